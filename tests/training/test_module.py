"""MultiExitModule under a Trainer."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mue.data import ShardsDataModule
from lightning_mue.exits import attached
from lightning_mue.training import MultiExitModule, Supervision
from lightning_mue.training import module as module_file
from lightning_mue.training import shortlist as shortlist_file
from lightning_mue.training.depths import Step, sample_step
from lightning_mue.training.supervised import ExitResult, Supervised
from tests import zoo
from tests.training.test_supervised import agreeable, reference_logits

FLAGS = {
    "weighting": "linear",
    "early_probability": 0.5,
    "early_after": 0.25,
    "gate_weight": 0.5,
    "gate_balance": False,
    "own_path": 0.5,
    "distill": 0.3,
    "distill_temperature": 2.0,
    "propagate": 0.5,
    "seed": 5,
}


def trainer(tmp_path, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=tmp_path, **(quiet | settings))


def batches(count, size=3):
    for seed in range(count):
        labels = torch.randint(5, 90, (size, 6), generator=torch.Generator().manual_seed(seed))
        labels[0, 4:] = -100
        yield {**zoo.inputs("florence2", size, seed), "labels": labels}


def loader(count):
    return DataLoader(list(batches(count)), batch_size=None)


def module_of(shortlist=0, gate=True, **settings):
    module = MultiExitModule(
        zoo.make("florence2", exits=False),
        {**zoo.BACKBONES["florence2"][2], "adapter_width": 8, "gate_width": 8, "gate": gate, "shortlist": shortlist},
        **settings,
    )
    with torch.no_grad():
        for parameter in module.exits.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.train()


def test_flags_are_hyper_parameters(tmp_path):
    module = module_of(shortlist=8, **FLAGS)
    assert module.supervision == Supervision(**FLAGS)
    assert module_of().supervision == Supervision()
    fit = trainer(tmp_path, max_steps=12, limit_val_batches=0)
    fit.fit(module, loader(12))
    assert {"train/loss", "train/gates", "train/distill", "train/loss_full_depth"} <= fit.callback_metrics.keys()
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = MultiExitModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.supervision == Supervision(**FLAGS)
    assert again.exits.config.shortlist == 8
    assert torch.equal(again.exits.shortlist, module.exits.shortlist)


def test_flags_are_what_the_steps_do(tmp_path, monkeypatch):
    """Nothing is drawn in the first quarter; thereafter what (seed, step) say."""
    seen, objective = [], module_file.objective
    monkeypatch.setattr(module_file, "objective", lambda *args: seen.append(args[-2:]) or objective(*args))
    module = module_of(**FLAGS)
    trainer(tmp_path, max_steps=16, limit_val_batches=0).fit(module, loader(16))
    assert {how for _, how in seen} == {Supervision(**FLAGS)}
    steps = [step for step, _ in seen]
    assert steps == [Step()] * 4 + [
        sample_step(Supervision(**FLAGS), module.exits.layers, k, 1.0) for k in range(4, 16)
    ]
    assert len({(step.own_path, step.token_seed is None) for step in steps[4:]}) == 4


def test_validation_says_how_well_signals_tell_agreement(tmp_path):
    """AUROC against its definition: the share of (agreeing, other) pairs in the right order, ties counting half."""
    module = module_of(shortlist=8)
    agreeable(module.model)
    trainer(tmp_path).validate(module, loader(2), verbose=False)  # leaves nothing behind
    (found,) = trainer(tmp_path).validate(module, loader(4), verbose=False)
    model, scores = module.model.eval(), {k: [] for k in (1, 2, 3, 4)}
    for batch in batches(4):
        tensors, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        counts, logits = labels >= 0, reference_logits(model, "florence2", tensors, labels)
        ids = torch.cat([torch.full((3, 1), zoo.START), labels[:, :-1]], 1).clamp(min=zoo.PAD)
        states = model(**tensors, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states
        for k in scores:
            top = logits[k][counts][:, module.exits.shortlist].softmax(-1).sort(-1, descending=True).values[:, :2]
            gate = module.exits.gates[f"decoder_{k}"](states[k][counts], (top / (1 - top)).log())
            cosine = torch.cosine_similarity(states[k], states[k - 1], dim=-1)[counts]
            same = logits[k].argmax(-1)[counts] == logits[5].argmax(-1)[counts]
            scores[k] += zip(gate.tolist(), cosine.tolist(), same.tolist(), strict=True)
    for k, rows in scores.items():
        agree, other = ([row for row in rows if row[2] == same] for same in (True, False))
        for i, signal in enumerate(("gate", "similarity")):
            share = right_order([row[i] for row in agree], [row[i] for row in other])
            assert found[f"val/decoder_{k}/{signal}_auroc"] == pytest.approx(share, abs=2e-3)


def right_order(agree, other):
    pairs = list(itertools.product(agree, other))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_similarity_is_ranked_across_batches(tmp_path):
    """Some batches have states that turn back, others none: their cosines stay comparable."""
    module, cosines, agrees = module_of(), ([0.1, 0.9, 0.2], [-0.5, 0.6, 0.15]), ([0, 1, 1], [0, 1, 0])
    for cosine, same in zip(cosines, agrees, strict=True):
        now = torch.stack([torch.tensor(cosine), (1 - torch.tensor(cosine) ** 2).sqrt(), *torch.zeros(30, 3)], -1)
        before = torch.eye(32)[0].expand(1, 3, 32)
        last = ExitResult(torch.zeros(()), torch.ones(3), None)
        results = {k: replace(last, tokens_N=torch.tensor(same)) for k in (1, 2, 3, 4)} | {5: last}
        states = [before, now[None], before, now[None], before]
        module._see_signals(Supervised(results, states, {}, torch.ones(1, 3, dtype=torch.bool), {}))
    expected = right_order([0.9, 0.2, 0.6], [0.1, -0.5, 0.15])
    assert module._auroc["similarity_2"].compute().item() == pytest.approx(expected)


def test_where_all_agree_there_is_nothing_to_tell(tmp_path, monkeypatch, recwarn):
    module = module_of()
    monkeypatch.setattr("lightning_mue.training.supervised.exit_logits", lambda b, e, k, h: b.decoder.head(h * 0))
    (found,) = trainer(tmp_path).validate(module, loader(2), verbose=False)
    assert math.isnan(found["val/decoder_1/gate_auroc"])
    assert math.isnan(found["val/decoder_4/similarity_auroc"])
    assert not [w for w in recwarn if "samples in targets" in str(w.message)]


def test_validation_reports_every_exit_alone(tmp_path):
    module = module_of()
    (found,) = trainer(tmp_path).validate(module, loader(1), verbose=False)
    tensors, labels = next((b, b["labels"]) for b in batches(1))
    tensors = {k: v for k, v in tensors.items() if k != "labels"}
    logits = reference_logits(module.model.eval(), "florence2", tensors, labels)
    for name, k in {"": 5, **{f"decoder_{k}/": k for k in (1, 2, 3, 4)}}.items():
        loss = torch.nn.functional.cross_entropy(logits[k].flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert found[f"val/{name}loss"] == pytest.approx(loss.item(), rel=1e-4)
    streams = {f"{s}_{k}" for s in ("vision", "encoder") for k in (1, 2, 3)}
    assert {f"val/{s}/{what}" for s in streams for what in ("loss", "exact")} <= found.keys()
    assert not [name for name in found if name.startswith("val/vision") and "auroc" in name]
    model = module.model
    layers = model.model.language_model.encoder.layers
    with torch.no_grad():
        hook = layers[0].register_forward_hook(lambda m, i, h: attached(model).adapters["encoder_1"](h))
        model.model.language_model.encoder.layers = layers[:1]
        loss = model(**tensors, labels=labels).loss
        hook.remove()
    assert found["val/encoder_1/loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_decomposed_streams_are_trained_and_validated(tmp_path):
    name = "florence2_decomposed"
    module = MultiExitModule(
        zoo.make(name, exits=False),
        {**zoo.BACKBONES[name][2], "adapter_width": 8},
        early_probability=0.5,
        early_after=0.0,
    )
    trainer(tmp_path, max_steps=4, limit_val_batches=1).fit(module, loader(4), loader(1))
    (found,) = trainer(tmp_path).validate(module, loader(1), verbose=False)
    assert {f"val/{s}_{k}/exact" for s, ks in (("image", (1, 2, 3)), ("text", (1, 3))) for k in ks} <= found.keys()


def test_the_shortlist_is_counted_from_the_training_references(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "VOCABULARY", 300)
    data = ShardsDataModule(str(shards), "vqa", image_size=64, image_tokens=5, vocab_size=300, batch_size=8)
    module = module_of(shortlist=20)
    data.setup("fit")
    data.train_samples.samples[0].references.append("seldom seldom seldom " * 200)  # the second of them
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    encode = data.processor.tokenizer
    counts = Counter()
    for sample in data.train_samples.samples:
        for text in sample.references:
            counts.update([*encode(text, add_special_tokens=False).input_ids, encode.eos_token_id])
    order = sorted(range(300), key=lambda token: (-counts[token], token))
    assert module.exits.shortlist.tolist() == sorted(order[:20])
    assert counts[order[0]] > counts[order[10]] > 0


def test_elsewhere_the_first_batches_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(shortlist_file, "COUNTED_BATCHES", 3)
    module = module_of(shortlist=10)
    trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(module, loader(6))
    counts = Counter(t for batch in batches(3) for t in batch["labels"].flatten().tolist() if t >= 0)
    order = sorted(range(97), key=lambda token: (-counts[token], token))
    assert module.exits.shortlist.tolist() == sorted(order[:10])


def test_a_run_that_goes_on_keeps_its_shortlist(tmp_path):
    module = module_of(shortlist=10)
    first = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    first.fit(module, loader(4))
    chosen = module.exits.shortlist.clone()
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = module_of(shortlist=10)
    other = [{**batch, "labels": torch.full((3, 6), 11)} for batch in batches(4)]
    trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(
        again, DataLoader(other, batch_size=None), ckpt_path=tmp_path / "half.ckpt"
    )
    assert torch.equal(again.exits.shortlist, chosen)


def test_settings_are_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match=r"`propagate` must be a share in \[0, 1\], got 2"):
        module_of(propagate=2)
    assert replace(Supervision(), early_after=0.0).begins_late is False
    assert Supervision().begins_late
    assert not Supervision(early_probability=0.0).begins_late


@pytest.mark.parametrize("gate", [True, False])
def test_gates_learn_at_a_rate_of_their_own(gate, tmp_path):
    module = module_of(learning_rate=1e-3, gate_learning_rate=7e-3, warmup_steps=1, gate=gate)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(module, loader(1))
    rates = {id(p): group["initial_lr"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert len(rates) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == (7e-3 if ".gates." in name else 1e-3), name
    assert (7e-3 in rates.values()) == gate
    decays = {id(p): group["weight_decay"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        assert (decays[id(parameter)] > 0) == (parameter.ndim > 1 and ".gates." not in name), name
