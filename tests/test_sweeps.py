"""Many checks out of one list: what they conclude, what they ask for, and who has to wait."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import sqlite3
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import standins
from conftest import Clock, World, make_world
from hypothesis import given
from hypothesis import strategies as st
from standins import Fault

import teckochecker as tecko

LIST, RETRIEVE = "GET /v1/batches", "GET /v1/batches/*"
KEY, OTHER = standins.OPENAI_KEY, "sk-standin-other"
INTERVAL = 120  # s, the default

Given = pytest.mark.parametrize


def asked(openai: standins.OpenAI) -> tuple[int, int]:
    """Pages and single batches asked for."""
    return openai.count(LIST), openai.count(RETRIEVE)


async def watch(world: World, count: int, **flat: Any) -> list[int]:
    """Jobs for as many batches in progress, one each, the last one the newest."""
    names = [f"batch_{n}" for n in range(count)]
    world.openai.many(KEY, names)
    return [await world.job(name, batch_ids=[name], **flat) for name in names]


def batch(world: World, number: int) -> standins.Batch:
    return world.openai._projects[f"Bearer {KEY}"].batches[f"batch_{number}"]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became true")


# ── What is concluded ─────────────────────────────────────────────────────────────────────────

status = st.sampled_from(["in_progress"] * 4 + ["validating", "finalizing", "completed"])
status |= st.sampled_from(["failed", "expired", "cancelled", "odd", None])  # None: deleted
life = st.lists(status, min_size=3, max_size=3)
job = st.tuples(st.sampled_from([KEY, OTHER]), st.lists(life, min_size=1, max_size=3))


@hypothesis.settings(deadline=None, max_examples=15)
@given(st.lists(job, min_size=3, max_size=9), st.integers(0, 220), st.sampled_from([0, 60, 9000]))
def test_coalesced_checks_conclude_what_plain_ones_do(
    jobs: Sequence[tuple[str, list[list[str | None]]]], foreign: int, between: int
) -> None:
    """Job by job, in every field, over three rounds of random lives of batches, with foreign
    batches in between, batches deleted, and two keys that have the same ids."""
    asyncio.run(compare(jobs, foreign, between))


async def compare(
    jobs: Sequence[tuple[str, list[list[str | None]]]], foreign: int, between: int
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        openai = stack.enter_context(standins.OpenAI())
        keboola = stack.enter_context(standins.Keboola())
        worlds = [await twin(stack, openai, keboola) for _ in range(2)]
        start = int(worlds[0].clock()) - 10_000
        worlds[1].clock.now = worlds[0].clock.now
        for key in (KEY, OTHER):
            openai.key(key)
            names = [f"batch_foreign_{n}" for n in range(foreign)]
            openai.many(key, names, created_at_start=start + between - foreign // 2)
        for number, (key, lives) in enumerate(jobs):
            ids = [f"batch_{number}_{n}" for n in range(len(lives))]
            for name in ids:
                openai.batch(name, "failed", key=OTHER if key == KEY else KEY, created_at=start)
            for world in worlds:
                secret = "openai" if key == KEY else "other"
                await world.job(str(number) + "-job", batch_ids=ids, openai_secret=secret)
        for round_ in range(3):
            live(openai, jobs, start, round_)
            all_jobs = range(1, len(jobs) + 1)
            await worlds[0].steps.step_all(all_jobs)
            for job_id in all_jobs:
                await worlds[1].steps.step(job_id)
            for job_id in all_jobs:
                assert await concluded(worlds[0], job_id) == await concluded(worlds[1], job_id)
            for world in worlds:
                world.clock.turn(INTERVAL)


async def twin(
    stack: contextlib.AsyncExitStack, openai: standins.OpenAI, keboola: standins.Keboola
) -> World:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    world, close = await make_world(folder, openai, keboola, {})
    stack.push_async_callback(close)
    await world.secret("openai", "openai", KEY)
    await world.secret("other", "openai", OTHER)
    await world.secret("keboola", "keboola", standins.KEBOOLA_TOKEN)
    return world


def live(openai: standins.OpenAI, jobs: Sequence[tuple[str, Any]], start: int, round_: int) -> None:
    """Make every batch what it is in this round."""
    for number, (key, lives) in enumerate(jobs):
        for n, life in enumerate(lives):
            name = f"batch_{number}_{n}"
            openai.remove(name, key=key)
            if life[round_] is not None:
                made = start + 97 * number + n
                openai.batch(name, life[round_], key=key, created_at=made, completed=round_ + 1)


async def concluded(world: World, job_id: int) -> tuple[Any, ...]:
    """All that is known of a job, but for ids that are drawn."""
    job = dataclasses.asdict(await world.get(job_id))
    batches, triggers = await world.store.batches(job_id), await world.store.triggers(job_id)
    said = (job.pop("last_error") or "").split("; ")  # whoever failed first is told first
    logs = [row.status for row in await world.store.logs(job_id, 100)]
    return job, sorted(said), batches, [(t.state, t.round, t.partial) for t in triggers], logs


async def test_pages_that_shift_while_they_are_read(world: World) -> None:
    """Between two pages new batches come, one that was read is deleted, one is done: nothing is
    read as missing, and what was done is triggered."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.steps.step_all(ids))
    await gate.areached()
    for n in range(30):
        world.openai.batch(f"batch_new_{n}")
    batch(world, 3).become("completed")
    world.openai.remove("batch_120")
    gate.release()
    await stepping
    assert [len(world.keboola.created), await missing(world, ids)] == [1, []]
    world.clock.turn(INTERVAL)
    await world.steps.step_all([n for n in ids if n != ids[3]])
    assert await missing(world, ids) == [ids[120]]


