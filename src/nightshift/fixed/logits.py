"""The model in a process of its own: token ids in, logits out, through memory that we own.

`ModelServer` starts the candidate's model in the sandbox. Ids and logits lie in one shared memory
of fixed size, sealed so that nobody can shrink it under the reader; the socket beside it carries
fixed-size questions and answers. Nothing that the server says is imported, unpickled or executed:
an answer is a status byte, a number and a message, which is quoted as data.

Covered: wrong shapes, exceptions, death, silence and lies about memory become an exception here,
never a number; logits that the server did not write are NaN (one column is poisoned beforehand).
Not covered: the model may spend the evaluation's time limit, and no more.
On a GPU logits pass through host memory as well: CUDA's memory handles do not cross pid namespaces.

    asks: a letter and a number (int64)      answers: status, float64, length, message
    L n   logits of the first n & 0xffffffff rows, n >> 32 tokens of each
                                             0 ok, 1 error, 2 out of memory
    U s   from now on with untrained weights of seed s; the number is their correlation with
          those of the U before
"""

import mmap
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed.ruler import Invalid
from nightshift.fixed.sandbox import Child, Sandbox, spawn

ASK = struct.Struct("<cq")
ANSWER = struct.Struct("<BdH")
OK, ERROR, OUT_OF_MEMORY = 0, 1, 2
MAX_MESSAGE = 300
MAX_BUFFER_BYTES = 1 << 30  # of logits; larger batches are cut down to it
F_ADD_SEALS, SEAL_SEAL, SEAL_SHRINK, SEAL_GROW = 1033, 1, 2, 4


class Failed(Exception):
    """The server did not answer; `status` is a status of a result."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


class OutOfMemory(Exception):
    """The batch was too large for the model's process."""


class Shared:
    """Ids int64 (B, T) and logits float32 (B, T, V) in one memory."""

    def __init__(self, descriptor: int, shape: tuple[int, int, int]):
        rows, seq_len, vocab_size = shape
        self.descriptor, self.shape = descriptor, shape
        self.memory = mmap.mmap(descriptor, Shared.size(shape))
        ids = rows * seq_len
        self.ids = np.frombuffer(self.memory, np.int64, ids).reshape(rows, seq_len)
        flat = torch.frombuffer(
            self.memory, dtype=torch.float32, count=ids * vocab_size, offset=8 * ids
        )
        self.logits = flat.view(rows, seq_len, vocab_size)

    @staticmethod
    def size(shape: tuple[int, int, int]) -> int:
        rows, seq_len, vocab_size = shape
        return rows * seq_len * (8 + 4 * vocab_size)

    @classmethod
    def create(cls, shape: tuple[int, int, int]) -> "Shared":
        """Ours. Not inherited by forks: the second server must not see what the first is shown."""
        made = cls(_sealed_memory(cls.size(shape)), shape)
        if hasattr(mmap, "MADV_DONTFORK"):
            made.memory.madvise(mmap.MADV_DONTFORK)
        return made


def _sealed_memory(size: int) -> int:
    """A descriptor. Raises MemoryError."""
    try:
        if hasattr(os, "memfd_create"):
            import fcntl

            descriptor = os.memfd_create("nightshift", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_SEAL)
            return descriptor
        with tempfile.TemporaryFile() as file:  # no memfd on macOS
            os.ftruncate(file.fileno(), size)
            return os.dup(file.fileno())
    except OSError as error:
        raise MemoryError(f"no {size / 1e6:.0f} MB for logits: {error}") from None


