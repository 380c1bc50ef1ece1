"""Run one trial: preflight, then a training and an evaluation for each seed, as child processes.

Nothing that a child says by its exit code is believed: training.json and result.json are read, and
a result counts only if it comes from the code, seed and configuration that were started. Whatever a
run leaves running is killed, also what forked itself out of its process group (warm.py).
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agent.journal import Run
from agent.warm import MARK, Starter, kill_marked
from nightshift.fixed.config import Config, check, config_digest
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    LOG_FILE,
    RESULT_FILE,
    TRAINING_FILE,
    Result,
    Training,
    read_result,
    read_training,
)

PRETRAIN, EVALUATE = "nightshift.pretrain", "nightshift.fixed.evaluate"
EVALUATE_LIMIT_S = 120.0  # on top of the budget's wall limit
PREPARE_LIMIT_S = (
    24 * 3600.0
)  # the baseline's preflight fetches the corpus and trains the tokenizer
PREFLIGHT_BYTES = 5_000  # of val text
POLL_S = 0.1
OUTSIDE_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM)
PRIVATE = ("PYTHON", "GIT_", "HYDRA_", "MLFLOW_")  # variables that a run does not inherit


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the running trial was stopped and will be run again."""


@dataclass
class Stop:
    """Set by a signal; looked at between steps, so that nothing is cut in the middle."""

    requested: bool = False

    def check(self) -> None:
        if self.requested:
            raise Interrupted


@dataclass(kw_only=True)
class Bench:
    """Where one trial runs."""

    marks: dict[str, str]  # in the environment of every process of the trial (warm.py)
    study_folder: Path
    folder: Path  # trials/NNN of it
    tree: Path  # the worktree
    config: Config  # resolved; seed, budget and runtime are set for each run
    own_cache: Path  # where the runs may write data
    shared_cache: Path  # where they may only read
    starter: Starter
    stop: Stop
    show: Callable[[str], None]  # what is being done, for the live view

    def run(self, name: str, seed: int, limit_s: float, **changes: dict[str, Any]) -> Run:
        """Train and evaluate once in <trial>/<name>. `changes`: values of groups of the config."""
        folder, started = self.folder / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = self._write_config(folder, seed, changes)
        problem = self._train(folder, name, limit_s)
        result = problem or self._evaluate(folder, name, limit_s + EVALUATE_LIMIT_S, config)
        return self._numbers(seed, result, folder, time.monotonic() - started)

    def preflight(self, seed: int, num_steps: int, limit_s: float) -> Run:
        """A run of a few steps and a small evaluation: most mistakes show here, for seconds."""
        return self.run(
            "preflight",
            seed,
            limit_s,
            budget={"kind": "steps", "amount": float(num_steps)},
            evaluate={"max_bytes": PREFLIGHT_BYTES, "sample_prompts": []},
            runtime={"num_dev_points": 0},
        )

    def _write_config(self, folder: Path, seed: int, changes: dict[str, Any]) -> Config:
        values = self.config.model_dump()
        values |= {"seed": seed, "resume": None, "parent_run_id": None, "run_name": None}
        values["tracking"]["enabled"] = False
        values["runtime"] |= {
            "progress_bar": False,
            "evaluate": False,  # here it is a run of its own, under its own limit
            "cache_dir": str(self.own_cache),
            "shared_cache_dir": str(self.shared_cache),
        }
        for group, keys in changes.items():
            values[group] |= keys
        config = check(values)
        OmegaConf.save(OmegaConf.create(config.model_dump()), folder / CONFIG_FILE)
        return config

    def _train(self, folder: Path, name: str, limit_s: float) -> Result | None:
        """What went wrong, or None: there is a checkpoint to evaluate."""
        self.show(f"{name}: training")
        args = ["--config-path", str(folder), "--config-name", Path(CONFIG_FILE).stem]
        args += [f"hydra.run.dir={_quoted(folder)}", "hydra.output_subdir=null"]
        args += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        if problem := self._execute(PRETRAIN, args, folder, limit_s):
            return problem
        training = _read(read_training, folder / TRAINING_FILE)
        if training is None:
            return _crash("training", folder, self.tree)
        if training.status != "ok":
            return Result(status=training.status, message=training.message, training=training)
        if not (folder / CHECKPOINT_FOLDER).is_dir():
            return Result(status="invalid", message="training left no checkpoint")
        return None

    def _evaluate(self, folder: Path, name: str, limit_s: float, config: Config) -> Result:
        self.show(f"{name}: evaluating")
        (folder / RESULT_FILE).unlink(missing_ok=True)  # planted by training, or half a run's
        if problem := self._execute(EVALUATE, [f"run={folder}"], folder, limit_s):
            return problem
        result = _read(read_result, folder / RESULT_FILE)
        if result is None:
            return _crash("evaluation", folder, self.tree)
        return distrust(result, self.tree, config)

    def _execute(self, module: str, args: list[str], folder: Path, limit_s: float) -> Result | None:
        """Run a module to its end. Returns what went wrong, or None; its files say the rest.

        A process that somebody outside killed is started once more.
        """
        what = "training" if module == PRETRAIN else "evaluation"
        for attempt in (1, 2):
            code = self._attempt(module, args, folder / LOG_FILE, limit_s)
            if code is None:
                message = f"{what} passed the wall limit of {limit_s:g} s and was killed"
                return Result(status="timeout", message=message)
            training = _read(read_training, folder / TRAINING_FILE)
            stopped = module == PRETRAIN and training is not None and training.interrupted
            if code not in OUTSIDE_SIGNALS and not stopped:
                return None
            if attempt == 1 and module == PRETRAIN:
                _empty(folder)
        message = f"{what} was killed from outside twice (signal 9 or 15). Is memory short?"
        return Result(status="crash", message=message)

    def _attempt(self, module: str, args: list[str], log: Path, limit_s: float) -> int | None:
        """Exit status, or None after the wall limit. Leaves no process of the trial behind."""
        deadline = time.monotonic() + limit_s
        number = self.starter.start(
            module, args, src=self.tree / "src", env=self._environment(), log=log
        )
        try:
            while (code := self.starter.wait(number, POLL_S)) is None:
                self.stop.check()
                if time.monotonic() > deadline:
                    return None
            return code
        finally:
            kill_marked(self.study_folder, self.marks[MARK])

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE)}
        return inherited | self.marks | {"HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1"}

    def _numbers(self, seed: int, result: Result, folder: Path, wall_s: float) -> Run:
        training = result.training or _read(read_training, folder / TRAINING_FILE)
        training = training or Training(status=result.status)
        names = (
            "steps",
            "tokens",
            "train_s",
            "tokens_per_s",
            "peak_memory_gb",
            "mfu",
            "num_params",
        )
        return Run(
            seed=seed,
            status=result.status,
            message=result.message,
            val_bpb=result.val_bpb,
            wall_s=round(wall_s, 3),
            folder=folder.relative_to(self.study_folder).as_posix(),
            **{name: getattr(training, name) for name in names},
        )


