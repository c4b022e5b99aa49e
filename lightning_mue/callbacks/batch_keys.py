"""BatchKeys: where a batch holds what calibration needs, so that any project's batches will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mue.callbacks.batches import Batch, content, missing_inputs, single

Key = int | str
"""Of a mapping; position in a tuple or list; attribute of anything else."""

Inputs = dict[str, Key] | Key | None


@dataclass(frozen=True)
class BatchKeys:
    """The keys of a batch; what is not given has our own name, and may be missing.

    Args:
        inputs: the backbone's input -> its key; or the key of a mapping that holds all of them; None: the batch does.
        references: accepted answers of each sample, a text or several; without them only ``consistency`` is measured.
        sample_id: a distinct name for each sample; without one, a hash of the sample's inputs.
        cluster: what was drawn independently, such as the picture; without one, every sample by itself.
        group: what promises may be about in turn, such as the type of a question; nothing if not given.
    """

    inputs: Inputs = None
    references: Key | None = None
    sample_id: Key | None = None
    cluster: Key | None = None
    group: Key | None = None

    def read(self, batch: Any, wanted: Sequence[str]) -> Batch:
        """Return the batch under our own names: inputs, ``sample_id``, ``cluster``, ``group``, and ``references``.

        Args:
            batch: a mapping, a tuple, a list or any object with attributes.
            wanted: names of the backbone's inputs.

        Raises:
            ValueError: an input is missing, or a key that was given is.
        """
        ours: Batch = self.inputs_of(batch, wanted)
        size = len(next(iter(ours.values())))
        ids = self._column(batch, "sample_id", size)
        if ids is None:
            nameless = ours | {"sample_id": [""] * size}
            ids = [content(single(nameless, row))[:20] for row in range(size)]
        clusters, references = self._column(batch, "cluster", size), self._column(batch, "references", size)
        ours |= {"sample_id": [str(name) for name in ids], "cluster": [str(name) for name in clusters or ids]}
        groups = None if self.group is None else self._column(batch, "group", size)
        ours["group"] = [str(name) for name in groups or [""] * size]
        if references is not None:
            ours["references"] = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        return ours

    def inputs_of(self, batch: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the backbone's inputs alone.

        Raises:
            ValueError: one is missing.
        """
        named = self.inputs if isinstance(self.inputs, dict) else {}
        holder = _entry(batch, self.inputs) if isinstance(self.inputs, (int, str)) else batch
        if holder is None:
            raise ValueError(f"`inputs` is {self.inputs!r}, and {_words(batch)} has no such entry.")
        found = {name: _entry(holder, named.get(name, name)) for name in wanted}
        found = {name: value for name, value in found.items() if value is not None}
        asked = [name for name in named if name in wanted and name not in found]
        if missing := list(dict.fromkeys(missing_inputs(wanted, found) + asked)):
            raise ValueError(
                f"The model needs {missing}, and {_words(holder)} has none under these names; say where they are, as "
                f"in `inputs={{{missing[0]!r}: KEY}}`."
            )
        return found

    def names_clusters(self, batch: Any) -> bool:
        """Say whether the batch tells which samples are independent."""
        return _entry(batch, "cluster" if self.cluster is None else self.cluster) is not None

    def _column(self, batch: Any, name: str, size: int) -> list[Any] | None:
        key = getattr(self, name)
        value = _entry(batch, name if key is None else key)
        if value is None and key is None:
            return None
        values = value.tolist() if isinstance(value, Tensor) else [] if value is None else list(value)
        if len(values) != size:
            raise ValueError(
                f"`{name}` is {key!r}, which must give one entry for each of {size} samples; found {len(values)} in "
                f"{_words(batch)}."
            )
        return values


def _entry(batch: Any, key: Key) -> Any:
    """Return what lies under a key, or None."""
    try:
        return batch[key] if isinstance(batch, Mapping) or isinstance(key, int) else getattr(batch, key)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _words(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"the batch with the keys {list(batch)}"
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"the batch ({type(batch).__name__}{size})"
