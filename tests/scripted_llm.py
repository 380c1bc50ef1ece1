"""An OpenAI-compatible server on loopback that answers by a script and counts what it charged.

It speaks both of OpenAI's ways, by the path that is asked for: chat completions, and responses (as
reasoning models with tools demand): there an answer has a reasoning item before it.

    with ScriptedServer([propose(title=...), fail(429, retry_after=1), say("hello")]) as server:
        ... study.llm.base_url=server.url
        server.tokens        # (input, output) of all answers that were sent whole

An entry of the script is a Reply, or a function of the request that gives one. When the script is
at its end its last entry is repeated.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Reply:
    message: dict[str, Any] | None = None  # the assistant's; None: `body` as it stands
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    wait_s: float = 0.0  # before the first byte
    drip_s: float = 0.0  # between bytes of the body: a server that never ends
    drop: bool = False  # hang up without a word
    finish: str = "stop"
    usage: bool | dict[str, Any] = True  # its own count; none; or these words in its place


Entry = Reply | Callable[[dict[str, Any]], Reply]


def say(content: str, **more) -> Reply:
    return Reply(message={"role": "assistant", "content": content}, **more)


def refuse(words: str) -> Reply:
    message = {"role": "assistant", "content": None, "refusal": words}
    return Reply(message=message, finish="content_filter")


def use(*calls: tuple[str, Any], **more) -> Reply:
    """Tool calls; arguments that are text go out as they are, however broken."""
    listed = [
        {
            "id": f"call_{time.monotonic_ns()}_{n}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": given if isinstance(given, str) else json.dumps(given),
            },
        }
        for n, (name, given) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": listed}
    return Reply(message=message, **{"finish": "tool_calls"} | more)


def propose(**answer) -> Reply:
    given = {"title": "t", "hypothesis": "h", "expected_effect": "-0.01"} | answer
    return use(("propose", given))


def an_edit(search: str, replace: str, path: str = "src/nightshift/model.py") -> dict[str, str]:
    return {"path": path, "search": search, "replace": replace}


def fail(status: int, message: str = "no", code: str | None = None, **headers: Any) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}})
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return Reply(status=status, body=body, headers=named)


def response(request: dict[str, Any], reply: Reply, asked: int, answered: int) -> dict[str, Any]:
    """The same answer as an object of the Responses API."""
    message, number = reply.message, time.monotonic_ns()
    items: list[dict] = [{"type": "reasoning", "id": f"rs_{number}", "summary": []}]
    parts = []
    if message.get("refusal"):
        parts.append({"type": "refusal", "refusal": message["refusal"]})
    if message.get("content"):
        parts.append({"type": "output_text", "text": message["content"], "annotations": []})
    if parts:
        said = {"type": "message", "id": f"msg_{number}", "role": "assistant"}
        items.append(said | {"status": "completed", "content": parts})
    for place, call in enumerate(message.get("tool_calls") or []):
        named = {"type": "function_call", "id": f"fc_{number}_{place}", "call_id": call["id"]}
        items.append(named | call["function"] | {"status": "completed"})
    return {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": 0,
        "status": "completed",
        "model": request["model"],
        "output": items,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked + answered,
        },
    }


class ScriptedServer:
    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.requests: list[dict[str, Any]] = []
        self.input_tokens = self.output_tokens = self.answered = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    @property
    def tokens(self) -> tuple[int, int]:
        return self.input_tokens, self.output_tokens

    def text_of(self, number: int) -> str:
        """All text of a request's messages."""
        request = self.requests[number]
        return json.dumps(request.get("messages") or request["input"], ensure_ascii=False)

    def next_reply(self, request: dict[str, Any]) -> Reply:
        with self.lock:
            entry = self.entries[min(len(self.requests), len(self.entries) - 1)]
            self.requests.append(request)
        return entry if isinstance(entry, Reply) else entry(request)

    def completion(self, request: dict[str, Any], reply: Reply) -> tuple[str, int, int]:
        """The body of an answer, and what it is charged: a token is four characters."""
        asked = len(json.dumps(request)) // 4
        answered = max(1, len(json.dumps(reply.message)) // 4)
        if "input" in request:
            return json.dumps(response(request, reply, asked, answered)), asked, answered
        body = {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model", "m"),
            "choices": [{"index": 0, "message": reply.message, "finish_reason": reply.finish}],
        }
        if isinstance(reply.usage, dict):
            body["usage"] = reply.usage
        elif reply.usage:
            total = asked + answered
            body["usage"] = {
                "prompt_tokens": asked, "completion_tokens": answered, "total_tokens": total
            }  # fmt: skip
        return json.dumps(body), asked, answered

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                request = json.loads(self.rfile.read(length))
                reply = server.next_reply(request)
                try:
                    self.answer(request, reply)
                except OSError:
                    self.close_connection = True  # the client went away

            def answer(self, request, reply):
                time.sleep(reply.wait_s)
                if reply.drop:
                    self.close_connection = True
                    return
                body, asked, answered = reply.body, 0, 0
                if reply.message is not None:
                    body, asked, answered = server.completion(request, reply)
                data = body.encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if reply.drip_s:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply.drip_s)
                with server.lock:  # before the client can know: it may ask for the count at once
                    server.input_tokens += asked
                    server.output_tokens += answered
                    server.answered += reply.message is not None
                self.wfile.write(data)

        return Handler
