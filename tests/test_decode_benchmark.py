"""The decoders' cost table: every line is there, decodes what it was asked to, and is refused where it does not."""

import json
import time
from dataclasses import replace
from functools import partial, wraps

import decode
import decode_signals
import numpy as np
import pytest
import targets
import torch
import yaml
from decode import LAYERS, PROMISES, Measured, measure, read_shape, values
from decode_case import START, Case, ragged_depths
from decode_limits import ideal_rows, limit_rows
from decode_lines import ASSISTED, BASELINE, COMPILED, LINES, Answer, engine_lines, generate_line, torch_executor
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from lightning_mue.backbones import view
from lightning_mue.benchmark.limits import Machine
from lightning_mue.inference import schedule
from lightning_mue.inference.schedule import DecoderExits
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from tests.runs import ROOT

NAMES = [
    "generate fp32 sdpa",
    "generate fp32 eager",
    "generate bf16 sdpa",
    "generate bf16 eager",
    "generate int8 sdpa",
    "generate int8 eager",
    "torch fp32 full",
    "torch fp32 static",
    "torch fp32 ragged",
    "torch bf16 sdpa full",
    "torch bf16 sdpa static",
    "torch bf16 sdpa ragged",
    "torch bf16 eager full",
    "torch bf16 eager static",
    "torch bf16 eager ragged",
]
"""At the least; other executors have lines of their own."""
ROWS, STEPS, DEPTH = 5, 8, 6


def tiny(seed=2, rows=ROWS):
    return Case(read_shape("tiny"), rows, time.process_time, seed)


@pytest.fixture(scope="module")
def measured():
    case = tiny()
    return case, measure(case, LINES, 2)


def pairs_by_hand(depths):
    """Each row's tokens one after the other: a layer that is reached runs over every position it has not seen."""
    seen = set()
    for row, of_row in enumerate(depths):
        for position, depth in enumerate(of_row):
            seen |= {(row, p, layer) for layer in range(1, depth + 1) for p in range(position + 1)}
    return len(seen)


def test_every_line_is_there_and_timed(measured):
    _, found = measured
    assert set(NAMES) <= set(found)
    for name, line in found.items():
        assert line.ms.shape == (2,)
        assert (line.ms > 0).all()
        assert ("layers" in line.parts) == (not name.startswith("generate"))
        assert all((ms > 0).all() and (ms <= line.ms).all() for ms in line.parts.values())


def test_forced_depths_were_used(measured):
    case, found = measured
    expected = {"full": 6.0, "static": 3.0, "ragged": 3.0}
    for name in NAMES[6:]:
        answer, schedule = found[name].answer, name.split()[-1]
        assert np.mean(answer.depths) == expected[schedule]
        assert answer.depths == case.depths[schedule]
        assert answer.pairs == pairs_by_hand(answer.depths)
    ragged = found["torch fp32 ragged"].answer
    assert pairs_by_hand(ragged.depths) > np.sum(ragged.depths), "no token had to catch up"


def test_tokens_differ_by_step_and_row(measured):
    """Else equal tokens would say little."""
    tokens = measured[1][BASELINE].answer.tokens
    assert len({tuple(row) for row in tokens}) == ROWS
    assert all(len(set(row)) > 1 for row in tokens)
    assert measured[1]["torch fp32 ragged"].answer.tokens != tokens, "depth makes no difference"


@pytest.mark.parametrize(("rows", "steps", "layers", "mean"), [(1, 20, 6, 3), (8, 20, 6, 3), (32, 20, 12, 6)])
def test_ragged_depths_meet_their_mean(rows, steps, layers, mean):
    depths = ragged_depths(rows, steps, layers, mean, 2)
    assert np.shape(depths) == (rows, steps)
    assert np.mean(depths) == mean
    assert (np.min(depths), np.max(depths)) == (1, layers)
    assert depths == ragged_depths(rows, steps, layers, mean, 2)
    assert depths != ragged_depths(rows, steps, layers, mean, 3)


