"""The service: timers that keep their pace, changes from elsewhere, reload, drain, and its word."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import standins
from conftest import PROGRAM, World, clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st

import teckochecker as tecko


async def until(condition: Callable[[], Any], seconds: float = 5) -> None:
    """Wait until a condition holds; it may be a coroutine function."""
    end = time.monotonic() + seconds
    while True:
        met = condition()
        if await met if inspect.isawaitable(met) else met:
            return
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(world: World, **how: Any) -> AsyncIterator[tecko.Service]:
    """The service on the world's store, which stays open as another process's would."""

    def load() -> tecko.Config:
        return tecko.load_config(world.config.path, dict(world.config.env))

    async with tecko.make_service(world.config, load, **how) as service:
        yield service


def checks(world: World, batch_id: str) -> int:
    return world.openai.count(f"GET /v1/batches/{batch_id}")


async def watch(world: World, batch_id: str, name: str = "", **flat: Any) -> int:
    """A job that watches one batch, which is in progress."""
    world.openai.batch(batch_id)
    return await world.job(name or batch_id, batch_ids=[batch_id], **flat)


# ── Timers ────────────────────────────────────────────────────────────────────────────────────


async def test_each_job_keeps_its_own_interval(world: World) -> None:
    """The first check comes soon after the start, the next ones by interval, not before."""
    await watch(world, "batch_slow", poll_interval=3600)
    await watch(world, "batch_quick", poll_interval=1)
    async with running(world):
        await until(lambda: checks(world, "batch_slow"))
        await until(lambda: checks(world, "batch_quick") >= 2)
    assert checks(world, "batch_slow") == 1


async def test_changes_of_another_process_take_effect(world: World) -> None:
    """Paused, resumed, new, given another interval or other batches, while the service runs."""
    at = {name: await watch(world, f"batch_{name}", name) for name in ("still", "interval", "set")}
    at |= {n: await watch(world, f"batch_{n}", n, poll_interval=1) for n in ("paused", "resumed")}
    await world.store.pause_job(at["resumed"], 0.0)
    world.openai.batch("batch_other")
    world.openai.fault("GET /v1/batches", standins.Fault.status(404), times=None)  # count each
    async with running(world):
        started = ("paused", "still", "interval", "set")
        await until(lambda: all(checks(world, f"batch_{name}") for name in started))
        specs = {name: (await world.get(at[name])).watches for name in ("interval", "set")}
        quick = specs["interval"].model_copy(update={"poll_interval": 1})
        watching = specs["set"].watch.model_copy(update={"batch_ids": ["batch_other"]})
        await world.store.pause_job(at["paused"], 0.0)
        before = checks(world, "batch_paused")
        await world.store.resume_job(at["resumed"], 0.0)
        await world.store.update_job(at["interval"], lambda _: quick, 0.0)
        await world.store.update_job(
            at["set"], lambda _: specs["set"].model_copy(update={"watch": watching}), 0.0
        )
        await watch(world, "batch_new")
        await until(lambda: checks(world, "batch_new") and checks(world, "batch_other"))
        await until(lambda: checks(world, "batch_resumed") >= 2)
        await until(lambda: checks(world, "batch_interval") >= 3)
    assert checks(world, "batch_paused") <= before + 1  # which was under way
    assert checks(world, "batch_still") == 1


async def test_a_job_is_found_by_a_service_that_sleeps(world: World) -> None:
    """Nothing of its own to do, and yet what another process adds is soon looked at."""
    async with running(world) as service:
        await until(lambda: not service.stale)
        await watch(world, "batch_new")
        await until(lambda: checks(world, "batch_new"))


async def test_a_job_that_has_ended_needs_no_timer(world: World) -> None:
    """Its batch failed, so that the job has; only the service's own timers are left."""
    world.openai.batch("batch_1", "failed")
    job_id = await world.job(poll_interval=1)
    async with running(world) as service:
        await until(lambda: checks(world, "batch_1"))
        await until(lambda: not timers(service))
    assert (await world.get(job_id)).status == "failed" and checks(world, "batch_1") == 1


def timers(service: tecko.Service) -> list[Any]:
    """Those of jobs; the service has two of its own."""
    return [job for job in service._scheduler.get_jobs() if job.name == "check"]


