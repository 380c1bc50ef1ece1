"""Teach a base checkpoint to chat: base + conversations -> chat checkpoint. One MLflow run.

    nightshift sft base=outputs/pretrain/<run>
    nightshift sft base=... sft=lora conversations=folder conversations.path=/my/chats.jsonl
    nightshift sft resume=outputs/sft/<run>

The same step, clock, warm-up, curve, checkpoint and resume as in pretraining, on packed rows of
which only the assistant's tokens are learned (packing.py), with `sft` and `sft_budget` in place of
`train`, `schedule` and `budget`. Model, tokenizer and corpus are the base's. In the curve of such a
run `dev_bpb` is that of held-out answers.

The loss is the mean over the learned tokens of a micro-batch: with several micro-batches a step,
those with fewer learned tokens count as much as the others.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nightshift import command, pretrain
from nightshift.fixed import config as knobs
from nightshift.fixed.config import FROM_BASE, ROOT, Config, ConfigError, check
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    SAMPLES_FILE,
    TRAINING_FILE,
    Training,
    write_json,
)

FOLDER = "outputs/sft/${now:%Y-%m-%d_%H-%M-%S}"
CHAT_RESULT_FILE = "chat_result.json"


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        arguments.append(f"hydra.run.dir={FOLDER}")
    return command.run(job, ready, arguments)


def ready(config: Config) -> None:
    """Mistakes that only this machine can show, before anything is written."""
    from nightshift.fixed.budget import read_progress
    from nightshift.fixed.checkpoint import folder_of, load_clock
    from nightshift.fixed.machine import pick_device

    if config.resume is not None:
        load_clock(folder_of(config.resume))
    else:
        for_run(config)
    if config.sft_budget.replay is not None:
        read_progress(Path(config.sft_budget.replay))
    pick_device(config.runtime)


def job(values: dict[str, Any]) -> int:
    """One run from composed values; returns the exit status."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = pretrain.that_name_a_run(hydra.overrides.task)
    try:
        tracking = check(values["tracking"], knobs.Tracking)
        return tracked_run(values, tracking, folder, overrides)
    except (ConfigError, OSError) as error:  # OSError: no space, no permission
        print(error, file=sys.stderr)
        return 2


def tracked_run(
    values: dict[str, Any], tracking: knobs.Tracking, folder: Path, overrides: list[str]
) -> int:
    """Train and score inside one MLflow run."""

    def body(log) -> tuple[bool, Training]:
        config = for_run(check(values), overrides)
        log.params(config)
        training = train(config, folder, log)
        pretrain.record(log, folder, training, None)
        scored = training.status == "ok" and config.runtime.evaluate
        chat = score(folder, log) if scored else None
        print(summary(folder, training, chat))
        ok = training.status == "ok" and (chat is not None or not config.runtime.evaluate)
        return ok, training

    name = values["run_name"] or ", ".join(overrides) or "sft"
    return pretrain.in_one_run(name, "sft", values["parent_run_id"], tracking, folder, body)


# -- the configuration of a run


def base_folder(config: Config) -> Path:
    """The checkpoint folder of the base; a relative path is tried from here, then from the
    checkout."""
    from nightshift.fixed.checkpoint import folder_of

    if config.base is None:
        raise ConfigError(
            "base (null): sft begins from a base checkpoint: base=outputs/pretrain/<run>"
        )
    here = folder_of(config.base)
    return here if here.exists() else folder_of(str(ROOT / config.base))


def base_config(config: Config) -> Config:
    from nightshift.fixed.checkpoint import read_config

    return read_config(base_folder(config) / CONFIG_FILE)


def portable(folder: Path) -> str:
    """Relative to the checkout where it lies inside: the same text in every clone."""
    folder = folder.resolve()
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def for_run(config: Config, overrides: list[str] = ()) -> Config:
    """The configuration of this tuning (fixed/config.py, for_tuning)."""
    if config.resume is not None:
        return pretrain.continued(config, overrides)
    groups = [o.lstrip("+~").split("=")[0].split(".")[0] for o in overrides]
    if wrong := [o for o, g in zip(overrides, groups, strict=True) if g in FROM_BASE]:
        raise ConfigError(
            f"{wrong[0]}: {', '.join(FROM_BASE)} are those of the base checkpoint ({config.base})"
        )
    return knobs.for_tuning(config, base_config(config), portable(base_folder(config)))


# -- training


