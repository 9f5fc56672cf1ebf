"""The process that listens: uvicorn, and how it ends.

SIGTERM (and Ctrl-C) drains: new requests are refused with 503, those that run are answered, then the process exits
with 0. A second signal, or the end of the time for draining, ends what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from ..errors import UserError, note
from .service import Service
from .slow_clients import end_slow_clients
from .worker import EngineThread

_BACKLOG = 2048  # connections that wait to be accepted
_LOOK = 0.05  # seconds between looks at what still runs
_LAST = 5.0  # seconds for the end of requests that were not sent to theirs, and of answers that are not read


class Server(uvicorn.Server):
    """uvicorn's, which also ends slow clients. It leaves signals alone: uvicorn's own handling would end connections at
    once, and exit by the signal.
    """

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watching = asyncio.create_task(end_slow_clients(self.server_state.connections))
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; port 0 = any free one. Raises UserError if the port cannot be had.

    Its connections send each part of an answer at once. asyncio sees to that where a socket's protocol is named, and
    `create_server` names none: the body of an answer, or a token of a stream, then waits until the client has
    acknowledged what came before, for 40 ms.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(f"{host}, port {port}, cannot be listened on: {error.strerror or error}.") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(app: Any, service: Service, host: str, port: int, drain_seconds: float) -> None:
    """Serves until a signal comes, then drains. Raises UserError if the port cannot be had."""
    listener = listen(host, port)
    _allow_many_connections()
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on", ws="none"
    )
    with listener:
        asyncio.run(_serve(Server(config), service, listener, drain_seconds))


def _allow_many_connections() -> None:
    """Takes as many open files as this process may have: each connection is one, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(server: Server, service: Service, listener: socket.socket, drain_seconds: float) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    signals = 0

    def ask() -> None:
        nonlocal signals
        signals += 1
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    thread = EngineThread(service.engine).start()
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    note(f"serving {', '.join(service.models[:8])} on http://{host}:{port}/v1")
    ending = asyncio.create_task(asked.wait())
    await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    service.draining = True
    note(f"draining: {len(service.running)} requests are answered first")
    stop = loop.time() + drain_seconds
    while service.is_busy and signals < 2 and loop.time() < stop and not serving.done():
        await asyncio.sleep(_LOOK)
    if service.running:
        note(f"{len(service.running)} requests are ended")
        for running in list(service.running):
            running.cancel()
        stop = loop.time() + 5.0
        while service.running and loop.time() < stop:
            await asyncio.sleep(_LOOK)
    server.should_exit = True
    await asyncio.wait({serving}, timeout=0 if service.running else _LAST)
    for connection in list(server.server_state.connections):  # half a request, or an answer that nobody reads
        connection.transport.abort()
    await asyncio.wait({serving}, timeout=_LAST)
    server.force_exit = True
    await serving
    ending.cancel()
    thread.stop()