async def test_a_long_step_is_not_overlapped_and_delays_nobody(world: World) -> None:
    """A check that hangs over several of its due times is the only one of its job, and others go
    on meanwhile; afterwards it goes on as well."""
    await watch(world, "batch_hung", poll_interval=1)
    await watch(world, "batch_fine", poll_interval=1)
    gate = world.openai.gate("GET /v1/batches/batch_hung", after_acting=False)
    async with running(world):
        await gate.areached()
        seen = checks(world, "batch_fine")
        await until(lambda: checks(world, "batch_fine") >= seen + 2)
        assert checks(world, "batch_hung") == 1
        gate.release()
        await until(lambda: checks(world, "batch_hung") >= 2)


class Brittle:
    """Stands before a part of the program, and has one of its methods raise what nobody expects,
    a few times."""

    def __init__(self, part: Any, method: str, error: BaseException, times: int = 2) -> None:
        self._part, self._method, self._error, self.left = part, method, error, times

    def __getattr__(self, name: str) -> Any:
        if name == self._method and self.left > 0:
            self.left -= 1
            raise self._error
        return getattr(self._part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_part", "_method", "_error", "left"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._part, name, value)


AWAITED = {  # what the service and its steps ask on the way from a batch to its trigger, by part
    "store": "data_version schedule jobs_among job record_checks secret prune open_triggers"
    " move_trigger",
    "openai": "register_secret listing retrieve",
    "keboola": "prepare send",
    "steps": "by_key check step",
}
UNEXPECTED = [
    *((part, m, KeyError("odd")) for part, all_ in AWAITED.items() for m in all_.split()),
    *(("store", m, tecko.StoreError("no disk")) for m in ("schedule", "record_checks")),
    ("steps", "step", MemoryError()),
]


@pytest.mark.parametrize(("part", "method", "error"), UNEXPECTED)
async def test_the_unexpected_costs_a_step(
    world: World, part: str, method: str, error: BaseException
) -> None:
    """Whatever raises whatever, wherever: both jobs fire all the same, and no step is left that
    seems to be under way."""
    for n in "12":
        world.openai.batch(f"batch_{n}")
        await world.job(f"job-{n}", batch_ids=[f"batch_{n}"], poll_interval=1)
    steps = world.steps
    if part == "steps":
        brittle = Brittle(steps, method, error)
    else:
        brittle = Brittle(getattr(steps, part), method, error)
        setattr(steps, part, brittle)
        steps._actions = {"keboola": steps.keboola}
    service = tecko.Service(cast(Any, brittle if part == "steps" else steps), lambda: world.config)
    service.store = cast(Any, brittle if part == "store" else world.store)
    steps.clock, steps.monotonic = time.time, time.monotonic
    quick = world.config.settings.model_copy(update={"trigger_settle_seconds": 1})
    world.config = steps.config = replace(world.config, settings=quick)
    await started(service)
    try:
        for n in "12":
            world.openai.batch(f"batch_{n}", "completed")
        await until(lambda: len(world.keboola.created) == 2, 20)
        await until(lambda: not any(timer.busy for timer in service._timers.values()))
        await until(lambda: brittle.left < 2)  # it was asked
    finally:
        await service.drain()


async def started(service: tecko.Service) -> None:
    """Start a service, again where its start met an error."""
    while True:
        try:
            return await service.start()
        except (KeyError, MemoryError, tecko.StoreError):
            continue


async def test_an_internal_error_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In the log with its traceback, in the job's last_error and in the figures, until the next
    step that goes well."""
    job_id = await watch(world, "batch_1", poll_interval=1)
    brittle = Brittle(world.steps, "step", KeyError("odd"), times=1)
    world.steps.clock = time.time
    service = tecko.Service(cast(Any, brittle), lambda: world.config)
    await service.start()
    try:
        await until(lambda: f"job {job_id}: error: internal error" in caplog.text)
        assert (
            "Traceback" in caplog.text
            and f"job {job_id}: internal error; see the log: KeyError; again in 1 s" in caplog.text
        )
        [row] = await world.store.logs(job_id, 1)
        assert (row.status, row.message) == ("error", "internal error; see the log: KeyError")
        assert (await service.stats()).errors == 1

        async def recovered() -> bool:
            return (await world.get(job_id)).last_error is None

        await until(recovered)
    finally:
        await service.drain()


async def test_a_damaged_row_is_its_job_s_error(world: World) -> None:
    """The others go on, and the job says what is wrong with it."""
    broken = await watch(world, "batch_broken", poll_interval=1)
    await watch(world, "batch_fine", poll_interval=1)
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        other.execute("UPDATE polling_jobs SET spec = '{}' WHERE id = ?", [broken])
    async with running(world) as service:
        await until(lambda: checks(world, "batch_fine") > 1)
        said = (await service.operations.job(str(broken))).last_error
        assert said is not None and "is damaged" in said


async def test_no_step_is_begun_while_the_store_cannot_be_written(world: World) -> None:
    """Another process holds its lock: OpenAI is asked no more than once a job, health says why,
    and all goes on when the lock is gone."""
    for n in range(5):
        await watch(world, f"batch_{n}", poll_interval=1)
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        async with running(world) as service:
            await until(lambda: world.openai.request_count > 2)
            other.execute("BEGIN IMMEDIATE")
            await until(lambda: service.store_error is not None, 10)
            asked = world.openai.request_count
            await until(lambda: not any(timer.busy for timer in service._timers.values()))
            health = await service.health()
            assert health.status == "degraded" and "locked" in health.problems[0]
            began = time.monotonic()
            await until(lambda: time.monotonic() > began + 2)
            assert world.openai.request_count <= asked + 5
            other.execute("ROLLBACK")
            await until(lambda: world.openai.request_count > asked + 10, 20)
            assert (await service.health()).problems == []


async def test_a_step_goes_on_while_its_job_leaves_and_comes_back(world: World) -> None:
    """Paused and resumed during a check that hangs: there is never a second one beside it."""
    job_id = await watch(world, "batch_hung", poll_interval=1)
    gate = world.openai.gate("GET /v1/batches/batch_hung", after_acting=False)
    async with running(world) as service:
        await gate.areached()
        for change in (world.store.pause_job, world.store.resume_job):
            await change(job_id, time.time())
            await until(lambda: not service.stale and synced(world, service))
        assert checks(world, "batch_hung") == 1
        gate.release()
        await until(lambda: checks(world, "batch_hung") >= 2)


async def synced(world: World, service: tecko.Service) -> bool:
    """Whether the service has seen all that the world's store committed."""
    return service._seen_version == await service.store.data_version()


# ── The scheduler ─────────────────────────────────────────────────────────────────────────────


async def test_no_check_is_dropped_by_the_scheduler(world: World) -> None:
    """However late, a due time counts, once; there is no jitter, and no job beside itself."""
    for n in range(3):
        await watch(world, f"batch_{n}")
    async with running(world) as service:
        assert len(timers(service)) == 3
        for job in timers(service):
            assert (job.misfire_grace_time, job.coalesce, job.max_instances) == (None, True, 1)
            assert job.trigger.jitter is None


@pytest.mark.parametrize("step", [600.0, -600.0, 28800.0, 3.0, 1.0, -1.0])
async def test_due_times_move_with_the_clock(step: float) -> None:
    """A clock that is set moves all due times by as much; one that strays a little moves none."""
    scheduler, due = tecko.make_scheduler(), datetime.now(UTC) + timedelta(hours=9)
    jobs = [
        scheduler.add_job(print, "interval", hours=1, next_run_time=due + timedelta(seconds=n))
        for n in range(3)
    ]
    scheduler.start()
    scheduler.offset -= step  # what the guard remembers of the clock before it was set
    scheduler._process_jobs()
    moved = timedelta(seconds=step if abs(step) > tecko.CLOCK_JUMP else 0)
    for n, job in enumerate(jobs):
        off = job.next_run_time - (due + timedelta(seconds=n) + moved)
        assert abs(off.total_seconds()) < 0.1
    scheduler.shutdown(wait=False)


async def test_a_clock_set_back_does_not_stop_the_checks() -> None:
    """What was due soon is still due soon, though the clock shows ten minutes less by then."""
    scheduler, ran = tecko.make_scheduler(), asyncio.Event()
    later = datetime.now(UTC) + timedelta(seconds=600.2)
    scheduler.add_job(ran.set, "interval", hours=1, next_run_time=later)
    scheduler.start()
    scheduler.offset += 600
    scheduler.wakeup()
    await asyncio.wait_for(ran.wait(), 5)
    scheduler.shutdown(wait=False)


@settings(deadline=None)
@given(job_id=st.integers(1, 10**9), interval=st.integers(1, 86400), jobs=st.integers(1, 10**6))
def test_a_first_check_is_within_the_interval(job_id: int, interval: int, jobs: int) -> None:
    """Never negative, never a whole interval late, and at once where there are few jobs."""
    wait = tecko.phase(job_id, interval, jobs)
    assert 0 <= wait < interval and wait <= jobs / tecko.START_RATE
    assert wait == tecko.phase(job_id, interval, jobs)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 10**6), interval=st.sampled_from([30, 120, 3600]))
