"""Backups: taken under load, verified, put back; what a start does with a damaged database; and
that nothing fires twice for a trigger whose row was lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import postgres
import pytest
import standins
from conftest import (
    ENVIRONMENT,
    JOB_YAML,
    RunningProgram,
    World,
    clean_environment,
    execute,
    make_world,
    run_program,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from standins import Fault
from test_crash import Site, until
from test_once import Histories
from warm import Program

import teckochecker as tecko

DRILLS = int(os.environ.get("RESTORE_DRILLS", "3"))  # 200 take the better part of an hour
DRILLS_AT_ONCE = 4
WATCHES = 8  # jobs of a drill
NO_KEYS = tecko.Vault(tecko.load_config(Path("no-jobs.yaml"), {}).settings)
PAGE = 4096


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def settings_of(world: World, **changes: Any) -> tecko.Settings:
    return world.config.settings.model_copy(update=changes)


def block(**given: Any) -> tecko.BackupBlock:
    return tecko.BackupBlock.model_validate(given)


def backed_up(world: World, name: str = "copy.db") -> Path:
    """A backup of the world's database as it is now."""
    file = world.config.base / name
    tecko.make_backup(world.config.settings.database, file, world.vault, world.clock())
    return file


# ── Making and verifying ──────────────────────────────────────────────────────────────────────


async def test_backups_while_others_write(world: World) -> None:
    """Each copy is of one moment: as many jobs as log rows that say so, and all are verified."""
    done = threading.Event()

    async def writes() -> None:
        for n in range(10_000):
            await world.job(f"job-{n}")
            if done.is_set():
                return

    def copies() -> list[Path]:
        try:
            return [backed_up(world, f"{n}.db") for n in range(5)]
        finally:
            done.set()

    files, _ = await asyncio.gather(asyncio.to_thread(copies), writes())
    jobs = [execute(file, "SELECT count(*) FROM polling_jobs")[0][0] for file in files]
    logs = "SELECT count(*) FROM polling_logs WHERE job_id IS NOT NULL"
    assert [execute(file, logs)[0][0] for file in files] == jobs
    assert jobs[0] < jobs[-1] and {mode(file) for file in files} == {0o600}
    assert sorted(world.config.base.glob("*.db*")) == sorted(
        [*files, *world.config.base.glob("teckochecker.db*")]
    )


def overwrite(file: Path, at: int = 2 * PAGE) -> None:
    """As a broken disk would."""
    with file.open("r+b") as handle:
        handle.seek(at)
        handle.write(b"\xa5" * PAGE)


