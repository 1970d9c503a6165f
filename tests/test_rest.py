"""The REST surface over real sockets: every route, every refusal, and what they change."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html
import itertools
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import MASTER_KEY, run_program
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate
from test_admin import Answer, Surface, is_error, surface

import teckochecker as tecko

KEYS = {"openai": standins.OPENAI_KEY, "keboola": standins.KEBOOLA_TOKEN}
NUMBERS = itertools.count(1)
TOKEN = "a-token-for-tests-0123456789"

FLAT = """
    name batch_id batch_ids openai_secret_id keboola_secret_id keboola_stack_url
    keboola_component_id keboola_configuration_id poll_interval_seconds
""".split()
JOB = {*FLAT, "id", "status", "last_error", "batches", "batch_count", "completed_count"}
JOB |= {"failed_count", "last_check_at", "next_check_at", "created_at", "completed_at"}
SECRET = {"id", "name", "type", "created_at"}


def schema_of(doc: Mapping[str, Any], method: str, path: str, answer: Answer) -> Any:
    """What the document says this answer looks like; None for a text or an unknown path."""
    method = "get" if method == "HEAD" else method.lower()
    wanted = path.partition("?")[0]
    for template, operations in doc["paths"].items():
        if re.fullmatch(template.replace("{id}", "[^/]+").replace(".", r"\."), wanted):
            responses = operations.get(method, {}).get("responses", {})
            described = responses.get(str(answer.status)) or responses.get("default")
            if described is None:
                return None
            kind = str(answer.headers["Content-Type"]).partition(";")[0]
            assert kind in described["content"], f"{method} {path}: {answer.status} as {kind}"
            return {**described["content"][kind]["schema"], "components": doc["components"]}
    return None


def call(
    made: Surface, method: str, path: str, body: Any = None, raw: bytes | None = None, **more: str
) -> Answer:
    """One request on a connection of its own. Every answer has to be as the document says, in
    nobody's cache, with an id, and without the value of a secret."""
    headers = {name.rstrip("_").replace("_", "-"): value for name, value in more.items()}
    if body is not None or raw is not None:
        headers.setdefault("Content-Type", "application/json")
        raw = json.dumps(body).encode() if raw is None else raw
    with contextlib.closing(made.client()) as client:
        client.request(method, path, raw, headers)
        got = client.getresponse()
        answer = Answer(got.status, got.headers, got.read())
    look_at(method, path, answer)
    return answer


def look_at(method: str, path: str, answer: Answer) -> None:
    assert answer.headers["X-Request-ID"] and answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == f"TeckoChecker/{tecko.VERSION}"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY" and answer.headers["Referrer-Policy"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not any(value.encode() in answer.raw for value in KEYS.values())
    schema = schema_of(tecko.openapi(), method, path, answer)
    if schema is not None and "json" in answer.headers["Content-Type"] and method != "HEAD":
        Draft202012Validator(schema).validate(answer.body)


def until(met: Callable[[], Any], what: str = "") -> Any:
    limit = time.monotonic() + 10
    while not (found := met()):
        assert time.monotonic() < limit, what or "never came true"
        time.sleep(0.02)
    return found


@dataclass
class Rest:
    """A surface whose service knows the stand-ins and has the secrets `openai` and `keboola`."""

    made: Surface
    openai: standins.OpenAI
    keboola: standins.Keboola
    folder: Path
    early: dict[str, list[Any]] = field(default_factory=dict)  # jobs by batch, begun beforehand

    def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        return call(self.made, method, path, body, **more)

    @property
    def secret_ids(self) -> dict[str, int]:
        listed = self("GET", "/api/admin/secrets").body["secrets"]
        return {row["name"]: row["id"] for row in listed}

    def flat(self, **changes: Any) -> dict[str, Any]:
        ids = self.secret_ids
        flat = {
            "name": f"job no. {next(NUMBERS)}",
            "batch_id": "batch_1",
            "openai_secret_id": ids["openai"],
            "keboola_secret_id": ids["keboola"],
            "keboola_stack_url": self.keboola.url,
            "keboola_component_id": "comp",
            "keboola_configuration_id": "cfg",
            "poll_interval_seconds": 3600,
        } | changes
        return {name: value for name, value in flat.items() if value is not ...}

    def nested(self, **changes: Any) -> dict[str, Any]:
        watch = {"type": "openai_batches", "secret": "openai", "batch_ids": ["batch_1"]}
        trigger = {"secret": "keboola", "stack_url": self.keboola.url, "component_id": "comp"}
        trigger["configuration_id"] = "cfg"
        name = f"job no. {next(NUMBERS)}"
        return {"name": name, "poll_interval": "1h", "watch": watch, "trigger": trigger} | changes

    def create(self, **changes: Any) -> Any:
        answer = self("POST", "/api/jobs", self.flat(**changes))
        assert answer.status == 201, answer.body
        return answer.body

    def job(self, job_id: int) -> Any:
        return self("GET", f"/api/jobs/{job_id}").body

    def ended(self, **changes: Any) -> Any:
        """A job that has failed, since its batch did."""
        early = [] if changes else self.early.get("batch_bad", [])
        job = early.pop() if early else self.create(batch_id="batch_bad", **changes)
        until(lambda: self.job(job["id"])["status"] == "failed", "the job did not fail")
        return job

    def checks(self, batch_id: str) -> int:
        return self.openai.count(f"GET /v1/batches/{batch_id}")

    def rows(self) -> list[tecko.LogRow]:
        rows: list[tecko.LogRow] = self.made.on_loop(self.made.service.store.logs(None, 10**6))
        return rows


@contextlib.contextmanager
def open_rest(folder: Path, **env: str) -> Iterator[Rest]:
    with standins.OpenAI() as openai, standins.Keboola() as keboola:
        environ = {"MIN_POLL_INTERVAL": "1", "SECRET_KEY": MASTER_KEY} | env
        openai.batch("batch_1")
        openai.batch("batch_bad", "failed")
        openai.batch("batch_done", "completed")
        openai.fault("GET /v1/batches", standins.Fault.status(404), times=None)  # count each
        with surface(folder, OPENAI_BASE_URL=openai.base_url, **environ) as made:
            for name, value in KEYS.items() if "ADMIN_TOKEN" not in env else ():
                body = {"name": name, "type": name, "value": value}
                assert call(made, "POST", "/api/admin/secrets", body).status == 201
            yield Rest(made, openai, keboola, folder)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    with open_rest(tmp_path_factory.mktemp("rest")) as made:
        for batch_id in ("batch_bad", "batch_bad", "batch_done"):  # they have ended when asked for
            made.early.setdefault(batch_id, []).append(made.create(batch_id=batch_id))
        yield made


def refused(answer: Answer, status: int, code: int, name: str) -> str:
    """An error in the published shape; its text."""
    assert (answer.status, answer.body["code"], answer.body["error"]) == (status, code, name)
    assert is_error(answer)
    return str(answer.body["detail"])