def test_first_checks_are_spread_evenly(first: int, interval: int) -> None:
    """10,000 ids in a row, whatever the first: each of 50 equal spans has about a fiftieth."""
    span = min(interval, 10_000 / tecko.START_RATE) / 50
    buckets = Counter(
        int(tecko.phase(n, interval, 10_000) / span) for n in range(first, first + 10_000)
    )
    assert len(buckets) == 50 and max(buckets.values()) <= 204 and min(buckets.values()) >= 196


@settings(deadline=None)
@given(st.floats(1.6e9, 4e9))
def test_due_times_lie_on_the_grid(at: float) -> None:
    """The next point, so that nothing is early, and at most one step late."""
    due = tecko.on_grid(at)
    assert due.tzinfo is UTC and due.timestamp() % tecko.GRID == 0
    assert 0 <= due.timestamp() - at < tecko.GRID


# ── Reload ────────────────────────────────────────────────────────────────────────────────────

FILE = """\
admin: {{host: 127.0.0.1, port: {port}}}
jobs:
  - name: from-file
    poll_interval: 3600
    watch: {{secret: openai, batch_ids: [batch_file]}}
    trigger:
      {{secret: {secret}, stack_url: "{stack}", component_id: c, configuration_id: "1"}}
"""


def write_file(world: World, **changed: object) -> None:
    """A jobs.yaml with one job."""
    values = {"secret": "keboola", "stack": world.keboola.url, "port": 8000} | changed
    world.config.path.write_text(FILE.format(**values))


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What the service manager hears."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        address = f"teckochecker-{os.getpid()}-{time.monotonic_ns()}"
        heard.bind("\0" + address)
        heard.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address)
        yield heard