async def test_a_page_whose_cursor_is_gone(world: World) -> None:
    """The last batch of a page is deleted before the next one is asked for: the list ends there,
    and what it did not show is asked for singly."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.steps.step_all(ids))
    await gate.areached()
    world.openai.remove("batch_50")
    gate.release()
    await stepping
    assert asked(world.openai) == (2, 50) and await missing(world, ids) == []


async def missing(world: World, ids: Sequence[int]) -> list[int]:
    return [n for n in ids if any(b.missing_checks for b in await world.store.batches(n))]


# ── What is asked for ─────────────────────────────────────────────────────────────────────────


async def test_one_page_answers_a_hundred_checks(world: World) -> None:
    """At the first look already, and at each round; half an interval later it is too old."""
    ids = await watch(world, 100)
    for pages in (1, 2):
        await world.steps.step_all(ids)
        assert asked(world.openai) == (pages, 0)
        world.clock.turn(INTERVAL)
    assert {(await world.get(n)).last_error for n in ids} == {None}


async def test_a_snapshot_answers_who_is_due_a_little_later(world: World) -> None:
    """Up to half an interval; and whoever asks during a sweep waits for the same one."""
    ids = await watch(world, 100)
    gate = world.openai.gate(LIST, after_acting=False)
    both = [asyncio.create_task(world.steps.step_all(some)) for some in (ids[:20], ids[20:40])]
    await gate.areached()
    gate.release()
    await asyncio.gather(*both)
    world.clock.turn(INTERVAL / 2)
    await world.steps.step_all(ids[40:60])
    assert asked(world.openai) == (1, 0)


async def test_few_batches_are_asked_for_singly(world: World) -> None:
    """Two in an account cost two requests; nor does one that many foreign ones came after lead
    through pages that bring nothing."""
    ids = await watch(world, 2)
    await world.steps.step_all(ids)
    assert asked(world.openai) == (0, 2)


async def test_a_list_that_does_not_pay_is_left_alone(world: World) -> None:
    """Watched ones deep below a thousand foreign ones: one page tells, and is not asked again."""
    ids = await watch(world, 10)
    world.openai.many(KEY, [f"batch_foreign_{n}" for n in range(1000)], created_at_start=2**31)
    for _ in range(3):
        await world.steps.step_all(ids)
        world.clock.turn(INTERVAL)
    assert asked(world.openai) == (1, 30)


async def test_a_batch_from_long_ago_costs_one_request_not_the_whole_list(world: World) -> None:
    """Thirty new ones and an old one with a thousand in between: a page and a retrieve."""
    world.openai.batch("batch_old", created_at=1000)
    old = await world.job("old", batch_ids=["batch_old"])
    await world.steps.step(old)
    world.openai.many(KEY, [f"batch_foreign_{n}" for n in range(1000)], created_at_start=2000)
    ids = await watch(world, 30)
    await world.steps.step_all(ids)
    world.clock.turn(INTERVAL)
    before = asked(world.openai)
    await world.steps.step_all([old, *ids])
    pages, singly = asked(world.openai)
    assert (pages - before[0], singly - before[1]) == (1, 1)


async def test_a_host_without_a_list(world: World) -> None:
    """Each batch is asked for singly, and the list is not tried at each check."""
    ids = await watch(world, 10)
    world.openai.fault(LIST, Fault.status(404), times=None)
    for _ in range(2):
        await world.steps.step_all(ids)
        world.clock.turn(INTERVAL)
    assert asked(world.openai) == (1, 20)


@Given("created_at", [0, 1, 2**31, None, "soon"])
async def test_a_list_that_never_ends(world: World, created_at: object) -> None:
    """The same page again and again, whatever it comes after: it costs less than single checks."""
    ids = await watch(world, 20)
    for job_id in ids:
        await world.steps.step(job_id)
    before = asked(world.openai)[1]
    items = [{"id": f"batch_x{n}", "status": "completed"} for n in range(100)]
    page = [item | {"created_at": created_at} for item in items]
    world.openai.fault(LIST, Fault.json({"data": page, "has_more": True}), times=None)
    world.clock.turn(INTERVAL)
    await world.steps.step_all(ids)
    pages, singly = asked(world.openai)
    assert 1 <= pages <= 10 and singly - before == 20


async def test_someone_who_asks_gets_an_answer_of_now(world: World) -> None:
    """Not what a list showed a moment ago."""
    ids = await watch(world, 10)
    await world.steps.step_all(ids)
    await world.steps.step(ids[0], (False, 0.0))
    assert asked(world.openai) == (1, 1)


async def test_from_done_to_triggered_in_one_step(world: World) -> None:
    """A page shows it, one request confirms it, and Keboola has the trigger by its end."""
    ids = await watch(world, 10)
    await world.steps.step_all(ids)
    world.clock.turn(INTERVAL)
    batch(world, 4).become("completed")
    await world.steps.step_all(ids)
    assert asked(world.openai) == (2, 1)
    assert (await world.get(ids[4])).status == "triggered" and len(world.keboola.created) == 1


async def test_later_pages_do_not_wait_for_each_other(world: World) -> None:
    """The first sweep takes its pages in turn, the next one all at once, also when new batches
    came in or the last of a page was deleted; and it costs hardly more of them."""
    ids = await watch(world, 450)
    await world.steps.step_all(ids)
    assert asked(world.openai) == (5, 0)
    for came, gone, pages, singly in ((0, None, 5, 0), (30, None, 6, 0), (0, 350, 6, 100)):
        world.openai.many(KEY, [f"batch_new_{n}" for n in range(came)], created_at_start=2**31)
        if gone is not None:
            world.openai.remove(f"batch_{gone}")
        before = asked(world.openai)
        gates = [world.openai.gate(LIST, after_acting=False) for _ in range(4)]
        world.clock.turn(INTERVAL)
        stepping = asyncio.create_task(world.steps.step_all(ids))
        for gate in gates:
            await gate.areached()
        world.openai.release_all()
        await stepping
        after = asked(world.openai)
        assert after[0] - before[0] <= pages and after[1] - before[1] <= singly
    assert await missing(world, ids) == [ids[350]]


async def test_whose_batch_is_listed_as_done_need_not_wait(world: World) -> None:
    """A list that others asked for shows it: its job is named, and the service checks it at once,
    an hour before it is due."""
    ids, named = await watch(world, 20, poll_interval=3600), list[int]()
    world.steps.on_finished = named.extend
    batch(world, 15).become("completed")
    await world.steps.step_all(ids[:10])
    assert named == [ids[15]] and asked(world.openai) == (1, 0)
    batch(world, 15).become("in_progress")
    async with tecko.make_service(world.config, lambda: world.config) as service:
        await until(lambda: service.counters["steps"] >= len(ids))
        batch(world, 15).become("completed")
        service.steps.on_finished(named)
        await until(lambda: world.keboola.created)
        await until(lambda: not service._tasks)
    assert (await world.get(ids[15])).status == "triggered"


async def other_batch(world: World, job_id: int) -> None:
    spec = (await world.get(job_id)).watches
    watched = spec.watch.model_copy(update={"batch_ids": ["batch_11"]})
    await world.store.update_job(job_id, lambda _: spec.model_copy(update={"watch": watched}), 0.0)


Change = Callable[[World, int], Any]
CHANGES: list[tuple[Change, str]] = [
    (lambda world, job_id: world.store.pause_job(job_id, 0.0), "changed while it was checked"),
    (lambda world, job_id: world.store.delete_job(job_id, 0.0), "nothing to do"),
    (other_batch, "0 of 1 batches done"),  # of the one that it watches now
]


@Given("change, said", CHANGES, ids=["paused", "deleted", "changed"])
async def test_a_job_that_changed_while_the_list_was_read(
    world: World, change: Change, said: str
) -> None:
    """The page decides nothing about it, and what is written down is about the job as it is."""
    ids = await watch(world, 12)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.steps.step_all(ids[:10]))
    await gate.areached()
    await change(world, ids[0])
    gate.release()
    assert (await stepping)[ids[0]].said == said
    await world.store.flush()
    job = await world.store.job(ids[0])
    batches = {batch.batch_id: batch.status for batch in await world.store.batches(ids[0])}
    expected = {"paused": {"batch_0": ""}, "active": {"batch_11": "in_progress"}}
    assert batches == (expected[job.status] if job else {})


# ── Keys that fail ────────────────────────────────────────────────────────────────────────────


async def test_a_list_that_fails_is_an_error_of_who_asked(world: World) -> None:
    """Of each job, and one failure for the key's circuit."""
    ids = await watch(world, 10)
    world.openai.fault(LIST, Fault.status(503))
    done = await world.steps.step_all(ids)
    assert asked(world.openai) == (1, 0) and all(s.error for s in done.values())
    for job_id in ids:
        job = await world.get(job_id)
        assert job.errors_in_row == 1 and "503" in (job.last_error or "")
    world.clock.turn(2)
    await world.steps.step_all(ids)
    assert asked(world.openai) == (2, 0) and (await world.get(ids[0])).last_error is None


