"""Ingests of REST APIs: paging, secrets, failures, nasty answers, validators, `since`, drift."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import World
from standins import Answer, Fault, Source

import teckochecker as tecko

STYLES: list[Any] = ["link", "cursor", "page", "offset"]
AT_ONCE = {"Retry-After": "0"}  # so that a retry does not wait
NOW = 1_750_000_000.0  # 2025-06-15T15:06:40Z
ITEMS = "GET /items"


class Api(standins.StandIn):
    """An API of an odd kind: `shows` makes its answer, or the JSON of it, out of a query."""

    def __init__(self, shows: Callable[[dict[str, str]], object]) -> None:
        super().__init__()
        self.shows = shows
        self.asked: list[dict[str, str]] = []

    def responders(self) -> Sequence[standins.Respond]:
        return (self._respond,)

    def _respond(self, request: standins.Request) -> Answer:
        self.asked.append({name: values[-1] for name, values in request.query.items()})
        shown = self.shows(self.asked[-1])
        return shown if isinstance(shown, Answer) else Answer(200, standins.as_json(shown))


@pytest.fixture
def elsewhere() -> Iterator[standins.Elsewhere]:
    with standins.Elsewhere() as server:
        yield server


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": n, "title": f"title {n}"} | more for n in range(1, count + 1)]


async def api(world: World, where: Source | str, name: str = "source", **block: Any) -> int:
    """An ingest job of the stand-in's collection, or of any URL."""
    url = where if isinstance(where, str) else where.items_url
    return await world.ingest(name, type="api", url=url, **block)


async def change(world: World, job_id: int, **block: Any) -> None:
    """Edit the block of a job."""
    old = (await world.get(job_id)).spec
    assert isinstance(old, tecko.IngestSpec)
    ingest = old.ingest.model_dump(exclude_unset=True) | block
    flat = {"name": old.name, "poll_interval": 60, "ingest": ingest}
    await world.store.update_job(
        job_id, lambda _: tecko.parse(tecko.IngestSpec, flat), world.clock()
    )


def counts(run: tecko.Run) -> dict[str, int]:
    """What became of a run's records, without the zeros."""
    named = {name: getattr(run, f"records_{name}") for name in tecko.COUNTED}
    return {name: count for name, count in named.items() if count}


async def good(world: World, job_id: int) -> dict[str, int]:
    """A run that has to succeed; its counts."""
    run = await world.run(job_id)
    assert (run.status, run.error_message) == ("success", None)
    return counts(run)


async def failed(world: World, job_id: int) -> str:
    """A run that has to fail, and not for a defect; what it says."""
    run = await world.run(job_id)
    assert run.status == "failed" and "defect" not in str(run.error_message), run.error_message
    return str(run.error_message)


async def ids(world: World) -> list[int]:
    """The ids of all records in the order in which they were written."""
    return [int(key) for key in await world.records()]


async def reasons(world: World) -> dict[str, str]:
    """Why which records were rejected."""
    return {row["place"]: row["reason"] for row in await world.store.rejects(None, 99)}


async def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.005)


# ── Paging ────────────────────────────────────────────────────────────────────────────────────


FIRST_ASKED = {
    "link": [{}, {"page": "2"}, {"page": "3"}],
    "cursor": [{}, {"cursor": standins.write_cursor(10)}, {"cursor": standins.write_cursor(20)}],
    "page": [{"page": "1"}, {"page": "2"}, {"page": "3"}],
    "offset": [{"offset": "0"}, {"offset": "10"}, {"offset": "20"}],
}


@pytest.mark.parametrize("style", STYLES)
async def test_all_pages_in_order(world: World, source: Source, style: Any) -> None:
    """Each of the four ways finds every record in the source's order, and sends but the one
    parameter that it is named after; a second run writes nothing."""
    source.style, source.records = style, rows(25)
    job = await api(world, source, next=style)
    assert await good(world, job) == {"processed": 25, "inserted": 25}
    assert await ids(world) == list(range(1, 26))
    asked = source.asked()
    assert asked[:2] == FIRST_ASKED[style][:2]  # of those that follow, two are under way at once
    assert all(query in asked for query in FIRST_ASKED[style])
    assert await good(world, job) == {"processed": 25, "unchanged": 25}


SIZED = [("link", {}), ("page", {"per_page": "4"}), ("offset", {"limit": "4"})]


@pytest.mark.parametrize(("style", "query"), [*SIZED, ("cursor", {})])
async def test_size(world: World, source: Source, style: Any, query: dict[str, str]) -> None:
    """The size goes out under the usual name, where pages go by number."""
    source.style, source.records, source.page_size = style, rows(6), 4
    job = await api(world, source, next={"type": style, "size": 4})
    assert await good(world, job) == {"processed": 6, "inserted": 6}
    sent = [
        {k: v for k, v in asked.items() if k in ("per_page", "limit")} for asked in source.asked()
    ]
    assert all(one == query for one in sent)


def by_number(query: dict[str, str]) -> object:
    at = int(query["at"])
    return rows(10)[at * 4 : at * 4 + 4] if query["n"] == "4" else "wrong"


def by_place(query: dict[str, str]) -> object:
    at = int(query["at"]) - 1
    return rows(10)[at : at + int(query["n"])]


def by_cursor(query: dict[str, str]) -> object:
    at = int(query.get("at", "0"))
    return {"rows": rows(10)[at : at + 4], "meta": {"next": at + 4 if at < 8 else None}}


@pytest.mark.parametrize(
    ("shows", "paging"),
    [
        (by_number, {"type": "page", "param": "at", "start": 0, "size": 4, "size_param": "n"}),
        (by_place, {"type": "offset", "param": "at", "start": 1, "size": 4, "size_param": "n"}),
        (by_cursor, {"type": "cursor", "param": "at", "path": "meta.next"}),
    ],
)
async def test_own_parameters(world: World, shows: Any, paging: dict[str, Any]) -> None:
    """Parameters' names, the first page's number, the size and the cursor's place can be given."""
    with Api(shows) as server:
        job = await api(world, server.url, next=paging)
        assert await good(world, job) == {"processed": 10, "inserted": 10}
    assert await ids(world) == list(range(1, 11))
    assert all("n" in query for query in server.asked) == ("size" in paging)


@pytest.mark.parametrize("style", ["page", "offset"])
async def test_a_server_that_caps_the_size(world: World, source: Source, style: Any) -> None:
    """More asked for than the server gives: nothing is skipped."""
    source.style, source.records, source.page_cap = style, rows(30), 7
    job = await api(world, source, next={"type": style, "size": 100})
    assert await good(world, job) == {"processed": 30, "inserted": 30}


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("style", ["page", "offset"])
async def test_the_end_of_numbered_pages(world: World, style: Any, status: int) -> None:
    """An empty page or a 404 behind full ones is the end, not an error."""

    def shows(query: dict[str, str]) -> object:
        at = (int(query["page"]) - 1) * 5 if style == "page" else int(query["offset"])
        return rows(10)[at : at + 5] if at < 10 else Answer(status, b"[]")

    with Api(shows) as server:
        job = await api(world, server.url, next=style)
        assert await good(world, job) == {"processed": 10, "inserted": 10}


@pytest.mark.parametrize("style", STYLES)
async def test_no_records_at_all(world: World, source: Source, style: Any) -> None:
    """An empty collection is a good run with nothing in it."""
    source.style = style
    assert await good(world, await api(world, source, next=style)) == {}


async def test_a_link_is_followed_unasked(world: World, source: Source) -> None:
    """Without `next` a Link header counts, relative ones too."""
    source.style, source.records, source.link_base = "link", rows(25), ""
    assert (await good(world, await api(world, source)))["inserted"] == 25


