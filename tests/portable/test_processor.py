"""Pictures and texts without transformers: to the bit what its processor makes of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode
from torchvision.transforms.v2.functional import resize as resize_tensor
from transformers import (
    BertTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    DeiTImageProcessor,
    TrOCRProcessor,
    ViTImageProcessor,
)

from lightning_mue.backbones.processor import Processor, build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.portable.pictures import Pictures, resize
from lightning_mue.portable.processor import PortableProcessor

TEXTS = ["what is this?", "<OCR>", "<REGION_TO_OCR> the red one", "  two  spaces, é ü 世 ", ""]
SIZES = [(64, 96), (48, 48), (200, 333), (31, 17), (1, 1), (768, 5)]


def picture(height, width, mode="RGB"):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is this?", "a red square left of it"], 300)


@pytest.fixture(scope="module", params=["stretched", "padded"])
def both(request, tokenizer, tmp_path_factory):
    theirs = build_processor(tokenizer, (64, 96), 5, keep_aspect=request.param == "padded")
    folder = tmp_path_factory.mktemp("processor")
    theirs.save(folder)
    return theirs, PortableProcessor(folder, theirs.tasks)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pictures(both, mode):
    theirs, ours = both
    images = [picture(height, width, mode) for height, width in SIZES[:5]]
    expected = theirs(images, ["a"] * len(images))["pixel_values"].numpy()
    found = ours.pictures(images)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_that_of_torchvision(kind, size):
    pixels = np.asarray(picture(*size))
    for height, width in ((64, 96), (224, 224), size, (7, size[1])):
        given = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        expected = resize_tensor(given, [height, width], interpolation=InterpolationMode(kind), antialias=True)
        assert np.array_equal(resize(pixels, height, width, kind), expected.permute(1, 2, 0).numpy())


def test_texts(both):
    theirs, ours = both
    images = [picture(8, 8)] * len(TEXTS)
    expected, found = theirs(images, TEXTS), ours(images, TEXTS)
    for name in ("input_ids", "attention_mask"):
        assert found[name].tolist() == expected[name].tolist()
    assert ours.labels(TEXTS).tolist() == theirs.labels(TEXTS).tolist()
    assert ours.decoder_prompts(TEXTS).tolist() == theirs.decoder_prompts(TEXTS).tolist()
    ids = torch.randint(-1, len(theirs.tokenizer), (40, 7))
    assert ours.decode(ids.numpy()) == theirs.decode(ids)
    for processor in both:
        with pytest.raises(ValueError, match=r"<OCR>"):
            processor(images[:1], ["<OCR> and more"])


@pytest.mark.parametrize("frame", [("<s>", "</s>"), ("", "")])
def test_a_tokenizer_that_frames_labels(frame, tokenizer, tmp_path):
    """BART's answers begin with a token of their own; prompts are framed by the processor alone."""
    described, names = json.loads(tokenizer), [{"SpecialToken": {"id": word, "type_id": 0}} for word in frame if word]
    single = [names[0], {"Sequence": {"id": "A", "type_id": 0}}, names[1]] if names else None
    if single:
        special = {word: {"id": word, "ids": [i], "tokens": [word]} for i, word in ((1, "<s>"), (2, "</s>"))}
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": special,
        }
    theirs = build_processor(json.dumps(described), 64, 5)
    theirs.save(tmp_path)
    ours = PortableProcessor(tmp_path, theirs.tasks)
    assert ours.labels(TEXTS).tolist() == theirs.labels(TEXTS).tolist()
    assert ours.decoder_prompts(TEXTS).tolist() == theirs.decoder_prompts(TEXTS).tolist()
    images = [picture(8, 8)] * len(TEXTS)
    assert ours(images, TEXTS)["input_ids"].tolist() == theirs(images, TEXTS)["input_ids"].tolist()


@pytest.mark.parametrize("pictures", [ViTImageProcessor, DeiTImageProcessor])
def test_trocrs_processor(pictures, tokenizer, tmp_path):
    """Its model reads no prompt; its tokenizer frames answers, and labels keep the frame."""
    words = build_processor(tokenizer, 64, 0).tokenizer
    size = {"height": 48, "width": 80}
    theirs = Processor(TrOCRProcessor(pictures(size=size, do_center_crop=False), words))
    theirs.save(tmp_path)
    ours, images = PortableProcessor(tmp_path, theirs.tasks), [picture(*size) for size in SIZES[:5]]
    expected, found = theirs(images, [""] * 5), ours(images, [""] * 5)
    assert list(expected) == list(found) == ["pixel_values"]
    assert np.array_equal(found["pixel_values"], expected["pixel_values"].numpy())
    assert ours.labels(TEXTS).tolist() == theirs.labels(TEXTS).tolist()
    assert ours.decoder_prompts(TEXTS).tolist() == theirs.decoder_prompts(TEXTS).tolist()
    assert ours.decode(ours.labels(TEXTS)) == theirs.decode(theirs.labels(TEXTS))


