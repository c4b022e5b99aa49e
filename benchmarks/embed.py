"""What embedding pictures and texts costs and finds: full depth, every static depth, and certified policies.

    python benchmarks/embed.py --ckpt_path runs/coca_scenes/last.ckpt --name scenes

Pictures of the recipe's test data look for their own texts among the candidates that the policy was calibrated with
(texts of the data that proposed it: nothing tested is in them); those of a class, for their class; the first text of
each picture, for that picture, among pictures. What is looked for and among is embedded at full depth. Without a policy
candidates and classes are those of the command line. Quality is on all queries that count, its share of full depth's
with an interval from clusters drawn again in pairs. Time is CPU time of one thread on some of these queries, all lines
in turn, in a new order each round. The first static depth is the ceiling: the most that exits can save. Writes
``benchmarks/results/embed_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import spread, where
from rich.progress import track
from runs import load_run
from targets import note, today
from torch import Tensor

from lightning_mue.calibration.bootstrap import kept_interval
from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.callbacks.batches import Batch, rows_of
from lightning_mue.callbacks.lookup import Lookup, picture_vectors, queries
from lightning_mue.callbacks.search import Search
from lightning_mue.files import write_text
from lightning_mue.inference.embedding import EmbedEngine, Query
from lightning_mue.inference.gallery import Gallery
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.policy_file import EMBED_POLICY, EMBED_TEXT_POLICY

RESULTS = Path(__file__).parent / "results"
FULL, POLICY = "full depth", "calibrated"
RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10")
TASKS: dict[str, tuple[str, str, str, Query]] = {
    "retrieval": (EMBED_POLICY, "recall_at_5", "r5", "picture"),
    "zero-shot": ("top_1_policy.json", "top_1", "top1", "picture"),
    "text retrieval": (EMBED_TEXT_POLICY, "recall_at_5", "text_r5", "text"),
}
"""Task -> its policy beside the checkpoint, the metric of its figures, what they are called, and who looks."""
KEPT, SPEEDUP, CONFIDENCE = 0.99, 1.5, 0.95


@dataclass(frozen=True)
class Task:
    """What queries are asked to find, and which.

    Args:
        name: one of ``TASKS``.
        searches: by metric.
        lookup: what all of them look among.
        engines: the lines, full depth first.
        batches: of the samples that count.
    """

    name: str
    searches: Mapping[str, Search]
    lookup: Lookup
    engines: Mapping[str, EmbedEngine]
    batches: Sequence[Batch]

    @property
    def query(self) -> Query:
        """Who looks."""
        return TASKS[self.name][3]

    @property
    def clusters(self) -> list[str]:
        """Of every query."""
        return [cluster for batch in self.batches for cluster in batch["cluster"]]

    def given(self, batch: Batch) -> Tensor:
        """Return what the queries' tower reads."""
        return queries(self.lookup.search, self.lookup.whole, batch)

    def scores(self, batch: Batch, query_BE: Tensor) -> dict[str, np.ndarray]:
        """Return metric -> 1 where a query finds its own, 0 where not: ``[B]``."""
        places = self.lookup.places(batch, query_BE)
        return {metric: (places < search.within).double().numpy() for metric, search in self.searches.items()}


@dataclass(frozen=True)
class Line:
    """What one line found and took.

    Args:
        scores: metric -> score of each query, ``[n]``.
        depth: mean layers run.
        ms: batch size -> CPU milliseconds a query, ``[repeats]``.
    """

    scores: Mapping[str, np.ndarray]
    depth: float
    ms: Mapping[int, np.ndarray]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--policies", help="folder of the policies, if not the checkpoint's")
    parser.add_argument("--candidates", type=int, default=1000, help="of retrieval, without a policy")
    parser.add_argument("--classes", help="file of classes, one a line, without a policy")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--timed-pictures", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    module, data = load_run(args.ckpt_path, **({} if args.data is None else {"train": args.data}))
    tasks = [task for name in TASKS if (task := make_task(name, module.model, data, args)) is not None]
    found = {task.name: measure(task, args) for task in tasks}
    target = Path(args.out) / f"embed_{args.name}_{today()}.md"
    write_text(target, report(tasks, found, args))
    if target.parent == RESULTS:
        for task in tasks:
            for name, value, wanted, unit in figures(task, found[task.name]):
                note(f"embed_{args.name}_{name}", value, wanted, "higher", unit, command(args), where(1))
    print(target.read_text())