async def test_a_later_page_that_fails_is_no_error_of_those_already_shown(world: World) -> None:
    """The first hundred are answered; the others are told the error."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.steps.step_all(ids))
    await gate.areached()
    world.openai.fault(LIST, Fault.status(500))
    gate.release()
    done = await stepping
    assert [n for n in ids if done[n].error] == ids[:50] and asked(world.openai) == (2, 0)


@Given("fault", [Fault.rate_limited(300), Fault.status(500), Fault.status(401)])
async def test_a_key_that_fails_delays_no_other(world: World, fault: Fault) -> None:
    """The other key's jobs are checked as ever, by one page."""
    await world.secret("other", "openai", OTHER)
    bad = await watch(world, 10)
    world.openai.many(OTHER, [f"batch_good_{n}" for n in range(10)])
    names = [f"batch_good_{n}" for n in range(10)]
    good = [await world.job(n, batch_ids=[n], openai_secret="other") for n in names]
    world.openai.fault("*", fault, times=None, key=KEY)
    for _ in range(3):
        done = await world.steps.step_all(bad + good)
        assert {n for n in done if done[n].error} == set(bad)
        world.clock.turn(INTERVAL)
    assert world.openai.count(RETRIEVE) == 0


@pytest.fixture
async def upstream(openai: standins.OpenAI) -> AsyncIterator[tuple[tecko.OpenAI, Clock]]:
    """Our OpenAI class with a clock to turn, on a stand-in that has batch_1."""
    openai.batch("batch_1")
    clock = Clock()
    made = tecko.OpenAI(openai.base_url, clock=clock)
    yield made, clock
    await made.close()


