"""The learning rate's shape: pure functions of progress, the share of the budget spent, in [0, 1].

Progress, not step numbers, so that a faster model simply takes more steps of the same shape.
"""

from nightshift.fixed.config import Schedule


def lr_scale(progress: float, schedule: Schedule) -> float:
    """Factor on every learning rate: linear up, flat, linear down to `final_lr_frac`."""
    if progress < schedule.warmup_frac:
        # Counted from a first step that is not lost: at progress 0 the rate is a tenth, not zero.
        return 0.1 + 0.9 * progress / schedule.warmup_frac
    remaining = 1.0 - progress
    if remaining >= schedule.warmdown_frac:
        return 1.0
    down = remaining / schedule.warmdown_frac
    return down + (1.0 - down) * schedule.final_lr_frac
