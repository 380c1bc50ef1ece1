"""The other number: bits per byte of the assistant's turns in conversations never tuned on.

chat_bpb = nats of the assistant's tokens / (ln 2 * UTF-8 bytes of its turns). Every conversation is
rendered alone (conversation.py). Special tokens have no bytes and are left out of both sums. A
conversation longer than the model's window is seen in windows that move by half of it, so each
token is a target once, with at least half a window before it.

Covered and not covered: as in ruler.py, whose arithmetic and probes these windows go through; that
every byte of a turn is scored once is asserted here too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from nightshift.fixed import conversation
from nightshift.fixed.ruler import Invalid, Windows
from nightshift.fixed.tasks import Chat
from nightshift.fixed.tokenizer import Tokenizer

Z = 1.96  # two-sided 95 %
NARROWEST = 32  # tokens; most conversations are shorter than half a window


@dataclass(frozen=True)
class Scored:
    """Nats and bytes of the assistant's turns, for each conversation."""

    nats: np.ndarray
    num_bytes: np.ndarray

    @property
    def bpb(self) -> float:
        return float(self.nats.sum() / log(2) / self.num_bytes.sum())

    def interval(self, nats: np.ndarray | None = None) -> float:
        """Half of the 95 % interval of a ratio of sums over independent conversations."""
        nats = self.nats if nats is None else nats
        residuals = nats - nats.sum() / self.num_bytes.sum() * self.num_bytes
        count = len(nats)
        spread = sqrt(float((residuals**2).sum()) * count / max(1, count - 1))
        return Z * spread / float(self.num_bytes.sum()) / log(2)


@dataclass(frozen=True)
class ChatWindows(Windows):
    """Windows of one width, each from one conversation."""

    owner: np.ndarray  # int64 (N,): which conversation


def bytes_said(chats: Sequence[Chat]) -> np.ndarray:
    """UTF-8 bytes of the assistant's turns of each, float64."""
    said = [[m["content"] for m in chat.messages if m["role"] == "assistant"] for chat in chats]
    return np.array([sum(len(text.encode()) for text in turns) for turns in said], dtype=np.float64)


def windows(
    tokens: list[int], mask: list[bool], T: int, num_plain: int
) -> Iterable[tuple[int, list[int]]]:
    """(start, which targets of the window are counted) such that every target is seen once."""
    start = done = 0
    while done < len(tokens) - 1:
        end = min(start + T, len(tokens) - 1)
        places = [i for i in range(done, end) if mask[i + 1] and tokens[i + 1] < num_plain]
        if places:
            yield start, [i - start for i in places]
        done, start = end, start + max(1, T // 2)


def cut_chats(chats: Sequence[Chat], tokenizer: Tokenizer, seq_len: int) -> list[ChatWindows]:
    """A group for each width: NARROWEST, twice that, ..., seq_len. Raises Invalid unless every byte
    of the assistant's is a byte of exactly one target."""
    rows: dict[int, list[tuple[list[int], list[int], int]]] = {}
    for number, chat in enumerate(chats):
        tokens, mask = conversation.render(chat.messages, tokenizer)
        for start, counted in windows(tokens, mask, seq_len, len(tokenizer.ranks)):
            piece = tokens[start : start + max(counted) + 2]
            rows.setdefault(width_for(len(piece) - 1, seq_len), []).append((piece, counted, number))
    sizes = tokenizer.token_bytes().astype(np.int64)
    groups = [grouped(rows[width], width, sizes) for width in sorted(rows)]
    found, wanted = sum(group.num_bytes for group in groups), int(bytes_said(chats).sum())
    if found != wanted:
        raise Invalid(f"{found} bytes were scored, the assistant's turns have {wanted}")
    return groups


def width_for(length: int, seq_len: int) -> int:
    width = min(NARROWEST, seq_len)
    while width < length:
        width = min(2 * width, seq_len)
    return width


def grouped(rows: list, width: int, sizes: np.ndarray) -> ChatWindows:
    """`sizes`: bytes of each token of the vocabulary."""
    inputs = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), -1, dtype=np.int64)
    for row, (piece, counted, _) in enumerate(rows):
        inputs[row, : len(piece) - 1] = piece[:-1]
        targets[row, counted] = [piece[i + 1] for i in counted]
    counts = sizes[targets.clip(min=0)] * (targets >= 0)
    owner = np.array([number for _, _, number in rows], dtype=np.int64)
    return ChatWindows(inputs, targets, counts, int(counts.sum()), owner)


def scored(
    nats: Sequence[np.ndarray], groups: Sequence[ChatWindows], chats: Sequence[Chat]
) -> Scored:
    """Nats of the windows, summed in float64 for each conversation."""
    total = np.zeros(len(chats))
    for group_nats, group in zip(nats, groups, strict=True):
        np.add.at(total, group.owner, (group_nats.astype(np.float64) * group.scored).sum(axis=1))
    return Scored(total, bytes_said(chats))
