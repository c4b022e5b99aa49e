"""Swin towers as a stream: exits inside the longest stage, as in DaViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.backbones.stream import Inputs, LayerCall, Outputs, StreamState

Grid = tuple[int, int]


class SwinStream:
    """The longest stage of a ``SwinModel`` or ``DonutSwinModel``; earlier stages are the prologue.

    Its patch merging, the later stages and the final norm, which Donut's towers have not, are the epilogue.

    Args:
        encoder: the tower.
    """

    name = "vision"

    def __init__(self, encoder: Any) -> None:
        self._encoder, self._stages = encoder, encoder.encoder.layers
        depths = [len(stage.blocks) for stage in self._stages]
        self._long = depths.index(max(depths))
        self.num_layers = max(depths)
        self.width = encoder.config.embed_dim * 2**self._long

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Patches, and the stages before the long one."""
        embeddings = self._encoder.embeddings
        pixels = inputs["pixel_values"].to(embeddings.patch_embeddings.projection.weight.dtype)
        h_BTD, grid = embeddings(pixels)
        for stage in self._stages[: self._long]:
            h_BTD, grid = stage(h_BTD, grid)[0], _merged(stage, grid)
        return StreamState(h_BTD, grid=grid)

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One block; its windows fix the picture's size."""
        assert state.grid is not None
        return LayerCall(_Block(self._stages[self._long].blocks[k - 1], state.grid), (state.h_BTD,), ((0,),))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one block."""
        return self._stages[self._long].blocks[k - 1](state.h_BTD, state.grid)[0]

    def epilogue(self, state: StreamState) -> Tensor:
        """Run what follows the long stage: the tokens of the picture, ``[B, S, width of the last stage]``."""
        assert state.grid is not None
        h_BTD, grid, (long, *later) = state.h_BTD, state.grid, self._stages[self._long :]
        if long.downsample is not None:
            h_BTD, grid = long.downsample(h_BTD, grid), _merged(long, grid)
        for stage in later:
            h_BTD, grid = stage(h_BTD, grid)[0], _merged(stage, grid)
        return self._encoder.layernorm(h_BTD) if hasattr(self._encoder, "layernorm") else h_BTD


def _merged(stage: Any, grid: Grid) -> Grid:
    """Return the grid that a stage leaves behind: its patch merging joins two by two."""
    return grid if stage.downsample is None else ((grid[0] + 1) // 2, (grid[1] + 1) // 2)


class _Block(nn.Module):
    """A block whose input has the name that all streams' states have in a graph."""

    def __init__(self, block: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.block, self.height, self.width = block, *grid

    def forward(self, h_BTD: Tensor) -> Tensor:
        result_BTD: Tensor = self.block(h_BTD, (self.height, self.width))[0]
        return result_BTD
