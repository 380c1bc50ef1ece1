"""What a training run is fed: batches, dev windows and the clock, from this process or another.

`LocalFeed` is for a run that a person starts. In a study the candidate's process has a `RemoteFeed`
instead: it holds no data, no clock and no seed of the data order, but asks for each over a socket.
The other end is a `Feeder` in a process of the harness, which serves batches in its own order,
counts tokens and steps, keeps the time, and stops when the budget is spent.

Covered: the number of tokens and steps, the order of the data, the time. The clock runs from the
first batch at the latest: nothing can be learned before, for there is no text. Pauses (dev, saving)
are granted for PAUSE_FRAC of the budget in all, then time runs on; each dev window is shown
runtime.num_dev_points times at most; the weights must arrive soon after the last step. On a CPU the
time that the process computes while the clock stands still is bounded by what dev and saving need.
Not covered: what is done with a batch between its arrival and the next question. Under a budget in
seconds that time is paid for; under one in tokens or steps, agent/trial.py compares it with what
the baseline needs.

    asks: a letter and a number (int64)      answers
    B     next training micro batch          1 and uint16 (B, T + 1), or 0: there is no more
    D i   micro batch i of dev               1, rows (uint32), uint16 (rows, T + 1), or 0
    S P   start, pause the clock             state
    N E   next step begins, ends             state
    L     look                               state: progress, seconds (float64), steps, spent
    W n   weights are saved, n optimizer steps were made   state, after the file was taken over
"""

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed import machine
from nightshift.fixed.batches import Batches, ensure_tokens
from nightshift.fixed.budget import Clock
from nightshift.fixed.config import Config
from nightshift.fixed.sandbox import Child
from nightshift.fixed.store import read_manifest
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

BYTES_PER_TOKEN = 4  # about; turns runtime.dev_bytes into tokens
PAUSE_FRAC = 0.1  # of a budget in seconds
ASIDE_FRAC, ASIDE_S = 0.1, 0.5  # CPU time beside the clock: of that of the steps, and in seconds
LEAD = 2  # micro batches that the Trainer may fetch ahead
ASK = struct.Struct("<cq")
STATE = struct.Struct("<ddqB")


class EndOfData(Exception):
    """The budget is spent: there is no further batch."""


def dev_tokens(config: Config) -> int:
    return config.runtime.dev_bytes // BYTES_PER_TOKEN


