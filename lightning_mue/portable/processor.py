"""Pictures and prompts in, arrays out, and back to text: a saved processor without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from lightning_mue.portable.pictures import Pictures
from lightning_mue.prompt import IGNORE

Array = np.ndarray
_KNOWN = ("Florence2Processor", "CLIPProcessor", "TrOCRProcessor", "BlipProcessor", "Blip2Processor")


class PortableProcessor:
    """Does what `lightning_mue.backbones.processor.Processor` does for inference, with arrays.

    Args:
        folder: written by that one's ``save``.
        tasks: task token -> the prompt that it stands for; ``{input}`` in it is the rest of the text.

    Raises:
        ValueError: a processor, or a setting of one, that this does not do.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, str]) -> None:
        settings, words = (_read(folder / name) for name in ("processor_config.json", "tokenizer_config.json"))
        if (found := settings.get("processor_class")) not in _KNOWN:
            raise ValueError(f"Prompts without transformers are laid out as by one of {list(_KNOWN)}, got {found!r}")
        self._reads_text = found != "TrOCRProcessor"
        self.pictures, self._tasks = Pictures(settings["image_processor"]), tasks
        self.image_tokens: int = settings["image_processor"].get("image_seq_length", 0)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab()
        self._pad, self._end = ids[words["pad_token"]], ids[words.get("eos_token") or words["sep_token"]]
        starts = ("bos_token", "cls_token") if found in ("CLIPProcessor", "BlipProcessor") else ()
        self._starts = {ids[words[name]] for name in starts if words.get(name)}
        self._frame: tuple[str, str] | None = None
        self.image_token_id: int | None = None
        self._picture: list[int] = []
        if queries := settings.get("num_query_tokens"):  # BLIP-2's, before what its tokenizer frames
            self.image_token_id = ids["<image>"]
            self._picture = [self.image_token_id] * queries
        if self.image_tokens:
            self._frame = words["image_token"] * self.image_tokens + words["bos_token"], words["eos_token"]
            self.image_token_id = ids[words["image_token"]]

    def __call__(self, images: Sequence[Image.Image], text: Sequence[str], words: object = None) -> dict[str, Array]:
        """Return ``pixel_values [B, 3, H, W]`` and, not of TrOCR, ``input_ids`` and ``attention_mask [B, S]``.

        Raises:
            ValueError: words of pages, which no model reads that has a bundle of graphs.
        """
        if words is not None:
            raise ValueError("this model reads no words of a page: leave `words` out")
        if not self._reads_text:
            return {"pixel_values": self.pictures(images)}
        if self._frame is None:
            rows = [self._picture + row for row in self._ids([self._asked(prompt) for prompt in text], special=True)]
        else:
            before, after = self._frame
            rows = self._ids([before + self._asked(prompt) + after for prompt in text])
        mask_BS = _padded([[1] * len(row) for row in rows], 0)
        return {"pixel_values": self.pictures(images), "input_ids": _padded(rows, self._pad), "attention_mask": mask_BS}

    def labels(self, text: Sequence[str]) -> Array:
        """Return the token ids of answers, each ended by the end token and padded with -100: ``[B, T]``."""
        rows = self._ids(text, special=True)
        rows = [row[1:] if row and row[0] in self._starts else row for row in rows]
        return _padded([row if row[-1:] == [self._end] else [*row, self._end] for row in rows], IGNORE)

    def decoder_prompts(self, text: Sequence[str]) -> Array:
        """Return the token ids of decoder prompts, without start and end tokens, padded with -100: ``[B, P]``."""
        return _padded(self._ids(text), IGNORE)

    def decode(self, sequences: Array) -> list[str]:
        """Return the texts of token ids ``[B, T]`` without special tokens."""
        return [text.strip() for text in self._tokenizer.decode_batch(sequences.clip(min=0).tolist())]

    def _ids(self, text: Sequence[str], special: bool = False) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(text), add_special_tokens=special)]

    def _asked(self, prompt: str) -> str:
        """Return the prompt that a task token stands for; other texts stay as they are."""
        for task, asked in self._tasks.items():
            if task in prompt:
                rest = prompt.replace(task, "").strip()
                if "{input}" not in asked and prompt != task:
                    raise ValueError(f"{task} must be all of the prompt, got {prompt!r}")
                return asked.format(input=rest)
        return prompt


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Array:
    padded_BT = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
