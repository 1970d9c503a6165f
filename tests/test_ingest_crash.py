"""Ingests that are cut off anywhere and run again end with the rows of an undisturbed run.

The real program is killed with -9 at moments that are seen from outside: how far the write-ahead
log has grown, or a request that stands at the source's gate. In process, hypothesis chooses where
a run is cut: the clock is an argument, looked at once for each chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import standins
from conftest import MASTER_KEY, RunningProgram, World, clean_environment, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import Program

import teckochecker as tecko

ROWS = 10_000  # five chunks
PATIENCE = 30  # s for any one thing to happen
COUNTS = [f"records_{name}" for name in tecko.COUNTED]
SEED = int.from_bytes(os.urandom(4))  # said by a test that fails
ENV = {"SECRET_KEY": MASTER_KEY, "MIN_POLL_INTERVAL": "1"}

Rows = list[dict[str, Any]]


# --- What stands in a store -----------------------------------------------------------------------


def query(folder: Path, sql: str) -> list[Any]:
    """Rows of the store in a folder, read from outside; [] where it has no such table yet."""
    uri = f"file:{folder / 'teckochecker.db'}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            return db.execute(sql).fetchall()
    except sqlite3.OperationalError as e:
        if re.match("no such table|unable to open", str(e)) is None:
            raise
        return []


class Content(NamedTuple):
    """What a source has brought, without times."""

    unified: dict[str, tuple[str, bytes]]  # the unified record and its hash, by id
    raw: dict[str, tuple[str, int]]  # the record as received and whether it was processed, by id
    rejects: set[tuple[str, str, str]]


def content(folder: Path) -> Content:
    unified = query(folder, "SELECT source_id, data, hash FROM normalized_data")
    raw = [
        row
        for table in ("raw_data_csv", "raw_data_api")
        for row in query(folder, f"SELECT external_id, raw_data, processed FROM {table}")
    ]
    rejects = query(folder, "SELECT place, reason, record FROM etl_reject")
    return Content(
        {key: (data, digest) for key, data, digest in unified},
        {key: (data, good) for key, data, good in raw},
        {*rejects},
    )


def runs(folder: Path) -> list[tuple[str, dict[str, int]]]:
    """How the runs ended, oldest first, and their counts."""
    found = query(folder, f"SELECT status, {', '.join(COUNTS)} FROM etl_run ORDER BY id")
    return [(row[0], dict(zip(tecko.COUNTED, row[1:], strict=True))) for row in found]


def sums_are_right(folder: Path) -> dict[str, int]:
    """The counts of all runs in all; they are those of the checkpoints, and fit the rows."""
    each = [counts for _, counts in runs(folder)]
    for counts in each:
        assert counts["processed"] == sum(counts.values()) - counts["processed"]
    total = {name: sum(counts[name] for counts in each) for name in tecko.COUNTED}
    kept = query(folder, f"SELECT records, {', '.join(COUNTS)} FROM etl_checkpoint")
    assert kept == [(total["inserted"], *total.values())] * 2  # of the source, and of all
    assert total["inserted"] == len(content(folder).unified)
    return total


def as_undisturbed(found: Content, wanted: Content, *before: Content) -> None:
    """Every record of the source as it is now, and of the vanished ones only such as were there
    before, as they were then."""
    assert {key: found.unified.get(key) for key in wanted.unified} == wanted.unified
    assert {key: found.raw.get(key) for key in wanted.raw} == wanted.raw
    assert found.rejects >= wanted.rejects
    for key in found.unified.keys() - wanted.unified.keys():
        assert found.unified[key] in [old.unified.get(key) for old in before]
    assert found.raw.keys() - wanted.raw.keys() <= {key for old in before for key in old.raw}


# --- Sources, and how they change -----------------------------------------------------------------


def made_rows(count: int, first: int = 0) -> Rows:
    """Records with text to fold; one id comes twice, far apart, and the last is to win."""
    rows = [
        {"id": f"k{n}", "title": f"title {n}", "note": 'say "x",\nplease' if n % 900 == 7 else "-"}
        for n in range(first, first + count)
    ]
    if count > 5000:
        rows[5000] = rows[5000] | {"id": "k7"}
    return rows


def as_csv(rows: Rows) -> bytes:
    """A line of it has a field too few."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "title", "note"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[:3000])
    text.write("ragged\n" if len(rows) > 3000 else "")
    writer.writerows(rows[3000:])
    return text.getvalue().encode()


def unchanged(rows: Rows) -> Rows:
    return rows


def appended(rows: Rows) -> Rows:
    return rows + made_rows(1500, 900_000)


def edited(rows: Rows) -> Rows:
    """One of the first records and one of the last, at the same length."""
    middle = rows[3:-3]
    return (
        [r | {"title": r["title"].upper()} for r in rows[:3]]
        + middle
        + [r | {"title": r["title"].upper()} for r in rows[-3:]]
    )


