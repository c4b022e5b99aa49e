"""Answering: pictures and prompts in, text out; what engines share. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning_mue.inference.answers import calibrated_answers
from lightning_mue.inference.output import ExitOutput
from lightning_mue.inference.request import check_prompts, check_texts
from lightning_mue.policy import ExitPolicy
from lightning_mue.prompt import Word


class Answering(ABC):
    """An engine that can be asked in pictures and words.

    Attributes:
        policy: under which it answers.
        processor: makes inputs of pictures and prompts and text of tokens; None: it cannot be asked so.
    """

    policy: ExitPolicy
    processor: Any

    @abstractmethod
    def generate(self, max_new_tokens: int | None = None, *args: Any, **inputs: Any) -> ExitOutput:
        """Answer a batch."""

    @property
    @abstractmethod
    def reads_prompts(self) -> bool:
        """Whether the model reads a prompt beside the picture."""

    @abstractmethod
    def end_id(self) -> int:
        """Return the token that ends an answer."""

    def place(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs where the engine computes."""
        return inputs

    def answer(
        self,
        images: Sequence[Any],
        prompts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        decoder_prompts: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        words: Sequence[Sequence[Word]] | None = None,
        **how: Any,
    ) -> list[str]:
        """Answer one prompt for each picture, as text; only with the answers that calibration allowed, if it did.

        Args:
            images: PIL pictures.
            prompts: as many texts; empty ones if not given, as for a model that reads none (CoCa, TrOCR).
            max_new_tokens: at most; if not given, as certified, else as the generation config says.
            decoder_prompts: as many texts that the decoder reads before it answers.
            groups: as many names, as in ``generate``.
            words: that stand on each picture and where, for a model that reads them (UDOP).
            **how: more settings of ``generate``, such as ``do_sample`` or ``num_beams``.

        Raises:
            ValueError: the engine has no processor, the numbers of pictures and of prompts of either kind differ, or
                the model would pass over a prompt or lacks the words that it reads.
        """
        if self.processor is None:
            raise ValueError("`answer` needs a processor and this engine has none; pass one, or use `generate`.")
        prompts = [""] * len(images) if prompts is None else prompts
        check_texts(images, prompts=prompts, decoder_prompts=decoder_prompts)
        if words is not None and len(words) != len(images):
            raise ValueError(f"`words` must hold those of each of {len(images)} images, got {len(words)}")
        check_prompts(prompts, self.reads_prompts)
        inputs: dict[str, Any] = self.processor(images, prompts, **({} if words is None else {"words": words}))
        if decoder_prompts is not None:
            inputs["decoder_prompt"] = self.processor.decoder_prompts(decoder_prompts)
        allowed = calibrated_answers(self.policy, self.processor, self.end_id())
        out = self.generate(max_new_tokens, allowed, groups=groups, **how, **self.place(inputs))
        texts: list[str] = self.processor.decode(out.sequences)
        return texts
