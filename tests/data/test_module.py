import copy
import dataclasses
import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mue.data import ShardsDataModule

from .conftest import TinyProcessor, png, vqa_members, write_tar

pytestmark = pytest.mark.usefixtures("tiny_processor")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(folder / "train-000.tar", vqa_members(5))
    write_tar(folder / "train-001.tar", vqa_members(4, first=5))  # uneven shards
    write_tar(folder / "val-000.tar", vqa_members(40, first=100, prefix="v"))
    return folder


def module_of(folder, **options):
    options = {"batch_size": 4, "eval_batch_size": 5, "image_size": 8, "vocab_size": 300} | options
    return ShardsDataModule(str(folder), "vqa", **options)


class Recorder(LightningModule):
    """Notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, tuple(batch["sample_id"])))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["sample_id"]

    def test_step(self, batch, batch_idx):
        self.tested += batch["sample_id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(tmp_path, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keep = {"enable_checkpointing": bool(callbacks), "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **(quiet | keep | options))


def fit(tmp_path, folder, callbacks=(), ckpt_path=None, workers=0, **options):
    model = Recorder()
    trainer = trainer_of(tmp_path, callbacks, **options)
    trainer.fit(model, module_of(folder, num_workers=workers), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 15, "max_epochs": -1}])
def test_an_interrupted_run_goes_on_with_the_next_batch(tmp_path, folder, limit):
    keep = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, folder, [keep], **limit)
    assert len(whole.seen) == 15  # 18 samples in batches of 4
    assert len({str([ids for e, ids in whole.seen if e == epoch]) for epoch in range(3)}) == 3  # three orders
    for epoch in range(3):
        shown = [i for e, ids in whole.seen if e == epoch for i in ids]
        assert sorted(shown) == sorted({f"p{k}#q{q}" for k in range(9) for q in range(2)})
    for step in (1, 3, 5, 7, 10, 13):
        resumed = fit(tmp_path, folder, ckpt_path=str(tmp_path / "steps" / f"step={step}.ckpt"), **limit)
        assert [ids for _, ids in resumed.seen] == [ids for _, ids in whole.seen[step:]], step


def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next_epoch(tmp_path, folder):
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    whole = fit(tmp_path, folder, [ends], max_epochs=3)
    for epoch in (0, 1):
        resumed = fit(tmp_path, folder, ckpt_path=str(tmp_path / "ends" / f"epoch={epoch}.ckpt"), max_epochs=3)
        assert resumed.seen == whole.seen[5 * (epoch + 1) :]


def test_resume_with_workers(tmp_path, folder):
    keep = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, folder, [keep], max_epochs=2, workers=1)
    path = str(tmp_path / "steps" / "step=3.ckpt")
    assert fit(tmp_path, folder, ckpt_path=path, max_epochs=2, workers=1).seen == whole.seen[3:]


def test_fit_validates_on_the_selection_part_and_validate_on_the_rest(tmp_path, folder):
    model, trainer, data = Recorder(), trainer_of(tmp_path, max_epochs=1), module_of(folder, select=0.4)
    trainer.fit(model, data)
    selected, model.validated = set(model.validated), []
    trainer.validate(model, data, verbose=False)
    everything = {f"v{k}#q{q}" for k in range(100, 140) for q in range(2)}
    assert model.validated == sorted(model.validated)
    assert selected.isdisjoint(model.validated)
    assert selected | set(model.validated) == everything
    assert 0.2 < len(selected) / 80 < 0.6
    assert {i.split("#")[0] for i in selected}.isdisjoint(i.split("#")[0] for i in model.validated)  # whole pictures
    trainer.test(model, data, verbose=False)
    assert set(model.tested) == everything


def test_holdout_pictures_calibrate_and_never_train(folder):
    data = module_of(folder, holdout=0.4)
    data.setup("fit")
    held, train = ({s.cluster for s in part.samples} for part in (data.calibration_samples, data.train_samples))
    assert held
    assert held.isdisjoint(train)
    assert held | train == {f"p{k}" for k in range(9)}
    assert len(data.selection_samples) == 80
    assert [i for b in data.val_dataloader() for i in b["sample_id"]] == sorted(
        f"{cluster}#q{q}" for cluster in held for q in range(2)
    )


def test_calibration_is_limited_by_whole_pictures_and_grows_only(folder):
    def clusters(limit):
        samples = module_of(folder, calibration_limit=limit).calibration_samples.samples
        assert limit is None or limit - 2 < len(samples) <= limit
        return {s.cluster for s in samples}

    assert clusters(10) < clusters(21) < clusters(None)
    with pytest.raises(ValueError, match=r"calibration_limit.*less than"):
        clusters(1)


def test_calibration_clusters_propose_or_certify(folder):
    data = module_of(folder)
    names = [data.split_of(f"c{k}") for k in range(2000)]
    assert set(names) == {"propose", "certify"}
    assert abs(names.count("propose") / 2000 - 0.3) < 0.04
    assert names == [module_of(folder).split_of(f"c{k}") for k in range(2000)]


def test_fingerprint_is_of_the_calibration_data_alone(folder):
    first = module_of(folder).calibration_fingerprint
    assert module_of(folder, batch_size=2).calibration_fingerprint == first
    assert module_of(folder, select=0.6).calibration_fingerprint != first


@pytest.mark.parametrize("fn", [TrainerFn.FITTING, TrainerFn.VALIDATING])
def test_ranks_share_batches(folder, fn):
    class Two:
        world_size = 2

        def __init__(self, rank):
            self.global_rank, self.state = rank, type("State", (), {"fn": fn})()

    loaders = []
    for rank in range(2):
        data = module_of(folder)
        data.trainer = Two(rank)
        loaders.append((data.train_dataloader(), data.val_dataloader()))
    assert len(loaders[0][0]) == len(loaders[1][0]) == 3
    assert len(loaders[0][1]) == len(loaders[1][1])
    ids = [{i for batch in train for i in batch["sample_id"]} for train, _ in loaders]
    assert ids[0].isdisjoint(ids[1])
    assert len(ids[0] | ids[1]) == 18
    part = data.selection_samples if fn == TrainerFn.FITTING else data.calibration_samples
    expected = sorted(s.sample_id for s in part.samples)
    dealt = [list(val) for _, val in loaders]
    inorder = [dealt[k % 2][k // 2]["sample_id"] for k in range(2 * len(dealt[0]))]
    assert [i for ids in inorder for i in ids][: len(expected)] == expected


def test_the_tokenizer_travels_in_the_checkpoint(tmp_path, folder):
    keep = ModelCheckpoint(tmp_path / "ends", filename="last")
    fit(tmp_path, folder, [keep], max_epochs=1)
    path = tmp_path / "ends" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["ShardsDataModule"]
    trained = module_of(folder).tokenizer_json
    assert saved == {"tokenizer": trained}
    assert json.loads(trained)["model"]["type"] == "BPE"
    other = copy.copy(folder)
    write_tar(other / "train-000.tar", vqa_members(3, first=50))  # other texts than the checkpoint's
    data = module_of(other)
    trainer_of(tmp_path).validate(Recorder(), data, ckpt_path=str(path), verbose=False, weights_only=True)
    assert data.tokenizer_json == trained
    assert data.processor.tokenizer.to_str() == trained
    assert module_of(other).tokenizer_json != trained


def test_skipped_samples_are_counted_once_per_split(folder):
    write_tar(folder / "train-001.tar", [*vqa_members(4, first=5), ("p9.json", {"id": "p9"})])
    data = module_of(folder, on_bad="skip")
    with pytest.warns(UserWarning, match=r"1 broken shards or samples were skipped: sample 'p9'") as caught:
        data.setup("fit")
    assert sum("skipped" in str(w.message) for w in caught) == 1
    assert len(data.bad.messages) == 1
    with pytest.raises(ValueError, match="'p9'"):
        module_of(folder).setup("fit")


def test_missing_or_empty_data_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no val data.*nowhere"):
        ShardsDataModule(str(folder), "vqa", "nowhere").setup("fit")
    with pytest.raises(FileNotFoundError, match="no validation data: `val` is not given"):
        ShardsDataModule([str(folder / "train-000.tar")], "vqa").setup("fit")
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"empty\.tar: there is no sample"):
        ShardsDataModule(str(folder), "vqa", str(tmp_path / "empty.tar")).setup("validate")
    with pytest.raises(ValueError, match="no selection data: `select` 0"):
        module_of(folder, select=0.0).setup("fit")
    for wrong in ({"holdout": 1.0}, {"select": -0.1}, {"batch_size": 0}, {"on_bad": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            module_of(folder, **wrong)


def test_the_real_processor_fits(folder, monkeypatch):
    monkeypatch.undo()
    data = module_of(folder, image_size=16, image_tokens=5)
    batch = next(iter(data.train_dataloader()))
    assert not isinstance(data.processor, TinyProcessor)
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.float32
    assert (batch["input_ids"] == 4).sum(1).tolist() == [5] * 4
    for k, row in enumerate(batch["labels"]):
        kept = row[row != -100]
        assert kept[-1] == 2
        assert data.processor.decode(kept[None, :-1])[0] in batch["references"][k]


def test_statements_to_match_come_as_decoder_prompts(tmp_path):
    """Padded with -100 on the right; the tokenizer knows their words, the fingerprint and the closed answers too."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = ["a red dog", "two green cats run", "bird"]
    members = []
    for k in range(4):
        record = {"id": f"m{k}", "refs": [texts[k % 3]], "negatives": [texts[(k + 1) % 3]]}
        members += [(f"m{k}.json", record), (f"m{k}.png", png())]
    write_tar(folder / "train-000.tar", members)
    write_tar(folder / "val-000.tar", members)
    data = ShardsDataModule(str(folder), "match", batch_size=8, image_size=8, vocab_size=300, select=0.5)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    prompts = batch["decoder_prompt"]
    assert data.processor.decode(prompts) == [
        texts[(int(name[1]) + (name[3] == "n")) % 3] for name in batch["sample_id"]
    ]
    lengths = (prompts >= 0).sum(1)
    assert ((prompts >= 0) == (torch.arange(prompts.shape[1]) < lengths[:, None])).all()
    assert len(lengths.unique()) > 1
    assert data.closed_answers == ["no", "yes", "maybe"]
    before = data.calibration_fingerprint
    sample = data.calibration_samples.samples[0]
    data.calibration_samples.samples[0] = dataclasses.replace(sample, decoder_prompt="another")
    assert data.calibration_fingerprint != before