@pytest.mark.parametrize(
    "link",
    [
        '<?page=2>; rel="next"',
        "<?page=2>; rel=next",
        '<?page=1>; rel="first", <?page=2>; title="a, b; c"; rel="next"',
        '<?page=2>; rel="last next"',
        '<?page=2>; REL="Next"',
    ],
)
async def test_forms_of_a_link(world: World, link: str) -> None:
    """rel may have several relations, in any case, quoted or not (RFC 8288, section 3.3)."""

    def shows(query: dict[str, str]) -> object:
        if query.get("page") == "2":
            return [{"id": 2}]
        return Answer(200, b'[{"id": 1}]', {"Link": link})

    with Api(shows) as server:
        assert (await good(world, await api(world, server.url, next="link")))["inserted"] == 2


async def test_a_cursor_that_is_a_url(world: World) -> None:
    """A next page named by its whole URL is asked for as it stands."""

    def shows(query: dict[str, str]) -> object:
        following = None if query.get("page") == "2" else f"{server.url}/?page=2&x=a%2Bb"
        return {"results": [{"id": query.get("page", "1")}], "next": following}

    with Api(shows) as server:
        job = await api(world, server.url, next={"type": "cursor", "path": "next"})
        assert (await good(world, job))["inserted"] == 2
    assert server.asked == [{}, {"page": "2", "x": "a+b"}]


async def test_parameters_go_with_each_page(world: World, source: Source) -> None:
    """`params` and what stands in the URL are sent with every page, booleans as words."""
    source.style, source.records = "page", rows(25)
    url = f"{source.items_url}?q=a%26b"
    job = await api(world, url, next="page", params={"lang": "cs", "all": True, "n": 5})
    await good(world, job)
    sent = {"q": "a&b", "lang": "cs", "all": "true", "n": "5"}
    assert [{**query, "page": ""} for query in source.asked()] == [{**sent, "page": ""}] * 4


# ── Where the records are ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "items"),
    [
        ([{"id": 1}], None),
        ({"items": [{"id": 1}]}, None),
        ({"data": [{"id": 1}], "total": 1, "links": {"self": []}}, None),
        ({"items": [{"id": 1}], "errors": []}, "items"),
        ({"result": {"rows": [{"id": 1}]}}, "result.rows"),
        ({"result.rows": [{"id": 1}], "result": {"rows": []}}, "result.rows"),
    ],
)
async def test_where_the_list_is(world: World, source: Source, body: Any, items: Any) -> None:
    """The answer itself, the only list in it, or what `items` says; a field of that name wins."""
    url = source.file("/x", json.dumps(body).encode(), "application/json")
    assert await good(world, await api(world, url, items=items)) == {"processed": 1, "inserted": 1}


@pytest.mark.parametrize(
    ("body", "items", "said"),
    [
        ({"a": 1}, None, "the answer is no list; `items` says where it is; found {'a': 1}"),
        ("no", None, "the answer is no list; `items` says where it is; found 'no'"),
        (7, None, "the answer is no list; `items` says where it is; found 7"),
        (None, None, "the answer is no list; `items` says where it is; found None"),
        (
            {"data": [], "errors": []},
            None,
            "the answer is no list; `items` says where it is; lists are at: data, errors",
        ),
        ({"data": {}}, "data", "there is no list at 'data' in the answer: {'data': {}}"),
        ({"data": [1]}, "data.x", "there is no list at 'data.x' in the answer: {'data': [1]}"),
        ([], "data", "there is no list at 'data' in the answer: []"),
        (None, "data", "there is no list at 'data' in the answer: None"),
    ],
)
async def test_answers_of_another_shape(
    world: World, source: Source, body: Any, items: Any, said: str
) -> None:
    """What is no list fails the run, and says what is there and what may help."""
    url = source.file("/x", json.dumps(body).encode(), "application/json")
    assert await failed(world, await api(world, url, items=items)) == said
    assert len(source.requests) == 1  # asked again, it would say the same


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────

SECRET = "open-sesame-of-tests"


def heard(server: standins.StandIn) -> str:
    return repr([(request.query, request.headers) for request in server.requests])


@pytest.mark.parametrize("header", [None, "X-Token: {secret}", "Authorization: Token t={secret};"])
async def test_a_secret_is_sent(world: World, source: Source, header: str | None) -> None:
    """In the usual header or one's own, with each page."""
    source.style, source.records, source.token = "link", rows(25), SECRET
    source.token_header = header or "Authorization: Bearer {secret}"
    await world.secret("mine", "api", SECRET)
    more = {} if header is None else {"header": header}
    job = await api(world, source, secret="mine", **more)
    assert (await good(world, job))["inserted"] == 25
    assert heard(source).count(SECRET) == 3


async def test_no_redirect_takes_a_secret_elsewhere(
    world: World, source: Source, elsewhere: standins.Elsewhere
) -> None:
    """A redirect to another origin fails the run; that host is not even asked."""
    await world.secret("mine", "api", SECRET)
    job = await api(world, source, secret="mine")
    for status in (301, 302, 303, 307, 308):
        source.fault(ITEMS, Fault.redirect(f"{elsewhere.url}/items", status))
        said = await failed(world, job)
        assert said.startswith(f"{source.items_url} said {status}: a redirect to {elsewhere.url}")
        assert "a secret goes to no other host" in said
    assert (elsewhere.requests, len(source.requests)) == ([], 5)


@pytest.mark.parametrize("style", ["link", "cursor"])
async def test_no_next_page_takes_a_secret_elsewhere(
    world: World, source: Source, elsewhere: standins.Elsewhere, style: Any
) -> None:
    """`next` on another origin fails the run; the page before it stays."""
    await world.secret("mine", "api", SECRET)
    source.style, source.records, source.link_base = style, rows(25), elsewhere.url
    if style == "cursor":
        body = {"data": rows(10), "next_cursor": f"{elsewhere.url}/items?page=2"}
        source.fault(ITEMS, Fault.json(body))
    said = await failed(world, await api(world, source, secret="mine", next=style))
    assert said == "`next` points to 127.0.0.1; a secret goes to no other host"
    assert (elsewhere.requests, len(await world.records())) == ([], 10)


async def test_a_redirect_on_the_same_origin(world: World, source: Source) -> None:
    """It is followed with the secret, and links count from where it led."""
    source.style, source.records, source.link_base, source.token = "link", rows(15), "", SECRET
    await world.secret("mine", "api", SECRET)
    source.fault("GET /old/list", Fault.redirect("/items"))
    job = await api(world, f"{source.url}/old/list", secret="mine")
    assert (await good(world, job))["inserted"] == 15
    assert [request.path for request in source.requests] == ["/old/list", "/items", "/items"]


async def test_without_a_secret_redirects_are_followed(world: World, source: Source) -> None:
    """To another host too, where there is nothing to give away; in circles they end."""
    source.records = rows(3)
    with Api(lambda query: Answer(302, b"", {"Location": source.items_url})) as server:
        assert (await good(world, await api(world, server.url)))["inserted"] == 3
    source.fault(ITEMS, Fault.redirect("/items"), times=None)
    said = await failed(world, await api(world, source, "again"))
    assert said.startswith(f"{source.items_url} said 307: a redirect to /items")


async def test_a_secret_that_is_not_there(world: World, source: Source) -> None:
    """The run fails with the words that help, and nothing is asked."""
    said = await failed(world, await api(world, source, secret="mine"))
    assert (said, source.requests) == ("there is no secret 'mine'", [])


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


async def test_a_secret_is_nowhere_to_be_read(world: World, source: Source, tmp_path: Path) -> None:
    """Not in what a refused run says, nor anywhere in the database, though the API echoes it."""
    await world.secret("mine", "api", SECRET)
    source.fault(ITEMS, Fault.json({"echo": f"Bearer {SECRET}"}))
    said = await failed(world, await api(world, source, secret="mine"))
    assert said.startswith("the answer is no list") and SECRET not in said
    await world.store.close()
    assert not [name for name in os.listdir(tmp_path) if holds(tmp_path / name, SECRET)]