async def hear(ear: socket.socket, word: str) -> str:
    """The next notification that contains `word`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        while word not in (said := (await loop.sock_recv(ear, 4096)).decode()):
            pass
    return said


async def test_reload_takes_up_a_new_file(world: World, ear: socket.socket) -> None:
    """A job added to jobs.yaml is checked, one taken out is not any more, and the service manager
    hears when it begins and when it is done."""
    world.openai.batch("batch_file")
    async with running(world) as service:
        write_file(world)
        service.reload.set()
        assert "MONOTONIC_USEC=" in await hear(ear, "RELOADING=1")
        assert await hear(ear, "READY=1")
        await until(lambda: checks(world, "batch_file"))
        world.config.path.write_text("jobs: []\n")
        service.reload.set()
        await hear(ear, "READY=1")
        await until(lambda: not timers(service))
    assert (await world.store.find_job("from-file")).shown_status == "removed"


async def test_reload_keeps_what_is_bound(
    world: World, ear: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Another address, database or log of the new file counts at the next start, and the log says
    so; the token, bounds and waits count at once."""
    async with running(world) as service:
        before = service.settings
        write_file(world, port=9)
        new = "DATABASE_URL=other.db\nADMIN_TOKEN=new-token-1\nLOG_FORMAT=json\nRETRY_DELAY=7\n"
        (world.config.path.parent / ".env").write_text(new)
        service.reload.set()
        await hear(ear, "READY=1")
        for name in tecko.BOUND_AT_START:
            assert getattr(service.settings, name) == getattr(before, name), name
        assert service.settings.retry_delay == 7 and before.retry_delay == 60
        token = service.settings.admin_token
        assert token is not None and token.reveal() == "new-token-1"
        assert "only by a restart: database, api_port, log_format" in caplog.text


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BAD: dict[str, Callable[[World, Path], object]] = {
    "not YAML": lambda world, folder: world.config.path.write_text("jobs: ["),
    "not text": lambda world, folder: world.config.path.write_bytes(b"\xff\xfe\xfd"),
    "unknown key": lambda world, folder: world.config.path.write_text("jops: []"),
    "unknown secret": lambda world, folder: write_file(world, secret="nobody"),
    "gone": lambda world, folder: world.config.path.unlink(),
    "empty": lambda world, folder: world.config.path.write_text(""),
    "without jobs": lambda world, folder: world.config.path.write_text("database: teckochecker.db"),
    "a folder": lambda world, folder: become_a_folder(world.config.path),
    "a pipe": lambda world, folder: become_a_pipe(world.config.path),
    ".env is not text": lambda world, folder: (folder / ".env").write_bytes(b"A=\xff\xfe\n"),
    "bad setting": lambda world, folder: (folder / ".env").write_text("MAX_RETRIES=lots\n"),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=list(BAD))
