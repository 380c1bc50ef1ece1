"""One call of a language model: made by LangChain, bounded in time, retried, counted.

LangChain is imported here and nowhere else, when a study first needs it. A call runs in a thread of
its own: the deadline holds for the whole answer (a client's timeout starts again with each byte),
and Ctrl-C is seen at once. A call that is given up is left behind; the client ends it.

Covered: a provider that is down, slow, limits the rate (Retry-After), is out of credit, refuses the
key, or answers what is no answer. Each attempt is in the ledger with what it cost.
"""

import copy
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from agent.costs import CHARS_PER_TOKEN, Ledger, Prices
from agent.quote import plain
from agent.settings import LlmSettings, StudyError
from agent.trial import Stop

EXTRAS = {"openai": "llm", "anthropic": "anthropic", "ollama": "ollama"}  # of pyproject.toml
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
# These refuse tools in chat completions; of later ones LangChain knows it.
WANTS_RESPONSES = re.compile(r"openai:gpt-5\.[4-9]")
FIRST_WAIT_S = 1.0  # doubled with each retry
MAX_MESSAGE_CHARS = 300
POLL_S = 0.05
WRITTEN = ("content", "tool_calls", "invalid_tool_calls", "additional_kwargs")  # by the model
TOO_LONG = ("context_length", "context length", "context size")
NO_CREDIT = ("insufficient_quota", "credit balance", "billing", "payment required")


class CallFailed(Exception):
    """No answer. `kind` in words, `retry`: may it work later?, `wait_s`: what the server asked."""

    def __init__(self, kind: str, message: str, retry: bool, wait_s: float | None = None):
        super().__init__(f"{kind}: {message}")
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


def open_model(settings: LlmSettings) -> Any:
    """LangChain's chat model. Raises StudyError: the package or the key that is missing."""
    provider = settings.model.split(":")[0]
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        raise StudyError(
            "study.sources.llm: LangChain is not installed. Run: pip install -e '.[llm]', or give "
            "study.sources={sampler: 1, recipes: 1}"
        ) from None
    given = {
        "timeout": settings.timeout_s,
        "max_retries": 0,
        "max_tokens": settings.longest_answer,
    }
    given |= {"base_url": settings.base_url, "temperature": settings.temperature}
    if (key := KEYS.get(provider)) and not os.environ.get(key):
        if not settings.base_url:
            raise StudyError(f"study.llm.model ({settings.model}): set {key} to your key")
        given["api_key"] = "none"  # a server of one's own asks for none
    if provider == "openai" and WANTS_RESPONSES.match(settings.model):
        given["use_responses_api"] = True
    if provider == "ollama":
        given["num_predict"] = given.pop("max_tokens")
        if settings.output == "schema":  # else it cuts the prompt without a word
            given["num_ctx"] = settings.context_tokens
        given["client_kwargs"] = {"timeout": given.pop("timeout")}
        given.pop("max_retries")
    try:
        return init_chat_model(settings.model, **{k: v for k, v in given.items() if v is not None})
    except ImportError:
        extra = EXTRAS.get(provider)
        how = f"pip install -e '.[{extra}]'" if extra else f"pip install langchain-{provider}"
        raise StudyError(
            f"study.llm.model ({settings.model}): the package for {provider} is not installed. "
            f"Run: {how}"
        ) from None
    except Exception as error:  # each provider has its own for what it cannot start with
        said = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
        raise StudyError(f"study.llm.model ({settings.model}): {said}") from None


