import pytest
from tokenizers import Tokenizer

from lightning_mue.data.tokenizer import PIECES, SPECIAL_TOKENS, train_pieces, train_tokenizer

TEXTS = [
    "a red circle , a blue square",
    "what is left of the red circle ?",
    "red",
    'does the picture show " a red one " ?',
] * 4


def test_special_tokens_come_first():
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 320))
    assert [tokenizer.id_to_token(k) for k in range(5)] == list(SPECIAL_TOKENS)
    assert 261 < tokenizer.get_vocab_size() <= 320


def test_a_word_is_the_same_token_everywhere():
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 400))
    first, inside, after = (tokenizer.encode(t).ids for t in ("red circle", "a red circle", "<image><image>red circle"))
    assert len(first) == 2
    assert inside[1:] == first
    assert after == [4, 4, *first]
    assert tokenizer.encode("  red circle ").ids == first


@pytest.mark.parametrize("text", ["a red circle", "Ünseen wörds 漢字 \x07", "NO.53 55,57 & 59, JALAN", "a < s > b"])
def test_any_text_comes_back(text):
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 300))
    ids = tokenizer.encode(text).ids
    assert 3 not in ids
    assert tokenizer.decode(ids).strip() == text


def test_the_same_texts_give_the_same_tokenizer_in_any_order():
    assert train_tokenizer(TEXTS, 350) == train_tokenizer(iter(TEXTS[::-1]), 350)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"at least 261.*got 260"):
        train_tokenizer(TEXTS, 260)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 300)


def test_pieces_are_few_and_digits_stand_alone():
    tokenizer = Tokenizer.from_str(train_pieces([*TEXTS, "1999 10-12"], 90))
    assert [tokenizer.id_to_token(k) for k in range(3)] == list(PIECES)
    assert tokenizer.encode("a red circle").tokens == ["▁a", "▁red", "▁circle"]
    assert tokenizer.encode("1999").tokens == ["▁", "1", "9", "9", "9"]
    assert tokenizer.decode(tokenizer.encode("a blue 91-2 left").ids) == "a blue 91-2 left"


def test_the_same_texts_give_the_same_pieces_in_any_order():
    assert train_pieces(TEXTS, 60) == train_pieces(iter(TEXTS[::-1]), 60)


def test_pieces_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match=r"at least 17 .*got 16"):
        train_pieces(["abc"], 16)
    with pytest.raises(ValueError, match="no text"):
        train_pieces([], 300)
