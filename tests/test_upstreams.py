"""The two upstream classes alone: what they ask, what they believe, and which errors they raise."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import pytest
import standins
from conftest import Clock
from hypothesis import given
from hypothesis import strategies as st
from standins import Fault

import teckochecker as tecko

CHECK, INDEX, POST = "GET /v1/batches/*", "GET /v2/storage", "POST /jobs"
SEARCH, FOLLOW = "GET /search/jobs", "GET /jobs/*"
KEY = tecko.SecretValue(standins.OPENAI_KEY)
TOKEN = tecko.SecretValue(standins.KEBOOLA_TOKEN)

Given = pytest.mark.parametrize


@pytest.fixture
async def batches(openai: standins.OpenAI) -> AsyncIterator[tecko.OpenAI]:
    """Our OpenAI class, on a stand-in that has batch_1."""
    openai.batch("batch_1", "completed", total=9, completed=7, failed=2)
    upstream = tecko.OpenAI(openai.base_url)
    yield upstream
    await upstream.close()


@pytest.fixture
async def queue() -> AsyncIterator[tecko.Keboola]:
    """Our Keboola class."""
    upstream = tecko.Keboola()
    yield upstream
    await upstream.close()


def trigger(stack: str, **facts: Any) -> tecko.Trigger:
    """A trigger whose answer was lost."""
    variable = {"name": standins.TRIGGER_VARIABLE, "value": "t-1"}
    body = {"component": "comp", "config": "cfg", "variableValuesData": {"values": [variable]}}
    lost = tecko.Trigger(
        id="t-1",
        job_id=1,
        round=1,
        state="unknown",
        stack_url=stack,
        secret="keboola",
        body=json.dumps(body),
        partial=False,
        on_ambiguous="resend",
        created_at=time.time(),
        attempts=1,
    )
    return dataclasses.replace(lost, **facts)


async def call(queue: tecko.Keboola, stack: str, route: str) -> object:
    """Make the call that ends at this route of Keboola's."""
    if route == SEARCH:
        return await queue.find(trigger(stack), TOKEN, set())
    if route == FOLLOW:
        return await queue.follow(trigger(stack, keboola_job_id="1000001"), TOKEN)
    return await queue.send(trigger(stack), TOKEN)


# --- Errors --------------------------------------------------------------------------------------

STATUSES = [
    *((code, True) for code in (307, 400, 401, 403, 404, 422)),
    *((code, False) for code in (408, 409, 429, 500, 502, 503, 529)),
]


@Given(("code", "permanent"), STATUSES)
async def test_an_openai_status_becomes_our_error(
    openai: standins.OpenAI, batches: tecko.OpenAI, code: int, permanent: bool
) -> None:
    """With the decision that follows from it."""
    openai.fault(CHECK, Fault.status(code))
    with pytest.raises(tecko.OpenAIError, match=str(code)) as raised:
        await batches.retrieve(KEY, "batch_1")
    error = raised.value
    assert (error.code, error.status, error.http_status) == (2001, code, 502)
    assert (error.permanent, error.sent, error.retry_after) == (permanent, True, None)


@Given(("code", "permanent"), STATUSES)
async def test_a_keboola_status_becomes_our_error(
    keboola: standins.Keboola, queue: tecko.Keboola, code: int, permanent: bool
) -> None:
    """With Keboola's own words and its exceptionId."""
    keboola.fault(
        POST, Fault.status(code, body={"error": "Nope.", "code": 7, "exceptionId": "ex-7"})
    )
    with pytest.raises(tecko.KeboolaError, match=str(code)) as raised:
        await call(queue, keboola.url, POST)
    error = raised.value
    assert (error.code, error.status, error.http_status) == (2002, code, 502)
    assert (error.permanent, error.sent, error.retry_after) == (permanent, True, None)
    assert code == 307 or ("Nope." in str(error) and "ex-7" in str(error))


RETRY_AFTER = [
    ("7", 7.0),
    ("0", 0.0),
    ("-3", 0.0),
    ("soon", None),
    ("", None),
    ("Mon, 01 Jan 2024 00:00:00 GMT", 0.0),
    ("Mon, 01 Jan 2024 00:00:00 +" + "9" * 30, None),
    ("Mon, 01 Jan 99999 00:00:00 GMT", None),
]


