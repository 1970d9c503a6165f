"""The stand-ins answer as the published contracts say, and fail as they are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, ConflictError, NotFoundError
from standins import KEBOOLA_TOKEN, OPENAI_KEY, Elsewhere, Fault, Keboola, OpenAI, Source

BATCH_REQUIRED = {
    *("id", "object", "endpoint", "input_file_id"),
    *("completion_window", "status", "created_at"),
}
JOB_REQUIRED = {
    *("id", "runId", "project", "token", "status", "mode"),
    *("component", "createdTime", "isFinished", "url"),
}
OPENAI_ERROR = {"type", "message", "param", "code"}
KEBOOLA_ERROR = {"error", "code", "status", "exceptionId"}

VARIABLES = {"values": [{"name": "teckochecker_trigger_id", "value": "t-1"}]}
BODY: dict[str, Any] = {"component": "comp", "config": "7", "variableValuesData": VARIABLES}


@pytest.fixture
def openai() -> Iterator[OpenAI]:
    """A Batch API with no batches."""
    with OpenAI() as standin:
        yield standin


@pytest.fixture
def keboola() -> Iterator[Keboola]:
    """A stack with its queue."""
    with Keboola() as standin:
        yield standin


@pytest.fixture
def queue(keboola: Keboola) -> Iterator[httpx2.Client]:
    """A client of the queue that has a valid token and little patience."""
    headers = {"X-StorageApi-Token": KEBOOLA_TOKEN}
    with httpx2.Client(base_url=keboola.queue_url, headers=headers, timeout=0.5) as client:
        yield client


def sdk(openai: OpenAI, key: str = OPENAI_KEY) -> AsyncOpenAI:
    """The official client, which does not retry by itself."""
    return AsyncOpenAI(base_url=openai.base_url, api_key=key, max_retries=0)


# --- OpenAI --------------------------------------------------------------------------------------


async def test_a_batch_has_what_the_contract_requires(openai: OpenAI) -> None:
    """A completed batch has the required fields, its moments, counts that add up, and files."""
    openai.batch("batch_1", "completed", total=5, failed=2, created_at=1_700_000_000)
    async with sdk(openai) as client:
        batch = await client.batches.retrieve("batch_1")
    assert batch.to_dict().keys() >= BATCH_REQUIRED
    assert batch.request_counts and batch.request_counts.completed == 3
    assert (batch.output_file_id, batch.error_file_id) == ("file-out-batch_1", "file-err-batch_1")
    assert batch.completed_at and batch.created_at == 1_700_000_000


async def test_a_batch_becomes_something_else(openai: OpenAI) -> None:
    """What is changed in the builder is what the next request sees, unknown statuses too."""
    batch = openai.batch("batch_1", "validating")
    async with sdk(openai) as client:
        seen = []
        for status in ("in_progress", "cancelling", "cancelled", "pondering"):
            batch.become(status, completed=3)
            seen.append(await client.batches.retrieve("batch_1"))
    assert [batch.status for batch in seen] == [
        "in_progress",
        "cancelling",
        "cancelled",
        "pondering",
    ]
    assert [batch.output_file_id for batch in seen] == [None, None, "file-out-batch_1", None]
    assert seen[1].cancelling_at and not seen[1].cancelled_at and seen[2].cancelled_at


def test_told_fields_win_and_empty_ones_can_be_left_out() -> None:
    """A file told to be None stays None, and without nulls only fields with a value are sent."""
    openai = OpenAI(nulls=False)
    batch = openai.batch("batch_1", output_file_id=None).become("completed")
    assert "output_file_id" not in batch.fields() and None not in batch.fields().values()
    assert openai.batch("batch_2", "failed").fields()["errors"]["data"]
    assert openai.batch("batch_3", "completed", completed=4).fields()["request_counts"] == {
        "total": 10,
        "completed": 4,
        "failed": 0,
    }


def test_a_script_changes_a_batch_by_time(openai: OpenAI) -> None:
    """Steps that are due are taken in order, later ones are not."""
    batch = openai.batch("batch_1", "validating")
    steps = [(3600.0, "failed", {}), (0.0, "in_progress", {}), (0.0, "completed", {"failed": 1})]
    openai.script("batch_1", steps)
    assert batch.status == "completed"
    assert batch.fields()["request_counts"] == {"total": 10, "completed": 9, "failed": 1}


async def test_keys_see_their_own_batches_only(openai: OpenAI) -> None:
    """An unknown key is a 401, another key's or a removed batch a 404, each in OpenAI's words."""
    openai.batch("batch_1")
    openai.key("sk-other")
    async with sdk(openai, "sk-unknown") as unknown, sdk(openai, "sk-other") as other:
        with pytest.raises(AuthenticationError) as refused:
            await unknown.batches.retrieve("batch_1")
        with pytest.raises(NotFoundError) as missing:
            await other.batches.retrieve("batch_1")
    assert refused.value.code == "invalid_api_key"
    assert missing.value.response.json()["error"].keys() == OPENAI_ERROR


async def test_lists_page_newest_first(openai: OpenAI) -> None:
    """Following the cursor visits every batch of the key once, the newest first."""
    names = [f"batch_{number}" for number in range(250)]
    openai.many(OPENAI_KEY, names, created_at_start=1_700_000_000)
    openai.batch("batch_old", created_at=1_600_000_000)
    openai.remove("batch_7")
    async with sdk(openai) as client:
        page = await client.batches.list(limit=100)
        everything = [batch.id async for batch in page]
    names.remove("batch_7")
    assert everything == [*reversed(names), "batch_old"]
    assert page.has_more and openai.count("GET /v1/batches") == 3


def test_a_page_says_where_it_begins_and_ends(openai: OpenAI) -> None:
    """A list carries its first and last id, and a page holds 20 unless asked otherwise."""
    openai.many(OPENAI_KEY, [f"batch_{number}" for number in range(21)])
    headers = {"Authorization": f"Bearer {OPENAI_KEY}"}
    page = httpx2.get(f"{openai.base_url}/batches", headers=headers).json()
    assert page.pop("object") == "list" and len(page.pop("data")) == 20
    assert page == {"first_id": "batch_20", "last_id": "batch_1", "has_more": True}


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"after": "batch_unknown"}])
async def test_a_bad_page_is_refused(openai: OpenAI, query: dict[str, Any]) -> None:
    """A limit outside 1 to 100 and an unknown cursor are errors, and say which it was."""
    openai.batch("batch_1")
    async with sdk(openai) as client:
        with pytest.raises(BadRequestError) as refused:
            await client.batches.list(**query)
    assert refused.value.param == next(iter(query))


async def test_cancelling(openai: OpenAI) -> None:
    """A running batch can be cancelled, an ended one cannot."""
    openai.batch("batch_1")
    openai.batch("batch_2", "completed")
    async with sdk(openai) as client:
        assert (await client.batches.cancel("batch_1")).status == "cancelling"
        with pytest.raises(ConflictError):
            await client.batches.cancel("batch_2")


# --- Keboola -------------------------------------------------------------------------------------


def test_the_index_names_the_queue(keboola: Keboola) -> None:
    """The stack's index needs no token; everything else does."""
    index = httpx2.get(f"{keboola.url}/v2/storage").json()
    urls = {service["id"]: service["url"] for service in index["services"]}
    assert index["api"] == "storage" and urls["queue"] == keboola.queue_url != keboola.url
    for url in (f"{keboola.url}/v2/storage/tokens/verify", f"{keboola.queue_url}/jobs/1"):
        refused = httpx2.get(url, headers={"X-StorageApi-Token": "wrong"})
        assert refused.status_code == 401 and refused.json().keys() == KEBOOLA_ERROR


