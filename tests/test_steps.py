"""What a step does: every row of the retry and error rules, against real servers and a real store.

The clock stands still until a test turns it, so that hours of back-off take milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import ENVIRONMENT, World, execute, make_world
from standins import Fault

import teckochecker as tecko

CHECK, INDEX, POST = "GET /v1/batches/*", "GET /v2/storage", "POST /jobs"
SEARCH, FOLLOW = "GET /search/jobs", "GET /jobs/*"
TRIGGER_ID = standins.TRIGGER_VARIABLE
INTERVAL = 120.0  # s, the default
WINDOW = 120.0  # s, the settle window
BACKOFF = [1.0, 2.0, 4.0, INTERVAL, INTERVAL]

Given = pytest.mark.parametrize


async def waits(world: World, job_id: int, times: int) -> list[float | None]:
    """Step so many times, turning the clock by what each asks for; what they asked for."""
    asked = []
    for _ in range(times):
        stepped = await world.steps.step(job_id)
        asked.append(stepped.wait)
        world.clock.turn(stepped.wait or 0.0)
    return asked


async def last_error(world: World, job_id: int) -> str:
    return (await world.get(job_id)).last_error or ""


async def status(world: World, job_id: int) -> str:
    return (await world.get(job_id)).status


async def ready(world: World, **flat: Any) -> int:
    """A job whose one batch is done: its first step triggers."""
    world.openai.batch("batch_1", "completed")
    return await world.job(**flat)


async def trigger_of(world: World, job_id: int) -> tecko.Trigger:
    """The newest trigger of a job."""
    return (await world.store.triggers(job_id))[-1]


def posts(keboola: standins.Keboola) -> list[bytes]:
    """The body of every POST /jobs that arrived."""
    return [r.body for r in keboola.requests if (r.method, r.path) == ("POST", "/jobs")]


def asked_with(server: standins.StandIn, key: str) -> int:
    """How many requests carried this key."""
    return sum(standins.credential(request) == key for request in server.requests)


def made_variables(keboola: standins.Keboola) -> dict[str, str]:
    """The variables of the one job that was created."""
    [job] = keboola.created
    return keboola.variables(job)


async def retarget(world: World, job_id: int, **trigger: str) -> None:
    """Change where a job's trigger goes."""
    spec = (await world.get(job_id)).watches
    target = spec.trigger.model_copy(update=trigger)
    spec = spec.model_copy(update={"trigger": target})
    await world.store.update_job(job_id, lambda _: spec, world.clock())


async def rewatch(world: World, job_id: int, *batch_ids: str) -> None:
    """Change which batches a job watches."""
    spec = (await world.get(job_id)).watches
    watch = spec.watch.model_copy(update={"batch_ids": list(batch_ids)})
    spec = spec.model_copy(update={"watch": watch})
    await world.store.update_job(job_id, lambda _: spec, world.clock())


async def file_job(world: World) -> int:
    """The usual job, as if it stood in jobs.yaml."""
    job_id = await world.job()
    spec = (await world.get(job_id)).spec
    await world.store.delete_job(job_id, world.clock())
    await world.store.sync_file_jobs([spec], world.clock())
    return (await world.store.find_job(spec.name)).id


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition that nothing announces."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about in time")


# --- Checks that fail ----------------------------------------------------------------------------


@Given(
    ("fault", "said"),
    [
        (Fault.status(408), "408"),
        (Fault.status(409), "409"),
        (Fault.status(500), "500"),
        (Fault.status(502, body="<h1>Bad Gateway</h1>"), "502"),
        (Fault.status(503), "503"),
        (Fault.status(529), "529"),
        (Fault.reset(), "OpenAI"),
        (Fault.drop_reply(), "OpenAI"),
        (Fault.truncate(), "OpenAI"),
    ],
    ids=["408", "409", "500", "502-html", "503", "529", "reset", "dropped", "cut"],
)
async def test_a_check_that_fails_is_tried_again_for_ever(
    world: World, fault: Fault, said: str
) -> None:
    """After 1, 2 and 4 s, then at each interval; the job says why until a check succeeds."""
    world.openai.batch("batch_1", "in_progress")
    job_id = await world.job()
    world.openai.fault(CHECK, fault, times=5)
    assert await waits(world, job_id, 5) == BACKOFF
    assert await status(world, job_id) == "active"
    assert said in await last_error(world, job_id)
    assert await waits(world, job_id, 1) == [INTERVAL]
    job = await world.get(job_id)
    assert (job.status, job.last_error, job.errors_in_row) == ("active", None, 0)


async def test_a_host_that_is_down_is_asked_again_until_it_is_back(world: World) -> None:
    """A refused connection is a failed check like any other."""
    job_id = await ready(world)
    world.openai.stop()
    assert await waits(world, job_id, 5) == BACKOFF
    assert "cannot be reached" in await last_error(world, job_id)
    world.openai.start()
    await world.step_until_waiting(job_id)
    assert await status(world, job_id) == "completed"


@Given("code", [429, 500, 503])
async def test_a_retry_after_in_seconds_wins(world: World, code: int) -> None:
    """Over the back-off's one second, and over the interval when it is longer."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    world.openai.fault(CHECK, Fault.status(code, {"Retry-After": "300"}))
    assert await waits(world, job_id, 1) == [300.0]


@Given("code", [429, 503])
async def test_a_retry_after_as_a_date_wins(world: World, code: int) -> None:
    """A date five minutes ahead is a wait of five minutes."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    date = formatdate(time.time() + 300, usegmt=True)
    world.openai.fault(CHECK, Fault.status(code, {"Retry-After": date}))
    [wait] = await waits(world, job_id, 1)
    assert wait is not None and 290 < wait <= 300


async def test_a_rate_limited_key_rests_and_no_other(world: World) -> None:
    """While a 429 lasts no request carries its key, whichever job asks; other keys go on."""
    world.openai.batch("batch_1")
    world.openai.batch("batch_2", key="sk-other")
    await world.secret("other", "openai", "sk-other")
    first, second = await world.job("first"), await world.job("second")
    third = await world.job("third", openai_secret="other", batch_ids=["batch_2"])
    world.openai.fault(CHECK, Fault.rate_limited(300), key=standins.OPENAI_KEY)
    steps = [await world.steps.step(job_id) for job_id in (first, second, third)]
    assert asked_with(world.openai, standins.OPENAI_KEY) == 1
    assert asked_with(world.openai, "sk-other") == 1
    assert steps[1].wait is not None and 290 < steps[1].wait <= 300
    assert "not asked with openai for now: OpenAI said 429" in await last_error(world, second)
    assert (steps[2].error, await last_error(world, third)) == (None, "")


