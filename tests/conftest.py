"""Fixtures: stand-ins for the two APIs, a real store with a clock to turn, the real program."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import postgres
import pytest
import standins
import warm
from warm import Program, Script

import teckochecker as tecko

# Where the tests are started in the background of a shell, SIGINT is ignored, and every program
# that they start would inherit that; one that is caught is at its default again after exec.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROGRAM = warm.PROGRAM
MASTER_KEY = "b25seS1mb3ItdGVzdHMtMDEyMzQ1Njc4OWFiY2RlZmc="  # 32 bytes, for tests alone


@pytest.fixture(scope="session", autouse=True)
def no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each client would read all of the system's certificates, for longer than a test takes."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("SSL_CERT_FILE", raising=False)
        environment.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("none")))
        yield


@pytest.fixture
def openai() -> Iterator[standins.OpenAI]:
    with standins.OpenAI() as server:
        yield server


@pytest.fixture
def keboola() -> Iterator[standins.Keboola]:
    with standins.Keboola() as server:
        yield server


@pytest.fixture
def source() -> Iterator[standins.Source]:
    with standins.Source() as server:
        yield server


# ── Two engines ───────────────────────────────────────────────────────────────────────────────

ON_BOTH_ENGINES = ("test_store", "test_database", "test_steps", "test_operations")
Place = Path | str  # of a database: a file, or the URL of a schema of its own


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sqlite: what it tests is about the file, or SQLite's own")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of what is stored run once on each engine."""
    both = metafunc.module.__name__ in ON_BOTH_ENGINES
    if "engine" in metafunc.fixturenames and both:
        only = metafunc.definition.get_closest_marker("sqlite")
        engines = ["sqlite"] if only else ["sqlite", "postgres"]
        metafunc.parametrize("engine", engines, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases of one test above the store ask it the same, with other values: the second engine
    need see but the first of them. The store's own tests run all cases on both."""
    seen: set[str] = set()
    again = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        above = item.nodeid.partition(".py")[0].endswith(("test_steps", "test_operations"))
        if above and "[postgres" in item.nodeid:
            again += [item] if name in seen else []
            seen.add(name)
    config.hook.pytest_deselected(items=again)
    items[:] = [item for item in items if item not in again]


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    """This process's PostgreSQL."""
    if not postgres.installed():
        pytest.skip(postgres.MISSING)
    running = postgres.Server()
    running.start()
    yield running
    running.stop()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def fresh(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], Place]:
    """Gives places of databases that are not there yet."""
    if engine == "postgres":
        made: Callable[[], Place] = request.getfixturevalue("server").schema
        return made
    names = (f"store{n or ''}.db" for n in itertools.count())
    return lambda: tmp_path / next(names)


@pytest.fixture
def path(fresh: Callable[[], Place]) -> Place:
    return fresh()


@pytest.fixture
async def store(path: Place) -> AsyncIterator[tecko.Store]:
    async with tecko.Store(path) as opened:
        yield opened


def execute(place: Place, sql: str, *values: object) -> list[Any]:
    """One statement by another process."""
    if isinstance(place, Path):
        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as other:
            return other.execute(sql, values).fetchall()
    import psycopg

    with psycopg.connect(place, autocommit=True) as db:
        found = db.execute(sql.replace("?", "%s").encode(), values)
        return [tuple(row) for row in found] if found.description else []


LOCKING: dict[type, tuple[str, ...]] = {
    Path: ("BEGIN IMMEDIATE",),
    str: ("BEGIN", "SELECT pg_advisory_xact_lock(7238, hashtext(current_schema()))"),
}


class Holder:
    """Another process that holds the lock for writing, until `release` or the context's end."""

    def __init__(self, place: Place) -> None:
        self.db: Any
        if isinstance(place, Path):
            self.db = sqlite3.connect(place, isolation_level=None, timeout=0)
        else:
            import psycopg

            self.db = psycopg.connect(place, autocommit=True)
        for statement in LOCKING[str if isinstance(place, str) else Path]:
            self.db.execute(statement)

    def __enter__(self) -> Holder:
        return self

    def release(self) -> None:
        self.db.execute("ROLLBACK")

    def __exit__(self, *_: object) -> None:
        self.db.close()


TABLES = (
    *("secrets", "polling_jobs", "polling_batches", "triggers", "polling_logs"),
    *("normalized_data", "raw_data_csv", "raw_data_api", "etl_checkpoint", "etl_part"),
    *("etl_run", "etl_reject", "alerts", "daily_sums"),
)


def dump(place: Place, tables: Sequence[str] = TABLES) -> dict[str, list[Any]]:
    """All that is stored, as another process sees it; and that it can write at once."""
    with Holder(place):
        return {
            table: sorted(execute(place, f"SELECT * FROM {table}"), key=repr) for table in tables
        }


