"""Which page belongs to which request. Bookkeeping only: the tensors are the cache's."""

from collections.abc import Iterable


class PagePool:
    """A fixed number of pages; each is free or owned by exactly one request."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages; the caller has checked that they are there."""
        assert count <= len(self._free), (count, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages taken before."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, (len(self._free), self.num_pages)
