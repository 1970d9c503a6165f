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
from pathlib import Path
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
            await worlds[0].step_all(all_jobs)
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
    batches, triggers = job.pop("batches"), await world.store.triggers(job_id)
    said = (job.pop("last_error") or "").split("; ")  # whoever failed first is told first
    logs = [row.status for row in await world.store.logs(job_id, 100)]
    return job, sorted(said), batches, [(t.state, t.round, t.partial) for t in triggers], logs


async def test_pages_that_shift_while_they_are_read(world: World) -> None:
    """Between two pages new batches come, one that was read is deleted, one is done: nothing is
    read as missing, and what was done is triggered."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.step_all(ids))
    await gate.areached()
    for n in range(30):
        world.openai.batch(f"batch_new_{n}")
    batch(world, 3).become("completed")
    world.openai.remove("batch_120")
    gate.release()
    await stepping
    assert [len(world.keboola.created), await missing(world, ids)] == [1, []]
    world.clock.turn(INTERVAL)
    await world.step_all([n for n in ids if n != ids[3]])
    assert await missing(world, ids) == [ids[120]]


async def test_a_page_whose_cursor_is_gone(world: World) -> None:
    """The last batch of a page is deleted before the next one is asked for: the list ends there,
    and what it did not show is asked for singly."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.step_all(ids))
    await gate.areached()
    world.openai.remove("batch_50")
    gate.release()
    await stepping
    assert asked(world.openai) == (2, 50) and await missing(world, ids) == []


async def missing(world: World, ids: Sequence[int]) -> list[int]:
    jobs = await world.store.jobs_among(ids)
    return [job.id for job in jobs if any(b.missing_checks for b in job.batches)]


# ── What is asked for ─────────────────────────────────────────────────────────────────────────


async def test_one_page_answers_a_hundred_checks(world: World) -> None:
    """At each round, and a few of them are asked for singly as well."""
    ids = await watch(world, 100)
    for rounds in range(1, 11):
        await world.step_all(ids)
        pages, singly = asked(world.openai)
        assert pages == rounds and singly <= 4 * (rounds - 1)
        world.clock.turn(INTERVAL)
    assert {(await world.get(n)).last_error for n in ids} == {None}


