"""The model library's own ``generate``, in every form that its users have at hand."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import Line, plain_line
from lightning_mue.callbacks.batches import Batch
from lightning_mue.inference.compare import Variant, transformers_variant

PLAIN = "transformers, full depth"
BF16, INT8, COMPILED = (f"transformers, {how}" for how in ("bf16, eager attention", "int8, dynamic", "compiled"))


def baseline_lines(exam: Exam, compiled: bool, sample: Batch) -> tuple[dict[str, Line], dict[str, str]]:
    """Return the lines that can answer a sample here, and why the others cannot.

    Args:
        exam: what is answered.
        compiled: compile the model's forward too: minutes, and a C++ compiler.
        sample: that each has to answer.
    """
    makers = {BF16: _in_bfloat16, INT8: _in_int8} | ({COMPILED: _compiled} if compiled else {})
    lines = {PLAIN: plain_line(exam, transformers_variant(exam.model, exam.max_new_tokens, exam.prefix))}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            variant = _variant(exam, make(copy.deepcopy(exam.model)))
            variant(sample)
        except Exception as error:  # whatever a library cannot do here is said, and the others go on
            left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        else:
            lines[name] = plain_line(exam, variant)
    return lines, left_out


def _variant(exam: Exam, model: nn.Module) -> Variant:
    """Return ``generate`` of a model, given numbers of its own type."""
    generate, dtype = transformers_variant(model, exam.max_new_tokens, exam.prefix), next(model.parameters()).dtype

    def answer(inputs: dict[str, Any]) -> Tensor:
        floats = {k: v.to(dtype) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return generate(inputs | floats)

    return answer


def _in_bfloat16(model: Any) -> nn.Module:
    model.set_attn_implementation("eager")  # its default is twice as slow in bf16 on CPUs, for few queries
    result: nn.Module = model.bfloat16()
    return result


def _in_int8(model: nn.Module) -> nn.Module:
    if (device := next(model.parameters()).device).type != "cpu":
        raise ValueError(f"dynamic quantisation computes on CPUs, the model is on {device}")
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still the one line that everybody knows
        quantised: nn.Module = torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear}, dtype=torch.qint8, inplace=True
        )
    return quantised


def _compiled(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, dynamic=True)  # type: ignore[method-assign]
    return model
