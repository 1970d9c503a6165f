"""Stand-ins for the upstream APIs: real HTTP/1.1 servers on 127.0.0.1 that can misbehave on demand.

`OpenAI` and `Keboola` answer as the published contracts say, keep what was really created, and
can be told to fail, hang, cut an answer short or stop a request half-way (`Fault`, `Gate`).
`Source` serves records in pages, and files, as ingest jobs fetch them. `Elsewhere` is any other
host. Each runs an event loop in a thread of its own, so that it can be
driven from synchronous and asynchronous tests, from a demo and from benchmarks alike.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate, parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from types import EllipsisType, TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlencode

# --- HTTP: what goes over the wire ---------------------------------------------------------------

PHRASES = {int(status): status.phrase for status in HTTPStatus}
JSON_TYPE: Mapping[str, str] = {"Content-Type": "application/json"}
HTML_TYPE: Mapping[str, str] = {"Content-Type": "text/html; charset=utf-8"}
NO_LINGER = struct.pack("ii", 1, 0)  # closing with data or without sends RST instead of FIN


class Request(NamedTuple):
    """One request as it came in: header names in lower case, `at` in monotonic seconds."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    at: float


class Answer(NamedTuple):
    """One answer before it is framed; Content-Length is added when it is sent, but to a 304."""

    status: int
    body: bytes
    headers: Mapping[str, str] = JSON_TYPE


class BadRequest(Exception):
    """What came in is no request that these servers can frame."""


Respond = Callable[[Request], Answer]


def as_json(value: object) -> bytes:
    """The compact JSON of `value`."""
    return json.dumps(value, separators=(",", ":")).encode()


def frame(answer: Answer) -> bytes:
    """The bytes of an answer, head and body in one piece."""
    status, body, headers = answer
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if status != 304:  # there it would be the length of what is not sent (RFC 9110, 8.6)
        lines += f"Content-Length: {len(body)}\r\n"
    head = f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}\r\n{lines}\r\n"
    return head.encode("latin-1") + body


def parse_head(head: str) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers out of everything before the empty line."""
    first, *lines = head.split("\r\n")
    try:
        method, target, _ = first.split(" ")
    except ValueError:
        raise BadRequest(f"no request line: {first!r}") from None
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return method, target, headers


def body_length(headers: Mapping[str, str]) -> int:
    """How many bytes of body follow the head."""
    if "transfer-encoding" in headers:
        raise BadRequest("chunked bodies are not decoded")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise BadRequest(f"bad Content-Length: {length!r}")
    return int(length)


def make_request(method: str, target: str, headers: dict[str, str], body: bytes) -> Request:
    """A request that has just arrived, its target taken apart."""
    path, _, query = target.partition("?")
    if "%" in path:
        path = unquote(path)
    values = parse_qs(query, keep_blank_values=True) if query else {}
    return Request(method, path, values, headers, body, time.monotonic())


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other, as HTTP/1.1 asks."""

    _transport: asyncio.Transport

    def __init__(self, owner: StandIn, respond: Respond) -> None:
        self._owner, self._respond = owner, respond
        self._unread = b""
        self._busy = False
        self._last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and be known to the owner so that a stop drops this connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; a request already on its way still takes effect."""
        self._owner.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Take in bytes and answer every request that is whole."""
        self._unread = self._unread + data if self._unread else data
        self.advance()

    def advance(self) -> None:
        """Answer what has arrived, unless an earlier request is still being held up."""
        try:
            while not self._busy and not self.gone and (request := self._take()):
                self._busy = True
                self._last = request.headers.get("connection", "").lower() == "close"
                self._owner.arrived(request, self, self._respond)
        except BadRequest as error:
            self._last = True
            self.send(self._owner.error(400, str(error)))

    def _take(self) -> Request | None:
        end = self._unread.find(b"\r\n\r\n")
        if end < 0:
            return None
        method, target, headers = parse_head(self._unread[:end].decode("latin-1"))
        begin = end + 4
        stop = begin + body_length(headers)
        if len(self._unread) < stop:
            return None
        body, self._unread = self._unread[begin:stop], self._unread[stop:]
        return make_request(method, target, headers, body)

    @property
    def gone(self) -> bool:
        """Whether nobody is there any more to read an answer."""
        return self._transport.is_closing()

    def send(self, answer: Answer) -> None:
        """Answer the request in hand and be ready for the next one."""
        self._write(frame(self._owner.dated(answer)))
        self._done()

    def _write(self, data: bytes) -> None:
        if not self.gone:
            self._transport.write(data)

    def _done(self) -> None:
        self._busy = False
        if self._last:
            self.close()

    def close(self) -> None:
        """Close in good order once everything written is sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        self._transport.abort()

    def reset(self) -> None:
        """Close with a TCP reset."""
        if not self.gone:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self._transport.abort()

    def truncate(self, answer: Answer) -> None:
        """Announce the whole answer, send half of its body, and close."""
        whole = frame(self._owner.dated(answer))
        self._write(whole[: len(whole) - (len(answer.body) + 1) // 2])
        self.close()

    async def drip(self, answer: Answer, every: float) -> None:
        """Send the answer one byte each `every` seconds, for as long as somebody reads."""
        for byte in frame(self._owner.dated(answer)):
            if self.gone:
                return
            self._write(bytes([byte]))
            await asyncio.sleep(every)
        self._done()


# --- Faults and gates: how a request goes wrong --------------------------------------------------

Ending = Literal["send", "replace", "close", "reset", "hang", "drip", "truncate"]

GARBAGE = b"<!DOCTYPE html><html><body><h1>It works!</h1></body></html>"


@dataclass(frozen=True)
class Fault:
    """One way in which a request goes wrong; `acts` says whether it takes effect all the same."""

    ending: Ending
    acts: bool = False
    code: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # None: the API's own error body for this code
    every: float = 0.0

    @classmethod
    def status(
        cls, code: int, headers: Mapping[str, str] | None = None, body: object = None
    ) -> Fault:
        """This status; a str or bytes body is sent as HTML, as a proxy would, others as JSON."""
        return cls._answer(code, headers, body, acts=False)

    @classmethod
    def act_then_status(
        cls, code: int, headers: Mapping[str, str] | None = None, body: object = None
    ) -> Fault:
        """The request takes effect, and is answered with this status nevertheless."""
        return cls._answer(code, headers, body, acts=True)

    @classmethod
    def _answer(
        cls, code: int, headers: Mapping[str, str] | None, body: object, acts: bool
    ) -> Fault:
        given = headers or {}
        if body is None:
            return cls("replace", acts, code, {**JSON_TYPE, **given})
        if isinstance(body, str | bytes):
            raw = body.encode() if isinstance(body, str) else body
            return cls("replace", acts, code, {**HTML_TYPE, **given}, raw)
        return cls("replace", acts, code, {**JSON_TYPE, **given}, as_json(body))

    @classmethod
    def json(cls, body: object, status: int = 200) -> Fault:
        """Well-formed JSON that need not be what the API says."""
        return cls("replace", False, status, JSON_TYPE, as_json(body))

    @classmethod
    def garbage(cls) -> Fault:
        """200 with a web page where JSON belongs."""
        return cls("replace", False, 200, HTML_TYPE, GARBAGE)

    @classmethod
    def act_then_garbage(cls) -> Fault:
        """The request takes effect, and is answered with 200 and a web page."""
        return cls("replace", True, 200, HTML_TYPE, GARBAGE)

    @classmethod
    def redirect(cls, location: str, status: int = 307) -> Fault:
        """Send the client elsewhere."""
        return cls("replace", False, status, {"Location": location}, b"")

    @classmethod
    def rate_limited(cls, retry_after: int | str | None) -> Fault:
        """429 with Retry-After in seconds, or as the text given, or without it."""
        return cls.status(429, {} if retry_after is None else {"Retry-After": str(retry_after)})

    @classmethod
    def drop_reply(cls) -> Fault:
        """The request takes effect, and the connection closes without an answer."""
        return cls("close", acts=True)

    @classmethod
    def reset(cls) -> Fault:
        """The connection is reset before anything happened."""
        return cls("reset")

    @classmethod
    def act_then_reset(cls) -> Fault:
        """The request takes effect, and the connection is reset."""
        return cls("reset", acts=True)

    @classmethod
    def hang(cls) -> Fault:
        """Nothing happens and no answer ever comes."""
        return cls("hang")

    @classmethod
    def act_then_hang(cls) -> Fault:
        """The request takes effect, and no answer ever comes."""
        return cls("hang", acts=True)

    @classmethod
    def drip(cls, every: float = 0.2) -> Fault:
        """The real answer, one byte each `every` seconds, so that no read ever times out."""
        return cls("drip", acts=True, every=every)

    @classmethod
    def truncate(cls) -> Fault:
        """The request takes effect, and its answer ends before the announced Content-Length."""
        return cls("truncate", acts=True)


NORMAL = Fault("send", acts=True)


class Gate:
    """A place where one request stops until it is released."""

    def __init__(self, route: str) -> None:
        self.route = route
        self._arrived = threading.Event()
        self._opened: Future[None] = Future()
        self._request: Request | None = None

    def reached(self, timeout: float = 10.0) -> Request:
        """Block until a request stands here, and return it."""
        if not self._arrived.wait(timeout):
            raise TimeoutError(f"no request reached the gate on {self.route!r} in {timeout} s")
        assert self._request is not None
        return self._request

    async def areached(self, timeout: float = 10.0) -> Request:
        """Wait until a request stands here, and return it."""
        return await asyncio.to_thread(self.reached, timeout)

    def release(self) -> None:
        """Let the request go on; one that comes later passes without stopping."""
        if not self._opened.done():
            self._opened.set_result(None)

    async def hold(self, request: Request) -> None:
        """Stop this request here; runs on the stand-in's own loop."""
        self._request = request
        self._arrived.set()
        await asyncio.wrap_future(self._opened)


