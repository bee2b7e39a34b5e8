"""The disk tier of the prefix cache: snapshots that survive a restart.

    DIR/<namespace>/MANIFEST.json LOCK pages/ab/<chain>.kv states/ab/<chain>-<n>.st bad/

A page of tokens is named by a hash chain over the token ids up to its end, a state by the chain of
its full pages and the ids after them. Files are written once and never changed; there is no
database, the index is read from their headers. What the bytes inside mean is the cache's business
(its layout is part of the namespace). One process writes (it holds LOCK), others only read.

Writing happens in a thread of its own with a short queue. Nothing that goes wrong with a file stops
the engine: a damaged one is moved to ``bad/``, counted, and is a miss; a full disk is reported once
and tried again later.
"""

import hashlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.engine.blob import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    TEMPORARY,
    DamagedBlob,
    NewerBlob,
    make_folder,
    read_blob,
    read_header,
    write_blob,
)
from qnext.engine.worth import HALF_LIFE_S, likelihood
from qnext.errors import RequestError

QUEUE_LENGTH = 2
"""Snapshots that may wait to be written; more are dropped."""
RETRY_S = 30.0
"""Pause after a failed write."""
MAX_BAD = 16
"""Damaged files that are kept for a look."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A snapshot on its way to the disk, copied out of the cache."""

    ids: tuple[int, ...]
    why: str
    mtp_first: int
    """First position whose MTP keys and values are there."""
    state: bytes
    tail: bytes
    """The last page if it is not full, else empty."""
    pages: Mapping[int, bytes]
    """By number; those the disk was found to lack."""


@dataclass(eq=False, kw_only=True, slots=True)
class DiskState:
    """A snapshot on disk."""

    length: int
    tail: tuple[int, ...]
    """Token ids after the full pages."""
    path: tuple[str, ...]
    """Names of its full pages, in order."""
    mtp_first: int
    why: str
    nbytes: int
    born: float
    used_at: float
    uses: float = 0.0

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        return state_name(self.path[-1] if self.path else "", self.tail, self.length)


