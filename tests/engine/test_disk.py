"""Snapshots on disk: what was written comes back, and nothing that was not."""

import errno
import json
import logging
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.engine import blob, disk
from qnext.engine.disk import DiskStore, Missing, Record, chain, namespace_of
from qnext.errors import RequestError

FIELDS = {"model": "a", "layout": {"page": ["float32", [4]]}}
PAGE = 4
SOURCE = Path(disk.__file__).parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def opened():
    stores = []

    def open_store(root, **options) -> DiskStore:
        settings = {"fields": FIELDS, "page_tokens": PAGE, "limit_bytes": 1 << 20} | options
        store = DiskStore(root, **settings)
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()


def content(*what) -> bytes:
    """Bytes that only these tokens have."""
    return random.Random(repr(what)).randbytes(100)


def record(store, ids, *, why="stable", mtp_first=1) -> Record:
    ids = tuple(ids)
    full = len(ids) // PAGE
    return Record(
        ids=ids, why=why, mtp_first=mtp_first, state=content("state", ids),
        tail=content("tail", ids) if len(ids) % PAGE else b"",
        pages={n: content("page", ids[: (n + 1) * PAGE]) for n in store.lacking(ids, mtp_first)
               if n < full},
    )  # fmt: skip


def put(store, ids, **more) -> None:
    assert store.submit(record(store, ids, **more), timeout_s=5)
    store.flush()


def check(store, ids) -> int:
    """The deepest snapshot of a prompt is read and compared; returns its length."""
    state = store.find(ids)
    if state is None:
        return 0
    own = tuple(ids[: state.length])
    tail = content("tail", own) if len(own) % PAGE else b""
    assert store.load_state(state) == (content("state", own), tail)
    for number in range(len(state.path)):
        data, first = store.load_page(state, number)
        assert data == content("page", own[: (number + 1) * PAGE])
        assert first == max(number * PAGE, 1)
    return state.length


def files(root, pattern="*.*") -> list[Path]:
    return sorted(p for p in Path(root).rglob(pattern) if p.suffix in (".kv", ".st"))


IDS = list(range(100, 130))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_a_snapshot_survives_a_restart(tmp_path, opened, length):
    first = opened(tmp_path)
    put(first, IDS[:length])
    first.close()
    again = opened(tmp_path)
    assert again.writable
    assert again.nbytes == first.nbytes == sum(p.stat().st_size for p in files(tmp_path))
    assert check(again, IDS) == length
    assert check(again, IDS[:length]) == 0  # one token must be left to run
    assert check(again, [*IDS[: length - 1], 7, 7, 7]) == 0
    assert again.find(IDS, longer_than=length) is None


def test_shared_pages_are_written_once(tmp_path, opened):
    store = opened(tmp_path)
    put(store, IDS[:9])
    put(store, IDS[:13])
    put(store, [*IDS[:8], 1, 2])
    assert len(files(tmp_path, "*.kv")) == 3
    assert len(files(tmp_path, "*.st")) == 3
    assert [check(store, [*IDS[:20]]), check(store, [*IDS[:8], 1, 2, 3])] == [13, 10]


def test_a_page_without_rows_of_the_mtp_layer_is_replaced_by_a_better_one(tmp_path, opened):
    store = opened(tmp_path)
    put(store, IDS[:8], mtp_first=8)
    assert store.load_page(store.find(IDS), 1)[1] == 8
    put(store, IDS[:12], mtp_first=1)
    assert store.load_page(store.find(IDS), 1)[1] == 4
    assert store.lacking(IDS[:12], 8) == []


def test_everything_that_changes_the_bytes_is_in_the_name_of_the_folder(tmp_path, opened):
    put(opened(tmp_path), IDS[:9])
    other = opened(tmp_path, fields={**FIELDS, "layout": {"page": ["bfloat16", [4]]}})
    assert other.find(IDS) is None
    assert namespace_of({"a": 1, "b": 2}) == namespace_of({"b": 2, "a": 1})
    manifest = json.loads((other.folder / "MANIFEST.json").read_text())
    assert manifest["layout"] == {"page": ["bfloat16", [4]]}


def test_a_chain_names_what_lies_before_a_page_too():
    assert chain(IDS, PAGE)[1] != chain(IDS[4:], PAGE)[0]
    assert chain(IDS[:11], PAGE) == chain(IDS, PAGE)[:2]


