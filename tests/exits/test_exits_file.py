import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mue import ExitConfig, attach_exits, detach_exits, load_exits, save_exits
from lightning_mue.exits import attached
from tests import zoo

NAME = "florence2"


def weights(model):
    return {name: tensor.clone() for name, tensor in attached(model).state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_round_trip(tmp_path):
    model = zoo.make(NAME)
    save_exits(model, tmp_path / "a.safetensors")
    save_exits(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = zoo.make(NAME, exits=False)
    state = torch.get_rng_state()
    exits = load_exits(other, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert attached(other) is exits
    assert exits.config == ExitConfig.of(attached(model).config.to_dict())
    assert_equal(weights(other), weights(model))
    with torch.no_grad():
        next(exits.parameters()).zero_()
    assert load_exits(other, tmp_path / "a.safetensors") is exits  # those that are there are overwritten
    assert_equal(weights(other), weights(model))


def test_the_file_is_safetensors_with_plain_metadata(tmp_path):
    model = zoo.make(NAME)
    save_exits(model, tmp_path / "exits.safetensors")
    with safe_open(tmp_path / "exits.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights(model))
        header = json.loads(file.metadata()["lightning_mue_exits"])
    assert header["exits"]["decoder"] == [1, 2, 3, 4]


def test_without_adapters_and_gates_there_is_only_a_config(tmp_path):
    model = zoo.make(NAME, exits=False)
    attach_exits(model, ExitConfig(decoder=[2], adapter="none", gate=False))
    save_exits(model, tmp_path / "exits")
    detach_exits(model)
    assert load_exits(model, tmp_path / "exits").layers == {"decoder": (2,)}


def test_another_precision_is_the_models(tmp_path):
    save_exits(zoo.make(NAME), tmp_path / "exits")
    model = zoo.make(NAME, exits=False).bfloat16()
    load_exits(model, tmp_path / "exits")
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.bfloat16}


def truncated(path):
    save_exits(zoo.make(NAME), path)
    path.write_bytes(path.read_bytes()[:-9])


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path)


def pickled(path):
    torch.save({"state_dict": {}, "callbacks": {}, "object": ModelCheckpoint()}, path)


def other_schema(path):
    save_file({}, path, metadata={"lightning_mue_exits": json.dumps({"schema": 1, "exits": {}})})


def two(path):
    packed = {"schema": 2, "exits": {}, "weights": {}}
    torch.save({"callbacks": {"one": packed, "two": packed, "three": {"best": 1}}}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (truncated, "must be a file of `save_exits` or a Lightning checkpoint"),
        (foreign, "holds weights, but no exits"),
        (lambda path: path.write_text("text"), "must be a file of `save_exits` or a Lightning checkpoint"),
        (pickled, "cannot be read as a Lightning checkpoint of plain values: Weights only load failed"),
        (lambda path: torch.save({"state_dict": {}}, path), "found none among its callbacks"),
        (lambda path: torch.save([1], path), "found none among its callbacks"),
        (
            two,
            r"exits of one MultiExitSupervision, found \['one', 'two'\] among its callbacks \['one', 'three', 'two'\]",
        ),
        (other_schema, "must hold exits of schema 2"),
    ],
)
def test_what_holds_no_exits_is_refused(write, message, tmp_path):
    path, model = tmp_path / "file", zoo.make(NAME, exits=False)
    write(path)
    with pytest.raises(ValueError, match=message):
        load_exits(model, path)
    assert attached(model) is None


def test_a_missing_file_and_missing_exits(tmp_path):
    model = zoo.make(NAME, exits=False)
    with pytest.raises(FileNotFoundError, match="nowhere is not there; name a file of `save_exits`"):
        load_exits(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No exits are attached, so there are none to save"):
        save_exits(model, tmp_path / "exits")
    assert not (tmp_path / "exits").exists()


def test_exits_that_do_not_fit_are_refused(tmp_path):
    save_exits(zoo.make(NAME), tmp_path / "exits")
    model = zoo.make(NAME, exits=False)
    attach_exits(model, ExitConfig(decoder=[1, 2, 3, 4], adapter_width=8, gate_width=8))
    before = weights(model)
    with pytest.raises(ValueError, match=r"not those of .*exits: `vision` is \[1, 2, 3\] there and \[\] here"):
        load_exits(model, tmp_path / "exits")
    assert_equal(weights(model), before)
    with safe_open(tmp_path / "exits", "pt") as file:
        tensors = {name: file.get_tensor(name)[..., :1].contiguous() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "narrow", metadata=file.metadata())
    model = zoo.make(NAME, exits=False)
    with pytest.raises(ValueError, match="narrow holds exits that do not fit Florence2ForConditionalGeneration"):
        load_exits(model, tmp_path / "narrow")
    assert attached(model) is None
