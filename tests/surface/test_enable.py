"""`generate` of a model with exits enabled: at full depth transformers' own, under a policy the engine's."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import lightning_mue as mue
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import STEPS, mixed
from tests.invariants.test_beams import answers

BACKBONES = list(zoo.BACKBONES)
WHOLE = [name for name in BACKBONES if not name.startswith("blip")]
"""Their `generate` is that of all models; BLIP's own calls that of a part."""
SIGNALS = ["gate", "similarity", "margin"]
SETTINGS = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    {"do_sample": True, "top_k": 20, "temperature": 0.8},
    {"do_sample": True, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 2},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
    {"prefix_allowed_tokens_fn": lambda row, ids: [11 + row, 12, 13] if len(ids) < 4 + row else [zoo.END]},
]


@pytest.fixture
def enabled():
    """Enable exits of shared models, and give their `generate` back."""
    models = []

    def enable(model, policy):
        models.append(model)
        return mue.enable(model, policy)

    yield enable
    for model in models:
        mue.disable(model)


def every_other_left(name):
    """Prompts with their padding on the left in every second row; one alone of a BLIP, whose own reads padding."""
    tensors = zoo.inputs(name, 4)
    if name == "blip_vqa":
        return zoo.alone(tensors, 2)
    if "attention_mask" not in tensors:
        return tensors
    moved = {name: tensors[name].clone() for name in ("input_ids", "attention_mask")}
    for row in range(0, len(moved["input_ids"]), 2):
        short = int((tensors["attention_mask"][row] == 0).sum())
        for tensor in moved.values():
            tensor[row] = tensor[row].roll(short)
    return tensors | moved


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "greedy")
def test_at_full_depth_it_is_the_models_own(name, settings, enabled):
    model, tensors = zoo.shared(name), every_other_left(name)
    how = {"num_beams": 1, "do_sample": False, "max_new_tokens": STEPS} | settings
    torch.manual_seed(5)
    expected = model.generate(**reference.inputs(model, tensors), **how)
    enabled(model, ExitPolicy.full_depth())
    torch.manual_seed(5)
    assert model.generate(**tensors, **how).tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", SIGNALS)
def test_under_a_policy_it_is_the_engine(name, signal, enabled):
    model, tensors = zoo.shared(name), zoo.inputs(name, 5)
    policy = mixed(model, name, tensors, signal)
    expected = mue.ExitEngine(model, policy).generate(STEPS, **tensors)
    found = enabled(model, policy)
    ids = model.generate(**tensors, max_new_tokens=STEPS)
    assert ids.tolist() == expected.sequences.tolist()
    for stream, depths in expected.exit_depths.items():
        assert torch.equal(found.exit_depths[stream], depths)
    assert expected.exit_depths["decoder"].unique().numel() > 1


def two_of_a_row(row, _ids):
    return [11 + row, 20 + row, zoo.END]


