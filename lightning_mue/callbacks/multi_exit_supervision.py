"""MultiExitSupervision: exits and deep supervision for a project whose own code stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.backbones import EXITS, Backbone, num_layers, view
from lightning_mue.callbacks.held_model import held_exits, held_model
from lightning_mue.callbacks.kept_exits import check_trainer, may_be_absent
from lightning_mue.callbacks.supervised_call import check_compiled, check_gives_loss, computes_loss, read_call
from lightning_mue.exits import ExitConfig, Exits, attach_exits, attached, exits_on_the_way
from lightning_mue.exits.exits_file import check_same, pack_exits, unpack_exits
from lightning_mue.training.add_loss import add_loss
from lightning_mue.training.depths import sample_step
from lightning_mue.training.losses import Weighting
from lightning_mue.training.objective import objective
from lightning_mue.training.pairs import check_contrast
from lightning_mue.training.replace_loss import replace_loss
from lightning_mue.training.shortlist import FirstLabels, begin_shortlist
from lightning_mue.training.supervision import Supervision


class MultiExitSupervision(L.Callback):
    """Attaches exits to the model that a LightningModule holds, and trains them through the loss of ``training_step``.

    Within it the model's output has the objective of deep supervision as its ``loss``; everywhere else outputs are
    untouched. A model that gives no loss, open_clip's CoCa, stays untouched there too: to what the step returns (the
    project's ``CoCaLoss``) the exits' losses are added, for which the model runs a second time. The project's loss has
    weight 1 and is full depth's; the exits have the weights of ``weighting`` in relation to the last layer.

    The exits are a submodule of the model, so that ``configure_optimizers`` sees them. In a checkpoint they lie in this
    callback's state, and ``state_dict`` is that of the project without exits.

    Gates begin from nothing and want a higher learning rate than a pretrained backbone: give the optimizer
    ``self.net.mue_exits.gates.parameters()`` as a group of its own (3e-3 under Adam), or they stay weak.

    Args:
        model: attribute of the LightningModule that holds the backbone, such as ``net`` or ``model.net``; made in
            ``__init__`` or ``configure_model``.
        exits: which layers become exits.
        weighting: of the decoder exits' losses: ``avg+last`` (DEED), ``sum`` (MuE), ``linear`` (CALM).
        early_probability: that a stream before the decoder is left at a random exit in a step.
        early_after: share of the training after which ``early_probability``, ``own_path`` and ``propagate`` begin.
        gate_weight: weight of the gates' loss; their inputs are detached, so they cost the backbone nothing.
        gate_balance: as in MultiExitModule, like the four that follow.
        own_path: share of steps in which the decoder's gates learn along the model's own output.
        caption: weight of the decoder's cross-entropy; beside open_clip's ``CoCaLoss`` its ``caption_loss_weight``.
        contrast: weight of the contrastive loss; there its ``clip_loss_weight``. Exits of ``text`` need it.
        distill: weight of the KL divergence from the last exit's distribution to each earlier decoder exit's.
        distill_temperature: of both distributions.
        propagate: share of steps in which target positions leave the decoder at random exits (CALM).
        seed: of all that is drawn for a step, and of the new exits' weights.
    """

    def __init__(
        self,
        model: str,
        exits: ExitConfig | dict[str, Any],
        weighting: Weighting = "avg+last",
        early_probability: float = 0.25,
        early_after: float = 0.3,
        gate_weight: float = 1.0,
        gate_balance: bool = True,
        own_path: float = 0.0,
        caption: float = 1.0,
        contrast: float = 0.0,
        distill: float = 0.0,
        distill_temperature: float = 1.0,
        propagate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model, self.exits = model, ExitConfig.of(exits)
        self.supervision = Supervision(
            weighting=weighting,
            early_probability=early_probability,
            early_after=early_after,
            gate_weight=gate_weight,
            gate_balance=gate_balance,
            own_path=own_path,
            caption=caption,
            contrast=contrast,
            distill=distill,
            distill_temperature=distill_temperature,
            propagate=propagate,
            seed=seed,
        )
        self._first_labels: FirstLabels | None = None
        self._forget_absence: Callable[[], None] | None = None
        self._restore_step: Callable[[], None] | None = None
        self._backbone: Backbone | None = None
        self._supervised = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Attach the exits: before the optimizer is made, and before a checkpoint is read."""
        check_trainer(trainer)
        model = held_model(pl_module, self.model)
        exits = attached(model)
        if exits is None:
            with torch.random.fork_rng(devices=[]):  # the project draws the numbers that it would without exits
                torch.default_generator.manual_seed(self.supervision.seed)
                exits = attach_exits(model, self.exits)
        check_same(self.exits, exits, f"MultiExitSupervision({self.model!r})")
        backbone = view(model)
        check_contrast(self.supervision, backbone, exits)
        check_gives_loss(model, backbone)
        if computes_loss(model):
            check_compiled(pl_module, self.model)
        if self.supervision.propagate and not computes_loss(model):
            raise ValueError(
                "`propagate` replaces a step's whole loss, and this project computes its own; set it to 0."
            )
        if exits.encoder != "joint" and "image" in num_layers(backbone):
            rank_zero_warn(
                "Exits of `image` or `text` decompose the encoder: training and our engine use that function, the "
                "project's own forward outside of `training_step` (its validation loss, its `generate`) the joint one."
            )
        self._release()
        self._forget_absence = exits.register_load_state_dict_post_hook(may_be_absent).remove

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether the exits will learn."""
        trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        if any(id(p) not in trained or not p.requires_grad for p in self._exits(pl_module).parameters()):
            raise ValueError(
                f"`configure_optimizers` leaves out parameters of `{self.model}.{EXITS}`, or they are frozen, so the "
                "exits would not learn; give the optimizer `self.parameters()`, or "
                f"`self.{self.model}.{EXITS}.parameters()` too."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the shortlist of the training labels, if the exits have one."""
        self._backbone = view(held_model(pl_module, self.model))
        vocab_size = self._backbone.decoder.vocab_size
        datamodule = getattr(trainer, "datamodule", None)
        self._first_labels = begin_shortlist(self._exits(pl_module), vocab_size, datamodule, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the loss be the objective in this step: in the model's place, or beside the project's own."""
        model = held_model(pl_module, self.model)
        self._restore()

        def loss(given: Mapping[str, Any], beside: bool) -> Tensor:
            return self._loss(trainer, pl_module, model, given, beside)

        added = partial(loss, beside=True)
        alone = computes_loss(model)
        self._restore_step = replace_loss(model, loss) if alone else add_loss(pl_module, model, added)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give back what was replaced."""
        self._restore()
        if not self._supervised and outputs:  # nothing: the step passed over its batch
            raise ValueError(
                f"`training_step` read no `loss` of `self.{self.model}(...)` with gradients, so no exit was trained; "
                f"`model` must name the module whose `loss` it returns, got {self.model!r}. A step that makes its loss "
                "of `logits` adds `lightning_mue.exit_losses(model, outputs, labels)`."
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Move the exits from the project's weights into this callback's state."""
        model = held_model(pl_module, self.model)
        if attached(model) is None:  # taken off since
            return
        for name in self._weights_in(checkpoint["state_dict"], pl_module):
            del checkpoint["state_dict"][name]
        checkpoint["callbacks"][self.state_key] = pack_exits(model)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the exits back."""
        packed = checkpoint["callbacks"].get(self.state_key)
        if packed is not None:
            unpack_exits(held_model(pl_module, self.model), packed, "the checkpoint")
        elif self._weights_in(checkpoint["state_dict"], pl_module):
            return
        elif trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"The checkpoint holds no exits of {self.model!r}, so its optimizer cannot go on with them. Load its "
                "weights alone (`load_from_checkpoint`) and call `fit` without `ckpt_path`."
            )
        else:
            rank_zero_warn(f"The checkpoint holds no exits of {self.model!r}: they stay as they are.")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind but the exits."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind but the exits."""
        self._release()

    @property
    def state_key(self) -> str:
        """Name this instance's state by the model it trains: a trainer may have one for each of several models."""
        return self._generate_state_key(model=self.model)

    def _loss(
        self, trainer: L.Trainer, pl_module: L.LightningModule, model: Any, given: Mapping[str, Any], beside: bool
    ) -> Tensor:
        backbone, exits = self._backbone, self._exits(pl_module)
        assert backbone is not None
        inputs, labels_BT = read_call(model, backbone, given)
        if self._first_labels is not None:
            self._first_labels.see(labels_BT)
        step = sample_step(
            self.supervision, exits_on_the_way(backbone, exits), trainer.global_step, self._progress(trainer)
        )
        losses = objective(backbone, exits, inputs, labels_BT, step, self.supervision, beside)
        pl_module.log("train/gates", losses.gates)
        if losses.by_exit:
            pl_module.log("train/loss_full_depth", losses.by_exit[backbone.decoder.num_layers])
        if self.supervision.distill:
            pl_module.log("train/distill", losses.distill)
        for k, loss in losses.contrast.items():
            pl_module.log(f"train/contrast_{k}", loss)
        self._supervised = True
        return losses.total

    def _progress(self, trainer: L.Trainer) -> float:
        """Return the share of the training that is done, where anything begins late."""
        if not self.supervision.begins_late:
            return 1.0
        total = trainer.estimated_stepping_batches
        if total == math.inf:
            raise ValueError(
                "`early_after` is a share of the training, which has no end: give the Trainer `max_steps` or "
                "`max_epochs`, or set `early_after=0`."
            )
        return trainer.global_step / max(1, total)

    def _exits(self, pl_module: L.LightningModule) -> Exits:
        return held_exits(pl_module, self.model)

    def _weights_in(self, state_dict: Mapping[str, Any], pl_module: L.LightningModule) -> list[str]:
        """Return the names of the exits' weights in the project's, under whatever attributes it holds the model."""
        exits = self._exits(pl_module)
        names = [name for name, module in pl_module.named_modules(remove_duplicate=False) if module is exits]
        return [key for key in state_dict if key.startswith(tuple(f"{name}." for name in names))]

    def _restore(self) -> None:
        if self._restore_step is not None:
            self._restore_step()
            self._restore_step = None

    def _release(self) -> None:
        self._restore()
        self._backbone = None
        if self._forget_absence is not None:
            self._forget_absence()
            self._forget_absence = None


def find_model(trainer: L.Trainer, pl_module: L.LightningModule, path: str | None) -> Any:
    """Return the backbone at ``path``; if that is None, the one that MultiExitSupervision trains, else ``model``.

    Raises:
        ValueError: there is no such module, or several are trained.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trained = [callback.model for callback in callbacks if isinstance(callback, MultiExitSupervision)]
    if path is None and len(trained) > 1:
        raise ValueError(f"`model` must say which of {trained} is meant.")
    return held_model(pl_module, path or (trained[0] if trained else "model"))