@dataclass
class Clock:
    """The time, as an argument: stands still until it is turned. `steady` is what the monotonic
    clock says, which no setting of the wall clock changes."""

    now: float = field(default_factory=time.time)
    passed: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def steady(self) -> float:
        return self.passed

    def turn(self, seconds: float) -> None:
        self.now += seconds
        self.passed += seconds

    def set_by(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.now += seconds


@contextlib.contextmanager
def secrets_forgotten() -> Iterator[None]:
    """What becomes a secret in here is none to the tests that share this process."""
    before = dict(tecko.SecretValue.known), tecko.SecretValue.forms
    try:
        yield
    finally:
        tecko.SecretValue.known, tecko.SecretValue.forms = before


def flat_job(**changed: Any) -> dict[str, Any]:
    """A good job in the flat form."""
    return {
        "name": "job",
        "batch_ids": ["batch_1", "batch_2"],
        "openai_secret": "openai",
        "keboola_secret": "keboola",
        "keboola_stack_url": "https://connection.keboola.com",
        "keboola_component_id": "comp",
        "keboola_configuration_id": "cfg",
    } | changed


@dataclass
class World:
    """A real store, the real steps with a clock to turn, and the stand-ins they talk to."""

    config: tecko.Config
    store: tecko.Store
    vault: tecko.Vault
    steps: tecko.Steps
    clock: Clock
    openai: standins.OpenAI
    keboola: standins.Keboola

    async def secret(self, name: str, kind: str, value: str, *, replace: bool = False) -> None:
        seal = partial(self.vault.seal, name, kind, tecko.SecretValue(value))
        save = self.store.replace_secret if replace else self.store.add_secret
        await save(name, kind, seal, self.clock())

    async def job(self, name: str = "job", **flat: Any) -> int:
        """Create a job in the store; by default for batch_1 and the Keboola stand-in."""
        given = {"name": name, "batch_ids": ["batch_1"], "keboola_stack_url": self.keboola.url}
        spec = tecko.job_spec(flat_job(**given | flat), self.config.settings.job_context)
        return await self.store.create_job(spec, "store", self.clock())

    async def ingest(self, name: str = "source", **block: Any) -> int:
        """Create an ingest job in the store: `block` is its `ingest:`."""
        spec = tecko.parse(tecko.IngestSpec, {"name": name, "poll_interval": 60, "ingest": block})
        return await self.store.create_job(spec, "store", self.clock())

    async def step_all(self, ids: Sequence[int]) -> dict[int, tecko.StepResult]:
        """A step of each of these jobs, and the lists of batches for those that they answer."""
        done, rows = dict[int, tecko.StepResult](), await self.steps.by_key(ids)
        for found in await asyncio.gather(*(self.steps.check(*group) for group in rows.items())):
            done |= found
        rest = [job_id for job_id in ids if job_id not in done]
        stepped = await asyncio.gather(*map(self.steps.step, rest))
        return done | dict(zip(rest, stepped, strict=True))

    async def run(self, job_id: int) -> tecko.Run:
        """One run of an ingest job; how it ended."""
        await self.steps.step(job_id)
        [run] = await self.store.runs((await self.get(job_id)).name, 1)
        return run

    async def records(self, source: str | None = None) -> dict[str, dict[str, Any]]:
        """The unified records by source_id, without their times."""
        rows = await self.store.data(source, 10**6, 0, 0)
        found = [json.loads(row["data"]) for row in rows]
        return {record["source_id"]: record for record in found}

    async def get(self, job_id: int) -> tecko.Job:
        job = await self.store.job(job_id)
        assert job is not None
        return job

    async def step_until_waiting(self, job_id: int, limit: int = 20) -> tecko.StepResult:
        """Step, turning the clock by what each step asks for, until nothing is left to do."""
        for _ in range(limit):
            stepped = await self.steps.step(job_id)
            if stepped.wait is None:
                return stepped
            self.clock.turn(stepped.wait)
        raise AssertionError(f"still not done after {limit} steps: {stepped}")


ENVIRONMENT = {"MIN_POLL_INTERVAL": "1", "SECRET_KEY": MASTER_KEY, "TRIGGER_SETTLE_SECONDS": "120"}


async def make_world(
    folder: Path,
    openai: standins.OpenAI,
    keboola: standins.Keboola,
    env: Mapping[str, str],
    place: Place | None = None,
) -> tuple[World, Any]:
    """A world in `folder`, its database at `place`, and the closing coroutine function; opens what
    is there already."""
    environ = ENVIRONMENT | {"OPENAI_BASE_URL": openai.base_url} | dict(env)
    config = tecko.load_config(folder / "jobs.yaml", environ)
    store, clock = tecko.Store(place or config.settings.database), Clock()
    await store.__aenter__()
    vault = tecko.Vault(config.settings)
    vault.load(required=True)
    openai_client = tecko.OpenAI(config.settings.openai_base_url, clock=clock.steady)
    upstreams = openai_client, tecko.Keboola(clock.steady), tecko.Web()
    clocks: Any = {"clock": clock, "monotonic": clock.steady}
    steps = tecko.Steps(config, store, vault, *upstreams, **clocks, jitter=lambda: 0.0)

    async def close() -> None:
        for upstream in upstreams:
            await upstream.close()
        await store.close()

    return World(config, store, vault, steps, clock, openai, keboola), close


@pytest.fixture
async def world(
    tmp_path: Path,
    openai: standins.OpenAI,
    keboola: standins.Keboola,
    engine: str,
    fresh: Callable[[], Place],
) -> AsyncIterator[World]:
    """A fresh world with the secrets `openai` and `keboola`, whose values the stand-ins take."""
    place = fresh() if engine == "postgres" else None
    made, close = await make_world(tmp_path, openai, keboola, {}, place)
    openai.key(standins.OPENAI_KEY)
    await made.secret("openai", "openai", standins.OPENAI_KEY)
    await made.secret("keboola", "keboola", standins.KEBOOLA_TOKEN)
    yield made
    await close()


@pytest.fixture
async def hasty(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> AsyncIterator[World]:
    """A world whose ingests try nothing twice in a run."""
    made, close = await make_world(tmp_path, openai, keboola, {"MAX_RETRIES": "0"})
    yield made
    await close()


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what configures TeckoChecker, and `extra`."""
    dropped = {*tecko.ENVIRONMENT, "DATABASE_URL", "NOTIFY_SOCKET", "OPENAI_API_KEY", "COLUMNS"}
    dropped.add("PYTHONDONTWRITEBYTECODE")  # what is imported need not be compiled each time
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"NO_COLOR": "1", "PYTHONUNBUFFERED": "1"} | dict(extra)


def run_program(
    *args: str,
    cwd: Path,
    env: Mapping[str, str] = {},
    input: str | None = None,
    timeout: float = 60,
    kind: type[Script] = Program,
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, in `cwd`, without a terminal."""
    pipe = subprocess.PIPE
    environ = clean_environment(env)
    with kind(*args, cwd=cwd, env=environ, stdin=pipe, stdout=pipe, stderr=pipe) as program:
        try:
            out, err = program.communicate(input or "", timeout=timeout)
        except BaseException:
            program.kill()
            raise
    return subprocess.CompletedProcess(args, program.returncode, out, err)


class RunningProgram:
    """`teckochecker.py start` as a process of its own, from the moment it says that it is ready.

    stdout and stderr go to `output`; leaving the context kills what still runs.
    """

    def __init__(
        self,
        cwd: Path,
        env: Mapping[str, str] = {},
        *args: str,
        wait: bool = True,
        kind: type[Script] = Program,
    ) -> None:
        self.cwd, self.env, self.args, self.wait, self.kind = cwd, env, args, wait, kind
        self.output = cwd / f"output-{time.monotonic_ns()}.log"
        self.notified: list[str] = []

    def __enter__(self) -> RunningProgram:
        address = f"\0teckochecker-{os.getpid()}-{time.monotonic_ns()}"
        self.ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ear.bind(address)
        environment = clean_environment(self.env) | {"NOTIFY_SOCKET": "@" + address[1:]}
        with self.output.open("w") as file:
            self.process = self.kind(
                *(*self.args, "start"),
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        if self.wait:
            self.heard("READY=1")
        return self

    def heard(self, word: str, timeout: float = 30) -> str:
        """Wait for a notification that contains `word`."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            ended = self.process.poll() is not None  # what it said before may still be unread
            self.ear.settimeout(0.1)
            try:
                self.notified.append(self.ear.recv(65536).decode())
            except TimeoutError:
                if ended:
                    said = f"ended with {self.process.returncode}:\n{self.text()}"
                    raise AssertionError(said) from None
                continue
            if word in self.notified[-1]:
                return self.notified[-1]
        raise AssertionError(f"never said {word}:\n{self.text()}")

    @property
    def url(self) -> str:
        """Where the admin surface is."""
        ready = next(text for text in self.notified if "admin surface at " in text)
        return ready.partition("admin surface at ")[2].splitlines()[0]

    def text(self) -> str:
        return self.output.read_text()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self, timeout: float = 15) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        self.ear.close()


JOB_YAML = """\
database: teckochecker.db
admin: {{host: 127.0.0.1, port: 0}}
secrets:
  openai:  {{type: openai,  env: TEST_OPENAI_KEY}}
  keboola: {{type: keboola, env: TEST_KEBOOLA_TOKEN}}
jobs:
  - name: job
    poll_interval: 1s
    watch: {{secret: openai, batch_ids: [batch_1]}}
    trigger:
      {{secret: keboola, stack_url: "{stack}", component_id: comp, configuration_id: cfg}}
"""


def program_environment(openai: standins.OpenAI, **extra: str) -> dict[str, str]:
    """What the program needs to work against the stand-ins with JOB_YAML."""
    return {
        "TEST_OPENAI_KEY": standins.OPENAI_KEY,
        "TEST_KEBOOLA_TOKEN": standins.KEBOOLA_TOKEN,
        "OPENAI_BASE_URL": openai.base_url,
        "MIN_POLL_INTERVAL": "1",
    } | extra
