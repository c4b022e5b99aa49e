"""Every metric gives the same figure however its updates are cut into batches and spread over ranks."""

import pickle

import pytest
import torch

from lightning_mue.metrics import AnswerScore, Bleu, Cider, DocumentFrequencies, ExitAgreement, MeanExitDepth
from tests.metrics.captions import corpus

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")

PREDICTIONS, REFERENCES = corpus(5, size=40)
FREQUENCIES = DocumentFrequencies.from_references(REFERENCES)
SIZE = len(PREDICTIONS)
DEPTHS = torch.randint(0, 7, (SIZE, 5), generator=torch.Generator().manual_seed(0))
FULL = torch.randint(1, 4, (SIZE, 6), generator=torch.Generator().manual_seed(1))

METRICS = {
    "cider": Cider,
    "cider_frozen": lambda: AnswerScore("cider", FREQUENCIES),
    "bleu": Bleu,
    "rouge_l": lambda: AnswerScore("rouge_l"),
    "character_accuracy": lambda: AnswerScore("character_accuracy"),
    "depth": lambda: MeanExitDepth("decoder"),
    "tokens": lambda: ExitAgreement("token", 1),
    "outputs": lambda: ExitAgreement("output", 1),
}


def update(metric, rows):
    if isinstance(metric, MeanExitDepth):
        metric.update({"decoder": DEPTHS[rows]})
    elif isinstance(metric, ExitAgreement):
        metric.update((DEPTHS[rows] > 1).long() + 1, FULL[rows])
    else:
        metric.update([PREDICTIONS[i] for i in rows], [REFERENCES[i] for i in rows])


def at_once(name):
    metric = METRICS[name]()
    update(metric, list(range(SIZE)))
    return metric.compute().item()


@pytest.mark.parametrize("name", METRICS)
def test_batches(name):
    metric, merged = METRICS[name](), METRICS[name]()
    update(merged, [0, 1, 2])
    for start in range(3, SIZE, 7):
        update(metric, list(range(start, min(start + 7, SIZE))))
    copied = pickle.loads(pickle.dumps(metric))
    merged._update_count += 1
    merged._reduce_states(copied.metric_state)
    assert merged.compute().item() == pytest.approx(at_once(name), abs=1e-12)
    merged.reset()
    assert merged.compute().isnan()


def _rank(rank, folder, first):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = {name: make() for name, make in METRICS.items()}
    for rows in (range(first), range(first, SIZE))[rank], range(0):
        for metric in metrics.values() if len(rows) else ():
            update(metric, list(rows))
    torch.save({name: metric.compute() for name, metric in metrics.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", [11, SIZE], ids=["uneven", "a rank without data"])
def test_ranks(first, tmp_path):
    torch.multiprocessing.start_processes(_rank, (tmp_path, first), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in METRICS:
        assert found[0][name] == found[1][name]
        assert found[0][name].item() == pytest.approx(at_once(name), abs=1e-12)
