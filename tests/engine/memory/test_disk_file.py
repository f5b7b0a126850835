"""Protects: what is written to files of the disk tier is read again byte by byte, and a failing disk says where."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CapacityError, ConfigError, EngineError
from engine.memory.disk.file import BLOCK, ByteRange, DiskFile, Request, requests_of
from engine.memory.disk.io import DiskIO, wait_for
from engine.memory.disk.rows import DiskRows
from engine.memory.paths import network_file_system
from engine.weights.sweep_reader import SweepReader, piece_bytes

SIZE = 3 << 20


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(count)), dtype=torch.uint8)


@pytest.fixture
def io() -> Iterator[DiskIO]:
    io = DiskIO()
    yield io
    io.close()


@pytest.fixture(params=["direct", "buffered"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskFile]:
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    with closing(DiskFile.create(str(tmp_path / "new" / "one"), SIZE)) as file:
        assert file.is_direct == (request.param == "direct")
        assert bool(fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT) == file.is_direct
        assert list((tmp_path / "new" / "one").iterdir()) == []
        yield file


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows neither direct access nor files without a name."""
    real = os.open

    def refuse(name: str, flags: int, *more: int, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


places = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.one_of(st.integers(1, 5000), st.integers(1, SIZE))), min_size=1, max_size=12
)


def disjoint(wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, end) of as much of `wanted` as does not overlap what came before."""
    taken: list[tuple[int, int]] = []
    for first, size in wanted:
        end = min(SIZE, first + size)
        if all(end <= a or first >= b for a, b in taken):
            taken.append((first, end))
    return taken


def test_bytes_come_back_as_they_were_written(file: DiskFile, io: DiskIO) -> None:
    """Spans of any place and size, written many at once around what is there already."""
    oracle = torch.zeros(SIZE, dtype=torch.uint8)

    @settings(max_examples=40, deadline=None)
    @given(wanted=places, seed=st.integers(0, 1000))
    def check(wanted: list[tuple[int, int]], seed: int) -> None:
        source = random_bytes(2 * SIZE, seed)
        spans = []
        for number, (first, end) in enumerate(disjoint(wanted)):
            at = (seed * 4099 + number * 77777) % SIZE
            spans.append(ByteRange(file, first, end, at))
            oracle[first:end] = source[at : at + end - first]
        io.write(file, spans, source)
        everything, parts = torch.empty(SIZE, dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8)
        wait_for(io.read([ByteRange(file, 0, SIZE, 0)], everything))
        assert torch.equal(everything, oracle)
        mine = [ByteRange(file, first, end, first) for first, end in disjoint(wanted)]
        wait_for(io.read(mine, parts))
        for span in mine:
            assert torch.equal(parts[span.first : span.end], oracle[span.first : span.end])

    check()


def test_neighbours_written_from_several_threads_keep_their_bytes(file: DiskFile, io: DiskIO) -> None:
    """Rows of 100 bytes share blocks: whoever writes one must not undo another's."""
    rows = random_bytes(4000 * 100)

    def write(part: int) -> None:
        for first in range(part, 4000, 4 * 50):
            spans = [
                ByteRange(file, row * 100, row * 100 + 100, row * 100)
                for row in range(first, min(4000, first + 200), 4)
            ]
            io.write(file, spans, rows)

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = torch.empty(4000 * 100, dtype=torch.uint8)
    wait_for(io.read([ByteRange(file, 0, 4000 * 100, 0)], found))
    assert torch.equal(found, rows)


