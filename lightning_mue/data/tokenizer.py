"""Small tokenizers, trained on the texts of the task at hand: byte-level BPE, and the pieces that UDOP reads."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
"""Their ids are 0 to 4, in this order."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE.

    Any text can be encoded, seen or not, and decodes to itself but for outer white space. A word is the same token
    at the start of a text and inside it (with room for the bytes alone there are no words, and every byte is a token).
    The same texts give the same tokenizer.

    Args:
        texts: what to learn from.
        vocab_size: most tokens it may have, special tokens and the 256 bytes included; fewer when the texts are few.

    Returns:
        The tokenizer as the JSON of the ``tokenizers`` package.

    Raises:
        ValueError: ``vocab_size`` cannot hold the bytes, or there is no text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"`vocab_size` must be at least {least} (special tokens and bytes), got {vocab_size}")
    lines = _lines(texts)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Strip()
    # The prefix space makes the first word of a text look like every other word.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=vocab_size > least)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


DIGITS = "0123456789"
PIECES = ("<pad>", "</s>", "<unk>")
"""Ids 0 to 2 of a tokenizer of pieces, as T5 has them."""


def train_pieces(texts: Iterable[str], vocab_size: int) -> str:
    """Trains pieces of words, as T5's and UDOP's tokenizers have them; each digit is a piece of its own.

    The pieces are BPE's and a word is cut into as few as will do, the commoner ones where there is a choice: the
    trainer of ``tokenizers`` for Unigram gives other pieces each time it runs.

    Args:
        texts: what to learn from; a letter that they lack is unknown, digits apart.
        vocab_size: most pieces, the special ones included.

    Returns:
        The tokenizer, a Unigram, as the JSON of the ``tokenizers`` package.

    Raises:
        ValueError: ``vocab_size`` cannot hold the letters, or there is no text.
    """
    lines = _lines(texts)
    letters = sorted({letter for line in lines for letter in line} - {" "} | {"▁", *DIGITS})
    if vocab_size < (least := len(PIECES) + len(letters)):
        raise ValueError(f"`vocab_size` must be at least {least} (special pieces and letters), got {vocab_size}")
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Digits(individual_digits=True)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(PIECES), initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(lines, trainer)
    in_order = sorted(trained.get_vocab().items(), key=lambda found: found[1])
    pieces = Tokenizer(models.Unigram([(piece, -1 - rank / len(in_order)) for piece, rank in in_order], unk_id=2))
    pieces.pre_tokenizer, pieces.decoder = words, decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return pieces.to_str()


def _lines(texts: Iterable[str]) -> list[str]:
    """Return the texts sorted, for what is trained depends on the set of them, not on the order of shards.

    Raises:
        ValueError: there is none.
    """
    lines = sorted(" ".join(text.split()) for text in texts)
    if not any(lines):
        raise ValueError("there is no text to train a tokenizer on: the training data holds no prompts and references")
    return lines
