"""What it costs to watch: TeckoChecker next to a plain asyncio loop over the same SDK calls.

    .venv/bin/python tests/benchmarks/checks.py             # some minutes
    .venv/bin/python tests/benchmarks/checks.py --full      # 10,000 and 100,000 batches: an hour
    .venv/bin/python tests/benchmarks/checks.py --batches 10000 --interval 60 --latency 0.1

The stand-ins for OpenAI, with batches that stay in progress, and for Keboola run in a process of
their own; so does each way of checking them, one after the other, on loopback alone. A row's
figures are those of its own process, threads included: CPU is user and system time out of /proc,
taken over whole intervals of steady work after every batch was checked; memory is its peak until
then. Lateness runs from when a check was due until it was answered; `done to POST` from OpenAI's
answer to the request that confirms a batch as done until Keboola has the request for its job.
Figures move with what else the machine does, ratios less. The plain loop has the program's number
of calls in flight. Checks that are due together spare it cold wake-ups, as the program's grid of
due times does: so that is the reference; from 10,000 batches on, where it could not keep the pace
or would take too long to show, it is let run flat out, which is as cheap.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "teckochecker.py"
HERE = Path(__file__).resolve()
HANGING, LIMITED = "sk-standin-hanging", "sk-standin-limited"

IN_FLIGHT, IN_FLIGHT_PER_KEY = 64, 8  # calls at once in the plain loop, as in the program
WINDOW = 20.0  # s of steady work that are measured at least, in whole intervals
FLAT_OUT_WINDOW = 10.0  # s; a loop that never waits does as many checks in that
FLAT_OUT_FROM = 10_000  # batches, from which on the plain loop is let run so
TROUBLED = 100  # batches of each key that does not work
FINISHED = 5  # batches that end at once, for the time from done to POST
PATIENCE = 60.0  # s beyond the intervals for a process to do what the next figure waits for
TICKS = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """What is watched: so many batches, one a job, each every `interval` seconds, of so many keys;
    each answer takes `latency` seconds. `troubled`: beside a key whose every call hangs, and one
    that is rate-limited."""

    batches: int
    interval: int
    keys: int = 1
    latency: float = 0.0
    troubled: bool = False

    @classmethod
    def read(cls, text: str) -> Load:
        return cls(*json.loads(text))

    def ids(self, key: int) -> list[str]:
        return [f"batch_{n}" for n in range(key, self.batches, self.keys)]

    @property
    def window(self) -> float:
        return math.ceil(WINDOW / self.interval) * self.interval

    def __str__(self) -> str:
        said = (
            f"{self.batches:,} batches, {self.interval} s, {self.keys} key{'s' * (self.keys > 1)}"
        )
        said += f", {1000 * self.latency:.0f} ms" if self.latency else ""
        return said + (", beside two bad keys" if self.troubled else "")


def key_of(number: int) -> str:
    return f"sk-standin-openai-{number}"


LOADS = (
    *(Load(100, 1), Load(100, 1, 10), Load(1000, 10), Load(1000, 10, 10)),
    Load(1000, 10, 10, troubled=True),
)
LARGE = (
    *(Load(10_000, 60), Load(10_000, 60, 10), Load(10_000, 60, 10, troubled=True)),
    *(Load(10_000, 60, latency=0.1), Load(100_000, 300), Load(100_000, 300, 10)),
)


class Row(NamedTuple):
    """What one way of checking did, and what it used for that. Seconds; NaN: not measured."""

    way: str
    checks: int
    requests: int
    seconds: float
    cpu: float
    peak_mb: float
    late: float
    late_p99: float
    post: float = math.nan

    @property
    def cpu_per_1000(self) -> float:
        return 1000 * self.cpu / self.checks


# --- The plain way, and the stand-ins: this file again, as processes of their own ----------------


async def check_plainly(base_url: str, load: Load) -> None:
    """Retrieve the batches in turn, all due together each interval or without any wait, and nothing
    else. At the end it says how late its last answers were: median and p99."""
    import openai

    flat_out = load.batches >= FLAT_OUT_FROM
    late: deque[float] = deque(maxlen=load.batches)
    slots = asyncio.Semaphore(min(IN_FLIGHT, IN_FLIGHT_PER_KEY * load.keys))
    clients = [openai.AsyncOpenAI(api_key=key_of(0), base_url=base_url)]
    clients += [clients[0].with_options(api_key=key_of(n)) for n in range(1, load.keys)]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, tell_and_end, late)

    async def check(number: int, due: float) -> None:
        try:
            await clients[number % load.keys].batches.retrieve(f"batch_{number}")
            late.append(time.monotonic() - due)
        finally:
            slots.release()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for round_ in itertools.count():
            due = began + round_ * load.interval
            if not flat_out and (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            for number in range(load.batches):
                await slots.acquire()
                group.create_task(check(number, due))


def tell_and_end(late: deque[float]) -> None:
    print(json.dumps([statistics.median(late), percentile_99(late)]), flush=True)
    os._exit(0)


def percentile_99(values: Sequence[float] | deque[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def stand_in(load: Load) -> None:
    """Serve the batches and Keboola until stdin ends. A line on it ends so many batches, and is
    answered by the requests answered so far, and the times from done to POST."""
    sys.path.insert(0, str(ROOT / "tests"))
    import standins

    class OpenAI(standins.OpenAI):
        """Counts what was answered to keys that work, and when a batch was first seen done."""

        def __init__(self) -> None:
            super().__init__(record=False)
            self.answered, self.done = 0, dict[str, float]()

        def _respond(self, request: standins.Request) -> standins.Answer:
            self.answered += 1
            return super()._respond(request)

        def _retrieve(self, project: standins.Project, batch_id: str) -> standins.Answer:
            if project.batches[batch_id].status == "completed":
                self.done.setdefault(batch_id, time.monotonic())
            return super()._retrieve(project, batch_id)

    with OpenAI() as server, standins.Keboola() as keboola:
        made = {n: server.many(key_of(n), load.ids(n)) for n in range(load.keys)}
        server.latency = load.latency
        if load.troubled:
            for key, fault in (
                (HANGING, standins.Fault.hang()),
                (LIMITED, standins.Fault.rate_limited(5)),
            ):
                server.many(key, [f"batch_{key[11:]}_{n}" for n in range(TROUBLED)])
                server.fault("*", fault, times=None, key=key)
        print(server.base_url, keboola.url, flush=True)
        for line in sys.stdin:
            for _ in range(int(line.strip() or 0)):
                made[0].pop(len(made[0]) // 2).become("completed")
            posts = [r for r in keboola.requests if (r.method, r.path) == ("POST", "/jobs")]
            sent = {json.loads(values(r)["batch_ids_completed"])[0]: r.at for r in posts}
            took = [at - server.done[batch_id] for batch_id, at in sent.items()]
            print(json.dumps([server.answered, took]), flush=True)


def values(request: Any) -> dict[str, str]:
    given = json.loads(request.body)["variableValuesData"]["values"]
    return {value["name"]: value["value"] for value in given}


async def make_store(database: str, stack_url: str, load: Load) -> None:
    """A job for each batch, as `job create` would make them, at once."""
    sys.path.insert(0, str(ROOT))
    import teckochecker as tecko

    def spec(batch_id: str, secret: str) -> tecko.JobSpec:
        trigger = {
            "secret": "keboola",
            "stack_url": stack_url,
            "component_id": "c",
            "configuration_id": "c",
        }
        watch = {"secret": secret, "batch_ids": [batch_id]}
        given = {"name": f"watch-{batch_id}", "poll_interval": load.interval}
        return tecko.JobSpec.model_validate(
            given | {"watch": watch, "trigger": trigger}, context={"bounds": (1, 86400)}
        )

    async with tecko.Store(Path(database)) as store:

        async def make() -> None:
            for number in range(load.keys):
                for batch_id in load.ids(number):
                    await store.create_job(spec(batch_id, f"openai-{number}"), "store", time.time())
            for key in (HANGING, LIMITED) if load.troubled else ():
                for n in range(TROUBLED):
                    made = spec(f"batch_{key[11:]}_{n}", key[11:])
                    await store.create_job(made, "store", time.time())
            store._news.clear()

        await store.transact(make)


# --- Processes and what they use ------------------------------------------------------------------


def cpu_of(pid: int) -> float:
    """Seconds of user and system time of a process with all its threads (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_mb_of(pid: int) -> float:
    """The most resident memory that a process has had, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(kib) * 1024 / 1e6


def clean_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """Nothing of this process's environment that could configure what is measured."""
    kept = ("PATH", "PYTHONPATH", "TMPDIR", "LANG")
    return {name: os.environ[name] for name in kept if name in os.environ} | dict(extra)


class Process:
    """A process from its start to the end of the context; its messages go to a file."""

    def __init__(
        self, command: Sequence[object], folder: Path, env: Mapping[str, str] = {}
    ) -> None:
        self.command = [sys.executable, *map(str, command)]
        self.folder, self.env = folder, clean_environment(env)
        self.messages = folder / f"messages-{time.monotonic_ns()}.log"
        self.patience = PATIENCE

    def __enter__(self) -> Process:
        with self.messages.open("w") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, question: str = "") -> str:
        """A line on its stdin, if any, and the next line of its stdout."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(question)
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() or self.fail("says nothing")

    def wait_until(self, done: Callable[[], bool], every: float = 0.01) -> None:
        until = time.monotonic() + self.patience
        while not done():
            if self.process.poll() is not None or time.monotonic() > until:
                self.fail("ended early, or does not get on")
            time.sleep(every)

    def fail(self, why: str) -> str:
        raise SystemExit(f"{' '.join(self.command)} {why}:\n{self.messages.read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
        with self.process:  # closes its pipes and waits
            pass


def measure(
    way: str,
    process: Process,
    load: Load,
    requests: Callable[[], int],
    checks: Callable[[], int],
    window: float,
) -> Row:
    """Wait until the process works steadily, let it, and say what that took. `requests` and
    `checks` count since its start."""
    process.patience = 3 * load.interval + PATIENCE
    if window >= load.interval:
        process.wait_until(lambda: checks() >= 2 * load.batches, every=0.2)
    else:
        process.wait_until(lambda: checks() > 0)
    began, checks_before, requests_before = time.monotonic(), checks(), requests()
    cpu_before = cpu_of(process.pid)
    time.sleep(window)
    cpu, seconds = cpu_of(process.pid) - cpu_before, time.monotonic() - began
    return Row(
        way=way,
        checks=checks() - checks_before,
        requests=requests() - requests_before,
        seconds=seconds,
        cpu=cpu,
        peak_mb=peak_mb_of(process.pid),
        late=math.nan,
        late_p99=math.nan,
    )


# --- The ways that are compared -------------------------------------------------------------------


def jobs_yaml(load: Load) -> str:
    keys = [f"openai-{n}" for n in range(load.keys)] + [HANGING[11:], LIMITED[11:]]
    lines = [f"  {name}: {{type: openai, env: {env_name(name)}}}" for name in keys]
    head = "database: teckochecker.db\nadmin: {host: 127.0.0.1, port: 0}\nsecrets:\n"
    return head + "\n".join([*lines, "  keboola: {type: keboola, env: KEY_KEBOOLA}", "jobs: []\n"])


def env_name(secret: str) -> str:
    return "KEY_" + secret.upper().replace("-", "_")


class Figures:
    """What a running program says of itself on /metrics."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        with Process([PROGRAM, "status", "--json"], folder, env) as status:
            document, _ = status.process.communicate(timeout=PATIENCE)
            self._address = json.loads(document)["admin"]
        self.before: dict[str, float] = {}
        self.now: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        """How many checks were answered, by an upper bound of their lateness, as text."""
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=PATIENCE) as answer:  # noqa: S310 our own
            text = answer.read().decode()
        name = "teckochecker_check_lateness_seconds_bucket"
        found = re.findall(rf'^{name}\{{le="(.+)"\}} (.+)$', text, re.M)
        return {bound: float(count) for bound, count in found}

    def checks(self) -> int:
        self.before, self.now = self.now, self()
        return int(self.now["+Inf"])


