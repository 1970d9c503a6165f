"""What ingests brought, from outside: /data, the commands, the figures, and runs beside others."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import http.client
import io
import json
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
import standins
from conftest import (
    JOB_YAML,
    MASTER_KEY,
    RunningProgram,
    World,
    clean_environment,
    program_environment,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_admin import Answer
from test_cli import Done, Told, run_many
from test_ingest_crash import opened, until
from test_rest import Rest, figures, open_rest, wrong_fields
from warm import Program

import teckochecker as tecko

COUNTS = [f"records_{name}" for name in tecko.COUNTED]


def table_of(count: int, first: int = 0, title: str = "title") -> str:
    """A CSV file."""
    rows = "".join(f"k{n},{title} {n},2024-01-15\n" for n in range(first, first + count))
    return "id,title,published_at\n" + rows


WITH_FAULTS = "id,title,published_at\na,one,2024-01-15\nb,two\n,three,2024-01-15\nc,four,never\n"


def query(folder: Path, sql: str) -> list[dict[str, Any]]:
    """Rows of the store in a folder, read from outside."""
    uri = f"file:{folder / 'teckochecker.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        db.row_factory = sqlite3.Row
        return [{**row} for row in db.execute(sql)]


# ── Over HTTP ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    """A service with two ingests that have run: `many`, and `few`, which met three bad records."""
    with open_rest(tmp_path_factory.mktemp("data")) as made:
        create(made, "many", table_of(120))
        create(made, "few", WITH_FAULTS)
        yield made


def block(rest: Rest, name: str, text: str) -> dict[str, Any]:
    (rest.folder / f"{name}.csv").write_text(text)
    return {"type": "csv", "path": f"{name}.csv"}


def post(rest: Rest, name: str, ingest: Mapping[str, Any]) -> Answer:
    body = {"name": name, "poll_interval_seconds": 3600, "ingest": ingest}
    return rest("POST", "/api/jobs", body)


def create(rest: Rest, name: str, text: str) -> int:
    """An ingest of a file with this text, when its first run has ended; its id."""
    answer = post(rest, name, block(rest, name, text))
    assert answer.status == 201, answer.body
    job_id = int(answer.body["id"])
    ended(rest, job_id, 1)
    return job_id


def ended(rest: Rest, job_id: int, runs: int) -> Any:
    """The last run of a job, when it has made so many."""

    def last() -> Any:
        made = rest.job(job_id)["runs"]
        return len(made) >= runs and made[0]["status"] != "in_progress" and made[0]

    return until(last, f"run {runs} of job {job_id}")


def run_again(rest: Rest, job_id: int, text: str | None = None) -> Any:
    """The next run of a job, of a file that was written anew before."""
    job = rest.job(job_id)
    if text is not None:
        block(rest, job["name"], text)
    assert rest("POST", f"/api/jobs/{job_id}/check").status == 202
    return ended(rest, job_id, len(job["runs"]) + 1)


def data(rest: Rest, path: str = "/data", **query: Any) -> Any:
    answer = rest("GET", f"{path}?{urlencode(query)}")
    assert answer.status == 200, answer.body
    return answer.body


def walk(rest: Rest, between: Callable[[], object] = lambda: None, **query: Any) -> list[str]:
    """The ids of all records, a page after the other; `between` happens after the first."""
    page = data(rest, **query)
    seen = [row["source_id"] for row in page["data"]]
    between()
    while page["next_after"] is not None:
        page = data(rest, **query, after=page["next_after"])
        assert page["data"]
        seen += [row["source_id"] for row in page["data"]]
    return seen


def test_a_page_of_records(rest: Rest) -> None:
    """The first ten, in the order they came, with all fields of the schema, and the figures of
    the answer itself."""
    answer = rest("GET", "/data?source=many")
    page = answer.body
    assert page["request_id"] == answer.headers["X-Request-ID"] != ""
    assert (page["total_count"], page["limit"], page["offset"]) == (120, 10, 0)
    assert isinstance(page["api_latency_ms"], float) and page["api_latency_ms"] > 0
    assert [row["source_id"] for row in page["data"]] == [f"k{n}" for n in range(10)]
    first = {name: value for name, value in page["data"][0].items() if value}
    assert first.pop("created_at") == first.pop("updated_at")
    at = "2024-01-15T00:00:00Z"
    assert first == {
        "source": "many", "source_id": "k0", "title": "title 0", "published_at": at
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("offset=-1", "offset"),
        ("offset=1.5", "offset"),
        ("after=-1", "after"),
        ("after=99999999999999999999", "after"),
        ("after=x", "after"),
        ("sources=many", "sources"),
        ("source=", "source"),
    ],
)
def test_bounds(rest: Rest, given: str, field: str) -> None:
    """What cannot be asked for is 422, and names the parameter."""
    for path in ("/data", "/api/data"):
        assert [*wrong_fields(rest("GET", f"{path}?{given}"))] == [field]


def test_an_offset_counts_from_after(rest: Rest) -> None:
    """Two ways to say where to begin go together."""
    ids = [row["source_id"] for row in data(rest, after=1, source="many")["data"]]
    assert [row["source_id"] for row in data(rest, offset=2, after=1, source="many")["data"]][
        :8
    ] == ids[2:]


def test_both_paths_and_the_largest_page(rest: Rest) -> None:
    """/api/data is /data; a hundred records are a page."""
    pages = [data(rest, path, limit=100) for path in ("/data", "/api/data")]
    assert pages[0]["data"] == pages[1]["data"] and len(pages[0]["data"]) == 100
    assert pages[0]["total_count"] == pages[1]["total_count"] >= 121


def test_offset(rest: Rest) -> None:
    """Skips records, of the source that is asked for; beyond the last there is nothing."""
    page = data(rest, source="many", limit=3, offset=118)
    assert [row["source_id"] for row in page["data"]] == ["k118", "k119"]
    assert (page["offset"], page["total_count"], page["next_after"]) == (118, 120, None)
    beyond = data(rest, source="many", offset=500)
    assert (beyond["data"], beyond["total_count"], beyond["next_after"]) == ([], 120, None)


@pytest.mark.parametrize("source", ["nobody", "many' OR '1'='1"])
def test_a_source_that_is_not_there(rest: Rest, source: str) -> None:
    """It has no records, and the count says so, too."""
    page = data(rest, source=source)
    assert (page["data"], page["total_count"], page["next_after"]) == ([], 0, None)


@pytest.mark.parametrize("limit", [7, 40, 100])  # 120 is a multiple of 40
def test_walking_with_after(rest: Rest, limit: int) -> None:
    """Every record comes once and in order, and the last page says that it is the last."""
    page = data(rest, source="many", limit=limit)
    seen = [row["source_id"] for row in page["data"]]
    while page["next_after"] is not None:
        page = data(rest, source="many", limit=limit, after=page["next_after"])
        seen += [row["source_id"] for row in page["data"]]
        assert page["total_count"] == 120 and page["data"]
    assert seen == [f"k{n}" for n in range(120)]


def test_walking_while_records_come_and_change(rest: Rest) -> None:
    """Between two pages a run adds records, on top of the file and beneath, and changes some: each
    comes once all the same, the new ones too."""
    job_id = create(rest, "moving", table_of(30))
    grown = table_of(20, first=100) + table_of(30, title="other").partition("\n")[2]
    seen = walk(rest, lambda: run_again(rest, job_id, grown), source="moving", limit=8)
    assert seen == [f"k{n}" for n in (*range(30), *range(100, 120))]
    assert data(rest, source="moving")["data"][0]["title"] == "other 0"


def test_total_count_after_runs_and_deletes(rest: Rest) -> None:
    """New records are counted, changed and vanished ones not; a deleted job's count no more, and
    the same records count again when they come again."""
    others = data(rest)["total_count"]

    def totals() -> tuple[int, int]:
        return data(rest, source="counted")["total_count"], data(rest)["total_count"] - others

    job_id = create(rest, "counted", table_of(12))
    assert totals() == (12, 12)
    run = run_again(rest, job_id, table_of(3, title="other") + table_of(5, 50).partition("\n")[2])
    assert [run[name] for name in COUNTS] == [8, 5, 3, 0, 0] and totals() == (17, 17)
    assert rest("DELETE", f"/api/jobs/{job_id}").status == 200
    assert totals() == (0, 0)
    create(rest, "counted", table_of(2))
    assert totals() == (2, 2)


@pytest.mark.parametrize(
    "asked", ["", "?after=5", "?source=many", "?source=many&after=5", "?source=many&offset=20"]
)
def test_data_is_found_by_key(rest: Rest, asked: str) -> None:
    """SQLite searches for all that /data answers: it scans no table and sorts nothing."""
    reader = rest.made.service.store._reader
    assert isinstance(reader, tecko.Sqlite) and reader._db is not None
    database = reader._db
    seen: list[str] = []
    rest.made.on_loop(database.set_trace_callback(seen.append))
    assert rest("GET", f"/data{asked}").status == 200
    rest.made.on_loop(database.set_trace_callback(lambda sql: None))
    reads = [sql for sql in seen if "normalized_data" in sql or "etl_checkpoint" in sql]
    assert len(reads) == 2
    plans = [
        row["detail"] for sql in reads for row in query(rest.folder, f"EXPLAIN QUERY PLAN {sql}")
    ]
    assert plans and all(plan.startswith("SEARCH") for plan in plans), plans


# ── Jobs over HTTP ────────────────────────────────────────────────────────────────────────────


def test_an_ingest_in_the_answers(rest: Rest) -> None:
    """A job shows its definition, totals, runs and rejects, and nothing of a batch."""
    few = next(job for job in rest("GET", "/api/jobs").body["jobs"] if job["name"] == "few")
    assert few["ingest"] == {"type": "csv", "path": "few.csv"}
    assert (few["batch_ids"], few["batch_count"], few["openai_secret"]) == ([], 0, None)
    job = rest.job(few["id"])
    assert job["totals"] == {"records": 1} | dict(zip(COUNTS, [4, 1, 0, 0, 3], strict=True))
    [run] = job["runs"]
    assert (run["status"], run["records_failed"], run["error_message"]) == ("success", 3, None)
    assert "3 of 4 records were rejected in the run of" in job["last_error"]
    found = {row["place"]: row["reason"] for row in job["rejects"]}
    assert [*found] == [f"few.csv line {n}" for n in (5, 4, 3)]  # newest first
    assert "2 fields" in found["few.csv line 3"] and "no id" in found["few.csv line 4"]
    assert "never" in found["few.csv line 5"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hosts",
        "/etc/hosts.csv",
        "../outside.csv",
        "sub/../../outside.csv",
        "link.csv",
        "linked/outside.csv",
        "jobs.yaml",
        ".env",
        "teckochecker.key",
        "teckochecker.db",
        "*",
        "sub/*",
        "many.csv/../.env",
        "~/x.csv",
    ],
)
def test_paths_that_http_may_not_read(rest: Rest, path: str) -> None:
    """Only data files beneath the folder of jobs.yaml: who may call must not read any others."""
    outside = rest.folder.parent / "outside.csv"
    outside.write_text(table_of(1))
    for name, target in {"link.csv": outside, "linked": outside.parent}.items():
        with contextlib.suppress(FileExistsError):
            (rest.folder / name).symlink_to(target)
    answer = post(rest, "reader", {"type": "csv", "path": path})
    if path == "~/x.csv":  # a folder of that name, and not a home
        assert rest("DELETE", f"/api/jobs/{answer.body['id']}").status == 200
    else:
        assert [*wrong_fields(answer)] == ["ingest.path"]


def test_a_file_with_a_secret_is_no_data_file(tmp_path: Path) -> None:
    """Whatever it is called: a secret's own file and the master key's are never read as records."""
    (tmp_path / "jobs.yaml").write_text("secrets: {a: {type: api, file: token.txt}}")
    config = tecko.load_config(tmp_path / "jobs.yaml", {"SECRET_KEY_FILE": "key.txt"})
    allowed = [tecko.may_be_read(tmp_path / f"{n}.txt", config) for n in ("token", "key", "notes")]
    assert allowed == [False, False, True]


def test_a_glob_finds_no_way_out(rest: Rest) -> None:
    """A link that leads out of the folder is no data file of it, however its name is found."""
    outside = rest.folder.parent / "secret.csv"
    outside.write_text(table_of(3))
    (rest.folder / "out1.csv").symlink_to(outside)
    answer = post(rest, "globber", {"type": "csv", "path": "out?.csv"})
    if answer.status == 201:
        ended(rest, answer.body["id"], 1)
    assert data(rest, source="globber")["total_count"] == 0


def test_an_interval_can_be_changed(rest: Rest) -> None:
    """PUT changes poll_interval_seconds of an ingest, which keeps its records."""
    job_id = create(rest, "slower", table_of(2))
    answer = rest("PUT", f"/api/jobs/{job_id}", {"poll_interval_seconds": 1800})
    assert (answer.status, answer.body["poll_interval_seconds"]) == (200, 1800)
    assert answer.body["ingest"] == {"type": "csv", "path": "slower.csv"}
    assert data(rest, source="slower")["total_count"] == 2


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"name": "renamed"}, 409),
        ({"keboola_component_id": "comp"}, 422),
        ({"keboola_secret": 1}, 422),
        ({"keboola_stack_url": "https://connection.keboola.com"}, 422),
        ({"poll_interval_seconds": 0}, 422),
        ({"ingest": {"type": "csv", "path": "few.csv"}}, 422),
    ],
)
def test_what_cannot_be_changed(rest: Rest, changes: dict[str, Any], status: int) -> None:
    """An ingest keeps its name, under which records stand, and has nothing of Keboola's."""
    listed = rest("GET", "/api/jobs").body["jobs"]
    job_id = next(job["id"] for job in listed if job["name"] == "many")
    before = rest.job(job_id)
    answer = rest("PUT", f"/api/jobs/{job_id}", changes)
    assert answer.status == status, answer.body
    assert status == 409 or [*wrong_fields(answer)] == [*changes]
    assert rest.job(job_id)["ingest"] == before["ingest"] and rest.job(job_id)["name"] == "many"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ingest": {"type": "xml", "path": "x.csv"}}, "ingest.type"),
        ({"ingest": {"type": "csv"}}, "ingest.path"),
        ({"ingest": {"type": "csv", "path": "many.csv", "delimeter": ";"}}, "ingest.delimeter"),
        ({"ingest": {"type": "api", "url": "ftp://x/y"}}, "ingest.url"),
        ({"ingest": {"type": "csv", "path": "many.csv"}, "watch": {}}, "watch"),
        ({"ingest": {"type": "csv", "path": "many.csv"}, "batch_id": "batch_1"}, "batch_id"),
    ],
)
def test_fields_of_an_ingest(rest: Rest, changes: dict[str, Any], field: str) -> None:
    """A wrong definition is 422 and names the field."""
    answer = rest("POST", "/api/jobs", {"name": "wrong", "poll_interval": "1h"} | changes)
    assert field in wrong_fields(answer)


