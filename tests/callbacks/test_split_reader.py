"""What calibration reads is read without a thread that draws: a loader's workers are forked inside."""

import threading

from torch.utils.data import DataLoader

from lightning_mue import CalibrateExits
from tests.callbacks.conftest import BATCH, Foreign, Plain


class Watching(DataLoader):
    """Notes which threads run when its batches are asked for."""

    threads: tuple[threading.Thread, ...] = ()

    def __iter__(self):
        self.threads += tuple(threading.enumerate())
        return super().__iter__()


def test_no_thread_of_the_bar_runs_when_workers_are_forked(make_trainer, capsys):
    loader = Watching(Foreign(), BATCH)
    trainer = make_trainer(CalibrateExits(keep=0.05, max_new_tokens=4, latency_repeats=1), enable_progress_bar=True)
    trainer.validate(Plain(), loader, verbose=False)
    assert "rehearsing" in capsys.readouterr().out  # the bar was drawn
    assert not [thread for thread in loader.threads if type(thread).__module__.startswith("rich")]
