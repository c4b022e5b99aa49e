"""Views of supported models as streams of layers; the only folder that knows transformers and open_clip."""

from lightning_mue.backbones.backbone import Backbone, exit_streams, num_layers
from lightning_mue.backbones.load import backbone_config, build_backbone, exits_expected, fingerprint, read_weights
from lightning_mue.backbones.stream import DecoderStream, DecodeSettings, EncoderStream, StreamState
from lightning_mue.backbones.view import EXITS, register_view, unwrapped, view

__all__ = [
    "EXITS",
    "Backbone",
    "DecodeSettings",
    "DecoderStream",
    "EncoderStream",
    "StreamState",
    "backbone_config",
    "build_backbone",
    "exit_streams",
    "exits_expected",
    "fingerprint",
    "num_layers",
    "read_weights",
    "register_view",
    "unwrapped",
    "view",
]
