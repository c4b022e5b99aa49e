"""Calibration: from the traces of a trainer's data to a certified policy, on every rank alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_mue.backbones import fingerprint
from lightning_mue.calibration import (
    Proposal,
    Provenance,
    Tested,
    certify,
    groups_large_enough,
    propose,
    rehearse,
    worth_decoding,
)
from lightning_mue.calibration.budget import best_within, certify_budget, within_budget
from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.precision import with_precision
from lightning_mue.calibration.propose import of_groups
from lightning_mue.calibration.requirements import requirements_of
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import stream_outcome
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch
from lightning_mue.callbacks.decoding import check_samples
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.ledger import Entry, Ledger, Reuse
from lightning_mue.callbacks.subject import Decoder, Subject
from lightning_mue.inference.profile import device_name
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace

SELECTION_REUSED = (
    "selection_reused: nothing says that this data did not choose the checkpoint; if it did, the promise is weaker."
)

Certifies = Mapping[str, tuple[str, str]]
"""The samples that certify: name -> cluster, group."""

Task = tuple[str, Sequence[str] | None, ExitPolicy | None, Sequence[str]]
"""A split, its groups, the policy to decode there (None: record the decoder's exits), samples known to be unchanged."""

Ask = Callable[[Task], Any]
"""Has all ranks do a task; returns what was decoded, or the files of what was recorded."""


@dataclass(frozen=True)
class Asked:
    """What a calibration is asked for; as in CalibrateExits, with ``latency_ms`` and ``speedup`` as the budget."""

    promises: list[Promise]
    confidence_level: float
    seed: int
    estimate: bool
    reuse: Reuse
    latency_ms: float | None = None
    speedup: float | None = None

    def budget_ms(self, full_ms: float) -> float | None:
        """Return the milliseconds a sample may take where full depth takes ``full_ms``; None if quality is asked."""
        return full_ms / self.speedup if self.speedup is not None else self.latency_ms


@dataclass
class Calibration:
    """One calibration of a model on a trainer's validation data.

    Args:
        model: the backbone.
        asked: the promises.
        subject: what the model does with the data.
        journal: of finished pieces.
        keys: of the batches.
        note: what the certificate says beside the promise.
        beside: the intents of other calibrations at the same time.
    """

    model: nn.Module
    asked: Asked
    subject: Subject
    journal: Journal
    keys: BatchKeys
    note: str = ""
    beside: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.journal.folder / "ledger.json")
        self.decoders: dict[str, Decoder] = {}

    @property
    def intent(self) -> str:
        """What is asked and how it is decoded, known before any data is seen."""
        return repr([self.asked, sorted(self.subject.settings.items())])

    def measure(self, one: Batch, repeats: int, precision: str | None = None) -> LatencyTable:
        """Measure on one sample; a resumed calibration uses the table it began with."""
        device = next(self.model.parameters()).device
        setting = [device_name(device), torch.get_num_threads(), repeats, precision, self.subject.runtime]
        path = self.journal.path("latency", setting, ".json")
        if not path.exists():
            self.subject.measure(one, repeats, precision).save(path)
        found = LatencyTable.from_json(path.read_text(encoding="utf-8"), str(path))
        if found.device != setting[0]:
            raise ValueError(
                f"{path} was measured on {found.device!r}, this is {setting[0]!r}; delete it, or move it away"
            )
        return found

    def propose(
        self,
        trace: Trace,
        latency: LatencyTable,
        certifies: Certifies,
        lower: Mapping[str, LatencyTable],
        ask: Ask,
    ) -> Proposal:
        """Search policies by simulation, and decode what is found on the data that it was found on.

        ``lower`` are the costs in lower precisions, which compete.
        """
        asked, groups = self.asked, self._groups(trace, certifies)
        proposal = propose(trace, latency, asked.promises, groups)
        for words in proposal.refused:
            rank_zero_info(f"Not tried: {words}.")
        own = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        for precision, measured in lower.items():
            if precision != own:
                proposal = with_precision(proposal, trace, measured, precision)
        chosen = [found for found in certifies.values() if groups is None or found[1] in groups]
        clusters, group_of = [cluster for cluster, _ in chosen], [group for _, group in chosen]
        size = (clusters, self._full_scores(trace, groups), groups, group_of, asked.estimate)
        budget = asked.budget_ms(proposal.full_depth.ms)
        if budget is not None:
            proposal = within_budget(proposal, budget)
        elif not worth_decoding(asked.promises, asked.confidence_level, *size):
            return proposal
        rank_zero_info(f"Searched {proposal.searched:,} policies; decoding the {len(proposal.worth_decoding)} best.")
        full = ask(("propose", groups, ExitPolicy.full_depth(), ()))
        check_samples(full.sample_ids, of_groups(trace, groups).sample_ids)
        rehearsed = rehearse(
            proposal, trace, lambda policy: ask(("propose", groups, policy, self._unchanged(policy, trace)))
        )
        return rehearsed if budget is None else best_within(rehearsed, budget)

    def certify(
        self, proposal: Proposal, trace: Trace, certifies: Certifies, ask: Ask
    ) -> tuple[ExitPolicy, list[Tested]]:
        """Test the chain on the certify split; within a budget, find out how much its one link keeps."""
        groups, asked = proposal.groups, self.asked
        certifies = {name: found for name, found in certifies.items() if groups is None or found[1] in groups}
        entered, recorded = list[tuple[float, str]](), list[Trace]()

        def decode(policy: ExitPolicy) -> Decoded:
            found = ask(("certify", groups, policy, self._unchanged(policy, *recorded)))
            check_samples(found.sample_ids, certifies)
            if not entered:  # full depth: nothing is tested, and nothing spent, before it is decoded
                entered.append(self._enter(proposal, [cluster for cluster, _ in certifies.values()]))
                if sum(map(self.subject.is_simulated_exactly, (link.policy for link in proposal.chain))) > 1:
                    recorded.append(Trace.merge([Trace.load(p) for p in ask(("certify", groups, None, ()))]))
            return found

        note = f"{self.note} {'' if self.journal.key['data'] else SELECTION_REUSED}".strip()
        provenance = Provenance(fingerprint(self.model), self.journal.key["data"], self.subject.settings, note)
        how: dict[str, Any] = {"confidence_level": asked.confidence_level, "seed": asked.seed}
        how |= {"provenance": provenance, "on_tested": _announce}
        if asked.budget_ms(proposal.full_depth.ms) is not None:
            policy, tests = certify_budget(proposal, decode, **how)
        else:
            policy, tests = certify(
                proposal.chain,
                decode,
                promises=asked.promises,
                clusters=[cluster for cluster, _ in certifies.values()],
                full_scores=self._full_scores(trace, groups),
                groups=groups,
                group_of=[group for _, group in certifies.values()],
                estimate=asked.estimate,
                **how,
            )
        assert policy.certificate is not None
        for risk, spent in entered:
            note = f"{policy.certificate.note} {spent}".strip()
            certificate = replace(policy.certificate, confidence_level=round(1 - risk, 9), note=note)
            policy = replace(policy, certificate=certificate)
        return policy, tests

    def _groups(self, trace: Trace, certifies: Certifies) -> tuple[str, ...] | None:
        """Return the groups that can be promised for; None if samples are not grouped."""
        if self.keys.group is None:
            return None
        means = self._full_scores(trace, sorted(set(trace.groups)))
        clusters, group_of = zip(*certifies.values(), strict=True)
        found = groups_large_enough(self.asked.promises, self.asked.confidence_level, means, clusters, group_of)
        small = sorted({*group_of} - {*found})
        if not found:
            raise ValueError(
                f"None of the groups by {self.keys.group!r} has enough samples to certify anything "
                f"({', '.join(small)}); gather more, promise less, or leave `group_by` out"
            )
        self.note += f" Groups too small to certify run at full depth: {', '.join(small)}." if small else ""
        return found

    def _full_scores(self, trace: Trace, groups: Sequence[str] | None) -> dict[str, dict[str, float]]:
        """Return group -> metric -> full depth's mean score over clusters, of what counts of it."""
        promises = [promise for promise in self.asked.promises if promise.metric in trace.full_score]
        caps = {p.metric: min(q.highest for q in promises if q.metric == p.metric) for p in promises}

        def means(rows: np.ndarray) -> dict[str, float]:
            clusters = [trace.clusters[i] for i in rows]
            capped = {metric: np.minimum(trace.full_score[metric][rows], cap) for metric, cap in caps.items()}
            return {metric: float(cluster_means(scores, clusters).mean()) for metric, scores in capped.items()}

        return {r.group: means(r.rows) for r in requirements_of(self.asked.promises[:1], groups, trace.groups)}

    def _enter(self, proposal: Proposal, clusters: Sequence[str]) -> tuple[float, str]:
        """Write the tests to come into the ledger; return the risk of error over all, and what to note of it."""
        asked = self.asked
        question = f"{proposal.chain_hash} {proposal.groups} {self.intent}"
        risk = 1 - asked.confidence_level
        entry = Entry.of(clusters, fingerprint(self.model), question, risk, self.intent, self.beside)
        earlier, others = self._ledger.enter(entry, asked.reuse), self._ledger.other_weights(entry)
        notes = [f"Some of these samples certified {others} other model(s) before."] if others else []
        if earlier:
            notes.append(f"{len(earlier)} other chain(s) were tested on them: the confidence is over all of them.")
        return sum((e.risk for e in earlier), entry.risk), " ".join(notes)

    def _unchanged(self, policy: ExitPolicy, trace: Trace | None = None) -> list[str]:
        """Return the samples of which no token changes, so that their output is that of full depth."""
        if trace is None or not self.subject.is_simulated_exactly(policy):
            return []
        trace = of_groups(trace, policy.groups)
        same = stream_outcome(StreamRows.of(trace, "decoder"), policy.rules["decoder"]).same
        return [name for name, kept in zip(trace.sample_ids, same, strict=True) if kept]

    def decode(self, task: Task) -> Decoded | list[Path]:
        """Do a task, on all ranks; full depth is decoded first."""
        split, groups, policy, unchanged = task
        if split not in self.decoders:
            self.forget()
            self.decoders[split] = self.subject.decoder(split, groups)
        decoder = self.decoders[split]
        return decoder.signals() if policy is None else decoder(policy, unchanged)

    def forget(self) -> None:
        """Let go of the batches that are kept in memory."""
        for decoder in self.decoders.values():
            decoder.reader.forget()


def _announce(tested: Tested) -> None:
    words = f"{tested.candidate.policy.depths_in_words()} ({tested.candidate.ms:.2f} ms predicted)"
    if not tested.evidence[0].estimated:
        found = f"p = {tested.result.p:.3g} {'passes' if tested.accepted else 'fails'}"
    else:
        found = f"{tested.used:.0%} of the allowed loss is used"
    rank_zero_info(f"{found}: {words}")
