"""The tuning step: what is learned from packed conversations, and by which optimizer.

sft.py runs it; it is pretraining's own step, with low-rank updates (lora.py) where a rank is given.
A study of chat_bpb edits this file and lora.py, and leaves what the base was trained with alone.
"""

import torch

from nightshift import lora
from nightshift.fixed.config import Config
from nightshift.model import GPT
from nightshift.optim import MuonAdamW
from nightshift.training import TrainingModule


class TuningModule(TrainingModule):
    """Targets are -100 where the assistant is silent: those are not learned."""

    def __init__(self, model: GPT, config: Config, dtype: torch.dtype, compile: bool):
        super().__init__(model, config, dtype, compile)
        rank, alpha = config.sft.lora_rank, config.sft.lora_alpha
        self.updates = None if rank is None else lora.add(model, rank, alpha)

    def configure_optimizers(self) -> MuonAdamW:
        """With LoRA only the low-rank updates are given to AdamW."""
        if self.updates is None:
            return super().configure_optimizers()
        rate = self.config.sft.lora_lr
        group = {"params": self.updates, "kind": "adamw", "initial_lr": rate, "lr": rate}
        return MuonAdamW([group], self.config.optim, self.dtype_of_matmuls)
