"""The admin surface over real sockets: what it answers, whom it refuses, and what it withstands."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import itertools
import json
import re
import resource
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MASTER_KEY, RunningProgram

import teckochecker as tecko


@dataclass
class Surface:
    """A running service and its admin surface, on a loop in a thread of its own."""

    service: tecko.Service
    server: tecko.Admin
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


async def serve(folder: Path, env: dict[str, str], ready: Future[Any]) -> None:
    config = tecko.load_config(folder / "jobs.yaml", {"API_PORT": "0"} | env)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with (
        tecko.make_service(config, lambda: config) as service,
        tecko.serving(service) as server,
    ):
        ready.set_result((Surface(service, server, loop), stop))
        await stop.wait()


@contextlib.contextmanager
def surface(folder: Path, **env: str) -> Iterator[Surface]:
    ready: Future[Any] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(serve(folder, env, ready)))
    thread.start()
    made, stop = ready.result(10)
    try:
        yield made
    finally:
        made.loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    """Without a token, as it comes."""
    with surface(tmp_path_factory.mktemp("open")) as made:
        yield made


TOKEN = "a-token-for-tests-0123456789"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    """With ADMIN_TOKEN, behind a proxy, and for a page of elsewhere."""
    env = {"ADMIN_TOKEN": TOKEN, "ADMIN_HOSTS": "proxy.example, Other.example:8443"}
    env["CORS_ORIGINS"] = "https://app.example.com, http://localhost:3000"
    with surface(tmp_path_factory.mktemp("guarded"), **env) as made:
        yield made


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


def ask(made: Surface, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request on a connection of its own; `Host_="x"` is the header Host."""
    with contextlib.closing(made.client()) as client:
        client.putrequest(method, path, skip_host="Host_" in headers)
        for name, value in headers.items():
            client.putheader(name.rstrip("_").replace("_", "-"), value)
        client.endheaders()
        answer = client.getresponse()
        return Answer(answer.status, answer.headers, answer.read())


