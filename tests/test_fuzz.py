"""The whole admin surface, fuzzed: requests out of its own description, and bytes that are none.

    FUZZ_EXAMPLES=500 python -m pytest tests/test_fuzz.py

makes 500 random examples of each kind, instead of a few that are always the same ones.

Of schemathesis' checks these are left out:
- status_code_conformance: any status passes where the description has a `default`; `in_shape` has
  it instead, with the refusals in REFUSALS;
- positive_data_acceptance: it does not know that a rule that no schema says (what a stack's address
  is, that a secret is of the right type) is 422 here; `in_shape` has that too;
- unsupported_method, allow_header_conformance: they judge methods that no case here has;
  test_admin.py does;
- missing_required_header, ignored_auth, object_level_authorization: no header or token is required
  here, and there is one user; test_admin.py has the token;
- use_after_free, ensure_resource_availability: they judge calls that follow from one another, which
  test_jobs_through_their_lives makes;
- max_response_time: nothing here is timed.
"""

from __future__ import annotations

import contextlib
import email
import itertools
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
import schemathesis
import standins
from conftest import MASTER_KEY, flat_job, secrets_forgotten
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
)
from test_admin import Surface, ask, request, surface

import teckochecker as tecko

LONG = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def few(examples: int) -> settings:
    """So many examples, or FUZZ_EXAMPLES of them."""
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * bool(LONG),
        suppress_health_check=list(HealthCheck),
    )


CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
]
REFUSALS = {"positive": {404, 409, 422}, "negative": {400, 404, 405, 409, 415, 422}}
"""What may be answered beside the statuses that an operation lists."""


@dataclass
class Fuzzed:
    """A running service, its description as it serves it, and a client."""

    made: Surface
    keboola: str
    schema: schemathesis.BaseSchema
    session: requests.Session = field(default_factory=requests.Session)
    names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"http://{self.made.host}"

    def call(self, method: str, path: str, **given: Any) -> Any:
        answer = self.session.request(method, self.url + path, timeout=20, **given)
        assert answer.ok, answer.text
        return answer.json()

    def secret(self, kind: str) -> int:
        body = {"name": f"{kind}-{next(self.names)}", "type": kind, "value": standins.OPENAI_KEY}
        return int(self.call("POST", "/api/admin/secrets", json=body)["id"])

    def job(self, **flat: Any) -> int:
        given = flat_job(name=f"job-{next(self.names)}", batch_ids=["batch_1"])
        del given["openai_secret"], given["keboola_secret"]
        given |= {"openai_secret_id": 1, "keboola_secret_id": 2, "poll_interval_seconds": 3600}
        given |= {"keboola_stack_url": self.keboola}
        return int(self.call("POST", "/api/jobs", json=given | flat)["id"])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """A service with secrets and jobs, whose batches never end, so that nothing ever fires at an
    address that was made up; after all tests it has to be as healthy as before."""
    folder = tmp_path_factory.mktemp("fuzz")
    with secrets_forgotten(), standins.OpenAI() as openai, standins.Keboola() as keboola:
        openai.batch("batch_1")
        env = {"OPENAI_BASE_URL": openai.base_url, "SECRET_KEY": MASTER_KEY}
        with surface(folder, **env) as made:
            schema = schemathesis.openapi.from_url(f"http://{made.host}/openapi.json")
            fuzzed = Fuzzed(made, keboola.url, schema)
            assert [fuzzed.secret(kind) for kind in ("openai", "keboola")] == [1, 2]
            for _ in range(3):
                fuzzed.job()
            with fuzzed.session:
                yield fuzzed


@pytest.fixture
def there(fuzzed: Fuzzed) -> list[int]:
    """Ids that stand for something: a job in each state that HTTP can bring about, and secrets."""
    jobs = [fuzzed.job() for _ in range(3)]
    fuzzed.call("POST", f"/api/jobs/{jobs[0]}/pause")
    return [*jobs, 1, 2, fuzzed.secret("openai")]


