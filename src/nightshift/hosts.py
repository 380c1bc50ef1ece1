"""Loaded models, each with a thread of its own that generates for everybody who asks.

All requests to one model share one batch: a row joins at any step, and leaves when it is done or
its client is gone. At most MAX_ROWS rows run, the rest wait in line, and beyond MAX_WAITING a
request is refused. At most `keep` models stay loaded: the one asked longest ago makes room.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nightshift import catalogue
from nightshift.catalogue import Entry
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.generate import Engine, Piece, Sampling
from nightshift.openai_api import ApiError, TokenLogprob

MAX_ROWS = 64
MAX_WAITING = 512


class Closed(Exception):
    """The model made room for another between asking for it and using it: ask again."""


@dataclass(frozen=True)
class Said:
    """A piece with the log probabilities that its request wanted."""

    piece: Piece
    logprob: TokenLogprob | None = None


class Ticket:
    """One row, as its request sees it: an asynchronous stream of `Said`."""

    def __init__(self, host: "Host", prompt: list[int], sampling: Sampling, top: int | None):
        self.host, self.prompt, self.sampling, self.top = host, prompt, sampling, top
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Said | Exception] = asyncio.Queue()
        self.is_cancelled = False

    async def stream(self) -> AsyncIterator[Said]:
        """Ends after the piece with `finish`. Raises ApiError if the model fails."""
        try:
            while True:
                said = await self.queue.get()
                if isinstance(said, Exception):
                    raise ApiError(500, f"The model failed: {said}") from None
                yield said
                if said.piece.finish:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Its row ends before the next step; a row that is done stays done."""
        self.is_cancelled = True
        self.host.wake()


class Recorder:
    """Stands between a batch and its model, and keeps the last logits for those who want them."""

    def __init__(self, inner):
        self.inner = inner
        self.rows, self.logits_BV = [], None

    def logits(self, rows) -> torch.Tensor:
        self.rows, self.logits_BV = [row.number for row in rows], self.inner.logits(rows)
        return self.logits_BV

    def logprobs(self, number: int) -> torch.Tensor:
        """(V,)"""
        return torch.log_softmax(self.logits_BV[self.rows.index(number)].float(), dim=-1).cpu()


