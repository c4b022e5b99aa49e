import json
import math

import pytest

from lightning_mue.policy import Certificate, ExitPolicy, ExitRule, chain_hash


def example():
    certificate = Certificate("certified", "accuracy", 0.98, 0.95, n=900, clusters=800, p_value=0.03, method="betting")
    rules = {
        "vision": ExitRule.static(3),
        "decoder": ExitRule("gate", (1, 2, 4), (0.25, math.inf, 1.0)),
    }
    return ExitPolicy(rules, fingerprint="abc", certificate=certificate)


def test_round_trip(tmp_path):
    policy = example()
    policy.save(tmp_path / "deep" / "policy.json")
    assert ExitPolicy.load(tmp_path / "deep" / "policy.json") == policy
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["policy.json"]  # nothing half-written is left
    assert ExitPolicy.from_json(ExitPolicy.full_depth().to_json()).is_full_depth


def test_equal_policies_have_equal_bytes():
    rules = example().rules
    turned = ExitPolicy(dict(reversed(list(rules.items()))), fingerprint="abc", certificate=example().certificate)
    assert turned.to_json() == example().to_json()
    assert "Infinity" not in example().to_json()
    assert chain_hash([example(), ExitPolicy()]) != chain_hash([ExitPolicy(), example()])


@pytest.mark.parametrize(
    ("signal", "threshold", "bounds"),
    [
        ("gate", 1.3, r"\[0, 1\]"),
        ("gate", -0.1, r"\[0, 1\]"),
        ("similarity", -1.5, r"\[-1, 1\]"),
        ("gate", math.nan, ""),
    ],
)
def test_threshold_out_of_range_is_refused(signal, threshold, bounds):
    with pytest.raises(ValueError, match=rf"`thresholds\['decoder'\]` must lie in {bounds}.*got {threshold:g}"):
        ExitPolicy({"decoder": ExitRule(signal, (1,), (threshold,))})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", (1,), (0.5,)), "`signal` must be one of"),
        (("gate", (1, 2), (0.5,)), "equal, non-zero length, got 2 and 1"),
        (("gate", (), ()), "non-zero length"),
        (("gate", (2, 1), (0.5, 0.5)), "must rise"),
        (("gate", (0, 1), (0.5, 0.5)), "start at 1"),
    ],
)
def test_rules_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitRule(*arguments)


def test_unknown_cache_fill_is_refused():
    with pytest.raises(ValueError, match=r"`kv_fill` must be one of .*got 'copy'"):
        ExitPolicy(kv_fill="copy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (example().to_json()[:200], "mine.json is not JSON"),
        ("", "mine.json is not JSON"),
        ("[1]", "must be a policy of schema 1, found 'list'"),
        ('{"schema": 2}', "must be a policy of schema 1, found 2"),
        ('{"schema": 1, "streams": {}}', "mine.json must be a policy; an entry is missing"),
        (example().to_json().replace('"p_value"', '"q_value"'), "mine.json must be a policy"),
    ],
)
def test_truncated_or_foreign_files_are_refused(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ExitPolicy.load(tmp_path / "mine.json")


def test_a_threshold_out_of_range_in_a_file_is_refused():
    data = json.loads(example().to_json())
    data["rules"]["decoder"]["thresholds"][0] = 1.3
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] for signal 'gate' .*got 1.3"):
        ExitPolicy.from_json(json.dumps(data))


def test_words():
    assert example().depths_in_words() == "decoder: gate at 1, 4; vision: static 3"
    assert ExitPolicy.full_depth().depths_in_words() == "full depth"
    text = example().certificate.in_words()
    assert "With 95% confidence" in text
    assert "keeps at least 98.0% of the full-depth accuracy" in text
    assert "n = 900 samples in 800 clusters" in text
    assert "same" not in Certificate("full depth", "consistency", 0.98, 0.95, note="Too few.").in_words()