def constraint(settings: LlmSettings, schema: dict[str, Any]) -> dict[str, Any]:
    """How a schema is sent. Raises StudyError where no way is known.

    `json_object` with a schema beside it is llama.cpp's own form: its server in Python refuses
    `json_schema`. In the raw body, because the client reads an answer to its own `response_format`
    and fails on one that was cut; and it sends the limit as `max_completion_tokens`, which that
    server does not know.
    """
    provider = str(settings.model).split(":")[0]
    if provider == "ollama":
        return {"format": schema}
    if provider == "openai" and settings.base_url:
        given = {"type": "json_object", "schema": schema}
        body = {"response_format": given, "max_tokens": settings.longest_answer}
        return {"extra_body": body}
    raise StudyError(
        f"study.llm.output=schema: not known how {settings.model} takes a schema. Give "
        "study.llm.base_url of a llama.cpp server, an ollama model, or study.llm.output=tools"
    )


class Caller:
    """The one way to the model in a study."""

    def __init__(self, settings: LlmSettings, ledger: Ledger, stop: Stop):
        self.settings, self.ledger = settings, ledger
        self.stop = stop  # looked at all the time
        self.stop_between = Stop()  # looked at between calls, none of which it cuts off
        self.show: Callable[[str], None] = lambda doing: None  # for the live view
        self.model = open_model(settings)
        if settings.output == "schema":
            constraint(settings, {})  # whether there is a way is best told at the start
        self.prices = Prices(settings)
        caps = settings.cap_dollars
        if not self.prices.known and (caps.call or caps.trial or caps.study):
            raise StudyError(
                f"study.llm.cap_dollars: no price is known for {settings.model}. Give "
                "study.llm.price={input: ..., output: ...} (dollars per million tokens) or a cap "
                "in tokens, study.llm.cap_tokens.study=..."
            )

    def beside(self, stop: Stop, stop_between: Stop) -> "Caller":
        """The same, while the live view and the first `stop` are the running trial's."""
        other = copy.copy(self)
        other.stop, other.stop_between, other.show = stop, stop_between, lambda doing: None
        return other

    def ask(
        self,
        trial: int,
        purpose: str,
        messages: list,
        tools: list[dict],
        schema: dict | None = None,
    ) -> Any:
        """The model's answer (AIMessage). Raises CallFailed, Paused or Interrupted.

        `schema`: of an answer in JSON, for a server that constrains decoding by it.
        """
        model = self.model.bind_tools(tools) if tools else self.model
        if schema:
            model = self.model.bind(**constraint(self.settings, schema))
        for attempt in range(self.settings.max_retries + 1):
            try:
                return self._attempt(trial, purpose, model, messages, tools)
            except CallFailed as failed:
                wait_s = failed.wait_s or FIRST_WAIT_S * 2**attempt * random.uniform(0.8, 1.2)
                last = attempt == self.settings.max_retries
                if last or not failed.retry or wait_s > self.settings.max_wait_s:
                    raise
                self.show(f"{failed.kind}; trying again in {wait_s:.0f} s")
                self._wait(wait_s)

    def _attempt(self, trial: int, purpose: str, model, messages: list, tools: list[dict]):
        self.stop.check()
        self.stop_between.check()
        most = self._most(messages, tools)
        self.ledger.must_fit(trial, most, self.settings)
        number = self.ledger.begin(trial, purpose, self.settings.model, most)
        started = time.monotonic()
        try:
            answer = self._in_time(lambda: model.invoke(messages))
        except CallFailed as failed:
            seconds = round(time.monotonic() - started, 3)
            self.ledger.end(number, failed.kind, message=str(failed), seconds=seconds)
            self.ledger.event(trial, f"call {number}: {failed}")
            raise
        seconds = round(time.monotonic() - started, 3)
        self.ledger.end(number, "ok", seconds=seconds, **self._charged(answer, most))
        return answer

    def _most(self, messages: list, tools: list[dict]) -> dict[str, Any]:
        """What a call can cost, about: all that is sent, and the longest answer."""
        chars = sum(len(str(m.content)) + len(str(getattr(m, "tool_calls", ""))) for m in messages)
        tokens = (chars + len(str(tools))) // CHARS_PER_TOKEN
        longest = self.settings.longest_answer
        dollars = self.prices.dollars(tokens, longest)
        return {"input_tokens": tokens, "output_tokens": longest, "dollars": dollars}

    def _charged(self, answer: Any, most: dict[str, Any]) -> dict[str, Any]:
        """By the provider's count; `estimated` where it gave none, or what is no count."""
        usage, facts = answer.usage_metadata or {}, {}
        if not all(is_count(usage.get(name)) for name in ("input_tokens", "output_tokens")):
            written = len(str(answer.content)) + len(str(answer.tool_calls))
            usage = {
                "input_tokens": most["input_tokens"],
                "output_tokens": written // CHARS_PER_TOKEN,
            }
            facts["estimated"] = True
        details = usage.get("input_token_details") or {}
        counts = [details.get(name) for name in ("cache_read", "cache_creation")]
        cached, written = [count if is_count(count) else 0 for count in counts]
        tokens = {name: usage[name] for name in ("input_tokens", "output_tokens")}
        dollars = self.prices.dollars(*tokens.values(), cached, written)
        return facts | tokens | {"cached_tokens": cached, "dollars": dollars}

    def _in_time(self, invoke: Callable[[], Any]) -> Any:
        box: queue.SimpleQueue = queue.SimpleQueue()

        def work():
            try:
                box.put((invoke(), None))
            except BaseException as error:  # whatever it is, the loop has to hear of it
                box.put((None, error))

        threading.Thread(target=work, daemon=True, name="model call").start()
        deadline = time.monotonic() + self.settings.timeout_s
        while time.monotonic() < deadline:
            self.stop.check()
            try:
                answer, error = box.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if error is not None:
                raise failure_of(error)
            if not hasattr(answer, "tool_calls"):
                raise CallFailed("no answer", f"got {type(answer).__name__}", retry=True)
            return answer.model_copy(
                update={name: encodable(getattr(answer, name)) for name in WRITTEN}
            )
        message = f"no whole answer within {self.settings.timeout_s:g} s (study.llm.timeout_s)"
        raise CallFailed("timeout", message, retry=True)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.stop.check()
            self.stop_between.check()
            time.sleep(POLL_S)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def encodable(value: Any) -> Any:
    """With a ? for each half of a surrogate pair: the answer is sent again, and kept, in UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {encodable(key): encodable(each) for key, each in value.items()}
    return [encodable(each) for each in value] if isinstance(value, list) else value


def failure_of(error: BaseException) -> CallFailed:
    """What a client's exception means. Clients share `status_code` and the names of classes."""
    said = plain(" ".join(str(error).split()))[:MAX_MESSAGE_CHARS]
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    code = str(getattr(error, "code", ""))
    if status == 402 or any(words in f"{code} {said}".lower() for words in NO_CREDIT):
        return CallFailed("out of credit", said, retry=False)
    if status == 429:
        return CallFailed("rate limited", said, retry=True, wait_s=retry_after_s(response))
    if status in (401, 403):
        return CallFailed("key refused", said, retry=False)
    if status in (408, 409) or "Timeout" in names:
        return CallFailed("timeout", said, retry=True)
    if status is not None and any(words in f"{code} {said}".lower() for words in TOO_LONG):
        move = "Give the server a longer context, or study.llm.output=schema and lower "
        said = f"{said.rstrip('.')}. {move}study.llm.context_tokens"
        return CallFailed("context too small", said, retry=False)
    if status is not None and 400 <= status < 500:
        return CallFailed("request refused", said, retry=False)
    if status is not None and status >= 500:
        return CallFailed("provider down", said, retry=True, wait_s=retry_after_s(response))
    if "Connect" in names or "Network" in names or "Protocol" in names or "ReadError" in names:
        return CallFailed("provider down", said, retry=True)
    return CallFailed("garbage", f"{type(error).__name__}: {said}", retry=True)


def retry_after_s(response: Any) -> float | None:
    """Seconds of a Retry-After header, in seconds or as a date; None without one."""
    value = getattr(response, "headers", {}).get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
