"""Which file a command's policy is read from: the one that is named, else the one beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning_mue.policy import ExitPolicy

POLICY, EMBED_POLICY, EMBED_TEXT_POLICY = "policy.json", "embed_policy.json", "embed_text_policy.json"
"""Names beside a checkpoint and in bundles: the policy of answers, that of embeddings, and that of texts as queries."""

EMBED_POLICIES = {"picture": EMBED_POLICY, "text": EMBED_TEXT_POLICY}
"""Where what is calibrated for queries of either side lies."""


def find_policy(path: str | None, ckpt_path: str | None) -> ExitPolicy:
    """Return the policy at ``path``, else the one beside the checkpoint, else full depth."""
    return _find(path, ckpt_path, POLICY) or ExitPolicy.full_depth()


def find_embed_policy(path: str | None, ckpt_path: str | None, query: str = "picture") -> ExitPolicy | None:
    """Return the policy of embeddings at ``path``, else the one beside the checkpoint, else None."""
    return _find(path, ckpt_path, EMBED_POLICIES[query])


def _find(path: str | None, ckpt_path: str | None, name: str) -> ExitPolicy | None:
    if path is not None:
        return ExitPolicy.load(path)
    beside = Path(ckpt_path).parent / name if ckpt_path else None
    return ExitPolicy.load(beside) if beside is not None and beside.exists() else None
