"""Cached generation says the same tokens as the full forward pass, whatever the settings."""

import random
import types

import pytest
import torch
import torch.nn.functional as F
from tiny import model_config

from agent.proposers.recipes import read_recipes
from nightshift import generate
from nightshift.fixed.config import ROOT
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.generate import Engine, Sampling, TextStream, window_start
from nightshift.model import GPT

VARIANTS = [
    {},
    {"kv_group": 2},
    {"mlp": "swiglu", "tied_head": True},
    {"value_embeds": True, "kv_group": 2},
    {"window_pattern": "SL", "short_window_frac": 0.25},
    {"softcap": None, "seq_len": 8},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)}, r"[\s\S]")


def make(gpt=GPT, **changes):
    torch.manual_seed(0)
    model = gpt(model_config(**changes), vocab_size=265)
    with torch.no_grad():  # away from the zero init, where every block is the identity
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_prompts(count, seed, longest=40):
    rng = random.Random(seed)
    return [
        [256, *(rng.randrange(256) for _ in range(rng.randrange(longest)))] for _ in range(count)
    ]


def random_sampling(seed):
    """Every kind of setting; a third is greedy."""
    rng = random.Random(seed)
    return Sampling(
        max_tokens=rng.choice([1, 5, 40]),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([None, None, 1, 20]),
        top_p=rng.choice([1.0, 1.0, 0.5, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=seed,
    )


def token_lists(completions):
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_generation_equals_full_forward(changes, tokenizer):
    """Prompts shorter and longer than the window (32), answers that slide over it."""
    model, prompts = make(**changes), random_prompts(20, seed=1)
    samplings = [random_sampling(seed) for seed in range(20)]
    cached, full = Engine(model, tokenizer), Engine(model, tokenizer, cache=False)
    assert cached.is_cached and not full.is_cached
    assert token_lists(cached.generate(prompts, samplings)) == token_lists(
        full.generate(prompts, samplings)
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[4]], ids=str)
def test_cached_generation_equals_full_forward_over_a_thousand_prompts(changes, tokenizer):
    model, prompts = make(**changes), random_prompts(1000, seed=2)
    samplings = [random_sampling(seed) for seed in range(1000)]
    cached = Engine(model, tokenizer).generate(prompts, samplings)
    full = Engine(model, tokenizer, cache=False).generate(prompts, samplings)
    assert token_lists(cached) == token_lists(full)


def test_greedy_generation_takes_the_likeliest_token_of_a_plain_forward_pass(tokenizer):
    model, prompt = make(), random_prompts(1, seed=3, longest=8)[0]
    said = Engine(model, tokenizer).generate([prompt], Sampling(max_tokens=20, temperature=0))[0]
    tokens = list(prompt)
    for token in said.tokens:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)


def test_a_row_says_the_same_alone_and_among_others(tokenizer):
    engine, prompts = Engine(make(), tokenizer), random_prompts(8, seed=4)
    samplings = [random_sampling(seed) for seed in range(8)]
    together = engine.generate(prompts, samplings)
    alone = [engine.generate([p], s)[0] for p, s in zip(prompts, samplings, strict=True)]
    assert token_lists(together) == token_lists(alone)


def test_rows_join_and_leave_a_running_batch(tokenizer):
    engine = Engine(make(), tokenizer)
    prompts = random_prompts(6, seed=5)
    sampling = Sampling(max_tokens=30, seed=7, stop_tokens=())
    alone = token_lists(engine.generate(prompts, sampling))
    batch, said = engine.batch(), {}
    for number, prompt in enumerate(prompts):
        assert batch.add(prompt, sampling) == number
        for piece in [p for _ in range(3) for p in batch.step()]:
            said.setdefault(piece.row, []).append(piece.token)
        if number == 4:
            batch.drop(1)
    while pieces := batch.step():
        for piece in pieces:
            said[piece.row].append(piece.token)
    assert said[1] == alone[1][:12], "dropped after twelve tokens"
    assert [said[n] for n in (0, 2, 3, 4, 5)] == [alone[n] for n in (0, 2, 3, 4, 5)]


