"""What the admin surface bears, and what that costs the checks.

    .venv/bin/python tests/benchmarks/admin.py

The stand-in for OpenAI, with batches that stay in progress and no list of them, and
`teckochecker.py start`, with a job for each of them, are processes of their own; so are the
clients, who keep 32 connections open and on each send the next request when the last one is
answered. Everything is on loopback. Each path is asked for 10 s, after a stretch of the same checks
without a client. How late a check is: the time from one retrieval of its batch to the next, as they
reach the stand-in, less the interval; it is negative for the one after a late one. A stretch is as
long as the interval, so its figures are those of each batch's check in it, against the one before
it, which no client delayed. All processes share the machine's cores, which bounds every figure.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checks import PATIENCE, PROGRAM, ROOT, Process, cpu_of, give_up

JOB_COUNT = 1000
INTERVAL = 10  # s between two checks of a batch: 100 checks a second in all
CONNECTIONS = 32
SECONDS = 10.0
LIMIT = 240  # s for everything; it takes about 90
PATHS = ("/health", "/stats", "/api/jobs?limit=100")
KEY = "sk-standin-openai"
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


class Row(NamedTuple):
    """What was asked for in a stretch of time, how fast that was answered, how late checks were."""

    asked: str
    rate: float
    times: list[float]  # s, of each answer
    refused: int  # answers other than 200
    cpu: float  # of the program, as a share of a core
    late: list[float]  # s, of each check


# --- The stand-in and the clients: this file again, as processes of their own --------------------


def stand_in() -> None:
    """Serve the batches until stdin ends; a line on it, "from to", is answered by the lateness of
    each check between these times."""
    sys.path.insert(0, str(ROOT / "tests"))
    import standins

    seen: dict[str, list[float]] = {}

    class Timed(standins.OpenAI):
        def _respond(self, request: standins.Request) -> standins.Answer:
            seen.setdefault(request.path, []).append(time.monotonic())
            return super()._respond(request)

    with Timed(record=False) as server:
        server.many(KEY, ids())
        no_list = standins.Fault.status(404)  # so that each batch is asked for, and seen to be late
        server.fault("GET /v1/batches", no_list, times=None)
        print(server.base_url, flush=True)
        for line in sys.stdin:
            begun, ended = map(float, line.split())
            late = [
                second - first - INTERVAL
                for times in list(seen.values())
                for first, second in itertools.pairwise(times)
                if begun <= second < ended
            ]
            print(json.dumps({"checked": len(seen), "late": late}), flush=True)


def ids() -> list[str]:
    return [f"batch_{n}" for n in range(JOB_COUNT)]


async def ask(host: str, path: str) -> None:
    """Keep every connection busy for SECONDS, then print each answer's time, and the refusals."""
    times: list[float] = []
    refused = 0
    until = time.monotonic() + SECONDS
    name, _, port = host.rpartition(":")
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()

    async def client() -> None:
        nonlocal refused
        reader, writer = await asyncio.open_connection(name, int(port))
        while (begun := time.monotonic()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
            await reader.readexactly(int(length))
            times.append(time.monotonic() - begun)
            refused += not head.startswith(b"HTTP/1.1 200 ")
        writer.close()

    async with asyncio.timeout(SECONDS + PATIENCE), asyncio.TaskGroup() as clients:
        for _ in range(CONNECTIONS):
            clients.create_task(client())
    print(json.dumps({"times": times, "refused": refused}), flush=True)


# --- The stretches that are compared --------------------------------------------------------------


def rows() -> Iterator[Row]:
    """A row without a client, and one for each path."""
    this = Path(__file__).resolve()
    with tempfile.TemporaryDirectory(prefix="teckochecker-benchmark-") as name:
        folder = Path(name)
        jobs = (JOB % (batch_id, INTERVAL, batch_id) for batch_id in ids())
        (folder / "jobs.yaml").write_text(JOBS + "".join(jobs))
        with Process([this, "stand-in"], folder) as server:
            env = {
                "OPENAI_BASE_URL": server.ask(),
                "BENCHMARK_OPENAI_KEY": KEY,
                "BENCHMARK_KEBOOLA_TOKEN": "no-token",
                "MIN_POLL_INTERVAL": str(INTERVAL),
            }

            def seen(begun: float, ended: float) -> Any:
                return json.loads(server.ask(f"{begun} {ended}\n"))

            with Process([PROGRAM, "start"], folder, env) as program:
                program.wait_until(lambda: seen(0, 0)["checked"] == JOB_COUNT, every=0.2)
                time.sleep(INTERVAL)  # so that each stretch has the second check of every pair
                host = address(folder, env).removeprefix("http://")
                for path in ("", *PATHS):
                    begun, cpu = time.monotonic(), cpu_of(program.pid)
                    said: dict[str, Any] = {"times": [], "refused": 0}
                    if path:
                        with Process([this, "ask", host, path], folder) as clients:
                            said = json.loads(clients.ask())
                    else:
                        time.sleep(SECONDS)
                    ended = time.monotonic()
                    used = (cpu_of(program.pid) - cpu) / (ended - begun)
                    late = seen(begun, ended)["late"]
                    yield Row(path, len(said["times"]) / SECONDS, **said, cpu=used, late=late)
                    time.sleep(INTERVAL)  # what was late is made up for


def address(folder: Path, env: dict[str, str]) -> str:
    with Process([PROGRAM, "status", "--json"], folder, env) as status:
        document, _ = status.process.communicate(timeout=PATIENCE)
        return str(json.loads(document)["admin"])


HEADS = (
    ("", "requests", "p50", "p99", "not", "CPU", "checks", "late: p50", "p99", "max"),
    ("", "a second", "ms", "ms", "200", "%", "", "ms", "ms", "ms"),
)
WIDTHS = (-21, 9, 7, 8, 5, 6, 8, 11, 8, 8)


def at(values: Sequence[float], share: float) -> str:
    """A percentile in ms."""
    return f"{1000 * sorted(values)[int(share * (len(values) - 1))]:.1f}" if values else ""


def table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.asked or "no client",
            f"{row.rate:.0f}" if row.asked else "",
            at(row.times, 0.5),
            at(row.times, 0.99),
            str(row.refused) if row.asked else "",
            f"{100 * row.cpu:.0f}",
            f"{len(row.late)}",
            f"{1000 * statistics.median(row.late):.1f}",
            at(row.late, 0.99),
            at(row.late, 1),
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


def main(argv: Sequence[str]) -> None:
    match argv:
        case ["stand-in"]:
            stand_in()
        case ["ask", host, path]:
            asyncio.run(ask(host, path))
        case []:
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, give_up)
            signal.alarm(LIMIT)
            print(f"Python {platform.python_version()}, {os.cpu_count()} cores; {JOB_COUNT} jobs")
            print(f"every {INTERVAL} s; {CONNECTIONS} connections, each for {SECONDS:.0f} s\n")
            print(table(list(rows())))
        case _:
            raise SystemExit("takes no arguments")


if __name__ == "__main__":
    main(sys.argv[1:])
