"""The official clients, unmodified, against a real server on loopback; and many of them at once."""

import asyncio
import importlib.util
import json
import signal
import time
import urllib.request

import psutil
import pytest
import tiny_checkpoint
from serving import server

pytestmark = pytest.mark.slow


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: the `clients` extra")


HELLO = [{"role": "user", "content": "Hello"}]
LONGER = {"model.seq_len": 128, "train.batch_tokens": 512}
NUM_CLIENTS, LOAD_S, SETTLE_S = 64, 60, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, work = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("work")
    tiny_checkpoint.make(root / "champion", work, **LONGER)
    tiny_checkpoint.make_trial(root, work, 0, "keep", **LONGER)
    return root


@pytest.fixture(scope="module")
def address(root):
    with server(root) as (address, _):
        yield address


@needs("openai")
def test_the_openai_client_chats_completes_streams_and_counts(address):
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["champion", "first/000"]
    whole = client.chat.completions.create(
        model="champion", messages=HELLO, max_completion_tokens=16, seed=1, logprobs=True
    )
    assert whole.usage.completion_tokens == 16 and whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content) == 16
    stream = client.chat.completions.create(
        model="champion",
        messages=HELLO,
        max_tokens=16,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    text = client.completions.create(
        model="first/000", prompt="The night", max_tokens=8, n=2, extra_body={"top_k": 5}
    )
    assert len(text.choices) == 2 and text.usage.completion_tokens <= 16


@needs("openai")
def test_the_openai_client_raises_its_own_errors(address):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="champion", messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="champion", prompt="word " * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"


@needs("openai")
def test_a_key_is_asked_for_by_the_client_s_own_error(root):
    import openai

    with server(root, NIGHTSHIFT_API_KEY="secret") as (address, _):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="no").models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list().data


@needs("langchain_openai")
def test_langchain_chats_streams_and_counts(address):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model="champion", max_tokens=12, temperature=0.5
    )
    answer = model.invoke([("system", "Be brief."), ("human", "Hello")])
    assert isinstance(answer.content, str) and answer.usage_metadata["output_tokens"] == 12
    pieces = list(model.stream("Hello", stream_usage=True))
    assert len(pieces) > 2
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.usage_metadata["output_tokens"] == 12
    assert len(model.batch(["a", "b", "c"])) == 3


def test_ctrl_c_ends_the_server_at_once_and_quietly_also_during_an_answer(root):
    with server(root) as (address, process):
        body = json.dumps({"prompt": "The night", "max_tokens": 4000, "stream": True}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            assert b"the server stops" in answer.read()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@needs("openai")
def test_64_clients_for_a_minute_get_answers_and_memory_stays_flat(root):
    """A third streams, a third waits for whole answers, a third hangs up in the middle."""
    with server(root) as (address, process):
        counts, memory_mb = asyncio.run(load(address, psutil.Process(process.pid)))
    print(f"{counts}, memory {memory_mb[0]:.0f} -> {max(memory_mb):.0f} MB")
    assert counts["errors"] == 0 and min(counts["stream"], counts["whole"]) > NUM_CLIENTS
    assert counts["hung up"] > NUM_CLIENTS and counts["left"] == 0
    assert max(memory_mb) < 1.05 * memory_mb[0] + 10


async def load(address: str, process: psutil.Process) -> tuple[dict, list[float]]:
    """(what happened, resident MB each second after the first SETTLE_S)."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    counts = {"stream": 0, "whole": 0, "hung up": 0, "tokens": 0, "errors": 0}
    ends_at = time.monotonic() + LOAD_S

    async def one(number: int) -> None:
        kind = ("stream", "whole", "hung up")[number % 3]
        while time.monotonic() < ends_at:
            try:
                num_tokens = await request(client, kind, number)
                counts["tokens"] += num_tokens
                counts[kind] += 1
            except Exception as error:
                counts["errors"] += 1
                print(f"{type(error).__name__}: {error}")

    async def watch() -> list[float]:
        await asyncio.sleep(SETTLE_S)
        found = []
        while time.monotonic() < ends_at:
            found.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(1)
        return found

    memory, *_ = await asyncio.gather(watch(), *(one(i) for i in range(NUM_CLIENTS)))
    counts["left"] = await requests_left(address)
    return counts, memory


async def request(client, kind: str, number: int) -> int:
    """Tokens of the answer, where it came whole."""
    body = {"model": "champion", "messages": [{"role": "user", "content": f"Hello {number}"}]}
    if kind == "whole":
        answer = await client.chat.completions.create(**body, max_tokens=24)
        return answer.usage.completion_tokens
    limit = 24 if kind == "stream" else 2000
    stream = await client.chat.completions.create(**body, max_tokens=limit, stream=True)
    count, finish = 0, None
    async for chunk in stream:
        count, finish = count + 1, chunk.choices[0].finish_reason
        if kind == "hung up" and count == 4:
            await stream.close()
            return 0
    assert finish in ("stop", "length")
    return count


async def requests_left(address: str) -> int:
    """After at most 5 s: rows whose clients are gone must have ended."""
    import httpx

    async with httpx.AsyncClient() as client:
        for _ in range(50):
            state = (await client.get(f"{address}/health")).json()["requests"]
            if not sum(state.values()):
                return 0
            await asyncio.sleep(0.1)
    return sum(state.values())
