"""The pages of the cache: which are free, who shares them, and what the finished ones hold.

A page holds the keys and values of 16 tokens of a sequence, in every layer. A full page is known by its tokens, by the
pages before it and by the prompts of its sequence, since all of that went into its keys and values. A sequence that
begins with the same ones takes it instead of computing it again. A page that nobody uses keeps what it holds until its
room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

PAGE_SIZE = 16  # tokens


class PageKey(NamedTuple):
    """What a full page holds. Two pages with equal keys hold the same."""

    before: int  # the serial number of the page before it, or the root of the sequence's prompts, which is negative
    tokens: tuple[int, ...]


class PagePool:
    """Counts the users of each page. It knows numbers of pages alone; their memory is the engine's."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._known: dict[PageKey, int] = {}
        self._keys: dict[int, PageKey] = {}  # page -> its key, if it is known
        self._serials: dict[int, int] = {}  # page -> a number that no other content of a page ever had
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages without users, oldest first
        self._last_serial = 0

    @property
    def available(self) -> int:
        """Pages that can be taken now; the idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages without users that keep what they hold."""
        return len(self._idle)

    def take(self) -> int:
        """A page for new tokens. There must be one available; the one that was idle for longest goes last."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """The pages of one user, in the order of its tokens. What the last one holds is given up first."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0
            if self._users[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def share(self, root: int, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The known pages that hold the beginning of the tokens, now used once more, and the serial of the last.

        One token is always left to be computed, since its logits are wanted.
        """
        pages, before = [], root
        for end in range(PAGE_SIZE, len(tokens), PAGE_SIZE):
            page = self._known.get(PageKey(before, tuple(tokens[end - PAGE_SIZE : end])))
            if page is None:
                break
            pages.append(page)
            before = self._serials[page]
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1
        return pages, before

    def fill(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Makes a full page known. Returns the serial of what it holds: of another page, if one holds the same."""
        key = PageKey(before, tuple(tokens))
        known = self._known.get(key)
        if known is not None:
            return self._serials[known]
        self._last_serial += 1
        self._known[key], self._keys[page], self._serials[page] = page, key, self._last_serial
        return self._last_serial

    def _forget(self, page: int) -> None:
        del self._known[self._keys.pop(page)], self._serials[page]