async def test_a_circuit_opens_tries_once_and_closes(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """After five failures nothing is asked, then one call after each pause, which doubles; a call
    that works ends it."""
    made, clock = upstream
    key, calls = tecko.SecretValue(KEY), []
    made.known_as(key, "prod")
    openai.fault("*", Fault.status(500), times=None)
    for _ in range(80):
        with pytest.raises(tecko.OpenAIError):
            await made.retrieve(key, "batch_1")
        calls.append(openai.request_count)
        clock.turn(10)
    tried = [n for n, (a, b) in enumerate(itertools.pairwise(calls), 1) if a != b]
    assert tried == [1, 2, 3, 4, 5, 7, 11, 19, 35, 65]  # 10 s, 20 s, 40 s, ... at most 300 s
    [(name, circuit, wait)] = made.open_circuits()
    assert (name, circuit.state, circuit.failures) == ("prod", "open", 11) and wait > 0
    with pytest.raises(tecko.OpenAIError, match=r"is not asked until .*: 11 failures in a row"):
        await made.retrieve(key, "batch_1")
    openai.heal()
    clock.turn(wait)
    assert (await made.retrieve(key, "batch_1")).status == "in_progress"
    assert made.open_circuits() == []


@Given("status", [400, 401, 403, 404, 409, 429])
async def test_an_answer_opens_no_circuit(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock], status: int
) -> None:
    """A host that says no works."""
    made, clock = upstream
    openai.fault("*", Fault.status(status), times=None)
    for _ in range(7):
        with pytest.raises(tecko.OpenAIError):
            await made.retrieve(tecko.SecretValue(KEY), "batch_1")
        clock.turn(10)
    assert (openai.request_count, made.open_circuits()) == (7, [])


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 700)), max_size=60))
def test_a_circuit_is_open_for_ten_seconds_to_five_minutes(calls: list[tuple[bool, float]]) -> None:
    """Only after five failures in a row, and each success closes it."""
    circuit, now = tecko.Circuit(), 0.0
    for failed, later in calls:
        now += later
        if circuit.pause and now < circuit.until:
            continue
        before = circuit
        circuit = tecko.call_ended(tecko.call_begun(before, now), before, failed, now)
        assert failed or circuit == tecko.Circuit()
        assert bool(circuit.pause) == (circuit.failures >= tecko.CIRCUIT_FAILURES)
        if circuit.pause:
            pause = circuit.until - now
            assert tecko.CIRCUIT_PAUSE - 1e-6 <= pause <= tecko.CIRCUIT_LONGEST + 1e-6


