"""Alerts: told once, reminded of, resolved, across restarts; grouped, redacted, in nobody's way."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import Holder, World, make_world, run_program, secrets_forgotten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from warm import Script

import teckochecker as tecko

LOOK = tecko.LOOK_SECONDS
KEEP = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"


@pytest.fixture
def inbox() -> Iterator[standins.Inbox]:
    with standins.Inbox() as server:
        yield server


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The URLs in here are no secrets to other tests."""
    with secrets_forgotten():
        yield


def health(**seen: Any) -> tecko.Health:
    """A health that finds nothing wrong but this."""
    usual: dict[str, Any] = {"timestamp": 0.0, "version": "1", "uptime_seconds": 1e6}
    usual |= {"db_connected": True, "scheduler": "running", "config_last_reload_successful": True}
    usual |= {"config_last_reload_at": 0.0, "config_last_reload_error": None}
    return tecko.with_status(tecko.Health(**usual | seen), None, None)


def failed(*jobs: str, what: Any = "failed", reason: str = "it failed") -> tecko.Health:
    attention = [tecko.Attention(job=job, what=what, reason=reason) for job in jobs]
    return health(attention=attention)


def alerting(world: World, *targets: Any) -> tecko.Alerts:
    """As a process that has just begun."""
    made = [tecko.AlertTarget.model_validate(each) for each in targets]
    world.steps.config = replace(world.config, alerts=made)
    return tecko.Alerts(world.steps)


async def look(world: World, alerts: tecko.Alerts, seen: tecko.Health, times: int = 1) -> None:
    for _ in range(times):
        await alerts.update(seen)
        world.clock.turn(LOOK)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.01)


# ── What is wrong ─────────────────────────────────────────────────────────────────────────────

KEY_RESTS = [tecko.Pause(secret="openai", reason="OpenAI said 429", until=0.0)]


@pytest.mark.parametrize(
    ("seen", "keys"),
    [
        (health(), []),
        (failed("a"), ["failed job a"]),
        (failed("a", what="held"), ["held job a"]),
        (failed("a", what="refused"), ["refused job a"]),
        (failed("a", what="ingest", reason="3 of 3 records were rejected"), ["ingest job a"]),
        (failed("a", what="ingest", reason="3 of 9 records were rejected"), []),
        (failed("a", what="ingest", reason="9 rejected, max_failed is 5"), ["ingest job a"]),
        (health(overdue_jobs=["a", "b"]), ["overdue job a", "overdue job b"]),
        (health(undelivered_jobs=["a"]), ["undelivered job a"]),
        (health(paused_keys=KEY_RESTS), ["limited key openai"]),
        (health(config_last_reload_successful=False), ["reload"]),
        (tecko.with_status(health(), "deleted", None), ["database"]),
        (tecko.with_status(health(), None, "it is locked"), ["database"]),
        (health(db_connected=False), ["database"]),
        (health().model_copy(update={"problems": ["the last backup failed"]}), ["backup"]),
    ],
)
def test_each_kind_of_trouble_is_a_condition(seen: tecko.Health, keys: Sequence[str]) -> None:
    """What waits for a person, what is late, and what ails the service; not what is allowed."""
    assert list(tecko.conditions(seen)) == keys


async def test_a_refused_key_waits_for_a_person(world: World) -> None:
    """The store says so of a job that goes on: OpenAI's 401, which no check repairs."""
    await world.secret("openai", "openai", "sk-a-refused-key-0123", replace=True)
    await world.steps.step(await world.job())
    [row] = await world.store.attention(10)
    assert (row["job"], row["what"]) == ("job", "refused") and "401" in row["reason"]


# ── Once, reminded of, resolved ───────────────────────────────────────────────────────────────


async def test_an_hour_of_a_fault_with_restarts_in_it(world: World, inbox: standins.Inbox) -> None:
    """One alert, a reminder each 25 minutes, one resolve, and nothing after it."""
    where = {"webhook": f"{inbox.url}/in", "remind": "25m"}
    for _ in range(20):  # of an hour, each three minutes a new process
        await look(world, alerting(world, where), failed("nightly"), times=6)
    for _ in range(3):
        await look(world, alerting(world, where), health(), times=6)
    told = ["firing", "reminder", "reminder", "resolved"]
    assert inbox.states() == [(state, "failed", "job nightly") for state in told]