def in_shape(answer: schemathesis.Response, case: schemathesis.Case[Any], mode: str) -> None:
    """What a schema cannot say of an answer."""
    listed = {int(s) for s in case.operation.definition.raw["responses"] if s.isdigit()}
    assert answer.status_code in listed | REFUSALS[mode], answer.text
    heads = {name.lower(): values for name, values in answer.headers.items()}
    [request_id] = heads["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", request_id) and heads["cache-control"] == ["no-store"]
    assert "Traceback" not in answer.text and "teckochecker.db" not in answer.text
    if answer.status_code >= 400:
        said = answer.json()
        assert said["request_id"] == request_id and [str(said["code"])] == heads["x-error-code"]
        assert bool(said.get("details")) == (answer.status_code == 422), said


OPERATIONS = [(p, m) for p, methods in tecko.openapi()["paths"].items() for m in methods]
TAKING = [  # with something in them that can be wrong
    (path, method)
    for path, method in OPERATIONS
    if {"parameters", "requestBody"}
    & {k for k, v in tecko.openapi()["paths"][path][method].items() if v}
]


def fuzz(fuzzed: Fuzzed, there: list[int], at: tuple[str, str], mode: str, examples: int) -> None:
    operation = fuzzed.schema[at[0]][at[1]]
    generation = schemathesis.GenerationMode(mode)

    @few(examples)
    @given(case=operation.as_strategy(generation), ref=st.sampled_from(there), real=st.booleans())
    def run(case: schemathesis.Case[Any], ref: int, real: bool) -> None:
        if mode == "positive" and real:
            make_real(fuzzed, case, ref)
        answer = case.call(base_url=fuzzed.url, session=fuzzed.session, timeout=20)
        case.validate_response(answer, checks=CHECKS)
        in_shape(answer, case, mode)

    run()


def make_real(fuzzed: Fuzzed, case: schemathesis.Case[Any], ref: int) -> None:
    """Let ids and addresses mean something, which random ones never do."""
    if "id" in case.path_parameters:
        case.path_parameters["id"] = ref
    body: dict[str, Any] = case.body if isinstance(case.body, dict) else {}
    if "keboola_stack_url" in body:
        body["keboola_stack_url"] = fuzzed.keboola
    for name, number in (("openai_secret_id", 1), ("keboola_secret_id", 2)):
        if name in body:
            body[name] = number
    for block, number in (("watch", 1), ("trigger", 2)):
        if block in body:
            body[block]["secret"] = number
    if "trigger" in body:
        body["trigger"]["stack_url"] = fuzzed.keboola


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_what_fits_the_description(
    fuzzed: Fuzzed, there: list[int], path: str, method: str
) -> None:
    """What the description allows is done, or refused by a rule of ours; the answer fits it."""
    fuzz(fuzzed, there, (path, method), "positive", 6)


@pytest.mark.parametrize(("path", "method"), TAKING)
def test_what_does_not_fit(fuzzed: Fuzzed, there: list[int], path: str, method: str) -> None:
    """What it does not allow is refused, in shape."""
    fuzz(fuzzed, there, (path, method), "negative", 8)


def test_a_secret_of_the_wrong_type(fuzzed: Fuzzed, there: list[int]) -> None:
    """A rule that no schema says is refused with the field it is about, too."""
    path = f"{fuzzed.url}/api/jobs/{there[0]}"
    answer = fuzzed.session.put(path, json={"keboola_secret_id": 1}, timeout=20)
    assert answer.status_code == 422, answer.text
    assert [said["field"] for said in answer.json()["details"]] == ["keboola_secret"]


# ── Chains of calls ───────────────────────────────────────────────────────────────────────────

STEPS = {  # what each step of a job may answer, in each state that it can be in here
    "active": {"pause": 200, "resume": 409, "retry": 409, "check": 202},
    "paused": {"pause": 409, "resume": 200, "retry": 409, "check": 409},
    "deleted": dict.fromkeys(("pause", "resume", "retry", "check"), 404),
}
AFTER = {"pause": "paused", "resume": "active"}


