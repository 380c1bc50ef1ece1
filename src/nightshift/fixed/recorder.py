"""The eyes and the clock of a training run: a Lightning callback, out of the candidate's reach.

Sets progress before each step, stops when the budget is spent, writes the curve, measures dev_bpb,
notices divergence, saves what `resume` needs, and shows a progress bar. Reads the loss only every
few steps on a GPU: each reading waits for the device.
"""

import json
import signal
import sys
import time
from contextlib import contextmanager
from math import log as ln
from pathlib import Path

import lightning as L
import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, IterableDataset

from nightshift.fixed import checkpoint, machine
from nightshift.fixed.budget import Clock
from nightshift.fixed.config import Config
from nightshift.fixed.feed import EndOfData, LocalFeed, RemoteFeed
from nightshift.fixed.result import CHECKPOINT_FOLDER, CURVE_FILE, Training, read_curve
from nightshift.fixed.ruler import nats_of_targets

NUM_WARM_UP_STEPS = 2
TRACK_EVERY_S = 5.0  # curve points reach MLflow in batches
EXPLODED = 1.5  # times ln V, the loss of a uniform guess


class Diverged(Exception):
    """The loss is not a number, or far above that of a uniform guess."""


class Stream(IterableDataset):
    """Micro batches from a position on, until the feed ends."""

    def __init__(self, feed, first: int, before_first):
        self.feed, self.first, self.before_first = feed, first, before_first

    def __iter__(self):
        self.before_first()
        index = self.first
        while True:
            try:
                batch = self.feed.batch(index)
            except EndOfData:
                return
            yield batch
            index += 1


