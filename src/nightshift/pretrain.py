"""Train one model: configuration -> checkpoint, curve, samples, result. Logged as one MLflow run.

    nightshift pretrain model.depth=6 optim.matrix_lr=0.03
    nightshift pretrain -m optim.matrix_lr=0.01,0.02,0.04 seed=1,2
    nightshift pretrain resume=outputs/pretrain/<run>

The run's folder gets training.json (fixed/result.py), curve.jsonl, checkpoint/, samples.json and,
from the evaluation in a process of its own, result.json.
"""

import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightshift import command
from nightshift.fixed import config as knobs
from nightshift.fixed.config import ROOT, Config, ConfigError, check
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    CURVE_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    TRAINING_FILE,
    Result,
    Training,
    read_result,
    write_json,
)

STARTED_AT = time.monotonic()
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    return command.run(job, ready, arguments)


def ready(config: Config) -> None:
    """Mistakes that only this machine can show, before anything is written."""
    from nightshift.fixed.budget import read_progress
    from nightshift.fixed.checkpoint import folder_of, load_clock
    from nightshift.fixed.machine import pick_device

    knobs.require_corpus(config)
    if config.resume is not None:
        load_clock(folder_of(config.resume))
    if config.budget.replay is not None:
        read_progress(Path(config.budget.replay))
    pick_device(config.runtime)


def job(values: dict[str, Any]) -> int:
    """One run from composed values; returns the exit status."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    folder, is_multirun = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    overrides = that_name_a_run(hydra.overrides.task)
    try:
        tracking = check(values["tracking"], knobs.Tracking)
        if is_multirun and tracking.enabled and not values["parent_run_id"]:
            raise ConfigError(
                "parent_run_id (null): this multirun has no parent run: the callback of "
                "conf/config.yaml (hydra.callbacks.mlflow_parent) failed. "
                "Run with tracking=off to do without"
            )
        return tracked_run(values, tracking, folder, overrides)
    except (ConfigError, OSError) as error:  # OSError: no space, no permission
        print(error, file=sys.stderr)
        return 2


def that_name_a_run(overrides: list[str]) -> list[str]:
    """Without those that do not change what is learned."""
    no_matter = ("parent_run_id=", "run_name=", "tracking", "runtime", "sandbox")
    return [override for override in overrides if not override.startswith(no_matter)]


def tracked_run(
    values: dict[str, Any], tracking: knobs.Tracking, folder: Path, overrides: list[str]
) -> int:
    """Train and evaluate inside one MLflow run."""

    def body(log) -> tuple[bool, Training]:
        config = continued(check(values), overrides)
        log.params(config)
        training = train(config, folder, log)
        result = scored(folder, training) if config.runtime.evaluate else None
        record(log, folder, training, result)
        print(summary(folder, training, result))
        return training.status == "ok" and (result is None or result.status == "ok"), training

    name = values["run_name"] or ", ".join(overrides) or "defaults"
    return in_one_run(name, "pretrain", values["parent_run_id"], tracking, folder, body)


def in_one_run(
    name: str,
    kind: str,
    parent_run_id: str | None,
    tracking: knobs.Tracking,
    folder: Path,
    body: Callable[[Any], tuple[bool, Training]],
) -> int:
    """`body(log)` says whether all went well; the MLflow run is closed whatever happens."""
    from nightshift.fixed.tracking import open_store

    log = open_store(tracking).start(name, kind, parent_run_id=parent_run_id)
    ended = "FAILED"
    try:
        ok, training = body(log)
        ended = "FINISHED" if ok else "KILLED" if training.interrupted else "FAILED"
        return 0 if ok else EXIT_INTERRUPTED if training.interrupted else 1
    except ConfigError as error:
        if not (folder / CURVE_FILE).exists():
            leave_nothing(folder)
        log.tags({"status": "invalid"})
        log.describe(f"Not run: {error}")
        raise
    finally:
        log.close(ended)


def leave_nothing(folder: Path) -> None:
    """Takes away what a run that never began wrote; hydra.run.dir may be a folder of the user's."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def continued(config: Config, overrides: list[str]) -> Config:
    """With `resume`, the interrupted run's own configuration; only what does not change the run may
    be given anew."""
    if config.resume is None:
        return config
    from nightshift.fixed.checkpoint import folder_of, read_config

    saved = read_config(folder_of(config.resume) / CONFIG_FILE)
    free = ("budget", "runtime", "sandbox", "tracking", "resume", "run_name", "parent_run_id")
    groups = {
        o.split("=", 1)[0].lstrip("+~"): o.split("=", 1)[0].lstrip("+~").split(".")[0]
        for o in overrides
    }
    if wrong := [key for key, group in groups.items() if group not in free]:
        raise ConfigError(
            f"{wrong[0]}: a resumed run keeps the configuration it had; "
            "only budget, runtime and tracking may change"
        )
    fresh = set(free) - (set() if "budget" in groups.values() else {"budget"})
    given = config.model_dump()
    return check(saved.model_dump() | {key: given[key] for key in fresh})