async def test_an_open_circuit_is_explained(world: World) -> None:
    """By the job's last error, which any process can read."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    world.openai.fault("*", Fault.status(500), times=None)
    for _ in range(6):
        await world.steps.step(job_id)
    desk = tecko.Desk(world.store, world.vault, lambda: world.config, world.clock)
    assert "5 failures in a row" in " ".join(await desk.explain(str(job_id)))


async def test_an_open_circuit_is_shown(world: World) -> None:
    """In /health and /metrics, by the secret's name."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    world.openai.fault("*", Fault.status(500), times=None)
    async with tecko.make_service(world.config, lambda: world.config, timers=False) as service:
        for _ in range(5):
            assert (await service.health()).circuits == []
            await service.steps.step(job_id)
        health, metrics = await service.health(), await service.metrics_text()
    [circuit] = health.circuits
    assert (circuit.secret, circuit.failures, circuit.state) == ("openai", 5, "open")
    assert circuit.host in world.openai.base_url and circuit.until > time.time()
    assert 'teckochecker_open_circuits{secret="openai"} 1.0' in metrics
    assert 'teckochecker_openai_requests_total{kind="retrieve"} 5.0' in metrics


# ── Turns ─────────────────────────────────────────────────────────────────────────────────────


async def test_slots_go_to_the_urgent_then_to_who_waited_longest() -> None:
    """And one that gave up waiting takes none."""
    slots, came = tecko.Slots(1), list[str]()

    async def call(name: str, rank: tecko.Rank) -> None:
        async with slots.turn(rank):
            came.append(name)
            await asyncio.sleep(0)

    ranks = {"late": (True, 3.0), "early": (True, 1.0), "gone": (True, 0.0), "asked": (False, 9.0)}
    async with slots.turn(tecko.NO_HURRY):
        tasks = {name: asyncio.create_task(call(name, rank)) for name, rank in ranks.items()}
        await asyncio.sleep(0)
        tasks["gone"].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert came == ["asked", "early", "late"]
    async with slots.turn(tecko.NO_HURRY):  # it came back
        pass