# ── Figures ───────────────────────────────────────────────────────────────────────────────────


def test_figures_before_during_and_after_runs(tmp_path: Path) -> None:
    """/stats, /health and /metrics of no run, of one under way, and of a failed one."""
    with open_rest(tmp_path) as rest, standins.Source() as source:
        source.records = [{"id": n} for n in range(5)]
        stats, health = rest("GET", "/stats").body, rest("GET", "/health").body
        assert (stats["last_run_id"], stats["runs"], stats["total_records"]) == (None, [], 0)
        assert (health["etl_last_run"], health["etl_status"]) == (None, None)
        gate = source.gate("GET /items", after_acting=False)
        api = post(rest, "api", {"type": "api", "url": source.items_url}).body["id"]
        gate.reached()
        assert rest("GET", "/health").body["etl_status"] == "in_progress"
        gate.release()
        good = ended(rest, api, 1)
        assert_stats(rest, good, [5, 5, 0, 0], failed=False)
        broken = create(rest, "broken", "name\nwithout an id\n")
        bad = ended(rest, broken, 1)
        assert (bad["status"], bad["records_processed"]) == ("failed", 0)
        assert "no column 'id'" in bad["error_message"]
        assert bad["error_message"] in rest.job(broken)["last_error"]
        assert_stats(rest, bad, [5, 5, 0, 0], failed=True)
        health = rest("GET", "/health").body
        assert (health["etl_last_run"], health["etl_status"]) == (bad["start_time"], "failed")
        shown = figures(rest.made)
        assert shown['teckochecker_ingest_runs_total{outcome="success"}'] == 1
        assert shown['teckochecker_ingest_runs_total{outcome="failed"}'] == 1
        assert shown['teckochecker_records_total{became="inserted"}'] == 5