def shortened(rows: Rows) -> Rows:
    return rows[: len(rows) // 3]


def replaced(rows: Rows) -> Rows:
    """Newest first: all others move down."""
    return made_rows(1200, 800_000) + rows[: len(rows) // 2]


Change = Callable[[Rows], Rows]


# --- The real program, killed ---------------------------------------------------------------------


def until(condition: Callable[[], Any], what: str, every: float = 0.02) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"not in {PATIENCE} s: {what}"
        time.sleep(every)
    return found


@dataclass
class Site:
    """A folder where one source is ingested, and a stand-in for that."""

    folder: Path
    source: standins.Source
    style: standins.Style | None  # of an API; None: it is CSV
    files: int = 1
    since: bool = False
    rows: Rows = field(default_factory=list)
    jitter: random.Random = field(default_factory=random.Random)

    def write(self, rows: Rows) -> None:
        self.rows = rows
        with self.source.lock:
            self.source.records = rows
        for number in range(self.files if self.style is None else 0):
            mine = [
                row for row in rows if zlib.crc32(str(row["id"]).encode()) % self.files == number
            ]
            (self.folder / f"records{number}.csv").write_bytes(as_csv(mine))

    def begin_with(self, rows: Rows) -> None:
        job = {"name": "records", "poll_interval": "1h", "ingest": self.block}
        (self.folder / "jobs.yaml").write_text(json.dumps({"admin": {"port": 0}, "jobs": [job]}))
        self.write(rows)

    @property
    def block(self) -> dict[str, Any]:
        if self.style is None:
            return {"type": "csv", "path": "records*.csv"}
        paging = {} if self.style == "plain" else {"next": self.style}
        block = {"type": "api", "url": self.source.items_url} | paging
        block |= {"items": "data"} if self.style == "cursor" else {}
        return block | ({"since": "updated"} if self.since else {})

    def begin(self) -> subprocess.Popen[str]:
        return Program(
            *("job", "run", "records"),
            cwd=self.folder,
            env=clean_environment(ENV),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self) -> None:
        """One run to its good end."""
        process = self.begin()
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out + err

    def log_size(self) -> int:
        try:
            return (self.folder / "teckochecker.db-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def so_far(self) -> tuple[int, int]:
        """Records of all runs, the one under way included; and how many runs came to their end."""
        sql = "SELECT total(records_processed), total(status = 'success') FROM etl_run"
        [[records, ended]] = query(self.folder, sql) or [[0, 0]]
        return int(records), int(ended)

    def moment(self) -> Callable[[], Any]:
        """When to kill: at a gate on some page; of a file, at any byte of what the first run
        writes, and when a later one has committed a chunk; or when the run has ended before."""
        if self.style is not None:
            return self._at_a_gate()
        before, ended_before = self.so_far()
        wanted = self.jitter.randrange(300_000, 2_000_000)  # the tables and the run take 250,000

        def reached() -> bool:
            records, ended = self.so_far()
            written = records > before if before else self.log_size() >= wanted
            return written or ended > ended_before

        what = f"a record after {before}" if before else f"a log of {wanted} bytes"
        return lambda: until(reached, f"{what}, or the run's end", 0.004)

    def _at_a_gate(self) -> Callable[[], Any]:
        gates: list[standins.Gate] = []
        page, acted = self.jitter.randrange(1, 9), self.jitter.random() < 0.5
        self.source.after_page(page, lambda: gates.append(self.source.gate("GET /items", acted)))

        def reached() -> None:
            until(lambda: gates, f"page {page}")
            gates[0].reached(PATIENCE)

        return reached

    def kill_run(self) -> None:
        moment, process = self.moment(), self.begin()
        moment()
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode in (-signal.SIGKILL, 0)  # 0: the kill came too late
        self.source.release_all()

    def kill_service(self) -> None:
        if self.so_far()[1]:
            return  # the run before ended as it was killed: none is due for an hour
        moment = self.moment()
        with RunningProgram(self.folder, ENV, wait=False) as program:
            moment()
            program.kill()
        self.source.release_all()

    def undisturbed(self) -> Content:
        """What one run over the source as it is now brings to a fresh store."""

        return asyncio.run(self.once())

    async def once(self) -> Content:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in self.folder.glob("*.csv"):
                (folder / file.name).write_bytes(file.read_bytes())
            async with opened(folder) as world:
                run = await world.run(await world.ingest("records", **self.block))
                assert run.status == "success", run
            return content(folder)


@cache
def idle() -> tuple[standins.OpenAI, standins.Keboola]:
    """Upstreams that no ingest asks; their threads end with the process."""
    return standins.OpenAI().start(), standins.Keboola().start()


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[World]:
    """A world in a folder, as a program that is started there has it."""
    world, close = await make_world(folder, *idle(), {})
    try:
        yield world
    finally:
        await close()


Act = Callable[[Site], None]


def change(changed: Change) -> Act:
    return lambda site: site.write(changed(site.rows))


kill, kill_service = Site.kill_run, Site.kill_service
CHANGES = [change(changed) for changed in (appended, edited, shortened, replaced)]
random.Random(SEED).shuffle(CHANGES)
STORIES: dict[str, tuple[standins.Style | None, int, Sequence[Act]]] = {
    "a file": (None, 10_000, [kill, kill_service]),
    "a file that changes": (None, 6000, [act for c in CHANGES for act in (kill, c)]),
    "pages": ("page", 300, [kill_service, change(edited), kill, change(shortened)]),
    "a cursor": ("cursor", 300, [kill, change(replaced)]),
}


def tell(folder: Path, name: str, seed: int) -> None:
    """Kill, change, kill; then run to the end and compare."""
    style, count, acts = STORIES[name]
    folder.mkdir()
    with standins.Source() as source:
        source.etags = True
        source.page_size = 20
        source.style = style or "plain"
        site = Site(folder, source, style, jitter=random.Random(seed))
        site.begin_with(made_rows(count))
        before = [site.undisturbed()]
        for act in acts:
            act(site)
            before += [] if act in (kill, kill_service) else [site.undisturbed()]
        site.run()
        as_undisturbed(content(folder), before.pop(), *before)
        *killed, last = [status for status, _ in runs(folder)]
        assert last == "success" and "interrupted" in killed
        assert {*killed} <= {"interrupted", "success"}  # a kill may come a moment late
        total = sums_are_right(folder)
        if name == "a file":  # nothing is read twice, and nothing is passed over
            assert total["processed"] == count + 1


@pytest.fixture(scope="module")
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[None]]]:
    """Every story whose test was selected, begun; the result raises what went wrong in it."""
    chosen = [
        item.callspec.params.get("name")
        for item in request.session.items
        if hasattr(item, "callspec") and item.path == request.path
    ]
    folder = tmp_path_factory.mktemp("stories")
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(tell, folder / n, n, SEED) for n in STORIES if n in chosen}


