"""What the database does to us, on both engines: locks, lost connections, files that vanish, disks
that are full, clocks that are set, rows that nobody can read any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import postgres
import pytest
import standins
from conftest import Holder, Place, World, execute, make_world
from test_store import checked, fired, get, job_in, made, spec

import teckochecker as tecko

# ── Opening ───────────────────────────────────────────────────────────────────────────────────


def test_an_opening_can_be_cut_off_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread is left behind that reports to an event loop which has been closed."""
    said = list[Any]()
    monkeypatch.setattr(threading, "excepthook", lambda error: said.append(error.exc_value))

    async def cut_off(turns: int) -> None:
        opening = asyncio.ensure_future(tecko.Store(tmp_path / f"{turns}.db").__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await opening).close()

    before = {*threading.enumerate()}
    for turns in range(120):
        asyncio.run(cut_off(turns))
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
    assert said == []


# ── Locks ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_end_waits_for_no_lock(store: tecko.Store, path: Place) -> None:
    """Once told to close soon, what waits for another process's lock gives up, however much it is,
    and nothing new is begun; the store closes while the lock is still held."""
    jobs = [await made(store, f"job-{n}", batch_ids=["batch_5"]) for n in range(20)]
    assert await checked(store, jobs[0])  # which is still to be written down
    with Holder(path):
        waiting = [asyncio.ensure_future(store.pause_job(job.id, 2.0)) for job in jobs]
        await asyncio.sleep(0)
        store.close_soon(0.2)
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in done} == {tecko.StoreError}
        with pytest.raises(tecko.StoreError, match="the program is ending"):
            await made(store, "late")
        await store.close()


