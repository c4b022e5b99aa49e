"""Reads with Florence-2; a loss of its own, made of logits; the model is made when Lightning asks for it."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Florence2Config, Florence2ForConditionalGeneration

import lightning_mue as mue

TEXT = {"vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_ffn_dim": 48}
TEXT |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
TEXT |= {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
VISION = {"depths": [1, 1, 3, 1], "embed_dim": [8, 16, 24, 32], "num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4]}
VISION |= {"patch_size": [7, 3, 3, 3], "window_size": 3, "projection_dim": 32, "max_position_embeddings": 20}


class Reader(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            config = Florence2Config(text_config={"model_type": "bart", **TEXT}, vision_config=VISION, image_token_id=4)
            self.model = Florence2ForConditionalGeneration(config)
            self.model.generation_config.update(decoder_start_token_id=2, eos_token_id=3, max_new_tokens=4)

    def loss(self, batch):
        outputs = self.model(**batch)
        loss = cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
        self.log("loss", loss)
        return loss + mue.exit_losses(self.model, outputs, batch["labels"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def make_loader(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    columns = {"pixel_values": torch.randn(count, 3, 64, 64, generator=drawn)}
    columns["input_ids"] = torch.randint(5, 90, (count, 9), generator=drawn)
    columns["input_ids"][:, :5] = 4
    columns["attention_mask"] = torch.ones_like(columns["input_ids"])
    columns["labels"] = torch.randint(5, 90, (count, 4), generator=drawn)
    return DataLoader([{name: column[i] for name, column in columns.items()} for i in range(count)], batch_size=10)


def main(root, steps=6):
    callbacks = [ModelCheckpoint(root, save_last=True)]
    callbacks += [mue.MultiExitSupervision("model", exits={"vision": [1], "encoder": [1], "decoder": [1, 2]})]
    callbacks += [mue.CalibrateExits(keep=0.05), mue.LogExitDepth()]
    trainer = L.Trainer(max_steps=steps, default_root_dir=root, callbacks=callbacks, accelerator="cpu", logger=False)
    module = Reader()
    trainer.fit(module, make_loader(40, 0), make_loader(60, 1))
    trainer.validate(module, make_loader(60, 2))
    return module
