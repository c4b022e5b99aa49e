"""EmbedEngine: embeddings of pictures and texts that leave their towers early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import EncoderStream, StreamState, fingerprint, view
from lightning_mue.backbones.contrastive import text_ids as text_ids_of
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import attached
from lightning_mue.inference.check import check_policy
from lightning_mue.inference.encode import climb
from lightning_mue.policy import ExitPolicy


@dataclass(frozen=True)
class Embedded:
    """Embeddings.

    Args:
        vectors: of unit length, ``[B, E]``.
        depths: layers that each went through, int64 ``[B]``.
        layer_runs: layer executions (calls).
    """

    vectors: Tensor
    depths: Tensor
    layer_runs: int


class EmbedEngine:
    """Embeds pictures and texts under an exit policy; ``ExitPolicy.full_depth()`` is the plain model.

    Args:
        model: a backbone that compares pictures with texts (CoCa), with exits attached if the policy needs them; put
            into eval mode.
        policy: its rules for the streams of pictures and texts are obeyed, others are not asked. Certificates speak of
            answers, not of embeddings.
        check_fingerprint: refuse a policy made for other weights.
        processor: makes tensors of pictures and texts; only ``embed_images`` and ``embed_texts`` need it.

    Raises:
        ValueError: the model compares nothing, or the policy does not fit.
    """

    def __init__(
        self, model: nn.Module, policy: ExitPolicy, check_fingerprint: bool = True, processor: Any = None
    ) -> None:
        self.model, self.policy, self.processor = model.eval(), policy, processor
        self.backbone, self.exits = view(model), attached(model)
        if self.backbone.contrastive is None:
            raise ValueError(f"{type(model).__name__} compares no pictures with texts; CoCa does.")
        if policy.groups is not None:
            raise ValueError(
                f"The policy leaves early for the groups {list(policy.groups)} alone; embeddings have none."
            )
        if policy.precision is not None:
            raise ValueError(f"Embeddings are computed as the model is, and the policy asks for {policy.precision!r}.")
        check_policy(policy, self.backbone, self.exits)
        if check_fingerprint and policy.fingerprint is not None and policy.fingerprint != (found := fingerprint(model)):
            raise ValueError(
                f"The policy was calibrated for weights with fingerprint {policy.fingerprint}, this model has {found}; "
                "calibrate again."
            )
        self.contrastive = self.backbone.contrastive

    @torch.inference_mode()
    def images(self, pixel_values: Tensor) -> Embedded:
        """Embed pictures ``[B, 3, H, W]``."""
        state, found = self._climb(self.contrastive.image, {"pixel_values": pixel_values})
        return Embedded(self.contrastive.image_embedding(state), *found)

    @torch.inference_mode()
    def texts(self, text_ids: Tensor) -> Embedded:
        """Embed texts ``[B, T]``: start token, text, end token, padded on the right; here to the model's length.

        Raises:
            ValueError: texts longer than the model's.
        """
        given = text_ids_of(text_ids[:, 1:], 0, self.contrastive)
        given[:, 0] = text_ids[:, 0]
        state, found = self._climb(self.contrastive.text, {"text_ids": given})
        return Embedded(self.contrastive.text_embedding(state), *found)

    def embed_images(self, images: Sequence[Any]) -> Embedded:
        """Embed PIL pictures."""
        return self.images(self._of_processor()(images, [""] * len(images))["pixel_values"].to(self._device))

    def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """Embed texts."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"`texts` must be a list of at least one text, got {texts!r}")
        labels_BT, settings = self._of_processor().labels(texts), self.backbone.decode_settings(None)
        return self.texts(text_ids_of(labels_BT, settings.start_id, self.contrastive).to(self._device))

    def _climb(self, stream: EncoderStream, inputs: Inputs) -> tuple[StreamState, tuple[Tensor, int]]:
        state = stream.prologue(inputs, {})
        h_BTD, depth_B, runs = climb(stream, self.exits, state.at(state.h_BTD), self.policy.rules.get(stream.name))
        return state.at(h_BTD), (depth_B, runs)

    def _of_processor(self) -> Any:
        if self.processor is None:
            raise ValueError("This engine has no processor; pass one, or use `images` and `texts`.")
        return self.processor

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
