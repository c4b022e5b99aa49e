"""A stand-in for the processor (no transformers) and helpers that write shards."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from lightning_mue.data import module as data_module


class TinyProcessor:
    """Encodes with the real tokenizer; pictures are resized."""

    def __init__(self, tokenizer_json, image_size, image_tokens, keep_aspect=False):
        self.tokenizer, self.image_size = Tokenizer.from_str(tokenizer_json), image_size

    def _pad(self, rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def __call__(self, images, text):
        size = (self.image_size, self.image_size)
        pixels = np.stack([np.asarray(image.resize(size), dtype=np.float32) for image in images])
        ids = [self.tokenizer.encode(line).ids for line in text]
        return {
            "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2),
            "input_ids": self._pad(ids, 0),
            "attention_mask": self._pad([[1] * len(row) for row in ids], 0),
        }

    def labels(self, text):
        return self._pad([[*self.tokenizer.encode(line).ids, 2] for line in text], -100)

    def decoder_prompts(self, text):
        return self._pad([self.tokenizer.encode(line).ids for line in text], -100).long()

    def decode(self, sequences):
        return [self.tokenizer.decode(row.clamp(min=0).tolist()).strip() for row in sequences]


@pytest.fixture
def tiny_processor(monkeypatch):
    monkeypatch.setattr(data_module, "_build_processor", TinyProcessor)


def png(colour=(200, 30, 30), size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    """Writes (name, bytes or JSON value) pairs."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def vqa_members(count, questions=2, first=0, prefix="p"):
    """Pictures whose colour says their number."""
    members = []
    for k in range(first, first + count):
        qa = [{"text": f"what is {k} {q} ?", "refs": [f"answer {k}", "other"]} for q in range(questions)]
        members += [
            (f"{prefix}{k}.png", png((k % 256, k // 256, 7))),
            (f"{prefix}{k}.json", {"id": f"{prefix}{k}", "qa": qa}),
        ]
    return members