@settings(max_examples=200, deadline=None)
@given(wanted=places, most=st.sampled_from([BLOCK, 5 * BLOCK, 1 << 20]), gap=st.sampled_from([BLOCK, 1 << 16]))
def test_requests_cover_all_and_share_no_block(wanted: list[tuple[int, int]], most: int, gap: int) -> None:
    file: Any = object()
    spans = [ByteRange(file, first, end, index << 32) for index, (first, end) in enumerate(disjoint(wanted))]
    requests = requests_of(spans, most, gap)
    covered = sorted((r.first + o, r.first + o + n, at) for r in requests for o, at, n in r.parts)
    for span in spans:
        mine = [part for part in covered if part[2] >> 32 == span.at >> 32]
        assert [part[0] for part in mine] == [span.first, *(part[1] for part in mine[:-1])]
        assert mine[-1][1] == span.end
        assert all(at - span.at == first - span.first for first, _, at in mine)
    for one, other in pairwise(requests):
        assert one.first + one.num_bytes <= other.first
    assert all(r.first % BLOCK == 0 and 0 < r.num_bytes <= most for r in requests)


def test_files_are_read_in_the_order_of_the_spans_wherever_they_lie_in_memory() -> None:
    files: list[Any] = sorted((object() for _ in range(20)), key=id, reverse=True)
    spans = [ByteRange(file, first, first + 10, 0) for file in files for first in (10 * BLOCK, 0)]
    found = [(request.file, request.first) for request in requests_of(spans, BLOCK, BLOCK)]
    assert found == [(file, first) for file in files for first in (0, 10 * BLOCK)]


def test_a_file_grows_and_keeps_what_it_holds(file: DiskFile, io: DiskIO, tmp_path: Path) -> None:
    data = random_bytes(SIZE)
    io.write(file, [ByteRange(file, 0, SIZE, 0)], data)
    file.grow(str(tmp_path), 2 * SIZE)
    io.write(file, [ByteRange(file, 2 * SIZE - 7, 2 * SIZE, 0)], data)
    found = torch.empty(2 * SIZE, dtype=torch.uint8)
    wait_for(io.read([ByteRange(file, 0, 2 * SIZE, 0)], found))
    assert torch.equal(found[:SIZE], data)
    assert not found[SIZE:-7].any()
    assert torch.equal(found[-7:], data[:7])