def test_a_seed_gives_the_same_text_and_another_seed_another(tokenizer):
    engine, prompts = Engine(make(), tokenizer), random_prompts(1, seed=6)

    def said(seed):
        return engine.generate(prompts, Sampling(max_tokens=20, temperature=1, seed=seed))[0].tokens

    assert said(1) == said(1) != said(2) and said(None) != said(None)


def test_samples_follow_the_model_s_probabilities(tokenizer):
    model, prompt = make(), [256, 1, 2, 3]
    wanted = torch.softmax(model(torch.tensor([prompt]))[0, -1].double() / 0.7, -1)
    rows = [Sampling(max_tokens=1, temperature=0.7, seed=seed) for seed in range(4000)]
    said = Engine(model, tokenizer).generate([prompt] * 4000, rows)
    found = torch.bincount(torch.tensor([c.tokens[0] for c in said]), minlength=265) / 4000
    assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_k_and_top_p_leave_out_the_unlikely(tokenizer):
    model, prompt = make(), [256, 1, 2, 3]
    p_V = torch.softmax(model(torch.tensor([prompt]))[0, -1], -1)
    order = p_V.argsort(descending=True).tolist()
    num_p = int((p_V.sort(descending=True).values.cumsum(-1) < 0.3).sum()) + 1

    def said(**settings):
        rows = [
            Sampling(max_tokens=1, temperature=1, seed=s, stop_tokens=(), **settings)
            for s in range(400)
        ]
        done = Engine(model, tokenizer).generate([prompt] * 400, rows)
        return {completion.tokens[0] for completion in done}

    assert said(top_k=3) == set(order[:3])
    assert said(top_p=0.3) == set(order[:num_p])
    assert said(top_k=1) == said(top_p=1e-9) == {order[0]}


def test_a_repetition_penalty_drives_out_repeated_tokens(tokenizer):
    model, prompt = make(), [256, 1, 2, 3]

    def distinct(penalty):
        sampling = Sampling(
            max_tokens=60, temperature=0, repetition_penalty=penalty, stop_tokens=()
        )
        return len(set(Engine(model, tokenizer).generate([prompt], sampling)[0].tokens))

    assert distinct(10.0) > distinct(1.0)


@pytest.mark.parametrize(
    "settings", [{"max_tokens": 0}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0.0},
                 {"repetition_penalty": 0}, {"stop": ("",)}], ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_prompts_that_no_model_can_read_are_refused(tokenizer):
    batch = Engine(make(), tokenizer).batch()
    with pytest.raises(ValueError, match="empty"):
        batch.add([], Sampling())
    with pytest.raises(ValueError, match="0 to 264"):
        batch.add([265], Sampling())


# -- text


def streamed(tokenizer, data: bytes, stop=()):
    text = TextStream(tokenizer, stop)
    pieces = [text.push(byte) for byte in data if not text.stopped]
    return [*pieces, "" if text.stopped else text.end()]


def test_a_character_is_shown_whole_or_not_at_all(tokenizer):
    said = "na\u00efve \u6f22\u5b57 \U0001f642!"
    assert "".join(streamed(tokenizer, said.encode())) == said
    assert "".join(streamed(tokenizer, said.encode()[:-3])) == said[:-2], "the end is cut off"
    assert "".join(streamed(tokenizer, b"a\xff\xc3b")) == "a\ufffd\ufffdb"


@pytest.mark.parametrize("cut", range(12))
def test_nothing_of_a_stop_text_is_shown(cut, tokenizer):
    """Whatever stands before it, also beginnings of it."""
    data = ("abUSER"[:cut] + "xUSUSER:more").encode()
    pieces = streamed(tokenizer, data, stop=("USER:", "never"))
    assert "".join(pieces) == "abUSER"[:cut] + "xUS"


def test_an_unfinished_stop_text_is_shown_at_the_end(tokenizer):
    assert "".join(streamed(tokenizer, b"answer USE", stop=("USER:",))) == "answer USE"


