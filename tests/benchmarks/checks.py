"""What it costs to watch: TeckoChecker next to a plain asyncio loop over the same SDK calls.

    .venv/bin/python tests/benchmarks/checks.py

The stand-in for OpenAI, with batches that stay in progress, runs in a process of its own; so does
each way of checking them, one after the other, on loopback alone. A row's figures are those of
its own process, threads included: CPU is user and system time out of /proc, taken over a window
of steady work after every batch was checked twice; start-up is what it used until its first
request arrived; memory is its peak until the window's end. Figures move with what else the
machine does, ratios less. Checks that are due together spare a loop its cold wake-ups, as the
program's grid of due times does: so the plain loop that does likewise is the reference.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "teckochecker.py"
KEY = "sk-standin-openai"

IN_FLIGHT = 10  # calls at once in the plain loop: more only makes each of them dearer
WINDOW = 20.0  # s of steady work that are measured: whole intervals, so that no phase counts more
FLAT_OUT_WINDOW = 5.0  # s; a loop that never waits does as many checks in that
PATIENCE = 30.0  # s for a process to do what the next figure waits for
LIMIT = 150  # s for all ways of one load; they take about 75
TICKS = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """What is watched: so many batches, one a job, each every `interval` seconds."""

    batches: int
    interval: int

    @property
    def ids(self) -> list[str]:
        return [f"batch_{n}" for n in range(self.batches)]


class Pace(NamedTuple):
    """How a plain loop makes its checks: `rate` a second, so many of them due `together`."""

    rate: float
    together: int = 1

    def due(self, number: int) -> float:
        """Seconds from the start to check `number` (from 0)."""
        return number // self.together * self.together / self.rate


LOADS = (Load(batches=100, interval=1),)


class Row(NamedTuple):
    """What one way of checking did, and what it used for that."""

    way: str
    checks: int
    requests: int
    seconds: float
    cpu: float
    start_up_cpu: float
    peak_mb: float

    @property
    def cpu_per_1000(self) -> float:
        return 1000 * self.cpu / self.checks


# --- The plain way, and the stand-in: this file again, as processes of their own -----------------


async def check_plainly(base_url: str, load: Load, pace: Pace) -> None:
    """Retrieve the batches in turn, at this pace, and nothing else."""
    import openai

    slots, began = asyncio.Semaphore(IN_FLIGHT), time.monotonic()
    client = openai.AsyncOpenAI(api_key=KEY, base_url=base_url)

    async def check(batch_id: str) -> None:
        try:
            await client.batches.retrieve(batch_id)
        finally:
            slots.release()

    async with asyncio.timeout(LIMIT), client, asyncio.TaskGroup() as group:
        for number, batch_id in enumerate(itertools.cycle(load.ids)):
            await slots.acquire()
            if (wait := began + pace.due(number) - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            group.create_task(check(batch_id))


def stand_in(load: Load) -> None:
    """Serve the batches until stdin ends; every line on it is answered by the requests so far."""
    sys.path.insert(0, str(ROOT / "tests"))
    import standins

    with standins.OpenAI(record=False) as server:
        server.many(KEY, load.ids)
        print(server.base_url, flush=True)
        for _ in sys.stdin:
            print(server.request_count, flush=True)


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
        until = time.monotonic() + PATIENCE
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
    checks: Callable[[], int] | None = None,
    window: float | None = None,
) -> Row:
    """Wait until the process works steadily, let it, and say what that took. `requests` and
    `checks` count since before its start; without `checks`, each request is one."""
    checks = checks or requests
    process.wait_until(lambda: requests() > 0)
    start_up = cpu_of(process.pid)
    process.wait_until(lambda: checks() >= 2 * load.batches, every=0.2)
    began, checks_before, requests_before = time.monotonic(), checks(), requests()
    cpu_before = cpu_of(process.pid)
    time.sleep(window or WINDOW)
    cpu, seconds = cpu_of(process.pid) - cpu_before, time.monotonic() - began
    return Row(
        way=way,
        checks=checks() - checks_before,
        requests=requests() - requests_before,
        seconds=seconds,
        cpu=cpu,
        start_up_cpu=start_up,
        peak_mb=peak_mb_of(process.pid),
    )


# --- The ways that are compared -------------------------------------------------------------------


JOBS = """\
database: teckochecker.db
admin: {host: 127.0.0.1, port: 0}
secrets:
  openai:  {type: openai,  env: BENCHMARK_OPENAI_KEY}
  keboola: {type: keboola, env: BENCHMARK_KEBOOLA_TOKEN}
jobs:
"""
JOB = """\
  - name: watch-%s
    poll_interval: %s
    watch: {secret: openai, batch_ids: [%s]}
    trigger:
      {secret: keboola, stack_url: "http://127.0.0.1:9", component_id: c, configuration_id: c}