def exchange(made: Surface, sent: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    with made.dial() as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def request(made: Surface, path: str = "/health", *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {made.host}", *lines, "", ""]).encode()


def is_error(answer: Answer) -> bool:
    """The published shape of an error, the same in body and headers."""
    said = answer.body
    assert said.keys() >= {"error", "detail", "code", "request_id"}
    assert re.fullmatch(r"[a-z][a-z_]+", said["error"]) and said["detail"]
    assert answer.headers["X-Error-Code"] == str(said["code"]) and said["code"] >= 1000
    return bool(answer.headers["X-Request-ID"] == said["request_id"] != "")


@contextlib.contextmanager
def held_up(made: Surface) -> Iterator[None]:
    """Whoever asks the store has to wait, until this ends: the thread of the connection for reads
    has something else to do."""
    busy, free = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        free.wait(60)

    reader: Any = made.service.store._reader
    asyncio.run_coroutine_threadsafe(reader._db._execute(occupy), made.loop)
    assert busy.wait(10)
    try:
        yield
    finally:
        free.set()


Slow = tuple[list[str], list[int]]  # whom the server cut off, in order; what others were answered
BEGUN = {
    "drips a line": b"GET /",
    "drips headers": b"GET /health HTTP/1.1\r\n",
    "drips a body": b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n",
    "half a line": b"GET /hea",
    "half the headers": b"GET /health HTTP/1.1\r\nHost",
    "silent": b"",
}
DRIPS = {"drips a line": b"x", "drips headers": b"X: y\r\n", "drips a body": b" "}


def send_slowly(folder: Path) -> Slow:
    """Begin requests, let some of them drip, and wait until the server has closed them all, also
    one that never reads its answers."""
    order: list[str] = []
    health: list[int] = []
    with surface(folder) as made, contextlib.ExitStack() as stack:
        left = {name: stack.enter_context(made.dial()) for name in BEGUN}
        for name, begun in BEGUN.items():
            left[name].sendall(begun)
        deaf = stack.enter_context(made.dial())
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while deaf.send(request(made, "/openapi.json") * 50):
                pass
        while (left or made.service.connections()) and len(health) < 60:
            for connection in select.select([*left.values()], [], [], 0.5)[0]:
                name = next(name for name in left if left[name] is connection)
                with contextlib.suppress(ConnectionError):
                    assert b" 200 " not in connection.recv(4096)
                order.append(name)
                del left[name]
            for name in left.keys() & DRIPS.keys():
                with contextlib.suppress(ConnectionError):
                    left[name].sendall(DRIPS[name])
            health.append(ask(made, "/health").status)
    return order, health


def begin_late(folder: Path) -> bytes:
    """A connection that is idle for almost as long as it may, and then asks as slowly as it may."""
    with surface(folder) as made, made.dial() as connection:
        time.sleep(tecko.HTTP_IDLE - 1)
        for byte in (b"GET", b" /livez", b" HTTP/1.1\r\n", b"Connection: close\r\n", b"\r\n"):
            connection.sendall(byte)
            time.sleep((tecko.HTTP_DEADLINE - 1) / 5)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post_behind_a_lock(folder: Path) -> tuple[list[Answer], list[str]]:
    """New secrets, while another process holds the database for longer than a caller waits: what
    each is answered, and the names of those that exist in the end."""

    def post(name: str) -> Answer:
        with contextlib.closing(made.client()) as client:
            secret = json.dumps({"name": name, "type": "api", "value": f"value-of-{name}"})
            kind = {"Content-Type": "application/json"}
            client.request("POST", "/api/admin/secrets", secret, kind)
            got = client.getresponse()
            return Answer(got.status, got.headers, got.read())

    with surface(folder, SECRET_KEY=MASTER_KEY) as made, ThreadPoolExecutor(4) as clients:
        database = sqlite3.connect(folder / "teckochecker.db", isolation_level=None)
        with contextlib.closing(database):
            database.execute("BEGIN IMMEDIATE")
            posted = [clients.submit(post, f"secret-{n}") for n in range(4)]
            wait(posted, timeout=tecko.HTTP_ANSWER + 3)
            database.execute("ROLLBACK")
        answers = [each.result(20) for each in posted]
    with contextlib.closing(sqlite3.connect(folder / "teckochecker.db")) as database:
        names = [row[0] for row in database.execute("SELECT name FROM secrets ORDER BY name")]
    return answers, names


def read_behind_a_lock(folder: Path) -> Answer:
    """What is answered to who only looks, while the store does not answer."""
    with surface(folder) as made, held_up(made):
        return ask(made, "/api/jobs")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What has to wait for the server's own deadlines runs beside the other tests."""
    works: dict[str, Callable[[Path], Any]] = {"slow": send_slowly, "late": begin_late}
    works |= {"locked": post_behind_a_lock, "read": read_behind_a_lock}
    with ThreadPoolExecutor(len(works)) as beside:
        yield {
            name: beside.submit(work, tmp_path_factory.mktemp(name)) for name, work in works.items()
        }


# ── What it answers ───────────────────────────────────────────────────────────────────────────

HEALTH = "status timestamp version uptime_seconds database db_connected scheduler overdue_jobs"
STATS = (
    "total_jobs active_jobs paused_jobs completed_jobs failed_jobs total_secrets total_logs"
    " uptime_seconds checks triggers errors"
)


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("query", ["", "?", "?verbose=1&x=/stats"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/", "name version description health"),
        ("/health", HEALTH),
        ("/api/health", HEALTH),
        ("/stats", STATS),
        ("/api/stats", STATS),
    ],
)
def test_routes(open_to_all: Surface, path: str, fields: str, query: str) -> None:
    """Each published path, under /api as well, as JSON that nobody keeps, with an id of its own."""
    first, second = ask(open_to_all, path + query), ask(open_to_all, path)
    assert first.status == 200 and first.body.keys() >= set(fields.split())
    assert first.headers["Content-Type"] == "application/json"
    assert first.headers["Cache-Control"] == "no-store"
    assert first.headers["Content-Length"] == str(len(first.raw))
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]


BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [(BROWSERS, True), ("text/html", True), ("*/*", False), ("application/json, text/html", False)],
)
def test_browsers_get_a_page(open_to_all: Surface, accept: str, page: bool) -> None:
    """Programs get what they always got; a cache is told that it depends."""
    answer = ask(open_to_all, "/", Accept=accept)
    assert answer.headers["Vary"] == "Accept, Origin"
    assert answer.headers["Content-Type"].startswith("text/html" if page else "application/json")
    assert answer.raw.lstrip().startswith(b"<!doctype html>" if page else b"{")


def test_health_is_that_of_the_service(open_to_all: Surface) -> None:
    """What a monitor reads is what the service knows of itself."""
    said = ask(open_to_all, "/health").body
    assert (said["status"], said["scheduler"], said["database"]) == (
        "healthy",
        "running",
        "connected",
    )


def test_reads_take_turns_and_health_waits_for_none(open_to_all: Surface) -> None:
    """While as many GETs are worked on as may be at once, another waits; health is answered."""
    reads = open_to_all.server._reads
    for _ in range(tecko.READS_AT_ONCE):
        open_to_all.on_loop(reads.acquire())
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, open_to_all, "/stats")
        assert ask(open_to_all, "/health").status == ask(open_to_all, "/livez").status == 200
        assert not wait([waiting], timeout=0.2).done
        for _ in range(tecko.READS_AT_ONCE):
            open_to_all.loop.call_soon_threadsafe(reads.release)
        assert waiting.result(10).status == 200


