"""Who computes how many tokens in the next step.

Every step takes the next token of each sequence that is decoding, and up to `chunk` tokens of prompts. Sequences whose
prompts are long share the chunk, so that neither they nor the ones that decode wait for one of them. Waiting requests
are admitted in turns: one of each queue, then the next of the first. When the pages run out, the sequence that was
admitted last gives its pages back and is computed again later; what it has said stays said.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from .pages import PAGE_SIZE, PagePool
from .request import SequenceState


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


class Scheduler:
    """The queues and the running sequences. All methods are for the thread that runs the engine."""

    def __init__(self, pool: PagePool, max_running: int, chunk: int):
        self.pool, self.max_running, self.chunk = pool, max_running, chunk
        self.running: list[SequenceState] = []  # in the order of their admission
        self._queues: OrderedDict[str, deque[SequenceState]] = OrderedDict()  # the next one's turn is first
        self._returning: deque[SequenceState] = deque()  # they have been admitted before, and go first
        self.preemptions = 0
        self.shared = 0  # tokens whose pages were there already

    @property
    def waiting(self) -> Iterator[SequenceState]:
        """Every sequence that is not running."""
        yield from self._returning
        for queue in self._queues.values():
            yield from queue

    @property
    def num_waiting(self) -> int:
        """Sequences that are not running."""
        return len(self._returning) + sum(map(len, self._queues.values()))

    def add(self, sequence: SequenceState, first: bool = False) -> None:
        """Puts a new sequence at the end of its queue, or before the others in it."""
        queue = self._queues.setdefault(sequence.request.queue, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)

    def plan(self) -> dict[SequenceState, int]:
        """The tokens that each sequence computes in the next step; their pages are taken."""
        planned: dict[SequenceState, int] = {}
        for sequence in [s for s in self.running if s.rest == 1]:
            self._plan(sequence, 1, planned)
        prefilling = [s for s in self.running if s.rest > 1]
        most = max(self.chunk // PAGE_SIZE, 1)  # each shall get a page at least
        while len(prefilling) < most and (admitted := self._admit()) is not None:
            prefilling.append(admitted)
        budget = self.chunk
        prefilling.sort(key=lambda s: s.rest)  # what a short one leaves is for the longer ones
        for place, sequence in enumerate(prefilling):
            share = -(-budget // (len(prefilling) - place))
            count = min(sequence.rest, share)
            if count > 0 and sequence in self.running and self._plan(sequence, count, planned):
                budget -= count
        return planned

    def advance(self, sequence: SequenceState, count: int) -> None:
        """The sequence's next `count` tokens are in its pages; the full pages become known."""
        sequence.cached += count
        while (sequence.filled + 1) * PAGE_SIZE <= sequence.cached:
            first = sequence.filled * PAGE_SIZE
            tokens = sequence.tokens[first : first + PAGE_SIZE]
            sequence.before = self.pool.fill(sequence.pages[sequence.filled], sequence.before, tokens)
            sequence.filled += 1

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a sequence, wherever it is, and takes its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
            return
        queues = self._queues
        for queue in (self._returning, queues.get(sequence.request.queue, deque())):
            if sequence in queue:
                queue.remove(sequence)
        if not queues.get(sequence.request.queue, True):
            del queues[sequence.request.queue]

    def _admit(self) -> SequenceState | None:
        """The next waiting sequence, if there is room for all its tokens; it is running then."""
        if len(self.running) >= self.max_running:
            return None
        queue = self._returning
        if not queue:
            if not self._queues:
                return None
            queue = next(iter(self._queues.values()))
        sequence = queue[0]
        promised = sum(max(_pages_for(len(s.tokens)) - len(s.pages), 0) for s in self.running)
        if self.pool.available < promised + _pages_for(len(sequence.tokens)):
            return None
        queue.popleft()
        if queue is not self._returning:
            name = sequence.request.queue
            if queue:
                self._queues.move_to_end(name)
            else:
                del self._queues[name]
        root = sequence.request.row.root
        sequence.pages, sequence.before = self.pool.share(root, sequence.tokens)
        sequence.filled = len(sequence.pages)
        sequence.cached = sequence.filled * PAGE_SIZE
        self.shared += sequence.cached
        self.running.append(sequence)
        return sequence

    def _plan(self, sequence: SequenceState, count: int, planned: dict[SequenceState, int]) -> bool:
        """Takes the pages for the tokens; False if the sequence itself had to give way."""
        if sequence not in self.running:  # it gave way to one before it
            return False
        wanted = max(_pages_for(sequence.cached + count) - len(sequence.pages), 0)
        while self.pool.available < wanted:
            victim = self.running[-1]
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += [self.pool.take() for _ in range(wanted)]
        planned[sequence] = count
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._returning.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.cached, sequence.filled = [], 0, 0