@dataclass
class Rule:
    """A fault that waits for requests; `left` None means until healed."""

    route: str
    fault: Fault
    left: int | None
    key: str | None


@dataclass
class Plan:
    """What happens to one request on its way."""

    fault: Fault
    before: Gate | None
    after: Gate | None


@lru_cache(maxsize=256)
def route_pattern(route: str) -> re.Pattern[str]:
    """What a route such as "GET /jobs/*" matches; "*" stands for anything, slashes too."""
    return re.compile(".*".join(map(re.escape, route.split("*"))))


def matches(route: str, method: str, path: str) -> bool:
    """Whether the whole of "METHOD /path" is covered by the route."""
    return route_pattern(route).fullmatch(f"{method} {path}") is not None


def credential(request: Request) -> str:
    """The API key or token that the request carries, or nothing."""
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    return request.headers.get("x-storageapi-token", bearer)


# --- The server ----------------------------------------------------------------------------------

BACKLOG = 1024  # a client without a limit opens about a thousand connections at once
PATIENCE = 10.0  # seconds for a thread to start or end; both take milliseconds


class StandIn:
    """A server in a thread of its own; after a stop, `start` listens on the same ports again."""

    def __init__(self, record: bool = True) -> None:
        self.record = record
        self.requests: list[Request] = []
        self.request_count = 0
        self.latency = 0.0
        self.clock_ahead = 0.0  # seconds by which this server's clock is ahead of the real time
        self.connections: set[Connection] = set()
        # Tests change the state from their threads while the loop's thread reads it.
        self.lock = threading.RLock()
        self._tally: Counter[tuple[str, str]] = Counter()
        self._rules: list[Rule] = []
        self._waiting: list[tuple[Gate, bool]] = []
        self._gates: list[Gate] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ports = [0] * len(self.responders())
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    def responders(self) -> Sequence[Respond]:
        """What answers, one for each listening port."""
        raise NotImplementedError

    def dated(self, answer: Answer) -> Answer:
        """The answer with a Date, which every server with a clock sends (RFC 9110, 6.6.1)."""
        date = formatdate(time.time() + self.clock_ahead, usegmt=True)
        return answer._replace(headers={"Date": date, **answer.headers})

    def error(self, status: int, message: str) -> Answer:
        """An error answer in the shape of this API."""
        return Answer(status, as_json({"error": message}))

    # Life

    def start(self) -> Self:
        """Listen; returns when requests are taken."""
        if self._thread is not None:
            raise RuntimeError("already started")
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=type(self).__name__, daemon=True
        )
        self._thread.start()
        try:
            ready.result(PATIENCE)
        except BaseException:
            self._thread = None
            raise
        return self

    def stop(self) -> None:
        """Drop every connection, hung ones too, and end the thread; harmless when repeated."""
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join(PATIENCE)
        self.release_all()
        if thread.is_alive():
            raise RuntimeError(f"{thread.name} does not stop")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self, ready: Future[None]) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _serve(self, ready: Future[None]) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        servers = []
        for number, respond in enumerate(self.responders()):
            server = await self._listen(self._ports[number], respond)
            self._ports[number] = server.sockets[0].getsockname()[1]
            servers.append(server)
        ready.set_result(None)
        await self._stopping.wait()
        for server in servers:
            server.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # an aborted socket is closed in the loop's next round

    async def _listen(self, port: int, respond: Respond) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            lambda: Connection(self, respond), "127.0.0.1", port, backlog=BACKLOG
        )

    def address(self, number: int) -> str:
        """The base URL of one of the ports."""
        if not self._ports[number]:
            raise RuntimeError("not started: it has no address yet")
        return f"http://127.0.0.1:{self._ports[number]}"

    @property
    def url(self) -> str:
        """Where it listens; still the same after a stop."""
        return self.address(0)

    # What came in, and what is to go wrong

    def count(self, route: str) -> int:
        """How many requests matched the route, whether they were answered or not."""
        with self.lock:
            return sum(
                n for (method, path), n in self._tally.items() if matches(route, method, path)
            )

    def fault(
        self, route: str, fault: Fault, times: int | None = 1, *, key: str | None = None
    ) -> None:
        """The next `times` matching requests (None: until healed) go wrong; oldest rule first."""
        with self.lock:
            self._rules.append(Rule(route, fault, times, key))

    def heal(self, route: str = "*") -> None:
        """Take back the faults given for exactly this route, or all of them."""
        with self.lock:
            self._rules = [rule for rule in self._rules if route not in ("*", rule.route)]

    def gate(self, route: str, after_acting: bool) -> Gate:
        """The next matching request stops before it takes effect, or after that, unanswered."""
        gate = Gate(route)
        with self.lock:
            self._gates.append(gate)
            self._waiting.append((gate, after_acting))
        return gate

    def release_all(self) -> None:
        """Open every gate, and forget those that nobody reached."""
        with self.lock:
            gates, self._gates, self._waiting = self._gates, [], []
        for gate in gates:
            gate.release()

    # One request

    def arrived(self, request: Request, connection: Connection, respond: Respond) -> None:
        """Record a request and answer it, at once unless something holds it up."""
        with self.lock:
            self.request_count += 1
            self._tally[request.method, request.path] += 1
            if self.record:
                self.requests.append(request)
            held = bool(self._rules or self._waiting or self.latency)
            plan = self._plan(request) if held else None
            answer = respond(request) if plan is None else None
        if answer is not None:
            connection.send(answer)
        elif plan is not None:
            task = asyncio.create_task(self._exchange(request, connection, respond, plan))
            self._tasks.add(task)  # the loop itself holds tasks only weakly
            task.add_done_callback(self._tasks.discard)

    def _plan(self, request: Request) -> Plan:
        before = self._take_gate(request, after_acting=False)
        after = self._take_gate(request, after_acting=True)
        return Plan(self._take_fault(request), before, after)

    def _take_gate(self, request: Request, after_acting: bool) -> Gate | None:
        for place, (gate, after) in enumerate(self._waiting):
            if after == after_acting and matches(gate.route, request.method, request.path):
                del self._waiting[place]
                return gate
        return None

    def _take_fault(self, request: Request) -> Fault:
        for rule in self._rules:
            if rule.key not in (None, credential(request)):
                continue
            if matches(rule.route, request.method, request.path):
                self._use_up(rule)
                return rule.fault
        return NORMAL

    def _use_up(self, rule: Rule) -> None:
        if rule.left is not None:
            rule.left -= 1
            if rule.left <= 0:
                self._rules.remove(rule)

    async def _exchange(
        self, request: Request, connection: Connection, respond: Respond, plan: Plan
    ) -> None:
        if plan.before:
            await plan.before.hold(request)
        try:
            with self.lock:
                answer = respond(request) if plan.fault.acts else None
        except Exception:
            connection.abort()  # a mistake in a test's own predicate must not look like a hang
            raise
        if plan.after:
            await plan.after.hold(request)
        if self.latency:
            await asyncio.sleep(self.latency)
        if answer is None or plan.fault.ending == "replace":
            answer = self._instead(plan.fault)
        await self._deliver(connection, answer, plan.fault)
        connection.advance()

    async def _deliver(self, connection: Connection, answer: Answer, fault: Fault) -> None:
        match fault.ending:
            case "send" | "replace":
                connection.send(answer)
            case "close":
                connection.close()
            case "reset":
                connection.reset()
            case "truncate":
                connection.truncate(answer)
            case "drip":
                await connection.drip(answer, fault.every)
            case "hang":
                pass  # the connection stays busy until the client or a stop closes it

    def _instead(self, fault: Fault) -> Answer:
        if fault.body is not None:
            return Answer(fault.code, fault.body, fault.headers)
        usual = self.error(fault.code, PHRASES.get(fault.code, "Unknown"))
        return usual._replace(headers=fault.headers)


