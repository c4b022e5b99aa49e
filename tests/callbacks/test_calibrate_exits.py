from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mue import CalibrateExits, ExitEngine, ExitPolicy, ExitRule, Promise, Trace
from lightning_mue.calibration import propose, rehearse
from lightning_mue.callbacks import decoding
from lightning_mue.callbacks.calibration import Calibration
from lightning_mue.callbacks.journal import Journal
from tests import zoo

from .conftest import SAMPLES, TOKENS, Foreign, Plain

FALLS = (None, (0.9, 4.0))


def calibrate(**options):
    quick = {"metric": "consistency", "keep": 0.5, "max_new_tokens": TOKENS, "latency_repeats": 1}
    return CalibrateExits(**(quick | options))


def test_consistency_needs_no_references_no_labels_and_no_data_module(module, make_loader, make_trainer, tmp_path):
    callback = calibrate(keep=0.05)
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    policy = ExitPolicy.load(tmp_path / "run" / "policy.json")
    certificate = policy.certificate
    assert policy.to_json() == callback.policy.to_json()
    assert certificate.evidence[0].score is None
    assert certificate.evidence[0].score_full_depth is None
    if certificate.kind == "certified":
        assert callback.tests
        assert certificate.evidence[0].n + len(callback.trace) == SAMPLES
    engine = ExitEngine(module.model, policy)  # the fingerprint is this model's
    assert engine.generate(TOKENS, **next(iter(make_loader(2)))).sequences.shape[0] == 2