def quantile(before: Mapping[str, float], after: Mapping[str, float], share: float) -> float:
    """Seconds, straight between the bounds of the bucket that it falls into."""
    low, below, wanted = 0.0, 0.0, share * (after["+Inf"] - before["+Inf"])
    for bound, count in after.items():
        here = count - before[bound]
        if here >= wanted:
            high = float(bound) if bound != "+Inf" else low
            return low + (high - low) * (wanted - below) / max(here - below, 1.0)
        low, below = float(bound), here
    return math.nan


def measure_program(load: Load, urls: str, ask: Callable[[str], Any], folder: Path) -> Row:
    """`teckochecker.py start`, with a job for each batch."""
    base_url, stack_url = urls.split()
    (folder / "jobs.yaml").write_text(jobs_yaml(load))
    env = {
        "OPENAI_BASE_URL": base_url,
        "KEY_KEBOOLA": "no-token",
        "MIN_POLL_INTERVAL": str(min(30, load.interval)),
        **{env_name(f"openai-{n}"): key_of(n) for n in range(load.keys)},
        **{env_name(key[11:]): key for key in (HANGING, LIMITED)},
    }
    made = [HERE, "make", folder / "teckochecker.db", stack_url, json.dumps(load)]
    subprocess.run([sys.executable, *map(str, made)], check=True)
    requests = partial_count(ask)
    with Process([PROGRAM, "start"], folder, env) as program:
        program.wait_until(lambda: requests() > 0)
        figures = Figures(folder, env)
        row = measure("TeckoChecker", program, load, requests, figures.checks, load.window)
        late = [quantile(figures.before, figures.now, share) for share in (0.5, 0.99)]
        program.patience = 2 * load.interval + PATIENCE
        ask("1\n")  # which opens connections, and is not counted
        program.wait_until(lambda: len(ask("\n")[1]) == 1, every=0.2)
        ask(f"{FINISHED}\n")
        program.wait_until(lambda: len(ask("\n")[1]) == 1 + FINISHED, every=0.2)
        post = statistics.median(ask("\n")[1][1:])
        return row._replace(late=late[0], late_p99=late[1], post=post)


