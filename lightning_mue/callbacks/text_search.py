"""TextSearch: which texts pictures look for, and among which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.promise import OF_EMBEDDINGS


@dataclass(frozen=True)
class TextSearch:
    """The task that a metric of embeddings scores.

    Args:
        metric: one of ``promise.OF_EMBEDDINGS``.
        candidates: with recall, how many texts are drawn at most.
        seed: of the draw.
        classes: names of the classes, as references name them. With ``top_1`` pictures are told apart by these alone.
        template: makes a text of a class's name, such as ``a photo of a {}``.

    Raises:
        ValueError: what does not fit.
    """

    metric: str
    candidates: int = 500
    seed: int = 0
    classes: tuple[str, ...] = ()
    template: str = "{}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.metric not in OF_EMBEDDINGS:
            raise ValueError(
                f"`metric` must be one of {list(OF_EMBEDDINGS)}, got {self.metric!r}; CalibrateExits is for answers"
            )
        if self.candidates <= self.within:
            raise ValueError(f"`candidates` must be more than {self.within} for {self.metric!r}, got {self.candidates}")
        if self.template.count("{}") != 1:
            raise ValueError(f"`template` must hold one {{}}, where the class goes, got {self.template!r}")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"`classes` must be two or more distinct names, got {list(self.classes)}")
        if self.metric == "top_1" and not self.classes:
            raise ValueError("Metric 'top_1' tells `classes` apart; name them.")

    @property
    def within(self) -> int:
        """A picture has found its text if that is among so many."""
        return OF_EMBEDDINGS[self.metric]

    @property
    def class_texts(self) -> tuple[str, ...]:
        """The texts of the classes, in full."""
        return tuple(self.template.replace("{}", name) for name in self.classes)

    def own(self, references: Sequence[str]) -> list[str]:
        """Return the texts that a picture with these references should find; none if it does not count."""
        if self.metric != "top_1":
            return list(references)
        return [text for name, text in zip(self.classes, self.class_texts, strict=True) if name in references]

    def among(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Return the candidates: those of the classes, or a draw of these ``texts`` that knows no order of theirs.

        Raises:
            ValueError: there are too few to tell anything.
        """
        if self.metric == "top_1":
            return self.class_texts
        distinct = sorted(set(texts))
        if len(distinct) <= self.within:
            raise ValueError(
                f"Metric {self.metric!r} needs more than {self.within} distinct texts to look among; the data to "
                f"propose on has {len(distinct)}. Give more validation data."
            )
        rng, count = np.random.default_rng(self.seed), min(self.candidates, len(distinct))
        return tuple(distinct[i] for i in sorted(rng.choice(len(distinct), count, replace=False)))