async def test_what_passes_by_itself_is_not_told(world: World, inbox: standins.Inbox) -> None:
    """Neither that something came for one look, nor that it went for one."""
    alerts = alerting(world, {"webhook": f"{inbox.url}/in"})
    for seen in (failed("a"), health(), failed("a"), health()):
        await look(world, alerts, seen)
    assert inbox.told() == []
    for seen in (failed("a"), failed("a"), health(), failed("a"), health(), failed("a")):
        await look(world, alerts, seen)
    assert [state for state, _, _ in inbox.states()] == ["firing"]


async def test_a_restart_resolves_nothing(world: World, inbox: standins.Inbox) -> None:
    """A new process says of no job that it is overdue, and of no key that it rests."""
    job_id = await world.job(poll_interval=60)
    world.openai.batch("batch_1")
    world.clock.turn(600)
    where = {"webhook": f"{inbox.url}/in"}
    wrong = health(overdue_jobs=["job"], paused_keys=KEY_RESTS)
    await look(world, alerting(world, where), wrong, times=12)
    await look(world, alerting(world, where), health(uptime_seconds=9.0), times=12)
    assert [state for state, _, _ in inbox.states()] == ["firing", "firing"]
    await world.steps.step(job_id)
    await look(world, alerting(world, where), health(), times=12)
    assert [state for state, _, _ in inbox.states()][2:] == ["resolved", "resolved"]


async def test_a_store_that_does_not_answer_resolves_no_job(
    world: World, inbox: standins.Inbox
) -> None:
    """What it would say of jobs is unknown then."""
    alerts = alerting(world, {"webhook": f"{inbox.url}/in"})
    await look(world, alerts, failed("a"), times=2)
    await look(world, alerts, health(db_connected=False), times=3)
    await look(world, alerts, health(), times=3)
    states = [(state, kind) for state, kind, _ in inbox.states()]
    assert states[:2] == [("firing", "failed"), ("firing", "database")]
    assert sorted(states[2:]) == [("resolved", "database"), ("resolved", "failed")]


async def test_a_store_that_cannot_be_written_is_told_once(
    world: World, inbox: standins.Inbox
) -> None:
    """From memory; once it can be written, a new process knows of it."""
    where = {"webhook": f"{inbox.url}/in"}
    alerts, wrong = alerting(world, where), tecko.with_status(health(), None, "it is locked")
    world.store.patience = 0.05
    with Holder(world.store.path):
        await look(world, alerts, wrong, times=5)
    assert inbox.states() == [("firing", "database", "database")]
    await look(world, alerts, wrong)
    await look(world, alerting(world, where), wrong, times=3)
    assert len(inbox.told()) == 1


History = Sequence[tuple[frozenset[str], int, str]]
STEP = st.tuples(
    st.frozensets(st.sampled_from("abc")),
    st.integers(1, 4),
    st.sampled_from(["", "restart", "mute"]),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[*HealthCheck])
@given(history=st.lists(STEP, max_size=12), remind=st.sampled_from([60, 120, 86400]))
def test_whatever_happens_each_target_hears_it_in_order(
    history: History,
    remind: int,
    inbox: standins.Inbox,
    openai: standins.OpenAI,
    keboola: standins.Keboola,
) -> None:
    """Over faults that come and go, restarts, and a target that takes nothing at times: no second
    firing before a resolve, no resolve or reminder without a firing, these at their interval."""
    asyncio.run(live(history, remind, inbox, (openai, keboola)))


