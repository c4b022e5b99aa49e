"""The lines of our engine: full depth wherever it can run, and all ways to leave early where the policy runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np

from lightning_mue.answers import Answers, answer
from lightning_mue.benchmark.accounting import precision_name
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import Line, Placed, engine_line
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, VERIFIED, first_exits, static_depths
from lightning_mue.benchmark.replay import ideal_line, oracle_depths, oracle_line
from lightning_mue.benchmark.tuning import Tuned
from lightning_mue.callbacks.batches import Batch
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.runtime import RUNTIMES
from lightning_mue.policy import ExitPolicy

IDEAL = "ideal: calibrated depths, no signal asked"
NO_UPKEEP = "ideal: no upkeep either, K/V copied"
ORACLE = "oracle: first decoder exit that agrees"


class OurLines:
    """What our engine does with a calibrated policy.

    Args:
        exam: what is answered.
        policy: the calibrated one.
        runtime: as of `ExitEngine`.

    Attributes:
        full: name of the line of full depth in the policy's runtime and precision.
        left_out: line -> why it cannot be run here.
    """

    def __init__(self, exam: Exam, policy: ExitPolicy, runtime: str | None = None) -> None:
        self._exam, self._policy = exam, policy
        # Held, for what engines share lives as long as one of them.
        self._engine = ExitEngine(exam.model, policy, check_fingerprint=False, runtime=runtime)
        self.runtime, self.precision = self._engine.runtime, policy.precision
        self.full = self._full(self.runtime, self.precision)
        self.left_out: dict[str, str] = {}

    def place(self, policy: ExitPolicy, runtime: str | None = None) -> Placed:
        """Return a policy as it runs beside the calibrated one: same runtime, precision and decode settings."""
        how = {"precision": self.precision, "fingerprint": None, "certificate": self._policy.certificate}
        own = {field.name: getattr(policy, field.name) for field in fields(ExitPolicy)}
        return Placed(**own | how, where=runtime or self.runtime)

    def decode(self, policy: ExitPolicy, batches: list[Batch]) -> Answers:
        """Return a policy's answers to some batches."""
        return answer(self._exam.model, self.place(policy), batches, self._exam.data, self._exam.score)

    def lines(self, tuned: Tuned) -> dict[str, Line]:
        """Return the lines that need no other line's answers.

        Args:
            tuned: the methods of the papers.
        """
        found = self._full_depths()
        early = {**static_depths(self._exam.model), FIRST: first_exits(self._exam.model), **tuned.policies}
        if "decoder" in self._policy.rules and self._policy.kv_fill == "just-in-time":
            early[VERIFIED] = self._policy.as_drafts()
        for name, policy in (early | {CALIBRATED: self._policy}).items():
            found[name] = engine_line(self._exam, self.place(policy), self.full, tuned.notes.get(name, ""))
        for runtime, precisions in RUNTIMES.items():
            full = self._full(runtime, self.precision)
            if runtime != self.runtime and self.precision in precisions and full in found:
                placed = self.place(self._policy, runtime)
                found[f"{CALIBRATED}, {runtime}"] = engine_line(self._exam, placed, full)
        return found

    def replays(self, found: Mapping[str, Answers]) -> dict[str, tuple[Line, str]]:
        """Return the lines of known depths, and the line whose answers each of them gives again.

        Args:
            found: line -> its answers.
        """
        exits, calibrated = attached(self._exam.model), found[CALIBRATED]
        policy, unscored = self.place(self._policy), np.full_like(calibrated.scores, np.nan)
        copied = replace(policy, kv_fill="copy", backlog=0, verified=False)
        lines = {
            IDEAL: (ideal_line(self._exam, policy, calibrated, self.full), CALIBRATED),
            NO_UPKEEP: (ideal_line(self._exam, copied, replace(calibrated, scores=unscored), self.full), CALIBRATED),
        }
        if exits is not None and exits.layers.get("decoder"):
            full = self.place(ExitPolicy.full_depth())
            forced = oracle_depths(self._exam, full, exits.layers["decoder"])
            lines[ORACLE] = (oracle_line(self._exam, full, forced, self.full), self.full)
        return lines

    def _full_depths(self) -> dict[str, Line]:
        """Return full depth in each runtime and precision that can be run here."""
        device, found = next(self._exam.model.parameters()).device, {}
        for runtime, precisions in RUNTIMES.items():
            for precision in precisions:
                name = self._full(runtime, precision)
                if precision == "float16" != self.precision and device.type == "cpu":
                    continue  # CPUs compute it through float32
                policy = replace(self.place(ExitPolicy.full_depth(), runtime), precision=precision)
                try:
                    found[name] = engine_line(self._exam, policy, name)
                except (ValueError, ImportError) as error:
                    self.left_out[name] = str(error)
        return found

    def _full(self, runtime: str, precision: str | None) -> str:
        return f"full depth, {runtime} {precision_name(self._exam.model, precision)}"