def wrong_fields(answer: Answer) -> dict[str, str]:
    """The fields that a 422 names, with what it says of them."""
    assert refused(answer, 422, 1004, "validation_error")
    assert all(item.keys() == {"field", "message"} for item in answer.body["details"])
    return {item["field"]: item["message"] for item in answer.body["details"]}


# ── Jobs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_id": ..., "batch_ids": ["batch_1"]},
        {"openai_secret_id": ..., "openai_secret": "openai"},
        {"openai_secret_id": "openai", "keboola_secret_id": "keboola"},
        {"poll_interval_seconds": "1h"},
    ],
    ids=["by ids", "batch_ids", "by a name", "ids that are names", "an interval in words"],
)
def test_create_flat(rest: Rest, changes: dict[str, Any]) -> None:
    """201 with the whole job, whichever way it was written; GET shows the same job."""
    flat = rest.flat()
    answer = rest("POST", "/api/jobs", rest.flat(**changes, name=flat["name"]))
    job = answer.body
    assert answer.status == 201 and job.keys() >= JOB | {"logs", "triggers"}
    assert {name: job[name] for name in flat} == flat and job["batch_ids"] == ["batch_1"]
    assert (job["status"], job["batch_count"], job["completed_count"]) == ("active", 1, 0)
    assert (job["failed_count"], job["last_check_at"], job["completed_at"]) == (0, None, None)
    assert [row["status"] for row in job["logs"]] == ["created"] and job["triggers"] == []
    assert rest.job(job["id"])["created_at"] == job["created_at"]


def test_create_nested(rest: Rest) -> None:
    """As jobs.yaml has it; the answer carries the flat fields."""
    nested = rest.nested()
    answer = rest("POST", "/api/jobs", nested)
    assert answer.status == 201
    flat = rest.flat(name=nested["name"])
    assert {name: answer.body[name] for name in flat} == flat


def test_defaults(rest: Rest) -> None:
    """An interval that is not given is DEFAULT_POLL_INTERVAL."""
    assert rest.create(poll_interval_seconds=...)["poll_interval_seconds"] == 120


def test_show(rest: Rest) -> None:
    """Logs come oldest first, as many as asked for, or not at all."""
    job_id = rest.create()["id"]
    for step in ("pause", "resume", "pause"):
        rest("POST", f"/api/jobs/{job_id}/{step}")

    def logs(query: str) -> Any:
        shown = rest("GET", f"/api/jobs/{job_id}{query}").body
        assert shown.keys() >= JOB | {"triggers"}
        rows = shown.get("logs")
        what = ("created", "paused", "resumed")
        return rows and [row["status"] for row in rows if row["status"] in what]

    assert logs("") == logs("?include_logs=true") == ["created", "paused", "resumed", "paused"]
    assert logs("?log_limit=1") == ["paused"] and not logs("?include_logs=false")


def test_triggers_and_logs_of_a_job_that_fired(rest: Rest) -> None:
    """A single job shows its triggers: state, Keboola's job, the body that was sent."""
    [job] = rest.early["batch_done"]
    until(lambda: rest.job(job["id"])["status"] == "triggered", "it did not fire")
    shown = rest.job(job["id"])
    [trigger] = shown["triggers"]
    assert trigger["keboola_job_id"] and trigger["body"]["component"] == "comp"
    assert (shown["completed_count"], shown["batches"][0]["status"]) == (1, "completed")
    assert {"created", "checking", "triggered"} <= {row["status"] for row in shown["logs"]}


def test_pages(tmp_path: Path) -> None:
    """250 jobs come in pages of 100, or as asked for, each once and in order; `total` counts all,
    or all of a status."""
    ids = make_many(tmp_path, 250)
    with surface(tmp_path, SECRET_KEY=MASTER_KEY) as made:
        sizes, seen, after = [], [], 0
        while after is not None:
            page = call(made, "GET", f"/api/jobs?after={after}").body
            assert page["total"] == 250
            sizes.append(len(page["jobs"]))
            seen += [job["id"] for job in page["jobs"]]
            after = page["next_after"]
        assert sizes == [100, 100, 50] and seen == ids
        first = call(made, "GET", "/api/jobs?limit=7").body
        assert [job["id"] for job in first["jobs"]] == ids[:7] and first["jobs"][0].keys() >= JOB
        some = call(made, "GET", f"/api/jobs?status=failed&limit=9&after={ids[99]}").body
        wanted = [job_id for job_id in ids[100:] if job_id % 50 == 0]
        assert [job["id"] for job in some["jobs"]] == wanted and some["total"] == 5
        assert call(made, "GET", "/api/jobs?limit=250").body["next_after"] is None
        assert call(made, "GET", f"/api/jobs?after={ids[-1]}").body["jobs"] == []


def make_many(folder: Path, count: int) -> list[int]:
    """Jobs that are not checked: paused ones, each fiftieth failed."""

    async def create() -> int:
        config = tecko.load_config(folder / "jobs.yaml", {"SECRET_KEY": MASTER_KEY})
        async with tecko.Store(config.settings.database) as store:
            flat = dict.fromkeys(("openai_secret", "keboola_secret"), "x") | {"name": "n"}
            flat |= dict.fromkeys(("keboola_component_id", "keboola_configuration_id"), "x")
            flat["keboola_stack_url"] = "https://connection.keboola.com"
            spec = tecko.job_spec({**flat, "batch_id": "batch_1"})
            for n in range(count):
                await store.create_job(spec.model_copy(update={"name": f"n{n}"}), "store", 1.0)
        return count

    asyncio.run(create())
    with contextlib.closing(sqlite3.connect(folder / "teckochecker.db")) as db, db:
        db.execute("UPDATE polling_jobs SET status = iif(id % 50, 'paused', 'failed')")
        return [row[0] for row in db.execute("SELECT id FROM polling_jobs ORDER BY id")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "renamed"),
        ("poll_interval_seconds", 1800),
        ("keboola_stack_url", "https://connection.keboola.com"),
        ("keboola_component_id", "other.component"),
        ("keboola_configuration_id", "4711"),
        ("keboola_secret_id", None),  # of the second one
    ],
)
def test_update(rest: Rest, field: str, value: Any) -> None:
    """PUT changes what it names, nothing else, and answers the whole job."""
    if field == "keboola_secret_id":
        body = {"name": f"k{next(NUMBERS)}", "type": "keboola", "value": KEYS["keboola"]}
        value = rest("POST", "/api/admin/secrets", body).body["id"]
    before = rest.create()
    rest("POST", f"/api/jobs/{before['id']}/pause")
    answer = rest("PUT", f"/api/jobs/{before['id']}", {field: value})
    assert answer.status == 200 and answer.body.keys() >= JOB | {"logs", "triggers"}
    kept = set(FLAT) - {field}
    assert answer.body[field] == value == rest.job(before["id"])[field] != before[field]
    assert {k: answer.body[k] for k in kept} == {k: before[k] for k in kept}
    assert answer.body["logs"][-1]["status"] == "updated"


def test_update_all_at_once(rest: Rest) -> None:
    """Several fields in one body."""
    job = rest.create()
    body = {"name": f"new {job['id']}", "poll_interval_seconds": 60, "keboola_component_id": "c2"}
    answer = rest("PUT", f"/api/jobs/{job['id']}", body)
    assert answer.status == 200 and {name: answer.body[name] for name in body} == body


