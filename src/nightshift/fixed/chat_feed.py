"""What a tuning run is fed: packed rows of conversations and the clock (feed.py has the protocol).

Rows are rendered and packed on the harness's side (conversation.py, packing.py). A candidate gets
the tokens of a micro batch and which of them are learned, in the harness's order; of the val
conversations it gets nothing, of the train conversations no more than the budget pays for.

Covered and not covered: as in feed.py. Questions of fixed/tasks.py follow simple patterns, and code
that makes such questions itself is knowledge that code carries: it is not found here.

    answers to B and D: uint16 tokens (B, T), then targets alike, SILENT where nothing is learned
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed import checkpoint, store
from nightshift.fixed.batches import Batches, CopiesOf, ensure_tokens
from nightshift.fixed.budget import Clock
from nightshift.fixed.config import ROOT, Config, digest
from nightshift.fixed.feed import Feeder, RemoteFeed, dev_tokens
from nightshift.fixed.packing import NOT_LEARNED, ChatBatches, ensure_rows
from nightshift.fixed.tokenizer import Tokenizer

SILENT = 65_535  # no token has this id: vocabularies are smaller


class LocalChatFeed:
    """Rows and clock in this process. `base`: the checkpoint folder that tuning begins from."""

    def __init__(self, config: Config, base: Path):
        self.config, self.tokenizer = config, Tokenizer.load(base / "tokenizer")
        rows = ensure_rows(config, self.tokenizer)
        self.data_digest = data_digest(rows, base)
        self.clock = Clock(config.budget, config.train.batch_tokens)
        self.train, self.dev = chat_splits(config, rows)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Micro batch `index`: inputs and targets, int64 (B, T); NOT_LEARNED where silent."""
        return self.train.batch(index)

    def dev_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.dev.in_order(dev_tokens(self.config)))

    def weights_saved(self, optimizer_steps: int) -> None:
        """Nobody waits for them here."""


def chat_splits(
    config: Config, rows: Path, tree: Path = ROOT, copies_of: CopiesOf | None = None
) -> tuple[ChatBatches, ChatBatches]:
    """The train and dev rows of a run; a share of the train rows is pretraining text."""
    shape = config.model.seq_len, config.train.micro_batch_size, config.seed
    frac, text = config.sft.text_frac, None
    if frac:
        text = Batches(ensure_tokens(config, tree, copies_of), "train", *shape)
    return ChatBatches(rows, "train", *shape, text, frac), ChatBatches(rows, "dev", *shape)


def data_digest(rows: Path, base: Path) -> str:
    """Names what is learned from: the rows, and the weights that it begins with."""
    return digest([store.read_manifest(rows)["digest"], checkpoint.weights_sha256(base)])


class RemoteChatFeed(RemoteFeed):
    """The candidate's end."""

    def _windows(self, rows: int) -> tuple[Tensor, Tensor]:
        shape = 2, rows, self.config.model.seq_len
        data = np.frombuffer(self.line.read(2 * int(np.prod(shape))), dtype="<u2")
        inputs, targets = torch.from_numpy(data.astype(np.int64).reshape(shape))
        return inputs, targets.masked_fill(targets == SILENT, NOT_LEARNED)


class ChatFeeder(Feeder):
    """The harness's end."""

    @staticmethod
    def packed(inputs: Tensor, targets: Tensor) -> bytes:
        targets = targets.masked_fill(targets == NOT_LEARNED, SILENT)
        return torch.stack([inputs, targets]).numpy().astype("<u2").tobytes()