def test_a_job_is_created_and_ends(keboola: Keboola, queue: httpx2.Client) -> None:
    """A new job is `created` in its own answer, and ended by the next one as it takes no time."""
    answer = queue.post("/jobs", json=BODY)
    job = answer.json()
    assert answer.status_code == 201 and job.keys() >= JOB_REQUIRED
    assert (job["status"], job["isFinished"], job["startTime"]) == ("created", False, None)
    ended = queue.get(f"/jobs/{job['id']}").json()
    assert (ended["status"], ended["isFinished"]) == ("success", True)
    assert ended["endTime"] and ended["result"]["message"] and ended["durationSeconds"] == 0
    assert keboola.jobs_of("t-1") == keboola.created == [ended]


def test_a_job_runs_until_it_is_told(keboola: Keboola, queue: httpx2.Client) -> None:
    """A job without an end stays in processing until it is finished or killed."""
    keboola.runs_until_told = True
    one, two = (queue.post("/jobs", json=BODY).json()["id"] for _ in range(2))
    assert {job["status"] for job in keboola.created} == {"processing"}
    keboola.finish(one, "error", "no such table")
    assert queue.post(f"/jobs/{two}/kill").status_code == 202
    failed, killed = keboola.created
    assert (failed["status"], failed["result"]["message"]) == ("error", "no such table")
    assert (killed["status"], killed["desiredStatus"]) == ("terminated", "terminating")


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {**BODY, "component": ""},
        {**BODY, "config": 7},
        {**BODY, "mode": "fast"},
        {**BODY, "variableValuesData": {}},
        {**BODY, "variableValuesData": {"values": [{"name": "a"}]}},
        {**BODY, "variableValuesData": {"values": [{"name": "a", "value": ""}]}},
        {**BODY, "variableValuesData": {"values": [{"name": "a", "value": 1}]}},
    ],
)
def test_a_bad_job_is_refused(keboola: Keboola, queue: httpx2.Client, body: object) -> None:
    """What the contract forbids, and an empty variable, is a 400 and creates nothing."""
    answer = queue.post("/jobs", json=body)
    assert answer.status_code == 400 and answer.json().keys() == KEBOOLA_ERROR
    assert keboola.created == []