@Given(("header", "seconds"), RETRY_AFTER, ids=[str(n) for n in range(len(RETRY_AFTER))])
async def test_a_retry_after_is_read_or_ignored(
    openai: standins.OpenAI, batches: tecko.OpenAI, header: str, seconds: float | None
) -> None:
    """Whatever stands there, the error is still ours."""
    openai.fault(CHECK, Fault.status(503, {"Retry-After": header}))
    with pytest.raises(tecko.OpenAIError) as raised:
        await batches.retrieve(KEY, "batch_1")
    assert raised.value.retry_after == seconds


@Given("ahead", [0.0, -7200.0, 7200.0])
async def test_a_retry_after_of_keboola_is_read_as_a_date(
    keboola: standins.Keboola, queue: tecko.Keboola, ahead: float
) -> None:
    """A date a minute ahead of its own clock is up to a minute, however wrong ours is."""
    keboola.clock_ahead = ahead
    date = formatdate(time.time() + ahead + 60, usegmt=True)
    keboola.fault(POST, Fault.rate_limited(date))
    with pytest.raises(tecko.KeboolaError) as raised:
        await call(queue, keboola.url, POST)
    assert raised.value.retry_after is not None and 50 < raised.value.retry_after <= 60


@Given(
    ("fault", "sent"),
    [(None, False), (Fault.reset(), True), (Fault.drop_reply(), True), (Fault.truncate(), True)],
    ids=["refused", "reset", "dropped", "cut"],
)
async def test_no_answer_says_whether_the_request_can_have_arrived(
    openai: standins.OpenAI,
    keboola: standins.Keboola,
    batches: tecko.OpenAI,
    queue: tecko.Keboola,
    fault: Fault | None,
    sent: bool,
) -> None:
    """`sent` is False only where it surely did not; trying again is always worth it."""
    await queue.prepare(keboola.url)
    for server in (openai, keboola):
        if fault is None:
            server.stop()
        else:
            server.fault("*", fault)
    with pytest.raises(tecko.KeboolaError) as theirs:
        await call(queue, keboola.url, POST)
    with pytest.raises(tecko.OpenAIError) as ours:
        await batches.retrieve(KEY, "batch_1")
    for error in (theirs.value, ours.value):
        assert (error.status, error.permanent, error.sent) == (None, False, sent)


async def test_an_error_repeats_no_secret_and_no_long_page(
    openai: standins.OpenAI, keboola: standins.Keboola, batches: tecko.OpenAI, queue: tecko.Keboola
) -> None:
    """A server that echoes what it got, at length, in many lines."""
    said = f"I got {KEY.reveal()} and {TOKEN.reveal()}\n" * 1000
    openai.fault(CHECK, Fault.status(500, body={"error": {"message": said}}))
    keboola.fault(POST, Fault.status(500, body={"error": said}))
    with pytest.raises(tecko.OpenAIError) as ours:
        await batches.retrieve(KEY, "batch_1")
    with pytest.raises(tecko.KeboolaError) as theirs:
        await call(queue, keboola.url, POST)
    for text in (str(ours.value), str(theirs.value)):
        assert "I got *** and ***" in text
        assert len(text) < 500 and "\n" not in text


# --- Belief --------------------------------------------------------------------------------------


@Given("nulls", [True, False])
async def test_a_batch_is_read_as_the_contract_has_it(nulls: bool) -> None:
    """Empty fields may come as null or not at all."""
    with standins.OpenAI(nulls=nulls) as openai:
        told = openai.batch(
            "batch_1", "expired", total=9, completed=7, failed=2, expires_at=1_000_000_000
        )
        upstream = tecko.OpenAI(openai.base_url)
        seen = await upstream.retrieve(KEY, "batch_1")
        await upstream.close()
    assert seen == tecko.BatchSeen(
        batch_id="batch_1",
        status="expired",
        created_at=told.created_at,
        expires_at=1_000_000_000,
        output_file_id="file-out-batch_1",
        error_file_id="file-err-batch_1",
        requests_total=9,
        requests_completed=7,
        requests_failed=2,
    )