@given(st.integers(1, 999), st.integers(30, 3600), st.integers(1, 10**6), st.integers(0, 10**9))
def test_each_batch_of_a_list_gets_its_turn(
    batches: int, interval: int, job_id: int, start: int
) -> None:
    """To be asked for singly: once in ten checks, or in an hour, where they are not too many."""
    checks = max(10, 3600 // interval)
    times = [start + interval * n for n in range(checks)]
    assert any(tecko.is_turn_to_confirm(job_id, interval, batches, now) for now in times)


def test_turns_cost_little_where_batches_are_many() -> None:
    """One of a thousand checks, evenly."""
    for now in range(0, 6000, 10):
        ids = range(1, 1001)
        assert sum(tecko.is_turn_to_confirm(job_id, 10, 1000, now) for job_id in ids) == 1


async def test_a_snapshot_answers_who_is_due_a_little_later(world: World) -> None:
    """Up to half an interval; and whoever asks during a sweep waits for the same one."""
    ids = await watch(world, 100)
    gate = world.openai.gate(LIST, after_acting=False)
    both = [asyncio.create_task(world.step_all(some)) for some in (ids[:20], ids[20:40])]
    await gate.areached()
    gate.release()
    await asyncio.gather(*both)
    world.clock.turn(INTERVAL / 2)
    await world.step_all(ids[40:60])
    pages, singly = asked(world.openai)
    assert pages == 1 and singly <= 1


async def test_a_list_that_was_read_meanwhile_is_not_read_again(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """By one who found the list before it to be too old."""
    made, clock = upstream
    key, wanted = tecko.SecretValue(KEY), {f"batch_{n}" for n in range(20)}
    for later in (0, 30, 31):
        clock.turn(later)
        await made.read_list(key, wanted, 20, 60.0)
    assert openai.count(LIST) == 2 and made.listing(key)[1].keys() == wanted


async def test_few_batches_are_asked_for_singly(world: World) -> None:
    """Two in an account cost two requests; nor does one that many foreign ones came after lead
    through pages that bring nothing."""
    ids = await watch(world, 2)
    await world.step_all(ids)
    assert asked(world.openai) == (0, 2)


async def test_a_list_that_does_not_pay_is_left_alone(world: World) -> None:
    """Watched ones deep below a thousand foreign ones: two pages tell, and are not asked again."""
    ids = await watch(world, 10)
    world.openai.many(KEY, [f"batch_foreign_{n}" for n in range(1000)], created_at_start=2**31)
    for _ in range(3):
        await world.step_all(ids)
        world.clock.turn(INTERVAL)
    assert asked(world.openai) == (2, 30)


async def test_a_batch_from_long_ago_does_not_cost_the_whole_list(world: World) -> None:
    """Thirty new ones and an old one with a thousand in between: two pages in vain at most."""
    world.openai.batch("batch_old", created_at=1000)
    old = await world.job("old", batch_ids=["batch_old"])
    world.openai.many(KEY, [f"batch_foreign_{n}" for n in range(1000)], created_at_start=2000)
    ids = await watch(world, 30)
    await world.step_all([old, *ids])
    assert asked(world.openai) == (3, 1)


async def test_a_host_without_a_list(world: World) -> None:
    """Each batch is asked for singly, and the list is not tried at each check."""
    ids = await watch(world, 10)
    world.openai.fault(LIST, Fault.status(404), times=None)
    for _ in range(2):
        await world.step_all(ids)
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
    await world.step_all(ids)
    pages, singly = asked(world.openai)
    assert 1 <= pages <= 10 and singly - before == 20


async def test_someone_who_asks_gets_an_answer_of_now(world: World) -> None:
    """Not what a list showed a moment ago."""
    ids = await watch(world, 10)
    await world.step_all(ids)
    await world.steps.step(ids[0])
    assert asked(world.openai) == (1, 1)


async def test_from_done_to_triggered_in_one_step(world: World) -> None:
    """A page shows it, one request confirms it, and Keboola has the trigger by its end."""
    ids = await watch(world, 10)
    await world.step_all(ids)
    world.clock.turn(INTERVAL)
    batch(world, 4).become("completed")
    await world.step_all(ids)
    pages, singly = asked(world.openai)
    assert pages == 2 and 1 <= singly <= 2
    assert (await world.get(ids[4])).status == "triggered" and len(world.keboola.created) == 1


async def test_a_damaged_job_costs_no_other_of_its_key_a_check(world: World) -> None:
    """Its definition cannot be read: it says so alone, and one page answers the rest."""
    ids = await watch(world, 10)
    await world.step_all(ids)
    world.clock.turn(INTERVAL)
    with contextlib.closing(sqlite3.connect(world.store.path)) as db, db:
        db.execute("UPDATE polling_jobs SET spec = '{}', last_error = 'x' WHERE id = ?", ids[3:4])
    for n in range(10):
        batch(world, n).become("in_progress", completed=4)
    done = await world.step_all(ids)
    assert [n for n in ids if done[n].error] == [ids[3]] and world.openai.count(LIST) == 2


async def other_batch(world: World, job_id: int) -> None:
    spec = (await world.get(job_id)).watches
    watched = spec.watch.model_copy(update={"batch_ids": ["batch_11"]})
    await world.store.update_job(job_id, lambda _: spec.model_copy(update={"watch": watched}), 0.0)


Change = Callable[[World, int], Any]
CHANGES: list[Change] = [
    lambda world, job_id: world.store.pause_job(job_id, 0.0),
    lambda world, job_id: world.store.delete_job(job_id, 0.0),
    other_batch,
]


@Given("change", CHANGES, ids=["paused", "deleted", "changed"])
async def test_a_job_that_changed_while_the_list_was_read(world: World, change: Change) -> None:
    """The page decides nothing about it, nor is anything of it written down."""
    ids = await watch(world, 12)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.step_all(ids[:10]))
    await gate.areached()
    await change(world, ids[0])
    gate.release()
    assert (await stepping)[ids[0]] == tecko.StepResult(0.0, "changed while it was checked")
    jobs = await world.store.jobs_among(ids[:1])
    assert {batch.status for job in jobs for batch in job.batches} <= {""}


# ── Lists that fail or lie ────────────────────────────────────────────────────────────────────

LATER = 2 * tecko.LIST_AGAIN


@Given(
    "fault",
    [
        *(Fault.status(code) for code in (400, 403, 404, 500, 503)),
        *(Fault.garbage(), Fault.reset(), Fault.truncate(), Fault.json({"data": 7})),
        Fault.status(401, body="<h1>Log in</h1>"),
    ],
)
async def test_where_a_list_fails_batches_are_asked_for_singly(world: World, fault: Fault) -> None:
    """No job is told, and the list is left alone for some minutes; then it is tried again."""
    ids = await watch(world, 10)
    world.openai.fault(LIST, fault, times=None)
    for rounds in (1, 2):
        done = await world.step_all(ids)
        assert asked(world.openai) == (1, 10 * rounds)
        assert not any(step.error for step in done.values())
        world.clock.turn(INTERVAL)
    world.openai.heal()
    world.clock.turn(LATER)
    await world.step_all(ids)
    assert asked(world.openai) == (2, 20)


async def test_a_later_page_that_fails_costs_single_requests_for_the_rest(world: World) -> None:
    """The first hundred are answered by the page that came."""
    ids = await watch(world, 150)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.step_all(ids))
    await gate.areached()
    world.openai.fault(LIST, Fault.status(500))
    gate.release()
    done = await stepping
    assert asked(world.openai) == (2, 50) and not any(step.error for step in done.values())


