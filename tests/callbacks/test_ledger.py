import pytest

from lightning_mue.callbacks.ledger import Entry, Ledger


def entry(question, fingerprint="abc", samples="x"):
    return Entry(samples, fingerprint, question, 0.05)


def test_another_question_to_the_same_samples_is_refused_or_spends(tmp_path):
    path = tmp_path / "ledger.json"
    assert Ledger(path).enter(entry("first"), "refuse") == []
    with pytest.raises(ValueError, match=r"tested 1 other chain.*not yet used, or set `reuse: spend`"):
        Ledger(path).enter(entry("second"), "refuse")
    assert Ledger(path).enter(entry("first"), "refuse") == []  # the same question has the same answer
    assert Ledger(path).enter(entry("second"), "spend") == [entry("first")]
    assert Ledger(path).enter(entry("third"), "spend") == [entry("first"), entry("second")]
    assert Ledger(path).enter(entry("second"), "refuse") == [entry("first")]  # as it was spent before


def test_other_samples_are_free_and_other_weights_are_counted(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger(path).enter(entry("first"), "refuse")
    assert Ledger(path).enter(entry("second", samples="y"), "refuse") == []
    assert Ledger(path).enter(entry("second", "def"), "refuse") == []
    assert Ledger(path).other_weights(entry("second", "def")) == 1
    assert Ledger(path).other_weights(entry("third", "ghi")) == 2


def test_what_was_asked_before_any_result_was_seen_is_no_reuse(tmp_path):
    one, two = Ledger(tmp_path / "ledger.json"), Ledger(tmp_path / "ledger.json")
    assert one.enter(entry("first"), "refuse") == []
    assert two.enter(entry("second"), "refuse") == []  # asked beside it, not after it
    assert [e.question for e in Ledger(tmp_path / "ledger.json")._before] == ["first", "second"]


def test_a_ledger_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path):
    for text in ("[{", '[{"who": 1}]', '["x"]'):
        (tmp_path / "ledger.json").write_text(text)
        with pytest.raises(ValueError, match="must list the tests made on this data, and cannot be read"):
            Ledger(tmp_path / "ledger.json")