@few(8)
@given(steps=st.lists(st.sampled_from(["pause", "resume", "retry", "check", "delete"]), max_size=8))
@example(steps=["check", "pause", "check", "resume", "check", "delete", "check"])
def test_jobs_through_their_lives(fuzzed: Fuzzed, steps: list[str]) -> None:
    """Whatever is done to a job in which order, each answer is that of its state, and a deleted
    job is there no more."""
    job, state = fuzzed.job(), "active"
    for step in steps:
        if step == "delete":
            answer = fuzzed.session.delete(f"{fuzzed.url}/api/jobs/{job}", timeout=20)
            assert answer.status_code == (404 if state == "deleted" else 200), answer.text
            state = "deleted"
            continue
        answer = fuzzed.session.post(f"{fuzzed.url}/api/jobs/{job}/{step}", timeout=20)
        assert answer.status_code == STEPS[state][step], (steps, step, answer.text)
        state = AFTER.get(step, state) if answer.ok else state
    shown = fuzzed.session.get(f"{fuzzed.url}/api/jobs/{job}", timeout=20)
    assert shown.status_code == (404 if state == "deleted" else 200)
    assert state == "deleted" or shown.json()["status"] == state


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────


def sent(fuzzed: Fuzzed, data: bytes) -> list[int]:
    """Send this, and no more, and read to the end: the status of every answer, each of them in
    shape and none of them a 5xx; and the service is well."""
    came, whole = b"", False
    with fuzzed.made.dial() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(65536):
            came += more
        whole = True  # else the rest of ours reset the connection, and what came may end anywhere
    statuses = []
    came = came.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    while came and (whole or b"\r\n\r\n" in came):
        head, end, came = came.partition(b"\r\n\r\n")
        line, _, fields = head.decode("ascii").partition("\r\n")
        # 501 and 505: a method or version that is none (RFC 9110, 15.6); any other 5xx is a defect
        assert end and re.fullmatch(r"HTTP/1\.1 ([24]\d\d|501|505) [A-Za-z -]+", line), head
        headers = email.message_from_string(fields)
        assert headers["X-Request-ID"] and not headers.defects and not headers.get_payload()
        length = int(headers["Content-Length"])
        body, came = came[:length], came[length:]
        if headers["Content-Type"] == "application/json" and len(body) == length:
            assert isinstance(json.loads(body), dict)
        statuses.append(int(line[9:12]))
    assert ask(fuzzed.made, "/health").body["status"] == "healthy"
    return statuses


@few(40)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(fuzzed: Fuzzed, data: bytes) -> None:
    """What is no request is refused in shape, or nothing is said, and never is it served."""
    assert not [status for status in sent(fuzzed, data + b"\r\n\r\n") if status < 400]


WORDS = st.sampled_from(
    "GET GET GET HEAD POST PUT DELETE OPTIONS TRACE get / /health /api/jobs/1 /api/jobs?limit=1"
    " * //x/health http://127.0.0.1/health /../health /%2e/health /health%00 /api/jobs/%31"
    " HTTP/1.1 HTTP/1.0 HTTP/0.9 HTTP/2 HTTP/1.1.1 HTTP/01.1 é \t \x00".split(" ")
)


@few(60)
@given(words=st.lists(WORDS | st.text(max_size=8), min_size=1, max_size=4))
@example(words=["GET", "/health"])  # as HTTP/0.9 had it
def test_any_request_line(fuzzed: Fuzzed, words: list[str]) -> None:
    """Of whatever it is made, there is one answer in shape, or none."""
    line = " ".join(words).replace("\n", "").replace("\r", "").encode("utf-8", "replace")
    head = f"Host: {fuzzed.made.host}\r\nConnection: close\r\n\r\n".encode()
    assert len(sent(fuzzed, line + b"\r\n" + head)) <= 1


NAMES = st.text(max_size=12) | st.sampled_from(
    "Host Origin Authorization Content-Length Transfer-Encoding Content-Type Connection Expect"
    " Accept Upgrade Cookie Range Via TE X-Request-ID X-HTTP-Method-Override".split()
)
VALUES = st.text(max_size=40) | st.sampled_from(
    "0 1 -1 1e3 chunked close keep-alive 100-continue application/json null Bearer 127.0.0.1 h2c"
    " gzip bytes=0-1 999999999999999999999".split()
)


