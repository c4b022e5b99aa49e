"""VQA accuracy: how many people gave the answer, after the VQA evaluation's rules (visualqa.org/evaluation)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mue.metrics.checks import check_references

ENOUGH = 3
"""People who must have given an answer for it to be right."""

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
# Without those that are words of their own once the apostrophe is gone: he'll, i'd, i'll, it's, let's, she'd, we'd, ...
_CONTRACTED = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he's
    here's how'd how'll how's i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock
    oughtn't shan't she's shouldn't shouldn't've should've that'd that'll that's there'd there're there's they'd
    they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'll who's who've why'll why's won't wouldn't wouldn't've would've y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
# Apostrophes and colons stay (girl's, 2:50 pm), and so do the signs that mean something: $ % & # *.
_TO_SPACE = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', " "))


def normalise_vqa(answer: str) -> str:
    """Normalise an answer.

    Lower case; commas between digits and periods dropped, but for decimal points; other punctuation a space; number
    words (and none) as digits; articles dropped; missing apostrophes of contractions put in. An answer of which
    nothing would be left ("a") stays.
    """
    text = " ".join(answer.lower().split())
    plain = re.sub(r"(?<=\d),(?=\d)", "", text)
    plain = re.sub(r"\.(?!\d)", "", plain).translate(_TO_SPACE)
    words = [_DIGITS.get(word, word) for word in plain.split() if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words) or text


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Score one answer: the mean over leave-one-out subsets of the people of ``min(people who gave it / 3, 1)``.

    With fewer than four people, all that are left are enough; a single answer is compared with. So what everybody says
    is always right. Both sides are normalised, as the rules say; the evaluation's code leaves articles and number words
    in the references, and normalises nothing where all agree.

    Args:
        prediction: the answer.
        references: one answer per person, the same answer as often as it was given.

    Returns:
        A number in [0, 1].
    """
    check_references(references)
    answer = normalise_vqa(prediction)
    people = len(references)
    agree = sum(normalise_vqa(reference) == answer for reference in references)
    if people == 1:
        return float(agree)
    enough = min(ENOUGH, people - 1)
    without_one_who_agrees, without_another = min((agree - 1) / enough, 1), min(agree / enough, 1)
    return (agree * without_one_who_agrees + (people - agree) * without_another) / people