# ── Failures ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "phrase", "times"),
    [
        (401, "Unauthorized", 1),
        (403, "Forbidden", 4),  # which says when to come again
        (404, "Not Found", 1),
        (500, "Internal Server Error", 4),
    ],
)
async def test_statuses(world: World, source: Source, status: int, phrase: str, times: int) -> None:
    """A refusal is not repeated within a run, a failure MAX_RETRIES times; the run says it."""
    source.fault(ITEMS, Fault.status(status, AT_ONCE), times=None)
    job = await api(world, source)
    assert await failed(world, job) == f"{source.items_url} said {status}: {phrase}"
    assert (await world.get(job)).last_error == f"{source.items_url} said {status}: {phrase}"
    assert len(source.requests) == times
    source.heal()
    source.records = rows(2)
    assert (await good(world, job))["inserted"] == 2
    assert (await world.get(job)).last_error is None


async def test_a_query_is_not_told(world: World, source: Source) -> None:
    """What stands in a URL's query may be nobody's business: messages leave it out."""
    source.fault(ITEMS, Fault.status(404))
    job = await api(world, f"{source.items_url}?api_key=hush", params={"key": "hush"})
    assert "hush" not in await failed(world, job)


async def test_a_refused_key_is_asked_less_often(world: World, source: Source) -> None:
    """After 401 the interval grows with each run in a row."""
    source.token = "another"
    job = await api(world, source)
    waits = []
    for _ in range(3):
        await failed(world, job)
        waits.append(round(((await world.get(job)).next_check_at or 0) - world.clock()))
    assert waits == [120, 240, 480]


async def test_429_and_then_good(world: World, source: Source) -> None:
    """Too many requests: asked again within the run, after what Retry-After says."""
    source.style, source.records = "link", rows(25)
    source.fault(ITEMS, Fault.rate_limited(0), times=2)
    source.after_page(2, lambda: source.fault(ITEMS, Fault.rate_limited(0), times=3))
    assert (await good(world, await api(world, source)))["inserted"] == 25
    assert len(source.requests) == 3 + 2 + 3


async def test_a_long_retry_after(world: World, source: Source) -> None:
    """A wait that is longer than RETRY_DELAY is no wait within a run: the next run keeps it."""
    source.fault(ITEMS, Fault.rate_limited(900))
    job = await api(world, source)
    assert await failed(world, job) == f"{source.items_url} said 429: Too Many Requests"
    assert (await world.get(job)).next_check_at == world.clock() + 900
    assert len(source.requests) == 1


@pytest.mark.parametrize("style", STYLES)
async def test_500_in_mid_paging(world: World, source: Source, style: Any) -> None:
    """The run fails, what was committed stays, and the next run ends with all."""
    source.style, source.records, source.etags = style, rows(55), True
    broken = Fault.status(500, AT_ONCE)
    source.after_page(2, lambda: source.fault(ITEMS, broken, times=None))
    job = await api(world, source, next=style)
    assert "said 500" in await failed(world, job)
    assert await ids(world) == list(range(1, 21))
    source.heal()
    source.records[0]["title"] = "changed"
    assert await good(world, job) == {
        "processed": 55, "inserted": 35, "updated": 1, "unchanged": 19
    }  # fmt: skip
    assert await ids(world) == list(range(1, 56))


@pytest.mark.parametrize("fault", [Fault.reset(), Fault.truncate(), Fault.drop_reply()])
async def test_lost_connections(hasty: World, source: Source, fault: Fault) -> None:
    """Half an answer is none: nothing of it is taken, the next run has all."""
    source.style, source.records = "link", rows(25)
    source.after_page(1, lambda: source.fault(ITEMS, fault))
    job = await api(hasty, source)
    assert (await failed(hasty, job)).startswith(f"{source.items_url} gave no answer: ")
    assert await ids(hasty) == list(range(1, 11))
    assert await good(hasty, job) == {"processed": 25, "inserted": 15, "unchanged": 10}


async def test_nobody_there(hasty: World, source: Source) -> None:
    """A server that is down fails the run, which says so."""
    job = await api(hasty, source)
    source.stop()
    assert (await failed(hasty, job)).startswith(f"{source.items_url} cannot be reached: ")


async def test_a_304_that_nobody_asked_for(world: World, source: Source) -> None:
    """Without a validator sent, "not modified" is no answer: the run fails, and not by a defect."""
    source.fault(ITEMS, Fault.status(304), times=None)
    assert "304" in await failed(world, await api(world, source))


@pytest.mark.parametrize(
    "following",
    [
        "http://127.0.0.1:99999/",
        "http://[",
        "http://a b/",
        "\ud800",
        "ftp://x/",
        "http://user:pw@127.0.0.1:9/",
    ],
)
async def test_a_next_that_is_nonsense(hasty: World, following: str) -> None:
    """A cursor that makes no URL fails the run with words, not as a defect."""

    def shows(query: dict[str, str]) -> object:
        if query.get("cursor"):
            return Answer(400, b"{}")
        return {"data": rows(2), "next_cursor": following}

    with Api(shows) as server:
        assert await failed(hasty, await api(hasty, server.url, next="cursor"))


# ── Nasty answers ─────────────────────────────────────────────────────────────────────────────


def deep(depth: int) -> bytes:
    return b'[{"id": 1, "x": ' + b"[" * depth + b"]" * depth + b"}]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the answer is not JSON: Expecting value"),
        (standins.GARBAGE, "the answer is not JSON: Expecting value"),
        (b'[{"id": 1}, {"id": 2', "the answer is not JSON: Expecting"),
        (deep(100_000), "the answer is not JSON: maximum recursion depth exceeded"),
    ],
    ids=["empty", "html", "cut", "deep"],
)
async def test_answers_that_are_no_json(
    world: World, source: Source, body: bytes, said: str
) -> None:
    """Garbage fails the run with a short word of what came, and takes nothing of it."""
    url = source.file("/x", body, "application/json")
    message = await failed(world, await api(world, url))
    assert message.startswith(said) and len(message) < 300
    assert await world.records() == {}


@pytest.mark.parametrize("depth", [300, 900, 960, 980, 990])
async def test_deep_json_is_taken_or_refused(world: World, source: Source, depth: int) -> None:
    """Nested deeper than the fast encoder goes: kept whole, or refused in words."""
    run = await world.run(await api(world, source.file("/x", deep(depth), "application/json")))
    assert "defect" not in str(run.error_message)
    kept = [row["data"].count("[") for row in await world.store.data(None, 9, 0, 0)]
    assert kept == [depth] * run.records_inserted


async def test_numbers_beyond_64_bits(world: World, source: Source) -> None:
    """Huge integers are kept to the last digit, as ids too."""
    huge = 2**70
    source.records = [{"id": huge, "title": huge, "x": -huge}]
    await good(world, await api(world, source))
    record = (await world.records())[str(huge)]
    assert (record["title"], record["metadata"]) == (str(huge), {"x": -huge})


async def test_a_number_beyond_floats(world: World, source: Source) -> None:
    """1e999 does not become null behind anybody's back."""
    url = source.file("/x", b'[{"id": 1, "x": 1e999}]', "application/json")
    run = await world.run(await api(world, url))
    assert (run.status, run.records_failed) != ("success", 0)


SURROGATE = "found half of a surrogate pair; allowed: finite numbers and whole characters"
ODD = [
    ({"id": "a", "published_at": True}, "published_at: found True; allowed: a date"),
    ({"id": "b", "published_at": "never"}, "published_at: found 'never'; allowed: a date"),
    ({"id": "c", "title": True}, "title: found True; allowed: text or a number"),
    ({"id": "\udfff"}, SURROGATE),
    ({"id": None}, "no id: id is missing"),
    ({}, "no id: id is missing"),
    ({"id": " "}, "no id: id is empty"),
    ({"id": True}, "id: found True; allowed: text or a number"),
    ({"id": [2]}, "id: found [2]; allowed: text or a number"),
    (5, "found 5; allowed: an object"),
    (None, "found None; allowed: an object"),
    ([{"id": 2}], "found [{'id': 2}]; allowed: an object"),
    ("x\0\ud800", r"found 'x\x00\ud800'; allowed: an object"),
]


