"""What an earlier program of this kind did wrong has to be impossible here: one test each."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import JOB_YAML, World, flat_job, program_environment, run_program
from standins import Fault
from test_rest import Rest, open_rest
from test_steps import posts, serving, status, trigger_of, until

import teckochecker as tecko

CHECK, INDEX, POST = "GET /v1/batches/*", "GET /v2/storage", "POST /jobs"
SEARCH, FOLLOW = "GET /search/jobs", "GET /jobs/*"

Given = pytest.mark.parametrize


@contextlib.asynccontextmanager
async def beside(path: Path) -> AsyncIterator[tecko.Store]:
    """The same store, opened once more: what the command line does while the service runs."""
    async with tecko.Store(path) as store:
        yield store


async def add_job(service: tecko.Service, keboola: standins.Keboola, name: str) -> None:
    """What `job create` does, beside the running service."""
    flat = flat_job(name=name, batch_ids=[f"batch_{name}"], keboola_stack_url=keboola.url)
    flat["keboola_configuration_id"] = name
    async with beside(service.store.path) as store:
        await store.create_job(
            tecko.job_spec(flat, service.settings.job_context), "store", time.time()
        )


async def test_batches_done_before_the_start_fire_once_and_not_again_at_a_restart(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Seen: a trigger at each start. Another job's trigger shows that the restart was at work."""
    keboola.runs_until_told = True
    openai.batch("batch_1", "completed")
    openai.batch("batch_later", "completed")
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    async with serving(tmp_path, openai, program_environment(openai)):
        await until(lambda: len(posts(keboola)) == 1)
    async with serving(tmp_path, openai, program_environment(openai)) as service:
        await until(lambda: keboola.count(FOLLOW) > 0)
        await add_job(service, keboola, "later")
        await until(lambda: len(posts(keboola)) == 2)
    assert [job["config"] for job in keboola.created] == ["cfg", "later"]
    assert openai.count("GET /v1/batches/batch_1") == 1


async def test_a_store_that_is_locked_in_mid_trigger_makes_one_trigger(world: World) -> None:
    """Seen: thousands of triggers in seconds, as none could be written down."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    gate = world.keboola.gate(POST, after_acting=True)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        gate.release()
        done, _ = await asyncio.wait([step], timeout=0.3)
        assert (not done, len(posts(world.keboola))) == (True, 1)
        other.execute("ROLLBACK")
    await step
    await world.step_until_waiting(job_id)
    assert (len(posts(world.keboola)), await status(world, job_id)) == (1, "completed")


async def test_a_store_that_is_locked_before_the_trigger_makes_none(world: World) -> None:
    """What cannot be written down first is not sent; it is when the lock is gone."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    with contextlib.closing(sqlite3.connect(world.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        step = asyncio.create_task(world.steps.step(job_id))
        await until(lambda: world.openai.count(CHECK) == 1)
        await asyncio.wait([step], timeout=0.3)
        assert world.keboola.request_count == 0
        other.execute("ROLLBACK")
    await step
    assert len(posts(world.keboola)) == 1


@Given("how", ["refused", "held", "error", "terminated", "cancelled"])
async def test_a_failed_trigger_never_ends_as_completed(world: World, how: str) -> None:
    """Seen: a job marked completed although Keboola had refused or failed."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job(on_ambiguous="hold")
    if how in ("refused", "held"):
        world.keboola.fault(POST, Fault.status(400 if how == "refused" else 500))
    else:
        world.keboola.end_with = how
    await world.step_until_waiting(job_id)
    for _ in range(3):
        world.clock.turn(3600)
        assert (await world.steps.step(job_id)).wait is None
        job = await world.get(job_id)
        assert (job.status, bool(job.last_error)) == ("failed", True)
    assert len(posts(world.keboola)) == 1


async def test_a_changed_stack_and_a_replaced_secret_are_used_at_once(world: World) -> None:
    """Seen: the old ones in use until a restart. Both are changed by another process here."""
    batch = world.openai.batch("batch_1", "in_progress")
    job_id = await world.job()
    await world.steps.step(job_id)
    seal = partial(world.vault.seal, "keboola", "keboola", tecko.SecretValue("kbc-new"))
    spec = (await world.get(job_id)).watches
    with standins.Keboola() as second:
        second.token("kbc-new")
        target = spec.trigger.model_copy(update={"stack_url": second.url})
        async with beside(world.store.path) as store:
            await store.replace_secret("keboola", "keboola", seal, world.clock())
            changed = spec.model_copy(update={"trigger": target})
            await store.update_job(job_id, lambda _: changed, world.clock())
        batch.become("completed")
        await world.step_until_waiting(job_id)
        tokens = {standins.credential(request) for request in second.requests}
        assert (len(second.created), tokens) == (1, {"", "kbc-new"})
    assert world.keboola.request_count == 0


@Given("route", [INDEX, POST, SEARCH, FOLLOW])
async def test_a_redirect_does_not_carry_the_token_to_another_host(
    world: World, route: str
) -> None:
    """Whichever call is redirected, the other host hears nothing and one job is made."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    if route == SEARCH:
        world.keboola.fault(POST, Fault.drop_reply())
    with standins.Elsewhere() as elsewhere:
        world.keboola.fault(route, Fault.redirect(elsewhere.url + "/v2/storage", 307))
        await world.step_until_waiting(job_id)
        assert elsewhere.request_count == 0
    assert (len(world.keboola.created), await status(world, job_id)) == (1, "completed")


