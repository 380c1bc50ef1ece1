"""Run one trial: preflight, then a training and an evaluation for each seed, as child processes.

The processes started here run the study's base commit. They put the candidate's code into a sandbox
(fixed/prepare.py, train.py, evaluate.py) and write training.json and result.json.

Covered: a result counts only if its binding is that of what was started: code on both sides of the
line, configuration, seed, budget, weights and protections. Processes see no credentials; whatever a
run leaves running is killed (warm.py). Under a budget in tokens or steps, work beyond WORK_LIMIT
times the baseline's for a token is refused.
Not covered: work below that limit; under such a budget a trial may use its time better or worse.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agent.journal import Run
from agent.target import VAL, Target
from agent.warm import MARK, Starter, kill_marked
from agent.workspace import Code
from nightshift.fixed.config import Config, check, config_digest
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    LOG_FILE,
    RESULT_FILE,
    SCRATCH_FOLDER,
    TEST_RESULT_FILE,
    TRAINING_FILE,
    Result,
    Training,
    read_result,
    read_training,
)
from nightshift.fixed.sandbox import ENVIRONMENT, missing

PREPARE = "nightshift.fixed.prepare"
EVALUATE_LIMIT_S = 60.0  # on top of evaluate.limit_s, which the evaluation keeps itself
# Times the baseline's cost of training over cost of scoring, for a token. The 130 honest changes of
# tests/cheats reach 1.5 times; three passes over each batch cost 3.2 times (LOG 2026-11-24).
WORK_LIMIT = 2.0
PREPARE_LIMIT_S = (
    24 * 3600.0
)  # the baseline's preflight fetches the corpus and trains the tokenizer
PREFLIGHT_BYTES, PREFLIGHT_CHATS = 5_000, 20  # of val text, of val conversations
POLL_S = 0.1
MAX_LOG_BYTES = 4 << 20
OUTSIDE_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM)
Watch = Callable[[Path], str | None]  # looks into the folder of a run that trains: why end it


class Hopeless(Exception):
    """The run is not worth its end; the message says why (early.py)."""


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
    base: Path  # a worktree of the study's base commit: the harness's own code
    code: Code  # what git has in `tree`, fixed part as of the base commit
    baseline_work: float | None  # of the baseline's runs; None for themselves
    config: Config  # resolved; seed, budget and runtime are set for each run
    own_cache: Path  # where the runs may write data
    shared_cache: Path  # where they may only read
    starter: Starter
    stop: Stop
    show: Callable[[str], None]  # what is being done, for the live view
    target: Target = VAL  # what the runs are judged by
    base_sha256: str | None = None  # of the weights that config.base names

    def run(
        self,
        name: str,
        seed: int,
        limit_s: float,
        watch: Watch | None = None,
        **changes: dict[str, Any],
    ) -> Run:
        """Train and evaluate once in <trial>/<name>. `watch` may end the training. `changes`:
        values of groups of the config."""
        folder, started = self.folder / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = self._write_config(folder, seed, changes)
        try:
            problem = self._train(folder, name, limit_s, watch)
            result = problem or self._evaluate(folder, name, config)
        except Hopeless as why:
            return self._stopped(seed, str(why), folder, time.monotonic() - started)
        return self._numbers(seed, result, folder, time.monotonic() - started)

    def prepared_run(self, name: str, seed: int, limit_s: float, **changes: dict[str, Any]) -> Run:
        """`run`, after its data were made. The limit holds for each of the two."""
        if problem := self.prepare(seed, limit_s):
            return self._numbers(seed, problem, self.folder / "prepare", 0.0)
        return self.run(name, seed, min(limit_s, self.config.budget.wall_limit_s), **changes)

    def preflight(self, seed: int, num_steps: int, limit_s: float) -> Run:
        """Data, a few steps and a small evaluation: most mistakes show here, for seconds."""
        return self.prepared_run(
            "preflight",
            seed,
            limit_s,
            budget={"kind": "steps", "amount": float(num_steps)},
            evaluate={"max_bytes": PREFLIGHT_BYTES, "sample_prompts": []},
            chat_evaluate={"max_conversations": PREFLIGHT_CHATS},
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

    def prepare(self, seed: int, limit_s: float) -> Result | None:
        """Corpus, tokenizer and tokens of this configuration; what went wrong, or None."""
        folder = self.folder / "prepare"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._write_config(folder, seed, {})
        self.show("preparing the data")
        fetched = self.own_cache != self.shared_cache or self._fetch(folder, limit_s)
        if not fetched:
            return _crash("", folder, self.tree)
        return self._execute(PREPARE, "the preparation", folder, limit_s)

    def _fetch(self, folder: Path, limit_s: float) -> bool:
        """The baseline fetches the corpus, with the user's environment: a hub may want a token. A
        process of its own, for no candidate may be forked from one that knows it."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_"))}
        environment |= self.marks | {"PYTHONPATH": str(self.base / "src")}
        command = [sys.executable, "-m", self.target.fetch, f"run={folder}"]
        deadline = time.monotonic() + limit_s
        with open(folder / LOG_FILE, "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                self.stop.check()
                time.sleep(POLL_S / 2)
            return process.poll() == 0
        finally:
            process.kill()
            process.wait()

    def _train(
        self, folder: Path, name: str, limit_s: float, watch: Watch | None = None
    ) -> Result | None:
        """What went wrong, or None: there is a checkpoint to evaluate."""
        self.show(f"{name}: training")
        look = watch and partial(watch, folder)
        try:
            problem = self._execute(self.target.train, "training", folder, limit_s, look=look)
        finally:
            shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)  # of one that was killed
        training = _read(read_training, folder / TRAINING_FILE)
        if training is not None and training.status != "ok":
            return Result(status=training.status, message=training.message, training=training)
        if problem or training is None:
            return problem or _crash("training", folder, self.tree)
        if not (folder / CHECKPOINT_FOLDER).is_dir():
            return Result(status="invalid", message="training left no checkpoint")
        return None

    def _evaluate(self, folder: Path, name: str, config: Config) -> Result:
        self.show(f"{name}: evaluating")
        (folder / RESULT_FILE).unlink(missing_ok=True)  # half a run's
        limit_s = config.evaluate.limit_s + EVALUATE_LIMIT_S
        problem = self._execute(self.target.evaluate, "evaluation", folder, limit_s)
        result = _read(read_result, folder / RESULT_FILE)
        if result is None:
            return problem or _crash("evaluation", folder, self.tree)
        result = distrust(result, self.code, config, self.target, self.base_sha256)
        return self._too_much_work(result, config)

    def _too_much_work(self, result: Result, config: Config) -> Result:
        """Under a budget in tokens or steps: cost of training over cost of scoring, for a token."""
        mine = work(result)
        if config.budget.kind == "seconds" or not (mine and self.baseline_work):
            return result
        if mine <= WORK_LIMIT * self.baseline_work:
            return result
        message = (
            f"training costs {mine:.1f} times as much for a token as scoring does; the baseline's "
            f"costs {self.baseline_work:.1f} times (limit: {WORK_LIMIT:g} times that). A budget in "
            "tokens or steps allows one pass over each batch; with budget.kind=seconds work is "
            "paid for in time"
        )
        return Result(status="invalid", message=message, training=result.training)

    def read_test(self, folder: Path, limit_s: float) -> tuple[Result | None, str]:
        """The one reading of test for the run in `folder`, and why it has no number. Not repeated:
        what an earlier call left counts, and the ledger refuses another (fixed/ledger.py)."""
        if (folder / TEST_RESULT_FILE).exists():
            return _read(read_result, folder / TEST_RESULT_FILE), ""
        self.show("reading test")
        module, limit_s = self.target.evaluate, limit_s + EVALUATE_LIMIT_S
        problem = self._execute(module, "evaluation", folder, limit_s, "split=test")
        result = _read(read_result, folder / TEST_RESULT_FILE)
        why = result or problem or _crash("the reading of test", folder, self.tree)
        return result, why.message or ""

    def _execute(
        self,
        module: str,
        what: str,
        folder: Path,
        limit_s: float,
        *more: str,
        look: Callable[[], str | None] | None = None,
    ) -> Result | None:
        """Run a module to its end. Returns what went wrong, or None; its files say the rest.
        Raises Hopeless, the run killed, with what `look` says.

        A process that somebody outside killed is started once more.
        """
        args = [f"run={folder}", f"tree={self.tree}", *more]
        for _ in range(2):
            code = self._attempt(module, args, folder / LOG_FILE, limit_s, look)
            if code is None:
                message = f"{what} passed the wall limit of {limit_s:g} s and was killed"
                return Result(status="timeout", message=message)
            if code == 0:
                return None
            if code not in OUTSIDE_SIGNALS:
                return _crash(what, folder, self.tree)
        message = f"{what} was killed from outside twice (signal 9 or 15). Is memory short?"
        return Result(status="crash", message=message)

    def _attempt(
        self,
        module: str,
        args: list[str],
        log: Path,
        limit_s: float,
        look: Callable[[], str | None] | None,
    ) -> int | None:
        """Exit status, or None after the wall limit. Leaves no process of the trial behind."""
        deadline = time.monotonic() + limit_s
        number = self.starter.start(
            module, args, src=self.base / "src", env=self._environment(), log=log
        )
        try:
            while (code := self.starter.wait(number, POLL_S)) is None:
                self.stop.check()
                if time.monotonic() > deadline:
                    return None
                if look and (why := look()):
                    raise Hopeless(why)
            return code
        finally:
            kill_marked(self.study_folder, self.marks[MARK])
            _trim(log)

    def _environment(self) -> dict[str, str]:
        """No key and no token: candidates are forked from processes that carry this."""
        inherited = {k: v for k, v in os.environ.items() if k in ENVIRONMENT}
        place = {"HOME": str(self.study_folder), "PYTHONUNBUFFERED": "1"}
        return inherited | place | self.marks

    def _stopped(self, seed: int, why: str, folder: Path, wall_s: float) -> Run:
        place = folder.relative_to(self.study_folder).as_posix()
        wall_s = round(wall_s, 3)
        return Run(seed=seed, status="stopped", message=why, wall_s=wall_s, folder=place)

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
            chat_bpb=result.chat_bpb,
            wall_s=round(wall_s, 3),
            folder=folder.relative_to(self.study_folder).as_posix(),
            work=work(result),
            weights_sha256=result.weights_sha256,
            protections=(result.binding or {}).get("protections") or training.protections,
            **{name: getattr(training, name) for name in names},
        )


