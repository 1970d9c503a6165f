"""Operations and what stands around them: explain, schema, completion, audit, upkeep."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import standins
from conftest import (
    JOB_YAML,
    PROGRAM,
    RunningProgram,
    World,
    clean_environment,
    dump,
    execute,
    flat_job,
    make_world,
    program_environment,
    run_program,
)

import teckochecker as tecko

EXAMPLE = PROGRAM.parent / "jobs.yaml.example"
STACK = "https://connection.keboola.com"


def spec(**changed: Any) -> tecko.JobSpec:
    return tecko.parse(tecko.FlatJob, flat_job(**changed), {"bounds": (1, 3600)}).to_spec()


# explain

NOW = 1_800_000_000.0


def a_job(status: str = "active", **changed: Any) -> tecko.Job:
    """A job that was checked 30 s ago and is due in 90 s."""
    known: dict[str, Any] = {f.name: None for f in fields(tecko.Job)}
    known |= {"id": 1, "name": "night", "origin": "file", "round": 1, "secret": "openai"}
    known |= {"interval": 120}
    known |= {"batches": [*SAYS_UNSEEN]}
    known |= {"text": spec().model_dump_json()}
    known |= {"last_check_at": NOW - 30, "next_check_at": NOW + 90, "created_at": NOW - 7200}
    return tecko.Job(**(known | {"status": status} | changed))


def a_batch(number: int, status: str, done: int = 0, **changed: Any) -> tecko.Batch:
    seen: dict[str, Any] = {
        "requests_total": 8,
        "requests_completed": done,
        "output_file_id": "f" * bool(done),
    }
    return tecko.Batch(**({"batch_id": f"batch_{number}", "status": status} | seen | changed))


def a_trigger(state: str, **changed: Any) -> tecko.Trigger:
    known: dict[str, Any] = {f.name: None for f in fields(tecko.Trigger)}
    known |= {"id": "f00d", "state": state, "created_at": NOW - 600, "searches": 2, "body": "{}"}
    known |= {"keboola_job_id": "77", "keboola_status": "processing", "message": "no such config"}
    return tecko.Trigger(**(known | changed))


SAYS_UNSEEN = (a_batch(1, ""), a_batch(2, ""))
DONE = (a_batch(1, "completed", 8), a_batch(2, "completed", 7, requests_failed=1))
GOING = (a_batch(1, "completed", 8), a_batch(2, "in_progress", 3))


def told(job: tecko.Job, trigger: tecko.Trigger | None = None) -> list[str]:
    """What explain says of a job as stored."""
    fields_ = tecko.job_fields(job, {})
    rest: dict[str, Any] = {"triggers": [], "logs": None, "totals": None, "runs": [], "rejects": []}
    detail = tecko.JobDetail(**fields_, **rest)
    detail.recent = tecko.recent_of(detail, 0, 0, [])
    detail.recent.trigger = trigger
    return [*tecko.explain(detail, NOW)]


GOAL = "It starts a Keboola job once each batch has completed."
SEEN = [
    GOAL,
    "It was last checked 30 s ago.",
    "  batch_1 completed: 8 of 8 requests succeeded",
    "  batch_2 completed: 7 of 8 requests succeeded",
]
WAITING = [*SEEN[:3], "  batch_2 in_progress, 3 of 8 requests done"]
FIRED = "It last fired 10 min ago, as trigger f00d: "
EXPLAINED: dict[str, tuple[tecko.Job, tuple[tecko.Batch, ...], tecko.Trigger | None, list[str]]] = {
    "waiting": (
        a_job(),
        GOING,
        None,
        [
            "Job 'night' is active: 11/16; waits for batch_2.",
            *WAITING,
            "Its next check is in 90 s, every 120 s, while the service runs.",
        ],
    ),
    "any end, never checked": (
        a_job(
            text=spec(trigger_when="all_finished", poll_interval_seconds=300).model_dump_json(),
            last_check_at=None,
            next_check_at=None,
            interval=300,
        ),
        SAYS_UNSEEN,
        None,
        [
            "Job 'night' is active: 0/16; waits for 2 batches.",
            GOAL.replace("completed", "ended, well or not"),
            "It has not been checked yet.",
            "Its next check is now, every 300 s, while the service runs.",
        ],
    ),
    "paused": (
        a_job("paused"),
        GOING,
        None,
        ["Job 'night' is paused: 11/16; waits for job resume.", *WAITING],
    ),
    "pending": (
        a_job("triggering", last_error="Keboola answers 429."),
        DONE,
        a_trigger("pending", keboola_job_id=None, keboola_status=None, message="429."),
        [
            "Job 'night' is triggering: 16/16; Keboola answers 429.",
            *SEEN,
            f"{FIRED}it has not reached Keboola yet (429).",
        ],
    ),
    "running": (
        a_job("triggered"),
        DONE,
        a_trigger("running", message=None),
        [
            "Job 'night' is triggered: 16/16; waits for its Keboola job to end.",
            *SEEN,
            f"{FIRED}its Keboola job runs (77, processing).",
        ],
    ),
    "never fired": (
        a_job("failed", last_error="batch_2 expired: 0 of 8 requests succeeded"),
        (DONE[0], a_batch(2, "expired")),
        None,
        [
            "Job 'night' is failed: 8/16; batch_2 expired: 0 of 8 requests succeeded.",
            *SEEN[:3],
            "  batch_2 expired: 0 of 8 requests succeeded",
        ],
    ),
    "removed": (
        a_job(removed_at=NOW - 60),
        DONE,
        None,
        ["Job 'night' is removed: 16/16; has left jobs.yaml.", *SEEN],
    ),
}


@pytest.mark.parametrize(("job", "batches", "trigger", "said"), EXPLAINED.values(), ids=EXPLAINED)
def test_explain(
    job: tecko.Job, batches: tuple[tecko.Batch, ...], trigger: tecko.Trigger | None, said: list[str]
) -> None:
    """What a job waits for, what was seen, why it did or did not fire, and what happens next."""
    assert told(replace(job, batches=[*batches]), trigger) == said


STATES = [None, *tecko.TRIGGER_STEPS]


@pytest.mark.parametrize("removed_at", [None, NOW - 60])
@pytest.mark.parametrize("last_error", [None, "it failed", "Keboola is down."])
def test_explain_reads_well(removed_at: float | None, last_error: str | None) -> None:
    """Whatever the states: sentences, without None, braces or two full stops."""
    messages: tuple[dict[str, Any], ...] = ({}, {"message": None}, {"message": "It broke."})
    for status, state, facts in itertools.product(tecko.JOB_STEPS, STATES, messages):
        job = a_job(status, removed_at=removed_at, last_error=last_error, batches=[*DONE])
        said = told(job, a_trigger(state, **facts) if state else None)
        assert all(line.startswith("  ") or re.search(r"[^.][.]$", line) for line in said), said
        assert not re.search(r"None|[{}]", "\n".join(said)), said


def explained(cwd: Path, env: dict[str, str]) -> list[str]:
    answer = run_program("--json", "explain", "job", cwd=cwd, env=env)
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["job"] == "job"
    return list(document["said"])


def test_explain_with_and_without_a_service(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """The command says the same as text and as JSON, and says when no service runs."""
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    openai.batch("batch_1", "in_progress")
    openai.key(standins.OPENAI_KEY)
    env = program_environment(openai)
    with RunningProgram(tmp_path, env) as program:
        during = explained(tmp_path, env)
        assert program.terminate() == 0
    after = explained(tmp_path, env)
    text = run_program("explain", "1", cwd=tmp_path, env=env)
    assert "does not run" not in "".join(during) and after[-1].endswith("not run at the moment.")
    assert after[0].startswith("Job 'job' is active") and during[1] == after[1]
    assert text.stdout.splitlines()[0] == after[0]
    assert text.stdout.splitlines()[-1] == after[-1]


# schema


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `schema` prints, as a validator; it needs no jobs.yaml, not even a good one."""
    folder = tmp_path_factory.mktemp("schema")
    answer = run_program("schema", cwd=folder)
    assert (answer.returncode, answer.stderr, list(folder.iterdir())) == (0, "", [])
    document = json.loads(answer.stdout)
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