async def test_a_bad_reload_keeps_the_old_configuration(
    world: World,
    ear: socket.socket,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[World, Path], object],
) -> None:
    """It is said in the log, the service manager hears that it goes on, and the job stays."""
    world.openai.batch("batch_file")
    write_file(world)
    world.config = tecko.load_config(world.config.path, dict(world.config.env))
    async with running(world) as service:
        old = service.steps.config
        spoil(world, world.config.path.parent)
        service.reload.set()
        await hear(ear, "RELOADING=1")
        await hear(ear, "READY=1")
        assert "reload refused" in caplog.text and service.steps.config is old
        health = await service.health()
        assert health.status == "degraded" and not health.config_last_reload_successful
    assert (await world.store.find_job("from-file")).shown_status == "active"


async def until_job(world: World, job_id: int, met: Callable[[tecko.Job], object]) -> None:
    async def holds() -> object:
        return met(await world.get(job_id))

    await until(holds)


async def test_a_replaced_secret_makes_its_jobs_due(world: World) -> None:
    """A refused key is waited with for longer and longer; a new one is tried at once."""
    world.openai.batch("batch_1")
    await world.secret("openai", "openai", "sk-a-refused-key-0123", replace=True)
    job_id = await world.job(poll_interval=3600)
    async with running(world):
        await until_job(world, job_id, lambda job: job.errors_in_row > 0)
        await world.secret("openai", "openai", standins.OPENAI_KEY, replace=True)
        await until_job(world, job_id, lambda job: job.last_error is None)


