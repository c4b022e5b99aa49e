"""Pictures and prompts in, tensors out, and back to text: a transformers processor and what training needs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    DetrImageProcessor,
    Florence2Processor,
    LayoutLMv3ImageProcessor,
    PreTrainedTokenizerFast,
    UdopProcessor,
    UdopTokenizer,
)

from lightning_mue.prompt import IGNORE, Word


class Processor:
    """A processor of Florence-2, CLIP, TrOCR, BLIP, UDOP or any of that form: pictures, prompts, answers.

    Args:
        processor: transformers' processor.
    """

    def __init__(self, processor: Any) -> None:
        if isinstance(processor, UdopProcessor):
            processor.image_processor.apply_ocr = False  # words come with the sample
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(
        self, images: Sequence[Image.Image], text: Sequence[str], words: Sequence[Sequence[Word]] | None = None
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, H, W]``, ``input_ids [B, S]`` and ``attention_mask [B, S]``.

        A ``TrOCRProcessor`` gives the first alone: its model reads no prompt. A ``UdopProcessor`` reads the words of
        each page and gives ``bbox [B, S, 4]`` too, between 0 and 1.

        Raises:
            ValueError: no words for a model that reads them, or words for another.
        """
        pictures = [image.convert("RGB") for image in images]
        if (words is not None) != isinstance(self.processor, UdopProcessor):
            name = type(self.processor).__name__
            raise ValueError(f"a {name} reads {'no words of a page' if words else 'the words of a page: give `words`'}")
        given: dict[str, Any] = {}
        if words is not None:
            given["text_pair"] = [[text for text, _ in page] for page in words]
            given["boxes"] = [[[round(x) for x in box] for _, box in page] for page in words]
        found = dict(self.processor(images=pictures, text=list(text), return_tensors="pt", padding=True, **given))
        if words is not None:
            found["bbox"] = found["bbox"] / 1000
        found.pop("labels", None)  # the prompts, as TrOCR's and Donut's processors give them back
        return found

    def labels(self, text: Sequence[str]) -> Tensor:
        """Return the token ids of answers, each ended by the end token and padded with -100: ``[B, T]``.

        A pretrained tokenizer frames them as its model knows them (BART's answers begin with ``<s>``); of CLIP's and
        BLIP's frame the start is left out, for it stands before the answer.
        """
        words, ids = self.tokenizer, self._ids(text)
        end = words.sep_token_id if words.eos_token_id is None else words.eos_token_id  # BERT's, which BLIP has
        if isinstance(self.processor, (CLIPProcessor, BlipProcessor)):
            frame = (words.bos_token_id, words.cls_token_id)
            ids = [row[1:] if row and row[0] in frame else row for row in ids]
        rows = [torch.tensor(row if row[-1:] == [end] else [*row, end]) for row in ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def decoder_prompts(self, text: Sequence[str]) -> Tensor:
        """Return the token ids of decoder prompts, without start and end tokens, padded with -100: ``[B, P]``."""
        ids = self._ids(text, add_special_tokens=False)
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]  # an empty row would be made of floats
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def _ids(self, text: Sequence[str], **how: Any) -> list[list[int]]:
        # UDOP's tokenizer asks for boxes of whatever is no target.
        name = "text_target" if isinstance(self.tokenizer, UdopTokenizer) else "text"
        ids: list[list[int]] = self.tokenizer(**{name: list(text)}, **how)["input_ids"]
        return ids

    def decode(self, sequences: Tensor) -> list[str]:
        """Return the texts of token ids ``[B, T]`` without special tokens."""
        texts = self.tokenizer.batch_decode(sequences.clamp(min=0), skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def tasks(self) -> dict[str, str]:
        """Task token -> the prompt that it stands for, where a processor knows tasks; ``{input}`` is the rest."""
        names = ("task_prompts_without_inputs", "task_prompts_with_input")
        return {task: prompt for name in names for task, prompt in getattr(self.processor, name, {}).items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the processor's own files (JSON)."""
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_padding()  # the last call's, which is no part of a tokenizer; each call sets its own
            backend.no_truncation()
        self.processor.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """Read a folder written by ``save`` or ``save_pretrained``, or a hub name.

        Raises:
            ValueError: there is no processor of pictures and texts.
        """
        try:
            processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the processor must be a folder written by `save_pretrained` or a hub name that can be reached, got "
                f"{str(folder)!r}: {str(error).splitlines()[0]}"
            ) from error
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError(
                f"{str(folder)!r} holds no processor of pictures and texts but a {type(processor).__name__}"
            )
        return cls(processor)


def build_processor(
    tokenizer_json: str, image_size: int | Sequence[int], image_tokens: int, keep_aspect: bool = False
) -> Processor:
    """Return a processor around a trained tokenizer: Florence-2's, CLIP's where prompts hold no picture, or UDOP's.

    Args:
        tokenizer_json: from ``lightning_mue.data.tokenizer``: ``train_tokenizer`` (special tokens ``<pad> <s> </s>
            <unk> <image>``), or ``train_pieces``, which UDOP reads.
        image_size: pictures are resized to this many pixels a side, or to ``[height, width]``.
        image_tokens: tokens that the backbone's projector makes of a picture, among those of the prompt; 0 for a
            backbone that reads no prompt beside the picture (CoCa).
        keep_aspect: resize to fit inside, and pad at the right and below, instead of stretching.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = {"height": height, "width": width}
    if (model := json.loads(tokenizer_json)["model"])["type"] == "Unigram":
        pages = LayoutLMv3ImageProcessor(size=size, apply_ocr=False)
        return Processor(UdopProcessor(pages, UdopTokenizer(vocab=[(piece, score) for piece, score in model["vocab"]])))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **({"extra_special_tokens": {"image_token": "<image>"}} if image_tokens else {}),
    )
    length: dict[str, Any] = {"image_seq_length": image_tokens} if image_tokens else {}
    image_processor: CLIPImageProcessor | DetrImageProcessor
    if keep_aspect:
        limits = {"max_height": height, "max_width": width}
        image_processor = DetrImageProcessor(size=limits, pad_size=size, do_pad=True, **length)
    else:
        image_processor = CLIPImageProcessor(size=size, do_center_crop=False, **length)
    if not image_tokens:
        return Processor(CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer))
    return Processor(Florence2Processor(image_processor=image_processor, tokenizer=tokenizer))