class Elsewhere(StandIn):
    """Any other host: answers 200 {} to everything, and records what it was told."""

    def responders(self) -> Sequence[Respond]:
        """One port that agrees with everything."""
        return (lambda request: Answer(200, b"{}"),)


class Inbox(Elsewhere):
    """Where alerts are sent to: a webhook, or one of Apprise's."""

    def told(self, path: str = "/in") -> list[Any]:
        """The JSON of each message that came there, in order."""
        with self.lock:
            return [json.loads(r.body) for r in self.requests if r.path == path and r.body]

    def states(self, path: str = "/in") -> list[tuple[str, str, str]]:
        """State, kind and subject of each alert in them."""
        alerts = [alert for message in self.told(path) for alert in message["alerts"]]
        return [(alert["state"], alert["kind"], alert["subject"]) for alert in alerts]


# --- OpenAI: batches -----------------------------------------------------------------------------

OPENAI_KEY = "sk-standin-openai"
DAY = 86_400  # seconds; the only completion window there is
PAGE_DEFAULT, PAGE_MAX = 20, 100

Told = Mapping[str, Any]

# Which moments a batch has behind it when it has this status.
MOMENTS: dict[str, tuple[str, ...]] = {
    "validating": (),
    "failed": ("failed_at",),
    "in_progress": ("in_progress_at",),
    "finalizing": ("in_progress_at", "finalizing_at"),
    "completed": ("in_progress_at", "finalizing_at", "completed_at"),
    "expired": ("in_progress_at", "expired_at"),
    "cancelling": ("in_progress_at", "cancelling_at"),
    "cancelled": ("in_progress_at", "cancelling_at", "cancelled_at"),
}
FINAL = {"failed", "completed", "expired", "cancelled"}
FINAL_MOMENTS = {MOMENTS[status][-1] for status in FINAL}
NO_MOMENTS: dict[str, None] = dict.fromkeys(name for names in MOMENTS.values() for name in names)

# What can be told of a batch and is worked out when it is not.
DEFAULTS: Told = {
    "total": 10,
    "completed": None,
    "failed": 0,
    "output_file_id": ...,
    "error_file_id": ...,
    "expires_at": None,
    "errors": None,
}
PLAIN = {"endpoint", "model", "input_file_id", "completion_window", "usage", "metadata"}
CHANGEABLE = DEFAULTS.keys() | NO_MOMENTS.keys() | PLAIN | {"request_counts"}

UNREADABLE_INPUT = {
    "code": "invalid_json_line",
    "message": "This line is not parseable as valid JSON.",
    "param": None,
    "line": 1,
}


