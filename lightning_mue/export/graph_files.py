"""A model as graphs on disk, from pixels to tokens: what `lightning_mue.portable` answers from.

Graphs are kept without their weights. Those lie in one file, each once, whoever shares them: layers that are tied, the
head and the embeddings, both modalities of a decomposed encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_mue.backbones import Backbone, DecoderStream, EncoderStream, StreamState, view
from lightning_mue.backbones.processor import Processor
from lightning_mue.exits import Exits, attached
from lightning_mue.export.function_graph import function_graph
from lightning_mue.inference.graphs import Graphs
from lightning_mue.inference.int8_product import PROBE
from lightning_mue.inference.sessions import decoder_pieces
from lightning_mue.policy import ExitPolicy
from lightning_mue.portable.files import PROBE_GRAPH, SCHEMA
from lightning_mue.portable.names import GRAPH_FOLDER, GRAPH_WEIGHTS, GRAPHS
from lightning_mue.signals import NEEDS_LOGITS

_STATE = ("h_BTD", "valid_BT", "mask", "beside_BSD")
"""Fields of a stream's state that are tensors; layers name what they are given by them."""

_INLINE = 16
"""Numbers; fewer stay in the graph."""


def write_graphs(model: nn.Module, policy: ExitPolicy, processor: Processor, folder: Path, found: str) -> None:
    """Write a model's graphs, their weights and what else an engine must know into ``folder``.

    Args:
        model: a supported backbone in float32 on the CPU, with exits attached if the policy needs them.
        policy: that the bundle will obey; a head for all logits is written only if its signal needs one.
        processor: of the model; its pictures have one size, and so have the graphs.
        folder: an existing folder.
        found: the fingerprint of the model's weights.

    """
    store, backbone, exits = _Store(), view(model), attached(model)
    precision = policy.precision or "float32"
    graphs = Graphs(precision)
    with torch.no_grad():
        inputs = _examples(backbone, processor)
        for name, graph in _encoder_graphs(backbone, exits, graphs, inputs):
            store.add(name, graph)
        needs_head = "decoder" in policy.rules and policy.rules["decoder"].signal in NEEDS_LOGITS
        for name, graph in _decoder_graphs(backbone, exits, graphs, needs_head):
            store.add(name, graph)
    (weight_VD, bias_V), bias_HN = backbone.decoder.head_weights(), backbone.decoder.distance_bias()
    arrays = {"head_weight": weight_VD} | ({} if bias_V is None else {"head_bias": bias_V})
    arrays |= {} if bias_HN is None else {"distance_bias": bias_HN.detach().numpy()}
    facts = {
        "schema": SCHEMA,
        "fingerprint": found,
        "precision": precision,
        "levels": graphs.levels,
        "decode": backbone.decode_settings(None).plain,
        "inputs": _about_inputs(backbone, processor, inputs),
        "tasks": processor.tasks,
        "streams": [[stream.name, stream.num_layers] for stream in backbone.encoders],
        "decoder": _about_decoder(backbone.decoder, exits),
        "arrays": {name: store.keep(array) for name, array in arrays.items()},
    }
    store.write(folder, facts)


def _encoder_graphs(
    backbone: Backbone, exits: Exits | None, graphs: Graphs, inputs: dict[str, Tensor]
) -> Iterator[tuple[str, bytes]]:
    """Yield name and graph of all streams before the decoder, and of what the decoder reads of them."""
    known, free = dict(inputs), {name: (0,) if name == "pixel_values" else (0, 1) for name in inputs}
    plain = Graphs()
    for stream in backbone.encoders:
        state = stream.prologue(known, known)
        fields = [field for field in _STATE if getattr(state, field) is not None]
        names = [field.lower() for field in fields]  # as an export calls what layers are given
        yield f"{stream.name}/prologue", function_graph(backbone.model, _prologue(stream, fields), known, free, names)
        fixed = (0,) if state.grid is not None else (0, 1)
        for k in range(1, stream.num_layers + 1):
            call = stream.call(k, state)
            yield f"{stream.name}/{k}", graphs.make(call.module, *call.tensors, free=call.free)
            if exits is not None and k in exits.layers.get(stream.name, ()):
                yield from _exit_graphs(plain, exits, stream.name, k, state.h_BTD, fixed)
            state.h_BTD = call()
        known[stream.name] = stream.epilogue(state)
        if known[stream.name] is not state.h_BTD:
            given, names = {"h_BTD": state.h_BTD}, [stream.name]
            yield (
                f"{stream.name}/epilogue",
                function_graph(backbone.model, _epilogue(stream, state), given, {"h_BTD": fixed}, names),
            )
        free[stream.name] = fixed

    def memory(given: dict[str, Tensor]) -> list[Tensor | None]:
        return [backbone.memory(given), backbone.memory_mask(given)]

    names = ["memory_BSD"] if backbone.memory_mask(known) is None else ["memory_BSD", "mask"]
    yield "memory", function_graph(backbone.model, memory, known, free, names)


def _prologue(stream: EncoderStream, fields: Sequence[str]) -> Callable[[dict[str, Tensor]], list[Tensor | None]]:
    def run(known: dict[str, Tensor]) -> list[Tensor | None]:
        state = stream.prologue(known, known)
        return [getattr(state, field) for field in fields]

    return run