async def test_a_rate_limited_key_is_used_again_when_the_limit_is_over(world: World) -> None:
    """The first request after it goes through, and the job has nothing left to say."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    world.openai.fault(CHECK, Fault.rate_limited("0.3"))
    await world.steps.step(job_id)
    assert (await world.steps.step(job_id)).error is not None
    world.clock.turn(0.3)
    assert (await world.steps.step(job_id)).error is None
    assert world.openai.count(CHECK) == 2
    assert await last_error(world, job_id) == ""


async def test_a_rate_limit_in_the_middle_of_a_job_holds_its_other_batches(world: World) -> None:
    """Batches that still wait for a slot of their key are not asked once it is limited."""
    ids = [f"batch_{n}" for n in range(10)]
    world.openai.many(standins.OPENAI_KEY, ids)
    job_id = await world.job(batch_ids=ids)
    world.openai.fault(CHECK, Fault.rate_limited(300), times=None)
    await world.steps.step(job_id)
    assert world.openai.count(CHECK) == tecko.IN_FLIGHT_PER_KEY


@Given("code", [401, 403])
async def test_a_refused_key_waits_longer_each_time_and_is_loud(world: World, code: int) -> None:
    """A key can be mended: the job stays active, says why, and goes on when it is."""
    world.openai.batch("batch_1")
    job_id = await world.job()
    world.openai.fault(CHECK, Fault.status(code), times=6)
    assert await waits(world, job_id, 6) == [240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0]
    assert await status(world, job_id) == "active"
    assert f"OpenAI said {code}" in await last_error(world, job_id)
    assert [row.status for row in await world.store.logs(job_id, 10)].count("error") == 1
    assert await waits(world, job_id, 1) == [INTERVAL]
    assert await last_error(world, job_id) == ""


@Given(("interval", "checks"), [(120, 6), (299, 4), (300, 3), (3600, 3)])
async def test_an_unknown_batch_fails_the_job_late(
    world: World, interval: int, checks: int
) -> None:
    """Not before the third check and not before ten minutes; it says what else can be wrong."""
    job_id = await world.job(poll_interval=interval)
    seen = []
    while await status(world, job_id) == "active":
        seen += await waits(world, job_id, 1)
    assert seen == [float(interval)] * (checks - 1) + [None]
    assert await status(world, job_id) == "failed"
    assert "batch_1" in await last_error(world, job_id)
    assert "a key of another project sees 404 too" in await last_error(world, job_id)
    assert posts(world.keboola) == []


async def test_a_batch_that_appears_in_between_starts_the_count_anew(world: World) -> None:
    """Young batches can be unknown for a moment, and again later."""
    job_id = await world.job()
    for _ in range(2):
        await waits(world, job_id, 5)
        world.openai.batch("batch_1")
        await waits(world, job_id, 1)
        assert await last_error(world, job_id) == ""
        world.openai.remove("batch_1")
    assert await status(world, job_id) == "active"


@Given("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_with_the_key(world: World, code: int) -> None:
    """The other host hears nothing, and the job says what happened."""
    job_id = await ready(world)
    with standins.Elsewhere() as elsewhere:
        world.openai.fault(CHECK, Fault.redirect(elsewhere.url + "/v1/batches/batch_1", code))
        await world.steps.step(job_id)
        assert elsewhere.request_count == 0
    assert await status(world, job_id) == "active"
    assert "redirect" in await last_error(world, job_id)


DONE = {"id": "batch_1", "status": "completed", "request_counts": {"total": 1, "completed": 1}}


@Given(
    "fault",
    [
        Fault.garbage(),
        Fault.truncate(),
        Fault.status(200, body=b""),
        Fault.status(200, body=b"\xff\xfe"),
        Fault.status(200, {"Content-Type": "application/json"}, body=b"[" * 100_000),
        Fault.json(None),
        Fault.json("completed"),
        Fault.json([DONE]),
        Fault.json({}),
        Fault.json({"id": "batch_1"}),
        Fault.json({**DONE, "status": None}),
        Fault.json({**DONE, "status": ["completed"]}),
        Fault.json({**DONE, "id": "batch_2"}),
        Fault.json({"status": "completed"}),
    ],
    ids=[
        *("html", "cut", "empty", "binary", "deep", "null", "text", "list", "object", "no-status"),
        *("null-status", "list-status", "other-batch", "no-id"),
    ],
)
async def test_an_unreadable_answer_is_never_believed(world: World, fault: Fault) -> None:
    """Nothing is marked done, nothing is triggered, and it is asked again soon."""
    job_id = await ready(world)
    world.openai.fault(CHECK, fault)
    assert await waits(world, job_id, 1) == [1.0]
    [batch] = (await world.store.find_job(job_id)).batches
    assert (batch.status, posts(world.keboola)) == ("", [])
    assert await status(world, job_id) == "active"
    assert "OpenAI" in await last_error(world, job_id)


@Given(
    "odd",
    [
        {"request_counts": {"total": float("inf"), "completed": 1}},
        {"request_counts": {"total": float("nan"), "completed": 1}},
        {"request_counts": {"total": 10**30, "completed": 1}},
        {"request_counts": [1], "errors": 7, "output_file_id": {}},
        {"created_at": 10**400, "expires_at": "tomorrow"},
        {"status": "\ud800"},
        {"errors": {"data": [{"message": "\ud800"}]}},
    ],
    ids=["infinite", "no-number", "huge", "wrong-types", "huge-time", "surrogate", "in-message"],
)
async def test_an_answer_with_odd_values_breaks_nothing(world: World, odd: dict[str, Any]) -> None:
    """Whatever is made of it, the job is active and checked again by its interval at the latest."""
    job_id = await ready(world)
    world.openai.fault(CHECK, Fault.json({**DONE, "status": "in_progress", **odd}))
    [wait] = await waits(world, job_id, 1)
    assert wait is not None and wait <= INTERVAL
    assert await status(world, job_id) == "active"


async def test_a_failed_check_of_one_batch_keeps_what_another_showed(world: World) -> None:
    """The job waits for the one that failed, and the finished one is not asked again."""
    world.openai.batch("batch_1", "completed")
    world.openai.batch("batch_2", "completed")
    job_id = await world.job(batch_ids=["batch_1", "batch_2"])
    world.openai.fault("GET /v1/batches/batch_2", Fault.status(500))
    assert await waits(world, job_id, 1) == [1.0]
    assert [b.status for b in (await world.store.find_job(job_id)).batches] == ["completed", ""]
    assert posts(world.keboola) == []
    await world.step_until_waiting(job_id)
    assert world.openai.count("GET /v1/batches/batch_1") == 1
    assert len(world.keboola.created) == 1


async def test_a_secret_that_is_not_there_is_said_and_asked_for_again(world: World) -> None:
    """The job stays active, and goes on when the secret has come."""
    job_id = await ready(world, openai_secret="later")
    await world.steps.step(job_id)
    assert "there is no secret 'later'" in await last_error(world, job_id)
    await world.secret("later", "openai", standins.OPENAI_KEY)
    await world.step_until_waiting(job_id)
    assert await status(world, job_id) == "completed"


# --- What a batch amounts to ---------------------------------------------------------------------


async def test_an_unknown_status_is_a_warning_and_goes_on_being_checked(world: World) -> None:
    """Said in last_error and in the log, until the status is one that we know."""
    batch = world.openai.batch("batch_1", "reticulating")
    job_id = await world.job()
    assert await waits(world, job_id, 2) == [INTERVAL, INTERVAL]
    assert "'reticulating'" in await last_error(world, job_id)
    assert "reticulating" in (await world.store.logs(job_id, 1))[0].message
    batch.become("completed")
    await world.step_until_waiting(job_id)
    assert await status(world, job_id) == "completed"


NO_DATA = {"total": 10, "completed": 0, "failed": 10, "output_file_id": None}


@Given(
    ("ending", "changes", "said"),
    [
        ("failed", {}, "This line is not parseable"),
        ("expired", {"completed": 4}, "expired: 4 of 10 requests succeeded"),
        ("cancelled", {"completed": 4}, "cancelled: 4 of 10 requests succeeded"),
        ("completed", NO_DATA, "completed without data"),
        ("completed", {**NO_DATA, "output_file_id": "file-empty"}, "completed without data"),
    ],
)
async def test_one_failed_batch_fails_a_job_of_all_completed_at_once(
    world: World, ending: str, changes: Mapping[str, Any], said: str
) -> None:
    """While another batch is still at work; nothing is triggered, not even decided."""
    world.openai.batch("batch_1", ending, **changes)
    world.openai.batch("batch_2", "in_progress")
    job_id = await world.job(batch_ids=["batch_1", "batch_2"])
    assert await waits(world, job_id, 1) == [None]
    assert await status(world, job_id) == "failed"
    assert said in await last_error(world, job_id)
    assert (await world.store.triggers(job_id), posts(world.keboola)) == ([], [])


@Given(
    ("ending", "changes", "files"),
    [
        ("failed", {}, []),
        ("expired", {"completed": 4}, ["file-out-batch_1"]),
        ("cancelled", {"completed": 4}, ["file-out-batch_1"]),
        ("expired", {}, []),
        ("completed", NO_DATA, []),
    ],
)
async def test_under_all_finished_it_counts_as_failed_and_its_output_is_passed_on(
    world: World, ending: str, changes: Mapping[str, Any], files: list[str]
) -> None:
    """The job waits for the other batch, fires, and ends as completed_with_failures."""
    world.openai.batch("batch_1", ending, **changes)
    other = world.openai.batch("batch_2", "in_progress")
    job_id = await world.job(batch_ids=["batch_1", "batch_2"], trigger_when="all_finished")
    assert await waits(world, job_id, 1) == [INTERVAL]
    other.become("completed")
    await world.step_until_waiting(job_id)
    values = made_variables(world.keboola)
    assert json.loads(values["output_file_ids"]) == [*files, "file-out-batch_2"]
    assert json.loads(values["batch_ids_failed"]) == ["batch_1"]
    assert await status(world, job_id) == "completed_with_failures"


async def test_a_batch_without_progress_for_hours_is_remarked(world: World) -> None:
    """Said while it lasts, and no longer when the batch moves on."""
    batch = world.openai.batch("batch_1", "in_progress", completed=3)
    job_id = await world.job()
    await world.steps.step(job_id)
    world.clock.turn(2 * 3600)
    await world.steps.step(job_id)
    assert await last_error(world, job_id) == ""
    world.clock.turn(3600)
    await world.steps.step(job_id)
    assert "batch_1 has made no progress for 3 h" in await last_error(world, job_id)
    batch.become("in_progress", completed=4)
    await world.steps.step(job_id)
    assert await last_error(world, job_id) == ""


async def test_a_batch_past_its_expiry_is_remarked(world: World) -> None:
    """OpenAI's own promise is over, and it still says in_progress."""
    world.openai.batch("batch_1", "in_progress", expires_at=int(world.clock()) + 60)
    job_id = await world.job()
    await world.steps.step(job_id)
    assert await last_error(world, job_id) == ""
    world.clock.turn(61)
    assert (await world.steps.step(job_id)).wait == INTERVAL
    assert "past its expires_at" in await last_error(world, job_id)