async def test_finalizing_batches_go_first(world: World) -> None:
    """Of jobs that are due together, and more than a key has slots for."""
    world.openai.fault(LIST, Fault.status(404), times=None)
    ids = await watch(world, 30)
    batch(world, 29).become("finalizing")
    await world.steps.step_all(ids)
    world.openai.requests.clear()
    world.clock.turn(INTERVAL)
    for _ in range(tecko.IN_FLIGHT_PER_KEY):
        world.openai.gate(RETRIEVE, after_acting=False)
    steps = [asyncio.create_task(world.steps.step(n, (True, float(n)))) for n in ids]
    [gate] = world.steps.openai._gates.values()
    await until(lambda: len(gate.slots._waiting) == len(ids) - tecko.IN_FLIGHT_PER_KEY)
    world.openai.release_all()
    await asyncio.gather(*steps)
    ninth = world.openai.requests[tecko.IN_FLIGHT_PER_KEY]
    assert ninth.path == "/v1/batches/batch_29"


async def test_a_budget_bounds_each_key(openai: standins.OpenAI) -> None:
    """A tenth of it at once, then evenly: so in no minute more than all of it."""
    openai.batch("batch_1")
    upstream = tecko.OpenAI(openai.base_url, per_minute=200)
    calls = [upstream.retrieve(tecko.SecretValue(KEY), "batch_1") for _ in range(22)]
    began = time.monotonic()
    await asyncio.gather(*calls)
    assert 1.8 * 60 / 180 < time.monotonic() - began < 10
    await upstream.close()


@given(st.integers(1, 100_000))
def test_a_budget_is_kept_in_every_minute(per_minute: int) -> None:
    """What is let through at once, and what flows in a minute after it."""

    async def rate() -> tuple[float, float]:
        limiter = tecko.budget(per_minute)
        assert limiter is not None
        return limiter.max_rate, limiter.max_rate / limiter.time_period * 60

    at_once, flow = asyncio.run(rate())
    assert at_once >= 1 and at_once + flow <= max(per_minute, 1.5) * (1 + 1e-9)


# ── poll_interval: auto ───────────────────────────────────────────────────────────────────────

T0 = 1_700_000_000.0


def seen(now: float, status: str = "in_progress", **facts: Any) -> tecko.Batch:
    given = {"created_at": T0, "expires_at": T0 + 86_400, "requests_total": 100, "changed_at": now}
    return tecko.Batch("batch_1", status, **(given | facts))


@given(st.floats(0, 90_000), st.integers(0, 100), st.sampled_from([*tecko.KNOWN_BATCH, "odd", ""]))
def test_auto_stays_within_its_bounds(age: float, done: int, status: str) -> None:
    """Whatever the batch says."""
    wait = tecko.auto_interval(
        [seen(T0 + age, status, requests_completed=done)], T0 + age, 30, 3600
    )
    assert 30 <= wait <= 3600


@hypothesis.settings(max_examples=200)
@given(st.floats(400, 86_000), st.booleans(), st.floats(0, 0.9))
def test_auto_is_late_by_less_than_a_twentieth(run: float, moves: bool, starts: float) -> None:
    """Half of the interval is what one waits on average; of a batch that moves evenly after some
    time, or of one that says nothing until it is done."""
    now = wait = T0
    while now < T0 + run:
        share = max(0.0, ((now - T0) / run - starts) / (1 - starts)) if moves else 0.0
        wait = tecko.auto_interval([seen(now, requests_completed=int(100 * share))], now, 30, 3600)
        now += wait
    assert wait / 2 <= max(15.0, 0.05 * run)


def test_auto_looks_sooner_when_something_is_about_to_happen() -> None:
    """Finalizing, nearly done, about to expire; and later when nothing moves."""
    now = T0 + 40_000

    def wait(status: str = "in_progress", at: float = now, **facts: Any) -> float:
        return tecko.auto_interval([seen(at, status, changed_at=now, **facts)], at, 30, 7200)

    usual = wait()
    assert wait("finalizing") == wait("") == 30 and wait(requests_completed=99) < usual / 10
    assert wait(expires_at=now + 60) <= 60 < usual < wait(at=now + 40_000)
    assert tecko.auto_interval([seen(now), seen(now, "finalizing")], now, 30, 7200) == 30


