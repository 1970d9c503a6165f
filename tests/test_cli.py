"""The command line from outside: what is printed where, exit codes, files, signals, the daemon."""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import logging
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import LOCK_EX, flock
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import postgres
import pytest
import standins
from conftest import (
    JOB_YAML,
    MASTER_KEY,
    PROGRAM,
    RunningProgram,
    clean_environment,
    flat_job,
    program_environment,
    run_program,
)
from warm import Program, Script

import teckochecker as tecko

LONG = "a-name-of-just-one-word-" + "x" * 80
LONG_STACK = f"https://connection.{'y' * 60}.keboola.com"
PLACEHOLDER = {"SECRET_KEY": "your-secret-key-for-encryption"}
TARGET = f"""\
secret: keboola, stack_url: "{LONG_STACK}", component_id: comp, configuration_id: cfg"""
HOME_YAML = f"""\
admin: {{port: 0}}
secrets:
  openai-env: {{type: openai, env: TEST_OPENAI_KEY}}
jobs:
  - name: from-file
    watch: {{secret: openai, batch_ids: [batch_1]}}
    trigger: {{{TARGET}}}
"""
CREATE = (
    "job create --name new --batch-id batch_1 --openai-secret openai --keboola-secret keboola"
    " --keboola-stack https://connection.keboola.com --component-id comp --config-id cfg"
)

# ── Many commands ─────────────────────────────────────────────────────────────────────────────


class Told(NamedTuple):
    """One command line, what it may read on stdin, and its own environment."""

    line: str
    env: Mapping[str, str] = {}
    typed: str = ""


class Done(NamedTuple):
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout of a command that succeeded, without a word else."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)

    def refused(self, *words: str) -> None:
        """Exit code 1, nothing on stdout, one line that has the words (below it perhaps the line
        of jobs.yaml that it is about), and at most a hint."""
        assert (self.code, self.out) == (1, ""), self.err
        first, *hints = (line for line in self.err.splitlines() if line[0] != " ")
        assert len(hints) <= 1 and all(hint.startswith("hint: ") for hint in hints), self.err
        missing = [word for word in words if word not in self.err]
        assert first.startswith("teckochecker: ") and not missing, self.err


def run_many(folder: Path, lines: Sequence[Told | str], env: Mapping[str, str] = {}) -> list[Done]:
    """Run command lines one after the other; how each ended."""
    ended = []
    for line, more, typed in map(as_told, lines):
        given = {"COLUMNS": "80", **env, **more}
        done = run_program(*shlex.split(line), cwd=folder, env=given, input=typed)
        ended.append(Done(done.returncode, done.stdout, done.stderr))
    return ended


def as_told(line: Told | str) -> Told:
    return Told(line) if isinstance(line, str) else line