def in_file(sql: str) -> Callable[[Path], object]:
    return lambda file: execute(file, sql)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a page overwritten": (overwrite, "damaged|malformed"),
    "the header overwritten": (lambda file: overwrite(file, 0), "not a database"),
    "cut off": (lambda file: os.truncate(file, file.stat().st_size // 2), "damaged|malformed"),
    "empty": (lambda file: os.truncate(file, 0), "no such table"),
    "not there": (Path.unlink, "unable to open"),
    "a row missing": (in_file("DELETE FROM polling_logs"), "not the rows"),
    "a row too many": (in_file("INSERT INTO etl_part VALUES ('a', 'b', 'c', 1)"), "not the rows"),
    "a row that refers to nothing": (
        in_file("UPDATE polling_batches SET job_id = 99"),
        "refers to nothing",
    ),
    "of a newer version": (in_file("UPDATE schema_version SET version = 99"), "newer"),
    "no backup": (in_file("DELETE FROM backups"), "is it a backup"),
    "without a version": (in_file("DELETE FROM schema_version"), "not the rows"),
    "with no counts": (in_file("UPDATE backups SET counts = '{'"), "is it a backup"),
    "restored already": (in_file("UPDATE backups SET restored_at = 1"), "is it a backup"),
    "a secret changed": (in_file("UPDATE secrets SET name = name || 'x'"), "does not decrypt"),
    "of another key": (in_file("UPDATE secrets SET key_id = 'x'"), "a key that is not in"),
}


@pytest.mark.parametrize("how", SPOILT)
async def test_what_is_no_good_backup_is_refused(world: World, how: str) -> None:
    """Whatever is wrong with it is said, and the database stays as it is."""
    await world.job()
    file, (spoil, said) = backed_up(world), SPOILT[how]
    tecko.verify_backup(file, world.vault)
    spoil(file)
    database = world.config.settings.database
    before = database.read_bytes()
    with pytest.raises(tecko.StoreError, match=said):
        tecko.restore([file], world.config.settings, "by hand", world.clock())
    assert database.read_bytes() == before


@pytest.mark.parametrize("what", ["a full disk", "no folder", "a damaged database", "another key"])
async def test_a_backup_that_fails(world: World, what: str) -> None:
    """It is told and tried again; the one before stays, and no part of a copy is left."""
    settings, now = settings_of(world, backup=block(every=60, keep=1)), world.clock.now
    await world.store.close()
    backups = tecko.Backups(world.vault, lambda: False)
    backups.run_if_due(settings, now)
    [first] = tecko.backups_in(settings.backups)
    os.utime(first, (now, now))
    limits, kept = resource.getrlimit(resource.RLIMIT_FSIZE), settings.database.read_bytes()
    if what == "no folder":
        settings = settings_of(world, backup=block(every=60, folder=f"{first}/no"))
    elif what == "a damaged database":
        overwrite(settings.database, 3 * PAGE)
    elif what == "another key":
        execute(settings.database, "UPDATE secrets SET key_id = 'x'")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * PAGE, limits[1]))
    try:
        backups.run_if_due(settings, now + 61)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert backups.error is not None
    assert [*first.parent.iterdir()] == [first]
    settings.database.write_bytes(kept)
    backups.run_if_due(replace_folder(settings, None), now + 62)
    assert backups.error is None
    [second] = first.parent.iterdir()
    assert second != first and backups.last == now + 62


def replace_folder(settings: tecko.Settings, folder: str | None) -> tecko.Settings:
    block = settings.backup.model_copy(update={"folder": folder, "keep": 1})
    return settings.model_copy(update={"backup": block})


async def test_when_a_backup_is_due(world: World) -> None:
    """At first, and when the newest is old enough, also after a restart; `keep` of them stay. One
    of a clock that was ahead counts for nothing, and after a new key one is made at once."""
    settings, now = settings_of(world, backup=block(every=3600, keep=2)), 1.7e9
    made = list[str]()
    for at in (0, 60, 3599, 3600, 3700, 7200, 10_800):
        tecko.Backups(world.vault, lambda: False).run_if_due(settings, now + at)
        files = tecko.backups_in(settings.backups)
        if files[-1].name not in made:
            made.append(files[-1].name)
            os.utime(files[-1], (now + at, now + at))
    assert made == [tecko.file_timestamp(now + at) + ".db" for at in (0, 3600, 7200, 10_800)]
    assert [file.name for file in files] == made[-2:]
    os.utime(files[-1], (now + 10**6, now + 10**6))
    tecko.Backups(world.vault, lambda: False).run_if_due(settings, now + 10_801)
    assert tecko.backups_in(settings.backups)[-1].name == tecko.file_timestamp(now + 10_801) + ".db"


async def test_a_new_master_key_makes_a_backup_due(tmp_path: Path) -> None:
    """What was sealed with the old one may not open any more."""
    key = tmp_path / "key"
    tecko.write_private(key, tecko.new_master_key())
    config = tecko.load_config(tmp_path / "jobs.yaml", {"SECRET_KEY_FILE": str(key)})
    await tecko.Store(config.settings.database).touch()
    backups, now = tecko.Backups(tecko.Vault(config.settings), lambda: False), key.stat().st_mtime
    backups.run_if_due(config.settings, now + 10)
    [file] = tecko.backups_in(config.settings.backups)
    os.utime(file, (now + 10, now + 10))
    backups.run_if_due(config.settings, now + 20)
    assert backups.last == now + 10
    os.utime(key, (now + 15, now + 15))
    backups.run_if_due(config.settings, now + 20)
    assert backups.last == now + 20