async def live(
    history: History,
    remind: int,
    inbox: standins.Inbox,
    upstreams: tuple[standins.OpenAI, standins.Keboola],
) -> None:
    heard: dict[tuple[str, str], tuple[str, float]] = {}
    wheres = [{"webhook": f"{inbox.url}/{path}", "remind": remind} for path in ("in", "other")]
    with tempfile.TemporaryDirectory() as folder:
        world, close = await make_world(Path(folder), *upstreams, {})
        alerts = alerting(world, *wheres)
        for wrong, looks, event in history:
            if event == "restart":
                await alerts.close()
                alerts = alerting(world, *wheres)
            if event == "mute":
                inbox.fault("POST /other", standins.Fault.status(503), times=None)
            for _ in range(looks):
                inbox.requests.clear()
                await alerts.update(failed(*wrong) if wrong else health())
                for path in ("/in", "/other") if event != "mute" else ("/in",):
                    for state, _, subject in inbox.states(path):
                        follows(heard, (path, subject), state, world.clock.now, remind)
                world.clock.turn(LOOK)
            inbox.heal()
        await alerts.close()
        await close()


def follows(
    heard: dict[tuple[str, str], tuple[str, float]],
    what: tuple[str, str],
    state: str,
    now: float,
    remind: float,
) -> None:
    """Whether a target may hear this after what it heard last of a subject."""
    before, at = heard.get(what, ("resolved", 0.0))
    assert (before == "resolved") == (state == "firing")
    assert state != "reminder" or now - at >= remind
    heard[what] = state, now


# ── Messages ──────────────────────────────────────────────────────────────────────────────────


async def test_many_faults_at_once_are_one_message(world: World, inbox: standins.Inbox) -> None:
    """Its text names ten of 500, its JSON all."""
    alerts = alerting(world, {"webhook": f"{inbox.url}/in"})
    await look(world, alerts, failed(*(f"job-{n}" for n in range(500))), times=4)
    [message] = inbox.told()
    lines = message["text"].splitlines()
    assert message["title"] == "TeckoChecker: 500 firing" and len(message["alerts"]) == 500
    assert len(lines) == 11 and lines[-1] == "and 490 more"
    assert lines[0] == "firing: job job-0: it failed"


async def test_no_target_receives_a_secret(world: World, inbox: standins.Inbox) -> None:
    """Not where it is in a reason, in a job's name, or was cut by an end of a text."""
    alerts = alerting(world, {"webhook": f"{inbox.url}/in"})
    for pad in (0, 130, 290):
        reason = "x" * pad + standins.OPENAI_KEY + "y" * 400
        await look(world, alerts, failed(f"job-{standins.KEBOOLA_TOKEN}", reason=reason), times=2)
        await look(world, alerts, health(), times=2)
    bodies = b"".join(request.body for request in inbox.requests)
    assert bodies.count(b"firing") >= 3 and b"job-***" in bodies
    assert standins.OPENAI_KEY[:12].encode() not in bodies
    assert standins.KEBOOLA_TOKEN.encode() not in bodies


# ── Targets ───────────────────────────────────────────────────────────────────────────────────