async def test_a_cut_off_caller_leaves_no_traceback(
    store: tecko.Store, path: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Its transaction fails later, when nobody is left to be told."""
    job = await made(store)
    store.patience = 0.1
    with Holder(path):
        caller = asyncio.ensure_future(store.pause_job(job.id, 2.0))
        await asyncio.sleep(0)
        caller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await caller
        async with store._lock:
            pass
    del caller
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text


async def test_the_wait_for_a_lock_counts_once(store: tecko.Store, path: Place) -> None:
    """Of many transactions that meet the same foreign lock, only the first waits out its patience;
    and all work again once the lock is gone."""
    jobs = [await made(store, f"job-{n}") for n in range(5)]
    store.patience = 0.3
    with Holder(path) as other:
        waits = [store.pause_job(job.id, 2.0) for job in jobs]
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(end) for end in done} == {tecko.StoreError}
        blocked = store._blocked_since
        assert blocked is not None
        other.release()
    await asyncio.gather(*(store.pause_job(job.id, 2.0) for job in jobs))
    assert {job.status for job in await store.jobs()} == {"paused"}


async def test_a_secret_is_sealed_with_the_lock_held(store: tecko.Store, path: Place) -> None:
    """A rotation that comes while a new secret waits for the lock is seen by its sealing, and no
    key is dropped that a row still needs."""
    keys = ["old"]
    with Holder(path):
        added = [
            asyncio.ensure_future(
                store.add_secret(name, "openai", lambda: (b"sealed", keys[0]), 1.0)
            )
            for name in "ab"
        ]
        await asyncio.sleep(0.05)
        keys.insert(0, "new")
    await asyncio.gather(*added)
    needed: list[set[str]] = []
    await store.change_keys(lambda ids: needed.append({*ids}))
    assert needed == [{"new"}]


async def test_rotations_and_new_secrets_at_once(tmp_path: Path, path: Place) -> None:
    """Three processes' worth of rotations, and secrets that are added meanwhile: every one of them
    opens in the end, and a last rotation leaves one key."""
    (tmp_path / "teckochecker.key").write_text(tecko.new_master_key())
    config = tecko.load_config(tmp_path / "jobs.yaml", {})
    async with contextlib.AsyncExitStack() as stack:
        operations_of_each = []
        for _ in range(3):
            store = await stack.enter_async_context(tecko.Store(path))
            operations_of_each.append(
                tecko.Operations(store, tecko.Vault(config.settings), lambda: config)
            )

        async def add(operations: tecko.Operations, number: int) -> None:
            for n in range(4):
                name = f"secret-{number}-{n}"
                value = f"value-of-{name}"
                await operations.add_secret(tecko.SecretBody(name=name, type="api", value=value))

        await add(operations_of_each[0], 3)  # a rotation that would seal nothing is refused
        both = [add(operations, n) for n, operations in enumerate(operations_of_each)]
        await asyncio.gather(*both, *(operations.rotate() for operations in operations_of_each * 2))
        await operations_of_each[0].rotate()
        assert len((tmp_path / "teckochecker.key").read_text().split()) == 1
        fresh, rows = tecko.Vault(config.settings), await operations_of_each[0].store.secrets()
        opened = {fresh.open(row).reveal() for row in rows}
    assert opened == {f"value-of-secret-{n}-{m}" for n in range(4) for m in range(4)}


# ── Files ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.sqlite
@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_file_that_is_gone_takes_no_more_writes(
    store: tecko.Store, path: Path, how: str
) -> None:
    """What was written to it would be lost at the next start, and a trigger would fire twice; it is
    said, and all goes on when the file is back."""
    job, kept = await made(store), path.with_name("kept.db")
    assert store.file_problem() is None
    os.rename(path, kept)
    if how == "replaced":
        os.mknod(path)
    assert how in str(store.file_problem())
    with pytest.raises(tecko.StoreError, match=how):
        await checked(store, job, "fire")
    assert await store.triggers(job.id) == []
    os.rename(kept, path)
    assert store.file_problem() is None and await checked(store, job, "fire")


@pytest.mark.sqlite
@pytest.mark.parametrize("pragma", ["max_page_count = 1", "query_only = ON"])
async def test_a_disk_that_takes_nothing(store: tecko.Store, path: Path, pragma: str) -> None:
    """Full, or read-only: nothing of a transaction is written, the problem is told until something
    could be written again, and then all goes on."""
    job = await made(store)
    assert isinstance(store._writer, tecko.Sqlite)
    await store._writer.run(f"PRAGMA {pragma}")
    before = execute(path, "SELECT count(*) FROM polling_logs")
    for n in range(200):
        with contextlib.suppress(tecko.StoreError):
            await made(store, f"job-{n}-" + "x" * 200)
        if problem := store.file_problem():
            break
    assert "full" in str(problem) or "readonly" in str(problem)
    await store._writer.run("PRAGMA max_page_count = 100000")
    await store._writer.run("PRAGMA query_only = OFF")
    await store.pause_job(job.id, 2.0)
    assert store.file_problem() is None
    assert execute(path, "SELECT count(*) FROM polling_logs") > before


@pytest.mark.sqlite
async def test_names_of_one_file(path: Path) -> None:
    """A second hard link is refused, since each name would have a log of its own; through a
    symbolic link it is the same file."""
    await tecko.Store(path).touch()
    link, hard = path.with_name("link.db"), path.with_name("hard.db")
    link.symlink_to(path)
    async with tecko.Store(path) as first, tecko.Store(link) as second:
        await made(first)
        assert [job.name for job in await second.jobs()] == ["job"]
    os.link(path, hard)
    for name in (path, link, hard):
        with pytest.raises(tecko.StoreError, match="2 names"):
            await tecko.Store(name).touch()


@pytest.mark.sqlite
async def test_the_log_is_cut_after_a_long_reader(store: tecko.Store, path: Path) -> None:
    """What a reader kept from being written back makes the log long, but not for ever."""
    log = path.with_name(path.name + "-wal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM polling_logs").fetchone()
        while log.stat().st_size <= tecko.WAL_BYTES:
            seal = lambda: (bytes(1 << 21), "k")  # noqa: E731
            await store.add_secret("large", "openai", seal, 1.0)
            await store.delete_secret("large", 1.0)
        reader.execute("ROLLBACK")
    for n in range(3):
        await made(store, f"job-{n}")
    assert log.stat().st_size <= tecko.WAL_BYTES


@pytest.mark.sqlite
async def test_an_old_sqlite_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and with what is needed, instead of at the first statement that it does not know."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 28, 0))
    with pytest.raises(tecko.StoreError, match=r"too old; needed: 3\.35"):
        await tecko.Store(path).touch()
    assert os.listdir(path.parent) == []


# ── Clocks ────────────────────────────────────────────────────────────────────────────────────


EVENTS: tuple[tecko.Event, ...] = ("claim", "lose")


async def live(store: tecko.Store, now: float) -> tuple[tecko.Job, tecko.Trigger]:
    """A checked job whose trigger is searched for, and one that is only checked."""
    job = await made(store, "fired")
    assert await checked(store, job, "fire", now=now)
    [trigger] = await store.triggers(job.id)
    for event in EVENTS:
        moved = await store.move_trigger(trigger, event, "", now)
        assert moved is not None
        trigger = moved
    assert await checked(store, await made(store, "checked", batch_ids=["batch_1"]), now=now)
    return await store.find_job("checked"), trigger


@pytest.mark.parametrize("step", [-3600.0, 86400.0, 3.0])
async def test_a_clock_that_is_set_takes_the_times_along(store: tecko.Store, step: float) -> None:
    """Every time that is compared with the clock keeps its distance from now; so nothing lies in
    the future, and no window ends early or late."""
    now = 1e9
    before, sent = await live(store, now)
    quiet = await made(store, "quiet", batch_ids=["batch_5"])
    assert await checked(store, quiet, now=now)
    await store.shift_times(step, now + step)
    job, [trigger] = await store.find_job("checked"), await store.open_triggers(sent.job_id)
    assert job.last_check_at == job.last_ok_at == now + step == trigger.unknown_at
    assert job.next_check_at == now + step + 60 and trigger.sent_at == now + step
    assert (await store.find_job(job.id)).batches[0].changed_at == 7.0 + step
    assert (await store.find_job("quiet")).next_check_at == now + step + 60
    assert trigger.created_at == sent.created_at and job.created_at == before.created_at


async def test_times_of_a_clock_that_was_ahead(store: tecko.Store) -> None:
    """At the start, whatever happened later than now happened now; what did not stays."""
    job, trigger = await live(store, 1e9)
    await store.clamp_times(1e9 + 1)
    assert await get(store, job.id) == job
    assert await store.open_triggers(trigger.job_id) == [trigger]
    await store.clamp_times(1e8)
    [after], seen = await store.open_triggers(trigger.job_id), await get(store, job.id)
    assert after.unknown_at == after.sent_at == seen.last_check_at == seen.last_ok_at == 1e8
    assert seen.next_check_at == 1e8
    assert (await store.find_job(job.id)).batches[0].changed_at == 7.0


# ── Rows ──────────────────────────────────────────────────────────────────────────────────────


DAMAGE = ["", "null", "[]", '{"name": "x"}', '{"name": 5, "ingest": {}}', "{", "\ud7ff"]


@pytest.mark.parametrize("text", DAMAGE)
async def test_a_row_that_cannot_be_read_is_its_own_error(
    store: tecko.Store, path: Place, text: str
) -> None:
    """The list has all jobs, this one with its reason; it can be paused, deleted, or given a new
    definition from jobs.yaml, and the others change as ever."""
    await store.sync_file_jobs([spec("bad"), spec("good", batch_ids=["batch_7"])], 1.0)
    execute(path, "UPDATE polling_jobs SET spec = ? WHERE name = 'bad'", text)
    bad, good = await store.jobs()
    assert "is damaged" in str(bad.damage) and good.damage is None
    with pytest.raises(tecko.TeckoError, match="'bad'"):
        _ = bad.spec
    await store.pause_job(bad.id, 2.0)
    both = [spec("bad"), spec("good", batch_ids=["batch_7"], poll_interval=600)]
    assert await store.sync_file_jobs(both, 3.0) == {"changed": 2}
    mended = await get(store, bad.id)
    assert mended.damage is None and (mended.round, mended.status) == (1, "paused")
    execute(path, "UPDATE polling_jobs SET spec = ? WHERE name = 'bad'", text)
    await store.sync_file_jobs([], 4.0)
    await store.delete_job(bad.id, 5.0)
    assert [job.name for job in await store.jobs()] == ["good"]


async def test_a_job_that_cannot_be_read_is_shown(world: World) -> None:
    """In the list with its reason, which a step of it says as well."""
    bad, good = await world.job("bad"), await world.job("good", batch_ids=["batch_2"])
    execute(world.store.place, "UPDATE polling_jobs SET spec = '{}' WHERE id = ?", bad)
    operations = tecko.Operations(world.store, world.vault, lambda: world.config, world.clock)
    listed = await operations.jobs(None, 10, 0)
    assert [job.id for job in listed.jobs] == [bad, good]
    assert "is damaged" in str(listed.jobs[0].last_error) and not listed.jobs[1].last_error
    assert (await operations.job("bad")).batches[0].batch_id == "batch_1"
    assert "is damaged" in (await world.steps.step(bad)).said
    assert "done" in (await world.steps.step(good)).said or world.openai.requests


@pytest.mark.parametrize("number", [2**63, 10**30])
async def test_numbers_without_an_end(store: tecko.Store, number: int) -> None:
    """A limit or an id of any size is one, and finds what there is."""
    job = await made(store)
    assert await store.jobs(None, number) == [job] and len(await store.logs(None, number)) == 1
    assert await store.runs(None, number) == await store.rejects(None, number) == []
    assert await store.data(None, number, 0, 0) == await store.data(None, 1, number, number) == []
    for ref in (str(number), "9" * 5000, "²", "٣"):
        with pytest.raises(tecko.NotFound):
            await store.find_job(ref)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=["NUL", "surrogate"])
async def test_texts_that_a_database_does_not_take(store: tecko.Store, text: str) -> None:
    """A NUL or half a surrogate in what comes from outside costs no check and no question; a
    question mark stands for it."""
    job = await made(store)
    assert await checked(store, job, error=text, errors=[tecko.OpenAIError("no")])
    assert (await get(store, job.id)).last_error == "a?b"
    await store.log_event("updated", text, 1.0)
    assert await store.jobs(search=text) == []
    with pytest.raises(tecko.NotFound):
        await store.find_job(text)


async def test_auto_is_not_overdue_before_its_first_check(store: tecko.Store) -> None:
    """A job whose interval its first check decides has a usual one until then, and owes a check
    only after three of those; a decided one counts from then on."""
    job = await made(store, poll_interval="auto")
    assert await store.overdue(2.0 + 3 * tecko.AUTO_PACE - 2, 0.0) == []
    assert await store.overdue(2.0 + 3 * tecko.AUTO_PACE, 0.0) == ["job"]
    assert await checked(store, job, now=10.0, pace=30.0)
    await store.update_job(job.id, lambda _: spec(poll_interval="auto", variables={"a": "b"}), 11.0)
    assert (await get(store, job.id)).pace == 30.0


async def test_what_is_kept_is_counted_in_rows(store: tecko.Store, path: Place) -> None:
    """Numbers that were used up and never seen do not count: the newest rows stay, and those that
    are young enough."""
    for n in range(61):
        sql = "INSERT INTO polling_logs (id, status, message, created_at) VALUES (?, 'x', '', ?)"
        execute(path, sql, 10 * n + 1, float(n))
    await store.prune(-1.0, 100)
    assert len(await store.logs(None, 999)) == 61
    await store.prune(5.0, 40)
    assert [row.created_at for row in await store.logs(None, 999)] == [*map(float, range(21, 61))]
    await store.prune(30.0, 40)
    assert len(await store.logs(None, 999)) == 31


async def test_what_ended_is_pruned(store: tecko.Store) -> None:
    """Ended jobs of the command line and settled triggers of earlier rounds go by age and number; a
    job of jobs.yaml, and what is open, held or paused, never."""
    for status in tecko.JOB_STEPS:
        await job_in(store, status, status)
    held = await made(store, "held", batch_ids=["batch_1", "batch_9"])
    await fired(store, held, "claim", "lose", "hold")
    await store.sync_file_jobs([spec("file", batch_ids=["batch_1", "batch_8"])], 1.0)
    kept = await store.find_job("file")
    await fired(store, kept, "claim", "accept", "succeed")
    await store.sync_file_jobs([spec("file", batch_ids=["batch_1", "batch_7"])], 2.0)
    await fired(store, await get(store, kept.id), "claim", "accept", "succeed")
    await store.prune(8.0, 2)
    assert sum(job.status in tecko.ENDED for job in await store.jobs()) == 4
    await store.prune(1e9, 10**9)
    left = {job.name for job in await store.jobs()}
    assert left == {"active", "paused", "triggering", "triggered", "held", "file"}
    assert [trigger.round for trigger in await store.triggers(kept.id)] == [2]


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.logs(1, 20),
        lambda store: store.schedule(),
        lambda store: store.jobs_among([1, 2]),
        lambda store: store.fired("aim"),
    ],
)
async def test_what_is_asked_often_is_found_by_index(
    store: tecko.Store, path: Path, ask: Callable[[tecko.Store], Awaitable[object]]
) -> None:
    """However many log rows, and jobs that have ended, there are."""
    assert isinstance(store._reader, tecko.Sqlite) and store._reader._db is not None
    seen: list[str] = []
    await store._reader._db.set_trace_callback(seen.append)
    await ask(store)
    await store._reader._db.set_trace_callback(None)  # type: ignore[arg-type]
    plan = [row[3] for sql in seen for row in execute(path, f"EXPLAIN QUERY PLAN {sql}")]
    assert plan and not [line for line in plan if line.startswith("SCAN") and "INDEX" not in line]


# ── Records ───────────────────────────────────────────────────────────────────────────────────


def chunk(rows: dict[str, str], bad: tuple[str, ...] = (), inserted: int = 0) -> tecko.Chunk:
    good = {key: text for key, text in rows.items() if key not in bad}
    return tecko.Chunk(
        tecko.Fetched("line", [], [], None, "file", {"at": len(rows)}, 0.5),
        raws=[(key, text, key not in bad) for key, text in rows.items()],
        unified=[(k, json.dumps({"v": v}), tecko.digest_of(v)) for k, v in good.items()],
        rejects=[tecko.Rejected(f"line {key}", "why", rows[key]) for key in bad],
        counts=Counter(processed=len(rows), inserted=inserted, failed=len(bad)),
    )


async def test_records_are_written_in_chunks(store: tecko.Store) -> None:
    """New ones come in order, those that differ change, what is bad is kept apart; in one
    transaction with how far the source was read, on either engine."""
    ingest = tecko.parse(
        tecko.IngestSpec,
        {"name": "s", "poll_interval": 60, "ingest": {"type": "csv", "path": "a.csv", "id": "i"}},
    )
    job = await get(store, await store.create_job(ingest, "store", 1.0))
    run = await store.begin_run(job, 2.0)
    many = {f"k{n}": f"tab\t, ěšč, {n}" for n in range(1200)} | {"k2": "back\\slash \\N"}
    assert await store.save_chunk(run, 1, "csv", chunk(many, inserted=1200), {"v": "text"}, 3.0)
    again = {"k1": "other", "k0": many["k0"], "new": "n", "bad": "b"}
    assert await store.save_chunk(run, 1, "csv", chunk(again, ("bad",), 1), {}, 4.0)
    rows = await store.data("s", 2000, 0, 0)
    said = [json.loads(row["data"])["v"] for row in rows]
    assert said[:3] == [many["k0"], "other", many["k2"]] and said[-1] == "n"
    assert len(rows) == 1201 and rows[1]["updated_at"] == 4.0 and rows[2]["updated_at"] == 3.0
    assert (await store.hashes(run, ["k1", "nope"])) == {"k1": (tecko.digest_of("other"), True)}
    assert (await store.totals("s"))["records"] == 1201 and len(await store.rejects("s", 9)) == 1
    ended = await store.end_run(run, tecko.RunEnd("success", None, [], 60.0), 5.0)
    assert (ended.status, ended.progress, ended.records_failed) == ("success", 1.0, 1)
    read = await store.checkpoint("s")
    assert read.parts == {"file": {"at": 4}} and read.whole
    await store.delete_job(job.id, 6.0)
    assert await store.data(None, 9, 0, 0) == [] and (await store.totals())["records"] == 0


async def test_files_that_vanished_are_forgotten(world: World) -> None:
    """What tells how far a file was read goes with it, and not before: a run that failed knows
    nothing of what there is."""
    folder = world.config.base
    for name in "ab":
        (folder / f"{name}.csv").write_text("i,title\n1,x\n")
    job_id = await world.ingest(type="csv", path="*.csv", id="i", fields={"title": "title"})
    await world.run(job_id)
    assert (await world.store.checkpoint("source")).parts.keys() == {"a.csv", "b.csv"}
    (folder / "a.csv").unlink()
    await world.run(job_id)
    assert (await world.store.checkpoint("source")).parts.keys() == {"b.csv"}
    (folder / "b.csv").unlink()
    await world.run(job_id)
    assert (await world.store.checkpoint("source")).parts.keys() == {"b.csv"}


# ── PostgreSQL alone ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def url(server: postgres.Server) -> str:
    return server.schema()


def cut_off(server: postgres.Server, schema: str) -> int:
    """End all connections to a schema, as a failing network would; how many."""
    rows = execute(
        server.url(),
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = 'postgres'",
    )
    return len(rows)


async def test_a_lost_connection_is_opened_again(server: postgres.Server, url: str) -> None:
    """Reads and transactions that find it gone do what they were asked; twice in a row as well."""
    async with tecko.Store(url) as store:
        job = await made(store)
        for n in range(2):
            assert cut_off(server, url) >= 2
            assert [j.id for j in await asyncio.gather(*(get(store, job.id) for _ in "abc"))]
            assert await store.data_version() >= 0
            await (store.resume_job if n else store.pause_job)(job.id, 2.0)
        assert (await get(store, job.id)).status == "active"


async def test_a_reader_that_gives_up(url: str) -> None:
    """Cancelled in the middle of a read: the others, and those after it, are answered."""
    async with tecko.Store(url) as store:
        job = await made(store)
        for turns in range(12):
            reading = [asyncio.ensure_future(get(store, job.id)) for _ in "abc"]
            for _ in range(turns):
                await asyncio.sleep(0)
            reading[1].cancel()
            done = await asyncio.gather(*reading, return_exceptions=True)
            assert done[0] == done[2] == job
        await store.pause_job(job.id, 2.0)


async def test_a_writer_that_gives_up(url: str) -> None:
    """Cancelled wherever it is: its transaction is whole, and the next one works."""
    async with tecko.Store(url) as store:
        for turns in range(0, 60, 4):
            name = f"job-{turns}"
            writing = asyncio.ensure_future(store.create_job(spec(name), "store", 1.0))
            for _ in range(turns):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await made(store, f"{name}-after")
            known = {job.name: job.id for job in await store.jobs()}
            assert name not in known or len((await store.find_job(known[name])).batches) == 2


async def test_a_transaction_that_lost_its_connection(server: postgres.Server, url: str) -> None:
    """It is a StoreError and nothing of it is there; the next one works."""
    async with tecko.Store(url) as store:

        async def half() -> None:
            await store.create_job(spec("half"), "store", 1.0)
            cut_off(server, url)
            await store.create_job(spec("other"), "store", 1.0)

        with pytest.raises(tecko.StoreError):
            await store.transact(half)
        assert await store.jobs() == []
        await made(store, "half")


async def test_another_node_s_writing_is_noticed(url: str) -> None:
    """data_version moves with what others commit, and not with our own."""
    async with tecko.Store(url) as store, tecko.Store(url) as other:
        await store.hold_exclusively()
        first = await store.data_version()
        job = await made(store)
        assert await store.data_version() == first
        await other.pause_job(job.id, 2.0)
        assert await store.data_version() != first


async def test_one_node_works_and_one_waits(server: postgres.Server, url: str) -> None:
    """The second takes over when the first one's connection is gone; the first one writes no more,
    says why, and works again only once the second has gone."""
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(tecko.Store(url))
        await first.hold_exclusively()
        second = await stack.enter_async_context(tecko.Store(url))
        waiting = asyncio.ensure_future(second.hold_exclusively())
        await made(first, "before")
        await asyncio.sleep(0.05)
        assert not waiting.done() and not first.superseded
        assert first._writer is not None
        await first._writer._db.close()  # type: ignore[union-attr]
        await asyncio.wait_for(waiting, 30)
        with pytest.raises(tecko.StoreError, match="another TeckoChecker"):
            await made(first, "after")
        assert first.superseded and not second.superseded
        await made(second, "mine")
        await second.close()
        await made(first, "again")
        assert not first.superseded


async def test_a_server_that_crashes_while_jobs_fire(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Killed and restarted again and again between and within steps: each job fires once, and none
    is lost."""
    server = postgres.Server()
    server.start()
    try:
        world, close = await make_world(tmp_path, openai, keboola, {}, server.schema())
        openai.key(standins.OPENAI_KEY)
        await world.secret("openai", "openai", standins.OPENAI_KEY)
        await world.secret("keboola", "keboola", standins.KEBOOLA_TOKEN)
        ids = []
        for n in range(8):
            openai.batch(f"batch_{n}", "completed", total=1, completed=1)
            ids.append(await world.job(f"job-{n}", batch_ids=[f"batch_{n}"]))
        await asyncio.gather(crashes(server), *(until_fired(world, job_id) for job_id in ids))
        ran = [keboola.variables(job)["teckochecker_job"] for job in keboola.created]
        assert sorted(ran) == [f"job-{n}" for n in range(8)]
        await close()
    finally:
        server.stop()


async def crashes(server: postgres.Server) -> None:
    for wait in (0.01, 0.05, 0.02):
        await asyncio.sleep(wait)
        await asyncio.to_thread(server.crash)
        await asyncio.to_thread(server.start)


async def until_fired(world: World, job_id: int) -> None:
    """Steps, whatever the store says, until Keboola has the job."""
    for _ in range(200):
        try:
            stepped = await world.steps.step(job_id)
            if (await world.get(job_id)).status in ("triggered", "completed"):
                return
        except tecko.StoreError:
            await asyncio.sleep(0.05)
        else:
            world.clock.turn(min(stepped.wait or 0.0, 40.0))
    raise AssertionError(f"job {job_id} has not fired")


@pytest.mark.sqlite
def test_a_failed_open_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot be opened is one StoreError, without a thread's traceback later."""
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "x.db"))  # which nobody can open as a file
        for _ in range(200):
            with pytest.raises(tecko.StoreError, match="unable to open"):
                asyncio.run(tecko.Store(tmp_path / "x.db").touch())
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    assert not failed
