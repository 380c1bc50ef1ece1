"""OpenAI's API as data: what a request may say, what an answer and an error look like.

No network and no model here: `serve.py` has the routes, `hosts.py` the generation. A request that
breaks a rule raises ApiError, which carries OpenAI's status and body.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nightshift.fixed import conversation
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.generate import Sampling

MAX_NEW_TOKENS = 4096  # of one answer
MAX_ROWS = 64  # answers of one request
MAX_STOPS = 4  # OpenAI's limit
ROLE_NAMES = {"developer": "system", "function": "tool"}


class ApiError(Exception):
    """An answer with a status of 400 or more, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


# -- requests ------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Request(BaseModel):
    """What chat and plain completions share. top_k and repetition_penalty are ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # null: the default checkpoint
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    n: int | None = Field(None, ge=1, le=MAX_ROWS)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Refused where they would change the answer.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Without meaning here: clients send them, and the answer is the same.
    user: str | None = None
    metadata: dict | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_usage(self) -> bool:
        return not self.stream or bool(self.stream_options and self.stream_options.include_usage)

    def refused(self) -> list[str]:
        """Parameters that are set and not supported."""
        names = ("presence_penalty", "frequency_penalty", "logit_bias")
        return [name for name in names if getattr(self, name)]

    def limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many alternatives of each token are wanted; null: no log probabilities."""
        raise NotImplementedError


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list | None = None
    functions: list | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None

    def refused(self) -> list[str]:
        names = [name for name in ("tools", "functions") if getattr(self, name)]
        if (self.response_format or {}).get("type", "text") != "text":
            names.append("response_format")
        return super().refused() + names

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def refused(self) -> list[str]:
        names = [name for name in ("echo", "suffix") if getattr(self, name)]
        if (self.best_of or 1) != 1:
            names.append("best_of")
        return super().refused() + names

    def num_logprobs(self) -> int | None:
        return self.logprobs


def parse(kind: type[Request], body: bytes) -> Any:
    """A request from its JSON. Raises ApiError."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body of the request is no valid JSON.") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body of the request must be a JSON object.")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, kind) from None
    if refused := request.refused():
        message = f"'{refused[0]}' is not supported by this server; leave it out."
        raise ApiError(400, message, refused[0], "unsupported_parameter")
    if request.stream_options and not request.stream:
        message = "'stream_options' can only be given with 'stream': true."
        raise ApiError(400, message, "stream_options")
    return request


def _invalid(error: ValidationError, kind: type[Request]) -> ApiError:
    """The first mistake, in OpenAI's words where it has some."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        message = f"Unrecognized request argument supplied: {name}. Known: {known}"
        return ApiError(400, message, name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(
            400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter"
        )
    got = json.dumps(first.get("input"), default=str)[:60]
    rule = first["msg"].replace("Input should be", "it must be")
    return ApiError(400, f"Invalid value for '{name}' ({got}): {rule}.", name, "invalid_value")


def sampling(request: Request, seed: int | None, room: int) -> Sampling:
    """`room`: tokens that the window still holds, what is generated if the request sets no limit.

    Raises ApiError.
    """
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOPS or "" in stop:
        message = f"Invalid 'stop': at most {MAX_STOPS} texts, none of them empty."
        raise ApiError(400, message, "stop", "invalid_value")
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if (value := getattr(request, name)) is not None
    }
    limit = request.limit() or min(max(1, room), MAX_NEW_TOKENS)
    return Sampling(max_tokens=limit, stop=tuple(stop), seed=seed, **given)


