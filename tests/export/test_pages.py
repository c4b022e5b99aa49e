"""A bundle that reads pages: pictures, the words on them and where they stand."""

import json

import pytest
import torch
from PIL import Image

from lightning_mue import ExitPolicy, freeze, load
from lightning_mue.backbones.processor import build_processor
from lightning_mue.cli import main
from lightning_mue.data.tokenizer import train_pieces
from lightning_mue.prompt import read_words
from tests import zoo

WORDS = [{"text": "SHOP 24", "box": [100, 50, 900, 90]}, {"text": "TOTAL 9.05", "box": [10, 700, 400, 735]}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    processor = build_processor(train_pieces(["how much ? SHOP TOTAL 9.05"], zoo.VOCABULARY), 64, 0)
    return freeze(zoo.make("udop"), ExitPolicy.full_depth(), tmp_path_factory.mktemp("page") / "bundle", processor)


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (40, 60), "white").save(tmp_path / "page.png")
    (tmp_path / "page.json").write_text(json.dumps(WORDS))
    return tmp_path


def test_a_page_is_answered_as_its_tensors_are(bundle):
    engine, image, words = load(bundle), Image.new("RGB", (40, 60), "white"), read_words(WORDS)
    (answer,) = engine.answer([image], ["how much ?"], words=[words])
    inputs = engine.processor.processor(
        images=[image], text=["how much ?"], text_pair=[[w["text"] for w in WORDS]], boxes=[[w["box"] for w in WORDS]]
    )
    tensors = {name: torch.as_tensor(value) for name, value in inputs.convert_to_tensors("pt").items()}
    out = engine.generate(**tensors | {"bbox": tensors["bbox"] / 1000})
    assert [answer] == engine.processor.decode(out.sequences)


def test_the_command_reads_words_from_json(bundle, page, capsys):
    engine = load(bundle)
    expected = engine.answer([Image.open(page / "page.png")], ["how much ?"], words=[read_words(WORDS)])
    main(
        [
            "generate",
            str(bundle),
            "--image",
            str(page / "page.png"),
            "--prompt",
            "how much ?",
            "--words",
            str(page / "page.json"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "page.json must hold the words of a page as JSON"),
        ('[{"text": "a", "box": [1]}]', "'a' must be 4 numbers"),
    ],
)
def test_a_broken_file_of_words_is_named(bundle, page, text, message):
    (page / "page.json").write_text(text)
    with pytest.raises((ValueError, SystemExit), match=message):
        main(
            [
                "generate",
                str(bundle),
                "--image",
                str(page / "page.png"),
                "--prompt",
                "a",
                "--words",
                str(page / "page.json"),
            ]
        )


def test_words_are_asked_for(bundle):
    with pytest.raises(ValueError, match="give `words`"):
        load(bundle).answer([Image.new("RGB", (8, 8))], ["how much ?"])
    with pytest.raises(ValueError, match="each of 1 images, got 2"):
        load(bundle).answer([Image.new("RGB", (8, 8))], ["how much ?"], words=[read_words(WORDS)] * 2)