def plain(path: Path) -> Any:
    return tecko.JobsYaml(path, {"CREDENTIALS_DIRECTORY": "/run"}).data


@pytest.mark.parametrize("name", ["example", "first", "tests"])
def test_the_schema_takes_good_files(schema: Any, tmp_path: Path, name: str) -> None:
    """The example, what `init` writes, and what these tests run."""
    texts = {"example": EXAMPLE.read_text(), "first": tecko.first_jobs_file()}
    path = tmp_path / "jobs.yaml"
    path.write_text(texts.get(name, JOB_YAML.format(stack=STACK)))
    schema.validate(plain(path))


def nested_job(**changed: Any) -> dict[str, Any]:
    """A good job in the nested form; `changed` by the names of the flat one."""
    made: dict[str, Any] = spec().model_dump()
    for name, value in changed.items():
        short = name.removeprefix("keboola_")
        block = next(b for b in (made, made["watch"], made["trigger"]) if short in b)
        block[short] = value
    return made


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k not in names}


def with_job(job: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": [job]}


def with_secret(**ref: Any) -> dict[str, Any]:
    return {"secrets": {"s": ref}}


BY_ID = {"openai_secret_id": 1, "keboola_secret_id": 2}
GOOD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "nested": with_job(nested_job()),
    "flat": with_job(flat_job()),
    "flat, secrets by id": with_job(without(flat_job(), "openai_secret", "keboola_secret") | BY_ID),
    "flat, one batch": with_job(without(flat_job(), "batch_ids") | {"batch_id": "batch_1"}),
    "flat, every key": with_job(
        flat_job(trigger_when="all_finished", on_ambiguous="hold", variables={"a": "b"})
    ),
    **{f"every {i!r}": with_job(nested_job(poll_interval=i)) for i in (90, "90", "30s", "2 m")},
    **{f"flat, every {i!r}": with_job(flat_job(poll_interval_seconds=i)) for i in (90, "1h")},
    "a number as configuration": with_job(nested_job(keboola_configuration_id=123456)),
    "a number as variable": with_job(nested_job(variables={"n": 5, "on": True})),
    "a secret in the environment": with_secret(type="openai", env="KEY"),
    "a secret in a file": with_secret(type="keboola", file="key"),
}
BAD: dict[str, dict[str, Any]] = {
    "an unknown key": {"job": []},
    "jobs as a block": {"jobs": {}},
    "a job's unknown key": with_job(nested_job() | {"interval": 5}),
    "a flat job's unknown key": with_job(flat_job(interval=5)),
    "no name": with_job(without(nested_job(), "name")),
    "no trigger": with_job(without(nested_job(), "trigger")),
    "flat without stack": with_job(without(flat_job(), "keboola_stack_url")),
    "no batches": with_job(nested_job(batch_ids=[])),
    "eleven batches": with_job(nested_job(batch_ids=[f"batch_{n}" for n in range(11)])),
    "a batch twice": with_job(nested_job(batch_ids=["batch_1", "batch_1"])),
    "no batch id": with_job(nested_job(batch_ids=["file-1"])),
    "no interval": with_job(nested_job(poll_interval="2 days")),
    "a wrong choice": with_job(nested_job(trigger_when="some")),
    "a stack with a path": with_job(nested_job(keboola_stack_url=f"{STACK}/v2")),
    "an empty variable": with_job(nested_job(variables={"a": ""})),
    "a port too high": {"admin": {"port": 70000}},
    "a secret's value": with_secret(type="openai", value="x"),
    "a secret of no type": with_secret(env="KEY"),
    "a secret from nowhere": with_secret(type="openai"),
    "a secret from two places": with_secret(type="openai", env="KEY", file="key"),
}