async def test_a_pause_during_a_check_stops_the_trigger(world: World) -> None:
    """Paused by another process while OpenAI's answer is on its way; resumed, it fires."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    gate = world.openai.gate(CHECK, after_acting=True)
    step = asyncio.create_task(world.steps.step(job_id))
    await gate.areached()
    async with beside(world.store.path) as store:
        await store.pause_job(job_id, world.clock())
    gate.release()
    await step
    assert (await status(world, job_id), await world.store.triggers(job_id)) == ("paused", [])
    assert ((await world.steps.step(job_id)).wait, world.keboola.request_count) == (None, 0)
    await world.store.resume_job(job_id, world.clock())
    await world.steps.step(job_id)
    assert (await trigger_of(world, job_id)).state == "running"


async def test_a_job_added_while_the_service_sleeps_is_checked_soon(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Seen: up to a minute. The service has slept already: its first job is due in an hour."""
    yaml = JOB_YAML.format(stack=keboola.url).replace("1s", "1h")
    (tmp_path / "jobs.yaml").write_text(yaml)
    openai.batch("batch_1")
    openai.batch("batch_added")
    async with serving(tmp_path, openai, program_environment(openai)) as service:
        await until(lambda: openai.count(CHECK) == 1)
        gate = openai.gate("GET /v1/batches/batch_added", after_acting=False)
        await add_job(service, keboola, "added")
        await gate.areached(timeout=5)  # promised are two seconds; a busy machine gets more
        gate.release()


PUBLISHED = [
    "your-secret-key-for-encryption",
    "your-generated-fernet-key-here",
    "changeme",
    "0" * 44,
    "A" * 43 + "=",
    "deadbeef" * 8,
]


@Given("text", PUBLISHED)
def test_a_placeholder_is_no_master_key(tmp_path: Path, text: str) -> None:
    """Neither from the environment nor from a file; nothing is sealed, and it is not repeated."""
    (tmp_path / "teckochecker.key").write_text(text + "\n")
    for environ in ({"SECRET_KEY": text}, {}):
        vault = tecko.Vault(tecko.load_config(tmp_path / "jobs.yaml", environ).settings)
        with pytest.raises(tecko.SecretError, match="master key") as raised:
            vault.load(required=False)
        assert text not in str(raised.value) and "init" in raised.value.hint
        with pytest.raises(tecko.SecretError):
            vault.seal("name", "openai", tecko.SecretValue("sk-never-to-be-sealed"))


def stored_secrets(folder: Path) -> int:
    """How many secrets the database has; none where there is no database."""
    path = folder / "teckochecker.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'secrets'"
        [(there,)] = db.execute(tables)
        return int(db.execute("SELECT count(*) FROM secrets").fetchone()[0]) if there else 0


