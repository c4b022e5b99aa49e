"""How attention is computed in blocks that call torch's own, whatever their model's config says: open_clip's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Literal["eager", "sdpa"]


def attention(how: Attention) -> AbstractContextManager[None]:
    """Return a context in which torch's attention is written out, or is left as it is.

    The fused kernel's backward is slow in bf16 on CPUs.
    """
    return sdpa_kernel(SDPBackend.MATH) if how == "eager" else nullcontext()
