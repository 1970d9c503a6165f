"""The admin surface over real sockets: what it answers, whom it refuses, and what it withstands."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import teckochecker as tecko


@dataclass
class Surface:
    """A running service and its admin surface, on a loop in a thread of its own."""

    service: tecko.Service
    server: tecko.AdminServer
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

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
    async with tecko.make_service(config, lambda: config) as service:
        with tecko.serving(service) as server:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
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
    """With ADMIN_TOKEN."""
    with surface(tmp_path_factory.mktemp("guarded"), ADMIN_TOKEN=TOKEN) as made:
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
    """Begin requests, let some of them drip, and wait until the server has closed them all."""
    order: list[str] = []
    health: list[int] = []
    with surface(folder) as made, contextlib.ExitStack() as stack:
        left = {name: stack.enter_context(made.dial()) for name in BEGUN}
        for name, begun in BEGUN.items():
            left[name].sendall(begun)
        while left and len(health) < 60:
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


def block_the_loop(folder: Path) -> list[Answer]:
    """What is answered while the loop is stuck, and what afterwards."""
    stuck, go_on = threading.Event(), threading.Event()
    with surface(folder) as made, ThreadPoolExecutor(2) as clients:

        def block() -> None:
            stuck.set()
            go_on.wait(30)

        made.loop.call_soon_threadsafe(block)
        assert stuck.wait(10)
        answers = list(clients.map(lambda path: ask(made, path), ("/health", "/stats")))
        go_on.set()
        return [*answers, ask(made, "/health")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What has to wait for the server's own deadlines runs beside the other tests."""
    with ThreadPoolExecutor(2) as beside:
        works = {"slow": send_slowly, "blocked": block_the_loop}
        yield {
            name: beside.submit(work, tmp_path_factory.mktemp(name)) for name, work in works.items()
        }


@pytest.fixture
def slow(begun: dict[str, Future[Any]]) -> Future[Slow]:
    return begun["slow"]


@pytest.fixture
def blocked(begun: dict[str, Future[Any]]) -> Future[list[Answer]]:
    return begun["blocked"]


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


def test_health_is_that_of_the_service(open_to_all: Surface) -> None:
    """What a monitor reads is what the service knows of itself."""
    said = ask(open_to_all, "/health").body
    assert (said["status"], said["scheduler"], said["database"]) == (
        "healthy",
        "running",
        "connected",
    )


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


def test_a_closed_store_is_an_error_in_shape(tmp_path: Path) -> None:
    """Health says unhealthy, everything else the database's error, both with 503."""
    with surface(tmp_path) as made:
        made.on_loop(made.service.store.close())
        health, stats = ask(made, "/health"), ask(made, "/stats")
    assert health.status == 503 and health.body["status"] == "unhealthy"
    assert health.body["database"] == "disconnected" and health.body.keys() >= set(HEALTH.split())
    assert stats.status == 503 and is_error(stats) and stats.body["code"] == 3001


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
    "Content-Length": ["Content-Length: {n}"],
    "lower case": ["content-length: {n}"],
    "two lengths": ["Content-Length: 0", "Content-Length: {n}"],
    "two lengths, reversed": ["Content-Length: {n}", "Content-Length: 0"],
    "chunked": ["Transfer-Encoding: chunked"],
    "chunked and a length": ["Transfer-Encoding: chunked", "Content-Length: 0"],
    "chunked in disguise": ["Transfer-Encoding: \tChunKed"],
    "a length that is none": ["Content-Length: abc"],
    "a negative length": ["Content-Length: -1"],
    "a length with a sign": ["Content-Length: +0"],
    "a list of lengths": ["Content-Length: 0, {n}"],
    "a space before the colon": ["Content-Length : {n}"],
    "a folded header": ["X: y", " Content-Length: {n}", "Content-Length:", " {n}"],
    "no header line": ["nonsense", "Content-Length: {n}"],
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=list(SMUGGLED))
def test_a_body_is_not_the_next_request(open_to_all: Surface, lines: list[str]) -> None:
    """One answer, whatever it is, and the connection is closed: what stands in a body, as a proxy
    in front of us may see it, is not served."""
    hidden = request(open_to_all, "/stats")
    head = [line.format(n=len(hidden)) for line in lines]
    came = exchange(open_to_all, request(open_to_all, "/health", *head) + hidden)
    assert came.count(b"HTTP/1.1 ") == 1 and b"total_jobs" not in came


def test_a_post_with_a_body_closes_as_well(open_to_all: Surface) -> None:
    """What is refused by its method leaves no body behind either."""
    hidden = request(open_to_all, "/stats")
    post = request(open_to_all, "/health", f"Content-Length: {len(hidden)}")
    came = exchange(open_to_all, b"POST" + post.removeprefix(b"GET") + hidden)
    assert came.count(b"HTTP/1.1 ") == 1 and b"total_jobs" not in came


LONG = "x" * 70_000
MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "a long request line": lambda host: f"GET /{LONG} HTTP/1.1\r\n\r\n".encode(),
    "a long header": lambda host: f"GET /health HTTP/1.1\r\nX: {LONG}\r\n\r\n".encode(),
    "many headers": lambda host: b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "no version": lambda host: b"GET /health is here HTTP/1.1\r\n\r\n",
    "a wrong version": lambda host: b"GET /health HTTP/x.y\r\n\r\n",
    "HTTP/2": lambda host: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": lambda host: b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
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