async def test_never_and_servers_make_no_backups(tmp_path: Path) -> None:
    """`every: never`, or a database that is none of ours to copy."""
    file = tmp_path / "jobs.yaml"
    for text, env in (
        ("backup: {every: never}", {}),
        ("backup: {every: 1h}", {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}),
    ):
        file.write_text(f"{text}\njobs: []\n")
        settings = tecko.load_config(file, env).settings
        tecko.Backups(tecko.Vault(settings), lambda: False).run_if_due(settings, 1.8e9)
    assert os.listdir(tmp_path) == ["jobs.yaml"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("every: 59", "backup.every: found 59; allowed: at least 60 seconds"),
        ("every: 2w", "backup.every: found '2w'; allowed: at least 60 seconds"),
        ("every: sometimes", "or never"),
        ("keep: 0", "backup.keep: found 0; allowed: how many, at least 1"),
        ("at: 3", "backup.at: found an unknown key; allowed: every, folder, keep"),
    ],
)
def test_a_bad_backup_block(tmp_path: Path, given: str, said: str) -> None:
    """Each mistake is told once, with its place and what is allowed."""
    (tmp_path / "jobs.yaml").write_text(f"backup: {{{given}}}\njobs: []\n")
    with pytest.raises(tecko.Invalid, match=said) as e:
        tecko.load_config(tmp_path / "jobs.yaml", {})
    assert len(e.value.problems) == 1


async def test_a_backup_ends_with_the_program(world: World) -> None:
    """A large copy does not keep the program from ending: no statement of its goes on."""
    database, file = world.config.settings.database, world.config.base / "copy.db"
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)"
    execute(database, f"INSERT INTO etl_part {numbers} SELECT i, 'a', 'b', 1 FROM n")
    with pytest.raises(tecko.StoreError, match="interrupted"):
        tecko.make_backup(database, file, world.vault, 1.0, lambda: True)
    assert not [*world.config.base.glob("*copy.db*")]


# ── Putting one back ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    """A folder with a key file, a database with one secret, and no jobs."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\njobs: []\n")
    tecko.write_private(tmp_path / "teckochecker.key", tecko.new_master_key())
    settings = settings_in(tmp_path)
    vault, value = tecko.Vault(settings), tecko.SecretValue(standins.OPENAI_KEY)
    async with tecko.Store(settings.database) as store:
        seal = partial(vault.seal, "openai", "openai", value)
        await store.add_secret("openai", "openai", seal, 1.0)
    return tmp_path