async def test_a_broken_target_stops_no_other(
    world: World, inbox: standins.Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, and hears it when it is mended; the log says it once, without its path."""
    inbox.fault("POST /broken-*", standins.Fault.status(500), times=None)
    broken = "/broken-0123456789abcdef"
    alerts = alerting(world, {"webhook": f"{inbox.url}{broken}"}, {"webhook": f"{inbox.url}/in"})
    await look(world, alerts, failed("a"), times=5)
    assert len(inbox.told()) == 1 and inbox.count(f"POST {broken}") == 4
    inbox.heal()
    await look(world, alerts, failed("a"), times=2)
    assert inbox.states(broken)[-1] == ("firing", "failed", "job a")
    assert caplog.text.count("failed, and is tried again") == 1 and broken not in caplog.text


async def test_a_command_reads_it_from_stdin(world: World, tmp_path: Path) -> None:
    """Its arguments are no shell's."""
    kept = tmp_path / "kept; touch wrong"
    alerts = alerting(world, {"command": [sys.executable, "-c", KEEP, str(kept)]})
    await look(world, alerts, failed("a"), times=2)
    [alert] = json.loads(kept.read_bytes())["alerts"]
    assert alert == {"state": "firing", "kind": "failed", "subject": "job a", "said": "it failed"}


async def test_apprise_reaches_its_services(world: World, inbox: standins.Inbox) -> None:
    """By a URL alone, here of its service for any JSON."""
    alerts = alerting(world, inbox.url.replace("http", "json") + "/apprise")
    await look(world, alerts, failed("a"), times=2)
    [told] = inbox.told("/apprise")
    assert (told["title"], told["message"]) == (
        "TeckoChecker: 1 firing",
        "firing: job a: it failed",
    )


async def test_a_webhook_gets_its_secret(world: World, inbox: standins.Inbox) -> None:
    await world.secret("hook", "api", "hook-secret-0123")
    alerts = alerting(world, {"webhook": f"{inbox.url}/in", "secret": "hook"})
    await look(world, alerts, failed("a"), times=2)
    [request] = inbox.requests
    assert request.headers["authorization"] == "Bearer hook-secret-0123"


@pytest.mark.parametrize("kind", ["webhook", "command", "apprise"])
async def test_a_target_that_hangs_is_in_nobodys_way(
    world: World, inbox: standins.Inbox, tmp_path: Path, kind: str
) -> None:
    """Checks go on meanwhile, and a stop does not wait for it."""
    inbox.fault("*", standins.Fault.hang(), times=None)
    begun, url = tmp_path / "begun", inbox.url
    slow = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(9)"
    where = {"webhook": url, "command": [sys.executable, "-c", slow]}
    where["apprise"] = url.replace("http", "json")
    world.openai.batch("batch_1")
    await world.job(poll_interval=1)
    await world.store.note_failure(await world.ingest("source", type="csv", path="x"), "no", 0, 1e9)
    alerting(world, {kind: where[kind]})
    service = tecko.Service(world.steps, lambda: world.config)
    await service.start()
    await until(lambda: (task := service._repeated.get(service._alert)) and task.done())
    world.clock.turn(600)
    service._repeat(service._alert)
    await until(lambda: begun.exists() or inbox.request_count)
    before = world.openai.request_count
    await until(lambda: world.openai.request_count > before + 1)
    await asyncio.wait_for(service.drain(), tecko.DRAIN_SECONDS / 2)


async def test_a_reload_takes_up_other_targets(world: World, inbox: standins.Inbox) -> None:
    """Those of the file as it is now are told."""
    world.config.path.write_text("jobs: []\n")

    def load() -> tecko.Config:
        return tecko.load_config(world.config.path, dict(world.config.env))

    async with tecko.make_service(load(), load, timers=False) as service:
        assert await service.alerts.test() == []
        world.config.path.write_text(f"jobs: []\nalerts: [{{webhook: '{inbox.url}/in'}}]\n")
        await service._reload()
        assert [finding.good for finding in await service.alerts.test()] == [True]
    assert len(inbox.told()) == 1


# ── The dead-man switch ───────────────────────────────────────────────────────────────────────


async def test_ping_is_asked_when_work_was_done(
    world: World, inbox: standins.Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    """Not without, and not for work that failed; that it fails is logged once."""
    world.steps.config = replace(world.config, ping=f"{inbox.url}/ping")
    alerts, job_id = tecko.Alerts(world.steps), await world.job()
    await world.steps.step(job_id)  # OpenAI does not know the batch
    await alerts.ping()
    assert inbox.count("GET /ping") == 0
    world.openai.batch("batch_1")
    inbox.fault("GET /ping", standins.Fault.status(500), times=2)
    for asked in (1, 2, 3):
        await world.steps.step(job_id)
        await alerts.ping()
        await alerts.ping()
        assert inbox.count("GET /ping") == asked
    assert caplog.text.count("the ping failed") == 1


# ── jobs.yaml and the command line ────────────────────────────────────────────────────────────

TOKEN = "Q7w8e9r0t1y2u3i4o5p6"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alerts: [no-url]", "alerts[0].apprise"),
        ("alerts: [7]", "alerts[0]"),
        (f"alerts: ['nosuch://{TOKEN}/x']", "does not know such a URL of nosuch"),
        (f"alerts: ['slack://{TOKEN[:5]}']", "does not know such a URL of slack"),
        ("alerts: [{remind: 1d}]", "exactly one of apprise, webhook and command"),
        (f"alerts: [{{webhook: 'ftp://x/{TOKEN}'}}]", "alerts[0].webhook"),
        (f"alerts: [{{webhook: 'http://x.example/{TOKEN}', secret: s}}]", "over https only"),
        ("alerts: [{webhook: 'https://x.example', secret: s}]", "there is no secret 's'"),
        ("alerts: [{command: [x], secret: s}]", "over https only"),
        ("alerts: [{command: []}]", "alerts[0].command"),
        ("alerts: [{command: [x], remind: 9}]", "at least 60 seconds, or 90m, 4h, 1d"),
        ("alerts: ['slack://${NO_SUCH}/x']", "${NO_SUCH} is not set"),
        (f"ping: 'https://user:{TOKEN}@x.example'", "ping: allowed: an https:// URL"),
    ],
)
def test_a_wrong_target_is_named_and_not_shown(tmp_path: Path, text: str, said: str) -> None:
    """The place and what is allowed, without anything of a URL but its scheme."""
    (tmp_path / "jobs.yaml").write_text(f"{text}\njobs: []\n")
    try:
        problems = tecko.all_problems(tecko.load_config(tmp_path / "jobs.yaml", {}), {})
    except tecko.Invalid as refused:
        problems = refused.problems
    shown = "".join(f"{tecko.redact(str(p))} {p.source}" for p in problems)
    assert said in shown
    assert TOKEN not in shown and "x.example" not in shown


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        (f"slack://T1JJ3T3L2/A1BRTD4JD/{TOKEN}/#ops", ["T1JJ3T3L2", "A1BRTD4JD", TOKEN]),
        ("mailto://me:pass%21word@mail.example.com", ["pass!word"]),
        (f"https://hooks.example.com/services/{TOKEN}?x=1", [TOKEN]),
    ],
)
def test_what_is_secret_in_a_url_is_redacted(url: str, secrets: Sequence[str]) -> None:
    """From when the file is read, wherever it would be said."""
    tecko.register_secrets({"alerts": [[url], None]}, {})
    for text in (url, *secrets):
        assert tecko.redact(f"<{text}>") == "<***>"
    assert tecko.redact("services at hooks.example.com") == "services at hooks.example.com"


