"""Answers that are sent while they are made, to clients that may leave at any time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from .slow_clients import SLOWEST_READ

Receive = Callable[[], Awaitable[Any]]


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, and ends it where the client leaves before; True if it did. The body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()  # raises what it raised
            return False
        return True
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """JSON objects as server-sent events, with [DONE] at the end. `done` is called however it ends."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], done: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.done = chunks, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await asyncio.wait_for(send(message), SLOWEST_READ)

        async def send_all() -> None:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for chunk in self.chunks:
                text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
                await write(f"data: {text}\n\n".encode())
            await write(b"data: [DONE]\n\n", more=False)

        try:
            with suppress(asyncio.TimeoutError, OSError):
                await until_gone(receive, send_all())
        finally:
            self.done()