def rows_that_fit(batch_size: int, seq_len: int, vocab_size: int) -> int:
    return max(1, min(batch_size, MAX_BUFFER_BYTES // (4 * seq_len * vocab_size)))


class ModelServer:
    """Our end. `loader` builds the model in the sandbox: () -> (model, device, untrained)."""

    def __init__(
        self, sandbox: Sandbox, loader: Callable, shape: tuple[int, int, int], deadline: float
    ):
        self.deadline, self.shared = deadline, Shared.create(shape)
        self.sock, theirs = socket.socketpair()
        self.waited_s = 0.0
        descriptors = theirs.fileno(), self.shared.descriptor
        self.child: Child = spawn(
            sandbox, lambda: serve(loader, *descriptors, shape), fds=descriptors
        )
        theirs.close()

    def ready(self) -> None:
        """Returns when the model is built. Raises Failed."""
        self._answer()

    def logits(self, ids: np.ndarray) -> Tensor:
        """(B, T) -> (B, T, V): a view of shared memory; copy before use. Raises Failed, Invalid.

        B and T are at most those of the shape."""
        rows, width = ids.shape
        self.shared.ids[:rows, :width] = ids
        self.shared.logits[:rows, :width, 0] = torch.nan
        started = time.monotonic()
        self.sock.sendall(ASK.pack(b"L", rows | width << 32))
        self._answer()
        self.waited_s += time.monotonic() - started
        return self.shared.logits[:rows, :width]

    def untrained(self, seed: int) -> float:
        """Switch to fresh weights; their correlation with those of the call before (0 at first)."""
        self.sock.sendall(ASK.pack(b"U", seed))
        return self._answer()

    def close(self) -> None:
        self.child.kill()
        self.sock.close()

    def _answer(self) -> float:
        status, value, length = ANSWER.unpack(self._read(ANSWER.size))
        message = self._read(min(length, MAX_MESSAGE)).decode("utf-8", "replace")
        if status == OUT_OF_MEMORY:
            raise OutOfMemory(message)
        if status != OK:
            raise Failed("crash", f"the model failed while it was scored: {message}")
        return value

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self.sock.settimeout(max(0.01, self.deadline - time.monotonic()))
            try:
                part = self.sock.recv(size - len(data))
            except TimeoutError:
                raise Failed(
                    "timeout", "the model did not answer within evaluate.limit_s"
                ) from None
            except ConnectionError:
                part = b""
            if not part:
                raise self._died()
            data += part
        return bytes(data)

    def _died(self) -> Exception:
        report = self.child.wait(5.0) or self.child.kill()
        if report.killed and report.killed.startswith("memory"):
            return OutOfMemory(report.killed)
        if report.killed:
            return Failed("invalid", f"the model's process was killed: {report.killed}")
        return Failed("crash", f"the model's process ended (exit status {report.exit})")


# ---- the other end: inside the sandbox ----


def serve(loader: Callable, sock_fd: int, memory_fd: int, shape: tuple[int, int, int]) -> None:
    sock = socket.socket(fileno=sock_fd)
    try:
        model, device, untrained = loader()
        shared = Shared(memory_fd, shape)
    except Exception as error:
        _reply(sock, error)
        return
    _reply(sock, None)
    while question := sock.recv(ASK.size, socket.MSG_WAITALL):
        letter, number = ASK.unpack(question)
        value = 0.0
        try:
            if letter == b"U":
                model, value = untrained(number)
            else:
                _forward(model, shared, number & 0xFFFFFFFF, number >> 32, device)
            _reply(sock, None, value)
        except Exception as error:
            _reply(sock, error)


@torch.inference_mode()
def _forward(model, shared: Shared, rows: int, width: int, device: torch.device) -> None:
    ids = torch.from_numpy(shared.ids[:rows, :width].copy()).to(device)
    logits = model(ids)
    wanted = (rows, width, shared.shape[2])
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Invalid(f"forward returned {found}; it must return logits of shape {wanted}")
    shared.logits[:rows, :width].copy_(logits)


def _reply(sock: socket.socket, error: Exception | None, value: float = 0.0) -> None:
    status, message = OK, b""
    if error is not None:
        short = " ".join(f"{type(error).__name__}: {error}".split())
        message = short.encode("utf-8", "replace")[:MAX_MESSAGE]
        status = OUT_OF_MEMORY if is_out_of_memory(error) else ERROR
        print(short[:2000], file=sys.stderr)
    sock.sendall(ANSWER.pack(status, value, len(message)) + message)


def is_out_of_memory(error: BaseException) -> bool:
    words = "can't allocate memory", "not enough memory"  # torch has no class for it on a CPU
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        word in str(error) for word in words
    )


@torch.no_grad()
def correlation(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Of the parameters of two models of one shape, each tensor about its own mean."""
    products, squares = 0.0, [0.0, 0.0]
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        a, b = (p.double() - p.double().mean() for p in (a, b))
        products += float((a * b).sum())
        squares = [squares[0] + float((a * a).sum()), squares[1] + float((b * b).sum())]
    size = (squares[0] * squares[1]) ** 0.5
    return products / size if size else 1.0


def load_model(tree: Path, folder: Path, values: dict, vocab_size: int) -> tuple:
    """Inside the sandbox: the tree's model with the weights of a checkpoint folder."""
    from nightshift.fixed.candidate import become

    become(tree)
    from nightshift.fixed import checkpoint, machine
    from nightshift.fixed.config import check
    from nightshift.model import GPT

    config = check(values)
    device = machine.pick_device(config.runtime)
    machine.prepare(config.runtime, device)

    def build(seed: int):
        torch.manual_seed(seed)
        model = GPT(config.model, vocab_size)
        model.dtype = machine.ruler_dtype(device, config.train)
        return model.to(device).eval()

    before: list = []

    def untrained(seed: int):
        model = build(seed)
        alike = correlation(model, before[-1]) if before else 0.0
        before[:] = [model]
        return model, alike

    model = build(config.seed)
    checkpoint.load_weights(model, folder)
    return model, device, untrained