def until(condition: Callable[[], Any], what: str, timeout: float = 5.0) -> Any:
    """Poll until the condition holds; what it was, once it is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)
    return value


# ── A stocked folder ──────────────────────────────────────────────────────────────────────────


async def stock(folder: Path) -> None:
    """Two secrets, a job of jobs.yaml, and one job for each state that a command may meet."""
    config = tecko.load_config(folder / "jobs.yaml", {})
    vault = tecko.Vault(config.settings)
    async with tecko.Store(config.settings.database) as store:
        for kind in ("openai", "keboola"):
            seal = partial(vault.seal, kind, kind, tecko.SecretValue(f"value-of-{kind}-secret"))
            await store.add_secret(kind, kind, seal, 1.0)
        [from_file] = config.jobs or []
        assert isinstance(from_file, tecko.JobSpec)
        for name in ("from-file", "gone"):
            watch = from_file.watch.model_copy(update={"batch_ids": [f"batch_{name}"]})
            changed = from_file.model_copy(update={"name": name, "watch": watch})
            await store.sync_file_jobs([changed], 1.0)
        await store.sync_file_jobs([from_file], 1.0)
        for name in ("active", "paused", "failed", "completed", LONG):
            watch = from_file.watch.model_copy(update={"batch_ids": [f"batch_{name}"]})
            spec = from_file.model_copy(update={"name": name, "watch": watch})
            await store.create_job(spec, "store", 1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, jobs.yaml and a store; no test changes it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "jobs.yaml").write_text(HOME_YAML)
    tecko.write_private(folder / "teckochecker.key", tecko.new_master_key() + "\n")
    asyncio.run(stock(folder))
    with sqlite3.connect(folder / "teckochecker.db") as db:
        for status in ("paused", "failed", "completed"):
            db.execute("UPDATE polling_jobs SET status = ? WHERE name = ?", (status, status))
    db.close()
    return folder


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────

ROWS: tuple[tuple[Any, ...], ...] = (
    (Told("job pause paused"), "Cannot pause", "'paused'", "it is paused"),
    (Told("job pause completed"), "Cannot pause", "it is completed"),
    (Told("job pause gone"), "Cannot pause", "it is removed"),
    (Told("job resume active"), "Cannot resume", "it is active"),
    (Told("job resume failed"), "Cannot resume", "it is failed"),
    (Told("job retry active"), "Cannot retry", "it is active"),
    (Told("job retry completed"), "Cannot retry", "it is completed"),
    (Told("job update from-file --poll-interval 1h"), "jobs.yaml", "hint: "),
    (Told("job delete from-file --force"), "jobs.yaml", "hint: "),
    (Told("job delete active"), "without a terminal", "--force"),
    (Told("secret delete openai"), "without a terminal", "--force"),
    (Told("secret delete openai --force"), "it is referenced by active jobs: 'from-file', "),
    (Told("secret delete nothing --force"), "Secret 'nothing' not found"),
    (Told("job show 99"), "Job with ID 99 not found", "hint: "),
    (Told("job show nothing"), "'nothing'", "not found"),
    (Told("job pause nothing"), "'nothing'", "not found"),
    (Told("job update nothing --config-id 2"), "'nothing'", "not found"),
    (Told("job delete nothing --force"), "'nothing'", "not found"),
    (Told("check nothing"), "'nothing'", "not found"),
    (Told(CREATE.replace("new", "active")), "there is a job 'active' already"),
    (Told("job update paused --name active"), "there is a job 'active' already"),
    (Told(f"{CREATE} --poll-interval 5"), "--poll-interval: found '5'; allowed: 30 to 3600"),
    (Told("job update active --poll-interval 2h"), "--poll-interval: found '2h'"),
    (Told(f"{CREATE} --batch-id nobatch"), "--batch-id[1]: found 'nobatch'"),
    (Told(f"{CREATE} --batch-id batch_1"), "twice"),
    (Told(f"{CREATE} --keboola-stack http://a.com"), "--keboola-stack: found 'http://a.com'"),
    (Told(f"{CREATE} --name 12"), "--name: found '12'"),
    (Told(f"{CREATE} --name ''"), "--name: found ''"),
    (Told(f"{CREATE} --variable batch_count_total=1"), "variables", "batch_count_total"),
    (Told(f"{CREATE} --openai-secret nothing"), "no secret 'nothing'", "hint: "),
    (Told(f"{CREATE} --openai-secret keboola"), "of type keboola", "needed: openai"),
    (Told("secret add --name openai --type openai", {}, "value-x"), "'openai' already exists"),
    (Told("secret add --name x --type openai --replace", {}, "value-x"), "no secret 'x'"),
    (Told("secret add --name x --type openai", {}, " \n"), "empty"),
    (Told("secret add --name x --type openai", {}, "one\ntwo"), "control characters"),
    (Told("secret add --name 12 --type openai", {}, "value-x"), "name"),
    (Told("secret add --name '' --type openai", {}, "value-x"), "name"),
    (Told("secret add --name 'a\tb' --type openai", {}, "value-x"), "name"),
    (Told(f"secret add --name {'n' * 256} --type openai", {}, "value-x"), "name"),
    (Told("secret add --name x --type openai", PLACEHOLDER, "value-x"), "master key", "44"),
    (Told("validate", PLACEHOLDER | {"TEST_OPENAI_KEY": "sk-1234"}), "master key", "44"),
    (Told("init", PLACEHOLDER), "master key", "44"),
    (Told("secret rotate", {"SECRET_KEY": MASTER_KEY}), "hint: set SECRET_KEY=NEW,OLD"),
    (Told("-c nothing.yaml validate"), "nothing.yaml", "no such file", "hint: "),
    (Told("-c nowhere/jobs.yaml init"), "nowhere"),
    (Told("init", {"DATABASE_URL": "sqlite:///nowhere/x.db"}), "nowhere"),
    (Told("secret add --name x --type api", {"SECRET_KEY_FILE": "."}, "value-x"), "key"),
    (Told("job list", {"DATABASE_URL": "sqlite:///nowhere/x.db"}), "nowhere/x.db"),
    (Told("job list", {"DATABASE_URL": "sqlite:///jobs.yaml"}), "jobs.yaml", "database"),
    (Told("job list", {"DATABASE_URL": "mysql://host/db"}), "DATABASE_URL", "sqlite:///"),
    (Told("job list", {"LOG_LEVEL": "LOUD"}), "LOG_LEVEL", "DEBUG"),
    (Told("job list", {"API_PORT": "http"}), "API_PORT", "0 to 65535"),
    (Told("job list", {"API_HOST": "0.0.0.0"}), "0.0.0.0", "hint: set ADMIN_TOKEN"),  # noqa: S104
    (Told("-c binary.yaml job list"), "binary.yaml"),
    (Told("-c dotted/jobs.yaml job list"), ".env"),
    (Told("stop"), "no TeckoChecker runs"),
)
REFUSALS: dict[str, tuple[Told, tuple[str, ...]]] = {
    " ".join([line.line[:90], *(f"{k}={v}" for k, v in line.env.items())]): (line, tuple(words))
    for line, *words in ROWS
}


class Refusals(NamedTuple):
    """How the commands ended, and whether key and store are still what they were."""

    done: dict[str, Done]
    unchanged: bool


@pytest.fixture(scope="module")
def refusals(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    """Every command line of REFUSALS as it ended; run once, in a copy of the stocked folder."""
    folder = tmp_path_factory.mktemp("refusals") / "home"
    shutil.copytree(home, folder)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "dotted").mkdir()
    (folder / "dotted/jobs.yaml").touch()
    (folder / "dotted/.env").write_bytes(b"NAME=caf\xe9\n")
    before = (folder / "teckochecker.key").read_text(), dump(folder)
    ended = run_many(folder, [line for line, _ in REFUSALS.values()])
    after = (folder / "teckochecker.key").read_text(), dump(folder)
    return Refusals(dict(zip(REFUSALS, ended, strict=True)), before == after)


def dump(folder: Path) -> list[str]:
    """Everything that a store holds."""
    db = sqlite3.connect(folder / "teckochecker.db")
    try:
        return list(db.iterdump())
    finally:
        db.close()


@pytest.mark.parametrize("line", REFUSALS)
def test_a_refusal_is_one_line_that_says_why(line: str, refusals: Refusals) -> None:
    """What cannot be done ends with 1 and one line on stderr; stdout stays empty."""
    refusals.done[line].refused(*REFUSALS[line][1])


def test_refusals_change_nothing(refusals: Refusals) -> None:
    """After all of them key and store are what they were: nothing was encrypted or half done."""
    assert refusals.unchanged


def test_every_bad_value_of_a_job_is_named_at_once(home: Path) -> None:
    """Three bad values of one job are three lines, each with the option that was typed; with --json
    stdout has them as a document, too."""
    bad = "--batch-id no --keboola-stack ftp://a --poll-interval 1"
    [done] = run_many(home, [f"--json {CREATE} {bad}"])
    document = json.loads(done.out)
    assert (done.code, document["error"]) == (1, "validation_error")
    for option in ("--poll-interval", "--batch-id[1]", "--keboola-stack"):
        assert sum(f"teckochecker: {option}: " in line for line in done.err.splitlines()) == 1
        assert sum(error["where"] == option for error in document["errors"]) == 1


def test_wrong_usage_is_exit_code_2(home: Path) -> None:
    """Unknown commands, options and choices, and missing options: usage on stderr, code 2."""
    lines = (
        "",
        "fly",
        "job",
        "secret",
        "job list --status bad",
        "job list --fast",
        "job create --name x",
        "job show",
        "job show 1 --logs many",
        "secret add --name x --type gold",
        f"{CREATE} --variable novalue",
    )
    for line, done in zip(lines, run_many(home, lines), strict=True):
        assert (done.code, done.out) == (2, ""), line
        assert "usage: " in done.err and "error: " in done.err, line


@pytest.mark.parametrize(("line", "code"), [("--version", 0), ("job show 99", 1), ("job fly", 2)])
def test_the_process_ends_with_the_exit_code(home: Path, line: str, code: int) -> None:
    """`python teckochecker.py` itself passes the code on, and prints where it should."""
    done = run_program(*line.split(), cwd=home, kind=Script)
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0) and bool(done.stderr) == (code != 0)


# ── From init to delete ───────────────────────────────────────────────────────────────────────


class Moment(NamedTuple):
    """The text of a key file, and the sealed secrets by name, at some time."""

    key: str
    rows: dict[str, tecko.SealedSecret]

    def opened(self, name: str, key: str) -> str:
        """A secret's value, opened with a key file's text."""
        given = tecko.SecretValue(key.strip())
        settings = tecko.load_config(Path("none.yaml"), {}).settings
        vault = tecko.Vault(settings.model_copy(update={"secret_key": given}))
        vault.load(required=True)
        return vault.open(self.rows[name]).reveal()


def moment(folder: Path) -> Moment:
    async def rows() -> list[tecko.SealedSecret]:
        async with tecko.Store(folder / "teckochecker.db") as store:
            return await store.secrets()

    found = {row.name: row for row in asyncio.run(rows())}
    return Moment((folder / "teckochecker.key").read_text(), found)


class Story(NamedTuple):
    """What the commands of one folder's life said, and its secrets around the rotation."""

    folder: Path
    said: dict[str, Done]
    before: Moment
    after: Moment


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One folder's life, with --json before and after the command, jobs by id and by name."""
    folder = tmp_path_factory.mktemp("story")
    said: dict[str, Done] = {}

    def tell(**lines: Told | str) -> Moment:
        said.update(zip(lines, run_many(folder, list(lines.values())), strict=True))
        return moment(folder)

    before = tell(
        init="--json init",
        init_again="init --json",
        add_openai=Told("--json secret add --name openai --type openai", {}, "  sk-value-1 \n"),
        add_keboola=Told("secret add --name keboola --type keboola --json", {}, "kbc-value-1\n"),
        create=f"--json {CREATE} --batch-id batch_2 --variable region=eu --poll-interval 90s"
        " --trigger-when all_finished --on-ambiguous hold",
        list="job list --json",
        update="--json job update 1 --name renamed --poll-interval 1h --batch-id batch_3",
        pause="job pause renamed --json",
        list_active="job list --status active --json",
        resume="--json job resume 1",
        show="job show renamed --json",
        replace="secret add --name openai --type openai --replace --value sk-value-2 --json",
        secrets="--json secret list",
        validate="validate --json",
        status="--json status",
    )
    with sqlite3.connect(folder / "teckochecker.db") as db:
        db.execute("UPDATE polling_jobs SET status = 'failed'")
    db.close()
    after = tell(retry="job retry renamed --json", rotate="--json secret rotate")
    tell(
        delete="job delete 1 --force --json",
        delete_secret="--json secret delete openai --force",
        list_empty="--json job list",
    )
    return Story(folder, said, before, after)