async def test_a_job_with_auto(world: World) -> None:
    """It waits as its batch asks for, is overdue after three of these, and shows as auto."""
    world.openai.batch("batch_1", created_at=int(world.clock()) - 1000)
    job_id = await world.job(poll_interval="auto")
    stepped = await world.steps.step(job_id)
    assert stepped.wait is not None and 50 < stepped.wait <= 80
    now = world.clock()
    for later, overdue in ((2.9, []), (3.1, ["job"])):
        assert await world.store.overdue(now + later * stepped.wait, 0.0) == overdue
    oldest, count = await world.store.lateness(now + 1000, 0.0)
    assert (round(oldest), count) == (1000, 1)
    desk = tecko.Desk(world.store, world.vault, lambda: world.config, world.clock)
    assert (await desk.job(str(job_id))).poll_interval_seconds == "auto"
    assert "as often as its progress asks for" in (await desk.explain(str(job_id)))[-1]


# ── Writes and counts ─────────────────────────────────────────────────────────────────────────


async def test_quiet_checks_are_written_together_and_at_the_end(world: World) -> None:
    """This process sees their times at once, another one after a flush, which closing is too."""
    ids = await watch(world, 10)
    await world.steps.step_all(ids)
    world.clock.turn(INTERVAL)
    writes = list[float]()
    world.store.on_write = writes.append
    await world.steps.step_all(ids)
    assert not writes
    first, now = (await world.get(ids[0])).last_check_at, world.clock()
    assert first == now
    assert set(times(world, ids)) == {now - INTERVAL}
    await world.store.pause_job(ids[9], now)
    writes.clear()
    await world.store.flush()
    assert len(writes) == 1 and times(world, ids) == [now] * 9 + [now - INTERVAL]
    world.clock.turn(INTERVAL)
    await world.steps.step_all(ids)
    await world.store.close()
    assert times(world, ids)[:9] == [now + INTERVAL] * 9


def times(world: World, ids: Sequence[int]) -> list[float]:
    """When the jobs were checked, as another process reads it."""
    with contextlib.closing(sqlite3.connect(world.store.path)) as db:
        return [at for (at,) in db.execute("SELECT last_check_at FROM polling_jobs ORDER BY id")]


