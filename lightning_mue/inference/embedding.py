"""EmbedEngine: embeddings of pictures and texts that leave their towers early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_mue.backbones import fingerprint, view
from lightning_mue.backbones.contrastive import text_ids as text_ids_of
from lightning_mue.exits import attached
from lightning_mue.inference.check import check_policy, check_text_policy, leave_both_early
from lightning_mue.inference.embed_branch import EmbedBranch
from lightning_mue.inference.encode import climb
from lightning_mue.policy import ExitPolicy

Query = Literal["picture", "text"]
"""Which side looks for the other."""

CHUNK = 64
"""Pictures or texts that are embedded at once where a list has many."""

Item = TypeVar("Item")


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
        text_policy: what texts obey instead (``CalibrateEmbeddings(query="text")``); ``policy`` if not given.

    Attributes:
        contrastive: the backbone's streams of pictures and texts.
        classes_CE: the policy's classes at full depth, unit vectors ``[C, E]``; None if there are none, or nothing to
            make them with.

    Raises:
        ValueError: the model compares nothing, a policy does not fit, or its classes cannot be embedded.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ExitPolicy,
        check_fingerprint: bool = True,
        processor: Any = None,
        text_policy: ExitPolicy | None = None,
    ) -> None:
        self.model, self.policy, self.processor = model.eval(), policy, processor
        self.text_policy = policy if text_policy is None else text_policy
        self.backbone, self.exits = view(model), attached(model)
        if self.backbone.contrastive is None:
            raise ValueError(f"{type(model).__name__} compares no pictures with texts; CoCa does.")
        self.contrastive = self.backbone.contrastive
        for each in [policy] if text_policy is None else [policy, text_policy]:
            self._check(each)
        if text_policy is not None:
            check_text_policy(text_policy, self.backbone)
        if check_fingerprint:
            self._check_fingerprint()
        reads_classes = policy.classes and (policy.asks_classes or processor is not None)
        self.classes_CE = self.full_depth.embed_texts(policy.classes).vectors if reads_classes else None

    @property
    def full_depth(self) -> EmbedEngine:
        """The same model, in which nothing leaves early: a gallery is embedded with it, once and in advance."""
        return EmbedEngine(self.model, ExitPolicy.full_depth(), False, self.processor)

    @property
    def leaves_both_early(self) -> bool:
        """Whether pictures and texts may both leave early; certificates are of one side and a gallery of the other."""
        return leave_both_early(self.policy, self.text_policy, self.backbone)

    @torch.inference_mode()
    def embed(self, query: Query, given: Tensor) -> Embedded:
        """Embed what a tower reads: pictures ``[B, 3, H, W]``, or whole texts ``[B, longest]`` as of ``text_ids``."""
        branch, policy = self.branch(query), self.policy if query == "picture" else self.text_policy
        return Embedded(*climb(branch.stream, branch, branch.start(given), policy.rules.get(branch.stream.name)))

    def images(self, pixel_values: Tensor) -> Embedded:
        """Embed pictures ``[B, 3, H, W]``."""
        return self.embed("picture", pixel_values)

    def texts(self, text_ids: Tensor) -> Embedded:
        """Embed texts ``[B, T]``: start token, text, end token, padded on the right; here to the model's length.

        Raises:
            ValueError: texts longer than the model's.
        """
        given = text_ids_of(text_ids[:, 1:], 0, self.contrastive)
        given[:, 0] = text_ids[:, 0]
        return self.embed("text", given)

    def embed_images(self, images: Sequence[Any]) -> Embedded:
        """Embed PIL pictures."""
        processor = self._of_processor()
        parts = (processor(part, [""] * len(part))["pixel_values"] for part in _chunks(images, "images"))
        return _joined([self.images(part.to(self._device)) for part in parts])

    def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """Embed texts."""
        return _joined([self.embed("text", self.text_ids(part)) for part in _chunks(texts, "texts")])

    def text_ids(self, texts: Sequence[str]) -> Tensor:
        """Return texts as the model reads them, ``[B, longest]``."""
        labels_BT, settings = self._of_processor().labels(texts), self.backbone.decode_settings(None)
        return text_ids_of(labels_BT, settings.start_id, self.contrastive).to(self._device)

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
        texts_CE = self.classes_CE if classes is None else self.full_depth.embed_texts(classes).vectors
        assert texts_CE is not None
        vectors_BE = self.embed_images(images).vectors
        with torch.inference_mode():
            return self.contrastive.logits(vectors_BE, texts_CE).float().softmax(-1)

    def branch(self, query: Query) -> EmbedBranch:
        """Return the tower of pictures or of texts: what leaving it gives, and its signals."""
        contrastive, classes_CE = self.contrastive, self.classes_CE
        if query == "text":
            return EmbedBranch(contrastive.text, "text_ids", self.exits, contrastive.text_embedding)
        logits = None if classes_CE is None else lambda vectors_BE: contrastive.logits(vectors_BE, classes_CE)
        return EmbedBranch(contrastive.image, "pixel_values", self.exits, contrastive.image_embedding, logits)

    def _check(self, policy: ExitPolicy) -> None:
        if policy.groups is not None:
            raise ValueError(
                f"The policy leaves early for the groups {list(policy.groups)} alone; embeddings have none."
            )
        if policy.precision is not None:
            raise ValueError(f"Embeddings are computed as the model is, and the policy asks for {policy.precision!r}.")
        check_policy(policy, self.backbone, self.exits, embeds=True)

    def _check_fingerprint(self) -> None:
        asked = {p.fingerprint for p in (self.policy, self.text_policy) if p.fingerprint is not None}
        if asked and (others := asked - {found := fingerprint(self.model)}):
            raise ValueError(
                f"The policy was calibrated for weights with fingerprint {min(others)}, this model has {found}; "
                "calibrate again."
            )

    def _of_processor(self) -> Any:
        if self.processor is None:
            raise ValueError("This engine has no processor; pass one, or use `images` and `texts`.")
        return self.processor

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _chunks(items: Sequence[Item], name: str) -> list[Sequence[Item]]:
    if isinstance(items, str) or not len(items):
        raise ValueError(f"`{name}` must be a list of at least one {name.removesuffix('s')}, got {items!r}")
    return [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]


def _joined(parts: Sequence[Embedded]) -> Embedded:
    vectors_BE, depths_B = (torch.cat(column) for column in ([p.vectors for p in parts], [p.depths for p in parts]))
    return Embedded(vectors_BE, depths_B, sum(part.layer_runs for part in parts))
