"""The server answers as OpenAI's does: bodies, streams, errors; and lets nobody in by accident."""

import asyncio
import json
import os

import pytest
import tiny_checkpoint
import torch
from starlette.testclient import TestClient

from nightshift import catalogue, hosts, serve
from nightshift.fixed import checkpoint
from nightshift.generate import Engine, Sampling
from nightshift.hosts import Hosts

HELLO = [{"role": "user", "content": "Hello"}]
ADDRESS = "http://127.0.0.1:8000"
LONGER = {"model.seq_len": 64, "train.batch_tokens": 256}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, work = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("work")
    tiny_checkpoint.make(root / "champion", work, val_bpb=1.5, **LONGER)
    tiny_checkpoint.make_trial(root, work, 0, "keep")
    tiny_checkpoint.make_trial(root, work, 1, "discard", kept=False)
    return root


def build(root, **options):
    models = Hosts(catalogue.default(root), torch.device("cpu"), 2, root)
    return serve.build_app(models, **options)


@pytest.fixture(scope="module")
def client(root):
    with TestClient(build(root), base_url=ADDRESS) as client:
        yield client


def chat(client, **values):
    body = {"messages": HELLO, "max_tokens": 8, "seed": 1} | values
    return client.post("/v1/chat/completions", json=body)


def text(client, **values):
    body = {"prompt": "The night", "max_tokens": 8, "seed": 1} | values
    return client.post("/v1/completions", json=body)


def chunks(response) -> list[dict]:
    """The bodies of a stream, which must end in [DONE]."""
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models_are_the_checkpoints_that_can_be_asked(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [m["id"] for m in body["data"]] == ["champion", "first/000"]
    one = client.get("/v1/models/first/000").json()
    assert (one["id"], one["object"], one["owned_by"]) == ("first/000", "model", "nightshift")
    missing = client.get("/v1/models/gpt-4")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_the_picker_also_shows_what_was_not_kept(client):
    body = client.get("/checkpoints").json()
    assert body["default"] == "champion"
    assert [(c["name"], c["is_kept"]) for c in body["checkpoints"]] == [
        ("champion", True),
        ("first/000", True),
        ("first/001", False),
    ]


def test_a_chat_answer_has_openai_s_shape_and_counts_its_tokens(client):
    body = chat(client).json()
    assert body["object"] == "chat.completion" and body["model"] == "champion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in (
        "stop",
        "length",
    )
    usage = body["usage"]
    assert usage["completion_tokens"] <= 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_completion_is_what_the_engine_says(client, root):
    model, tokenizer, _ = checkpoint.load(root / "champion/checkpoint")
    prompt = [tokenizer.bos, *tokenizer.encode("The night")]
    sampling = Sampling(max_tokens=8, temperature=0.5, seed=3)
    (said,) = Engine(model, tokenizer).generate([prompt], sampling)
    body = text(client, temperature=0.5, seed=3).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == said.text
    assert body["choices"][0]["finish_reason"] == said.finish


