"""The store: schema, transactions that survive cancellation and locks, and compare-and-set."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, TABLES, Holder, Place, clean_environment, dump, execute, flat_job
from hypothesis import given, settings
from hypothesis import strategies as st

import teckochecker as tecko

STATUSES: list[str] = list(tecko.JOB_STEPS)
OPEN = ("triggering", "triggered")


def spec(name: str = "job", **flat: Any) -> tecko.JobSpec:
    given = {"openai_secret": "o", "keboola_secret": "k", "keboola_configuration_id": "1"} | flat
    return tecko.FlatJob.model_validate(flat_job(name=name, **given)).to_spec()


async def get(store: tecko.Store, job_id: int) -> tecko.Job:
    job = await store.job(job_id)
    assert job is not None
    return job


async def made(store: tecko.Store, name: str = "job", **flat: Any) -> tecko.Job:
    return await get(store, await store.create_job(spec(name, **flat), "store", 1.0))


async def checked(
    store: tecko.Store,
    job: tecko.Job,
    event: tecko.Event | None = None,
    *,
    partial: bool = False,
    **told: Any,
) -> bool:
    """Record a check of `job` as it was read, which saw batch_1 done and decided `event`."""
    known = [batch for row in await store.jobs_among([job.id]) for batch in row.batches]
    job = replace(job, batches=known)
    seen = tecko.BatchSeen("batch_1", "completed", requests_total=1, requests_completed=1)
    batches = [
        tecko.batch_after_answer(b, seen, 7.0) if b.batch_id == "batch_1" else b for b in known
    ]
    verdict = tecko.Verdict(event, "why" if event == "give_up" else "", partial)
    trigger = tecko.new_trigger(job, batches, verdict, uuid.uuid4().hex, 7.0)
    facts: dict[str, Any] = {
        "error": verdict.reason or None,
        "errors": [],
        "wait": 60.0,
        "now": 7.0,
    } | told
    fired = replace(trigger, on_ambiguous="hold") if event == "fire" else None
    check = tecko.CheckResult(job, batches, verdict, fired, **facts)
    return job.id in await store.record_checks([check])


async def moved(store: tecko.Store, job: tecko.Job, *events: tecko.Event) -> tecko.Trigger:
    """Move the job's last trigger on."""
    trigger = (await store.triggers(job.id))[-1]
    for event in events:
        after = await store.move_trigger(trigger, event, f"did {event}", 8.0)
        assert after is not None
        trigger = after
    return trigger


async def fired(store: tecko.Store, job: tecko.Job, *events: tecko.Event) -> tecko.Trigger:
    assert await checked(store, job, "fire")
    return await moved(store, job, *events)


async def job_in(store: tecko.Store, status: str, name: str = "job") -> tecko.Job:
    """A job that has come to `status` by the steps that lead there."""
    job = await made(store, name)
    if status == "paused":
        await store.pause_job(job.id, 2.0)
    if status == "failed":
        assert await checked(store, job, "give_up")
    if status.startswith(("trigger", "completed")):
        assert await checked(store, job, "fire", partial=status == "completed_with_failures")
    if status.startswith(("triggered", "completed")):
        await moved(store, job, "claim", "accept")
    if status.startswith("completed"):
        await moved(store, job, "succeed")
    job = await get(store, job.id)
    assert job.status == status
    return job


async def ended(threads: int) -> None:
    """Wait until no more threads than these are left: a connection's would block the exit."""
    until = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < until, threading.enumerate()
        await asyncio.sleep(0.005)


# ── Opening ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.sqlite
@pytest.mark.parametrize("there", [False, True])
async def test_a_new_store_has_its_tables(path: Path, there: bool) -> None:
    """Out of nothing, or out of an empty file; a file that it makes is for its owner alone."""
    if there:
        os.mknod(path)
    async with tecko.Store(path) as store:
        assert await store.jobs() == [] and await store.secrets() == []
    assert execute(path, "SELECT version FROM schema_version") == [(1 + len(tecko.MIGRATIONS),)]
    assert there or stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_a_store_opens_again_as_it_was(path: Place) -> None:
    """Reopening migrates nothing and loses nothing, and `touch` leaves a store as it is."""
    async with tecko.Store(path) as store:
        job = await job_in(store, "triggered")
        trigger = (await store.triggers(job.id))[0]
    before = dump(path)
    await tecko.Store(path).touch()
    async with tecko.Store(path) as store:
        assert await get(store, job.id) == job and await store.triggers(job.id) == [trigger]
    assert dump(path) == before


COLUMNS = {
    "secrets": "id name type value created_at",
    "polling_jobs": "id name poll_interval_seconds status last_check_at next_check_at created_at"
    " completed_at",
    "polling_logs": "id job_id status message created_at",
}


async def test_tables_are_named_as_published(store: tecko.Store) -> None:
    """The data model that others read: its tables and columns have the names that were given."""
    for table, columns in COLUMNS.items():
        assert await store._sql(f"SELECT {', '.join(columns.split())} FROM {table}") == []


@pytest.mark.sqlite
async def test_what_the_connection_is_set_to(store: tecko.Store) -> None:
    """What is committed survives a power loss, readers do not wait, and references hold."""
    said = {}
    for name in ("synchronous", "journal_mode", "foreign_keys", "busy_timeout"):
        [[said[name]]] = await store.transact(partial(store._sql, f"PRAGMA {name}"))
    full = 2
    assert said == {
        "synchronous": full,
        "journal_mode": "wal",
        "foreign_keys": 1,
        "busy_timeout": 1000 * tecko.LOCK_TURN,
    }