def distrust(
    result: Result,
    code: Code,
    config: Config,
    target: Target = VAL,
    base_sha256: str | None = None,
) -> Result:
    """The result, or `invalid` if its binding is not that of what was started."""
    if result.status != "ok":
        return result
    bound, training = result.binding or {}, result.training
    started = {
        "commit": code.commit,
        "fixed_code": code.fixed,
        "editable_code": code.editable,
        "config_digest": config_digest(config),
        "seed": config.seed,
        "budget": config.budget.model_dump(),
        "weights_sha256": training.weights_sha256 if training else None,
        "base_sha256": base_sha256,
    }
    wrong = None
    if getattr(result, target.name) is None:
        wrong = f"it has no {target.name}"
    for key, expected in started.items():
        if bound.get(key) != expected:
            wrong = f"its {key} is {bound.get(key)!r}, {expected!r} was started"
            break
    if off := missing(bound.get("protections") or {}, config.sandbox.require):
        wrong = f"it was made without the required protections: {', '.join(off)}"
    if wrong:
        message = f"the result is not of this trial: {wrong}"
        return Result(status="invalid", message=message, training=training)
    return result


def work(result: Result) -> float | None:
    """Cost of training over cost of scoring, for a token; null where either is unknown.

    In CPU time, which a busy machine hardly moves; on a GPU in time by the clock.
    """
    training = result.training
    if not (training and training.tokens):
        return None
    if training.machine.get("device") == "cuda":
        if not (training.train_s and result.forward_tokens_per_s):
            return None
        return training.train_s / training.tokens * result.forward_tokens_per_s
    if not (training.steps_cpu_s and result.forward_cpu_s):
        return None
    return training.steps_cpu_s / training.tokens / result.forward_cpu_s * 1e6


def data_digest(study_folder: Path, run: Run) -> str | None:
    training = _read(read_training, study_folder / run.folder / TRAINING_FILE)
    return training.data_digest if training else None


def _trim(log: Path) -> None:
    """Keep the two ends of a log that a candidate flooded."""
    size = log.stat().st_size if log.exists() else 0
    if size > MAX_LOG_BYTES:
        with open(log, "r+b") as file:
            head = file.read(MAX_LOG_BYTES // 2)
            file.seek(size - MAX_LOG_BYTES // 4)
            tail = file.read()
            file.seek(0)
            file.write(
                head + b"\n[... %d bytes left out ...]\n" % (size - len(head) - len(tail)) + tail
            )
            file.truncate()


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