def assert_stats(rest: Rest, last: Any, totals: list[int], *, failed: bool) -> None:
    stats = rest("GET", "/stats").body
    names = ("processed", "inserted", "updated", "failed")
    assert [stats[f"total_records_{name}"] for name in names] == totals
    assert stats["runs"][0] == last and stats["last_run_id"] == last["run_id"]
    assert stats["last_run_status"] == last["status"]
    assert stats["last_run_timestamp"] == last["start_time"]
    assert (stats["last_failure_timestamp"] is not None) == failed


@pytest.mark.parametrize(
    ("env", "left"),
    [
        ({"LOG_RETENTION_DAYS": "2"}, range(201, 251)),
        ({"LOG_RETENTION_ROWS": "100"}, range(151, 251)),
    ],
)
def test_old_runs_and_rejects_are_pruned(tmp_path: Path, env: dict[str, str], left: range) -> None:
    """Those past their days, and those beyond the newest so many, go in the background."""
    asyncio.run(tecko.Store(tmp_path / "teckochecker.db").touch())
    day, now = 86400, time.time()
    ages = [(n, now - (3 * day if n <= 200 else day)) for n in range(1, 251)]
    with contextlib.closing(sqlite3.connect(tmp_path / "teckochecker.db")) as db, db:
        db.executemany(
            "INSERT INTO etl_run (id, run_id, source, status, start_time)"
            " VALUES (?1, ?1, 's', 'success', ?2)",
            ages,
        )
        db.executemany(
            "INSERT INTO etl_reject (id, source, place, reason, record, digest, run_id, created_at)"
            " VALUES (?1, 's', ?1, '', '', '', 1, ?2)",
            ages,
        )
    with open_rest(tmp_path, **env):
        for table in ("etl_run", "etl_reject"):
            sql = f"SELECT id FROM {table} ORDER BY id"
            until(partial(ids_are, tmp_path, sql, [*left]), table)


