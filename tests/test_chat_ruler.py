"""chat_bpb from windows: each byte of the assistant's once, however long a conversation is."""

import numpy as np
import pytest
import torch
from tiny import model_config

from nightshift.chat_evaluate import likelihood
from nightshift.fixed import chat_ruler
from nightshift.fixed.chat_ruler import bytes_said, cut_chats, scored, width_for
from nightshift.fixed.ruler import Invalid, check_probes, score
from nightshift.fixed.tasks import Chat, question
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.model import GPT

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)} | {b"ight": 256}, r"\p{L}+|[\s\S]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(model_config(seq_len=SEQ_LEN), vocab_size=266)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def chats() -> list[Chat]:
    """Short, as long as a window, and much longer; one with three answers."""
    made = [question("t", "a" * i, "night " + "b" * (4 * i)) for i in (1, 3, 9, 14, 40)]
    turns = [("user", "Hi"), ("assistant", "Hé"), ("user", "So?"), ("assistant", "No. " * 30)]
    turns += [("user", "Bye"), ("assistant", "Bye")]
    return [*made, Chat(messages=[{"role": r, "content": c} for r, c in turns], source="t")]


def test_the_number_is_that_of_the_open_evaluation(model, tokenizer):
    talks = chats()
    groups = cut_chats(talks, tokenizer, SEQ_LEN)
    nats = [score(lambda ids: model(torch.from_numpy(ids)), group, 4) for group in groups]
    found, plain = scored(nats, groups, talks), likelihood(model, tokenizer, talks, 4)
    np.testing.assert_allclose(found.nats, plain.nats, rtol=1e-6)
    assert found.bpb == pytest.approx(plain.bpb, abs=1e-7)
    assert found.interval() == pytest.approx(plain.interval(), rel=1e-5) and found.interval() > 0


def test_every_byte_of_the_assistant_is_scored_once_and_no_other(tokenizer):
    talks = chats()
    groups = cut_chats(talks, tokenizer, SEQ_LEN)
    sizes = np.zeros(len(talks))
    for group in groups:
        np.add.at(sizes, group.owner, group.sizes.sum(axis=1))
    assert list(sizes) == list(bytes_said(talks))
    assert bytes_said(talks)[-1] == len("HéNo. Bye".encode()) + 29 * 4
    assert {group.inputs.shape[1] for group in groups} == {32, 64}


def test_bytes_that_get_lost_are_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_ruler, "windows", lambda tokens, mask, T, num: [(0, [5])])
    with pytest.raises(Invalid, match="bytes were scored, the assistant's turns have"):
        cut_chats(chats(), tokenizer, SEQ_LEN)


@pytest.mark.parametrize(("length", "width"), [(1, 32), (32, 32), (33, 64), (65, 96), (96, 96)])
def test_a_window_is_as_narrow_as_may_be(length, width):
    assert width_for(length, seq_len=96) == width


def test_a_model_that_peeks_into_the_answer_is_caught_and_an_honest_one_is_not(model, tokenizer):
    """In windows that are mostly filler after a short answer, too."""

    def peeks(ids):
        logits = model(torch.from_numpy(ids))
        ahead = torch.from_numpy(np.roll(ids, -1, axis=1))[..., None]
        return logits.scatter_add(-1, ahead, torch.full(ahead.shape, 2.0))

    for group in cut_chats(chats(), tokenizer, SEQ_LEN):
        honest = lambda ids: model(torch.from_numpy(ids))  # noqa: E731
        assert check_probes(honest, score(honest, group, 4), group, 4, 12) > 0
        with pytest.raises(Invalid, match="sees the future"):
            check_probes(peeks, score(peeks, group, 4), group, 4, 12)
