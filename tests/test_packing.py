"""Packed rows: nothing is lost, nothing is learned but the assistant's tokens."""

import random

import numpy as np
import pytest
import torch
from chat_tiny import chat_config

from nightshift.fixed import chats, conversation, store
from nightshift.fixed.config import ConfigError
from nightshift.fixed.packing import (
    NOT_LEARNED,
    ChatBatches,
    best_fit,
    ensure_rows,
    pack,
    write_rows,
)
from nightshift.fixed.tokenizer import Tokenizer


def rendered(count=50, longest=30, seed=0):
    rng = random.Random(seed)
    talks = []
    for i in range(count):
        length = rng.randrange(3, longest)
        talks.append(([1000 + i] * length, [False] + [True] * (length - 1)))
    return talks


def test_each_conversation_lies_whole_in_one_row():
    tokens, mask, facts = pack(rendered(), row_len=32, filler=7)
    for i, (said, learned) in enumerate(rendered()):
        places = np.argwhere(tokens == 1000 + i)
        assert len(places) == len(said) and len(set(places[:, 0])) == 1
        assert mask[tokens == 1000 + i].sum() == sum(learned)
    assert not mask[tokens == 7].any(), "what fills up is not learned"
    assert facts["conversations"] == 50 and facts["learned_tokens"] == mask.sum()


def test_rows_are_full():
    rng = random.Random(1)
    lengths = [rng.randrange(3, 60) for _ in range(2000)]
    rows = best_fit(lengths, 256)
    assert sorted(which for row in rows for which in row) == list(range(2000))
    sizes = [sum(lengths[which] for which in row) for row in rows]
    assert max(sizes) <= 256 and sum(sizes) / (256 * len(rows)) > 0.95


def test_a_conversation_longer_than_a_row_is_cut_and_left_out_if_nothing_is_said():
    talks = [([1] * 40, [False] * 20 + [True] * 20), ([2] * 40, [False] * 35 + [True] * 5)]
    tokens, mask, facts = pack(talks, row_len=32, filler=7)
    assert tokens.shape == (1, 32) and mask.sum() == 12
    assert facts["cut"] == 2 and facts["left_out"] == 1


def test_nothing_to_learn_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no train conversation says anything in its first 8"):
        write_rows(tmp_path, "train", [([1] * 20, [False] * 19 + [True])], 8, 0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    cfg = chat_config(tmp_path_factory.mktemp("rows"))
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, r"[\s\S]")
    return ensure_rows(cfg, tokenizer), tokenizer, cfg


def test_the_targets_are_what_the_assistant_says(rows):
    folder, tokenizer, cfg = rows
    batches = ChatBatches(folder, "train", 64, 8, seed=1)
    x, y = batches.rows(np.arange(len(batches.tokens)))
    learned = y[y != NOT_LEARNED]
    said = [
        conversation.render(chat.messages, tokenizer)
        for chat in chats.read_chats(chats.ensure_chats(cfg), "train")
    ]
    wanted = [t for tokens, mask in said for t, m in zip(tokens[:65], mask[:65], strict=True) if m]
    assert sorted(learned.tolist()) == sorted(wanted)
    assert torch.equal(x[:, 1:][y[:, :-1] != NOT_LEARNED], y[:, :-1][y[:, :-1] != NOT_LEARNED])


def test_an_epoch_shows_every_row_once_and_any_batch_can_be_had_at_any_time(rows):
    folder, _, _ = rows
    batches = ChatBatches(folder, "train", 64, 1, seed=1)
    count = len(batches.tokens)
    seen = [batches.batch(i)[0] for i in range(2 * count)]
    first, second = torch.cat(seen[:count]), torch.cat(seen[count:])
    whole = torch.from_numpy(batches.tokens[:, :-1].astype(np.int64))
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, whole.tolist()))
    assert not torch.equal(first, second)
    again = ChatBatches(folder, "train", 64, 1, seed=1)
    assert torch.equal(again.batch(count + 3)[0], seen[count + 3])


def test_a_share_of_the_rows_is_pretraining_text(rows):
    folder, _, _ = rows

    class Text:
        def batch(self, index):
            return torch.full((4, 64), 3), torch.full((4, 64), 3)

    batches = ChatBatches(folder, "train", 64, 4, seed=1, text=Text(), text_frac=0.3)
    text_rows = sum(int((batches.batch(i)[1] == 3).all(1).sum()) for i in range(100))
    assert text_rows == 120
    plain = ChatBatches(folder, "train", 64, 4, seed=1)
    chat_rows = [r for i in range(20) for r in batches.batch(i)[0] if not (r == 3).all()]
    in_order = [r for i in range(20) for r in plain.batch(i)[0]]
    assert all(torch.equal(a, b) for a, b in zip(chat_rows, in_order, strict=False))


def test_the_rows_are_named_by_what_they_hold(rows):
    folder, tokenizer, cfg = rows
    assert ensure_rows(cfg, tokenizer) == folder
    assert store.read_manifest(folder)["splits"]["train"]["rows"] > 5
    longer = cfg.model_copy(update={"model": cfg.model.model_copy(update={"seq_len": 32})})
    assert ensure_rows(longer, tokenizer) != folder
