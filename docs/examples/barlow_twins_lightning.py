"""Barlow Twins with LARS in Lightning: torchrun --nproc_per_node 2 docs/examples/barlow_twins_lightning.py."""

import lightning.pytorch as pl
import torch

from trustratio.optimizers import LARS
from trustratio.recipes.rules.schedules import WarmupPolynomial


class BarlowTwins(pl.LightningModule):
    def configure_model(self):
        layers = [torch.nn.Conv2d(1, 16, 5, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 32)]
        self.net = torch.nn.Sequential(*layers)

    def training_step(self, views, step):
        z, y = (torch.nn.functional.batch_norm(self.net(view), None, None, training=True) for view in views)
        loss = ((z.T @ y / 64 - torch.eye(32)).square() * (0.01 + 0.99 * torch.eye(32))).sum()
        print(f"step {step} loss {loss.item():.4f} on rank {self.global_rank}")
        return loss

    def configure_optimizers(self):
        optimizer = LARS(self.named_parameters(), lr=2.0, weight_decay=1e-6, momentum_form="gradient")
        return [optimizer], [{"scheduler": WarmupPolynomial(optimizer, 10, 100), "interval": "step"}]


pl.seed_everything(0)  # two views of each image: the same waves, in other noise
waves = torch.randn(200, 1, 64, 2, 1, 1) * torch.stack(torch.meshgrid(2 * [torch.arange(12.0)], indexing="ij"))
views = (0.5 * waves).sum(3, True).sin() + 0.5 * torch.randn(200, 2, 64, 1, 12, 12)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False)
trainer.fit(BarlowTwins(), torch.utils.data.DataLoader(views, batch_size=None))