def test_delete_a_job(rest: Rest) -> None:
    """It is gone, with its routes; no other is."""
    kept, gone = rest.create(), rest.create()
    answer = rest("DELETE", f"/api/jobs/{gone['id']}")
    assert answer.status == 200 and answer.body["success"] is True
    assert answer.body["message"].endswith("deleted successfully")
    assert rest("GET", f"/api/jobs/{gone['id']}").status == 404
    assert rest("DELETE", f"/api/jobs/{gone['id']}").status == 404
    assert rest.job(kept["id"])["name"] == kept["name"]


def test_steps_of_a_job(rest: Rest) -> None:
    """Each step from the state it wants answers the job, from any other 409 and what it is."""
    job_id = rest.create()["id"]

    def step(name: str) -> Answer:
        return rest("POST", f"/api/jobs/{job_id}/{name}")

    def cannot(name: str) -> str:
        detail = refused(step(name), 409, 1003, "conflict")
        assert detail.startswith(f"Cannot {name} ")
        return detail

    assert "active" in cannot("resume") and "active" in cannot("retry")
    assert step("pause").body["status"] == "paused" == rest.job(job_id)["status"]
    assert "paused" in cannot("pause") and "paused" in cannot("check")
    assert step("resume").body["status"] == "active" == rest.job(job_id)["status"]
    job_id = rest.ended()["id"]
    assert "failed" in cannot("pause") and "failed" in cannot("resume")
    assert "failed" in cannot("check")
    answer = step("retry")
    assert (answer.status, answer.body["status"]) == (200, "active")


def test_names_are_unique(rest: Rest) -> None:
    """409 for a second job of a name, created or renamed."""
    first, second = rest.create(), rest.create()
    again = rest("POST", "/api/jobs", rest.flat(name=first["name"]))
    renamed = rest("PUT", f"/api/jobs/{second['id']}", {"name": first["name"]})
    for answer in (again, renamed):
        assert first["name"] in refused(answer, 409, 1003, "conflict")


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────


def new_secret(rest: Rest, kind: str = "openai") -> Any:
    body = {"name": f"secret {next(NUMBERS)}", "type": kind, "value": KEYS.get(kind, "v" * 20)}
    answer = rest("POST", "/api/admin/secrets", body)
    assert answer.status == 201, answer.body
    return answer.body


@pytest.mark.parametrize("kind", ["openai", "keboola", "api"])
def test_secrets(rest: Rest, kind: str) -> None:
    """Created, listed, shown and deleted, and never with the value."""
    made = new_secret(rest, kind)
    assert made.keys() >= SECRET and made["type"] == kind and "value" not in made
    shown = rest("GET", f"/api/admin/secrets/{made['id']}")
    listed = rest("GET", "/api/admin/secrets").body
    assert shown.status == 200 and shown.body == made and made in listed["secrets"]
    assert listed["total"] == len(listed["secrets"])
    answer = rest("DELETE", f"/api/admin/secrets/{made['id']}")
    assert answer.status == 200 and answer.body["success"] is True
    assert answer.body["message"].endswith("deleted successfully")
    assert rest("GET", f"/api/admin/secrets/{made['id']}").status == 404
    assert made not in rest("GET", "/api/admin/secrets").body["secrets"]


def test_a_secret_twice(rest: Rest) -> None:
    """409, and the first one stays as it was."""
    made = new_secret(rest)
    body = {"name": made["name"], "type": "keboola", "value": "another-value"}
    answer = rest("POST", "/api/admin/secrets", body)
    assert made["name"] in refused(answer, 409, 1003, "conflict")
    assert rest("GET", f"/api/admin/secrets/{made['id']}").body == made


def test_a_secret_in_use(rest: Rest) -> None:
    """409 that names the job, active or paused; once the job is deleted it can go."""
    secret = new_secret(rest)
    job = rest.create(openai_secret_id=secret["id"])
    for step in ("pause", "resume"):
        answer = rest("DELETE", f"/api/admin/secrets/{secret['id']}")
        assert job["name"] in refused(answer, 409, 1003, "conflict")
        rest("POST", f"/api/jobs/{job['id']}/{step}")
    rest("DELETE", f"/api/jobs/{job['id']}")
    assert rest("DELETE", f"/api/admin/secrets/{secret['id']}").status == 200


def test_a_secret_of_ended_jobs(rest: Rest) -> None:
    """It can be deleted; the job stays and can be looked at, and a retry says what is missing."""
    secret = new_secret(rest)
    job = rest.ended(openai_secret_id=secret["id"])
    assert rest("DELETE", f"/api/admin/secrets/{secret['id']}").status == 200
    shown = rest.job(job["id"])
    assert (shown["status"], shown["name"]) == ("failed", job["name"])
    assert shown["openai_secret_id"] is None and shown["completed_at"]
    assert job["id"] in [row["id"] for row in rest("GET", "/api/jobs?status=failed").body["jobs"]]


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────

ROUTES = [(route.method, route.path) for route in tecko.ROUTES]
WITH_ID = [(method, path) for method, path in ROUTES if "{id}" in path]


@pytest.mark.parametrize(("method", "path"), WITH_ID)
@pytest.mark.parametrize("number", ["0", "987654"])
def test_not_found(rest: Rest, method: str, path: str, number: str) -> None:
    """404 with the code of what is missing, and its id."""
    body = {"name": "x"} if method == "PUT" else None
    answer = rest(method, path.replace("{id}", number), body)
    what, code = ("Job", 1002) if "jobs" in path else ("Secret", 1001)
    detail = refused(answer, 404, code, f"{what.lower()}_not_found")
    assert detail == f"{what} with ID {number} not found"


@pytest.mark.parametrize(("method", "path"), WITH_ID)
def test_an_id_that_is_no_number(rest: Rest, method: str, path: str) -> None:
    """422 that names the id, and where numbers are found."""
    body = {"name": "x"} if method == "PUT" else None
    for text in ("x", "-1", "1.5", "1e3", "%31x", "%D9%A1", "0x1"):
        said = wrong_fields(rest(method, path.replace("{id}", text), body))
        assert said == {"id": f"must be a number; GET {path.partition('/{id}')[0]} lists them"}


@pytest.mark.parametrize("number", ["9" * 18, str(2**63), "9" * 400])
def test_an_id_that_is_too_large(rest: Rest, number: str) -> None:
    """There is no such job, however long the number."""
    assert rest("GET", f"/api/jobs/{number}").status in (404, 422)


@pytest.mark.parametrize("changes", [{"openai_secret_id": 9999}, {"keboola_secret_id": 9999}])
def test_a_secret_that_is_not_there(rest: Rest, changes: dict[str, Any]) -> None:
    """404 with 1001, on creation and on change; nothing is created."""
    flat = rest.flat(**changes)
    assert "9999" in refused(rest("POST", "/api/jobs", flat), 404, 1001, "secret_not_found")
    listed = rest("GET", "/api/jobs?limit=1000").body["jobs"]
    assert flat["name"] not in [job["name"] for job in listed]


