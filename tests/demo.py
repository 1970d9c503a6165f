"""The demo: the whole program against stand-ins for both APIs and a source, on this machine, in
some seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import standins
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import teckochecker as tecko

JOBS = """\
database: demo.db
admin: {{host: 127.0.0.1, port: 0}}
secrets:
  openai-demo:  {{type: openai,  env: DEMO_OPENAI_KEY}}
  keboola-demo: {{type: keboola, env: DEMO_KEBOOLA_TOKEN}}
jobs:
  - name: nightly
    poll_interval: 1s
    watch: {{secret: openai-demo, batch_ids: [batch_nightly]}}
    trigger: &target
      {{secret: keboola-demo, stack_url: "{stack}", component_id: demo.app, configuration_id: "1",
       variables: {{region: eu}}}}
  - name: three-parts
    poll_interval: 1s
    watch:
      secret: openai-demo
      batch_ids: [batch_part1, batch_part2, batch_part3]
      trigger_when: all_finished
    trigger: *target
  - name: bad-input
    poll_interval: 1s
    watch: {{secret: openai-demo, batch_ids: [batch_bad]}}
    trigger: *target
  - name: products
    poll_interval: 1s
    ingest: {{type: csv, path: products.csv, id: sku, fields: {{title: name, published_at: added}}}}
  - name: posts
    poll_interval: 1s
    ingest: {{type: api, url: "{posts}", items: data, next: cursor}}
"""
PRODUCTS = """\
sku,name,added,price
A-1,Kettle,2024-01-15,24.90
A-2,"Teapot, glass",15.02.2024,19.50
A-3,Strainer,2024-13-45,3.20
A-4,Cup,"Mon, 4 Mar 2024 10:30:00 GMT",4.10
"""
LATER = {"24.90": "22.90"}  # what changes in the file while the demo runs,
MORE = "A-5,Saucer,2024-03-09,2.80\n"  # and what comes
LIMIT = 45.0  # s; it takes about ten
WIDTH = 80  # columns of a line at most
ENDED = {"nightly": "completed", "three-parts": "completed_with_failures", "bad-input": "failed"}
INGESTED = {"products": 4, "posts": 25}  # and one product is rejected


def play(openai: standins.OpenAI) -> None:
    """What happens at OpenAI, in seconds from now."""
    for name, end, after in (
        ("nightly", "completed", 4.0),
        ("part1", "completed", 2.5),
        ("part2", "completed", 3.5),
        ("part3", "expired", 5.0),
        ("bad", "failed", 3.0),
    ):
        openai.batch(f"batch_{name}", "validating", total=200)
        counts = {"completed": 120} if end == "expired" else {}
        errors = [{"code": "invalid_json_line", "message": "line 3 is not JSON", "line": 3}]
        steps = [(1.0, "in_progress", {"completed": 40})] if end != "failed" else []
        last = {"errors": errors} if end == "failed" else counts
        openai.script(f"batch_{name}", [*steps, (after, end, last)])


def change(file: Path) -> None:
    """One product gets another price, and one is added."""
    text = file.read_text()
    for old, new in LATER.items():
        text = text.replace(old, new)
    file.write_text(text + MORE)


async def is_done(store: tecko.Store) -> bool:
    """Whether every batch job has ended, and every record has come."""
    ended = all(ENDED.get(job.name, job.status) == job.status for job in await store.jobs())
    totals = [(await store.totals(name))["records"] for name in INGESTED]
    return ended and totals == [*INGESTED.values()]


def show(text: str, indent: int = 0) -> None:
    """Print a line, broken between words where it is longer than WIDTH or the terminal."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(text, max(width, indent + 20), subsequent_indent=" " * indent, **how))


