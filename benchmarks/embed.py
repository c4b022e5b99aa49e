"""What embedding pictures costs and finds: full depth, static depths, a certified policy, and the ceiling.

    python benchmarks/embed.py --ckpt_path runs/coca_scenes/last.ckpt --name scenes --classes classes.txt

Pictures of the recipe's test data look for their own texts among candidates (texts of its calibration data: nothing
tested is in them) and, with classes, for their class. Quality of every line is on all pictures, its share of full
depth's with an interval from clusters drawn again in pairs. Time is CPU time of one thread, all lines in turn, in a new
order each round. 'First exit' always leaves there: the most that exits can save. Policies are those beside the
checkpoint unless they are named. Writes ``benchmarks/results/embed_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from decode import spread, where
from rich.progress import track
from runs import load_run
from targets import note, today
from torch import Tensor

from lightning_mue.calibration.bootstrap import kept_interval
from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.callbacks.batches import Batch
from lightning_mue.callbacks.text_search import TextSearch
from lightning_mue.files import write_text
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.inference.gallery import Gallery
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.policy_file import find_embed_policy

RESULTS = Path(__file__).parent / "results"
FULL, FIRST, RETRIEVAL, CLASSES = "full depth", "first exit", "policy of retrieval", "policy of classes"
TARGETS = {"recall_at_5": (RETRIEVAL, "r5"), "top_1": (CLASSES, "top1")}
KEPT, SPEEDUP, CONFIDENCE = 0.99, 1.5, 0.95


@dataclass(frozen=True)
class Question:
    """What pictures are scored by: a search, its gallery, and the pictures of each batch that count."""

    search: TextSearch
    gallery: Gallery

    def score(self, batch: Batch, image_BE: Tensor) -> np.ndarray:
        """Return 1 where a picture finds a text of its own, 0 where not, nan where it does not count: ``[B]``."""
        own = [self.search.own(references) for references in batch["references"]]
        found_B, rows = np.full(len(own), np.nan), [row for row, texts in enumerate(own) if texts]
        if rows:
            places = self.gallery.places(image_BE[rows], [own[row] for row in rows])
            found_B[rows] = (places < self.search.within).numpy()
        return found_B


@dataclass(frozen=True)
class Line:
    """What one line found and took.

    Args:
        scores: metric -> score of each picture, ``[n]``; nan where it does not count.
        depth: mean layers run.
        ms: batch size -> CPU milliseconds a picture, ``[repeats]``.
    """

    scores: Mapping[str, np.ndarray]
    depth: float
    ms: Mapping[int, np.ndarray]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--policy", help="of retrieval; embed_policy.json beside the checkpoint if not given")
    parser.add_argument("--class-policy", help="of classes; top_1_policy.json beside the checkpoint if not given")
    parser.add_argument("--classes", help="file of classes, one a line, as references name them")
    parser.add_argument("--template", default="{}", help="makes a text of a class's name")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--timed-pictures", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    module, data = load_run(args.ckpt_path, **({} if args.data is None else {"train": args.data}))
    batches = list(data.test_dataloader())
    engines = lines(module.model, data.processor, policies(args))
    asked = questions(args, engines[FULL], [s.references for s in data.calibration_samples.samples])
    found = measure(engines, asked, batches, args)
    clusters = [cluster for batch in batches for cluster in batch["cluster"]]
    target = Path(args.out) / f"embed_{args.name}_{today()}.md"
    write_text(target, report(found, engines, clusters, args))
    if target.parent == RESULTS:
        for name, value, wanted, unit in figures(found, clusters):
            note(f"embed_{args.name}_{name}", value, wanted, "higher", unit, command(args), where(1))
    print(target.read_text())


def policies(args: argparse.Namespace) -> dict[str, ExitPolicy]:
    """Return the policies that were calibrated."""
    beside = Path(args.ckpt_path).parent / "top_1_policy.json"
    named = args.class_policy or (str(beside) if beside.exists() else None)
    found = {RETRIEVAL: find_embed_policy(args.policy, args.ckpt_path)}
    found |= {CLASSES: ExitPolicy.load(named) if named is not None else None}
    return {name: policy for name, policy in found.items() if policy is not None}


def lines(model: torch.nn.Module, processor: object, calibrated: Mapping[str, ExitPolicy]) -> dict[str, EmbedEngine]:
    """Return name -> engine: full depth, every static depth, what was calibrated, and the first exit, always."""
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    exits, stream = whole.exits, whole.contrastive.image.name
    layers = exits.layers.get(stream, ()) if exits is not None else ()
    static = {f"static {k}": ExitPolicy({stream: ExitRule.static(k)}) for k in layers}
    named = {**static, **calibrated, FIRST: static[f"static {layers[0]}"]}
    return {FULL: whole} | {name: EmbedEngine(model, policy, processor=processor) for name, policy in named.items()}


def questions(args: argparse.Namespace, whole: EmbedEngine, references: Sequence[Sequence[str]]) -> dict[str, Question]:
    """Return metric -> question; recalls look among one draw of candidates."""
    texts, found = [text for of_one in references for text in of_one], {}
    drawn = TextSearch("recall_at_10", args.candidates, args.seed).among(texts)
    gallery = Gallery(whole, drawn)
    for metric in ("recall_at_1", "recall_at_5", "recall_at_10"):
        found[metric] = Question(TextSearch(metric, args.candidates, args.seed), gallery)
    if args.classes is not None:
        named = [line.strip() for line in Path(args.classes).read_text(encoding="utf-8").splitlines()]
        search = TextSearch("top_1", classes=tuple(name for name in named if name), template=args.template)
        found["top_1"] = Question(search, Gallery(whole, search.class_texts))
    return found


def measure(
    engines: Mapping[str, EmbedEngine],
    asked: Mapping[str, Question],
    batches: Sequence[Batch],
    args: argparse.Namespace,
) -> dict[str, Line]:
    """Return what every line found in all batches, and took for some pictures."""
    pixels = torch.cat([batch["pixel_values"] for batch in batches])[: args.timed_pictures]
    ms = {size: timed(engines, pixels, size, args.repeats, args.seed) for size in args.batch_sizes}
    found = {}
    for name, engine in engines.items():
        embedded = [engine.images(batch["pixel_values"]) for batch in track(batches, description=name)]
        scores = {
            metric: np.concatenate(
                [question.score(batch, part.vectors) for batch, part in zip(batches, embedded, strict=True)]
            )
            for metric, question in asked.items()
        }
        depth = float(torch.cat([part.depths for part in embedded]).double().mean())
        found[name] = Line(scores, depth, {size: ms[size][name] for size in ms})
    return found


def timed(
    engines: Mapping[str, EmbedEngine], pixels: Tensor, size: int, repeats: int, seed: int
) -> dict[str, np.ndarray]:
    """Return name -> CPU milliseconds a picture in each round, ``[repeats]``; every round has an order of its own."""
    parts, names = [part for part in pixels.split(size) if len(part) == size], list(engines)
    if not parts:
        raise ValueError(f"Batches of {size} need that many pictures to time, there are {len(pixels)}")
    rng, ms = np.random.default_rng(seed), {name: np.zeros((repeats, len(parts))) for name in engines}
    for name in names:
        engines[name].images(parts[0])
    for turn in track(range(repeats), description=f"batches of {size}"):
        for i, part in enumerate(parts):
            for k in rng.permutation(len(names)):
                begin = time.process_time()
                engines[names[k]].images(part)
                ms[names[k]][turn, i] = (time.process_time() - begin) * 1e3 / size
    return {name: values.mean(1) for name, values in ms.items()}


def kept(line: Line, full: Line, metric: str, clusters: Sequence[str]) -> tuple[float, float, str]:
    """Return a line's score, its share of full depth's, and that share's interval in words."""
    counted = ~np.isnan(full.scores[metric])
    mine, whole = line.scores[metric][counted], full.scores[metric][counted]
    names = [cluster for cluster, counts in zip(clusters, counted, strict=True) if counts]
    score, of_full = cluster_means(mine, names).mean(), cluster_means(whole, names).mean()
    interval = kept_interval(metric, mine, whole, names, CONFIDENCE, 0)
    words = "" if interval is None else " ({:.1%} to {:.1%})".format(*interval)
    return float(score), float(score / of_full) if of_full else float("nan"), words


