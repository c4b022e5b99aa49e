import json
import math

import pytest

from lightning_mue.policy import ExitPolicy, ExitRule, chain_hash
from tests.promises import certificate


def example():
    rules = {
        "vision": ExitRule.static(3),
        "decoder": ExitRule("gate", (1, 2, 4), (0.25, math.inf, 1.0)),
    }
    return ExitPolicy(rules, fingerprint="abc", certificate=certificate())


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
        ("entropy", 1.1, r"\[0, 1\]"),
        ("flat_similarity", -1.1, r"\[-1, 1\]"),
        ("patience", 0.5, r"\[1, inf\]"),
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
    with pytest.raises(ValueError, match=r"`kv_fill` must be one of .*got 'holes'"):
        ExitPolicy(kv_fill="holes")


def papers():
    """A rule as MuE's paper has it, and K/V as CALM has them."""
    rule = ExitRule("patience", (1, 2, 4), (math.inf, 2, 3), decay=(1, 4), from_step=3)
    return ExitPolicy({"decoder": rule, "image": ExitRule("flat_similarity", (2,), (0.99,))}, "propagate", 2)


def test_comparison_modes_round_trip():
    again = ExitPolicy.from_json(papers().to_json())
    assert again == papers()
    assert again.to_json() == papers().to_json()
    assert (again.kv_fill, again.backlog) == ("propagate", 2)
    assert (again.rules["decoder"].decay, again.rules["decoder"].from_step) == ((1.0, 4.0), 3)
    assert (again.rules["image"].decay, again.rules["image"].from_step) == (None, 0)


def test_a_file_without_the_newer_fields_still_reads():
    data = json.loads(example().to_json())
    del data["backlog"]
    for rule in data["rules"].values():
        del rule["decay"], rule["from_step"]
    assert ExitPolicy.from_json(json.dumps(data)) == example()


def test_thresholds_fall_with_the_step():
    rule = ExitRule("confidence", (1, 2, 3), (0.5, math.inf, 0.9), decay=(0.9, 4.0))
    # CALM, equation 5: 0.9 threshold + 0.1 exp(-4 t / N), with N = 20
    for step, rise in {0: 0.1, 5: 0.1 * 0.36787944, 20: 0.1 * 0.01831564}.items():
        found = rule.thresholds_at(step, 20)
        assert list(found) == [1, 3]
        assert list(found.values()) == pytest.approx([0.45 + rise, 0.81 + rise])
    plain = ExitRule("confidence", (1, 2, 3), (0.5, math.inf, 0.9), from_step=3)
    assert [plain.thresholds_at(step, 20) for step in (0, 2, 3, 19)] == [{}, {}, {1: 0.5, 3: 0.9}, {1: 0.5, 3: 0.9}]
    late = ExitRule("confidence", (1,), (0.5,), decay=(0.9, 4.0), from_step=5)
    assert late.thresholds_at(4, 20) == {}
    assert late.thresholds_at(5, 20) == pytest.approx({1: 0.45 + 0.1 * 0.36787944})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"decay": (1.1, 1.0)}, r"`decay` must be \(beta in \[0, 1\], tau >= 0\), got \(1.1, 1.0\)"),
        ({"decay": (0.9, -1)}, r"`decay` must be .*got \(0.9, -1.0\)"),
        ({"decay": (0.9, math.inf)}, "`decay` must be"),
        ({"decay": (math.nan, 1)}, "`decay` must be"),
        ({"decay": (0.9,)}, r"`decay` must be .*got \(0.9,\)"),
        ({"decay": (0.9, 1, 2)}, r"`decay` must be .*got \(0.9, 1.0, 2.0\)"),
        ({"from_step": -1}, "`from_step` must be 0 or more, got -1"),
    ],
)
def test_steps_that_mean_nothing_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        ExitRule("gate", (1,), (0.5,), **more)


@pytest.mark.parametrize("more", [{"decay": (0.9, 1.0)}, {"from_step": 2}])
@pytest.mark.parametrize("stream", ["vision", "encoder", "image", "text"])
def test_only_the_decoder_counts_steps(more, stream):
    rule = ExitRule("gate", (1,), (0.5,), **more)
    with pytest.raises(ValueError, match=f"count decoding steps; '{stream}' is left once per sample"):
        ExitPolicy({"decoder": rule, stream: rule})


@pytest.mark.parametrize(("fill", "backlog"), [("just-in-time", 1), ("copy", -1), ("propagate", -2)])
def test_a_backlog_that_means_nothing_is_refused(fill, backlog):
    with pytest.raises(ValueError, match=f"`backlog` bounds .*got {backlog} with '{fill}'"):
        ExitPolicy(kv_fill=fill, backlog=backlog)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (example().to_json()[:200], "mine.json is not JSON"),
        ("", "mine.json is not JSON"),
        ("[1]", "must be a policy of schema 2, found 'list'"),
        ('{"schema": 1}', "must be a policy of schema 2, found 1"),
        ('{"schema": 2, "streams": {}}', "mine.json must be a policy; an entry is missing"),
        (example().to_json().replace('"p_value"', '"q_value"'), "mine.json must be a policy"),
        (example().to_json().replace('"from_step": 0', '"from_step": "soon"'), "mine.json must be a policy"),
        (example().to_json().replace('"decay": null', '"decay": [0.9]'), r"`decay` must be .*got \(0.9,\)"),
        (example().to_json().replace('"decay": null', '"decay": 0.9'), "mine.json must be a policy"),
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
    assert (
        papers().depths_in_words() == "decoder: patience at 2, 4; image: flat_similarity at 2; K/V: propagate beyond 2"
    )
    text = example().certificate.in_words()
    assert "With 95% confidence" in text
    assert "keeps at least 98.0% of the full-depth accuracy" in text
    assert "n = 900 samples in 300 clusters" in text
    assert "same" not in certificate("full depth", "consistency", note="Too few.").in_words()
