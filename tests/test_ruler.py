"""The ruler's arithmetic: what is scored, what the probes see, what is refused."""

import math
import random

import numpy as np
import pytest
import torch
import yaml

from nightshift.fixed import ruler
from nightshift.fixed.config import CONF
from nightshift.fixed.ruler import (
    Invalid,
    bits_per_byte,
    check_probes,
    cut,
    held_out_text,
    plan_probes,
    probe_rows,
    score,
)
from nightshift.fixed.tokenizer import Tokenizer, train

V, T = 400, 32


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Words that do not follow from each other: what comes next is worth knowing."""
    pick = random.Random(1)
    words = ["".join(pick.choices("aeioulnrst", k=pick.randint(2, 7))) for _ in range(300)]
    documents = [" ".join(pick.choices(words, k=400)) for _ in range(6)]
    return [*documents, "Ünïcödé 🙂\r\n"]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    values = yaml.safe_load((CONF / "tokenizer" / "bpe4k.yaml").read_text())
    from nightshift.fixed.config import Tokenizer as Settings

    return train(texts, Settings(**values | {"vocab_size": V, "train_bytes": 10_000}))


@pytest.fixture(scope="module")
def windows(texts, tokenizer):
    return cut(texts, tokenizer, T)


def bpb(logits_of, windows, batch_size=4):
    return bits_per_byte(score(logits_of, windows, batch_size), windows)


def uniform(ids):
    return torch.zeros(*ids.shape, V)


def bigrams(windows) -> torch.Tensor:
    """log p of each token after each other one, counted from the text and smoothed, (V, V)."""
    counts = np.full((V, V), 0.1)
    real = windows.targets >= 0
    np.add.at(counts, (windows.inputs[real], windows.targets[real]), 1)
    return torch.from_numpy(np.log(counts / counts.sum(1, keepdims=True))).float()


def honest(windows):
    table = bigrams(windows)
    return lambda ids: table[torch.from_numpy(ids)]


# ---- known distributions ----


def test_uniform_logits_score_log2_of_the_vocabulary_times_tokens_over_bytes(windows):
    expected = math.log2(V) * int(windows.scored.sum()) / windows.num_bytes
    assert bpb(uniform, windows) == pytest.approx(expected, abs=1e-6)


def test_a_table_of_bigrams_scores_what_a_sum_over_the_text_gives(texts, tokenizer, windows):
    table = bigrams(windows).double().log_softmax(-1)
    bits = num_bytes = 0.0
    previous = None
    for text in texts:
        for token in [tokenizer.bos, *tokenizer.encode(text)]:
            if previous is not None and token != tokenizer.bos:
                bits -= float(table[previous, token]) / math.log(2)
            previous = token
        num_bytes += len(text.encode())
    assert bpb(honest(windows), windows) == pytest.approx(bits / num_bytes, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_the_number_does_not_depend_on_the_batch_size(windows, batch_size):
    assert bpb(honest(windows), windows, batch_size) == bpb(honest(windows), windows, 4)


def test_the_number_does_not_depend_on_the_order_of_showing(windows, monkeypatch):
    before = bpb(honest(windows), windows)
    monkeypatch.setattr(ruler, "ORDER_SEED", 5)
    assert bpb(honest(windows), windows) == before


# ---- what is scored ----


@pytest.mark.parametrize("seq_len", [8, 32, 1000, 100_000])
def test_every_token_is_a_target_once_whatever_the_windows(texts, tokenizer, seq_len):
    stream = ruler.token_stream(texts, tokenizer)
    windows = cut(texts, tokenizer, seq_len)
    real = windows.targets >= 0
    assert np.array_equal(windows.targets[real], stream[1:])
    assert np.array_equal(windows.inputs[real], stream[:-1])
    assert windows.sizes.sum() == windows.num_bytes == sum(len(t.encode()) for t in texts)


def test_a_constant_on_all_logits_changes_nothing(windows):
    shifted = bpb(lambda ids: honest(windows)(ids) + 50.0, windows)
    assert shifted == pytest.approx(bpb(honest(windows), windows), abs=1e-5)


def test_logits_so_large_that_sums_round_to_them_win_nothing(windows):
    assert bpb(lambda ids: uniform(ids) + 1e30, windows) == bpb(uniform, windows)
    huge = bpb(lambda ids: honest(windows)(ids) + 2.0**25, windows)
    assert huge >= bpb(honest(windows), windows) - 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_number(windows, poison):
    def broken(ids):
        logits = uniform(ids)
        logits[0, 0, 0] = poison
        return logits

    with pytest.raises(Invalid, match="not all finite"):
        score(broken, windows, 4)


def test_logits_that_change_while_they_are_read_are_not_seen(windows, monkeypatch):
    """The row that is summed is a copy: a thread of the model may write on, into its own buffer."""
    rows = windows.inputs[:4], windows.targets[:4]
    buffer, real = honest(windows)(rows[0]), ruler.nats_of_targets
    expected = ruler.nats_of_rows(lambda ids: buffer.clone(), *rows, 4)

    def while_it_is_read(logits, targets):
        buffer[0] += 50 * torch.nn.functional.one_hot(targets.clamp(min=0)[0], V)
        return real(logits, targets)

    monkeypatch.setattr(ruler, "nats_of_targets", while_it_is_read)
    first = ruler.nats_of_rows(lambda ids: buffer, *rows, 4)[0]
    assert np.array_equal(first, expected[0]) and buffer.max() > 40, "it did change"


def test_a_tokenizer_that_changes_the_text_is_refused(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode_bytes", lambda ids: b"something else")
    with pytest.raises(Invalid, match="byte for byte"):
        cut(texts, tokenizer, T)


def test_inflated_token_bytes_do_not_pass(tokenizer, texts, monkeypatch):
    sizes = tokenizer.token_bytes() * 2
    monkeypatch.setattr(tokenizer, "token_bytes", lambda: sizes)
    with pytest.raises(Invalid, match="bytes were scored"):
        cut(texts, tokenizer, T)


def test_held_out_text_is_whole_documents_up_to_the_limit(monkeypatch):
    documents = [("a", "x" * 600), ("b", "y" * 600), ("c", "z" * 300)]
    monkeypatch.setattr(ruler, "read_documents", lambda folder, split: iter(documents))
    assert [t[0] for t in held_out_text(None, "val", 1000)] == ["x", "z"]
    assert [t[0] for t in held_out_text(None, "val", None)] == ["x", "y", "z"]
    assert [t[0] for t in held_out_text(None, "val", 10)] == ["x"]


# ---- probes ----


class Cheat:
    """A model that adds `bump` to the logit of the true next token where `where` says so."""

    def __init__(self, windows, bump=8.0, where=lambda ids: np.ones(ids.shape, bool)):
        self.honest, self.bump, self.where = honest(windows), bump, where

    def __call__(self, ids):
        logits = self.honest(ids).clone()
        following = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        rows, columns = np.nonzero(self.where(ids))
        logits[rows, columns, following[rows, columns]] += self.bump
        return logits


def probed(first, second, windows, count=40):
    nats = score(first, windows, 4)
    return check_probes(second, nats, windows, 4, count)


def test_honest_models_pass_the_probes_every_time(windows):
    for _ in range(20):
        assert probed(honest(windows), honest(windows), windows) > 10


@pytest.mark.parametrize("bump", [8.0, 1.0, 0.05, 0.02])
def test_a_model_that_sees_the_next_token_is_caught_however_little_it_uses(windows, bump):
    cheat = Cheat(windows, bump)
    assert bpb(cheat, windows) < bpb(honest(windows), windows), "the cheat would pay"
    with pytest.raises(Invalid, match="sees the future"):
        probed(cheat, cheat, windows)


def test_a_leak_at_one_position_in_fifty_is_caught_where_it_pays(windows):
    chosen = (
        np.random.default_rng(1).random((V, V)) < 0.02
    )  # depends on the tokens, as a cheat would

    def where(ids):
        following = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        return chosen[ids, following]

    caught = 0
    for _ in range(10):
        try:
            probed(Cheat(windows, 20.0, where), Cheat(windows, 20.0, where), windows)
        except Invalid:
            caught += 1
    assert caught >= 8


def test_a_model_that_remembers_what_it_was_shown_is_caught(windows):
    class Remembers:
        def __init__(self):
            self.honest, self.counts = honest(windows), torch.zeros(V)

        def __call__(self, ids):
            logits = self.honest(ids) + torch.log1p(self.counts)
            self.counts += torch.bincount(torch.from_numpy(ids).flatten(), minlength=V)
            return logits

    with pytest.raises(Invalid, match="keeps state"):
        probed(Remembers(), Remembers(), windows)


def test_a_model_that_looks_into_other_rows_is_caught(windows):
    def neighbours(ids):
        logits = honest(windows)(ids)
        counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=V)
        return logits + torch.log1p(counts)

    with pytest.raises(Invalid, match="other rows"):
        probed(neighbours, neighbours, windows)


def test_rounding_of_bf16_inside_the_model_is_no_leak(windows):
    noise = torch.Generator().manual_seed(0)

    def rough(ids):
        logits = honest(windows)(ids)
        return logits + 0.01 * torch.randn(logits.shape, generator=noise)

    for _ in range(5):
        assert probed(rough, rough, windows)


def test_noise_is_no_cover_for_a_leak(windows):
    noise = torch.Generator().manual_seed(0)
    cheat = Cheat(windows, 0.1)

    def noisy(ids):
        logits = cheat(ids)
        return logits + 0.02 * torch.randn(logits.shape, generator=noise)

    with pytest.raises(Invalid, match="sees the future"):
        probed(noisy, noisy, windows)


@pytest.mark.parametrize("seq_len", [32, 700, 100_000])
def test_the_second_process_is_shown_nothing_that_follows_a_position_it_answers_for(
    texts, tokenizer, seq_len
):
    windows = cut(texts, tokenizer, seq_len)
    nats = score(uniform, windows, 4)
    for _ in range(5):
        draw, seen = np.random.default_rng(), {}
        for turn in plan_probes(nats, windows, 40, draw):
            rows = probe_rows(turn, windows, draw)
            assert len({p.window for p in turn}) == len(turn), "no two of a window in a round"
            for row, probe in zip(rows, turn, strict=True):
                original, end = windows.inputs[probe.window], probe.position + 1
                assert seen.get(probe.window, 0) < end, "nor what follows in an earlier round"
                seen[probe.window] = end
                assert np.array_equal(row[:end], original[:end])
                if end < len(row):
                    assert row[end] != original[end] and set(row[end:]) <= {*row[:end], *range(256)}


def test_a_text_in_one_window_is_probed_too(texts, tokenizer):
    """A context longer than the text is no way around the probes."""
    windows = cut(texts[:1], tokenizer, 4_000)
    assert len(windows.inputs) == 1
    cheat = Cheat(windows, 0.5)
    with pytest.raises(Invalid, match="sees the future"):
        probed(cheat, cheat, windows)
    assert probed(honest(windows), honest(windows), windows) >= 8
