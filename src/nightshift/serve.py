"""Talk to checkpoints over HTTP: OpenAI's API, and a web page on the same address.

    nightshift serve                      the champion (tuned to chat, if it is), on http://127.0.0.1:8000
    nightshift serve first/4 --port 9000  another default; every checkpoint can be asked for
    NIGHTSHIFT_API_KEY=... nightshift serve --host 0.0.0.0

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Routes: GET /v1/models, POST /v1/chat/completions, POST /v1/completions (both also streamed), GET
/checkpoints (what the page's picker shows), GET /health and the page. `model` is a name of
catalogue.py. Without a key every program of this machine may use it; a page of another site may not
(its Origin is refused), nor one that resolves its own name to this address (its Host is refused).
"""

import argparse
import asyncio
import hmac
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nightshift import catalogue, openai_api
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.hosts import Closed, Host, Hosts, Said, Ticket
from nightshift.openai_api import Answer, ApiError, ChatRequest, CompletionRequest, event
from nightshift.ui import free_port

PAGE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES = 4 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEY_VARIABLE = "NIGHTSHIFT_API_KEY"


def build_app(hosts: Hosts, api_key: str | None = None, host: str = LOOPBACK[0]) -> Starlette:
    """`host` is the address that is listened on: on loopback only its names are answered to."""

    @asynccontextmanager
    async def lifespan(app):
        yield
        hosts.close()
        await asyncio.to_thread(hosts.join)

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/checkpoints", checkpoints),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    handlers = {ApiError: api_error, HTTPException: http_error, Exception: our_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.state.hosts = hosts
    app.add_middleware(Guard, api_key=api_key, host=host)
    return app


