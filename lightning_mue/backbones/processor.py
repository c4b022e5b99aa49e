"""Pictures and prompts in, tensors out, and back to text: a transformers processor and what training needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor, CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

IGNORE = -100
"""Label of positions that no loss counts."""


class Processor:
    """A ``Florence2Processor`` (or any processor of that form) for pictures, prompts, labels and answers.

    Args:
        processor: transformers' processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, images: Sequence[Image.Image], text: Sequence[str]) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, H, W]``, ``input_ids [B, S]`` and ``attention_mask [B, S]``."""
        pictures = [image.convert("RGB") for image in images]
        return dict(self.processor(images=pictures, text=list(text), return_tensors="pt", padding=True))

    def labels(self, text: Sequence[str]) -> Tensor:
        """Return the token ids of answers, each ended by the end token and padded with -100: ``[B, T]``."""
        ids = self.tokenizer(list(text), add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*row, self.tokenizer.eos_token_id]) for row in ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def decode(self, sequences: Tensor) -> list[str]:
        """Return the texts of token ids ``[B, T]`` without special tokens."""
        texts = self.tokenizer.batch_decode(sequences.clamp(min=0), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the processor's own files (JSON)."""
        self.processor.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """Read a folder written by ``save``, or a hub name."""
        return cls(AutoProcessor.from_pretrained(folder))


def build_processor(tokenizer_json: str, image_size: int, image_tokens: int) -> Processor:
    """Return a Florence-2 processor around a trained tokenizer.

    Args:
        tokenizer_json: from ``lightning_mue.data.tokenizer.train_tokenizer`` (special tokens ``<pad> <s> </s> <unk>
            <image>``).
        image_size: pictures are resized to this many pixels a side.
        image_tokens: tokens that the backbone's projector makes of a picture.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size=side, do_center_crop=False, image_seq_length=image_tokens)
    return Processor(Florence2Processor(image_processor=image_processor, tokenizer=tokenizer))
