"""A small byte-level BPE tokenizer, trained on the texts of the task at hand."""

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
    # Sorted and counted once: the result depends on the set of lines, not on the order in which shards were read.
    lines = sorted(" ".join(text.split()) for text in texts)
    if not any(lines):
        raise ValueError("there is no text to train a tokenizer on: the training data holds no prompts and references")
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