class Batch:
    """A live batch: what is changed here is what the next request sees."""

    __slots__ = (
        "_encoded",
        "_lock",
        "_moments",
        "_nulls",
        "_script",
        "_status",
        "_told",
        "created_at",
        "id",
    )

    def __init__(
        self, batch_id: str, created_at: int, lock: threading.RLock, *, nulls: bool
    ) -> None:
        self.id, self.created_at = batch_id, created_at
        self._lock, self._nulls = lock, nulls
        self._status, self._told = "validating", DEFAULTS
        self._moments: Mapping[str, int] = {}
        self._script: list[tuple[float, str, Told]] = []
        self._encoded: bytes | None = None

    @property
    def status(self) -> str:
        """The status at this moment, scripted changes included."""
        with self._lock:
            self._follow_script()
            return self._status

    def become(self, status: str, **changes: Any) -> Batch:
        """Take on a status, known or not, and change fields or counts of the contract."""
        if unknown := changes.keys() - CHANGEABLE:
            raise TypeError(f"a batch has no {', '.join(sorted(unknown))}")
        with self._lock:
            self._turn(status, changes, int(time.time()))
        return self

    def follow(self, steps: Iterable[tuple[float, str, Told]]) -> None:
        """Take on each status so many seconds from now."""
        now = time.monotonic()
        with self._lock:
            due = [(now + seconds, status, changes) for seconds, status, changes in steps]
            self._script = sorted(due, key=lambda step: step[0])

    def fields(self) -> dict[str, Any]:
        """The batch as the API shows it."""
        with self._lock:
            self._follow_script()
            fields = self._render()
        return fields if self._nulls else {k: v for k, v in fields.items() if v is not None}

    def encoded(self) -> bytes:
        """The JSON of the batch, kept until it changes; the caller holds the lock."""
        if self._script:
            self._follow_script()
        if self._encoded is None:
            self._encoded = as_json(self.fields())
        return self._encoded

    def _follow_script(self) -> None:
        now = time.monotonic()
        while self._script and self._script[0][0] <= now:
            due, status, changes = self._script.pop(0)
            self._turn(status, changes, int(time.time() - (now - due)))

    def _turn(self, status: str, changes: Told, at: int) -> None:
        told = {**self._told, **changes} if changes else self._told
        if status == "completed" and told["completed"] is not None and "completed" not in changes:
            told = {**told, "completed": None}  # whatever was half-way is done now
        self._told, self._status, self._encoded = told, status, None
        if status in MOMENTS:
            past = {k: v for k, v in self._moments.items() if k not in FINAL_MOMENTS}
            self._moments = {**dict.fromkeys(MOMENTS[status], max(at, self.created_at)), **past}

    def _render(self) -> dict[str, Any]:
        told = self._told
        output, error = self._files()
        fields: dict[str, Any] = {
            "id": self.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": self._errors(),
            "input_file_id": f"file-in-{self.id}",
            "completion_window": "24h",
            "status": self._status,
            "output_file_id": output,
            "error_file_id": error,
            "created_at": self.created_at,
            **NO_MOMENTS,
            **self._moments,
            "expires_at": told["expires_at"] or self.created_at + DAY,
            "request_counts": self._counts(),
            "metadata": None,
        }
        fields.update((name, told[name]) for name in told if name not in DEFAULTS)
        return fields

    def _counts(self) -> dict[str, int]:
        total, completed, failed = (self._told[name] for name in ("total", "completed", "failed"))
        if completed is None:
            completed = total - failed if self._status == "completed" else 0
        return {"total": total, "completed": completed, "failed": failed}

    def _files(self) -> tuple[str | None, str | None]:
        counts, output, error = self._counts(), None, None
        if self._status in ("completed", "expired", "cancelled"):
            whole = self._status == "completed"
            output = f"file-out-{self.id}" if whole or counts["completed"] else None
            error = f"file-err-{self.id}" if counts["failed"] else None
        told_output, told_error = self._told["output_file_id"], self._told["error_file_id"]
        return (
            output if told_output is ... else told_output,
            error if told_error is ... else told_error,
        )

    def _errors(self) -> object:
        errors = self._told["errors"]
        if errors is None and self._status == "failed":
            errors = [UNREADABLE_INPUT]
        return {"object": "list", "data": errors} if isinstance(errors, list) else errors