def test_streamed_pieces_add_up_to_the_whole_answer(client):
    whole = chat(client, temperature=1.5).json()
    stream = chunks(chat(client, temperature=1.5, stream=True))
    assert stream[0]["choices"][0]["delta"]["role"] == "assistant"
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in stream)
    assert said == whole["choices"][0]["message"]["content"]
    assert stream[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {c["object"] for c in stream} == {"chat.completion.chunk"}
    assert len({c["id"] for c in stream}) == 1 and "usage" not in stream[0]


def test_a_stream_ends_with_its_usage_when_asked(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = chunks(text(client, **options))
    assert all(c["usage"] is None for c in stream[:-1])
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == text(client).json()["usage"]


def test_n_answers_differ_and_a_seed_repeats_them(client):
    first, again = text(client, n=3).json(), text(client, n=3).json()
    texts = [c["text"] for c in first["choices"]]
    assert [c["index"] for c in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c["text"] for c in again["choices"]]
    streamed = ["", "", ""]
    for chunk in chunks(text(client, n=3, stream=True)):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts


def test_several_prompts_are_answered_in_their_order(client):
    both = text(client, prompt=["a", "The night"]).json()
    assert (
        both["choices"][1]["text"] == text(client, prompt="The night").json()["choices"][0]["text"]
    )


def test_a_stop_text_ends_the_answer_before_it(client):
    whole = text(client, max_tokens=30).json()["choices"][0]["text"]
    stop = whole[3:5]
    choice = text(client, max_tokens=30, stop=[stop]).json()["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_model(client, root):
    choice = text(client, logprobs=2, temperature=0).json()["choices"][0]
    model, tokenizer, _ = checkpoint.load(root / "champion/checkpoint")
    tokens = [tokenizer.bos, *tokenizer.encode("The night")]
    for name, logprob, top in zip(
        choice["logprobs"]["tokens"],
        choice["logprobs"]["token_logprobs"],
        choice["logprobs"]["top_logprobs"],
        strict=True,
    ):
        with torch.inference_mode():
            logp_V = torch.log_softmax(model(torch.tensor([tokens]))[0, -1], dim=-1)
        token = int(logp_V.argmax())
        assert name == tokenizer.decode([token])
        assert logprob == pytest.approx(float(logp_V[token]), abs=1e-4)
        assert max(top.values()) == pytest.approx(logprob)
        tokens.append(token)
    body = chat(client, logprobs=True, top_logprobs=3).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in content)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_come_in_openai_s_shape_also_before_a_stream(client, stream):
    response = chat(client, temperature=7, stream=stream)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    missing = chat(client, model="gpt-4", stream=stream)
    assert missing.status_code == 404 and "champion" in missing.json()["error"]["message"]
    gone = chat(client, model="first/001")
    assert gone.status_code == 404 and "git worktree add" in gone.json()["error"]["message"]


def test_a_prompt_that_is_too_long_is_refused(client):
    response = text(client, prompt="The night " * 1000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_wrong_addresses_and_methods_are_errors_in_the_same_shape(client):
    assert client.get("/v1/nothing").json()["error"]["message"].startswith("Invalid URL (GET")
    assert client.get("/v1/chat/completions").status_code == 405
    too_large = client.post("/v1/completions", content=b"x" * (serve.MAX_BODY_BYTES + 1))
    assert too_large.status_code == 413
    assert client.post("/v1/completions", content=b"{").status_code == 400


def test_the_page_asks_nobody_else_for_anything(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for outside in ("http://", "https://", "//cdn", "@import", "src="):
        assert outside not in page.text.replace("http://www.w3.org/2000/svg", "")


def test_pages_of_other_sites_are_refused(client):
    assert client.get("/v1/models", headers={"Origin": "http://example.com"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "example.com"}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": ADDRESS}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


def test_with_a_key_only_its_owner_gets_in(root):
    with TestClient(build(root, api_key="secret"), base_url=ADDRESS) as client:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "secret"}):
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=key).status_code == 200
        assert client.get("/checkpoints").status_code == 401
        assert client.get("/").status_code == 200


def test_at_most_so_many_models_stay_loaded(root):
    app = build(root)
    app.state.hosts.keep = 1
    with TestClient(app, base_url=ADDRESS) as client:
        for name in ("champion", "first/000", "champion"):
            assert text(client, model=name).json()["model"] == name
            assert list(app.state.hosts.loaded) == [name]


def test_a_champion_trained_again_is_loaded_again(root):
    app = build(root)
    with TestClient(app, base_url=ADDRESS) as client:
        text(client)
        before = app.state.hosts.loaded["champion"]
        os.utime(root / "champion/checkpoint/model.safetensors", (2e9, 2e9))
        text(client)
        assert app.state.hosts.loaded["champion"] is not before


# -- rows that come and go -------------------------------------------------------------------------


def with_host(root, test):
    """Runs `test(host)` in an event loop, as the server does."""

    async def run():
        host = hosts.Host(catalogue.find("champion", root), torch.device("cpu"))
        try:
            await asyncio.wait_for(test(host), 30)
        finally:
            host.close()
        host.thread.join(10)
        assert not host.thread.is_alive()

    asyncio.run(run())


def submit(host, number=1, **settings):
    prompts = [[host.tokenizer.bos]] * number
    samplings = [Sampling(**({"seed": i, "stop_tokens": ()} | settings)) for i in range(number)]
    return host.submit(prompts, samplings, None)


def test_a_client_that_hangs_up_ends_its_row(root):
    async def test(host):
        (ticket,) = submit(host, max_tokens=4000)
        stream = ticket.stream()
        await anext(stream)
        await stream.aclose()
        while not host.is_idle:
            await asyncio.sleep(0.01)
        steps = host.num_steps
        await asyncio.sleep(0.1)
        assert host.num_steps == steps < 2000

    with_host(root, test)


def test_more_rows_than_fit_wait_in_line_and_are_all_answered(root, monkeypatch):
    monkeypatch.setattr(hosts, "MAX_ROWS", 4)

    async def test(host):
        tickets = submit(host, 10, max_tokens=5)
        most = 0

        async def read(ticket):
            nonlocal most
            count = 0
            async for _ in ticket.stream():
                count += 1
                most = max(most, len(host.running))
            return count

        assert await asyncio.gather(*map(read, tickets)) == [5] * 10
        assert most <= 4

    with_host(root, test)


def test_a_full_line_is_refused_with_503(root, monkeypatch):
    monkeypatch.setattr(hosts, "MAX_ROWS", 1)
    monkeypatch.setattr(hosts, "MAX_WAITING", 2)

    async def test(host):
        submit(host, 2, max_tokens=3000)
        with pytest.raises(serve.ApiError) as error:
            submit(host, 3)
        assert error.value.status == 503

    with_host(root, test)


def test_a_row_says_the_same_alone_and_among_others(root):
    async def test(host):
        async def read(ticket):
            return [said.piece.token async for said in ticket.stream()]

        alone = await read(submit(host, 1, max_tokens=40)[0])
        together = await asyncio.gather(*map(read, submit(host, 8, max_tokens=40)))
        assert together[0] == alone

    with_host(root, test)


def test_a_model_that_fails_is_an_error_and_not_the_end(root):
    async def test(host):
        head = host.engine.model.head.weight
        kept = head.detach().clone()
        with torch.no_grad():
            head.fill_(float("nan"))
        with pytest.raises(serve.ApiError, match="not all finite"):
            async for _ in submit(host)[0].stream():
                pass
        with torch.no_grad():
            head.copy_(kept)
        assert [s async for s in submit(host, max_tokens=2)[0].stream()]

    with_host(root, test)
