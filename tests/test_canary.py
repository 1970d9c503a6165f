"""Canaries: secrets with awkward characters go through everything, and are found nowhere after."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import standins
from conftest import RunningProgram, run_program
from warm import Script

import teckochecker as tecko


def canary(name: str) -> str:
    """A value with what repr, JSON, URLs and shells escape, and a stretch that nothing does; any
    PIECE of it belongs to no other canary."""
    song = hashlib.sha256(name.encode()).hexdigest()[:24]
    return f"""{name}-"q'\\b{name}%41<&>{name}{{x}}?=/+ {name}{song}"""


OPENAI, KEBOOLA, BY_ENV, BY_FILE, ADMIN = map(canary, ("Oai", "Kbc", "Env", "Fil", "Adm"))
MASTER = tecko.new_master_key()
CANARIES = {"openai": OPENAI, "keboola": KEBOOLA, "env": BY_ENV, "file": BY_FILE}
CANARIES |= {"ADMIN_TOKEN": ADMIN, "SECRET_KEY": MASTER}
PIECE = 12  # characters in a row that betray a value: cutting it short is not hiding it


def traces(value: str) -> set[bytes]:
    """Every piece of a value: raw, and as repr, JSON, URLs and base64 (any alignment) show it."""
    forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote(value, safe="")}
    pieces = {form[i : i + PIECE].encode() for form in forms for i in range(len(form) - PIECE + 1)}
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * shift + value.encode())[4:-4]
            pieces |= {text[i : i + PIECE] for i in range(len(text) - PIECE + 1)}
    return pieces


TRACES = {name: traces(value) for name, value in CANARIES.items()}


def leaks(content: bytes | str) -> dict[str, str]:
    """Which canaries sing in what was printed, sent or stored, and a line where they do."""
    data = content.encode() if isinstance(content, str) else content
    found = {}
    for name, pieces in TRACES.items():
        places = [data.find(piece) for piece in pieces if piece in data]
        if places:
            start = max(0, min(places) - 60)
            found[name] = data[start : start + 200].decode(errors="replace")
    return found


def test_the_search_finds_a_canary_however_it_is_written() -> None:
    """What looks for leaks sees a value that is cut, quoted, escaped or encoded."""
    for name, value in CANARIES.items():
        basic = base64.b64encode(f"user:{value}".encode()).decode()
        for shown in (value[:20], repr([value]), json.dumps(value), quote(value), basic):
            assert name in leaks(f"some text {shown} and more"), shown
    assert leaks("Oai Kbc Env canary *** and nothing of a value") == {}


JOBS = """\
admin: {{host: 127.0.0.1, port: 0}}
secrets:
  by-env:  {{type: openai, env: CANARY_BY_ENV}}
  by-file: {{type: keboola, file: canary.txt}}
jobs:
"""
JOB = """\
  - name: {name}
    poll_interval: 1s
    watch: {{secret: {openai}, batch_ids: [batch_{name}]}}
    trigger: {{secret: {keboola}, stack_url: "{stack}", component_id: c, configuration_id: {name}}}
"""


def says(message: str) -> dict[str, Any]:
    """An error body of OpenAI."""
    return {"error": {"message": message, "type": "x", "param": None, "code": None}}


def openai_echoes(openai: standins.OpenAI, key: str) -> list[str]:
    """Batches whose answers give the key back, each in another place; the names of their jobs."""
    openai.key(key)
    faults = {
        "refused": standins.Fault.status(401, body=says(f"Incorrect API key: {key}")),
        "cut": standins.Fault.status(400, body=says("x" * 285 + key)),
        "strange": standins.Fault.json({"id": "batch_strange", "echo": key}),
        "cutjson": standins.Fault.json({"id": "y" * 45, "echo": key}),
        "moved": standins.Fault.redirect(f"http://127.0.0.1:9/?key={quote(key, safe='')}"),
        "page": standins.Fault.status(500, body=f"<h1>{key}</h1>"),
    }
    for name, fault in faults.items():
        openai.fault(f"GET /v1/batches/batch_{name}", fault, None)
    errors = [{"code": "bad", "message": f"line 1: {key}", "line": 1}]
    openai.batch("batch_invalid", "failed", key=key, errors=errors)
    openai.batch("batch_unknown", f"new {key}", key=key)
    return [*faults, "invalid", "unknown"]


