"""`import`: what the original program has in its database, taken over once and whole."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import MASTER_KEY, World, run_program
from cryptography.fernet import Fernet

import teckochecker as tecko

Given = pytest.mark.parametrize
SECRET_KEY = "the original takes any text for a key"
SEVERAL = """
CREATE TABLE secrets (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL UNIQUE,
    type VARCHAR(50) NOT NULL, value TEXT NOT NULL, created_at DATETIME NOT NULL);
CREATE TABLE polling_jobs (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL,
    openai_secret_id INTEGER, keboola_secret_id INTEGER, keboola_stack_url VARCHAR(500) NOT NULL,
    keboola_component_id VARCHAR(255) NOT NULL, keboola_configuration_id VARCHAR(255) NOT NULL,
    poll_interval_seconds INTEGER NOT NULL, status VARCHAR(50) NOT NULL, last_check_at DATETIME,
    next_check_at DATETIME, created_at DATETIME NOT NULL, completed_at DATETIME);
CREATE TABLE job_batches (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL,
    batch_id VARCHAR(255) NOT NULL, status VARCHAR(50) NOT NULL, created_at DATETIME NOT NULL,
    completed_at DATETIME);
CREATE TABLE polling_logs (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL,
    status VARCHAR(50) NOT NULL, message TEXT, created_at DATETIME NOT NULL);
"""
SINGLE = SEVERAL.replace("openai_secret_id INTEGER,", "batch_id TEXT, openai_secret_id INTEGER,")
SINGLE = SINGLE.replace("CREATE TABLE job_batches", "CREATE TABLE something_else")
MADE, ENDED = "2025-01-22 10:00:00.250000", "2025-01-22 10:15:00.000000"


class Original:
    """The original's database, with two secrets."""

    def __init__(self, folder: Path, schema: str = SEVERAL) -> None:
        folder.mkdir()
        self.file, self.jobs, self.several = folder / "teckochecker.db", 0, schema == SEVERAL
        (folder / ".env").write_text(f"SECRET_KEY={SECRET_KEY}  # as its .env has it\n")
        digest = hashlib.sha256(SECRET_KEY.encode()).digest()
        self.fernet = Fernet(base64.urlsafe_b64encode(digest))
        with closing(sqlite3.connect(self.file)) as db:
            db.executescript(schema)
        self.secret("openai-prod", "openai", standins.OPENAI_KEY)
        self.secret("keboola-prod", "keboola", standins.KEBOOLA_TOKEN)

    def insert(self, table: str, **row: Any) -> None:
        marks = ", ".join("?" * len(row))
        with closing(sqlite3.connect(self.file, isolation_level=None)) as db:
            db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])

    def secret(self, name: str, kind: str, value: str) -> None:
        sealed = self.fernet.encrypt(value.encode()).decode()
        self.insert("secrets", name=name, type=kind, value=sealed, created_at=MADE)

    def job(self, state: str, *batches: tuple[str, str], **changed: Any) -> None:
        self.jobs += 1
        row = {
            "id": self.jobs,
            "name": f"job {self.jobs}",
            "openai_secret_id": 1,
            "keboola_secret_id": 2,
            "keboola_stack_url": "https://connection.keboola.com",
            "keboola_component_id": "comp",
            "keboola_configuration_id": "123",
            "poll_interval_seconds": 120,
            "status": state,
            "created_at": MADE,
            "completed_at": None if state in ("active", "paused") else ENDED,
        } | changed
        self.insert("polling_jobs", **row)
        for batch_id, seen_as in batches:
            seen = {"batch_id": batch_id, "status": seen_as, "created_at": MADE}
            self.insert("job_batches", job_id=self.jobs, **seen)

    def log(self, status: str, message: str | None) -> None:
        row = {"job_id": self.jobs, "status": status, "message": message, "created_at": ENDED}
        self.insert("polling_logs", **row)


@pytest.fixture
def there(tmp_path: Path) -> Original:
    return Original(tmp_path / "original")


async def take(world: World, there: Original, key: str = SECRET_KEY) -> dict[str, tuple[bool, str]]:
    """What became of each secret and job."""
    operations = tecko.Operations(world.store, world.vault, lambda: world.config, world.clock)
    with tecko.open_sqlite(there.file, "ro") as db:
        done = await world.store.transact(tecko.Import(db, key, operations).run)
    return {what: (here, said) for what, here, said in done}


async def test_secrets_come_sealed_anew(world: World, there: Original) -> None:
    """Under our key, with their values and types."""
    done = await take(world, there)
    assert all(here for here, _ in done.values())
    row = await world.store.secret("openai-prod")
    assert row is not None and (row.type, row.key_id) == ("openai", world.vault.key_id)
    assert world.vault.open(row).reveal() == standins.OPENAI_KEY