def test_a_stream_gives_the_text_that_generate_gives(tokenizer):
    engine, prompts = Engine(make(), tokenizer), random_prompts(5, seed=8)
    sampling = Sampling(max_tokens=25, temperature=1.0, seed=3, stop_tokens=())
    texts = [""] * 5
    for pieces in engine.stream(prompts, sampling):
        for piece in pieces:
            texts[piece.row] += piece.text
    whole = engine.generate(prompts, sampling)
    assert texts == [completion.text for completion in whole]
    for completion in whole:
        assert completion.finish == "length" and len(completion.tokens) == 25
        plain = [token for token in completion.tokens if token < 256]
        assert tokenizer.decode(plain).startswith(completion.text)


def test_generation_ends_at_a_special_token_and_at_a_stop_text(tokenizer):
    model, prompt = make(), [256, 5]
    engine = Engine(model, tokenizer)
    free = engine.generate([prompt], Sampling(max_tokens=30, temperature=0, stop_tokens=()))[0]
    third = free.tokens[2]
    until = Sampling(max_tokens=30, temperature=0, stop_tokens=(third,))
    stopped = engine.generate([prompt], until)[0]
    whole = free.tokens[: free.tokens.index(third) + 1]
    assert stopped.finish == "stop" and stopped.tokens == whole
    model.forward = lambda tokens: F.one_hot(torch.full_like(tokens, 256), 265).float()  # bos
    ended = Engine(model, tokenizer).generate([prompt], Sampling(temperature=0))[0]
    assert ended.tokens == [256] and ended.text == "" and ended.finish == "stop"


# -- the window


def test_the_window_never_exceeds_what_the_model_sees_and_moves_in_quarters():
    starts = [window_start(length, 32) for length in range(1, 200)]
    sizes = [length - start for length, start in zip(range(1, 200), starts, strict=True)]
    assert max(sizes) == 32 and min(sizes[32:]) == 25
    assert set(starts) <= set(range(0, 200, 8)) and starts == sorted(starts)


# -- edited models


def edited_model(title):
    """model.py with a recipe applied, as a module of its own."""
    recipe = next(r for r in read_recipes() if r.title == title)
    source = (ROOT / "src/nightshift/model.py").read_text(encoding="utf-8")
    for edit in recipe.edits:
        source = source.replace(edit.search, edit.replace)
    module = types.ModuleType("edited")
    exec(compile(source, "model.py", "exec"), module.__dict__)
    return module.GPT


CODE = [r for r in read_recipes() if any(e.path.endswith("/model.py") for e in r.edits)]


@pytest.mark.parametrize("title", [r.title for r in CODE])
def test_an_edited_model_generates_what_its_forward_says(title, tokenizer):
    """With the cache where it agrees, without it where the edit looks at neighbours."""
    model, prompts = make(edited_model(title)), random_prompts(6, seed=9)
    engine, full = Engine(model, tokenizer), Engine(model, tokenizer, cache=False)
    sampling = Sampling(max_tokens=40, temperature=0.9, seed=1, stop_tokens=())
    assert token_lists(engine.generate(prompts, sampling)) == token_lists(
        full.generate(prompts, sampling)
    )
    assert engine.is_cached == (title != "token smear"), engine.why_uncached


def test_a_model_without_a_place_for_a_cache_still_generates(tokenizer):
    source = (ROOT / "src/nightshift/model.py").read_text(encoding="utf-8")
    source = source.replace("if self.cache is not None", "if False")
    module = types.ModuleType("edited")
    exec(compile(source, "model.py", "exec"), module.__dict__)
    engine = Engine(make(module.GPT), tokenizer)
    assert "does not use its cache" in engine.why_uncached
    assert engine.generate([[256, 1]], Sampling(max_tokens=5, stop_tokens=()))[0].finish == "length"


def test_broken_weights_are_an_error_not_a_text(tokenizer):
    model = make()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not all finite"):
        Engine(model, tokenizer, cache=False).generate([[256]], Sampling())


def test_prefill_is_split_when_its_logits_would_not_fit(tokenizer, monkeypatch):
    engine, prompts = Engine(make(), tokenizer), random_prompts(9, seed=10)
    sampling = Sampling(max_tokens=5, seed=1)
    whole = token_lists(engine.generate(prompts, sampling))
    monkeypatch.setattr(generate, "MAX_LOGITS", 265 * 50)
    assert token_lists(engine.generate(prompts, sampling)) == whole