odd = st.sampled_from([1e400, float("nan"), 10**400, 2**63, -(2**63) - 1, "", "\ud800", True])
plain = odd | st.none() | st.integers() | st.floats() | st.text()
anything = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
counts = st.fixed_dictionaries({}, optional=dict.fromkeys(("total", "completed", "failed"), plain))
errors = st.fixed_dictionaries({"data": st.lists(st.fixed_dictionaries({"message": plain}))})
batch_like = st.fixed_dictionaries(
    {"id": st.just("batch_1"), "status": st.just("completed") | plain},
    optional={
        "request_counts": counts | anything,
        "errors": errors | anything,
        "created_at": plain,
        "expires_at": plain,
        "output_file_id": plain,
    },
)


@given(batch_like | anything)
def test_any_json_is_a_batch_that_can_be_stored_or_an_openai_error(data: Any) -> None:
    """Never another error, never a status that does not stand there, never another batch."""
    try:
        seen = tecko.parse_batch("batch_1", data)
    except tecko.OpenAIError:
        return
    assert (seen.batch_id, seen.status) == (data["id"], tecko.one_line(data["status"]))
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        values = dataclasses.astuple(seen)
        db.execute(f"SELECT {', '.join('?' * len(values))}", values)


@Given("odd", [1_732_600_000_000, 253_402_300_800, 1e14, -1, -62_135_596_801, True, "soon", None])
def test_a_time_that_no_calendar_has_is_none(odd: Any) -> None:
    """Milliseconds, or before 1970: it could be neither shown nor counted with."""
    data = {"id": "batch_1", "status": "in_progress", "created_at": odd, "expires_at": odd}
    seen = tecko.parse_batch("batch_1", data)
    assert (seen.created_at, seen.expires_at) == (None, None)


variables = st.fixed_dictionaries({"values": anything})
job_like = st.fixed_dictionaries(
    {"id": st.just("1") | plain, "status": st.just("error") | plain, "isFinished": st.booleans()},
    optional={
        "result": st.fixed_dictionaries({"message": plain}) | anything,
        "variableValuesData": variables | anything,
    },
)


@given(job_like | anything)
def test_any_json_is_a_keboola_job_or_a_keboola_error(data: Any) -> None:
    """A job has an id, a status and an end only where they stand there."""
    try:
        job = tecko.parse_keboola_job(data)
    except tecko.KeboolaError:
        return
    assert job.id and not isinstance(data["id"], bool)
    assert (job.id, job.status) == (str(data["id"]), tecko.one_line(data["status"]))
    assert job.is_finished is data["isFinished"]


@given(job_like | anything)
def test_any_json_can_be_looked_at_for_what_we_started(data: Any) -> None:
    """Other tools' jobs are in the search as well."""
    found, (name, batches) = tecko.purpose_of(data)
    assert {type(found), type(name), type(batches)} <= {type(None), str, list}


# --- Keboola's addresses -------------------------------------------------------------------------


