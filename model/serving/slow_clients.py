"""Ends the connections of clients that do not send their request, or do not read their answer.

uvicorn itself ends a connection only where it is idle after an answer: half a header would hold one for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

SLOWEST_HEADER = 30.0  # seconds that a client may take for a request's header
SLOWEST_READ = 300.0  # seconds that it may take to read the last of an answer
_LOOK = 1.0


async def end_slow_clients(connections: Iterable[Any]) -> None:
    """Looks at uvicorn's connections until it is cancelled."""
    clock = asyncio.get_running_loop().time
    # connection -> its last request, and when it was seen to wait after that
    since: dict[Any, tuple[Any, float]] = {}
    while True:
        now, before = clock(), since
        since = {}
        for one in [one for one in connections if _waits(one)]:
            last, began = before.get(one, (None, now))
            since[one] = one.cycle, began if last is one.cycle else now
            longest = SLOWEST_READ if one.transport.get_write_buffer_size() else SLOWEST_HEADER
            if now - since[one][1] > longest:
                one.transport.abort()
        await asyncio.sleep(_LOOK)


def _waits(connection: Any) -> bool:
    """Whether no request runs: the first one's header has not come, or the last one was answered."""
    return connection.cycle is None or connection.cycle.response_complete