def test_validate_names_the_missing_package(tmp_path: Path) -> None:
    """In one line, with what to run; nothing else needs it."""
    (tmp_path / "apprise.py").write_text("raise ImportError('not installed')\n")
    for alerts, code in (("json://127.0.0.1", 1), ("{command: [x]}", 0)):
        (tmp_path / "jobs.yaml").write_text(f"jobs: []\nalerts:\n  - {alerts}\n")
        done = run_program("validate", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, kind=Script)
        assert (done.returncode, "pip install apprise" in done.stderr) == (code, bool(code))


def test_alert_test_says_of_each_target_whether_it_went(
    tmp_path: Path, inbox: standins.Inbox
) -> None:
    """With exit code 1 where one did not; a job with a mistake is no obstacle."""
    good = [f"webhook: {inbox.url}/in", "command: ['true']"]
    bad = ["command: ['false']", "command: [/no/such]", "webhook: http://127.0.0.1:9/in"]
    for targets, code in ((good, 0), (good + bad, 1)):
        lines = "".join(f"  - {{{each}}}\n" for each in targets)
        (tmp_path / "jobs.yaml").write_text(f"alerts:\n{lines}jobs: [{{name: unfinished}}]\n")
        done = run_program("alert", "test", "--json", cwd=tmp_path)
        assert done.returncode == code, done.stderr
        found = [each["good"] for each in json.loads(done.stdout)["targets"]]
        assert found == [each in good for each in targets]
    assert inbox.states() == [("test", "test", "test")] * 2
    (tmp_path / "jobs.yaml").write_text("jobs: []\n")
    assert run_program("alert", "test", cwd=tmp_path).returncode == 1
