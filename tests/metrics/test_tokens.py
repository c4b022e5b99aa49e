from collections import Counter

import pytest

from lightning_mue.metrics import tokenise_caption
from lightning_mue.metrics.tokens import ngrams
from tests.metrics.captions import corpus

# What COCO's evaluation (Stanford PTBTokenizer 3.4.1, then its list of punctuation) makes of these texts.
PTB = [
    ("A dog doesn't run, it's the man's ball.", "a dog does n't run it 's the man 's ball"),
    ("The dogs' toys can't be seen", "the dogs toys ca n't be seen"),
    ("I cannot gonna wanna", "i can not gon na wan na"),
    ("a well-known t-shirt - and -- more ... end", "a well-known t-shirt and more end"),
    ("He said \"hello\" and 'bye'.", "he said hello and bye"),
    ("colour grey theatre", "colour grey theatre"),
    ("black/white w/ a dog", "black/white w / a dog"),
    ("Mr. Smith lives in the U.S. now at 5 p.m.", "mr. smith lives in the u.s. now at 5 p.m."),
    ("3,000 people paid $5.50 & 50% @ #1", "3,000 people paid $ 5.50 & 50 % @ # 1"),
    ("a man ,a woman .The end", "a man a woman the end"),
    ("it is 12:30; yes!", "it is 12:30 yes"),
    ("he'll we've I'd I'm they're", "he 'll we 've i 'd i 'm they 're"),
    ("A caf\u00e9\u2019s \u201csmart\u201d \u2013 quotes \u2014 em\u2026 x", "a caf\u00e9 's smart quotes em x"),
    ("dog.Cat runs", "dog.cat runs"),
    ("", ""),
    ("a b  c\td", "a b c d"),
    ("wo n't do n't ca n't dog 's", "wo n't do n't ca n't dog 's"),
    ("U.S.A", "u.s.a"),
    ("a dog... TV.", "a dog tv"),
    ("9th 1990's", "9th 1990 's"),
    ("Ben & Jerry's a\\b a+b x=y", "ben & jerry 's a \\ b a + b x = y"),
    ("cats, dogs,and birds", "cats dogs and birds"),
    ("o'neil O'Brien o'clock ma'am", "o'neil o'brien o'clock ma'am"),
    ("man- woman man -woman a--b", "man woman man woman a b"),
    ("5-year-old it:s a;b no? yes", "5-year-old it s a b no yes"),
    ("cat's-eye isn't-it shouldn't've", "cat 's eye is n't it should n't 've"),
    ("black/white/red 24/7 *star*", "black/white/red 24/7 * star *"),
]
OTHERWISE = [("a (small) [box]", "a small box"), ("hello?! what??", "hello what"), ("the '50s", "the 50s")]


@pytest.mark.parametrize(("text", "expected"), PTB + OTHERWISE)
def test_tokens(text, expected):
    assert tokenise_caption(text) == expected


def test_tokenised_captions_stay():
    predictions, references = corpus(0)
    for text in [*predictions, *(text for refs in references for text in refs), *(tokens for _, tokens in PTB)]:
        assert tokenise_caption(text) == text


def test_ngrams():
    assert ngrams(["a", "b", "a", "b"], 2) == Counter({"a b": 2, "b a": 1})
    assert ngrams(["a", "b"], 3) == Counter()