@pytest.mark.parametrize(("path", "status"), [("/health", b"200"), ("/nothing", b"404")])
def test_head(open_to_all: Surface, path: str, status: bytes) -> None:
    """HEAD has the headers of GET, and no body, so that the next answer is found."""
    head = b"HEAD" + request(open_to_all, path).removeprefix(b"GET")
    came = exchange(open_to_all, head + request(open_to_all, "/health", "Connection: close"))
    first, second, body = came.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 " + status) and second.startswith(b"HTTP/1.1 200")
    assert b"Content-Length: 0" not in first and json.loads(body)["status"] == "healthy"


@pytest.mark.parametrize("path", ["/nothing", "/health/", "/Health", "/api", "/health/x"])
def test_what_is_not_there(open_to_all: Surface, path: str) -> None:
    """404 in the published shape."""
    answer = ask(open_to_all, path)
    assert answer.status == 404 and is_error(answer)
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("method", "POST PUT DELETE PATCH OPTIONS TRACE CONNECT BREW get".split())
def test_other_methods(open_to_all: Surface, method: str) -> None:
    """Refused in the published shape; nothing is changed by them."""
    answer = ask(open_to_all, "/health", method)
    assert answer.status in (405, 501) and is_error(answer)


def test_an_error_names_no_file_of_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a master key: the answer says what, the log under the request's id where."""
    with surface(tmp_path, SECRET_KEY="") as made, made.dial() as connection:
        body = b'{"name": "x", "type": "api", "value": "some-secret"}'
        head = f"POST /api/admin/secrets HTTP/1.1\r\nHost: {made.host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        said = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    answer = json.loads(said.partition("\r\n\r\n")[2])
    assert (said[9:12], answer["code"], str(tmp_path) in said) == ("500", 3002, False)
    [line] = [line for line in caplog.messages if answer["request_id"] in line]
    assert str(tmp_path / "teckochecker.key") in line


# ── Connections ───────────────────────────────────────────────────────────────────────────────


def test_a_connection_is_kept(open_to_all: Surface) -> None:
    """Two requests on one connection, and two sent at once, are answered in order."""
    with contextlib.closing(open_to_all.client()) as client:
        ids, sockets = set(), set()
        for path in ("/health", "/stats", "/nothing"):
            client.request("GET", path)
            answer = client.getresponse()
            ids.add(json.loads(answer.read()) and answer.headers["X-Request-ID"])
            sockets.add(client.sock)
    assert len(ids) == 3 and len(sockets) == 1
    both = request(open_to_all, "/health") + request(open_to_all, "/stats", "Connection: close")
    came = exchange(open_to_all, both)
    assert came.count(b"HTTP/1.1 200") == 2
    assert came.index(b"overdue_jobs") < came.index(b"total_jobs")


SMUGGLED: dict[str, list[str]] = {
    "two lengths": ["Content-Length: 0", "Content-Length: {n}"],
    "two lengths, reversed": ["Content-Length: {n}", "Content-Length: 0"],
    "two lengths that agree": ["Content-Length: {n}", "content-length: {n}"],
    "a list of lengths": ["Content-Length: {n}, {n}"],
    "chunked": ["Transfer-Encoding: chunked"],
    "chunked and a length": ["Transfer-Encoding: chunked", "Content-Length: 0"],
    "chunked in disguise": ["Transfer-Encoding: \tChunKed"],
    "no transfer encoding": ["Transfer-Encoding: identity"],
    "a length that is none": ["Content-Length: abc"],
    "a length that is empty": ["Content-Length:"],
    "a negative length": ["Content-Length: -1"],
    "a length with a sign": ["Content-Length: +{n}"],
    "a length with an underscore": ["Content-Length: 1_0"],
    "a hexadecimal length": ["Content-Length: 0x10"],
    "a length in other digits": ["Content-Length: \u0661\u0662"],
    "a length in superscript": ["Content-Length: \xb2"],
    "16 digits": ["Content-Length: 0000000000000005"],
    "5,000 digits": ["Content-Length: " + "9" * 5000],
    "5,000 zeros": ["Content-Length: " + "0" * 5000],
    "a body too large": ["Content-Length: 1048577"],
    "a space before the colon": ["Content-Length : {n}"],
    "a folded header": ["X: y", " Content-Length: {n}"],
    "a folded length": ["Content-Length:", "\t{n}"],
    "a folded first line": [" Content-Length: {n}"],
    "no header line": ["nonsense", "Content-Length: {n}"],
    "no name": [": x", "Content-Length: {n}"],
    "a name of other letters": ["Content-L\xe9ngth: {n}"],
    "a name in brackets": ["Content-Length(): {n}"],
    "a bare CR": ["X: y\rContent-Length: {n}"],
    "a bare LF": ["X: y\nContent-Length: {n}"],
    "an end of bare LFs": ["X: y\n\nGET /stats HTTP/1.1"],
    "an end of bare CRs": ["X: y\r\rGET /stats HTTP/1.1"],
    "a NUL": ["X: y\0", "Content-Length: {n}"],
    "a NUL in a name": ["X\0: y"],
    "a vertical tab": ["X: y\x0bContent-Length: {n}"],
    "two hosts": ["Host: 127.0.0.1"],
    "two hosts, one foreign": ["host: evil.example"],
    "two origins": ["Origin: http://127.0.0.1", "Origin: http://evil.example"],
    "two tokens": ["Authorization: Bearer a", "Authorization: Bearer b"],
    "many headers": ["X: y"] * 200,
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=list(SMUGGLED))
def test_a_body_is_not_the_next_request(open_to_all: Surface, lines: list[str]) -> None:
    """What could be read in two ways is refused, and the connection closed: what stands behind it,
    as a proxy in front of us may see it, is not served."""
    hidden = request(open_to_all, "/stats")
    head = [line.format(n=len(hidden)) for line in lines]
    came = exchange(open_to_all, request(open_to_all, "/health", *head) + hidden)
    assert re.match(rb"HTTP/1\.1 4\d\d ", came), came[:80]
    assert came.count(b"HTTP/1.1 ") == 1 and b"total_jobs" not in came