def train(config: Config, folder: Path, log, feed=None) -> Training:
    """pretrain.train with another `fit`: what goes wrong while training is a status.

    `feed`: rows and clock from outside (fixed/chat_feed.py); by default this process's own.
    """
    import torch

    from nightshift.fixed import checkpoint, machine
    from nightshift.fixed.recorder import Diverged

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_config(config, folder / CONFIG_FILE)
    for stale in (TRAINING_FILE, CHAT_RESULT_FILE, SAMPLES_FILE):
        (folder / stale).unlink(missing_ok=True)
    try:
        training = fit(config, folder, log, feed)
    except Diverged as error:
        training = Training(status="diverged", message=f"{error}. Or lower sft.lr_scale")
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = pretrain.out_of_memory(config, error).replace("train.", "sft.")
        training = Training(status="oom", message=message)
    training.seed, training.config_digest = config.seed, knobs.config_digest(config)
    training.code, training.commit = str(ROOT), machine.commit_of(ROOT)
    write_json(folder / TRAINING_FILE, training)
    return training


def fit(config: Config, folder: Path, log, feed) -> Training:
    """Rows, the base's weights, Lightning, checkpoint."""
    import torch

    from nightshift import lora
    from nightshift.fixed import checkpoint, machine
    from nightshift.fixed.chat_feed import LocalChatFeed
    from nightshift.tuning import TuningModule

    pretrain.quiet_lightning()
    device = machine.pick_device(config.runtime)
    machine.prepare(config.runtime, device)
    dtype = machine.pick_dtype(device, config.train)
    base = base_folder(config)
    model, tokenizer, _ = checkpoint.load(base, device)
    feed = feed or LocalChatFeed(config, base)
    torch.manual_seed(config.seed)
    module = TuningModule(model, config, dtype, machine.pick_compile(device, config.train))
    recorder = chat_recorder(module, config, feed, folder, log)
    recorder.announce(device, dtype)
    trainer = pretrain.lean_trainer(config, device, recorder)
    with recorder.signals():
        trainer.fit(module, recorder.loader())
    state = (trainer.optimizers[0], feed.clock.state()) if recorder.interrupted else ()
    if not recorder.interrupted:
        lora.merge(model)  # an interrupted run keeps base and update apart, to go on with
    checkpoint.save(folder / CHECKPOINT_FOLDER, model, config, tokenizer, *state)
    feed.clock.save(folder)
    recorder.hook.remove()
    feed.weights_saved(max(recorder.optimizer_steps.values(), default=0))
    return recorder.training(device, dtype, feed.data_digest)


def chat_recorder(module, config: Config, feed, folder: Path, log):
    """The pretraining's recorder; its dev_bpb is of the assistant's held-out answers."""
    import torch
    import torch.nn.functional as F

    from nightshift.fixed.recorder import Recorder

    class ChatRecorder(Recorder):
        @torch.no_grad()
        def dev_bpb(self) -> float:
            sizes = torch.from_numpy(feed.tokenizer.token_bytes().astype("int64")).to(self.device)
            nats = num_bytes = 0.0
            for inputs, targets in feed.dev_batches():
                inputs, targets = inputs.to(self.device), targets.to(self.device)
                logits = module.model(inputs).flatten(0, 1).float()
                loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
                size = sizes[targets.flatten().clamp(min=0)] * (targets.flatten() >= 0)
                nats += float((loss * (size > 0)).double().sum())
                num_bytes += int(size.sum())
            return round(nats / math.log(2) / max(1, num_bytes), 6)

    return ChatRecorder(module, config, feed, folder, log)


# -- afterwards


def score(folder: Path, log) -> dict[str, Any] | None:
    """chat_evaluate in a process of its own, as pretraining's evaluation; null if it failed."""
    import json

    from nightshift import chat_evaluate

    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command_line = [sys.executable, "-m", "nightshift.chat_evaluate", f"run={folder}"]
    subprocess.run(command_line, env=environment, stdout=subprocess.DEVNULL)
    if not (folder / CHAT_RESULT_FILE).is_file():
        return None
    result = json.loads((folder / CHAT_RESULT_FILE).read_text(encoding="utf-8"))
    chat_evaluate.record(log, folder, result)
    return result


def summary(folder: Path, training: Training, chat: dict[str, Any] | None) -> str:
    lines = pretrain.summary(folder, training, None).splitlines()
    if chat is not None:
        m = chat["metrics"]
        lines.insert(0, f"chat_bpb:        {m['chat_bpb']:.4f} +- {m['chat_bpb_interval']:.4f}")
        if "chat_bpb_gain" in m:
            lines.insert(
                1, f"gain on base:    {m['chat_bpb_gain']:.4f} +- {m['chat_bpb_gain_interval']:.4f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
