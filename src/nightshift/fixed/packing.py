"""Conversations -> rows of fixed length, and which tokens of them are learned: the assistant's.

Each conversation goes whole into the fullest row that has room, in the order of a hash, so that a
row holds long and short ones of all sources. One that is longer than a row is cut at its end, and
left out if nothing of the assistant's is left. What remains of a row is filled up. Conversations in
one row see those before them, as documents do in pretraining.

The folder: `<split>.bin` (uint16, row after row), `<split>.mask` (uint8, alike), manifest.json.

B rows of a batch, T time
"""

import bisect
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed import chats, conversation, store
from nightshift.fixed import config as knobs
from nightshift.fixed.batches import Batches
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.tokenizer import Tokenizer

FORMAT = 1
NOT_LEARNED = -100  # as a target: what torch's cross entropy leaves out

Rendered = tuple[list[int], list[bool]]


def ensure_rows(config: Config, tokenizer: Tokenizer) -> Path:
    """The train and dev conversations as packed rows."""
    talks = chats.ensure_chats(config)
    digest, row_len = store.read_manifest(talks)["digest"], config.model.seq_len + 1
    key = knobs.digest([FORMAT, digest, tokenizer.digest(), row_len])

    def build(folder: Path) -> None:
        facts = {}
        for split in ("train", "dev"):
            rendered = (
                conversation.render(chat.messages, tokenizer)
                for chat in store.progress(chats.read_chats(talks, split), split, lambda _: 0)
            )
            facts[split] = write_rows(folder, split, rendered, row_len, tokenizer.bos)
        whole = knobs.digest([facts[split] for split in facts])
        store.write_manifest(folder, key, digest=whole, chats_digest=digest, splits=facts)

    return store.ensure("chat_rows", key, build, config)


def write_rows(
    folder: Path, split: str, rendered: Iterable[Rendered], row_len: int, filler: int
) -> dict[str, int | str]:
    tokens, mask, facts = pack(rendered, row_len, filler)
    if not len(tokens):
        raise ConfigError(
            f"conversations: no {split} conversation says anything in its first {row_len} tokens. "
            "Raise model.seq_len of the base, or use other conversations"
        )
    (folder / f"{split}.bin").write_bytes(tokens.astype("<u2").tobytes())
    (folder / f"{split}.mask").write_bytes(mask.astype(np.uint8).tobytes())
    return facts | {"sha256": store.sha256_file(folder / f"{split}.bin")}


def pack(
    rendered: Iterable[Rendered], row_len: int, filler: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(tokens (N, row_len) uint16, mask alike bool, counts)."""
    facts = {"conversations": 0, "cut": 0, "left_out": 0}
    usable: list[Rendered] = []
    for tokens, mask in rendered:
        facts["cut"] += len(tokens) > row_len
        if any(mask[:row_len]):
            usable.append((tokens[:row_len], mask[:row_len]))
        else:
            facts["left_out"] += 1
    facts["conversations"] = len(usable)
    rows = best_fit([len(tokens) for tokens, _ in usable], row_len)
    packed = np.full((len(rows), row_len), filler, dtype=np.uint16)
    learned = np.zeros((len(rows), row_len), dtype=bool)
    for number, row in enumerate(rows):
        end = 0
        for which in row:
            tokens, mask = usable[which]
            packed[number, end : end + len(tokens)] = tokens
            learned[number, end : end + len(tokens)] = mask
            end += len(tokens)
    facts |= {"rows": len(rows), "learned_tokens": int(learned.sum())}
    return packed, learned, facts


def best_fit(lengths: list[int], row_len: int) -> list[list[int]]:
    """Which items go into which row; each item into the fullest row that has room."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free, row), sorted
    for which, length in enumerate(lengths):
        place = bisect.bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            rows.append([])
            free, row = row_len, len(rows) - 1
        else:
            free, row = open_rows.pop(place)
        rows[row].append(which)
        if free > length:
            bisect.insort(open_rows, (free - length, row))
    return rows


class ChatBatches:
    """Micro-batches of packed rows, in an order that follows from the seed: any at any time.

    An epoch is a permutation of the rows. With `text`, a share of the rows is pretraining text, all
    of which is learned.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        seq_len: int,
        micro_batch_size: int,
        seed: int,
        text: Batches | None = None,
        text_frac: float = 0.0,
    ):
        shape = (-1, seq_len + 1)
        self.tokens = np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r").reshape(shape)
        self.mask = np.memmap(folder / f"{split}.mask", dtype=np.uint8, mode="r").reshape(shape)
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self.text, self.text_frac = text, text_frac

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """x, y int64 (B, T), y one ahead of x and NOT_LEARNED where the assistant is silent."""
        size = self.micro_batch_size
        first, last = (self._chat_rows_before(i * size) for i in (index, index + 1))
        x, y = self.rows(self._order(np.arange(first, last)))
        missing = size - (last - first)
        if missing and self.text is not None:
            text_x, text_y = self.text.batch(index)
            x, y = torch.cat((x, text_x[:missing])), torch.cat((y, text_y[:missing]))
        return x, y

    def rows(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.tokens[which].astype(np.int64))
        learned = torch.from_numpy(self.mask[which].astype(bool))
        targets = tokens[:, 1:].masked_fill(~learned[:, 1:], NOT_LEARNED)
        return tokens[:, :-1].contiguous(), targets.contiguous()

    def in_order(self, max_tokens: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches over the rows once; with `max_tokens`, rows spread evenly over them."""
        total = len(self.tokens)
        wanted = total if max_tokens is None else max(1, max_tokens // self.tokens.shape[1])
        count = min(total, wanted)
        which = np.arange(count) * total // count
        size = self.micro_batch_size
        return [self.rows(which[first : first + size]) for first in range(0, count, size)]

    def _chat_rows_before(self, row: int) -> int:
        """How many of the first `row` rows are chats; the others are text, evenly spread."""
        return row - int(row * self.text_frac)

    def _order(self, samples: np.ndarray) -> np.ndarray:
        epochs, positions = np.divmod(samples, len(self.tokens))
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, int(epoch)]).permutation(len(self.tokens))
            rows[epochs == epoch] = order[positions[epochs == epoch]]
        return rows