def make_task(name: str, model: torch.nn.Module, data: Any, args: argparse.Namespace) -> Task | None:
    """Return a task with its lines; None where there are no classes to tell apart, or no exits."""
    file, metric, _, query = TASKS[name]
    path = Path(args.policies or Path(args.ckpt_path).parent) / file
    policy = ExitPolicy.load(path) if path.exists() else None
    settings = policy.certificate.decode if policy is not None and policy.certificate is not None else {}
    if metric == "top_1":
        classes, template = settings.get("classes") or lines_of(args.classes), settings.get("template", "{}")
        if not classes:
            return None
        searches = {metric: Search(metric, classes=tuple(classes), template=template)}
    else:
        size, seed = settings.get("candidates", args.candidates), settings.get("candidates_seed", 0)
        searches = {recall: Search(recall, query, size, seed) for recall in RECALLS}
    engines, search = lines(model, data.processor, policy, query), searches[metric]
    if len(engines) == 1:
        return None
    lookup = Lookup(search, engines[FULL], gallery(search, engines[FULL], data))
    counted = (rows_of(b, [bool(search.own(refs)) for refs in b["references"]]) for b in data.test_dataloader())
    return Task(name, searches, lookup, engines, [batch for batch in counted if batch["sample_id"]])


def gallery(search: Search, whole: EmbedEngine, data: Any) -> Gallery:
    """Return the candidates that a calibration of this data has: drawn of the part that proposes."""
    proposes = {
        sample.sample_id: (sample.cluster, sample.references)
        for sample in data.calibration_samples.samples
        if data.split_of(sample.cluster) == "propose" and search.own(sample.references)
    }
    drawn = search.among(proposes)
    if search.query == "picture":
        return Gallery(whole.embed_texts([*drawn]).vectors, [*drawn.values()])
    found = picture_vectors(whole, data.val_dataloader(), drawn)
    return Gallery(torch.from_numpy(np.stack([found[name] for name in drawn])), [*drawn.values()])


def lines_of(path: str | None) -> tuple[str, ...]:
    """Return the lines of a file that hold something."""
    text = "" if path is None else Path(path).read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def lines(
    model: torch.nn.Module, processor: object, calibrated: ExitPolicy | None, query: Query
) -> dict[str, EmbedEngine]:
    """Return name -> engine: full depth, every static depth of the queries' tower, and what was calibrated."""
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    exits, stream = whole.exits, whole.branch(query).stream.name
    layers = exits.layers.get(stream, ()) if exits is not None else ()
    named = {f"static {k}": ExitPolicy({stream: ExitRule.static(k)}) for k in layers}
    named |= {POLICY: calibrated} if calibrated is not None else {}
    return {FULL: whole} | {name: EmbedEngine(model, policy, processor=processor) for name, policy in named.items()}


def measure(task: Task, args: argparse.Namespace) -> dict[str, Line]:
    """Return what every line found for all queries, and took for some of them."""
    given = torch.cat([task.given(batch) for batch in task.batches])[: args.timed_pictures]
    ms = {size: timed(task.engines, task.query, given, size, args.repeats) for size in args.batch_sizes}
    found = {}
    for name, engine in task.engines.items():
        embedded = [engine.embed(task.query, task.given(b)) for b in track(task.batches, description=name)]
        parts = [task.scores(batch, part.vectors) for batch, part in zip(task.batches, embedded, strict=True)]
        scores = {metric: np.concatenate([part[metric] for part in parts]) for metric in task.searches}
        depth = float(torch.cat([part.depths for part in embedded]).double().mean())
        found[name] = Line(scores, depth, {size: ms[size][name] for size in ms})
    return found


def timed(
    engines: Mapping[str, EmbedEngine], query: Query, given: Tensor, size: int, repeats: int
) -> dict[str, np.ndarray]:
    """Return name -> CPU milliseconds a query in each round, ``[repeats]``; every batch has an order of its own."""
    parts, names = [part for part in given.split(size) if len(part) == size], list(engines)
    if not parts:
        raise ValueError(f"Batches of {size} need that many queries to time, there are {len(given)}")
    rng, ms = np.random.default_rng(0), {name: np.zeros((repeats, len(parts))) for name in engines}
    for name in names:
        engines[name].embed(query, parts[0])
    for turn in track(range(repeats), description=f"batches of {size}"):
        for i, part in enumerate(parts):
            for k in rng.permutation(len(names)):
                begin = time.process_time()
                engines[names[k]].embed(query, part)
                ms[names[k]][turn, i] = (time.process_time() - begin) * 1e3 / size
    return {name: values.mean(1) for name, values in ms.items()}


