"""Bounds of one key of conf/space: scale, distribution in Optuna, how values are rounded."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHOWN = 3  # changes in a title


def scale(bounds):
    """To the scale on which equal steps count equally, and back."""
    return (math.log, math.exp) if bounds.log else (float, float)


def contains(bounds, value) -> bool:
    if bounds.choices:
        return value in bounds.choices
    return isinstance(value, int | float) and bounds.low <= value <= bounds.high


def rounded(value, bounds, incumbent):
    """Two digits on a logarithmic scale, three otherwise; a whole number where it was one."""
    if bounds.choices:
        return value
    if isinstance(incumbent, int):
        return round(value)
    value = float(f"{value:.2g}" if bounds.log else f"{value:.3g}")
    return min(max(value, bounds.low), bounds.high)


def distribution(bounds, optuna):
    if bounds.choices:
        return optuna.distributions.CategoricalDistribution(bounds.choices)
    return optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)


def named(overrides: dict[str, Any], before: dict[str, Any]) -> str:
    """`matrix_lr 0.02 -> 0.03, beta1 0.8 -> 0.7 and 2 more`, for a title."""
    each = [f"{key.split('.')[-1]} {before[key]} -> {value}" for key, value in overrides.items()]
    more = len(each) - SHOWN
    return ", ".join(each[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def quiet_optuna() -> Iterator[Any]:
    """The module, without its log and its warnings."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield optuna