def partial_count(ask: Callable[[str], Any]) -> Callable[[], int]:
    """Requests from now on."""
    before = int(ask("\n")[0])
    return lambda: int(ask("\n")[0]) - before


def measure_plain(load: Load, urls: str, ask: Callable[[str], Any], folder: Path) -> Row:
    """The plain loop: each request is a check."""
    flat_out = load.batches >= FLAT_OUT_FROM
    way = "plain loop, flat out" if flat_out else "plain loop"
    requests = partial_count(ask)
    with Process([HERE, "plain", urls.split()[0], json.dumps(load)], folder) as loop:
        window = FLAT_OUT_WINDOW if flat_out else load.window
        row = measure(way, loop, load, requests, requests, window)
        loop.process.terminate()
        assert loop.process.stdout
        late, late_p99 = json.loads(loop.process.stdout.readline())
        return row if flat_out else row._replace(late=late, late_p99=late_p99)


def rows_of(load: Load) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="teckochecker-benchmark-") as name:
        folder = Path(name)
        with Process([HERE, "stand-in", json.dumps(load)], folder) as server:
            urls = server.ask()

            def ask(line: str) -> Any:
                return json.loads(server.ask(line))

            yield measure_plain(load, urls, ask, folder)
            yield measure_program(load, urls, ask, folder)


