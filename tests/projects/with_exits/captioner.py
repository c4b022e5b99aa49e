"""Captions with ViT and GPT-2; the model's own loss."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

import lightning_mue as mue


class Captioner(L.LightningModule):
    def __init__(self, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
        vision = ViTConfig(image_size=64, patch_size=16, **size)
        size = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}
        text = GPT2Config(is_decoder=True, add_cross_attention=True, **size)
        config = VisionEncoderDecoderConfig(encoder=vision.to_dict(), decoder=text.to_dict())
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 2, 3, 0
        self.net = VisionEncoderDecoderModel(config)
        ids = {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "max_new_tokens": 4}
        self.net.generation_config.update(**ids)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def make_loader(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 64, 64, generator=drawn)
    labels = torch.randint(5, 90, (count, 4), generator=drawn)
    return DataLoader([{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)], batch_size=10)


def main(root, steps=6):
    callbacks = [ModelCheckpoint(root, save_last=True)]
    callbacks += [mue.MultiExitSupervision("net", exits={"vision": [1, 2], "decoder": [1, 2, 3]})]
    callbacks += [mue.CalibrateExits(keep=0.05), mue.LogExitDepth()]
    trainer = L.Trainer(max_steps=steps, default_root_dir=root, callbacks=callbacks, accelerator="cpu", logger=False)
    module = Captioner()
    trainer.fit(module, make_loader(40, 0), make_loader(60, 1))
    trainer.validate(module, make_loader(60, 2))
    return module