def accepted(data: dict[str, Any], folder: Path) -> bool:
    """What the program itself says of such a file."""
    (folder / "jobs.yaml").write_text(json.dumps(data))  # which is YAML too
    try:
        return not tecko.load_config(folder / "jobs.yaml", {}).problems
    except tecko.Invalid:
        return False


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_the_schema_takes_what_the_program_takes(
    schema: Any, tmp_path: Path, data: dict[str, Any]
) -> None:
    """An editor marks nothing that runs."""
    assert accepted(data, tmp_path)
    schema.validate(data)


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_the_schema_refuses_what_the_program_refuses(
    schema: Any, tmp_path: Path, data: dict[str, Any]
) -> None:
    """An editor marks what does not run."""
    assert not accepted(data, tmp_path)
    assert not schema.is_valid(data)


def test_the_example_names_its_schema() -> None:
    """Its first line is the editor's modeline, for a file that a command beside it writes."""
    first, *rest = EXAMPLE.read_text().splitlines()
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found and found[1] == "jobs.schema.json"
    assert f"teckochecker schema > {found[1]}" in "\n".join(rest)


@pytest.mark.parametrize("command", [("schema",), ("completion", "bash")])
def test_what_needs_no_configuration_works_beside_a_broken_one(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """The schema helps to mend a jobs.yaml, and a shell may start anywhere."""
    (tmp_path / "jobs.yaml").write_text("jobs: {\n")
    answer = run_program(*command, cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "") and answer.stdout


# completion

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The completion script of each shell, in a file."""
    folder = tmp_path_factory.mktemp("completion")
    made = {}
    for shell in SHELLS:
        answer = run_program("completion", shell, cwd=folder)
        assert (answer.returncode, answer.stderr) == (0, "")
        made[shell] = folder / f"completion.{shell}"
        made[shell].write_text(answer.stdout)
    return made


def words_of(parser: Any) -> Iterator[str]:
    """Every command and every long option of the command line."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                yield name
                yield from words_of(sub)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_is_one(scripts: dict[str, Path], shell: str) -> None:
    """The shell it is for reads it without complaint."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-n", scripts[shell]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_word(scripts: dict[str, Path], shell: str) -> None:
    """Every command and long option stands in the script; fish writes options without dashes."""
    text = scripts[shell].read_text()
    words = set(words_of(tecko.make_parser()))
    assert {"job", "explain", "--follow", "--batch-id"} <= words
    prefix = {"fish": "-l "}.get(shell, "--")
    forms = {word: word.replace("--", prefix, 1) for word in words}
    assert [w for w, form in forms.items() if not re.search(rf"{form}(?![\w-])", text)] == []


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("jo", {"job"}),
        ("job li", {"list"}),
        ("job ", {"create", "list", "show", "update", "delete", "pause", "resume", "retry", "run"}),
        ("--json job list --st", {"--status"}),
        ("job list --status pa", {"paused"}),
        ("secret add --type ", {"openai", "keboola", "api"}),
        ("-c jobs.yaml sec", {"secret"}),
        ("completion f", {"fish"}),
    ],
)
def test_bash_completes(scripts: dict[str, Path], line: str, replies: set[str]) -> None:
    """What TAB brings after a line, out of bash itself."""
    script = f"""
        source {scripts["bash"]}
        COMP_WORDS=(teckochecker "$@") COMP_CWORD=$#
        $(complete -p teckochecker | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = ["bash", "--norc", "-c", script, "bash", *line.split(" ")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert (set(done.stdout.split()), done.stderr) == (replies, "")


# the operations


@pytest.fixture
def operations(world: World) -> tecko.Operations:
    return tecko.Operations(world.store, world.vault, lambda: world.config, world.clock)


async def logged(world: World, status: str) -> list[tecko.LogRow]:
    return [row for row in await world.store.logs(None, 1000) if row.status == status]


async def test_jobs_come_in_pages(world: World, operations: tecko.Operations) -> None:
    """Every job is on one page, once; the total is of all, or of all of that status."""
    ids = [await world.job(f"job {n}", batch_ids=[f"batch_{n}"]) for n in range(7)]
    await operations.step_job(str(ids[3]), "pause")
    found, after = [], 0
    while True:
        page = await operations.jobs(None, 3, after)
        found.append([(job.id, job.batches[0].batch_id) for job in page.jobs])
        assert page.total == 7
        if page.next_after is None:
            break
        after = page.next_after
    assert list(map(len, found)) == [3, 3, 1]
    assert list(itertools.chain(*found)) == [(job_id, f"batch_{n}") for n, job_id in enumerate(ids)]


@pytest.mark.parametrize(
    ("status", "limit", "ids", "total", "more"),
    [
        ("paused", 10, [2], 1, None),
        ("active", 2, [1, 3], 3, 3),
        ("active", 3, [1, 3, 4], 3, None),
        ("failed", 10, [], 0, None),
        (None, 4, [1, 2, 3, 4], 4, None),
    ],
)
async def test_a_page_of_a_status(
    world: World,
    operations: tecko.Operations,
    status: str | None,
    limit: int,
    ids: list[int],
    total: int,
    more: int | None,
) -> None:
    """A full last page has no next one."""
    for n in range(4):
        await world.job(f"job {n}")
    await operations.step_job("2", "pause")
    page = await operations.jobs(status, limit, 0)
    assert ([job.id for job in page.jobs], page.total, page.next_after) == (ids, total, more)


@pytest.mark.parametrize(
    ("search", "status", "names"),
    [
        ("", None, ["Nightly EU", "nightly_us", "weekly 100%"]),
        ("NIGHT", None, ["Nightly EU", "nightly_us"]),
        ("night", "paused", ["nightly_us"]),
        ("%", None, ["weekly 100%"]),
        ("_", None, ["nightly_us"]),
        ("monthly", None, []),
    ],
)
async def test_jobs_are_found_by_a_part_of_their_name(
    world: World, operations: tecko.Operations, search: str, status: str | None, names: list[str]
) -> None:
    """In either case, as it stands; the total is of what is found."""
    for name in ("Nightly EU", "nightly_us", "weekly 100%"):
        await world.job(name)
    await operations.step_job("2", "pause")
    page = await operations.jobs(status, 10, 0, search)
    assert ([job.name for job in page.jobs], page.total) == (names, len(names))


async def test_a_list_shows_what_each_job_did_last(
    world: World, operations: tecko.Operations
) -> None:
    """Where it is asked for: progress, reason, the last trigger and how the last runs ended."""
    await fire(world)
    (world.config.base / "a.csv").write_text("id,published_at\n1,2024-01-15\n2,never\n")
    source = {"type": "csv", "path": "a.csv", "id": "id"}
    await world.run(await world.ingest(**source, fields={"published_at": "published_at"}))
    assert [job.recent for job in (await operations.jobs(None, 9, 0)).jobs] == [None, None]
    watch, ingest = [job.recent for job in (await operations.jobs(None, 9, 0, recent=True)).jobs]
    assert watch and watch.trigger and watch.trigger.keboola_job_id
    assert (watch.done, watch.runs) == ("100/100", [])
    assert ingest and (ingest.done, ingest.runs) == ("1 record, 1 rejected", ["rejected"])
    assert "rejected" in str(ingest.why) and ingest.trigger is None


async def fire(world: World) -> int:
    """A job whose batch is done, carried to its end."""
    world.openai.batch("batch_1", "completed", total=100, completed=100)
    job_id = await world.job()
    await world.step_until_waiting(job_id)
    return job_id


async def test_days_are_summed_up(world: World, operations: tecko.Operations) -> None:
    """Checks, triggers with their delay, and records that came."""
    await fire(world)
    (world.config.base / "a.csv").write_text("id\n1\n2\n")
    source = await world.ingest(type="csv", path="a.csv", id="id")
    await world.run(source)
    [day] = await operations.history(30)
    assert day.day == tecko.iso(time.time())[:10]
    assert (day.checks, day.triggers, day.done_to_post_ms, day.records) == (1, 1, 0, 2)
    await world.run(source)
    assert await operations.history(30) == [day]


async def test_days_are_kept_for_a_quarter(world: World, operations: tecko.Operations) -> None:
    """A day that is older goes; the last ones are shown, the oldest first."""
    days = [tecko.iso(time.time() - 86400 * n)[:10] for n in (200, 91, 88, 1, 0)]
    for day in days[:-1]:
        row = {"day": day, "checks": 10, "triggers": 4, "delay_ms": 90, "records": 0}
        execute(world.store.place, INSERT_DAY, *row.values())
    await world.store.transact(partial(world.store._add_to_day, time.time(), checks=5))
    await world.store.prune(0.0, 10**6)
    assert [day.day for day in await operations.history(90)] == days[2:]
    assert [(d.checks, d.done_to_post_ms) for d in await operations.history(2)] == [
        (10, 22),
        (5, None),
    ]


INSERT_DAY = "INSERT INTO daily_sums VALUES (?, ?, ?, ?, ?)"
CHANGES: dict[str, tuple[Any, Any]] = {
    "name": ("other", "other"),
    "batch_ids": (["batch_8", "batch_9"], ["batch_8", "batch_9"]),
    "openai_secret": ("openai2", "openai2"),
    "openai_secret_id": (3, 3),
    "keboola_secret": ("keboola2", "keboola2"),
    "keboola_secret_id": (4, 4),
    "trigger_when": ("all_finished", "all_finished"),
    "keboola_stack_url": (f"{STACK}/", STACK),
    "keboola_component_id": ("other", "other"),
    "keboola_configuration_id": (12, "12"),
    "variables": ({"region": "eu"}, {"region": "eu"}),
    "on_ambiguous": ("hold", "hold"),
    "poll_interval_seconds": ("2m", 120),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_update_job(world: World, operations: tecko.Operations, name: str) -> None:
    """Each field of the flat form changes alone, is shown, and is in the log once."""
    for kind in ("openai", "keboola"):
        await world.secret(f"{kind}2", kind, "sk-second-value-0123")
    job_id = await world.job(poll_interval_seconds=60)
    before = (await operations.job("job")).model_dump()
    given, shown = CHANGES[name]
    changes = tecko.parse(tecko.JobChanges, {name: given}).model_dump(exclude_unset=True)
    after = (await operations.update_job("job", changes)).model_dump()
    assert after[name] == shown != before[name]
    twin = name.removesuffix("_id") if "secret" in name else name
    follows = {"batch_ids": {"batch_id", "batches", "batch_count", "recent"}}
    follows |= {f"{kind}_secret": {f"{kind}_secret_id"} for kind in ("openai", "keboola")}
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {twin, "logs"} | follows.get(twin, set())
    assert [row.job_id for row in await logged(world, "updated")] == [job_id]


REFUSALS: dict[str, tuple[int, Callable[[tecko.Operations], Any]]] = {
    "show a secret": (1001, lambda operations: operations.secret("none")),
    "show a secret by id": (1001, lambda operations: operations.secret("99")),
    "delete a secret": (1001, lambda operations: operations.delete_secret("none")),
    "replace a secret": (
        1001,
        lambda operations: operations.add_secret(body("none"), replace=True),
    ),
    "replace by another type": (
        1001,
        lambda operations: operations.add_secret(body("keboola"), replace=True),
    ),
    "create with no secret": (
        1001,
        lambda operations: operations.create_job(spec(openai_secret="none")),
    ),
    "create with a wrong one": (
        1004,
        lambda operations: operations.create_job(spec(openai_secret="keboola")),
    ),
    "update to no secret": (
        1001,
        lambda operations: operations.update_job("job", {"openai_secret": 99}),
    ),
    "pause no job": (1002, lambda operations: operations.step_job("none", "pause")),
    "resume no job": (1002, lambda operations: operations.step_job("99", "resume")),
    "retry no job": (1002, lambda operations: operations.step_job("none", "retry")),
    "show no job": (1002, lambda operations: operations.job("99")),
    "explain no job": (1002, lambda operations: operations.explain("none")),
    "update no job": (1002, lambda operations: operations.update_job("none", {"name": "x"})),
    "delete no job": (1002, lambda operations: operations.delete_job("99")),
    "a job twice": (1003, lambda operations: operations.create_job(spec())),
    "a job's name twice": (
        1003,
        lambda operations: operations.update_job("job", {"name": "second"}),
    ),
    "a secret twice": (1003, lambda operations: operations.add_secret(body("openai"))),
    "delete a used secret": (1003, lambda operations: operations.delete_secret("openai")),
    "resume an active job": (1003, lambda operations: operations.step_job("job", "resume")),
    "retry an active job": (1003, lambda operations: operations.step_job("job", "retry")),
    "update a file's job": (
        1003,
        lambda operations: operations.update_job("of the file", {"name": "x"}),
    ),
    "delete a file's job": (1003, lambda operations: operations.delete_job("of the file")),
    "no batches": (1004, lambda operations: operations.update_job("job", {"batch_ids": []})),
    "no stack": (1004, lambda operations: operations.update_job("job", {"keboola_stack_url": "x"})),
    "an interval too short": (
        1004,
        lambda operations: operations.update_job("job", {"poll_interval_seconds": 0}),
    ),
    "an unknown field": (1004, lambda operations: operations.update_job("job", {"interval": 60})),
}


def body(name: str) -> tecko.SecretBody:
    return tecko.SecretBody(name=name, type="openai", value="sk-some-value-0123456")


async def test_a_secret_that_alerts_use_is_not_deleted(world: World) -> None:
    """It is the bearer token of a webhook, by its name or by its id."""
    await world.secret("hook", "api", "token-for-the-hook")
    for ref in ("hook", 3):
        given = {"webhook": "https://example.com/hook", "secret": ref}
        target = tecko.AlertTarget.model_validate(given)
        config = replace(world.config, alerts=[target])
        operations = tecko.Operations(world.store, world.vault, lambda: config)  # noqa: B023
        with pytest.raises(tecko.Conflict, match="`alerts:` in jobs"):
            await operations.delete_secret("hook")
    assert (await operations.secret("hook")).id == 3


@pytest.mark.parametrize(("code", "ask"), REFUSALS.values(), ids=REFUSALS)
async def test_what_the_desk_refuses(
    world: World, operations: tecko.Operations, code: int, ask: Callable[[tecko.Operations], Any]
) -> None:
    """A refusal has its code, one that says what, and changes nothing."""
    for name in ("job", "second"):
        await world.job(name)
    await world.store.sync_file_jobs([spec(name="of the file")], world.clock())
    before = dump(world.store.place)
    with pytest.raises(tecko.TeckoError) as refused:
        await ask(operations)
    assert refused.value.code == code and str(refused.value)
    assert dump(world.store.place) == before


# audit


@pytest.fixture
async def keyed(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> AsyncIterator[World]:
    """A world whose master key is in a file, so that it can be rotated."""
    tecko.write_private(tmp_path / "teckochecker.key", tecko.new_master_key())
    made, close = await make_world(tmp_path, openai, keboola, {"SECRET_KEY": ""})
    yield made
    await close()


async def test_rotate(keyed: World) -> None:
    """Another key seals what was stored, which still opens; the log has one row of it."""
    operations = tecko.Operations(keyed.store, keyed.vault, lambda: keyed.config, keyed.clock)
    await operations.add_secret(body("a"))
    await operations.add_secret(body("b"))
    before = await keyed.store.secrets()
    assert await operations.rotate() == 2
    after = await keyed.store.secrets()
    assert {row.key_id for row in before}.isdisjoint({row.key_id for row in after})
    assert {keyed.vault.open(row).reveal() for row in after} == {body("a").value}
    [row] = await logged(keyed, "rotated")
    assert "2" in row.message


async def test_rotate_needs_a_key_file(world: World, operations: tecko.Operations) -> None:
    """A key in the environment is not this program's to change; nothing is sealed anew."""
    before = await world.store.secrets()
    with pytest.raises(tecko.SecretError) as refused:
        await operations.rotate()
    assert refused.value.code == 3002 and "SECRET_KEY=NEW,OLD" in refused.value.hint
    assert await world.store.secrets() == before


CREATE = """job create --name n --batch-id batch_1 --openai-secret openai --keboola-secret keboola
    --keboola-stack https://connection.keboola.com --component-id c --config-id 1"""
COMMANDS = (CREATE, "check n", "job pause n", "job resume n", "job update n --config-id 2")


def test_the_log_says_that_the_command_line_asked(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Each change has its row with its actor; what a check finds out has none."""
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    openai.key(standins.OPENAI_KEY)
    openai.batch("batch_1", "in_progress")
    calls = "\n".join(f"assert main({line.split()!r}) == 0" for line in COMMANDS)
    env = clean_environment(program_environment(openai)) | {"PYTHONPATH": str(PROGRAM.parent)}
    run = [sys.executable, "-c", f"from teckochecker import main\n{calls}"]
    subprocess.run(run, cwd=tmp_path, env=env, check=True, timeout=60)
    log = partial(
        execute, tmp_path / "teckochecker.db", "SELECT status, actor FROM polling_logs ORDER BY id"
    )
    said = log()
    assert [status for status, actor in said if actor] == "created paused resumed updated".split()
    assert {actor for _, actor in said} == {None, "command line"}
    assert ("checking", None) in said
    deleted = run_program("job", "delete", "n", "--force", cwd=tmp_path)
    assert deleted.returncode == 0, deleted.stderr
    assert log()[-1] == ("deleted", "command line")


# upkeep


def fill_log(path: Path, count: int, age: float) -> None:
    asyncio.run(tecko.Store(path).touch())
    row = ("checking", "m", time.time() - age)
    with contextlib.closing(sqlite3.connect(path)) as db:
        sql = "INSERT INTO polling_logs (status, message, created_at) VALUES (?, ?, ?)"
        db.executemany(sql, [row] * count)
        db.commit()


def kept_rows(path: Path, until: Callable[[list[int]], bool]) -> list[int]:
    """The ids of the log once they are so."""
    end = time.monotonic() + 20
    ids_there = partial(execute, path, "SELECT id FROM polling_logs ORDER BY id")
    while not until(ids := [row[0] for row in ids_there()]):
        assert time.monotonic() < end, len(ids)
        time.sleep(0.05)
    return ids


def test_a_running_service_prunes_its_log(tmp_path: Path) -> None:
    """Rows past LOG_RETENTION_DAYS go, and all but the last LOG_RETENTION_ROWS, in any number."""
    path = tmp_path / "teckochecker.db"
    for count, days in ((2500, 2.1), (50, 1.9), (150, 0)):
        fill_log(path, count, days * 86400)
    env = {"API_PORT": "0", "LOG_RETENTION_DAYS": "2", "LOG_RETENTION_ROWS": "10000"}
    with RunningProgram(tmp_path, env):
        assert kept_rows(path, lambda ids: len(ids) <= 200) == list(range(2501, 2701))
    with RunningProgram(tmp_path, env | {"LOG_RETENTION_ROWS": "100"}):
        assert kept_rows(path, lambda ids: len(ids) <= 100) == list(range(2601, 2701))


RANGES = {
    "LOG_RETENTION_DAYS": (1, 36500, "whole days, 1 to 36500"),
    "LOG_RETENTION_ROWS": (100, 10**9, "log rows, 100 to 1000000000"),
    "API_MAX_CONNECTIONS": (1, 1000, "1 to 1000"),
}


@pytest.mark.parametrize("name", RANGES)
def test_new_settings(tmp_path: Path, name: str) -> None:
    """The bounds are allowed; beyond them, and what is no whole number, says what is."""
    low, high, allowed = RANGES[name]
    for good in (low, high):
        config = tecko.load_config(tmp_path / "jobs.yaml", {name: f" {good} "})
        assert getattr(config.settings, name.lower()) == good
    for bad in (low - 1, high + 1, -1, "1.5", "many", "1e2"):
        with pytest.raises(tecko.Invalid) as refused:
            tecko.load_config(tmp_path / "jobs.yaml", {name: str(bad)})
        said = f"environment: {name}: found {str(bad)!r}; allowed: {allowed}"
        assert str(refused.value) == said


@pytest.mark.parametrize("hosts", ["https://example.com", "a b", "example.com/x", "*"])
def test_admin_hosts_that_are_none(tmp_path: Path, hosts: str) -> None:
    """What could never be a Host is refused, instead of refusing every request later on."""
    with pytest.raises(tecko.Invalid, match=r"environment: ADMIN_HOSTS: .*host names"):
        tecko.load_config(tmp_path / "jobs.yaml", {"ADMIN_HOSTS": hosts})