def ids_are(folder: Path, sql: str, wanted: list[int]) -> bool:
    return [row["id"] for row in query(folder, sql)] == wanted


# ── Counts that are kept ──────────────────────────────────────────────────────────────────────

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("ab"), st.integers(0, 6)),
        st.tuples(st.sampled_from(["run", "cut", "delete"]), st.sampled_from("ab"), st.just(0)),
    ),
    min_size=3,
    max_size=12,
)


async def operate(world: World, what: str, name: str, number: int) -> None:
    """Write a file, run its ingest (whole, or until its first chunk), or delete it."""
    if what == "write":
        text = table_of(number, first=number % 3, title=f"{number}")
        (world.config.base / f"{name}.csv").write_text(text + "ragged\n")
        return
    jobs = {job.name: job.id for job in await world.store.jobs()}
    job_id = jobs.get(name) or await world.ingest(name, type="csv", path=f"{name}.csv")
    if what == "delete":
        await world.store.delete_job(job_id, 0.0)
        return
    world.steps.stopping = what == "cut"
    await world.run(job_id)


@settings(max_examples=15, deadline=None)
@given(operations=OPERATIONS)
async def test_totals_are_those_of_a_count(operations: list[tuple[str, str, int]]) -> None:
    """Whatever was done, the kept counts are those that counting rows gives."""
    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder)) as world:
            for operation in operations:
                await operate(world, *operation)
                sql = "SELECT count(*) AS n FROM normalized_data"
                for name in ("a", "b"):
                    [row] = query(Path(folder), f"{sql} WHERE source = '{name}'")
                    assert (await world.store.totals(name))["records"] == row["n"]
                [row] = query(Path(folder), sql)
                assert (await world.store.totals())["records"] == row["n"]