async def test_a_finished_batch_is_not_asked_again(world: World) -> None:
    """One request for the one that is done, one each step for the one that is not."""
    world.openai.batch("batch_1", "completed")
    world.openai.batch("batch_2", "finalizing")
    job_id = await world.job(batch_ids=["batch_1", "batch_2"])
    await waits(world, job_id, 3)
    assert world.openai.count("GET /v1/batches/batch_1") == 1
    assert world.openai.count("GET /v1/batches/batch_2") == 3


async def test_a_finished_job_asks_nobody_anything(world: World) -> None:
    """Done is done: no check, no trigger, no look at Keboola."""
    job_id = await ready(world)
    await world.step_until_waiting(job_id)
    before = world.openai.request_count, world.keboola.request_count
    world.clock.turn(86400)
    assert (await world.steps.step(job_id)).wait is None
    assert (world.openai.request_count, world.keboola.request_count) == before


# --- Triggering ----------------------------------------------------------------------------------


async def test_a_trigger_is_on_disk_before_it_is_on_the_wire(world: World) -> None:
    """While the POST is held, the file says `sending` and has the very bytes that arrived."""
    job_id = await ready(world)
    gate = world.keboola.gate(POST, after_acting=False)
    step = asyncio.create_task(world.steps.step(job_id))
    request = await gate.areached()
    seen = partial(execute, world.store.place)
    [row] = seen("SELECT state, body, attempts, keboola_job_id FROM triggers")
    [(job_status,)] = seen("SELECT status FROM polling_jobs")
    assert row == ("sending", request.body.decode(), 1, None)
    assert (job_status, world.keboola.created) == ("triggering", [])
    gate.release()
    await step
    assert (await trigger_of(world, job_id)).state == "running"


async def test_keboola_receives_exactly_this(world: World) -> None:
    """The whole body as INTERFACE has it: every value a non-empty string."""
    world.openai.batch("batch_1", "completed", total=10, failed=1)
    world.openai.batch("batch_2", "expired", total=5, completed=2)
    job_id = await world.job(
        "nightly",
        batch_ids=["batch_1", "batch_2"],
        trigger_when="all_finished",
        variables={"region": "eu", "empty": False, "limit": 7},
    )
    await world.steps.step(job_id)
    [body] = map(json.loads, posts(world.keboola))
    values = {item["name"]: item["value"] for item in body.pop("variableValuesData")["values"]}
    assert body == {"mode": "run", "component": "comp", "config": "cfg"}
    assert values == {
        "batch_ids_completed": '["batch_1"]',
        "batch_ids_failed": '["batch_2"]',
        "batch_count_total": "2",
        "batch_count_completed": "1",
        "batch_count_failed": "1",
        "output_file_ids": '["file-out-batch_1", "file-out-batch_2"]',
        "error_file_ids": '["file-err-batch_1"]',
        "request_count_total": "15",
        "request_count_completed": "11",
        "request_count_failed": "1",
        "teckochecker_job": "nightly",
        "teckochecker_trigger_id": (await trigger_of(world, job_id)).id,
        "region": "eu",
        "empty": "false",
        "limit": "7",
    }


async def test_nothing_failed_is_an_empty_list_and_a_zero(world: World) -> None:
    """No value is an empty string, which Keboola would refuse."""
    await world.step_until_waiting(await ready(world))
    values = made_variables(world.keboola)
    assert (values["batch_ids_failed"], values["error_file_ids"]) == ("[]", "[]")
    assert (values["batch_count_failed"], values["request_count_failed"]) == ("0", "0")
    assert all(values.values())


@contextlib.asynccontextmanager
async def nowhere(kind: str) -> AsyncIterator[str]:
    """An address that no request can be written to."""

    async def answer_in_plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer_in_plain, "127.0.0.1", 0)
    address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    if kind == "refused":
        server.close()
    yield {"dns": "https://nowhere.invalid", "tls": f"https://{address}"}.get(
        kind, f"http://{address}"
    )
    server.close()


def name_queue(keboola: standins.Keboola, url: object, times: int | None = 1) -> None:
    """Let the stack's index name another queue."""
    services = [{"id": "import", "url": keboola.url}, {"id": "queue", "url": url}]
    keboola.fault(INDEX, Fault.json({"services": services}), times)


@Given("kind", ["refused", "dns", "tls"])
async def test_a_queue_that_cannot_be_reached_is_sent_the_trigger_again(
    world: World, kind: str
) -> None:
    """The request was never written: the same trigger goes out again, after 1, 2, 4 s and so on."""
    job_id = await ready(world)
    async with nowhere(kind) as url:
        name_queue(world.keboola, url, times=5)
        assert await waits(world, job_id, 5) == BACKOFF
    first = await trigger_of(world, job_id)
    assert (first.state, await status(world, job_id)) == ("pending", "triggering")
    assert "cannot be reached" in await last_error(world, job_id)
    await world.step_until_waiting(job_id)
    [job] = world.keboola.created
    assert [job] == world.keboola.jobs_of(first.id)
    assert world.keboola.count(SEARCH) == 0


@Given("kind", ["refused", "dns", "tls"])
async def test_a_stack_that_cannot_be_reached_is_asked_again(world: World, kind: str) -> None:
    """Already its index cannot be had; mending the URL is all it takes."""
    async with nowhere(kind) as url:
        job_id = await ready(world, keboola_stack_url=url)
        assert await waits(world, job_id, 5) == BACKOFF
    assert await status(world, job_id) == "triggering"
    assert "cannot be reached" in await last_error(world, job_id)
    await retarget(world, job_id, stack_url=world.keboola.url)
    await world.step_until_waiting(job_id)
    assert (len(world.keboola.created), await status(world, job_id)) == (1, "completed")


