"""The command ``mue``: LightningCLI's subcommands and ours behind one thin dispatcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.policy import ExitPolicy

LIGHTNING = {
    "fit": "train a model with exits",
    "validate": "quality at every exit; calibrates if the recipe has CalibrateExits",
    "test": "decode the test data under a policy and score it",
    "predict": "decode the test data under a policy",
    "calibrate": "collect, propose and certify thresholds that keep a promised quality",
}
OWN = {
    "quickstart": "the whole life cycle on built-in data, with a table and a report",
    "freeze": "make a bundle of a checkpoint and a policy",
    "generate": "answer for a picture with a bundle",
    "embed": "embed pictures and texts with a bundle, and compare them",
    "benchmark": "measure a bundle on your data: quality, time, and where both come from",
    "check": "run the properties that must hold on a model of your own",
    "policy": "show a policy's promise in plain words",
    "data": "write built-in data, or your copy of a public data set, as shards",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``mue <command> ...``; without a known command, show them all."""
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args else "--help"
    if command in LIGHTNING:
        from lightning_mue.lightning_cli import run

        run(args)
    elif command in OWN:
        try:
            globals()[f"_{command}"](args[1:])
        except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
            sys.exit(f"mue {command}: {error}")
    else:
        print(_help())
        sys.exit(0 if command in ("-h", "--help") else f"mue: no command {command!r}")


def _help() -> str:
    lines = ["usage: mue <command> ...   (mue <command> --help shows its options)", ""]
    lines += [f"  {name:<12}{text}" for name, text in (LIGHTNING | OWN).items()]
    return "\n".join([*lines, "", "Recipes (-c FILE) lie in recipes/; see README.md."])


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"mue {command}", description=OWN[command])


def _quickstart(args: Sequence[str]) -> None:
    parser = _parser("quickstart")
    parser.add_argument("--out", default="quickstart", help="folder for data, checkpoint, bundle and report")
    parser.add_argument("--keep", type=float, default=0.98, help="fraction of full-depth quality to keep")
    parser.add_argument("--steps", type=int, default=None, help="of training; the recipe's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods",
        action="store_true",
        help="measure the exit methods of the literature beside the calibrated exits; a minute or two more",
    )
    found = parser.parse_args(args)
    from lightning_mue.quickstart import quickstart

    quickstart(Path(found.out), found.keep, found.seed, found.steps, found.methods)


def _freeze_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = _parser("freeze")
    parser.add_argument("-c", "--config", help="accepted and not needed: the checkpoint knows its recipe")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of `mue fit`")
    parser.add_argument("--policy", help="policy.json; the one beside the checkpoint if not given, else full depth")
    parser.add_argument("--embed-policy", help="embed_policy.json, likewise; without one, embeddings obey the other")
    parser.add_argument("--embed-text-policy", help="embed_text_policy.json, likewise; what embedded texts obey")
    parser.add_argument("--out", required=True, help="folder of the bundle")
    parser.add_argument(
        "--runtime",
        choices=["onnxruntime"],
        help="write graphs: the bundle then answers with onnxruntime, numpy, tokenizers and Pillow alone",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="also write each stream before the decoder as one ONNX file, its exits in it, for other programs",
    )
    parser.add_argument(
        "--verified",
        action="store_true",
        help="lose nothing: the decoder's exits draft, the last layer settles; other streams stay at full depth",
    )
    return parser.parse_args(args)


def _freeze(args: Sequence[str]) -> None:
    found = _freeze_arguments(args)
    from lightning_mue.checkpoint import load_checkpoint
    from lightning_mue.export import freeze
    from lightning_mue.export.manifest import bundle_size
    from lightning_mue.policy_file import find_embed_policy, find_policy

    module, processor = load_checkpoint(found.ckpt_path)
    policy = find_policy(found.policy, found.ckpt_path)
    policy = policy.as_drafts() if found.verified else policy
    # Graphs do not embed: policies that only lie there are then left out.
    asked = {"embed_policy": ("picture", found.embed_policy), "embed_text_policy": ("text", found.embed_text_policy)}
    embeds = {
        name: find_embed_policy(path, found.ckpt_path if found.runtime is None else None, query)
        for name, (query, path) in asked.items()
    }
    how = {"runtime": found.runtime, "graphs": found.graphs, **embeds}
    bundle = freeze(module.model, policy, found.out, processor, **how)
    weights, rest = bundle_size(bundle)
    print(f"{bundle}: {policy.depths_in_words()}")
    print(f"{weights / 1e6:.1f} MB of weights{' and graphs' if found.runtime else ''}, {rest / 1e6:.1f} MB of all else")
    _print_promise(policy)
    for one in embeds.values():
        if one is not None:
            print(f"Embeddings: {one.depths_in_words()}")
            _print_promise(one)