async def test_a_start_waits_for_a_foreign_lock(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and goes on when the lock is gone."""
    caplog.set_level("INFO", logger="teckochecker")
    write_file(world)
    world.config = tecko.load_config(world.config.path, dict(world.config.env))
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        async def start() -> None:
            async with running(world):
                pass

        starting = asyncio.create_task(start())
        await until(lambda: "waiting for another process that has locked" in caplog.text)
        assert not starting.done()
        other.execute("ROLLBACK")
        await asyncio.wait_for(starting, 20)


# ── Drain ─────────────────────────────────────────────────────────────────────────────────────


async def test_drain_lets_the_check_in_flight_finish(world: World) -> None:
    """What was asked is answered and recorded, nothing that falls due is begun, and no task is
    left."""
    flying = await watch(world, "batch_flying")
    await watch(world, "batch_due", poll_interval=1)
    gate = world.openai.gate("GET /v1/batches/batch_flying", after_acting=False)
    before = asyncio.all_tasks()
    async with running(world) as service:
        await gate.areached()
        await until(lambda: checks(world, "batch_due"))
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        begun, passed = checks(world, "batch_due"), time.time() + 1 + 2 * tecko.GRID
        await until(lambda: time.time() > passed)
        assert checks(world, "batch_due") == begun and not draining.done()
        gate.release()
        await draining
        assert timers(service) == []
    assert asyncio.all_tasks() == before
    assert (await world.get(flying)).last_check_at is not None


async def test_drain_finishes_a_trigger_on_the_wire(world: World) -> None:
    """Keboola took the job and has not answered yet: the answer is waited for and written down."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    gate = world.keboola.gate("POST /jobs", after_acting=True)
    async with running(world) as service:
        await gate.areached()
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        gate.release()
        await draining
    [trigger] = await world.store.triggers(job_id)
    assert (trigger.state, trigger.keboola_job_id) == ("running", world.keboola.created[0]["id"])


async def test_a_start_that_fails_closes_everything(world: World) -> None:
    """A job with an unknown secret: Invalid, and neither a task nor an open store is left."""
    write_file(world, secret="nobody")
    world.config = tecko.load_config(world.config.path, dict(world.config.env))
    tasks, threads = asyncio.all_tasks(), threading.active_count()
    with pytest.raises(tecko.Invalid, match="there is no secret 'nobody'"):
        async with running(world):
            pass
    assert asyncio.all_tasks() == tasks
    await until(lambda: threading.active_count() == threads)


# ── Figures ───────────────────────────────────────────────────────────────────────────────────

HEALTH = {
    "status": "healthy",
    "version": tecko.VERSION,
    "database": "connected",
    "db_connected": True,
    "scheduler": "running",
    "overdue_jobs": [],
}


async def test_healthy(world: World) -> None:
    """All of the published fields, from the start on."""
    async with running(world) as service:
        said = await service.health()
    shown = said.model_dump(mode="json")
    assert shown | HEALTH == shown and shown["uptime_seconds"] >= 0
    assert datetime.fromisoformat(shown["timestamp"]).tzinfo is not None


async def test_degraded_while_a_job_is_overdue(world: World) -> None:
    """Three intervals without a good check: the job is named; after a good one it is healthy."""
    world.openai.fault("GET /v1/batches/batch_1", standins.Fault.status(500), times=None)
    world.clock.turn(-10_000)
    await watch(world, "batch_1", "behind", poll_interval=1)
    await watch(world, "batch_2", "fine", poll_interval=1)
    async with running(world) as service:
        assert (await service.health()).status == "healthy"  # it has only just begun to look
        await until(lambda: service.metrics.total(service.metrics.upstream_errors))
        service.started_at -= 5_000
        await until(lambda: checks(world, "batch_2"))

        async def only_behind() -> bool:  # the other one's check is written down by the next tick
            said = await service.health()
            return (said.status, said.overdue_jobs) == ("degraded", ["behind"])

        await until(only_behind)
        world.openai.heal()

        async def healthy() -> bool:
            said = await service.health()
            return not said.overdue_jobs and said.status == "healthy"

        await until(healthy)


async def test_unhealthy(world: World) -> None:
    """Without timers, when the ticks have stopped, when the store does not answer."""
    async with running(world, timers=False) as service:
        said = await service.health()
        assert (said.status, said.scheduler) == ("unhealthy", "stopped")
    async with running(world) as service:
        service._scheduler.pause()
        await until(lambda: not service._tasks)
        service._ticked -= tecko.STALLED_TICKS + 1
        said = await service.health()
        assert (said.status, said.scheduler) == ("unhealthy", "stalled")
        service._scheduler.resume()
        await until(lambda: time.monotonic() - service._ticked < tecko.STALLED_TICKS)
        await service.store.close()
        said = await service.health()
        assert (said.status, said.database) == ("unhealthy", "disconnected")
        assert said.db_connected is False


GOOD: dict[str, Any] = {
    **{"timestamp": 1.0, "version": "1", "uptime_seconds": 1.0, "db_connected": True},
    **{"scheduler": "running", "config_last_reload_successful": True},
    **{"config_last_reload_at": 1.0, "config_last_reload_error": None},
}
JUDGED: list[tuple[dict[str, Any], str | None, str | None, str, str]] = [
    ({}, None, None, "healthy", ""),
    ({"db_connected": False}, None, None, "unhealthy", "the database does not answer"),
    ({}, "it is gone", None, "unhealthy", "the database was deleted, replaced"),
    ({}, None, "disk full", "unhealthy", "the database was deleted, replaced"),
    ({}, None, "database is locked", "degraded", "another process has locked the database"),
    ({"scheduler": "stalled"}, None, None, "unhealthy", "the scheduler is stalled"),
    ({"overdue_jobs": ["a"]}, None, None, "degraded", "1 active job without a successful"),
    ({"undelivered_jobs": ["a", "b"]}, None, None, "degraded", "2 triggers not delivered"),
    ({"config_last_reload_successful": False}, None, None, "degraded", "the last reload was"),
    ({"overdue_jobs": ["a"]}, None, "disk full", "unhealthy", "the database was deleted, replaced"),
]


@pytest.mark.parametrize(("facts", "file", "store", "status", "said"), JUDGED)
def test_judged(
    facts: dict[str, Any], file: str | None, store: str | None, status: str, said: str
) -> None:
    """Unhealthy where nothing can go on, degraded where something does not; the worst first."""
    health = tecko.with_status(tecko.Health(**(GOOD | facts)), file, store)
    assert (health.status, bool(health.problems)) == (status, status != "healthy")
    assert not said or health.problems[0].startswith(said)
    assert all(name not in "".join(health.problems) for name in ("'a'", "'b'"))


async def test_a_trigger_that_is_not_delivered(world: World) -> None:
    """Keboola's index answers 503 for longer than three intervals and the settle window: health
    is degraded and names the job, and a metric tells the trigger's age."""
    world.openai.batch("batch_1", "completed")
    world.keboola.fault("GET /v2/storage", standins.Fault.status(503), times=None)
    world.clock.turn(-1000)
    await world.steps.step(await world.job("behind", poll_interval=60))
    async with running(world) as service:
        said = await service.health()
        assert (said.status, said.undelivered_jobs) == ("degraded", ["behind"])
        [age] = re.findall(
            r"^teckochecker_oldest_open_trigger_seconds (\S+)$", await service.metrics_text(), re.M
        )
        assert 1000 <= float(age) < 2000
        world.keboola.heal()
        await service.check_now("behind")

        async def delivered() -> bool:
            return not (await service.health()).undelivered_jobs

        await until(delivered)


async def test_what_waits_for_a_person(world: World) -> None:
    """A failed job is in `attention` with its reason, though nothing is wrong with the program;
    a caller without a token sees neither."""
    world.openai.batch("batch_1", "failed")
    await world.steps.step(await world.job("nightly"))
    async with running(world) as service:
        said = await service.health()
        assert said.status == "healthy" and said.attention[0].job == "nightly"
        assert said.attention[0].what == "failed" and "batch_1" in str(said.attention[0].reason)
        assert said.anonymous().attention == [] and said.anonymous().status == "healthy"


@pytest.mark.parametrize("what", ["deleted", "replaced"])
async def test_a_database_file_that_is_not_ours_any_more(world: World, what: str) -> None:
    """One look a tick: unhealthy, and it says what happened."""
    async with running(world) as service:
        path = service.store.path
        path.rename(path.with_name("moved.db"))
        if what == "replaced":
            path.touch()
        said = await service.health()
        assert said.status == "unhealthy" and "deleted, replaced" in said.problems[0]


async def test_who_asks_for_health_at_one_moment_shares_an_answer(world: World) -> None:
    """Health is made once for all who ask together, and anew for who asks later."""
    async with running(world) as service:
        first, second = await asyncio.gather(service.shared_health(), service.shared_health())
        assert first is second
        assert await service.shared_health() is not first


async def test_health_waits_for_no_writer(world: World) -> None:
    """Another process holds the store's lock and a write of ours waits for it: health answers
    meanwhile, and says that the database is connected."""
    await watch(world, "batch_1", poll_interval=1)
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        async with running(world) as service:
            other.execute("BEGIN IMMEDIATE")
            write = asyncio.create_task(service.store.log_event("error", "", 0.0))
            await asyncio.sleep(0)
            async with asyncio.timeout(2):
                said = await service.health()
            assert said.database == "connected" and not write.done()
            other.execute("ROLLBACK")
            await write


async def test_metrics(world: World) -> None:
    """What Prometheus can read: by job, of the process, and of a job that has gone nothing."""
    world.openai.batch("batch_1", "failed")
    job_id = await world.job("nightly")
    async with running(world) as service:
        await until(lambda: service.metrics.total(service.metrics.checks))
        text = await service.metrics_text()
        assert 'teckochecker_job_state{job="nightly",status="failed"} 1.0' in text
        assert 'teckochecker_job_last_success_timestamp_seconds{job="nightly"} ' in text
        assert "process_open_fds" in text and "_created" not in text
        await service.store.delete_job(job_id, 0.0)
        assert "nightly" not in await service.metrics_text()


async def test_stats(world: World) -> None:
    """How much there is of what, and what was done."""
    world.openai.batch("batch_1", "completed")
    ids = [await world.job(name) for name in "abc"]
    await world.store.pause_job(ids[0], 0.0)
    await world.store.sync_file_jobs([], 0.0)
    async with running(world) as service:
        await until(
            lambda: (
                len(world.keboola.created) == 2
                and service.metrics.total(service.metrics.checks) >= 2
            )
        )
        await until(lambda: not service._tasks)
        said = await service.stats()
        logs = await world.store.logs(None, 999)
    assert (said.total_jobs, said.paused_jobs, said.active_jobs) == (3, 1, 0)
    assert (said.total_secrets, said.triggers, said.errors) == (2, 2, 0)
    assert said.checks >= 2 and said.total_logs == len(logs)
    assert (said.completed_jobs, said.failed_jobs) == (0, 0)


# ── The service manager, and one process per database ─────────────────────────────────────────


@pytest.mark.parametrize("kind", ["abstract", "path"])
def test_the_service_manager_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One datagram of lines, to an abstract address or a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        name = f"tecko-{time.monotonic_ns()}"
        ear.bind("\0" + name if kind == "abstract" else str(tmp_path / "n"))
        ear.settimeout(5)
        address = "@" + name if kind == "abstract" else str(tmp_path / "n")
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        tecko.notify("READY=1", "STATUS=fine")
        assert ear.recv(4096) == b"READY=1\nSTATUS=fine"


@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all", "@nobody-listens", "x" * 200])
def test_without_a_service_manager(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """Nobody there, or nobody who listens: nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    tecko.notify("READY=1")


async def test_the_watchdog_is_fed_by_ticks(world: World, ear: socket.socket) -> None:
    """Each tick that got through to the store feeds it; without timers nobody does."""
    async with running(world) as service:
        for _ in range(2):
            await hear(ear, "WATCHDOG=1")
        await service.store.close()
        with contextlib.suppress(BlockingIOError):
            while ear.recv(4096):
                pass
        ticked = service._ticked
        with pytest.raises(tecko.StoreError):
            await service._tick()
        with pytest.raises(BlockingIOError):
            ear.recv(4096)
        assert service._ticked == ticked


HOLDER = """
import sys
import tempfile
import teckochecker as tecko
with tecko.RunLock(tecko.Path(sys.argv[1]), sys.argv[2]) as lock:
    lock.write("http://127.0.0.1:2", 1.0)
    print("held", flush=True)
    sys.stdin.readline()
    lock.hold()
    print("still", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def held(folder: Path, database: str = "t.db", command: str = "start") -> Iterator[Any]:
    """Another process that holds the run lock of a database."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, database, command],
        cwd=folder,
        env=clean_environment({"PYTHONPATH": str(PROGRAM.parent)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def link_folder(folder: Path) -> Path:
    (folder / "there").symlink_to(folder)
    return folder / "there" / "t.db"


def link_file(folder: Path) -> Path:
    (folder / "other.db").symlink_to(folder / "t.db")
    return folder / "other.db"


@pytest.mark.parametrize("spell", [lambda f: f / "t.db", link_folder, link_file])
def test_a_second_process_is_refused(tmp_path: Path, spell: Callable[[Path], Path]) -> None:
    """By whatever name it calls the database; it is told who works on it."""
    (tmp_path / "t.db").touch()
    with held(tmp_path) as process:
        other = spell(tmp_path)
        with pytest.raises(tecko.Conflict) as e, tecko.RunLock(other):
            pass
        assert f"pid {process.pid}" in str(e.value)
        found = tecko.holder(tmp_path / "t.db")
        assert found == (process.pid, 1.0, "http://127.0.0.1:2", "start")
        assert (tmp_path / "t.db.pid").read_text() == f"{process.pid}\n"
        assert (tmp_path / "t.db.lock").stat().st_mode & 0o777 == 0o600


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    """After kill -9 its files are still there, and hold nobody up."""
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert (tmp_path / "t.db.lock").read_text() and tecko.holder(tmp_path / "t.db") is None
    with held(tmp_path) as process:
        found = tecko.holder(tmp_path / "t.db")
        assert found is not None and found.pid == process.pid


def test_a_check_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A start that meets a `check` says so and goes on when that has ended; it gives up after its
    time."""
    with held(tmp_path, command="check") as process:
        database = tmp_path / "t.db"
        with pytest.raises(tecko.Conflict), tecko.RunLock(database, wait=0.2):
            pass
        end = threading.Timer(0.1, process.kill)
        end.start()
        with tecko.RunLock(database, wait=60):
            end.join()
    assert f"waiting for TeckoChecker check (pid {process.pid})" in caplog.text


def test_a_deleted_lock_file_is_locked_again(tmp_path: Path) -> None:
    """Whoever deletes it opens no door: the next tick puts it back."""
    with held(tmp_path) as process:
        (tmp_path / "t.db.lock").unlink()
        assert tecko.holder(tmp_path / "t.db") is None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"still\n"
        found = tecko.holder(tmp_path / "t.db")
        assert found == (process.pid, 1.0, "http://127.0.0.1:2", "start")


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    """A folder that is not there: a StoreError that names the file."""
    missing = tmp_path / "x" / "t.db"
    with pytest.raises(tecko.StoreError, match=r"t\.db\.lock"), tecko.RunLock(missing):
        pass
    assert tecko.holder(missing) is None


AS_NOBODY = """
import encodings.utf_8_sig, os, pathlib, sys, teckochecker
teckochecker.load_config(pathlib.Path("jobs.yaml"), {})  # imports what nobody may not read
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(teckochecker.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("command", ["stop", "check", "reload"])
def test_another_user_is_told_at_once_whose_service_it_is(command: str) -> None:
    """A user who may not read the lock is told the pid, and does not wait for an answer."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        (Path(folder) / "jobs.yaml").write_text("jobs: []\n")
        with tecko.RunLock(Path(folder) / "teckochecker.db"):
            told = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, command],
                cwd=folder,
                env=clean_environment({"PYTHONPATH": str(PROGRAM.parent)}),
                capture_output=True,
                text=True,
                timeout=25,
                check=False,
            )
    assert told.returncode == 1, told.stderr
    assert f"pid {os.getpid()} belongs to another user, who has to do this" in told.stderr
