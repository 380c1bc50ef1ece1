"""Requests are checked as OpenAI checks them; every refusal names the parameter and the rule."""

import json

import pytest

from nightshift import openai_api
from nightshift.fixed import conversation
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.openai_api import ApiError, ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)}, r"[\s\S]")


def chat(**values) -> ChatRequest:
    return openai_api.parse(ChatRequest, json.dumps({"messages": HELLO} | values).encode())


def text(**values) -> CompletionRequest:
    return openai_api.parse(CompletionRequest, json.dumps({"prompt": "a"} | values).encode())


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": ["hi"]}, "messages", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, "max_tokens", "invalid_value"),
        ({"seed": 0.5}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(values, param, code):
    with pytest.raises(ApiError) as error:
        chat(**values)
    body = error.value.body()["error"]
    assert error.value.status == 400 and body["type"] == "invalid_request_error"
    assert (body["param"], body["code"]) == (param, code)
    assert param in body["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError, match="JSON"):
        openai_api.parse(ChatRequest, body)


def test_a_missing_parameter_is_named():
    with pytest.raises(ApiError, match="Missing required parameter: 'messages'"):
        openai_api.parse(ChatRequest, b"{}")


def test_what_clients_send_without_meaning_is_accepted():
    assert chat(
        user="me",
        metadata={},
        store=False,
        logit_bias={},
        tools=[],
        presence_penalty=0.0,
        response_format={"type": "text"},
        parallel_tool_calls=True,
        stop=None,
        seed=None,
    )


def test_settings_reach_the_sampling():
    wanted = chat(temperature=0, top_p=0.5, top_k=3, stop="x", max_completion_tokens=7)
    sampling = openai_api.sampling(wanted, seed=5, room=100)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert (sampling.stop, sampling.max_tokens, sampling.seed) == (("x",), 7, 5)


def test_without_a_limit_the_answer_may_fill_the_window():
    assert openai_api.sampling(chat(), None, room=100).max_tokens == 100
    assert openai_api.sampling(chat(), None, room=10**9).max_tokens == openai_api.MAX_NEW_TOKENS


@pytest.mark.parametrize("stop", [["a"] * 5, ["a", ""], ""])
def test_stop_texts_have_their_limits(stop):
    with pytest.raises(ApiError, match="stop"):
        openai_api.sampling(chat(stop=stop), None, 10)


def test_messages_become_our_chat_format(tokenizer):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "y"}],
        },
        {"role": "user", "content": "you", "name": "someone"},
    ]
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hey\n\nyou"},
    ]
    wanted = chat(messages=messages)
    assert openai_api.chat_prompt(wanted, tokenizer) == conversation.prompt(expected, tokenizer)


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([{"role": "wizard", "content": "x"}], "role"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text"),
        ([*HELLO, {"role": "assistant", "content": "x"}], "last message"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(tokenizer, messages, rule):
    with pytest.raises(ApiError, match=rule) as error:
        openai_api.chat_prompt(chat(messages=messages), tokenizer)
    assert error.value.status == 400 and error.value.param.startswith("messages")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98]], [[97], [98]]),
        ("", [[256]]),
    ],
)
def test_prompts_are_texts_or_tokens(tokenizer, prompt, expected):
    assert openai_api.completion_prompts(text(prompt=prompt), tokenizer) == expected


@pytest.mark.parametrize("prompt", [[], [[]], [999], [-1]])
def test_prompts_of_nothing_or_of_unknown_tokens_are_refused(tokenizer, prompt):
    with pytest.raises(ApiError, match="Invalid 'prompt'"):
        openai_api.completion_prompts(text(prompt=prompt), tokenizer)


def test_a_prompt_without_room_for_an_answer_is_too_long():
    openai_api.check_length([[1] * 31], 32, "prompt")
    with pytest.raises(ApiError) as error:
        openai_api.check_length([[1], [1] * 32], 32, "messages")
    assert error.value.code == "context_length_exceeded" and "32 tokens" in error.value.message