REPORTING = (
    "init init_again add_openai add_keboola create list update pause list_active resume show"
    " secrets validate status retry rotate delete delete_secret list_empty"
).split()


@pytest.mark.parametrize("step", REPORTING)
def test_json_is_one_document_on_stdout(step: str, story: Story) -> None:
    """Every reporting command prints one JSON document with --json, and nothing on stderr."""
    assert isinstance(story.said[step].document, dict)


def test_init_makes_what_is_missing_and_then_nothing(story: Story) -> None:
    """The first run makes key (0600), database and jobs.yaml and says so; the second nothing."""
    made = "\n".join(story.said["init"].document["done"])
    assert all(name in made for name in ("teckochecker.key", "teckochecker.db", "jobs.yaml"))
    assert stat.S_IMODE((story.folder / "teckochecker.key").stat().st_mode) == 0o600
    assert story.said["init_again"].document["done"] == []
    assert story.said["init"].document["next"], "it says what to do next"


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """A jobs.yaml and a key that are there stay as they are, whatever else is missing."""
    key = tecko.new_master_key()
    (tmp_path / "jobs.yaml").write_text("database: other.db\n")
    (tmp_path / "teckochecker.key").write_text(key)
    [first, again] = run_many(tmp_path, ["init", "init"])
    assert "other.db" in first.out and "nothing was changed" in again.out
    assert (tmp_path / "jobs.yaml").read_text() == "database: other.db\n"
    assert (tmp_path / "teckochecker.key").read_text() == key
    assert (tmp_path / "other.db").exists() and not (tmp_path / "teckochecker.db").exists()


def test_a_created_job_is_what_was_asked_for(story: Story) -> None:
    """Every option of `job create` is in the job that it reports."""
    wanted = flat_job(name="new", id=1, status="active", poll_interval_seconds=90)
    wanted |= {"variables": {"region": "eu"}}
    wanted |= {"trigger_when": "all_finished", "on_ambiguous": "hold"}
    job = story.said["create"].document
    assert {name: job[name] for name in wanted} == wanted
    assert [row["id"] for row in story.said["list"].document["jobs"]] == [1]


def test_commands_change_a_job_by_id_and_by_name(story: Story) -> None:
    """update, pause, resume and retry report the job as it is after them; delete ends it."""
    updated = story.said["update"].document
    assert (updated["name"], updated["poll_interval_seconds"]) == ("renamed", 3600)
    assert updated["batch_ids"] == ["batch_3"] and updated["variables"] == {"region": "eu"}
    statuses = [story.said[step].document["status"] for step in ("pause", "resume", "retry")]
    assert statuses == ["paused", "active", "active"]
    nothing = {"jobs": [], "total": 0, "next_after": None}
    assert story.said["list_active"].document == nothing
    assert story.said["list_empty"].document == nothing


def test_show_has_batches_triggers_and_logs(story: Story) -> None:
    """`job show` tells the job's whole story, oldest first."""
    shown = story.said["show"].document
    assert [batch["batch_id"] for batch in shown["batches"]] == ["batch_3"]
    assert shown["triggers"] == []
    told = [entry["status"] for entry in shown["logs"]]
    assert told == ["created", "updated", "paused", "resumed"]


def test_a_value_is_stripped_and_never_listed(story: Story) -> None:
    """White space around a piped value is not part of it; `secret list` shows names and types."""
    assert story.before.opened("keboola", story.before.key) == "kbc-value-1"
    rows = story.said["secrets"].document["secrets"]
    assert [(row["name"], row["type"]) for row in rows] == [
        ("keboola", "keboola"),
        ("openai", "openai"),
    ]
    assert "value" not in story.said["secrets"].out


def test_value_on_the_command_line_works_but_warns(story: Story) -> None:
    """--value is taken, and stderr says who can see it; stdout is still one JSON document."""
    assert story.before.opened("openai", story.before.key) == "sk-value-2"
    assert (
        story.said["replace"].code == 0
        and json.loads(story.said["replace"].out)["name"] == "openai"
    )
    assert "warning: " in story.said["replace"].err and "sk-value" not in story.said["replace"].err


def test_rotation_replaces_the_key(story: Story) -> None:
    """After `secret rotate` the new key opens what is stored, and the old one no longer does."""
    assert story.said["rotate"].document == {"resealed": 2}
    assert len(story.after.key.split()) == 1
    assert story.after.opened("keboola", story.after.key) == "kbc-value-1"
    with pytest.raises(tecko.SecretError):
        story.after.opened("keboola", story.before.key)


def test_the_first_jobs_file_is_good(story: Story, tmp_path: Path) -> None:
    """What init writes validates as it is, and with the # taken away."""
    assert (story.folder / "jobs.yaml").read_text() == tecko.first_jobs_file()
    assert story.said["validate"].document["valid"] is True
    assert story.said["validate"].document["secrets"] == ["keboola", "openai"]
    text = tecko.first_jobs_file().replace("\n#  ", "\n  ")
    (tmp_path / "jobs.yaml").write_text(text)
    env = {"OPENAI_API_KEY": "sk-of-tests", "KEBOOLA_TOKEN": "1-2-of-tests"}
    [bare, uncommented] = run_many(
        story.folder, ["validate", Told(f"-c {tmp_path}/jobs.yaml validate", env)]
    )
    assert "0 jobs" in bare.out and "1 job, 2 secrets" in uncommented.out, uncommented.err


def test_status_of_what_does_not_run(story: Story) -> None:
    """Without a service `status` says so, with the jobs by state."""
    status = story.said["status"].document
    assert status["running"] is False and status["pid"] is None
    assert status["jobs"] == {"active": 1}


def test_stats_of_each_day(home: Path, tmp_path: Path) -> None:
    """A table, or one document: the days on which anything was done, at most so many as asked."""
    shutil.copytree(home, tmp_path / "home")
    with sqlite3.connect(tmp_path / "home" / "teckochecker.db") as db:
        for day in ("2026-11-25", "2026-11-26"):
            db.execute("INSERT INTO daily_sums VALUES (?, 1200, 4, 90, 0)", (day,))
    table, document = run_many(tmp_path / "home", ["stats", "--json stats --days 1"])
    assert re.search(r"2026-11-25 +1200 +4 +22 +0\n2026-11-26", table.out)
    numbers = {"checks": 1200, "triggers": 4, "done_to_post_ms": 22, "records": 0}
    assert document.document == {"history": [{"day": "2026-11-26"} | numbers]}


def imported(folder: Path, *lines: str) -> set[str]:
    """The modules that were imported in the end by one process that ran these command lines."""
    run = "import shlex, sys, teckochecker\nfor line in sys.argv[1:]:"
    run += "\n    teckochecker.main(shlex.split(line))\nprint(*sys.modules, file=sys.stderr)"
    env = clean_environment({"PYTHONPATH": str(PROGRAM.parent), "TEST_OPENAI_KEY": "sk-of-tests"})
    command = [sys.executable, "-c", run, *lines]
    ran = subprocess.run(command, cwd=folder, env=env, input=b"value-y", capture_output=True)
    assert not ran.returncode, ran.stderr
    return set(ran.stderr.decode().splitlines()[-1].split())


def test_commands_without_openai_do_not_import_its_sdk(home: Path, tmp_path: Path) -> None:
    """The SDK costs 0.7 s and 30 MB: what asks OpenAI nothing does without. Only `validate` needs
    an HTTP client, to see whether one can be made."""
    shutil.copytree(home, tmp_path / "home")
    lines = ["secret add --name y --type api", CREATE, "init", "job list", "job show 1"]
    quick = imported(tmp_path / "home", *lines, "secret list", "status", "stop")
    assert not quick & {"openai", "httpx2", "apscheduler"}
    assert imported(tmp_path / "home", "validate") & {"openai", "httpx2"} == {"httpx2"}


