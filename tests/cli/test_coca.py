"""CoCa's life by commands: captions and embeddings from one bundle."""

import numpy as np
import pytest
import torch
import yaml

import lightning_mue as mue_package
from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.policy import ExitPolicy, ExitRule
from tests.runs import ROOT, members_of, mue


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, shards):
    """A folder with a bundle of a CoCa that was fitted for a moment and leaves every tower early."""
    folder = tmp_path_factory.mktemp("coca")
    recipe = yaml.safe_load((ROOT / "recipes" / "coca_scenes.yaml").read_text())
    backbone = recipe["model"]["backbone"]
    backbone["embed_dim"] = 32
    backbone["vision_cfg"] |= {"patch_size": 8, "width": 32, "layers": 3, "head_width": 8, "attn_pooler_queries": 5}
    for name, layers in (("text_cfg", 2), ("multimodal_cfg", 3)):
        backbone[name] |= {"width": 32, "layers": layers}
    backbone["text_cfg"]["vocab_size"] = 300
    backbone["generation_config"]["max_new_tokens"] = 4
    recipe["model"]["exits"] = {"vision": [1, 2], "text": [1], "decoder": [3, 4], "adapter_width": 8, "gate_width": 8}
    recipe["model"]["early_after"] = 0.0
    recipe["data"] |= {name: str(shards) for name in ("train", "val", "test")}
    recipe["data"] |= {"vocab_size": 300, "batch_size": 16, "eval_batch_size": 32, "select": 0.2}
    recipe["trainer"] |= {
        "max_steps": 8,
        "val_check_interval": 4,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "default_root_dir": str(folder),
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    recipe["trainer"]["callbacks"][0]["init_args"] = {"keep": 0.6, "metric": "consistency", "latency_repeats": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mue("fit", "-c", folder / "recipe.yaml")
    mue("calibrate", "-c", folder / "recipe.yaml")
    rules = {"vision": ExitRule.static(1), "text": ExitRule.static(1), "decoder": ExitRule.static(4)}
    ExitPolicy(rules).save(folder / "static.json")
    ckpt = ("--ckpt_path", folder / "last.ckpt", "--policy", folder / "static.json")
    mue("freeze", *ckpt, "--out", folder / "bundle")
    mue("freeze", *ckpt, "--out", folder / "graphs", "--runtime", "onnxruntime")
    pictures = [data for name, data in members_of(shards / "test-000.tar").items() if name.endswith(".png")][:2]
    for i, data in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(data)
    return folder


def test_validation_says_how_pictures_and_texts_find_each_other(bundle):
    (log,) = bundle.glob("lightning_logs/version_0/metrics.csv")
    columns = log.read_text().splitlines()[0].split(",")
    for at in ("", "vision_1/", "vision_2/", "text_1/"):
        for way in ("image_to_text", "text_to_image"):
            assert {f"val/{at}{way}_R@{k}" for k in (1, 5, 10)} <= set(columns)
    assert {"train/contrast_1", "train/contrast_2"} <= {column.removesuffix("_step") for column in columns}
    policy = ExitPolicy.load(bundle / "policy.json")  # of `mue calibrate`: whatever it found, it is of this model
    assert set(policy.rules) <= {"vision", "decoder"}


def test_captions_are_the_same_from_modules_and_from_graphs(bundle, capsys):
    images = ("--image", bundle / "0.png", "--image", bundle / "1.png")
    for folder in ("bundle", "graphs"):
        mue("generate", bundle / folder, *images)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:4]


@torch.no_grad()
def test_embeddings_leave_early_and_are_compared(bundle, capsys):
    texts = ("a red square", "a blue circle and a green star")
    words = [argument for text in texts for argument in ("--text", text)]
    images = ("--image", bundle / "0.png", "--image", bundle / "1.png")
    mue("embed", bundle / "bundle", *images, *words, "--out", bundle / "found.npz")
    said = capsys.readouterr().out
    assert "image: 32 numbers each; layers run [1, 1]" in said
    assert "text: 32 numbers each; layers run [1, 1]" in said
    with np.load(bundle / "found.npz") as found:
        image, text = found["image"], found["text"]
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-5)
    for row, path in zip(image, ("0.png", "1.png"), strict=True):
        told = said.split(str(bundle / path))[1].splitlines()[1:3]
        assert sorted(told) == sorted(f"  {row @ vector:+.3f}  {t}" for vector, t in zip(text, texts, strict=True))
    mue("embed", bundle / "bundle", "--text", texts[0])
    assert capsys.readouterr().out.splitlines() == ["text: 32 numbers each; layers run [1]"]
    module, processor = load_checkpoint(bundle / "last.ckpt")
    engine = mue_package.EmbedEngine(module.model, ExitPolicy.full_depth(), processor=processor)
    labels = processor.labels(texts)
    ids = torch.zeros(2, 64, dtype=torch.long)  # padded as open_clip's tokenizer does
    ids[:, 0], ids[:, 1 : 1 + labels.shape[1]] = 1, labels.clamp(min=0)
    torch.testing.assert_close(engine.embed_texts(texts).vectors, module.model.coca.encode_text(ids))


def test_what_embed_refuses(bundle, fitted_once, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        mue("embed", bundle / "bundle")
    assert stopped.value.code == 2
    mue("freeze", "--ckpt_path", fitted_once / "last.ckpt", "--out", tmp_path / "florence")
    with pytest.raises(SystemExit, match="compares no pictures with texts; CoCa does"):
        mue("embed", tmp_path / "florence", "--text", "a")
    with pytest.raises(SystemExit, match="is a bundle of graphs"):
        mue("embed", bundle / "graphs", "--text", "a")
