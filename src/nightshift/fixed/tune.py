"""One tuning of a trial, by the harness: as train.py, from a base and on packed conversations.

The candidate's process can read the base's checkpoint and the tokenizer; the rows come by the feed
(chat_feed.py). What it delivers must be tensors of the base's names and shapes.

    python -m nightshift.fixed.tune run=<folder with config.yaml> tree=<worktree>
"""

import sys
from pathlib import Path

from nightshift.fixed import candidate, train
from nightshift.fixed.chat_feed import ChatFeeder, chat_splits, data_digest
from nightshift.fixed.config import Config
from nightshift.fixed.packing import ensure_rows
from nightshift.fixed.result import TUNING_MODULES
from nightshift.fixed.tokenizer import Tokenizer


def conversations(config: Config, tree: Path) -> train.Given:
    base = Path(config.base)
    rows = ensure_rows(config, Tokenizer.load(base / "tokenizer"))
    return train.Given(
        tokenizer=base / "tokenizer",
        data_digest=data_digest(rows, base),
        batches=chat_splits(config, rows, tree, train.not_here),
        learn=candidate.tune,
        feeder=ChatFeeder,
        editable=TUNING_MODULES,
        base=base,
    )


if __name__ == "__main__":
    sys.exit(train.main(conversations, "tune"))