def test_an_update_to_a_secret_that_is_not_there(rest: Rest) -> None:
    """404 with 1001, and the job stays as it was."""
    job = rest.create()
    answer = rest("PUT", f"/api/jobs/{job['id']}", {"keboola_secret_id": 9999})
    refused(answer, 404, 1001, "secret_not_found")
    assert rest.job(job["id"])["keboola_secret_id"] == job["keboola_secret_id"]


def test_a_secret_of_another_type(rest: Rest) -> None:
    """It is refused, and the types are named."""
    answer = rest("POST", "/api/jobs", rest.flat(openai_secret_id=rest.secret_ids["keboola"]))
    assert answer.status in (404, 409, 422) and is_error(answer)
    assert "openai" in answer.body["detail"] and "keboola" in answer.body["detail"]


FLAT_WRONG = [
    ("name", ""),
    ("name", "7"),
    ("name", None),
    ("name", ...),
    ("name", "x" * 256),
    ("name", "a\nb"),
    ("batch_id", "nonsense"),
    ("batch_id", 7),
    ("batch_id", "batch_" + "x" * 250),
    ("batch_ids", []),
    ("batch_ids", ["batch_1", "batch_1"]),
    ("batch_ids", [f"batch_{n}" for n in range(11)]),
    ("openai_secret_id", True),
    ("openai_secret_id", [1]),
    ("keboola_secret_id", None),
    ("keboola_stack_url", "http://example.com"),
    ("keboola_stack_url", ...),
    ("keboola_component_id", ""),
    ("keboola_component_id", ...),
    ("keboola_configuration_id", None),
    ("poll_interval_seconds", 0),
    ("poll_interval_seconds", 3601),
    ("poll_interval_seconds", "often"),
    ("poll_interval_seconds", 1.5),
    ("trigger_when", "never"),
    ("on_ambiguous", "maybe"),
    ("variables", {"batch_ids_completed": "x"}),
    ("nonsense", 1),
]


@pytest.mark.parametrize(("field", "value"), FLAT_WRONG)
def test_flat_fields(rest: Rest, field: str, value: Any) -> None:
    """422 names the field by the name that the sender used, and no other."""
    without = {"batch_id": ...} if field == "batch_ids" else {}
    fields = wrong_fields(rest("POST", "/api/jobs", rest.flat(**without | {field: value})))
    assert [re.split(r"[.\[]", name)[0] for name in fields] == [field], fields


def test_several_fields_at_once(rest: Rest) -> None:
    """All of them in one answer, and in the detail too."""
    body = rest.flat(name="", poll_interval_seconds=0, keboola_stack_url="x")
    answer = rest("POST", "/api/jobs", body)
    wrong = {"name", "poll_interval_seconds", "keboola_stack_url"}
    assert wrong_fields(answer).keys() == wrong
    assert all(field in answer.body["detail"] for field in wrong)


def test_what_a_flat_body_may_hold_is_said_flat(rest: Rest) -> None:
    """An unknown key of a flat body is told what is allowed in that form."""
    said = wrong_fields(rest("POST", "/api/jobs", rest.flat(poll_intervall=3)))
    assert "poll_interval_seconds" in said["poll_intervall"]


def test_nested_fields(rest: Rest) -> None:
    """A body as in jobs.yaml is answered in its own names."""
    body = rest.nested(poll_interval=0)
    body["watch"]["batch_ids"] = ["no"]
    body["trigger"]["colour"] = "red"
    wrong = {"poll_interval", "watch.batch_ids[0]", "trigger.colour"}
    assert wrong_fields(rest("POST", "/api/jobs", body)).keys() == wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("poll_interval_seconds", 0),
        ("keboola_stack_url", "x"),
        ("keboola_component_id", ""),
        ("keboola_secret_id", ""),
        ("batch_ids", []),
        ("status", "paused"),
        ("id", 5),
        *((name, None) for name in ("name", "poll_interval_seconds", "keboola_stack_url")),
    ],
)
def test_update_fields(rest: Rest, field: str, value: Any) -> None:
    """422 names the flat field; the job stays as it was."""
    job = rest.create()
    fields = wrong_fields(rest("PUT", f"/api/jobs/{job['id']}", {field: value}))
    assert list(fields) == [field]
    after = rest.job(job["id"])
    assert {name: after[name] for name in FLAT} == {name: job[name] for name in FLAT}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "7"),
        ("name", ...),
        ("type", "password"),
        ("type", ...),
        ("value", ""),
        ("value", ...),
        ("value", ["x"]),
        ("value", "x" * 10_001),
        ("value", f"'{standins.OPENAI_KEY}'"),
        ("value", standins.OPENAI_KEY + "\x07"),
        ("value", standins.OPENAI_KEY + "\u00e9"),
        ("colour", standins.OPENAI_KEY),
    ],
)
def test_secret_fields(rest: Rest, field: str, value: Any) -> None:
    """422 names the field and shows nothing of what was given."""
    body = {"name": "new", "type": "openai", "value": standins.OPENAI_KEY, field: value}
    body = {name: given for name, given in body.items() if given is not ...}
    assert list(wrong_fields(rest("POST", "/api/admin/secrets", body))) == [field]
    assert "new" not in rest.secret_ids


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/jobs?status=asleep", "status"),
        ("/api/jobs?status=", "status"),
        ("/api/jobs?limit=0", "limit"),
        ("/api/jobs?limit=1001", "limit"),
        ("/api/jobs?limit=many", "limit"),
        ("/api/jobs?limit=", "limit"),
        ("/api/jobs?limit=1e2", "limit"),
        ("/api/jobs?after=-1", "after"),
        (f"/api/jobs?after={2**63}", "after"),
        ("/api/jobs?stauts=active", "stauts"),
        ("/api/jobs?Status=active", "Status"),
        ("/api/jobs/{id}?include_logs=perhaps", "include_logs"),
        ("/api/jobs/{id}?log_limit=0", "log_limit"),
        ("/api/jobs/{id}?log_limits=5", "log_limits"),
    ],
)
def test_query_parameters(rest: Rest, path: str, field: str) -> None:
    """422 names the parameter; a misspelt one does not pass for none."""
    job_id = str(rest("GET", "/api/jobs?limit=1").body["jobs"][0]["id"])
    assert list(wrong_fields(rest("GET", path.replace("{id}", job_id)))) == [field]


def test_states_that_can_be_asked_for(rest: Rest) -> None:
    """Each state is one, `removed` too, and a wrong one is told which there are."""
    states = [*tecko.JOB_STEPS, "removed"]
    for status in states:
        answer = rest("GET", f"/api/jobs?status={status}&limit=1000")
        assert answer.status == 200 and {job["status"] for job in answer.body["jobs"]} <= {status}
    said = rest("GET", "/api/jobs?status=asleep").body["detail"]
    assert all(status in said for status in states), said


BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "cut off": b'{"name": "x"',
    "two documents": b'{"name": "x"}{"name": "y"}',
    "a form": b"name=x",
    "YAML": b"name: x",
    "no UTF-8": b'{"name": "\xff"}',
    "NaN": b'{"name": "x", "poll_interval_seconds": NaN}',
    "NaN for a text": b'{"name": "x", "keboola_configuration_id": NaN}',
    "Infinity": b'{"poll_interval_seconds": Infinity}',
    "-Infinity": b'{"keboola_component_id": -Infinity}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep in a field": b'{"name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[]",
    "a text": b'"name"',
    "a number": b"7",
    "null": b"null",
    "true": b"true",
    "half a character": b'{"name": "\\ud800"}',
    "half a character as a key": b'{"\\ud800": 1}',
    "a long number": b'{"poll_interval_seconds": ' + b"9" * 5000 + b"}",
    "a large number": b'{"poll_interval_seconds": 1e400}',
}


@pytest.mark.parametrize("raw", BODIES.values(), ids=list(BODIES))
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/jobs"), ("PUT", "/api/jobs/{id}"), ("POST", "secrets")]
)
def test_bodies(rest: Rest, method: str, path: str, raw: bytes) -> None:
    """What is no JSON object is refused with 422, and changes nothing."""
    job = rest("GET", "/api/jobs?limit=1").body["jobs"][0]
    target = path.replace("{id}", str(job["id"])).replace("secrets", "/api/admin/secrets")
    answer = rest(method, target, raw=raw)
    assert answer.status == 422 and is_error(answer)
    assert rest("GET", "/api/jobs?limit=1").body["jobs"][0]["name"] == job["name"]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_job_in_json_that_is_none(rest: Rest, word: str) -> None:
    """What only Python takes for JSON does not become a text in a job that is right otherwise."""
    raw = json.dumps(rest.flat()).replace('"cfg"', word, 1).encode()
    assert rest("POST", "/api/jobs", raw=raw).status == 422


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x"])
@pytest.mark.parametrize("path", ["/api/jobs", "/api/admin/secrets"])
def test_content_types(rest: Rest, path: str, kind: str) -> None:
    """415 for what a form of a web page could send."""
    answer = rest("POST", path, rest.flat(), Content_Type=kind)
    refused(answer, 415, 1000, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_content_types_of_json(rest: Rest, kind: str) -> None:
    """Parameters and case do not matter."""
    assert rest("POST", "/api/jobs", rest.flat(), Content_Type=kind).status == 201


def test_large_bodies(rest: Rest) -> None:
    """1 MiB is taken, a byte more is 413, said so even while the body is still being sent."""
    text = json.dumps(rest.flat()).encode()
    assert rest("POST", "/api/jobs", raw=text.ljust(1 << 20)).status == 201
    for _ in range(5):
        answer = rest("POST", "/api/jobs", raw=text.ljust((1 << 20) + 1))
        refused(answer, 413, 1000, answer.body["error"])
        assert answer.headers["Connection"] == "close"


PATHS = sorted({path for route in tecko.ROUTES for path in (route.path, route.also) if path})


@pytest.mark.parametrize("path", PATHS)
def test_methods(rest: Rest, path: str) -> None:
    """What a path does not know is 405 with what it knows, also for methods of no path."""
    known = {route.method for route in tecko.ROUTES if path in (route.path, route.also)}
    known |= {"HEAD"} if "GET" in known else set()
    target = path.replace("{id}", str(rest("GET", "/api/jobs?limit=1").body["jobs"][0]["id"]))
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - known:
        answer = rest(method, target)
        assert answer.status == 405 and answer.headers["X-Error-Code"] == "1000"
        assert set(answer.headers["Allow"].split(", ")) == known
        assert method == "HEAD" or is_error(answer)


@pytest.mark.parametrize("route", [route for route in tecko.ROUTES if route.method == "GET"])
def test_head(rest: Rest, route: tecko.Route) -> None:
    """The headers of GET, and no body."""
    job = rest("GET", "/api/jobs?limit=1").body["jobs"][0]
    number = job["id"] if "jobs" in route.path else rest.secret_ids["openai"]
    path = route.path.replace("{id}", str(number))
    get, head = rest("GET", path), rest("HEAD", path)
    assert (head.status, head.raw) == (get.status, b"")
    assert get.status == 200
    differ = {"X-Request-ID", "Date", "Content-Length"}
    same = [{k: v for k, v in a.headers.items() if k not in differ} for a in (get, head)]
    assert same[0] == same[1] and get.headers.keys() == head.headers.keys()
    assert int(head.headers["Content-Length"]) > 0


# ── What it changes in the running service ────────────────────────────────────────────────────


def test_check_now(rest: Rest) -> None:
    """A job that is due each hour is checked once it is created, and once more when told to."""
    rest.openai.batch("batch_now")
    job = rest.create(batch_id="batch_now")
    for n in (1, 2):
        until(lambda n=n: rest.checks("batch_now") == n, f"check {n} did not come")  # type: ignore[misc]
        until(lambda: rest.job(job["id"])["last_check_at"])
        answer = rest("POST", f"/api/jobs/{job['id']}/check")
        assert answer.status == 202 and answer.body["success"] is True


def test_paused_and_resumed(rest: Rest) -> None:
    """While another job goes on, a paused one is checked at most by what was under way; resumed,
    it goes on at once. A deleted one is not checked either."""
    for batch_id in ("batch_p", "batch_go", "batch_d"):
        rest.openai.batch(batch_id)
    paused = rest.create(batch_id="batch_p", poll_interval_seconds=1)["id"]
    deleted = rest.create(batch_id="batch_d", poll_interval_seconds=1)["id"]
    going = rest.create(batch_id="batch_go", poll_interval_seconds=1)["id"]
    until(lambda: all(rest.checks(f"batch_{name}") for name in ("p", "go", "d")))
    rest("POST", f"/api/jobs/{paused}/pause")
    rest("DELETE", f"/api/jobs/{deleted}")
    before = {name: rest.checks(f"batch_{name}") for name in ("p", "go", "d")}
    until(lambda: rest.checks("batch_go") >= before["go"] + 2)
    assert all(rest.checks(f"batch_{name}") <= before[name] + 1 for name in ("p", "d"))
    seen = rest.checks("batch_p")
    rest("POST", f"/api/jobs/{paused}/resume")
    until(lambda: rest.checks("batch_p") > seen)
    for job_id in (paused, going):
        rest("DELETE", f"/api/jobs/{job_id}")


def test_retried_and_changed(rest: Rest) -> None:
    """A retry checks the batches from the start, and a shorter interval counts from now on."""
    job = rest.ended()["id"]
    seen = rest.checks("batch_bad")
    rest("POST", f"/api/jobs/{job}/retry")
    until(lambda: rest.checks("batch_bad") == seen + 1)
    rest.openai.batch("batch_c")
    job = rest.create(batch_id="batch_c")["id"]
    until(lambda: rest.job(job)["last_check_at"])
    rest("PUT", f"/api/jobs/{job}", {"poll_interval_seconds": 1})
    until(lambda: rest.checks("batch_c") >= 2)
    rest("DELETE", f"/api/jobs/{job}")


# ── Who may ask ───────────────────────────────────────────────────────────────────────────────

PUBLIC = {"/health", "/api/health", "/livez", "/readyz"}


def test_the_token(tmp_path: Path) -> None:
    """Everything but health wants it, known or not, by any method; with it all is served."""
    wanted = {"Authorization": f"Bearer {TOKEN}"}
    with open_rest(tmp_path, ADMIN_TOKEN=TOKEN) as r:
        for path in (*PATHS, "/nothing", "/api/jobs/1/explode"):
            target = path.replace("{id}", "1")
            status = r("GET", target).status
            assert (status == 200) if path in PUBLIC else (status == 401), path
            assert r("GET", target, **wanted).status != 401
            if path not in PUBLIC:
                assert {r(m, target, {}).status for m in ("POST", "PUT", "DELETE")} == {401}
        answer = r("GET", "/api/jobs", Authorization=f"Bearer {TOKEN}x")
        assert refused(answer, 401, 1000, "unauthorized")


# ── The description ───────────────────────────────────────────────────────────────────────────


def test_the_document_is_valid(rest: Rest) -> None:
    """OpenAPI 3.1, as served."""
    document = rest("GET", "/openapi.json").body
    validate(document)
    assert document["openapi"].startswith("3.1") and document["info"]["version"] == tecko.VERSION


def test_the_document_covers_what_is_served(rest: Rest) -> None:
    """Each path and method of it is served (another answer than 405, or a 404 without a thing),
    each method that is not in it is refused, and a path that is not in it is not there."""
    paths = rest("GET", "/openapi.json").body["paths"]
    for path, operations in paths.items():
        served = {method.upper() for method in operations}
        allow = rest("PATCH", path.replace("{id}", "987654")).headers["Allow"].split(", ")
        assert set(allow) - {"HEAD"} == served
        for method in served:
            answer = rest(method, path.replace("{id}", "987654"), raw=b"{}")
            thing = "{id}" in path and answer.body["code"] in (1001, 1002)
            assert answer.status not in (404, 405) or thing, (method, path)
    published = "/ /health /api/health /stats /api/stats /data /api/data /metrics /openapi.json"
    published += " /docs /redoc /livez /readyz"
    published += " /api/admin/secrets /api/admin/secrets/{id} /api/jobs /api/jobs/{id}"
    steps = [f"/api/jobs/{{id}}/{step}" for step in ("pause", "resume", "retry", "check")]
    assert paths.keys() == {*published.split(), *steps}
    for path in (
        "/api",
        "/api/jobs/",
        "/api/jobs/1/stop",
        "/api/secrets",
        "/docs/",
        "/swagger",
        "/health/x",
    ):
        assert rest("GET", path).status == 404


def test_bodies_of_the_document(rest: Rest) -> None:
    """What it says of a job and a secret holds for what is taken here, and each has an example
    that is right by it."""
    document = rest("GET", "/openapi.json").body
    operations = [op for ops in document["paths"].values() for op in ops.values()]
    contents = [op["requestBody"]["content"]["application/json"] for op in operations
                if "requestBody" in op]  # fmt: skip
    assert len(contents) == 3
    for content in contents:
        examples = [one["value"] for one in content.get("examples", {}).values()]
        examples += [content["example"]] if "example" in content else []
        assert examples, "no example"
        for example in examples:
            schema = {**content["schema"], "components": document["components"]}
            Draft202012Validator(schema).validate(example)


@pytest.mark.parametrize("form", ["batch_id", "batch_ids", "names", "nested"])
def test_forms_of_a_job_in_the_document(rest: Rest, form: str) -> None:
    """Every form that is served is right by the document: with batch_id, too."""
    name = {"openai_secret_id": ..., "openai_secret": "openai"}
    name |= {"keboola_secret_id": ..., "keboola_secret": "keboola"}
    body = {
        "batch_id": rest.flat(),
        "batch_ids": rest.flat(batch_id=..., batch_ids=["batch_1"]),
        "names": rest.flat(batch_id=..., batch_ids=["batch_1"], **name),
        "nested": rest.nested(),
    }[form]
    assert rest("POST", "/api/jobs", body).status == 201
    document = tecko.openapi()
    job = {"$ref": "#/components/schemas/Job", "components": document["components"]}
    Draft202012Validator(job).validate(body)


@pytest.mark.parametrize("route", [route for route in tecko.ROUTES if route.body])
def test_examples_are_taken(rest: Rest, route: tecko.Route) -> None:
    """What the page shows passes the model it stands for."""
    read = tecko.job_spec if route.body is tecko.JobSpec else partial(tecko.parse, route.body)
    read(route.example, {"bounds": (30, 3600)})
    shown = html.unescape(rest("GET", "/docs").raw.decode())
    assert json.dumps(route.example) in shown


def test_the_page(rest: Rest) -> None:
    """Every route with its curl line and a form to send it, every model, a list of contents, and
    nothing from another host."""
    answer = rest("GET", "/docs")
    assert answer.headers["Content-Type"].startswith("text/html")
    page, paths = answer.raw.decode(), tecko.openapi()["paths"]
    operations = [(m.upper(), path) for path, methods in paths.items() for m in methods]
    for method, path in operations:
        assert f"<code>{method}</code> {path}</h2>" in page
        assert f'<form data-method="{method}" data-path="{path}">' in page
    assert page.count("<pre>curl ") == len(operations)
    for name in tecko.openapi()["components"]["schemas"]:
        assert f'id="{name}"' in page
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) > 2 * len(operations) and all(page.count(f'id="{to}"') == 1 for to in links)
    for said in ('id="url"', "Authorization: Bearer", 'name="viewport"'):
        assert said in page
    linked = re.findall(r"""(?:src|href|action|url\()\s*=\s*["']?([^"'>)]+)""", page)
    assert {to for to in linked if to[:1] != "#"} == {"/openapi.json"} and "@import" not in page


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_what_a_page_may_run(rest: Rest, path: str) -> None:
    """Its own script and style, by their hashes; no other, no attribute, and nothing elsewhere."""
    answer = rest("GET", path, Accept="text/html")
    page, policy = answer.raw.decode(), answer.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{tag}-src [^;]*'sha256-{re.escape(digest)}'", policy)
    assert "unsafe" not in policy and "*" not in policy and "default-src 'none'" in policy
    assert not re.search(r"<[^>]+\s(on\w+|style)=", page)
    assert policy == rest("GET", "/health").headers["Content-Security-Policy"]