"""  # nothing listens there: no batch ever ends


def measure_program(load: Load, base_url: str, count: Callable[[], int], folder: Path) -> Row:
    """`teckochecker.py start`, with a job for each batch."""
    jobs = (JOB % (batch_id, load.interval, batch_id) for batch_id in load.ids)
    (folder / "jobs.yaml").write_text(JOBS + "".join(jobs))
    env = {
        "OPENAI_BASE_URL": base_url,
        "BENCHMARK_OPENAI_KEY": KEY,
        "BENCHMARK_KEBOOLA_TOKEN": "no-token",
        "MIN_POLL_INTERVAL": str(load.interval),
    }
    before = count()
    with Process([PROGRAM, "start"], folder, env) as program:
        address = ""

        def figure(name: str) -> int:
            nonlocal address
            if not address:
                with Process([PROGRAM, "status", "--json"], folder, env) as status:
                    document, _ = status.process.communicate(timeout=PATIENCE)
                    address = json.loads(document)["admin"]
            with urllib.request.urlopen(f"{address}/stats", timeout=PATIENCE) as answer:  # noqa: S310 our own
                return int(json.load(answer)[name])

        way = f"TeckoChecker, {load.batches} jobs, {load.interval} s"
        row = measure(way, program, load, lambda: count() - before, lambda: figure("checks"))
        if figure("errors"):
            program.fail("had checks that failed")
        return row


def measure_plain(
    load: Load, base_url: str, count: Callable[[], int], folder: Path, pace: Pace
) -> Row:
    """The plain loop, at this pace."""
    command = [Path(__file__).resolve(), "plain", base_url, *load, *pace]
    before = count()
    way, window = f"plain loop, {pace.together} together", WINDOW
    if pace.together == 1:
        way = "plain loop, evenly spread"
    if pace.rate == math.inf:
        way, window = "plain loop, flat out", FLAT_OUT_WINDOW
    with Process(command, folder) as loop:
        return measure(way, loop, load, lambda: count() - before, window=window)


def rows_of(load: Load) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="teckochecker-benchmark-") as name:
        folder = Path(name)
        with Process([Path(__file__).resolve(), "stand-in", *load], folder) as server:
            base_url = server.ask()

            def count() -> int:
                return int(server.ask("\n"))

            yield measure_program(load, base_url, count, folder)
            rate = load.batches / load.interval
            for pace in (Pace(rate, together=load.batches), Pace(rate), Pace(math.inf)):
                yield measure_plain(load, base_url, count, folder, pace)


HEADS = (
    ("", "checks", "checks", "requests", "CPU s", "", "peak", "start-up"),
    ("", "", "a second", "a check", "per 1000", "ratio", "MB", "CPU s"),
)
WIDTHS = (-27, 6, 9, 9, 9, 6, 5, 9)  # 80 in all; negative: to the left


def table(rows: Sequence[Row], reference: Row) -> str:
    """The rows, with their CPU per check as a multiple of the reference's."""
    cells = [
        (
            row.way,
            f"{row.checks:,}",
            f"{row.checks / row.seconds:.0f}",
            f"{row.requests / row.checks:.2f}",
            f"{row.cpu_per_1000:.2f}",
            f"{row.cpu_per_1000 / reference.cpu_per_1000:.2f}",
            f"{row.peak_mb:.0f}",
            f"{row.start_up_cpu:.2f}",
        )
        for row in rows
    ]
    return "\n".join(
        "".join(
            text.ljust(-width) if width < 0 else text.rjust(width)
            for text, width in zip(line, WIDTHS, strict=True)
        )
        for line in (*HEADS, *cells)
    )


def give_up(number: int, _: object) -> None:
    raise SystemExit(f"ended by {signal.Signals(number).name}")  # each context ends its process


def main(argv: Sequence[str]) -> None:
    match argv:
        case ["stand-in", batches, interval]:
            stand_in(Load(int(batches), int(interval)))
        case ["plain", base_url, batches, interval, rate, together]:
            load, pace = Load(int(batches), int(interval)), Pace(float(rate), int(together))
            asyncio.run(check_plainly(base_url, load, pace))
        case []:
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, give_up)
            signal.alarm(LIMIT * len(LOADS))
            version = importlib.metadata.version("openai")
            print(f"Python {platform.python_version()}, openai {version}, {os.cpu_count()} cores\n")
            for load in LOADS:
                rows = list(rows_of(load))
                print(table(rows, reference=rows[1]))
        case _:
            raise SystemExit("takes no arguments")


if __name__ == "__main__":
    main(sys.argv[1:])