def contents(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def settings_in(home: Path) -> tecko.Settings:
    return tecko.load_config(home / "jobs.yaml", {}).settings


def copy_of(home: Path, name: str = "copy.db") -> Path:
    """A backup that the library made."""
    file = home / name
    tecko.make_backup(home / "teckochecker.db", file, tecko.Vault(settings_in(home)), time.time())
    return file


def test_the_key_goes_along_only_where_asked(home: Path) -> None:
    """With --with-key it is beside the backup, and for its owner alone; never in it."""
    done = run_program("backup", "copy.db", "--with-key", cwd=home)
    assert done.returncode == 0, done.stderr
    key, copy, beside = (home / n for n in ("teckochecker.key", "copy.db", "copy.db.key"))
    assert beside.read_text() == key.read_text() and (mode(copy), mode(beside)) == (0o600, 0o600)
    assert key.read_bytes().strip() not in copy.read_bytes()
    beside.unlink()
    again = run_program("backup", "copy.db", cwd=home)
    assert again.returncode == 1 and "there already" in again.stderr and not beside.exists()


@pytest.mark.parametrize("present", ["missing", "another"])
def test_a_restore_names_the_key_beside_the_backup(home: Path, present: str) -> None:
    """Where the present key is missing or does not open it; the present one stays as it is."""
    file, key = copy_of(home), home / "teckochecker.key"
    key.rename(f"{file}.key")
    if present == "another":
        tecko.write_private(key, tecko.new_master_key())
    before = contents(key)
    with pytest.raises(tecko.StoreError, match=f"its key is in {file}.key"):
        tecko.restore([file], settings_in(home), "by hand", 1.8e9)
    assert contents(key) == before
    Path(f"{file}.key").rename(key)
    tecko.restore([file], settings_in(home), "by hand", 1.8e9)
    copy_of(home, "opens.db")


async def test_records_get_no_id_twice(world: World) -> None:
    """Who reads /data by `after` sees what comes after a restore, whatever was read before."""
    database, row = world.config.settings.database, "'{}', x'00', 1, 1) RETURNING id"
    add = "INSERT INTO normalized_data (source, source_id, data, hash, created_at, updated_at)"
    execute(database, f"{add} VALUES ('s', '1', {row}")
    file = backed_up(world)
    [[lost]] = execute(database, f"{add} VALUES ('s', '2', {row}")
    await world.store.close()
    tecko.restore([file], world.config.settings, "by hand", world.clock())
    [[new]] = execute(database, f"{add} VALUES ('s', '2', {row}")
    assert new > lost


async def test_a_restore_keeps_what_it_replaces(home: Path) -> None:
    """The database that was there, with a log beside it, opens under its new name; and what was
    done since is in it."""
    file, database = copy_of(home), home / "teckochecker.db"
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("INSERT INTO etl_part VALUES ('late', 'b', 'c', 1)")  # still in the log
    said = tecko.restore([file], settings_in(home), "by hand", 1.8e9)
    writer.close()
    kept = Path(f"{database}.{tecko.file_timestamp(1.8e9)}")
    assert str(kept) in said and mode(database) == 0o600
    late = "SELECT source FROM etl_part"
    assert (execute(database, late), execute(kept, late)) == ([], [("late",)])


def test_a_restore_is_refused_while_a_service_runs(home: Path) -> None:
    """And a backup is made meanwhile."""
    with RunningProgram(home):
        copy_of(home)
        refused = run_program("restore", "copy.db", cwd=home)
    assert refused.returncode == 1 and "works on this database" in refused.stderr
    assert not [*home.glob("teckochecker.db.2*")]


def test_a_server_has_its_own_commands(tmp_path: Path) -> None:
    """One line names them; nothing is asked or written."""
    env = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    (tmp_path / "jobs.yaml").write_text("jobs: []\n")
    for command, named in (("backup", "pg_dump"), ("restore", "pg_restore")):
        done = run_program(command, "copy.db", cwd=tmp_path, env=env)
        assert done.returncode == 1 and named in done.stderr.splitlines()[0]
    assert os.listdir(tmp_path) == ["jobs.yaml"]


# ── A damaged database at the start ───────────────────────────────────────────────────────────


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a page overwritten": overwrite,
    "no database any more": lambda file: overwrite(file, 0),
    "cut off": lambda file: os.truncate(file, 5 * PAGE),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


def damaged(home: Path, damage: str) -> dict[Path, bytes]:
    """Three backups, the newest damaged, and a database damaged like this; what is there then."""
    for day in (1, 2, 3):
        copy_of(home, f"teckochecker.db.backups/2026010{day}T000000Z.db")
    overwrite(home / "teckochecker.db.backups" / "20260103T000000Z.db")
    DAMAGES[damage](home / "teckochecker.db")
    return {path: path.read_bytes() for path in home.rglob("*.db")}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_start_falls_back(
    home: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest good backup takes the place of a damaged or deleted database, which is kept as it
    is, and that is said; a second start finds nothing to do."""
    before, database = damaged(home, damage), home / "teckochecker.db"
    tecko.ensure_usable_database(settings_in(home), 1.8e9)
    [said] = [record.message for record in caplog.records if record.levelname == "CRITICAL"]
    assert "cannot be used" in said and "20260102T000000Z.db" in said
    assert contents(Path(f"{database}.{tecko.file_timestamp(1.8e9)}")) == before.get(database)
    async with tecko.Store(database) as store:
        [waits] = await store.attention(10)
        assert waits == {"id": None, "job": "database", "what": "restored", "reason": said}
        assert [row.name for row in await store.secrets()] == ["openai"]
    tecko.ensure_usable_database(settings_in(home), 1.9e9)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_start_without_a_good_backup_is_refused(home: Path, damage: str) -> None:
    """What was found and what to do is said, and nothing is overwritten."""
    before = damaged(home, damage)
    for day in (1, 2):
        before.pop(home / "teckochecker.db.backups" / f"2026010{day}T000000Z.db")
        (home / "teckochecker.db.backups" / f"2026010{day}T000000Z.db").unlink()
    with pytest.raises(tecko.StoreError, match=r"cannot be used.*20260103T000000Z\.db") as e:
        tecko.ensure_usable_database(settings_in(home), 1.8e9)
    assert "`restore FILE`" in e.value.hint
    assert {path: path.read_bytes() for path in home.rglob("*.db")} == before


def test_every_surface_tells_of_a_fallback(home: Path) -> None:
    """Log, health, attention, stats and status, until a person says that they know."""
    damaged(home, "a page overwritten")
    with RunningProgram(home) as program:
        assert "CRITICAL" in program.text() and "took its place" in program.text()
        health = asked(program, "/health")
        assert health["status"] == "degraded" and "took the database's place" in str(health)
        assert [each["what"] for each in health["attention"]] == ["restored"]
        assert asked(program, "/stats")["restored"] == 1
        assert "took its place" in run_program("status", cwd=home).stdout
        assert run_program("restore", "--acknowledge", cwd=home).stdout == "noted\n"
        assert asked(program, "/health")["status"] == "healthy"


def asked(program: RunningProgram, path: str) -> dict[str, Any]:
    document: dict[str, Any]
    document = tecko.ask_service(program.url, "GET", path, settings_in(program.cwd))
    return document


async def test_nothing_makes_an_empty_database_in_place_of_one_that_is_gone(home: Path) -> None:
    """While there are backups of it; whoever would open it is told what to do."""
    copy_of(home, "teckochecker.db.backups/20260101T000000Z.db")
    for suffix in ("", "-wal", "-shm"):
        (home / f"teckochecker.db{suffix}").unlink(missing_ok=True)
    for looks in (True, False):
        with pytest.raises(tecko.StoreError, match="is gone") as e:
            await tecko.Store(home / "teckochecker.db", read_only=looks).touch()
        assert "start" in e.value.hint
    assert not (home / "teckochecker.db").exists()


def test_a_database_with_two_names_is_not_replaced(home: Path) -> None:
    """A service may work on it under the other one; its opening refuses it."""
    copy_of(home, "teckochecker.db.backups/20250101T000000Z.db")
    os.link(home / "teckochecker.db", home / "other.db")
    before = sorted(home.iterdir())
    tecko.ensure_usable_database(settings_in(home), 1.8e9)
    assert sorted(home.iterdir()) == before


def test_the_first_start_needs_no_backup(tmp_path: Path) -> None:
    """No database and no backups: a new one is made, and soon the first backup of it."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\njobs: []\n")
    with RunningProgram(tmp_path) as program:
        until(lambda: asked(program, "/health")["backup_last_success_at"], "a word about a backup")
        assert len(tecko.backups_in(tmp_path / "teckochecker.db.backups")) == 1
        health = asked(program, "/health")
        assert (health["status"], health["backup_last_error"]) == ("healthy", None)
        assert asked(program, "/stats")["backup_last_success_at"]


def test_a_log_that_was_cut(tmp_path: Path) -> None:
    """Killed, and the end of SQLite's log is lost: the transactions before it count."""
    with Site(tmp_path / "site") as site:
        with site.program() as program:
            until(lambda: site.ended() == "completed", "the job's end")
            program.kill()
        log = site.folder / "teckochecker.db-wal"
        os.truncate(log, log.stat().st_size - 100)
        with site.program():
            assert until(site.ended, "the job's end") == "completed"
        assert len(site.keboola.created) == 1


# ── Once, though rows were lost ───────────────────────────────────────────────────────────────

Before = Callable[[World, int], Awaitable[None]]


async def undecided(world: World, job_id: int) -> None:
    """The backup has the job, and no trigger."""


async def decided(world: World, job_id: int) -> None:
    """Its trigger is pending: Keboola's index does not answer."""
    world.keboola.fault("GET /v2/storage", Fault.status(503))
    await world.steps.step(job_id)


async def postponed(world: World, job_id: int) -> None:
    """Its trigger was refused for now."""
    world.keboola.fault("POST /jobs", Fault.rate_limited(5))
    await world.steps.step(job_id)


async def asked_for(world: World, job_id: int) -> None:
    """Its trigger's answer was lost, and nothing was started."""
    world.keboola.fault("POST /jobs", Fault.reset())
    await world.steps.step(job_id)


async def running(world: World, job_id: int) -> None:
    """Its Keboola job runs."""
    world.keboola.runs_until_told = True
    await world.steps.step(job_id)
    world.keboola.runs_until_told = False


async def ended(world: World, job_id: int) -> None:
    """All is over."""
    await world.step_until_waiting(job_id)


STATES: tuple[Before, ...] = (undecided, decided, postponed, asked_for, running, ended)


async def restored(world: World, file: Path, folder: Path) -> tuple[World, Any]:
    """The world goes on from a backup."""
    await world.store.close()
    settings = world.config.settings
    tecko.restore([file], settings, "by hand", world.clock())
    again, close = await make_world(folder, world.openai, world.keboola, {})
    again.clock.now, again.clock.passed = world.clock.now, world.clock.passed
    return again, close


@pytest.mark.parametrize("went_on", [True, False], ids=["to its end", "no further"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_once_after_a_restore(
    world: World, tmp_path: Path, state: Before, went_on: bool
) -> None:
    """Whatever the backup knew of a trigger, and whether or not it was sent since: one Keboola job,
    and the job completes."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job()
    await state(world, job_id)
    file = backed_up(world)
    if went_on:
        world.clock.turn(3000)
        await world.step_until_waiting(job_id)
    again, close = await restored(world, file, tmp_path)
    await again.step_until_waiting(job_id)
    [made] = world.keboola.created
    [trigger] = await again.store.triggers(job_id)
    assert (trigger.state, trigger.keboola_job_id) == ("succeeded", made["id"])
    assert (await again.get(job_id)).status == "completed"
    await close()


async def test_a_job_that_the_backup_has_not(world: World, tmp_path: Path) -> None:
    """jobs.yaml brings it back under its name, and its Keboola job is found."""
    file = backed_up(world)
    world.openai.batch("batch_1", "completed")
    await world.step_until_waiting(await world.job())
    again, close = await restored(world, file, tmp_path)
    job_id = await again.job()
    await again.step_until_waiting(job_id)
    assert len(world.keboola.created) == 1
    assert (await again.get(job_id)).status == "completed"
    await close()


async def test_only_what_is_the_same_is_adopted(world: World, tmp_path: Path) -> None:
    """Neither a job with other batches, nor one with another name; each fires for itself."""
    file = backed_up(world)
    for batch in ("batch_1", "batch_2"):
        world.openai.batch(batch, "completed")
    await world.step_until_waiting(await world.job("other"))
    await world.step_until_waiting(await world.job("job", batch_ids=["batch_1", "batch_2"]))
    again, close = await restored(world, file, tmp_path)
    await again.step_until_waiting(await again.job("job"))
    assert len(world.keboola.created) == 3
    await close()


async def test_a_retry_after_a_restore_starts_a_new_one(world: World, tmp_path: Path) -> None:
    """The adopted Keboola job had failed: `job retry` does not find it once more."""
    world.openai.batch("batch_1", "completed")
    job_id, world.keboola.end_with = await world.job(), "error"
    file = backed_up(world)
    await world.step_until_waiting(job_id)
    again, close = await restored(world, file, tmp_path)
    await again.step_until_waiting(job_id)
    assert (await again.get(job_id)).status == "failed" and len(world.keboola.created) == 1
    world.keboola.end_with = "success"
    await again.store.retry_job(job_id, again.clock())
    await again.step_until_waiting(job_id)
    assert (await again.get(job_id)).status == "completed" and len(world.keboola.created) == 2
    await close()


async def test_hold_leaves_a_lost_trigger_to_a_person(world: World, tmp_path: Path) -> None:
    """`on_ambiguous: hold`: what the search does not show is not sent without being asked for."""
    world.openai.batch("batch_1", "completed")
    job_id = await world.job(on_ambiguous="hold")
    again, close = await restored(world, backed_up(world), tmp_path)
    await again.step_until_waiting(job_id)
    [trigger] = await again.store.triggers(job_id)
    assert trigger.state == "held" and world.keboola.created == []
    await close()


async def test_once_after_pg_restore(
    server: postgres.Server, tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """Which makes other tables than were dumped: what fired since the dump does not fire again,
    and a person is told, once."""
    url = server.schema()
    world, close = await make_world(tmp_path, openai, keboola, {}, url)
    openai.key(standins.OPENAI_KEY)
    await world.secret("openai", "openai", standins.OPENAI_KEY)
    await world.secret("keboola", "keboola", standins.KEBOOLA_TOKEN)
    openai.batch("batch_1", "completed")
    job_id = await world.job()
    for _ in range(2):  # the same tables: nothing to tell
        await world.store.detect_restore(world.clock())
    assert not await world.store.acknowledge()
    dump = server.dump(url)
    await world.step_until_waiting(job_id)
    await close()
    server.restore(url, dump)
    env = ENVIRONMENT | {"DATABASE_URL": url, "OPENAI_BASE_URL": openai.base_url}
    checked = await asyncio.to_thread(run_program, "check", cwd=tmp_path, env=env)
    assert checked.returncode == 0, checked.stderr
    again, close = await make_world(tmp_path, openai, keboola, {}, url)
    await again.store.detect_restore(again.clock())
    assert (await again.get(job_id)).status == "completed" and len(keboola.created) == 1
    [told] = [row for row in await again.store.attention(9) if row["what"] == "restored"]
    assert f"a dump of {tecko.iso(world.clock.now)[:10]}" in told["reason"]
    assert [await again.store.acknowledge() for _ in range(2)] == [True, False]
    await close()


async def test_younger_batches_fire_without_a_search(world: World, tmp_path: Path) -> None:
    """They were in no trigger that a restore could have lost."""
    again, close = await restored(world, backed_up(world), tmp_path)
    created = int(again.clock() + 2 * tecko.CLOCK_DOUBT)
    world.openai.batch("batch_1", "completed", created_at=created)
    await again.step_until_waiting(await again.job())
    assert len(world.keboola.created) == 1 and world.keboola.count("GET /search/jobs") == 0
    await close()


# ── Random histories with restores ────────────────────────────────────────────────────────────


class Restores(Histories):
    """A life in which the database is lost now and then, and a backup takes its place."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = list[Path]()
        self.retries = 0

    @rule()
    def is_backed_up(self) -> None:
        self.copies.append(backed_up(self.world, f"{len(self.copies)}.db"))

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 9))
    def is_restored(self, which: int) -> None:
        self.loop.run(self.close())
        file, settings_ = self.copies[which % len(self.copies)], self.world.config.settings
        tecko.restore([file], settings_, "lost", self.world.clock())
        self.open(self.world.clock)
        self.ids = {batch.batch_id for batch in self.job().batches}

    def person(self, command: str) -> None:
        self.retries += command == "retry_job"
        super().person(command)

    @invariant()
    def at_most_once(self) -> None:
        """A set of batches starts a Keboola job again only as often as a person asked for it."""
        started = Counter[Any]()
        for job in self.keboola.created:
            values = self.keboola.variables(job)
            ids = json.loads(values["batch_ids_completed"]) + json.loads(values["batch_ids_failed"])
            started[job["config"], *sorted(ids)] += 1
        assert max(started.values(), default=0) <= 1 + self.retries

    def nothing_is_lost(self) -> None:
        made = {job["id"] for job in self.keboola.created}
        for trigger in self.triggers():
            assert (trigger.state in ("succeeded", "failed")) == (trigger.keboola_job_id in made)
        rounds = {trigger.round: trigger for trigger in self.triggers()}
        self.job_is_right(self.job(), rounds.get(self.job().round))


def test_random_histories_with_restores() -> None:
    """A trigger whose row was lost is not sent again, and none that was decided is lost."""
    examples = int(os.environ.get("RESTORE_HISTORIES", "10"))
    how: Any = {"max_examples": examples, "stateful_step_count": 20, "deadline": None}
    slow = [HealthCheck.too_slow]
    run_state_machine_as_test(Restores, settings=settings(**how, suppress_health_check=slow))


# ── Drills ────────────────────────────────────────────────────────────────────────────────────


JOB = """\
  - name: job-{n}
    poll_interval: 1s
    watch: {{secret: openai, batch_ids: [batch_{n}]}}
    trigger:
      {{secret: keboola, stack_url: "{stack}", component_id: comp, configuration_id: cfg}}
"""


def add_load(site: Site) -> list[standins.Batch]:
    """Jobs whose batches are still to be finished, and an ingest."""
    jobs = "".join(JOB.format(n=n, stack=site.keboola.url) for n in range(WATCHES))
    records = "  - {name: records, poll_interval: 1s, ingest: {type: csv, path: r.csv, id: id}}\n"
    head = JOB_YAML.partition("  - name")[0].format()
    (site.folder / "jobs.yaml").write_text(head + jobs + records)
    (site.folder / "r.csv").write_text("id,title\n" + "".join(f"{n},t\n" for n in range(500)))
    return [site.openai.batch(f"batch_{n}", "in_progress") for n in range(WATCHES)]


def under_load(site: Site, luck: random.Random) -> list[Path]:
    """Finish the batches while backups are made; services and backups are killed. The backups."""
    batches, made = add_load(site), list[Path]()
    luck.shuffle(batches)
    while batches or not made:
        with site.program() as program:
            for _ in range(luck.randint(1, 3)):
                for batch in [batches.pop() for _ in range(min(len(batches), luck.randint(0, 3)))]:
                    batch.become("completed")
                file = site.folder / f"{len(made)}.db"
                made += [file] if back_up(site, file, killed=luck.random() < 0.2) else []
            program.kill()
    return made


def back_up(site: Site, file: Path, *, killed: bool) -> bool:
    """Whether there is a backup afterwards. One that is killed is a process of its own."""
    if not killed:
        tecko.make_backup(site.folder / "teckochecker.db", file, NO_KEYS, time.time())
        return True
    env = clean_environment(site.environment)
    with Program("backup", file.name, cwd=site.folder, env=env) as backup:
        until(
            lambda: [*site.folder.glob(f".{file.name}.*")] or backup.poll() is not None, "a draft"
        )
        backup.kill()
    return file.exists()


def drill(folder: Path, seed: int) -> None:
    """One of the backups is restored, and run on."""
    luck = random.Random(seed)
    with Site(folder) as site:
        file = luck.choice(under_load(site, luck))
        done = run_program("restore", file.name, cwd=folder, env=site.environment)
        assert done.returncode == 0, done.stderr
        undone = "SELECT 1 FROM polling_jobs WHERE completed_at IS NULL AND watch_secret <> ''"
        with site.program():
            until(lambda: not site.rows(undone), "the end of every job")
            until(lambda: site.rows("SELECT 1 FROM etl_run WHERE status = 'success'"), "a run")
        names = [site.keboola.variables(job)["teckochecker_job"] for job in site.keboola.created]
        assert Counter(names) == {f"job-{n}": 1 for n in range(WATCHES)}
        states = {row["status"] for row in site.rows("SELECT status FROM polling_jobs")}
        assert states == {"completed", "active"}  # the ingest
        assert site.rows("SELECT count(*) AS n FROM normalized_data") == [{"n": 500}]
        assert site.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.fixture(scope="module")
def drills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[None]]]:
    """All of them, some at once: most of the time they wait."""
    folder = tmp_path_factory.mktemp("drills")
    with ThreadPoolExecutor(DRILLS_AT_ONCE) as pool:
        yield [pool.submit(drill, folder / str(n), n) for n in range(DRILLS)]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("number", range(DRILLS))
def test_restore_drill(drills: list[Future[None]], number: int) -> None:
    """From a backup taken under load, with kill -9s before and after it: nothing that was decided
    is lost, and nothing is doubled."""
    drills[number].result()