class Lines:
    """What happens as lines that stay, for a pipe or a file."""

    def __init__(self, store: tecko.Store, started: float) -> None:
        self.store, self.started = store, started
        self.seen = 0
        self.names: dict[int | None, str] = {}

    async def new_rows(self) -> list[tuple[str, tecko.LogRow]]:
        """Log rows that were not there before, with the names of their jobs."""
        rows = await self.store.logs(None, 100, after=self.seen)
        if rows and not self.names:
            self.names = {job.id: job.name for job in await self.store.jobs()}
        self.seen = rows[-1].id if rows else self.seen
        return [(self.names.get(row.job_id, ""), row) for row in rows]

    async def update(self) -> None:
        for name, row in await self.new_rows():
            at = time.monotonic() - self.started
            text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24}\b", r"\1", row.message)
            show(f"{at:5.1f} s  {name:11}  {row.status:9}  {text}", indent=32)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Screen(Lines):
    """What happens as one line a job, which is drawn anew, for a terminal."""

    def __init__(self, store: tecko.Store, started: float) -> None:
        super().__init__(store, started)
        self.said: dict[str, str] = {}
        console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
        console.width = min(WIDTH, console.width)
        self.live = Live(console=console, auto_refresh=False)

    async def update(self) -> None:
        for name, row in await self.new_rows():
            self.said[name] = row.message
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for width in (11, 12, 14, None):
            table.add_column(width=width, no_wrap=True, overflow="ellipsis")
        for job in await self.store.jobs():
            sign, number = tecko.SIGNS[job.status]
            colour = f"color({number - 30})"  # rich counts from black
            state = Text(f"{sign} {job.status.partition('_')[0]}", colour)
            done, total = await self.progress(job)
            bar = ProgressBar(total, done, width=14, complete_style=colour)
            table.add_row(job.name, state, bar, self.said.get(job.name, ""))
        self.live.update(table, refresh=True)

    async def progress(self, job: tecko.Job) -> tuple[int, int]:
        """Requests of its batches, or records, that are done; and all."""
        if job.name in INGESTED:
            return (await self.store.totals(job.name))["records"], INGESTED[job.name]
        done = sum(batch.requests_completed for batch in job.batches)
        return done, sum(batch.requests_total for batch in job.batches) or 1

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()


async def watch(store: tecko.Store, started: float, products: Path) -> None:
    """Show what happens until all is done. Once the products have come, their file changes."""
    changed = False
    kind = Screen if sys.stdout.isatty() else Lines
    with kind(store, started) as shown:
        while time.monotonic() - started < LIMIT:
            done = await is_done(store)  # asked first, so that the last rows are shown, too
            await shown.update()
            if done:
                return
            if not changed and (await store.totals("products"))["records"]:
                changed = True
                change(products)
            await asyncio.sleep(0.1)


def verdict(jobs: dict[str, str], keboola: standins.Keboola) -> list[str]:
    """What is not as it must be: which Keboola jobs there are, and with which variables."""
    wrong = [
        f"{name} is {jobs[name]}, not {end}" for name, end in ENDED.items() if jobs[name] != end
    ]
    found = {v["teckochecker_job"]: v for v in map(keboola.variables, keboola.created)}
    if sorted(found) != ["nightly", "three-parts"] or len(keboola.created) != 2:
        wrong.append(f"Keboola jobs for {sorted(found)}, {len(keboola.created)} in all")
    expected: dict[str, dict[str, Any]] = {
        "nightly": {"batch_ids_completed": ["batch_nightly"], "batch_ids_failed": []},
        "three-parts": {
            "batch_ids_completed": ["batch_part1", "batch_part2"],
            "batch_ids_failed": ["batch_part3"],
        },
    }
    for name, lists in expected.items():
        for key, value in lists.items():
            if json.loads(found.get(name, {}).get(key, "null")) != value:
                wrong.append(f"{name}: {key} is not {value}")
    return wrong