def train(config: Config, folder: Path, log, feed=None) -> Training:
    """What a configuration or an edit can do wrong while training is a status, not an exception.

    `feed`: data and clock from outside (fixed/feed.py); by default they are this process's own.
    """
    import torch

    from nightshift.fixed import checkpoint, machine
    from nightshift.fixed.recorder import Diverged

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_config(config, folder / CONFIG_FILE)
    for stale in (TRAINING_FILE, RESULT_FILE, SAMPLES_FILE):
        (folder / stale).unlink(missing_ok=True)
    try:
        training = fit(config, folder, log, feed)
    except Diverged as error:
        training = Training(status="diverged", message=str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        training = Training(status="oom", message=out_of_memory(config, error))
    except RuntimeError as error:
        if "can't allocate memory" not in str(
            error
        ):  # torch has no class of its own for this on a CPU
            raise
        training = Training(status="oom", message=out_of_memory(config, error))
    training.seed, training.config_digest = config.seed, knobs.config_digest(config)
    training.code, training.commit = str(ROOT), machine.commit_of(ROOT)
    training.total_s = round(time.monotonic() - STARTED_AT, 3)
    write_json(folder / TRAINING_FILE, training)
    return training


def fit(config: Config, folder: Path, log, feed) -> Training:
    """Data, model, Lightning, checkpoint, samples."""
    import torch

    from nightshift.fixed import checkpoint, machine
    from nightshift.fixed.feed import LocalFeed
    from nightshift.fixed.recorder import Recorder
    from nightshift.model import GPT
    from nightshift.training import TrainingModule

    quiet_lightning()
    device = machine.pick_device(config.runtime)
    machine.prepare(config.runtime, device)
    dtype = machine.pick_dtype(device, config.train)
    feed = feed or LocalFeed(config)
    tokenizer = feed.tokenizer
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = GPT(config.model, tokenizer.vocab_size)
    module = TrainingModule(model, config, dtype, machine.pick_compile(device, config.train))
    recorder = Recorder(module, config, feed, folder, log)
    recorder.announce(device, dtype)
    trainer = lean_trainer(config, device, recorder)
    with recorder.signals():
        trainer.fit(module, recorder.loader())
    checkpoint.save(
        folder / CHECKPOINT_FOLDER,
        model,
        config,
        tokenizer,
        *((trainer.optimizers[0], feed.clock.state()) if recorder.interrupted else ()),
    )
    feed.clock.save(folder)
    recorder.hook.remove()  # not before: on_train_end belongs to the module too
    feed.weights_saved(max(recorder.optimizer_steps.values(), default=0))
    training = recorder.training(device, dtype, feed.data_digest)
    if not recorder.interrupted:
        write_json(folder / SAMPLES_FILE, samples(model, tokenizer, config))
    return training


def lean_trainer(config: Config, device, recorder):
    """A Trainer that does only what the loop needs: its default callbacks cost 0.6 ms a step."""
    import lightning as L

    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        callbacks=[recorder],
        accumulate_grad_batches=config.train.batch_tokens // config.tokens_per_micro_batch,
        max_epochs=-1,
        max_steps=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )


def quiet_lightning() -> None:
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*num_workers.*")


def samples(model, tokenizer, config: Config) -> list[dict[str, str]]:
    from nightshift.generate import Engine, Sampling

    model.eval()
    e = config.evaluate
    if not e.sample_tokens or not e.sample_prompts:
        return []
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in e.sample_prompts]
    wanted = [
        Sampling(max_tokens=e.sample_tokens, temperature=e.temperature, seed=seed)
        for seed in range(len(prompts))
    ]
    done = Engine(model, tokenizer).generate(prompts, wanted)
    return [
        {"prompt": prompt, "completion": completion.text}
        for prompt, completion in zip(e.sample_prompts, done, strict=True)
    ]


def out_of_memory(config: Config, error: BaseException) -> str:
    what = (str(error).splitlines() or ["no memory left"])[0][:120]
    return (
        f"out of memory ({what}). Lower train.micro_batch_size ({config.train.micro_batch_size}), "
        f"then model.seq_len ({config.model.seq_len}) or model.depth ({config.model.depth})"
    )


def scored(folder: Path, training: Training) -> Result:
    """Evaluated in a process of its own: training's memory and state do not reach it."""
    if training.status != "ok":
        result = Result(status=training.status, message=training.message, training=training)
        write_json(folder / RESULT_FILE, result)
        return result
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "nightshift.fixed.evaluate", f"run={folder}"]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if not (folder / RESULT_FILE).is_file():
        return Result(
            status="crash", message="the evaluation ended without a result", training=training
        )
    return read_result(folder / RESULT_FILE)


def record(log, folder: Path, training: Training, result: Result | None) -> None:
    """Everything about the run that MLflow shows."""
    import json

    numbers = {
        k: v
        for k, v in vars(training).items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    if result is not None:
        numbers |= {"val_bpb": result.val_bpb, "eval_s": result.eval_s}
    log.metrics({k: v for k, v in numbers.items() if v is not None and k != "seed"})
    status = result.status if result else training.status
    log.tags(
        {"status": status, "commit": training.commit or "", "data": training.data_digest or ""}
        | {f"machine.{k}": v for k, v in training.machine.items()}
    )
    if training.data_digest:
        log.dataset("tokens", training.data_digest)
    for name in (CONFIG_FILE, CURVE_FILE, TRAINING_FILE, RESULT_FILE, SAMPLES_FILE):
        if (folder / name).is_file():
            log.artifact(folder / name)
    if (folder / SAMPLES_FILE).is_file():
        log.table(
            json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8")), "completions.json"
        )
    log.describe(summary(folder, training, result).replace("\n", "  \n"))


def summary(folder: Path, training: Training, result: Result | None) -> str:
    status, message = (
        (result.status, result.message) if result else (training.status, training.message)
    )
    lines = [f"status:          {status}" + (f"  {message}" if message else "")]
    if result is not None and result.val_bpb is not None:
        lines.insert(0, f"val_bpb:         {result.val_bpb:.6f}")
    if training.steps is not None:
        lines += [
            f"training_s:      {training.train_s:.1f}",
            f"steps:           {training.steps}",
            f"tokens_M:        {training.tokens / 1e6:.3f}",
            f"tokens_per_s:    {training.tokens_per_s:.0f}",
            f"peak_memory_gb:  {training.peak_memory_gb:.2f}",
        ]
    return "\n".join([*lines, f"folder:          {os.path.relpath(folder)}"])


if __name__ == "__main__":
    sys.exit(main())
