"""Captions as open_clip's own CoCa makes them: greedy, the whole text run anew for every token.

Its ``CoCa.generate`` does this too, but fails under transformers 5: this is the loop in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.coca_model import CoCa
from torch import Tensor


@torch.inference_mode()
def uncached_captions(
    coca: CoCa, pixel_values: Tensor, start_id: int, end_ids: Sequence[int], max_new_tokens: int
) -> Tensor:
    """Return token ids ``[B, 1 + T]``, the start token first, padding after an end.

    Args:
        coca: the model.
        pixel_values: ``[B, 3, H, W]``; the pictures are run once.
        start_id: the token that captions begin with.
        end_ids: the tokens that end one; none: all are of the full length.
        max_new_tokens: tokens at most.
    """
    latent_BE, image_BSD = coca._encode_image(pixel_values)
    ids_BT = torch.full((len(pixel_values), 1), start_id, device=pixel_values.device)
    ended_B = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=pixel_values.device)
    for _ in range(max_new_tokens):
        out = coca(None, ids_BT, image_latent=latent_BE, image_embs=image_BSD, output_labels=False)
        logits_BV = out["logits"][:, -1]
        logits_BV[:, coca.pad_id] = -torch.inf  # its masks take the token for padding wherever it stands
        next_B = logits_BV.argmax(-1).masked_fill(ended_B, coca.pad_id)
        ids_BT = torch.cat([ids_BT, next_B[:, None]], 1)
        ended_B |= torch.isin(next_B, ends)
        if ended_B.all():
            break
    return ids_BT