@dataclass(eq=False, kw_only=True, slots=True)
class _Page:
    parent: str
    ids: tuple[int, ...]
    mtp_first: int
    nbytes: int
    states: int = 0
    """How many states lie on it or beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskReport:
    """What a namespace holds."""

    states: int
    pages: int
    nbytes: int
    writable: bool
    counts: Mapping[str, int] = field(default_factory=dict)


class Missing(Exception):
    """A file of a snapshot is gone or damaged; ``corrupt`` says which."""

    def __init__(self, *, corrupt: bool) -> None:
        super().__init__()
        self.corrupt = corrupt


def namespace_of(fields: Mapping[str, Any]) -> str:
    """Name of the folder for everything that must agree before bytes may be reused."""
    text = json.dumps({**fields, "format": FORMAT_VERSION}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def chain(ids: Sequence[int], page_tokens: int) -> list[str]:
    """Name of every full page of ``ids``: a hash of its tokens and of the page before."""
    names, before = [], ""
    for start in range(0, len(ids) - page_tokens + 1, page_tokens):
        before = _page_name(before, ids[start : start + page_tokens])
        names.append(before)
    return names


def state_name(last_page: str, tail: Sequence[int], length: int) -> str:
    """Name of the state after the page of that name and some more tokens."""
    return f"{_page_name(last_page, tail)}-{length}"


def _page_name(before: str, ids: Sequence[int]) -> str:
    state = hashlib.blake2b(bytes.fromhex(before), digest_size=16)
    for token in ids:
        state.update(token.to_bytes(8, "little"))
    return state.hexdigest()


class DiskStore:
    """Snapshots of one namespace in one folder.

    ``fields`` are everything the bytes depend on; ``limit_bytes`` bounds the files. ``clock`` gives
    seconds since the epoch. Raises RequestError when the folder cannot be used at all.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fields: Mapping[str, Any],
        page_tokens: int,
        limit_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.namespace, self.page_tokens = namespace_of(fields), page_tokens
        self.limit_bytes, self._clock = limit_bytes, clock
        self.root = Path(root).expanduser()
        self.folder = self.root / self.namespace
        self.counts: Counter[str] = Counter()
        """Events since the start, by kind."""
        self._mutex = threading.RLock()
        self._pages: dict[str, _Page] = {}
        self._states: dict[str, DiskState] = {}
        self._by_chain: dict[str, list[DiskState]] = {}
        self._nbytes = 0
        self._newer = 0
        self._said: set[str] = set()
        self._resume_at = -math.inf
        self._queue: queue.Queue[Record | None] = queue.Queue(QUEUE_LENGTH)
        self._stopping = False
        try:
            make_folder(self.folder)
            self._lock = _lock(self.folder / "LOCK")
            if self.writable:
                self._write_manifest(fields)
            self._read_index()
        except OSError as error:
            raise RequestError(
                f"cache_dir {self.root}: {error.strerror or error}. Choose a folder that can be "
                "written to, or leave cache_dir out."
            ) from error
        self._thread: threading.Thread | None = None
        if self.writable:
            self._thread = threading.Thread(
                target=self._write_all, name="cache-writer", daemon=True
            )
            self._thread.start()
        else:
            _log.warning("%s is in use by another process: it is read and not written", self.folder)

    @property
    def writable(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the index."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._states)

    def report(self) -> DiskReport:
        """What there is now."""
        with self._mutex:
            return DiskReport(
                states=len(self._states), pages=len(self._pages), nbytes=self._nbytes,
                writable=self.writable, counts=dict(self.counts),
            )  # fmt: skip

    # -- lookup ----------------------------------------------------------------------------------

    def find(self, ids: Sequence[int], *, longer_than: int = 0) -> DiskState | None:
        """The deepest snapshot that leaves at least one of ``ids`` to run."""
        best: DiskState | None = None
        with self._mutex:
            for name in ("", *chain(ids, self.page_tokens)):
                for state in self._by_chain.get(name, ()):
                    start = state.length - len(state.tail)
                    fits = longer_than < state.length < len(ids)
                    if (
                        fits
                        and (best is None or state.length > best.length)
                        and tuple(ids[start : state.length]) == state.tail
                    ):
                        best = state
        return best

    def bytes_to_load(self, state: DiskState, *, skip_pages: int) -> int:
        """Bytes read for a snapshot of which the first pages are there already."""
        with self._mutex:
            pages = (self._pages.get(name) for name in state.path[skip_pages:])
            return state.nbytes + sum(page.nbytes for page in pages if page)

    def load_state(self, state: DiskState) -> tuple[bytes, bytes]:
        """State and last page, if that is not full. Raises Missing."""
        header, parts = self._load(self._state_path(state.name), "state")
        if tuple(header["ids"]) != state.tail or len(parts) != 2:
            self._damaged(self._state_path(state.name), DamagedBlob("another state's name"))
            raise Missing(corrupt=True)
        with self._mutex:
            now = self._clock()
            state.uses = state.uses * 0.5 ** ((now - state.used_at) / HALF_LIFE_S) + 1.0
            state.used_at = now
        return parts[0], parts[1]

    def load_page(self, state: DiskState, number: int) -> tuple[bytes, int]:
        """One full page, and the first position of its MTP rows. Raises Missing."""
        name = state.path[number]
        path = self._page_path(name)
        header, parts = self._load(path, "page")
        if _page_name(header["parent"], header["ids"]) != name or len(parts) != 1:
            self._damaged(path, DamagedBlob("another page's name"))
            raise Missing(corrupt=True)
        return parts[0], header["mtp_first"]

    def _load(self, path: Path, kind: str) -> tuple[dict[str, Any], list[bytes]]:
        try:
            header, parts = read_blob(path)
            if header["kind"] != kind or header["namespace"] != self.namespace:
                raise DamagedBlob(f"{path}: a {header['kind']} of {header['namespace']}.")
        except DamagedBlob as error:
            self._damaged(path, error)
            raise Missing(corrupt=True) from error
        except (NewerBlob, OSError) as error:
            # Another process may have removed it; nothing is wrong with the disk then.
            self._newer += isinstance(error, NewerBlob)
            self._say("read", "cannot read %s: %s", path, error)
            self._forget_file(path)
            raise Missing(corrupt=False) from error
        return header, parts

    # -- writing ---------------------------------------------------------------------------------

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether the snapshot at exactly these tokens is on disk."""
        names = chain(ids, self.page_tokens)
        tail = ids[len(names) * self.page_tokens :]
        with self._mutex:
            return state_name(names[-1] if names else "", tail, len(ids)) in self._states

    def lacking(self, ids: Sequence[int], mtp_first: int) -> list[int]:
        """Numbers of the full pages of ``ids`` that are not on disk, or there with fewer rows."""
        found = []
        with self._mutex:
            for number, name in enumerate(chain(ids, self.page_tokens)):
                page = self._pages.get(name)
                first = max(mtp_first, number * self.page_tokens)
                if page is None or page.mtp_first > first:
                    found.append(number)
        return found

    @property
    def accepts(self) -> bool:
        """Whether a snapshot given now would be written."""
        return self.writable and not self._queue.full() and self._clock() >= self._resume_at

    def submit(self, record: Record, *, timeout_s: float = 0.0) -> bool:
        """Queue a snapshot; False, and counted, when it is not going to be written."""
        if not self.writable or self._stopping or self._clock() < self._resume_at:
            return False
        try:
            self._queue.put(record, block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Full:
            self.counts["dropped"] += 1
            return False
        return True

    def flush(self) -> None:
        """Wait until everything queued is written or has failed."""
        self._queue.join()

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what is queued, within the time, and let another process write."""
        if self._thread is None or self._lock is None:
            return
        end = time.monotonic() + timeout_s
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            _log.warning("%s: not everything was written in %.0f s", self.folder, timeout_s)
        self._thread.join(max(end - time.monotonic(), 0.0))
        self._stopping = True
        if not self._thread.is_alive():
            os.close(self._lock)
            self._lock = None

    def _write_all(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                if not self._stopping:
                    self._write(record)
            except OSError as error:
                self.counts["write_errors"] += 1
                self._resume_at = self._clock() + RETRY_S
                self._say(
                    f"write {error.errno}",
                    "%s: the prefix cache cannot be written (%s); it goes on in memory and tries "
                    "again every %.0f s", self.folder, error.strerror or error, RETRY_S,
                )  # fmt: skip
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, record: Record) -> None:
        """Pages first, then the state: a state on disk has all its pages."""
        if self.holds(record.ids):
            return
        names = chain(record.ids, self.page_tokens)
        tail = record.ids[len(names) * self.page_tokens :]
        with self._mutex:
            kept = [self._pages[name] for name in names if name in self._pages]
            for page in kept:
                page.states += 1  # making room must not take them
        written: list[str] = []
        try:
            now = self._clock()
            state = DiskState(
                length=len(record.ids), tail=tail, path=tuple(names), mtp_first=record.mtp_first,
                why=record.why, nbytes=len(record.state) + len(record.tail), born=now, used_at=now,
            )  # fmt: skip
            need = _file_bytes(state.nbytes, len(tail))
            need += sum(_file_bytes(len(data), self.page_tokens) for data in record.pages.values())
            if not self._make_room(need, state):
                self.counts["no_room"] += 1
                return
            for number, name in enumerate(names):
                data = record.pages.get(number)
                if data is not None:
                    self._write_page(record, names, number, data)
                    written.append(name)
                elif name not in self._pages:
                    self.counts["dropped"] += 1  # it went while the record waited
                    return
            header = {
                "kind": "state", "namespace": self.namespace, "parent": names[-1] if names else "",
                "ids": list(tail), "mtp_first": record.mtp_first, "tokens": len(record.ids),
                "why": record.why, "born": now,
            }  # fmt: skip
            path = self._state_path(state.name)
            state.nbytes = write_blob(path, header, [record.state, record.tail])
            with self._mutex:
                self._enter(state)
            self.counts["written"] += 1
        finally:
            with self._mutex:
                for page in kept:
                    page.states -= 1
                self._drop_pages([*names, *written])

    def _write_page(self, record: Record, names: list[str], number: int, data: bytes) -> None:
        size, name = self.page_tokens, names[number]
        parent = names[number - 1] if number else ""
        ids = record.ids[number * size : (number + 1) * size]
        # What counts is from where on the rows of this very page are there.
        first = min(max(record.mtp_first, number * size), (number + 1) * size)
        header = {
            "kind": "page", "namespace": self.namespace, "parent": parent, "ids": list(ids),
            "mtp_first": first,
        }  # fmt: skip
        nbytes = write_blob(self._page_path(name), header, [data])
        with self._mutex:
            old = self._pages.get(name)
            if old is None:
                self._pages[name] = _Page(parent=parent, ids=ids, mtp_first=first, nbytes=nbytes)
                self._nbytes += nbytes
            else:
                self._nbytes += nbytes - old.nbytes
                old.mtp_first, old.nbytes = first, nbytes

    # -- room ------------------------------------------------------------------------------------

    def _make_room(self, need: int, newcomer: DiskState) -> bool:
        """Remove snapshots of least value until so many bytes fit; False if they should not."""
        if need > self.limit_bytes:
            return False
        with self._mutex:
            while self._nbytes + need > self.limit_bytes:
                if not self._states:
                    return False
                victim = min(
                    self._states.values(), key=lambda state: (self._value(state), state.born)
                )
                if self._value(victim) > self._value(newcomer):
                    return False
                self._remove(victim)
                self.counts["evicted"] += 1
        return True

    def _value(self, state: DiskState) -> float:
        """As in memory: likelihood of use times tokens saved, per byte that only it holds."""
        likely = likelihood(state.why, state.uses, self._clock() - state.used_at)
        pages = (self._pages.get(name) for name in state.path)
        own = sum(page.nbytes for page in pages if page and page.states <= 1)
        return likely * state.length / max(state.nbytes + own, 1)

    def _enter(self, state: DiskState) -> None:
        self._states[state.name] = state
        self._by_chain.setdefault(state.path[-1] if state.path else "", []).append(state)
        self._nbytes += state.nbytes
        for name in state.path:
            self._pages[name].states += 1

    def _remove(self, state: DiskState, *, unlink: bool = True) -> None:
        """Forget a snapshot; the writer removes its files too, the state before its pages."""
        if self._states.pop(state.name, None) is None:
            return
        siblings = self._by_chain[state.path[-1] if state.path else ""]
        siblings.remove(state)
        self._nbytes -= state.nbytes
        if self.writable and unlink:
            self._state_path(state.name).unlink(missing_ok=True)
        for name in state.path:
            page = self._pages.get(name)
            if page is not None:
                page.states -= 1
        self._drop_pages(state.path)

    def _drop_pages(self, names: Sequence[str]) -> None:
        """Remove those of the pages that no state needs."""
        if self._newer:
            return  # a later version's states may need them
        for name in names:
            page = self._pages.get(name)
            if page is not None and page.states <= 0:
                del self._pages[name]
                self._nbytes -= page.nbytes
                if self.writable:
                    self._page_path(name).unlink(missing_ok=True)

    # -- damage ----------------------------------------------------------------------------------

    def _damaged(self, path: Path, error: DamagedBlob) -> None:
        """Out of the way with it; only its own process touches the files of a writer."""
        self.counts["corrupt"] += 1
        self._say("corrupt", "damaged file in the prefix cache, moved to bad/: %s", error)
        if self.writable:
            bad = self.folder / "bad"
            make_folder(bad)
            try:
                os.replace(path, bad / path.name)
                known = sorted(bad.iterdir(), key=lambda file: file.stat().st_mtime)
                for file in known[:-MAX_BAD]:
                    file.unlink()
            except FileNotFoundError:
                pass  # it is gone already, which is what was wanted
        self._forget_file(path)

    def _forget_file(self, path: Path) -> None:
        """Whatever needs this file cannot be used any more."""
        name = path.stem
        with self._mutex:
            hit = [s for s in self._states.values() if s.name == name or name in s.path]
            for state in hit:
                self._remove(state, unlink=state.name != name)
            page = self._pages.pop(name, None)
            if page is not None:
                self._nbytes -= page.nbytes

    def _say(self, kind: str, message: str, *values: Any) -> None:
        """Log the first event of a kind; the rest are counted."""
        if kind not in self._said:
            self._said.add(kind)
            _log.warning(message, *values)

    # -- the index -------------------------------------------------------------------------------

    def _read_index(self) -> None:
        """Pages and states by their headers; what is unfinished or useless goes."""
        if self.writable:
            for file in self.folder.rglob(f"*{TEMPORARY}"):
                file.unlink(missing_ok=True)
        for path, header, size in self._headers("pages", "*.kv", "page"):
            ids = tuple(header["ids"])
            if _page_name(header["parent"], ids) != path.stem or len(ids) != self.page_tokens:
                self._damaged(path, DamagedBlob(f"{path}: another page's name."))
                continue
            self._pages[path.stem] = _Page(
                parent=header["parent"], ids=ids, mtp_first=header["mtp_first"], nbytes=size
            )
            self._nbytes += size
        for path, header, size in self._headers("states", "*.st", "state"):
            self._index_state(path, header, size)
        self._drop_pages(list(self._pages))

    def _index_state(self, path: Path, header: dict[str, Any], size: int) -> None:
        tail, last = tuple(header["ids"]), header["parent"]
        born, why = header.get("born"), header.get("why")
        names: list[str] = []
        name = last
        while name and name in self._pages:
            names.append(name)
            name = self._pages[name].parent
        length = len(names) * self.page_tokens + len(tail)
        if name:  # a page before it is gone: the state is of no use
            if self.writable and not self._newer:
                path.unlink(missing_ok=True)
            return
        right = state_name(last, tail, length) == path.stem and len(header["parts"]) == 2
        if not right or not isinstance(born, int | float) or not isinstance(why, str):
            self._damaged(path, DamagedBlob(f"{path}: another state's name."))
            return
        self._enter(
            DiskState(
                length=length, tail=tail, path=tuple(reversed(names)), nbytes=size, why=why,
                mtp_first=header["mtp_first"], born=born, used_at=born,
            )
        )  # fmt: skip

    def _headers(
        self, folder: str, pattern: str, kind: str
    ) -> Iterator[tuple[Path, dict[str, Any], int]]:
        for path in sorted((self.folder / folder).glob(f"*/{pattern}")):
            try:
                header, size = read_header(path)
            except NewerBlob:
                self._newer += 1
                self._say("newer", "%s is of a later version; it is left alone", path)
                continue
            except DamagedBlob as error:
                self._damaged(path, error)
                continue
            except FileNotFoundError:
                continue  # the writer has just removed it
            if header["kind"] != kind or header["namespace"] != self.namespace:
                self._damaged(path, DamagedBlob(f"{path}: not a {kind} of this folder."))
                continue
            yield path, header, size

    def _page_path(self, name: str) -> Path:
        return self.folder / "pages" / name[:2] / f"{name}.kv"

    def _state_path(self, name: str) -> Path:
        return self.folder / "states" / name[:2] / f"{name}.st"

    def _write_manifest(self, fields: Mapping[str, Any]) -> None:
        """For people: what this folder belongs to. Nothing reads it but ``qnext cache info``."""
        path = self.folder / "MANIFEST.json"
        if not path.exists():
            text = json.dumps({**fields, "format": FORMAT_VERSION}, indent=2, default=str)
            temporary = path.with_name(f".{path.name}{TEMPORARY}")
            with open(temporary, "w", opener=lambda p, f: os.open(p, f, 0o600)) as file:
                file.write(text + "\n")
            os.replace(temporary, path)


def _file_bytes(payload: int, ids: int) -> int:
    """At most the size of a file with so much in it."""
    return payload + 1024 + 20 * ids + 40 * (payload // BLOCK_BYTES + 1)


def _lock(path: Path) -> int | None:
    """A held lock, or None when another process has it or the folder cannot be written to."""
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise RequestError(
            "cache_dir needs file locks as Linux and macOS have them; leave it out here."
        ) from error
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except PermissionError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