def test_inside_fit_it_simulates_logs_and_promises_nothing(module, make_loader, make_trainer, tmp_path):
    callback, keep = calibrate(fit_samples=24), ModelCheckpoint(tmp_path / "ckpt", "one")
    trainer = make_trainer(callback, keep, enable_checkpointing=True, num_sanity_val_steps=2)
    seen = []
    check = L.pytorch.callbacks.LambdaCallback(
        on_sanity_check_end=lambda *_: seen.append((callback.calibration, (tmp_path / "run" / "calibration").exists()))
    )
    trainer.callbacks.append(check)
    trainer.fit(module, make_loader(24), make_loader())
    assert seen == [(None, False)]  # nothing happens in the sanity check
    assert trainer.callback_metrics["exits/simulated_speedup"] >= 1
    for stream, layers in (("vision", 4), ("encoder", 4), ("decoder", 5)):
        assert 1 <= trainer.callback_metrics[f"exits/simulated_depth_{stream}"] <= layers
    assert len(callback.trace) == 24
    assert callback.policy.certificate.kind == "uncertified"
    assert "no promise" in callback.policy.certificate.in_words()
    assert not (tmp_path / "run" / "policy.json").exists()
    # The policy travels in the checkpoint, as text.
    saved = torch.load(tmp_path / "ckpt" / "one.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert ExitPolicy.from_json(saved["policy"]) == callback.policy
    again = calibrate(fit_samples=0)
    make_trainer(again, max_steps=3).fit(module, make_loader(24), ckpt_path=tmp_path / "ckpt" / "one.ckpt")
    assert again.policy == callback.policy


def test_without_fit_samples_fit_is_left_alone(module, make_loader, make_trainer, tmp_path):
    callback = calibrate()
    trainer = make_trainer(callback, num_sanity_val_steps=1)
    trainer.fit(module, make_loader(24), make_loader(24))
    assert callback.policy is None
    assert callback.state_dict() == {}
    assert not (tmp_path / "run" / "calibration").exists()


def test_two_at_once_need_two_files(module, make_loader, make_trainer, tmp_path):
    names = {keep: str(tmp_path / f"{keep}.json") for keep in (0.5, 0.3)}
    two = [calibrate(keep=keep, out=out) for keep, out in names.items()]
    make_trainer(*two).validate(module, make_loader(), verbose=False)
    for keep, out in names.items():
        assert ExitPolicy.load(out).certificate.promise.keep == keep
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(calibrate(keep=0.5), calibrate(keep=0.3))


def test_two_at_once_stopped_between_them_go_on(module, make_loader, make_trainer, tmp_path, monkeypatch):
    """The second was not chosen by the first one's result, though it is tested after that."""
    how = {0.05: str(tmp_path / "a.json"), 0.04: str(tmp_path / "b.json")}

    def two():
        return [calibrate(keep=keep, out=out) for keep, out in how.items()]

    whole, saved = two(), ExitPolicy.save
    with monkeypatch.context() as patch:

        def stop(self, path):
            saved(self, path)
            raise KeyboardInterrupt

        patch.setattr(ExitPolicy, "save", stop)
        with pytest.raises(BaseException):  # noqa: B017, PT011  # Lightning leaves by SystemExit or what it was given
            make_trainer(*two()).validate(module, make_loader(), verbose=False)
    assert not (tmp_path / "b.json").exists()
    with pytest.raises(ValueError, match="have tested 1 other chain"):  # it alone may have been chosen since
        make_trainer(calibrate(keep=0.03)).validate(module, make_loader(), verbose=False)
    make_trainer(*whole).validate(module, make_loader(), verbose=False)
    assert [cb.policy.certificate.confidence_level for cb in whole] == [0.95, 0.95]


def test_the_state_key_holds_nothing_that_is_tuned():
    one = calibrate(out="a.json")
    other = calibrate(out="a.json", keep=0.9, confidence_level=0.8, fit_samples=3, latency_repeats=7, seed=4)
    assert one.state_key == other.state_key != calibrate(out="b.json").state_key


def test_only_the_batches_that_validation_sees_certify(module, make_loader, make_trainer, monkeypatch):
    decoded = []
    plain = decoding.SplitDecoder._decode
    monkeypatch.setattr(decoding.SplitDecoder, "_decode", lambda *a: decoded.extend(a[2]["sample_id"]) or plain(*a))
    callback = calibrate(keep=0.05)
    make_trainer(callback, limit_val_batches=3).validate(module, make_loader(), verbose=False)
    assert decoded
    assert {int(name[1:]) for name in decoded} <= set(range(36))


def test_several_loaders(module, make_loader, make_trainer):
    callback = calibrate(keep=0.05)
    loaders = [make_loader(36), make_loader(24, 1, "t")]
    make_trainer(callback).validate(module, loaders, verbose=False)
    names = {*callback.calibration.decoders["certify"](ExitPolicy.full_depth()).sample_ids, *callback.trace.sample_ids}
    assert len(names) == 60


def test_with_a_progress_bar(module, make_loader, make_trainer):
    callback = calibrate(keep=0.05)
    make_trainer(callback, enable_progress_bar=True).validate(module, make_loader(), verbose=False)
    assert callback.policy is not None


def test_data_that_may_have_chosen_the_checkpoint_is_named(module, make_loader, make_trainer):
    callback = calibrate(keep=0.05)
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    assert "selection_reused" in callback.policy.certificate.note  # a foreign loader says nothing of its history
    assert callback.policy.certificate.decode["precision"] == "float32"


def test_the_chain_is_rehearsed_before_any_other_sample_is_decoded(module, make_loader, make_trainer, monkeypatch):
    """First the samples of the trace alone, then the others; the chain tested is the one that rehearsing gives."""
    decoded = []
    plain = decoding.SplitDecoder._decode
    monkeypatch.setattr(decoding.SplitDecoder, "_decode", lambda *a: decoded.append(a[2]["sample_id"]) or plain(*a))
    callback = calibrate(keep=0.05, lower_precision=[])
    trainer = make_trainer(callback)
    trainer.validate(module, make_loader(), verbose=False)
    proposed = set(callback.trace.sample_ids)
    uses = [bool(proposed & set(names)) for names in decoded]
    assert uses == sorted(uses, reverse=True)
    assert any(uses)
    assert not all(uses)
    simulated = propose(callback.trace, callback.latency, [Promise("consistency", 0.05)])
    run = callback.calibration
    decoder = decoding.SplitDecoder(
        trainer, module.model, run.subject.scoring, None, run.journal, callback.keys, "propose"
    )
    decoder(ExitPolicy.full_depth())
    again = rehearse(simulated, callback.trace, decoder)
    assert callback.policy.certificate.chain_hash == again.chain_hash


def test_several_promises_by_group(make_trainer, tmp_path, steady_clock):
    """Groups are read where they lie; those too small run at full depth, and the engine asks for the group."""

    class Grouped(Foreign):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"kind": "rare" if index % 20 == 0 else f"often{index % 2}"}

    promises = [Promise("consistency", keep=0.05), Promise("consistency", keep=0.02)]
    callback = calibrate(metric=None, promises=promises, group_by="kind", confidence_level=0.5)
    make_trainer(callback).validate(Plain(), DataLoader(Grouped(), 12), verbose=False)
    policy = ExitPolicy.load(tmp_path / "run" / "policy.json")
    assert {(e.promise, e.group) for e in policy.certificate.evidence} == {
        (promise, group) for promise in promises for group in ("often0", "often1")
    }
    assert "Groups too small to certify run at full depth: rare." in policy.certificate.note
    certified = {s for s, (_, group) in callback._certifies.items() if group != "rare"}
    assert set(callback.calibration.decoders["certify"](ExitPolicy.full_depth()).sample_ids) == certified
    assert policy.rules
    with pytest.raises(ValueError, match=r"leaves early for the groups \['often0', 'often1'\] alone"):
        ExitEngine(Plain().model, policy, check_fingerprint=False).generate(2, **zoo.inputs("florence2", 2))


