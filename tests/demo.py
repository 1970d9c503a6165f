"""The demo: the whole program against stand-ins for both APIs, on this machine, in some seconds."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import standins

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
"""
LIMIT = 45.0  # s; it takes about ten
ENDED = {"nightly": "completed", "three-parts": "completed_with_failures", "bad-input": "failed"}


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


async def watch(store: tecko.Store, started: float) -> None:
    """Print every log row as it comes, until all jobs have ended."""
    names: dict[int | None, str] = {}
    seen = 0
    while time.monotonic() - started < LIMIT:
        for row in await store.logs(None, 100, after=seen):
            seen = row.id
            names = names or {job.id: job.name for job in await store.jobs()}
            at = time.monotonic() - started
            who = names.get(row.job_id, "")
            print(f"{at:5.1f} s  {who:12} {row.status:10} {row.message}")
        if all(job.status == ENDED[job.name] for job in await store.jobs()):
            return
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


async def run(folder: Path, keep: bool) -> int:
    with standins.OpenAI() as openai, standins.Keboola() as keboola:
        keboola.run_seconds = 1.5
        (folder / "jobs.yaml").write_text(JOBS.format(stack=keboola.url))
        environ = {
            "DEMO_OPENAI_KEY": standins.OPENAI_KEY,
            "DEMO_KEBOOLA_TOKEN": standins.KEBOOLA_TOKEN,
            "OPENAI_BASE_URL": openai.base_url,
            "MIN_POLL_INTERVAL": "1",
        }
        config = tecko.load_config(folder / "jobs.yaml", environ)
        print(f"stand-ins: OpenAI at {openai.url}, Keboola at {keboola.url}; store in {folder}\n")
        play(openai)
        started = time.monotonic()
        async with tecko.make_service(config, lambda: config) as service:
            with tecko.serving(service) as admin:
                await watch(service.store, started)
                jobs = {job.name: str(job.status) for job in await service.store.jobs()}
                wrong = verdict(jobs, keboola)
                print("\nWhat Keboola received:")
                for job in keboola.created:
                    values = keboola.variables(job)
                    keys = ("teckochecker_job", "batch_ids_completed", "batch_ids_failed", "region")
                    print(f"  job {job['id']}: " + ", ".join(f"{k}={values[k]}" for k in keys))
                said = "\n".join(wrong) or "As it must be: two Keboola jobs, none for bad-input."
                print(f"\n{said}\n\nWhile the demo runs (--keep), look further:")
                for path in ("/health", "/stats"):
                    print(f"  curl {admin.url}{path}")
                key = f"-H 'Authorization: Bearer {standins.OPENAI_KEY}'"
                print(f"  curl {openai.base_url}/batches {key}")
                if keep:
                    print("\nCtrl-C ends it.", flush=True)
                    await asyncio.Event().wait()
    return 1 if wrong else 0


def main(*, keep: bool) -> int:
    """Exit code 0: everything happened as it must."""
    logging.getLogger("teckochecker").setLevel(logging.CRITICAL)  # the rows say the same
    with tempfile.TemporaryDirectory(prefix="teckochecker-demo-") as folder:
        try:
            return asyncio.run(run(Path(folder), keep))
        except KeyboardInterrupt:
            return 0