def test_unknown_configurations_can_be_refused(keboola: Keboola, queue: httpx2.Client) -> None:
    """With a list of configurations, any other one is a 404."""
    keboola.only_configurations = {("comp", "7")}
    assert queue.post("/jobs", json=BODY).status_code == 201
    assert queue.post("/jobs", json={**BODY, "config": "8"}).status_code == 404


def test_search_filters_and_pages(keboola: Keboola, queue: httpx2.Client) -> None:
    """A search selects by component, configuration and creation time, newest first."""
    first, second = (queue.post("/jobs", json=BODY).json() for _ in range(2))
    queue.post("/jobs", json={**BODY, "config": "8"})

    def ids(**params: Any) -> list[str]:
        return [job["id"] for job in queue.get("/search/jobs", params=params).json()]

    both = [second["id"], first["id"]]
    assert ids(componentId="comp", configId="7") == ids(**{"config[]": ["7", "9"]}) == both
    assert ids(config="7", limit=1, offset=1, sortOrder="asc") == both[:1]
    assert ids(config="7", createdTimeFrom=first["createdTime"]) == both
    assert ids(createdTimeFrom="2999-01-01T00:00:00Z") == ids(createdTimeTo="2001-01-01") == []


def test_search_lags_and_hides(keboola: Keboola, queue: httpx2.Client) -> None:
    """Jobs too young for the index and hidden ones are missing from searches, not from /jobs."""
    job_id = queue.post("/jobs", json=BODY).json()["id"]
    keboola.search_lag = 3600.0
    assert queue.get("/search/jobs").json() == []
    keboola.search_lag = 0.0
    assert len(queue.get("/search/jobs").json()) == 1
    keboola.hide_from_search(lambda job: job["id"] == job_id)
    assert queue.get("/search/jobs").json() == []
    assert queue.get(f"/jobs/{job_id}").status_code == 200


# --- Source --------------------------------------------------------------------------------------

RECORDS = [{"id": n, "at": f"2024-01-{n + 1:02}T00:00:00Z"} for n in range(25)]


@pytest.fixture
def source() -> Iterator[Source]:
    """An API with 25 records and a file."""
    with Source() as standin:
        standin.records = list(RECORDS)
        standin.file("/data.csv", b"id,name\n1,one\n")
        yield standin


