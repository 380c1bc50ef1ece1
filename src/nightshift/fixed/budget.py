"""The clock of a run: how much of the budget is spent, and when to stop.

Progress runs from 0 to 1 in seconds, tokens or steps. Seconds are counted from the first real step;
what may not learn (the undone warm-up, measurements on dev, saving) pauses the clock. Each step's
progress is recorded, so that a run on a clock can be replayed step for step (`budget.replay`).
In a study this clock runs in a process of the harness (fixed/feed.py); a run that a person starts
keeps it in its own process, where an edited model could reach it.
"""

import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nightshift.fixed.config import Budget, ConfigError

PROGRESS_FILE = "progress.f32"  # float32 per step, little endian


class Clock:
    def __init__(self, budget: Budget, tokens_per_step: int, now=time.monotonic):
        self.budget, self.tokens_per_step, self.now = budget, tokens_per_step, now
        self.steps = 0
        self.recorded: list[float] = []
        self._elapsed_s, self._started_at = 0.0, None
        self.replay = read_progress(Path(budget.replay)) if budget.replay else None

    def start(self) -> None:
        if self._started_at is None:
            self._started_at = self.now()

    @contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()

    def stop(self) -> None:
        if self._started_at is not None:
            self._elapsed_s += self.now() - self._started_at
            self._started_at = None

    def charge(self, seconds: float) -> None:
        """Time that ran while the clock stood still without a right to."""
        self._elapsed_s += seconds

    @property
    def elapsed_s(self) -> float:
        running = 0.0 if self._started_at is None else self.now() - self._started_at
        return self._elapsed_s + running

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def progress(self) -> float:
        if self.replay is not None:
            return float(self.replay[self.steps]) if self.steps < len(self.replay) else 1.0
        spent = {"seconds": self.elapsed_s, "tokens": self.tokens, "steps": self.steps}[
            self.budget.kind
        ]
        return min(1.0, spent / self.budget.amount)

    @property
    def spent(self) -> bool:
        if self.replay is not None:  # the last step of a run may have begun at progress 1
            return self.steps >= len(self.replay)
        return self.progress >= 1.0

    def begin_step(self) -> float:
        """The progress that this step's schedules see; recorded."""
        self.recorded.append(float(np.float32(self.progress)))  # what a replay will read
        return self.recorded[-1]

    def end_step(self) -> None:
        self.steps += 1

    def remaining_s(self) -> float | None:
        """Estimated; null before there is anything to estimate from."""
        progress = self.progress
        return self.elapsed_s * (1 - progress) / progress if progress > 0 else None

    def state(self) -> dict:
        return {"steps": self.steps, "elapsed_s": self.elapsed_s, "recorded": self.recorded}

    def restore(self, state: dict) -> None:
        self.steps, self._elapsed_s = state["steps"], state["elapsed_s"]
        self.recorded = list(state["recorded"])

    def save(self, folder: Path) -> None:
        np.asarray(self.recorded, dtype="<f4").tofile(folder / PROGRESS_FILE)


def read_progress(path: Path) -> np.ndarray:
    path = path / PROGRESS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"budget.replay ({path}): no recorded run there; "
            f"give a run's folder or its {PROGRESS_FILE}"
        )
    return np.fromfile(path, dtype="<f4")