async def test_a_rate_limited_post_is_sent_again_with_backoff(world: World) -> None:
    """429 acts on nothing: the same body again after 1, 2, 4 s, then at the interval."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None), times=5)
    assert await waits(world, job_id, 5) == BACKOFF
    assert "429" in await last_error(world, job_id)
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), len(set(posts(world.keboola)))) == (6, 1)
    assert (len(world.keboola.created), world.keboola.count(SEARCH)) == (1, 0)


async def test_a_rate_limited_post_waits_as_long_as_keboola_asks(world: World) -> None:
    """Retry-After wins over the back-off."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(77))
    assert await waits(world, job_id, 1) == [77.0]


@Given("fault", [Fault.status(500), Fault.garbage(), Fault.reset(), Fault.json({"services": []})])
async def test_a_failing_index_leaves_the_trigger_to_be_sent(world: World, fault: Fault) -> None:
    """Nothing was sent, so nothing has to be searched for."""
    job_id = await ready(world)
    world.keboola.fault(INDEX, fault, times=2)
    assert await waits(world, job_id, 2) == [1.0, 2.0]
    assert (await trigger_of(world, job_id)).state == "pending"
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), world.keboola.count(SEARCH)) == (1, 0)


REFUSALS = (400, 401, 402, 403, 404, 405, 410, 413, 422)
REFUSED = [*((POST, code) for code in REFUSALS), (INDEX, 404)]


@Given(("route", "code"), REFUSED)
async def test_a_refused_trigger_fails_the_job_loudly_until_retry(
    world: World, route: str, code: int
) -> None:
    """Nothing is sent again by itself; `job retry` checks afresh and fires a new trigger."""
    job_id = await ready(world)
    own = {"error": "no", "code": code, "exceptionId": "ex-7"}
    world.keboola.fault(route, Fault.status(code, body=own))
    assert await waits(world, job_id, 1) == [None]
    first, said = await trigger_of(world, job_id), await last_error(world, job_id)
    assert (first.state, await status(world, job_id)) == ("rejected", "failed")
    assert all(word in said for word in (str(code), "no", "ex-7", "job retry"))
    assert (await waits(world, job_id, 1), world.keboola.created) == ([None], [])
    await world.store.retry_job(job_id, world.clock())
    await world.step_until_waiting(job_id)
    assert (await status(world, job_id), len(world.keboola.created)) == ("completed", 1)
    assert world.keboola.jobs_of(first.id) == []


ACTED = [
    Fault.act_then_status(500),
    Fault.act_then_status(502, body="<h1>Bad Gateway</h1>"),
    Fault.drop_reply(),
    Fault.act_then_reset(),
    Fault.truncate(),
    Fault.act_then_garbage(),
    Fault.act_then_status(200, body={}),
    Fault.act_then_status(201, body=[]),
    Fault.act_then_status(201, body={"id": None, "status": "created", "isFinished": False}),
    Fault.act_then_status(201, body={"id": "", "status": "created", "isFinished": False}),
    Fault.act_then_status(202, {"Content-Type": "application/json"}, body=b"[" * 100_000),
    Fault.act_then_status(408),
    Fault.act_then_status(409),
    Fault.act_then_status(302, {"Location": "http://127.0.0.1:9/"}),
]
ACTED_IDS = [
    *("500", "502-html", "dropped", "reset", "cut", "html", "object", "list", "null-id"),
    *("empty-id", "deep", "408", "409", "302"),
]


@Given("fault", ACTED, ids=ACTED_IDS)
async def test_a_trigger_whose_answer_is_lost_is_found_and_adopted(
    world: World, fault: Fault
) -> None:
    """Keboola took it: its search shows it, and it is followed as if nothing had been."""
    job_id = await ready(world)
    world.keboola.fault(POST, fault)
    assert await waits(world, job_id, 1) == [0.0]
    assert (await trigger_of(world, job_id)).state == "unknown"
    assert "unknown" in await last_error(world, job_id)
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), len(world.keboola.created)) == (1, 1)
    assert (await status(world, job_id), await last_error(world, job_id)) == ("completed", "")


NOT_ACTED = [
    Fault.status(500),
    Fault.status(503, body="<h1>Service Unavailable</h1>"),
    Fault.reset(),
    Fault.garbage(),
    Fault.status(200, body=b""),
    Fault.json({}),
    Fault.status(408),
    Fault.status(409),
    Fault.redirect("http://127.0.0.1:9/jobs", 302),
    Fault.redirect("http://127.0.0.1:9/jobs", 307),
]
NOT_ACTED_IDS = [
    *("500", "503-html", "reset", "html", "empty", "object", "408", "409", "302", "307")
]


@Given("fault", NOT_ACTED, ids=NOT_ACTED_IDS)
async def test_a_trigger_that_did_not_arrive_is_sent_again_after_the_window(
    world: World, fault: Fault
) -> None:
    """At least three searches over the window find nothing: the same bytes go out again. All the
    while the job says what became of its POST."""
    job_id, start = await ready(world), world.clock()
    world.keboola.fault(POST, fault)
    while len(posts(world.keboola)) < 2:
        await waits(world, job_id, 1)
        why = (await trigger_of(world, job_id)).message or ""
        assert why in await last_error(world, job_id) and (why or world.keboola.created)
    assert world.keboola.count(SEARCH) >= 3
    assert world.clock() - start >= WINDOW
    await world.step_until_waiting(job_id)
    first, second = posts(world.keboola)
    assert (first, len(world.keboola.created)) == (second, 1)
    assert (await trigger_of(world, job_id)).attempts == 2
    assert await status(world, job_id) == "completed"


async def lost(world: World, fault: Fault, **flat: Any) -> int:
    """A job whose trigger has just become unknown."""
    job_id = await ready(world, **flat)
    world.keboola.fault(POST, fault)
    await world.steps.step(job_id)
    assert (await trigger_of(world, job_id)).state == "unknown"
    return job_id


async def test_a_trigger_that_is_held_is_left_for_a_person(world: World) -> None:
    """on_ambiguous: hold sends nothing by itself; retry settles once more, then sends."""
    job_id = await lost(world, Fault.status(500), on_ambiguous="hold")
    await world.step_until_waiting(job_id)
    held = await trigger_of(world, job_id)
    assert (held.state, await status(world, job_id)) == ("held", "failed")
    assert "job retry" in await last_error(world, job_id)
    assert (await waits(world, job_id, 1), len(posts(world.keboola))) == ([None], 1)
    searched = world.keboola.count(SEARCH)
    await world.store.retry_job(job_id, world.clock())
    await world.step_until_waiting(job_id)
    assert world.keboola.count(SEARCH) >= searched + 3
    assert (len(posts(world.keboola)), len(world.keboola.jobs_of(held.id))) == (2, 1)
    assert await status(world, job_id) == "completed"


async def test_a_held_trigger_that_arrived_after_all_is_adopted_on_retry(world: World) -> None:
    """The search that retry asks for shows it: nothing is sent."""
    world.keboola.hide_from_search()
    job_id = await lost(world, Fault.drop_reply(), on_ambiguous="hold")
    await world.step_until_waiting(job_id)
    assert await status(world, job_id) == "failed"
    world.keboola.hide_from_search(False)
    await world.store.retry_job(job_id, world.clock())
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), await status(world, job_id)) == (1, "completed")


BAD_SEARCHES = [
    Fault.status(500),
    Fault.status(401),
    Fault.garbage(),
    Fault.reset(),
    Fault.truncate(),
    Fault.json({"jobs": []}),
    Fault.rate_limited(None),
    Fault.redirect("http://127.0.0.1:9/"),
]
BAD_SEARCH_IDS = ["500", "401", "html", "reset", "cut", "object", "429", "307"]


