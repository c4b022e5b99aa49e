"""A certified policy against the cheapest static depths that answer at least as well.

    python -m papers.rival --ckpt_path CKPT --policy POLICY --name scenes --data SHARDS

(from the folder ``benchmarks``). The rival is chosen on the test data itself, which favours it: of all combinations of
static depths of all streams, from cheap to dear by the latency table, the first whose quality there is at least that of
the policy. Both are then timed alone, paired on the same samples.
Writes ``benchmarks/results/rival_<name>_<date>.md``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from papers.bounds import interval
from papers.compare import certified, static_combinations
from papers.entry import head_to_head
from papers.task import Task, arguments, command
from targets import device, note, today

from lightning_mue.files import write_text
from lightning_mue.methods import in_words


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", required=True)
    args = parser.parse_args()
    task = Task.load(args)
    policy = certified(task, args.policy)
    ours = task.decode(policy)
    rival, answers = next(
        (static, found)
        for static in static_combinations(task)
        if (found := task.decode(static)).quality >= ours.quality
    )
    paired = head_to_head(task, policy, rival, args)
    low, high = interval(ours.scores, answers.scores, ours.clusters)
    where = f"{device()}, {args.threads} thread(s), torch {torch.__version__}"
    note(
        f"{task.name}_over_equal_static",
        paired.ratio,
        1.0,
        "lower",
        "of the time of the cheapest static depths that answer at least as well",
        command(args, "papers.rival"),
        where,
    )
    text = (
        f"# {task.name}: certified exits against static depths of at least their quality\n\n{where}; {today()}. "
        f"{len(ours.scores)} test samples, {task.metric}. The static depths were chosen on these very samples, in "
        "their favour: the cheapest of all combinations that answer at least as well. Time: batch 1, "
        f"{args.timed_samples} samples, {3 * args.repeats} repeats, in turn; ratio paired, ± half the interquartile "
        "range of the repeats.\n\n"
        f"* certified exits ({in_words(policy)}): {ours.quality:.4f}\n"
        f"* static depths ({in_words(rival)}): {answers.quality:.4f}\n"
        f"* time: {paired.ratio:.3f} ± {(paired.ratio_spread or 0) / 2:.3f} of theirs; quality: "
        f"{ours.quality / answers.quality:.3f} ({low:.3f}-{high:.3f}) of theirs\n"
    )
    write_text(Path(__file__).parents[1] / "results" / f"rival_{task.name}_{today()}.md", text)
    print(text)


if __name__ == "__main__":
    main()