async def test_bad_records(world: World, source: Source) -> None:
    """Each is kept aside with its place and reason, counted, and those around it are taken."""
    odd: list[Any] = [record for record, _ in ODD]
    source.records = [{"id": 1}, *odd, {"id": 3}]
    job = await api(world, source, fields={"title": "title", "published_at": "published_at"})
    for _ in range(2):
        run = await world.run(job)
        assert (run.status, run.records_failed) == ("success", len(ODD))
    assert [*await world.records()] == ["1", "3"]
    kept = (await world.store.rejects(None, 99))[::-1]  # once, however often it is met
    assert [row["place"] for row in kept] == [f"page 1 record {n + 2}" for n in range(len(ODD))]
    assert [row["reason"] for row in kept] == [reason for _, reason in ODD]
    assert [json.loads(row["record"]) for row in kept] == odd


FAR = [10**400, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]


@pytest.mark.parametrize("date", FAR, ids=["huge", "first", "last"])
async def test_dates_beyond_the_calendar(world: World, source: Source, date: object) -> None:
    """A date that no calendar has in UTC is one more bad record, and does not stop the run."""
    source.records = [{"id": 1}, {"id": 2, "published_at": date}, {"id": 3}]
    job = await api(world, source)
    assert await good(world, job) == {"processed": 3, "inserted": 2, "failed": 1}
    assert (await reasons(world))["page 1 record 2"].startswith("published_at: found ")


async def test_text_of_all_kinds(world: World, source: Source) -> None:
    """NUL bytes, emoji, a byte order mark and an id of 300 characters are kept as they came."""
    long = "i" * 300
    record = {"id": long, "title": "a\0b \U0001f600", "\0": "\u2028"}
    body = b"\xef\xbb\xbf" + json.dumps([record, {"id": "a\0b"}]).encode()
    await good(world, await api(world, source.file("/x", body, "application/json")))
    found = await world.records()
    assert found[long]["title"] == record["title"]
    assert found[long]["metadata"] == {"\0": "\u2028"}
    assert found["a\0b"]["metadata"] == {}


@pytest.mark.parametrize(
    "body",
    [
        rb'[{"id": 1, "title": "\ud800"}]',
        rb'[{"id": 1, "x": {"\udfff": 1}}]',
        *map(deep, (100, 245, 251, 252, 253, 254, 500)),
        deep(400).replace(b": 1,", b": %d," % 2**70),
        b'[{"id": 1, "x": 1234567890123456789012345678901234567890}]',
    ],
    ids=["text", "key", *"100 245 251 252 253 254 500".split(), "deep and huge", "huge"],
)
async def test_what_is_taken_can_be_served(world: World, source: Source, body: bytes) -> None:
    """A record is rejected with its reason, or /data can show it: none spoils a page of others."""
    run = await world.run(await api(world, source.file("/x", body, "application/json")))
    assert (run.status, run.records_inserted) in [("success", 1), ("failed", 0)]
    assert run.records_inserted + run.records_failed == 1
    operations = tecko.Operations(world.store, world.vault, lambda: world.config)
    for record in (await operations.data(None, 10))[0]:
        assert tecko.DataPage.model_construct(data=[record]).model_dump_json()


async def test_surrogates_in_a_message(world: World, source: Source) -> None:
    """What cannot be written down is not written into the error either."""
    url = source.file("/x", rb'{"\ud800": [], "b": []}', "application/json")
    assert "lists are at" in await failed(world, await api(world, url))


async def test_the_same_id_three_times(world: World, source: Source) -> None:
    """On one page the last wins and the others count as updated."""
    source.records = [{"id": 1, "title": title} for title in ("first", "second", "last")]
    job = await api(world, source)
    assert await good(world, job) == {"processed": 3, "inserted": 1, "updated": 2}
    assert (await world.records())["1"]["title"] == "last"


async def test_many_records_on_one_page(world: World, source: Source) -> None:
    """5,000 in one answer are committed in chunks, and their places counted on."""
    source.records = rows(5000)
    source.records[4500] = {"id": None}
    job = await api(world, source)
    assert await good(world, job) == {"processed": 5000, "inserted": 4999, "failed": 1}
    assert await reasons(world) == {"page 1 record 4501": "no id: id is missing"}
    assert (await good(world, job))["unchanged"] == 4999
    assert len(await reasons(world)) == 1


async def test_too_many_rejected(world: World, source: Source) -> None:
    """Above `max_failed` the run fails and says so; the next one reads the same pages again."""
    source.style, source.etags = "link", True
    source.records = [{"id": 1}, {"id": None}, {"id": None}, {"id": 4}]
    job = await api(world, source, max_failed="1")
    said = "2 of 4 records were rejected; allowed: max_failed 1"
    assert [await failed(world, job) for _ in range(2)] == [said, said]
    await change(world, job, max_failed="50%")
    assert await good(world, job) == {"processed": 4, "unchanged": 2, "failed": 2}


# ── Pages that change while they are read ─────────────────────────────────────────────────────


@pytest.mark.parametrize("style", STYLES)
async def test_a_page_repeated(world: World, source: Source, style: Any) -> None:
    """What came before is unchanged, and what it hid comes with the next run."""
    source.style, source.records, source.etags = style, rows(35), True
    source.repeat_page(1)
    job = await api(world, source, next=style)
    first = await good(world, job)
    assert first == {"processed": 35, "inserted": 25, "unchanged": 10}
    assert (await good(world, job))["inserted"] == 10
    assert len(await world.records()) == 35


@pytest.mark.parametrize("style", STYLES)
async def test_a_page_that_shrinks(world: World, source: Source, style: Any) -> None:
    """A page with fewer records than the others is not the end, and hides only its own ones."""
    source.style, source.records = style, rows(65)
    source.shrink_page(2, by=3)
    job = await api(world, source, next=style)
    lost = 0 if style == "offset" else 3  # there the next page begins where this one ended
    assert (await good(world, job))["inserted"] == 65 - lost
    assert (await good(world, job)).get("inserted", 0) == lost