def test_only_the_owner_can_look_at_conversations(tmp_path, opened):
    put(opened(tmp_path / "new"), IDS[:9])
    for path in (tmp_path / "new").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_one_process_writes_and_another_reads(tmp_path, opened, caplog):
    writer = opened(tmp_path)
    put(writer, IDS[:9])
    reader = opened(tmp_path)
    assert "in use by another process" in caplog.text
    assert not reader.writable
    assert not reader.submit(record(reader, IDS[:13]))
    assert check(reader, IDS) == 9
    # A file that goes away is a miss, a damaged one is left to its owner.
    files(tmp_path, "*.st")[0].unlink()
    with pytest.raises(Missing):
        reader.load_state(reader.find(IDS))
    assert reader.find(IDS) is None
    writer.close()
    assert opened(tmp_path).writable


def test_a_reader_leaves_damaged_files_where_they_are(tmp_path, opened):
    put(opened(tmp_path), IDS[:9])
    reader = opened(tmp_path)
    path = files(tmp_path, "*.st")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Missing) as found:
        reader.load_state(reader.find(IDS))
    assert found.value.corrupt
    assert path.exists()


# -- damage --------------------------------------------------------------------------------------


def parts_of(path: Path) -> dict[str, int]:
    """An offset in every part of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[12:16], "little")
    return {
        "magic": 3, "version": 8, "header length": 12, "header": 16 + length // 2,
        "header checksum": 16 + length + 5, "payload": 16 + length + 16 + 50, "end": len(raw) - 1,
    }  # fmt: skip


def try_to_read(store) -> int:
    """Length reused for IDS, the way the engine asks: what cannot be read is a miss."""
    try:
        return check(store, IDS)
    except Missing:
        return check(store, IDS)


@pytest.mark.parametrize(
    "part",
    ["magic", "version", "header length", "header", "header checksum", "payload", "end"],
)
@pytest.mark.parametrize("ending", [".kv", ".st"])
@pytest.mark.parametrize("when", ["while open", "between"])
def test_a_flipped_bit_anywhere_is_a_miss(tmp_path, opened, part, ending, when):
    store = opened(tmp_path)
    put(store, IDS[:6])
    if when == "between":
        store.close()
    [path] = files(tmp_path, f"*{ending}")
    raw = bytearray(path.read_bytes())
    raw[parts_of(path)[part]] ^= 0x10
    path.write_bytes(raw)
    if when == "between":
        store = opened(tmp_path)
    assert try_to_read(store) == 0
    if part == "version":
        assert path.exists()  # might be a later program's
        assert not store.counts["corrupt"]
    else:
        assert store.counts["corrupt"] == 1
        assert [p.name for p in (store.folder / "bad").iterdir()] == [path.name]
    # It is not in the way of a new copy.
    put(store, IDS[:6])
    assert try_to_read(store) == 6


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_of_any_kind_never_gives_wrong_bytes(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("disk")
    options = {"fields": FIELDS, "page_tokens": PAGE, "limit_bytes": 1 << 20, "clock": Clock()}
    store = DiskStore(root, **options)
    for length in (3, 8, 14):
        put(store, IDS[:length])
    store.close()
    path, other = (files(root)[data.draw(st.integers(0, 5))] for _ in range(2))
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "swap"]))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(raw[:at] if kind == "cut" else raw + b"x")
    store = DiskStore(root, **options)
    assert try_to_read(store) in (0, 3, 8, 14)  # and check() has compared every byte
    store.close()


def test_a_page_that_is_gone_takes_the_states_beyond_it_along(tmp_path, opened):
    store = opened(tmp_path)
    for length in (3, 8, 14):
        put(store, IDS[:length])
    store.close()
    (store.folder / "pages" / (name := chain(IDS, PAGE)[1])[:2] / f"{name}.kv").unlink()
    again = opened(tmp_path)
    assert check(again, IDS) == 3
    assert len(files(tmp_path)) == 1  # what nobody can use is gone


def test_a_later_version_is_ignored_and_kept(tmp_path, opened):
    store = opened(tmp_path)
    put(store, IDS[:9])
    store.close()
    path = files(tmp_path, "*.st")[0]
    raw = bytearray(path.read_bytes())
    raw[8:12] = (blob.FORMAT_VERSION + 1).to_bytes(4, "little")
    path.write_bytes(raw)
    again = opened(tmp_path)
    assert again.find(IDS) is None
    assert len(files(tmp_path)) == 3  # its pages too: the later program needs them


# -- being killed --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from qnext.engine import blob
import test_disk
left = int(sys.argv[2])
def deadly(function):
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return call
store = test_disk.DiskStore(
    sys.argv[1], fields=test_disk.FIELDS, page_tokens=test_disk.PAGE, limit_bytes=1 << 20)
for name in ("open", "fsync", "replace", "close"):
    setattr(os, name, deadly(getattr(os, name)))
os.mkdir = deadly(os.mkdir)
test_disk.put(store, test_disk.IDS[:9])
os._exit(0)
"""


