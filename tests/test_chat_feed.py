"""The feed of a tuning: rows and masks cross unchanged, and nothing of val is among them."""

import socket
import threading

import pytest
import torch
from chat_tiny import chat_config, untrained_base
from test_feed import Still

from nightshift import sft
from nightshift.fixed import chats, conversation
from nightshift.fixed.chat_feed import ChatFeeder, LocalChatFeed, RemoteChatFeed, chat_splits
from nightshift.fixed.feed import Broken
from nightshift.fixed.packing import NOT_LEARNED, ensure_rows

STEPS = 4


@pytest.fixture(scope="module")
def tuning(tmp_path_factory):
    """(config of a tuning run, its base's checkpoint folder)."""
    place = tmp_path_factory.mktemp("feed")
    base = untrained_base(place)
    changes = {"base": str(base), "sft_budget.amount": float(STEPS), "sft.text_frac": 0.3}
    return sft.for_run(chat_config(place, **changes)), base / "checkpoint"


class Pair:
    def __init__(self, config, base):
        self.local = LocalChatFeed(config, base)
        ours, self.theirs = socket.socketpair()
        batches = chat_splits(config, ensure_rows(config, self.local.tokenizer))
        self.feeder, self.broken = ChatFeeder(ours, config, batches, lambda: None), None
        self.remote = RemoteChatFeed(self.theirs, config, self.local.tokenizer, "digest")
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        try:
            self.feeder.run(Still())
        except Broken as error:
            self.broken = str(error)
            self.feeder.sock.close()

    def end(self):
        self.theirs.close()
        self.thread.join(10)
        return self.broken


def test_rows_and_masks_arrive_as_in_a_process_of_one_s_own(tuning):
    pair = Pair(*tuning)
    learned = 0
    for index in range(3):
        mine, theirs = pair.remote.batch(index), pair.local.batch(index)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        learned += int((mine[1] != NOT_LEARNED).sum())
        assert mine[1].min() == NOT_LEARNED and mine[0].min() >= 0
        pair.remote.clock.begin_step()
        pair.remote.clock.end_step()
    assert learned > 0
    dev = list(zip(pair.remote.dev_batches(), pair.local.dev_batches(), strict=True))
    assert dev and all(torch.equal(a, b) for one in dev for a, b in zip(*one, strict=True))
    assert pair.end() is None


def test_nothing_that_is_fed_is_of_a_val_conversation(tuning):
    config, base = tuning
    feed, place = LocalChatFeed(config, base), chats.ensure_chats(config)
    fed = set()
    for index in range(len(feed.train.tokens) // 4 + 1):
        fed |= {tuple(row) for row in feed.batch(index)[0].tolist()}
    for batch, _ in feed.dev_batches():
        fed |= {tuple(row) for row in batch.tolist()}
    text = "|".join(",".join(map(str, row)) for row in fed)
    start = feed.tokenizer.bos
    of = lambda split: [  # noqa: E731
        ",".join(map(str, conversation.render(chat.messages, feed.tokenizer)[0]))
        for chat in chats.read_chats(place, split)
    ]
    assert str(start) in text and sum(one in text for one in of("train")) > 20
    assert not any(one in text for one in of("val"))