async def test_a_refused_key_is_told_to_all_and_asked_once(world: World) -> None:
    """What the list is refused with 401, every batch would be."""
    ids = await watch(world, 10)
    world.openai.fault("*", Fault.status(401), times=None)
    done = await world.step_all(ids)
    assert asked(world.openai) == (1, 0)
    assert all("401" in str(done[n].error) for n in ids)
    assert {(await world.get(n)).errors_in_row for n in ids} == {1}


async def test_a_list_that_is_rate_limited_while_batches_are_not(world: World) -> None:
    """The key rests as the list asked for; afterwards batches are asked for singly."""
    ids = await watch(world, 10)
    world.openai.fault(LIST, Fault.rate_limited(30), times=None)
    done = await world.step_all(ids)
    assert asked(world.openai) == (1, 0) and {step.wait for step in done.values()} == {30.0}
    batch(world, 3).become("completed")
    for rounds in (1, 2):
        world.clock.turn(INTERVAL)
        await world.step_all(ids)
        assert asked(world.openai) == (1, 10 if rounds == 1 else 19)
    assert (await world.get(ids[3])).status != "active"


ODD = [
    *(b'{"id":"batch_odd","metadata":{"title":"x \\ud83d"}}', b"null", b"[[[[7]]]]"),
    *(b'{"id":7,"status":7}', b'{"id":"batch_odd","status":"\\ud800","created_at":1e999}'),
]


@Given("item", ODD)
async def test_an_odd_item_is_lost_and_not_its_page(world: World, item: bytes) -> None:
    """Of a batch that nobody watches, beside ten that are."""
    ids = await watch(world, 10)
    batches = [batch(world, n).encoded() for n in range(10)]
    page = b'{"data":[' + b",".join([item, *batches]) + b'],"has_more":false}'
    world.openai.fault(LIST, Fault.status(200, {"Content-Type": "application/json"}, page))
    await world.step_all(ids)
    assert asked(world.openai) == (1, 0)


async def test_a_list_that_stands_still_hides_nothing(world: World) -> None:
    """A gateway's copy shows five batches as they were: within ten checks one is found to be
    done, and then all of them at once."""
    ids = await watch(world, 5)
    frozen = {"data": [batch(world, n).fields() for n in range(5)], "has_more": False}
    world.openai.fault(LIST, Fault.json(frozen), times=None)
    for n in range(5):
        batch(world, n).become("completed")
    for _ in range(12):
        await world.step_all(ids)
        world.clock.turn(INTERVAL)
    assert len(world.keboola.created) == 5


# ── Keys that rest ────────────────────────────────────────────────────────────────────────────


@Given("fault", [Fault.rate_limited(300), Fault.status(503), Fault.status(401)])
async def test_a_key_that_fails_delays_no_other(world: World, fault: Fault) -> None:
    """The other key's jobs are checked as ever."""
    await world.secret("other", "openai", OTHER)
    bad = await watch(world, 10)
    world.openai.many(OTHER, [f"batch_good_{n}" for n in range(10)])
    names = [f"batch_good_{n}" for n in range(10)]
    good = [await world.job(n, batch_ids=[n], openai_secret="other") for n in names]
    world.openai.fault("*", fault, times=None, key=KEY)
    for _ in range(3):
        done = await world.step_all(bad + good)
        assert {n for n in done if done[n].error} == set(bad)
        world.clock.turn(INTERVAL)