@Given("fault", BAD_SEARCHES, ids=BAD_SEARCH_IDS)
async def test_a_search_that_failed_counts_for_nothing(world: World, fault: Fault) -> None:
    """However many fail for however long: three good ones are still needed before a resend."""
    job_id = await lost(world, Fault.status(500))
    world.keboola.fault(SEARCH, fault, times=5)
    await waits(world, job_id, 5)
    world.clock.turn(WINDOW)
    for _ in range(2):
        await world.steps.step(job_id)
        assert (await trigger_of(world, job_id)).state == "unknown"
    assert len(posts(world.keboola)) == 1
    await world.step_until_waiting(job_id)
    assert world.keboola.count(SEARCH) == 9  # the last one without a bound in time
    assert (len(posts(world.keboola)), len(world.keboola.created)) == (2, 1)


async def test_a_search_that_lags_less_than_the_window_finds_it_in_the_end(world: World) -> None:
    """Every search but the one at the very end of the window misses it; still one job."""
    world.keboola.search_lag = 1e6
    job_id = await lost(world, Fault.drop_reply())
    start = world.clock()
    while (rest := start + WINDOW - world.clock()) > 0:
        stepped = await world.steps.step(job_id)
        assert stepped.wait is not None and stepped.wait <= rest
        world.clock.turn(stepped.wait)
    assert world.keboola.count(SEARCH) >= 3
    world.keboola.search_lag = 0.0
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), len(world.keboola.created)) == (1, 1)


async def test_a_trigger_on_the_second_page_of_the_search_is_found(world: World) -> None:
    """A configuration that runs often fills the first page with others' jobs."""
    job_id = await lost(world, Fault.drop_reply())
    other = {"id": "1", "status": "success", "isFinished": True, "variableValuesData": None}
    world.keboola.fault(SEARCH, Fault.json([other] * tecko.SEARCH_PAGE))
    world.keboola.fault(SEARCH, Fault.json(world.keboola.created))
    await world.step_until_waiting(job_id)
    asked = [r.query["offset"] for r in world.keboola.requests if r.path == "/search/jobs"]
    assert asked == [["0"], [str(tecko.SEARCH_PAGE)]]
    assert (len(world.keboola.created), await status(world, job_id)) == (1, "completed")


async def test_jobs_of_others_are_not_adopted(world: World) -> None:
    """Found jobs of other triggers, without variables or with odd ones, are not ours."""
    odd = [None, {}, {"values": None}, {"values": 5}, {"values": [5, {}, {"name": "x"}]}]
    jobs: list[Any] = [{"id": "1", "status": "success", "isFinished": True}, None, 5]
    jobs += [{**jobs[0], "variableValuesData": data} for data in odd]
    job_id = await lost(world, Fault.status(500))
    world.keboola.fault(SEARCH, Fault.json(jobs), times=3)
    await waits(world, job_id, 3)
    trigger = await trigger_of(world, job_id)
    assert (trigger.state, trigger.searches) == ("unknown", 3)


async def test_a_crash_while_sending_is_settled_by_the_search(world: World) -> None:
    """A row found as `sending` may have arrived: it is searched for, never just sent."""
    job_id = await ready(world)
    gate = world.keboola.gate(POST, after_acting=True)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    step.cancel()
    await asyncio.wait([step])
    gate.release()
    assert (await trigger_of(world, job_id)).state == "sending"
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), len(world.keboola.created)) == (1, 1)


# --- Following -----------------------------------------------------------------------------------


async def followed(world: World, **flat: Any) -> tuple[int, str]:
    """A job whose Keboola job runs until it is told to end; their ids."""
    world.keboola.runs_until_told = True
    job_id = await ready(world, **flat)
    await world.steps.step(job_id)
    return job_id, world.keboola.created[0]["id"]


@Given("unfinished", ["created", "waiting", "processing", "terminating"])
async def test_a_keboola_job_at_work_goes_on_being_followed(world: World, unfinished: str) -> None:
    """Less often than batches are checked, and the job is `triggered` all the while."""
    job_id, keboola_id = await followed(world)
    world.keboola.finish(keboola_id, unfinished)
    for wait in await waits(world, job_id, 3):
        assert wait is not None and wait > INTERVAL
    trigger = await trigger_of(world, job_id)
    assert (trigger.state, trigger.keboola_status) == ("running", unfinished)
    assert (await status(world, job_id), len(posts(world.keboola))) == ("triggered", 1)


@Given(
    ("ending", "partial", "becomes"),
    [
        ("success", False, "completed"),
        ("warning", False, "completed"),
        ("success", True, "completed_with_failures"),
        ("warning", True, "completed_with_failures"),
        ("error", False, "failed"),
        ("error", True, "failed"),
        ("terminated", False, "failed"),
        ("cancelled", False, "failed"),
    ],
)
async def test_a_job_ends_as_its_keboola_job_does(
    world: World, ending: str, partial: bool, becomes: str
) -> None:
    """With Keboola's own message when it failed."""
    world.openai.batch("batch_2", "expired" if partial else "completed")
    flat = {"batch_ids": ["batch_1", "batch_2"], "trigger_when": "all_finished"}
    job_id, keboola_id = await followed(world, **flat)
    world.keboola.finish(keboola_id, ending, "Table orders not found.")
    assert await waits(world, job_id, 1) == [None]
    job, trigger = await world.get(job_id), await trigger_of(world, job_id)
    assert (job.status, trigger.state == "failed") == (becomes, becomes == "failed")
    assert (trigger.keboola_status, job.completed_at is not None) == (ending, True)
    assert ("Table orders not found." in (job.last_error or "")) == (becomes == "failed")


NO_WORD = [
    Fault.status(500),
    Fault.status(401),
    Fault.status(404),
    Fault.rate_limited(None),
    Fault.garbage(),
    Fault.reset(),
    Fault.truncate(),
    Fault.json({"status": "success"}),
    Fault.json({"id": "1", "status": "success", "isFinished": None}),
    Fault.redirect("http://127.0.0.1:9/"),
]
NO_WORD_IDS = ["500", "401", "404", "429", "html", "reset", "cut", "no-id", "unsure", "307"]


@Given("fault", NO_WORD, ids=NO_WORD_IDS)
async def test_a_failed_look_at_keboola_decides_nothing(world: World, fault: Fault) -> None:
    """The job is neither done nor failed, says why, and learns the end later."""
    job_id, keboola_id = await followed(world)
    world.keboola.finish(keboola_id, "success")
    world.keboola.fault(FOLLOW, fault, times=4)
    assert None not in await waits(world, job_id, 4)
    assert (await trigger_of(world, job_id)).state == "running"
    assert (await status(world, job_id), await last_error(world, job_id) != "") == (
        "triggered",
        True,
    )
    await world.step_until_waiting(job_id)
    assert (await status(world, job_id), await last_error(world, job_id)) == ("completed", "")


async def test_retry_after_a_failed_keboola_job_fires_a_new_trigger(world: World) -> None:
    """The batches are checked afresh, and Keboola gets a second job of another trigger id."""
    job_id, keboola_id = await followed(world)
    world.keboola.finish(keboola_id, "error")
    await world.steps.step(job_id)
    world.keboola.runs_until_told = False
    await world.store.retry_job(job_id, world.clock())
    await world.step_until_waiting(job_id)
    assert len({world.keboola.variables(j)[TRIGGER_ID] for j in world.keboola.created}) == 2
    assert (world.openai.count(CHECK), await status(world, job_id)) == (2, "completed")


# --- Changes while something is under way --------------------------------------------------------


async def removed(world: World, job_id: int) -> None:
    await world.store.sync_file_jobs([], world.clock())