class Project:
    """The batches that one key sees, in an order that pages without a search."""

    def __init__(self) -> None:
        self.batches: dict[str, Batch] = {}
        self._order: list[Batch] = []
        self._place: dict[str, int] = {}
        self._sorted = True

    def add(self, batch: Batch) -> None:
        """Register a batch, in place of one with the same id."""
        self.remove(batch.id)
        self.batches[batch.id] = batch
        if self._order and batch.created_at < self._order[-1].created_at:
            self._sorted = False
        self._place[batch.id] = len(self._order)
        self._order.append(batch)

    def remove(self, batch_id: str) -> None:
        """Forget a batch, if it is there."""
        if self.batches.pop(batch_id, None):
            self._sorted = False

    def page(self, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """The next batches, newest first, and whether more follow; KeyError: unknown `after`."""
        if not self._sorted:
            self._order = sorted(self.batches.values(), key=lambda batch: batch.created_at)
            self._place = {batch.id: place for place, batch in enumerate(self._order)}
            self._sorted = True
        end = len(self._order) if after is None else self._place[after]
        start = max(0, end - limit)
        return self._order[start:end][::-1], start > 0


class OpenAI(StandIn):
    """The Batch API: batches belong to the key that they were registered for."""

    def __init__(self, record: bool = True, nulls: bool = True) -> None:
        """`nulls` sends empty fields as null like the live service; False leaves them out."""
        super().__init__(record)
        self._nulls = nulls
        self._projects: dict[str, Project] = {}

    def responders(self) -> Sequence[Respond]:
        """One port, everything under /v1."""
        return (self._respond,)

    @property
    def base_url(self) -> str:
        """What the official client takes as its base URL."""
        return f"{self.url}/v1"

    # Builders

    def key(self, key: str) -> None:
        """Register an API key, with no batches unless it has some."""
        with self.lock:
            self._projects.setdefault(f"Bearer {key}", Project())

    def batch(
        self,
        batch_id: str,
        status: str = "in_progress",
        *,
        key: str = OPENAI_KEY,
        total: int = 10,
        completed: int | None = None,
        failed: int = 0,
        output_file_id: str | EllipsisType | None = ...,
        error_file_id: str | EllipsisType | None = ...,
        created_at: int | None = None,
        expires_at: int | None = None,
        errors: list[dict[str, Any]] | dict[str, Any] | None = None,
    ) -> Batch:
        """Register a batch and its key; files and counts that are not told fit the status."""
        told = {
            "total": total,
            "completed": completed,
            "failed": failed,
            "output_file_id": output_file_id,
            "error_file_id": error_file_id,
            "expires_at": expires_at,
            "errors": errors,
        }
        made = int(time.time()) if created_at is None else created_at
        return self._add(key, Batch(batch_id, made, self.lock, nulls=self._nulls), status, told)

    def many(
        self,
        key: str,
        ids: Iterable[str],
        status: str = "in_progress",
        created_at_start: int | None = None,
    ) -> list[Batch]:
        """Register many batches, each a second newer than the one before it, the last one now."""
        names = list(ids)
        start = int(time.time()) - len(names) if created_at_start is None else created_at_start
        return [
            self._add(key, Batch(name, start + n, self.lock, nulls=self._nulls), status, {})
            for n, name in enumerate(names)
        ]

    def _add(self, key: str, batch: Batch, status: str, told: Told) -> Batch:
        batch.become(status, **told)
        self.key(key)
        with self.lock:
            self._projects[f"Bearer {key}"].add(batch)
        return batch

    def remove(self, batch_id: str, *, key: str = OPENAI_KEY) -> None:
        """Forget a batch; its key stays registered."""
        with self.lock:
            self._projects[f"Bearer {key}"].remove(batch_id)

    def script(
        self, batch_id: str, steps: Iterable[tuple[float, str, Told]], *, key: str = OPENAI_KEY
    ) -> None:
        """Change a registered batch by time: seconds from now, status, further changes."""
        with self.lock:
            self._projects[f"Bearer {key}"].batches[batch_id].follow(steps)

    # Answers

    def error(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> Answer:
        """An error answer as OpenAI words it."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind, code = "requests", code or "rate_limit_exceeded"
        error = {"message": message, "type": kind, "param": param, "code": code}
        return Answer(status, as_json({"error": error}))

    def _respond(self, request: Request) -> Answer:
        project = self._projects.get(request.headers.get("authorization", ""))
        if project is None:
            return self.error(401, "Incorrect API key provided.", code="invalid_api_key")
        match request.method, request.path.split("/")[1:]:
            case "GET", ["v1", "batches"]:
                return self._list(project, request.query)
            case "GET", ["v1", "batches", batch_id]:
                return self._retrieve(project, batch_id)
            case "POST", ["v1", "batches", batch_id, "cancel"]:
                return self._cancel(project, batch_id)
        return self.error(404, f"Invalid URL ({request.method} {request.path})")

    def _no_batch(self, batch_id: str) -> Answer:
        return self.error(404, f"No batch found with id '{batch_id}'.")

    def _retrieve(self, project: Project, batch_id: str) -> Answer:
        batch = project.batches.get(batch_id)
        return Answer(200, batch.encoded()) if batch else self._no_batch(batch_id)

    def _cancel(self, project: Project, batch_id: str) -> Answer:
        batch = project.batches.get(batch_id)
        if batch is None:
            return self._no_batch(batch_id)
        if batch.status in FINAL:
            return self.error(409, f"Cannot cancel a batch with status '{batch.status}'.")
        if batch.status != "cancelling":
            batch.become("cancelling")
        return Answer(200, batch.encoded())

    def _list(self, project: Project, query: Mapping[str, list[str]]) -> Answer:
        limit = whole_number(query.get("limit", [str(PAGE_DEFAULT)])[-1])
        if limit is None or not 1 <= limit <= PAGE_MAX:
            message = f"Invalid 'limit': expected an integer from 1 to {PAGE_MAX}."
            return self.error(400, message, code="invalid_value", param="limit")
        after = query.get("after", [None])[-1]
        try:
            batches, more = project.page(after, limit)
        except KeyError:
            message = f"Invalid 'after': no batch found with id '{after}'."
            return self.error(400, message, code="invalid_value", param="after")
        return Answer(200, self._page(batches, more))

    def _page(self, batches: Sequence[Batch], more: bool) -> bytes:
        ends: dict[str, Any] = {"has_more": more}
        if batches or self._nulls:
            ends["first_id"] = batches[0].id if batches else None
            ends["last_id"] = batches[-1].id if batches else None
        data = b",".join([batch.encoded() for batch in batches])
        return b'{"object":"list","data":[' + data + b"]," + as_json(ends)[1:]


def whole_number(text: str) -> int | None:
    """The integer that the text spells, if it does."""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


# --- Keboola: the stack and its job queue --------------------------------------------------------

KEBOOLA_TOKEN = "kbc-standin-token"
TRIGGER_VARIABLE = "teckochecker_trigger_id"

UNFINISHED = {"created", "waiting", "processing", "terminating"}
# A job's run, as shares of its seconds: it is created, then waits, then is processed.
WAITING_FROM, PROCESSING_FROM = 0.1, 0.2

MODES = ("run", "debug", "forceRun")
TYPES: Mapping[str, type] = {
    "config": str,
    "configRowIds": list,
    "configData": dict,
    "tag": str,
    "branchId": str,
    "variableValuesId": str,
    "variableValuesData": dict,
    "backend": dict,
}
# What a job shows as it was sent, null if it was not.
KEPT = [name for name in TYPES if name != "configRowIds"]
# Search parameters, each with the field of a job that it is compared with.
FILTERS = {
    "id": "id",
    "status": "status",
    "componentId": "component",
    "component": "component",
    "configId": "config",
    "config": "config",
}
SORTABLE = {
    "id": "id",
    "runId": "runId",
    "branchId": "branchId",
    "componentId": "component",
    "configId": "config",
    "status": "status",
    "createdTime": "createdTime",
    "startTime": "startTime",
    "endTime": "endTime",
    "durationSeconds": "durationSeconds",
}

EVER = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

JobDict = dict[str, Any]


class Refused(Exception):
    """A request that a server does not take, and why."""


def show_time(moment: datetime) -> str:
    """A time as the queue writes it, in UTC with milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_time(text: str) -> datetime:
    """A time out of a query; one without a zone is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f'"{text}" is not a valid date and time') from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def check_job(body: object) -> JobDict:
    """The body of a new job, or Refused with what the contract finds wrong with it."""
    if not isinstance(body, dict):
        raise Refused("The request body is not a JSON object")
    component = body.get("component")
    if not isinstance(component, str) or not component:
        raise Refused('"component" must be a non-empty string')
    if body.get("mode", "run") not in MODES:
        raise Refused(f'"mode" must be one of {", ".join(MODES)}')
    for name, kind in TYPES.items():
        if name in body and not isinstance(body[name], kind):
            raise Refused(f'"{name}" must be of type {kind.__name__}')
    if "variableValuesData" in body:
        check_variables(body["variableValuesData"].get("values"))
    return body


def check_variables(values: object) -> None:
    """Refused unless every variable has a name and a value, and neither is empty."""
    if not isinstance(values, list):
        raise Refused('"variableValuesData.values" must be an array')
    for place, item in enumerate(values):
        for part in ("name", "value"):
            text = item.get(part) if isinstance(item, dict) else None
            if not isinstance(text, str) or not text:
                where = f"variableValuesData.values[{place}].{part}"
                raise Refused(f'"{where}" must be a non-empty string')


class Job:
    """A job of the queue; its status follows from its age until somebody says otherwise."""

    def __init__(
        self, fixed: JobDict, run_seconds: float, ending: tuple[str, str], ahead: float = 0.0
    ) -> None:
        self.fixed = fixed
        now = datetime.now(UTC) + timedelta(seconds=ahead)
        # To the millisecond that is shown, so that a search from a createdTime finds its job.
        self.created = now.replace(microsecond=now.microsecond // 1000 * 1000)
        self.killed = False
        self._born = time.monotonic()
        self._run_seconds = run_seconds
        self._ending = ending
        self._told: tuple[float, str, str] | None = None

    @property
    def age(self) -> float:
        """Seconds since the job was created."""
        return time.monotonic() - self._born

    def end(self, status: str, message: str) -> None:
        """Take on this status now, whatever the time says."""
        self._told = (self.age, status, message)

    def show(self, endless: bool, age: float | None = None) -> JobDict:
        """The job as the contract says; `endless` keeps it from ending by itself."""
        age = self.age if age is None else age
        status, message = self._state(age, endless)
        finished = status not in UNFINISHED
        started, ended = self._span(status)
        return {
            **self.fixed,
            "status": status,
            "desiredStatus": "terminating" if self.killed else "processing",
            "result": {"message": message} if finished else None,
            "createdTime": show_time(self.created),
            "startTime": self._time(started),
            "endTime": self._time(ended if finished else None),
            "durationSeconds": int(ended - started) if finished and started is not None else None,
            "isFinished": finished,
        }

    def _state(self, age: float, endless: bool) -> tuple[str, str]:
        if self._told:
            return self._told[1:]
        if age < self._run_seconds * WAITING_FROM:
            return "created", ""
        if age < self._run_seconds * PROCESSING_FROM:
            return "waiting", ""
        if endless or age < self._run_seconds:
            return "processing", ""
        return self._ending

    def _span(self, status: str) -> tuple[float | None, float]:
        ended = self._told[0] if self._told else self._run_seconds
        started = min(self._run_seconds * PROCESSING_FROM, ended)
        waits = status in ("created", "waiting", "cancelled")
        return (None if waits else started), ended

    def _time(self, age: float | None) -> str | None:
        return None if age is None else show_time(self.created + timedelta(seconds=age))


class Keboola(StandIn):
    """A stack (`url`) and its job queue (`queue_url`), on two ports."""

    def __init__(self, record: bool = True) -> None:
        super().__init__(record)
        self.run_seconds = 0.0  # how long a new job runs
        self.end_with = "success"  # how a new job ends
        self.end_message: str | None = None
        self.runs_until_told = False
        self.search_lag = 0.0  # seconds until the search shows a job
        self.only_configurations: set[tuple[str, str]] | None = None
        self._tokens = {KEBOOLA_TOKEN}
        self._jobs: dict[str, Job] = {}
        self._hidden: Callable[[JobDict], bool] = lambda job: False
        self._exceptions = itertools.count(1)

    def responders(self) -> Sequence[Respond]:
        """The stack first, the queue second."""
        return self._stack, self._queue

    @property
    def queue_url(self) -> str:
        """Where the job queue listens, as the stack's index says."""
        return self.address(1)

    # Builders, and what was created

    def token(self, value: str) -> None:
        """Register a further Storage token."""
        with self.lock:
            self._tokens.add(value)

    @property
    def created(self) -> list[JobDict]:
        """Every job that was really created, oldest first, as it stands now."""
        with self.lock:
            return [job.show(self.runs_until_told) for job in self._jobs.values()]

    def jobs_of(self, trigger_id: str) -> list[JobDict]:
        """The jobs created for this trigger."""
        return [
            job for job in self.created if self.variables(job).get(TRIGGER_VARIABLE) == trigger_id
        ]

    @staticmethod
    def variables(job: JobDict) -> dict[str, str]:
        """The inline variables of a job."""
        values = (job.get("variableValuesData") or {}).get("values", [])
        return {item["name"]: item["value"] for item in values}

    def finish(self, job_id: str, status: str, message: str | None = None) -> None:
        """End a job now; a status that is not known counts as finished."""
        with self.lock:
            self._jobs[job_id].end(status, message or f"Job ended with {status}.")

    def hide_from_search(self, which: Callable[[JobDict], bool] | bool = True) -> None:
        """Keep all jobs, or those that the predicate picks, out of every search."""
        with self.lock:
            self._hidden = which if callable(which) else lambda job: which

    # The stack

    def error(self, status: int, message: str) -> Answer:
        """An error answer as Keboola words it, with an exceptionId of its own."""
        error = {
            "error": message,
            "code": status,
            "status": "error",
            "exceptionId": f"standin-{next(self._exceptions):06d}",
        }
        return Answer(status, as_json(error))

    def _refuses(self, request: Request) -> Answer | None:
        known = request.headers.get("x-storageapi-token") in self._tokens
        return None if known else self.error(401, "Invalid access token")

    def _stack(self, request: Request) -> Answer:
        match request.method, request.path:
            case "GET", "/v2/storage":
                return self._index()
            case "GET", "/v2/storage/tokens/verify":
                return self._refuses(request) or self._token_detail()
            case "GET", "/v2/storage/components":
                return self._refuses(request) or self._components()
        if found := re.fullmatch(r"/v2/storage/components/([^/]+)/configs/([^/]+)", request.path):
            return self._refuses(request) or self._configuration(unquote(found[1]), found[2])
        return self.error(404, f"No route found for {request.method} {request.path}")

    def _index(self) -> Answer:
        services = {"queue": self.queue_url, "import": self.url, "encryption": self.url}
        index = {
            "host": self.url.removeprefix("http://"),
            "api": "storage",
            "version": "v2",
            "services": [{"id": name, "url": url} for name, url in services.items()],
        }
        return Answer(200, as_json(index))

    def _components(self) -> Answer:
        there = self.only_configurations or [("keboola.ex-stand-in", "1")]
        configured = [
            {"id": component, "configurations": [{"id": number, "name": f"Load {number}"}]}
            for component, number in there
        ]
        return Answer(200, as_json(configured))

    def _configuration(self, component: str, configuration: str) -> Answer:
        there = self.only_configurations
        if there is not None and (component, configuration) not in there:
            return self.error(404, f"Configuration {configuration} not found")
        return Answer(200, as_json({"id": configuration, "name": f"{component}'s stand-in"}))

    def _token_detail(self) -> Answer:
        detail = {
            "id": "12345",
            "description": "stand-in",
            "isMasterToken": False,
            "expires": None,
            "isExpired": False,
            "isDisabled": False,
            "owner": {"id": 123, "name": "Stand-in"},
        }
        return Answer(200, as_json(detail))

    # The queue

    def _queue(self, request: Request) -> Answer:
        if refusal := self._refuses(request):
            return refusal
        try:
            return self._route(request)
        except Refused as error:
            return self.error(400, str(error))

    def _route(self, request: Request) -> Answer:
        match request.method, request.path.split("/")[1:]:
            case "POST", ["jobs"]:
                return self._create(request)
            case "GET", ["search", "jobs"]:
                return self._search(request.query)
            case "GET", ["jobs", job_id] if job_id in self._jobs:
                return Answer(200, as_json(self._jobs[job_id].show(self.runs_until_told)))
            case "POST", ["jobs", job_id, "kill"] if job_id in self._jobs:
                return self._kill(self._jobs[job_id])
            case _, ["jobs", job_id, *_]:
                return self.error(404, f'Job "{job_id}" not found')
        return self.error(404, f"No route found for {request.method} {request.path}")

    def _create(self, request: Request) -> Answer:
        try:
            body = check_job(json.loads(request.body))
        except ValueError:
            raise Refused("The request body is not valid JSON") from None
        if self.only_configurations is not None:
            wanted = body["component"], body.get("config", "")
            if wanted not in self.only_configurations:
                return self.error(404, 'Configuration "{1}" of "{0}" not found'.format(*wanted))
        ending = self.end_with, self.end_message or f"Job ended with {self.end_with}."
        fixed = self._fixed(body, request.headers.get("x-kbc-runid"))
        job = Job(fixed, self.run_seconds, ending, self.clock_ahead)
        self._jobs[fixed["id"]] = job
        fresh = job.show(endless=True, age=0.0)
        # Even a job of no length is new in the answer that tells of it.
        return Answer(201, as_json({**fresh, "status": "created", "startTime": None}))

    def _fixed(self, body: JobDict, parent: str | None) -> JobDict:
        job_id = str(1_000_001 + len(self._jobs))
        return {
            "id": job_id,
            "runId": f"{parent}.{job_id}" if parent else job_id,
            "project": {"id": "123"},
            "token": {"id": "12345", "description": "stand-in"},
            "component": body["component"],
            "mode": "debug" if body.get("mode") == "debug" else "run",
            "configRow": None,
            **{name: body.get(name) for name in KEPT},
            "type": "standard",
            "url": f"{self.queue_url}/jobs/{job_id}",
        }

    def _kill(self, job: Job) -> Answer:
        before = job.show(self.runs_until_told)
        if before["isFinished"]:
            raise Refused(f'Job "{before["id"]}" is not in one of killable states')
        job.killed = True
        status = "cancelled" if before["startTime"] is None else "terminated"
        job.end(status, f"Job has been {status}.")
        return Answer(202, as_json({**before, "desiredStatus": "terminating"}))

    def _search(self, query: Mapping[str, list[str]]) -> Answer:
        values = merged(query)
        offset, limit = page_bounds(values)
        since, until = time_bounds(values)
        found = [
            shown
            for job in self._jobs.values()
            if job.age >= self.search_lag and since <= job.created <= until
            if selected(shown := job.show(self.runs_until_told), values)
            if not self._hidden(shown)
        ]
        return Answer(200, as_json(in_order(found, values)[offset : offset + limit]))


def merged(query: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The values of each parameter, "name" and "name[]" taken together."""
    values: dict[str, list[str]] = {}
    for name, given in query.items():
        values.setdefault(name.removesuffix("[]"), []).extend(given)
    return values


def page_bounds(values: Mapping[str, list[str]]) -> tuple[int, int]:
    """Offset and limit of a search, or Refused."""
    offset = whole_number(values.get("offset", ["0"])[-1])
    limit = whole_number(values.get("limit", ["100"])[-1])
    if offset is None or offset < 0 or limit is None or limit < 1:
        raise Refused('"offset" and "limit" must be whole numbers, "limit" at least 1')
    return offset, limit


def time_bounds(values: Mapping[str, list[str]]) -> tuple[datetime, datetime]:
    """The first and the last moment of creation that a search asks for."""
    since = [read_time(text) for text in values.get("createdTimeFrom", [])]
    until = [read_time(text) for text in values.get("createdTimeTo", [])]
    return max(since, default=EVER[0]), min(until, default=EVER[1])


def selected(job: JobDict, values: Mapping[str, list[str]]) -> bool:
    """Whether a job has one of the values asked for, in each field that was asked for."""
    return all(job[part] in values[name] for name, part in FILTERS.items() if name in values)


def in_order(jobs: list[JobDict], values: Mapping[str, list[str]]) -> list[JobDict]:
    """The jobs as sortBy and sortOrder ask, those without the field first when ascending."""
    sort_by = values.get("sortBy", ["id"])[-1]
    order = values.get("sortOrder", ["desc"])[-1]
    if sort_by not in SORTABLE or order not in ("asc", "desc"):
        raise Refused(f'Cannot sort by "{sort_by}" "{order}"')
    part = SORTABLE[sort_by]
    by_part = sorted(jobs, key=lambda job: (job[part] is not None, job[part] or 0))
    return by_part if order == "asc" else by_part[::-1]


# --- Source: what ingest jobs fetch --------------------------------------------------------------

COLLECTION = "/items"
Style = Literal["plain", "wrapped", "link", "cursor", "page", "offset"]
Endless = Literal["last", "first", "empty", "itself"]
# Where a style has its list in the answer; the others answer with nothing but the list.
ITEMS_AT: Mapping[Style, str] = {"wrapped": "items", "cursor": "data"}
SIZE_ASKED: Mapping[Style, str] = {"page": "per_page", "link": "per_page"}  # else "limit"
# Last-Modified of whatever is first asked for; each change that is seen is a minute later.
FIRST_EDITION = datetime(2024, 1, 1, tzinfo=UTC)

Record = dict[str, Any]


class Window(NamedTuple):
    """A page of the collection, counted from 1, and the places of its records, from 0."""

    number: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        """Where the next page starts."""
        return self.start + self.size


class File(NamedTuple):
    """What a path other than the collection's answers."""

    content: bytes
    content_type: str


def number_asked(query: Mapping[str, list[str]], name: str, usual: int, least: int) -> int:
    """A parameter that is a whole number and at least this, or Refused."""
    number = whole_number(query.get(name, [str(usual)])[-1])
    if number is None or number < least:
        raise Refused(f'"{name}" must be a whole number, at least {least}')
    return number


def moment_of(value: object) -> float | None:
    """A number, or an ISO time in seconds (without a zone: UTC), as text or not."""
    try:
        return float(str(value))
    except ValueError:
        pass
    try:
        return read_time(str(value)).timestamp()
    except Refused:
        return None


def http_date(text: str) -> datetime | None:
    """The moment that a header names, or None, as what is no date has to be ignored."""
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def write_cursor(place: int) -> str:
    """An opaque cursor; the "+" and "=" in it come back as another one if they are not encoded."""
    return base64.b64encode(b">>>%08d" % place).decode()


def read_cursor(text: str) -> int:
    """The place that a cursor stands for, or Refused."""
    try:
        place = int(base64.b64decode(text)[3:])
    except ValueError:
        place = -1
    if place < 0 or write_cursor(place) != text:
        raise Refused(f'"{text}" is no cursor of this collection')
    return place


class Source(StandIn):
    """An API with one collection of records, in the style of paging that is set, and files.

    Attributes may be set at any time; a request sees them as they are when it is answered. The
    places in the collection are counted anew on each request: records that come or go while a
    client pages shift the others, as they do behind most APIs.
    """

    def __init__(self, record: bool = True) -> None:
        super().__init__(record)
        self.records: list[Record] = []
        self.style: Style = "plain"
        self.items_path: str | None = None  # dotted; None: the style's own
        self.page_size = 10  # records a page if the request does not say
        self.page_cap = 100  # records a page at most, whatever the request says
        self.since_field: str | None = None  # what `since` is compared with; None: it is ignored
        self.since_parameter = "since"
        self.etags = False  # whether to send ETag and heed If-None-Match
        self.dates = False  # whether to send Last-Modified and heed If-Modified-Since
        self.token: str | None = None  # what every request has to carry
        self.token_header = "Authorization: Bearer {secret}"
        self.link_base: str | None = None  # of links; None: this server; "": relative ones
        self.final_cursor: str | EllipsisType | None = None  # the last page's; ...: left out
        self.endless: Endless | None = None  # how the pages never end, see `_shown`
        self.files: dict[str, File] = {}
        self._repeats: Counter[int] = Counter()
        self._lacking: dict[int, list[int]] = {}
        self._after: dict[int, list[Callable[[], object]]] = {}
        self._editions: dict[str, tuple[str, datetime]] = {}

    def responders(self) -> Sequence[Respond]:
        """One port: the collection and the files."""
        return (self._respond,)

    @property
    def items_url(self) -> str:
        """Where the collection is."""
        return self.url + COLLECTION

    # Builders, and what was asked

    def file(self, path: str, content: bytes, content_type: str = "text/csv") -> str:
        """Serve these bytes at a path, instead of those before; returns the URL."""
        with self.lock:
            self.files[path] = File(content, content_type)
        return self.url + path

    def repeat_page(self, number: int, times: int = 1) -> None:
        """The page after this one shows this one's records once more, and not its own."""
        with self.lock:
            self._repeats[number + 1] += times

    def shrink_page(self, number: int, by: int = 1, times: int = 1) -> None:
        """A page lacks its last records, as if filtered out late, though more pages follow."""
        with self.lock:
            self._lacking.setdefault(number, []).extend([by] * times)

    def after_page(self, number: int, action: Callable[[], object]) -> None:
        """Do this once when the page is made out: change records, or add a fault or a gate."""
        with self.lock:
            self._after.setdefault(number, []).append(action)

    def asked(self, path: str = COLLECTION) -> list[dict[str, str]]:
        """The parameters of every request for a path, in order of arrival."""
        with self.lock:
            return [
                {name: values[-1] for name, values in request.query.items()}
                for request in self.requests
                if request.path == path
            ]

    # Answers

    def _respond(self, request: Request) -> Answer:
        if refusal := self._refuses(request):
            return refusal
        if request.method != "GET":
            return self.error(405, f"{request.method} is not allowed")
        try:
            answer = self._answer(request)
        except Refused as error:
            return self.error(400, str(error))
        return self._unless_known(request, answer) if answer.status == 200 else answer

    def _refuses(self, request: Request) -> Answer | None:
        if self.token is None:
            return None
        name, _, value = self.token_header.partition(":")
        wanted = value.strip().replace("{secret}", self.token)
        known = request.headers.get(name.strip().lower()) == wanted
        return None if known else self.error(401, "Invalid or missing token")

    def _answer(self, request: Request) -> Answer:
        if request.path == COLLECTION:
            return self._items(request)
        if found := self.files.get(request.path):
            return Answer(200, found.content, {"Content-Type": found.content_type})
        return self.error(404, f"Nothing at {request.path}")

    def _unless_known(self, request: Request, answer: Answer) -> Answer:
        """304 if the client has this body, by its tags if it sends any, else by the date."""
        etag = f'"{hashlib.sha256(answer.body).hexdigest()[:32]}"'
        date = self._edition(request, etag)
        headers = dict(answer.headers)
        if self.etags:
            headers["ETag"] = etag
        if self.dates:
            headers["Last-Modified"] = format_datetime(date, usegmt=True)
        if self._knows(request, etag, date):
            del headers["Content-Type"]
            return Answer(304, b"", headers)
        return answer._replace(headers=headers)

    def _knows(self, request: Request, etag: str, date: datetime) -> bool:
        tags = request.headers.get("if-none-match")
        if self.etags and tags is not None:
            return tags == "*" or etag in tags
        since = http_date(request.headers.get("if-modified-since", ""))
        return self.dates and since is not None and date <= since

    def _edition(self, request: Request, etag: str) -> datetime:
        target = f"{request.path}?{urlencode(request.query, doseq=True)}"
        before, date = self._editions.get(target, (etag, FIRST_EDITION))
        if before != etag:
            date += timedelta(minutes=1)
        self._editions[target] = etag, date
        return date

    # The collection

    def _items(self, request: Request) -> Answer:
        chosen = self._chosen(request.query)
        window = self._window(request.query, len(chosen))
        following = self._following(window, len(chosen))
        headers = dict(JSON_TYPE)
        if self.style == "link" and (links := self._links(request, window, following, len(chosen))):
            headers["Link"] = links
        answer = Answer(200, as_json(self._body(self._shown(window, chosen), following)), headers)
        for action in self._after.pop(window.number, []):
            action()
        return answer

    def _body(self, shown: list[Record], following: int | None) -> object:
        body: Any = shown
        path = self.items_path or ITEMS_AT.get(self.style)
        for name in reversed(path.split(".") if path else []):
            body = {name: body}
        if self.style == "cursor":
            cursor = self.final_cursor if following is None else write_cursor(following)
            body |= {} if cursor is ... else {"next_cursor": cursor}
        return body

    def _chosen(self, query: Mapping[str, list[str]]) -> list[Record]:
        """The records from `since` on, that moment included; one without the field is left out."""
        if self.since_field is None or self.since_parameter not in query:
            return list(self.records)
        text = query[self.since_parameter][-1]
        if (since := moment_of(text)) is None:
            raise Refused(f'"{self.since_parameter}" is neither a time nor a number: "{text}"')
        moments = [moment_of(record.get(self.since_field)) for record in self.records]
        return [
            record
            for record, moment in zip(self.records, moments, strict=True)
            if moment is not None and moment >= since
        ]

    def _window(self, query: Mapping[str, list[str]], total: int) -> Window:
        if self.style in ("plain", "wrapped"):
            return Window(1, 0, max(1, total))
        asked = number_asked(query, SIZE_ASKED.get(self.style, "limit"), self.page_size, 1)
        size = min(asked, self.page_cap)
        if self.style == "cursor":
            start = read_cursor(query["cursor"][-1]) if "cursor" in query else 0
        elif self.style == "offset":
            start = number_asked(query, "offset", 0, 0)
        else:
            start = (number_asked(query, "page", 1, 1) - 1) * size
        return Window(start // size + 1, start, size)

    def _following(self, window: Window, total: int) -> int | None:
        """Where the page starts that this one calls the next."""
        if window.stop < total:
            return window.stop
        if self.endless is None or self.style in ("plain", "wrapped"):
            return None
        return window.start if self.endless == "itself" else window.stop

    def _shown(self, window: Window, chosen: list[Record]) -> list[Record]:
        """The records of a page. If the pages are endless, each has a next one, and those past the
        last show its records again ("last"), the first one's ("first") or none ("empty"); or the
        last one's next is itself ("itself")."""
        start, size = window.start, window.size
        if self._repeats[window.number] > 0:
            self._repeats[window.number] -= 1
            start -= size
        if start >= len(chosen) > 0 and self.endless not in (None, "empty"):
            start = 0 if self.endless == "first" else (len(chosen) - 1) // size * size
        shown = chosen[start : start + size]
        lacking = self._lacking.get(window.number)
        return shown[: -lacking.pop()] if lacking else shown

    def _links(self, request: Request, window: Window, following: int | None, total: int) -> str:
        """The Link header of a page (RFC 8288), with every relation that it has."""
        if following is None and window.start == 0:
            return ""
        last = (max(1, total) - 1) // window.size * window.size
        starts = {"prev": window.start - window.size, "next": following, "last": last, "first": 0}
        return ", ".join(
            f'<{self._link(request, start // window.size + 1)}>; rel="{rel}"'
            for rel, start in starts.items()
            if start is not None and start >= 0
        )

    def _link(self, request: Request, page: int) -> str:
        query = urlencode({**request.query, "page": page}, doseq=True)
        return f"{self.url if self.link_base is None else self.link_base}{COLLECTION}?{query}"
