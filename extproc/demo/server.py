"""The demo provider's edge: aiohttp routes that read a request, let the wire modules answer, and pace the stream.

It listens on a Unix socket that only Envoy's user can open, or on a host and port. The surprising thing: it logs
nothing, not even paths. What passes through it is a person's prompt, and the gateway's own record has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from extproc.demo import anthropic, chat, completions, embeddings, lifeline, responses
from extproc.demo.answers import answer, prompt_tokens
from extproc.demo.schema import UnsatisfiableError
from extproc.demo.tokens import Split, o200k
from extproc.demo.wire import Refused, Stamp, dump, invalid, parse
from extproc.errors import Code, Dialect, Refusal, error_body

MODELS = ("demo", "demo-embedding")
MODELS_CREATED = 1_767_225_600
"""2026-01-01, in seconds: a model list must give a date and should not change from run to run."""

MAX_BODY_BYTES = 64 << 20
INLINE_BYTES = 16 << 10
"""Above this a body is answered on a thread: counting its tokens would hold up every open stream."""

DRAIN_S = 5.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Ready = tuple[bytes, None] | tuple[None, Iterable[bytes]]
"""An answer: the JSON body, or the events of a stream."""


@dataclass(frozen=True, slots=True)
class Demo:
    """The demo provider. `token_delay_s` is what lies between two events of a stream, so that a person sees it flow."""

    split: Split
    token_delay_s: float

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        app.router.add_post("/v1/chat/completions", self._endpoint(self.chat))
        app.router.add_post("/v1/completions", self._endpoint(self.completions))
        app.router.add_post("/v1/responses", self._endpoint(self.responses))
        app.router.add_post("/v1/embeddings", self._endpoint(self.embeddings))
        app.router.add_post("/v1/messages", self._endpoint(self.messages))
        app.router.add_post("/v1/messages/count_tokens", self._endpoint(self.count_tokens))
        app.router.add_get("/v1/models", _models)
        app.router.add_get("/v1/models/{name:.+}", _model)
        return app

    def chat(self, body: bytes, stamp: Stamp) -> Ready:
        request = parse(chat.ChatRequest, body)
        said = answer(chat.ask_of(request), self.split)
        return (None, chat.events(request, said, stamp)) if request.stream else (chat.body(request, said, stamp), None)

    def completions(self, body: bytes, stamp: Stamp) -> Ready:
        request = parse(completions.CompletionRequest, body)
        choices = completions.choices_of(request, self.split)
        if request.stream:
            return None, completions.events(request, choices, stamp)
        return completions.body(request, choices, stamp), None

    def responses(self, body: bytes, stamp: Stamp) -> Ready:
        request = parse(responses.ResponseRequest, body)
        said = answer(responses.ask_of(request), self.split)
        if request.stream:
            return None, responses.events(request, said, stamp)
        return responses.body(request, said, stamp), None

    def embeddings(self, body: bytes, _stamp: Stamp) -> Ready:
        return embeddings.body(parse(embeddings.EmbeddingRequest, body), self.split), None

    def messages(self, body: bytes, stamp: Stamp) -> Ready:
        request = parse(anthropic.MessagesRequest, body)
        said = answer(anthropic.ask_of(request), self.split)
        if request.stream:
            return None, anthropic.events(request, said, stamp)
        return anthropic.body(request, said, stamp), None

    def count_tokens(self, body: bytes, _stamp: Stamp) -> Ready:
        ask = anthropic.ask_of(parse(anthropic.CountRequest, body))
        return anthropic.counted(prompt_tokens(ask, self.split)), None

    def _endpoint(self, respond: Callable[[bytes, Stamp], Ready]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            stamp = Stamp.at(int(time.time()))
            try:
                if len(body) > INLINE_BYTES:
                    whole, events = await asyncio.to_thread(respond, body, stamp)
                else:
                    whole, events = respond(body, stamp)
            except UnsatisfiableError as problem:
                raise invalid(str(problem)) from None
            if events is None:
                return web.Response(body=whole, content_type="application/json")
            return await self._streamed(request, events)

        return handle

    async def _streamed(self, request: web.Request, events: Iterable[bytes]) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        with suppress(ConnectionError):  # the client hung up: nothing is left to say, and to no one
            for event in events:
                await response.write(event)
                if self.token_delay_s:
                    await asyncio.sleep(self.token_delay_s)
            await response.write_eof()
        return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        return _refusal(request, refused.refusal)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(request, Refusal(Code.BODY_TOO_LARGE, f"The body is larger than {MAX_BODY_BYTES} bytes."))
    except web.HTTPMethodNotAllowed:
        return _refusal(request, Refusal(Code.METHOD_NOT_ALLOWED, f"{request.path} does not take {request.method}."))
    except web.HTTPNotFound:
        return _refusal(request, Refusal(Code.UNKNOWN_PATH, f"The demo provider has no {request.path}."))
    except Exception as problem:  # aiohttp would log it, and its message may quote the prompt
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{type(problem).__name__} in {frame.name}, line {frame.lineno}"
        return _refusal(request, Refusal(Code.GATEWAY_UNAVAILABLE, f"The demo provider has a bug: {where}."))


def _refusal(request: web.Request, refusal: Refusal) -> web.Response:
    dialect = Dialect.ANTHROPIC if _speaks_anthropic(request) else Dialect.OPENAI
    request_id = request.headers.get("x-request-id") or f"req_{Stamp.at(0).serial}"
    body = error_body(refusal, dialect, request_id)
    return web.Response(status=refusal.status, body=body, content_type="application/json")


def _speaks_anthropic(request: web.Request) -> bool:
    return request.path.startswith("/v1/messages") or "anthropic-version" in request.headers


def _listed(request: web.Request, name: str) -> dict[str, object]:
    if _speaks_anthropic(request):
        return {
            "type": "model",
            "id": name,
            "display_name": f"extproc {name}",
            "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active",
        }
    return {"id": name, "object": "model", "created": MODELS_CREATED, "owned_by": "extproc"}


async def _models(request: web.Request) -> web.StreamResponse:
    data = [_listed(request, name) for name in MODELS]
    paging = {"has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}
    document = {"data": data, **paging} if _speaks_anthropic(request) else {"object": "list", "data": data}
    return web.Response(body=dump(document), content_type="application/json")


async def _model(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name not in MODELS:
        raise Refused(Refusal(Code.MODEL_NOT_FOUND, f"The demo provider lists no model {name!r}.", "model"))
    return web.Response(body=dump(_listed(request, name)), content_type="application/json")


async def serve_demo(
    *,
    unix_socket: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token_delay_s: float = 0.005,
    split: Split | None = None,
) -> web.AppRunner:
    """Start the demo provider and return its runner, whose `cleanup()` ends it and whose `addresses` say where it is.

    It listens on `unix_socket` (mode 0600, replacing a socket that a crashed run left) or else on `host` and `port`
    (0: a free one). Raises OSError when it cannot.
    """
    demo = Demo(o200k() if split is None else split, token_delay_s)
    runner = web.AppRunner(demo.app(), access_log=None, handle_signals=False, shutdown_timeout=DRAIN_S)
    await runner.setup()
    if unix_socket is None:
        await web.TCPSite(runner, host, port).start()
    else:
        await web.UnixSite(runner, unix_socket).start()
        unix_socket.chmod(0o600)  # noqa: ASYNC240 - one system call, before the first request
    return runner


async def _until_signalled(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for wanted in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    if options.until_stdin_ends:
        lifeline.watch(stop.set)
    runner = await serve_demo(
        unix_socket=options.socket, host=options.host, port=options.port, token_delay_s=options.token_delay_ms / 1000
    )
    sys.stdout.write("ready\n")  # what the supervisor waits for; nothing else is ever written
    sys.stdout.flush()
    await stop.wait()
    await runner.cleanup()
    if options.socket is not None:
        options.socket.unlink(missing_ok=True)


def main() -> None:
    """The command line: say `ready`, serve until SIGTERM or SIGINT, let open streams end for at most `DRAIN_S`."""
    parser = argparse.ArgumentParser(prog="python -m extproc.demo", description="extproc's built-in demo provider")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, help="Unix socket to listen on")
    where.add_argument("--port", type=int, default=0, help="TCP port to listen on")
    parser.add_argument("--host", default="127.0.0.1", help="address for --port")
    parser.add_argument("--token-delay-ms", type=float, default=5.0, help="pause between two events of a stream")
    parser.add_argument(
        "--until-stdin-ends", action="store_true", help="end with the process that holds standard input"
    )
    asyncio.run(_until_signalled(parser.parse_args()))