def test_other_tasks_train_beside_and_are_nowhere_else(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    members = []
    for k in range(40):
        members += [
            (f"m{k}.json", {"id": f"m{k}", "refs": ["a dog", "dogs"], "negatives": ["a cat"]}),
            (f"m{k}.png", png()),
        ]
    write_tar(folder / "train-000.tar", members)
    write_tar(folder / "val-000.tar", members)
    options = {"batch_size": 16, "image_size": 8, "vocab_size": 300, "holdout": 0.3}
    alone = ShardsDataModule(str(folder), "match", **options)
    data = ShardsDataModule(str(folder), "match", also=["caption"], **options)
    trained = {s.sample_id for s in data.train_samples.samples}
    before = {s.sample_id for s in alone.train_samples.samples}
    pictures = {name.partition("#")[0] for name in before}
    assert trained == before | {f"{picture}#c0" for picture in pictures}
    for part in ("selection_samples", "calibration_samples", "test_samples"):
        assert getattr(data, part).samples == getattr(alone, part).samples
    assert data.calibration_fingerprint == alone.calibration_fingerprint
    assert data.closed_answers == alone.closed_answers
    for batch in data.train_dataloader():
        for name, prompt, label in zip(batch["sample_id"], batch["decoder_prompt"], batch["labels"], strict=True):
            is_caption = name.endswith("#c0")
            assert ((prompt >= 0).sum() == 0) == is_caption
            said = data.processor.decode(label[label >= 0][None])[0].replace("</s>", "").strip()
            assert said in (("a dog", "dogs") if is_caption else ("yes", "no"))
    assert data.train_dataloader().name != alone.train_dataloader().name


def test_no_picture_of_the_calibration_data_trains_in_another_task(tmp_path):
    """Tasks cluster by themselves: reading by receipt, captions by picture; the main task's rule holds for all."""
    folder = tmp_path / "data"
    folder.mkdir()
    ids = [f"receipt{k // 4:02d}-{k % 4}" for k in range(80)]
    members = [pair for i in ids for pair in ((f"{i}.json", {"id": i, "refs": ["a line"]}), (f"{i}.png", png()))]
    write_tar(folder / "train-000.tar", members)
    write_tar(folder / "val-000.tar", members[:2])
    for task, other in (("reading", "caption"), ("caption", "reading")):
        data = ShardsDataModule(str(folder), task, also=[other], holdout=0.4, image_size=8, vocab_size=300)
        held = {s.sample_id.partition("#")[0] for s in data.calibration_samples.samples}
        trains = {s.sample_id.partition("#")[0] for s in data.train_samples.samples}
        assert held
        assert held | trains == set(ids)
        assert not held & trains
        assert {s.task for s in data.train_samples.samples} == {task, other}
        assert {s.task for s in data.calibration_samples.samples} == {task}


def test_a_run_with_other_tasks_beside_is_another_run(folder):
    names = {module_of(folder, also=also).train_dataloader().name for also in (None, [])}
    assert len(names) == 1
    for also in ("caption", ["caption", "caption"], ["vqa"], ["captions"]):
        with pytest.raises(ValueError, match=r"`also` may name tasks of .* other than 'vqa', each once"):
            module_of(folder, also=also)