@pytest.mark.parametrize("name", STORIES)
def test_killed_anywhere_and_run_again(told: Mapping[str, Future[None]], name: str) -> None:
    """kill -9 at random moments, the source changed in between: every row is there once, as an
    undisturbed run has it, the killed runs are `interrupted`, and the counts add up."""
    try:
        told[name].result()
    except BaseException as error:
        error.add_note(f"with SEED = {SEED}")
        raise


# --- Cut anywhere, in process ---------------------------------------------------------------------


class Cut(NamedTuple):
    """Where a run is cut: at which look at the clock (first at its begin, then one a chunk, last at
    its end), and whether the service stops then or the task is cancelled and the program ends."""

    look: int
    how: Literal["stop", "cancel"]


class Edit(NamedTuple):
    """A change of the source; `place` counts from the top, or from the end where it is negative."""

    what: Literal["add", "insert", "edit", "remove"]
    place: int


async def cut_run(world: World, job_id: int, cut: Cut) -> None:
    """A run that is cut, or comes to its end if it does not look at the clock so often."""
    looks, task = itertools.count(1), asyncio.create_task(world.steps.step(job_id))

    def clock() -> float:
        if next(looks) == cut.look:
            world.steps.stopping = cut.how == "stop"
            _ = cut.how == "cancel" and task.cancel()
        return world.clock.now

    world.steps.clock = clock
    with contextlib.suppress(asyncio.CancelledError):
        await task
    world.steps.stopping = False


def changed(rows: Rows, edit: Edit, number: int) -> Rows:
    """The rows after their `number`-th change, which takes place some time after the one before."""
    rows, place = rows.copy(), edit.place % max(len(rows), 1)
    fresh = {"id": f"new{number}", "title": "-", "updated": EPOCH + 1000 * number}
    if edit.what == "edit" and rows:
        rows[place] = rows[place] | {"title": f"edit {number}", "updated": fresh["updated"]}
    elif edit.what == "remove":
        del rows[place : place + 2]
    else:
        rows.insert(place if edit.what == "insert" else len(rows), fresh)
    return rows


EPOCH = 1_700_000_000
CUTS = st.builds(Cut, st.integers(1, 8), st.sampled_from(["stop", "cancel"]))
EDITS = st.builds(
    Edit, st.sampled_from(["add", "insert", "edit", "edit", "remove"]), st.integers(-4, 30)
)
ACTS = st.lists(st.tuples(CUTS, st.lists(EDITS, max_size=2)), min_size=1, max_size=3)
Acts = list[tuple[Cut, list[Edit]]]


