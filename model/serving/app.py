"""The HTTP surface: OpenAI's routes, /health, /metrics, and the adapters' admin route.

GET    /v1/models, /v1/models/NAME
POST   /v1/completions, /v1/chat/completions
GET    /health, /metrics
GET    /admin/adapters                         only where there is an admin token
POST   /admin/adapters {"name", "path"}
DELETE /admin/adapters/NAME
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from zinit_kernels.console import shown

from ..errors import UserError
from ..llama import Adapter
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .protocol import Asked, parse_body, read_chat, read_completion
from .request import UnknownAdapter
from .responses import Piece, Responses
from .service import Running, Service
from .streaming import EventStream, until_gone

LARGEST_BODY = 64 << 20  # bytes: sixteen photographs as base64
_SLOWEST_BODY = 300.0  # seconds that a client may take to send it
_SLOW_BODY = 1 << 16  # bytes; a longer one is read in another thread
_log = logging.getLogger(__name__)
Load = Callable[[str], Adapter]  # the adapter of a file


def create_app(
    service: Service,
    *,
    api_keys: Sequence[str] = (),
    admin_token: str | None = None,
    load: Load | None = None,
) -> FastAPI:
    """The application. api_keys: one of them must be sent as a bearer token; none = open to all. admin_token: the
    bearer token of the admin routes; None = there are none. load: how they read an adapter's file.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def sample() -> None:
            while True:
                service.metrics.sample()
                await asyncio.sleep(1.0)

        task = asyncio.create_task(sample())
        yield
        task.cancel()

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,  # it would redirect to whatever host the client names
    )  # fmt: skip
    app.add_middleware(_Counted, service=service)
    app.add_exception_handler(ApiError, lambda request, error: _refusal(error))  # type: ignore[arg-type]
    app.add_exception_handler(UserError, lambda request, error: _refusal(ApiError(400, str(error))))
    app.add_exception_handler(HTTPException, _of_http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unexpected)

    def client_of(request: Request) -> str | None:
        """Which key was sent. Raises ApiError unless one of ours was."""
        if not api_keys:
            return None
        sent = _bearer(request)
        for place, key in enumerate(api_keys):
            if hmac.compare_digest(sent, key.encode()):
                return str(place)
        raise ApiError(
            401, "send one of the server's API keys: Authorization: Bearer KEY.", code="invalid_api_key"
        )

    def check_admin(request: Request) -> None:
        if admin_token is None:
            raise ApiError(404, "there is no such route: the server was started without an admin token.")
        if not hmac.compare_digest(_bearer(request), admin_token.encode()):
            raise ApiError(401, "send the admin token: Authorization: Bearer TOKEN.", code="invalid_api_key")

    async def answer(request: Request, read: Callable[[dict[str, Any]], Asked]) -> Response:
        client = client_of(request)
        body = await _body_of(request)
        if len(body) > _SLOW_BODY:
            asked = await asyncio.to_thread(lambda data: read(parse_body(data)), body)
        else:
            asked = read(parse_body(body))
        del body
        running = await service.start(asked, client)
        responses = Responses(asked.model, asked.is_chat, service.tokenizer)
        if asked.stream:
            return EventStream(_chunks(running, responses, asked, service), lambda: service.done(running))
        try:
            gone = await until_gone(request.receive, _collect(running))
        finally:
            service.done(running)
        if gone:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(responses.whole(running.answers, running.prompt_tokens))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, read_chat)

    def model_entry(name: str) -> dict[str, Any]:
        parent = None if name == service.base_name else service.base_name
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "zinit",
            "parent": parent,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        client_of(request)
        return {"object": "list", "data": [model_entry(name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        client_of(request)
        if name not in service.models:
            raise ApiError(404, f"there is no model {shown(name)}.", code="model_not_found", param="model")
        return model_entry(name)

    @app.get("/health")
    async def health() -> Response:
        state = "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.metrics.sample()
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/admin/adapters")
    async def adapters(request: Request) -> dict[str, Any]:
        check_admin(request)
        return {"adapters": service.engine.adapters}

    @app.post("/admin/adapters")
    async def add_adapter(request: Request) -> Response:
        check_admin(request)
        body = parse_body(await _body_of(request))
        name, path = body.get("name"), body.get("path")
        if not isinstance(name, str) or not isinstance(path, str) or body.keys() != {"name", "path"}:
            raise ApiError(400, 'the body must be {"name": NAME, "path": FILE}.')
        check_name(name)

        def add() -> None:
            assert load is not None
            service.add_adapter(name, load(path))

        try:
            await asyncio.to_thread(add)
        except OSError as error:
            raise ApiError(400, f"{path} cannot be read: {error.strerror or error}.") from None
        return JSONResponse({"adapters": service.engine.adapters}, 201)

    @app.delete("/admin/adapters/{name:path}")
    async def drop_adapter(request: Request, name: str) -> dict[str, Any]:
        check_admin(request)
        try:
            await asyncio.to_thread(service.drop_adapter, name)
        except UnknownAdapter as error:
            raise ApiError(404, str(error), code="model_not_found") from None
        return {"adapters": service.engine.adapters}

    return app


def check_name(name: str) -> None:
    """Raises UserError for a name that cannot stand in an address or a line of text."""
    if (
        not 1 <= len(name) <= 128
        or not name.isascii()
        or not name.isprintable()
        or set(name) & set(' "\\?#%')
        or not all(set(part) - {"."} for part in name.split("/"))  # clients take "a/../b" for "b"
    ):
        raise UserError(
            f"the name of an adapter has 1 to 128 letters, digits and signs of an address, got {name!r}."
        )


async def _collect(running: Running) -> None:
    async for _ in running.pieces():
        pass


async def _chunks(
    running: Running, responses: Responses, asked: Asked, service: Service
) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream. A failure is the last one: the status has been sent already."""
    for index in range(len(running.answers)):
        first = responses.first(index)
        if first is not None:
            yield first
    try:
        async for found in running.pieces():
            if not isinstance(found, Piece):
                yield responses.last(found, running.answers[found].finish_reason or "stop")
            elif found.text or found.logprobs is not None:
                yield responses.piece(found)
    except ApiError as error:
        yield error.body
        return
    if asked.include_usage:
        yield responses.usage(running.answers, running.prompt_tokens)


async def _body_of(request: Request) -> bytes:
    """The body. Raises ApiError if it is too large, without reading all of it, or does not come in time."""
    try:
        return await asyncio.wait_for(_read_body(request), _SLOWEST_BODY)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {_SLOWEST_BODY:.0f} seconds.") from None


async def _read_body(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body has more than {LARGEST_BODY >> 20} MiB.")
    if length.isdecimal() and int(length) > LARGEST_BODY:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _bearer(request: Request) -> bytes:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip().encode() if kind.lower() == "bearer" else b""


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _of_http(request: Request, error: HTTPException) -> Response:
    """What Starlette refuses: an unknown route, a wrong method."""
    detail = "there is no such route" if error.status_code == 404 else str(error.detail)
    refusal = ApiError(error.status_code, f"{detail}: {request.method} {request.url.path}.")
    return JSONResponse(refusal.body, error.status_code, dict(error.headers or {}))


def _unexpected(request: Request, error: Exception) -> Response:
    number = secrets.token_hex(4)
    _log.error("error %s in %s %s", number, request.method, request.url.path, exc_info=error)
    return _refusal(ApiError(500, f"the request failed; the server's log has the cause as error {number}."))


class _Counted:
    """Counts the responses by route and status, and ends quietly where the client has gone."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.service.metrics.responses[path, message["status"]] += 1
            await send(message)

        with suppress(ClientDisconnect):
            await self.app(scope, receive, counted)
