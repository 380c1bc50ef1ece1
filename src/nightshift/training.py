"""The training step: loss, learning rate, gradient clipping.

Lightning runs it; pretrain.py feeds it.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from nightshift.fixed.config import Config
from nightshift.model import GPT
from nightshift.optim import MuonAdamW, parameter_groups
from nightshift.schedule import lr_scale


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats per token."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class TrainingModule(L.LightningModule):
    def __init__(self, model: GPT, config: Config, dtype: torch.dtype, compile: bool):
        super().__init__()
        self.model, self.config, self.dtype_of_matmuls = model, config, dtype
        model.dtype = dtype
        self.forward_model = torch.compile(model) if compile else model
        self.progress = 0.0  # share of the budget spent; set before every step
        self.losses: list[Tensor] = []  # of the micro batches since they were last read

    def configure_optimizers(self) -> MuonAdamW:
        return MuonAdamW(
            parameter_groups(self.model, self.config.optim),
            self.config.optim,
            self.dtype_of_matmuls,
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs_BT, targets_BT = batch
        loss = next_token_loss(self.forward_model(inputs_BT), targets_BT)
        self.losses.append(loss.detach())  # read later: reading now would wait for the device
        return loss

    def on_before_optimizer_step(self, optimizer: MuonAdamW) -> None:
        if self.config.train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        scale = lr_scale(self.progress, self.config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