async def wrong_data(store: tecko.Store) -> list[str]:
    """What is not as it must be in the records."""
    wrong = []
    for name, count in INGESTED.items():
        if (found := (await store.totals(name))["records"]) != count:
            wrong.append(f"{name}: {found} records, not {count}")
    if [row["place"] for row in await store.rejects(None, 10)] != ["products.csv line 4"]:
        wrong.append("products.csv line 4 is not the one that was rejected")
    prices = [
        json.loads(row["data"])["metadata"]["price"]
        for row in await store.data("products", 1, 0, 0)
    ]
    if prices != [*LATER.values()]:
        wrong.append(f"the price of A-1 is {prices}")
    return wrong


async def run(folder: Path, keep: bool, told: dict[str, Any]) -> int:
    """`told` is filled with what --json prints at the end."""
    with standins.OpenAI() as openai, standins.Keboola() as keboola, standins.Source() as posts:
        keboola.run_seconds = 1.5
        posts.style = "cursor"
        posts.records = [{"id": i, "title": f"Post {i}", "likes": 3 * i} for i in range(1, 26)]
        text = JOBS.format(stack=keboola.url, posts=posts.items_url)
        (folder / "jobs.yaml").write_text(text)
        (folder / "products.csv").write_text(PRODUCTS)
        environ = {
            "DEMO_OPENAI_KEY": standins.OPENAI_KEY,
            "DEMO_KEBOOLA_TOKEN": standins.KEBOOLA_TOKEN,
            "OPENAI_BASE_URL": openai.base_url,
            "MIN_POLL_INTERVAL": "1",
        }
        config = tecko.load_config(folder / "jobs.yaml", environ)
        print("OpenAI, Keboola, an API and a file, all played on this machine:\n")
        play(openai)
        started = time.monotonic()
        async with tecko.make_service(config, lambda: config) as service:  # noqa: SIM117
            async with tecko.serving(service) as admin:
                await watch(service.store, started, folder / "products.csv")
                jobs = {job.name: str(job.status) for job in await service.store.jobs()}
                wrong = verdict(jobs, keboola) + await wrong_data(service.store)
                received = [keboola.variables(job) for job in keboola.created]
                [reject] = await service.operations.rejects(None, 1)
                told.update(ok=not wrong, wrong=wrong, jobs=jobs, received=received)
                told.update(rejected=[{"place": reject.place, "reason": reject.reason}])
                print("\nWhat Keboola received:")
                for job, values in zip(keboola.created, received, strict=True):
                    keys = ("teckochecker_job", "batch_ids_completed", "batch_ids_failed", "region")
                    variables = ", ".join(f"{key}={values[key]}" for key in keys)
                    show(f"  job {job['id']}: {variables}", indent=4)
                print("\nWhat was rejected:")
                show(f"  {reject.place}: {reject.reason}", indent=4)
                good = "OK: 2 Keboola jobs started, none for bad-input, 29 records in /data."
                print("\n" + ("\n".join(wrong) or good))
                if keep:
                    print("\nWhile it runs, look further:")
                    for path in ("/health", "/stats", "/data"):
                        print(f"  curl {admin.url}{path}")
                    print(f"  curl {openai.base_url}/batches \\")
                    print(f"    -H 'Authorization: Bearer {standins.OPENAI_KEY}'")
                    print("\nCtrl-C ends it.", flush=True)
                    await asyncio.Event().wait()
                print("\n`demo --keep` goes on after this, to be looked at over HTTP.")
                print(f"Next, with your own keys and batches:\n  {tecko.COMMAND} init")
    return 1 if wrong else 0


def main(*, keep: bool, as_json: bool = False) -> int:
    """Exit code 0: everything happened as it must. `as_json`: one document at the end, and all
    else to stderr."""
    logging.getLogger("teckochecker").setLevel(logging.CRITICAL)  # the rows say the same
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="teckochecker-demo-") as folder:
        try:
            with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
                code = asyncio.run(run(Path(folder), keep, told))
        except KeyboardInterrupt:
            if not keep or not told:
                print("\nstopped", file=sys.stderr)
            code = 0 if keep and told else 130
    if as_json and told:
        print(json.dumps(told, indent=2))
    return code