class Host:
    """One model. Construct it in a thread: loading takes seconds."""

    def __init__(self, entry: Entry, device: torch.device, root: Path = ROOT):
        self.entry = entry
        model, self.tokenizer, _ = catalogue.load(entry.folder, device, root)
        if device.type == "cuda":  # on a CPU float32: the cached answer is the uncached one
            model.dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        self.engine = Engine(model, self.tokenizer)
        self.seq_len = self.engine.seq_len
        self.waiting: deque[Ticket] = deque()
        self.running: dict[int, Ticket] = {}
        self.changed = threading.Condition()
        self.is_closed = False
        self.num_steps = 0
        self.batch = self._new_batch()
        self.thread = threading.Thread(target=self._work, name=f"host {entry.name}", daemon=True)
        self.thread.start()

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, prompts: list[list[int]], samplings: list[Sampling], top: int | None):
        """A ticket for each prompt. Raises ApiError when too many wait, Closed after `close`."""
        with self.changed:
            if self.is_closed:
                raise Closed
            if len(self.waiting) + len(prompts) > MAX_WAITING:
                raise ApiError(503, "The server is busy. Try again later.", code="overloaded")
            tickets = [
                Ticket(self, prompt, sampling, top)
                for prompt, sampling in zip(prompts, samplings, strict=True)
            ]
            self.waiting.extend(tickets)
            self.changed.notify()
        return tickets

    def wake(self) -> None:
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """Ends the thread; requests that are still open get an error."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()

    def _new_batch(self):
        batch = self.engine.batch()
        batch.ways = Recorder(batch.ways)
        return batch

    def _work(self) -> None:
        while self._admit():
            try:
                said = self._said(self.batch.step())
            except RuntimeError as error:  # the weights are broken, or memory is short
                self._fail(error)
                continue
            self.num_steps += 1
            self._deliver(said)
        self._fail(RuntimeError("it was unloaded, or the server stops"))

    def _admit(self) -> bool:
        """Waits for work, drops rows whose client is gone, lets others in; False: closed."""
        with self.changed:
            while not self.is_closed:
                self._drop_cancelled()
                while self.waiting and len(self.running) < MAX_ROWS:
                    ticket = self.waiting.popleft()
                    self.running[self.batch.add(ticket.prompt, ticket.sampling)] = ticket
                if self.running:
                    return True
                self.changed.wait()
        return False

    def _drop_cancelled(self) -> None:
        gone = [number for number, ticket in self.running.items() if ticket.is_cancelled]
        for number in gone:
            self.batch.drop(number)
            del self.running[number]
        self.waiting = deque(ticket for ticket in self.waiting if not ticket.is_cancelled)

    def _said(self, pieces: list[Piece]) -> list[tuple[Ticket, Said]]:
        found = []
        for piece in pieces:
            ticket = self.running.pop(piece.row) if piece.finish else self.running[piece.row]
            found.append((ticket, Said(piece, self._logprob(ticket, piece))))
        return found

    def _logprob(self, ticket: Ticket, piece: Piece) -> TokenLogprob | None:
        """Null where none is wanted, and for the special token that ends an answer."""
        if ticket.top is None or piece.token >= len(self.tokenizer.ranks):
            return None
        logp_V = self.batch.ways.logprobs(piece.row)
        values, tokens = logp_V.topk(min(ticket.top, len(logp_V)))
        top = [
            (*self._token(token), value)
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        return TokenLogprob(*self._token(piece.token), float(logp_V[piece.token]), top)

    def _token(self, token: int) -> tuple[str, list[int]]:
        data = self.tokenizer.decode_bytes([token])
        return data.decode("utf-8", "replace"), list(data)

    def _deliver(self, said: list[tuple[Ticket, Said | Exception]]) -> None:
        """One call into each event loop for all of its tickets: a thread switch a step."""
        loops = {ticket.loop for ticket, _ in said}
        for loop in loops:
            mine = [(ticket, each) for ticket, each in said if ticket.loop is loop]
            _call(loop, lambda mine=mine: [ticket.queue.put_nowait(each) for ticket, each in mine])

    def _fail(self, error: Exception) -> None:
        with self.changed:
            tickets = [*self.running.values(), *self.waiting]
            self.running, self.waiting = {}, deque()
            self.batch = self._new_batch()
        self._deliver([(ticket, error) for ticket in tickets])


def _call(loop: asyncio.AbstractEventLoop, action: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(action)
    except RuntimeError:  # the loop is closed, and with it every client is gone
        pass


class Hosts:
    """The loaded models by name, in the order of their last use."""

    def __init__(self, default: Entry, device: torch.device, keep: int, root):
        self.default, self.device, self.keep, self.root = default, device, keep, root
        self.loaded: dict[str, Host] = {}
        self.lock = asyncio.Lock()

    def entry(self, name: str | None) -> Entry:
        """Looked up anew: the champion may have been trained again. Raises ApiError."""
        is_default = not name or name in ("default", self.default.name)
        try:
            return catalogue.find(self.default.name if is_default else name, self.root, paths=False)
        except ConfigError as error:
            if is_default:  # a folder that was given on the command line
                return self.default
            raise ApiError(404, str(error), "model", "model_not_found") from None

    async def get(self, name: str | None) -> Host:
        """Loads the model if it is not there, or was trained again since. Raises ApiError."""
        entry = await asyncio.to_thread(self.entry, name)
        async with self.lock:  # one load at a time: it takes memory twice
            host = self.loaded.pop(entry.name, None)
            if host is None or host.entry.created != entry.created:
                if host:
                    host.close()
                host = await self._load(entry)
            self.loaded[entry.name] = host
            self._make_room()
        return host

    async def _load(self, entry: Entry) -> Host:
        try:
            return await asyncio.to_thread(Host, entry, self.device, self.root)
        except (ConfigError, ValueError, OSError) as error:
            raise ApiError(500, f"{entry.name} cannot be loaded: {error}", "model") from None

    def _make_room(self) -> None:
        for name in list(self.loaded)[:-1]:
            if len(self.loaded) > self.keep and self.loaded[name].is_idle:
                self.loaded.pop(name).close()

    def close(self) -> None:
        for host in self.loaded.values():
            host.close()

    def join(self) -> None:
        """Waits until no thread is inside a model: torch ends badly when Python exits under it."""
        for host in self.loaded.values():
            host.thread.join(5)