def chat_prompt(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Raises ApiError."""
    messages = merged([_message(m, i) for i, m in enumerate(request.messages)])
    try:
        return conversation.prompt(messages, tokenizer)
    except ValueError as error:  # no conversation, or half a surrogate pair
        raise ApiError(400, str(error), "messages", "invalid_value") from None


def _message(message: dict, number: int) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_text(part, number) for part in content)
    if content is None and role == "assistant":  # it called a tool
        content = ""
    return {"role": ROLE_NAMES.get(role, role) if isinstance(role, str) else role} | {
        "content": content
    }


def _text(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    message = f"messages[{number}].content: this model reads text; parts must have type 'text'."
    raise ApiError(400, message, f"messages[{number}].content", "invalid_value")


def merged(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Neighbours of one role become one message: our format has the roles take turns."""
    found: list[dict[str, str]] = []
    for message in messages:
        texts = (
            found and isinstance(found[-1]["content"], str) and isinstance(message["content"], str)
        )
        if texts and found[-1]["role"] == message["role"] != "tool":
            both = f"{found[-1]['content']}\n\n{message['content']}"
            found[-1] = found[-1] | {"content": both}
        else:
            found.append(message)
    return found


def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Raises ApiError. Texts get <|bos|> in front; token ids are taken as they are."""
    prompt = request.prompt
    is_ids = isinstance(prompt, list) and prompt and all(isinstance(p, int) for p in prompt)
    several = [prompt] if isinstance(prompt, str) or is_ids else prompt
    try:
        found = [
            [tokenizer.bos, *tokenizer.encode(p)] if isinstance(p, str) else p for p in several
        ]
    except ValueError as error:
        raise ApiError(400, str(error), "prompt", "invalid_value") from None
    wrong = [t for ids in found for t in ids if not 0 <= t < tokenizer.vocab_size]
    if not found or not all(found) or wrong:
        what = f"token {wrong[0]} is not below {tokenizer.vocab_size}" if wrong else "it is empty"
        raise ApiError(400, f"Invalid 'prompt': {what}.", "prompt", "invalid_value")
    return found


def check_length(prompts: Sequence[Sequence[int]], seq_len: int, param: str) -> None:
    """Raises ApiError for a prompt that leaves no room for an answer."""
    longest = max(map(len, prompts))
    if longest >= seq_len:
        message = (
            f"This model's maximum context length is {seq_len} tokens, and the prompt has "
            f"{longest}. Shorten it"
            + (" or leave out the oldest messages." if param == "messages" else ".")
        )
        raise ApiError(400, message, param, "context_length_exceeded")


# -- answers -------------------------------------------------------------------------------------


@dataclass
class TokenLogprob:
    """One generated token, its log probability and the likeliest ones in its place."""

    text: str
    bytes: list[int]
    logprob: float
    top: list[tuple[str, list[int], float]] = field(default_factory=list)


@dataclass
class Answer:
    """Frame of all the bodies of one request."""

    is_chat: bool
    model: str
    num_prompt_tokens: int
    num_tokens: int = 0  # generated so far
    id: str = ""
    created: int = 0

    def __post_init__(self):
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def body(self, choices: list[dict]) -> dict:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage()}

    def chunk(self, choices: list[dict]) -> dict:
        return self._frame("chat.completion.chunk" if self.is_chat else "text_completion", choices)

    def _frame(self, kind: str, choices: list[dict]) -> dict:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return frame | {"system_fingerprint": None, "choices": choices}

    def usage(self) -> dict:
        total = self.num_prompt_tokens + self.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": total,
        }

    def choice(
        self, index: int, text: str, finish: str, logprobs: list[TokenLogprob] | None
    ) -> dict:
        """A whole choice."""
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.is_chat
            else {"text": text}
        )
        return {
            "index": index,
            **said,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": finish,
        }

    def opening(self, index: int) -> dict:
        """The first piece of a streamed chat choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(
        self, index: int, text: str, finish: str | None, logprobs: list[TokenLogprob] | None
    ) -> dict:
        """A streamed piece of a choice."""
        said = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return {
            "index": index,
            **said,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": finish,
        }

    def logprobs(self, tokens: list[TokenLogprob] | None) -> dict | None:
        if tokens is None:
            return None
        if self.is_chat:
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        offsets, offset = [], 0
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # Reversed: of several tokens with one text (halves of characters) the likeliest stays.
            "top_logprobs": [{text: value for text, _, value in reversed(t.top)} for t in tokens],
            "text_offset": offsets,
        }


def _chat_logprob(token: TokenLogprob) -> dict:
    top = [{"token": t, "bytes": b, "logprob": value} for t, b, value in token.top]
    said = {"token": token.text, "bytes": token.bytes, "logprob": token.logprob}
    return said | {"top_logprobs": top}


def event(body: dict | Literal["[DONE]"]) -> bytes:
    """One server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
