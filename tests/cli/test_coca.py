"""CoCa's life by commands: captions and embeddings from one bundle."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

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
    backbone["text_cfg"]["vocab_size"] = 320
    backbone["generation_config"]["max_new_tokens"] = 4
    recipe["model"]["exits"] = {"vision": [1, 2], "text": [1], "decoder": [3, 4], "adapter_width": 8, "gate_width": 8}
    recipe["model"]["early_after"] = 0.0
    recipe["data"] |= {name: str(shards) for name in ("train", "val", "test")}
    recipe["data"] |= {"vocab_size": 320, "batch_size": 16, "eval_batch_size": 32, "select": 0.2}
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
    answers, pictures, texts, _ = recipe["trainer"]["callbacks"]
    answers["init_args"] = {"keep": 0.6, "metric": "consistency", "latency_repeats": 2}
    few = {"keep": 0.1, "metric": "recall_at_5", "candidates": 20, "latency_repeats": 2}
    pictures["init_args"], texts["init_args"] = few, few | {"query": "text"}
    recipe["trainer"]["callbacks"] = [answers, pictures, texts]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mue("fit", "-c", folder / "recipe.yaml")
    mue("calibrate", "-c", folder / "recipe.yaml")
    rules = {"vision": ExitRule.static(1), "text": ExitRule.static(1), "decoder": ExitRule.static(4)}
    ExitPolicy(rules).save(folder / "static.json")
    ckpt = ("--ckpt_path", folder / "last.ckpt", "--policy", folder / "static.json")
    embeds = ("--embed-policy", folder / "static.json", "--embed-text-policy", folder / "static.json")
    mue("freeze", *ckpt, "--out", folder / "bundle", *embeds)
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
    assert said.splitlines()[-2].startswith("Pictures and texts may both leave early here.")
    for side, depths in (("image", ("[3, 3]", "[1, 1]")), ("text", ("[1, 1]", "[2, 2]"))):
        mue("embed", bundle / "bundle", *images, *words, "--full-depth", side)
        lines = capsys.readouterr().out.splitlines()
        for line, name, depth in zip(lines, ("image", "text"), depths, strict=False):
            assert line == f"{name}: 32 numbers each; layers run {depth}"
        assert not any("both leave early" in line for line in lines)
    mue("embed", bundle / "bundle", "--text", texts[0])
    assert capsys.readouterr().out.splitlines() == ["text: 32 numbers each; layers run [1]"]
    module, processor = load_checkpoint(bundle / "last.ckpt")
    engine = mue_package.EmbedEngine(module.model, ExitPolicy.full_depth(), processor=processor)
    labels = processor.labels(texts)
    ids = torch.zeros(2, 64, dtype=torch.long)  # padded as open_clip's tokenizer does
    ids[:, 0], ids[:, 1 : 1 + labels.shape[1]] = 1, labels.clamp(min=0)
    torch.testing.assert_close(engine.embed_texts(texts).vectors, module.model.coca.encode_text(ids))


@torch.no_grad()
def test_the_embedding_policies_beside_the_checkpoint_go_into_the_bundle(bundle, tmp_path, capsys):
    found, of_texts = (ExitPolicy.load(bundle / name) for name in ("embed_policy.json", "embed_text_policy.json"))
    assert set(found.rules) <= {"vision"}
    assert set(of_texts.rules) <= {"text"}
    mue("freeze", "--ckpt_path", bundle / "last.ckpt", "--out", tmp_path / "bundle")
    engine, card = mue_package.load_embedder(tmp_path / "bundle"), (tmp_path / "bundle" / "README.md").read_text()
    assert (engine.policy, engine.text_policy) == (found, of_texts)
    for policy in (found, of_texts):  # of `mue calibrate`
        assert policy.certificate.promise.metric == "recall_at_5"
        assert policy.certificate.in_words() in card
    assert ("may both leave early" in card) == bool(found.rules and of_texts.rules)
    assert "may both leave early" in (bundle / "bundle" / "README.md").read_text()
    assert mue_package.load(tmp_path / "bundle").policy == ExitPolicy.load(bundle / "policy.json")
    assert not [*(bundle / "graphs").glob("embed_*")]
    classes = ("red circle", "red square", "blue square")
    rule = {"vision": ExitRule("class_margin", (1, 2), (0.0, 0.0))}
    ExitPolicy(rule, classes=classes).save(tmp_path / "by_class.json")
    ckpt = ("--ckpt_path", bundle / "last.ckpt", "--embed-policy", tmp_path / "by_class.json")
    mue("freeze", *ckpt, "--out", tmp_path / "bundle")
    assert "Embeddings: vision: class_margin at 1, 2" in capsys.readouterr().out
    engine = mue_package.load_embedder(tmp_path / "bundle")
    (tmp_path / "classes.txt").write_text("red circle\n\nred square\nblue square\n")
    for file in ((), (tmp_path / "classes.txt",)):
        mue("embed", tmp_path / "bundle", "--image", bundle / "0.png", "--classes", *file)
        told = capsys.readouterr().out.splitlines()
        assert told[0] == str(bundle / "0.png")
        probabilities = engine.classify([Image.open(bundle / "0.png")], classes)[0].tolist()
        expected = sorted(zip(probabilities, classes, strict=True), reverse=True)
        assert told[1:] == [f"  {probability:.3f}  {name}" for probability, name in expected]
    with pytest.raises(SystemExit, match="does not embed"):
        mue("freeze", *ckpt, "--out", tmp_path / "no", "--runtime", "onnxruntime")
    ExitPolicy(fingerprint="of another").save(tmp_path / "other.json")
    for option, file, why in (
        ("--embed-policy", "other.json", "fingerprint of another"),
        ("--embed-text-policy", "other.json", "fingerprint of another"),
        ("--embed-text-policy", "by_class.json", "must have a rule for 'text', it has them for"),
    ):
        with pytest.raises(SystemExit, match=why):
            mue("freeze", *ckpt[:2], option, tmp_path / file, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_embed_refuses(bundle, fitted_once, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        mue("embed", bundle / "bundle")
    assert stopped.value.code == 2
    mue("freeze", "--ckpt_path", fitted_once / "last.ckpt", "--out", tmp_path / "florence")
    with pytest.raises(SystemExit, match="compares no pictures with texts; CoCa does"):
        mue("embed", tmp_path / "florence", "--text", "a")
    with pytest.raises(SystemExit, match="is a bundle of graphs"):
        mue("embed", bundle / "graphs", "--text", "a")
    with pytest.raises(SystemExit) as stopped:
        mue("embed", bundle / "bundle", "--image", "a.png", "--classes", "--out", tmp_path / "a.npz")
    assert stopped.value.code == 2