def test_validate_names_what_does_not_resolve_or_decrypt(home: Path, tmp_path: Path) -> None:
    """A reference to an unset variable, a stored secret under another key, a bad job: each is a
    line of its own; what is good validates."""
    text = HOME_YAML.replace("watch: {secret: openai,", "watch: {secret: openai-env,")
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home/jobs.yaml").write_text(text)
    other = {"SECRET_KEY": tecko.new_master_key()}
    resolved = {"TEST_OPENAI_KEY": "sk-whatever"}
    [bad, sealed_otherwise, good] = run_many(
        tmp_path / "home",
        ["validate", Told("validate", other | resolved), Told("validate", resolved)],
    )
    bad.refused("jobs.yaml:6", "'from-file'", "TEST_OPENAI_KEY is not set")
    assert sealed_otherwise.code == 1
    assert all(f"secret '{name}'" in sealed_otherwise.err for name in ("openai", "keboola"))
    assert good.code == 0 and "is good" in good.out


# ── What is printed ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("line", ["job list", f"job show {LONG}", "secret list", "status"])
def test_a_piped_table_is_whole(home: Path, line: str) -> None:
    """No row is folded or cut, however long: a name is found by `grep`, and nothing is coloured."""
    [done] = run_many(home, [Told(line, {"COLUMNS": "20"})])
    assert (done.code, done.err) == (0, "") and "\x1b" not in done.out and "…" not in done.out
    if "job" in line:
        assert len([row for row in done.out.splitlines() if LONG in row]) >= 1
    if "show" in line:
        assert LONG_STACK in done.out


@pytest.mark.parametrize("columns", [120, 80, 50, 20])
@pytest.mark.parametrize("line", ["job list", f"job show {LONG}", "secret list", "status"])
def test_a_table_fits_its_terminal(home: Path, line: str, columns: int) -> None:
    """Columns go and times become short before a word is broken."""
    _, screen, _ = Terminal(home, line, {"COLUMNS": str(columns)}, stdout_too=True).run(b"")
    rows = re.sub(r"\x1b\[[0-9;]*m", "", screen).splitlines()
    assert max(len(row.rstrip()) for row in rows) <= columns
    if line == "job list":
        words = {word for row in rows for word in row.split()}
        assert {"from-file", "active", "paused", "failed"} <= words