async def deleted(world: World, job_id: int) -> None:
    await removed(world, job_id)
    await world.store.delete_job(job_id, world.clock())


async def paused(world: World, job_id: int) -> None:
    await world.store.pause_job(job_id, world.clock())


async def changed(world: World, job_id: int) -> None:
    spec = (await world.get(job_id)).watches
    watch = spec.watch.model_copy(update={"batch_ids": ["batch_2"]})
    await world.store.sync_file_jobs([spec.model_copy(update={"watch": watch})], world.clock())


Change = Callable[[World, int], Awaitable[None]]


@Given("change", [paused, removed, deleted, changed])
async def test_a_change_during_a_check_keeps_it_from_triggering(
    world: World, change: Change
) -> None:
    """What was seen of a job that is no longer the same decides nothing, and raises nothing."""
    world.openai.batch("batch_1", "completed")
    job_id = await file_job(world)
    gate = world.openai.gate(CHECK, after_acting=True)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    await change(world, job_id)
    gate.release()
    await step
    assert (await world.store.triggers(job_id), posts(world.keboola)) == ([], [])


@Given("fault", [None, Fault.status(500), Fault.status(400)], ids=["fine", "500", "400"])
@Given("route", [INDEX, POST, SEARCH, FOLLOW])
async def test_a_job_deleted_while_it_is_triggered_raises_nothing(
    world: World, route: str, fault: Fault | None
) -> None:
    """Whichever of Keboola's answers is outstanding, and whatever it says."""
    world.keboola.runs_until_told = True
    job_id = await ready(world)
    if route == SEARCH:
        world.keboola.fault(POST, Fault.drop_reply())
    if route in (SEARCH, FOLLOW):
        await world.steps.step(job_id)
    if fault:
        world.keboola.fault(route, fault)
    gate = world.keboola.gate(route, after_acting=True)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    await world.store.delete_job(job_id, world.clock())
    gate.release()
    await step
    assert (await world.steps.step(job_id)).wait is None


async def test_other_batches_are_a_new_round_that_fires_again(world: World) -> None:
    """The first round's Keboola job is followed to its end and does not end the second."""
    job_id, first = await followed(world)
    batch = world.openai.batch("batch_2", "in_progress")
    await rewatch(world, job_id, "batch_2")
    await world.steps.step(job_id)
    assert await status(world, job_id) == "active"
    world.keboola.finish(first, "error", "The first one failed.")
    await world.steps.step(job_id)
    assert ((await world.store.triggers(job_id))[0].state, await status(world, job_id)) == (
        "failed",
        "active",
    )
    batch.become("completed")
    await world.steps.step(job_id)
    world.keboola.finish(world.keboola.created[1]["id"], "success")
    await world.step_until_waiting(job_id)
    ids = [world.keboola.variables(job)["batch_ids_completed"] for job in world.keboola.created]
    assert (ids, await status(world, job_id)) == (['["batch_1"]', '["batch_2"]'], "completed")


async def test_the_same_batches_in_another_order_are_no_new_round(world: World) -> None:
    """It is the set that counts."""
    world.openai.batch("batch_2", "completed")
    job_id = await ready(world, batch_ids=["batch_1", "batch_2"])
    await world.step_until_waiting(job_id)
    await rewatch(world, job_id, "batch_2", "batch_1")
    assert (await world.steps.step(job_id)).wait is None
    assert len(world.keboola.created) == 1


async def test_a_replaced_key_is_used_at_the_next_check(world: World) -> None:
    """The old value is not sent again."""
    world.openai.batch("batch_1", key="sk-second")
    job_id = await world.job()
    await world.steps.step(job_id)
    await world.secret("openai", "openai", "sk-second", replace=True)
    await world.steps.step(job_id)
    keys = [standins.credential(request) for request in world.openai.requests]
    assert keys == [standins.OPENAI_KEY, "sk-second"]
    assert await last_error(world, job_id) == ""


async def test_a_replaced_token_is_used_for_a_waiting_trigger_and_for_following(
    world: World,
) -> None:
    """Same trigger, same target, another token."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None))
    await world.steps.step(job_id)
    world.keboola.token("kbc-second")
    await world.secret("keboola", "keboola", "kbc-second", replace=True)
    await world.step_until_waiting(job_id)
    tokens = [t for r in world.keboola.requests if (t := standins.credential(r))]
    assert tokens == [standins.KEBOOLA_TOKEN, "kbc-second", "kbc-second"]
    assert len(world.keboola.created) == 1


async def with_other_token(world: World) -> dict[str, str]:
    """A second token and its secret; what a trigger has to say to use it."""
    world.keboola.token("kbc-second")
    await world.secret("second", "keboola", "kbc-second")
    return {"secret": "second"}


async def with_other_configuration(world: World) -> dict[str, str]:
    return {"configuration_id": "mended"}


Target = Callable[[World], Awaitable[dict[str, str]]]


@Given("other", [with_other_token, with_other_configuration])
async def test_a_changed_target_counts_for_a_trigger_that_was_surely_not_sent(
    world: World, other: Target
) -> None:
    """It goes to the new target, once."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None))
    await world.steps.step(job_id)
    target = await other(world)
    await retarget(world, job_id, **target)
    await world.step_until_waiting(job_id)
    states = [trigger.state for trigger in await world.store.triggers(job_id)]
    assert (states, len(world.keboola.created)) == (["succeeded"], 1)
    body = json.loads(posts(world.keboola)[-1])
    assert body["config"] == target.get("configuration_id", "cfg")
    expected = "kbc-second" if "secret" in target else standins.KEBOOLA_TOKEN
    assert standins.credential(world.keboola.requests[-1]) == expected


async def test_a_changed_stack_counts_for_a_trigger_that_was_surely_not_sent(world: World) -> None:
    """The new stack gets the one job, the old one hears no more."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None))
    await world.steps.step(job_id)
    heard = world.keboola.request_count
    with standins.Keboola() as second:
        await retarget(world, job_id, stack_url=second.url)
        await world.step_until_waiting(job_id)
        assert len(second.created) == 1
    assert (world.keboola.request_count, world.keboola.created) == (heard, [])


async def test_a_target_changed_during_a_post_that_fails_counts_too(world: World) -> None:
    """Once Keboola has said 429 the trigger was surely not sent: the new target gets the job."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None))
    gate = world.keboola.gate(POST, after_acting=False)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    await retarget(world, job_id, configuration_id="mended")
    gate.release()
    await step
    await world.step_until_waiting(job_id)
    assert [job["config"] for job in world.keboola.created] == ["mended"]


@Given("resent", [False, True], ids=["unknown", "to-be-resent"])
async def test_a_changed_target_does_not_move_a_trigger_that_may_have_arrived(
    world: World, resent: bool
) -> None:
    """It is searched for, and sent again, where it went; a second target would make two of it."""
    job_id = await lost(world, Fault.status(500))
    if resent:
        world.keboola.fault(POST, Fault.rate_limited(None))
        while len(posts(world.keboola)) < 2:
            await waits(world, job_id, 1)
        assert (await trigger_of(world, job_id)).state == "pending"
    with standins.Keboola() as second:
        await retarget(world, job_id, stack_url=second.url)
        await world.step_until_waiting(job_id)
        assert second.request_count == 0
    assert (len(world.keboola.created), len(set(posts(world.keboola)))) == (1, 1)


async def test_a_round_left_behind_loses_no_trigger_when_the_target_changes(world: World) -> None:
    """Decided is decided: batch_1's trigger arrives though the job watches batch_2 by now."""
    job_id = await ready(world)
    world.keboola.fault(POST, Fault.rate_limited(None))
    await world.steps.step(job_id)
    world.openai.batch("batch_2", "completed")
    await rewatch(world, job_id, "batch_2")
    await retarget(world, job_id, configuration_id="mended")
    await world.step_until_waiting(job_id)
    ids = [world.keboola.variables(job)["batch_ids_completed"] for job in world.keboola.created]
    assert sorted(ids) == ['["batch_1"]', '["batch_2"]']


