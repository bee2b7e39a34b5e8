"""Pages and who holds them. Bookkeeping only: the tensors are the cache's.

A page is held by any number of owners: live sequences and snapshots of the prefix cache. It is
written by the one sequence that is growing into it, at positions no snapshot covers; everybody
else copies a page that is not full before writing to it.
"""

from collections.abc import Iterable, Sequence


class PagePool:
    """A fixed number of pages with a count of holders each."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many owners hold a page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages; the caller has checked that they are there."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Become a further holder of pages that are held already."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Stop holding pages; those nobody holds any more are free."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def exclusive(self, pages: Iterable[int]) -> int:
        """How many of these pages have a single holder."""
        return [self._holders[page] for page in pages].count(1)