def test_a_file_that_ends_within_a_block_is_read_to_its_end(io: DiskIO, tmp_path: Path) -> None:
    data = random_bytes(3 * BLOCK + 17)
    (tmp_path / "whole").write_bytes(bytes(data.tolist()))
    found = torch.empty(17 + 9, dtype=torch.uint8)
    with closing(DiskFile.open(tmp_path / "whole")) as file:
        wait_for(io.read([ByteRange(file, 3 * BLOCK - 9, 3 * BLOCK + 17, 0)], found))
        assert torch.equal(found, data[3 * BLOCK - 9 :])
        with pytest.raises(EngineError, match=f"whole: ends before byte {3 * BLOCK + 18}"):
            wait_for(io.read([ByteRange(file, 3 * BLOCK, 3 * BLOCK + 18, 0)], found))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_write_says_where(
    code: int, file: DiskFile, io: DiskIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = random_bytes(SIZE)
    io.write(file, [ByteRange(file, 0, SIZE, 0)], before)
    real = os.pwritev

    def fail(handle: int, buffers: list[Any], place: int) -> int:
        if place >= 2 << 20:
            raise OSError(code, os.strerror(code))
        return real(handle, buffers, place)

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(EngineError) as caught:
        io.write(file, [ByteRange(file, 0, SIZE, 0)], random_bytes(SIZE, 1))
    monkeypatch.undo()
    message = str(caught.value)
    assert isinstance(caught.value, CapacityError) == (code != errno.EIO)
    assert str(tmp_path) in message
    assert re.search(r"1048576 bytes at 2097152\b", message)
    assert os.strerror(code) in message
    assert "\n" not in message
    rest = torch.empty(1 << 20, dtype=torch.uint8)
    wait_for(io.read([ByteRange(file, 2 << 20, SIZE, 0)], rest))
    assert torch.equal(rest, before[2 << 20 :])  # what could not be written is as it was


def test_a_failing_read_says_where(file: DiskFile, io: DiskIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int, buffers: list[Any], place: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(EngineError, match=r"offload file in .*: bytes 8192 to 8200 cannot be read: Input/output error"):
        wait_for(io.read([ByteRange(file, 8193, 8200, 0)], torch.empty(7, dtype=torch.uint8)))


def test_short_reads_and_writes_go_on(file: DiskFile, io: DiskIO, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, place: read(handle, [buffers[0][: 5 * BLOCK]], place))
    monkeypatch.setattr(os, "pwritev", lambda handle, buffers, place: write(handle, [buffers[0][: 3 * BLOCK]], place))
    data, found = random_bytes(SIZE), torch.empty(SIZE, dtype=torch.uint8)
    io.write(file, [ByteRange(file, 0, SIZE, 0)], data)
    wait_for(io.read([ByteRange(file, 0, SIZE, 0)], found))
    assert torch.equal(found, data)


def test_a_full_disk_and_a_bad_directory_leave_nothing(tmp_path: Path) -> None:
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match=r"no room for 1152921504\.6 GB \(\d+\.\d GB free") as caught:
        DiskFile.create(str(tmp_path), 1 << 60)
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not writable: Not a directory"):
        DiskFile.create(str(tmp_path / "file"), BLOCK)
    with pytest.raises(EngineError, match="missing cannot be opened: No such file"):
        DiskFile.open(tmp_path / "missing")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_file_system_that_cannot_claim_is_used_all_the_same(
    io: DiskIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, first: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with closing(DiskFile.create(str(tmp_path), SIZE)) as file:
        data, found = random_bytes(100), torch.empty(100, dtype=torch.uint8)
        io.write(file, [ByteRange(file, SIZE - 100, SIZE, 0)], data)
        wait_for(io.read([ByteRange(file, SIZE - 100, SIZE, 0)], found))
        assert torch.equal(found, data)


def test_rows_are_read_as_they_were_last_written(tmp_path: Path) -> None:
    from engine.memory.arena import Arena

    arena = Arena(torch.device("cpu"), offload_dir=str(tmp_path))
    tables = DiskRows(arena, [100, 4096])
    tables.grow(50)
    oracle = [torch.zeros(80, 100, dtype=torch.uint8), torch.zeros(80, 4096, dtype=torch.uint8)]
    rng = random.Random(5)
    for step in range(30):
        if step == 15:
            tables.grow(80)
        table, limit = rng.randrange(2), 50 if step < 15 else 80
        pieces = []
        for _ in range(3):
            first = rng.randrange(limit)
            rows = random_bytes(rng.randrange(1, 9) * oracle[table].shape[1], step).view(-1, oracle[table].shape[1])
            rows = rows[: limit - first]
            if any(first < a + len(r) and a < first + len(rows) for a, r in pieces):
                continue
            pieces.append((first, rows))
            oracle[table][first : first + len(rows)] = rows
        tables.write(table, pieces)
    tables.settle()
    for table, expected in enumerate(oracle):
        assert torch.equal(tables.fetch(table, [(60, 20), (0, 60)]).rows(), torch.cat((expected[60:], expected[:60])))
    assert arena.num_bytes["disk"] == 80 * (100 + 4096)
    tables.close()
    arena.close()


class Unit:
    """Plays the file of a unit: every block is full of one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, first: int, memory: memoryview, needed: int) -> None:
        assert len(memory) == needed == BLOCK
        memory[:] = bytes([self.number * 16 + first // BLOCK]) * BLOCK


class Recorder:
    """Plays `DiskIO`: reads at once; notes the order."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def submit(self, work: Any, request: Request, memory: torch.Tensor, copied: Any) -> Any:
        unit: Any = request.file
        self.asked.append((unit.number, request.first))
        work(request, memory, copied)

        class Done:
            def result(self) -> None:
                return None

        return Done()


class Copy:
    """An event that notes when somebody has waited for it."""

    def __init__(self, order: list[str]) -> None:
        self.number = len(order)
        self.order = order
        order.append(f"copied {self.number}")

    def synchronize(self) -> None:
        self.order.append(f"waited {self.number}")


def reader(sizes: list[int], pieces: int, ready: set[int], *, ahead: bool = True) -> tuple[SweepReader, Recorder]:
    """A reader of units of so many blocks each, a block a request."""
    io: Any = Recorder()
    files: list[Any] = [Unit(number) for number in range(len(sizes))]
    units: list[Any] = [
        lambda f=f, n=n: [ByteRange(f, 0, n * BLOCK, 0)] if n else [] for f, n in zip(files, sizes, strict=True)
    ]
    staging = torch.zeros(pieces * BLOCK, dtype=torch.uint8)
    assert piece_bytes(staging.numel()) == BLOCK
    return SweepReader(io, staging, units, lambda unit: unit in ready, ahead=ahead), io


def content(reader: SweepReader, unit: int, copied: Any = lambda: None) -> list[int]:
    """First byte of each block that is taken."""
    return [int(blocks[0]) for _, blocks in reader.take(unit, copied)]


def test_what_follows_is_read_while_a_unit_is_taken_across_the_end_of_the_sweep() -> None:
    read, io = reader([2, 0, 3, 1], 4, {0, 1, 2, 3})
    for _ in range(3):
        assert content(read, 0) == [0, 1]
        assert content(read, 1) == []
        assert content(read, 2) == [32, 33, 34]
        assert content(read, 3) == [48]
    once = [(0, 0), (0, BLOCK), (2, 0), (2, BLOCK), (2, 2 * BLOCK), (3, 0)]
    assert io.asked == (once * 4)[: 3 * 6 + 4]  # nothing twice, and always four pieces ahead


def test_a_piece_is_filled_anew_only_behind_its_copy() -> None:
    read, _ = reader([3, 3, 3], 2, {0, 1, 2})
    order: list[str] = []

    for unit in (0, 1, 2):
        assert content(read, unit, lambda: Copy(order)) == [16 * unit, 16 * unit + 1, 16 * unit + 2]
    copies = [entry for entry in order if entry.startswith("copied")]
    assert len(copies) == 9
    for entry in copies:
        assert order[order.index(entry) + 1] == entry.replace("copied", "waited")


def test_units_that_have_not_arrived_are_not_read_ahead() -> None:
    ready = {0}
    read, io = reader([1, 1, 1], 3, ready)
    content(read, 0)
    assert io.asked == [(0, 0)]
    ready.add(1)
    assert content(read, 1) == [16]
    assert io.asked == [(0, 0), (1, 0)]


def test_without_overlap_only_the_unit_in_hand_is_read() -> None:
    read, io = reader([2, 2], 3, {0, 1}, ahead=False)
    for unit in (0, 1, 0):
        assert content(read, unit) == [16 * unit, 16 * unit + 1]
    assert len(io.asked) == 6


def test_a_unit_out_of_turn_is_read_all_the_same() -> None:
    read, _ = reader([2, 2, 2], 3, {0, 1, 2})
    for unit in (0, 2, 1, 1, 0):
        assert content(read, unit) == [16 * unit, 16 * unit + 1]


def test_network_file_systems_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_file_system(str(tmp_path / "not" / "yet")) is None
    device = os.stat(tmp_path).st_dev
    mounts, real = tmp_path / "mountinfo", open
    line = "36 35 {}:{} / {} rw,noatime master:1 - {} server:/export rw"
    for kind, expected in (("nfs4", "nfs4"), ("ext4", None), ("cifs", "cifs")):
        mounts.write_text(line.format(os.major(device), os.minor(device), tmp_path, kind) + "\n")
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", lambda name, *args, **named: real(mounts, *args, **named))
            assert network_file_system(str(tmp_path)) == expected