class LocalFeed:
    """Data and clock in this process."""

    def __init__(self, config: Config):
        self.config, self.tokens = config, ensure_tokens(config)
        self.tokenizer = Tokenizer.load(ensure_tokenizer(config))
        self.data_digest = read_manifest(self.tokens)["digest"]
        self.clock = Clock(config.budget, config.train.batch_tokens)
        self.train, self.dev = splits(config, self.tokens)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Micro batch `index`: inputs and targets, int64 (B, T)."""
        return self.train.batch(index)

    def dev_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.dev.in_order(dev_tokens(self.config))

    def weights_saved(self, optimizer_steps: int) -> None:
        """Nobody waits for them here."""


def splits(config: Config, tokens: Path) -> tuple[Batches, Batches]:
    """The train and dev batches of a run."""
    shape = config.model.seq_len, config.train.micro_batch_size, config.seed
    return Batches(tokens, "train", *shape), Batches(tokens, "dev", *shape)


# ---- the candidate's end ----


class RemoteFeed:
    """Data and clock of the harness, asked for over a socket."""

    def __init__(self, sock: socket.socket, config: Config, tokenizer: Tokenizer, data_digest: str):
        self.line, self.config = Line(sock), config
        self.tokenizer, self.data_digest = tokenizer, data_digest
        self.clock = RemoteClock(self.line, config)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        self.line.ask(b"B", index)
        if not self.line.number("<B"):
            raise EndOfData
        return self._windows(self.config.train.micro_batch_size)

    def dev_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = 0
        while True:
            self.line.ask(b"D", index)
            if not self.line.number("<B"):
                return
            yield self._windows(self.line.number("<I"))
            index += 1

    def weights_saved(self, optimizer_steps: int) -> None:
        self.line.ask(b"W", optimizer_steps)
        self.line.read(STATE.size)

    def _windows(self, rows: int) -> tuple[Tensor, Tensor]:
        width = self.config.model.seq_len + 1
        data = np.frombuffer(self.line.read(rows * width * 2), dtype="<u2")
        windows = torch.from_numpy(data.astype(np.int64).reshape(rows, width))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class RemoteClock:
    """Looks like budget.Clock; the time is kept at the other end."""

    def __init__(self, line: "Line", config: Config):
        self.line, self.budget = line, config.budget
        self.tokens_per_step = config.train.batch_tokens
        self.steps, self.spent, self._progress, self._elapsed_s = 0, False, 0.0, 0.0

    def _say(self, letter: bytes) -> None:
        self.line.ask(letter)
        state = STATE.unpack(self.line.read(STATE.size))
        self._progress, self._elapsed_s, self.steps, self.spent = *state[:3], bool(state[3])

    def start(self) -> None:
        self._say(b"S")

    def stop(self) -> None:
        self._say(b"P")

    @contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()

    @property
    def progress(self) -> float:
        self._say(b"L")
        return self._progress

    @property
    def elapsed_s(self) -> float:
        self._say(b"L")
        return self._elapsed_s

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def begin_step(self) -> float:
        self._say(b"N")
        return self._progress

    def end_step(self) -> None:
        self._say(b"E")

    def remaining_s(self) -> float | None:
        progress = self._progress
        return self._elapsed_s * (1 - progress) / progress if progress > 0 else None

    def state(self) -> dict:
        """Nothing to resume from: the harness starts a run that was cut off anew."""
        return {"steps": self.steps, "elapsed_s": self._elapsed_s, "recorded": []}

    def save(self, folder: Path) -> None:
        """The harness records the progress of each step."""


class Line:
    """Fixed-size questions and answers over a stream socket."""

    def __init__(self, sock: socket.socket):
        self.sock = sock

    def ask(self, letter: bytes, number: int = 0) -> None:
        self.sock.sendall(ASK.pack(letter, number))

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError("the harness has ended the run")
            data += part
        return bytes(data)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]


# ---- the harness's end ----


class Broken(Exception):
    """The candidate broke a rule of the feed; the message says which."""


class Feeder:
    """Answers a candidate until it has delivered its weights and ended. Trusts no word of it."""

    def __init__(self, sock: socket.socket, config: Config, batches: tuple, take_over: Callable):
        """`batches`: of train and dev (`splits`)."""
        self.sock, self.config, self.take_over = sock, config, take_over
        self.clock = Clock(config.budget, config.train.batch_tokens)
        self.train, self.dev = batches
        self.micro = config.train.batch_tokens // config.tokens_per_micro_batch
        self.served = 0  # micro batches
        self.dev_parts: list | None = None
        self.dev_served: dict[int, int] = {}
        self.paused_at: float | None = None
        self.paused_s = self.longest_pause_s = 0.0
        self.started = self.delivered = False
        self.spent_at: float | None = None
        self.child: Child | None = None
        self.dev_tokens = 0  # served
        self.cpu_at = 0.0  # the tree's CPU time when `charge_cpu` was last called
        self.cpu_s = {"steps": 0.0, "aside": 0.0}  # while the clock ran; in pauses and at the end
        self.on_cpu = machine.pick_device(config.runtime).type == "cpu"
        self.in_seconds = config.budget.kind == "seconds"

    def run(self, child: Child) -> None:
        """Until the candidate hangs up or ends. Raises Broken."""
        self.sock.setblocking(True)
        self.child = child
        unread = b""
        while True:
            readable, _, _ = select.select([self.sock, child.pipe], [], [], 1.0)
            self._check_delivery()
            if self.sock in readable:
                data = self.sock.recv(ASK.size - len(unread))
                if not data:
                    return
                unread += data
                if len(unread) == ASK.size:
                    self._answer(*ASK.unpack(unread))
                    unread = b""
            elif child.pipe in readable and child.wait(0) is not None:
                return

    def _answer(self, letter: bytes, number: int) -> None:
        began = None
        match letter:
            case b"B":
                self._batch()
            case b"D":
                self._dev(number)
            case b"S":
                self._resume()
            case b"P":
                self._pause()
            case b"N":
                began = self.clock.begin_step()  # as it is recorded, and as a replay will see it
            case b"E":
                self.clock.end_step()
                if self.clock.spent and self.spent_at is None:
                    self.charge_cpu("steps")
                    self.spent_at = time.monotonic()
                    self.clock.stop()
            case b"L":
                pass
            case b"W":
                self._deliver(number)
            case _:
                raise Broken(f"training spoke out of turn ({letter!r} on the feed's socket)")
        if letter not in b"BD":
            clock = self.clock
            progress = clock.progress if began is None else began
            state = progress, clock.elapsed_s, clock.steps, clock.spent
            self._send(STATE.pack(*state))

    def _batch(self) -> None:
        if not self.started:
            self.cpu_at = self.child.cpu_s()
            self.clock.start()  # text is never looked at for free
            self.started = True
        self._resume()
        ahead = self.served - self.clock.steps * self.micro
        if self.clock.spent or ahead >= self.micro + LEAD:
            self._send(b"\0")
            return
        inputs, targets = self.train.batch(self.served)
        self.served += 1
        self._send(b"\1" + self.packed(inputs, targets))

    def _dev(self, index: int) -> None:
        if self.dev_parts is None:
            self.dev_parts = list(self.dev.in_order(dev_tokens(self.config)))
        shown = self.dev_served.get(index, 0)
        there = self.started and 0 <= index < len(self.dev_parts)
        if not there or shown >= self.config.runtime.num_dev_points:
            self._send(b"\0")
            return
        self.dev_served[index] = shown + 1
        self.dev_tokens += self.dev_parts[index][0].numel()
        inputs, targets = self.dev_parts[index]
        self._send(b"\1" + struct.pack("<I", len(inputs)) + self.packed(inputs, targets))

    def _resume(self) -> None:
        if self.paused_at is not None:
            self.charge_cpu("aside")
            pause = time.monotonic() - self.paused_at
            self.paused_s, self.paused_at = self.paused_s + pause, None
            self.longest_pause_s = max(self.longest_pause_s, pause)
            over = self.paused_s - self.pause_allowance_s
            if over > 0:
                self.clock.charge(min(over, pause))
                self.paused_s -= min(over, pause)
        if self.started and self.spent_at is None:
            self.clock.start()

    @property
    def pause_allowance_s(self) -> float:
        if self.in_seconds:
            return PAUSE_FRAC * self.config.budget.amount
        return 5.0 + 2.5 * PAUSE_FRAC * self.clock.elapsed_s

    def _pause(self) -> None:
        if self.started and self.paused_at is None and self.spent_at is None:
            self.charge_cpu("steps")
            self.clock.stop()
            self.paused_at = time.monotonic()

    def grace_s(self) -> float:
        """From the last step to the weights: a measurement on dev, and saving. On a CPU what is
        computed meanwhile is bounded too, so a busy machine may take its time."""
        step_s = self.clock.elapsed_s / max(1, self.clock.steps)
        return (20.0 if self.on_cpu else 4.0) + 3 * self.longest_pause_s + 10 * step_s

    def _check_delivery(self) -> None:
        if self.spent_at is None or self.delivered:
            return
        late = time.monotonic() - self.spent_at
        if late > self.grace_s():
            raise Broken(
                f"training went on after its budget: no weights {late:.1f} s after the last step "
                f"(allowed {self.grace_s():.1f} s). Do all work before progress 1"
            )

    def _deliver(self, optimizer_steps: int) -> None:
        self._check_delivery()
        steps = self.clock.steps
        if optimizer_steps > steps:
            raise Broken(
                f"the optimizer stepped {optimizer_steps} times in {steps} steps of the budget; "
                "one step for each batch of train.batch_tokens. Lower train.batch_tokens instead"
            )
        if steps and not optimizer_steps:
            raise Broken("the optimizer never stepped: nothing was learned from the data")
        self.charge_cpu("aside" if self.spent_at or self.paused_at else "steps")
        self._check_aside()
        if not self.delivered:
            self.take_over()
            self.delivered = True

    def charge_cpu(self, where: str) -> None:
        now = self.child.cpu_s()
        self.cpu_s[where] += now - self.cpu_at
        self.cpu_at = now

    def _check_aside(self) -> None:
        """What was computed while the clock stood still: dev, forward only, and saving."""
        steps, aside = self.cpu_s["steps"], self.cpu_s["aside"]
        forward = steps * self.dev_tokens / max(1, self.clock.tokens)  # as dear as a training step
        allowed = forward + ASIDE_FRAC * steps + ASIDE_S
        if self.on_cpu and aside > allowed:
            raise Broken(
                f"{aside:.1f} s of CPU time were used while the clock stood still (measuring dev "
                f"and saving may take {allowed:.1f} s here): what is learned must be paid for"
            )

    @staticmethod
    def packed(inputs: Tensor, targets: Tensor) -> bytes:
        """(B, T) and (B, T), one ahead -> uint16 (B, T + 1)."""
        windows = torch.cat([inputs, targets[:, -1:]], dim=1)
        return windows.numpy().astype("<u2").tobytes()

    def _send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is gone; `run` notices