@few(60)
@given(
    lines=st.lists(st.tuples(NAMES, VALUES), max_size=6), method=st.sampled_from(["GET", "POST"])
)
@example(lines=[("Expect", "100-continue")], method="GET")
@example(lines=[("Connection", "close"), ("Connection", "keep-alive")], method="GET")
def test_any_headers(fuzzed: Fuzzed, lines: list[tuple[str, str]], method: str) -> None:
    """Headers of whatever names and values change whether a request is served, and nothing else."""
    begun = f"{method} /api/jobs HTTP/1.1\r\nHost: {fuzzed.made.host}\r\n"
    head = begun + "".join(f"{name}: {value}\r\n" for name, value in lines) + "\r\n"
    assert set(sent(fuzzed, head.encode("utf-8", "replace"))) <= EITHER


EITHER = {200, *REFUSALS["negative"], 403, 411, 413, 417, 421, 431}
WHOLE = b'{"name": "cut", "type": "api", "value": "a-value-that-is-cut"}'


@few(40)
@given(cut=st.integers(1, 400), extra=st.integers(0, 3))
def test_cut_requests(fuzzed: Fuzzed, cut: int, extra: int) -> None:
    """A request of which any part is missing does nothing: no secret is stored."""
    lines = ["Content-Type: application/json", f"Content-Length: {len(WHOLE) + extra}"]
    head = request(fuzzed.made, "/api/admin/secrets", *lines).replace(b"GET", b"POST", 1)
    statuses = sent(fuzzed, (head + WHOLE + b" " * extra)[: -min(cut, len(head) + len(WHOLE))])
    assert not [status for status in statuses if status < 400]
    assert "cut" not in {s["name"] for s in fuzzed.call("GET", "/api/admin/secrets")["secrets"]}


KEYS = st.sampled_from("name watch trigger batch_ids variables keboola_stack_url x".split())
VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def posted(fuzzed: Fuzzed, body: bytes) -> list[int]:
    """The statuses of the answers to a new job with this body."""
    lines = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    head = request(fuzzed.made, "/api/jobs", *lines).replace(b"GET", b"POST", 1)
    return sent(fuzzed, head + body)


@few(25)
@given(body=st.binary(max_size=60) | VALUE.map(lambda value: json.dumps(value).encode()))
@example(body=b'{"name": NaN}')
@example(body=b'"\\ud800"')
@example(body=b'{"\\ud800": {"name": "\\ud800"}}')
def test_any_body(fuzzed: Fuzzed, body: bytes) -> None:
    """A body that is no job is refused, whatever it is: half a surrogate and NaN, too."""
    assert posted(fuzzed, body) == [422]


# ── Afterwards ────────────────────────────────────────────────────────────────────────────────


def checked(fuzzed: Fuzzed) -> Any:
    """A new job after its first check."""
    job = fuzzed.job(poll_interval_seconds=30)
    fuzzed.call("POST", f"/api/jobs/{job}/check")
    until = time.monotonic() + 20
    while (shown := fuzzed.call("GET", f"/api/jobs/{job}"))["last_check_at"] is None:
        assert time.monotonic() < until, shown
    return shown


@pytest.mark.parametrize("value", ["p", "      r\n"])
def test_a_short_secret_changes_no_data(fuzzed: Fuzzed, value: str) -> None:
    """A secret that is a letter is refused, or hides that letter from logs: never from a status."""
    body = {"name": f"letter-{next(fuzzed.names)}", "type": "api", "value": value}
    stored = fuzzed.session.post(f"{fuzzed.url}/api/admin/secrets", json=body, timeout=20)
    assert stored.status_code in (201, 422)
    assert checked(fuzzed)["batches"][0]["status"] == "in_progress"


def test_all_is_well_afterwards(fuzzed: Fuzzed) -> None:
    """After all of that the store is whole, and a job can be created, checked and deleted."""
    assert fuzzed.call("GET", "/health")["status"] == "healthy"
    stats = fuzzed.call("GET", "/stats")
    shown = checked(fuzzed)
    assert shown["batches"][0]["status"] == "in_progress" and shown["last_error"] is None
    fuzzed.call("DELETE", f"/api/jobs/{shown['id']}")
    assert fuzzed.call("GET", "/stats")["total_jobs"] == stats["total_jobs"]
    with contextlib.closing(sqlite3.connect(fuzzed.made.service.settings.database)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
