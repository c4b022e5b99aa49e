"""The model card of a bundle, written for whoever finds the folder."""

from __future__ import annotations

import json
import math

from lightning_mue.certificate import ONE_SIDE, VERIFIED
from lightning_mue.policy import ExitPolicy


def model_card(
    policy: ExitPolicy,
    name: str,
    table: str | None,
    has_processor: bool,
    is_graphs: bool = False,
    reads_prompts: bool = True,
    embed_policy: ExitPolicy | None = None,
    embed_text_policy: ExitPolicy | None = None,
    both_early: bool = False,
) -> str:
    """Return the card as Markdown: the promise, the policy, the comparison, how to use it, what it rests on.

    Args:
        policy: of the bundle, with its fingerprint.
        name: of the bundle's folder.
        table: the comparison as Markdown, or None.
        has_processor: whether the bundle takes pictures and text, or tensors.
        is_graphs: whether it holds graphs, and needs no torch.
        reads_prompts: whether the model does, beside the picture.
        embed_policy: what embeddings obey, if not the policy.
        embed_text_policy: what those of texts obey, if not that.
        both_early: whether pictures and texts may both leave early.
    """
    prompt = "your prompt" if reads_prompts else ""
    parts = [
        "---\nlibrary_name: lightning_mue\npipeline_tag: image-text-to-text\ntags:\n- early-exit\n---\n",
        f"# {name}\n",
        f"{_promise(policy)}\n",
        f"## Policy\n\n{_rules(policy)}\n",
        _embeddings(embed_policy, embed_text_policy, both_early),
        f"## Comparison\n\n{table.strip()}\n" if table else "",
        f"## Use\n\n```python\n{_usage(name, has_processor, policy.groups, prompt)}\n```\n",
        f"It loads without {'torch' if is_graphs else 'Lightning'}: "
        f"{'ONNX, ' if is_graphs else ''}safetensors and JSON, never pickle. "
        "Files that are damaged or of another bundle are refused by name.\n",
        f"## What it rests on\n\n{_provenance(policy)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _promise(policy: ExitPolicy) -> str:
    if policy.certificate is not None:
        return policy.certificate.in_words()
    return VERIFIED if policy.verified else "No certificate: this policy was not calibrated."


def _embeddings(embeds: ExitPolicy | None, of_texts: ExitPolicy | None, both_early: bool) -> str:
    """Return what embeddings obey; nothing if that is the policy of answers."""
    given = {"": embeds, "Of texts:": of_texts}
    parts = [f"{words}\n\n{_promise(p)}\n\n{_rules(p)}".strip() for words, p in given.items() if p is not None]
    if not parts:
        return ""
    note = [f"{ONE_SIDE} `full_depth` of the engine embeds a gallery."] if both_early else []
    return "\n\n".join(["## Embeddings", *parts, *note, "`mue.load_embedder` obeys this.\n"])


def _rules(policy: ExitPolicy) -> str:
    if policy.is_full_depth:
        return "Full depth: every stream runs all of its layers."
    lines = ["| stream | signal | leave after layer: if the score is at least |", "| --- | --- | --- |"]
    for stream, rule in policy.rules.items():
        exits = ", ".join(
            f"{layer}: always" if rule.signal == "static" else f"{layer}: {threshold:.4g}"
            for layer, threshold in zip(rule.layers, rule.thresholds, strict=True)
            if threshold < math.inf
        )
        lines.append(f"| {stream} | {rule.signal} | {exits or 'never'} |")
    return "\n".join(lines)


def _usage(name: str, has_processor: bool, groups: tuple[str, ...] | None, prompt: str) -> str:
    group = f", groups=[{groups[0]!r}]" if groups else ""
    if has_processor:
        return (
            "import lightning_mue as mue\nfrom PIL import Image\n\n"
            f'engine = mue.load("{name}")\n'
            f'print(engine.answer([Image.open("picture.jpg")], ["{prompt}"]{group}))'
        )
    return (
        f'import lightning_mue as mue\n\nengine = mue.load("{name}")\n'
        f"out = engine.generate(**inputs{group})  # the backbone's own tensors\nprint(out.sequences, out.exit_depths)"
    )


def _provenance(policy: ExitPolicy) -> str:
    facts: dict[str, object] = {"weights": policy.fingerprint}
    if certificate := policy.certificate:
        facts |= {
            "data": certificate.data_fingerprint,
            "calibration split": certificate.split_hash,
            "seed": certificate.seed,
            "decoding": json.dumps(dict(certificate.decode), sort_keys=True) if certificate.decode else "",
            "versions": ", ".join(f"{k} {v}" for k, v in sorted(certificate.versions.items())),
        }
    return "\n".join(f"* {key}: `{value}`" for key, value in facts.items() if value not in ("", None))