async def test_ids_stay(world: World, there: Original) -> None:
    """Its HTTP clients know jobs by them; also where some in between were deleted, and the next
    one gets another. One that was given here already is not taken away."""
    there.jobs = 5
    there.job("active", ("batch_a", "completed"))
    there.secret("later", "api", "a value of its own")
    there.jobs = 40
    there.job("paused", ("batch_b", "failed"))
    done = await take(world, there)
    assert done["job 'job 6'"] == (True, "ID 6, active")
    assert done["job 'job 41'"] == (True, "ID 41, paused")
    ids = [done[f"secret {name!r}"][1] for name in ("openai-prod", "keboola-prod", "later")]
    assert ids == ["ID 3", "ID 4", "ID 5"]  # after two of the world's own
    assert await world.job("new") == 42


@Given("status", ["active", "paused", "completed", "completed_with_failures", "failed"])
async def test_jobs_come_as_they_are(world: World, there: Original, status: str) -> None:
    """In each state: definition, batches, times and log."""
    there.job(status, ("batch_a", "completed"), ("batch_b", "failed"))
    there.log("checking", "Batch status: 1 completed")
    there.log("error", None)
    await take(world, there)
    job = await world.store.find_job("job 1")
    assert (job.status, job.origin, tecko.iso(job.created_at)) == (
        *(status, "store"),
        "2025-01-22T10:00:00Z",
    )
    assert job.watches.watch.batch_ids == ["batch_a", "batch_b"]
    assert job.watches.watch.trigger_when == "all_finished"
    assert (job.watches.watch.secret, job.watches.trigger.secret) == ("openai-prod", "keboola-prod")
    assert (job.completed_at is None) == (status in ("active", "paused"))
    logs = [row for row in await world.store.logs(job.id, 10) if row.actor == "the original"]
    assert [row.message for row in logs] == ["Batch status: 1 completed", ""]
    assert {tecko.iso(row.created_at) for row in logs} == {"2025-01-22T10:15:00Z"}


async def test_what_has_fired_there_does_not_fire_here(world: World, there: Original) -> None:
    """It leaves a trigger that has ended; the same batches fire again only by `job retry`."""
    there.job("completed", ("batch_1", "completed"), keboola_stack_url=world.keboola.url)
    there.log("keboola_triggered", "Action: keboola_triggered, Result: 4711")
    await take(world, there)
    job = await world.store.find_job("job 1")
    [trigger] = await world.store.triggers(job.id)
    assert (trigger.state, trigger.keboola_job_id) == ("succeeded", "4711")
    assert [by.name for by, _ in await world.store.fired(tecko.aim_of_spec(job.watches))] == [
        "job 1"
    ]
    watch = job.watches.watch.model_copy(update={"batch_ids": ["batch_2"]})
    other = job.watches.model_copy(update={"watch": watch})
    await world.store.update_job(job.id, lambda _: other, world.clock())
    await world.store.update_job(job.id, lambda _: job.watches, world.clock())  # a new round
    world.openai.batch("batch_1", "completed")
    await world.steps.step(job.id)
    assert world.keboola.created == []
    assert "have started this Keboola job before" in ((await world.get(job.id)).last_error or "")


async def test_a_job_that_fired_and_was_not_marked_comes_as_completed(
    world: World, there: Original
) -> None:
    """The original died between its trigger and its mark: its log tells."""
    there.job("active", ("batch_a", "completed"))
    there.log("keboola_triggered", "Action: keboola_triggered, Result: N/A")
    await take(world, there)
    job = await world.store.find_job("job 1")
    assert job.status == "completed" and len(await world.store.triggers(job.id)) == 1


async def test_an_active_job_goes_on(world: World, there: Original) -> None:
    """With the key that came over, its batches are asked for and its trigger is sent, once."""
    there.job("active", ("batch_1", "in_progress"), keboola_stack_url=world.keboola.url)
    await take(world, there)
    world.openai.batch("batch_1", "completed")
    job = await world.store.find_job("job 1")
    await world.step_until_waiting(job.id)
    assert (len(world.keboola.created), (await world.get(job.id)).status) == (1, "completed")


async def test_a_failed_job_says_why(world: World, there: Original) -> None:
    """Its last error, and no trigger: `job retry` may fire it."""
    there.job("failed", ("batch_a", "expired"))
    there.log("error", f"Keboola trigger failed: {standins.KEBOOLA_TOKEN} is no token")
    await take(world, there)
    job = await world.store.find_job("job 1")
    assert (job.last_error or "").startswith("Keboola trigger failed: ***")
    assert await world.store.triggers(job.id) == []


async def test_its_first_version_had_one_batch_a_job(world: World, tmp_path: Path) -> None:
    """As its design document has the table; it fired on `completed` alone."""
    there = Original(tmp_path / "first", SINGLE)
    there.job("completed", batch_id="batch_a")
    there.job("active", batch_id="batch_b")
    done = await take(world, there)
    assert [said for _, said in done.values()][2:] == ["ID 1, completed", "ID 2, active"]
    job = await world.store.find_job("job 2")
    assert job.watches.watch == tecko.parse(
        tecko.OpenAIBatches, {"secret": "openai-prod", "batch_ids": ["batch_b"]}
    )


