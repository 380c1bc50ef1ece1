"""Low-rank updates of a model's matrices (Hu et al. 2021): W + (alpha / rank) B A, only A and B
learn.

torch's parametrization puts them behind `weight`, so the model's code, edited or not, knows nothing
of it; `merge` writes the sums into the weights, and a checkpoint looks like any other.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))  # starts as the base

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def matrices(model: nn.Module) -> list[nn.Module]:
    """The modules of the blocks that hold a matrix `weight`."""
    return [m for m in model.blocks.modules() if getattr(m, "weight", None) is not None]


def add(model: nn.Module, rank: int, alpha: float) -> list[nn.Parameter]:
    """Freezes the model and gives each matrix of the blocks an update; returns what learns."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    updates = []
    for module in matrices(model):
        update = LowRank(module.weight, rank, alpha)
        parametrize.register_parametrization(module, "weight", update)
        updates += [update.down, update.up]
    return updates


@torch.no_grad()
def merge(model: nn.Module) -> None:
    for module in [m for m in model.blocks.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