async def test_a_delete_that_was_cut_off(world: World, tmp_path: Path) -> None:
    """Half of the records are gone, then the program is: the count is of those that are there, and
    the job, resumed, brings back the rest."""
    (tmp_path / "a.csv").write_text(table_of(tecko.DELETE_ROWS + 500))
    job_id = await world.ingest("a", type="csv", path="a.csv")
    await world.run(job_id)
    sql = "SELECT count(*) AS n FROM normalized_data"
    deleting = asyncio.create_task(world.store.delete_job(job_id, 0.0))

    def between_transactions(_: float) -> None:
        if query(tmp_path, sql)[0]["n"] == 500:
            deleting.cancel()

    world.store.on_write = between_transactions
    with contextlib.suppress(asyncio.CancelledError):
        await deleting
    left = query(tmp_path, sql)[0]["n"]
    assert 0 < left < tecko.DELETE_ROWS and (await world.store.totals())["records"] == left
    await world.store.resume_job(job_id, 0.0)
    await world.run(job_id)
    wanted = query(tmp_path, sql)[0]["n"]
    assert wanted == tecko.DELETE_ROWS + 500
    assert [(await world.store.totals(name))["records"] for name in ("a", "")] == [wanted] * 2


async def test_deleting_an_ingest_deletes_all_of_it(world: World, tmp_path: Path) -> None:
    """Records, raw rows, rejects and checkpoint of this one, and of no other; its runs stay."""
    (tmp_path / "a.csv").write_text(WITH_FAULTS)
    for name in ("kept", "gone"):
        await world.run(await world.ingest(name, type="csv", path="a.csv"))
    await world.store.delete_job((await world.store.find_job("gone")).id, 0.0)
    for table in "normalized_data raw_data_csv etl_reject etl_part".split():
        assert {row["source"] for row in query(tmp_path, f"SELECT source FROM {table}")} == {"kept"}
    found = query(tmp_path, "SELECT source FROM etl_checkpoint")
    assert {row["source"] for row in found} == {"kept", ""}
    [run] = query(tmp_path, "SELECT * FROM etl_run WHERE source = 'gone'")
    assert (run["job_id"], run["status"]) == (None, "success")
    assert await world.store.runs("gone", 5) == []  # none that a new job of that name has made


# ── On the command line ───────────────────────────────────────────────────────────────────────

CLI_YAML = """\
admin: {{port: 0}}
secrets:
  openai:  {{type: openai,  env: TEST_OPENAI_KEY}}
  keboola: {{type: keboola, env: TEST_KEBOOLA_TOKEN}}
jobs:
  - {{name: products, ingest: {{type: csv, path: products.csv}}}}
  - {{name: broken, ingest: {{type: csv, path: nothing.csv}}}}
  - {{name: paused, ingest: {{type: csv, path: products.csv}}}}
  - name: batches
    watch: {{secret: openai, batch_ids: [batch_1]}}
    trigger:
      {{secret: keboola, stack_url: "{stack}", component_id: comp, configuration_id: cfg}}
"""
COMMANDS = [
    "check products",
    "job pause paused",
    "job run products",
    "--json job run 1",
    "job run broken",
    "--json job run broken",
    "job run batches",
    "job run paused",
    "job run nobody",
    "data list",
    "data list --limit 1",
    "--json data list",
    "--json data list --source products --limit 1",
    "data list --csv --source products",
    "--json data list --source nobody",
    "data rejects",
    "--json data rejects --source products --limit 1",
    "--json data rejects --source nobody",
    "job show products",
    "--json job show products",
    "explain products",
    "explain broken",
    "--json status",
]


