"""What ranks say to one another: the same words everywhere, one that leads, and an end for all if one stops."""

import json
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_mue.callbacks.ranks import check_visible, gather, lead, refuse_sharded
from tests import ranks


def test_alone_there_is_nothing_to_wait_for():
    assert gather([1, 2]) == [1, 2]
    assert gather([]) == []
    assert lead(lambda ask: [ask(1), ask(2)], lambda asked: asked * 10) == [10, 20]


def test_gather_gives_all_items_in_order_of_rank(tmp_path):
    def function():
        with ranks.group():
            mine = [[{"b": 1}], [], ["c", 4]][ranks.my_rank()]  # uneven, and a rank without any
            print(json.dumps([gather(mine), gather([]), gather([ranks.my_rank()])]))

    codes, said = ranks.run(tmp_path, 3, function)
    assert codes == [0, 0, 0], said
    assert [json.loads(text) for text in said] == [[[{"b": 1}, "c", 4], [], [0, 1, 2]]] * 3


def test_rank_zero_leads_and_all_follow(tmp_path):
    """Each rank would choose otherwise by its own sums; what is done is what rank 0 chooses."""

    def function():
        done = []

        def together(asked):
            done.append(asked)
            return sum(gather([asked * (ranks.my_rank() + 1)]))

        def work(ask):
            print("I choose")
            found = ask(3)
            return {"found": found, "then": ask(found)}

        with ranks.group():
            print(json.dumps([lead(work, together), done]))

    codes, said = ranks.run(tmp_path, 2, function)
    assert codes == [0, 0], said
    assert [text.count("I choose") for text in said] == [1, 0]
    assert [json.loads(text.splitlines()[-1]) for text in said] == [[{"found": 9, "then": 27}, [3, 9]]] * 2


@pytest.mark.parametrize(("rank", "where"), [(0, "work"), (0, "together"), (1, "together")])
def test_an_error_on_one_rank_is_the_end_of_all(tmp_path, rank, where):
    def function():
        def together(asked):
            if where == "together" and ranks.my_rank() == rank:
                raise KeyError("sample 7")
            return gather([asked])

        def work(ask):
            ask(1)
            if where == "work":
                raise KeyError("sample 7")

        with ranks.group():
            lead(work, together)

    codes, said = ranks.run(tmp_path, 3, function)
    assert codes == [1, 1, 1], said
    assert "KeyError: 'sample 7'" in said[rank].splitlines()[-1]
    for other in {0, 1, 2} - {rank}:
        assert f"RankFailed: rank {rank} stopped: KeyError: 'sample 7'. The same command" in said[other]


@pytest.mark.parametrize("how", ["is killed", "hangs"])
def test_a_rank_that_says_nothing_ends_the_others(tmp_path, how):
    def function():
        with ranks.group(timeout=timedelta(seconds=3)):
            gather([])
            if ranks.my_rank() == 1:
                if how == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(8)
                os._exit(0)
            gather([])

    codes, said = ranks.run(tmp_path, 2, function)
    assert codes == [1, -signal.SIGKILL if how == "is killed" else 0], said
    assert "RankFailed: Rank 0 waited for the others, and one of them has died or did not answer in time" in said[0]


def test_what_others_wrote_must_be_visible(tmp_path):
    here = tmp_path / "here"
    here.write_text("")
    check_visible([here])
    with pytest.raises(FileNotFoundError, match=r"Of 2 files .* does not see 1, such as .*there: `default_root_dir`"):
        check_visible([here, tmp_path / "there"])


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_whole_models_are_welcome(alone):
    refuse_sharded(model())
    refuse_sharded(nn.parallel.DistributedDataParallel(model()))
    copied = model()
    copied[0].weight = nn.Parameter(distribute_tensor(copied[0].weight.data, alone, [Replicate()]))
    refuse_sharded(copied)


def zero3(net):
    net[0].weight.ds_id = 0  # what DeepSpeed marks a partitioned parameter with
    return net


def split(net):
    net[1][0].weight = nn.Parameter(distribute_tensor(net[1][0].weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
    return net


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (lambda net: fully_shard(net[1]) and net, r"1\.0\.weight is sharded \(FSDP2"),
        (split, r"1\.0\.weight is sharded \(FSDP2 or tensor parallel\)"),
        (lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")), "FSDP wraps"),
        (zero3, r"0\.weight is partitioned by DeepSpeed ZeRO-3"),
    ],
    ids=["FSDP2", "tensor parallel", "FSDP", "ZeRO-3"],
)
def test_models_in_parts_are_refused(alone, shard, words):
    with pytest.raises(ValueError, match=f"whole model on every rank, and {words}.*--trainer.strategy ddp"):
        refuse_sharded(shard(model()))
