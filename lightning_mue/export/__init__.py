"""Bundles: frozen weights, their policy and everything needed to answer, in one folder. Runs without Lightning."""

from lightning_mue.export.freeze import freeze
from lightning_mue.export.load import load

__all__ = ["freeze", "load"]
