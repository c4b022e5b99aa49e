"""Which layers of which stream become exits, and what hangs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_mue.backbones.stream import EncoderKind

AdapterKind = Literal["bottleneck", "linear", "none"]


@dataclass(frozen=True)
class ExitConfig:
    """Exits by stream; layers are counted from 1, the last layer is always there and is not an exit.

    Args:
        vision: exit layers of the vision stream.
        encoder: exit layers of the encoder.
        image: exit layers of the encoder's image tokens. Naming ``image`` or ``text`` decomposes the encoder: each
            modality goes through its layers alone (MuE). That changes the function, in training and inference alike.
        text: exit layers of the encoder's text tokens; of CoCa those of its texts, which decompose nothing.
        text_reads_image: with a decomposed encoder, text reads the states with which the image left.
        decoder: exit layers of the decoder.
        adapter: map before the shared norm and head at each exit, zero at the start and off the trunk:
            ``bottleneck`` (residual MLP), ``linear`` (residual linear) or ``none``.
        adapter_width: hidden units of a bottleneck.
        gate: whether each exit gets a small classifier that says "leaving here is safe".
        gate_width: its hidden units.
        shortlist: the decoder's gates also see how sure the exit is: the log-odds of its two likeliest among so
            many tokens, those most frequent in the training labels. A cheap stand-in for the vocabulary's margin; 0 is
            none.
    """

    vision: Sequence[int] = field(default_factory=list)
    encoder: Sequence[int] = field(default_factory=list)
    image: Sequence[int] = field(default_factory=list)
    text: Sequence[int] = field(default_factory=list)
    decoder: Sequence[int] = field(default_factory=list)
    adapter: AdapterKind = "bottleneck"
    adapter_width: int = 64
    gate: bool = True
    gate_width: int = 32
    text_reads_image: bool = False
    shortlist: int = 0

    @classmethod
    def of(cls, config: ExitConfig | Mapping[str, Any]) -> ExitConfig:
        """Return the config itself, or the one that a mapping (of a recipe, of a checkpoint) describes.

        Raises:
            ValueError: the mapping names what there is not, such as an unknown stream.
        """
        if isinstance(config, ExitConfig):
            return config
        if unknown := sorted(set(config) - set(cls.__dataclass_fields__)):
            raise ValueError(f"ExitConfig has no {unknown}; it has {sorted(cls.__dataclass_fields__)}")
        return cls(**config)

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Return stream name -> exit layers, streams without exits left out."""
        named = {name: getattr(self, name) for name in ("vision", "encoder", "image", "text", "decoder")}
        return {name: tuple(ks) for name, ks in named.items() if ks}

    @property
    def encoder_kind(self) -> EncoderKind:
        """How image and text meet in the encoder."""
        if not self.image and not self.text:
            return "joint"
        return "one-way" if self.text_reads_image else "decomposed"

    def check(self, num_layers: Mapping[str, int], first_exits: Mapping[str, int] | None = None) -> None:
        """Compare with the backbone's streams.

        Args:
            num_layers: stream name -> layers.
            first_exits: stream name -> the first layer that may be an exit; 1 if not named.

        Raises:
            ValueError: an unknown stream, or layers that are no exits of it.
        """
        if self.adapter not in ("bottleneck", "linear", "none"):
            raise ValueError(f"`adapter` must be bottleneck, linear or none, got {self.adapter!r}")
        if self.shortlist < 0 or self.shortlist == 1:
            raise ValueError(f"`shortlist` must be 0 (none) or at least 2 tokens, got {self.shortlist}")
        if self.shortlist and not (self.gate and self.decoder):
            raise ValueError("`shortlist` is for the decoder's gates: it needs `gate: true` and exits of `decoder`")
        if self.text_reads_image and self.encoder_kind == "joint":
            raise ValueError("`text_reads_image` needs a decomposed encoder: name exits of `image` or `text`")
        if self.encoder and self.encoder_kind != "joint":
            raise ValueError("`encoder` is all tokens together, `image` and `text` each alone: name one or the other")
        for stream, layers in self.layers().items():
            if stream not in num_layers:
                raise ValueError(f"{stream!r} is not a stream of this backbone; it has {list(num_layers)}")
            first = (first_exits or {}).get(stream, 1)
            if list(layers) != sorted(set(layers)) or layers[0] < first or layers[-1] >= num_layers[stream]:
                raise ValueError(
                    f"Exits of {stream!r} must rise within {first}..{num_layers[stream] - 1} "
                    f"(layer {num_layers[stream]} is full depth), got {list(layers)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