@pytest.mark.parametrize("read_only", [True, False])
async def test_a_database_of_another_program_is_refused(tmp_path: Path, read_only: bool) -> None:
    """It is left as it is, also where a table has a name that ours have."""
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE secrets (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(tecko.StoreError, match="a database of another program") as e:
        await tecko.Store(path, read_only=read_only).__aenter__()
    assert "import FILE" in e.value.hint and path.read_bytes() == before


async def test_a_newer_schema_is_refused(path: Place) -> None:
    """An older program does not touch what a newer one wrote, and says what to do."""
    await tecko.Store(path).touch()
    execute(path, "UPDATE schema_version SET version = 99")
    before, threads = dump(path), threading.active_count()
    with pytest.raises(tecko.StoreError, match=r"newer TeckoChecker \(schema 99\)") as e:
        await tecko.Store(path).touch()
    assert "backup" in e.value.hint and dump(path) == before
    await ended(threads)


def first_version(place: Place) -> None:
    """Make a database as the first version of the program did, with a row in it."""
    kind = tecko.Postgres if isinstance(place, str) else tecko.Sqlite
    for statement in tecko.SCHEMA.split(";\n"):
        if statement.strip():
            execute(place, statement.replace("{id}", kind.id))
    execute(place, "INSERT INTO polling_logs (status, message, created_at) VALUES ('a', 'b', 1)")


async def test_an_older_schema_is_brought_up_to_date(
    path: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at it says what to do and changes nothing; whoever writes makes it the newest, with
    all its rows, and as a new one is."""
    first_version(path)
    monkeypatch.setattr(tecko, "MIGRATIONS", ("CREATE TABLE later (id {id});\n",))
    before = dump(path)
    with pytest.raises(tecko.StoreError, match="older TeckoChecker") as e:
        await tecko.Store(path, read_only=True).touch()
    assert "init" in e.value.hint and dump(path) == before
    await tecko.Store(path).touch()
    assert execute(path, "SELECT version FROM schema_version") == [(2,)]
    assert dump(path) == before and dump(path, ["later"]) == {"later": []}
    async with tecko.Store(path, read_only=True) as store:
        assert [row.message for row in await store.logs(None, 10)] == ["b"]


@pytest.mark.sqlite
@pytest.mark.parametrize("what", ["no database", "a folder", "no folder"])
async def test_what_cannot_be_opened(path: Path, what: str) -> None:
    """A StoreError that names the file, and no thread left behind."""
    threads = threading.active_count()
    if what == "no database":
        execute(path.with_name("garbage"), "VACUUM INTO ?", str(path))
        os.truncate(path, 50)
    elif what == "a folder":
        os.mkdir(path)
    place = path / "x.db" if what == "no folder" else path
    with pytest.raises(tecko.StoreError, match=r"store\.db") as e:
        await tecko.Store(place).touch()
    assert e.value.code == 3001
    await ended(threads)


async def test_a_closed_store_says_so(path: Place) -> None:
    """Reads and writes alike; closing twice is harmless."""
    store = tecko.Store(path)
    async with store:
        await store.close()
        for attempt in (store.jobs(), store.create_job(spec(), "store", 1.0)):
            with pytest.raises(tecko.StoreError, match="closed"):
                await attempt


async def test_two_processes_may_create_it_at_once(path: Place) -> None:
    """Each opens what is not there yet; both end with the same, whole schema."""
    stores = [tecko.Store(path) for _ in range(6)]
    await asyncio.gather(*(store.touch() for store in stores))
    async with tecko.Store(path) as store:
        assert await store.jobs() == []


# ── Transactions ──────────────────────────────────────────────────────────────────────────────


async def run_traced(
    store: tecko.Store,
    work: Awaitable[object],
    at: int,
    then: Callable[[asyncio.Task[Any]], object],
) -> bool:
    """Run `work`, and call `then` on the loop when SQLite begins its statement number `at`."""
    assert isinstance(store._writer, tecko.Sqlite) and store._writer._db is not None
    loop, begun = asyncio.get_running_loop(), itertools.count()
    task = asyncio.ensure_future(work)

    def trace(_: str) -> None:
        if next(begun) == at:
            loop.call_soon_threadsafe(then, task)

    await store._writer._db.set_trace_callback(trace)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    async with store._lock:  # stands in line behind a transaction that still runs
        await store._writer._db.set_trace_callback(None)  # type: ignore[arg-type]
    return task.cancelled()


@pytest.mark.sqlite
async def test_a_cancelled_caller_leaves_no_half(store: tecko.Store, path: Path) -> None:
    """Cancelled at whichever statement: the transaction is whole, and others can write at once."""
    for at in range(20):
        name = f"job-{at}"
        work = store.create_job(spec(name), "store", 1.0)
        cancelled = await run_traced(store, work, at, asyncio.Task.cancel)
        job = await store.find_job(name)
        dump(path)
        assert len((await store.find_job(job.id)).batches) == 2
        assert [row.status for row in await store.logs(job.id, 9)] == ["created"]
        if not cancelled:
            break
    assert 5 < at < 19


@pytest.mark.sqlite
async def test_a_cancelled_decision_is_whole(store: tecko.Store, path: Path) -> None:
    """The transaction that decides to fire ends as one, whenever its caller is cancelled."""
    for at in range(20):
        job = await made(store, f"job-{at}")
        cancelled = await run_traced(store, checked(store, job, "fire"), at, asyncio.Task.cancel)
        dump(path)
        status, triggers = (await get(store, job.id)).status, await store.triggers(job.id)
        seen = [batch.status for batch in (await store.find_job(job.id)).batches]
        assert (status, len(triggers), seen) in (
            ("triggering", 1, ["completed", ""]),
            ("active", 0, ["", ""]),  # cancelled in the read before
        )
        if not cancelled:
            break
    assert 5 < at < 19


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=8))
def test_many_callers_cancelled_anywhere(turns: list[tuple[int, bool]]) -> None:
    """Whichever of several concurrent callers give up when: each job is there whole or not at all,
    and the store goes on."""

    async def main(path: Place) -> None:
        async with tecko.Store(path) as store:
            works = [store.create_job(spec(f"j{n}"), "store", 1.0) for n in range(len(turns))]
            tasks = [asyncio.ensure_future(work) for work in works]
            for wait, cancel in turns:
                for _ in range(wait):
                    await asyncio.sleep(0)
                if cancel:
                    tasks[wait % len(tasks)].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await made(store, "another")
            jobs = await store.jobs()
            dump(path)
            assert {len((await store.find_job(job.id)).batches) for job in jobs} == {2}
            kept = {job.name for job in jobs}
            assert {f"j{n}" for n, task in enumerate(tasks) if not task.cancelled()} <= kept

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder) / "s.db"))


async def test_a_lock_held_for_long_is_an_error(store: tecko.Store, path: Place) -> None:
    """After the busy timeout it is a StoreError that may pass; afterwards the store works."""
    store.patience = 0.1
    job, before = await made(store), dump(path)
    with Holder(path) as other:
        for _ in range(2):
            with pytest.raises(tecko.StoreError, match="locked") as e:
                await store.pause_job(job.id, 2.0)
            assert not e.value.permanent and (await get(store, job.id)).status == "active"
        other.release()
    assert dump(path) == before
    await store.pause_job(job.id, 2.0)
    assert (await get(store, job.id)).status == "paused"


@pytest.mark.sqlite
async def test_a_lock_held_for_a_moment_is_waited_for(store: tecko.Store, path: Path) -> None:
    """A transaction that finds the file locked goes on when it is free."""
    job = await made(store)
    with Holder(path) as other:
        work = store.pause_job(job.id, 2.0)
        assert not await run_traced(store, work, 0, lambda _: other.release())
    assert (await get(store, job.id)).status == "paused"


async def test_a_locked_store_opens_for_reading(store: tecko.Store, path: Place) -> None:
    """`status` and `job list` have nothing to wait for while another process writes."""
    await made(store)
    with Holder(path) as other:
        other.db.execute("UPDATE polling_jobs SET name = 'unseen'")
        async with tecko.Store(path) as reader:
            assert [job.name for job in await reader.jobs()] == ["job"]


async def test_readers_do_not_wait_for_a_writer_that_waits(store: tecko.Store, path: Place) -> None:
    """While a foreign lock keeps one of our own transactions waiting, every read is answered, and
    what others committed before is seen."""
    job = await made(store)
    with Holder(path) as other:
        writing = asyncio.ensure_future(store.pause_job(job.id, 2.0))
        await asyncio.sleep(0)
        for _ in range(20):
            assert await store.jobs() == [job] and (await store.counts())["jobs"] == {"active": 1}
            assert await store.data_version() is not None
        assert not writing.done()
        other.release()
        await writing
    assert (await get(store, job.id)).status == "paused"


async def test_opened_for_reading_only(path: Place) -> None:
    """It reads what is there, and writes nothing."""
    await tecko.Store(path).touch()
    async with tecko.Store(path, read_only=True) as store:
        assert await store.jobs() == [] and await store.data_version() >= 0
        with pytest.raises(tecko.StoreError, match="reading only"):
            await made(store)


@pytest.mark.sqlite
async def test_a_reader_sees_a_writer_that_came_later(path: Path) -> None:
    """A file that nobody wrote when it was opened for reading may be written at any time; and
    reading alone leaves nothing beside it."""
    await tecko.Store(path).touch()
    async with tecko.Store(path, read_only=True) as reader:
        assert await reader.jobs() == [] and os.listdir(path.parent) == [path.name]
        async with tecko.Store(path) as writer:
            first = await made(writer)
            assert await reader.jobs() == [first]
        assert await reader.jobs() == [first]
        async with tecko.Store(path) as writer:
            second = await made(writer, "other")
        assert await reader.jobs() == [first, second]


@pytest.mark.parametrize("what", ["nothing", "an empty one"])
async def test_nothing_to_read(path: Place, tmp_path: Path, what: str) -> None:
    """Opened for reading, it makes no file and no tables, and says how they are made."""
    if what == "an empty one" and isinstance(path, Path):
        os.mknod(path)
    before = os.listdir(tmp_path)
    with pytest.raises(tecko.StoreError, match=r"no database") as e:
        await tecko.Store(path, read_only=True).__aenter__()
    assert "init" in e.value.hint and os.listdir(tmp_path) == before


async def test_two_changes_of_one_job_both_count(store: tecko.Store, path: Place) -> None:
    """Whoever changes a job sees what was written before, so that two changes of different fields
    at once, by two processes, are both there."""
    job = await made(store)

    def changing(**update: Any) -> Callable[[tecko.Job], tecko.Spec]:
        return lambda seen: seen.spec.model_copy(update=update)

    async with tecko.Store(path) as second:
        await asyncio.gather(
            store.update_job(job.id, changing(name="new"), 2.0),
            second.update_job(job.id, changing(poll_interval=600), 2.0),
        )
    after = (await get(store, job.id)).spec
    assert (after.name, after.poll_interval) == ("new", 600)


async def test_what_was_rolled_back_is_not_logged(
    store: tecko.Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The program's log tells of what was committed, and of that alone."""
    await made(store, "mine")
    with caplog.at_level(logging.INFO, "teckochecker"):
        with pytest.raises(tecko.Conflict):
            await store.sync_file_jobs([spec("new"), spec("mine")], 2.0)
        assert caplog.messages == []
        job = await made(store, "other")
    assert caplog.messages == [f"job {job.id}: created: watches batch_1, batch_2"]


async def test_ids_are_never_used_again(store: tecko.Store) -> None:
    """A deleted job's number in an old log or URL never means another job; nor a secret's."""
    jobs, secrets = [], []
    for _ in range(3):
        jobs.append((await made(store)).id)
        await store.delete_job(jobs[-1], 2.0)
        secrets.append(await store.add_secret("s", "openai", lambda: (b"x", "k"), 1.0))
        await store.delete_secret("s", 2.0)
    assert len(set(jobs)) == len(set(secrets)) == 3 and jobs == sorted(jobs)


# ── Two processes ─────────────────────────────────────────────────────────────────────────────

WRITER = """
import asyncio, sys
import teckochecker as tecko

async def main():
    async with tecko.Store(sys.argv[1]) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(40):
            await store.add_secret(f"theirs-{n}", "openai", lambda: (b"x", "k"), 1.0)

asyncio.run(main())
"""


async def test_two_processes_lose_nothing(store: tecko.Store, path: Place) -> None:
    """Another process and two connections of this one write at once; all of it arrives."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER, str(path)),
        env=clean_environment({"PYTHONPATH": str(PROGRAM.parent)}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin and process.stdout and await process.stdout.readline() == b"ready\n"
    process.stdin.write(b"go\n")
    async with tecko.Store(path) as second:
        for n in range(20):
            await asyncio.gather(
                store.add_secret(f"ours-{n}", "openai", lambda: (b"x", "k"), 1.0),
                made(second, f"j{n}"),
            )
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert (await store.counts())["secrets"] == 60 and len(await store.jobs()) == 20
    ids = [row.id for row in await store.logs(None, 999)]
    assert len(ids) == len(set(ids)) == 80


@pytest.mark.sqlite
async def test_another_process_writing_is_noticed(store: tecko.Store, path: Path) -> None:
    """data_version moves with what others commit, and not with our own."""
    first = await store.data_version()
    job = await made(store)
    assert await store.data_version() == first
    execute(path, "UPDATE polling_jobs SET last_error = 'x'")
    assert await store.data_version() != first
    assert (await get(store, job.id)).last_error == "x"


async def test_only_one_of_two_claims_wins(store: tecko.Store, path: Place) -> None:
    """Two processes that hold the same trigger: one claims it, the other is told None."""
    trigger = await fired(store, await made(store))
    async with tecko.Store(path) as second:
        claims = [s.move_trigger(trigger, "claim", "", 9.0) for s in (store, second)]
        won = [claim for claim in await asyncio.gather(*claims) if claim is not None]
    assert len(won) == 1 and won[0].state == "sending" and won[0].attempts == 1
    assert await store.triggers(trigger.job_id) == won


# ── Checks and triggers: compare-and-set ──────────────────────────────────────────────────────


async def rearmed(store: tecko.Store, job: tecko.Job) -> None:
    assert await checked(store, job, "give_up")
    await store.retry_job(job.id, 6.0)


async def deleted(store: tecko.Store, job: tecko.Job) -> None:
    await store.sync_file_jobs([], 5.0)
    await store.delete_job(job.id, 5.0)


Change = Callable[[tecko.Store, tecko.Job], Awaitable[object]]
MEANWHILE: dict[str, Change] = {
    "paused": lambda store, job: store.pause_job(job.id, 5.0),
    "removed": lambda store, job: store.sync_file_jobs([], 5.0),
    "deleted": lambda store, job: deleted(store, job),
    "other batches": lambda store, job: store.sync_file_jobs([spec(batch_ids=["batch_9"])], 5.0),
    "another target": lambda store, job: store.sync_file_jobs(
        [spec(keboola_stack_url="https://connection.eu-central-1.keboola.com")], 5.0
    ),
    "another condition": lambda store, job: store.sync_file_jobs(
        [spec(trigger_when="all_finished")], 5.0
    ),
    "fired by another": lambda store, job: checked(store, job, "fire"),
    "failed by another": lambda store, job: checked(store, job, "give_up"),
    "failed and armed again": lambda store, job: rearmed(store, job),
}


@pytest.mark.parametrize("event", ["fire", "give_up", None])
@pytest.mark.parametrize("change", MEANWHILE.values(), ids=list(MEANWHILE))
async def test_a_check_of_what_has_changed_decides_nothing(
    store: tecko.Store, path: Place, change: Change, event: tecko.Event | None
) -> None:
    """A job changed while it was checked: nothing at all is written, and it counts as no check."""
    await store.sync_file_jobs([spec()], 1.0)
    job = await store.find_job("job")
    await change(store, job)
    before = dump(path)
    assert not await checked(store, job, event) or event is None
    assert dump(path) == before


async def test_ids_can_be_reserved(store: tecko.Store) -> None:
    """The next row gets the one that is asked for, unless that was given before; then the next."""
    for number, (next_id, job_id) in enumerate([(1, 1), (2, 2), (7, 7), (3, 8), (8, 9)]):
        await store.reserve_ids("polling_jobs", next_id)
        assert (await made(store, f"job-{number}")).id == job_id


async def test_a_check_is_written_down(store: tecko.Store) -> None:
    """Status, times and errors of a good check, then of a failed one, then of a good one again."""
    job = await made(store)
    for n, (ok, error) in enumerate([(True, None), (False, "no"), (False, "no"), (True, None)]):
        at = 10.0 + n
        errors = [] if ok else [tecko.OpenAIError("no")]
        assert await checked(store, job, errors=errors, error=error, now=at)
        job = await get(store, job.id)
        assert (job.last_check_at, job.next_check_at, job.last_error) == (at, at + 60, error)
        assert job.errors_in_row == (0, 1, 2, 0)[n] and job.last_ok_at == (10, 10, 10, 13)[n]
    logs = [row.status for row in await store.logs(job.id, 9)]
    assert logs == ["created", "checking", "error"]  # what is not new is not said again


async def test_a_round_has_one_trigger(store: tecko.Store, path: Place) -> None:
    """Even if a job's row were wrong, the table itself refuses a second trigger of a round."""
    await fired(store, await made(store))
    execute(path, "UPDATE polling_jobs SET status = 'active', fires_again = TRUE")
    before = dump(path)
    with pytest.raises(tecko.Conflict, match=r"triggers.*job_id.*round"):
        await checked(store, (await store.jobs())[0], "fire")
    assert dump(path) == before


@pytest.mark.parametrize("event", ["claim", "reject"])
async def test_a_stale_trigger_is_not_moved(
    store: tecko.Store, path: Place, event: tecko.Event
) -> None:
    """Who thinks that a trigger is pending while it is on the wire moves nothing."""
    job = await made(store)
    stale = await fired(store, job)
    await moved(store, job, "claim")
    before = dump(path)
    assert await store.move_trigger(stale, event, "said", 9.0) is None
    assert dump(path) == before


async def test_a_step_that_is_not_listed_changes_nothing(store: tecko.Store, path: Place) -> None:
    """A running trigger cannot be sent again; asking for it is a Conflict."""
    trigger = await fired(store, await made(store), "claim", "accept")
    before = dump(path)
    events: tuple[tecko.Event, ...] = ("claim", "resend", "postpone", "hold")
    for event in events:
        with pytest.raises(tecko.Conflict):
            await store.move_trigger(trigger, event, "", 9.0)
    assert dump(path) == before


@pytest.mark.parametrize("event", ["succeed", "fail"])
async def test_an_older_round_does_not_move_the_job(store: tecko.Store, event: tecko.Event) -> None:
    """The batches were changed while the Keboola job ran: its end is written down with the trigger,
    and the job's new round goes on."""
    job = await made(store)
    running = await fired(store, job, "claim", "accept")
    await store.update_job(job.id, lambda _: spec(batch_ids=["batch_3"]), 9.0)
    before = await get(store, job.id)
    assert (before.status, before.round) == ("active", 2)
    await store.note_trigger(running, 10.0, error="cannot be reached")
    assert await moved(store, job, event)
    assert await get(store, job.id) == replace(before, has_open=False)
    assert (await store.triggers(job.id))[0].finished_at == 8.0


async def test_news_of_a_deleted_job_is_dropped(store: tecko.Store, path: Place) -> None:
    """A job deleted while Keboola was asked about its trigger: what Keboola said is no error."""
    job = await made(store)
    running = await fired(store, job, "claim", "accept")
    await store.delete_job(job.id, 9.0)
    before = dump(path)
    assert await store.move_trigger(running, "succeed", "", 10.0) is None
    await store.note_trigger(running, 10.0, keboola_status="processing")
    assert dump(path) == before


# ── Jobs of the command line ──────────────────────────────────────────────────────────────────

ALLOWED = {
    "pause": {"active": "paused"},
    "resume": {"paused": "active"},
    "retry": {"failed": "active"},
}


@pytest.mark.parametrize("action", ALLOWED)
@pytest.mark.parametrize("status", [*STATUSES, "removed"])
async def test_pause_resume_retry(
    store: tecko.Store, path: Place, action: str, status: str
) -> None:
    """Each from its one state; from any other, removed ones too: Conflict, and nothing changes."""
    if status == "removed":
        await store.sync_file_jobs([spec()], 1.0)
        await store.sync_file_jobs([], 2.0)
        job = await store.find_job("job")
    else:
        job = await job_in(store, status)
    change = {"pause": store.pause_job, "resume": store.resume_job, "retry": store.retry_job}
    before = dump(path)
    if status in ALLOWED[action]:
        await change[action](job.id, 9.0)
        assert (await get(store, job.id)).status == ALLOWED[action][status]
        return
    with pytest.raises(tecko.Conflict, match=f"Cannot {action} job 'job': it is {status}"):
        await change[action](job.id, 9.0)
    assert dump(path) == before


async def test_changes_of_a_job_that_is_not_there(store: tecko.Store, path: Place) -> None:
    """1002, the same words for each, and nothing in the log."""
    before = dump(path)
    for work in (
        store.pause_job(7, 1.0),
        store.resume_job(7, 1.0),
        store.retry_job(7, 1.0),
        store.delete_job(7, 1.0),
        store.update_job(7, lambda _: spec(), 1.0),
    ):
        with pytest.raises(tecko.NotFound, match=r"^Job with ID 7 not found$") as e:
            await work
        assert e.value.code == 1002
    assert dump(path) == before


async def test_a_job_of_this_name_is_there_already(store: tecko.Store, path: Place) -> None:
    """Creating a second one, or renaming to it, is a Conflict."""
    await made(store, "a")
    b = await made(store, "b")
    before = dump(path)
    for work in (
        store.create_job(spec("a"), "store", 2.0),
        store.update_job(b.id, lambda _: spec("a"), 2.0),
    ):
        with pytest.raises(tecko.Conflict):
            await work
    assert dump(path) == before


async def test_find_job_by_id_and_name(store: tecko.Store) -> None:
    """A number is an id, anything else a name, whatever stands in it."""
    names = ["a", "with space", "x' OR 1=1 --", "ěšč", "7 jobs", "_"]
    for name in names:
        job = await made(store, name)
        assert (await store.find_job(name)) == (await store.find_job(str(job.id))) == job
    for ref, told in (("99", "Job with ID 99 not"), ("b", "Job with name 'b' not"), ("%", "'%'")):
        with pytest.raises(tecko.NotFound, match=told):
            await store.find_job(ref)


async def test_secrets_by_id_become_names(store: tecko.Store, path: Place) -> None:
    """The flat form may carry ids; the job keeps names. An id that is not there: 1001."""
    ids = [
        await store.add_secret(n, t, lambda: (b"x", "k"), 1.0)
        for n, t in (("a", "openai"), ("b", "k"))
    ]
    job = await made(store, openai_secret=ids[0], keboola_secret=ids[1])
    assert (job.watches.watch.secret, job.watches.trigger.secret) == ("a", "b")
    before = dump(path)
    with pytest.raises(tecko.NotFound, match="Secret with ID 77 not found") as e:
        await made(store, "other", openai_secret=77)
    assert e.value.code == 1001 and dump(path) == before


async def test_other_batches_start_a_round(store: tecko.Store) -> None:
    """Another set of batches is checked from the start, from any state; the history stays."""
    for status in STATUSES:
        job = await job_in(store, status, status)
        new = spec(status, batch_ids=["batch_2", "batch_3"])
        await store.update_job(job.id, lambda _, new=new: new, 9.0)  # type: ignore[misc]
        after = await get(store, job.id)
        assert after.round == 2 and after.last_error is None and after.completed_at is None
        assert after.status == ("paused" if status == "paused" else "active")
        batches = (await store.find_job(job.id)).batches
        assert [(b.batch_id, b.status) for b in batches] == [("batch_2", ""), ("batch_3", "")]
        assert [t.round for t in await store.triggers(job.id)] in ([], [1])


@pytest.mark.parametrize(
    "change",
    [
        {"batch_ids": ["batch_2", "batch_1"]},
        {"poll_interval": 300},
        {"openai_secret": "other"},
        {"name": "renamed"},
        {"variables": {"region": "eu"}},
        {},
    ],
)
async def test_what_starts_no_round(store: tecko.Store, change: dict[str, Any]) -> None:
    """The same batches in another order, or another detail: what was seen of them stays."""
    job = await made(store)
    assert await checked(store, job)
    await store.update_job(job.id, lambda _: spec(**change), 9.0)
    after = await get(store, job.id)
    assert (after.round, after.status, after.last_check_at) == (1, "active", 7.0)
    assert {b.batch_id: b.status for b in after.batches} == {"batch_1": "completed", "batch_2": ""}
    logs = [row.status for row in await store.logs(job.id, 9)]
    assert logs.count("updated") == bool(change)


ELSEWHERE = {
    "keboola_stack_url": "https://connection.eu-central-1.keboola.com",
    "keboola_configuration_id": "2",
    "keboola_secret": "k2",
}


def target(trigger: tecko.Trigger) -> tuple[str, str, str]:
    return trigger.stack_url, json.loads(trigger.body)["config"], trigger.secret


@pytest.mark.parametrize(
    ("events", "goes_elsewhere"),
    [
        ([], True),
        (["claim"], False),
        (["claim", "postpone"], True),
        (["claim", "lose"], False),
        (["claim", "lose", "resend"], False),
        (["claim", "accept"], False),
    ],
)
async def test_another_target_counts_for_what_was_not_sent(
    store: tecko.Store, events: list[tecko.Event], goes_elsewhere: bool
) -> None:
    """A trigger that surely never left goes to the job's new target, with what it says of the
    batches; one that may have arrived keeps the target that it went to."""
    job = await made(store)
    before = await fired(store, job, *events)
    await store.update_job(job.id, lambda _: spec(**ELSEWHERE), 9.0)
    [trigger] = await store.triggers(job.id)
    assert trigger.id == before.id and trigger.state == before.state
    assert target(trigger) == (
        tuple(ELSEWHERE.values())
        if goes_elsewhere
        else ("https://connection.keboola.com", "1", "k")
    )
    values = [json.loads(t.body)["variableValuesData"]["values"] for t in (before, trigger)]
    assert sorted(map(str, values[0])) == sorted(map(str, values[1])) and "batch_1" in trigger.body


async def test_a_claim_with_the_old_target_is_refused(store: tecko.Store, path: Place) -> None:
    """Who read the trigger before its target changed does not send it to the old one."""
    job = await made(store)
    stale = await fired(store, job)
    await store.update_job(job.id, lambda _: spec(**ELSEWHERE), 9.0)
    before = dump(path)
    assert await store.move_trigger(stale, "claim", "", 10.0) is None
    await store.note_trigger(stale, 10.0, error="old news")
    assert dump(path) == before


async def test_a_target_changed_on_the_wire_counts_if_it_was_not_sent(store: tecko.Store) -> None:
    """Refused with 429 after the target had changed: the next attempt goes to the new one."""
    job = await made(store)
    await fired(store, job, "claim")
    await store.update_job(job.id, lambda _: spec(**ELSEWHERE), 9.0)
    assert target(await moved(store, job, "postpone")) == tuple(ELSEWHERE.values())
    assert target((await store.triggers(job.id))[0]) == tuple(ELSEWHERE.values())


async def test_a_pending_trigger_of_an_older_round_is_not_lost(store: tecko.Store) -> None:
    """Its batches are watched no more, so that nothing would fire in its place."""
    job = await made(store)
    await fired(store, job)
    await store.update_job(job.id, lambda _: spec(batch_ids=["batch_3"]), 8.0)
    await store.update_job(job.id, lambda _: spec(batch_ids=["batch_3"], **ELSEWHERE), 9.0)
    [trigger] = await store.triggers(job.id)
    assert trigger.state == "pending" and target(trigger) == tuple(ELSEWHERE.values())


async def test_a_job_of_the_file_is_edited_in_the_file(store: tecko.Store, path: Place) -> None:
    """Updating or deleting it elsewhere would not last: Conflict, with what to do."""
    await store.sync_file_jobs([spec()], 1.0)
    job, before = await store.find_job("job"), dump(path)
    for work in (
        store.update_job(job.id, lambda _: spec(poll_interval=60), 2.0),
        store.delete_job(job.id, 2.0),
    ):
        with pytest.raises(tecko.Conflict, match=r"jobs\.yaml") as e:
            await work
        assert e.value.hint
    assert dump(path) == before


async def test_retry_of_a_held_trigger_settles_it_once_more(store: tecko.Store) -> None:
    """The same trigger is asked for again and then sent; no second one is made."""
    job = await made(store)
    held = await fired(store, job, "claim", "lose", "hold")
    assert (await get(store, job.id)).status == "failed"
    assert "asks Keboola" in await store.retry_job(job.id, 20.0)
    [trigger], job = await store.triggers(job.id), await get(store, job.id)
    assert (trigger.id, trigger.state, trigger.unknown_at) == (held.id, "unknown", 20.0)
    assert trigger.on_ambiguous == "resend" and (job.status, job.round) == ("triggering", 1)


async def test_retry_after_a_refusal_starts_a_round(store: tecko.Store) -> None:
    """What Keboola refused stays refused; the batches are checked again and may fire again."""
    job = await made(store)
    await fired(store, job, "claim", "reject")
    assert "from the start" in await store.retry_job(job.id, 9.0)
    again = await fired(store, await get(store, job.id))
    assert [t.state for t in await store.triggers(job.id)] == ["rejected", "pending"]
    assert again.round == 2


async def test_deleting_takes_everything_along(store: tecko.Store, path: Place) -> None:
    """Batches, triggers and logs of a deleted job go with it; others' stay, and one line tells."""
    other = await job_in(store, "triggered", "other")
    before = {table: execute(path, f"SELECT * FROM {table}") for table in TABLES}
    job = await job_in(store, "triggered")
    await store.delete_job(job.id, 9.0)
    for table in before.keys() - {"daily_sums"}:
        left = [row for row in execute(path, f"SELECT * FROM {table}") if None not in row[:2]]
        assert left == before[table]
    [line] = execute(path, "SELECT status, message FROM polling_logs WHERE job_id IS NULL")
    assert line == ("deleted", f"job 'job' (ID {job.id})") and await store.jobs() == [other]


# ── jobs.yaml ─────────────────────────────────────────────────────────────────────────────────


async def names(store: tecko.Store) -> dict[str, str]:
    return {job.name: job.shown_status for job in await store.jobs()}


async def test_the_file_is_taken_up(store: tecko.Store) -> None:
    """New ones appear, changed ones change and keep their history, one that left is removed and
    comes back as it was; and nothing to do is said by an empty counter."""
    a, b = spec("a"), spec("b")
    assert await store.sync_file_jobs([a, b], 1.0) == {"created": 2}
    assert await store.sync_file_jobs([b, a], 2.0) == {}
    first = await store.find_job("a")
    assert await checked(store, first)
    changed = spec("a", poll_interval=600)
    assert await store.sync_file_jobs([changed, b], 3.0) == {"changed": 1}
    assert (await store.find_job("a")).last_check_at == 7.0 and (
        await store.find_job("a")
    ).id == first.id
    assert await store.sync_file_jobs([changed], 4.0) == {"removed": 1}
    assert await store.sync_file_jobs([changed], 5.0) == {}
    assert await names(store) == {"a": "active", "b": "removed"}
    assert await store.sync_file_jobs([changed, spec("b", poll_interval=60)], 6.0) == {
        "changed": 1,
        "returned": 1,
    }
    assert await names(store) == {"a": "active", "b": "active"}


async def test_a_renamed_job_is_the_same_job(store: tecko.Store) -> None:
    """The same batches and target under another name, the old name gone: it keeps its id and its
    history, and does not fire again; another interval changes nothing about that."""
    await store.sync_file_jobs([spec("old")], 1.0)
    old = await store.find_job("old")
    await fired(store, old, "claim", "accept", "succeed")
    assert await store.sync_file_jobs([spec("new", poll_interval=600)], 9.0) == {"renamed": 1}
    assert await names(store) == {"new": "completed"}
    assert (await store.find_job("new")).id == old.id and len(await store.triggers(old.id)) == 1


@pytest.mark.parametrize(
    "later", [{"batch_ids": ["batch_2", "batch_3"]}, {"keboola_component_id": "other"}]
)
async def test_another_job_under_another_name(store: tecko.Store, later: dict[str, Any]) -> None:
    """With other batches or another target it is new: the old one is removed."""
    await store.sync_file_jobs([spec("old")], 1.0)
    assert await store.sync_file_jobs([spec("new", **later)], 2.0) == {"created": 1, "removed": 1}
    assert await names(store) == {"old": "removed", "new": "active"}


async def test_a_job_renamed_after_it_had_left(store: tecko.Store) -> None:
    """Taken out of the file, and put back later under another name: still the same job. A copy
    of one that is still in the file is another job."""
    await store.sync_file_jobs([spec("old"), spec("other", batch_ids=["batch_7"])], 1.0)
    old = await store.find_job("old")
    await store.sync_file_jobs([spec("other", batch_ids=["batch_7"])], 2.0)
    back = [spec("new"), spec("other", batch_ids=["batch_7"]), spec("b", batch_ids=["batch_7"])]
    done = await store.sync_file_jobs(back, 3.0)
    assert done == {"renamed": 1, "returned": 1, "created": 1}
    assert (await store.find_job("new")).id == old.id
    assert await names(store) == {"new": "active", "other": "active", "b": "active"}


async def test_a_set_of_batches_fires_once(store: tecko.Store) -> None:
    """Back to batches that fired before: the job ends and says where they fired; `job retry` fires
    them again."""
    await store.sync_file_jobs([spec()], 1.0)
    job = await store.find_job("job")
    first = await fired(store, job, "claim", "accept", "succeed")
    await store.sync_file_jobs([spec(batch_ids=["batch_1"])], 9.0)
    await fired(store, await get(store, job.id), "claim", "accept", "succeed")
    await store.sync_file_jobs([spec(batch_ids=["batch_2", "batch_1"])], 10.0)
    assert await checked(store, await get(store, job.id), "fire")
    after = await get(store, job.id)
    assert after.status == "failed" and "job retry" in str(after.last_error)
    assert first.id in str(after.last_error) and len(await store.triggers(job.id)) == 2
    await store.retry_job(job.id, 11.0)
    await fired(store, await get(store, job.id), "claim", "accept", "succeed")
    assert [t.round for t in await store.triggers(job.id)] == [1, 2, 4]
    said = await store.fired(tecko.aim_of_spec(spec()))
    assert [(job.name, trigger.round) for job, trigger in said] == [("job", 4), ("job", 1)]
    assert said[0][0].removed_at is None


async def test_what_was_refused_has_not_fired(store: tecko.Store) -> None:
    """Keboola said no to the first: the same batches may fire in a later round."""
    job = await made(store)
    await fired(store, job, "claim", "reject")
    for ids in (["batch_1"], ["batch_1", "batch_2"]):
        await store.update_job(job.id, lambda _, ids=ids: spec(batch_ids=ids), 9.0)  # type: ignore[misc]
    assert (await fired(store, await get(store, job.id))).round == 3


async def test_the_plan_is_what_becomes(store: tecko.Store) -> None:
    """`file_changes` says what a reload would do, and does nothing; where that is nothing, a reload
    waits for no lock."""
    await store.sync_file_jobs([spec("a"), spec("b", batch_ids=["batch_7"])], 1.0)
    new = [spec("c"), spec("d", batch_ids=["batch_8"])]
    plan = [(c.what, c.name) for c in await store.file_changes(new)]
    assert plan == [("renamed", "c"), ("created", "d"), ("removed", "b")]
    assert (await names(store)).keys() == {"a", "b"}
    await store.sync_file_jobs(new, 2.0)
    with Holder(store.place):
        assert await store.sync_file_jobs(new, 3.0) == {}


async def test_jobs_of_the_store_are_not_the_files_business(store: tecko.Store) -> None:
    """An empty file removes what came from it, and leaves what the command line made."""
    await made(store, "mine")
    await store.sync_file_jobs([spec("a")], 1.0)
    assert await store.sync_file_jobs([], 2.0) == {"removed": 1}
    assert await names(store) == {"mine": "active", "a": "removed"}


async def test_a_name_on_both_sides(store: tecko.Store, path: Place) -> None:
    """A job of the file that was also made on the command line stops all of it: what stands before
    and after it in the file is not taken up either."""
    await store.sync_file_jobs([spec("a"), spec("gone")], 1.0)
    await made(store, "mine")
    before = dump(path)
    file = [spec("new"), spec("a", batch_ids=["batch_7"]), spec("mine"), spec("z")]
    with pytest.raises(tecko.Conflict, match=r"'mine' .* on the command line") as e:
        await store.sync_file_jobs(file, 2.0)
    assert "rename" in e.value.hint and dump(path) == before


async def test_a_removed_job_can_be_deleted_and_return(store: tecko.Store) -> None:
    """It is then a new job, without a past."""
    await store.sync_file_jobs([spec()], 1.0)
    job = await store.find_job("job")
    await store.sync_file_jobs([], 2.0)
    await store.delete_job(job.id, 3.0)
    assert await store.sync_file_jobs([spec()], 4.0) == {"created": 1}
    assert (await store.find_job("job")).id > job.id


async def test_an_ended_job_stays_ended_in_the_file(store: tecko.Store) -> None:
    """A restart with the same file does not fire again; other batches do."""
    await store.sync_file_jobs([spec()], 1.0)
    job = await store.find_job("job")
    await fired(store, job, "claim", "accept", "succeed")
    assert await store.sync_file_jobs([spec()], 9.0) == {}
    assert (await get(store, job.id)).status == "completed" and await store.schedule() == {}
    await store.sync_file_jobs([spec(batch_ids=["batch_2"])], 10.0)
    assert await store.schedule() != {}


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", ["o", "k"])
async def test_a_secret_in_use_is_not_deleted(store: tecko.Store, status: str, name: str) -> None:
    """Not while a job that goes on uses it; one used by ended jobs alone goes, and they stay."""
    for secret in ("o", "k"):
        await store.add_secret(secret, "openai", lambda: (b"x", "k"), 1.0)
    await job_in(store, status)
    if status in (*OPEN, "active", "paused"):
        with pytest.raises(
            tecko.Conflict, match=f"'{name}': it is referenced by active jobs: 'job'"
        ):
            await store.delete_secret(name, 9.0)
        assert (await store.counts())["secrets"] == 2
    else:
        await store.delete_secret(name, 9.0)
        assert (await store.counts())["secrets"] == 1 and await names(store) == {"job": status}


async def test_secrets_are_added_replaced_and_deleted(store: tecko.Store) -> None:
    """By name, one each; replacing keeps id and type; what is not there is 1001."""
    first = await store.add_secret("s", "openai", lambda: (b"one", "k1"), 1.0)
    with pytest.raises(tecko.Conflict, match="Secret with name 's' already exists"):
        await store.add_secret("s", "keboola", lambda: (b"two", "k1"), 2.0)
    await store.replace_secret("s", "openai", lambda: (b"three", "k2"), 3.0)
    for work in (
        store.replace_secret("s", "keboola", lambda: (b"four", "k2"), 4.0),
        store.replace_secret("t", "openai", lambda: (b"four", "k2"), 4.0),
        store.delete_secret("t", 4.0),
    ):
        with pytest.raises(tecko.NotFound) as e:
            await work
        assert e.value.code == 1001
    row = tecko.SealedSecret(first, "s", "openai", b"three", "k2", 1.0)
    assert await store.secret("s") == row and await store.secrets() == [row]
    await store.delete_secret("s", 5.0)
    assert await store.secret("s") is None
    logs = [row.status for row in await store.logs(None, 9)]
    assert logs == ["created", "updated", "deleted"]


# ── Figures ───────────────────────────────────────────────────────────────────────────────────


async def test_what_has_something_left_to_do(store: tecko.Store) -> None:
    """Active jobs, and whichever has a trigger under way, also when it has left the file."""
    jobs = {status: await job_in(store, status, status) for status in STATUSES}
    wanted = {jobs[status].id for status in ("active", *OPEN)}
    assert set(await store.schedule()) == wanted
    await store.sync_file_jobs([spec("a"), spec("b")], 1.0)
    await fired(store, await store.find_job("a"), "claim", "lose")
    await store.sync_file_jobs([], 2.0)
    wanted.add((await store.find_job("a")).id)
    held = await made(store, "held", poll_interval=60, batch_ids=["batch_1", "batch_9"])
    await fired(store, held, "claim", "lose", "hold")
    plans = await store.schedule()
    assert plans.keys() == wanted and {plan.interval for plan in plans.values()} == {120}


async def test_counts_and_filters(store: tecko.Store) -> None:
    """By the status that is shown: `removed` wins over what the job was."""
    for n, status in enumerate([*STATUSES, *STATUSES[:2]]):
        await job_in(store, status, f"{n}-{status}")
    await store.sync_file_jobs([spec("a")], 1.0)
    await store.sync_file_jobs([], 2.0)
    await store.add_secret("s", "openai", lambda: (b"x", "k"), 1.0)
    counts = await store.counts()
    expected = dict.fromkeys(STATUSES, 1) | {"active": 2, "paused": 2, "removed": 1}
    assert counts["jobs"] == expected and counts["secrets"] == 1 and counts["triggers"] == 4
    assert counts["logs"] == len(await store.logs(None, 999))
    for status, number in expected.items():
        assert len(await store.jobs(status)) == number


async def test_overdue(store: tecko.Store) -> None:
    """No good check for more than three intervals; paused, ended and removed ones owe none, and
    nobody owes one from before the start of the service."""
    for status in STATUSES:
        await job_in(store, status, status)
    await store.sync_file_jobs([spec("gone")], 1.0)
    await store.sync_file_jobs([], 1.0)
    await made(store, "slow", poll_interval=3600)  # all were made at 1.0, and check every 120 s
    assert await store.overdue(361.0, 0.0) == []
    assert await store.overdue(361.5, 0.0) == ["active"]
    assert await store.overdue(361.5, 2.0) == []
    assert await store.overdue(10802.0, 0.0) == ["active", "slow"]


async def test_a_job_resumed_or_back_is_not_overdue_at_once(store: tecko.Store) -> None:
    """What it owes is counted from its return."""
    paused = await job_in(store, "paused", "paused")
    await store.sync_file_jobs([spec("back")], 1.0)
    await store.sync_file_jobs([], 2.0)
    await store.resume_job(paused.id, 5000.0)
    await store.sync_file_jobs([spec("back")], 5000.0)
    assert await store.overdue(5001.0, 0.0) == []
    assert len(await store.overdue(5361.0, 0.0)) == 2


async def test_due_next(store: tecko.Store) -> None:
    """The soonest first, of those that will be checked."""
    for name, at in (("late", 300.0), ("soon", 100.0), ("paused", 50.0), ("middle", 200.0)):
        assert await checked(store, await made(store, name), wait=at, now=0.0)
    await store.pause_job((await store.find_job("paused")).id, 8.0)
    assert await store.due_next(2) == [("soon", 100.0), ("middle", 200.0)]


async def test_logs_are_paged(store: tecko.Store) -> None:
    """The last rows, oldest first; of one job or of all; only those beyond an id."""
    first, second = await made(store, "a"), await made(store, "b")
    for n in range(6):
        await (store.resume_job if n % 2 else store.pause_job)(first.id, float(n))
    rows = await store.logs(first.id, 99)
    ids = [row.id for row in rows]
    assert [row.status for row in rows] == ["created", *["paused", "resumed"] * 3]
    assert ids == sorted(ids) and [row.id for row in await store.logs(first.id, 2)] == ids[-2:]
    assert [row.id for row in await store.logs(first.id, 99, after=ids[-3])] == ids[-2:]
    assert len(await store.logs(None, 99)) == 8 and len(await store.logs(second.id, 99)) == 1


# ── Whatever happens ──────────────────────────────────────────────────────────────────────────

OPERATIONS = st.sampled_from(
    "pause resume retry delete check fire fire_partly give_up claim postpone lose resend hold"
    " accept reject succeed fail other_batches other_target other_interval leave return".split()
)
OF_STATUS: dict[str, set[str | None]] = {
    "active": {None},
    "paused": {None},
    "triggering": {"pending", "sending", "unknown"},
    "triggered": {"running"},
    "completed": {"succeeded"},
    "completed_with_failures": {"succeeded"},
    "failed": {None, "held", "rejected", "failed"},
}


async def do(store: tecko.Store, file: dict[str, Any], operation: str, n: int) -> None:
    """One operation on the job of jobs.yaml, which is `file` or, when empty, not there."""
    now = float(n)
    job = next(iter(await store.jobs()), None)
    if operation in ("other_batches", "other_target", "other_interval", "return"):
        changes: dict[str, dict[str, Any]] = {
            "other_batches": {"batch_ids": [f"batch_{n}"]},
            "other_target": {"keboola_configuration_id": str(n)},
            "other_interval": {"poll_interval": 30 + n},
        }
        file |= changes.get(operation, {})
        await store.sync_file_jobs([spec(**file)], now)
    elif operation == "leave":
        await store.sync_file_jobs([], now)
    elif job is None:
        return
    elif operation in ("pause", "resume", "retry", "delete"):
        await getattr(store, f"{operation}_job")(job.id, now)
    elif operation in ("check", "fire", "fire_partly", "give_up"):
        events: dict[str, tecko.Event | None] = {"check": None, "give_up": "give_up"}
        await checked(store, job, events.get(operation, "fire"), partial=operation == "fire_partly")
    elif triggers := await store.triggers(job.id):
        await store.move_trigger(triggers[-1], operation, "", now)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_whatever_is_done_the_job_is_consistent(operations: list[str]) -> None:
    """The status is one of the table and fits the trigger of the round, the round never goes back,
    and a round never has two triggers."""

    async def main(path: Place) -> None:
        async with tecko.Store(path) as store:
            file: dict[str, Any] = {}
            await do(store, file, "return", 0)
            last = (0, 0)
            for n, operation in enumerate(operations, 1):
                with contextlib.suppress(tecko.Conflict):
                    await do(store, file, operation, n)
                for job in await store.jobs():
                    triggers = await store.triggers(job.id)
                    states = {t.round: t.state for t in triggers}
                    assert len(states) == len(triggers) and max(states, default=0) <= job.round
                    assert states.get(job.round) in OF_STATUS[job.status], operation
                    assert (job.id, job.round) >= last
                    last = (job.id, job.round)
                    batches = (await store.find_job(job.id)).batches
                    assert [b.batch_id for b in batches] == job.watches.watch.batch_ids

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder) / "s.db"))


# ── Alerts ────────────────────────────────────────────────────────────────────────────────────


async def test_what_alerts_were_told_is_kept_by_target(store: tecko.Store) -> None:
    """The last word on each, whatever the conditions are called."""
    await store.save_alerts("a", {"failed job x": 1.0})
    await store.save_alerts("b", {})
    await store.save_alerts("a", {'failed job "y" %': 2.5})
    assert await store.alerts() == {"a": {'failed job "y" %': 2.5}, "b": {}}
