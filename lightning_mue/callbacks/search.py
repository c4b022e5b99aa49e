"""Search: what queries look for, and among which candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from lightning_mue.inference.embedding import Query
from lightning_mue.promise import OF_EMBEDDINGS

Proposes = Mapping[str, tuple[str, Sequence[str]]]
"""The samples that propose: name -> cluster, references."""


@dataclass(frozen=True)
class Search:
    """The task that a metric of embeddings scores.

    Args:
        metric: one of ``promise.OF_EMBEDDINGS``.
        query: pictures look for texts, or texts for pictures. Of a sample's references the first is its text then.
        candidates: with recall, how many are drawn at most.
        seed: of the draw.
        classes: names of the classes, as references name them. With ``top_1`` pictures are told apart by these alone.
        template: makes a text of a class's name, such as ``a photo of a {}``.

    Raises:
        ValueError: what does not fit.
    """

    metric: str
    query: Query = "picture"
    candidates: int = 500
    seed: int = 0
    classes: tuple[str, ...] = ()
    template: str = "{}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.query not in get_args(Query):
            raise ValueError(f"`query` must be one of {list(get_args(Query))}, got {self.query!r}")
        if self.metric not in OF_EMBEDDINGS:
            raise ValueError(
                f"`metric` must be one of {list(OF_EMBEDDINGS)}, got {self.metric!r}; CalibrateExits is for answers"
            )
        if self.query == "text" and (self.metric == "top_1" or self.classes):
            raise ValueError(
                "Pictures are told apart by class, texts are not: with `query='text'` leave `classes` out and take a "
                f"recall, got {self.metric!r} and {len(self.classes)} classes"
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
        """A query has found its own if that is among so many."""
        return OF_EMBEDDINGS[self.metric]

    @property
    def others(self) -> str:
        """What is looked for."""
        return "texts" if self.query == "picture" else "pictures"

    @property
    def class_texts(self) -> tuple[str, ...]:
        """The texts of the classes, in full."""
        return tuple(self.template.replace("{}", name) for name in self.classes)

    def own(self, references: Sequence[str]) -> list[str]:
        """Return a sample's texts: those that its picture should find, or the one that should find its picture.

        A candidate that has one of them is the query's own. There are none if the sample does not count.
        """
        if self.metric != "top_1":
            return list(references if self.query == "picture" else references[:1])
        return [text for name, text in zip(self.classes, self.class_texts, strict=True) if name in references]

    def among(self, proposes: Proposes) -> dict[str, list[str]]:
        """Return candidate -> its texts: those of the classes, or a draw that knows no order of the samples.

        A text is its own candidate. A cluster gives one picture, that of its first sample by name, with what is said of
        all; so samples that share a picture do not crowd the first places.

        Raises:
            ValueError: there are too few to tell anything.
        """
        if self.metric == "top_1":
            return {text: [text] for text in self.class_texts}
        found = _texts(proposes) if self.query == "picture" else _pictures(proposes)
        names = sorted(found)
        if len(names) <= self.within:
            raise ValueError(
                f"Metric {self.metric!r} needs more than {self.within} distinct {self.others} to look among; the data "
                f"to propose on has {len(names)}. Give more validation data."
            )
        rng, count = np.random.default_rng(self.seed), min(self.candidates, len(names))
        return {names[i]: found[names[i]] for i in sorted(rng.choice(len(names), count, replace=False))}


def _texts(proposes: Proposes) -> dict[str, list[str]]:
    return {text: [text] for _, references in proposes.values() for text in references}


def _pictures(proposes: Proposes) -> dict[str, list[str]]:
    first, said = dict[str, str](), dict[str, set[str]]()
    for name, (cluster, references) in sorted(proposes.items()):
        said.setdefault(first.setdefault(cluster, name), set()).update(references)
    return {name: sorted(texts) for name, texts in said.items()}
