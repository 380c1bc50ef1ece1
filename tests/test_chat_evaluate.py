"""The chat metric: computed by hand, whatever the batch; tasks with honest intervals."""

import json
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_tiny import base_run, chat_config
from tiny import model_config

from nightshift import chat_evaluate
from nightshift.chat_evaluate import Scored, likelihood, nats_of, plain, wilson, windows
from nightshift.fixed import conversation
from nightshift.fixed.tasks import Chat, question
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.generate import Engine
from nightshift.model import GPT


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)} | {b"ight": 256}, r"\p{L}+|[\s\S]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(model_config(), vocab_size=266)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def talk(asked, answer):
    return question("arithmetic", asked, answer)


def test_the_likelihood_is_that_of_the_assistant_s_bytes_alone(model, tokenizer):
    chat = talk("ab", "night")
    tokens, mask = conversation.render(chat.messages, tokenizer)
    log_p = torch.log_softmax(model(torch.tensor([tokens[:-1]])), -1)[0]
    wanted = -sum(
        float(log_p[i, token])
        for i, token in enumerate(tokens[1:])
        if mask[i + 1] and token != conversation.end_of_turn(tokenizer)
    )
    scored = likelihood(model, tokenizer, [chat], 4)
    assert scored.nats[0] == pytest.approx(wanted, rel=1e-5) and scored.num_bytes[0] == 5
    assert scored.bpb == pytest.approx(wanted / log(2) / 5, rel=1e-5)


def test_a_uniform_model_needs_log2_of_its_vocabulary_for_each_token(tokenizer):
    model = GPT(model_config(), vocab_size=266)
    with torch.no_grad():
        model.head.weight.zero_()
    scored = likelihood(model, tokenizer, [talk("x", "abc"), talk("y" * 90, "z" * 70)], 2)
    assert scored.bpb == pytest.approx(np.log2(266), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_does_not_change_the_number(model, tokenizer, batch_size):
    chats = [talk("a" * i, "b" * (3 * i)) for i in range(1, 12)]
    scored = likelihood(model, tokenizer, chats, 4)
    other = likelihood(model, tokenizer, chats, batch_size)
    np.testing.assert_allclose(scored.nats, other.nats, rtol=1e-5)


@pytest.mark.parametrize("length", [2, 10, 32, 33, 34, 100, 131])
def test_every_token_of_a_long_text_is_counted_once_with_half_a_window_before_it(length):
    counted = []
    for start, places in windows([1] * length, [True] * length, 32, 256):
        assert all(0 <= place < 32 for place in places)
        if start:
            assert min(places) >= 15
        counted += [start + place for place in places]
    assert counted == list(range(length - 1))


def test_the_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        num_bytes = random.integers(5, 100, 150).astype(float)
        nats = num_bytes * random.normal(1.0, 0.3, 150)
        scored = Scored(nats, num_bytes)
        covered += abs(scored.bpb - 1 / log(2)) < scored.interval()
    assert 0.91 < covered / 400 < 0.985


@pytest.mark.parametrize(
    "right, count, low, high",
    [(0, 9, 0.0, 0.2992), (5, 10, 0.2366, 0.7634), (9, 9, 0.7008, 1.0), (1, 100, 0.0018, 0.0545)],
)
def test_wilson_s_interval(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=2e-4)


def test_what_counts_as_the_same_answer():
    assert plain(" Abraham  Lincoln.") == plain("abraham lincoln")
    assert plain("12") != plain("1 2")


def test_exact_match_counts_right_answers_and_stops(tokenizer, monkeypatch):
    from nightshift.generate import Completion

    end = conversation.end_of_turn(tokenizer)
    table = [Completion([1, end], " 12.", "stop"), Completion([1, 2], "13", "length")]
    monkeypatch.setattr(chat_evaluate, "answers", lambda *_: table)
    chats = [talk("5 + 7 = ?", "12"), talk("6 + 7 = ?", "12")]
    settings = SimpleNamespace(answer_tokens=4, batch_size=4)
    result = chat_evaluate.exact_match(SimpleNamespace(tokenizer=tokenizer), chats, settings)
    result = result["arithmetic"]
    assert (result["share"], result["stops"], result["num"]) == (0.5, 0.5, 2)


def test_multiple_choice_takes_the_likeliest_answer_by_its_bytes(model, tokenizer):
    offered = ["night", "x", "abab"]
    bits = {}
    for choice in offered:
        tokens, mask = conversation.render(talk("q", choice).messages, tokenizer)
        bits[choice] = nats_of(model, tokenizer, [(tokens, mask)], 1)[0] / len(choice)
    best = min(bits, key=bits.get)
    for choice in offered:
        choices = [choice, *(c for c in offered if c != choice)]
        chat = Chat(messages=talk("q", choice).messages, source="task/documents", choices=choices)
        result = chat_evaluate.multiple_choice(model, tokenizer, [chat], 4)["documents"]
        assert result["share"] == (choice == best)
        assert result["guessing"] == pytest.approx(1 / 3)
        assert result["centred"] == pytest.approx(1.0 if choice == best else -0.5)


def test_broken_weights_are_an_error_not_a_number(tokenizer):
    model = GPT(model_config(), vocab_size=266)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not all finite"):
        likelihood(model, tokenizer, [talk("a", "b")], 1)


def test_answers_end_where_the_assistant_ends_them(model, tokenizer):
    end = conversation.end_of_turn(tokenizer)
    with torch.no_grad():
        speaks_up = GPT(model_config(), vocab_size=266)
        speaks_up.forward = lambda tokens: torch.nn.functional.one_hot(
            torch.where(tokens == 65, end, 65), 266
        ).float()
    said = chat_evaluate.answers(Engine(speaks_up, tokenizer), [talk("a", "b").messages[:1]], 9, 2)
    assert said[0].text == "A" and said[0].tokens == [65, end] and said[0].finish == "stop"


def test_a_checkpoint_is_scored_beside_its_base(tmp_path):
    """The base against itself: no gain, and an interval of none."""
    base = base_run(tmp_path)
    cfg = chat_config(tmp_path)
    result = chat_evaluate.evaluate(base / "checkpoint", cfg, base / "checkpoint")
    m = result["metrics"]
    assert m["chat_bpb"] == m["chat_bpb_before"] > 0 and m["chat_bpb_gain"] == 0
    assert m["chat_bpb_gain_interval"] == 0 and m["text_bpb"] == m["text_bpb_before"]
    assert 0 <= m["exact"] <= 1 and set(result["exact"]) >= {"spelling", "arithmetic"}
    assert "continuation" in result["choice"] and "continuation" not in result["exact"]
    assert [s["question"] for s in result["samples"]] == cfg.chat_evaluate.sample_questions
    json.dumps(result, allow_nan=False)
    assert "base" in chat_evaluate.table(result)


def test_the_command_says_how_it_is_used(capsys):
    assert chat_evaluate.main([]) == 2 and "run=outputs/sft" in capsys.readouterr().err
    assert chat_evaluate.main(["run=/nowhere/at/all"]) == 2
    assert "no such file" in capsys.readouterr().err