def figures(found: Mapping[str, Line], clusters: Sequence[str]) -> list[tuple[str, float, float, str]]:
    """Return the promised figures: name, value, target, unit."""
    result = []
    for metric, (line, short) in TARGETS.items():
        if line in found and metric in found[line].scores:
            share = kept(found[line], found[FULL], metric, clusters)[1]
            result.append((f"kept_{short}", share, KEPT, "share of full depth's"))
            for size, ms in found[line].ms.items():
                gain = float(np.median(found[FULL].ms[size] / ms))
                name = ("speedup" if short == "r5" else f"speedup_{short}") + ("" if size == 1 else f"_b{size}")
                result.append((name, gain, SPEEDUP, "times as fast as full depth"))
    return result


def report(
    found: Mapping[str, Line], engines: Mapping[str, EmbedEngine], clusters: Sequence[str], args: argparse.Namespace
) -> str:
    """Return the page."""
    full = found[FULL]
    metrics, sizes = list(full.scores), list(full.ms)
    counted = {metric: int((~np.isnan(scores)).sum()) for metric, scores in full.scores.items()}
    text = (
        f"# Embeddings of {args.name}\n\n{where(1)}; {today()}. Quality on {len(clusters)} pictures "
        f"({', '.join(f'{metric}: {n}' for metric, n in counted.items())}) in {len(set(clusters))} clusters that "
        f"neither trained nor calibrated; {args.candidates} candidates; shares of full depth's with "
        f"{CONFIDENCE:.0%} intervals (paired bootstrap of clusters). CPU ms a picture on {args.timed_pictures} of "
        f"them, {args.repeats} rounds, all lines in turn in random order; medians with quartiles, ratios paired by "
        "round.\n\n"
    )
    columns = ["line", "mean depth", *(f"ms, batch {size}" for size in sizes)]
    columns += [f"times as fast, batch {size}" for size in sizes]
    columns += [name for metric in metrics for name in (metric, "kept")]
    text += f"| {' | '.join(columns)} |\n| --- {'| ---: ' * (len(columns) - 1)}|\n"
    for name, line in found.items():
        cells = [name, f"{line.depth:.2f}", *(spread(line.ms[size], 3) for size in sizes)]
        cells += [spread(full.ms[size] / line.ms[size], 2) for size in sizes]
        for metric in metrics:
            score, share, words = kept(line, full, metric, clusters)
            cells += [f"{score:.4f}", f"{share:.1%}{words}"]
        text += f"| {' | '.join(cells)} |\n"
    text += "\n| figure | measured | promised | |\n| --- | ---: | ---: | --- |\n"
    for name, value, target, _unit in figures(found, clusters):
        text += f"| {name} | {value:.3f} | >= {target} | {'kept' if value >= target else 'not kept'} |\n"
    for name in (RETRIEVAL, CLASSES):
        if name in engines:
            policy = engines[name].policy
            words = policy.certificate.in_words() if policy.certificate is not None else "Not calibrated."
            text += f"\n{name[0].upper()}{name[1:]}: {policy.depths_in_words()}. {words}\n"
    return text


def command(args: argparse.Namespace) -> str:
    """Return the command line that measures this again, without the names of folders here."""
    sizes = " ".join(map(str, args.batch_sizes))
    classes = f" --classes CLASSES --template '{args.template}'" if args.classes is not None else ""
    return (
        f"python benchmarks/embed.py --ckpt_path CKPT --name {args.name}{classes} --candidates {args.candidates} "
        f"--batch-sizes {sizes} --timed-pictures {args.timed_pictures} --repeats {args.repeats} --seed {args.seed}"
    )


if __name__ == "__main__":
    main()
