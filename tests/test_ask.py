"""One way to ask another server: what it is allowed to send, and what an error says and tells."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gzip
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import standins
from standins import Fault

import teckochecker as tecko

Given = pytest.mark.parametrize
LIMIT = 4 << 20
ERRORS = [tecko.OpenAIError, tecko.KeboolaError, tecko.SourceError]


@pytest.fixture
def other() -> Iterator[standins.Elsewhere]:
    with standins.Elsewhere() as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    made = tecko.make_client(tecko.SourceError)
    yield made
    await made.aclose()


async def ask(client: httpx2.AsyncClient, url: str, **options: Any) -> httpx2.Response:
    given: dict[str, Any] = {"deadline": 20, "limit": LIMIT, "error": tecko.SourceError} | options
    error = given.pop("error")
    return await tecko.http_request(client, error, "the host", "GET", url, **given)


@contextlib.asynccontextmanager
async def pouring(status: int, *, packed: bool) -> AsyncIterator[str]:
    """A server whose answers do not end before the client closes, as they are or packed."""
    block = gzip.compress(bytes(1 << 26), 9) if packed else bytes(1 << 16)
    head = f"HTTP/1.1 {status} OK\r\n" + "Content-Encoding: gzip\r\n" * packed + "\r\n"

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head.encode())
            while True:
                writer.write(block)
                await writer.drain()

    server = await asyncio.start_server(pour, "127.0.0.1", 0)
    yield "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    server.close()


@Given("packed", [False, True])
@Given("status", [200, 500])
async def test_an_answer_without_end_costs_an_error_and_little_memory(
    client: httpx2.AsyncClient, status: int, packed: bool
) -> None:
    """Good or bad, as it comes or as 64 MB in each 64 KB: nobody holds it in memory."""
    async with pouring(status, packed=packed) as url:
        tracemalloc.start()
        with pytest.raises(tecko.SourceError, match="bytes" if status == 200 else "500"):
            await ask(client, url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


@Given("value", [b"[]", b"{}", b"1.5", b'{"a":1}'])
def test_many_small_values_cost_an_error_and_little_memory(value: bytes) -> None:
    """4 MB of them would be some 100 MB of Python's objects."""
    body = b"[" + (value + b",") * ((4 << 20) // len(value + b",") - 1) + b"1]"
    answer = httpx2.Response(200, content=body)
    tracemalloc.start()
    with pytest.raises(tecko.OpenAIError, match="values"):
        tecko.parse_json_answer(answer, tecko.OpenAIError, "OpenAI's answer")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


async def test_the_answer_is_the_whole_body_unpacked(
    other: standins.Elsewhere, client: httpx2.AsyncClient, tmp_path: Path
) -> None:
    """In memory, or in a file where one is given, up to the limit to the byte."""
    body = b"abc" * 1000
    fault = Fault.status(200, {"Content-Encoding": "gzip"}, gzip.compress(body))
    other.fault("*", fault, times=None)
    answer = await ask(client, other.url, limit=3000)
    assert answer.content == body
    with (tmp_path / "sink").open("w+b") as sink:
        assert (await ask(client, other.url, sink=sink)).content == b""
        sink.seek(0)
        assert sink.read() == body
    with pytest.raises(tecko.SourceError, match="more than 2,999 bytes"):
        await ask(client, other.url, limit=2999)


OWN = {"error": {"message": "No such batch"}, "code": 404}
FORMS = [
    (404, OWN, tecko.OpenAIError, 404),
    (404, {"error": "no", "code": 404}, tecko.KeboolaError, 404),
    (404, {"error": "no"}, tecko.KeboolaError, None),
    (404, {"detail": "Not Found"}, tecko.OpenAIError, None),
    (404, "404 page not found", tecko.OpenAIError, None),
    (401, "<h1>Log in</h1>", tecko.KeboolaError, None),
    (429, "slow down", tecko.KeboolaError, 429),
    (502, "<h1>Bad Gateway</h1>", tecko.OpenAIError, 502),
    (404, "404 page not found", tecko.SourceError, 404),
]


@Given(("status", "body", "error", "told"), FORMS)
async def test_only_an_error_in_the_apis_own_form_is_its_word(
    other: standins.Elsewhere,
    client: httpx2.AsyncClient,
    status: int,
    body: Any,
    error: type[tecko.UpstreamError],
    told: int | None,
) -> None:
    """A proxy's or router's page is no answer of the API: it decides nothing."""
    other.fault("*", Fault.status(status, body=body))
    with pytest.raises(error) as raised:
        await ask(client, other.url, error=error)
    assert (raised.value.status, raised.value.sent) == (told, True)
    assert f"the host said {status}" in str(raised.value)
    assert raised.value.permanent == (told in (401, 404))


async def test_the_reason_that_a_body_gives_is_shown(
    other: standins.Elsewhere, client: httpx2.AsyncClient
) -> None:
    """200 characters of it, without a secret, half of one at the place of a cut included."""
    secret = tecko.SecretValue("hush-" + "s3cr3t" * 40)
    for body in ("r" * 190 + secret.reveal(), (secret.reveal() + " ") * 200_00, "x" * 9_000_000):
        other.fault("*", Fault.status(400, body={"error": {"message": body}}))
        with pytest.raises(tecko.OpenAIError) as raised:
            await ask(client, other.url, error=tecko.OpenAIError)
        said = str(raised.value)
        assert "s3cr3t" not in said and len(said) < 300


@Given("status", [200, 404, 500])
@Given("error", ERRORS)
async def test_a_web_page_is_called_one(
    other: standins.Elsewhere,
    client: httpx2.AsyncClient,
    status: int,
    error: type[tecko.UpstreamError],
) -> None:
    """And the setting named that leads there."""
    other.fault("*", Fault.status(status, body="<!DOCTYPE html><p>Welcome"))
    with pytest.raises(error, match=f"a web page; is {tecko.SET_BY[error]} right?"):
        tecko.parse_json_answer(await ask(client, other.url, error=error), error, "the host")


@Given(
    "json", [b'{"a": "x \\ud83d"}', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 400 + b"}"]
)
async def test_json_that_one_reader_refuses_another_takes(json: bytes) -> None:
    """One odd value is no reason to lose all that came with it."""
    answer = httpx2.Response(200, content=json)
    assert set(tecko.parse_json_answer(answer, tecko.OpenAIError, "it")) == {"a"}


@Given("body", [b"", b"nothing", b"[" * 2_000_000, b'{"a":' * 200_000, b"\xff\xfe"])
async def test_what_cannot_be_read_is_an_error(body: bytes) -> None:
    """However deep it goes."""
    with pytest.raises(tecko.OpenAIError, match="cannot be read"):
        tecko.parse_json_answer(httpx2.Response(200, content=body), tecko.OpenAIError, "it")


async def test_redirects_are_followed_within_the_origin_or_where_it_is_allowed(
    other: standins.Elsewhere, client: httpx2.AsyncClient
) -> None:
    """So many of them and no more; none unless it is asked for."""
    with standins.Elsewhere() as further:
        other.fault("GET /away", Fault.redirect(further.url + "/there"), times=None)
        other.fault("GET /here", Fault.redirect("/there"), times=None)
        other.fault("GET /round", Fault.redirect("/round"), times=None)
        assert (await ask(client, other.url + "/here", redirects=1)).status_code == 200
        for path, options in (
            ("/here", {}),
            ("/away", {"redirects": 5}),
            ("/round", {"redirects": 5}),
        ):
            with pytest.raises(tecko.SourceError, match="a redirect to") as raised:
                await ask(client, other.url + path, **options)
            assert raised.value.status == 307
        assert (other.count("GET /round"), further.request_count) == (6, 0)
        await ask(client, other.url + "/away", redirects=1, anywhere=True)
        assert further.request_count == 1


async def test_no_cookie_is_kept(other: standins.Elsewhere, client: httpx2.AsyncClient) -> None:
    """One that was set for one key would go along with the next one."""
    other.fault("*", Fault.status(200, {"Set-Cookie": "session=1; Path=/"}, {}))
    for _ in range(2):
        await ask(client, other.url)
    assert [request.headers.get("cookie") for request in other.requests] == [None, None]


@Given(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("SSL_CERT_FILE", "/nowhere.pem"),
        ("HTTPS_PROXY", "x:y"),
    ],
)
async def test_a_client_that_cannot_be_made_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Known not to have been sent, so that whatever was to be done is done when it is mended."""
    monkeypatch.setenv(name, value)
    with pytest.raises(tecko.KeboolaError, match="no HTTP client can be made") as raised:
        tecko.make_client(tecko.KeboolaError)
    assert not raised.value.sent


async def test_what_a_proxy_says_to_connect_is_known_not_to_have_been_sent(
    monkeypatch: pytest.MonkeyPatch, other: standins.Elsewhere
) -> None:
    """A proxy that answers 503 has sent nothing on."""
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    other.fault("*", Fault.status(503, body="<h1>squid</h1>"))
    client = tecko.make_client(tecko.KeboolaError)
    with pytest.raises(tecko.KeboolaError, match="cannot be reached: 503") as raised:
        await ask(client, "https://connection.keboola.com/jobs", error=tecko.KeboolaError)
    assert (raised.value.status, raised.value.sent) == (None, False)
    await client.aclose()


async def test_look_ups_need_no_thread_of_the_pool_that_files_use(
    other: standins.Elsewhere, client: httpx2.AsyncClient
) -> None:
    """And what hangs there does not keep a name from being looked up."""
    stuck = threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
    waiting = asyncio.create_task(asyncio.to_thread(stuck.wait, 20))
    try:
        url = other.url.replace("127.0.0.1", "localhost")
        assert (await ask(client, url)).status_code == 200
        assert not waiting.done()
    finally:
        stuck.set()
        await waiting
