"""What a trained recipe answers at full depth: several metrics on all of its test data.

    python -m papers.full_depth --ckpt_path CKPT --name sroie_lines --metrics exact_text character_accuracy

(from the folder ``benchmarks``). The share of letters wrong is edits / letters over the whole data, first references.
Writes ``benchmarks/results/full_depth_<name>_<date>.md``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from papers.task import Task, arguments
from targets import device, today
from torchmetrics.functional.text import char_error_rate

from lightning_mue.files import write_text
from lightning_mue.policy import ExitPolicy


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--metrics", nargs="+", required=True)
    args = parser.parse_args()
    task = Task.load(args)
    references = [refs for batch in task.test for refs in batch["references"]]
    texts = task.decode(ExitPolicy.full_depth()).texts
    lines = []
    for metric in args.metrics:
        score = replace(task, metric=metric).score
        mean = np.mean([score(text, refs) for text, refs in zip(texts, references, strict=True)])
        lines.append(f"* {metric}: {mean:.4f}")
    lines.append(f"* letters wrong: {char_error_rate(texts, [refs[0] for refs in references]):.4f}")
    text = (
        f"# {task.name}: full depth\n\n{device()}, {args.threads} thread(s), torch {torch.__version__}; {today()}. "
        f"{len(texts)} test samples.\n\n" + "\n".join(lines) + "\n"
    )
    write_text(Path(__file__).parents[1] / "results" / f"full_depth_{task.name}_{today()}.md", text)
    print(text)


if __name__ == "__main__":
    main()
