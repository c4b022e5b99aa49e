"""Captions as people might write them, tokenised, and the cases at the edge."""

import random

NOUNS = ["dog", "man", "woman", "boy", "girl", "cat", "ball", "t-shirt", "bike"]
ADJECTIVES = ["small", "brown", "white", "young", "black-and-white", "happy"]
VERBS = ["runs", "jumps", "is standing", "plays", "is looking"]
PLACES = ["in the grass", "on a beach", "over a log", "in front of a crowd", "near the water", "", "at 12:30"]

EDGES = [
    ("", ["a dog runs", "the dog"]),
    ("dog", ["a dog runs in the grass", "a brown dog runs"]),
    ("a dog", ["a dog"]),
    ("a a a a a a a a", ["a dog and a cat and a ball", "a a"]),
    ("the dog the dog the dog the dog", ["the dog runs"]),
    ("a brown dog runs in the grass", ["a brown dog runs in the grass", "a cat"]),
    ("zebra giraffe quokka", ["a dog runs", "two dogs"]),
    ("a b c d e", ["a b c d e f", "a b c d"]),  # two references equally close in length
    ("a dog", ["a very long reference " * 5, ""]),
    ("a dog runs in the grass " * 6, ["dog"]),
]


def caption(draw):
    words = ["a", draw.choice(ADJECTIVES), draw.choice(NOUNS), draw.choice(VERBS), draw.choice(PLACES)]
    if draw.random() < 0.3:
        words += ["and the", draw.choice(NOUNS), draw.choice(VERBS)]
    return " ".join(" ".join(w for w in words if w and draw.random() < 0.9).split())


def corpus(seed, size=30, edges=True):
    """Predictions, and lists of one to five references; some predictions are references, some mix two."""
    draw = random.Random(seed)
    predictions, references = [], []
    for _ in range(size):
        accepted = [caption(draw) or "dog" for _ in range(draw.randint(1, 5))]
        mixed = " ".join(draw.sample(accepted[0].split(), len(accepted[0].split())))
        predictions.append(draw.choice([caption(draw), accepted[-1], mixed]))
        references.append(accepted)
    for prediction, accepted in EDGES if edges else []:
        predictions.append(" ".join(prediction.split()))
        references.append([" ".join(text.split()) for text in accepted])
    return predictions, references


def for_coco(predictions, references):
    """The two mappings pycocoevalcap asks for."""
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