def test_a_body_that_no_route_wants(open_to_all: Surface) -> None:
    """It is read, so that the next request is the one behind it; also behind a stray empty line."""
    body = request(open_to_all, "/data")
    post = request(open_to_all, "/health", f"Content-Length: {len(body)} ")
    post = b"POST" + post.removeprefix(b"GET") + body + b"\r\n"
    came = exchange(open_to_all, post + request(open_to_all, "/stats", "Connection: close"))
    assert re.findall(rb"HTTP/1\.1 (\d+)", came) == [b"405", b"200"] and b"total_jobs" in came


def test_a_body_is_asked_for(open_to_all: Surface) -> None:
    """Who expects 100 Continue gets it before the body, and a refusal instead where it is one."""
    for length, said in ((2, b"HTTP/1.1 100 Continue\r\n\r\n"), (1 << 21, b"HTTP/1.1 413 ")):
        lines = ["Expect: 100-continue", f"Content-Length: {length}", "Connection: close"]
        post = b"POST" + request(open_to_all, "/api/jobs", *lines).removeprefix(b"GET")
        with open_to_all.dial() as connection:
            connection.sendall(post)
            assert connection.recv(65536).startswith(said)


def test_http_1_0(open_to_all: Surface) -> None:
    """As haproxy and old probes speak it: without a Host, one answer, and the end."""
    came = exchange(open_to_all, b"GET /health HTTP/1.0\r\n\r\n")
    assert came.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in came
    refused = exchange(open_to_all, b"GET /stats HTTP/1.0\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 421 ")


LONG = "x" * 70_000
MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "a long request line": lambda host: f"GET /{LONG} HTTP/1.1\r\n\r\n".encode(),
    "a long header": lambda host: f"GET /health HTTP/1.1\r\nX: {LONG}\r\n\r\n".encode(),
    "many headers": lambda host: b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "spaces": lambda host: b"GET /health is here HTTP/1.1\r\n\r\n",
    "two spaces": lambda host: b"GET  /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
    "HTTP/0.9": lambda host: b"GET /health\r\n",
    "said to be HTTP/0.9": lambda host: b"GET /health HTTP/0.9\r\n\r\n",
    "lines that end in LF": lambda host: b"GET /health HTTP/1.1\nHost: " + host + b"\n\n",
    "a wrong version": lambda host: b"GET /health HTTP/x.y\r\n\r\n",
    "HTTP/2": lambda host: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another host's address": lambda host: (
        b"GET http://evil.example/health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
    ),
    "an authority": lambda host: b"CONNECT " + host + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
    "an asterisk": lambda host: b"OPTIONS * HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
    "TLS": lambda host: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \r\n\r\n",
    "a bad port": lambda host: b"GET http://[:x/ HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=list(MALFORMED))
def test_what_is_no_request_is_refused(
    open_to_all: Surface, make: Callable[[bytes], bytes]
) -> None:
    """A 4xx or 505 as JSON with an id, then the end; the surface goes on."""
    came = exchange(open_to_all, make(open_to_all.host.encode()))
    head, _, body = came.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 (4\d\d|505) ", head), came[:80]
    assert b"X-Request-ID: " in head and json.loads(body)["error"]
    assert ask(open_to_all, "/health").status == 200


def test_many_clients_at_once(open_to_all: Surface) -> None:
    """All of 200 requests by 16 clients are answered, each with an id of its own."""
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda n: ask(open_to_all, "/stats"), range(200)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.headers["X-Request-ID"] for answer in answers}) == 200