def keboola_echoes(openai: standins.OpenAI, keboola: standins.Keboola, token: str) -> list[str]:
    """Three jobs whose Keboola jobs give the token back: refused, refused at length, failed."""
    keboola.token(token)
    keboola.end_with, keboola.end_message = "error", f"could not log in with {token}"
    answer = {"error": f"bad token {token}", "code": 401, "exceptionId": token}
    keboola.fault("POST /jobs", standins.Fault.status(401, body=answer))
    keboola.fault(
        "POST /jobs", standins.Fault.status(400, body={"error": "z" * 285 + token, "code": 1})
    )
    return ["first", "second", "third"]


@dataclass
class Aviary:
    """Where the canaries were let out: the running service, and everything that was said."""

    folder: Path
    env: Mapping[str, str]
    said: dict[str, bytes] = field(default_factory=dict)

    def cli(self, label: str, *args: str, typed: str = "", **env: str) -> str:
        """Run a command, keep what it printed; its stdout."""
        done = run_program(*args, cwd=self.folder, env={**self.env, **env}, input=typed)
        self.said[f"{label} stdout"] = done.stdout.encode()
        self.said[f"{label} stderr"] = done.stderr.encode()
        return done.stdout

    def keep_files(self) -> None:
        """Keep every file of the store, as the service holds it open."""
        for end in ("", "-wal", "-shm", ".pid"):
            path = self.folder / f"teckochecker.db{end}"
            self.said[f"file {path.name}"] = path.read_bytes()

    def ask(self, label: str, url: str, line: str, **headers: str) -> int:
        """One request; keeps head and body of the answer, and returns the status."""
        method, _, path = line.partition(" ")
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        self.said[f"http {label}"] = f"{answer.headers}".encode() + answer.read()
        connection.close()
        return answer.status


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.05)


def errors_of(folder: Path) -> dict[str, str | None]:
    """Each job's last_error, from the store itself."""
    db = sqlite3.connect(folder / "teckochecker.db")
    rows = db.execute("SELECT name, last_error FROM polling_jobs").fetchall()
    db.close()
    return dict(rows)


def break_two_jobs(folder: Path, poison: str) -> None:
    """Put nonsense into the row of a trigger, so that what reads it runs into a defect, and into
    another job's definition, which is that job's error."""
    with sqlite3.connect(folder / "teckochecker.db", timeout=10) as db:
        of_job = "WHERE job_id = (SELECT id FROM polling_jobs WHERE name = 'third')"
        db.execute(f"UPDATE triggers SET state = ?, finished_at = NULL {of_job}", (poison,))
        broken = json.dumps({"name": "unknown", "poll_interval": poison})
        db.execute("UPDATE polling_jobs SET spec = ? WHERE name = 'unknown'", (broken,))
    db.close()


def ask_everything(aviary: Aviary, url: str) -> list[int]:
    """Every kind of answer of the HTTP surface, good and bad; the statuses."""
    good = {"Authorization": f"Bearer {ADMIN}"}
    return [
        aviary.ask("health", url, "GET /health"),
        aviary.ask("stats", url, "GET /stats", **good),
        aviary.ask("no token", url, "GET /stats"),
        aviary.ask("wrong token", url, "GET /stats", Authorization=f"Bearer {ADMIN[:-1]}"),
        aviary.ask("no such path", url, f"GET /{quote(ADMIN, safe='')}", **good),
        aviary.ask("wrong method", url, f"BREW /{quote(ADMIN, safe='')}", **good),
    ]


ADD = ("-v", "secret", "add", "--type")
BESIDE = {
    "list": ("job", "list", "--json"),
    "show third": ("job", "show", "third", "--json"),
    "show as table": ("job", "show", "invalid"),
    "secrets": ("-v", "secret", "list"),
    "status": ("-v", "status"),
    "validate": ("-v", "validate"),
    "start again": ("-v", "start"),
    "rotate": ("-v", "secret", "rotate"),
    "delete": ("-v", "secret", "delete", "k", "--force"),
}


