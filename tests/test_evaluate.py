"""The ruler: what is scored, and what is refused."""

import math

import numpy as np
import pytest
import torch
from tiny import write_texts

from nightshift.fixed import evaluate
from nightshift.fixed.evaluate import Invalid, check_causality, score, token_stream, windows
from nightshift.fixed.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    import yaml

    from nightshift.fixed.config import CONF

    pattern = yaml.safe_load((CONF / "tokenizer" / "bpe4k.yaml").read_text())["split_pattern"]
    return Tokenizer({bytes([i]): i for i in range(256)}, pattern)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder = write_texts(tmp_path_factory.mktemp("texts"), 3)
    return [f.read_text() for f in sorted(folder.iterdir())] + ["Ünïcödé 🙂\r\n" * 20]


def uniform(tokens):
    return torch.zeros(*tokens.shape, 265)


def test_bpb_of_a_uniform_model_is_log2_of_the_vocabulary_for_one_byte_tokens(tokenizer, texts):
    val_bpb, num_bytes, num_tokens = score(uniform, texts, tokenizer, 32, 4, CPU)
    assert val_bpb == pytest.approx(math.log2(265), rel=1e-6)
    assert num_bytes == num_tokens == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("seq_len, batch_size", [(8, 1), (32, 4), (1000, 3), (100_000, 1)])
def test_every_token_is_a_target_once_whatever_the_windows(tokenizer, texts, seq_len, batch_size):
    stream = token_stream(texts, tokenizer)
    inputs, targets = (
        torch.cat([w[i].flatten() for w in windows(stream, seq_len, batch_size)]) for i in (0, 1)
    )
    scored = targets >= 0
    assert np.array_equal(targets[scored].numpy(), stream[1:])
    assert np.array_equal(inputs[scored].numpy(), stream[:-1])


def test_a_better_model_has_a_lower_number(tokenizer, texts):
    def likes_letters(tokens):
        logits = uniform(tokens)
        logits[..., 97:123] = 3.0
        return logits

    assert (
        score(likes_letters, texts, tokenizer, 32, 4, CPU)[0]
        < score(uniform, texts, tokenizer, 32, 4, CPU)[0]
    )


def test_inflated_logits_change_nothing(tokenizer, texts):
    """Probabilities are normalised by the scorer: a constant on all logits cannot help."""
    shifted = score(lambda t: uniform(t) + 50.0, texts, tokenizer, 32, 4, CPU)[0]
    assert shifted == pytest.approx(score(uniform, texts, tokenizer, 32, 4, CPU)[0], rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_number(tokenizer, texts, poison):
    def broken(tokens):
        logits = uniform(tokens)
        logits[0, 0, 0] = poison
        return logits

    with pytest.raises(Invalid, match="not all finite"):
        score(broken, texts, tokenizer, 32, 4, CPU)


def test_a_model_that_sees_the_next_token_is_caught(tokenizer, texts):
    def peeks(tokens):
        following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        return 20.0 * torch.nn.functional.one_hot(following, 265).float()

    assert score(peeks, texts, tokenizer, 32, 4, CPU)[0] < 1, "the cheat would pay"
    with pytest.raises(Invalid, match="sees the future"):
        check_causality(peeks, token_stream(texts, tokenizer), 32, 265, 4, 1, CPU)


def test_a_causal_model_passes(tokenizer, texts):
    def repeats(tokens):
        return torch.nn.functional.one_hot(tokens, 265).float()

    check_causality(repeats, token_stream(texts, tokenizer), 32, 265, 8, 1, CPU)


def test_a_tokenizer_that_changes_the_text_is_refused(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode_bytes", lambda ids: b"something else")
    with pytest.raises(Invalid, match="byte for byte"):
        token_stream(texts, tokenizer)


def test_inflated_token_bytes_do_not_pass(tokenizer, texts, monkeypatch):
    sizes = tokenizer.token_bytes() * 2
    monkeypatch.setattr(tokenizer, "token_bytes", lambda: sizes)
    with pytest.raises(Invalid, match="bytes were scored"):
        score(uniform, texts, tokenizer, 32, 4, CPU)


def test_out_of_memory_halves_the_batch_and_gives_the_same_number(tokenizer, texts):
    def hungry(tokens):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("too much")
        return uniform(tokens)

    assert score(hungry, texts, tokenizer, 32, 16, CPU) == score(
        uniform, texts, tokenizer, 32, 2, CPU
    )


def test_val_text_is_whole_documents_up_to_the_limit(monkeypatch):
    documents = [("a", "x" * 600), ("b", "y" * 600), ("c", "z" * 300)]
    monkeypatch.setattr(evaluate, "read_documents", lambda folder, split: iter(documents))
    assert [t[0] for t in evaluate.val_text(None, 1000)] == ["x", "z"]
    assert [t[0] for t in evaluate.val_text(None, None)] == ["x", "y", "z"]
    assert [t[0] for t in evaluate.val_text(None, 10)] == ["x"]