def test_asking_again_is_noticed(module, make_loader, make_trainer):
    make_trainer(calibrate(keep=0.05)).validate(module, make_loader(), verbose=False)
    same = calibrate(keep=0.05)
    make_trainer(same).validate(module, make_loader(), verbose=False)
    assert same.policy.certificate.confidence_level == 0.95
    with pytest.raises(ValueError, match="Some of these samples have tested 1 other chain"):
        make_trainer(calibrate(keep=0.04)).validate(module, make_loader(), verbose=False)
    spends = calibrate(keep=0.04, reuse="spend")
    make_trainer(spends).validate(module, make_loader(), verbose=False)
    assert spends.policy.certificate.confidence_level == 0.9
    assert "1 other chain(s) were tested on them" in spends.policy.certificate.note


def test_nothing_is_spent_where_nothing_is_decoded(module, make_loader, make_trainer, tmp_path):
    short = calibrate(keep=0.999, estimate=False)
    make_trainer(short).validate(module, make_loader(), verbose=False)
    assert short.policy.certificate.kind == "full depth"
    assert not (tmp_path / "run" / "calibration" / "ledger.json").exists()
    make_trainer(calibrate(keep=0.05)).validate(module, make_loader(), verbose=False)  # so less is asked for


def test_other_decode_settings_are_another_question(module, make_loader, make_trainer):
    make_trainer(calibrate(keep=0.05)).validate(module, make_loader(), verbose=False)
    with pytest.raises(ValueError, match="Some of these samples have tested 1 other chain"):
        make_trainer(calibrate(keep=0.05, max_new_tokens=3)).validate(module, make_loader(), verbose=False)


@pytest.fixture
def fast_8_bits(monkeypatch):
    """Let 8 bits take half the time: on layers this small that depends on the machine, and on what runs beside."""
    measure = Calibration.measure

    def steady(self, one, repeats, precision=None):
        table, share = measure(self, one, repeats), 1.0 if precision is None else 0.5
        decoder = table.decoder
        less = {"cross_ms": share * decoder.cross_ms, "step_ms": share * decoder.step_ms}
        layer_ms = tuple(share * ms for ms in decoder.layer_ms)
        return replace(table, decoder=replace(decoder, layer_ms=layer_ms, **less))

    monkeypatch.setattr(Calibration, "measure", steady)


@pytest.mark.usefixtures("fast_8_bits")
def test_in_another_runtime_8_bits_compete(module, make_loader, make_trainer, tmp_path):
    """What was calibrated there is measured and decoded there, and served there unless asked otherwise."""
    callback = calibrate(keep=0.05, runtime="onnxruntime")
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    assert callback.policy.certificate.decode["runtime"] == callback.policy.runtime == "onnxruntime"
    candidates = [*callback.proposal.frontier, *callback.proposal.worth_decoding]
    assert {c.policy.precision for c in candidates} <= {None, "int8"}
    assert any(c.policy.precision == "int8" for c in callback.proposal.worth_decoding)
    engine = ExitEngine(module.model, ExitPolicy.load(tmp_path / "run" / "policy.json"))
    assert engine.runtime == "onnxruntime"
    batch = next(iter(make_loader(4)))
    expected = ExitEngine(module.model, replace(callback.policy, precision=None), runtime="torch")
    if callback.policy.precision is None:
        assert (
            engine.generate(TOKENS, **batch).sequences.tolist() == expected.generate(TOKENS, **batch).sequences.tolist()
        )


