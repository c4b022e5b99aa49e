"""Batches that are not ours."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from lightning_mue import CalibrateExits, CollectTrace, ExitPolicy
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import single
from tests import zoo

from .conftest import BATCH, TOKENS, Foreign

WANTED = ("input_ids", "pixel_values", "attention_mask")
Triple = namedtuple("Triple", ["pictures", "prompts", "answers"])


def tensors(size=3, seed=0):
    return zoo.inputs("florence2", size, seed)


def assert_inputs(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in WANTED)


@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict, lambda d: SimpleNamespace(**d)])
def test_our_own_names_in_any_container(kind):
    batch = tensors() | {"labels": torch.zeros(3, 2), "sample_id": ["a", "b", "c"], "cluster": ["x", "x", "y"]}
    batch |= {"references": ["one", ["two", "deux"], ("three",)], "num_beams": [1, 2, 3]}
    found = BatchKeys().read(kind(batch), WANTED)
    assert_inputs(found, batch)
    assert (found["sample_id"], found["cluster"]) == (["a", "b", "c"], ["x", "x", "y"])
    assert found["references"] == [["one"], ["two", "deux"], ["three"]]
    assert found.keys() == {*WANTED, "sample_id", "cluster", "group", "references"}
    assert BatchKeys().names_clusters(kind(batch))


@pytest.mark.parametrize(
    ("keys", "pack"),
    [
        (
            {"inputs": {"pixel_values": "image", "input_ids": "ids"}},
            lambda p, i, m: {"image": p, "ids": i, "attention_mask": m},
        ),
        ({"inputs": "model"}, lambda p, i, m: {"model": {"pixel_values": p, "input_ids": i, "attention_mask": m}}),
        ({"inputs": 1}, lambda p, i, m: ("x", BatchEncoding({"pixel_values": p, "input_ids": i, "attention_mask": m}))),
        ({"inputs": {"pixel_values": 0, "input_ids": 1, "attention_mask": 2}}, lambda p, i, m: [p, i, m]),
        ({"inputs": {"pixel_values": "pictures", "input_ids": 1, "attention_mask": 2}}, Triple),
    ],
)
def test_named_inputs(keys, pack):
    batch = tensors()
    found = BatchKeys(**keys).read(pack(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]), WANTED)
    assert_inputs(found, batch)
    assert found["cluster"] == found["sample_id"]
    assert len(set(found["sample_id"])) == 3


def test_named_columns():
    batch = tensors() | {"question_id": torch.tensor([7, 8, 9]), "picture": ["p", "p", "q"], "answers": ["a", "b", "c"]}
    found = BatchKeys(references="answers", sample_id="question_id", cluster="picture").read(batch, WANTED)
    assert (found["sample_id"], found["cluster"]) == (["7", "8", "9"], ["p", "p", "q"])
    assert found["references"] == [["a"], ["b"], ["c"]]


def test_a_hashed_id_is_the_samples_own():
    """The same whatever its batch-mates, their padding and its labels; another where any input differs."""
    batch = tensors(4)
    ids = BatchKeys().read(batch, WANTED)["sample_id"]
    assert len(set(ids)) == 4
    longer = {
        name: torch.cat([batch[name], torch.zeros(4, 3, dtype=torch.long)], 1)
        for name in ("input_ids", "attention_mask")
    }
    assert BatchKeys().read(batch | longer, WANTED)["sample_id"] == ids
    rows = {name: tensor[[2, 0]] for name, tensor in batch.items()} | {"labels": torch.ones(2, 3)}
    assert BatchKeys().read(rows, WANTED)["sample_id"] == [ids[2], ids[0]]
    for name, change in (("pixel_values", 1e-6), ("input_ids", 1)):
        other = batch[name].clone()
        other[1, 0] += change
        found = BatchKeys().read(batch | {name: other}, WANTED)["sample_id"]
        assert [a == b for a, b in zip(found, ids, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("keys", "batch", "message"),
    [
        (
            {},
            {"image": torch.zeros(1), "input_ids": torch.zeros(1)},
            r"needs \['pixel_values'\], and the batch with the keys \['image', 'input_ids'\]",
        ),
        (
            {},
            (1, 2),
            r"needs \['input_ids', 'pixel_values'\], and the batch \(tuple of 2\) .*`inputs=\{'input_ids': KEY\}`",
        ),
        (
            {"inputs": "model"},
            {"net": 1},
            r"`inputs` is 'model', and the batch with the keys \['net'\] has no such entry",
        ),
        (
            {"sample_id": "qid"},
            tensors(),
            "`sample_id` is 'qid', which must give one entry for each of 3 samples; found 0",
        ),
        (
            {"cluster": "c"},
            tensors() | {"c": ["x"]},
            "`cluster` is 'c', which must give one entry for each of 3 samples; found 1",
        ),
    ],
)
def test_what_is_not_there_is_named(keys, batch, message):
    with pytest.raises(ValueError, match=message):
        BatchKeys(**keys).read(batch, WANTED)


class TupleProject(L.LightningModule):
    """Batches are tuples, pictures are normalised on the device, and the model lies under another name."""

    def __init__(self):
        super().__init__()
        self.captioner = zoo.make("florence2")

    def on_after_batch_transfer(self, batch, dataloader_idx):
        pixels, *others = batch
        return ((pixels - 0.5) * 2, *others)

    def validation_step(self, batch, batch_idx):
        pass


def tuple_loader(count=60, **options):
    columns = zoo.inputs("florence2", count)
    rows = [tuple(columns[name][i] for name in ("pixel_values", "input_ids", "attention_mask")) for i in range(count)]
    return DataLoader(rows, BATCH, **options)


def calibrate(**options):
    named = {"model": "captioner", "inputs": {"pixel_values": 0, "input_ids": 1, "attention_mask": 2}}
    return CalibrateExits(**({"keep": 0.05, "max_new_tokens": TOKENS, "latency_repeats": 1} | named | options))


def test_certifies_a_project_of_tuples(make_trainer):
    callback, module = calibrate(), TupleProject()
    make_trainer(callback).validate(module, tuple_loader(), verbose=False)
    certificate = callback.policy.certificate
    assert certificate.metric == "consistency"
    assert certificate.evidence[0].n + len(callback.trace) == 60
    assert "independent" in certificate.note
    # What is decoded is what validation saw: after the project's own batch hooks.
    decoded = callback.calibration.decoders["certify"](ExitPolicy.full_depth())
    names = {}
    for pixels, ids, mask in tuple_loader():
        batch = {"pixel_values": (pixels - 0.5) * 2, "input_ids": ids, "attention_mask": mask}
        sequences = module.captioner.generate(**batch, max_new_tokens=TOKENS, do_sample=False, num_beams=1)
        names |= dict(zip(BatchKeys().read(batch, WANTED)["sample_id"], sequences.tolist(), strict=True))
    assert set(decoded.sample_ids) < set(names)
    tokens = callback.calibration.decoders["certify"]._full
    for name, found in ((name, row["tokens"]) for name, row in tokens.items()):
        assert names[name][1 : len(found) + 1] == found


def test_other_samples_in_another_pass_are_refused(make_trainer):
    loader = tuple_loader(shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"sample .\w+. (now and not before|before and not now); every pass"):
        make_trainer(calibrate(), limit_val_batches=4).validate(TupleProject(), loader, verbose=False)


def test_named_clusters_are_believed(module, make_loader, make_trainer):
    callback = CalibrateExits(keep=0.05, metric="consistency", max_new_tokens=TOKENS, latency_repeats=1)
    make_trainer(callback).validate(module, make_loader(), verbose=False)
    assert "independent" not in callback.policy.certificate.note


def test_named_references_are_scored_with_the_modules_own_processor(make_trainer, module):
    class WithAnswers(Foreign):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"answer": "w5 w5" if index % 2 else "w6"}

    class Words:
        """In place of a tokenizer: token 5 is w5."""

        def batch_decode(self, sequences, skip_special_tokens):
            assert skip_special_tokens
            return [" ".join(f"w{int(t)}" for t in row if t > 4) for row in sequences]

    module.processor = SimpleNamespace(tokenizer=Words())
    collect = CollectTrace(metric="exact_match", max_new_tokens=2, references="answer")
    make_trainer(collect).validate(module, DataLoader(WithAnswers(), BATCH), verbose=False)
    tokens = {}
    for batch in DataLoader(WithAnswers(), BATCH):
        inputs = {name: batch[name] for name in WANTED}
        sequences = module.model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=1)
        texts = Words().batch_decode(sequences[:, 1:], True)
        tokens |= {n: float(a == t) for n, a, t in zip(batch["sample_id"], batch["answer"], texts, strict=True)}
    assert dict(zip(collect.trace.sample_ids, collect.trace.full_score["exact_match"], strict=True)) == tokens


def test_a_row_alone_has_no_padding_and_a_prompt_may_be_missing():
    prompt = torch.tensor([[5, 6, -100], [7, 8, 9], [-100, -100, -100]])
    wanted = (*WANTED, "decoder_prompt")
    found = BatchKeys().read(tensors() | {"decoder_prompt": prompt}, wanted)
    assert [single(found, row)["decoder_prompt"].tolist() for row in range(3)] == [[[5, 6]], [[7, 8, 9]], [[]]]
    assert len(set(found["sample_id"])) == 3
    other = BatchKeys().read(tensors() | {"decoder_prompt": prompt.clamp(max=8)}, wanted)
    assert [a == b for a, b in zip(found["sample_id"], other["sample_id"], strict=True)] == [True, False, True]
    assert "decoder_prompt" not in BatchKeys().read(tensors(), wanted)
    with pytest.raises(ValueError, match=r"needs \['decoder_prompt'\]"):
        BatchKeys({"decoder_prompt": "a typo"}).read(tensors(), wanted)