class Guard:
    """Refuses strangers before a route runs: Host, Origin, key. Streams pass it untouched."""

    def __init__(self, app, api_key: str | None, host: str):
        self.app, self.api_key, self.is_loopback = app, api_key, host in LOOPBACK

    async def __call__(self, scope, receive, send):
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (JSONResponse(refusal.body(), refusal.status) if refusal else self.app)(
            scope, receive, send
        )

    def refusal(self, scope) -> ApiError | None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        host = headers.get("host", b"").decode("latin-1")
        if self.is_loopback and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return ApiError(403, f"This server answers on loopback; the Host {host!r} is not.")
        origin = headers.get("origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != host:
            return ApiError(403, f"Pages of {origin!r} may not use this server.")
        if self.api_key and scope["path"].startswith(("/v1/", "/checkpoints")):
            return self._wrong_key(headers.get("authorization", b""))
        return None

    def _wrong_key(self, given: bytes) -> ApiError | None:
        wanted = f"Bearer {self.api_key}".encode()
        if hmac.compare_digest(given, wanted):  # takes the same time wherever they differ
            return None
        message = "Incorrect API key provided. Send it as 'Authorization: Bearer <key>'."
        return ApiError(401, message, code="invalid_api_key")


# -- errors --------------------------------------------------------------------------------------


async def api_error(request: HttpRequest, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


async def http_error(request: HttpRequest, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    what = "Method not allowed" if error.status_code == 405 else "Invalid URL"
    return JSONResponse(ApiError(error.status_code, f"{what} ({where})").body(), error.status_code)


async def our_error(request: HttpRequest, error: Exception) -> Response:
    """Starlette prints the traceback; the client need not see it."""
    return JSONResponse(ApiError(500, "The server had an error.").body(), 500)


# -- what there is -------------------------------------------------------------------------------


async def page(request: HttpRequest) -> Response:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


async def health(request: HttpRequest) -> Response:
    loaded = request.app.state.hosts.loaded
    state = {name: len(h.running) + len(h.waiting) for name, h in loaded.items()}
    return JSONResponse({"status": "ok", "requests": state})


async def checkpoints(request: HttpRequest) -> Response:
    """Every checkpoint, also those that were not kept: the picker says so."""
    hosts = request.app.state.hosts
    found = await asyncio.to_thread(catalogue.entries, hosts.root)
    if hosts.default.name not in {entry.name for entry in found}:
        found.insert(0, hosts.default)
    rows = [
        {"name": e.name, "title": e.title, "val_bpb": e.val_bpb, "chat_bpb": e.chat_bpb}
        | {"decision": e.decision, "is_kept": e.is_kept}
        for e in found
    ]
    return JSONResponse({"default": hosts.default.name, "checkpoints": rows})


async def models(request: HttpRequest) -> Response:
    hosts = request.app.state.hosts
    found = await asyncio.to_thread(catalogue.entries, hosts.root)
    kept = {e.name: e for e in [hosts.default, *found] if e.is_kept}
    return JSONResponse({"object": "list", "data": [model_body(e) for e in kept.values()]})


async def model(request: HttpRequest) -> Response:
    entry = await asyncio.to_thread(request.app.state.hosts.entry, request.path_params["name"])
    return JSONResponse(model_body(entry))


def model_body(entry: catalogue.Entry) -> dict:
    body = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "nightshift"}
    return body | {"title": entry.title, "val_bpb": entry.val_bpb, "decision": entry.decision}


# -- generation ----------------------------------------------------------------------------------


async def chat_completions(request: HttpRequest) -> Response:
    wanted = openai_api.parse(ChatRequest, await body_of(request))
    return await answer(request, wanted, "messages")


async def completions(request: HttpRequest) -> Response:
    wanted = openai_api.parse(CompletionRequest, await body_of(request))
    return await answer(request, wanted, "prompt")


async def body_of(request: HttpRequest) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The request is larger than {MAX_BODY_BYTES} bytes.")
    return body


async def answer(request: HttpRequest, wanted: openai_api.Request, param: str) -> Response:
    host, tickets, num_prompt_tokens = await begin(request.app.state.hosts, wanted, param)
    frame = Answer(param == "messages", host.entry.name, num_prompt_tokens)
    if wanted.stream:
        events = stream(frame, wanted, tickets)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
    choices = await unless_gone(request, whole(frame, tickets), tickets)
    return JSONResponse(frame.body(choices))


async def begin(
    hosts: Hosts, wanted: openai_api.Request, param: str
) -> tuple[Host, list[Ticket], int]:
    """The model, a ticket for each answer, the length of all prompts. Raises ApiError."""
    while True:
        host = await hosts.get(wanted.model)
        prompts = await asyncio.to_thread(prompts_of, wanted, host, param)
        jobs = answers_wanted(wanted, prompts, host.seq_len)
        try:
            tickets = host.submit(*zip(*jobs, strict=True), wanted.num_logprobs())
            return host, tickets, sum(map(len, prompts))
        except Closed:
            continue


def prompts_of(wanted: openai_api.Request, host: Host, param: str) -> list[list[int]]:
    """Raises ApiError."""
    if param == "messages":
        prompts = [openai_api.chat_prompt(wanted, host.tokenizer)]
    else:
        prompts = openai_api.completion_prompts(wanted, host.tokenizer)
    openai_api.check_length(prompts, host.seq_len, param)
    return prompts


def answers_wanted(wanted: openai_api.Request, prompts: Sequence[list[int]], seq_len: int):
    """(prompt, sampling) of each answer: n for each prompt, each with a seed of its own."""
    n = wanted.n or 1
    if n * len(prompts) > openai_api.MAX_ROWS:
        message = f"Too many answers at once ({n} x {len(prompts)}); {openai_api.MAX_ROWS} may be."
        raise ApiError(400, message, "n", "invalid_value")
    return [
        (
            prompt,
            openai_api.sampling(
                wanted,
                None if wanted.seed is None else wanted.seed + number,
                seq_len - len(prompt),
            ),
        )
        for prompt in prompts
        for number in range(n)
    ]


async def whole(frame: Answer, tickets: Sequence[Ticket]) -> list[dict]:
    """All choices, finished."""

    async def one(index: int, ticket: Ticket) -> dict:
        said = [each async for each in ticket.stream()]
        text = "".join(each.piece.text for each in said)
        frame.num_tokens += len(said)
        return frame.choice(index, text, said[-1].piece.finish, logprobs_of(ticket, said))

    return await asyncio.gather(*(one(i, ticket) for i, ticket in enumerate(tickets)))


def logprobs_of(ticket: Ticket, said: Sequence[Said]):
    if ticket.top is None:
        return None
    return [each.logprob for each in said if each.logprob is not None]


async def unless_gone(request: HttpRequest, work, tickets: Sequence[Ticket]):
    """The result of `work`; if the client hangs up first, its rows end and nobody is answered."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client closed the connection.")
    finally:
        for ticket in tickets:
            ticket.cancel()
        working.cancel()
        watching.cancel()


async def hung_up(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(
    frame: Answer, wanted: openai_api.Request, tickets: Sequence[Ticket]
) -> AsyncIterator[bytes]:
    """Server-sent events. Starlette closes this generator when the client hangs up."""
    usage = {"usage": None} if wanted.wants_usage else {}
    try:
        if frame.is_chat:
            for index in range(len(tickets)):
                yield event(frame.chunk([frame.opening(index)]) | usage)
        async with aclosing(together(tickets)) as pieces:
            async for index, said in pieces:
                frame.num_tokens += 1
                piece, logprobs = said.piece, logprobs_of(tickets[index], [said])
                if piece.text or piece.finish or logprobs:
                    choice = frame.piece(index, piece.text, piece.finish, logprobs)
                    yield event(frame.chunk([choice]) | usage)
        if wanted.wants_usage:
            yield event(frame.chunk([]) | {"usage": frame.usage()})
        yield event("[DONE]")
    except ApiError as error:  # the status is sent already: OpenAI's clients look for this
        yield event(error.body())
    finally:
        for ticket in tickets:
            ticket.cancel()


async def together(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Said]]:
    """The pieces of all tickets as they come."""
    if len(tickets) == 1:
        async for said in tickets[0].stream():
            yield 0, said
        return
    queue: asyncio.Queue = asyncio.Queue()

    async def forward(index: int, ticket: Ticket) -> None:
        try:
            async for said in ticket.stream():
                queue.put_nowait((index, said))
        except ApiError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(i, ticket)) for i, ticket in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            index, said = await queue.get()
            if isinstance(said, ApiError):
                raise said
            yield index, said
            left -= said.piece.finish is not None
    finally:
        for task in tasks:
            task.cancel()


# -- the command ---------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Says where it is when it is there; ends open answers when it is told to stop."""

    def __init__(self, app: Starlette, host: str, port: int, greeting: str):
        settings = {"log_level": "warning", "timeout_graceful_shutdown": 5}
        super().__init__(uvicorn.Config(app, host=host, port=port, **settings))
        self.hosts, self.greeting = app.state.hosts, greeting

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)

    def handle_exit(self, number, frame) -> None:
        """With an error event as their last: else uvicorn would wait for them."""
        self.hosts.close()
        super().handle_exit(number, frame)


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    api_key = os.environ.get(KEY_VARIABLE) or None
    try:
        default = choose(args.checkpoint, args.root)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        port = free_port(args.host, args.port)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.host not in LOOPBACK and not api_key:
        print(f"anybody who reaches {args.host} can use it: set {KEY_VARIABLE}", file=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a client that is gone is no news
    app = build_app(Hosts(default, device, args.keep_loaded, args.root), api_key, args.host)
    place = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}"
    greeting = f"{default.name} on {place}  (API: {place}/v1)\nCtrl-C stops it."
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        Server(app, args.host, port, greeting).run()
    return 0


def choose(name: str | None, root: Path) -> catalogue.Entry:
    return catalogue.find(name, root) if name else catalogue.default(root)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="nightshift serve", description=__doc__.splitlines()[0])
    found.add_argument("checkpoint", nargs="?", help="default model: champion, first/4, a folder")
    found.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout whose models are shown"
    )
    found.add_argument("--host", default=LOOPBACK[0], help="address to listen on (%(default)s)")
    found.add_argument("--port", type=int, default=8000, help="first port to try (%(default)s)")
    found.add_argument("--device", help="cpu or cuda (cuda if there is one)")
    found.add_argument("--num-threads", type=int, help="of the CPU for one step")
    found.add_argument(
        "--keep-loaded", type=int, default=4, help="models that stay in memory (%(default)s)"
    )
    found.error = lambda message: found.exit(2, f"{found.prog}: {message}\n")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