def test_one_connection_too_many(tmp_path: Path) -> None:
    """It gets 503 at once, in the published shape; those that were there first go on, and when one
    of them leaves there is room again."""
    with surface(tmp_path) as made, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(made.client())) for _ in range(32)]
        assert len(clients) == 32
        for client in clients:
            client.request("GET", "/health")
            assert client.getresponse().read()
        refused = [ask(made, "/health") for _ in range(5)]
        assert {answer.status for answer in refused} == {503}
        clients[0].request("GET", "/health")
        assert clients[0].getresponse().status == 200
        clients[1].close()
        until = time.monotonic() + 5
        while ask(made, "/health").status != 200:
            assert time.monotonic() < until
    assert all(is_error(answer) for answer in refused)


# ── Who may ask ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LocalHost:{}", "[::1]:{}"])
def test_a_host_that_is_this_one(open_to_all: Surface, host: str) -> None:
    """By any of the names of this machine, with the port."""
    assert ask(open_to_all, "/health", Host_=host.format(open_to_all.port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:{}", "127.0.0.1.evil.example:{}", "127.0.0.1", "localhost"),
        *(
            "127.0.0.1:1",
            "",
            "127.0.0.1:{}@evil.example",
            "127.0.0.1:{},evil.example",
            "0.0.0.0:{}",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/stats", "/nothing"])
def test_a_host_that_is_not_this_one(open_to_all: Surface, host: str, path: str) -> None:
    """A page whose name was pointed at this machine (DNS rebinding) reads nothing, nor health."""
    answer = ask(open_to_all, path, Host_=host.format(open_to_all.port))
    assert answer.status in (400, 403, 421) and is_error(answer)


def test_two_hosts(open_to_all: Surface) -> None:
    """Which of two Host headers counts is no question: neither."""
    lines = ["Host: evil.example", "Connection: close"]
    assert b"overdue_jobs" not in exchange(open_to_all, request(open_to_all, "/health", *lines))


@pytest.mark.parametrize(
    ("origin", "served"),
    [
        ("http://127.0.0.1:{}", True),
        ("http://localhost:{}", False),  # not the host that was asked
        ("https://127.0.0.1:{}", False),
        ("http://127.0.0.1:1", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_pages_of_another_origin(open_to_all: Surface, origin: str, served: bool) -> None:
    """A page of another origin is refused, health included, and gets no CORS header."""
    answer = ask(open_to_all, "/health", Origin=origin.format(open_to_all.port))
    assert answer.status == (200 if served else 403)
    assert served or is_error(answer)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    TOKEN,
    f"Basic {TOKEN}",
    f"Bearer {TOKEN}x",
    f"Bearer {TOKEN[:-1]}",
    f"Bearer {TOKEN.upper()}",
    "Bearer \xe9\xff",
]


@pytest.mark.parametrize("path", ["/", "/stats", "/api/stats", "/nothing"])
@pytest.mark.parametrize("given", WRONG)
def test_without_the_token(guarded: Surface, path: str, given: str | None) -> None:
    """401 for everything but health, also for what is not there, and it says what is asked for."""
    answer = ask(guarded, path, **({} if given is None else {"Authorization": given}))
    assert answer.status == 401 and is_error(answer)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert TOKEN.encode() not in answer.raw


def test_with_the_token(guarded: Surface) -> None:
    """All is served; health needs none."""
    for path, status in (("/", 200), ("/stats", 200), ("/api/stats", 200), ("/nothing", 404)):
        assert ask(guarded, path, Authorization=f"Bearer {TOKEN}").status == status
    for path in ("/health", "/api/health"):
        assert ask(guarded, path).status == 200
        assert ask(guarded, path, Authorization="Bearer wrong").status == 200


def test_the_token_does_not_open_to_other_hosts(guarded: Surface) -> None:
    """Host and origin are looked at first."""
    token = f"Bearer {TOKEN}"
    answer = ask(guarded, "/stats", Host_="evil.example", Authorization=token)
    assert answer.status in (400, 403, 421)
    assert ask(guarded, "/stats", Origin="null", Authorization=token).status == 403


# ── What takes its time: begun with the first test, looked at here ────────────────────────────


def test_slow_senders_are_cut_off(slow: Future[Slow]) -> None:
    """Silent ones first, then those that drip, on which no read ever times out; others are answered
    meanwhile."""
    order, health = slow.result(30)
    assert sorted(order[:3]) == ["half a line", "half the headers", "silent"]
    assert sorted(order[3:]) == ["drips a body", "drips a line", "drips headers"]
    assert set(health) == {200} and len(health) >= 5


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


def test_a_blocked_loop_is_unhealthy(blocked: Future[list[Answer]]) -> None:
    """A loop that does nothing for seconds is answered for with 503, in whole; afterwards all is as
    it was."""
    health, stats, afterwards = blocked.result(30)
    assert (health.status, afterwards.status) == (503, 200)
    assert (health.body["status"], health.body["scheduler"]) == ("unhealthy", "stalled")
    assert health.body.keys() >= set(HEALTH.split()) and health.headers["X-Request-ID"]
    assert stats.status == 503 and is_error(stats)


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


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A Conflict that names the address, and what chooses another one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        config = tecko.load_config(tmp_path / "jobs.yaml", {"API_PORT": port})
        async with tecko.make_service(config, lambda: config, timers=False) as service:
            with pytest.raises(tecko.Conflict, match=f"127.0.0.1:{port}: .*in use") as e:
                tecko.AdminServer(service, asyncio.get_running_loop())
    assert "API_PORT" in e.value.hint
