"""What it costs to ingest a CSV: TeckoChecker next to the plain loop that fills the same tables.

    .venv/bin/python tests/benchmarks/ingest.py [--rows N] [--rounds N] [--first] [--data] [--json]

The plain loop is csv.reader, json.dumps and sqlite3's executemany: upserts into the raw and the
normalized table, 1,000 rows a commit, with the program's own journal and durability; it neither
validates nor compares. The program does `job run`. Each part is a process of its own, on a file
and a store that the part before it left: CPU is that process's user and system time, threads
included, out of wait4(2); memory is its peak, read from /proc while it runs, as wait4's is never
below this process's own. "Net" is without the start-up: what `job list` takes, and for the plain
loop what it takes for a file without rows. Each "of plain" is the plain loop's figure for the
same file, in rows a second or CPU seconds, set so that 1.0 is as good as it and more is better.
`--first` stops after the first part, for the memory of a large file; `--data` goes on to measure
GET /data.
"""

from __future__ import annotations

import argparse
import base64
import csv
import itertools
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

# `checks` is imported only where it is used: its own imports would be memory of the plain loop.

THIS = Path(__file__).resolve()
SOURCE = "products"
ROWS = 100_000
CHUNK = 1000  # rows a commit
CHANGED_EVERY = 100  # rows: 1 % change
LIMIT = 600.0  # s for 100,000 rows, all parts; they take about 60
ASKED = 50  # requests whose median is one figure of /data
PAGES = (10, 100)  # records a request: the default and the most
SECRET_KEY = base64.urlsafe_b64encode(bytes(range(32))).decode()  # nothing is kept under it

# --- The file ------------------------------------------------------------------------------------

FIELDS = "id title description content author published_at url category".split()
OTHERS = "price quantity rating in_stock".split()
CATEGORIES = "garden kitchen office workshop travel music".split()
SYLLABLES = "ba be ker lo mi na or pu ra sel tan u vin zo".split()
MARK = "revised"  # is in what was changed and nowhere else


def prose() -> str:
    """Text to cut descriptions from: the same in every run."""
    chance = random.Random(4)
    words = ("".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(4000))
    return " ".join(word + "," if n % 9 == 0 else word for n, word in enumerate(words))


def row(number: int, text: str, changed: bool) -> list[object]:
    """One record of about 400 bytes; some have quotes, most have commas, a few are not ASCII."""
    place = number * 7919 % (len(text) - 300)
    title = f"{text[place : place + 24].strip().title()} {number}"
    content = text[place + 60 : place + 250]
    return [
        f"SKU-{number:08}",
        f'The "{title}"' if number % 10 == 0 else title,
        text[place : place + 60],
        f"{MARK}: {content[9:]}" if changed else content + (" ñandú" if number % 25 == 0 else ""),
        f"Author {number % 500}",
        f"20{10 + number % 15}-{1 + number % 12:02}-{1 + number % 28:02}T10:30:{number % 60:02}Z",
        f"https://shop.example/{CATEGORIES[number % 6]}/items/{number}",
        CATEGORIES[number % 6],
        f"{number % 9973 / 100 + changed:.2f}",
        number % 41,
        number % 50 / 10,
        "true" if number % 3 else "false",
    ]