def test_what_was_tested_goes_to_the_logger(module, make_loader, make_trainer, steady_clock):
    callback = calibrate(keep=0.05)
    trainer = make_trainer(callback)
    trainer.validate(module, make_loader(), verbose=False)
    assert callback.policy.rules
    (found,) = callback.policy.certificate.evidence
    assert trainer.callback_metrics["exits/p_value"] == pytest.approx(found.p_value)
    assert trainer.callback_metrics["exits/kept_consistency"] == pytest.approx(found.kept)
    assert trainer.callback_metrics["exits/speedup"] > 1


def test_a_budget_instead_of_a_quality(module, make_loader, make_trainer):
    callback = calibrate(speedup=1.2, confidence_level=0.5)
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    (test,) = callback.tests
    assert test.candidate.ms <= callback.proposal.full_depth.ms / 1.2
    assert callback.policy.is_full_depth or callback.policy.rules == test.candidate.policy.rules
    assert callback.policy.certificate.kind == ("full depth" if callback.policy.is_full_depth else "certified")
    with pytest.raises(ValueError, match=r"No policy takes at most 1e-09 ms"):
        make_trainer(calibrate(latency_ms=1e-9)).validate(module, make_loader(), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency_ms": 1.0, "speedup": 2.0}, "The budget is `latency_ms` or `speedup`, above 0, got 1.0 and 2.0"),
        ({"speedup": 0}, "above 0, got None and 0"),
        ({"speedup": 2, "group_by": "kind"}, "nothing can be promised by group"),
        ({"promises": [Promise("consistency", keep=0.5)]}, "Give `promises`, or `keep` and `metric`"),
        ({"promises": [], "metric": None}, "`promises` is empty"),
        ({"confidence_level": 1}, r"`confidence_level` must lie in \(0, 1\)"),
    ],
)
def test_promises_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**options)


def test_what_a_decoders_exits_do_not_change_is_not_decoded_again(module, make_loader, make_trainer, monkeypatch):
    """The same results as by decoding every sample; and fewer samples decoded."""
    callback = calibrate(keep=0.05)
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    run = callback.calibration
    margins = [0.02, 0.1, 0.3]
    policies = [ExitPolicy({"decoder": ExitRule("margin", (1, 2), (m, m), fall)}) for m in margins for fall in FALLS]
    decoded = []
    plain = decoding.SplitDecoder._decode
    monkeypatch.setattr(decoding.SplitDecoder, "_decode", lambda *a: decoded.extend(a[2]["sample_id"]) or plain(*a))
    known = 0
    for split in ("propose", "certify"):
        trace = callback.trace
        if split == "certify":
            trace = Trace.merge([Trace.load(path) for path in run.decode((split, None, None, ()))])
        everything = decoding.SplitDecoder(
            run.subject.trainer,
            run.model,
            run.subject.scoring,
            TOKENS,
            Journal(run.journal.folder / "apart", {}),
            run.keys,
            split,
        )
        everything(ExitPolicy.full_depth())
        for policy in policies:
            expected, unchanged = everything(policy).in_order(), run._unchanged(policy, trace)
            known += len(unchanged)
            decoded.clear()
            found = run.decode((split, None, policy, unchanged)).in_order()
            assert sorted(decoded) == sorted(set(expected.sample_ids) - set(unchanged))
            assert list(found.sample_ids) == list(expected.sample_ids)
            assert (found.same == expected.same).all()
            assert set(unchanged) == {n for n, same in zip(expected.sample_ids, expected.same, strict=True) if same}
    assert known
    vision = ExitPolicy({"vision": ExitRule.static(2), "decoder": ExitRule.static(1)})
    for other in (vision, ExitPolicy({"decoder": ExitRule.static(1)}, precision="bfloat16"), ExitPolicy.full_depth()):
        assert run._unchanged(other, callback.trace) == []