@pytest.fixture
async def upstream(openai: standins.OpenAI) -> AsyncIterator[tuple[tecko.OpenAI, Clock]]:
    """Our OpenAI class with a clock to turn, on a stand-in with many batches; the key's name is
    told."""
    openai.many(KEY, [f"batch_{n}" for n in range(100)])
    clock = Clock()
    made = tecko.OpenAI(openai.base_url, clock=clock.steady)
    made.register_secret(tecko.SecretValue(KEY), "prod")
    yield made, clock
    await made.close()


async def fails(made: tecko.OpenAI, *numbers: int) -> list[tecko.OpenAIError]:
    """Ask for these batches; each is an error."""
    errors = []
    for n in numbers:
        with pytest.raises(tecko.OpenAIError) as raised:
            await made.retrieve(tecko.SecretValue(KEY), f"batch_{n}")
        errors.append(raised.value)
    return errors


async def test_an_outage_lets_a_key_rest_and_one_call_try(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """After five failures about different batches nothing is asked, then one call after each
    pause, which doubles; one that works ends it."""
    made, clock = upstream
    openai.fault("*", Fault.status(503), times=None)
    calls = []
    for n in range(80):
        await fails(made, n)
        calls.append(openai.request_count)
        clock.turn(10)
    tried = [n for n, (a, b) in enumerate(itertools.pairwise(calls), 1) if a != b]
    assert tried == [1, 2, 3, 4, 5, 7, 11, 19, 35, 65]  # 10 s, 20 s, 40 s, ... at most 300 s
    [pause] = made.pauses()
    assert (pause.secret, pause.until > time.time()) == ("prod", True)
    [error] = await fails(made, 99)
    said = "OpenAI is not asked with prod for now: OpenAI said 503 about batch_65"
    assert said in str(error) and said.endswith(pause.reason.partition(":")[0])
    assert (error.sent, error.status) == (False, 503) and error.retry_after
    openai.heal()
    clock.turn(error.retry_after)
    assert (await made.retrieve(tecko.SecretValue(KEY), "batch_90")).status == "in_progress"
    assert made.pauses() == []


@Given(
    "fault",
    [Fault.status(500), Fault.status(503), Fault.reset(), Fault.json({}), Fault.status(404)],
)
async def test_a_broken_batch_stops_no_other(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock], fault: Fault
) -> None:
    """However often it is asked for, whatever it answers: failures count by what they are about."""
    made, clock = upstream
    openai.fault("GET /v1/batches/batch_7", fault, times=None)
    for _ in range(20):
        await fails(made, 7)
        clock.turn(10)
    assert made.pauses() == []
    assert (await made.retrieve(tecko.SecretValue(KEY), "batch_1")).status == "in_progress"


async def test_after_a_pause_a_batch_that_was_good_tries(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """Six broken batches that answer 503 for ever make the key rest; when they ask again first,
    they wait, and the good one ends it."""
    made, clock = upstream
    for n in range(6):
        openai.fault(f"GET /v1/batches/batch_{n}", Fault.status(503), times=None)
    await fails(made, *range(6))
    clock.turn(tecko.OUTAGE_PAUSE)
    before = openai.request_count
    await fails(made, *range(5))
    assert openai.request_count == before
    assert (await made.retrieve(tecko.SecretValue(KEY), "batch_50")).status == "in_progress"
    assert made.pauses() == []


@Given("status", [400, 401, 403, 404, 409, 500])
async def test_an_answer_is_no_outage(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock], status: int
) -> None:
    """A host that says no, or fails at one batch, is there."""
    made, _ = upstream
    openai.fault("*", Fault.status(status), times=None)
    await fails(made, *range(20))
    assert (openai.request_count, made.pauses()) == (20, [])