@pytest.mark.parametrize("stage", range(1, 60, 3))
def test_killed_at_any_moment_of_a_write_nothing_wrong_is_left(tmp_path, opened, stage):
    store = opened(tmp_path)
    put(store, IDS[:5])
    store.close()
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(stage), str(SOURCE),
         str(Path(__file__).parent)], check=False,
    ).returncode  # fmt: skip
    assert code in (0, -9)
    again = opened(tmp_path)
    assert check(again, IDS) in ((5, 9) if code else (9,))
    assert not again.counts["corrupt"]
    assert not list(tmp_path.rglob("*.tmp"))
    put(again, IDS[:9])
    assert check(again, IDS) == 9


def test_the_last_stages_of_the_test_above_are_after_the_write(tmp_path):
    arguments = [str(SOURCE), str(Path(__file__).parent)]
    codes = [
        subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / str(stage)), str(stage), *arguments],
            check=False,
        ).returncode
        for stage in (1, 200)
    ]
    assert codes == [-9, 0]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_is_said_once_and_writing_goes_on_later(
    tmp_path, opened, monkeypatch, caplog, failing
):
    clock = Clock()
    store = opened(tmp_path, clock=clock)
    put(store, IDS[:5])

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(os, failing, full)
        put(store, IDS[:9])
        assert store.counts["write_errors"] == 1
        assert not store.accepts
        assert not store.submit(record(store, IDS[:9]))  # not at once again
        clock.now += disk.RETRY_S
        put(store, IDS[:9])
    assert caplog.text.count("No space left on device") == 1
    assert check(store, IDS) == 5
    clock.now += disk.RETRY_S
    put(store, IDS[:9])
    assert check(store, IDS) == 9
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_used_is_refused(tmp_path, opened):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cache_dir .*file.*: .*Choose a folder"):
        opened(tmp_path / "file" / "below")


# -- the limit -----------------------------------------------------------------------------------


def test_the_folder_stays_below_its_limit_and_keeps_what_is_worth_most(tmp_path, opened):
    store = opened(tmp_path, limit_bytes=12_000)
    put(store, IDS[:12], why="system")
    for tail in range(40):
        put(store, [tail, *IDS[:8]], why="end")
        assert store.nbytes <= 12_000
        assert store.nbytes == sum(p.stat().st_size for p in files(tmp_path))
    assert store.counts["evicted"] > 5
    assert check(store, IDS) == 12
    assert check(store, [39, *IDS]) == 9
    store.close()
    assert check(opened(tmp_path), [39, *IDS]) == 9


def test_what_is_larger_than_the_limit_is_not_written(tmp_path, opened):
    store = opened(tmp_path, limit_bytes=200)
    put(store, IDS[:12])
    assert store.counts["no_room"] == 1
    assert files(tmp_path) == []


def test_a_full_queue_drops_instead_of_waiting(tmp_path, opened, monkeypatch):
    store = opened(tmp_path)
    with store._mutex:  # the writer cannot get on
        results = [store.submit(record(store, IDS[: 4 + n])) for n in range(6)]
    assert results[:2] == [True, True]
    assert not all(results)
    assert store.counts["dropped"] == results.count(False)
    store.flush()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 14), st.sampled_from(["end", "system"])),
        max_size=12,
    ),
    limit=st.integers(500, 12_000),
)
def test_any_sequence_of_writes_and_restarts_keeps_the_books_right(
    tmp_path_factory, actions, limit
):
    root = tmp_path_factory.mktemp("disk")
    options = {"fields": FIELDS, "page_tokens": PAGE, "limit_bytes": limit}
    store = DiskStore(root, **options)
    for document, length, why in actions:
        ids = [document, *IDS]
        put(store, ids[:length], why=why)
        assert check(store, ids) in range(15)
        on_disk = files(root)
        assert store.nbytes == sum(path.stat().st_size for path in on_disk) <= limit
        used = {name for state in store._states.values() for name in state.path}
        assert {path.stem for path in on_disk if path.suffix == ".kv"} == used
        if length % 3 == 0:
            store.close()
            store = DiskStore(root, **options)
    store.close()