def distrust(result: Result, tree: Path, config: Config) -> Result:
    """The result, or `invalid` if it is not of what was started."""
    training = result.training
    if result.status != "ok":
        return result
    wrong = None
    if training is None:
        wrong = "the result does not say what was trained"
    elif not training.code or Path(training.code).resolve() != tree.resolve():
        wrong = f"code was imported from {training.code}, not from the trial's worktree"
    elif training.seed != config.seed:
        wrong = f"seed {training.seed} was trained, seed {config.seed} was asked for"
    elif training.config_digest != config_digest(config):
        wrong = f"another configuration was trained ({training.config_digest})"
    return Result(status="invalid", message=wrong, training=training) if wrong else result


def data_digest(study_folder: Path, run: Run) -> str | None:
    training = _read(read_training, study_folder / run.folder / TRAINING_FILE)
    return training.data_digest if training else None


def _read(reader: Callable[[Path], Any], path: Path) -> Any:
    """What a file of a run says; None if it is not there or not whole."""
    try:
        return reader(path)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _crash(what: str, folder: Path, tree: Path) -> Result:
    """The last line of the log, and the last place in the trial's own code that it names."""
    log = folder / LOG_FILE
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = re.findall(rf'File "{re.escape(str(tree))}/(\S+)", line (\d+)', text)
    where = f" ({places[-1][0]}, line {places[-1][1]})" if places else ""
    last = lines[-1][:300] if lines else f"{what} ended without a word"
    return Result(status="crash", message=f"{last}{where}")


def _empty(folder: Path) -> None:
    """Back to a run that was never started, log included."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (CONFIG_FILE, LOG_FILE):
            path.unlink()


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's override grammar."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
