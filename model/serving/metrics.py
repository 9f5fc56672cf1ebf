"""What the server counts, as Prometheus' text."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from .engine import Engine
from .pages import PAGE_SIZE

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_WINDOW = 10.0  # seconds over which tokens per second are counted


class Histogram:
    """How many durations lie below each bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds


class Metrics:
    """The figures of an engine and of its HTTP server."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.first_token, self.between_tokens = Histogram(), Histogram()
        self._seen: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def sample(self) -> None:
        """Notes how many tokens and answers there were; called about once a second."""
        now, counts = time.monotonic(), self.engine.counts
        ended = sum(count for name, count in list(counts.items()) if name.startswith("ended_"))
        self._seen.append((now, counts["new_tokens"], ended))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW:
            self._seen.popleft()

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all answers, over the last ten seconds."""
        return self._rate(1)

    @property
    def answers_per_second(self) -> float:
        """Answers that ended, over the last ten seconds."""
        return self._rate(2)

    def _rate(self, place: int) -> float:
        first, last = self._seen[0], self._seen[-1]
        return (last[place] - first[place]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def text(self) -> str:
        """All figures."""
        engine = self.engine
        counts, pool = engine.counts, engine.pool
        lines: list[str] = []

        def put(name: str, kind: str, about: str, values: Mapping[tuple[tuple[str, str], ...], Any]) -> None:
            lines.append(f"# HELP zinit_{name} {about}")
            lines.append(f"# TYPE zinit_{name} {kind}")
            for labels, value in values.items():
                shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
                lines.append(f"zinit_{name}{{{shown}}} {value}" if shown else f"zinit_{name} {value}")

        put("requests_waiting", "gauge", "Answers that wait to be computed.", {(): engine.waiting})
        put(
            "requests_running", "gauge", "Answers that are computed now.", {(): len(engine.scheduler.running)}
        )
        put(
            "tokens_per_second",
            "gauge",
            "New tokens over the last ten seconds.",
            {(): round(self.tokens_per_second, 3)},
        )
        put("cache_pages", "gauge", f"Pages of {PAGE_SIZE} tokens.", {
            (("state", "used"),): pool.num_pages - pool.available,
            (("state", "kept"),): pool.idle,
            (("state", "free"),): pool.available - pool.idle,
        })  # fmt: skip
        put("adapters", "gauge", "Adapters that are served.", {(): len(engine.adapters)})
        put("steps_total", "counter", "Passes of the base.", {(): counts["steps"]})
        put("computed_tokens_total", "counter", "Tokens of prompts and answers that were computed.", {
            (): counts["computed_tokens"]
        })  # fmt: skip
        put(
            "shared_tokens_total",
            "counter",
            "Tokens whose pages were there already.",
            {(): engine.scheduler.shared},
        )
        put(
            "preemptions_total",
            "counter",
            "Answers that gave their pages back.",
            {(): engine.scheduler.preemptions},
        )
        put("new_tokens_total", "counter", "Tokens of answers, by adapter; the base has no name.", {
            (("adapter", name or ""),): count for name, count in list(engine.tokens_of.items())
        })  # fmt: skip
        put("answers_total", "counter", "Answers, by how they ended.", {
            (("reason", name.removeprefix("ended_")),): count
            for name, count in list(counts.items()) if name.startswith("ended_")
        })  # fmt: skip
        put("http_responses_total", "counter", "Responses, by route and status.", {
            (("route", route), ("status", str(status))): count
            for (route, status), count in list(self.responses.items())
        })  # fmt: skip
        for name, about, found in (
            ("time_to_first_token_seconds", "From a request to its first token.", self.first_token),
            ("time_between_tokens_seconds", "Between the tokens of an answer.", self.between_tokens),
        ):
            put(name, "histogram", about, {})
            below = 0
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), found.counts, strict=True):
                below += count
                lines.append(f'zinit_{name}_bucket{{le="{bound}"}} {below}')
            lines.append(f"zinit_{name}_sum {found.total:.6f}")
            lines.append(f"zinit_{name}_count {below}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
