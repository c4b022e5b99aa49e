"""The recipes of the papers, run on imported data with a tiny pretrained model in place of the large one."""

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerFast

from lightning_mue.backbones import backbone_config, build_backbone
from lightning_mue.backbones.processor import Processor, build_processor
from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.data import ShardsDataModule
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.export import load
from tests import zoo
from tests.runs import ROOT, mue

from .conftest import WRITERS, paint

PAPERS = sorted((ROOT / "recipes" / "papers").glob("*.yaml"))
DATA = {"mue_snli_ve": "snli-ve", "mue_coco_caption": "coco", "deed_docvqa": "docvqa", "deed_vqa": "vqa"}
START, END = 1, 2


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as on the hub: a Florence-2 of 6 + 6 layers in float16, and a tokenizer that frames as BART's does."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = backbone_config(zoo.tiny_florence2())
    tokens = {"bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": END, "forced_bos_token_id": START}
    config["text_config"] |= {"vocab_size": 300, "encoder_layers": 6, "decoder_layers": 6} | tokens
    config["text_config"] |= {"max_position_embeddings": 256}
    config["generation_config"] |= tokens | {"no_repeat_ngram_size": 3}
    torch.manual_seed(0)
    build_backbone(config).half().save_pretrained(folder)
    tokenizer = Tokenizer.from_str(train_tokenizer(["what is it", "yes", "no", "maybe"], 300))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    build_processor(tokenizer.to_str(), 64, zoo.IMAGE_TOKENS).save(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards for each data set, with the training pictures as validation pictures too."""
    root = tmp_path_factory.mktemp("imported")
    for name in DATA.values():
        annotations, images = WRITERS[name](root / "official" / name)
        files = sorted(path for path in annotations.iterdir() if path.suffix in (".json", ".jsonl"))
        for split in ("train", "val"):
            options = ["--images", images, "--out", root / name, "--split", split]
            mue("data", name, "--annotations", *files, *options)
    return root


def fit(recipe, pretrained, shards, root, *more):
    small = {
        "model.backbone": pretrained,
        "data.processor": pretrained,
        "data.train": shards / DATA[recipe.stem],
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.select": 0.99,
        "trainer.max_steps": 1,
        "trainer.limit_train_batches": 1,  # so that it validates after the step
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 1.0,
        "trainer.default_root_dir": root,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    mue("fit", "-c", recipe, *(f"--{name}={value}" for name, value in small.items()), *more)


def test_there_is_a_recipe_for_each_paper():
    assert {recipe.stem for recipe in PAPERS} == set(DATA)


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda path: path.stem)
def test_a_step_of_training(recipe, pretrained, shards, tmp_path):
    fit(recipe, pretrained, shards, tmp_path)
    module, processor = load_checkpoint(tmp_path / "last.ckpt")
    plain = yaml.safe_load(recipe.read_text())
    assert {stream: list(layers) for stream, layers in module.exits.layers.items()} == {
        stream: layers for stream, layers in plain["model"]["exits"].items() if isinstance(layers, list)
    }
    weights = Florence2ForConditionalGeneration.from_pretrained(pretrained, dtype=torch.float32).state_dict()
    after = module.model.state_dict()
    assert {after[name].dtype for name in weights} == {torch.float32}  # though the folder holds float16
    moved = [name for name in weights if not torch.equal(weights[name], after[name])]
    assert any("decoder.layers.5" in name for name in moved)  # trained from the pretrained weights,
    assert max((weights[name] - after[name]).abs().max() for name in moved) < 1e-3  # not from others
    assert processor.tokenizer.get_vocab() == Processor.load(pretrained).tokenizer.get_vocab()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["ShardsDataModule"]
    assert state == {"processor": str(pretrained)}


def test_a_checkpoint_with_a_processor_becomes_a_bundle(pretrained, shards, tmp_path, capsys):
    fit(PAPERS[0], pretrained, shards, tmp_path)
    mue("freeze", "--ckpt_path", tmp_path / "last.ckpt", "--out", tmp_path / "bundle")
    picture = paint(tmp_path / "page.png")
    mue("generate", tmp_path / "bundle", "--image", picture, "--prompt", "what is it")
    processor = load(tmp_path / "bundle").processor
    assert processor.labels(["what"]).tolist() == Processor.load(pretrained).labels(["what"]).tolist()


def test_a_run_goes_on_with_the_folder_where_it_is_now(pretrained, shards, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(pretrained)
    fit(PAPERS[0], pretrained, shards, tmp_path)
    fit(PAPERS[0], moved, shards, tmp_path, "--trainer.max_steps=2")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["ShardsDataModule"] == {"processor": str(moved)}
    assert state["global_step"] == 2
    with pytest.raises(
        ValueError, match=r"trained with `processor` '.*moved', this run has None: give one too, or none"
    ):
        fit(PAPERS[0], pretrained, shards, tmp_path, "--trainer.max_steps=3", "--data.processor=null")


def module_of(shards, processor, name="vqa", task="vqa"):
    return ShardsDataModule(str(shards / name), task, processor=str(processor), batch_size=2, select=0.99)


def test_labels_are_framed_as_the_pretrained_model_knows_them(pretrained, shards):
    """A model that is made to begin its answers with <s> must have learnt what follows it."""
    data = module_of(shards, pretrained)
    batch = next(iter(data.train_dataloader()))
    words = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    for row, references in zip(batch["labels"].tolist(), batch["references"], strict=True):
        inner = [words.encode(text, add_special_tokens=False).ids for text in references]
        assert [token for token in row if token != -100] in [[START, *ids, END] for ids in inner]
    prompt = words.encode(batch["prompt"][0], add_special_tokens=False).ids
    expected = [4] * zoo.IMAGE_TOKENS + [START, *prompt, END]
    assert batch["input_ids"][0].tolist()[: len(expected)] == expected
    assert batch["pixel_values"].shape == (2, 3, 64, 64)


def test_closed_answers_survive_a_forced_beginning(pretrained, shards):
    data = module_of(shards, pretrained, "snli-ve", "statement")
    model = build_backbone(str(pretrained))
    assert model.training  # or Lightning would train it without dropout
    model.eval()
    inputs = next(iter(data.train_dataloader()))
    tensors = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    out = model.generate(
        **tensors, num_beams=1, do_sample=False, prefix_allowed_tokens_fn=data.answer_constraint(END), max_new_tokens=9
    )
    assert set(data.processor.decode(out)) <= {"no", "yes", "maybe"}


def test_what_is_no_processor_is_named(pretrained, shards, tmp_path):
    for name, message in {
        str(tmp_path / "nowhere"): "got '.*nowhere': ",
        str(tmp_path): "the processor must be a folder written by `save_pretrained` or a hub name",
    }.items():
        with pytest.raises(ValueError, match=message):
            module_of(shards, name).setup("fit")
    PreTrainedTokenizerFast(tokenizer_file=str(pretrained / "tokenizer.json")).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="holds no processor of pictures and texts but a"):
        module_of(shards, tmp_path / "words").setup("fit")


def test_a_trained_tokenizer_is_not_framed():
    processor = build_processor(train_tokenizer(["a red dog"], 300), 64, 5)
    ids = processor.tokenizer(["a red dog"], add_special_tokens=False)["input_ids"][0]
    assert processor.labels(["a red dog", ""]).tolist() == [[*ids, END], [END] + [-100] * len(ids)]
