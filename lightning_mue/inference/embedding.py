"""EmbedEngine: embeddings of pictures and texts that leave their towers early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import EncoderStream, fingerprint, view
from lightning_mue.backbones.contrastive import text_ids as text_ids_of
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import attached
from lightning_mue.inference.check import check_policy
from lightning_mue.inference.embed_branch import EmbedBranch
from lightning_mue.inference.encode import climb
from lightning_mue.policy import ExitPolicy, ExitRule

CHUNK = 64
"""Texts that are embedded at once where there are many."""


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
        policy: its rules for the streams of pictures and texts are obeyed, others are not asked. That of
            CalibrateEmbeddings is certified for embeddings; certificates of CalibrateExits speak of answers.
        check_fingerprint: refuse a policy made for other weights.
        processor: makes tensors of pictures and texts; ``embed_images``, ``embed_texts`` and classes need it.

    Attributes:
        contrastive: the backbone's streams of pictures and texts.
        classes_CE: the policy's classes at full depth, unit vectors ``[C, E]``; None if there are none, or nothing to
            make them with.

    Raises:
        ValueError: the model compares nothing, the policy does not fit, or its classes cannot be embedded.
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
        check_policy(policy, self.backbone, self.exits, embeds=True)
        if check_fingerprint and policy.fingerprint is not None and policy.fingerprint != (found := fingerprint(model)):
            raise ValueError(
                f"The policy was calibrated for weights with fingerprint {policy.fingerprint}, this model has {found}; "
                "calibrate again."
            )
        self.contrastive = self.backbone.contrastive
        reads_classes = policy.classes and (policy.asks_classes or processor is not None)
        self.classes_CE = self.full_depth_texts(policy.classes) if reads_classes else None

    @torch.inference_mode()
    def images(self, pixel_values: Tensor) -> Embedded:
        """Embed pictures ``[B, 3, H, W]``."""
        stream = self.contrastive.image
        rule = self.policy.rules.get(stream.name)
        return self._climb(stream, self.image_branch(), {"pixel_values": pixel_values}, rule)

    @torch.inference_mode()
    def texts(self, text_ids: Tensor) -> Embedded:
        """Embed texts ``[B, T]``: start token, text, end token, padded on the right; here to the model's length.

        Raises:
            ValueError: texts longer than the model's.
        """
        given = text_ids_of(text_ids[:, 1:], 0, self.contrastive)
        given[:, 0] = text_ids[:, 0]
        stream = self.contrastive.text
        return self._climb(stream, self.text_branch(), {"text_ids": given}, self.policy.rules.get(stream.name))

    def embed_images(self, images: Sequence[Any]) -> Embedded:
        """Embed PIL pictures."""
        return self.images(self._of_processor()(images, [""] * len(images))["pixel_values"].to(self._device))

    def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """Embed texts."""
        return self.texts(self._text_ids(texts))

    @torch.inference_mode()
    def full_depth_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors ``[C, E]`` of texts whatever the policy: a gallery is embedded once, and in advance."""
        stream, branch, ids = self.contrastive.text, self.text_branch(), self._text_ids(texts).split(CHUNK)
        return torch.cat([self._climb(stream, branch, {"text_ids": part}, None).vectors for part in ids])

    def classify(self, images: Sequence[Any], classes: Sequence[str] | None = None) -> Tensor:
        """Return the probability of each class for each PIL picture, ``[B, C]``, at the model's temperature.

        Args:
            images: the pictures.
            classes: texts of the classes, in full, such as "a photo of a dog"; the policy's if not given. Certificates
                are of the policy's alone.

        Raises:
            ValueError: there are no classes.
        """
        if classes is None and self.classes_CE is None:
            raise ValueError("The policy names no classes; give some, such as `classes=['a photo of a dog', ...]`.")
        texts_CE = self.classes_CE if classes is None else self.full_depth_texts(classes)
        assert texts_CE is not None
        vectors_BE = self.embed_images(images).vectors
        with torch.inference_mode():
            return self.contrastive.logits(vectors_BE, texts_CE).float().softmax(-1)

    def image_branch(self) -> EmbedBranch:
        """Return what leaving the stream of pictures gives, and its signals."""
        contrastive, classes_CE = self.contrastive, self.classes_CE
        logits = None if classes_CE is None else lambda vectors_BE: contrastive.logits(vectors_BE, classes_CE)
        return EmbedBranch(contrastive.image.name, self.exits, contrastive.image_embedding, logits)

    def text_branch(self) -> EmbedBranch:
        """Return the same of the stream of texts."""
        return EmbedBranch(self.contrastive.text.name, self.exits, self.contrastive.text_embedding)

    def _climb(self, stream: EncoderStream, branch: EmbedBranch, inputs: Inputs, rule: ExitRule | None) -> Embedded:
        return Embedded(*climb(stream, branch, stream.prologue(inputs, {}), rule))

    def _text_ids(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"`texts` must be a list of at least one text, got {texts!r}")
        labels_BT, settings = self._of_processor().labels(texts), self.backbone.decode_settings(None)
        return text_ids_of(labels_BT, settings.start_id, self.contrastive).to(self._device)

    def _of_processor(self) -> Any:
        if self.processor is None:
            raise ValueError("This engine has no processor; pass one, or use `images` and `texts`.")
        return self.processor

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