@pytest.fixture(scope="module")
def aviary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aviary]:
    """The whole program used with canaries for secrets, against upstreams that echo them."""
    folder = tmp_path_factory.mktemp("aviary")
    with standins.OpenAI() as openai, standins.Keboola() as keboola:
        env = {
            "SECRET_KEY": MASTER,
            "ADMIN_TOKEN": ADMIN,
            "CANARY_BY_ENV": BY_ENV,
            "OPENAI_BASE_URL": openai.base_url,
            "MIN_POLL_INTERVAL": "1",
            "LOG_LEVEL": "DEBUG",
        }
        aviary = Aviary(folder, env)
        (folder / "canary.txt").write_text(BY_FILE + "\n")
        write_jobs(folder, openai, keboola)
        aviary.cli("add openai", *ADD, "openai", "--name", "stored-openai", typed=OPENAI)
        aviary.cli("add keboola", *ADD, "keboola", "--name", "k", typed=f" {KEBOOLA}\n")
        logged = env | {"LOG_FORMAT": "json", "LOG_FILE": "service.log"}
        with RunningProgram(folder, logged, "-v", kind=Script) as program:
            use(aviary, program)
        aviary.cli("check", "-v", "job", "show", "unknown", "--json")
        yield aviary


def write_jobs(folder: Path, openai: standins.OpenAI, keboola: standins.Keboola) -> None:
    """jobs.yaml: half of the echoes with stored secrets, half with referenced ones."""
    text = JOBS.format()
    for key, token in ((BY_ENV, KEBOOLA), (OPENAI, BY_FILE)):
        openai.key(key)
        keboola.token(token)
    for name in openai_echoes(openai, OPENAI):
        text += JOB.format(name=name, openai="stored-openai", keboola="k", stack=keboola.url)
    for name in keboola_echoes(openai, keboola, BY_FILE):
        openai.batch(f"batch_{name}", "completed", key=BY_ENV)
        text += JOB.format(name=name, openai="by-env", keboola="by-file", stack=keboola.url)
    (folder / "jobs.yaml").write_text(text)


def listen(program: RunningProgram) -> None:
    """Take what the service has told systemd."""
    program.ear.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            program.notified.append(program.ear.recv(65536).decode())


def use(aviary: Aviary, program: RunningProgram) -> None:
    """Everything that can be done to a running service; ends it."""
    folder = aviary.folder
    wait_for(lambda: all(errors_of(folder).values()), "an error for every job")
    listen(program)
    assert ask_everything(aviary, program.url) == [200, 200, 401, 401, 404, 404]
    pid = program.process.pid
    aviary.said["cmdline"] = Path(f"/proc/{pid}/cmdline").read_bytes()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda item: aviary.cli(item[0], *item[1]), BESIDE.items()))
    listen(program)
    aviary.said["notified"] = "\n".join(program.notified).encode()
    aviary.keep_files()
    break_two_jobs(folder, BY_FILE)
    log = folder / "service.log"
    wait_for(lambda: "Traceback" in log.read_text(), "a traceback in the log")
    assert program.terminate() == 0
    for label, path in (("log", log), ("stderr", program.output)):
        lines = path.read_bytes().splitlines(keepends=True)
        aviary.said[label] = b"".join(line for line in lines if b"Traceback" not in line)
        aviary.said[f"traceback in {label}"] = b"".join(k for k in lines if b"Traceback" in k)


def loud(aviary: Aviary, *labels: str) -> dict[str, dict[str, str]]:
    """What of these was said with a canary in it; the labels are beginnings."""
    chosen = {k: v for k, v in aviary.said.items() if k.startswith(labels)}
    assert chosen, labels
    return {k: found for k, v in chosen.items() if (found := leaks(v))}


def test_commands_print_no_canary(aviary: Aviary) -> None:
    """What the command line says of secrets and jobs, with -v and beside a running service."""
    assert not loud(aviary, "add", "secrets", "status", "validate", "start", "rotate", "delete")


def test_what_upstreams_echo_is_redacted_in_every_report(aviary: Aviary) -> None:
    """last_error, batches and triggers in `job list` and `job show`, which know no secret."""
    assert b"***" in aviary.said["list stdout"]
    assert not loud(aviary, "list", "show")


def test_logs_have_no_canary(aviary: Aviary) -> None:
    """At DEBUG, each line one JSON object, to stderr and to LOG_FILE; systemd is told none."""
    assert b"***" in aviary.said["log"]
    assert all(json.loads(line)["level"] for line in aviary.said["log"].splitlines())
    assert not loud(aviary, "log", "stderr", "notified")


