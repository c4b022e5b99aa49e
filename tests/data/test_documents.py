"""Pages whose words are given, as UDOP reads them: from shards to batches."""

import json

import pytest
import torch
from transformers import UdopProcessor

from lightning_mue.backbones.processor import Processor
from lightning_mue.callbacks.batches import single
from lightning_mue.data import ShardsDataModule
from tests.data.conftest import png, write_tar

WORDS = [{"text": "SHOP 24", "box": [100, 50, 900, 90]}, {"text": "TOTAL 9.05", "box": [10, 700, 400, 735]}]
QUESTIONS = [{"text": "how much ?", "refs": ["9.05"]}, {"text": "where ?", "refs": ["SHOP 24"]}]


def record(k):
    return {"id": f"page-{k}", "qa": QUESTIONS, "words": WORDS}


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 12), ("val", 12)):
        pages = [(f"page-{k}", record(k)) for k in range(count)]
        members = [item for name, page in pages for item in ((f"{name}.png", png()), (f"{name}.json", page))]
        write_tar(tmp_path / f"{split}-000.tar", members)

    def make(**options):
        shape = {"image_size": 32, "vocab_size": 60, "batch_size": 4, "select": 0.5}
        module = ShardsDataModule(train=str(tmp_path), task="document", **(shape | options))
        module.setup("fit")
        return module

    return make


def test_batches_are_those_of_transformers(data):
    module = data()
    batch = next(iter(module.train_dataloader()))
    theirs = module.processor.processor
    assert isinstance(theirs, UdopProcessor)
    texts, boxes = [word["text"] for word in WORDS], [word["box"] for word in WORDS]
    image = module.train_samples.samples[0].image
    expected = theirs(
        images=[image] * 4,
        text=batch["prompt"],
        text_pair=[texts] * 4,
        boxes=[boxes] * 4,
        padding=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name])
    torch.testing.assert_close(batch["bbox"] * 1000, expected["bbox"].float())
    assert module.processor.decode(batch["labels"]) == [references[0] for references in batch["references"]]


def test_one_page_of_a_batch_is_that_page_alone(data):
    module = data()
    sample = module.train_samples.samples[0]
    longer = sample.words * 3
    batch = module.processor([sample.image] * 2, [sample.prompt] * 2, [sample.words, longer])
    alone = module.processor([sample.image], [sample.prompt], [sample.words])
    found = single(batch | {"sample_id": ["a", "b"]}, 0)
    assert batch["input_ids"].shape[1] > alone["input_ids"].shape[1]
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_saved_processor_reads_the_same(data, tmp_path):
    module = data()
    module.processor.save(tmp_path / "processor")
    published = json.loads((config := tmp_path / "processor" / "processor_config.json").read_text())
    published["image_processor"]["apply_ocr"] = True  # as UDOP's own
    config.write_text(json.dumps(published))
    again, sample = Processor.load(tmp_path / "processor"), module.train_samples.samples[0]
    found, expected = (p([sample.image], [sample.prompt], [sample.words]) for p in (again, module.processor))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(again.labels(["9.05"]), module.processor.labels(["9.05"]))


def test_a_processor_is_given_words_or_none(data):
    module = data()
    sample = module.train_samples.samples[0]
    with pytest.raises(ValueError, match="UdopProcessor reads the words of a page: give `words`"):
        module.processor([sample.image], [sample.prompt])


def test_digits_of_page_and_answer_change_alike(data):
    module = data(augment=["digits"])
    dataset, seen = module.train_dataloader().dataset, set()
    asked = [k for k, sample in enumerate(module.train_samples.samples) if sample.prompt == "how much ?"]
    for epoch in range(8):
        batch = dataset[epoch, asked[:1]]
        (page,), (label,) = (module.processor.decode(batch[name]) for name in ("input_ids", "labels"))
        assert page.endswith(f"TOTAL {label}")
        assert len(set(label)) == 4
        seen.add(label)
    assert "9.05" in seen
    assert len(seen) > 2
    assert batch["references"] == [["9.05"]]


def test_batches_hold_pages_of_like_length(data):
    dataset = data(group_by_length=True).train_dataloader().dataset
    words, label = sum(len(word["text"]) for word in WORDS), dataset.label(0, 0)
    assert dataset.length(0, 0) == words + len(label)