def pages(source: Source, most: int = 9, **params: Any) -> list[list[int]]:
    """The ids of each page, as a client gets them that follows the style up to an empty page."""
    found: list[list[int]] = []
    url: str | None = source.items_url
    with httpx2.Client() as client:
        while url and len(found) < most:
            answer = client.get(url, params=params or None).raise_for_status()
            data = answer.json()
            items = data if isinstance(data, list) else data["data"]
            found.append([item["id"] for item in items])
            match source.style:
                case "link":
                    url, params = answer.links.get("next", {}).get("url"), {}
                case "cursor":
                    params = {**params, "cursor": data["next_cursor"]}
                    url = url if data["next_cursor"] else None
                case "page":
                    params = {**params, "page": len(found) + 1}
                case "offset":
                    params = {**params, "offset": sum(map(len, found))}
            if source.style in ("page", "offset") and not items:
                url = None
    return [page for page in found if page]


def places(*bounds: Sequence[int]) -> list[list[int]]:
    """Pages as the places where they begin and end."""
    return [list(range(*pair)) for pair in bounds]


@pytest.mark.parametrize("style", ["link", "cursor", "page", "offset"])
def test_every_style_pages_through_everything(source: Source, style: Any) -> None:
    """Pages are of the default size or the one asked for, as far as the cap allows."""
    source.style = style
    assert pages(source) == places((0, 10), (10, 20), (20, 25))
    source.page_cap = 12
    size = "per_page" if style in ("link", "page") else "limit"
    assert pages(source, **{size: 100}) == places((0, 12), (12, 24), (24, 25))
    assert source.asked()[-1].keys() <= {"page", "per_page", "limit", "offset", "cursor"}


@pytest.mark.parametrize(
    ("style", "query"),
    [
        ("page", {"page": 0}),
        ("link", {"per_page": 0}),
        ("offset", {"offset": -1}),
        ("offset", {"limit": "x"}),
        ("cursor", {"cursor": "10"}),
        ("plain", {"since": "yesterday"}),
    ],
)
def test_what_no_page_can_be_is_refused(source: Source, style: Any, query: Any) -> None:
    """A bad place, size, cursor or watermark is a 400 that names it."""
    source.style, source.since_field = style, "at"
    answer = httpx2.get(source.items_url, params=query)
    assert answer.status_code == 400 and next(iter(query)) in answer.json()["error"]


def test_lists_can_be_inside_of_something(source: Source) -> None:
    """Unpaged styles answer with everything, under the path that is set."""
    assert httpx2.get(source.items_url).json() == RECORDS
    source.style = "wrapped"
    assert httpx2.get(source.items_url).json() == {"items": RECORDS}
    source.items_path = "result.rows"
    assert httpx2.get(source.items_url).json() == {"result": {"rows": RECORDS}}


@pytest.mark.parametrize("since", ["2024-01-24T00:00:00Z", "2024-01-24T01:00:00+01:00", 1706054400])
def test_since_includes_its_moment(source: Source, since: object) -> None:
    """Times and numbers are compared as moments, whatever they are written as."""
    source.style, source.since_field = "page", "at"
    assert pages(source, since=since) == [[23, 24]]


def test_the_ways_in_which_pages_never_end(source: Source) -> None:
    """Past the last page comes what was chosen, and always a next one."""
    source.style = "cursor"
    expected: dict[Any, list[int]] = {"last": [20], "first": [0], "empty": [], "itself": [20]}
    for source.endless, starts in expected.items():
        assert [page[0] for page in pages(source, most=5)] == [0, 10, 20, *starts * 2]
    cursors = [query.get("cursor") for query in source.asked()[-5:]]
    assert cursors[0] is None and len(set(cursors[:3])) == 3 and len(set(cursors[2:])) == 1


def test_pages_misbehave_once(source: Source) -> None:
    """A page repeats, lacks a record, or changes what comes after it, and then no more."""
    source.style = "link"
    source.repeat_page(1)
    source.shrink_page(3, by=2)
    assert pages(source) == places((0, 10), (0, 10), (20, 23))
    source.after_page(1, lambda: source.records.pop(0))
    source.after_page(2, lambda: source.fault("GET /items", Fault.status(500)))
    with pytest.raises(httpx2.HTTPStatusError):
        pages(source)
    assert [query.get("page") for query in source.asked()[-3:]] == [None, "2", "3"]
    assert pages(source) == places((1, 11), (11, 21), (21, 25))


