"""Milliseconds a step: our Lightning Trainer with its recorder, against a bare loop, same work.

Pairs alternate (bare, trainer, bare, trainer, ...) so that a slow minute of the machine hits both;
the ratio is taken within each pair. Both do the same: batch, forward, backward, clip, schedule,
optimizer.

    python benchmarks/lightning_overhead.py [pairs] [steps] [key=value ...]
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import nightshift  # noqa: F401  before torch
from nightshift import command, pretrain
from nightshift.fixed import machine
from nightshift.fixed.batches import Batches, ensure_tokens
from nightshift.fixed.budget import Clock
from nightshift.fixed.config import check
from nightshift.fixed.recorder import Recorder
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer
from nightshift.fixed.tracking import open_store
from nightshift.model import GPT
from nightshift.training import TrainingModule


class Timed(Recorder):
    """Notes when each step ends; the warm-up is left out by construction."""

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self.ends = [time.perf_counter()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_index)
        if (batch_index + 1) % self.micro_batches == 0:
            self.ends.append(time.perf_counter())


def make(config, device, dtype, vocab_size):
    torch.manual_seed(0)
    model = GPT(config.model, vocab_size).to(device)
    return TrainingModule(model, config, dtype, machine.pick_compile(device, config.train))


def bare(config, device, dtype, tokenizer, batches) -> list[float]:
    module = make(config, device, dtype, tokenizer.vocab_size)
    optimizer = module.configure_optimizers()
    micro = config.train.batch_tokens // config.tokens_per_micro_batch
    ends = []
    for step in range(int(config.budget.amount) + 2):  # two to warm up
        module.progress = step / config.budget.amount if step < config.budget.amount else 1.0
        for i in range(micro):
            batch = [t.to(device) for t in batches.batch(step * micro + i)]
            (module.training_step(batch, i) / micro).backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        module.losses[-1].item()
        ends.append(time.perf_counter())
    return [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]


def trainer(config, device, dtype, tokenizer, batches, tokens) -> list[float]:
    module = make(config, device, dtype, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        log = open_store(config.tracking).start("benchmark", "pretrain")
        recorder = Timed(
            module,
            config,
            Clock(config.budget, config.train.batch_tokens),
            batches,
            tokens,
            tokenizer,
            Path(folder),
            log,
        )
        recorder.announce(device, dtype)
        pretrain.quiet_lightning()
        pretrain.lean_trainer(config, device, recorder).fit(module, recorder.loader())
    return [b - a for a, b in zip(recorder.ends, recorder.ends[1:], strict=False)]


def main() -> None:
    pairs, steps = (int(a) for a in (sys.argv[1:3] + ["6", "30"][len(sys.argv[1:3]) :]))
    overrides = [
        "tracking=off",
        "runtime.progress_bar=false",
        "runtime.num_dev_points=0",
        "budget.kind=steps",
        f"budget.amount={steps}",
        *sys.argv[3:],
    ]
    config = check(command.compose("config", overrides))
    device = machine.pick_device(config.runtime)
    machine.prepare(config.runtime, device)
    dtype = machine.pick_dtype(device, config.train)
    tokens, tokenizer = ensure_tokens(config), Tokenizer.load(ensure_tokenizer(config))
    batches = Batches(
        tokens, "train", config.model.seq_len, config.train.micro_batch_size, config.seed
    )
    sys.stdout, shown = open(os.devnull, "w"), sys.stdout
    ratios, bares, trainers = [], [], []
    for _ in range(pairs):
        a = statistics.median(bare(config, device, dtype, tokenizer, batches))
        b = statistics.median(trainer(config, device, dtype, tokenizer, batches, tokens))
        bares.append(a)
        trainers.append(b)
        ratios.append(b / a)
    sys.stdout = shown
    print(
        f"{machine.facts(device)['cpu']}, {torch.get_num_threads()} threads, {device.type}, "
        f"{dtype}, {config.train.batch_tokens} tokens a step, {pairs} pairs of {steps} steps"
    )
    print(f"bare loop       {statistics.median(bares) * 1e3:8.2f} ms a step")
    print(f"Trainer         {statistics.median(trainers) * 1e3:8.2f} ms a step")
    low, high = min(ratios), max(ratios)
    print(f"ratio           {statistics.median(ratios):8.3f}  (min {low:.3f}, max {high:.3f})")


if __name__ == "__main__":
    main()
