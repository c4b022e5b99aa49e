"""CalibrateEmbeddings on a plain project: candidates certify nothing, its policy embeds, `fit` is left alone."""

from functools import cache

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_mue import CalibrateEmbeddings, EmbedEngine, ExitPolicy, ExitRule
from lightning_mue.callbacks.search import Search
from lightning_mue.exits import attach_exits
from tests import ranks, zoo
from tests.inference.test_gallery import CLASSES, WORDS, Words

SAMPLES = 120


class Pairs(Dataset):
    """Pictures with the class that the model itself sees in them, and a text that no other has; some of no class."""

    def __init__(self, count=SAMPLES):
        self.pixels = zoo.inputs("coca", SAMPLES)["pixel_values"][:count]
        engine = EmbedEngine(zoo.shared("coca"), ExitPolicy(), processor=Words())
        self.classes = (engine.images(self.pixels).vectors @ engine.embed_texts(CLASSES).vectors.T).argmax(-1)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        alone = " ".join(WORDS[index // 6**digit % 6] for digit in range(3))
        texts = [CLASSES[self.classes[index]], alone] if index % 10 else [alone]
        named = {"sample_id": f"s{index:03d}", "cluster": f"s{index:03d}"}
        return {"pixel_values": self.pixels[index], "references": texts, **named}


class Project(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.processor = zoo.make("coca"), Words()

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.model.mue_exits.gates.parameters()) * 1e-6

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def joined(rows):
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}


def loader(count=SAMPLES, **options):
    return DataLoader(Pairs(count), 16, collate_fn=joined, **options)


def calibrate(**options):
    quick = {"latency_repeats": 1, "keep": 0.3, "candidates": 8, "metric": "recall_at_1", "confidence_level": 0.5}
    return CalibrateEmbeddings(**(quick | options))


@pytest.fixture
def module():
    return Project()


PAIRS = cache(Pairs)


def brute_force(module, policy, ids, search, candidates):
    """Return the share of pictures whose best texts, of its own and the candidates, hold one of its own."""
    engine, pairs, hits = EmbedEngine(module.model, policy, processor=Words()), PAIRS(), []
    full = EmbedEngine(module.model, ExitPolicy(), processor=Words())
    for index in (int(name[1:]) for name in ids):
        own = search.own(pairs[index]["references"])
        texts = sorted({*own, *candidates})
        vectors = full.embed_texts(texts).vectors
        order = (vectors @ engine.images(pairs[index]["pixel_values"][None]).vectors[0]).argsort(descending=True)
        hits.append(any(texts[i] in own for i in order[: search.within]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("metric", ["recall_at_1", "top_1"])
def test_it_certifies_what_brute_force_finds(module, make_trainer, steady_clock, tmp_path, metric):
    classes = list(CLASSES) if metric == "top_1" else None
    callback = calibrate(metric=metric, classes=classes)
    make_trainer(callback).validate(module, loader(), verbose=False)
    policy = ExitPolicy.load(tmp_path / "run" / "embed_policy.json")
    assert policy == callback.policy
    assert policy.certificate.kind == "certified"
    assert policy.rules
    assert policy.classes == (CLASSES if classes else ())
    found, proposed = policy.certificate.evidence[0], set(callback.trace.sample_ids)
    certified = set(callback._certifies)
    assert not proposed & certified
    counted = {f"s{i:03d}" for i in range(SAMPLES) if metric != "top_1" or i % 10}
    assert proposed | certified == counted  # `top_1`: not those of no class
    candidates = [text for (text,) in callback._subject.lookup.gallery.texts]
    own = {text for name in proposed for text in PAIRS()[int(name[1:])]["references"]}
    assert set(candidates) <= (set(CLASSES) if classes else own)  # no text of a sample that certifies
    assert len(candidates) == (len(CLASSES) if classes else 8)
    for at, score in ((policy, found.score), (ExitPolicy(), found.score_full_depth)):
        assert brute_force(module, at, sorted(certified), callback.search, candidates) == pytest.approx(score)
    with pytest.raises(ValueError, match="fingerprint"):
        EmbedEngine(zoo.shared("coca", 1), policy, processor=Words())


@torch.no_grad()
def texts_by_hand(module, policy, ids, names, within):
    """Return the share of first texts whose own picture comes before all but ``within - 1`` others that lack it."""
    engine, pairs, hits = EmbedEngine(module.model, policy, processor=Words()), PAIRS(), []
    vectors = torch.cat([module.model.coca.encode_image(pairs.pixels[i : i + 1]) for i in range(SAMPLES)])
    for index in (int(name[1:]) for name in ids):
        text = pairs[index]["references"][0]
        cosines = vectors @ engine.embed_texts([text]).vectors[0]
        others = [cosines[i] for i in (int(name[1:]) for name in names) if text not in pairs[i]["references"]]
        hits.append(sum(bool(other >= cosines[index]) for other in others) < within)
    return sum(hits) / len(hits)


def test_texts_are_certified_to_find_their_pictures(module, make_trainer, steady_clock, tmp_path):
    """Beside pictures, in one trainer: each with a policy of its own, and one bundle's engine obeys both."""
    pictures, texts = calibrate(metric="recall_at_5"), calibrate(metric="recall_at_5", query="text", candidates=12)
    make_trainer(pictures, texts).validate(module, loader(), verbose=False)
    policy = ExitPolicy.load(tmp_path / "run" / "embed_text_policy.json")
    assert policy == texts.policy
    assert policy.certificate.kind == "certified"
    assert policy.certificate.decode["query"] == "text"
    assert "Texts look among 12 fixed pictures and their own" in policy.certificate.note
    assert set(policy.rules) == {"text"}
    proposed, certified = set(texts.trace.sample_ids), set(texts._certifies)
    names = texts.search.among(texts._proposes)
    assert len(names) == 12
    assert set(names) <= proposed
    assert not proposed & certified
    assert proposed | certified == {f"s{i:03d}" for i in range(SAMPLES)}
    found = policy.certificate.evidence[0]
    for at, score in ((policy, found.score), (ExitPolicy(), found.score_full_depth)):
        assert texts_by_hand(module, at, sorted(certified), names, 5) == pytest.approx(score)
    assert 0 < found.score < 1
    assert pictures.policy == ExitPolicy.load(tmp_path / "run" / "embed_policy.json")
    engine = EmbedEngine(module.model, pictures.policy, text_policy=policy)
    assert engine.leaves_both_early == bool(pictures.policy.rules)


def test_two_processes_draw_the_same_pictures(make_trainer, steady_clock, tmp_path):
    """And certify the same, byte for byte; a batch is one sample, for those of two ranks are others than of one."""

    def validate(root, **options):
        callback = calibrate(metric="recall_at_5", query="text")
        trainer = make_trainer(callback, default_root_dir=root, **options)
        trainer.validate(Project(), DataLoader(Pairs(41), 1, collate_fn=joined), verbose=False)

    one, two = tmp_path / "one", tmp_path / "two"
    codes, said = ranks.run(tmp_path, 2, lambda: validate(two, devices=2, strategy="ddp"))
    assert codes == [0, 0], said
    assert "MEMBER: 2/2" in said[1]
    validate(one)
    policies = [(root / "embed_text_policy.json").read_text() for root in (one, two)]
    assert policies[0] == policies[1]
    assert ExitPolicy.from_json(policies[0]).certificate.evidence[0].n > 20


def test_inside_fit_it_does_nothing(module, make_trainer, tmp_path):
    callback = calibrate()
    make_trainer(callback, num_sanity_val_steps=1).fit(module, loader(), loader())
    assert callback.policy is None
    assert callback.state_dict() == {}
    assert not (tmp_path / "run").exists()


def test_what_is_refused(module, make_trainer):
    with pytest.raises(ValueError, match=r"must be one of .*; CalibrateExits is for answers"):
        CalibrateEmbeddings(metric="cider")
    with pytest.raises(ValueError, match="tells `classes` apart"):
        CalibrateEmbeddings(metric="top_1")
    with pytest.raises(ValueError, match="must be more than 5"):
        CalibrateEmbeddings(candidates=5)
    with pytest.raises(ValueError, match=r"must hold one \{\}"):
        CalibrateEmbeddings(classes=["a", "b"], template="a photo")
    with pytest.raises(ValueError, match="`keep` must lie in"):
        CalibrateEmbeddings(keep=1.0)
    for wrong in ({"metric": "top_1", "classes": ["a", "b"]}, {"classes": ["a", "b"]}):
        with pytest.raises(ValueError, match="Pictures are told apart by class, texts are not"):
            CalibrateEmbeddings(query="text", **wrong)
    with pytest.raises(ValueError, match=r"`query` must be one of \['picture', 'text'\], got 'image'"):
        CalibrateEmbeddings(query="image")
    few = calibrate(metric="recall_at_5", query="text")
    with pytest.raises(ValueError, match=r"needs more than 5 distinct pictures .* has \d"):
        make_trainer(few).validate(module, loader(12), verbose=False)
    with pytest.raises(ValueError, match=r"needs more than 10 distinct texts .* has \d"):
        make_trainer(calibrate(metric="recall_at_10", candidates=11)).validate(module, loader(12), verbose=False)
    with pytest.raises(ValueError, match=r"No picture has one of the classes \['red', 'green'\]"):
        make_trainer(calibrate(metric="top_1", classes=["red", "green"])).validate(module, loader(12), verbose=False)
    module.model = zoo.make("coca", exits=False)
    attach_exits(module.model, {"vision": [1]})
    with pytest.raises(ValueError, match="There are no exits of 'text' to calibrate"):
        make_trainer(calibrate(query="text")).validate(module, loader(12), verbose=False)
    processor, module.processor = module.processor, None
    with pytest.raises(ValueError, match="with a `processor`"):
        make_trainer(calibrate()).validate(module, loader(12), verbose=False)
    module.processor, module.model = processor, zoo.make("florence2")
    with pytest.raises(ValueError, match="compares no pictures with texts"):
        make_trainer(calibrate()).validate(module, loader(), verbose=False)


def samples(texts, names=None):
    names = names or [f"s{i:03d}" for i in range(len(texts))]
    return {name: (name, [text]) for name, text in zip(names, texts, strict=True)}


def test_the_draw_knows_no_order_and_the_template_makes_texts_of_names():
    texts = [f"text {i}" for i in range(50)]
    search = Search("recall_at_5", candidates=20)
    drawn = search.among(samples(texts))
    assert drawn == search.among(samples([*reversed(texts), *texts]))
    assert len(drawn) == 20
    assert all(said == [text] for text, said in drawn.items())
    assert [*drawn] != [*Search("recall_at_5", candidates=20, seed=1).among(samples(texts))]
    assert search.own(["x", "y"]) == ["x", "y"]
    search = Search("top_1", classes=("dog", "cat"), template="a photo of a {}")
    assert [*search.among(samples(texts))] == ["a photo of a dog", "a photo of a cat"]
    assert search.own(["cat", "a cat"]) == ["a photo of a cat"]
    assert search.own(["bird"]) == []
    rule = ExitRule("class_margin", (1,), (0.5,))
    assert ExitPolicy({"vision": rule}, classes=search.class_texts).classes == ("a photo of a dog", "a photo of a cat")


def test_a_picture_is_drawn_once_however_many_samples_share_it():
    search = Search("recall_at_1", "text", candidates=3)
    proposes = {f"{cluster}{i}": (cluster, [f"{cluster} {i}", "all"]) for cluster in "abcdef" for i in (2, 0, 1)}
    drawn = search.among(proposes)
    assert drawn == search.among(dict(reversed(proposes.items())))
    assert len(drawn) == 3
    for name, said in drawn.items():
        assert name[1] == "0"
        assert said == sorted(["all", *(f"{name[0]} {i}" for i in range(3))])
    assert search.own(["first", "second"]) == ["first"]
    assert search.own([]) == []


@pytest.mark.parametrize("query", ["picture", "text"])
def test_other_samples_in_another_pass_are_refused_and_not_spent(module, make_trainer, tmp_path, query):
    shuffled = loader(shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(calibrate(query=query), limit_val_batches=5, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="every pass must give the same samples"):
        trainer.validate(module, shuffled, verbose=False)
    assert not [*tmp_path.rglob("ledger.json")]