def kept(line: Line, full: Line, metric: str, clusters: Sequence[str]) -> tuple[float, float, str]:
    """Return a line's score, its share of full depth's, and that share's interval in words."""
    mine, whole = line.scores[metric], full.scores[metric]
    score, of_full = float(cluster_means(mine, clusters).mean()), float(cluster_means(whole, clusters).mean())
    interval = kept_interval(metric, mine, whole, clusters, CONFIDENCE, 0)
    words = "" if interval is None else " ({:.1%} to {:.1%})".format(*interval)
    return score, score / of_full if of_full else float("nan"), words


def figures(task: Task, found: Mapping[str, Line]) -> list[tuple[str, float, float, str]]:
    """Return the promised figures: name, value, target, unit; none without a policy."""
    if POLICY not in found:
        return []
    _, metric, short, _ = TASKS[task.name]
    share = kept(found[POLICY], found[FULL], metric, task.clusters)[1]
    result = [(f"kept_{short}", share, KEPT, "share of full depth's")]
    for size, ms in found[POLICY].ms.items():
        name = ("speedup" if short == "r5" else f"speedup_{short}") + ("" if size == 1 else f"_b{size}")
        result.append((name, float(np.median(found[FULL].ms[size] / ms)), SPEEDUP, "times as fast as full depth"))
    return result


def report(tasks: Sequence[Task], found: Mapping[str, Mapping[str, Line]], args: argparse.Namespace) -> str:
    """Return the page."""
    text = (
        f"# Embeddings of {args.name}\n\n{where(1)}; {today()}. Quality on test data that neither trained nor "
        f"calibrated; shares of full depth's with {CONFIDENCE:.0%} intervals (paired bootstrap of clusters). CPU ms a "
        f"query on at most {args.timed_pictures} of them, {args.repeats} rounds, all lines in turn in random order; "
        "medians with quartiles, ratios paired by round.\n"
    )
    for task in tasks:
        text += f"\n## {task.name}: {len(task.clusters)} {task.query}s in {len(set(task.clusters))} clusters, "
        text += f"{len(task.lookup.gallery.texts)} {task.lookup.search.others} to look among\n\n"
        text += table(task, found[task.name])
        if promised := figures(task, found[task.name]):
            policy = task.engines[POLICY].policy
            words = policy.certificate.in_words() if policy.certificate is not None else "Not calibrated."
            text += f"\nCalibrated: {policy.depths_in_words()}. {words}\n"
            text += "\n| figure | measured | promised | |\n| --- | ---: | ---: | --- |\n"
            for name, value, target, _unit in promised:
                verdict = "kept" if value >= target else "not kept"
                text += f"| {name} | {value:.3f} | >= {target} | {verdict} |\n"
    return text


def table(task: Task, found: Mapping[str, Line]) -> str:
    """Return the lines of one task."""
    full = found[FULL]
    columns = ["line", "mean depth", *(f"ms, batch {size}" for size in full.ms)]
    columns += [f"times as fast, batch {size}" for size in full.ms]
    columns += [name for metric in full.scores for name in (metric, "kept")]
    text = f"| {' | '.join(columns)} |\n| --- {'| ---: ' * (len(columns) - 1)}|\n"
    for name, line in found.items():
        cells = [name, f"{line.depth:.2f}", *(spread(ms, 3) for ms in line.ms.values())]
        cells += [spread(full.ms[size] / ms, 2) for size, ms in line.ms.items()]
        for metric in full.scores:
            score, share, words = kept(line, full, metric, task.clusters)
            cells += [f"{score:.4f}", f"{share:.1%}{words}"]
        text += f"| {' | '.join(cells)} |\n"
    return text


def command(args: argparse.Namespace) -> str:
    """Return the command line that measures this again, without the names of folders here."""
    sizes, classes = " ".join(map(str, args.batch_sizes)), " --classes CLASSES" if args.classes is not None else ""
    return (
        f"python benchmarks/embed.py --ckpt_path CKPT --name {args.name} --candidates {args.candidates}{classes} "
        f"--batch-sizes {sizes} --timed-pictures {args.timed_pictures} --repeats {args.repeats}"
    )


if __name__ == "__main__":
    main()
