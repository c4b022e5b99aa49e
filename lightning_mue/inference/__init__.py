"""Inference under a policy: schedule, executor, engine, traces and the latency table. Runs without Lightning."""

from lightning_mue.inference.engine import ExitEngine
from lightning_mue.inference.output import ExitOutput

__all__ = ["ExitEngine", "ExitOutput"]
