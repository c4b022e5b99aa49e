"""Queries among fixed candidates: against brute force, torchmetrics and open_clip's embeddings; exits as simulated."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import RetrievalHitRate

from lightning_mue.calibration import simulate
from lightning_mue.certificate import Certificate, Evidence
from lightning_mue.inference import ExitEngine, embedding
from lightning_mue.inference.embed_profile import measure_embedding
from lightning_mue.inference.embed_record import record_embeddings
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.inference.gallery import Gallery, places
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise
from tests import reference, zoo

ROWS = 12
WORDS = ["red", "green", "blue", "square", "circle", "cross"]
CLASSES = tuple(f"a {color} {shape}" for color in WORDS[:3] for shape in WORDS[3:])
SIGNALS = ("similarity", "gate", "pooled_similarity", "class_margin")
TOWERS = [("picture", signal) for signal in SIGNALS] + [("text", signal) for signal in SIGNALS[:3]]
TEXTS = tuple(f"{a} {b}" for a in WORDS[:4] for b in WORDS[3:])


class Words:
    """A processor of texts for a vocabulary this small: a word is a token."""

    def labels(self, texts):
        ids = [[5 + ["a", *WORDS].index(word) for word in text.split()] + [zoo.END] for text in texts]
        longest = max(map(len, ids))
        return torch.tensor([row + [-100] * (longest - len(row)) for row in ids])


@pytest.fixture(scope="module")
def processor():
    return Words()


@pytest.fixture(scope="module")
def model():
    return zoo.shared("coca")


@pytest.fixture(scope="module")
def pixels():
    return zoo.inputs("coca", ROWS)["pixel_values"]


@pytest.fixture(scope="module")
def given(model, processor, pixels):
    """What each side's tower reads; texts of several lengths."""
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    return {"picture": pixels, "text": whole.text_ids([*TEXTS[: ROWS - 2], "a", "a red square red square"])}


def unit(rows, seed):
    return normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_of_each_picture_is_that_of_torchmetrics_on_its_own_ranking(k):
    image_BE, candidate_CE, counts = unit(40, 0), unit(30, 1), [1 + row % 3 for row in range(40)]
    row_R = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
    own_RE, is_own_BC = unit(len(row_R), 2), torch.rand(40, 30, generator=torch.Generator().manual_seed(3)) < 0.05
    for row, column in is_own_BC.nonzero().tolist():  # a candidate that is an own text has that text's vector
        own_RE[(row_R == row).nonzero()[0, 0]] = candidate_CE[column]
    place_B = places(image_BE, own_RE, row_R, candidate_CE, is_own_BC)
    hit_rate, expected = RetrievalHitRate(top_k=k), []
    for row in range(40):  # all own texts, and the candidates that are none of them
        texts = torch.cat([own_RE[row_R == row], candidate_CE[~is_own_BC[row]]])
        right = torch.arange(len(texts)) < counts[row]
        expected.append(float(hit_rate(texts @ image_BE[row], right, torch.zeros(len(texts), dtype=torch.long))))
    assert (place_B < k).double().tolist() == expected
    assert 0 < sum(expected) < 40


def test_ties_count_against_a_picture():
    alike = torch.ones(4, 8) / math.sqrt(8)
    place_B = places(alike[:2], alike[:2], torch.arange(2), alike, torch.zeros(2, 4, dtype=torch.bool))
    assert place_B.tolist() == [4, 4]


@pytest.mark.parametrize("width", [16, 512, 768])
def test_equal_texts_tie_whatever_their_sums_round_to(width):
    generator = torch.Generator().manual_seed(0)
    image_BE, text_1E = (normalize(torch.randn(n, width, generator=generator), dim=-1) for n in (50, 1))
    texts = text_1E.expand(50, width)
    place_B = places(image_BE, texts, torch.arange(50), texts[:7].contiguous(), torch.zeros(50, 7, dtype=torch.bool))
    assert place_B.tolist() == [7] * 50


