"""An endpoint that OpenAI's clients know: chat and text completions, streamed or whole, and a page to chat on.

What a request asks for is done or refused; fields that change nothing here are taken.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from importlib.resources import files
from itertools import takewhile
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamax.errors import UserError
from dynamax.serving.answers import Answerer, BusyError, Ended, Piece
from dynamax.serving.link import Link

MOST_BODY = 1_000_000
"""Bytes of a request."""

OPEN = ("/", "/health")
"""What is answered without a token."""

SLOWEST = 30.0
"""Seconds that a reader may take for one event, while others wait for their turn."""

HARMLESS: dict[str, Sequence[object]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0, None)),
    **dict.fromkeys(("logit_bias", "tools", "functions", "stop_token_ids"), (None, {}, [])),
    **dict.fromkeys(("logprobs", "top_logprobs", "echo"), (None, False, 0)),
    **dict.fromkeys(("n", "best_of"), (None, 1)),
    **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
}
"""Fields that would change an answer and are not followed, with the values at which they change nothing."""

UNHEEDED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
"""Fields that change no token."""

ROUTES = "Here are /v1/chat/completions, /v1/completions, /v1/models, /health and the page at /."


class StreamOptions(BaseModel):
    """What a stream says beside its tokens."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class TextPart(BaseModel):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A turn of a conversation; of text alone."""

    role: Literal["system", "user", "assistant", "developer"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class TextAsked(Asked):
    """``/v1/completions``."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]


class Refused(Exception):  # noqa: N818 - an answer
    """A request that is not followed, and how that is said."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


def endpoint(answerer: Answerer, tokens: Sequence[str] = (), link: Link | None = None) -> FastAPI:
    """The application.

    Args:
        answerer: What answers.
        tokens: Whoever shows one of these may ask; none lets everybody.
        link: To the cloud that the answerer asks, for its health.
    """
    app = FastAPI(title="dynamax", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, tokens=tokens)

    @app.exception_handler(Refused)
    def _(_: Request, error: Refused) -> JSONResponse:
        return _error(error.status, error.message, error.field)

    @app.exception_handler(RequestValidationError)
    def _(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(each) for each in first["loc"] if each != "body")
        return _error(400, f"{field if field and field != '0' else 'The request'}: {first['msg']}", field or None)

    @app.exception_handler(HTTPException)
    def _(asked: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{asked.method} {asked.url.path}: {error.detail}. {ROUTES}", None)

    @app.get("/", response_class=HTMLResponse)
    def _() -> str:
        return (files("dynamax.serving") / "page.html").read_text("utf-8")

    @app.get("/health")
    def _() -> dict[str, str]:
        if link is None:
            return {"status": "ok"}
        return {"status": "ok", "cloud": link.fault() or "ok"}

    model = {"id": answerer.name, "object": "model", "created": 0, "owned_by": "dynamax"}

    @app.get("/v1/models")
    def _() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def _(name: str) -> dict[str, Any]:
        check_model(name, answerer.name)
        return model

    @app.post("/v1/chat/completions", response_model=None)
    def _(asked: ChatAsked) -> Response:
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise Refused(400, "max_tokens and max_completion_tokens say the same; give one of them.", "max_tokens")
        most = asked.max_completion_tokens or asked.max_tokens
        turns = [{"role": turn.role, "content": turn.text} for turn in asked.messages]
        return Reply(answerer, asked, turns, most, chat=True).response()

    @app.post("/v1/completions", response_model=None)
    def _(asked: TextAsked) -> Response:
        prompt = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
        return Reply(answerer, asked, prompt, asked.max_tokens, chat=False).response()

    return app


class Guard:
    """Refuses callers without a token, and bodies that are too long, before anything of a body is read.

    Args:
        app: What answers the others.
        tokens: Whoever shows one of these may ask; none lets everybody.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self._app, self._tokens = app, [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["path"] in OPEN:
            return None
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._tokens and not any(secrets.compare_digest(given, each) for each in self._tokens):
            return _error(401, "A bearer token that this server knows is wanted: give it as the API key.", None)
        length = headers.get("content-length", "0" if scope["method"] == "GET" else "")
        if not length.isdigit() or int(length) > MOST_BODY:
            return _error(413, f"A request has at most {MOST_BODY} bytes, and says how many.", None)
        return None


class EventStream(StreamingResponse):
    """Events of an answer. If its reader goes away, the answer ends at once, and the next has its turn.

    Args:
        events: The events.
    """

    def __init__(self, events: Generator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. A reader that takes nothing for too long is as good as gone."""

        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SLOWEST)

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            self._events.close()


class WholeAnswer(Response):
    """An answer in one piece. If its reader goes away, the answer ends at once, and the next has its turn.

    Args:
        answer: Makes it, in a thread; it looks whether its reader is gone.
    """

    def __init__(self, answer: Callable[[threading.Event], Response]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        gone = threading.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        watching = asyncio.create_task(watch())
        try:
            response = await run_in_threadpool(self._answer, gone)
        finally:
            watching.cancel()
        await response(scope, receive, send)


class Reply:
    """One answer in the words of the protocol.

    Args:
        answerer: What answers.
        asked: The request.
        prompt: Text, or turns.
        most: Most tokens.
        chat: Whether it is a chat's.

    Raises:
        Refused: If something is asked for that cannot be done.
    """

    def __init__(self, answerer: Answerer, asked: Asked, prompt: Any, most: int | None, *, chat: bool) -> None:  # noqa: ANN401
        check(asked, answerer)
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        sampled = asked.temperature != 0 and (asked.temperature is not None or asked.top_p is not None)
        options = {
            "max_new_tokens": most,
            "do_sample": sampled if sampled or asked.temperature == 0 else None,
            "temperature": asked.temperature if sampled else None,
            "top_p": asked.top_p if sampled else None,
            "seed": asked.seed,
            "stop_strings": stop or None,
        }
        self._answerer, self._asked, self._chat = answerer, asked, chat
        try:
            self._prepared = answerer.prepared(prompt, chat=None if chat else False, options=options)
        except UserError as error:
            raise Refused(400, str(error)) from error
        kind = "chat.completion" if chat else "text_completion"
        self._about = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if chat and asked.stream else kind,
            "created": int(time.time()),
            "model": answerer.name,
        }

    def response(self) -> Response:
        """The whole answer, or its stream."""
        return EventStream(self._events()) if self._asked.stream else WholeAnswer(self._whole)

    def _whole(self, gone: threading.Event) -> JSONResponse:
        try:
            with self._answerer.turn():
                left = self._answerer.pieces(*self._prepared)
                pieces = list(takewhile(lambda _: not gone.is_set(), left))
        except BusyError:
            return _error(429, "Too many answers wait for their turn. Ask again later.", None)
        except UserError as error:
            return _error(503, str(error), None)
        text = "".join(piece.text for piece in pieces)
        ended = self._prepared[2]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": ended.reason, "logprobs": None}
        return JSONResponse(
            {**self._about, "choices": [choice], "usage": _usage(ended), "dynamax": [_facts(each) for each in pieces]}
        )

    def _events(self) -> Generator[str]:
        ended = self._prepared[2]
        try:
            with self._answerer.turn():
                if self._chat:
                    yield self._event({"delta": {"role": "assistant", "content": ""}})
                for piece in self._answerer.pieces(*self._prepared):
                    said = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
                    yield self._event(said, dynamax=_facts(piece))
        except (BusyError, UserError) as error:
            told = str(error) or "Too many answers wait for their turn. Ask again later."
            yield f"data: {json.dumps(_body(told, None))}\n\n"
            return
        yield self._event({"delta": {}} if self._chat else {"text": ""}, reason=ended.reason)
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield f"data: {json.dumps({**self._about, 'choices': [], 'usage': _usage(ended)})}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, said: dict[str, Any], reason: str | None = None, **more: object) -> str:
        choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps({**self._about, 'choices': [choice], **more})}\n\n"


