import math
import multiprocessing

import pytest
from torch import distributed

from lightning_mue.data import loader as loader_module
from lightning_mue.data.loader import BatchLoader, EncodedBatches, eval_batches, train_batches
from lightning_mue.data.shards import BadSamples
from lightning_mue.data.store import read_samples
from lightning_mue.data.tokenizer import train_tokenizer

from .conftest import TinyProcessor, vqa_members, write_tar


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 23, 60])
def test_ranks_have_equal_batches_and_together_see_everything(count, world, by_length):
    lengths = [k % 7 for k in range(count)] if by_length else None
    ranks = [train_batches(count, 4, seed=1, epoch=2, rank=r, world=world, lengths=lengths) for r in range(world)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    seen = [k for batches in ranks for batch in batches for k in batch]
    assert set(seen) == set(range(count))
    assert len(seen) == math.ceil(count / world) * world


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return train_batches(50, 8, seed, epoch)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_batches_of_like_length_hold_little_padding_and_come_in_random_order():
    lengths = [k * 37 % 101 for k in range(400)]
    batches = train_batches(400, 10, seed=0, epoch=0, lengths=lengths)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) < 15
    means = [sum(lengths[i] for i in batch) for batch in batches]
    assert means != sorted(means)
    assert batches != train_batches(400, 10, seed=0, epoch=1, lengths=lengths)


def test_the_global_batch_knows_no_world_size():
    alone = train_batches(64, 8, seed=0, epoch=1)
    four = [train_batches(64, 2, seed=0, epoch=1, rank=r, world=4) for r in range(4)]
    for k, batch in enumerate(alone):
        assert sorted(batch) == sorted(i for rank in four for i in rank[k])


@pytest.mark.parametrize("world", [1, 2, 3, 7, 9])
def test_eval_batches_are_dealt_in_order_of_id(world):
    ids = [f"p{k * 7 % 50}" for k in range(50)]
    alone = eval_batches(ids, 8)
    assert [ids[i] for batch in alone for i in batch] == sorted(ids)
    ranks = [eval_batches(ids, 8, r, world) for r in range(world)]
    assert {len(r) for r in ranks} == {math.ceil(7 / world)}
    dealt = [ranks[k % world][k // world] for k in range(len(ranks[0]) * world)]
    assert dealt[:7] == alone
    assert all(batch in alone for batch in dealt[7:])


@pytest.fixture
def store(tmp_path):
    return read_samples([write_tar(tmp_path / "a.tar", vqa_members(10))], "vqa", BadSamples())


def loader_of(store, workers=0, seed=3, name=""):
    processor = TinyProcessor(train_tokenizer([s.prompt for s in store.samples], 300), 8, 4)
    return BatchLoader(
        EncodedBatches(store, processor, seed), lambda epoch: train_batches(len(store), 3, 3, epoch), workers, name
    )


def ids_of(loader):
    return [i for batch in loader for i in batch["sample_id"]]


def test_a_batch_belongs_together(store):
    loader = loader_of(store)
    for batch in loader:
        for k, name in enumerate(batch["sample_id"]):
            number = int(name[1:].split("#")[0])
            assert batch["pixel_values"][k, :, 0, 0].tolist() == [number, 0, 7]
            assert batch["cluster"][k] == f"p{number}"
            assert batch["prompt"][k] == f"what is {number} {name[-1]} ?"
            assert batch["references"][k] == [f"answer {number}", "other"]
            assert batch["level"][k] == 0
            row = batch["labels"][k]
            row = row[row != -100]
            assert row[-1] == 2
            assert loader.dataset.processor.decode(row[None, :-1])[0] in batch["references"][k]
            asked = batch["input_ids"][k][batch["attention_mask"][k] == 1]
            assert loader.dataset.processor.decode(asked[None])[0] == batch["prompt"][k]


def test_labels_are_drawn_by_epoch_and_are_first_in_evaluation(store):
    loader = loader_of(store)
    items = [(epoch, [k]) for epoch in range(4) for k in range(20)]
    drawn = [loader.dataset[item]["labels"].tolist() for item in items]
    assert drawn == [loader.dataset[item]["labels"].tolist() for item in items]
    second = drawn[:20].count(loader.dataset.processor.labels(["other"]).tolist())
    assert 3 < second < 17
    assert drawn[:20] != drawn[20:40]
    first = EncodedBatches(store, loader.dataset.processor)
    assert first[(5, [4])]["labels"].tolist() == loader.dataset.processor.labels(["answer 2"]).tolist()


def test_worker_processes_change_nothing(store):
    alone, helped = loader_of(store), loader_of(store, workers=2)
    for mine, theirs in zip(alone, helped, strict=True):
        assert mine["sample_id"] == theirs["sample_id"]
        assert mine["labels"].equal(theirs["labels"])
        assert mine["pixel_values"].equal(theirs["pixel_values"])


@pytest.mark.parametrize("hangs", [True, False])
def test_beside_gloos_threads_nothing_is_forked_where_that_may_hang(store, hangs, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_FORKS_MAY_HANG", hangs)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        batches = iter(loader_of(store, workers=1))
        found = [next(batches)["sample_id"]]
        assert len(multiprocessing.active_children()) == (0 if hangs else 1)
        found += [batch["sample_id"] for batch in batches]
    finally:
        distributed.destroy_process_group()
    assert found == [batch["sample_id"] for batch in loader_of(store)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loaded_state_continues_with_the_next_batch(store, workers):
    whole = loader_of(store, workers)
    whole.set_epoch(2)
    expected = ids_of(whole)
    first = loader_of(store, workers)
    first.set_epoch(2)
    iterator = iter(first)
    seen = [i for _ in range(3) for i in next(iterator)["sample_id"]]
    second = loader_of(store, workers)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    iterator = iter(second)  # Lightning makes the iterator before it says which epoch it is
    second.set_epoch(2)
    assert len(second) == 7
    assert seen + [i for batch in iterator for i in batch["sample_id"]] == expected
    second.set_epoch(3)
    assert len(ids_of(second)) == 20


def test_a_state_of_another_plan_is_refused_in_mid_epoch_only(store):
    loader = loader_of(store, name="batch 4")
    with pytest.raises(ValueError, match=r"batch 3.*batch 4"):
        loader.load_state_dict({"epoch": 1, "batch": 2, "plan": "batch 3"})
    loader.load_state_dict({"epoch": 1, "batch": 7, "plan": "batch 3"})


def test_a_picture_that_turns_out_broken_is_left_out_of_its_batch(tmp_path):
    path = write_tar(tmp_path / "a.tar", vqa_members(3, questions=1))
    store = read_samples([path], "vqa", BadSamples("skip"), memory_limit_mb=0)
    data = bytearray(path.read_bytes())
    at = store.pictures[1].offset
    data[at : at + 30] = b"\0" * 30
    path.write_bytes(bytes(data))
    loader = loader_of(store)
    assert loader.dataset[(0, [0, 1, 2])]["sample_id"] == ["p0#q0", "p2#q0"]
    with pytest.raises(ValueError, match=r"every picture of a batch is broken.*'p1'"):
        _ = loader.dataset[(0, [1])]