@pytest.mark.parametrize("path", ["/items", "/data.csv"])
def test_what_is_known_is_not_sent_again(source: Source, path: str) -> None:
    """Validators are sent when they are on; tags win over dates; a change is seen by both."""
    with httpx2.Client(base_url=source.url) as client:
        assert not {"etag", "last-modified"} & client.get(path).headers.keys()
        source.etags = source.dates = True
        first = client.get(path).headers
        tag = {"If-None-Match": first["ETag"]}
        date = {"If-Modified-Since": first["Last-Modified"]}
        same = [client.get(path, headers=headers) for headers in (tag, date)]
        assert [(answer.status_code, answer.content) for answer in same] == [(304, b"")] * 2
        assert client.get(path, headers={**date, "If-None-Match": '"other"'}).status_code == 200
        source.records = []
        source.file("/data.csv", b"id,name\n")
        assert [client.get(path, headers=h).status_code for h in (tag, date)] == [200, 200]


def test_a_token_opens_everything(source: Source) -> None:
    """Once there is a token, it is wanted in the header that is set, for files too."""
    source.token = "sesame"
    for path in ("/items", "/data.csv"):
        assert httpx2.get(source.url + path).status_code == 401
        bearer = httpx2.get(source.url + path, headers={"Authorization": "Bearer sesame"})
        assert bearer.status_code == 200
    source.token_header = "X-Key: {secret}"
    assert httpx2.get(source.items_url, headers={"X-Key": "sesame"}).status_code == 200
    assert source.requests[-1].headers["x-key"] == "sesame"


def test_links_can_lead_elsewhere(source: Source) -> None:
    """The next page may be given relative to this one, or on another host."""
    source.style = "link"
    for base in ("", "http://elsewhere.invalid"):
        source.link_base = base
        links = httpx2.get(source.items_url, params={"per_page": 20}).links
        assert links["next"]["url"] == f"{base}/items?per_page=20&page=2"
        assert links["last"] == {**links["next"], "rel": "last"}


# --- Faults and gates ----------------------------------------------------------------------------

WITHOUT_ACTING = {
    "status": Fault.status(503),
    "rate_limited": Fault.rate_limited(3),
    "garbage": Fault.garbage(),
    "json": Fault.json({"id": None}, 201),
    "reset": Fault.reset(),
    "hang": Fault.hang(),
}
ACTING = {
    "status": Fault.act_then_status(500),
    "garbage": Fault.act_then_garbage(),
    "drop": Fault.drop_reply(),
    "truncate": Fault.truncate(),
    "reset": Fault.act_then_reset(),
    "hang": Fault.act_then_hang(),
}


def outcome(queue: httpx2.Client) -> str | int:
    """The status of creating a job, or the name of the error that came instead."""
    try:
        return queue.post("/jobs", json=BODY).status_code
    except httpx2.TransportError as error:
        return type(error).__name__


def test_faults_that_do_not_act(keboola: Keboola, queue: httpx2.Client) -> None:
    """Each of these fails in its own way, once, and creates nothing."""
    for fault in WITHOUT_ACTING.values():
        keboola.fault("POST /jobs", fault)
    seen = dict(zip(WITHOUT_ACTING, [outcome(queue) for _ in WITHOUT_ACTING], strict=True))
    assert seen == {
        "status": 503,
        "rate_limited": 429,
        "garbage": 200,
        "json": 201,
        "reset": "ReadError",
        "hang": "ReadTimeout",
    }
    assert keboola.created == [] and outcome(queue) == 201


def test_faults_that_act(keboola: Keboola, queue: httpx2.Client) -> None:
    """Each of these fails in its own way, once, although the job was created."""
    for fault in ACTING.values():
        keboola.fault("POST /jobs", fault)
    seen = dict(zip(ACTING, [outcome(queue) for _ in ACTING], strict=True))
    assert seen == {
        "status": 500,
        "garbage": 200,
        "drop": "RemoteProtocolError",
        "truncate": "RemoteProtocolError",
        "reset": "ReadError",
        "hang": "ReadTimeout",
    }
    assert len(keboola.created) == len(ACTING)


def test_a_dripped_answer_arrives_whole(keboola: Keboola, queue: httpx2.Client) -> None:
    """A dripping server takes longer than the read timeout and still answers."""
    keboola.fault("POST /jobs", Fault.drip(every=0.001))
    answer = queue.post("/jobs", json=BODY)
    assert answer.elapsed.total_seconds() > 0.5 and answer.json().keys() >= JOB_REQUIRED