@torch.no_grad()
def test_zero_shot_is_open_clips_and_accuracy_that_of_torchmetrics(model, processor, pixels):
    engine = EmbedEngine(model, ExitPolicy(classes=CLASSES), processor=processor)
    ids = torch.full((len(CLASSES), 64), zoo.PAD)
    labels = processor.labels(CLASSES)
    ids[:, 0], ids[:, 1 : 1 + labels.shape[1]] = zoo.START, labels.clamp(min=0)
    image_BE, text_CE = model.coca.encode_image(pixels), model.coca.encode_text(ids)
    expected = (model.coca.logit_scale.exp() * image_BE @ text_CE.T).softmax(-1)
    found = engine.contrastive.logits(engine.images(pixels).vectors, engine.classes_CE).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    label_B = torch.arange(ROWS) % len(CLASSES)
    own = [[CLASSES[label]] for label in label_B]
    gallery = Gallery(engine.full_depth.embed_texts(CLASSES).vectors, [[text] for text in CLASSES])
    right = gallery.places(image_BE, engine.classes_CE[label_B], torch.arange(ROWS), own) < 1
    accuracy = MulticlassAccuracy(len(CLASSES), average="micro")
    assert right.float().mean() == accuracy(expected, label_B)


@torch.no_grad()
def test_signals_are_of_the_embedding_that_leaving_gives(model, processor, pixels, given):
    engine = EmbedEngine(model, ExitPolicy(classes=CLASSES), processor=processor)
    trace = record(engine, given)
    margins = []
    for k in (1, 2, 3):
        with reference.left_after(model, "vision", k):
            logits_BC = engine.contrastive.logits(model.coca.encode_image(pixels), engine.classes_CE)
        best, second = logits_BC.softmax(-1).topk(2).values.unbind(1)
        margins.append(best - second)
    np.testing.assert_allclose(trace.streams["vision"].scores["class_margin"], torch.stack(margins, 1), atol=1e-5)
    stream, exits, cosines = engine.contrastive.image, engine.exits, []
    state = stream.prologue({"pixel_values": pixels}, {})
    for k in (1, 2, 3):
        before, state.h_BTD = state.h_BTD, stream.layer(k, state)
        two = [engine.contrastive.image_embedding(state.at(exits.adapt("vision", k, h))) for h in (before, state.h_BTD)]
        cosines.append((two[0] * two[1]).sum(-1))
    found = trace.streams["vision"].scores["pooled_similarity"]
    np.testing.assert_allclose(found, torch.stack(cosines, 1), atol=1e-5)


def scorer(engine, given, query):
    """What scores queries: the R-th finds the R-th candidate, or one of the same texts, among the first three."""
    other = "text" if query == "picture" else "picture"
    own_RE = engine.full_depth.embed(other, given[other]).vectors
    names = [[f"{row % 9}"] for row in range(ROWS)]
    gallery = Gallery(own_RE[: ROWS - 3], names[: ROWS - 3])

    def score(vectors_BE):
        return (gallery.places(vectors_BE, own_RE, torch.arange(ROWS), names) < 3).double().numpy()

    return score


def record(engine, given, query="picture"):
    names = [f"s{row:02d}" for row in range(ROWS)]
    more = (names, names, [""] * ROWS, "recall_at_5", scorer(engine, given, query), {"classes": list(CLASSES)})
    return record_embeddings(engine, query, given[query], *more)


@torch.no_grad()
@pytest.mark.parametrize(("query", "signal"), TOWERS)
def test_the_engine_does_what_simulation_says(model, processor, given, query, signal):
    """Depths and scores, exactly; rows leave at several layers; a batch is its rows one by one."""
    whole = EmbedEngine(model, ExitPolicy(classes=CLASSES), processor=processor)
    trace, score = record(whole, given, query), scorer(whole, given, query)
    latency = measure_embedding(whole, query, given[query][:1], repeats=1)
    stream = {"picture": "vision", "text": "text"}[query]
    layers, last = {"picture": ((1, 2, 3), 4), "text": ((1,), 2)}[query]
    assert latency.streams[stream].signal_ms.keys() == {found for side, found in TOWERS if side == query}
    scores = trace.streams[stream].scores[signal]
    thresholds = [float(np.median(scores[:, e]) + 1e-4) for e in range(len(layers))]
    policy = ExitPolicy({stream: ExitRule(signal, layers, thresholds)}, classes=CLASSES)
    engine = EmbedEngine(model, policy, processor=processor)
    found, expected = engine.embed(query, given[query]), simulate(trace, policy, latency)
    assert found.depths.tolist() == expected.depths[stream].tolist()
    assert len(set(found.depths.tolist())) > min(2, len(layers))
    assert score(found.vectors).tolist() == expected.score["recall_at_5"].tolist()
    for row in range(ROWS):
        alone = engine.embed(query, given[query][row : row + 1])
        torch.testing.assert_close(found.vectors[row], alone.vectors[0], rtol=1e-5, atol=1e-6)
        rules = {stream: ExitRule.static(int(alone.depths))} if alone.depths < last else {}
        static = EmbedEngine(model, ExitPolicy(rules)).embed(query, given[query][row : row + 1])
        torch.testing.assert_close(alone.vectors, static.vectors)