def test_blips_processor(tmp_path):
    """Its tokenizer is BERT's, whose texts end with the separator; the token that stands before an answer is left out.

    Ids are those of the vocabulary below.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = [*special, "what", "is", "this", "red", "the", "one", "##s", "?", ","]
    words = BertTokenizer({word: i for i, word in enumerate(vocabulary)}, bos_token="[DEC]")
    theirs = Processor(BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 80}), words))
    assert theirs.labels(["the reds", ""]).tolist() == [[10, 9, 12, 3], [3, -100, -100, -100]]
    theirs.save(tmp_path)
    ours, images = PortableProcessor(tmp_path, theirs.tasks), [picture(*size) for size in SIZES[:5]]
    texts = ["What is this?", "the red ones, one", "é", "[DEC] one", ""]
    expected, found = theirs(images, texts), ours(images, texts)
    assert {*expected} == {*found} == {"pixel_values", "input_ids", "attention_mask"}
    for name, array in found.items():
        assert np.array_equal(array, expected[name].numpy())
    assert ours.labels(texts).tolist() == theirs.labels(texts).tolist()
    assert ours.decoder_prompts(texts).tolist() == theirs.decoder_prompts(texts).tolist()
    assert ours.decode(ours.labels(texts)) == theirs.decode(theirs.labels(texts))
    assert isinstance(Processor.load(tmp_path).processor, BlipProcessor)


def test_blip_2s_processor(tokenizer, tmp_path):
    """The picture's tokens stand before a prompt that the tokenizer frames."""
    words = build_processor(tokenizer, 64, 0).tokenizer
    pictures = BlipImageProcessor(size={"height": 48, "width": 80})
    theirs = Processor(Blip2Processor(pictures, words, num_query_tokens=5))
    theirs.save(tmp_path)
    ours, images = PortableProcessor(tmp_path, theirs.tasks), [picture(*size) for size in SIZES[:5]]
    expected, found = theirs(images, TEXTS), ours(images, TEXTS)
    assert {*expected} == {*found} == {"pixel_values", "input_ids", "attention_mask"}
    for name, array in found.items():
        assert np.array_equal(array, expected[name].numpy())
    assert (found["input_ids"] == ours.image_token_id).sum(1).tolist() == [5] * len(TEXTS)
    assert ours.labels(TEXTS).tolist() == theirs.labels(TEXTS).tolist()
    assert ours.decode(ours.labels(TEXTS)) == theirs.decode(theirs.labels(TEXTS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_processor_type": "BitImageProcessor"}, r"read as \['CLIP.*'BitImageProcessor'"),
        ({"size": {"shortest_edge": 224}}, r"resized to a height and a width .*\{'shortest_edge': 224\}"),
        ({"do_resize": False}, "must be resized"),
        ({"size": {"max_height": 8, "max_width": 8}}, "must be padded to one `pad_size`"),
        ({"do_center_crop": True}, "are not cropped"),
        ({"resample": 1}, "`resample` must be one of"),
    ],
)
def test_other_settings_are_refused(changed, message, tokenizer, tmp_path):
    build_processor(tokenizer, 64, 5).save(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    Pictures(settings)
    with pytest.raises(ValueError, match=message):
        Pictures(settings | changed)


def test_other_processors_are_refused(tokenizer, tmp_path):
    theirs: Processor = build_processor(tokenizer, 64, 5)
    theirs.save(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace("Florence2Processor", "DonutProcessor"))
    with pytest.raises(ValueError, match=r"laid out as by one of .*'CLIPProcessor'.*, got 'DonutProcessor'"):
        PortableProcessor(tmp_path, {})


def test_a_picture_without_width_is_refused(tokenizer, tmp_path):
    theirs = build_processor(tokenizer, 64, 5, keep_aspect=True)
    theirs.save(tmp_path)
    with pytest.raises(ValueError, match="500 x 3 pixels is too narrow for"):
        PortableProcessor(tmp_path, {}).pictures([picture(500, 3)])