def write_file(path: Path, rows: int, changed: bool = False, turned: bool = False) -> None:
    """The file with every `CHANGED_EVERY`th row as before or changed; `turned` begins in its
    middle, so that only the rows are known and not the file."""
    text = prose()
    numbers: Iterable[int] = range(rows)
    if turned:
        numbers = itertools.chain(range(rows // 2, rows), range(rows // 2))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS + OTHERS)
        writer.writerows(row(n, text, changed and n % CHANGED_EVERY == 50) for n in numbers)


# --- The plain loop: this file again, as a process of its own ------------------------------------

TABLES = """\
CREATE TABLE IF NOT EXISTS raw_data_csv (
    id INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    external_id TEXT NOT NULL,
    raw_data TEXT NOT NULL,
    ingested_at TEXT NOT NULL,
    processed INTEGER NOT NULL DEFAULT 0,
    UNIQUE (source, external_id)
);
CREATE TABLE IF NOT EXISTS normalized_data (
    id INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    source_id TEXT NOT NULL,
    data TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    UNIQUE (source, source_id)
);
"""
RAW = """\
INSERT INTO raw_data_csv (source, external_id, raw_data, ingested_at, processed)
VALUES (?, ?, ?, ?, 1)
ON CONFLICT (source, external_id) DO UPDATE SET
    raw_data = excluded.raw_data, ingested_at = excluded.ingested_at, processed = 1
"""
NORMALIZED = """\
INSERT INTO normalized_data (source, source_id, data, created_at, updated_at)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (source, source_id) DO UPDATE SET
    data = excluded.data, updated_at = excluded.updated_at
"""


def unified(record: Mapping[str, str]) -> dict[str, object]:
    """The record in the schema of all sources."""
    return {
        "source": SOURCE,
        "source_id": record["id"],
        **{name: record[name] for name in FIELDS[1:]},
        "metadata": {name: record[name] for name in OTHERS},
    }


def ingest_plainly(file: Path, database: Path) -> None:
    """Upsert every row of the file into both tables."""
    db = sqlite3.connect(database, isolation_level=None)
    with closing(db), file.open(newline="", encoding="utf-8-sig") as lines:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(TABLES)
        reader = csv.reader(lines)
        header = next(reader)
        while chunk := list(itertools.islice(reader, CHUNK)):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            records = [dict(zip(header, values, strict=True)) for values in chunk]
            db.execute("BEGIN IMMEDIATE")
            db.executemany(RAW, [(SOURCE, r["id"], json.dumps(r), now) for r in records])
            db.executemany(
                NORMALIZED, [(SOURCE, r["id"], json.dumps(unified(r)), now, now) for r in records]
            )
            db.execute("COMMIT")


# --- Processes and what they use -----------------------------------------------------------------


class Use(NamedTuple):
    """What one process used."""

    seconds: float
    cpu: float  # s
    peak_mb: float

    def less(self, other: Use) -> Use:
        return Use(self.seconds - other.seconds, self.cpu - other.cpu, self.peak_mb)


def run(command: Sequence[object], folder: Path) -> Use:
    """Run a command of this interpreter to its end; its output is shown only if it fails."""
    import checks

    args = [sys.executable, *map(str, command)]
    env = checks.clean_environment({"SECRET_KEY": SECRET_KEY, "MIN_POLL_INTERVAL": "1"})
    with (folder / "messages.log").open("w+") as messages:
        begun, peak = time.monotonic(), 0.0
        process = subprocess.Popen(
            args, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages
        )
        try:
            while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                with suppress(ValueError):  # it has just ended
                    peak = checks.peak_mb_of(process.pid)
                time.sleep(0.005)
            seconds = time.monotonic() - begun
        except BaseException:
            process.kill()
            raise
        finally:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            said = messages.read()[-2000:]
            raise SystemExit(f"{' '.join(args)} ended with {process.returncode}:\n{said}")
    return Use(seconds, used.ru_utime + used.ru_stime, peak)


def middle(uses: Iterable[Use]) -> Use:
    """The one with the median of CPU seconds."""
    ordered = sorted(uses, key=lambda use: use.cpu)
    return ordered[len(ordered) // 2]


# --- The parts that are compared -----------------------------------------------------------------

JOBS = f"""\
database: ingest.db
admin: {{host: 127.0.0.1, port: 0}}
jobs:
  - name: {SOURCE}
    poll_interval: 1h
    ingest: {{type: csv, path: products.csv, id: id}}
"""


class Part(NamedTuple):
    """What becomes of the file before a run, and how many rows were changed in it ever since."""

    name: str
    like: str  # the part whose plain figures it is compared with
    write: Callable[[Path, int], None] | None = None
    touched: bool = False
    changed: bool = False


EMPTY = "empty store"
UNCHANGED = "unchanged"
PARTS = (
    Part(EMPTY, EMPTY, write_file, touched=True),
    Part(UNCHANGED, UNCHANGED),
    Part("unchanged, but touched", UNCHANGED, touched=True),
    Part(
        "1 % changed",
        "1 % changed",
        lambda path, rows: write_file(path, rows, changed=True),
        touched=True,
        changed=True,
    ),
    Part(
        "unchanged rows in another order",
        UNCHANGED,
        lambda path, rows: write_file(path, rows, changed=True, turned=True),
        touched=True,
        changed=True,
    ),
)
WAYS = ("plain loop", "TeckoChecker")
START_UP = "start-up"


def check_store(database: Path, rows: int, changed: bool) -> None:
    """SystemExit unless the store has every row once, and what was changed in them."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        query = "SELECT count(*), sum(CAST(data AS TEXT) LIKE ?) FROM normalized_data"
        found = db.execute(query, [f"%{MARK}: %"]).fetchone()
    wanted = rows, len(range(50, rows, CHANGED_EVERY)) if changed else 0
    if found != wanted:
        raise SystemExit(f"{database.name} has (rows, changed) {found} instead of {wanted}")


def measure(folder: Path, rows: int, parts: Sequence[Part]) -> Iterator[tuple[str, str, Use]]:
    """Way, part and use of every part, in a folder without a store; start-ups come last."""
    import checks

    (folder / "jobs.yaml").write_text(JOBS)
    file, none = folder / "products.csv", folder / "none.csv"
    plain_db, program_db = folder / "plain.db", folder / "ingest.db"
    write_file(none, 0)
    plain = [THIS, "plain", file, plain_db]
    program = [checks.PROGRAM, "-c", "jobs.yaml", "job"]
    moment = int(time.time()) - 1000  # s; the file gets older times than now, each a new one
    for part in parts:
        if part.write:
            part.write(file, rows)
        if part.touched:
            moment += 10
            os.utime(file, (moment, moment))
        if part.name == part.like:
            yield WAYS[0], part.name, run(plain, folder)
            check_store(plain_db, rows, part.changed)
        yield WAYS[1], part.name, run([*program, "run", SOURCE], folder)
        check_store(program_db, rows, part.changed)
    for _ in range(3):
        yield WAYS[0], START_UP, run([THIS, "plain", none, plain_db], folder)
        yield WAYS[1], START_UP, run([*program, "list"], folder)


class Line(NamedTuple):
    """One line of the table; `of_plain` is rate, CPU, net rate and net CPU against plain's."""

    way: str
    part: str
    use: Use
    net: Use
    of_plain: tuple[float, float, float, float]


def lines_of(uses: Mapping[tuple[str, str], Use], parts: Sequence[Part]) -> Iterator[Line]:
    for way, part in itertools.product(WAYS, parts):
        if (use := uses.get((way, part.name))) is None:
            continue
        plain = uses[WAYS[0], part.like]
        net, plain_net = use.less(uses[way, START_UP]), plain.less(uses[WAYS[0], START_UP])
        ratios = (
            plain.seconds / use.seconds,
            plain.cpu / use.cpu,
            plain_net.seconds / max(net.seconds, 0.001),
            plain_net.cpu / max(net.cpu, 0.001),
        )
        yield Line(way, part.name, use, net, ratios)
    for way in WAYS:
        use = uses[way, START_UP]
        yield Line(way, START_UP, use, use.less(use), (0, 0, 0, 0))


# --- GET /data -----------------------------------------------------------------------------------


class Depth(NamedTuple):
    """Median and longest ms of a page this deep: by `after` and by `offset`."""

    limit: int
    depth: int
    after: tuple[float, float]
    offset: tuple[float, float]


def measure_data(folder: Path, rows: int) -> Iterator[Depth]:
    """Start the service on the store that was filled, and ask it one request at a time."""
    import http.client

    import checks

    env = {"SECRET_KEY": SECRET_KEY, "MIN_POLL_INTERVAL": "1"}
    with checks.Process([checks.PROGRAM, "start"], folder, env) as service:
        host = wait_for_address(service, folder, env).removeprefix("http://")
        with closing(http.client.HTTPConnection(host, timeout=checks.PATIENCE)) as client:

            def ask(query: str) -> Any:
                client.request("GET", f"/data?source={SOURCE}&{query}")
                answer = client.getresponse()
                document = json.loads(answer.read())
                if answer.status != 200:
                    raise SystemExit(f"GET /data?{query}: {answer.status} {document}")
                return document

            def times(query: str) -> tuple[float, float]:
                taken = []
                for _ in range(ASKED):
                    begun = time.perf_counter()
                    ask(query)
                    taken.append(1000 * (time.perf_counter() - begun))
                return sorted(taken)[ASKED // 2], max(taken)

            if (total := ask("limit=1")["total_count"]) != rows:
                raise SystemExit(f"total_count is {total} instead of {rows}")
            depths = 0, rows // 2, rows - max(PAGES) * 10
            cursors = cursors_at(ask, depths)
            for limit, depth in itertools.product(PAGES, depths):
                after = f"&after={cursors[depth]}" if depth else ""
                by_key, by_count = times(f"limit={limit}{after}"), f"limit={limit}&offset={depth}"
                yield Depth(limit, depth, by_key, times(by_count))


def cursors_at(ask: Callable[[str], Any], depths: Sequence[int]) -> dict[int, str]:
    """`after` for each depth but 0, found by following the pages that far."""
    from urllib.parse import quote

    cursors: dict[int, str] = {}
    passed, query = 0, f"limit={max(PAGES)}"
    while len(cursors) < len(set(depths) - {0}):
        page = ask(query)
        passed += len(page["data"])
        if page["next_after"] is None:
            raise SystemExit(f"/data ends after {passed} records")
        after = quote(str(page["next_after"]))
        query = f"limit={max(PAGES)}&after={after}"
        if passed in depths:
            cursors[passed] = after
    return cursors


def wait_for_address(service: Any, folder: Path, env: dict[str, str]) -> str:
    """Where the service's admin surface is, as soon as it answers there."""
    import urllib.request

    import checks

    found: list[str] = []

    def answers() -> bool:
        with checks.Process([checks.PROGRAM, "status", "--json"], folder, env) as status:
            document, _ = status.process.communicate(timeout=checks.PATIENCE)
        try:
            address = str(json.loads(document)["admin"])
            with urllib.request.urlopen(f"{address}/health", timeout=checks.PATIENCE):  # noqa: S310 our own
                found.append(address)
        except (OSError, ValueError, KeyError):
            return False
        return True

    service.wait_until(answers, every=0.2)
    return found[0]


# --- What is shown -------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others figures."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        first, *others = zip(texts, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


HEADS = ["", "rows/s", "of plain", "CPU s", "of plain"]
HEADS += ["net rows/s", "of plain", "net CPU s", "of plain", "peak MB"]


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ingest_table(lines: Iterable[Line], rows: int) -> str:
    def cells(line: Line) -> list[str]:
        use, net = line.use, line.net
        if line.part == START_UP:
            figures = ["", "", f"{use.cpu:.2f}", "", "", "", "", ""]
        else:
            rate, cpu, net_rate, net_cpu = map(ratio, line.of_plain)
            # What takes no longer than a start-up has no rate worth the name.
            net_shown = f"{rows / net.seconds:,.0f}" if net.seconds > 0.05 else "-"
            figures = [f"{rows / use.seconds:,.0f}", rate, f"{use.cpu:.2f}", cpu]
            figures += [net_shown, net_rate if net_shown != "-" else "-"]
            figures += [f"{net.cpu:.2f}", net_cpu if net.cpu > 0.05 else "-"]
        return [f"{line.way}, {line.part}", *figures, f"{use.peak_mb:.0f}"]

    return markdown(HEADS, map(cells, lines))


def data_table(depths: Iterable[Depth]) -> str:
    heads = ["GET /data", "after: median ms", "longest", "offset: median ms", "longest"]
    return markdown(
        heads,
        (
            [
                f"{depth.limit} records from {depth.depth:,} on",
                *(f"{value:.1f}" for value in (*depth.after, *depth.offset)),
            ]
            for depth in depths
        ),
    )


def compare(options: argparse.Namespace) -> None:
    """Measure in folders of their own, one a round, and print."""
    parts = PARTS[:1] if options.first else PARTS
    uses: dict[tuple[str, str], list[Use]] = {}
    depths: list[Depth] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="teckochecker-benchmark-") as name:
            folder = Path(name)
            for way, part, use in measure(folder, options.rows, parts):
                uses.setdefault((way, part), []).append(use)
            size = (folder / "products.csv").stat().st_size / options.rows
            if options.data and number == options.rounds - 1:
                depths = list(measure_data(folder, options.rows))
    lines = list(lines_of({which: middle(found) for which, found in uses.items()}, parts))
    about = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cores": os.cpu_count(),
        "rows": options.rows,
        "bytes_per_row": round(size),
        "rounds": options.rounds,
    }
    if options.json:
        print(
            json.dumps(
                {**about, "parts": lines_shown(lines), "data": [*map(Depth._asdict, depths)]}
            )
        )
        return
    print(
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()), end="\n\n"
    )
    print(ingest_table(lines, options.rows))
    if depths:
        print("\n" + data_table(depths))


def lines_shown(lines: Iterable[Line]) -> list[dict[str, Any]]:
    return [
        {**line._asdict(), "use": line.use._asdict(), "net": line.net._asdict()} for line in lines
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ingest beside the plain loop.")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of the file (default {ROWS})")
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are shown")
    parser.add_argument("--first", action="store_true", help="only into an empty store")
    parser.add_argument("--data", action="store_true", help="measure GET /data, too")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def main(argv: Sequence[str]) -> None:
    match argv:
        case ["plain", file, database]:
            ingest_plainly(Path(file), Path(database))
        case _:
            import signal

            import checks

            options = parser().parse_args(argv)
            if options.rows < 2000:
                raise SystemExit("--rows: at least 2000")
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, checks.give_up)
            signal.alarm(int(LIMIT * options.rounds * max(1, options.rows / ROWS)))
            compare(options)


if __name__ == "__main__":
    main(sys.argv[1:])
