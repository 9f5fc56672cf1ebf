"""The thread that makes an engine's steps."""

from __future__ import annotations

import logging
import threading

from .engine import Engine

_IDLE = 1.0  # seconds after which an idle thread looks whether it is to end
_log = logging.getLogger(__name__)


class EngineThread:
    """Runs an engine until `stop`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> EngineThread:
        """Begins to make steps whenever there is something to compute."""
        self.engine.thread = self._thread
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends after the present step. Requests that are not finished then stay as they are."""
        self._stopped.set()
        self._thread.join()
        self.engine.thread = None

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self.engine.step():
                    self.engine.wait(_IDLE)
            except (
                Exception
            ) as error:  # of the engine itself: whoever waits is told, and the next request is tried
                _log.exception("the engine failed")
                self.engine.fail_all(error)
