"""From logits to tokens: temperature, top-k, top-p, repetition penalty, one seed for each row.

A row draws one uniform number a token from a generator of its own and looks it up in its cumulated
probabilities. So what a row says depends on its logits and its seed, not on its neighbours.

B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_tokens: int = 256
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # over 1: tokens of prompt and answer lose (Keskar et al. 2019)
    stop: tuple[str, ...] = ()  # ends before the first of these texts
    stop_tokens: tuple[int, ...] | None = None  # ends at one of these; null: every special token
    seed: int | None = None  # null: another answer each time

    def __post_init__(self):
        rules = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature <= 5, "must be between 0 and 5"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1, or null"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "must be in (0, 10]"),
            ("stop", "" not in self.stop, "must not hold an empty text"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} ({getattr(self, name)!r}) {rule}")

    @property
    def filters(self) -> bool:
        return self.top_k is not None or self.top_p < 1


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    contexts: Sequence[Sequence[int]],
    draws: Sequence[float],
) -> list[int]:
    """A token for each row. `contexts` are the tokens so far, `draws` uniform in [0, 1)."""
    if not torch.isfinite(logits_BV).all():
        raise RuntimeError("the model's logits are not all finite: its weights are broken")
    logits_BV = logits_BV.float()
    for row, sampling in enumerate(samplings):
        if sampling.repetition_penalty != 1:
            logits_BV = penalise(logits_BV, row, contexts[row], sampling.repetition_penalty)
    tokens = logits_BV.argmax(-1).tolist()
    # Rows that filter are sorted first; apart from the others, whose sums would be ordered anew.
    for filters in (False, True):
        rows = [
            row
            for row, sampling in enumerate(samplings)
            if sampling.temperature > 0 and sampling.filters == filters
        ]
        if rows:
            drawn = draw(logits_BV[rows], [samplings[r] for r in rows], [draws[r] for r in rows])
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    return tokens


def penalise(logits_BV: Tensor, row: int, context: Sequence[int], penalty: float) -> Tensor:
    logits_BV = logits_BV.clone()
    seen = torch.tensor(sorted(set(context)), device=logits_BV.device)
    values = logits_BV[row, seen]
    logits_BV[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits_BV


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Looks the draws up in the rows' distributions, which are sorted if they filter."""
    device, order_BV = logits_BV.device, None
    logits_BV = logits_BV / torch.tensor([[s.temperature] for s in samplings], device=device)
    if samplings[0].filters:
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        logits_BV = keep_likeliest(logits_BV, samplings)
    sums_BV = torch.softmax(logits_BV.double(), dim=-1).cumsum(-1)
    wanted_B1 = torch.tensor([[d] for d in draws], device=device, dtype=sums_BV.dtype)
    places_B1 = torch.searchsorted(sums_BV, wanted_B1 * sums_BV[:, -1:], right=True)
    places_B1 = places_B1.clamp(max=sums_BV.size(-1) - 1)
    return (places_B1 if order_BV is None else order_BV.gather(-1, places_B1))[:, 0].tolist()


def keep_likeliest(sorted_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """-inf for what top-k and then top-p leave out of logits in falling order; never the first."""
    device, V = sorted_BV.device, sorted_BV.size(-1)
    k_B1 = torch.tensor([[s.top_k or V] for s in samplings], device=device)
    p_B1 = torch.tensor([[s.top_p] for s in samplings], device=device, dtype=torch.float64)
    sorted_BV = sorted_BV.masked_fill(torch.arange(V, device=device) >= k_B1, -torch.inf)
    p_BV = torch.softmax(sorted_BV.double(), dim=-1)
    likelier_BV = p_BV.cumsum(-1) - p_BV
    return sorted_BV.masked_fill((likelier_BV >= p_B1) & (p_B1 < 1), -torch.inf)