AGAIN = "id,title,no date\n" + table_of(2).partition("\n")[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Done]:
    """How each of the commands ended, one after the other, without a service; products.csv is
    edited and grows between `check` and `job run`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "jobs.yaml").write_text(CLI_YAML.format(stack="http://127.0.0.1:1"))
    (folder / "products.csv").write_text(WITH_FAULTS)
    env = {"SECRET_KEY": MASTER_KEY, "TEST_OPENAI_KEY": standins.OPENAI_KEY}
    env |= {"TEST_KEBOOLA_TOKEN": standins.KEBOOLA_TOKEN}
    first = run_many(folder, COMMANDS[:1], env)
    (folder / "products.csv").write_text(WITH_FAULTS.replace("one", "first") + AGAIN)
    rest = run_many(folder, COMMANDS[1:], env)
    return dict(zip(COMMANDS, first + rest, strict=True))


def test_check_runs_an_ingest(told: Mapping[str, Done]) -> None:
    """A round by hand says what became of the records."""
    done = told["check products"]
    assert done.code == 0 and "4 processed, 1 inserted" in done.out


def test_job_run(told: Mapping[str, Done]) -> None:
    """One run, what became of the records, and where to look for those that were rejected."""
    done = told["job run products"]
    counts = "7 processed, 2 inserted, 1 updated, 0 unchanged, 4 failed"
    assert (done.code, done.out) == (0, f"products: success: {counts}\n")
    assert "data rejects" in done.err


def test_job_run_as_json(told: Mapping[str, Done]) -> None:
    """The run as etl_run has it; of an unchanged file, nothing is processed."""
    run = told["--json job run 1"].document
    assert (run["source"], run["status"], run["error_message"]) == ("products", "success", None)
    assert [run[name] for name in COUNTS] == [0] * 5
    assert run["start_time"] <= run["end_time"] and run["start_time"].endswith("Z")


@pytest.mark.parametrize("line", ["job run broken", "--json job run broken"])
def test_a_failed_run_is_exit_code_1(told: Mapping[str, Done], line: str) -> None:
    """It says why on stderr, and how the run ended on stdout."""
    done = told[line]
    assert done.code == 1
    assert "teckochecker: broken: there is no file nothing.csv" in done.err.splitlines()
    if line.startswith("--json"):
        run = json.loads(done.out)
        assert run["status"] == "failed" and "nothing.csv" in run["error_message"]
    else:
        assert done.out.startswith("broken: failed: 0 processed")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("job run batches", "job 'batches' watches batches"),
        ("job run paused", "Cannot run job 'paused': it is paused"),
        ("job run nobody", "Job with name 'nobody' not found"),
    ],
)
def test_what_cannot_be_run(told: Mapping[str, Done], line: str, words: str) -> None:
    """One line says why."""
    told[line].refused(words)


def test_data_list(told: Mapping[str, Done]) -> None:
    """A table, and how many more there are."""
    done = told["data list"]
    assert done.code == 0 and all(word in done.out for word in ("first", "k0", "title 1", "2024"))
    assert "1 of 3" not in done.out and "1 of 3" in told["data list --limit 1"].out


def test_data_list_as_json(told: Mapping[str, Done]) -> None:
    """One array of records in the unified schema, in the order they came."""
    found = told["--json data list"].document
    assert [row["source_id"] for row in found] == ["a", "k0", "k1"]
    assert found[0].keys() == tecko.StoredRecord.model_fields.keys()
    assert found[0]["updated_at"] >= found[0]["created_at"]
    assert told["--json data list --source products --limit 1"].document == found[:1]
    assert told["--json data list --source nobody"].document == []


def test_data_list_as_csv(told: Mapping[str, Done]) -> None:
    """The same as CSV, which reads back."""
    done = told["data list --csv --source products"]
    rows = [*csv.DictReader(io.StringIO(done.out))]
    assert [(row["source_id"], row["title"], row["metadata"]) for row in rows] == [
        ("a", "first", "{}"),
        ("k0", "title 0", "{}"),
        ("k1", "title 1", "{}"),
    ]


def test_data_rejects(told: Mapping[str, Done]) -> None:
    """Each with its place, the reason and the record; kept once, though it was met twice."""
    done = told["data rejects"]
    assert done.code == 0 and done.out.count("products.csv line 3") == 1
    assert "b,two" in done.out and "no id" in done.out
    [last] = told["--json data rejects --source products --limit 1"].document
    assert (last["source"], last["place"]) == ("products", "products.csv line 6")
    assert "published_at" in last["reason"] and '"id":"id"' in last["record"]
    assert told["--json data rejects --source nobody"].document == []


def test_show_and_explain(told: Mapping[str, Done]) -> None:
    """Totals, runs and rejects; in sentences, what it brought and why it failed."""
    shown, job = told["job show products"].out, told["--json job show products"].document
    assert "products.csv line 3" in shown and "success" in shown and "Batch" not in shown
    assert [run["records_processed"] for run in job["runs"]] == [0, 7, 4]
    assert job["totals"] == {"records": 3} | dict(zip(COUNTS, [11, 3, 1, 0, 7], strict=True))
    said = told["explain products"].out
    assert "products.csv" in said and "3 records" in said and "success" in said
    failed = told["explain broken"].out
    assert "failed" in failed and "there is no file nothing.csv" in failed


def test_status_counts_ingests(told: Mapping[str, Done]) -> None:
    """They are jobs as others are, and due like those."""
    status = told["--json status"].document
    assert status["jobs"] == {"active": 3, "paused": 1}
    assert {due["job"] for due in status["due_next"]} == {"products", "broken"}


def test_job_delete_deletes_records(tmp_path: Path) -> None:
    """A job that has left jobs.yaml keeps its records until it is deleted."""
    job = "{name: gone, ingest: {type: csv, path: products.csv}}"
    (tmp_path / "jobs.yaml").write_text(f"jobs: [{job}]\n")
    (tmp_path / "empty.yaml").write_text("jobs: []\n")
    (tmp_path / "products.csv").write_text(table_of(3))
    lines = ["job run gone", "job delete gone --force", "-c empty.yaml check"]
    lines += ["--json data list", "job delete gone --force", "--json data list"]
    done = run_many(tmp_path, lines, {"SECRET_KEY": MASTER_KEY})
    done[1].refused("it is in jobs.yaml")
    assert (len(done[3].document), done[4].code, done[5].document) == (3, 0, [])


# ── Beside a service ──────────────────────────────────────────────────────────────────────────

TOKEN = "a-token-for-tests-0123456789"
BATCHES = 10  # jobs that watch one each, once a second
BIG = 100_000  # rows
SLOW = BATCHES + 1  # the id of the job `slow`


@dataclass
class Live:
    """A running service with a token, an API that tests hold up, a file, and batches to watch."""

    folder: Path
    source: standins.Source
    openai: standins.OpenAI
    env: Mapping[str, str]
    program: RunningProgram

    def last(self, name: str) -> dict[str, Any]:
        """The last run of a job; {} before the first."""
        sql = f"SELECT * FROM etl_run WHERE source = '{name}' ORDER BY id DESC LIMIT 1"
        return next(iter(query(self.folder, sql)), {})

    def ended(self, name: str, after: int = 0) -> dict[str, Any]:
        def run() -> dict[str, Any] | None:
            last = self.last(name)
            over = last.get("id", 0) > after and last["status"] != "in_progress"
            return last if over else None

        found: dict[str, Any] = until(run, f"a run of {name}")
        return found

    def begin(self, *args: str) -> subprocess.Popen[str]:
        return Program(
            *args,
            cwd=self.folder,
            env=clean_environment(self.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def cli(self, *lines: Told | str) -> list[Done]:
        return run_many(self.folder, lines, self.env)

    def post(self, path: str) -> int:
        """POST to the service as one who has the token; the status of the answer."""
        host = self.program.url.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as client:
            client.request("POST", path, headers={"Authorization": f"Bearer {TOKEN}"})
            return client.getresponse().status

    def gate_on_page(self, number: int) -> Callable[[], standins.Gate]:
        """Hold up the request that follows the answer with this page; the gate, once there is a
        request that stands at it."""
        gates: list[standins.Gate] = []
        self.source.after_page(
            number, lambda: gates.append(self.source.gate("GET /items", after_acting=False))
        )

        def reached() -> standins.Gate:
            until(lambda: gates, f"page {number}")
            gates[0].reached()
            return gates[0]

        return reached

    def asked(self) -> int:
        """How often OpenAI was asked for batches, whether singly or by the page."""
        return self.openai.count("GET /v1/batches*")

    def checked(self) -> list[float]:
        """When each job that watches a batch was last checked, as the store has it."""
        sql = "SELECT last_check_at FROM polling_jobs WHERE watch_secret <> '' ORDER BY id"
        return [row["last_check_at"] or 0.0 for row in query(self.folder, sql)]


@contextlib.contextmanager
def live_in(folder: Path) -> Iterator[Live]:
    with standins.Source() as source, standins.OpenAI() as openai, standins.Keboola() as keboola:
        source.style, source.page_size = "link", 5
        source.records = [{"id": n} for n in range(22)]
        api = f'{{type: api, url: "{source.items_url}"}}'
        text = JOB_YAML.format(stack=keboola.url)
        head, batch = text.partition("jobs:\n")[0] + "jobs:\n", text.partition("jobs:\n")[2]
        for n in range(BATCHES):
            openai.batch(f"batch_{n}")
            one = batch.replace("batch_1", f"batch_{n}")
            head += one.replace("name: job", f"name: job{n}")
        head += f"  - {{name: slow, poll_interval: 1h, ingest: {api}}}\n"
        head += "  - {name: big, poll_interval: 1h, ingest: {type: csv, path: big.csv}}\n"
        (folder / "jobs.yaml").write_text(head)
        (folder / "big.csv").write_text(table_of(0))
        env = program_environment(openai, ADMIN_TOKEN=TOKEN, SECRET_KEY=MASTER_KEY)
        with RunningProgram(folder, env) as program:
            made = Live(folder, source, openai, env, program)
            for name in ("slow", "big"):
                assert made.ended(name)["status"] == "success"
            yield made
            source.release_all()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_in(tmp_path_factory.mktemp("live")) as made:
        yield made


class Big(NamedTuple):
    """A large run as the service made it, and what went on meanwhile."""

    told: Any  # by `job run`
    run: dict[str, Any]
    asked: int  # requests to OpenAI between its begin and its end
    checked: list[float]  # when each watching job was last checked


def run_big(live: Live) -> Big:
    (live.folder / "big.csv").write_text(table_of(BIG))
    before = live.last("big")["id"]
    running = live.begin("--json", "job", "run", "big")
    until(lambda: live.last("big")["id"] > before, "its begin")
    asked = live.asked()
    run = live.ended("big", before)
    asked = live.asked() - asked
    until(lambda: min(live.checked()) > run["start_time"], "its last checks, noted a second later")
    checked = live.checked()
    out, err = running.communicate(timeout=10)
    assert running.returncode == 0, err
    return Big(json.loads(out), run, asked, checked)


@pytest.fixture(scope="module", autouse=True)
def big(request: pytest.FixtureRequest) -> Iterator[Future[Big] | None]:
    """The large run, begun before all tests of this file: it goes on beside the first of them."""
    if not any("large_ingest" in item.name for item in request.session.items):
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_big, request.getfixturevalue("live"))


def test_batches_are_polled_beside_a_large_ingest(big: Future[Big]) -> None:
    """`job run` has the service do it; between its begin and its end OpenAI is asked for batches
    again and again, and every job is checked."""
    told, run, asked, checked = big.result()
    assert (run["status"], run["records_inserted"]) == ("success", BIG)
    assert told["run_id"] == run["run_id"]
    seconds = int(run["end_time"] - run["start_time"])  # each should have brought a check
    assert asked >= max(1, seconds - 1)
    assert len(checked) == BATCHES


def test_a_second_run_is_refused(live: Live) -> None:
    """While one goes on there is no other, whether the command line asks or HTTP; the first comes
    to its good end, and nothing is there twice."""
    gate = live.gate_on_page(2)
    first = live.begin("job", "run", "slow")
    held = gate()
    second, stranger = live.cli("job run slow", Told("job run slow", {"ADMIN_TOKEN": ""}))
    assert live.post(f"/api/jobs/{SLOW}/check") == 409
    second.refused("409", "Cannot run job 'slow': a run of it goes on already")
    stranger.refused("401")
    held.release()
    out, err = first.communicate(timeout=10)
    assert first.returncode == 0, err
    assert out.startswith("slow: success: 22 processed, 0 inserted, 0 updated, 22 unchanged")


def test_pause_stops_a_run(live: Live) -> None:
    """In the middle of a run: it writes nothing more and says so; resumed, the next is whole."""
    gate = live.gate_on_page(2)
    running = live.begin("job", "run", "slow")
    held = gate()
    assert live.post(f"/api/jobs/{SLOW}/pause") == 200
    count = live.last("slow")["records_processed"]
    held.release()
    out, err = running.communicate(timeout=10)
    assert running.returncode == 1 and "slow: interrupted" in out, err
    assert "the job was paused, changed or removed while it ran" in err
    run = live.last("slow")
    assert (run["status"], run["records_processed"]) == ("interrupted", count)
    assert live.post(f"/api/jobs/{SLOW}/resume") == 200
    assert live.ended("slow", run["id"])["records_processed"] == 22


def test_sigterm_in_the_middle_of_a_run(live: Live) -> None:
    """The run ends with the chunk under way as `interrupted`, the service with exit code 0, and
    the next one goes on."""
    live.source.records = [{"id": n, "title": "other"} for n in range(22)]
    gate = live.gate_on_page(2)
    running = live.begin("job", "run", "slow")
    held = gate()
    live.program.process.send_signal(signal.SIGTERM)
    until(lambda: "INFO     stopping" in live.program.text(), "the beginning of its end")
    held.release()
    assert live.program.process.wait(10) == 0 and "Traceback" not in live.program.text()
    assert running.communicate(timeout=10)[0].startswith("slow: interrupted")
    run = live.last("slow")
    assert (run["status"], run["records_updated"]) == ("interrupted", 15)
    with RunningProgram(live.folder, live.env):
        last = live.ended("slow", run["id"])
    assert (last["status"], last["records_processed"], last["records_updated"]) == (
        "success",
        22,
        7,
    )


def test_a_service_that_is_killed_leaves_nobody_waiting(live: Live) -> None:
    """`job run` follows the service's run; when that is gone, it says so and ends with 1."""
    live.program.kill()
    before = live.last("slow")["id"]
    with RunningProgram(live.folder, live.env) as program:
        after = live.ended("slow", before)["id"]
        gate = live.gate_on_page(2)
        running = live.begin("job", "run", "slow")
        gate()
        assert live.last("slow")["id"] > after
        program.kill()
    live.source.release_all()
    try:
        _, err = running.communicate(timeout=10)
    finally:
        running.kill()
    assert running.returncode == 1 and "teckochecker: " in err


def test_ctrl_c_on_a_run_of_its_own(live: Live) -> None:
    """Without a service, Ctrl-C ends `job run` with 130 and no traceback; the next run is whole,
    and the cut one `interrupted`."""
    live.program.kill()
    gate = live.gate_on_page(3)
    running = live.begin("job", "run", "slow")
    gate()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    live.source.release_all()
    assert running.returncode == 130 and "Traceback" not in err and "never retrieved" not in err
    assert live.cli("job run slow")[0].out.startswith("slow: success: 22 processed")
    sql = "SELECT status FROM etl_run WHERE source = 'slow' ORDER BY id DESC LIMIT 2"
    assert [row["status"] for row in query(live.folder, sql)] == ["success", "interrupted"]
