"""The table of a trained and calibrated recipe: every variant on its test data, in one interleaved run.

    python benchmarks/life_cycle.py --ckpt_path runs/easyvqa/last.ckpt --name easyvqa --metric accuracy

Reads ``policy.json`` beside the checkpoint; writes ``benchmarks/results/<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from targets import device, note, today

from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.data import ShardsDataModule
from lightning_mue.files import write_text
from lightning_mue.policy_file import find_policy
from lightning_mue.report import print_table, table_markdown
from lightning_mue.side_by_side import CALIBRATED, FIRST, FULL, side_by_side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--timed-samples", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    module, _ = load_checkpoint(args.ckpt_path)
    policy = find_policy(None, args.ckpt_path)
    checkpoint = torch.load(args.ckpt_path, map_location="cpu", weights_only=True)
    data = ShardsDataModule(**{k: v for k, v in checkpoint["datamodule_hyper_parameters"].items() if k[0] != "_"})
    data.load_state_dict(checkpoint["ShardsDataModule"])
    data.setup("test")
    if not (data.hparams["holdout"] or data.hparams["test"] or data.has_test_shards):
        parser.error("there is no data that did not calibrate: give the recipe `test` data or a `holdout`")
    measured = side_by_side(module.model, policy, data, args.metric, args.timed_samples, args.repeats)
    rows = {row.name: row for row in measured.rows}
    quality = args.metric.replace("_", " ")
    print_table(measured.rows, policy.certificate, f"{args.name}, batch 1, end to end", quality)
    where = f"{device()}, {args.threads} thread(s), torch {torch.__version__}"
    clusters = len({sample.cluster for sample in data.test_samples.samples})
    text = f"# {args.name}: full depth, static depths, calibrated exits\n\n"
    text += f"{where}; {today()}. Quality on {len(data.test_samples)} samples of {clusters} pictures that neither "
    text += (
        f"trained nor calibrated; time on {args.timed_samples} of them, batch 1, {args.repeats} repeats, all variants "
    )
    text += "in turn; time ratio to our engine at full depth, paired, with half its interquartile range.\n\n"
    text += table_markdown(measured.rows, quality)
    promise = policy.certificate.in_words() if policy.certificate else "Not calibrated."
    text += f"\nPolicy: {policy.depths_in_words()}. {promise}\n"
    kept = rows[FIRST].quality / rows[FULL].quality if rows[FULL].quality else float("nan")
    text += f"\nControl: everything at its first exit keeps {kept:.1%} of full-depth {quality}"
    text += " - depth hardly matters here, and no saving should be credited to exits.\n" if kept >= 0.99 else ".\n"
    target = Path(__file__).parent / "results" / f"{args.name}_{today()}.md"
    write_text(target, text)
    command = f"python benchmarks/life_cycle.py --ckpt_path CKPT --name {args.name} --metric {args.metric}"
    full, chosen = rows[FULL], rows[CALIBRATED]
    note(f"{args.name}_full_depth_{args.metric}", full.quality, 0.8, "higher", "share", command, where)
    note(f"{args.name}_kept_{args.metric}", chosen.quality / full.quality, 0.98, "higher", "share", command, where)
    note(f"{args.name}_time_ratio", chosen.ratio, 1.0, "lower", "of our engine at full depth", command, where)
    print(target)


if __name__ == "__main__":
    main()