async def test_a_failure_after_a_quiet_check_keeps_what_that_one_found(world: World) -> None:
    """The last good check is the quiet one, though it was still to be written down."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    await world.steps.step(job_id)
    world.clock.turn(INTERVAL)
    await world.steps.step(job_id)
    good = world.clock()
    world.clock.turn(INTERVAL)
    world.openai.fault("*", Fault.status(500))
    await world.steps.step(job_id)
    await world.store.flush()
    job = await world.get(job_id)
    assert (job.last_ok_at, job.last_check_at, job.errors_in_row) == (good, good + INTERVAL, 1)


ops = st.sampled_from("job file drop pause resume delete fire fail secret unsecret prune".split())


@hypothesis.settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(ops, st.integers(0, 5)), max_size=25))
def test_kept_counts_are_what_a_scan_finds(steps: list[tuple[str, int]]) -> None:
    """After any operations, those that are refused included."""
    asyncio.run(count_after(steps))


async def count_after(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with tecko.Store(Path(folder) / "t.db") as store:
            for op, n in steps:
                with contextlib.suppress(tecko.TeckoError):
                    await operate(store, op, n)
            counts = await store.counts()
            scans = {
                "secrets": "SELECT count(*) FROM secrets",
                "triggers": "SELECT count(*) FROM triggers",
                "logs": "SELECT count(*) FROM polling_logs",
            }
            for what, sql in scans.items():
                assert counts[what] == (await store._sql(sql))[0][0], what
            shown = [job.shown_status for job in await store.jobs()]
            assert counts["jobs"] == {s: shown.count(s) for s in shown}


def spec(name: str) -> tecko.JobSpec:
    flat = {"batch_id": "batch_1", "openai_secret": "o", "keboola_secret": "k"}
    target = {"component_id": "c", "configuration_id": "g"}
    stack = {"keboola_stack_url": "http://127.0.0.1:9"}
    keboola = {f"keboola_{k}": v for k, v in target.items()}
    return tecko.parse(tecko.JobSpec, {"name": name} | flat | keboola | stack)


async def operate(store: tecko.Store, op: str, n: int) -> None:
    """One operation of the store, on the n-th of what it may be for."""
    if op == "job":
        await store.create_job(spec(f"job-{n}"), "store", 1.0)
    elif op in ("file", "drop"):
        await store.sync_file_jobs([spec(f"file-{m}") for m in range(n)] * (op == "file"), 1.0)
    elif op in ("pause", "resume", "delete"):
        await getattr(store, f"{op}_job")(n + 1, 1.0)
    elif op == "secret":
        await store.add_secret(f"s{n}", "openai", b"x", "k", 1.0)
    elif op == "unsecret":
        await store.delete_secret(f"s{n}", 1.0)
    elif op == "prune":
        await store.prune("polling_logs", 0.0, n)
    elif (job := await store.job(n + 1)) is not None:
        await decide(store, job, await store.batches(job.id), op)


async def decide(store: tecko.Store, job: tecko.Job, known: list[tecko.Batch], op: str) -> None:
    """A check that fires or fails the job."""
    trigger = tecko.Trigger(
        f"t{job.id}-{job.round}", job.id, job.round, "pending", "s", "k", "{}", False, "hold", 1.0
    )
    verdict = tecko.Verdict("fire" if op == "fire" else "give_up", "why")
    fired = trigger if op == "fire" else None
    check = tecko.Checked(job, known, known, verdict, fired, None, [], 1.0, 1.0)
    await store.record_check(check)


@given(st.text(), st.integers(1, 10**6), st.sampled_from([1, 10, 30, 3600]), st.integers(1, 10**6))
def test_jobs_of_a_key_are_due_within_half_an_interval(
    secret: str, job_id: int, interval: int, jobs: int
) -> None:
    """So that the list which the first one asks for is young enough for the last one."""
    first = tecko.phase(zlib.crc32(secret.encode()), interval / 2, jobs)
    own = tecko.slot(secret, job_id, interval, jobs) - first
    assert -1e-6 <= own <= 0.45 * interval and first + own <= min(interval, jobs / 100)


@given(st.integers(1, 10**6), st.sampled_from([30, 300, 3600]))
def test_neighbours_of_many_are_due_together(first: int, interval: int) -> None:
    """Whose rows lie together, at one whole second; and of 10,000 about as many at each."""
    ids = range(first, first + 10_000)
    slots = [tecko.slot("openai", job_id, interval, 10_000) for job_id in ids]
    moves = sum(a != b for a, b in itertools.pairwise(slots))
    assert moves <= len(ids) / tecko.NEIGHBOURS + 1
    each = Counter(slots).values()
    assert max(each) <= len(ids) / len(each) + 3 * tecko.NEIGHBOURS


# ── The calendar of due times ─────────────────────────────────────────────────────────────────


@hypothesis.settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), max_size=40), st.integers(0, 20))
def test_the_calendar_knows_who_is_due(moves: list[tuple[int, int]], now: int) -> None:
    """As a list of all due times would, after jobs were added, moved and taken out (at 0)."""
    store, times = tecko.make_scheduler()._jobstores["default"], dict[str, datetime]()
    for number, at in moves:
        name = str(number)
        if at == 0:
            if times.pop(name, None) is not None:
                store.remove_job(name)
        else:
            times[name] = tecko.on_grid(T0 + at)
            store.update_job(SimpleNamespace(id=name, next_run_time=times[name]))
    due = sorted(name for name, at in times.items() if at <= tecko.on_grid(T0 + now))
    assert sorted(job.id for job in store.get_due_jobs(tecko.on_grid(T0 + now))) == due
    assert store.get_next_run_time() == min(times.values(), default=None)
    assert sorted(job.id for job in store.get_all_jobs()) == sorted(times)