async def cut_and_compare(site: Site, acts: Acts) -> None:
    """Runs that are cut, with changes between them, and one to the end: as undisturbed."""
    before, numbers = [await site.once()], itertools.count(1)
    async with opened(site.folder) as world:
        job_id = await world.ingest("records", **site.block)
    for cut, edits in acts:
        async with opened(site.folder) as world:
            await cut_run(world, job_id, cut)
        for edit in edits:
            site.write(changed(site.rows, edit, next(numbers)))
        before += [await site.once()] if edits else []
    async with opened(site.folder) as world:
        last = await world.run(job_id)
    assert last.status == "success", last
    as_undisturbed(content(site.folder), before.pop(), *before)
    assert {status for status, _ in runs(site.folder)} <= {"interrupted", "success"}
    sums_are_right(site.folder)


@pytest.fixture(scope="module")
def server() -> Iterator[standins.Source]:
    with standins.Source() as source:
        yield source


@settings(max_examples=12, deadline=None)
@given(
    style=st.sampled_from(["link", "cursor", "page", "offset"]),
    count=st.integers(0, 23),
    etags=st.booleans(),
    since=st.booleans(),
    acts=ACTS,
)
def test_an_api_cut_anywhere(
    server: standins.Source, style: standins.Style, count: int, etags: bool, since: bool, acts: Acts
) -> None:
    """Whatever the paging, wherever runs are cut and whatever changes in between: the records are
    those of an undisturbed run, and `since` passes over none of them."""
    server.style, server.etags, server.page_size = style, etags, 5
    server.since_field = "updated"
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), server, style, since=since)
        newest_first = [{"id": n, "title": "-", "updated": EPOCH - 1000 * n} for n in range(count)]
        site.write(newest_first)
        asyncio.run(cut_and_compare(site, acts))


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_long_page_cut_within(
    tmp_path: Path, server: standins.Source, how: Literal["stop", "cancel"]
) -> None:
    """A page of several chunks has an ETag: it is not taken for read before its last chunk is."""
    server.style, server.etags, server.since_field = "plain", True, None
    site = Site(tmp_path, server, "plain")
    site.write([{"id": n, "title": f"title {n}"} for n in range(4500)])
    async with opened(tmp_path) as world:
        job_id = await world.ingest("records", **site.block)
        await cut_run(world, job_id, Cut(3, how))
        assert 0 < len(await world.records()) < 4500
        await world.run(job_id)
    as_undisturbed(content(tmp_path), await site.once())


@settings(max_examples=8, deadline=None)
@given(count=st.sampled_from([2, 9, 20, 6300]), acts=ACTS)
def test_files_cut_anywhere(server: standins.Source, count: int, acts: Acts) -> None:
    """Three files under one glob, of one chunk or of two: cut within or between them, edited,
    shortened, added to, they bring the records of an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), server, None, files=3)
        site.write(made_rows(count))
        asyncio.run(cut_and_compare(site, acts))


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("again", ["1,a\n2,a\n", "1,b\n"])
async def test_a_file_that_may_win_is_read_after_a_cut(tmp_path: Path, at: int, again: str) -> None:
    """The first file changes a record that the last one has, too, and the run is cut behind it."""
    (tmp_path / "f1.csv").write_text("id,title\n1,first\n2,first\n")
    (tmp_path / "f2.csv").write_text("id,title\n1,last\n")
    async with opened(tmp_path) as world:
        job_id = await world.ingest(type="csv", path="f?.csv")
        await world.run(job_id)
        (tmp_path / "f1.csv").write_text(f"id,title\n{again}")
        await cut_run(world, job_id, Cut(at, "stop"))
        await world.run(job_id)
        assert (await world.records())["1"]["title"] == "last"


def edited_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-len(b"title 4199,-\n"), os.SEEK_END)
        file.write(b"TITLE")


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"late,of late,-\n")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def renamed_over(path: Path) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(as_csv(made_rows(20) + made_rows(2500, 700_000)))
    fresh.replace(path)


def written_anew(path: Path) -> None:
    path.write_bytes(as_csv(made_rows(20) + made_rows(2500, 700_000)))


@pytest.mark.parametrize(
    "act", [edited_in_place, grown, cut_short, renamed_over, written_anew], ids=lambda a: a.__name__
)
async def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, server: standins.Source, act: Callable[[Path], None]
) -> None:
    """Between the first chunk and the second; what that run could not see, the next one does."""
    site = Site(tmp_path, server, None)
    site.write(made_rows(4200))
    before = await site.once()
    async with opened(tmp_path) as world:
        job_id = await world.ingest("records", **site.block)
        looks = itertools.count(1)

        def clock() -> float:
            if next(looks) == 2:
                act(tmp_path / "records0.csv")
            return world.clock.now

        world.steps.clock = clock
        await world.run(job_id)
        await world.run(job_id)
    as_undisturbed(content(tmp_path), await site.once(), before)