def test_redoc_leads_to_the_page(rest: Rest) -> None:
    """As the user guide has it."""
    assert rest("GET", "/redoc").raw == rest("GET", "/docs").raw


def test_the_curl_lines_run(rest: Rest) -> None:
    """Each command of the page is answered by its route."""
    page = html.unescape(rest("GET", "/docs").raw.decode())
    lines = re.findall(r"<pre>(curl .*?)</pre>", page, re.S)
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        [url] = [word for word in words if word.startswith("$URL")]
        method = words[words.index("-X") + 1]
        body = words[words.index("-d") + 1].encode() if "-d" in words else None
        target = url.removeprefix("$URL").replace("/1", "/987654")
        assert "Content-Type: application/json" in words or body is None
        answer = rest(method, target, raw=body)
        assert answer.status not in (400, 405, 415, 422), (line, answer.raw[:300])
        assert answer.status != 404 or "987654" in target or body
    if shutil.which("curl"):
        command = shlex.split(lines[2].replace("$URL", f"http://{rest.made.host}"))
        done = subprocess.run(command, capture_output=True, check=True)
        assert b'"healthy"' in done.stdout or b'"degraded"' in done.stdout


# ── Figures ───────────────────────────────────────────────────────────────────────────────────


def figures(made: Surface) -> dict[str, float]:
    answer = call(made, "GET", "/metrics")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    lines = [line for line in answer.raw.decode().splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def total(made: Surface, family: str) -> float:
    return sum(value for name, value in figures(made).items() if name.startswith(family + "{"))


def test_figures(rest: Rest) -> None:
    """Names by Prometheus' conventions, a type and a help line each."""
    rest.create()
    text = rest("GET", "/metrics").raw.decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    assert dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.M)).keys() == types.keys()
    assert types.items() >= {
        "teckochecker_checks_total": "counter",
        "teckochecker_triggers_total": "counter",
        "teckochecker_upstream_errors_total": "counter",
        "teckochecker_check_duration_seconds": "histogram",
        "teckochecker_check_lateness_seconds": "histogram",
        "teckochecker_jobs": "gauge",
        "teckochecker_overdue_jobs": "gauge",
        "teckochecker_loop_lag_seconds": "gauge",
        "teckochecker_build_info": "gauge",
        "teckochecker_oldest_open_trigger_seconds": "gauge",
        "teckochecker_job_state": "gauge",
        "process_start_time_seconds": "gauge",
        "teckochecker_http_connections": "gauge",
        "teckochecker_store_write_duration_seconds": "histogram",
    }.items()  # fmt: skip
    assert all(name.startswith(("teckochecker_", "process_")) for name in types)
    stats = rest("GET", "/stats").body
    assert figures(rest.made)['teckochecker_jobs{status="active"}'] == stats["active_jobs"]


