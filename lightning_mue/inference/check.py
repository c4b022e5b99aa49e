"""Whether a policy fits a backbone."""

from __future__ import annotations

from lightning_mue.backbones import Backbone, exit_streams
from lightning_mue.exits import Exits
from lightning_mue.policy import OF_EMBEDDINGS, ExitPolicy
from lightning_mue.promise import OF_EMBEDDINGS as METRICS_OF_EMBEDDINGS
from lightning_mue.signals import NEEDS_LOGITS


def check_policy(policy: ExitPolicy, backbone: Backbone, exits: Exits | None, embeds: bool = False) -> None:
    """Compare a policy with a backbone and its exits; ``embeds``: what leaves becomes an embedding, not an answer.

    Raises:
        ValueError: what does not fit, what there is, and what to do.
    """
    layers = exit_streams(backbone)
    evidence = () if policy.certificate is None else policy.certificate.evidence
    if not embeds and {one.promise.metric for one in evidence} & METRICS_OF_EMBEDDINGS.keys():
        raise ValueError(
            "This policy was certified for embeddings, not for answers: give it to an EmbedEngine, or to "
            "`mue freeze` as `--embed-policy`."
        )
    for stream, rule in policy.rules.items():
        if stream not in layers:
            raise ValueError(f"The policy names the stream {stream!r}; this backbone has {list(layers)}.")
        if rule.layers[-1] >= layers[stream]:
            raise ValueError(
                f"The policy leaves {stream!r} after layer {rule.layers[-1]}; exits lie in 1..{layers[stream] - 1}."
            )
        if stream == "decoder" and rule.layers[0] < (first := backbone.decoder.first_exit):
            raise ValueError(
                f"The policy leaves 'decoder' after layer {rule.layers[0]}, which has not read the picture; exits lie "
                f"in {first}..{layers[stream] - 1}."
            )
        known = exits.layers.get(stream, ()) if exits is not None else None
        if known is not None and not set(rule.layers) <= set(known):
            raise ValueError(
                f"The policy leaves {stream!r} after {list(rule.layers)}, exits are attached at {list(known)}; "
                "attach exits there and train them."
            )
        embedded = _embedded(rule.signal, backbone) if embeds else []
        if rule.signal in OF_EMBEDDINGS and stream not in embedded:
            raise ValueError(
                f"Signal {rule.signal!r} of {stream!r} is about embeddings; only an EmbedEngine makes some, here of "
                f"{embedded or 'nothing'}; take another signal."
            )
        if rule.signal == "gate" and (exits is None or not exits.config.gate):
            raise ValueError(f"The policy's signal for {stream!r} is 'gate', but no gates are attached.")
        if stream != "decoder" and rule.signal in NEEDS_LOGITS:
            raise ValueError(
                f"Signal {rule.signal!r} needs logits; stream {stream!r} has none. Use gate or similarity."
            )


def check_text_policy(policy: ExitPolicy, backbone: Backbone) -> None:
    """Look whether a policy that texts are to obey is about them.

    Raises:
        ValueError: it leaves other streams early, and not that of texts.
    """
    assert backbone.contrastive is not None
    if policy.rules and (name := backbone.contrastive.text.name) not in policy.rules:
        raise ValueError(
            f"The policy of texts must have a rule for {name!r}, it has them for {[*policy.rules]}; "
            "CalibrateEmbeddings(query='text') makes one."
        )


def leave_both_early(pictures: ExitPolicy, texts: ExitPolicy, backbone: Backbone) -> bool:
    """Say whether pictures and texts that obey these policies may both leave early."""
    if (contrastive := backbone.contrastive) is None:
        return False
    return contrastive.image.name in pictures.rules and contrastive.text.name in texts.rules


def _embedded(signal: str, backbone: Backbone) -> list[str]:
    """Return the streams whose embeddings a signal is about: pictures are told apart by class, texts are not."""
    contrastive = backbone.contrastive
    if contrastive is None:
        return []
    return [contrastive.image.name, *([] if signal == "class_margin" else [contrastive.text.name])]
