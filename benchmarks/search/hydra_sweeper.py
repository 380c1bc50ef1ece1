"""Hydra's Optuna sweeper, asked for points: `-m hydra/sweeper=optuna hydra/sweeper/sampler=tpe`.

It is a program of its own, in an environment made once under benchmarks/out/search: it wants Optuna
below 3, nightshift's sampler is Optuna 5's. Each job that it launches (hydra_sweep.py) asks this
process for its number. One job at a time (n_jobs=1: by default it launches two at once, the second
without the first one's number); all else is the sweeper's default.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import OUT

PACKAGES = ("hydra-core==1.3.8", "hydra-optuna-sweeper==1.3.0", "optuna==2.10.1")
JOB = Path(__file__).with_name("hydra_sweep.py")
JOBS = 2000  # more than a search can pay for
PATIENCE_S = 120.0  # for the next job, the sweeper's start included

Asked = tuple[dict[str, Any], Callable[[float], None]]  # values, and where their number is told


@contextmanager
def sweeper(space: dict[str, str], seed: int) -> Iterator[Iterator[Asked]]:
    """Runs it over a space (key -> Hydra's syntax of an override); it is killed at the end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as server,
        open(f"{folder}/log", "w+") as log,
    ):
        server.bind(f"{folder}/socket")
        server.listen()
        server.settimeout(PATIENCE_S)
        settings = [
            "hydra/sweeper=optuna",
            "hydra/sweeper/sampler=tpe",
            f"hydra.sweeper.sampler.seed={seed}",
            f"hydra.sweeper.n_trials={JOBS}",
            "hydra.sweeper.n_jobs=1",
            f"hydra.sweep.dir={folder}/sweep",
        ]
        process = subprocess.Popen(
            [python(), JOB, "-m", *settings, *(f"+{key}={what}" for key, what in space.items())],
            env=os.environ | {"SEARCH_SOCKET": f"{folder}/socket"},
            stdout=log,
            stderr=log,
        )
        try:
            yield jobs(server)
        except TimeoutError:
            log.seek(0)
            sys.exit(f"Hydra's sweeper asked for nothing in {PATIENCE_S:.0f} s:\n{log.read()}")
        finally:
            process.kill()
            process.wait()


def jobs(server: socket.socket) -> Iterator[Asked]:
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as lines:

            def tell(number: float, lines=lines) -> None:
                lines.write(f"{number}\n")
                lines.flush()

            yield json.loads(lines.readline()), tell


def python() -> Path:
    """The interpreter of the sweeper's environment, which is made if it is not there whole."""
    folder = OUT / "sweeper"
    interpreter, whole = folder / "bin" / "python", folder / "whole"
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        whole.touch()
    return interpreter