@pytest.mark.parametrize("line", ["job list", "--json job list"])
def test_a_reader_that_leaves_is_no_error(home: Path, line: str) -> None:
    """`job list | head -1` prints no traceback when head has gone."""
    process = Script(
        *line.split(),
        cwd=home,
        env=clean_environment({"PYTHONUNBUFFERED": ""}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=20)[1] == ""


@dataclass
class Terminal:
    """A command that has a terminal for stdin and stderr; its stdout is a pipe."""

    folder: Path
    line: str
    env: Mapping[str, str] = field(default_factory=dict)
    stdout_too: bool = False

    def run(
        self,
        typed: bytes,
        after: bytes = b"",
        number: int | None = None,
        before: Sequence[tuple[bytes, bytes]] = (),
    ) -> tuple[int, str, str]:
        """Type, or send the signal `number`, once the screen shows `after`; `before` that, type
        what belongs to other words. Exit code, the screen, stdout."""
        here, there = pty.openpty()
        process = Program(
            *shlex.split(self.line),
            cwd=self.folder,
            env=clean_environment({"TERM": "xterm", "COLUMNS": "80"} | dict(self.env)),
            stdin=there,
            stdout=there if self.stdout_too else subprocess.PIPE,
            stderr=there,
            start_new_session=True,  # else /dev/tty would be the terminal of who runs the tests
        )
        os.close(there)
        screen, seen = b"", 0
        try:
            for word, answer in (*before, (after, b"")):
                while (found := screen.find(word, seen)) < 0:
                    screen += self.read(here)
                seen = found + len(word)
                os.write(here, answer)
            if number is not None:
                process.send_signal(number)
            os.write(here, typed)
            while more := self.read(here):
                screen += more
            out = process.communicate(timeout=20)[0]
        finally:
            process.kill()
            process.wait(10)
            os.close(here)
        return process.returncode, screen.decode(), out or ""

    @staticmethod
    def read(here: int) -> bytes:
        """What appears next; nothing once nobody writes any more."""
        assert select.select([here], [], [], 20)[0], "nothing on the screen for 20 s"
        with suppress(OSError):
            return os.read(here, 4096)
        return b""


@pytest.fixture(scope="module")
def operations(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stocked folder for what is typed at a terminal."""
    return Path(shutil.copytree(home, tmp_path_factory.mktemp("operations") / "home"))


def test_a_typed_secret_is_not_echoed(operations: Path) -> None:
    """On a terminal the value is asked for, and does not appear on the screen."""
    code, screen, out = Terminal(operations, "secret add --name typed --type openai").run(
        b"sk-typed-value\n", after=b": "
    )
    assert code == 0 and "typed" in out
    assert "Secret value" in screen and "sk-typed" not in screen + out


@pytest.mark.parametrize(
    ("line", "typed", "code"),
    [
        ("job delete active", b"n\n", 1),
        ("job delete active", b"\x04", 1),
        ("secret add --name eof --type openai", b"\x04", 1),
        ("--json job delete completed", b"y\n", 0),
    ],
    ids=["no", "end of file", "end of file for a value", "yes"],
)
def test_deleting_asks_on_a_terminal(operations: Path, line: str, typed: bytes, code: int) -> None:
    """Only a yes deletes; the question is no part of stdout, whose JSON stays one document, and
    an end of file is a no rather than a traceback."""
    prompt = b"value: " if "secret" in line else b""
    ended, screen, out = Terminal(operations, line).run(typed, after=prompt)
    assert ended == code and "Traceback" not in screen
    assert ("active" in "\n".join(dump(operations))) and "eof" not in "\n".join(dump(operations))
    assert json.loads(out)["success"] if code == 0 else out == ""


def test_no_color_is_honoured_on_a_terminal(home: Path) -> None:
    """With NO_COLOR not one colour is switched on, even where escape codes could be used."""
    code, screen, _ = Terminal(home, "job list", {"NO_COLOR": "1"}, stdout_too=True).run(b"")
    assert code == 0 and "from-file" in screen
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d", screen)


# ── Starting ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("env", [{}, PLACEHOLDER], ids=["no key", "the example's placeholder"])
def test_start_refuses_without_the_key_that_stored_secrets_need(
    home: Path, tmp_path: Path, env: Mapping[str, str]
) -> None:
    """A first start without a key, or under a published one, ends with one clear line."""
    folder = Path(shutil.copytree(home, tmp_path / "home"))
    (folder / "teckochecker.key").unlink()
    done = run_program("start", cwd=folder, env=env, timeout=8)
    said = [line for line in done.stderr.splitlines() if line.startswith("teckochecker: ")]
    assert done.returncode == 1 and done.stdout == ""
    assert len(said) == 1 and "master key" in said[0]


@dataclass
class Live:
    """A running service with one stand-in of each kind, its folder and its environment."""

    program: RunningProgram
    openai: standins.OpenAI
    keboola: standins.Keboola

    def cli(self, *lines: Told | str) -> list[Done]:
        """Command lines beside the service, which succeed."""
        done = run_many(self.program.cwd, lines, self.program.env)
        assert [each.code for each in done] == [0] * len(lines), done
        return done

    def create(self, name: str, interval: str) -> str:
        """The command line that creates a job for a batch of the same name."""
        line = CREATE.replace("new", name).replace("batch_1", f"batch_{name}")
        line = line.replace("https://connection.keboola.com", self.keboola.url)
        return f"{line} --poll-interval {interval}"

    def checks(self, batch: str) -> int:
        """How often OpenAI was asked about a batch."""
        return self.openai.count(f"GET /v1/batches/{batch}")

    def ticks(self) -> int:
        """How many ticks the service has told of since this was last asked."""
        told = 0
        self.program.ear.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                self.program.notified.append(self.program.ear.recv(65536).decode())
                told += "WATCHDOG=1" in self.program.notified[-1]
        return told

    def triggered(self, job: str) -> list[Any]:
        """Keboola's jobs for this job."""
        made = self.keboola.created
        return [j for j in made if self.keboola.variables(j)["teckochecker_job"] == job]


def reload(live: Live, jobs_yaml: str = "") -> list[str]:
    """Write jobs.yaml and send SIGHUP; what was notified until the service is ready again."""
    if jobs_yaml:
        (live.program.cwd / "jobs.yaml").write_text(jobs_yaml)
    live.ticks()
    before = len(live.program.notified)
    live.program.process.send_signal(signal.SIGHUP)
    live.program.heard("READY=1")
    told = [text for text in live.program.notified[before:] if "WATCHDOG" not in text]
    return [text.partition("\n")[0] for text in told]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service that works with stored secrets and one job of jobs.yaml, which it checks once a
    second; the tests below use it one after the other."""
    folder = tmp_path_factory.mktemp("live")
    with standins.OpenAI() as openai, standins.Keboola() as keboola:
        (folder / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
        for name in ("1", "slow", "kept"):
            openai.batch(f"batch_{name}")
        openai.fault("GET /v1/batches", standins.Fault.status(404), times=None)  # count each
        env = program_environment(openai)
        live = Live(RunningProgram(folder, env), openai, keboola)
        values = {"openai": standins.OPENAI_KEY, "keboola": standins.KEBOOLA_TOKEN}
        lines = [Told(f"secret add --name {k} --type {k}", {}, v) for k, v in values.items()]
        live.cli("init", *lines, live.create("slow", "1h"), live.create("kept", "1s"))
        with live.program:
            yield live


class TestLive:
    """What the command line and signals do to a service while it runs."""

    def test_a_second_process_is_refused(self, live: Live) -> None:
        """start and start --daemon name the process that works on this database."""
        pid = str(live.program.process.pid)
        lines = ["start", "start --daemon", "--json status"]
        *refused, status = run_many(live.program.cwd, lines, live.program.env)
        for done in refused:
            done.refused(f"pid {pid}")
        shown = status.document
        assert (shown["running"], shown["pid"], shown["admin"]) == (
            True,
            int(pid),
            live.program.url,
        )
        assert shown["uptime_seconds"] >= 0
        assert "slow" in [due["job"] for due in shown["due_next"]]

    def test_check_asks_the_service(self, live: Live) -> None:
        """A job that is due in an hour is checked at once, by the service; the table says how it
        stands."""
        before = until(lambda: live.checks("batch_slow"), "the first check")
        [done] = live.cli("--json check slow")
        assert live.checks("batch_slow") == before + 1
        [row] = done.document
        assert (row["name"], row["status"]) == ("slow", "active")
        assert "batch_slow in_progress" in row["said"]

    def test_a_created_job_is_checked_within_two_ticks(self, live: Live) -> None:
        """A job added by the command line does not wait for anything but the next ticks."""
        live.openai.batch("batch_late")
        live.cli(live.create("late", "1s"))
        live.ticks()
        until(lambda: live.checks("batch_late"), "the first check")
        assert live.ticks() <= 2

    def test_pause_update_and_resume_take_effect(self, live: Live) -> None:
        """A job that was due in an hour is checked every second after `job update`; meanwhile
        the finished batch of a paused job triggers nothing, and does once that is resumed."""
        before = live.checks("batch_slow")
        live.cli("job pause late", "job update slow --poll-interval 1s")
        live.openai.batch("batch_late", "completed")
        until(lambda: live.checks("batch_slow") >= before + 2, "two further checks")
        assert live.ticks() <= 5 and not live.triggered("late")
        live.cli("job resume late")
        live.ticks()
        until(lambda: live.triggered("late"), "the trigger")
        assert live.ticks() <= 2

    def test_the_service_works_on_after_a_rotation(self, live: Live) -> None:
        """`secret rotate` under a running service: it takes up the new key by itself."""
        until(lambda: live.checks("batch_kept"), "the first check")
        live.cli("secret rotate")
        live.openai.batch("batch_kept", "completed")
        until(lambda: live.triggered("kept"), "the trigger")

    def test_reload_takes_up_a_new_and_a_changed_job(self, live: Live) -> None:
        """SIGHUP: another set of batches fires again, a new job appears, its interval follows the
        file, and what has left the file is listed as removed."""
        live.openai.batch("batch_1", "completed")
        until(lambda: len(live.triggered("job")) == 1, "the first trigger")
        live.openai.batch("batch_2", "completed")
        live.openai.batch("batch_added")
        first = JOB_YAML.format(stack=live.keboola.url).replace("batch_1", "batch_2")
        job = first.partition("jobs:\n")[2]
        added = job.replace("name: job", "name: added").replace("batch_2", "batch_added")
        assert reload(live, first + added.replace("1s", "1h")) == ["RELOADING=1", "READY=1"]
        until(lambda: len(live.triggered("job")) == 2, "the trigger of the second round")
        until(lambda: live.checks("batch_added") == 1, "the first check of the new job")
        reload(live, first.replace(job, "") + added)
        until(lambda: live.checks("batch_added") >= 3, "checks at the new interval")
        [done] = live.cli("--json job list --status removed")
        listed = done.document["jobs"]
        assert [row["name"] for row in listed] == ["job"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("jobs.yaml", b"jobs: [\n"), (".env", b"NAME=caf\xe9\n")],
        ids=["jobs.yaml", ".env"],
    )
    def test_a_bad_file_keeps_the_old_configuration(
        self, live: Live, name: str, content: bytes
    ) -> None:
        """SIGHUP with a file that cannot be read: the log names it, and the work goes on."""
        path = live.program.cwd / name
        good = path.read_bytes() if path.exists() else b""
        path.write_bytes(content)
        assert reload(live) == ["RELOADING=1", "READY=1"]
        path.write_bytes(good)
        said = live.program.text().splitlines()
        assert any("configuration before it stays" in k and f"{name}" in k for k in said)
        before = live.checks("batch_added")
        until(lambda: live.checks("batch_added") > before, "a further check")

    def test_reload_says_what_came_of_it(self, live: Live) -> None:
        """A good file is taken up; one with a mistake is refused with its words and exit code 1,
        and `status` goes on saying so until the next good one."""
        path = live.program.cwd / "jobs.yaml"
        good = path.read_bytes()
        path.write_bytes(good + b"  - {name: x}\n")
        refused, status = run_many(live.program.cwd, ["reload", "--json status"], live.program.env)
        path.write_bytes(good)
        assert refused.code == 1 and "job 'x': watch: missing" in refused.err
        assert refused.err.endswith("hint: the service goes on with what it had\n")
        assert "jobs.yaml" in {each["job"] for each in status.document["attention"]}
        done, status = live.cli("--json reload", "--json status")
        assert done.document["reloaded"] is True
        assert "jobs.yaml" not in {each["job"] for each in status.document["attention"]}

    def test_a_service_manager_that_does_not_listen_holds_nothing_up(self, live: Live) -> None:
        """Notifications that nobody takes fill their queue; the loop goes on all the same."""
        room = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        before = live.program.text().count("configuration before it stays")
        good = (live.program.cwd / "jobs.yaml").read_bytes()
        (live.program.cwd / "jobs.yaml").write_bytes(b"jobs: [\n")
        try:
            for number in range(before + 1, before + room // 2 + 5):  # two notifications each
                live.program.process.send_signal(signal.SIGHUP)
                until(partial(self.said, live, number), f"reload {number}")
        finally:
            (live.program.cwd / "jobs.yaml").write_bytes(good)
            live.ticks()

    @staticmethod
    def said(live: Live, times: int) -> bool:
        """Whether so many reloads have failed by now."""
        return live.program.text().count("configuration before it stays") >= times

    def test_ctrl_c_ends_it_in_good_order(self, live: Live) -> None:
        """SIGINT: STOPPING=1 for systemd, exit code 0, no traceback, the lock is free again."""
        live.program.process.send_signal(signal.SIGINT)
        live.program.heard("STOPPING=1")  # a tick under way may say WATCHDOG=1 after it
        assert live.program.process.wait(15) == 0
        assert "Traceback" not in live.program.text()
        [status] = live.cli("--json status")
        assert status.document["running"] is False


@pytest.fixture(scope="module", autouse=True)
def hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningProgram]:
    """A service that was sent SIGTERM while OpenAI had not answered; it drains beside the other
    tests of this file, since that takes it some seconds."""
    folder = tmp_path_factory.mktemp("hung")
    with standins.OpenAI() as openai, standins.Keboola() as keboola:
        (folder / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
        openai.fault("*", standins.Fault.hang(), None)
        with RunningProgram(folder, program_environment(openai)) as program:
            until(lambda: openai.request_count, "a call to OpenAI", 15)
            program.process.send_signal(signal.SIGTERM)
            yield program


def test_sigterm_ends_it_while_openai_hangs(hung: RunningProgram) -> None:
    """A call that never returns does not keep the service from ending in good order."""
    assert hung.process.wait(15) == 0
    hung.ear.settimeout(1)
    told = [hung.ear.recv(65536).decode()]
    while "STOPPING=1" not in told:
        told.append(hung.ear.recv(65536).decode())
    assert "Traceback" not in hung.text()


# ── Streams, signals and prompts ──────────────────────────────────────────────────────────────

# What a stream can be, for commands that print help, a table, a document, and that ask.
STREAMS = {
    "--help": (">&-", ">/dev/full", "| head -0"),
    "job list": (">&-", "2>&-", ">/dev/full", "| head -0", "| true"),
    "--json job show caf\u00e9": (">&-", ">/dev/full", "| true", "ascii", "latin-1"),
    "job delete active": ("<&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"),
}


@pytest.fixture(scope="module")
def cafe(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stocked folder where one job's name is not ASCII."""
    folder = Path(shutil.copytree(home, tmp_path_factory.mktemp("cafe") / "home"))
    with sqlite3.connect(folder / "teckochecker.db") as db:
        db.execute("UPDATE polling_jobs SET name = 'caf\u00e9' WHERE name = 'paused'")
    db.close()
    return folder


@pytest.mark.parametrize("line", STREAMS)
def test_no_stream_brings_a_traceback(cafe: Path, line: str) -> None:
    """Closed, full, without a reader, or of another encoding: no traceback, and never the
    interpreter's own exit code 120."""
    program = shlex.join([sys.executable, "-m", "teckochecker", *line.split()])
    tried = [
        f"PYTHONIOENCODING={stream} {program}" if stream[0] in "al" else f"{program} {stream}"
        for stream in STREAMS[line]
    ]
    env = clean_environment({"PYTHONUNBUFFERED": "", "PYTHONPATH": str(PROGRAM.parent)})
    said = subprocess.run(
        ["bash", "-c", "; ".join(f"{{ {each}; }}; echo code $?" for each in tried)],
        cwd=cafe,
        env=env,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    text = (said.stdout + said.stderr).decode(errors="replace")
    assert "Traceback" not in text and "Exception ignored" not in text
    assert len(re.findall(r"^code [01]$", text, re.MULTILINE)) == len(tried)


def test_a_full_stdout_is_an_error(home: Path) -> None:
    """What could not be printed ends with 1 and a line that says why."""
    with open("/dev/full", "w") as full:
        process = Script("schema", cwd=home, stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 1 and "No space left" in said


LOOKING = (
    "status",
    "job list",
    "job show 1",
    "explain 1",
    "secret list",
    "validate",
    "data list",
    "data rejects",
    "logs",
    "schema",
    "stop",
    "reload",
    "start",
    "check",
    "job run 1",
    "job update 1 --name other",
    "job pause 1",
    "secret rotate",
    "alert test",
    "backup",
    "restore --acknowledge",
)


def test_an_empty_folder_stays_empty(tmp_path: Path) -> None:
    """A command that only looks, or changes what is there, makes no file where there is nothing;
    with a LOG_FILE and no usable key."""
    env = {"LOG_FILE": "t.log"} | PLACEHOLDER
    told = [Told(line, env if line != "start" else {}) for line in LOOKING]
    done = run_many(tmp_path, told)
    assert list(tmp_path.iterdir()) == []
    ended = dict(zip(LOOKING, done, strict=True))
    assert [line for line in LOOKING if ended[line].code == 0] == [
        "status",
        "secret list",
        "schema",
    ]
    ended["validate"].refused("no jobs.yaml in", "init writes one")
    ended["start"].refused("no jobs.yaml in", "init writes one")
    ended["check"].refused("no jobs.yaml in", "init writes one")
    ended["job list"].refused("there is no database at", "init")
    ended["secret rotate"].refused("there is no database at", "init")


def test_looking_leaves_a_database_as_it_is(home: Path, tmp_path: Path) -> None:
    """Beside a database that no process has open, they make neither a -wal nor another file."""
    folder = Path(shutil.copytree(home, tmp_path / "home"))
    dump(folder)  # the last one to have it open takes its -wal away
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_many(folder, ["status", "job list", "secret list", "logs", "explain active"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "prompt", "nothing"),
    [
        ("secret add --name q --type openai", b"value: ", "nothing stored"),
        ("secret delete openai", b"[y/N]: ", "nothing deleted"),
        ("job delete active", b"[y/N]: ", "nothing deleted"),
    ],
)
def test_ctrl_c_at_a_prompt(operations: Path, line: str, prompt: bytes, nothing: str) -> None:
    """The first Ctrl-C ends it with 130, and says that nothing was done."""
    code, screen, out = Terminal(operations, line).run(b"", prompt, signal.SIGINT)
    assert (code, out) == (130, "")
    assert nothing in screen and "Traceback" not in screen


def test_a_prompt_says_what_goes(tmp_path: Path) -> None:
    """Deleting an ingest deletes its records: question and answer say how many."""
    (tmp_path / "jobs.yaml").write_text("jobs: [{name: a, ingest: {type: csv, path: a.csv}}]")
    (tmp_path / "a.csv").write_text("id,title\n1,x\n2,y\n")
    env = {"SECRET_KEY": MASTER_KEY}
    run_many(tmp_path, ["job run a"], env)
    (tmp_path / "jobs.yaml").write_text("jobs: [{name: b, ingest: {type: csv, path: a.csv}}]")
    run_many(tmp_path, ["check"], env)
    code, screen, out = Terminal(tmp_path, "job delete a", env).run(b"y\n", b"[y/N]: ")
    assert code == 0 and "2 records in /data?" in screen and "2 records" in out


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4, 0.8])
def test_a_start_can_be_ended_at_any_moment(tmp_path: Path, delay: float) -> None:
    """SIGHUP, then SIGTERM, while it still starts: exit code 0, and no traceback."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    process = Script("start", cwd=tmp_path, env=clean_environment({}), stderr=subprocess.PIPE)
    handled = f"/proc/{process.pid}/status"
    until(
        lambda: int(re.findall(r"SigCgt:\s*(\w+)", Path(handled).read_text())[0], 16) >> 14 & 1, ""
    )
    time.sleep(delay)  # any moment will do
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 0 and "Traceback" not in said


def test_ctrl_c_during_the_imports_is_quiet(tmp_path: Path) -> None:
    """However early it comes, there is no traceback."""
    process = Script("job", "list", cwd=tmp_path, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    until(lambda: int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> 14 & 1, "")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=15)[1] == "" and process.returncode == 130


def test_a_start_whose_stderr_is_gone_ends_with_0(tmp_path: Path) -> None:
    """The reader of its log has gone: it works on, and SIGTERM ends it as ever."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    env = clean_environment({})
    process = Program("-v", "start", cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    database = tmp_path / "teckochecker.db"
    until(lambda: (found := tecko.holder(database)) and found.address, "its address", 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


# ── What is said ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("jbo list", "'job'"),
        ("job lsit", "'list'"),
        ("job show activ", "'active'"),
        ("check activ", "'active'"),
        ("secret delete opnai --force", "'openai'"),
    ],
)
def test_a_misspelt_word_is_met_with_the_one_that_was_meant(
    home: Path, line: str, meant: str
) -> None:
    """Commands, jobs and secrets."""
    [done] = run_many(home, [line])
    assert done.code in (1, 2) and f"did you mean {meant}?" in done.err


@pytest.mark.parametrize(
    "line", ["job list --stat paused", "secret add --na x --type api", "--js job list"]
)
def test_options_are_not_abbreviated(home: Path, line: str) -> None:
    """An abbreviation would become interface."""
    assert run_many(home, [line])[0].code == 2


@pytest.mark.parametrize("count", ["9" * 20, "\u00b2", "-1", "1.5", ""])
@pytest.mark.parametrize("line", ["job show 1 --logs", "data list --limit", "logs -n"])
def test_a_number_is_bounded(home: Path, line: str, count: str) -> None:
    """What is no number, or none that one could mean, is wrong usage."""
    assert run_many(home, [f"{line} '{count}'"])[0].code == 2


def test_options_of_all_commands_are_told_once(home: Path) -> None:
    """The help of a command has its own options with their defaults; the common ones are taken
    after it all the same."""
    main, show, after = run_many(home, ["--help", "job show --help", "job list --json -q"])
    assert "--json" in main.out and "--json" not in show.out and "default: 20" in show.out
    assert after.document["total"] == 7


def test_an_error_is_a_document_too(home: Path, tmp_path: Path) -> None:
    """With --json: what is wrong, and of jobs.yaml every mistake by itself; the exit code stays."""
    [error] = run_many(home, ["--json job show 99"])
    document = json.loads(error.out)
    assert (error.code, document["error"]) == (1, "job_not_found") and "99" in document["detail"]
    (tmp_path / "jobs.yaml").write_text("jobs: [{name: x}, {name: y}]\n")
    [bad] = run_many(tmp_path, ["--json validate"])
    told = json.loads(bad.out)
    assert told["valid"] is False and len(told["errors"]) >= 2
    wanted = {"file", "line", "column", "where", "found", "allowed"}
    assert all(set(each) == wanted for each in told["errors"])


def test_a_document_is_redacted_by_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    """A secret's value goes from texts; a key or number that looks like it stays what it is."""
    tecko.SecretValue("1234567")
    tecko.report(
        argparse.Namespace(json=True), {"1234567": [1234567, "a 1234567 b"], "n": {"x": "1234567"}}
    )
    assert json.loads(capsys.readouterr().out) == {
        "1234567": [1234567, "a *** b"],
        "n": {"x": "***"},
    }


def test_a_mistake_is_shown_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """File, line and column, the line itself and a mark; not where it may show a secret."""
    at: dict[str, Any] = {"file": "jobs.yaml", "line": 8, "column": 5}
    shown = tecko.Problem("jobs", "'a'", "b", **at, source="    secret: a")
    hidden = tecko.Problem("secrets.x", "'value'", "env", **at, source="    value: hunter2")
    tecko.print_error(tecko.Invalid([shown, hidden], hint="do that"))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("teckochecker: jobs.yaml:8:5: jobs: found 'a'")
    assert said[1:3] == ["    8 |     secret: a", "      |     ^"]
    assert (
        said[3].startswith("teckochecker: jobs.yaml:8:5: secrets.x") and said[4] == "hint: do that"
    )


def test_show_writes_a_definition_as_its_author_did(home: Path) -> None:
    """No brackets and quotes of Python, and no "None"."""
    assert (
        tecko.as_written({"a": ["b", 1], "c": True, "d": {"e": 1.5}})
        == "a: b, 1, c: true, d: e: 1.5"
    )
    [done] = run_many(home, ["job show active"])
    assert not re.search(r"\bNone\b|\{|\[", done.out)


def test_a_retry_that_cannot_help_says_so(home: Path, tmp_path: Path) -> None:
    """A batch that failed for good will not change: what to do instead is said."""
    folder = Path(shutil.copytree(home, tmp_path / "home"))
    with sqlite3.connect(folder / "teckochecker.db") as db:
        db.execute("UPDATE polling_batches SET status = 'failed' WHERE batch_id = 'batch_failed'")
    db.close()
    [done] = run_many(folder, ["job retry failed"])
    assert done.code == 0 and "is active now" in done.out
    assert "hint: batch_failed has failed at OpenAI for good" in done.err


def test_logs_name_the_job_and_who_asked(home: Path, tmp_path: Path) -> None:
    """Oldest first, with the actor; of one job, the last ones, and as a document."""
    folder = Path(shutil.copytree(home, tmp_path / "home"))
    lines = ["job pause active", "logs", "logs active -n 1", "--json logs active"]
    _, every, last, document = run_many(folder, lines)
    times = [row.split()[0] for row in every.out.splitlines()]
    assert times == sorted(times) and len(times) > 7
    assert last.out.splitlines()[0].endswith("active  paused (by command line)")
    assert [row["status"] for row in document.document] == ["created", "paused"]


def test_logs_follow_until_ctrl_c(home: Path, tmp_path: Path) -> None:
    """-f prints what comes, and Ctrl-C is its normal end."""
    folder = Path(shutil.copytree(home, tmp_path / "home"))
    env = clean_environment({})
    with Program("logs", "-f", "-n", "1", cwd=folder, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        run_many(folder, ["job pause active"])
        assert "active  paused (by command line)" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_stop_and_status_work_despite_a_mistake_in_jobs_yaml(tmp_path: Path) -> None:
    """The database is found where DATABASE_URL or the file says; a mistake stops neither."""
    text = "database: data/other.db\nadmin: {port: 0}\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "jobs.yaml").write_text(text)
    with RunningProgram(tmp_path) as program:
        (tmp_path / "jobs.yaml").write_text(text + "jobs: [\n")
        status, refused, stopped = run_many(tmp_path, ["--json status", "reload", "stop"])
        assert status.document["pid"] == program.process.pid and status.document["running"]
        refused.refused("jobs.yaml")
        assert (stopped.code, program.process.wait(10)) == (0, 0)


# ── The log file ──────────────────────────────────────────────────────────────────────────────


def settings_with(log_file: Path, log_format: str = "text") -> tecko.Settings:
    env = {"LOG_FILE": str(log_file), "LOG_FORMAT": log_format}
    return tecko.load_config(log_file.parent / "jobs.yaml", env).settings


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """What `set_up_logging` changes is as it was."""
    root, raising = logging.getLogger(), logging.raiseExceptions
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)


def test_a_log_file_that_was_moved_away_is_begun_anew(
    tmp_path: Path, logging_restored: None
) -> None:
    """As logrotate does it: the next line is in a new file."""
    tecko.set_up_logging(settings_with(tmp_path / "t.log"), "INFO")
    tecko.log.info("first")
    (tmp_path / "t.log").rename(tmp_path / "t.log.old")
    tecko.log.info("second")
    assert "second" in (tmp_path / "t.log").read_text()
    assert "second" not in (tmp_path / "t.log.old").read_text()


def test_a_full_disk_is_said_once(
    tmp_path: Path, logging_restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log file that cannot be written: one line about it, however many are lost."""
    (tmp_path / "t.log").symlink_to("/dev/full")
    tecko.set_up_logging(settings_with(tmp_path / "t.log"), "INFO")
    for number in range(5):
        tecko.log.info("line %d", number)
    said = capsys.readouterr().err
    assert said.count("cannot write the log file") == 1 and "Traceback" not in said


def test_a_json_line_names_its_job(tmp_path: Path, logging_restored: None) -> None:
    """Where the record knows one."""
    tecko.set_up_logging(settings_with(tmp_path / "t.log", "json"), "INFO")
    tecko.log.info("checked", extra={"job": "nightly"})
    tecko.log.info("started")
    first, second = map(json.loads, (tmp_path / "t.log").read_text().splitlines())
    assert first["job"] == "nightly" and "job" not in second


# ── Other machines ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("minor", [9, 10])
def test_an_older_python_is_told_so(minor: int) -> None:
    """The file is grammar that it can read, up to the line that says what is needed."""
    ast.parse(PROGRAM.read_text(), feature_version=(3, minor))
    found = [*Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python3")] + [
        Path(tool) for tool in [shutil.which(f"python3.{minor}")] if tool and "shims" not in tool
    ]
    for python in found[:1]:
        done = subprocess.run([python, str(PROGRAM), "status"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("TeckoChecker needs Python 3.11 or later; this is 3.")


@pytest.mark.parametrize("line", ["--help", "job list", "demo"])
def test_a_missing_package_is_one_line(tmp_path: Path, line: str) -> None:
    """A Python without the packages of requirements.txt says what to run."""
    command = [sys.executable, "-S", str(PROGRAM), *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    packages = PROGRAM.with_name("requirements.txt")
    assert f"is missing; run: {sys.executable} -m pip install -r {packages}\n" in done.stderr


# ── The daemon, and one round by hand ─────────────────────────────────────────────────────────


def test_a_daemon_starts_and_stops(tmp_path: Path) -> None:
    """start --daemon returns when the service is ready; status and the pid file know it; stop
    ends it, and then says that there is nothing to stop."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    [started] = run_many(tmp_path, ["--json -v start --daemon"])
    pid = started.document["pid"]
    try:
        lock = (tmp_path / "teckochecker.db.pid").read_text().split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        lines = ["--json status", "stop --json", "--json status", "stop"]
        shown, stopped, gone, again = run_many(tmp_path, lines)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert shown.document["pid"] == pid and shown.document["admin"].startswith("http://127")
    assert lock == [str(pid)] and command[-2:] == [b"start", b""]
    assert stopped.document == {"stopped": pid} and gone.document["running"] is False
    again.refused("no TeckoChecker runs")
    assert "admin surface" in Path(started.document["log"]).read_text()


def test_a_daemon_that_fails_says_why(tmp_path: Path) -> None:
    """What the background process would have printed is in the error, with where its log is."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    [done] = run_many(tmp_path, [Told("start --daemon", PLACEHOLDER)])
    done.refused("the service did not start", "master key", "hint: ", ".log")


def test_stop_never_signals_a_process_it_does_not_know(tmp_path: Path) -> None:
    """A service that holds the lock and has not written its pid yet: stop is refused, and does
    not send its signal to pid 0, which is everyone in its own process group."""
    with open(tmp_path / "teckochecker.db.pid", "w") as file:
        flock(file, LOCK_EX)
        env, pipe = clean_environment({}), subprocess.PIPE
        process = Program("stop", cwd=tmp_path, env=env, stderr=pipe, start_new_session=True)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and said.startswith("teckochecker: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_check_that_is_stopped_finishes_what_is_in_flight(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola, number: int
) -> None:
    """In the middle of a POST: its answer is awaited and recorded, and nothing new is begun."""
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    openai.batch("batch_1", "completed")
    gate = keboola.gate("POST /jobs", after_acting=True)
    env = clean_environment(program_environment(openai))
    process = Program("check", cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    gate.reached(60)
    process.send_signal(number)
    gate.release()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "Traceback" not in said
    [(state, job)] = sqlite3.connect(tmp_path / "teckochecker.db").execute(
        "SELECT state, keboola_job_id FROM triggers"
    )
    assert state == "running" and job and len(keboola.created) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_daemon_starts_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """No process is left behind, however long the way to the folder for temporary files."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    env = clean_environment({"TMPDIR": str(tmp_path / ("x" * 200))})
    with tecko.RunLock(tmp_path / "teckochecker.db", "check"):  # which the start waits for
        process = Script("start", "--daemon", cwd=tmp_path, env=env, stderr=subprocess.PIPE)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        [child] = until(lambda: children.read_text().split(), "its child", 20)
        log = tmp_path / "teckochecker.log"
        until(log.exists, "the child's log", 20)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said
    assert not Path(f"/proc/{child}").exists()


def test_check_is_one_round_in_the_foreground(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """`check` fires what is ready and prints it; `check JOB` looks at that one alone, and an
    error is exit code 1."""
    first = JOB_YAML.format(stack=keboola.url)
    job = first.partition("jobs:\n")[2]
    other = job.replace("name: job", "name: other").replace("batch_1", "batch_2")
    (tmp_path / "jobs.yaml").write_text(first + other)
    openai.batch("batch_1", "completed")
    openai.batch("batch_2")
    openai.fault("GET /v1/batches/batch_2", standins.Fault.status(401), None)
    lines = ["--json check job", "check other", "--json check"]
    one, failing, both = run_many(tmp_path, lines, program_environment(openai))
    assert [(row["name"], row["status"]) for row in one.document] == [("job", "triggered")]
    assert len(keboola.created) == 1
    assert failing.code == 1 and "401" in failing.out and "other" in failing.out
    assert both.code == 1 and {row["name"] for row in json.loads(both.out)} == {"job", "other"}


# ── PostgreSQL ────────────────────────────────────────────────────────────────────────────────


def test_two_nodes_on_postgresql(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola, server: postgres.Server
) -> None:
    """One works and fires once, the other waits in reserve and takes over after kill -9; SIGTERM
    ends one that waits. What looks needs no file, and shows neither user nor password."""
    openai.batch("batch_1", "completed")
    url = server.schema().replace("user=postgres&", "user=postgres&password=hunter2-of-tests&")
    env = program_environment(openai, DATABASE_URL=url, SECRET_KEY=MASTER_KEY)
    env["TRIGGER_SETTLE_SECONDS"] = "1"
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    with RunningProgram(first, env) as working:
        until(lambda: keboola.created, "its job", 30)
        with RunningProgram(second, env) as waiting:
            assert "in reserve" in waiting.text() and not any(
                "admin" in n for n in waiting.notified
            )
            begun = time.monotonic()
            shown, listed, asked = run_many(second, ["status", "job list", "check"], env)
            asked.refused("is in reserve: another node works on this database")
            assert time.monotonic() - begun < 20, "what cannot be done here is said at once"
            assert "in reserve" in shown.out and "job" in listed.out, listed.err
            assert "postgresql:///postgres" in shown.out
            assert "hunter2" not in shown.out + listed.out + waiting.text() + working.text()
            assert waiting.terminate() == 0
        with RunningProgram(second, env) as waiting:
            working.kill()
            waiting.heard("admin surface at ")
            assert waiting.terminate() == 0
    assert len(keboola.created) == 1


def test_watching_without_a_descriptor_left(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """A process that may open nothing more says so, fires nothing wrong, and goes on by itself."""
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    openai.batch("batch_1")
    with RunningProgram(tmp_path, program_environment(openai)) as program:
        pid = program.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        openai.batch("batch_1", "completed")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, before[1]))
        until(lambda: "Too many open files" in program.text(), "that it says so", 20)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        until(lambda: keboola.created, "its trigger", 30)
        assert program.terminate() == 0
    assert len(keboola.created) == 1 and "Traceback" not in program.text()
