"""Doctor and plan: what jobs.yaml would change, and what the other sides say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import standins
from conftest import JOB_YAML, World, flat_job, program_environment, run_program

import teckochecker as tecko


def spec(**changed: object) -> tecko.Spec:
    return tecko.job_spec(flat_job(**{"name": "nightly"} | changed))


def ingest(**changed: object) -> tecko.Spec:
    source = {"type": "csv", "path": "a.csv"} | changed
    return tecko.job_spec({"name": "products", "ingest": source})


FIRES = "will fire when its batches are done"
NEW = ["job 'nightly' is new", f"job 'nightly' {FIRES}"]
OTHERS = ["batch_9"]


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        ([spec()], [spec()], []),
        ([spec()], [], NEW),
        ([spec(poll_interval_seconds=60)], [spec()], ["changes: poll_interval 120 -> 60"]),
        ([spec(batch_ids=OTHERS)], [spec()], ["changes: watch.batch_ids changed", FIRES]),
        ([spec(name="x")], [spec()], ["job 'nightly' is called 'x' now, and keeps its history"]),
        ([], [spec()], ["job 'nightly' has left jobs.yaml: it is checked no more"]),
        ([ingest(id="sku")], [ingest()], ["job 'products' changes: ingest.id changed"]),
        ([ingest()], [spec(name="products")], ["job 'products' changes: ingest.fields changed"]),
        ([ingest()], [spec()], ["'products' is new", "'nightly' has left"]),
    ],
)
async def test_what_a_file_would_change(
    world: World, now: list[tecko.Spec], before: list[tecko.Spec], said: list[str]
) -> None:
    """A sentence for what is new, changed, renamed or gone, and for what will fire."""
    await world.store.sync_file_jobs(before, 0.0)
    found = await tecko.describe_plan(now, world.store)
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))


async def test_what_has_fired_before_is_said(world: World) -> None:
    """The same batches and target under any name fire again only when somebody asks for it."""
    world.openai.batch("batch_1", "completed")
    one = spec(batch_ids=["batch_1"], keboola_stack_url=world.keboola.url)
    await world.steps.step(await world.store.create_job(one, "store", 0.0))
    [trigger] = await world.store.triggers(1)
    other = one.model_copy(update={"name": "other"})
    [new, once] = await tecko.describe_plan([other], world.store)
    assert "'other' is new" in new and trigger.id in once
    assert "fires again only by `job retry`" in once and "of job 'nightly'" in once


async def diagnosed(world: World, *specs: tecko.Spec) -> dict[str, tecko.Finding]:
    found = await tecko.examine(world.steps, specs)
    return {finding.subject.split()[0]: finding for finding in found}


async def test_all_is_well(world: World) -> None:
    """Each key, batch, token, configuration and path is asked once, and nothing is sent."""
    world.openai.batch("batch_1", "in_progress")
    (world.config.base / "a.csv").write_text("id\n1\n")
    one = spec(batch_ids=["batch_1"], keboola_stack_url=world.keboola.url)
    two = one.model_copy(update={"name": "other"})
    found = await tecko.examine(world.steps, [one, two, ingest()])
    assert [f.good for f in found] == [True] * 4, found
    assert "in_progress" in found[0].said and "project: Stand-in, expires: None" in found[1].said
    assert "comp's stand-in" in found[2].said and found[3].said == "1 files"
    assert world.keboola.created == [] and len(world.openai.requests) == 1


async def test_whose_fault_it_is(world: World) -> None:
    """An unknown batch, a missing configuration and a missing file are each named as such."""
    world.keboola.only_configurations = {("comp", "another")}
    found = await diagnosed(
        world, spec(batch_ids=["batch_9"], keboola_stack_url=world.keboola.url), ingest()
    )
    assert "a project that the key is not of" in found["batch"].said
    assert "no such configuration" in found[next(k for k in found if k[:4] == "comp")].said
    assert "there is no file" in found["source"].said and found["Keboola"].good


async def test_refused_secrets_and_a_dead_stack(world: World) -> None:
    """A refused key is the secret's fault; a stack that does not answer is nobody's here."""
    await world.secret("openai", "openai", "sk-a-refused-key-0123", replace=True)
    found = await diagnosed(world, spec(keboola_stack_url="http://127.0.0.1:9"))
    assert "the secret is refused: replace it" in found["batch"].said
    assert "nothing to change here" in found["Keboola"].said


def test_the_command(tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola) -> None:
    """`doctor` is `validate --online`: what would change, what was found, and an exit code."""
    openai.key(standins.OPENAI_KEY)
    (tmp_path / "jobs.yaml").write_text(JOB_YAML.format(stack=keboola.url))
    env = program_environment(openai)
    ran = run_program("--json", "doctor", cwd=tmp_path, env=env)
    told = json.loads(ran.stdout)
    assert ran.returncode == 1 and told["changes"] == ["job 'job' is new", f"job 'job' {FIRES}"]
    assert [f["good"] for f in told["online"]] == [False, True, True]
    openai.batch("batch_1")
    ran = run_program("validate", "--online", cwd=tmp_path, env=env)
    assert ran.returncode == 0 and "good  batch batch_1" in ran.stdout
