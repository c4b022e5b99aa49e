"""``mue benchmark``: every line is there and does what it says; oracle and ideal against brute force."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_mue.benchmark import baselines, lines
from lightning_mue.benchmark.baselines import BF16, COMPILED, INT8, PLAIN, baseline_lines
from lightning_mue.benchmark.entry import Entry, entry_of
from lightning_mue.benchmark.exam import PLACE, Exam
from lightning_mue.benchmark.lines import Line, Placed, engine_line, measure
from lightning_mue.benchmark.ours import IDEAL, NO_UPKEEP, ORACLE, OurLines
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, VERIFIED
from lightning_mue.benchmark.replay import Replay, ideal_line, oracle_depths, oracle_line
from lightning_mue.benchmark.run import Settings, benchmark
from lightning_mue.benchmark.table import markdown
from lightning_mue.benchmark.tuning import Tuned
from lightning_mue.callbacks.batches import single
from lightning_mue.export import freeze, load
from lightning_mue.inference import ExitEngine, encode
from lightning_mue.inference.runtime import RUNTIMES
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference
from tests.promises import certificate
from tests.runs import mue
from tests.test_side_by_side import METHODS, Data, answers
from tests.zoo import shared

pytestmark = pytest.mark.slow

STATICS = [f"static decoder depth {k}" for k in (1, 2, 3, 4)]
FULLS = [
    f"full depth, {runtime} {precision or 'float32'}"
    for runtime, precisions in RUNTIMES.items()
    for precision in precisions
    if precision != "float16"
]
OTHER = f"{CALIBRATED}, onnxruntime"
LIMITS = ["limit of bytes and FLOPs, full depth", "limit of bytes and FLOPs, calibrated depths"]
FULL, ORT_FULL = FULLS[0], "full depth, onnxruntime float32"
CERTIFICATE = certificate("certified", "exact_match", 0.7)
POLICY = ExitPolicy(
    {
        "vision": ExitRule("gate", (1, 2, 3), (0.68,) * 3),
        "encoder": ExitRule("gate", (1, 2, 3), (0.55,) * 3),
        "decoder": ExitRule("gate", (1, 2, 3, 4), (0.58, 0.2, 0.35, 0.45)),
    },
    certificate=CERTIFICATE,
)


@pytest.fixture(scope="module")
def model():
    return shared("florence2")


@pytest.fixture(scope="module")
def exam(model):
    return Exam.of(model, Data(model), "exact_match")


@pytest.fixture(scope="module")
def ours(exam):
    return OurLines(exam, POLICY)


@pytest.fixture(scope="module", autouse=True)
def _held(ours):
    """What engines share lives as long as one of them, and making it takes longest."""
    return ours.lines(Tuned())


@pytest.fixture(scope="module")
def found(exam):
    return benchmark(exam, POLICY, Settings(2, 1, (1, 4), methods=True, progress=False))


def test_every_line_is_there_in_every_batch_size(found):
    ours = [*FULLS, *STATICS, FIRST, *METHODS, VERIFIED, CALIBRATED, OTHER]
    names = [PLAIN, BF16, INT8, *ours, IDEAL, NO_UPKEEP, ORACLE, *LIMITS]
    assert {FULL, ORT_FULL, "full depth, torch bfloat16", "full depth, onnxruntime int8"} <= set(FULLS)
    assert {size: [entry.name for entry in entries] for size, entries in found.entries.items()} == {1: names, 4: names}
    assert found.full == FULL
    assert not found.left_out
    assert [entry.name for entry in found.entries[1] if entry.chosen] == [CALIBRATED]
    assert set(found.machine) == {"layers", "head"}
    assert "none is certified" in found.note


def test_the_policy_leaves_everywhere(exam):
    """Else the other tests would say little."""
    engine = ExitEngine(exam.model, POLICY)
    depths = {}
    for batch in exam.batches:
        for stream, depth in engine.generate(**batch).exit_depths.items():
            depths.setdefault(stream, set()).update(depth.flatten().tolist())
    assert all(len(of - {0}) > 1 for of in depths.values())


def test_quality_and_depths_are_those_of_the_samples_one_by_one(found, model):
    entries, batches = {entry.name: entry for entry in found.entries[1]}, Data(model).test_dataloader()
    static = {name: ExitPolicy({"decoder": ExitRule.static(k)}) for k, name in enumerate(STATICS, 1)}
    for name, policy in (static | {FULL: ExitPolicy.full_depth(), CALIBRATED: POLICY, OTHER: POLICY}).items():
        quality, depths = answers(model, policy, batches)
        assert entries[name].quality == pytest.approx(quality), name
        assert entries[name].depths == pytest.approx(depths), name
        for stream, of_stream in entries[name].histogram.items():
            assert sum(of_stream.values()) == pytest.approx(1)
            assert sum(k * share for k, share in of_stream.items()) == pytest.approx(depths[stream])
    assert entries[PLAIN].quality == entries[FULL].quality == entries[ORACLE].quality == 0.75
    assert entries[IDEAL].quality == entries[CALIBRATED].quality
    assert entries[VERIFIED].quality == entries[FULL].quality
    assert entries[NO_UPKEEP].quality is None


def test_gains_of_engine_and_of_exits_are_apart(found):
    for entries in found.entries.values():
        by_name = {entry.name: entry for entry in entries}
        for entry in entries:
            if entry.name in (PLAIN, BF16, INT8, *LIMITS):
                assert entry.of_full is entry.full_gain is entry.exits_gain is None
            elif entry.name in FULLS:
                assert entry.exits_gain == 1
                assert entry.full_gain == 1 / entry.of_generate[0]
            else:
                own = ORT_FULL if entry.name == OTHER else FULL
                assert entry.full_gain == by_name[own].full_gain
                assert entry.exits_gain == 1 / entry.of_full[0]


def test_parts_and_work(found):
    for entries in found.entries.values():
        by_name = {entry.name: entry for entry in entries}
        for entry in entries:
            assert bool(entry.parts) == (entry.name not in (PLAIN, BF16, INT8))
            parts = sum(ms for part, ms in entry.parts.items() if part != "total")
            assert parts <= entry.parts.get("total", 0) * (1 + 1e-9)
        for name in (IDEAL, ORACLE, FULL):
            assert by_name[name].parts.get("signals", 0) == 0
        assert by_name[CALIBRATED].parts["signals"] > 0
        assert by_name[FIRST].macs < by_name[CALIBRATED].macs < by_name[FULL].macs == by_name[LIMITS[0]].macs
        assert by_name[IDEAL].macs == by_name[CALIBRATED].macs == by_name[LIMITS[1]].macs
        assert by_name["CALM"].macs is None  # K/V that are made up are not counted
        assert 0 < by_name[LIMITS[1]].p50_ms < by_name[LIMITS[0]].p50_ms


CLOSED = torch.tensor([11, 12, 13])
"""So few tokens that the exits of a random model often agree."""


class Closed(Data):
    """Data with these answers alone."""

    def answer_constraint(self, end_id):
        return lambda _row, _ids: CLOSED.tolist()


def brute_force(model, sample, layers, last):
    """Read the full-depth answer at once; return the first exit that says each of its tokens."""
    settings = {"num_beams": 1, "do_sample": False, "prefix_allowed_tokens_fn": lambda _row, _ids: CLOSED.tolist()}
    ids_1T = model.generate(**sample, **settings)
    states, _ = reference.decoder_states(model, sample, ids_1T[:, :-1])
    logits = {k: reference.exit_logits(model, k, states[k])[0] for k in layers}
    said = {k: CLOSED[of_exit[:, CLOSED].argmax(-1)] for k, of_exit in logits.items()}
    return [next((k for k in layers if said[k][t] == token), last) for t, token in enumerate(ids_1T[0, 1:])]


@torch.no_grad()
def test_the_oracle_leaves_at_the_first_exit_that_says_the_token(model):
    exam = Exam.of(model, Closed(model), "exact_match")
    forced = oracle_depths(exam, Placed(), (1, 2, 3, 4))
    for batch, of_batch in zip(exam.batches, forced, strict=True):
        for row, depths in enumerate(of_batch):
            sample = {name: tensor for name, tensor in single(batch, row).items() if isinstance(tensor, torch.Tensor)}
            assert depths == brute_force(model, sample, (1, 2, 3, 4), 5)
    assert {depth for of_batch in forced for row in of_batch for depth in row} > {1, 5}
    full = engine_line(exam, Placed()).decode(lambda _: None)
    oracle = oracle_line(exam, Placed(), forced)
    assert oracle.decode(lambda _: None).texts == full.texts
    for sample in exam.picked(8, 4):
        found = oracle.timed(sample)
        assert exam.data.processor.decode(found.sequences[:, 1:]) == [full.texts[i] for i in sample[PLACE]]
        assert found.exit_depths["decoder"].tolist() == [(forced[0] + forced[1])[i] for i in sample[PLACE]]


@pytest.mark.parametrize("size", [1, 4])
def test_ideal_gives_the_same_tokens_and_asks_no_signal(exam, ours, size, monkeypatch):
    calibrated = engine_line(exam, ours.place(POLICY))
    given = calibrated.decode(lambda _: None)
    line = ideal_line(exam, ours.place(POLICY), given)
    samples = exam.picked(8, size)
    expected = [calibrated.timed(sample) for sample in samples]
    asked = []
    score, stream_scores = TorchExecutor.score, encode.stream_scores
    monkeypatch.setattr(TorchExecutor, "score", lambda *args: asked.append(args[1]) or score(*args))
    monkeypatch.setattr(encode, "stream_scores", lambda *args: asked.append(args[1]) or stream_scores(*args))
    for sample, out in zip(samples, expected, strict=True):
        found = line.timed(sample)
        assert found.sequences.tolist() == out.sequences.tolist()
        assert {s: d.tolist() for s, d in found.exit_depths.items()} == {
            s: d.tolist() for s, d in out.exit_depths.items()
        }
        assert found.pairs == out.pairs
    # Rows that left a stream at different layers cannot leave it by one depth: there alone its rule is asked.
    assert set(asked) <= ({"static"} if size == 1 else {"static", "gate"})
    assert "signals" not in found.timings


def test_a_replay_of_other_depths_is_another_answer(exam, ours):
    """That replays repeat answers is no accident."""
    given = engine_line(exam, ours.place(POLICY)).decode(lambda _: None)
    wrong = [[1] * len(row) for rows in given.by_row for row in rows]
    replay = Replay(exam, ours.place(POLICY), {k: v for k, v in given.depths.items() if k != "decoder"}, wrong)
    said = [exam.data.processor.decode(replay(False, sample).sequences[:, 1:])[0] for sample in exam.picked(8)]
    assert said != given.texts


def test_notes_count_the_answers_that_are_the_same(found, exam, ours, monkeypatch):
    notes = {entry.name: entry.note for entry in found.entries[1]}
    assert notes[IDEAL] == notes[ORACLE] == "same answers on 2 of 2 timed samples"
    plain = Replay.__call__

    def wrong(self, timings, batch):
        out = plain(self, timings, batch)
        return replace(out, sequences=torch.full_like(out.sequences, 50))

    monkeypatch.setattr(Replay, "__call__", wrong)
    entries = benchmark(exam, POLICY, Settings(2, 1, progress=False)).entries[1]
    assert {e.note for e in entries if e.name in (IDEAL, ORACLE)} == {"same answers on 0 of 2 timed samples"}


def test_a_policy_of_groups_has_no_ideal_in_batches(exam):
    policy = replace(
        POLICY, groups=("a",), certificate=certificate(metric="exact_match", decode={"group_by": "question_type"})
    )
    batches = [batch | {"question_type": ["a", "b", "a", "b"]} for batch in exam.batches]
    found = benchmark(replace(exam, batches=batches), policy, Settings(4, 1, (1, 4), progress=False))
    assert {IDEAL, ORACLE} <= {entry.name for entry in found.entries[1]}
    assert IDEAL not in {entry.name for entry in found.entries[4]}
    assert "several groups" in found.left_out[f"{IDEAL}, batch 4"]
    note = next(entry.note for entry in found.entries[1] if entry.name == IDEAL)
    assert note == "same answers on 4 of 4 timed samples"


def test_a_verified_policy_says_what_full_depth_says(exam):
    """Its tokens come from the last layer, and so do those of its depths replayed, without verifying."""
    policy = ExitPolicy({"decoder": POLICY.rules["decoder"]}, verified=True, certificate=CERTIFICATE)
    entries = {entry.name: entry for entry in benchmark(exam, policy, Settings(4, 1, progress=False)).entries[1]}
    assert entries[CALIBRATED].quality == entries[FULL].quality
    assert entries[CALIBRATED].macs is None  # what was drafted in vain is not known
    assert entries[IDEAL].note == "same answers on 4 of 4 timed samples"


def test_samples_are_spread_and_know_their_place(exam):
    assert [batch[PLACE] for batch in exam.picked(3)] == [[0], [3], [7]]
    assert [batch[PLACE] for batch in exam.picked(99)] == [[k] for k in range(8)]
    assert [batch[PLACE] for batch in exam.picked(99, 3)] == [[0, 1, 2], [4, 5, 6]]
    for batch in exam.picked(8):
        (place,) = batch[PLACE]
        alone = single(exam.batches[place // 4], place % 4)
        for name in ("pixel_values", "input_ids", "attention_mask"):
            assert torch.equal(batch[name], alone[name])
    for batch in exam.picked(8, 3):
        assert batch["attention_mask"].any(0).all(), "padding that no row needs"
    with pytest.raises(ValueError, match=r"No batch of 5 .* largest batch has 4 rows"):
        exam.picked(8, 5)


def test_what_a_baseline_cannot_do_is_said(exam, monkeypatch):
    def fail(*_args, **_settings):
        raise RuntimeError("no compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(baselines, "_in_int8", lambda model: fail())
    found, left_out = baseline_lines(exam, True, exam.picked(1)[0])
    assert list(found) == [PLAIN, BF16]
    assert left_out == {INT8: "RuntimeError: no compiler found", COMPILED: "RuntimeError: no compiler found"}


def test_the_compiled_line_compiles_the_forward(exam, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiled.append(how) or forward)
    found, _ = baseline_lines(exam, True, exam.picked(1)[0])
    assert compiled == [{"dynamic": True}]
    assert found[COMPILED].decode(lambda _: None).texts == found[PLAIN].decode(lambda _: None).texts


def test_baselines_are_what_they_are_called(exam):
    dtypes = {}
    found, _ = baseline_lines(exam, False, exam.picked(1)[0])
    for name, line in found.items():
        with torch.autograd.profiler.profile() as profile:
            line.answer(exam.picked(1)[0])
        dtypes[name] = {event.name for event in profile.function_events}
    assert any("quantized" in op for op in dtypes[INT8])
    assert not any("quantized" in op for op in dtypes[PLAIN] | dtypes[BF16])
    assert any("scaled_dot_product" in op for op in dtypes[PLAIN])
    assert not any("scaled_dot_product" in op for op in dtypes[BF16])


def test_times_are_kept_by_line_sample_and_repeat():
    now = [0.0]

    def variant(seconds):
        def answer(sample):
            now[0] += seconds * sample["i"]

        return answer

    samples, variants = [{"i": 1}, {"i": 2}, {"i": 3}], {"a": variant(0.1), "b": variant(0.05)}
    found = measure(variants, samples, 2, "a", clock=lambda: now[0])
    assert found["a"].ms == pytest.approx(np.array([[100, 200, 300]] * 2))
    assert found["b"].ms == pytest.approx(np.array([[50, 100, 150]] * 2))
    assert found["b"].over(found["a"]) == pytest.approx((0.5, 0))
    assert found["b"].timing.ratio == pytest.approx(0.5)
    assert found["a"].timing.p50_ms == pytest.approx(200)


def test_gains_are_medians_of_pairs(exam):
    def times(*ms):
        return lines.Times(None, np.array(ms, float)[None])

    by_name = {"plain": times(40, 40, 80), "full": times(20, 40, 20), "this": times(10, 10, 20)}
    line = Line(None, None, full="full")
    given = engine_line(exam, POLICY).decode(lambda _: None)
    timing = measure({"this": lambda _: None}, [{}], 1, "this")["this"].timing
    by_name["this"] = replace(by_name["this"], timing=timing)
    found = entry_of("this", line, given, by_name, "plain")
    assert found.of_generate == (0.25, None)
    assert found.of_full == (0.5, None)
    assert (found.full_gain, found.exits_gain) == (2.0, 2.0)


def test_the_page(found):
    text = markdown(found, "Benchmark of it", {"device": "this one"}, "exact match")
    assert text.startswith("# Benchmark of it\n\n* device: this one\n")
    main = text[text.index("## Batch 1") : text.index("### Where the time goes")]
    rows = [line.strip("| ").split(" | ") for line in main.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows if row[-1]}) <= 2
    for entry in found.entries[1]:
        assert sum(row[0].strip("* ") == entry.name for row in rows) == 1
    for header in ("p50 ms", "p95 ms", "of generate", "of own full depth", "full depth x", "exits x", "decoder depth"):
        assert header in rows[0]
    first, full = (next(e for e in found.entries[1] if e.name == name) for name in (FIRST, FULL))
    assert f"Ceiling: everything at its first exit takes {first.of_full[0]:.3f}" in main
    assert f"keeps {first.quality / full.quality:.1%} of its quality" in main
    parts = text[text.index("### Where the time goes") : text.index("## Batch 4")]
    assert "| vision | encoder | memory | layers | signals | head | 10^6 MACs an answer |" in parts
    assert f"| {PLAIN} |" not in parts
    depths = text[text.index("## Where samples and tokens left") :]
    assert f"| {CALIBRATED} |" in depths
    assert f"| {FULL} |" not in depths  # leaves nowhere early
    assert "Left out" not in text


@pytest.fixture(scope="module")
def bundle(calibrated_once, tmp_path_factory):
    """A bundle of the tiny recipe, whose policy no timing chose."""
    engine = load(calibrated_once / "bundle")
    rules = {"vision": ExitRule("gate", (1,), (0.5,)), "decoder": ExitRule("gate", (1, 2), (0.5, 0.5))}
    policy = ExitPolicy(rules, certificate=CERTIFICATE)
    return freeze(engine.original, policy, tmp_path_factory.mktemp("known") / "bundle", engine.processor)


def run(bundle, out, *more):
    mue("benchmark", bundle, "--timed-samples", 3, "--repeats", 1, "--out", out, *more)
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_the_command_with_a_recipe(bundle, calibrated_once, tmp_path, capsys):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    text, figures = run(
        bundle, tmp_path / "page.md", "-c", calibrated_once / "recipe.yaml", "--batch", 2, "--methods", "--threads", 1
    )
    assert set(figures["batches"]) == {"1", "2"}
    names = [entry["name"] for entry in figures["batches"]["1"]]
    assert {PLAIN, BF16, INT8, *FULLS, *STATICS[:2], FIRST, "CALM", CALIBRATED, IDEAL, ORACLE, *LIMITS} <= set(names)
    assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in names)
    for key in ("device", "threads", "versions", "date", "quality", "time", "policy"):
        assert f"* {key}: {figures['facts'][key]}\n" in text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", figures["facts"]["date"])
    assert f"torch {torch.__version__.split('+')[0]}" in figures["facts"]["versions"]
    assert figures["metric"] == "exact_match"  # the promise's
    assert all(str(folder) not in text + json.dumps(figures) for folder in (bundle, calibrated_once, tmp_path))
    assert "calibrated exits" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_the_command_with_shards_alone(bundle, shards, tmp_path):
    given = ("--task", "vqa", "--metric", "accuracy")
    text, figures = run(bundle, tmp_path / "a.md", "--data", shards, *given, "--runtime", "onnxruntime")
    assert figures["own full depth"] == ORT_FULL
    assert f"{CALIBRATED}, torch" in {entry["name"] for entry in figures["batches"]["1"]}
    assert "| line | accuracy |" in text
    one_tar, _ = run(bundle, tmp_path / "b.md", "--data", shards / "test-000.tar", *given)
    pattern = r"quality: all (\d+) test samples"
    assert re.search(pattern, one_tar)[1] == re.search(pattern, text)[1]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((), "give the recipe .* or --data and --task"),
        (("--data", "shards"), "give the recipe .* or --task"),
        (("-c", "recipe", "--metric", "nonsense"), "`metric` must be one of"),
        (("-c", "recipe", "--batch", "500"), "No batch of 500"),
        (("-c", "wrong"), "must be a recipe with `data`"),
        (("-c", "unknown"), "must be settings of ShardsDataModule"),
        (("-c", "recipe", "--out", "it.json"), "`--out` is the page"),
    ],
)
def test_what_does_not_fit_is_said(given, why, bundle, calibrated_once, shards, tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: 1\n")
    (tmp_path / "unknown.yaml").write_text(f"data:\n  train: {shards}\n  task: vqa\n  nonsense: 1\n")
    files = {"recipe": calibrated_once / "recipe.yaml", "shards": shards}
    files |= {name: tmp_path / f"{name}.yaml" for name in ("wrong", "unknown")}
    with pytest.raises(SystemExit, match=why):
        mue("benchmark", bundle, "--timed-samples", 1, *(files.get(word, word) for word in given))


def test_a_bundle_must_say_what_it_promises_and_take_pictures(bundle, calibrated_once, tmp_path):
    engine, recipe = load(bundle), calibrated_once / "recipe.yaml"
    freeze(engine.original, engine.policy, tmp_path / "bare")
    with pytest.raises(SystemExit, match="has no processor"):
        mue("benchmark", tmp_path / "bare", "-c", recipe)
    outputs = replace(engine.policy, certificate=certificate(metric="consistency"))
    freeze(engine.original, outputs, tmp_path / "outputs", engine.processor)
    with pytest.raises(SystemExit, match=r"\(consistency\) names no score of a single answer; give --metric"):
        mue("benchmark", tmp_path / "outputs", "-c", recipe)


def test_entries_are_plain_values():
    entry = Entry("a", 0.5, depths={"decoder": 2.0}, histogram={"decoder": {2: 1.0}}, of_full=(1.0, None))
    assert json.loads(json.dumps(entry.to_dict()))["histogram"] == {"decoder": {"2": 1.0}}