async def test_a_removed_job_is_not_checked(world: World) -> None:
    """It has left jobs.yaml; its batches are nobody's business any more."""
    world.openai.batch("batch_1", "completed")
    job_id = await file_job(world)
    await removed(world, job_id)
    assert (await world.steps.step(job_id)).wait is None
    assert world.openai.request_count == 0
    assert job_id not in await world.store.schedule()


@Given("fault", [Fault.rate_limited(None), Fault.drop_reply(), Fault.status(500)])
async def test_the_trigger_of_a_removed_job_is_carried_to_its_end(
    world: World, fault: Fault
) -> None:
    """Decided before the job left the file, it is sent, settled and followed all the same."""
    world.openai.batch("batch_1", "completed")
    job_id = await file_job(world)
    world.keboola.fault(POST, fault)
    await world.steps.step(job_id)
    await removed(world, job_id)
    assert job_id in await world.store.schedule()
    await world.step_until_waiting(job_id)
    assert (await trigger_of(world, job_id)).state == "succeeded"
    assert len(world.keboola.created) == 1


# --- Clocks --------------------------------------------------------------------------------------


@Given("ahead", [-40_000_000.0, -3600.0, -400.0, 250.0, 400.0, 3600.0, 40_000_000.0])
async def test_a_clock_that_is_wrong_doubles_no_trigger(world: World, ahead: float) -> None:
    """Keboola's time counts in its search, and we know it from its answers."""
    world.clock.set_by(ahead)
    job_id = await lost(world, Fault.act_then_reset())
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), await status(world, job_id)) == (1, "completed")


@Given("code", [None, 500], ids=["arrived", "not-arrived"])
async def test_keboolas_clock_need_not_be_known(world: World, code: int | None) -> None:
    """Without a Date, and with a clock of ours that is far ahead: the search before a resend has
    no bound in time."""
    world.keboola.dated = lambda answer: answer  # type: ignore[method-assign]
    world.clock.set_by(7200.0)
    job_id = await lost(world, Fault.status(code) if code else Fault.drop_reply())
    await world.step_until_waiting(job_id)
    assert (len(world.keboola.created), len(posts(world.keboola))) == (1, 2 if code else 1)
    assert await status(world, job_id) == "completed"


@Given("step", [-86_400.0, -3600.0, 60.0, 3600.0, 86_400.0])
async def test_a_clock_set_in_the_settle_window_changes_nothing(world: World, step: float) -> None:
    """As many searches over as long a time, and one effect."""
    world.keboola.search_lag = 1e6
    job_id, start = await lost(world, Fault.drop_reply()), world.clock.steady()
    await waits(world, job_id, 1)
    world.clock.set_by(step)
    while (rest := start + WINDOW - world.clock.steady()) > 0:
        stepped = await world.steps.step(job_id)
        assert stepped.wait is not None and stepped.wait <= rest
        world.clock.turn(stepped.wait)
    assert len(posts(world.keboola)) == 1 and 3 <= world.keboola.count(SEARCH) <= 6
    world.keboola.search_lag = 0.0
    await world.step_until_waiting(job_id)
    assert (len(world.keboola.created), await status(world, job_id)) == (1, "completed")


# --- What others say, and what is missing --------------------------------------------------------


@Given("code", [400, 401, 404, 405, 410])
async def test_what_a_router_says_ends_nothing(world: World, code: int) -> None:
    """A page that is not in the API's own form says nothing of batch or trigger: asked again, and
    searched for, until those are there that know."""
    job_id = await ready(world)
    page = Fault.status(code, body="404 page not found")
    world.openai.fault(CHECK, page, times=9)
    world.keboola.fault(INDEX, page, times=3)
    world.keboola.fault(POST, page, times=1)
    world.keboola.fault(SEARCH, page, times=3)
    world.keboola.fault(FOLLOW, page, times=3)
    world.clock.turn(3600)
    await world.step_until_waiting(job_id, 60)
    assert (await status(world, job_id), len(world.keboola.created)) == ("completed", 1)


async def test_a_search_that_is_refused_for_hours_leaves_the_trigger_on_hold(world: World) -> None:
    """Not for a day in silence: a person is told, and retry asks once more."""
    job_id = await lost(world, Fault.drop_reply())
    world.keboola.fault(SEARCH, Fault.status(403), times=None)
    start = world.clock.steady()
    await world.step_until_waiting(job_id)
    assert 4 * 3600 <= world.clock.steady() - start <= 6 * 3600
    held = await trigger_of(world, job_id)
    assert (held.state, await status(world, job_id)) == ("held", "failed")
    assert "403" in await last_error(world, job_id) and "retry" in await last_error(world, job_id)
    world.keboola.heal()
    await world.store.retry_job(job_id, world.clock())
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), await status(world, job_id)) == (1, "completed")


async def test_a_stop_leaves_no_trigger_as_sending_that_never_left(world: World) -> None:
    """More triggers than a stack has connections: who waits for one is still to be sent."""
    ids = [await ready(world)]
    ids += [await world.job(f"job-{n}") for n in range(2 * tecko.CALLS_PER_STACK)]
    await asyncio.to_thread(world.keboola.fault, POST, Fault.hang(), None)
    steps = [asyncio.create_task(world.steps.step(job_id)) for job_id in ids]
    await until(lambda: world.keboola.count(POST) == tecko.CALLS_PER_STACK)
    await until(lambda: world.openai.count(CHECK) == len(ids))
    for step in steps:
        step.cancel()
    await asyncio.wait(steps)
    states = [(await trigger_of(world, job_id)).state for job_id in ids]
    assert states.count("sending") == world.keboola.count(POST)
    assert set(states) == {"sending", "pending"}


@Given("late", [60, 10**6], ids=["comes", "never-comes"])
async def test_a_batch_with_output_waits_for_its_file(world: World, late: int) -> None:
    """Its counts are there before the file's name: looked at again soon, and fired without it only
    after some minutes, which is said."""
    batch = world.openai.batch("batch_1", "completed", output_file_id=None)
    job_id, start = await world.job(), world.clock()
    stepped = await world.steps.step(job_id)
    assert stepped.wait is not None and stepped.wait <= 30 and posts(world.keboola) == []
    assert "has yet to name its output file" in await last_error(world, job_id)
    while not posts(world.keboola):
        world.clock.turn(15)
        if world.clock() - start >= late:
            batch.become("completed", output_file_id="file-late")
        await world.steps.step(job_id)
    waited, files = world.clock() - start, made_variables(world.keboola)["output_file_ids"]
    said = " ".join(row.message for row in await world.store.logs(job_id, 9))
    assert ("OpenAI names no output file" in said) == (files == "[]")
    assert (waited, files) == ((60, '["file-late"]') if late == 60 else (300, "[]"))


async def test_a_clock_set_back_fires_no_batch_without_its_file(world: World) -> None:
    """What was seen a moment ago lies in the future then, and is as young as before."""
    world.openai.batch("batch_1", "completed", output_file_id=None)
    job_id = await world.job()
    await world.steps.step(job_id)
    world.clock.set_by(-30)
    await world.steps.step(job_id)
    assert posts(world.keboola) == []