@Given("key", [None, PUBLISHED[0]], ids=["none", "placeholder"])
def test_a_secret_is_not_stored_without_a_key_of_ones_own(tmp_path: Path, key: str | None) -> None:
    """The first command of a new user: one line that says what to do, and nothing is written."""
    env = {"SECRET_KEY": key} if key else {}
    command = ["secret", "add", "--name", "openai", "--type", "openai"]
    done = run_program(*command, cwd=tmp_path, env=env, input="sk-never-to-be-sealed\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "master key" in done.stderr and "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert stored_secrets(tmp_path) == 0
    assert not (tmp_path / "teckochecker.key").exists()


def test_a_start_with_a_placeholder_as_key_is_refused(tmp_path: Path) -> None:
    """Already the service does not come up, though no job would need the key."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\njobs: []\n")
    done = run_program("start", cwd=tmp_path, env={"SECRET_KEY": PUBLISHED[0]}, timeout=20)
    assert done.returncode == 1
    assert "master key" in done.stderr and "Traceback" not in done.stderr


async def test_a_service_without_its_key_says_so_and_goes_on(world: World, tmp_path: Path) -> None:
    """Stored secrets, and the key is gone: the job stays active and names what is missing."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    config = tecko.load_config(tmp_path / "jobs.yaml", {})
    upstreams = world.steps.openai, world.steps.keboola, world.steps.web
    steps = tecko.Steps(config, world.store, tecko.Vault(config.settings), *upstreams)
    await steps.step(job_id)
    job = await world.get(job_id)
    assert (job.status, "no master key" in (job.last_error or "")) == ("active", True)
    assert posts(world.keboola) == []


# ── The original's clients ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    with open_rest(tmp_path_factory.mktemp("rest")) as made:
        yield made


def test_its_clients_find_the_way(rest: Rest) -> None:
    """What GET / names for health answers."""
    root = rest("GET", "/").body
    assert (root["docs"], root["health"]) == ("/docs", "/api/health")
    assert rest("GET", root["health"]).body["database"] == "connected"


REFUSALS: dict[str, tuple[str, str, dict[str, Any], int, str, str]] = {
    "a secret twice": (
        *(
            "POST",
            "/api/admin/secrets",
            {"name": "openai", "type": "openai", "value": "sk-12345678"},
        ),
        *(409, "Secret with name 'openai' already exists", "1003"),
    ),
    "a secret in use": (
        *("DELETE", "/api/admin/secrets/{openai}", {}, 409, "referenced by active jobs", "1003"),
    ),
    "no such OpenAI secret": (
        *("POST", "/api/jobs", {"openai_secret_id": 7007}, 404),
        *("OpenAI secret with ID 7007 not found", "1001"),
    ),
    "no such Keboola secret": (
        *("POST", "/api/jobs", {"keboola_secret_id": 7007}, 404),
        *("Keboola secret with ID 7007 not found", "1001"),
    ),
    "no such job": ("GET", "/api/jobs/99999", {}, 404, "Job with ID 99999 not found", "1002"),
}


@Given("case", REFUSALS.values(), ids=list(REFUSALS))
def test_its_clients_read_the_details_that_they_look_for(
    rest: Rest, case: tuple[str, str, dict[str, Any], int, str, str]
) -> None:
    """The words that they search in `detail`, the status, and the code in a header."""
    method, path, body, status, words, code = case
    job = rest.create()
    sent = rest.flat(**body) if path == "/api/jobs" else body or None
    answer = rest(method, path.replace("{openai}", str(job["openai_secret_id"])), sent)
    assert (answer.status, answer.headers["X-Error-Code"]) == (status, code)
    assert words in answer.body["detail"]


@Given("raw", [b"no JSON", b'{"name": "x"', b"", b'{"name": 5}', b"[]"])
def test_its_clients_get_422_for_whatever_is_wrong_with_a_body(rest: Rest, raw: bytes) -> None:
    """With `message` beside `detail`, and the wrong fields in `details` where there are any."""
    answer = rest("POST", "/api/jobs", raw=raw)
    assert (answer.status, answer.body["error"]) == (422, "validation_error")
    assert answer.body["message"] == "Request validation failed" and answer.body["detail"]


def test_its_clients_see_new_batches_in_progress(rest: Rest) -> None:
    """Until OpenAI has answered, which is held up here."""
    gate = rest.openai.gate("GET /v1/batches/batch_new", after_acting=False)
    job = rest.create(batch_id=..., batch_ids=["batch_new", "batch_also"])
    assert [batch["status"] for batch in job["batches"]] == ["in_progress"] * 2
    assert (job["status"], job["batch_count"], job["completed_count"]) == ("active", 2, 0)
    gate.release()
