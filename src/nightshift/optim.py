"""Muon for the matrices of the blocks, AdamW for embeddings, head and scalars: one optimizer.

Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix by a Newton-Schulz
iteration, so that every direction of a weight matrix learns at the same speed. Same-shaped matrices
are stacked and iterated together: the cost is a few batched matmuls a step.
"""

import torch
from torch import Tensor

from nightshift.fixed.config import Optim
from nightshift.model import GPT

# Quintic coefficients from Jordan et al. 2024: steep at zero, singular values end in 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)

# Width where the AdamW learning rates of conf/optim hold; they scale with width ** -0.5 (nanochat).
REFERENCE_WIDTH = 192


def orthogonalize(g_NRC: Tensor, num_steps: int) -> Tensor:
    """For each of N matrices (R rows, C columns) about U V^T of its singular decomposition."""
    a, b, c = QUINTIC
    tall = g_NRC.size(-2) > g_NRC.size(-1)
    x = g_NRC.mT if tall else g_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def parameter_groups(model: GPT, optim: Optim) -> list[dict]:
    """Every parameter once, by its role."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    embeddings = [model.embed.weight, *(e.weight for e in model.value_embeds.values())]
    head = [] if model.config.tied_head else [model.head.weight]
    width_scale = (model.config.width / REFERENCE_WIDTH) ** -0.5
    groups = [
        {"params": embeddings, "kind": "adamw", "initial_lr": optim.embedding_lr * width_scale},
        {"params": head, "kind": "adamw", "initial_lr": optim.head_lr * width_scale},
        {"params": scalars, "kind": "adamw", "initial_lr": optim.scalar_lr},
    ]
    for shape in sorted({tuple(p.shape) for p in matrices}):
        same = [p for p in matrices if p.shape == shape]
        # A tall matrix moves its outputs by more: sqrt(rows / columns) evens the update's effect.
        lr = optim.matrix_lr * max(1.0, shape[0] / shape[1]) ** 0.5
        groups.append({"params": same, "kind": "muon", "initial_lr": lr})
    return [g | {"lr": g["initial_lr"]} for g in groups if g["params"]]


class MuonAdamW(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], optim: Optim, dtype: torch.dtype):
        """dtype: of the Newton-Schulz matmuls."""
        self.optim, self.dtype = optim, dtype
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["kind"] == "muon" else self._adamw)(params, group["lr"])
        return loss

    def _muon(self, params: list[Tensor], lr: float) -> None:
        grads = [p.grad for p in params]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - self.optim.momentum)
        nesterov = torch._foreach_lerp(grads, momenta, self.optim.momentum)
        updates = orthogonalize(torch.stack(nesterov).to(self.dtype), self.optim.num_polar_steps)
        torch._foreach_mul_(params, 1 - lr * self.optim.weight_decay)
        torch._foreach_add_(params, list(updates.to(params[0].dtype).unbind()), alpha=-lr)

    def _adamw(self, params: list[Tensor], lr: float) -> None:
        """Kingma and Ba 2015 with bias correction; no weight decay on embeddings, head, scalars."""
        o, grads = self.optim, [p.grad for p in params]
        states = [self.state[p] for p in params]
        for p, s in zip(params, states, strict=True):
            if not s:
                s |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            s["step"] += 1
        means, squares = [s["mean"] for s in states], [s["square"] for s in states]
        torch._foreach_lerp_(means, grads, 1 - o.beta1)
        torch._foreach_mul_(squares, o.beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - o.beta2)
        count = states[0]["step"]
        denominator = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominator, (1 - o.beta2**count) ** 0.5)
        torch._foreach_add_(denominator, o.eps)
        torch._foreach_addcdiv_(params, means, denominator, value=-lr / (1 - o.beta1**count))