@Given("name", ["ALL_PROXY", "SSL_CERT_FILE"])
async def test_an_environment_without_a_client_is_told_and_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At the job's pace, by its last error: no silent hour, no search for what was never sent."""
    job_id = await ready(world)
    with monkeypatch.context() as broken:
        broken.setenv(name, "socks5://127.0.0.1:9" if name == "ALL_PROXY" else "/nowhere.pem")
        assert await waits(world, job_id, 4) == BACKOFF[:4]
        assert "no HTTP client can be made" in await last_error(world, job_id)
    await world.steps.openai.retrieve(tecko.SecretValue(standins.OPENAI_KEY), "batch_1")
    with monkeypatch.context() as broken:
        broken.setenv(name, "socks5://127.0.0.1:9" if name == "ALL_PROXY" else "/nowhere.pem")
        assert await waits(world, job_id, 2) == [1.0, 2.0]
        assert "no HTTP client can be made" in await last_error(world, job_id)
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), world.keboola.count(SEARCH)) == (1, 0)


# --- Nobody waits for others ---------------------------------------------------------------------


async def test_the_calls_of_a_key_at_once_are_bounded_and_leave_room_for_another(
    world: World,
) -> None:
    """Ten batches of a key that hangs: eight requests; another key's job is done meanwhile."""
    ids = [f"batch_{n}" for n in range(10)]
    await world.secret("hung", "openai", "sk-hung")
    world.openai.many("sk-hung", ids)
    hung = await world.job("hung", openai_secret="hung", batch_ids=ids)
    good = await ready(world)
    world.openai.fault(CHECK, Fault.hang(), times=None, key="sk-hung")
    step = asyncio.create_task(world.steps.step(hung))
    await until(lambda: asked_with(world.openai, "sk-hung") >= tecko.IN_FLIGHT_PER_KEY)
    await world.step_until_waiting(good)
    assert asked_with(world.openai, "sk-hung") == tecko.IN_FLIGHT_PER_KEY
    assert (await status(world, good), step.done()) == ("completed", False)
    step.cancel()
    await asyncio.wait([step])


CROWD = """\
database: crowd.db
secrets:
  hung:    {type: openai, env: HUNG}
  limited: {type: openai, env: LIMITED}
  good:    {type: openai, env: GOOD}
  keboola: {type: keboola, env: TOKEN}
jobs:
"""
CROWD_JOB = """\
  - name: {name}
    poll_interval: 1s
    watch: {{secret: {secret}, batch_ids: [batch_{name}]}}
    trigger: {{secret: keboola, stack_url: "{stack}", component_id: comp, configuration_id: {name}}}
"""


async def test_a_hanging_key_a_limited_key_and_a_hanging_stack_delay_nobody(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Their requests are still open, or refused for long, when all that the others do is done."""
    env = {"HUNG": "sk-hung", "LIMITED": "sk-limited", "GOOD": "sk-good"}
    jobs = [("hung1", "hung"), ("hung2", "hung"), ("limited", "limited"), ("stuck", "good")]
    jobs += [("good1", "good"), ("good2", "good")]
    with standins.Keboola() as stuck:
        text = CROWD
        for name, secret in jobs:
            openai.batch(f"batch_{name}", "completed", key=f"sk-{secret}")
            stack = (stuck if name == "stuck" else keboola).url
            text += CROWD_JOB.format(name=name, secret=secret, stack=stack)
        openai.fault(CHECK, Fault.hang(), times=None, key="sk-hung")
        openai.fault(CHECK, Fault.rate_limited(600), times=None, key="sk-limited")
        stuck.fault("*", Fault.hang(), times=None)
        gates = [openai.gate(f"GET /v1/batches/batch_good{n}", False) for n in (1, 2)]
        (tmp_path / "jobs.yaml").write_text(text)
        async with serving(tmp_path, openai, env | {"TOKEN": standins.KEBOOLA_TOKEN}) as service:
            await until(lambda: asked_with(openai, "sk-hung") == 2 and stuck.request_count == 1)
            await until(lambda: asked_with(openai, "sk-limited") == 1)
            for gate in gates:
                gate.release()
            await until(lambda: len(keboola.created) == 2)
            checked = {j.name: j.last_check_at for j in await service.store.jobs()}
            assert (checked["hung1"], checked["hung2"]) == (None, None)
            assert (asked_with(openai, "sk-hung"), stuck.request_count) == (2, 1)
            assert asked_with(openai, "sk-limited") == 1
            openai.stop()  # lets go of what hangs, so that the drain need not wait for it
            stuck.stop()
    assert sorted(job["config"] for job in keboola.created) == ["good1", "good2"]


@contextlib.asynccontextmanager
async def serving(
    folder: Path, openai: standins.OpenAI, env: Mapping[str, str]
) -> AsyncIterator[tecko.Service]:
    """The real service in this process, on the jobs.yaml of `folder`."""
    environ = ENVIRONMENT | {"OPENAI_BASE_URL": openai.base_url} | dict(env)

    def load() -> tecko.Config:
        return tecko.load_config(folder / "jobs.yaml", environ)

    async with tecko.make_service(load(), load) as service:
        yield service


# --- Deadlines -----------------------------------------------------------------------------------

# What waits for the real deadlines (15 and 20 s) runs all at once, in a thread beside the tests
# above, and is looked at last.


class Slow:
    """One case: a world of its own, what went wrong in it, and what one step made of it."""

    def __init__(self, route: str, fault: Fault, ends: str) -> None:
        self.route, self.fault, self.ends = route, fault, ends
        self.result: Future[tuple[tecko.StepResult, str]] = Future()

    async def run(self, folder: Path) -> None:
        with standins.OpenAI() as openai, standins.Keboola() as keboola:
            world, close = await make_world(folder, openai, keboola, {})
            try:
                await world.secret("openai", "openai", standins.OPENAI_KEY)
                await world.secret("keboola", "keboola", standins.KEBOOLA_TOKEN)
                self.result.set_result(await self.one_step(world))
            except BaseException as error:
                self.result.set_exception(error)
                raise
            finally:
                await close()

    async def one_step(self, world: World) -> tuple[tecko.StepResult, str]:
        """The step that meets the fault, and how the job ends after it."""
        job_id = await ready(world)
        if self.route in (SEARCH, FOLLOW):
            world.keboola.runs_until_told = True
            if self.route == SEARCH:
                world.keboola.fault(POST, Fault.drop_reply())
            await world.steps.step(job_id)
        for server in (world.openai, world.keboola):
            server.fault(self.route, self.fault)
        stepped = await world.steps.step(job_id)
        world.keboola.runs_until_told = False
        await world.step_until_waiting(job_id)
        return stepped, f"{await status(world, job_id)} {len(posts(world.keboola))}"


HANGING = {
    "check-hangs": Slow(CHECK, Fault.hang(), "completed 1"),
    "check-drips": Slow(CHECK, Fault.drip(), "completed 1"),
    "index-hangs": Slow(INDEX, Fault.hang(), "completed 1"),
    "post-hangs": Slow(POST, Fault.hang(), "completed 2"),
    "post-acts-and-hangs": Slow(POST, Fault.act_then_hang(), "completed 1"),
    "post-drips": Slow(POST, Fault.drip(), "completed 1"),
    "search-hangs": Slow(SEARCH, Fault.hang(), "completed 1"),
    "follow-drips": Slow(FOLLOW, Fault.drip(), "completed 1"),
}


@pytest.fixture(scope="module", autouse=True)
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs the cases of HANGING in a thread, for as long as this file's tests run."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    async def everything() -> None:
        cases = [c.run(tmp_path_factory.mktemp(name)) for name, c in HANGING.items()]
        started.set()
        await asyncio.gather(*cases, return_exceptions=True)

    running: Coroutine[Any, Any, None] = everything()
    task = loop.create_task(running)
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    started.wait(10)
    yield
    loop.call_soon_threadsafe(task.cancel)
    thread.join(30)
    loop.close()


@Given("name", HANGING)
def test_a_call_that_hangs_or_drips_is_given_up_and_done_again(name: str) -> None:
    """The step comes back with an error, and what follows is as after any lost answer."""
    stepped, ended = HANGING[name].result.result(timeout=40)
    assert "in time" in str(stepped.error)
    assert ended == HANGING[name].ends