def _print_promise(policy: ExitPolicy) -> None:
    if policy.certificate is not None:
        print(policy.certificate.in_words())


def _generate(args: Sequence[str]) -> None:
    parser = _parser("generate")
    parser.add_argument("bundle", help="folder made by `mue freeze`")
    parser.add_argument("--image", required=True, action="append", help="picture; may be given several times")
    parser.add_argument(
        "--prompt", help="question or instruction (default: what does the picture show ?), where a model reads one"
    )
    parser.add_argument(
        "--decoder_prompt", help="text that the decoder reads before it answers, where a model asks for one"
    )
    parser.add_argument(
        "--words",
        action="append",
        help='JSON of the words on a picture, for a model that reads them: [{"text": ..., "box": [left, top, right, '
        "bottom]}], in thousandths of the page; one for each --image",
    )
    parser.add_argument("--group", help="group of the sample, where a policy leaves early for some groups alone")
    parser.add_argument("--max_new_tokens", type=int, default=None)
    parser.add_argument("--runtime", help="torch, onnxruntime (the same answers, on CPUs often faster) or auto")
    parser.add_argument("--sample", action="store_true", help="draw tokens; what is certified is the best ones")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --sample")
    parser.add_argument("--top_k", type=int, default=0, help="of --sample: only so many of the best tokens; 0 is all")
    parser.add_argument("--top_p", type=float, default=1.0, help="of --sample: only the likeliest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    found = parser.parse_args(args)
    from lightning_mue.export import load
    from lightning_mue.picture_files import read_pages, read_pictures

    how = {name: getattr(found, name) for name in ("temperature", "top_k", "top_p", "seed")}
    engine, pictures = load(found.bundle, runtime=found.runtime), read_pictures(found.image)
    given: dict[str, Any] = {"decoder_prompts": found.decoder_prompt, "groups": found.group}
    given = {name: [text] * len(pictures) for name, text in given.items() if text is not None}
    given["words"] = None if found.words is None else read_pages(found.words)
    prompt = found.prompt or ("what does the picture show ?" if engine.reads_prompts else "")
    for answer in engine.answer(
        pictures, [prompt] * len(pictures), found.max_new_tokens, do_sample=found.sample, **given, **how
    ):
        print(answer)


def _embed(args: Sequence[str]) -> None:
    from lightning_mue.embed_command import main as embed

    embed(_parser("embed"), args)


def _benchmark(args: Sequence[str]) -> None:
    from lightning_mue.benchmark.command import main as benchmark

    benchmark(_parser("benchmark"), args)


def _check(args: Sequence[str]) -> None:
    parser = _parser("check")
    parser.add_argument("factory", help="module:function that returns a model and what makes inputs of n samples")
    found = parser.parse_args(args)
    from lightning_mue.check import check, named

    failed = 0
    for finding in check(named(found.factory)):
        print(finding, flush=True)
        failed += finding.holds is False
    sys.exit(f"mue check: {failed} of these do not hold" if failed else 0)


def _policy(args: Sequence[str]) -> None:
    parser = _parser("policy")
    parser.add_argument("action", choices=["show"])
    parser.add_argument("file", help="policy.json")
    found = parser.parse_args(args)
    from lightning_mue.policy import ExitPolicy

    policy = ExitPolicy.load(found.file)
    print(policy.depths_in_words())
    print(policy.certificate.explained() if policy.certificate else "Uncalibrated: no promise is made.")


def _data(args: Sequence[str]) -> None:
    from lightning_mue.data.importers.command import add_commands, run

    parser = _parser("data")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME", title="which data")
    scenes = names.add_parser("scenes", help="the built-in data", description="Draws scenes and writes them as shards.")
    scenes.add_argument("--out", required=True, help="folder for the shards")
    scenes.add_argument("--train", type=int, default=10_000, help="training pictures")
    scenes.add_argument("--val", type=int, default=2_000, help="validation pictures")
    scenes.add_argument("--test", type=int, default=0, help="test pictures")
    scenes.add_argument("--size", type=int, default=48, help="pixels a side")
    scenes.add_argument("--seed", type=int, default=0)
    add_commands(names)
    found = parser.parse_args(args)
    if found.name != "scenes":
        run(found)
        return
    from lightning_mue.data.scenes import write_scenes

    for split in ("train", "val", "test"):
        if count := getattr(found, split):
            shards = write_scenes(found.out, count, found.seed, split, found.size)
            print(f"{split}: {count} pictures in {len(shards)} shards under {found.out}")


if __name__ == "__main__":
    main()
