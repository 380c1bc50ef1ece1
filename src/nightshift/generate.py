"""Generation with a KV cache: many texts at once, each with its own settings, streamed.

    engine = Engine(model, tokenizer)
    for pieces in engine.stream([tokens], Sampling(max_tokens=64, seed=1)):
        print(pieces[0].text, end="")

`Engine.batch()` gives rows that come and go at any step (a server's way); `stream` and `generate`
are loops around it.

The cache only saves time: without it the model computes the whole window anew for each token, and
the tokens are the same. A model whose edited code does not stand a cache (it mixes positions in
another way) is found out by a comparison when the engine is made and runs without one.
In float32 the two ways agree to rounding (about 1e-6 of a logit), so a token differs only where two
candidates tie to that precision; in bf16 they agree to about 1e-2, and ties are common.

A text longer than the model's seq_len goes on in a sliding window: its first tokens are forgotten a
quarter of seq_len at a time, and what is left is computed anew at positions from 0 on.

B rows, T time, V vocabulary.
"""

import codecs
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nightshift.fixed.tokenizer import Tokenizer
from nightshift.kv_cache import Cache
from nightshift.model import GPT
from nightshift.sampling import Sampling, choose

MAX_LOGITS = 1 << 27  # of one forward pass over whole windows: 512 MB in float32
PROBE_STEPS = 3  # tokens that are decoded when the cache is compared with the full forward pass
PROBE_TOLERANCE = 1e-3  # of a logit


@dataclass(frozen=True)
class Piece:
    """What one step gives to one row."""

    row: int
    token: int  # the last one may be a stop token
    text: str  # what can be shown now: whole characters, never the start of a stop text
    finish: str | None  # null: goes on; stop: stop token or text; length: max_tokens


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # with the stop token
    text: str
    finish: str


class TextStream:
    """Tokens -> text that can be shown. Bytes of half a character wait for the other half; bytes
    that can become no character are U+FFFD; half a character at the end is left out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False  # a stop text was met; nothing comes after it

    def push(self, token: int) -> str:
        if token < len(self.tokenizer.ranks):  # special tokens have no text
            self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        places = [place for text in self.stop if (place := self.held.find(text)) >= 0]
        if places:
            self.stopped = True
            shown, self.held = self.held[: min(places)], ""
            return shown
        return self._release(len(self.held) - self._start_of_a_stop())

    def end(self) -> str:
        return self._release(len(self.held))

    def _release(self, size: int) -> str:
        shown, self.held = self.held[:size], self.held[size:]
        return shown

    def _start_of_a_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max((len(text) for text in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(text.startswith(self.held[-size:]) for text in self.stop):
                return size
        return 0


@dataclass
class Row:
    """One text in the making."""

    number: int
    tokens: list[int]
    sampling: Sampling
    stop_tokens: frozenset[int]
    text: TextStream
    random: random.Random
    num_new: int = 0
    start: int = field(init=False, default=0)  # of the window that the model sees

    def add(self, token: int, seq_len: int) -> Piece:
        self.tokens.append(token)
        self.num_new += 1
        self.start = window_start(len(self.tokens), seq_len)
        if token in self.stop_tokens:
            return Piece(self.number, token, self.text.end(), "stop")
        shown = self.text.push(token)
        if self.text.stopped:
            return Piece(self.number, token, shown, "stop")
        if self.num_new >= self.sampling.max_tokens:
            return Piece(self.number, token, shown + self.text.end(), "length")
        return Piece(self.number, token, shown, None)

    @property
    def window(self) -> list[int]:
        return self.tokens[self.start :]


def window_start(length: int, seq_len: int) -> int:
    """Where the window of a text of `length` tokens begins; moves a quarter of seq_len at once."""
    stride = max(1, seq_len // 4)
    return -(-max(0, length - seq_len) // stride) * stride


class Recompute:
    """The next token's logits, with the whole window computed for each."""

    def __init__(self, model: GPT):
        self.model = model

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """(B, V), one for each row."""
        parts = []
        for part in whole_windows(self.model, rows):
            tokens_BT, lengths = padded(part, device_of(self.model))
            parts.append(last_of(self.model(tokens_BT), lengths))
        return torch.cat(parts)


class Cached:
    """The same logits; a row that stays in its window costs one token."""

    def __init__(self, model: GPT):
        self.model = model
        self.cache: Cache | None = None
        self.held: list[tuple[int, int]] = []  # (number, start) of the rows in the cache

    def logits(self, rows: Sequence[Row]) -> Tensor:
        by_key = {(row.number, row.start): row for row in rows}
        self._keep([key for key in self.held if key in by_key])
        found = {}
        if self.held:
            last = [by_key[key].tokens[-1] for key in self.held]
            logits_BV = self.cache.decode(
                self.model, torch.tensor(last, device=device_of(self.model))
            )
            found |= dict(zip(self.held, logits_BV, strict=True))
        new = [row for key, row in by_key.items() if key not in found]
        for part in whole_windows(self.model, new):
            found |= self._prefill(part)
        return torch.stack([found[row.number, row.start] for row in rows])

    def _keep(self, keys: list[tuple[int, int]]) -> None:
        if not keys:
            self.cache, self.held = None, []
        elif keys != self.held:
            self.cache.select([self.held.index(key) for key in keys])
            self.held = keys

    def _prefill(self, rows: Sequence[Row]) -> dict[tuple[int, int], Tensor]:
        tokens_BT, lengths = padded(rows, device_of(self.model))
        cache, logits_BTV = Cache.prefill(self.model, tokens_BT, lengths)
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        keys = [(row.number, row.start) for row in rows]
        self.held = self.held + keys
        return dict(zip(keys, last_of(logits_BTV, lengths), strict=True))


