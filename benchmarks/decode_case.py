"""What the decoders' cost table (``decode.py``) decodes: a random model of a shape, a memory, and depths to leave at.

Shapes: ``B`` rows, ``S`` memory tokens, ``D`` width.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones import build_backbone

START, PAD = 2, 1

Clock = Callable[[], float]

Depths = Sequence[Sequence[int]]
"""Row -> exit depth of each token."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and of what it decodes: see ``shapes.json``."""

    like: str
    layers: int
    width: int
    heads: int
    ffn: int
    vocabulary: int
    memory: int
    steps: int


class Case:
    """What all lines of a batch size decode.

    Args:
        shape: of the decoder.
        batch: rows.
        clock: seconds, of the parts too.
        seed: of weights, memory and ragged depths.

    Attributes:
        half: of the layers, rounded down.
        notes: line -> what a reader must know of it, such as why it is left out.
    """

    def __init__(self, shape: Shape, batch: int, clock: Clock, seed: int) -> None:
        self.shape, self.batch, self.clock, self.seed = shape, batch, clock, seed
        self.notes: dict[str, str] = {}
        self._made: dict[Hashable, Any] = {}
        generator = torch.Generator().manual_seed(seed)
        self._memory_BSD = torch.randn(batch, shape.memory, shape.width, generator=generator)
        self.half = shape.layers // 2
        self.depths = {
            "full": [[shape.layers] * shape.steps for _ in range(batch)],
            "static": [[self.half] * shape.steps for _ in range(batch)],
            "ragged": ragged_depths(batch, shape.steps, shape.layers, self.half, seed),
        }

    def memory(self, precision: str) -> Tensor:
        """Return what the decoder reads, as a model of this precision takes it."""
        return self._memory_BSD.bfloat16() if precision == "bf16" else self._memory_BSD

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what all lines share under this key; it is made for the first one."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def model(self, precision: str = "fp32", attention: str = "sdpa") -> Any:
        """Return the model in a precision (``fp32``, ``bf16``, ``int8``), with an attention of transformers."""
        original = self.once("model", lambda: random_model(self.shape, self.seed))
        if (precision, attention) == ("fp32", "sdpa"):
            return original
        return self.once(("model", precision, attention), lambda: changed_copy(original, precision, attention))


def random_model(shape: Shape, seed: int) -> nn.Module:
    """Return a Florence-2 of this decoder; nothing before it is ever run.

    Matrices keep the variance of what they read, and positions weigh more than tokens, which would otherwise choose
    themselves again and again. No token ends an answer.
    """
    std = shape.width**-0.5
    text = {
        "model_type": "bart",
        "vocab_size": shape.vocabulary,
        "d_model": shape.width,
        "encoder_layers": 1,
        "encoder_attention_heads": shape.heads,
        "encoder_ffn_dim": shape.width,
        "decoder_layers": shape.layers,
        "decoder_attention_heads": shape.heads,
        "decoder_ffn_dim": shape.ffn,
        "init_std": std,
        "initializer_range": std,
    }
    one = [1, 1, 1, 1]
    vision = {"depths": one, "embed_dim": [8] * 4, "num_heads": one, "num_groups": one, "projection_dim": shape.width}
    torch.manual_seed(seed)
    model = build_backbone(
        {
            "model_type": "florence2",
            "text_config": text,
            "vision_config": vision,
            "position_std": 6 * std,
            "generation_config": {"decoder_start_token_id": START, "pad_token_id": PAD},
        }
    )
    return model.eval().requires_grad_(False)


def changed_copy(model: Any, precision: str, attention: str) -> nn.Module:
    """Return a copy in bf16, or with dynamic int8 linears, or in fp32, with this attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    if precision == "bf16":
        return model.bfloat16()
    if precision == "int8":
        with warnings.catch_warnings(action="ignore"):  # deprecated, and still the one line that everybody knows
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


def ragged_depths(rows: int, steps: int, layers: int, mean: int, seed: int) -> list[list[int]]:
    """Return row -> depth of each token: drawn evenly from all layers, then some moved by one until the mean is met."""
    rng = np.random.default_rng([seed, rows])
    depths = rng.integers(1, layers + 1, rows * steps)
    while excess := int(depths.sum()) - mean * depths.size:
        movable = np.flatnonzero(depths > 1 if excess > 0 else depths < layers)
        depths[rng.permutation(movable)[: abs(excess)]] -= np.sign(excess)
    return depths.reshape(rows, steps).tolist()


def just_in_time_pairs(depths: Depths) -> int:
    """Return the (position, layer) pairs that these depths need: each position goes as deep as any later token."""
    return int(np.maximum.accumulate(np.array(depths)[:, ::-1], axis=1).sum())