def _epilogue(stream: EncoderStream, state: StreamState) -> Callable[[dict[str, Tensor]], list[Tensor | None]]:
    return lambda given: [stream.epilogue(state.at(given["h_BTD"]))]


def _exit_graphs(
    graphs: Graphs, exits: Exits, stream: str, k: int, h_BTD: Tensor, free: Sequence[int]
) -> Iterator[tuple[str, bytes]]:
    name = f"{stream}_{k}"
    if name in exits.adapters:
        yield f"{stream}/{k}/adapter", graphs.make(exits.adapters[name], h_BTD, free=[free])
    if name in exits.gates:
        yield f"{stream}/{k}/gate", graphs.make(exits.gates[name], h_BTD[:, 0])


def _decoder_graphs(
    backbone: Backbone, exits: Exits | None, graphs: Graphs, needs_head: bool
) -> Iterator[tuple[str, bytes]]:
    """Yield name and graph of all that the decoder does but attend."""
    from lightning_mue.inference.product_graph import product_graph

    decoder, plain = backbone.decoder, Graphs()
    for name, (module, *examples) in decoder_pieces(decoder).items():
        if name != "head" or needs_head:
            yield f"decoder/{name}", graphs.make(module, *examples)
    h_ND, sure_N2, last = torch.zeros(2, decoder.width), torch.zeros(2, 2), decoder.num_layers
    for k in (*(exits.layers.get("decoder", ()) if exits is not None else ()), last):
        adapter = exits.adapters[f"decoder_{k}"] if exits is not None and f"decoder_{k}" in exits.adapters else None
        branch = nn.Sequential(adapter or nn.Identity(), decoder.norm_piece)
        if len(branch.state_dict()):
            yield f"decoder/{k}/branch", plain.make(branch, h_ND)
        if exits is not None and f"decoder_{k}" in exits.gates:
            beside = () if exits.shortlist is None else (sure_N2,)
            yield f"decoder/{k}/gate", plain.make(exits.gates[f"decoder_{k}"], h_ND, *beside)
    given = {"ids": torch.ones(2, 3, dtype=torch.long), "positions": torch.arange(3)}

    def embed(given: dict[str, Tensor]) -> list[Tensor | None]:
        return [decoder.embed_at(given["ids"], given["positions"])]

    free = {"ids": (0, 1), "positions": (0,)}
    yield "decoder/embed", function_graph(backbone.model, embed, given, free, ["h_RmD"])
    yield "decoder/product", product_graph(decoder.vocab_size, decoder.width)
    yield PROBE_GRAPH, product_graph(*PROBE)


class _Store:
    """Graphs without weights, and weights by what they are: equal ones are kept once."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, name: str, graph: bytes) -> None:
        """Take a graph apart."""
        import onnx

        from lightning_mue.inference.product_graph import make_external

        model, weights = onnx.ModelProto.FromString(graph), dict[str, str]()
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims) >= _INLINE:
                weights[tensor.name] = self.keep(onnx.numpy_helper.to_array(tensor))
                make_external(tensor)
        data = model.SerializeToString(deterministic=True)
        file = f"{hashlib.sha256(data).hexdigest()[:16]}.onnx"
        self._files[file], self._entries[name] = data, {"file": file, "weights": weights}

    def keep(self, array: np.ndarray) -> str:
        """Keep an array; return what it is called."""
        array = np.ascontiguousarray(array)
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]
        self._arrays.setdefault(key, array)
        return key

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write everything."""
        from safetensors.numpy import save_file

        (folder / GRAPH_FOLDER).mkdir()
        for file, data in self._files.items():
            (folder / GRAPH_FOLDER / file).write_bytes(data)
        save_file(self._arrays, folder / GRAPH_WEIGHTS)
        text = json.dumps(facts | {"graphs": self._entries}, indent=1, sort_keys=True, allow_nan=False) + "\n"
        (folder / GRAPHS).write_text(text, encoding="utf-8")


def _examples(backbone: Backbone, processor: Processor) -> dict[str, Tensor]:
    """Return what the backbone reads of two samples, one of them padded: so its layers are those that take a mask."""
    found = processor([Image.new("RGB", (32, 32))] * 2, ["a", "a a a a a a a a"])
    return {name: found[name] for name in backbone.generate_inputs if name in found}


def _about_inputs(backbone: Backbone, processor: Processor, inputs: dict[str, Tensor]) -> dict[str, Any]:
    model: Any = backbone.model
    if "input_ids" not in inputs:
        return {"picture": list(inputs["pixel_values"].shape[1:]), "image_tokens": 0}
    image_token_id = getattr(model.config, "image_token_id", -1)  # BLIP's questions hold no picture
    return {
        "picture": list(inputs["pixel_values"].shape[1:]),
        "image_tokens": int((inputs["input_ids"][0] == image_token_id).sum()),
        # a T5 takes any number, and a T5Gemma 2, which has no `text_config`
        "most_tokens": getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None),
    }


def _about_decoder(decoder: DecoderStream, exits: Exits | None) -> dict[str, Any]:
    shortlist = None if exits is None or exits.shortlist is None else exits.shortlist.tolist()
    return {
        "layers": decoder.num_layers,
        "heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "max_positions": decoder.max_positions,
        "windows": [decoder.window(k) for k in range(1, decoder.num_layers + 1)],
        "shortlist": shortlist,
    }