class Batch:
    """Rows in flight. One thread at a time may use it; an engine may have several batches."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self.ways = (Cached if engine.is_cached else Recompute)(engine.model)
        self.rows: dict[int, Row] = {}
        self.next_number = 0

    def add(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """Begins a row after these tokens; returns its number. Raises ValueError."""
        tokenizer, number = self.engine.tokenizer, self.next_number
        if not len(tokens):
            raise ValueError(f"prompt {number} is empty: begin with tokenizer.bos")
        if not all(0 <= token < tokenizer.vocab_size for token in tokens):
            raise ValueError(f"prompt {number}: tokens must be 0 to {tokenizer.vocab_size - 1}")
        stop = sampling.stop_tokens
        row = Row(
            number,
            list(tokens),
            sampling,
            frozenset(tokenizer.special.values() if stop is None else stop),
            TextStream(tokenizer, sampling.stop),
            random.Random(sampling.seed),
        )
        row.start = window_start(len(row.tokens), self.engine.seq_len)
        self.rows[number] = row
        self.next_number += 1
        return number

    def drop(self, number: int) -> None:
        """Ends a row early."""
        self.rows.pop(number, None)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One token for every row, in the order they were added; finished rows are gone."""
        rows = list(self.rows.values())
        if not rows:
            return []
        with self.engine.lock:
            logits_BV = self.ways.logits(rows)
        samplings, contexts = [row.sampling for row in rows], [row.tokens for row in rows]
        tokens = choose(logits_BV, samplings, contexts, [row.random.random() for row in rows])
        seq_len = self.engine.seq_len
        pieces = [row.add(token, seq_len) for row, token in zip(rows, tokens, strict=True)]
        for piece in pieces:
            if piece.finish:
                self.drop(piece.row)
        return pieces


class Engine:
    """A model ready to generate. `cache`: auto (compare first), or False (never)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, cache: bool | str = "auto"):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.seq_len = model.config.seq_len
        self.lock = threading.Lock()  # a cache hangs on the model during a forward pass
        # Why the model runs without a cache; null if it has one.
        self.why_uncached = "not wanted" if cache is False else self._compare()

    @property
    def is_cached(self) -> bool:
        return self.why_uncached is None

    def batch(self) -> Batch:
        return Batch(self)

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> Iterator[list[Piece]]:
        """The pieces of each step until every row is finished; `Piece.row` counts the prompts."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        batch = self.batch()
        for prompt, wanted in zip(prompts, samplings, strict=True):
            batch.add(prompt, wanted)
        while pieces := batch.step():
            yield pieces

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Completion]:
        """Whole texts, in the order of the prompts."""
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for step in self.stream(prompts, sampling):
            for piece in step:
                pieces[piece.row].append(piece)
        return [
            Completion([p.token for p in row], "".join(p.text for p in row), row[-1].finish)
            for row in pieces
        ]

    @torch.inference_mode()
    def _compare(self) -> str | None:
        """Cached against full forward pass on made-up tokens, in float32; null if they agree."""
        dtype, self.model.dtype = self.model.dtype, torch.float32
        try:
            moved = probe(self.model, self.tokenizer.vocab_size, self.seq_len)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"the model has no place for a cache ({type(error).__name__}: {error})"
        finally:
            self.model.dtype = dtype
        if not moved <= PROBE_TOLERANCE:
            return f"cached logits are off by {moved:.3g}: the model mixes positions in its own way"
        return None


def probe(model: GPT, vocab_size: int, seq_len: int) -> float:
    """The largest difference of a logit: a row that fills the window beside one of two tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, seq_len - PROBE_STEPS), min(2, max(1, seq_len - PROBE_STEPS))]
    total = [min(seq_len, length + PROBE_STEPS) for length in lengths]
    rows = [torch.randint(0, vocab_size, (n,), generator=generator) for n in total]
    rows = [row.to(device_of(model)) for row in rows]
    whole = [model(row[None])[0] for row in rows]
    cache, logits_BTV = Cache.prefill(model, rows[0][None, : lengths[0]], lengths[:1])
    short, short_logits_BTV = Cache.prefill(model, rows[1][None, : lengths[1]], lengths[1:])
    moved = [logits_BTV[0] - whole[0][: lengths[0]], short_logits_BTV[0] - whole[1][: lengths[1]]]
    cache.join(short)
    for step in range(min(t - n for t, n in zip(total, lengths, strict=True))):
        places = [length + step for length in lengths]
        tokens_B = torch.stack([row[place] for row, place in zip(rows, places, strict=True)])
        logits_BV = cache.decode(model, tokens_B)
        moved += [logits_BV[b] - whole[b][places[b]] for b in (0, 1)]
    return max(float(difference.abs().max()) for difference in moved)


def whole_windows(model: GPT, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in groups, such that a forward pass over their windows fits in memory."""
    group: list[Row] = []
    for row in rows:
        longest = max(len(r.window) for r in [*group, row])
        if group and (len(group) + 1) * longest * model.embed.num_embeddings > MAX_LOGITS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, list[int]]:
    """(tokens (B, T) filled up on the right, lengths). What is on the right of a causal model's
    last token cannot reach it."""
    windows = [row.window for row in rows]
    return padded_tokens(windows).to(device), [len(window) for window in windows]


def padded_tokens(texts: Sequence[Sequence[int]]) -> Tensor:
    tokens_BT = torch.zeros(len(texts), max(len(text) for text in texts), dtype=torch.long)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = torch.tensor(text)
    return tokens_BT


def last_of(logits_BTV: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits (B, V) after the last token of each row."""
    return logits_BTV[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def device_of(model: GPT) -> torch.device:
    return next(model.parameters()).device