async def test_a_second_import_doubles_nothing(world: World, there: Original) -> None:
    """What is here is named and stays as it is; what is new comes. Names may repeat there."""
    there.job("active", ("batch_a", "in_progress"), name="same")
    there.job("paused", ("batch_b", "in_progress"), name="same")
    first = await take(world, there)
    assert {*first} >= {"job 'same'", "job 'same (2)'"}
    there.job("active", ("batch_c", "in_progress"))
    again = await take(world, there)
    assert again.pop("job 'job 3'") == (True, "ID 3, active")
    assert {*again.values()} == {(True, "is here already, and stays as it is")}
    assert len(await world.store.jobs()) == 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"openai_secret_id": None}, "openai_secret"),
    ({"keboola_secret_id": 77}, "keboola_secret"),
    ({"openai_secret_id": 2}, "of type keboola; needed: openai"),
    ({"keboola_stack_url": "http://connection.keboola.com"}, "keboola_stack_url: found"),
    ({"poll_interval_seconds": 86400}, "poll_interval_seconds: found"),
    ({"status": "zombie"}, "status: found 'zombie'"),
    ({"name": "123"}, "name: found '123'"),
]


@Given(("changed", "said"), BAD)
async def test_what_cannot_come_is_listed(
    world: World, there: Original, changed: dict[str, Any], said: str
) -> None:
    """With its reason, and leaves nothing behind; the others come."""
    there.job("active", ("batch_a", "in_progress"), **changed)
    there.job("active", ("batch_b", "in_progress"))
    done = await take(world, there)
    [(what, why)] = [(what, why) for what, (here, why) in done.items() if not here]
    assert what.startswith("job") and said in why
    assert [job.name for job in await world.store.jobs()] == ["job 2"]


async def test_a_job_without_batches_is_listed(world: World, there: Original) -> None:
    there.job("active")
    done = await take(world, there)
    assert not done["job 'job 1'"][0] and "batch_ids" in done["job 'job 1'"][1]


async def test_with_another_key_nothing_comes(world: World, there: Original) -> None:
    """Neither the secrets nor the jobs that need them, and no word of a value."""
    there.job("active", ("batch_a", "in_progress"))
    done = await take(world, there, "another key")
    assert [here for here, _ in done.values()] == [False] * 3
    assert done["secret 'openai-prod'"][1] == "the original's SECRET_KEY does not open it"
    assert await world.store.jobs() == [] and len(await world.store.secrets()) == 2


async def test_an_import_that_breaks_off_leaves_nothing(world: World, there: Original) -> None:
    """It is one transaction: the secrets, which came first, are not here either."""
    there.job("active", ("batch_a", "in_progress"))
    with closing(sqlite3.connect(there.file, isolation_level=None)) as db:
        db.execute("DROP TABLE polling_logs")
    with pytest.raises(tecko.StoreError, match="no such table: polling_logs"):
        await take(world, there)
    assert await world.store.jobs() == [] and len(await world.store.secrets()) == 2


@Given(
    ("content", "said"),
    [
        (None, "unable to open database file"),
        (b"this is no database, however long it is made", "not a database"),
        (b"", "no such table: secrets"),
    ],
)
def test_a_file_that_is_none_of_its_databases(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    """One line, and the store is as it was."""
    if content is not None:
        (tmp_path / "old.db").write_bytes(content)
    (tmp_path / ".env").write_text(f"SECRET_KEY={MASTER_KEY}\n")
    done = run_program("import", "old.db", cwd=tmp_path)
    assert done.returncode == 1 and "old.db: " in done.stderr and said in done.stderr


def test_the_command(tmp_path: Path, there: Original) -> None:
    """Its .env gives the key; --json says all; 1 where something could not come."""
    there.job("active", ("batch_a", "in_progress"))
    env = {"SECRET_KEY": MASTER_KEY}
    done = run_program("--json", "import", str(there.file), cwd=tmp_path, env=env)
    told = json.loads(done.stdout)["imported"]
    assert done.returncode == 0 and [row["here"] for row in told] == [True] * 3
    there.job("zombie", ("batch_b", "in_progress"))
    (tmp_path / "key.env").write_text(f"SECRET_KEY={SECRET_KEY}\n")
    done = run_program(*("import", str(there.file), "--env", "key.env"), cwd=tmp_path, env=env)
    assert done.returncode == 1 and "NOT   job 'job 2': status: found 'zombie'" in done.stdout
    (there.file.parent / ".env").unlink()
    done = run_program("import", str(there.file), cwd=tmp_path, env=env)
    assert done.returncode == 1 and "hint: --env names" in done.stderr