async def test_those_who_wait_for_the_one_that_tries_go_with_it(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """After a rate limit, too, one call goes ahead; and all of the others, if it works."""
    made, clock = upstream
    openai.fault("*", Fault.rate_limited(5))
    await fails(made, 0)
    clock.turn(5)
    gate = openai.gate(RETRIEVE, after_acting=False)
    calls = [made.retrieve(tecko.SecretValue(KEY), f"batch_{n}") for n in range(6)]
    tasks = [asyncio.create_task(call) for call in calls]
    await gate.areached()
    assert openai.request_count == 2
    gate.release()
    assert {seen.status for seen in await asyncio.gather(*tasks)} == {"in_progress"}


async def test_a_key_that_rests_is_shown_and_explained(world: World) -> None:
    """In /health and /metrics by its secret's name, and by each job's last error."""
    ids = await watch(world, 6)
    world.openai.fault("*", Fault.status(503), times=None)
    async with tecko.make_service(world.config, lambda: world.config, timers=False) as service:
        for job_id in ids[:5]:
            assert (await service.health()).paused_keys == []
            await service.steps.step(job_id)
        health, metrics = await service.health(), await service.metrics_text()
        await service.steps.step(ids[5])
    [paused] = health.paused_keys
    assert paused.secret == "openai" and "503 about batch_4" in paused.reason
    assert paused.until > time.time()
    assert 'teckochecker_paused_keys{secret="openai"} 1.0' in metrics
    operations = tecko.Operations(world.store, world.vault, lambda: world.config, world.clock)
    assert "is not asked with openai for now" in " ".join(await operations.explain(str(ids[5])))


async def test_the_values_that_a_secret_had_are_forgotten(
    openai: standins.OpenAI, upstream: tuple[tecko.OpenAI, Clock]
) -> None:
    """A secret in a file that is rewritten each minute keeps one key, whatever else is in use."""
    made, _ = upstream
    made.register_secret(tecko.SecretValue(OTHER), "other")
    for n in range(50):
        made.register_secret(tecko.SecretValue(f"sk-rewritten-{n}"), "prod")
    assert set(made._keys) == {OTHER, "sk-rewritten-49"}


# ── Turns ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_budget_bounds_each_key(openai: standins.OpenAI) -> None:
    """Its requests are spread evenly, and another key's beside them."""
    openai.key(OTHER)
    openai.batch("batch_1")
    openai.batch("batch_1", key=OTHER)
    upstream = tecko.OpenAI(openai.base_url, per_minute=600)
    keys = [tecko.SecretValue(key) for key in [KEY, OTHER] * 6]
    began = time.monotonic()
    await asyncio.gather(*(upstream.retrieve(key, "batch_1") for key in keys))
    assert 5 * 60 / 600 < time.monotonic() - began < 10
    await upstream.close()


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
    operations = tecko.Operations(world.store, world.vault, lambda: world.config, world.clock)
    assert (await operations.job(str(job_id))).poll_interval_seconds == "auto"
    assert "as often as its progress asks for" in (await operations.explain(str(job_id)))[-1]


# ── Writes and counts ─────────────────────────────────────────────────────────────────────────


async def test_quiet_checks_are_written_together(world: World) -> None:
    """In one transaction, but for one that is asked for singly; nothing of a job that was paused
    meanwhile."""
    ids = await watch(world, 10)
    await world.step_all(ids)
    before = world.clock()
    world.clock.turn(INTERVAL)
    gate = world.openai.gate(LIST, after_acting=True)
    stepping = asyncio.create_task(world.step_all(ids))
    await gate.areached()
    await world.store.pause_job(ids[9], world.clock())
    writes = list[float]()
    world.store.on_write = writes.append
    gate.release()
    await stepping
    assert len(writes) <= 2 and times(world, ids) == [world.clock()] * 9 + [before]


def times(world: World, ids: Sequence[int]) -> list[float]:
    """When the jobs were checked, as another process reads it."""
    with contextlib.closing(sqlite3.connect(world.store.path)) as db:
        return [at for (at,) in db.execute("SELECT last_check_at FROM polling_jobs ORDER BY id")]


async def test_a_failure_after_a_quiet_check_keeps_what_that_one_found(world: World) -> None:
    """The last good check is the quiet one."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    await world.steps.step(job_id)
    world.clock.turn(INTERVAL)
    await world.steps.step(job_id)
    good = world.clock()
    world.clock.turn(INTERVAL)
    world.openai.fault("*", Fault.status(500))
    await world.steps.step(job_id)
    job = await world.get(job_id)
    assert (job.last_ok_at, job.last_check_at, job.errors_in_row) == (good, good + INTERVAL, 1)


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
    assert moves <= len(ids) / tecko.DUE_TOGETHER + 1
    each = Counter(slots).values()
    assert max(each) <= len(ids) / len(each) + 3 * tecko.DUE_TOGETHER