def test_figures_grow(rest: Rest) -> None:
    """A job that fires counts as a check and as a trigger, each under what came of it; one that
    meets an error, as an error upstream."""
    families = ("teckochecker_checks_total", "teckochecker_triggers_total")
    fired = 'teckochecker_checks_total{outcome="fire"}'
    [early] = rest.early["batch_done"]  # which may be under way
    until(lambda: rest("GET", f"/api/jobs/{early['id']}").body.get("status") != "active")
    before = [total(rest.made, family) for family in families]
    was = figures(rest.made).get(fired, 0.0)
    job = rest.create(batch_id="batch_done")
    until(lambda: rest.job(job["id"])["status"] == "triggered")
    assert all(total(rest.made, f) > n for f, n in zip(families, before, strict=True))
    now = figures(rest.made)
    assert now[fired] == was + 1
    assert all(re.search(r'\{outcome="[a-z_]+"\}', name) for name in now if "checks_total" in name)
    late = {k: v for k, v in now.items() if k.startswith("teckochecker_check_lateness_seconds")}
    buckets = [value for name, value in late.items() if "_bucket" in name]
    assert buckets == sorted(buckets) and buckets[-1] >= 1  # each counts those below it, too
    assert late["teckochecker_check_lateness_seconds_count"] == buckets[-1]
    assert 0 < late["teckochecker_check_lateness_seconds_sum"] < 60 * buckets[-1]
    errors = total(rest.made, "teckochecker_upstream_errors_total")
    rest.create(batch_id="batch_that_is_not_there")
    until(lambda: total(rest.made, "teckochecker_upstream_errors_total") > errors)


def test_promtool(rest: Rest) -> None:
    """Prometheus' own check has nothing to say."""
    tool = shutil.which("promtool", path=os.environ.get("PATH"))
    if tool is None:
        pytest.skip("promtool is not installed")
    text = rest("GET", "/metrics").raw
    done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ── How it is ─────────────────────────────────────────────────────────────────────────────────


def test_alive_and_ready(rest: Rest) -> None:
    """200 while all is well, and by HEAD as well."""
    for path in ("/livez", "/readyz"):
        answer = rest("GET", path)
        assert answer.status == 200 and answer.body["success"] is True


def test_a_closed_store_is_not_ready(tmp_path: Path) -> None:
    """It lives, but is not ready; all else is 503 with the database's code."""
    with open_rest(tmp_path) as rest:
        rest.made.on_loop(rest.made.service.store.close())
        assert rest("GET", "/livez").status == 200
        for path in ("/readyz", "/health"):
            assert rest("GET", path).status == 503
            assert rest("GET", path).headers["Connection"] == "close"
        for path in ("/api/jobs", "/api/jobs/1", "/api/admin/secrets", "/metrics", "/stats"):
            refused(rest("GET", path), 503, 3001, "database_error")
        body = {"name": "x", "type": "api", "value": "a-long-value"}
        answer = rest("POST", "/api/admin/secrets", body)
        assert refused(answer, 503, 3001, "database_error")
        assert str(tmp_path) not in answer.body["detail"]


# ── Audit ─────────────────────────────────────────────────────────────────────────────────────


def test_who_did_what(rest: Rest, caplog: pytest.LogCaptureFixture) -> None:
    """Each change leaves one row and one line with the id of the request that asked for it; what
    was refused, and what only looked, leaves none."""
    caplog.set_level("INFO", logger=tecko.log.name)
    done: list[tuple[Answer, str | None]] = []

    def does(status: str | None, method: str, path: str, body: Any = None) -> Any:
        answer = rest(method, path, body)
        done.append((answer, status))
        return answer.body

    secret = {"name": f"audited {next(NUMBERS)}", "type": "openai", "value": KEYS["openai"]}
    secret_id = does("created", "POST", "/api/admin/secrets", secret)["id"]
    does(None, "POST", "/api/admin/secrets", secret)
    job = does("created", "POST", "/api/jobs", rest.flat(batch_id="batch_bad"))["id"]
    until(lambda: rest.job(job)["status"] == "failed")
    does("updated", "PUT", f"/api/jobs/{job}", {"poll_interval_seconds": 900})
    does(None, "PUT", f"/api/jobs/{job}", {"poll_interval_seconds": 900})
    does(None, "POST", f"/api/jobs/{job}/pause")
    does("updated", "POST", f"/api/jobs/{job}/retry")
    other = does("created", "POST", "/api/jobs", rest.flat())["id"]
    does("paused", "POST", f"/api/jobs/{other}/pause")
    does("resumed", "POST", f"/api/jobs/{other}/resume")
    does(None, "GET", f"/api/jobs/{other}")
    for answer, status in done:
        request_id = answer.headers["X-Request-ID"]
        rows = [row for row in rest.rows() if row.actor == f"HTTP {request_id}"]
        lines = [line for line in caplog.messages if request_id in line]
        assert [row.status for row in rows] == ([status] if status else []), (status, rows)
        assert len(lines) == len(rows) and all(
            row.status in line for row, line in zip(rows, lines, strict=True)
        )
    deletes(rest, caplog, f"/api/jobs/{other}", f"/api/admin/secrets/{secret_id}")


