"""What calibration reads: once, where it fits into memory, and without a thread that draws.

A loader's workers are forked inside.
"""

import itertools
import threading

import pytest
from torch.utils.data import DataLoader

from lightning_mue import CalibrateExits
from lightning_mue.callbacks import split_reader
from tests.callbacks.conftest import BATCH, Foreign, Plain

ENOUGH = split_reader.MEMORY


class Forgetful(DataLoader):
    """Leaves its first batch out from the third pass on: after validation's own and the one that proposes."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return itertools.islice(super().__iter__(), int(self.passes >= 3), None)


class Watching(DataLoader):
    """Counts its passes, and notes which threads run when its batches are asked for."""

    threads: tuple[threading.Thread, ...] = ()
    passes = 0

    def __iter__(self):
        self.passes += 1
        self.threads += tuple(threading.enumerate())
        return super().__iter__()


def test_no_thread_of_the_bar_runs_when_workers_are_forked(make_trainer, capsys):
    loader = Watching(Foreign(), BATCH)
    trainer = make_trainer(CalibrateExits(keep=0.05, max_new_tokens=4, latency_repeats=1), enable_progress_bar=True)
    trainer.validate(Plain(), loader, verbose=False)
    assert "rehearsing" in capsys.readouterr().out  # the bar was drawn
    assert not [thread for thread in loader.threads if type(thread).__module__.startswith("rich")]


@pytest.mark.parametrize("memory", [ENOUGH, 700_000, 2000])  # all of it, some batches, less than one
def test_a_split_is_read_once_if_it_fits(make_trainer, monkeypatch, memory):
    monkeypatch.setattr(split_reader, "MEMORY", memory)
    loader, decoded = Watching(Foreign(), BATCH), []
    callback = CalibrateExits(keep=0.05, max_new_tokens=4, latency_repeats=1)
    decode = split_reader.SplitReader.read
    monkeypatch.setattr(
        split_reader.SplitReader, "read", lambda self, *args: decoded.append(args) or decode(self, *args)
    )
    make_trainer(callback).validate(Plain(), loader, verbose=False)
    assert len(decoded) > 4  # full depth and two policies of each split
    assert loader.passes == 1 + (2 if memory == ENOUGH else len(decoded))  # validation's own, and ours
    assert not any(decoder.reader._kept for decoder in callback.calibration.decoders.values())  # nothing stays


def test_other_samples_certify_nothing(make_trainer, tmp_path):
    callback = CalibrateExits(keep=0.05, max_new_tokens=4, latency_repeats=1)
    trainer = make_trainer(callback, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="before and not now; every pass must give the same samples"):
        trainer.validate(Plain(), Forgetful(Foreign(), BATCH), verbose=False)
    assert not [*tmp_path.rglob("ledger.json")]  # and are not spent
