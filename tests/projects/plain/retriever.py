"""Trains open_clip's CoCa with open_clip's own loss."""

import lightning as L
import open_clip
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

LENGTH = 16
VISION = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 4, "head_width": 6, "output_tokens": True}
VISION |= {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4}
TEXT = {"context_length": LENGTH, "vocab_size": 97, "width": 32, "heads": 4, "layers": 2}
DECODER = {"context_length": LENGTH, "vocab_size": 97, "width": 32, "heads": 4, "layers": 3}


class Retriever(L.LightningModule):
    def __init__(self):
        super().__init__()
        text = TEXT | {"embed_cls": True, "output_tokens": True}
        self.net = open_clip.coca_model.CoCa(32, multimodal_cfg=DECODER, text_cfg=text, vision_cfg=VISION)
        torch.nn.init.normal_(self.net.text_decoder.text_projection, std=0.3)  # open_clip leaves it as it finds it
        self.loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)

    def training_step(self, batch, batch_idx):
        images, texts = batch
        return sum(self.loss(**self.net(images, texts)))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(self.loss(**self.net(*batch))))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def make_loader(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    texts = torch.zeros(count, LENGTH, dtype=torch.long)
    texts[:, 0], texts[:, 1:5], texts[:, 5] = 95, torch.randint(5, 90, (count, 4), generator=drawn), 96
    return DataLoader([*zip(torch.randn(count, 3, 32, 32, generator=drawn), texts, strict=True)], batch_size=10)


def main(root, steps=6):
    callbacks = [ModelCheckpoint(root, save_last=True)]
    trainer = L.Trainer(max_steps=steps, default_root_dir=root, callbacks=callbacks, accelerator="cpu", logger=False)
    module = Retriever()
    trainer.fit(module, make_loader(40, 0), make_loader(60, 1))
    trainer.validate(module, make_loader(60, 2))
    return module