@contextlib.contextmanager
def crowd(made: Surface, begun: bytes, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that have sent no whole request."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(made.dial()) for _ in range(count)]
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(begun)
        yield connections


@pytest.mark.parametrize("begun", [b"", b"GET /hea", BEGUN["drips a body"]], ids=repr)
def test_slow_connections_keep_no_one_out(tmp_path: Path, begun: bytes) -> None:
    """Whatever hundreds of connections leave unfinished, health and the routes are answered to
    whoever asks; those that wait longest go, and no more are kept than may be."""
    with surface(tmp_path) as made, crowd(made, begun, 300) as connections:
        for path in ("/health", "/stats", "/api/jobs") * 5:
            assert ask(made, path).status == 200
        assert made.service.connections() <= 33
        gone = select.select(connections, [], [], 0)[0]
        assert connections[:250] == gone[:250]


def test_who_waits_for_an_answer_is_not_cut_off(tmp_path: Path) -> None:
    """While each connection that there may be waits for the store, others are told to come again,
    slow ones included, and each of those is answered in the end."""
    with surface(tmp_path, API_MAX_CONNECTIONS="4") as made, ThreadPoolExecutor(4) as clients:
        with held_up(made):
            asked = [clients.submit(ask, made, "/api/jobs") for _ in range(4)]
            until(lambda: made.service.connections() == 4)
            with crowd(made, b"", 20):
                refused = ask(made, "/api/jobs")
                assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
                assert is_error(refused) and ask(made, "/livez").status == 200
        assert [each.result(10).status for each in asked] == [200] * 4


def until(met: Callable[[], Any]) -> None:
    limit = time.monotonic() + 20
    while not met():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_an_error_that_nobody_expects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """500 with the id under which the log has the traceback, and the end of the connection."""
    with surface(tmp_path) as made:
        with (
            contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as database,
            database,
        ):
            database.execute("INSERT INTO normalized_data VALUES (1, 's', 'x', '{', x'', 0, 0)")
        two = request(made, "/data") + request(made, "/livez")
        came = exchange(made, two).decode()
    request_id = json.loads(came.partition("\r\n\r\n")[2])["request_id"]
    assert came.startswith("HTTP/1.1 500 ") and came.count("HTTP/1.1") == 1
    assert f"internal error; see the log for request ID {request_id}" in came
    assert [line for line in caplog.messages if request_id in line]


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """What cannot be accepted is tried again each second, and told in a line; once descriptors are
    free, all is as before."""
    (tmp_path / "jobs.yaml").write_text("jobs: []\n")
    with RunningProgram(tmp_path, {"API_PORT": "0", "API_MAX_CONNECTIONS": "1000"}) as program:
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (60, 60))
        host, port = program.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(80):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            until(lambda: program.text().count("cannot accept a connection") >= 2)
        until(lambda: b" 200 " in fetch(host, int(port)))
        assert program.terminate() == 0
    said = program.text()
    assert said.count("cannot accept a connection") < 30


def fetch(host: str, port: int) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as to:
        to.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        return to.recv(65536)
    return b""


# ── Who may ask ───────────────────────────────────────────────────────────────────────────────