HEADS = (
    *("", "checks/s", "requests per 1,000", "CPU s per 1,000", "ratio"),
    *("late, median and p99 (ms)", "done to POST (ms)", "peak MB"),
)


def table_line(row: Row, reference: Row) -> str:
    """A row of the table, with its CPU per check as a share of the reference's."""
    late = "" if math.isnan(row.late) else f"{1000 * row.late:,.0f}, {1000 * row.late_p99:,.0f}"
    cells = (
        row.way,
        f"{row.checks / row.seconds:,.0f}",
        f"{1000 * row.requests / row.checks:,.0f}",
        f"{row.cpu_per_1000:.3f}",
        "1" if row is reference else f"1/{reference.cpu_per_1000 / row.cpu_per_1000:.1f}",
        late,
        "" if math.isnan(row.post) else f"{1000 * row.post:.0f}",
        f"{row.peak_mb:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def give_up(number: int, _: object) -> None:
    raise SystemExit(f"ended by {signal.Signals(number).name}")  # each context ends its process


def compare(loads: Sequence[Load]) -> None:
    """Print a table in Markdown, a pair of rows for each load, as they come."""
    signal.signal(signal.SIGTERM, give_up)
    version = importlib.metadata.version("openai")
    print(f"Python {platform.python_version()}, openai {version}, {os.cpu_count()} cores\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for load in loads:
        print(f"| **{load}** |{' |' * (len(HEADS) - 1)}", flush=True)
        reference = None
        for row in rows_of(load):
            reference = reference or row
            print(table_line(row, reference), flush=True)


def main(argv: Sequence[str]) -> None:
    match argv:
        case ["stand-in", load]:
            return stand_in(Load.read(load))
        case ["plain", base_url, load]:
            return asyncio.run(check_plainly(base_url, Load.read(load)))
        case ["make", database, stack_url, load]:
            return asyncio.run(make_store(database, stack_url, Load.read(load)))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="also 10,000 and 100,000 batches")
    parser.add_argument("--batches", type=int, help="only so many, of one load")
    parser.add_argument("--interval", type=int, default=10, help="s between checks of a batch")
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--latency", type=float, default=0.0, help="s that an answer takes")
    parser.add_argument("--troubled", action="store_true", help="beside a hanging and a 429 key")
    a = parser.parse_args(argv)
    one = Load(a.batches or 0, a.interval, a.keys, a.latency, a.troubled)
    return compare([one] if a.batches else (*LOADS, *(LARGE if a.full else ())))


if __name__ == "__main__":
    main(sys.argv[1:])