def check_model(asked: str, name: str) -> None:
    """Refuse another model."""
    if asked != name:
        raise Refused(404, f"There is no model {asked!r} here; this server has {name!r}.", "model")


def check(asked: Asked, answerer: Answerer) -> None:
    """Refuse another model, and fields that would change the answer and are not followed."""
    check_model(asked.model, answerer.name)
    for field in ("temperature", "top_p"):
        if answerer.greedy and asked.temperature != 0 and getattr(asked, field) not in (None, 0):
            raise Refused(
                400,
                f"{field} is not followed here: this edge asks a cloud, which gives the most likely token. Leave it "
                f"out, or give temperature 0.",
                field,
            )
    for field, given in (asked.model_extra or {}).items():
        if field in UNHEEDED:
            continue
        if field not in HARMLESS or given not in HARMLESS[field]:
            raise Refused(400, f"{field} is not followed here. Leave it out.", field)


def _facts(piece: Piece) -> dict[str, Any]:
    return {"text": piece.text, "origin": piece.origin, "depth": piece.depth}


def _usage(ended: Ended) -> dict[str, int]:
    total = ended.prompt + ended.tokens
    return {"prompt_tokens": ended.prompt, "completion_tokens": ended.tokens, "total_tokens": total}


def _body(message: str, field: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": field, "code": None}}


def _error(status: int, message: str, field: str | None) -> JSONResponse:
    return JSONResponse(_body(message, field), status)