def deletes(rest: Rest, caplog: pytest.LogCaptureFixture, *paths: str) -> None:
    """The row and the line of a deletion outlive what was deleted."""
    for path in paths:
        request_id = rest("DELETE", path).headers["X-Request-ID"]
        [row] = [row for row in rest.rows() if row.actor == f"HTTP {request_id}"]
        [line] = [line for line in caplog.messages if request_id in line]
        assert row.status == "deleted" and row.message in line


def test_what_the_program_does_itself_is_by_nobody(rest: Rest) -> None:
    """A request that made the timers turn is not named for what they do from then on."""
    rest("POST", f"/api/jobs/{rest.create()['id']}/check")
    job = rest.ended(poll_interval_seconds=900)
    rows = rest.made.on_loop(rest.made.service.store.logs(job["id"], 100))
    assert {row.actor for row in rows if row.status in ("checking", "failed")} == {None}


def test_the_command_line_is_named(tmp_path: Path) -> None:
    """What is done there is told of there, a secret's new value and a new master key included."""
    (tmp_path / "teckochecker.key").write_text(MASTER_KEY)
    (tmp_path / "teckochecker.key").chmod(0o600)
    add = ("secret", "add", "--name", "s", "--type", "api")
    commands = [add, (*add, "--replace"), ("secret", "rotate")]
    lines = []
    for command in commands:
        done = run_program("-v", *command, cwd=tmp_path, input="the-value")
        assert done.returncode == 0, done.stderr
        lines.append([line for line in done.stderr.splitlines() if "command line" in line])
    with contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as db:
        rows = db.execute("SELECT status, actor FROM polling_logs ORDER BY id").fetchall()
    assert rows == [(status, "command line") for status in ("created", "updated", "rotated")]
    assert [len(found) for found in lines] == [1, 1, 1]


@pytest.mark.parametrize(
    ("env", "left"),
    [
        ({"LOG_RETENTION_DAYS": "2"}, range(201, 251)),
        ({"LOG_RETENTION_ROWS": "100"}, range(151, 251)),
    ],
)
def test_old_logs_are_pruned(tmp_path: Path, env: dict[str, str], left: range) -> None:
    """Rows past their days, and those beyond the newest so many, go in the background."""
    make_many(tmp_path, 0)
    day, now = 86400, time.time()
    ages = [(n, now - (3 * day if n <= 200 else day)) for n in range(1, 251)]
    with contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as db, db:
        sql = (
            "INSERT INTO polling_logs (id, status, message, created_at) VALUES (?, 'error', '', ?)"
        )
        db.executemany(sql, ages)
    with surface(tmp_path, SECRET_KEY=MASTER_KEY, **env) as made:
        until(lambda: call(made, "GET", "/stats").body["total_logs"] == len(left))
        rows = made.on_loop(made.service.store.logs(None, 1000))
    assert [row.id for row in rows] == [*left]


# ── The same as on the command line ───────────────────────────────────────────────────────────


def on_command_line(rest: Rest, *args: str) -> subprocess.CompletedProcess[str]:
    env = {"SECRET_KEY": MASTER_KEY, "MIN_POLL_INTERVAL": "1"}
    return run_program("--json", *args, cwd=rest.folder, env=env)


def options(flat: Mapping[str, Any]) -> list[str]:
    """What `job create` is told for a job of Rest.flat."""
    given = {
        "--name": flat["name"],
        "--batch-id": flat["batch_id"],
        "--openai-secret": "openai",
        "--keboola-secret": "keboola",
        "--keboola-stack": flat["keboola_stack_url"],
        "--component-id": flat["keboola_component_id"],
        "--config-id": flat["keboola_configuration_id"],
        "--poll-interval": str(flat["poll_interval_seconds"]),
    }
    return ["job", "create", *itertools.chain(*given.items())]


def timeless(job: Any) -> Any:
    """A job without ids, times and who asked."""
    if isinstance(job, dict):
        apart = {"id", "job_id", "actor"}
        return {k: timeless(v) for k, v in job.items() if k not in apart and not k.endswith("_at")}
    return [timeless(item) for item in job] if isinstance(job, list) else job


def test_the_same_job_on_the_command_line(rest: Rest) -> None:
    """Created and shown there, it answers field by field what HTTP answers."""
    flat = rest.flat()
    over_http = rest("POST", "/api/jobs", flat).body
    rest("DELETE", f"/api/jobs/{over_http['id']}")
    created = on_command_line(rest, *options(flat))
    assert created.returncode == 0, created.stderr
    made = json.loads(created.stdout)
    assert timeless(made) == timeless(over_http) and made.keys() == over_http.keys()
    until(lambda: rest.job(made["id"])["last_check_at"])  # the service has taken it up
    shown = json.loads(on_command_line(rest, "job", "show", str(made["id"])).stdout)
    assert shown == rest.job(made["id"])


def same_refusal(rest: Rest, method: str, path: str, body: Any, args: list[str]) -> None:
    answer = rest(method, path, body)
    done = on_command_line(rest, *args)
    assert is_error(answer) and done.returncode == 1
    for line in answer.body["detail"].splitlines():
        field, colon, rest_of_it = line.partition(":")
        option = tecko.JOB_OPTIONS.get(field, (field,))[0]  # there, what was typed is named
        assert f"teckochecker: {option}{colon}{rest_of_it}\n" in done.stderr


@pytest.mark.parametrize(
    ("method", "path", "body", "command"),
    [
        ("POST", "/{id}/resume", None, "job resume {id}"),
        ("GET", "/987654", None, "job show 987654"),
        ("PUT", "/{id}", {"keboola_stack_url": "x"}, "job update {id} --keboola-stack x"),
    ],
)
def test_the_same_refusal(rest: Rest, method: str, path: str, body: Any, command: str) -> None:
    """The text that the command line writes is the detail that HTTP answers."""
    job_id = str(rest.create()["id"])
    args = command.replace("{id}", job_id).split()
    same_refusal(rest, method, "/api/jobs" + path.replace("{id}", job_id), body, args)


@pytest.mark.parametrize(
    ("flat", "option"),
    [
        ({"name": "taken"}, ("--name", "taken")),
        ({"openai_secret_id": ..., "openai_secret": "absent"}, ("--openai-secret", "absent")),
        ({"keboola_stack_url": "x", "keboola_component_id": ""}, ("--keboola-stack", "x")),
    ],
    ids=["a name that is taken", "a secret that is not there", "fields that are wrong"],
)
def test_the_same_refusal_of_a_new_job(
    rest: Rest, flat: dict[str, Any], option: tuple[str, str]
) -> None:
    """Word for word, with the names of the flat form."""
    rest("POST", "/api/jobs", rest.flat(name="taken"))
    body = rest.flat(**flat)
    given = {"batch_id": "batch_1", "name": body["name"]} | body
    args = [*options(given), *option]  # the last of two counts
    same_refusal(rest, "POST", "/api/jobs", body, args)