HOSTS = ["127.0.0.1:{}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:80", "10.1.2.3:8443", "[::1]:{}"]
HOSTS += ["[fe80::1]", "localhost", "LocalHost:{}", "localhost.:{}", "localhost:1"]
HOSTS += [
    "proxy.example",
    "PROXY.example:1",
    "other.example",
    "other.example.:8443",
    "[2001:DB8::1]:80",
]
FOREIGN = ["", "evil.example", "evil.example:{}", "127.0.0.1.evil.example", "xproxy.example"]
FOREIGN += ["x.proxy.example", "127.0.0.1:{}@evil.example", "127.0.0.1:{},evil.example"]
FOREIGN += ["[::1].evil.example", "evil.example:80:80", "evil.example#[::1]", "::1", "2130706433x"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_is_this_one(guarded: Surface, host: str) -> None:
    """By address, which no rebinding of names can bring about, or by a name that is its own or in
    ADMIN_HOSTS; whatever the port, which a container may have mapped."""
    given = {"Host_": host.format(guarded.port), "Authorization": f"Bearer {TOKEN}"}
    assert ask(guarded, "/stats", **given).status == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/stats", "/nothing", "/docs"])
def test_a_host_that_is_not_this_one(open_to_all: Surface, host: str, path: str) -> None:
    """A page whose name was pointed at this machine (DNS rebinding) reads nothing."""
    answer = ask(open_to_all, path, Host_=host.format(open_to_all.port))
    assert answer.status == 421 and is_error(answer) and "ADMIN_HOSTS" in answer.body["detail"]


@pytest.mark.parametrize("path", ["/health", "/api/health", "/livez", "/readyz"])
def test_probes_come_by_any_address(guarded: Surface, path: str) -> None:
    """Health is public: by a pod's address, another name, or with no Host at all."""
    for host in (*FOREIGN, "10.1.2.3:8000"):
        assert ask(guarded, path, Host_=host.format(guarded.port)).status == 200
    came = exchange(guarded, f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    assert came.startswith(b"HTTP/1.1 200 ")


def test_health_names_nobody_to_strangers(tmp_path: Path) -> None:
    """The names of jobs are for those who have the token, and ask this host."""
    with surface(tmp_path, ADMIN_TOKEN=TOKEN) as made:
        flat = {"name": "overdue-job", "batch_id": "batch_1", "poll_interval_seconds": 1}
        flat |= dict.fromkeys(("openai_secret", "keboola_secret"), "absent")
        flat |= dict.fromkeys(("keboola_component_id", "keboola_configuration_id"), "x")
        flat |= {"keboola_stack_url": "https://connection.keboola.com"}
        spec = tecko.job_spec(flat, {"bounds": (1, 60)})
        made.on_loop(made.service.store.create_job(spec, "store", time.time()))
        token = {"Authorization": f"Bearer {TOKEN}"}
        until(lambda: ask(made, "/health", **token).body["overdue_jobs"] == ["overdue-job"])
        for given in ({}, {"Authorization": "Bearer x"}, token | {"Host_": "evil.example"}):
            answer = ask(made, "/health", **given)
            assert answer.body["overdue_jobs"] == [] and answer.body["status"] == "degraded"
            assert b"overdue-job" not in answer.raw


ORIGINS = {
    "http://{host}": True,
    "HTTPS://{host}": True,  # a proxy took the TLS off
    "http://localhost:{port}": False,  # not the host that was asked
    "http://127.0.0.1:1": False,
    "http://127.0.0.1": False,
    "https://evil.example": False,
    "http://{host}.evil.example": False,
    "{host}": False,
    "file://{host}": False,
    "null": False,
    "": False,
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_another_origin(open_to_all: Surface, method: str, origin: str) -> None:
    """A page of another origin is refused, health included, and gets no CORS header."""
    given = origin.format(host=open_to_all.host, port=open_to_all.port)
    answer = ask(open_to_all, "/health", method, Origin=given)
    served = 200 if method == "GET" else 405
    assert answer.status == (served if ORIGINS[origin] else 403) and (
        answer.status == 200 or is_error(answer)
    )
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("proxy.example", "https://proxy.example"),
        ("proxy.example:443", "https://proxy.example"),
        ("Proxy.example:8443", "https://proxy.example:8443"),
    ],
)
def test_an_origin_behind_a_proxy(guarded: Surface, host: str, origin: str) -> None:
    """Ports that need not be written and the scheme make no other origin."""
    token = f"Bearer {TOKEN}"
    assert ask(guarded, "/stats", Host_=host, Origin=origin, Authorization=token).status == 200


def test_a_password_in_the_browser_is_not_for_other_sites(guarded: Surface) -> None:
    """What changes something is refused if a page of another site asks, with the right password,
    too; a link to here is followed."""
    known = {"Authorization": basic("me", TOKEN), "Sec-Fetch-Site": "cross-site"}
    known = {name.replace("-", "_"): value for name, value in known.items()}
    for method in ("POST", "PUT", "DELETE"):
        assert ask(guarded, "/api/jobs/1", method, **known).status == 403
    assert ask(guarded, "/stats", **known).status == 200
    assert ask(guarded, "/api/jobs/1", "DELETE", **known | {"Sec_Fetch_Site": "none"}).status == 404


def test_origins_that_may_call(guarded: Surface) -> None:
    """CORS_ORIGINS: the browser's question is answered without a token, the request with one; each
    answer, errors too, says for which origin it is, and never for all."""
    for origin in ("https://app.example.com", "http://localhost:3000"):
        asks = {"Origin": origin, "Access_Control_Request_Method": "PUT"}
        preflight = ask(guarded, "/api/jobs/1", "OPTIONS", **asks)
        refused = ask(guarded, "/api/jobs", Origin=origin)
        answer = ask(guarded, "/api/jobs", Origin=origin, Authorization=f"Bearer {TOKEN}")
        assert (preflight.status, refused.status, answer.status) == (200, 401, 200)
        for each in (preflight, refused, answer):
            assert each.headers["Access-Control-Allow-Origin"] == origin
            assert each.headers["Vary"] == "Accept, Origin"
        assert "PUT" in preflight.headers["Access-Control-Allow-Methods"]
        assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    for origin in ("http://app.example.com", "https://app.example.com:1", "https://x.example.com"):
        other = ask(guarded, "/api/jobs", "OPTIONS", Origin=origin)
        assert other.status == 403 and "Access-Control-Allow-Origin" not in other.headers
    assert ask(guarded, "/health").headers["Vary"] == "Accept, Origin"


@pytest.mark.parametrize("origins", ["https://a.b", "http://a, https://[::1]:3", '["http://a:3"]'])
def test_origins_as_they_are_written(tmp_path: Path, origins: str) -> None:
    """With commas between, or as the list that the user guide shows."""
    settings = tecko.load_config(tmp_path / "jobs.yaml", {"CORS_ORIGINS": origins}).settings
    assert settings.cors_origins == origins


@pytest.mark.parametrize("origins", ["*", "evil.example", "https://x/path", "https://*.x", "null"])
def test_origins_that_are_none(tmp_path: Path, origins: str) -> None:
    """The service does not start with them."""
    with pytest.raises(tecko.Invalid, match=r"CORS_ORIGINS: .*https://app.example.com"):
        tecko.load_config(tmp_path / "jobs.yaml", {"CORS_ORIGINS": origins})


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


WRONG = [None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x"]
WRONG += [f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN.upper()}", "Bearer \xe9\xff", "Basic \xe9"]
WRONG += [basic(TOKEN, ""), basic(TOKEN, "x"), basic("x", TOKEN + "x"), "Basic ====", "Basic"]
WRONG += [f"Token {TOKEN}", f"Bearer {TOKEN},"]
RIGHT = [f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"BEARER {TOKEN} ", basic("", TOKEN)]
RIGHT += [basic("anyone", TOKEN), basic("\u010d", TOKEN).replace("Basic", "basic")]


@pytest.mark.parametrize("path", ["/", "/stats", "/nothing", "/docs"])
@pytest.mark.parametrize("given", WRONG)
def test_without_the_token(guarded: Surface, path: str, given: str | None) -> None:
    """401 for everything but health, also for what is not there; it says what is asked for, so that
    a browser asks its user."""
    answer = ask(guarded, path, **({} if given is None else {"Authorization": given}))
    assert answer.status == 401 and is_error(answer)
    challenges = answer.headers.get_all("WWW-Authenticate") or []
    assert [challenge.split()[0] for challenge in challenges] == ["Bearer", "Basic"]
    assert TOKEN.encode() not in answer.raw


@pytest.mark.parametrize("given", RIGHT)
def test_with_the_token(guarded: Surface, given: str) -> None:
    """All is served, whichever of its two ways it came."""
    for path, status in (("/", 200), ("/stats", 200), ("/api/stats", 200), ("/nothing", 404)):
        assert ask(guarded, path, Authorization=given).status == status


def test_a_token_beyond_ascii(tmp_path: Path) -> None:
    """It is compared as the UTF-8 that curl sends."""
    token = "p\u0159\u00edli\u0161-tajn\u00fd-token"
    with surface(tmp_path, ADMIN_TOKEN=token) as made:
        for given in (f"Bearer {token}".encode().decode("latin-1"), basic("x", token)):
            assert ask(made, "/stats", Authorization=given).status == 200
        assert ask(made, "/stats", Authorization="Bearer p\xf8").status == 401


def test_the_token_does_not_open_to_other_hosts(guarded: Surface) -> None:
    """Host and origin are looked at first."""
    token = f"Bearer {TOKEN}"
    assert ask(guarded, "/stats", Host_="evil.example", Authorization=token).status == 421
    assert ask(guarded, "/stats", Origin="null", Authorization=token).status == 403


# ── What takes its time: begun with the first test, looked at here ────────────────────────────


def test_slow_clients_are_cut_off(begun: dict[str, Future[Any]]) -> None:
    """A silent one first, then those that drip, on which no read ever times out, and one that never
    reads what it is answered; others are answered meanwhile."""
    order, health = begun["slow"].result(40)
    assert order[0] == "silent" and sorted(order) == sorted(BEGUN)
    assert set(health) == {200} and 5 <= len(health) < 60


def test_idle_time_is_not_the_next_request_s(begun: dict[str, Future[Any]]) -> None:
    """A request has its time from its own first byte on."""
    assert begun["late"].result(40).startswith(b"HTTP/1.1 200 ")


def test_who_waits_for_a_change_is_told_the_truth(begun: dict[str, Future[Any]]) -> None:
    """503 is said of what was not done, 202 with where to look of what goes on; it is done."""
    answers, names = begun["locked"].result(40)
    said = {f"secret-{n}": answer for n, answer in enumerate(answers)}
    assert {answer.status for answer in answers} <= {201, 202, 503}
    assert all(is_error(a) and n not in names for n, a in said.items() if a.status == 503)
    late = {name: answer.body for name, answer in said.items() if answer.status == 202}
    assert late.keys() & names
    assert all("GET /api/admin/secrets shows" in body["message"] for body in late.values())


def test_who_waits_for_an_answer_is_told_to_come_again(begun: dict[str, Future[Any]]) -> None:
    """A look that takes too long is 503, in the published shape, and ends the connection."""
    answer = begun["read"].result(40)
    assert answer.status == 503 and is_error(answer) and int(answer.headers["Retry-After"]) > 0
    assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize(
    "path",
    [
        *("/health/", "/./health", "/x/../health", "/%68ealth", "/health%00", "/health;x"),
        *(
            "/HEALTH",
            "/api//jobs",
            "/api/jobs/",
            "/api/jobs/1/../2",
            "/api/jobs/%31",
            "/../etc/passwd",
        ),
        *("/api/jobs/1%2Fpause", "\\health", "http://example.com/nothing"),
    ],
)
def test_a_path_means_itself_alone(open_to_all: Surface, path: str) -> None:
    """Nothing is decoded, joined or cleaned (but for leading slashes, which the standard library
    folds before anything is decided), so that no other spelling gets round a rule."""
    answer = exchange(open_to_all, request(open_to_all, path, "Connection: close"))
    assert answer.split(b" ", 2)[1] in (b"404", b"422", b"400")


# ── Beginning and end ─────────────────────────────────────────────────────────────────────────


def test_it_ends_cleanly(tmp_path: Path, begun: dict[str, Future[Any]]) -> None:
    """No thread is left, the port is free and can be taken again at once."""
    wait(begun.values(), timeout=30)
    before = len(threading.enumerate())
    with surface(tmp_path) as first:
        assert ask(first, "/health").status == 200
    with pytest.raises(ConnectionRefusedError):
        first.dial()
    with surface(tmp_path, API_PORT=str(first.port)) as second:
        assert second.port == first.port and ask(second, "/health").status == 200
    until = time.monotonic() + 5
    while len(threading.enumerate()) > before:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)


def test_a_stop_under_load(tmp_path: Path) -> None:
    """Clients that go on posting while the program is told to end: each job that exists was
    answered so, and no one is told of an error."""
    answers: dict[str, int] = {}

    def post(host: str, client: int) -> None:
        connection = http.client.HTTPConnection(host, timeout=20)
        with contextlib.suppress(OSError, http.client.HTTPException):  # in the end it is closed
            for n in itertools.count():
                secret = {"name": f"{client}-{n}", "type": "api", "value": f"value-of-{n}"}
                kind = {"Content-Type": "application/json"}
                connection.request("POST", "/api/admin/secrets", json.dumps(secret), kind)
                answer = connection.getresponse()
                answers[secret["name"]] = answer.status
                answer.read()

    env = {"API_PORT": "0", "SECRET_KEY": MASTER_KEY}
    (tmp_path / "jobs.yaml").write_text("jobs: []\n")
    with RunningProgram(tmp_path, env) as program, ThreadPoolExecutor(12) as clients:
        host = program.url.removeprefix("http://")
        posted = [clients.submit(post, host, client) for client in range(12)]
        until(lambda: len(answers) > 100)
        assert program.terminate() == 0
        wait(posted, timeout=30)
    with contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as database:
        made = {row[0] for row in database.execute("SELECT name FROM secrets")}
    assert set(answers.values()) <= {201, 202} and made == answers.keys()
    assert "Traceback" not in program.text() and "ERROR" not in program.text()


def test_what_is_under_way_is_answered_before_the_end(tmp_path: Path) -> None:
    """The surface closes at once for others; who waits for a change hears that it goes on, before
    the store closes, and it is done."""
    with surface(tmp_path, SECRET_KEY=MASTER_KEY) as made, ThreadPoolExecutor(2) as clients:
        secret = b'{"name": "x", "type": "api", "value": "a-value"}'
        lines = ["Content-Type: application/json", f"Content-Length: {len(secret)}"]
        post = b"POST" + request(made, "/api/admin/secrets", *lines)[3:] + secret
        with held_up(made):
            asked = clients.submit(exchange, made, post)
            until(lambda: made.service.connections() == 1)
            ended = clients.submit(made.on_loop, made.server.stop())
            came = asked.result(10)
        ended.result(10)
    assert came.startswith(b"HTTP/1.1 202 ") and b"\r\nConnection: close\r\n" in came
    with contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as database:
        assert database.execute("SELECT name FROM secrets").fetchall() == [("x",)]


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A Conflict that names the address, and what chooses another one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        config = tecko.load_config(tmp_path / "jobs.yaml", {"API_PORT": port})
        async with tecko.make_service(config, lambda: config, timers=False) as service:
            with pytest.raises(tecko.Conflict, match=f"127.0.0.1:{port}: .*in use") as e:
                await tecko.serving(service).__aenter__()
    assert "API_PORT" in e.value.hint