class Recorder(L.Callback):
    def __init__(
        self,
        module,
        config: Config,
        feed: LocalFeed | RemoteFeed,
        folder: Path,
        log,
    ):
        self.module, self.config, self.feed, self.clock = module, config, feed, feed.clock
        self.tokenizer, self.folder, self.run_log = feed.tokenizer, folder, log
        self.micro_batches = config.train.batch_tokens // config.tokens_per_micro_batch
        self.optimizer_steps: dict[int, int] = {}  # of each optimizer object, after the warm-up
        self.interrupted = False
        self.bar = Bar(config.runtime.progress_bar)
        self.points: list[dict] = []  # not yet in MLflow
        self.final_loss: float | None = None
        self.dev_points_done = 0
        self.matmul_peak: float | None = None
        self.resumed = checkpoint.folder_of(config.resume) if config.resume else None
        if self.resumed:
            self.clock.restore(checkpoint.load_clock(self.resumed))

    def announce(self, device: torch.device, dtype: torch.dtype) -> None:
        """Runs before the clock: facts that the curve and the bar need."""
        self.device, self.dtype = device, dtype
        self.matmul_peak = machine.matmul_peak_flops(device, dtype)
        c, b = self.config, self.config.budget
        self.bar.say(
            f"pretrain  {self.module.model.num_params() / 1e6:.1f}M params | "
            f"{c.train.batch_tokens:,} tokens/step "
            f"({self.micro_batches} x {c.train.micro_batch_size} x {c.model.seq_len}) | "
            f"budget {b.amount:g} {b.kind} | {device.type}, {str(dtype).removeprefix('torch.')}"
        )

    def loader(self) -> DataLoader:
        first = self.clock.steps * self.micro_batches
        stream = Stream(self.feed, first, self.warm_up_once)
        return DataLoader(stream, batch_size=None, num_workers=0)

    @contextmanager
    def signals(self):
        """Puts back the handlers that `on_train_start` replaces, and the terminal."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.bar.close()

    def on_signal(self, number, frame) -> None:
        """The first SIGINT or SIGTERM ends training after the step, with a checkpoint; the second
        ends at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    # -- Lightning's hooks, in the order they come

    def on_fit_start(self, trainer, module) -> None:
        self.trainer, self.is_warm = trainer, False
        self.hook = register_optimizer_step_post_hook(self.count_step)

    def count_step(self, optimizer, args, kwargs) -> None:
        self.optimizer_steps[id(optimizer)] = self.optimizer_steps.get(id(optimizer), 0) + 1

    def warm_up_once(self) -> None:
        """Before the first batch is asked for: from there on time counts."""
        if not self.is_warm:
            self.is_warm = True
            self.warm_up(self.trainer.optimizers[0])
            self.optimizer_steps.clear()

    def on_train_start(self, trainer, module) -> None:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # here: Lightning installs its own before this hook
            signal.signal(number, self.on_signal)
        optimizer = trainer.optimizers[0]
        curve = self.folder / CURVE_FILE
        kept = []
        if self.resumed:
            checkpoint.load_state(self.resumed, self.module.model, optimizer)
            kept = [
                p
                for p in read_curve(self.resumed.parent / CURVE_FILE)
                if p["step"] <= self.clock.steps
            ]
        curve.write_text("".join(json.dumps(p) + "\n" for p in kept), encoding="utf-8")
        self.points = list(kept)
        self.dev_points_done = sum("dev_bpb" in p for p in kept)
        self.curve_file = open(curve, "a", encoding="utf-8", buffering=1)
        self.tracked_at = self.saved_at = time.monotonic()
        self.logged_step, self.logged_s = self.clock.steps, self.clock.elapsed_s
        self.clock.start()
        self.stop_if_done(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        if batch_index % self.micro_batches == 0:
            self.module.progress = self.clock.begin_step()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if (batch_index + 1) % self.micro_batches:
            return
        self.clock.end_step()
        done = self.clock.spent or self.interrupted
        is_logged = self.clock.steps % self.config.runtime.log_every_steps == 0 or done
        if is_logged or self.device.type == "cpu":
            self.read_losses()
        dev_bpb = self.dev_bpb_if_due(done)
        if is_logged or dev_bpb is not None:
            self.write_point(trainer, dev_bpb)
        if not done and time.monotonic() - self.saved_at > self.config.runtime.save_every_s:
            self.save_state(trainer)
        self.stop_if_done(trainer)

    def on_train_end(self, trainer, module) -> None:
        self.clock.stop()
        self.run_log.curve(self.points)
        self.points = []
        self.curve_file.close()

    # -- what they do

    def warm_up(self, optimizer) -> None:
        """Compiles and allocates on made-up tokens; weights, buffers, optimizer and RNG stay."""
        state = [*self.module.parameters(), *self.module.buffers()]
        before = [tensor.detach().clone() for tensor in state]
        rng = torch.get_rng_state()
        cuda_rng = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else None
        shape = (self.config.train.micro_batch_size, self.config.model.seq_len)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.tokenizer.vocab_size, shape, generator=random).to(
            self.device
        )
        for _ in range(NUM_WARM_UP_STEPS):
            self.module.training_step((tokens, tokens), 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        optimizer.state.clear()
        self.module.losses.clear()
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)

    def read_losses(self) -> None:
        losses, self.module.losses = self.module.losses, []
        self.final_loss = float(torch.stack(losses).mean())
        limit = EXPLODED * ln(self.tokenizer.vocab_size)
        if not self.final_loss < limit:
            self.clock.stop()
            raise Diverged(
                f"loss {self.final_loss:.3g} at step {self.clock.steps} (limit {limit:.3g}, "
                "1.5 times that of a uniform guess). Lower optim.matrix_lr or optim.embedding_lr, "
                "or lengthen schedule.warmup_frac"
            )

    def write_point(self, trainer, dev_bpb: float | None) -> None:
        c = self.clock
        steps, seconds = c.steps - self.logged_step, c.elapsed_s - self.logged_s
        rate = steps * c.tokens_per_step / seconds if seconds > 0 else None
        self.logged_step, self.logged_s = c.steps, c.elapsed_s
        lr = next(g["lr"] for g in trainer.optimizers[0].param_groups)
        point = {
            "step": c.steps,
            "progress": round(c.progress, 6),
            "elapsed_s": round(c.elapsed_s, 3),
            "tokens": c.tokens,
            "train/loss": self.final_loss,
            "lr_scale": lr / trainer.optimizers[0].param_groups[0]["initial_lr"],
            "tokens_per_s": rate,
            "memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
            "time": round(time.time(), 3),
        }
        if self.device.type == "cuda":
            point["memory_gb"] = round(torch.cuda.memory_allocated() / 1e9, 3)
        if dev_bpb is not None:
            point["dev_bpb"] = dev_bpb
        point = {key: value for key, value in point.items() if value is not None}
        self.curve_file.write(json.dumps(point) + "\n")
        self.points.append(point)
        self.bar.show(c, self.final_loss, rate)
        if time.monotonic() - self.tracked_at > TRACK_EVERY_S:
            with c.paused():
                self.run_log.curve(self.points)
            self.points, self.tracked_at = [], time.monotonic()

    def dev_bpb_if_due(self, done: bool) -> float | None:
        """At evenly spaced progress, and at the end. The clock stands still; nothing learns."""
        wanted = self.config.runtime.num_dev_points
        if wanted == 0 or self.dev_points_done >= wanted:
            return None
        if not done and self.clock.progress < (self.dev_points_done + 1) / wanted:
            return None
        self.dev_points_done += 1
        model, was_training = self.module.model, self.module.model.training
        with self.clock.paused():
            model.eval()  # dropout and statistics stand still
            measured = self.dev_bpb()
            model.train(was_training)
        return measured

    @torch.no_grad()
    def dev_bpb(self) -> float:
        bytes_of_token = torch.from_numpy(self.tokenizer.token_bytes().astype("int64")).to(
            self.device
        )
        nats = num_bytes = 0.0
        for inputs, targets in self.feed.dev_batches():
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            sizes = bytes_of_token[targets]
            nats += float(
                (nats_of_targets(self.module.model(inputs), targets) * (sizes > 0)).double().sum()
            )
            num_bytes += int(sizes.sum())
        return round(nats / ln(2) / num_bytes, 6)

    def save_state(self, trainer) -> None:
        with self.clock.paused():
            checkpoint.save(
                self.folder / CHECKPOINT_FOLDER,
                self.module.model,
                self.config,
                self.tokenizer,
                trainer.optimizers[0],
                self.clock.state(),
            )
        self.saved_at = time.monotonic()

    def stop_if_done(self, trainer) -> None:
        if self.clock.spent or self.interrupted:
            trainer.should_stop = True
            self.clock.stop()

    def training(self, device: torch.device, dtype: torch.dtype, data_digest: str) -> Training:
        c, model = self.clock, self.module.model
        rate = c.tokens / c.elapsed_s if c.elapsed_s > 0 else None
        mfu = rate * model.flops_per_token() / self.matmul_peak if rate else None
        status, message = "ok", None
        if self.interrupted:
            status = "crash"
            message = f"stopped by a signal at step {c.steps}; continue with resume={self.folder}"
        return Training(
            status=status,
            message=message,
            interrupted=self.interrupted,
            steps=c.steps,
            tokens=c.tokens,
            train_s=round(c.elapsed_s, 3),
            final_loss=self.final_loss,
            tokens_per_s=rate and round(rate, 1),
            peak_memory_gb=round(machine.peak_memory_gb(device), 3),
            mfu=mfu and round(mfu, 4),
            num_params=model.num_params(),
            data_digest=data_digest,
            machine=machine.facts(device)
            | {
                "dtype": str(dtype).removeprefix("torch."),
                "matmul_tflops": round(self.matmul_peak / 1e12, 3),
            },
        )


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    LINES = 10  # in a log file, over the whole run

    def __init__(self, wanted: bool):
        self.rich, self.next_line = None, 0.0
        if wanted and sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            self.rich = Progress(
                TextColumn("step {task.fields[step]:>6}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn(
                    "loss {task.fields[loss]:.4f}  {task.fields[rate]} tok/s  "
                    "{task.fields[left]} left"
                ),
                transient=True,
                refresh_per_second=4,
            )
            self.task = self.rich.add_task(
                "", total=1.0, step=0, loss=float("nan"), rate="-", left="-"
            )

    def say(self, line: str) -> None:
        print(line, flush=True)

    def show(self, clock: Clock, loss: float, rate: float | None) -> None:
        left_s = clock.remaining_s()
        left = "-" if left_s is None else f"{left_s:.0f} s"
        speed = "-" if rate is None else f"{rate:,.0f}"
        if self.rich:
            self.rich.start()
            self.rich.update(
                self.task,
                completed=clock.progress,
                step=clock.steps,
                loss=loss,
                rate=speed,
                left=left,
            )
        elif clock.progress >= self.next_line:
            self.next_line = clock.progress + 1 / self.LINES
            print(
                f"step {clock.steps:>6} | {clock.progress:>4.0%} | loss {loss:.4f} | "
                f"{speed} tok/s | {left} left",
                flush=True,
            )

    def close(self) -> None:
        if self.rich:
            self.rich.stop()
