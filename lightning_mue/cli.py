"""The command ``mue``: LightningCLI's subcommands and ours behind one thin dispatcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _freeze(args: Sequence[str]) -> None:
    parser = _parser("freeze")
    parser.add_argument("-c", "--config", help="accepted and not needed: the checkpoint knows its recipe")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of `mue fit`")
    parser.add_argument("--policy", help="policy.json; the one beside the checkpoint if not given, else full depth")
    parser.add_argument("--embed-policy", help="embed_policy.json, likewise; without one, embeddings obey the other")
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
    found = parser.parse_args(args)
    from lightning_mue.checkpoint import load_checkpoint
    from lightning_mue.export import freeze
    from lightning_mue.export.manifest import bundle_size
    from lightning_mue.policy_file import find_embed_policy, find_policy

    module, processor = load_checkpoint(found.ckpt_path)
    policy = find_policy(found.policy, found.ckpt_path)
    policy = policy.as_drafts() if found.verified else policy
    # Graphs do not embed: a policy that only lies there is then left out.
    embeds = found.embed_policy is not None or found.runtime is None
    embed_policy = find_embed_policy(found.embed_policy, found.ckpt_path) if embeds else None
    how = {"runtime": found.runtime, "graphs": found.graphs, "embed_policy": embed_policy}
    bundle = freeze(module.model, policy, found.out, processor, **how)
    weights, rest = bundle_size(bundle)
    print(f"{bundle}: {policy.depths_in_words()}")
    print(f"{weights / 1e6:.1f} MB of weights{' and graphs' if found.runtime else ''}, {rest / 1e6:.1f} MB of all else")
    for of in (policy, embed_policy):
        if of is not None and of is not policy:
            print(f"Embeddings: {of.depths_in_words()}")
        if of is not None and of.certificate is not None:
            print(of.certificate.in_words())


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

    how = {name: getattr(found, name) for name in ("temperature", "top_k", "top_p", "seed")}
    engine, pictures = load(found.bundle, runtime=found.runtime), _pictures(found.image)
    given = (None if text is None else [text] * len(pictures) for text in (found.decoder_prompt, found.group))
    prompt = found.prompt or ("what does the picture show ?" if engine.reads_prompts else "")
    for answer in engine.answer(
        pictures, [prompt] * len(pictures), found.max_new_tokens, *given, do_sample=found.sample, **how
    ):
        print(answer)


def _embed(args: Sequence[str]) -> None:
    parser = _parser("embed")
    parser.add_argument("bundle", help="folder made by `mue freeze` of a model that compares (CoCa)")
    parser.add_argument("--image", action="append", default=[], help="picture; may be given several times")
    parser.add_argument("--text", action="append", default=[], help="text; may be given several times")
    parser.add_argument(
        "--classes",
        nargs="?",
        const="",
        help="file of classes, one a line, of which the likeliest are told for each picture; without a name, those "
        "that the policy was calibrated for",
    )
    parser.add_argument("--out", help=".npz file for the embeddings: `image` [B, E], `text` [C, E]")
    found = parser.parse_args(args)
    if not found.image and (not found.text or found.classes is not None):
        parser.error("give an --image" + ("" if found.classes is not None else " or a --text"))
    from lightning_mue.export import load_embedder

    engine = load_embedder(found.bundle)
    if found.classes is not None:
        _classify(engine, found.image, found.classes)
        return
    image = engine.embed_images(_pictures(found.image)) if found.image else None
    text = engine.embed_texts(found.text) if found.text else None
    for name, part in (("image", image), ("text", text)):
        if part is not None:
            print(f"{name}: {part.vectors.shape[1]} numbers each; layers run {part.depths.tolist()}")
    if image is not None and text is not None:
        for path, row in zip(found.image, (image.vectors @ text.vectors.T).tolist(), strict=True):
            print(path)
            for cosine, words in sorted(zip(row, found.text, strict=True), reverse=True):
                print(f"  {cosine:+.3f}  {words}")
    if found.out:
        import io

        import numpy as np

        from lightning_mue.files import write_bytes

        parts: dict[str, Any] = {
            name: part.vectors.cpu().numpy() for name, part in (("image", image), ("text", text)) if part
        }
        buffer = io.BytesIO()
        np.savez(buffer, **parts)
        write_bytes(Path(found.out), buffer.getvalue())
        print(found.out)


def _classify(engine: Any, paths: Sequence[str], file: str) -> None:
    """Print the five likeliest classes of each picture."""
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else engine.policy.classes
    classes = [line.strip() for line in lines if line.strip()]
    for path, row in zip(paths, engine.classify(_pictures(paths), classes or None).tolist(), strict=True):
        print(path)
        for probability, name in sorted(zip(row, classes, strict=True), reverse=True)[:5]:
            print(f"  {probability:.3f}  {name}")


def _pictures(paths: Sequence[str]) -> list[Any]:
    """Read pictures.

    Raises:
        ValueError: a file that is none.
    """
    from PIL import Image

    pictures = []
    for path in paths:
        try:
            pictures.append(Image.open(path).convert("RGB"))
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
            raise ValueError(f"{path} must be a picture, and it cannot be read as one: {error}") from error
    return pictures


def _benchmark(args: Sequence[str]) -> None:
    from lightning_mue.benchmark.command import main as benchmark

    benchmark(_parser("benchmark"), args)


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
