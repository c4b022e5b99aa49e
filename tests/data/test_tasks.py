import hashlib

import pytest

from lightning_mue.data.tasks import STATEMENT_WORDS, make_samples, split_of


def test_vqa_asks_every_question():
    record = {
        "id": "p7",
        "qa": [{"text": "what  color ?", "refs": ["red"], "level": 2}, {"text": "where?", "refs": ["a", "b"]}],
    }
    first, second = make_samples(record, None, "vqa")
    assert (first.sample_id, first.cluster, first.prompt, first.references) == ("p7#q0", "p7", "what color ?", ["red"])
    assert (first.level, second.level, second.references, second.sample_id) == (2, 0, ["a", "b"], "p7#q1")


def test_statement_from_each_kind_of_record():
    nlvr = make_samples({"id": "train-1-0", "text": "There is a box.", "label": 0, "group": "1"}, None, "statement")
    assert [(s.prompt, s.references, s.cluster) for s in nlvr] == [
        ('does the picture show " There is a box " ?', ["no"], "group-1")
    ]
    flickr = make_samples({"id": "f", "refs": ["A dog .", "Dogs ."], "negatives": ["A cat ."]}, None, "statement")
    assert [(s.sample_id, s.references[0]) for s in flickr] == [("f#r0", "yes"), ("f#r1", "yes"), ("f#n0", "no")]
    scene = make_samples({"id": "s", "statements": [{"text": "x", "label": 2, "level": 4}]}, None, "statement")
    assert (scene[0].references, scene[0].level) == (["maybe"], 4)
    assert STATEMENT_WORDS == ("no", "yes", "maybe")


def test_a_statement_to_match_is_read_by_the_decoder():
    record = {"id": "f", "refs": ["A dog .", "Dogs"], "negatives": ["A cat ."]}
    made = make_samples(record, None, "match")
    assert [(s.sample_id, s.decoder_prompt, s.references) for s in made] == [
        ("f#r0", "A dog", ["yes"]),
        ("f#r1", "Dogs", ["yes"]),
        ("f#n0", "A cat", ["no"]),
    ]
    assert {s.prompt for s in made} == {s.prompt for s in make_samples(record, None, "caption")}
    assert {s.decoder_prompt for task in ("statement", "caption") for s in make_samples(record, None, task)} == {""}


def test_caption_and_reading():
    (caption,) = make_samples({"id": "c", "refs": ["one .", "two ."]}, None, "caption")
    assert caption.references == ["one .", "two ."]
    (line,) = make_samples({"id": "receipt-000-07", "refs": ["TOTAL 9.00"]}, None, "reading")
    assert (line.cluster, line.references, line.prompt) == ("receipt-000", ["TOTAL 9.00"], "what is written ?")


def test_a_document_is_asked_about_with_its_words():
    words = [{"text": "TOTAL  9.00", "box": [10, 20, 30, 40]}, {"text": " ", "box": [0, 0, 0, 0]}]
    record = {"id": "d", "words": words, "qa": [{"text": "how much ?", "refs": ["9.00"]}] * 2}
    first, second = make_samples(record, None, "document")
    assert first.words == second.words == (("TOTAL 9.00", (10, 20, 30, 40)),)
    (asked,) = {(s.prompt, s.cluster) for s in (first, second)}
    assert asked == ("how much ?", "d")
    assert make_samples(record, None, "vqa")[0].words == ()


PAGE = {"id": "p1", "qa": [{"text": "a", "refs": ["a"]}]}


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        (PAGE, "document", "'p1'.*'words' is missing"),
        (PAGE | {"words": []}, "document", "'p1'.*no words"),
        (PAGE | {"words": [{"text": "a"}]}, "document", "'p1'.*`text` and `box`"),
        (PAGE | {"words": [{"text": "a", "box": [1, 2, 3]}]}, "document", "'p1'.*'a' must be 4 numbers"),
        (PAGE | {"words": [{"text": "a", "box": [9, 0, 1, 1]}]}, "document", "'p1'.*'a' must be left.*thousandths"),
        ({"id": "p1", "refs": ["a", " "]}, "caption", "'p1'.*c0 is empty"),
        ({"id": "p1", "refs": []}, "caption", "'p1'.*no reference"),
        ({"id": "p1", "qa": [{"text": "", "refs": ["a"]}]}, "vqa", "'p1'.*q0 is empty"),
        ({"id": "p1", "qa": []}, "vqa", "'p1'.*nothing to ask"),
        ({"id": "p1", "qa": [{"text": "a"}]}, "vqa", "'p1'.*'refs' is missing"),
        ({"id": "p1", "refs": ["a"]}, "vqa", "'p1'.*'qa' is missing"),
        ({"id": "p1", "qa": 3}, "vqa", "'p1'.*wrong form"),
        ({"id": "p1", "text": "a", "label": 7}, "statement", "'p1'.*label.*7"),
        ({"refs": ["a"]}, "caption", "`id`"),
        ({"id": "p1", "refs": ["a"]}, "captions", "`task` must be one of"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(record, task, message):
    with pytest.raises(ValueError, match=message):
        make_samples(record, None, task)


def test_split_of_is_sha256_of_the_key():
    for key in ("a", "b", "picture-12"):
        point = int(hashlib.sha256(f"salt\n{key}".encode()).hexdigest()[:12], 16) / 16**12
        assert split_of(key, {"x": 0.3, "y": 0.7}, "salt") == ("x" if point < 0.3 else "y")


def test_split_of_keeps_the_shares_and_salts_are_independent():
    keys = [str(k) for k in range(4000)]
    first = [split_of(k, {"x": 0.3, "y": 0.7}, "one") == "x" for k in keys]
    second = [split_of(k, {"x": 0.3, "y": 0.7}, "two") == "x" for k in keys]
    both = [a and b for a, b in zip(first, second, strict=True)]
    for hits, share in ((first, 0.3), (second, 0.3), (both, 0.09)):
        assert abs(sum(hits) / 4000 - share) < 0.03
    assert {split_of(k, {"x": 0.0, "y": 1.0}, "s") for k in keys} == {"y"}
    with pytest.raises(ValueError, match="add up to 1"):
        split_of("a", {"x": 0.5}, "s")