@pytest.mark.parametrize(("first", "short"), [(0, 3), (1, 4), (2, 2), (2, 5), (3, 6)])
async def test_offsets_go_on_behind_what_came(world: World, first: int, short: int) -> None:
    """However the first pages and a later one are short, no record is skipped."""
    asked: list[int] = []

    def shows(query: dict[str, str]) -> object:
        at = int(query["offset"])
        asked.append(at)
        few = len(asked) <= first or (len(asked) > 4 and at // 10 == short)
        return rows(100)[at : at + (7 if few else 10)]

    with Api(shows) as server:
        await good(world, await api(world, server.url, next="offset"))
    assert sorted(await ids(world)) == list(range(1, 101))


async def test_records_that_move_up_are_taken_by_the_next_run(world: World, source: Source) -> None:
    """One deleted on page 1 while page 2 is asked for hides another, for that run only."""
    source.style, source.records, source.etags = "page", rows(30), True
    source.after_page(1, lambda: source.records.pop(0))
    job = await api(world, source, next="page")
    assert (await good(world, job))["inserted"] == 29
    assert (await good(world, job))["inserted"] == 1
    assert len(await world.records()) == 30  # what vanished from the source stays


CIRCLES = [(style, "last") for style in STYLES]
CIRCLES += [("link", "itself"), ("link", "empty"), ("cursor", "itself"), ("cursor", "empty")]
CIRCLES += [("page", "first"), ("offset", "first"), ("page", "empty")]


@pytest.mark.parametrize(("style", "endless"), CIRCLES)
async def test_an_endless_next(world: World, source: Source, style: Any, endless: Any) -> None:
    """What was shown already, or nothing, is the end; a `next` that never ends fails the run, which
    says where to look. All records are there."""
    source.style, source.records, source.endless = style, rows(25), endless
    run = await world.run(await api(world, source, next=style))
    assert sorted(await ids(world)) == list(range(1, 26))
    goes_on = style in ("link", "cursor") and endless == "last"  # it has a next one, and yet is old
    assert (run.status, "`next`" in str(run.error_message)) == (
        ("failed", True) if goes_on else ("success", False)
    )
    assert len(source.requests) <= 5  # three pages, and two to be sure


# ── What is unchanged ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("style", [*STYLES, None])
async def test_a_new_page_behind_a_full_one(world: World, source: Source, style: Any) -> None:
    """The last page is full and unchanged, and yet the one that follows by now is found."""
    source.style, source.records, source.etags = style or "link", rows(20), True
    job = await api(world, source, **({"next": style} if style else {}))
    await good(world, job)
    source.records = rows(23)
    assert (await good(world, job))["inserted"] == 3
    source.records = rows(45)
    assert (await good(world, job))["inserted"] == 22
    assert len(await world.records()) == 45


async def test_odd_validators(hasty: World) -> None:
    """An ETag with bytes beyond ASCII (RFC 9110, 8.8.3) is sent back, or left out: never fatal."""

    def shows(query: dict[str, str]) -> object:
        return Answer(
            200, b'[{"id": 1}]', {"ETag": '"\u00e9"', "Last-Modified": "yesterday \u00e9"}
        )

    with Api(shows) as server:
        job = await api(hasty, server.url)
        await good(hasty, job)
        await good(hasty, job)


async def test_a_changed_mapping_reads_all_again(world: World, source: Source) -> None:
    """Other `fields` make other records of the same answer, though its ETag is known."""
    source.records, source.etags = rows(3, other="o"), True
    job = await api(world, source)
    await good(world, job)
    await change(world, job, fields={"title": "other"})
    assert await good(world, job) == {"processed": 3, "updated": 3}
    assert {record["title"] for record in (await world.records()).values()} == {"o"}


# ── Since ─────────────────────────────────────────────────────────────────────────────────────


def timed(**at: object) -> list[dict[str, Any]]:
    """Records by id, with what stands in their field `at`."""
    return [{"id": name, "at": value} for name, value in at.items()]


async def since_job(world: World, source: Source, since: Any = "at", **more: Any) -> int:
    world.clock.now = NOW
    source.since_field = "at"
    return await api(world, source, since=since, **more)


def sent(source: Source, name: str = "since") -> list[str | None]:
    """What each request had for a watermark."""
    return [query.get(name) for query in source.asked()]


FORMS = [
    ("2024-01-15T10:00:00Z", "2024-01-15T09:55:00Z"),
    ("2024-01-15T12:00:00+02:00", "2024-01-15T11:55:00+02:00"),
    ("2024-01-15T10:00:00.750123", "2024-01-15T09:55:00.750123"),
    ("2024-01-15T10:00:00,7Z", "2024-01-15T09:55:00,7Z"),
    ("2024-01-15 10:00:00", "2024-01-15 09:55:00"),
    ("2024-01-15 10:00", "2024-01-15 09:55"),
    ("2024-01-15 10:00:00.123456789 +0000 UTC", "2024-01-15 09:55:00.123456789 +0000 UTC"),
    ("2024/01/15 10:00:00", "2024/01/15 09:55:00"),
    ("20240115T100000Z", "20240115T095500Z"),
    ("20240115", "20240114"),
    ("Mon, 15 Jan 2024 10:00:00 GMT", "Mon, 15 Jan 2024 09:55:00 GMT"),
    ("Mon, 15 Jan 2024 00:00:00 +0200", "Sun, 14 Jan 2024 23:55:00 +0200"),
    ("15.01.2024", "14.01.2024"),
    ("Jan 15, 2024 10:00 AM", "Jan 15, 2024 10:00 AM"),  # not written here, so without overlap
    ("Mon Jan 15 10:00:00 2024", "Mon Jan 15 10:00:00 2024"),
    ("2024-01-15", "2024-01-14"),
    (1705312800, "1705312500"),
    (1705312800.9, "1705312500"),
    ("1705312800", "1705312500"),
    (1705312800000, "1705312500000"),
    ("1705312800000", "1705312500000"),
]


@pytest.mark.parametrize(("at", "expected"), FORMS, ids=[repr(at) for at, _ in FORMS])
async def test_what_is_sent(world: World, source: Source, at: object, expected: str) -> None:
    """First nothing, then the greatest value less the overlap, in the form of the source's own."""
    source.records = timed(a=at)
    job = await since_job(world, source)
    source.since_field = None  # the form alone counts here
    for _ in range(3):
        await good(world, job)
    assert sent(source) == [None, expected, expected]


async def test_since_knows_which_number_is_the_day(world: World, source: Source) -> None:
    """`dates` counts for the watermark, too; without it the run says that it cannot be read."""
    source.records = timed(a="03/04/2024 10:00:00")
    run = await world.run(await since_job(world, source))
    assert "no time that can be read" in run.notes[0]
    source.since_field = None
    job = await api(world, source, "dmy", since="at", dates="dmy")
    for _ in range(2):
        await good(world, job)
    assert sent(source)[-1] == "03/04/2024 10:00:00"


async def test_since_in_whole(world: World, source: Source) -> None:
    """A block names a dotted field, the parameter and the overlap; every page has it."""
    source.style = "page"
    source.records = [{"id": n, "meta": {"at": 1705312800 - n}} for n in range(15)]
    job = await since_job(
        world, source, {"field": "meta.at", "param": "from", "overlap": "1h"}, next="page"
    )
    source.since_field = None
    await good(world, job)
    first = len(source.requests)
    await good(world, job)
    assert {*sent(source, "from")[:first]} == {None}
    assert {*sent(source, "from")[first:]} == {str(1705312800 - 3600)}


async def test_only_what_is_new_is_read(world: World, source: Source) -> None:
    """The second run reads what lies in the overlap and what came after, and doubles nothing."""
    source.records = timed(a="2024-01-15T09:00:00Z", b="2024-01-15T10:00:00Z")
    job = await since_job(world, source)
    assert await good(world, job) == {"processed": 2, "inserted": 2}
    source.records += timed(c="2024-01-15T11:00:00Z")
    assert await good(world, job) == {"processed": 2, "inserted": 1, "unchanged": 1}
    assert await good(world, job) == {"processed": 1, "unchanged": 1}


async def test_rows_on_the_boundary(world: World, source: Source) -> None:
    """With no overlap, a second record of the very same moment is taken, the first not doubled."""
    source.records = timed(a="2024-01-15T10:00:00Z")
    job = await since_job(world, source, {"field": "at", "overlap": 0})
    await good(world, job)
    source.records += timed(b="2024-01-15T10:00:00Z")
    assert await good(world, job) == {"processed": 2, "inserted": 1, "unchanged": 1}
    assert sent(source) == [None, "2024-01-15T10:00:00Z"]


async def test_fractions_on_the_boundary(world: World, source: Source) -> None:
    """The watermark is rounded down, never past a record of the same second."""
    source.records = timed(a=1705312800.9)
    job = await since_job(world, source, {"field": "at", "overlap": 0})
    await good(world, job)
    source.records += timed(b=1705312800.95)
    assert (await good(world, job))["inserted"] == 1


async def test_a_late_record(world: World, source: Source) -> None:
    """One that shows up under an older time stamp within the overlap is taken."""
    source.records = timed(a="2024-01-15T10:00:00Z")
    job = await since_job(world, source)
    await good(world, job)
    source.records += timed(late="2024-01-15T09:55:00Z", later="2024-01-15T09:54:59Z")
    assert (await good(world, job))["inserted"] == 1
    assert {*await world.records()} == {"a", "late"}


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
async def test_a_failed_run_does_not_move_the_watermark(
    world: World, source: Source, before: bool
) -> None:
    """What it did not reach is asked for again, from where the last whole run stood."""
    source.style = "link"
    source.records = timed(**{f"a{n}": "2024-01-15T10:00:00Z" for n in range(10)})
    job = await since_job(world, source)
    if before:
        await good(world, job)
    source.records += timed(z="2024-03-01T00:00:00Z", y="2024-02-01T00:00:00Z")
    source.records.insert(0, {"id": "x", "at": "2024-03-01T00:00:00Z"})
    source.after_page(1, lambda: source.fault(ITEMS, Fault.status(500, AT_ONCE), times=4))
    await failed(world, job)
    asked = len(source.requests)
    await good(world, job)
    assert sent(source)[asked] == ("2024-01-15T09:55:00Z" if before else None)
    assert len(await world.records()) == 13


async def test_an_interrupted_run_does_not_move_the_watermark(world: World, source: Source) -> None:
    """Nor does one that was stopped."""
    source.style = "link"
    source.records = timed(**{f"a{n}": f"2024-01-{28 - n}" for n in range(25)})
    job = await since_job(world, source)
    source.after_page(1, lambda: setattr(world.steps, "stopping", True))
    assert (await world.run(job)).status == "interrupted"
    world.steps.stopping = False
    assert (await good(world, job))["inserted"] == 15
    assert {*sent(source)} == {None}


async def test_a_watermark_is_never_in_the_future(world: World, source: Source) -> None:
    """A record dated tomorrow does not hide what comes today: it does not count."""
    source.records = timed(a=NOW + 86400, c=NOW - 10)
    job = await since_job(world, source)
    await good(world, job)
    source.records += timed(b=NOW + 1)
    assert (await good(world, job))["inserted"] == 1
    assert sent(source) == [None, str(int(NOW) - 310)]


async def test_a_watermark_never_goes_back(world: World, source: Source) -> None:
    """A run that brings older records only leaves it where it was, and so does an empty one."""
    source.records = timed(a="2024-01-15T10:00:00Z")
    job = await since_job(world, source)
    await good(world, job)
    source.records = timed(b="2024-01-15T09:59:00Z")
    await good(world, job)
    source.records = []
    await good(world, job)
    await good(world, job)
    assert sent(source) == [None, *["2024-01-15T09:55:00Z"] * 3]


NO_TIMES = [["soon", True, -5, [1], None, ""], ["0001-01-01T00:00:00Z"], *([far] for far in FAR)]


@pytest.mark.parametrize("at", NO_TIMES, ids=["none", "zero", "huge", "first", "last"])
async def test_time_stamps_that_are_none(world: World, source: Source, at: list[Any]) -> None:
    """What Go writes for no time, and what is no time at all, stop no run, now or later."""
    source.records = [{"id": n, "at": value} for n, value in enumerate(at)]
    job = await since_job(world, source)
    source.since_field = None
    for _ in range(2):
        await good(world, job)
    if at != FAR[2:]:  # which is later than any other
        source.records += timed(b="2024-01-15T10:00:00Z")
        await good(world, job)
        await good(world, job)
        assert sent(source)[-1] == "2024-01-15T09:55:00Z"


@pytest.mark.parametrize(
    "changed",
    [
        {"url": "/other"},
        {"params": {"lang": "cs"}},
        {"since": {"field": "created", "param": "since"}},
        {"items": "old"},
        {"id": "key"},
        {"fields": {"title": "name"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
async def test_what_forgets_the_watermark(world: World, changed: dict[str, Any]) -> None:
    """Another URL, field, list, id or mapping concerns old records too: all are read again."""
    record = {"id": 1, "key": "k", "name": "n", "at": NOW - 9e5, "created": NOW - 8e5}

    with Api(lambda query: {"new": [record], "old": [{**record, "id": 2}]}) as server:
        world.clock.now = NOW
        job = await api(world, f"{server.url}/first", items="new", since="at")
        await good(world, job)
        if "url" in changed:
            changed = {"url": server.url + changed["url"]}
        await change(world, job, **changed)
        await good(world, job)
    assert [query.get("since") for query in server.asked] == [None, None]


async def test_what_keeps_the_watermark(world: World, source: Source) -> None:
    """A change that concerns no record asks on from where it stood."""
    source.records = timed(a="2024-01-15T10:00:00Z")
    job = await since_job(world, source)
    await good(world, job)
    await change(world, job, max_failed="5%", on_drift="freeze", max_requests_per_minute=6000)
    await good(world, job)
    assert sent(source) == [None, "2024-01-15T09:55:00Z"]


# ── Drift ─────────────────────────────────────────────────────────────────────────────────────

DRIFTS = [({"new": 1}, ["new field 'new'"]), ({"n": None}, []), ({"n": "one", "o": [1]}, [])]
KNOWN = {"id": 1, "n": 1, "f": 0.5, "t": "text", "o": {}}


@pytest.mark.parametrize(("changed", "notes"), DRIFTS)
async def test_drift(
    world: World, source: Source, changed: dict[str, Any], notes: list[str]
) -> None:
    """Of names alone; under `freeze` it fails before it is written, under `evolve` it is noted,
    once."""
    source.records = [KNOWN]
    job = await api(world, source, on_drift="freeze")
    await good(world, job)
    source.records = [KNOWN | {"id": 2} | changed]
    if notes:
        said = f"the fields drifted, and on_drift is freeze: {'; '.join(notes)}"
        assert await failed(world, job) == said
        assert [*await world.records()] == ["1"]
        await change(world, job, on_drift="evolve")
    run = await world.run(job)
    assert (run.status, run.records_inserted, run.notes) == ("success", 1, notes)
    assert (await world.run(job)).notes == []


async def test_a_field_that_is_gone(world: World, source: Source) -> None:
    """Only one that every record had counts as gone."""
    source.records = [{"id": 1, "always": 1, "at_times": 2}, {"id": 2, "always": 1}]
    job = await api(world, source)
    await good(world, job)
    source.records = [{"id": 3}]
    assert (await world.run(job)).notes == ["field 'always' is gone"]
    logs = await world.store.logs(job, 20)
    assert "source: field 'always' is gone" in [row.message for row in logs]


async def test_an_end_to_freezing(world: World, source: Source) -> None:
    """Once `on_drift` is evolve, a run that failed by it goes on."""
    source.records, source.etags = [KNOWN], True
    job = await api(world, source, on_drift="freeze")
    await good(world, job)
    source.records = [KNOWN, KNOWN | {"id": 2, "new": 1}]
    await failed(world, job)
    await failed(world, job)
    await change(world, job, on_drift="evolve")
    assert await good(world, job) == {"processed": 2, "inserted": 1, "unchanged": 1}
    await change(world, job, on_drift="freeze")
    assert await good(world, job) == {"processed": 2, "unchanged": 2}


# ── Mapping ───────────────────────────────────────────────────────────────────────────────────


async def test_nested_values_that_nobody_named(world: World, source: Source) -> None:
    """A list or object under a unified field's name goes to the metadata; plain values match."""
    source.records = [{"id": 1, "Title": "t", "content": {"raw": "c"}, "category": ["a"], "url": 5}]
    await good(world, await api(world, source))
    assert (await world.records())["1"] == {
        "source": "source",
        "source_id": "1",
        "title": "t",
        "url": "5",
        "metadata": {"content": {"raw": "c"}, "category": ["a"]},
    }


async def test_dotted_paths(world: World, source: Source) -> None:
    """Ids and fields may lie deeper; what is not there is left out."""
    source.records = [
        {"ref": {"id": "a"}, "title": {"rendered": "t"}, "by": {"name": "n"}},
        {"ref": {"id": "b"}, "title": "plain", "by": None},
    ]
    fields = {"title": "title.rendered", "author": "by.name"}
    await good(world, await api(world, source, id="ref.id", fields=fields))
    found = await world.records()
    assert (found["a"]["title"], found["a"]["author"]) == ("t", "n")
    assert "title" not in found["b"] and "author" not in found["b"]
    assert found["b"]["metadata"]["title"] == "plain"


@pytest.mark.parametrize("value", [{"a": 1}, ["a"], True])
async def test_wrong_types_of_named_fields(world: World, source: Source, value: Any) -> None:
    """What a person named has to be text or a number."""
    source.records = [{"id": 1, "name": value}, {"id": 2, "name": 7}]
    job = await api(world, source, fields={"title": "name"})
    assert await good(world, job) == {"processed": 2, "inserted": 1, "failed": 1}
    said = f"title: found {value!r}; allowed: text or a number"
    assert await reasons(world) == {"page 1 record 1": said}


async def test_a_record_gone_bad_leaves_the_good_one(world: World, source: Source) -> None:
    """The row that was good stays; the raw one is kept as it came, marked as not processed."""
    source.records = [{"id": 1, "published_at": "2024-01-15"}]
    job = await api(world, source)
    await good(world, job)
    source.records = [{"id": 1, "published_at": "never"}]
    assert "all 1 records were rejected" in await failed(world, job)
    assert (await world.records())["1"]["published_at"] == "2024-01-15T00:00:00Z"
    with sqlite3.connect(world.config.settings.database) as database:
        [(raw, done)] = database.execute("SELECT raw_data, processed FROM raw_data_api")
    assert (json.loads(raw), done) == (source.records[0], 0)


# ── Runs that end early, and rates ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("style", STYLES)
async def test_a_cancelled_run(world: World, source: Source, style: Any) -> None:
    """It is `interrupted`, what was committed stays, and the next one ends as if undisturbed."""
    source.style, source.records = style, rows(45)
    gates: list[standins.Gate] = []
    source.after_page(1, lambda: gates.append(source.gate(ITEMS, after_acting=False)))
    job = await api(world, source, next=style)
    task = asyncio.create_task(world.steps.step(job))
    await until(lambda: gates)
    await gates[0].areached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [run] = await world.store.runs("source", 9)
    assert (run.status, run.error_message) == ("interrupted", "the program was told to end")
    source.release_all()
    await good(world, job)
    assert await ids(world) == list(range(1, 46))


async def test_a_stopped_run(world: World, source: Source) -> None:
    """Told to stop, a run ends behind the chunk in hand; its page does not count as known."""
    source.records, source.etags = rows(5000), True
    job = await api(world, source)
    world.steps.stopping = True
    run = await world.run(job)
    assert (run.status, run.records_inserted) == ("interrupted", tecko.CHUNK_ROWS)
    assert run.error_message == "the service was stopped while it ran"
    world.steps.stopping = False
    assert await good(world, job) == {"processed": 5000, "inserted": 3000, "unchanged": 2000}


async def test_a_second_run_beside_one(world: World, source: Source) -> None:
    """While a run goes on, another one of the same job does nothing."""
    source.records = rows(3)
    gate = source.gate(ITEMS, after_acting=False)
    job = await api(world, source)
    task = asyncio.create_task(world.steps.step(job))
    await gate.areached()
    assert (await world.steps.step(job)).said == "a run goes on already"
    gate.release()
    await task
    assert [run.status for run in await world.store.runs("source", 9)] == ["success"]
    assert len(source.requests) == 1


@pytest.mark.parametrize("style", ["link", "page"])
async def test_a_rate_changes_nothing_else(world: World, source: Source, style: Any) -> None:
    """With `max_requests_per_minute` the same requests go out and the same records come."""
    source.style, source.records = style, rows(45)
    job = await api(world, source, next=style, max_requests_per_minute=60_000)
    assert await good(world, job) == {"processed": 45, "inserted": 45}
    assert await ids(world) == list(range(1, 46))


async def test_a_rate_is_shared(world: World, source: Source) -> None:
    """Two jobs on one host share a rate: the second waits while a third, without one, runs."""
    source.records = rows(1)
    block = {"type": "api", "url": source.items_url, "max_requests_per_minute": 1}
    first = await world.ingest("first", **block)
    second = await world.ingest("second", **block, params={"second": "yes"})
    await good(world, first)
    task = asyncio.create_task(world.steps.step(second))
    await until(lambda: second in world.steps.ingesting)
    for n in range(3):
        third = await world.ingest(f"third {n}", type="api", url=source.items_url)
        await good(world, third)
    assert source.asked() == [{}] * 4
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ── The block in jobs.yaml ────────────────────────────────────────────────────────────────────

GOOD = """\
secrets:
  mine: {type: api, env: MINE}
  other: {type: keboola, env: MINE}
jobs:
  - name: posts
    poll_interval: 2m
    ingest:
      type: api
      url: https://api.example.com/posts
      secret: mine
      header: "X-Token: {secret}"
      items: data.posts
      next: {type: page, param: p, start: 0, size: 50, size_param: n}
      since: {field: at, param: from, overlap: 10m}
      id: id
      fields: {title: name}
      params: {lang: cs}
      dates: dmy
      max_failed: 5%
      on_drift: freeze
      max_requests_per_minute: 60
"""


def load(folder: Path, text: str) -> tuple[list[str], list[tecko.Spec]]:
    """The problems of a jobs.yaml as `start` tells them, and its jobs."""
    path = folder / "jobs.yaml"
    path.write_text(text)
    config = tecko.load_config(path, {"MINE": SECRET})
    problems = tecko.all_problems(config, {})
    return [str(line).replace(f"{folder}/", "") for line in problems], [*(config.jobs or [])]


def test_the_file_that_the_wrong_ones_are_made_of_is_good(tmp_path: Path) -> None:
    """Without an edit there is nothing to say, so each message comes from its edit."""
    problems, [spec] = load(tmp_path, GOOD)
    assert isinstance(spec, tecko.IngestSpec) and isinstance(spec.ingest, tecko.ApiSource)
    assert problems == [] and spec.ingest.since and spec.ingest.since.overlap == 600


@pytest.mark.parametrize("kind", STYLES)
def test_short_forms(tmp_path: Path, kind: str) -> None:
    """`next` and `since` may be one word."""
    short = {"next: {type: page, param: p, start: 0, size: 50, size_param: n}": f"next: {kind}"}
    short |= {"since: {field: at, param: from, overlap: 10m}": "since: at"}
    text = GOOD
    for old, new in short.items():
        text = text.replace(old, new)
    problems, [spec] = load(tmp_path, text)
    assert isinstance(spec, tecko.IngestSpec) and isinstance(spec.ingest, tecko.ApiSource)
    assert problems == [] and spec.ingest.next and spec.ingest.next.type == kind
    assert spec.ingest.since == tecko.Since(field="at", param="since", overlap=300, format=None)


API_KEYS = (
    "dates, fields, header, id, items, max_failed, max_requests_per_minute, more, next, on_drift,"
    " params, secret, since, timeout, type, url"
)
PLACE = "https://api.example.com/posts"
NEXT = "{type: page, param: p, start: 0, size: 50, size_param: n}"
SINCE = "{field: at, param: from, overlap: 10m}"
WHOLE = GOOD[GOOD.index("    ingest:") + 11 :]
UNIFIED = ", ".join(tecko.UNIFIED)

BLOCK = "a block with type: csv and path, or type: api and url"
URL = "an https:// URL"
NO_URL = f"{URL} (not an http or https URL)"
PASSWORD = f"{URL} (a password in a URL; `secret` and `header` are for that)"
HEADER = "a header like X-Token: {secret}"
ITEMS_PATH = "where the list is, dotted; default: the answer itself"
WAYS = "link, cursor, last, page or offset"
START = "the first page's number; default 1 or 0"
SIZE = "records a page, 1 to 100000"
SINCE_FIELD = "the field of a record that tells when it changed, dotted"
OVERLAP = "seconds, or 30s, 5m, 1h; what is that old is asked for again"
ID = "the column or field that identifies a record, or a list of them"
FIELDS = f"a block of unified field: source field; unified: {UNIFIED}"
PARAMS = "names and values of query parameters"
RATE = "1 to 100000, per host"
MAX_FAILED = "a number of records, or a share like 5%"


def wrong(old: str, place: str, allowed: str, *written: str) -> list[tuple[str, str, str]]:
    """A row for each thing written in the place of `old`, with the message that it has to bring."""
    found = {"''": "''", "[a]": "['a']", "true": "True", "": "None"}
    return [
        (old, new, f"{place}: found {found.get(new) or shown(new)}; allowed: {allowed}")
        for new in written
    ]


def shown(text: str) -> str:
    return text if text.lstrip("-").isdecimal() else repr(text)


MEANT = "found an unknown key (did you mean {!r}?); allowed:"
WRONG = [
    ("      items:", "      itms:", f"12: ingest.itms: {MEANT.format('items')} {API_KEYS}"),
    ("items: data.posts", "path: a", f"12: ingest.path: found an unknown key; allowed: {API_KEYS}"),
    (
        "param: p,",
        "parm: p,",
        f"13: ingest.next.parm: {MEANT.format('param')} param, path, size, size_param, start, type",
    ),
    (
        "overlap: 10m",
        "over: 10m",
        "14: ingest.since.over: found an unknown key (did you mean 'overlap'?); allowed: field,"
        " format, overlap, param",
    ),
    ("{title: ", "{titel: ", f"16: ingest.fields.titel: found 'titel'; allowed: {FIELDS}"),
    ("type: api\n ", "type: rest\n ", "8: ingest.type: found 'rest'; allowed: csv or api"),
    ("      type: api\n", "", "7: ingest.type: found nothing; allowed: csv or api"),
    (f"      url: {PLACE}\n", "", f"7: ingest.url: found nothing; allowed: {URL}"),
    (WHOLE, "\n", f"7: ingest: found None; allowed: {BLOCK}"),
    (WHOLE, " soon\n", f"7: ingest: found 'soon'; allowed: {BLOCK}"),
    (WHOLE, " []\n", f"7: ingest: found []; allowed: {BLOCK}"),
    *wrong(PLACE, "9: ingest.url", URL, "''", "[a]"),
    *wrong(PLACE, "9: ingest.url", NO_URL, "api.example.com", "ftp://example.com/x", "https://"),
    *wrong(PLACE, "9: ingest.url", NO_URL, "https://example.com/#part", "https://a b/"),
    *(
        (PLACE, url, f"9: ingest.url: found 'https://***@example.com'; allowed: {PASSWORD}")
        for url in ("https://me:hunter2@example.com", "https://me@example.com")
    ),
    *wrong(PLACE, "9: ingest.url", f"{URL} (a secret goes over https only)", "http://example.com"),
    (
        "secret: mine",
        "secret: ''",
        "10: ingest.secret: found ''; allowed: the name of a secret of type api",
    ),
    (
        "secret: mine",
        "secret: nobody",
        "10: ingest.secret: there is no secret 'nobody' (there are: mine, other);"
        " `secret add --name nobody --type api` stores it",
    ),
    (
        "secret: mine",
        "secret: other",
        "10: ingest.secret: secret 'other' is of type keboola; needed: api",
    ),
    *(  # a header without {secret} may have the secret itself in it, which is not shown
        ('"X-Token: {secret}"', header, f"11: ingest.header: allowed: {HEADER}")
        for header in (
            "'X-Token: hunter2-hunter2'",
            "'{secret}'",
            "'X Token: {secret}'",
            '"X-Token: {secret}\\n"',
            "'X-Token: \u00e4{secret}'",
        )
    ),
    *wrong("data.posts", "12: ingest.items", ITEMS_PATH, "''", "[a]"),
    *wrong(
        NEXT, "13: ingest.next", f"{WAYS}, or a block with type; default: link, if any", "[a]", "7"
    ),
    *wrong(NEXT, "13: ingest.next.type", WAYS, "forward", "Link"),
    (NEXT, "{param: p}", f"13: ingest.next.type: found nothing; allowed: {WAYS}"),
    (
        "param: p,",
        "param: '',",
        "13: ingest.next.param: found ''; allowed: default cursor, starting_after, page or offset",
    ),
    *(
        ("start: 0", f"start: {new}", f"13: ingest.next.start: found {found}; allowed: {START}")
        for new, found in (("-1", "-1"), ("a", "'a'"), ("1.5", "'1.5'"), ("true", "True"))
    ),
    *wrong("50", "13: ingest.next.size", SIZE, "0", "100001", "big", "[a]", "true"),
    (SINCE, "{param: from}", f"14: ingest.since.field: found nothing; allowed: {SINCE_FIELD}"),
    *wrong(
        SINCE,
        "14: ingest.since",
        "a field, or a block with field, param, overlap, format",
        "[a]",
        "7",
    ),
    *wrong(SINCE, "14: ingest.since.field", SINCE_FIELD, "''"),
    *wrong("10m", "14: ingest.since.overlap", OVERLAP, "-5", "10000001"),
    *wrong("10m", "14: ingest.since.overlap", f"{OVERLAP} (not an interval)", "soon", "[a]"),
    (" id: id", " id: ''", f"15: ingest.id[0]: found ''; allowed: {ID}"),
    (" id: id", " id: []", f"15: ingest.id: found []; allowed: {ID}"),
    *wrong("{title: name}", "16: ingest.fields", FIELDS, "[a]", "title"),
    ("name}", "''}", f"16: ingest.fields.title: found ''; allowed: {FIELDS}"),
    *wrong("{lang: cs}", "17: ingest.params", PARAMS, "[a]", "lang"),
    ("cs}", "[cs]}", f"17: ingest.params.lang: found ['cs']; allowed: {PARAMS}"),
    ("cs}", "}", f"17: ingest.params.lang: found None; allowed: {PARAMS}"),
    *wrong("dmy", "18: ingest.dates", "dmy or mdy: how to read 03/04/2024", "ymd"),
    *wrong("5%", "19: ingest.max_failed", MAX_FAILED, "lots", "100%", "-1", "5 %"),
    *wrong("freeze", "20: ingest.on_drift", "evolve or freeze", "stop", "true"),
    *wrong("60", "21: ingest.max_requests_per_minute", RATE, "0", "100001", "many", "true"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG, ids=[said[:60] for _, _, said in WRONG])
def test_a_wrong_block_and_its_exact_message(tmp_path: Path, old: str, new: str, said: str) -> None:
    """File, line, job, field, what was found and what is allowed; one error, one line."""
    assert GOOD.count(old) == 1
    message = said.replace(": ", ": job 'posts': ", 1)
    assert load(tmp_path, GOOD.replace(old, new))[0] == [f"jobs.yaml:{message}"]


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    """In the order of the file, none hiding another."""
    text = GOOD.replace("start: 0", "start: x").replace("dmy", "ymd").replace("5%", "lots")
    places = [line.split(": ")[2] for line in load(tmp_path, text)[0]]
    assert places == ["ingest.next.start", "ingest.dates", "ingest.max_failed"]


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:1"])
def test_a_secret_over_http_to_this_machine(tmp_path: Path, host: str) -> None:
    """On loopback nobody listens in; without a secret plain http may go anywhere."""
    assert load(tmp_path, GOOD.replace(PLACE, f"http://{host}/x"))[0] == []
    without = GOOD.replace(PLACE, "http://example.com").replace("      secret: mine\n", "")
    assert load(tmp_path, without)[0] == []
