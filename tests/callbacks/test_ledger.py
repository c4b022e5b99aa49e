import pytest

from lightning_mue.callbacks.ledger import Entry, Ledger


def entry(question, fingerprint="abc", clusters=("a", "b")):
    return Entry.of(clusters, fingerprint, question, 0.05)


def questions(entries):
    return [e.question for e in entries]


FIRST, SECOND, THIRD = entry("first"), entry("second"), entry("third")


def test_another_question_to_the_same_samples_is_refused_or_spends(tmp_path):
    path = tmp_path / "ledger.json"
    assert Ledger(path).enter(FIRST, "refuse") == []
    with pytest.raises(ValueError, match=r"tested 1 other chain.*not yet used, or `--reuse spend`"):
        Ledger(path).enter(SECOND, "refuse")
    assert Ledger(path).enter(FIRST, "refuse") == []  # the same question has the same answer
    assert questions(Ledger(path).enter(SECOND, "spend")) == questions([FIRST])
    assert questions(Ledger(path).enter(THIRD, "spend")) == questions([FIRST, SECOND])
    assert questions(Ledger(path).enter(SECOND, "refuse")) == questions([FIRST])  # as it was spent before


def test_one_shared_cluster_is_reuse(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger(path).enter(FIRST, "refuse")
    assert Ledger(path).enter(entry("second", clusters=("c", "d")), "refuse") == []
    with pytest.raises(ValueError, match="tested 2 other chain"):
        Ledger(path).enter(entry("third", clusters=("b", "c")), "refuse")
    with pytest.raises(ValueError, match="tested 1 other chain"):
        Ledger(path).enter(entry("first", clusters=("a", "b", "x")), "refuse")  # the same question, of more samples


def test_other_weights_are_counted(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger(path).enter(FIRST, "refuse")
    assert Ledger(path).enter(entry("second", "def"), "refuse") == []
    assert Ledger(path).other_weights(entry("second", "def")) == 1
    assert Ledger(path).other_weights(entry("third", "ghi")) == 2
    assert Ledger(path).other_weights(entry("third", "ghi", ("z",))) == 0


def test_what_was_asked_before_any_result_was_seen_is_no_reuse(tmp_path):
    one, two = Ledger(tmp_path / "ledger.json"), Ledger(tmp_path / "ledger.json")
    assert one.enter(FIRST, "refuse") == []
    assert two.enter(SECOND, "refuse") == []  # asked beside it, not after it
    assert Ledger(tmp_path / "ledger.json").enter(SECOND, "refuse") == []  # nor when both are asked again
    assert Ledger(tmp_path / "ledger.json").enter(FIRST, "refuse") == []


def test_no_more_is_spent_than_there_is(tmp_path):
    for k in range(19):
        Ledger(tmp_path / "ledger.json").enter(entry(str(k)), "spend")
    with pytest.raises(ValueError, match="19 tests on these samples have spent all confidence"):
        Ledger(tmp_path / "ledger.json").enter(entry("last"), "spend")


def test_a_ledger_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path):
    for text in ("[{", '[{"who": 1}]', '["x"]'):
        (tmp_path / "ledger.json").write_text(text)
        with pytest.raises(ValueError, match="must list the tests made on this data, and cannot be read"):
            Ledger(tmp_path / "ledger.json")