def test_a_traceback_has_no_canary(aviary: Aviary) -> None:
    """A defect that shows its values is logged with its place and without them; so is a definition
    that cannot be read, by a command."""
    assert b"_advance" in aviary.said["traceback in log"]
    assert b"is damaged" in aviary.said["check stdout"] + aviary.said["check stderr"]
    assert not loud(aviary, "traceback", "check")


def test_http_answers_have_no_canary(aviary: Aviary) -> None:
    """Good answers, refusals, and a request whose path has the token."""
    assert not loud(aviary, "http")


def test_the_process_list_has_no_canary(aviary: Aviary) -> None:
    """/proc/PID/cmdline of the service is what it was started with."""
    assert aviary.said["cmdline"].endswith(b"start\0")
    assert not loud(aviary, "cmdline")


def test_no_file_of_the_store_has_a_canary(aviary: Aviary) -> None:
    """Database, WAL, shared memory and pid file, whatever upstreams had echoed."""
    assert not loud(aviary, "file")


INLINE = {
    "a value": f"secrets: {{a: {{type: openai, value: {json.dumps(OPENAI)}}}}}",
    "instead of a block": f"secrets: {{a: {json.dumps(OPENAI)}}}",
    "instead of all": f"secrets: {json.dumps(OPENAI)}",
    "as a type": f"secrets: {{a: {{type: {json.dumps(OPENAI)}, env: X}}}}",
    "in a field": "secrets: {a: {type: openai, env: CANARY_BY_ENV}}\n"
    "jobs: [{name: j, poll_interval: '${CANARY_BY_ENV}'}]",
    "no YAML": f"secrets: {{a: {{type: openai, value: {json.dumps(OPENAI)}",
    "the key file": MASTER,
    "the secret's file": json.dumps(BY_FILE),
}


@pytest.mark.parametrize("where", INLINE)
def test_a_secret_at_the_wrong_place_is_refused_unseen(tmp_path: Path, where: str) -> None:
    """A value in jobs.yaml, or a key file given for it, is refused without being shown."""
    (tmp_path / "jobs.yaml").write_text(INLINE[where] + "\n")
    environ = {"CANARY_BY_ENV": BY_ENV}
    try:
        config = tecko.load_config(tmp_path / "jobs.yaml", environ)
        said = "\n".join(
            f"{problem}\n{problem.source}" for problem in tecko.all_problems(config, {})
        )
    except tecko.TeckoError as e:
        shown = [p.source for p in e.problems] if isinstance(e, tecko.Invalid) else []
        said = "\n".join([str(e), e.hint, *shown])
    assert "jobs.yaml:" in said and not leaks(said)


ERRORS: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "two lines": (("secret", "add", "--name", "x", "--type", "api"), f"{OPENAI}\n{OPENAI}", {}),
    "bad type": (("secret", "add", "--name", "x", "--type", "?", "--value", OPENAI), "", {}),
    "bad name": (("secret", "add", "--name", "1", "--type", "api", "--value", OPENAI), "", {}),
    "no text": (("secret", "add", "--name", "x", "--type", "api"), OPENAI + "é", {}),
    "no key": (("-v", "validate"), "", {"SECRET_KEY": OPENAI}),
    "bad port": (("-v", "start"), "", {"API_PORT": "http"}),
}


def test_refused_commands_print_no_canary(tmp_path: Path) -> None:
    """Values that are refused, and settings that are wrong beside good secrets, at DEBUG."""
    (tmp_path / "jobs.yaml").write_text("admin: {port: 0}\n")
    env = {"SECRET_KEY": MASTER, "ADMIN_TOKEN": ADMIN, "LOG_LEVEL": "DEBUG"}

    def run(label: str) -> tuple[int, dict[str, str]]:
        args, typed, more = ERRORS[label]
        done = run_program(*args, cwd=tmp_path, env=env | more, input=typed)
        return done.returncode, leaks(done.stdout + done.stderr)

    with ThreadPoolExecutor(3) as pool:
        ended = dict(zip(ERRORS, pool.map(run, ERRORS), strict=True))
    assert all(code in (1, 2) for code, _ in ended.values()), ended
    assert not {label: found for label, (_, found) in ended.items() if found}