@torch.no_grad()
@pytest.mark.parametrize(("query", "signal"), TOWERS)
def test_thresholds_out_of_reach_are_full_depth(model, processor, given, query, signal):
    stream, layers = {"picture": ("vision", (1, 2, 3)), "text": ("text", (1,))}[query]
    rule = ExitRule(signal, layers, [math.inf] * len(layers))
    engine = EmbedEngine(model, ExitPolicy({stream: rule}, classes=CLASSES), processor=processor)
    found, whole = engine.embed(query, given[query]), engine.full_depth.embed(query, given[query])
    assert torch.equal(found.vectors, whole.vectors)
    assert len(set(found.depths.tolist())) == 1
    assert found.layer_runs == found.depths[0]


@torch.no_grad()
def test_signals_of_texts_do_not_see_the_padding(model, processor, given):
    """By hand, of the states at a text's own tokens and [CLS] alone."""
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    trace, stream, exits = record(whole, given, "text"), whole.contrastive.text, whole.exits
    state = stream.prologue({"text_ids": given["text"]}, {})
    before_BTD, after_BTD = state.h_BTD, stream.layer(1, state)
    for row, ids in enumerate(given["text"]):
        own = [*range(int((ids != zoo.PAD).sum())), len(ids)]
        cosine = torch.cosine_similarity(before_BTD[row, own], after_BTD[row, own], dim=-1).mean()
        gate = exits.gates["text_1"](after_BTD[row, own].mean(0)).sigmoid()
        found = trace.streams["text"].scores
        assert found["similarity"][row, 0] == pytest.approx(cosine.item(), abs=1e-5)
        assert found["gate"][row, 0] == pytest.approx(gate.item(), abs=1e-5)


def test_a_candidate_with_a_text_of_the_query_is_its_own():
    """Of pictures: one of which the very text is said is no wrong answer, whatever else is said of it."""
    query_BE, candidate_CE = unit(1, 0).expand(2, 8), unit(3, 1)
    candidate_CE[0] = query_BE[0]
    gallery = Gallery(candidate_CE, [["red", "green"], ["blue"], ["red"]])
    found = gallery.places(query_BE, -query_BE, torch.arange(2), [["red"], ["blue"]])
    assert found.tolist() == [1, 2]


@torch.no_grad()
def test_an_accepted_exit_makes_its_embedding_once(model, processor, pixels, monkeypatch):
    policy = ExitPolicy({"vision": ExitRule("class_margin", (1,), (0.0,))}, classes=CLASSES)
    engine, calls = EmbedEngine(model, policy, processor=processor), []
    whole = engine.contrastive.image_embedding
    monkeypatch.setattr(engine.contrastive, "image_embedding", lambda state: calls.append(1) or whole(state))
    assert engine.images(pixels).depths.tolist() == [1] * ROWS
    assert len(calls) == 1