class Forgetful(TorchExecutor):
    """Runs the newest position alone, whatever it was asked to catch up."""

    def run_layer(self, layer, pending):
        super().run_layer(layer, [(last - 1, last, rows) for _, last, rows in pending])


def changed(line, **fields):
    """Return the line with something else in its answers."""
    return replace(line, prepare=lambda case: lambda: replace(line.prepare(case)(), **fields))


def elsewhere(line):
    """Return the line on other weights."""
    return replace(line, prepare=lambda case: line.prepare(tiny(case.seed + 1)))


def one_wrong_token(line):
    def prepare(case):
        def run():
            answer = line.prepare(case)()
            answer.tokens[ROWS - 1][STEPS - 1] ^= 1
            return answer

        return run

    return replace(line, prepare=prepare)


def runner_up(line):
    """Return the line with the second best token at the end of the last row."""

    def prepare(case):
        def run():
            answer = line.prepare(case)()
            given = torch.tensor([[START, *tokens[:-1]] for tokens in answer.tokens])
            memory = BaseModelOutput(last_hidden_state=case.memory("fp32"))
            logits = case.model()(decoder_input_ids=given, encoder_outputs=memory).logits[-1, -1]
            best, second = logits.topk(2).indices.tolist()
            assert answer.tokens[-1][-1] == best
            answer.tokens[-1][-1] = second
            return answer

        return run

    return replace(line, prepare=prepare)


def forgetful(case):
    return partial(Forgetful, view(case.model()))


