"""Captions as tokens and n-grams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_FUSED = {
    "cannot": "can not",
    "gimme": "gim me",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "wanna": "wan na",
}
# Whatever no line of this matches is dropped.
_TOKEN = re.compile(
    r"""
      [^\W\d_](?:\.[^\W\d_])*\.(?!\w)                     # u.s., p.m.
    | (?:mr|mrs|ms|dr|st|jr|sr)\.
    | (?:n't|'(?:s|m|d|re|ve|ll))(?!\w)                   # what _CLITIC split off
    | \w+(?:(?:[-'./]|(?<=\d)[,:](?=\d))\w+)*             # t-shirt, o'clock, black/white, 3,000, 12:30
    | [^\w\s.,:;?!'"`()\[\]{}\u2026\u2013\u2014-]         # &, %, $
    """,
    re.VERBOSE,
)


def tokenise_caption(text: str) -> str:
    """Return a caption as tokens joined by single spaces, after the rules of COCO's caption evaluation.

    Lower case; full stops, commas, colons, quotes, dashes and the like dropped, hyphens and points inside words kept,
    clitics split off ("does n't", "dog 's"), other symbols tokens of their own. Tokenised captions stay as they are.

    COCO uses the Java PTBTokenizer. It differs in what captions rarely hold: it writes brackets as tokens ("-lrb-"),
    where they are dropped here; it keeps clusters such as "?!", the apostrophe of "'50s" and the sign of "-5", knows
    more abbreviations ("no. 7") and e-mail addresses as one token, and splits rarer contractions ("y' all", "'t is",
    "1.5 m").
    """
    tokens = _TOKEN.findall(_CLITIC.sub(r" \1", text.lower().translate(_STRAIGHT)))
    return " ".join(_FUSED.get(token, token) for token in tokens)


def ngrams(words: Sequence[str], order: int) -> Counter[str]:
    """Count the n-grams of one order, each its words joined by a space."""
    return Counter(" ".join(words[i : i + order]) for i in range(len(words) - order + 1))
