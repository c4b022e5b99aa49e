"""How attention is computed: as a config says, and in blocks that call torch's own whatever it says: open_clip's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Literal["eager", "sdpa"]


def attention(how: Attention) -> AbstractContextManager[None]:
    """Return a context in which torch's attention is written out, or is left as it is.

    The fused kernel's backward is slow in bf16 on CPUs.
    """
    return sdpa_kernel(SDPBackend.MATH) if how == "eager" else nullcontext()


def set_attention(model: Any, how: Attention) -> None:
    """Let a model of transformers compute attention so; BLIP always writes it out, and would warn each time."""
    if model._supports_sdpa:
        model.set_attn_implementation(how)