def test_faults_last_until_healed_and_can_be_for_one_key(openai: OpenAI) -> None:
    """A fault without an end hits only the key it was given for, and goes when it is healed."""
    date = "Wed, 21 Oct 2037 07:28:00 GMT"
    for key in ("sk-1", "sk-2"):
        openai.batch("batch_1", key=key)
    openai.fault("GET /v1/*", Fault.rate_limited(date), times=None, key="sk-1")

    def get(key: str) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.get(f"{openai.base_url}/batches/batch_1", headers=headers)

    answers = [get("sk-1"), get("sk-1"), get("sk-2")]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == date
    assert answers[0].json()["error"].keys() == OPENAI_ERROR
    openai.heal()
    assert get("sk-1").status_code == 200


@pytest.mark.parametrize("after_acting", [False, True])
async def test_a_gate_stops_a_request(keboola: Keboola, after_acting: bool) -> None:
    """At a gate the job exists only if the gate is after acting; released, it is answered."""
    gate = keboola.gate("POST /jobs", after_acting)
    headers = {"X-StorageApi-Token": KEBOOLA_TOKEN}
    async with httpx2.AsyncClient(base_url=keboola.queue_url, headers=headers) as client:
        posting = asyncio.create_task(client.post("/jobs", json=BODY))
        await gate.areached()
        assert len(keboola.created) == after_acting and not posting.done()
        gate.release()
        assert (await posting).status_code == 201
    assert len(keboola.created) == 1


def test_latency_delays_the_answer_not_the_effect(keboola: Keboola, queue: httpx2.Client) -> None:
    """A client that gives up before a slow answer has created its job."""
    keboola.latency = 60.0
    assert outcome(queue) == "ReadTimeout" and len(keboola.created) == 1


# --- The servers ---------------------------------------------------------------------------------


async def test_a_stop_drops_what_hangs(openai: OpenAI) -> None:
    """A stop ends hung requests, held ones too, and leaves neither a thread nor a connection."""
    gate, before = openai.gate("*", after_acting=False), set(threading.enumerate())
    async with httpx2.AsyncClient(base_url=openai.url) as client:
        held = asyncio.create_task(client.get("/held"))
        await gate.areached()
        openai.stop()
        with pytest.raises(httpx2.TransportError):
            await held
    assert not openai.connections
    assert {thread.name for thread in before - set(threading.enumerate())} >= {"OpenAI"}


def test_a_start_after_a_stop_takes_the_same_port() -> None:
    """Connections are refused between a stop and the next start, as in an outage."""
    with Elsewhere() as elsewhere, httpx2.Client(base_url=elsewhere.url) as client:
        elsewhere.stop()
        with pytest.raises(httpx2.ConnectError):
            client.get("/")
        elsewhere.start()
        assert client.get("/").json() == {}


def test_elsewhere_records_who_was_sent_there(openai: OpenAI) -> None:
    """A redirect leads to the other host, which records what it was told."""
    with Elsewhere() as elsewhere, httpx2.Client(follow_redirects=True) as client:
        openai.fault("GET /v1/batches/*", Fault.redirect(f"{elsewhere.url}/trap?a=1&a=2"))
        headers = {"Authorization": "Bearer sk-1"}
        assert client.get(f"{openai.base_url}/batches/b", headers=headers).json() == {}
        (request,) = elsewhere.requests
    assert (request.method, request.path, request.query) == ("GET", "/trap", {"a": ["1", "2"]})
    assert "authorization" in openai.requests[0].headers
    assert "authorization" not in request.headers


def test_counting_goes_on_without_recording() -> None:
    """Routes are matched on the whole path, also when nothing is recorded."""
    with Keboola(record=False) as keboola, httpx2.Client(base_url=keboola.queue_url) as client:
        for path in ("/jobs/1", "/search/jobs", "/jobs"):
            client.get(path)
    assert keboola.count("GET /jobs/*") == keboola.count("GET /search/jobs") == 1
    assert keboola.count("*") == keboola.request_count == 3 and keboola.requests == []