async def test_the_index_is_asked_once_and_without_the_token(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """The queue gets the token, the stack's public index does not."""
    for _ in range(3):
        await call(queue, keboola.url, POST)
    assert (keboola.count(INDEX), keboola.count(POST)) == (1, 3)
    tokens = [standins.credential(request) for request in keboola.requests]
    assert tokens == ["", *[TOKEN.reveal()] * 3]


async def test_every_request_to_keboola_says_who_asks(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """Keboola's support can tell our requests."""
    await call(queue, keboola.url, POST)
    agents = {request.headers["user-agent"] for request in keboola.requests}
    assert agents == {f"TeckoChecker/{tecko.VERSION}"}
    assert keboola.requests[-1].headers["content-type"] == "application/json"


INDEXES: dict[str, Any] = {
    "list": [],
    "no-services": {},
    "null": {"services": None},
    "number": {"services": 5},
    "text": {"services": "queue"},
    "others": {"services": [None, 5, {"id": "import", "url": "https://x.example"}]},
    "no-url": {"services": [{"id": "queue"}]},
    "null-url": {"services": [{"id": "queue", "url": None}]},
    "no-scheme": {"services": [{"id": "queue", "url": "queue.example"}]},
    "other-scheme": {"services": [{"id": "queue", "url": "file:///etc/passwd"}]},
    "bad-host": {"services": [{"id": "queue", "url": "http://["}]},
    "bad-port": {"services": [{"id": "queue", "url": "http://127.0.0.1:999999"}]},
    "bad-port-name": {"services": [{"id": "queue", "url": "http://127.0.0.1:http"}]},
    "space": {"services": [{"id": "queue", "url": "https://exa mple.invalid"}]},
    "control": {"services": [{"id": "queue", "url": "https://exam\x00ple.invalid"}]},
}


@Given("index", INDEXES.values(), ids=list(INDEXES))
async def test_an_index_without_a_usable_queue_is_an_error_and_is_asked_again(
    keboola: standins.Keboola, queue: tecko.Keboola, index: Any
) -> None:
    """Surely nothing was sent; when the index is mended, the next call finds it."""
    keboola.fault(INDEX, Fault.json(index))
    with pytest.raises(tecko.KeboolaError) as raised:
        await call(queue, keboola.url, POST)
    assert not raised.value.sent
    await call(queue, keboola.url, POST)
    assert len(keboola.created) == 1


@Given(
    ("stack", "url", "trusted"),
    [
        ("https://connection.keboola.com", "https://queue.keboola.com", True),
        ("https://connection.keboola.com", "https://gateway.example/queue/v2/", True),
        ("https://connection.keboola.com", "http://queue.keboola.com", False),
        ("https://connection.keboola.com", "http://127.0.0.1:8002/queue", False),
        ("https://connection.keboola.com", "ftp://queue.keboola.com", False),
        ("https://connection.keboola.com", "https://user:pass@queue.keboola.com", False),
        ("https://connection.keboola.com", "https://queue.keboola.com?x=1", False),
        ("https://connection.keboola.com", "https://", False),
        ("https://connection.keboola.com", "", False),
        ("http://127.0.0.1:8001", "http://127.0.0.1:8002", True),
        ("http://127.0.0.1:8001", "http://localhost:8002/queue", True),
        ("http://127.0.0.1:8001", "http://queue.keboola.com", False),
        ("http://127.0.0.1:8001", "https://queue.keboola.com", True),
    ],
)
def test_a_token_goes_to_plain_http_only_on_this_machine(
    stack: str, url: str, trusted: bool
) -> None:
    """With a path or without. A stack that is asked over https cannot send the token elsewhere in
    the clear; what was found instead is said."""
    index = {"services": [{"id": "queue", "url": url}]}
    if trusted:
        assert tecko.queue_url(stack, index) == url.rstrip("/")
    else:
        with pytest.raises(tecko.KeboolaError) as raised:
            tecko.queue_url(stack, index)
        assert tecko.one_line(repr(url)) in str(raised.value) and not raised.value.sent


async def test_a_queue_with_a_path_is_used_with_it(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """As behind a gateway."""
    services = [{"id": "queue", "url": keboola.queue_url + "/gateway"}]
    keboola.fault(INDEX, Fault.json({"services": services}))
    with pytest.raises(tecko.KeboolaError):
        await call(queue, keboola.url, POST)
    assert keboola.requests[-1].path == "/gateway/jobs"


async def test_the_index_is_asked_anew_after_a_refused_connection(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """The queue has moved: its new address is found without a restart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        moved = f"http://127.0.0.1:{free.getsockname()[1]}"
    keboola.fault(INDEX, Fault.json({"services": [{"id": "queue", "url": moved}]}))
    with pytest.raises(tecko.KeboolaError) as raised:
        await call(queue, keboola.url, POST)
    assert not raised.value.sent
    await call(queue, keboola.url, POST)
    assert (keboola.count(INDEX), len(keboola.created)) == (2, 1)


@Given("code", [301, 302, 303, 307, 308])
@Given("route", [INDEX, POST, SEARCH, FOLLOW])
async def test_no_redirect_is_followed(
    keboola: standins.Keboola, queue: tecko.Keboola, route: str, code: int
) -> None:
    """Neither with the token nor without it."""
    with standins.Elsewhere() as elsewhere:
        keboola.fault(route, Fault.redirect(elsewhere.url + "/jobs", code))
        with pytest.raises(tecko.KeboolaError, match="redirect"):
            await call(queue, keboola.url, route)
        assert elsewhere.request_count == 0


# --- Keboola's search ----------------------------------------------------------------------------


@pytest.fixture(params=["UTC", "America/New_York"])
def zone(request: pytest.FixtureRequest) -> Iterator[None]:
    """This machine's time zone, for a test."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("zone")
async def test_a_search_asks_as_the_contract_says(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """By component, configuration and a time in UTC, 300 s before the first POST."""
    sent = datetime(2024, 3, 1, 0, 2, 0, tzinfo=UTC).timestamp()
    assert await queue.find(trigger(keboola.url, sent_at=sent), TOKEN, set()) is None
    query = {name: values for name, [values] in keboola.requests[-1].query.items()}
    since = datetime.fromisoformat(query.pop("createdTimeFrom"))
    assert since == datetime(2024, 2, 29, 23, 57, 0, tzinfo=UTC)
    assert query == {
        "componentId": "comp",
        "configId": "cfg",
        "sortBy": "createdTime",
        "sortOrder": "asc",
        "limit": str(tecko.SEARCH_PAGE),
        "offset": "0",
    }


async def test_a_search_finds_the_trigger_among_others(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """The oldest job that carries the id, not the newest of the configuration."""
    mine = trigger(keboola.url)
    bodies = [mine.body.replace("t-1", "t-0"), mine.body, mine.body, mine.body.replace("1", "2")]
    jobs = [await queue.send(dataclasses.replace(mine, body=b), TOKEN) for b in bodies]
    found = await queue.find(mine, TOKEN, set())
    assert found is not None and found.id == jobs[1].id


def others(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Jobs of another tool."""
    ids = range(first, first + count)
    return [{"id": str(n), "status": "success", "isFinished": True} for n in ids]


async def test_a_search_reads_every_page(keboola: standins.Keboola, queue: tecko.Keboola) -> None:
    """Until one is not full; what is on none of them is not there."""
    keboola.fault(SEARCH, Fault.json(others(tecko.SEARCH_PAGE)))
    keboola.fault(SEARCH, Fault.json(others(tecko.SEARCH_PAGE, 1000)))
    keboola.fault(SEARCH, Fault.json(others(3, 2000)))
    assert await queue.find(trigger(keboola.url), TOKEN, set()) is None
    offsets = [r.query["offset"][0] for r in keboola.requests if r.path == "/search/jobs"]
    assert offsets == ["0", str(tecko.SEARCH_PAGE), str(2 * tecko.SEARCH_PAGE)]


async def test_a_search_that_repeats_its_pages_is_an_error(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """A server that ignores `offset` proves nothing, and is not asked for ever."""
    keboola.fault(SEARCH, Fault.json(others(tecko.SEARCH_PAGE)), times=None)
    for anytime in (False, True):
        with pytest.raises(tecko.KeboolaError, match="repeats its pages"):
            await queue.find(trigger(keboola.url), TOKEN, set(), anytime=anytime)
    assert keboola.count(SEARCH) == 4


async def test_a_search_without_end_is_an_error(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """New jobs on each page, and never a last one."""
    for n in range(tecko.SEARCH_PAGES + 1):
        keboola.fault(SEARCH, Fault.json(others(tecko.SEARCH_PAGE, 1000 * n)))
    with pytest.raises(tecko.KeboolaError, match="did not end"):
        await queue.find(trigger(keboola.url), TOKEN, set())
    assert keboola.count(SEARCH) == tecko.SEARCH_PAGES


async def test_a_search_at_any_time_ends_a_day_before_the_trigger(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """Newest first: what was created before a page that old cannot be ours."""
    mine = trigger(keboola.url, sent_at=1_700_000_000.0)
    for n, created in enumerate(("2023-11-14T22:00:00.000Z", "2023-11-13T22:00:00.000Z")):
        page = [job | {"createdTime": created} for job in others(tecko.SEARCH_PAGE, 1000 * n)]
        keboola.fault(SEARCH, Fault.json(page))
    assert await queue.find(mine, TOKEN, set(), anytime=True) is None
    query = keboola.requests[-1].query
    assert keboola.count(SEARCH) == 2 and query["sortOrder"] == ["desc"]
    assert "createdTimeFrom" not in query


async def test_a_job_of_another_id_is_not_believed(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """A cache or a router that mixes answers up ends no job."""
    keboola.fault(FOLLOW, Fault.json(others(1)[0]))
    with pytest.raises(tecko.KeboolaError, match="about job 1000001 is about 0"):
        await call(queue, keboola.url, FOLLOW)


@Given("ahead", [-4000.0, 0.0, 4000.0])
async def test_keboolas_clock_is_known_from_its_date(
    keboola: standins.Keboola, ahead: float
) -> None:
    """And goes on by the monotonic clock; no wall clock of ours is asked."""
    clock = Clock()
    queue = tecko.Keboola(clock.steady)
    keboola.clock_ahead = ahead
    told = await queue.prepare(keboola.url)
    clock.turn(10.0)
    later = await queue.prepare(keboola.url)
    await queue.close()
    assert told is not None and abs(told - time.time() - ahead) < 5
    assert (later, keboola.count(INDEX)) == (told + 10.0, 1)


async def test_many_that_need_the_index_at_once_ask_for_it_once(
    keboola: standins.Keboola, queue: tecko.Keboola
) -> None:
    """A slow index is no reason to ask forty times."""
    gate = keboola.gate(INDEX, after_acting=True)
    calls = [asyncio.create_task(queue.prepare(keboola.url)) for _ in range(40)]
    await gate.areached()
    gate.release()
    await asyncio.gather(*calls)
    assert keboola.count(INDEX) == 1


# --- Connections ---------------------------------------------------------------------------------


async def test_all_keys_share_one_client_and_its_connections(
    openai: standins.OpenAI, batches: tecko.OpenAI
) -> None:
    """Five keys one after the other need one connection; each sends its own key."""
    keys = [f"sk-shared-{n}" for n in range(5)]
    for key in keys:
        openai.batch("batch_1", key=key)
        await batches.retrieve(tecko.SecretValue(key), "batch_1")
    assert [standins.credential(request) for request in openai.requests] == keys
    assert len(openai.connections) == 1


async def test_only_the_key_goes_along(
    openai: standins.OpenAI, batches: tecko.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the environment says for another key; nor a cookie that was set for one."""
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY", "API_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "from-the-environment")
    cookie = {"Set-Cookie": "session=1; Path=/"}
    openai.fault(CHECK, Fault.status(500, cookie))
    for key in (standins.OPENAI_KEY, standins.OPENAI_KEY, "sk-second"):
        openai.batch("batch_1", key=key)
        with contextlib.suppress(tecko.OpenAIError):
            await batches.retrieve(tecko.SecretValue(key), "batch_1")
    sent = [request.headers for request in openai.requests]
    assert not any("from-the-environment" in str(headers) for headers in sent)
    assert not any("cookie" in headers for headers in sent) and len(sent) == 3


async def test_calls_at_once_are_bounded_for_all_keys_together(
    openai: standins.OpenAI, batches: tecko.OpenAI
) -> None:
    """Ten keys with ten calls each: none gets more than its share, all are answered."""
    keys = [tecko.SecretValue(f"sk-crowd-{n}") for n in range(10)]
    for key in keys:
        openai.batch("batch_1", key=key.reveal())
    openai.latency = 0.02
    seen = await asyncio.gather(*(batches.retrieve(k, "batch_1") for k in keys * 10))
    assert len(seen) == 100
    assert len(openai.connections) <= tecko.IN_FLIGHT