@pytest.mark.parametrize("name", BACKBONES)
def test_signals_see_what_processors_leave(name, enabled):
    """Each row has a constraint of its own, and rows leave one by one: numbers of rows must not be mixed up."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 5)
    layers = zoo.exit_layers(name)["decoder"]
    found = [
        mue.ExitEngine(model, ExitPolicy({"decoder": ExitRule("margin", layers, [threshold] * len(layers))}))
        for threshold in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    outs = [engine.generate(STEPS, two_of_a_row, **tensors) for engine in found]
    kinds = [out.exit_depths["decoder"][out.exit_depths["decoder"] > 0].unique().numel() for out in outs]
    assert max(kinds) > 1
    for engine, out in zip(found, outs, strict=True):
        enabled(model, engine.policy)
        ids = model.generate(**tensors, max_new_tokens=STEPS, prefix_allowed_tokens_fn=two_of_a_row)
        assert ids.tolist() == out.sequences.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_beams_and_prompts_under_a_policy(name, enabled):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    policy = mixed(model, name, tensors)
    prompt = torch.tensor([[7, 8], [9, 10], [11, 12]])
    engine = mue.ExitEngine(model, policy)
    enabled(model, policy)
    beams = {"num_beams": 3, "max_new_tokens": STEPS}
    assert answers(model.generate(**tensors, **beams)) == answers(engine.generate(**tensors, **beams).sequences)
    given = torch.cat([torch.full((3, 1), zoo.START), prompt], 1)
    found = model.generate(**tensors, decoder_input_ids=given, max_new_tokens=STEPS)
    expected = engine.generate(STEPS, decoder_prompt=prompt, **tensors).sequences
    assert found[:, 3:].tolist() == expected[:, 1:].tolist()


class Kept:
    """A streamer that keeps what comes."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class Never(LogitsProcessor):
    """Bars a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] > 3)


def test_streamers_processors_and_criteria(enabled):
    model, tensors, kept = zoo.shared("florence2"), zoo.inputs("florence2", 1), Kept()
    plain = model.generate(**tensors, max_new_tokens=STEPS)[0].tolist()
    enabled(model, mue.ExitPolicy.full_depth())
    assert model.generate(**tensors, max_new_tokens=STEPS, streamer=kept)[0].tolist() == kept.tokens == plain
    assert kept.ended
    never = LogitsProcessorList([Never(plain[1])])
    assert plain[1] not in model.generate(**tensors, max_new_tokens=STEPS, logits_processor=never)[0].tolist()
    short = model.generate(**tensors, max_new_tokens=STEPS, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert short[0].tolist() == plain[:4]
    found = model.generate(**tensors, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert len(found.scores) == found.sequences.shape[1] - 1


@pytest.mark.parametrize("name", WHOLE)
def test_custom_generate_leaves_the_encoder_alone(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    policy = ExitPolicy({"decoder": mixed(model, name, tensors).rules["decoder"]})
    leaves = mue.early_exit(policy)
    if reference.encoder_kind(model) != "joint":
        with pytest.raises(ValueError, match="use `enable`"):
            model.generate(**tensors, custom_generate=leaves)
        return
    expected = mue.ExitEngine(model, policy).generate(STEPS, **tensors).sequences
    assert model.generate(**tensors, max_new_tokens=STEPS, custom_generate=leaves).tolist() == expected.tolist()
    assert leaves.exit_depths.unique().numel() > 1
    kept = Kept()
    one = zoo.alone(tensors, 0)
    ids = model.generate(**one, max_new_tokens=STEPS, custom_generate=mue.early_exit(policy, streamer=kept))
    assert ids[0].tolist() == kept.tokens


def test_a_prompt_as_blips_processor_gives_it(enabled):
    """Its own `generate` takes the first token for a start and the last for an end."""
    model, tensors = zoo.shared("blip"), zoo.inputs("blip", 2)
    prompt = torch.tensor([[9, 7, 8, 11]]).repeat(2, 1)
    how = {"attention_mask": torch.ones_like(prompt), "num_beams": 2, "max_new_tokens": STEPS}
    expected = model.generate(tensors["pixel_values"], prompt.clone(), **how)
    enabled(model, ExitPolicy.full_depth())
    assert model.generate(tensors["pixel_values"], prompt, **how).tolist() == expected.tolist()
    assert prompt[0].tolist() == [9, 7, 8, 11]
    assert model.generate(tensors["pixel_values"], prompt.tolist(), **how).tolist() == expected.tolist()


def test_disabled_it_is_as_before():
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 2)
    before, names = model.generate(**tensors).tolist(), set(vars(model))
    mue.enable(model, ExitPolicy({"decoder": ExitRule.static(1)}))
    assert model.generate(**tensors).tolist() != before
    mue.disable(model)
    assert model.generate(**tensors).tolist() == before
    assert set(vars(model)) == names
    mue.disable(model)


def test_a_copy_is_its_own():
    model, tensors = zoo.make("florence2"), zoo.inputs("florence2", 2)
    mue.enable(model, ExitPolicy({"decoder": ExitRule.static(1)}))
    early, other = model.generate(**tensors).tolist(), copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    assert other.generate(**tensors).tolist() != early
    mue.disable(model)
    assert "generate" in vars(other)
    mue.disable(other)
    full = mue.ExitEngine(other, ExitPolicy()).generate(20, **tensors).sequences.tolist()
    assert other.generate(**tensors, max_new_tokens=20).tolist() == full


def test_threads_wait_for_each_other(enabled):
    model, tensors = zoo.shared("florence2"), [zoo.inputs("florence2", 2, seed) for seed in range(4)]
    enabled(model, ExitPolicy({"decoder": ExitRule.static(2)}))
    expected = [model.generate(**one).tolist() for one in tensors]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda one: model.generate(**one).tolist(), tensors)) == expected
    assert "forward" not in vars(model)


@pytest.mark.parametrize("beams", [1, 3])
def test_under_autocast(beams, enabled):
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(**tensors, num_beams=beams, max_new_tokens=6)
        enabled(model, ExitPolicy.full_depth())
        assert model.generate(**tensors, num_beams=beams, max_new_tokens=6).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": ("a",)}, "promises by group"),
        ({"verified": True}, "drafts and verifies"),
        ({"precision": "int8"}, "computes in int8"),
        ({"kv_fill": "copy"}, "makes up K/V by 'copy'"),
    ],
)
def test_what_needs_the_engine_is_refused(change, said):
    policy = ExitPolicy({"decoder": ExitRule.static(1)}, **change)
    with pytest.raises(ValueError, match=said):
        mue.enable(zoo.shared("florence2"), policy)


def test_what_it_cannot_do_is_refused(enabled):
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 2)
    other = zoo.make("florence2")
    other.__class__ = type("Other", (type(other),), {"generate": lambda _: None})
    with pytest.raises(TypeError, match="Other has no `generate` of transformers' own"):
        mue.enable(other, ExitPolicy())
    own = zoo.make("blip")
    own.__class__ = type("Own", (type(own),), {"generate": lambda _, images: images})
    with pytest.raises(TypeError, match="Own has no `generate` of transformers' own"):
        mue.enable(own, ExitPolicy())
    with pytest.raises(TypeError, match="Linear"):
        mue.enable(torch.nn.Linear(2, 2), ExitPolicy())
    blip = zoo.shared("blip")
    enabled(blip, ExitPolicy.full_depth())
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        blip.generate(**zoo.inputs("blip", 1), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="exits are attached at"):
        mue.enable(zoo.shared("florence2_prenorm"), ExitPolicy({"decoder": ExitRule.static(3)}))
    enabled(model, ExitPolicy({"decoder": ExitRule.static(1)}))
    for asked, said in (
        ({"assistant_model": model}, "assistant_model"),
        ({"encoder_repetition_penalty": 2.0}, "encoder_repetition_penalty"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "inputs_embeds"),
        ({"decoder_prompt": torch.zeros(2, 1)}, "decoder_prompt"),
        ({"num_beams": 2, "streamer": Kept()}, "beams choose at the end"),
        ({"pixel_values": None}, "needs 'pixel_values'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no attentions"),
        ({"decoder_attention_mask": torch.zeros(2, 1)}, "of one length"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(**(tensors | asked))