full, ragged = LINES["torch fp32 full"], LINES["torch fp32 ragged"]
WRONG = {
    "one token": (one_wrong_token(full), "100% of tokens, got 97.5%"),
    "a nearly right token": (runner_up(full), "100% of tokens, got 97.5%"),
    "one token of ragged": (one_wrong_token(ragged), "100% of tokens, got 97.5%"),
    "one token of generate": (one_wrong_token(LINES["generate fp32 eager"]), "100% of tokens, got 97.5%"),
    "no catching up": (engine_lines("wrong", "fp32", forgetful)["wrong ragged"], "what the fp32 model says"),
    "other weights": (elsewhere(LINES["generate fp32 eager"]), "what the fp32 model says"),
    "other weights, bf16": (elsewhere(LINES["generate bf16 sdpa"]), "50% of tokens"),
    "other weights, int8": (elsewhere(LINES["generate int8 eager"]), "50% of tokens"),
    "other depths": (replace(full, schedule="ragged"), "got other depths"),
    "never left": (changed(ragged, depths=[[DEPTH] * STEPS] * ROWS), "got other depths"),
    "pairs": (changed(ragged, pairs=ROWS * STEPS * DEPTH), "these depths and 240 pairs"),
    "too short": (changed(full, tokens=[[5] * STEPS] * (ROWS - 1) + [[5]]), "8 tokens in each of 5 rows"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_line_is_refused(wrong):
    line, why = WRONG[wrong]
    with pytest.raises(ValueError, match=f"'wrong' must .*{why}"):
        measure(tiny(), {BASELINE: LINES[BASELINE], "wrong": line}, 1)


def test_a_fp32_line_at_full_depth_says_what_generate_says():
    """Both are what the model says at some depth; they have to be it at the same one."""
    shallow = changed(generate_line("fp32", "sdpa"), depths=[[3] * STEPS] * ROWS)
    with pytest.raises(ValueError, match="what the fp32 model says"):
        measure(tiny(), {BASELINE: shallow}, 1)
    at_three = replace(LINES["torch fp32 static"], schedule=None)
    with pytest.raises(ValueError, match=f"must choose the tokens of '{BASELINE}'"):
        measure(tiny(), {BASELINE: LINES[BASELINE], "wrong": at_three}, 1)


def test_the_script_writes_a_table(tmp_path, capsys):
    decode.main(["--shape", "tiny", "--repeats", "1", "--batch-sizes", "1", "8", "--out", str(tmp_path)])
    (page,) = tmp_path.iterdir()
    assert page.name == f"decode_tiny_batch_1_8_{targets.today()}.md"
    text = page.read_text()
    assert text in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {len(decode.COLUMNS)}
    cells = [[row[0], *numbers(row[1:])] for row in rows if row[0] in LINES]
    at_eight = [name for name in LINES if name != ASSISTED]
    assert [row[0] for row in cells] == [*LINES, *at_eight]
    assert f"{ASSISTED}: left out: ValueError: assisted generate is only supported for batch_size = 1." in text
    for tokens, batch in ((8, cells[: len(LINES)]), (64, cells[len(LINES) :])):
        ms = {row[0]: row[1] for row in batch}
        for name, _, ratio, speedup, *rest in batch:
            assert ratio == pytest.approx(ms[name] / ms[BASELINE], rel=0.02)
            assert speedup == pytest.approx(ms[BASELINE] / ms[name], rel=0.02)
            if not name.startswith("generate"):
                of_full, of_exits, layers, memory, head, _, depth, computed, pairs, *_ = rest
                assert of_full * of_exits == pytest.approx(speedup, rel=0.03)
                assert layers + memory + head < ms[name]
                assert depth == (6 if name.endswith("full") else 3)
                assert computed == pytest.approx(pairs / tokens, abs=0.005)

    derived = {row[0]: numbers(row[1:]) for row in rows if row[0].endswith(" ideal") or row[0].startswith("limit ")}
    engines = [name for name in LINES if name.endswith(" full")]
    limits = [f"limit {p} {schedule}" for p in ("fp32", "bf16", "int8") for schedule in ("full", "ragged")]
    assert list(derived) == [*(name.replace(" full", " ideal") for name in engines), *limits]


def numbers(cells):
    return [float(cell.split()[0].replace(",", "")) for cell in cells if cell != "-"]


def test_an_assistant_is_the_model_cut_in_half_and_changes_no_token(monkeypatch):
    case, assistants = tiny(rows=1), []
    decoding = GenerationMixin._assisted_decoding

    @wraps(decoding)  # `generate` reads the signature
    def noted(self, *args, **settings):
        assistants.append(settings["assistant_model"])
        return decoding(self, *args, **settings)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", noted)
    found = measure(case, {BASELINE: LINES[BASELINE], ASSISTED: LINES[ASSISTED]}, 1)
    assert found[ASSISTED].answer.tokens == found[BASELINE].answer.tokens
    assistant, own = assistants[0], {id(parameter) for parameter in case.model().parameters()}
    assert len(assistant.model.language_model.decoder.layers) == DEPTH / 2
    assert {id(parameter) for parameter in assistant.parameters()} < own
    assert len(case.model().model.language_model.decoder.layers) == DEPTH
    passes = int(case.notes[ASSISTED].split()[4])
    assert STEPS / DEPTH <= passes <= STEPS


def test_the_compiled_line_is_generate_or_says_why_not(monkeypatch):
    (name,), compiled = COMPILED, []
    lines = {BASELINE: LINES[BASELINE], **COMPILED}
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiled.append(how) or forward)
    assert measure(tiny(), lines, 1)[name].answer.tokens
    assert compiled == [{"dynamic": True}]

    def fail(_forward, **_how):
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(torch, "compile", lambda _forward, **_how: fail)
    case = tiny()
    told = []
    assert list(measure(case, lines, 2, lambda: told.append(None))) == [BASELINE]
    assert case.notes[name].startswith("left out: ")
    assert len(told) == len(lines) * 3


def test_held_bytes_by_hand(measured):
    _, found = measured
    own, memory = DEPTH * ROWS * 64 * 2, DEPTH * ROWS * 20 * 64 * 2
    for name, size in (("generate fp32 sdpa", 4), ("generate bf16 eager", 2), ("generate int8 sdpa", 4)):
        assert found[name].answer.cache == (own * STEPS * size, memory * size)
    buffers = own * STEPS * (DEPTH + 1) // DEPTH  # with a place for what enters layer 1, which stays empty
    assert found["torch fp32 full"].answer.cache == (buffers * 4, memory * 4)
    assert found["torch fp32 static"].answer.cache == (buffers * 4, memory * 4 // 2)
    assert found["ORT int8 full"].answer.cache[1] == memory * 2


def test_an_ideal_has_the_share_of_pairs_and_no_other_upkeep():
    case = tiny(rows=2)
    full = Measured(Answer([]), np.array([100.0, 80.0]), {"layers": np.array([60.0, 40.0])}, "a full")
    other = Measured(Answer([]), np.array([1.0, 1.0]), {"layers": np.array([1.0, 1.0])}, "a full")
    rows = ideal_rows(case, {"a full": full, "a ragged": other, BASELINE: Measured(Answer([]), full.ms, {})})
    assert list(rows) == ["a ideal"]
    assert np.mean(case.depths["ragged"]) == DEPTH / 2
    assert rows["a ideal"].ms.tolist() == [70, 60]
    assert rows["a ideal"].parts["layers"].tolist() == [30, 20]
    assert rows["a ideal"].answer.pairs == np.sum(case.depths["ragged"])


def test_limits_by_hand():
    """One row at full depth, on a machine that multiplies in no time, and on one that reads in no time."""
    case = tiny(rows=1)
    width, ffn, vocabulary, memory = 64, 96, 199, 20
    biases = 6 * width + ffn + width
    layer, projection = 6 * width**2 + 2 * width * ffn + biases, 2 * (width**2 + width)
    reads = {p: Machine(p, 1000.0, float("inf")) for p in ("float32", "bfloat16", "int8")}
    found = limit_rows(case, reads)
    for name, (of_weight, of_cached) in {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}.items():
        parts = found[f"limit {name} full"].parts
        expected = {
            "layers": DEPTH * STEPS * (layer * of_weight + 2 * memory * width * of_cached),
            "memory": DEPTH * projection * of_weight,
            "head": STEPS * vocabulary * width,
        }
        assert {part: float(ms[0]) for part, ms in parts.items()} == pytest.approx(expected)
        assert found[f"limit {name} full"].ms == pytest.approx(sum(expected.values()))
    multiplies = {p: Machine(p, float("inf"), 1000.0) for p in reads}
    found = limit_rows(case, multiplies)
    pairs = pairs_by_hand(case.depths["ragged"])
    one = layer - biases + 2 * width + 2 * memory * width
    assert float(found["limit int8 ragged"].parts["layers"][0]) == pytest.approx(pairs * one)
    assert found["limit int8 ragged"].answer.pairs == pairs


@pytest.mark.parametrize(
    ("promised", "folder", "noted"), [("tiny", "", True), ("tiny", "else", False), ("issue", "", False)]
)
def test_the_promised_run_notes_the_figures_whose_lines_are_there(promised, folder, noted, tmp_path, monkeypatch):
    ours = engine_lines("ORT int8", "fp32", partial(torch_executor, "fp32", "sdpa"))
    monkeypatch.setattr(decode, "LINES", {name: LINES[name] for name in NAMES[:6]} | ours)
    monkeypatch.setattr(decode, "PROMISED", promised)
    monkeypatch.setattr(decode, "RESULTS", tmp_path)
    monkeypatch.setattr(targets, "TARGETS", tmp_path / "targets.json")
    out = tmp_path / folder
    decode.main(["--shape", "tiny", "--repeats", "1", "--batch-sizes", "8", "--out", str(out)])
    text = next(out.glob("*.md")).read_text()
    missing = "| decode_fp32_full_vs_generate_b8 | times as fast: ORT fp32 full as generate fp32 sdpa | - |"
    assert (missing in text) == (promised == "tiny")
    assert targets.TARGETS.exists() == noted
    if noted:
        found = json.loads(targets.TARGETS.read_text())
        assert {name: (entry["target"], entry["better"]) for name, entry in found.items()} == {
            "decode_int8_exits_vs_generate_b8": (6.0, "higher"),
            "decode_int8_exits_vs_generate_int8_b8": (1.8, "higher"),
            "decode_int8_exits_layers_b8": (0.6, "lower"),
            "cost_model_off_b8": (0.1, "lower"),
        }
        assert all(entry["value"] > 0 for entry in found.values())


def times(*ms, layers=None):
    return Measured(Answer([]), np.array(ms, float), {} if layers is None else {"layers": np.array(layers, float)})


def test_figures_are_paired_medians_against_the_faster_rival():
    found = {
        BASELINE: times(700, 1400, 7),
        "generate int8 sdpa": times(300, 300, 300),
        "generate int8 eager": times(400, 200, 200),  # the faster one by its median
        "ORT int8 full": times(1, 1, 1, layers=[10, 20, 30]),
        "ORT int8 ragged": times(100, 100, 100, layers=[5, 8, 30]),
    }
    expected = {
        "decode_int8_exits_vs_generate": 7.0,
        "decode_int8_exits_vs_generate_int8": 2.0,
        "decode_int8_exits_layers": 0.5,
    }
    at = {promise.name: value for promise, batch, value in values({1: found}) if batch == 1}
    assert {name: value for name, value in at.items() if value is not None} == expected
    assert {name for name, value in at.items() if value is None} == {p.name for p in PROMISES} - set(expected)
    verdicts = {p.name: p.is_kept(1, expected[p.name]) for p in PROMISES if p.name in expected}
    assert list(verdicts.values()) == [True, False, True]
    assert LAYERS == {1: 0.55, 8: 0.6, 32: 0.6}


def test_the_promised_shape_is_the_issues():
    shape = read_shape("issue")
    sizes = shape.layers, shape.width, shape.heads, shape.ffn, shape.vocabulary, shape.memory, shape.steps
    assert sizes == (6, 768, 12, 3072, 51289, 597, 20)


@pytest.mark.parametrize("name", ["quickstart", "flickr8k_caption", "sroie_lines"])
def test_shapes_of_recipes_are_the_recipes(name):
    recipe, shape = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()), read_shape(name)
    text, generation = (recipe["model"]["backbone"][part] for part in ("text_config", "generation_config"))
    sizes = (text[key] for key in ("decoder_layers", "d_model", "decoder_attention_heads", "decoder_ffn_dim"))
    assert (shape.layers, shape.width, shape.heads, shape.ffn) == tuple(sizes)
    assert (shape.vocabulary, shape.steps) == (text["vocab_size"], generation["max_new_tokens"])
    assert shape.memory > recipe["data"]["image_tokens"]


def test_signals_are_asked_wherever_an_exit_is_and_decide_nothing(tmp_path):
    pytest.importorskip("onnxscript")
    case, asked = tiny(), []
    make = partial(torch_executor, "fp32", "sdpa")(case)
    executor = make(None, case.memory("fp32"), None, STEPS, (), Stopwatch(None, False))
    executor.score = lambda signal, layer, places: asked.extend((layer, *place) for place in places)
    given = DecoderExits("static", lambda _step: {}, forced=case.depths["ragged"])
    found = schedule.decode(decode_signals.Asking(executor, "gate", (1, 3)), given, [[START]] * ROWS, (), STEPS)
    assert found.depths == case.depths["ragged"]
    expected = [(k, r, t) for r in range(ROWS) for t in range(STEPS) for k in (1, 3) if given.forced[r][t] >= k]
    assert sorted(asked) == sorted(expected)
    decode_signals.main(["--shape", "tiny", "--batch-sizes", "3", "--repeats", "1", "--out", str(tmp_path)])
    text = next(tmp_path.glob("decode_signals_tiny_*.md")).read_text()
    assert text.count(" %") == 2 * len(decode_signals.SIGNALS)