@torch.no_grad()
def test_texts_leave_by_the_change_of_their_embedding(model, processor):
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    stream, adapt, pool = whole.contrastive.text, whole.exits.adapt, whole.contrastive.text_embedding
    ids = whole.text_ids(CLASSES)
    state = stream.prologue({"text_ids": ids}, {})
    before, state.h_BTD = state.h_BTD, stream.layer(1, state)
    two = [pool(state.at(adapt("text", 1, h_BTD))) for h_BTD in (before, state.h_BTD)]
    cosine = (two[0] * two[1]).sum(-1)
    policy = ExitPolicy({"text": ExitRule("pooled_similarity", (1,), (float(cosine.median()),))})
    found = EmbedEngine(model, policy, processor=processor).embed_texts(CLASSES)
    assert found.depths.tolist() == [1 if c >= cosine.median() else 2 for c in cosine]
    expected = torch.where((found.depths == 1)[:, None], two[1], whole.embed_texts(CLASSES).vectors)
    torch.testing.assert_close(found.vectors, expected, rtol=1e-5, atol=1e-6)


def test_a_certificate_of_embeddings_is_none_of_answers(model):
    evidence = (Evidence(Promise("recall_at_5", keep=0.99)),)
    policy = ExitPolicy({"vision": ExitRule.static(2)}, certificate=Certificate("certified", evidence, 0.95))
    assert EmbedEngine(model, policy).policy == policy
    with pytest.raises(ValueError, match="certified for embeddings, not for answers"):
        ExitEngine(model, policy)


@torch.no_grad()
def test_each_side_obeys_its_own_policy(model, processor, given):
    """Two certificates, one engine; what one policy says of the other's stream is not asked."""
    pictures = ExitPolicy({"vision": ExitRule.static(2), "text": ExitRule.static(1)})
    whole, early = ExitPolicy(), ExitPolicy({"text": ExitRule.static(1)})
    for texts, depth, both in ((None, 1, True), (whole, 2, False), (early, 1, True)):
        engine = EmbedEngine(model, pictures, processor=processor, text_policy=texts)
        assert engine.images(given["picture"]).depths.tolist() == [2] * ROWS
        assert engine.embed_texts(TEXTS).depths.tolist() == [depth] * len(TEXTS)
        assert engine.leaves_both_early == both
        assert engine.full_depth.embed_texts(TEXTS).depths.tolist() == [2] * len(TEXTS)
    with pytest.raises(ValueError, match=r"must have a rule for 'text', it has them for \['vision'\]"):
        EmbedEngine(model, whole, text_policy=ExitPolicy({"vision": ExitRule.static(2)}))
    with pytest.raises(ValueError, match="weights with fingerprint of another"):
        EmbedEngine(model, whole, text_policy=replace(early, fingerprint="of another"))


@torch.no_grad()
def test_long_lists_are_embedded_in_parts(model, processor, monkeypatch):
    whole = EmbedEngine(model, ExitPolicy(), processor=processor)
    together = whole.embed_texts(TEXTS)
    monkeypatch.setattr(embedding, "CHUNK", 5)
    parts = whole.embed_texts(TEXTS)
    torch.testing.assert_close(parts.vectors, together.vectors, rtol=1e-5, atol=1e-6)
    assert (len(parts.depths), parts.layer_runs) == (len(TEXTS), 3 * together.layer_runs)


def test_what_is_refused(model, processor):
    rule = ExitRule("class_margin", (1,), (0.5,))
    with pytest.raises(ValueError, match="needs two or more; got \\[\\]"):
        ExitPolicy({"vision": rule})
    with pytest.raises(ValueError, match="no processor"):
        EmbedEngine(model, ExitPolicy({"vision": rule}, classes=CLASSES))
    with pytest.raises(ValueError, match="names no classes"):
        EmbedEngine(model, ExitPolicy(), processor=processor).classify([])
    for signal in ("class_margin", "pooled_similarity"):
        policy = ExitPolicy({"vision": ExitRule(signal, (1,), (0.5,))}, classes=CLASSES)
        with pytest.raises(ValueError, match=f"Signal '{signal}' of 'vision' is about embeddings; .* of nothing"):
            ExitEngine(model, policy)
        elsewhere = ExitPolicy({"decoder": ExitRule(signal, (3,), (0.5,))}, classes=CLASSES)
        with pytest.raises(ValueError, match=f"Signal '{signal}' of 'decoder' is about embeddings; .* of ..vision'"):
            EmbedEngine(model, elsewhere, processor=processor)
        assert ExitPolicy.from_json(policy.to_json()) == policy
