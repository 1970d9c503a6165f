"""Once, whatever happens: random histories of one job, and what has gone wrong in practice."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import Clock, World, flat_job, make_world
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from standins import Fault
from test_crash import Site, stopped_at, until

import teckochecker as tecko

# --- Random histories -----------------------------------------------------------------------------

JOB = 1
BATCHES = ("batch_1", "batch_2", "batch_3")
STATUSES = ("completed", "completed", "completed", "expired", "in_progress")
LAGS = (0.0, 119.0)  # s until the search shows a job; the window is 120 s
AHEAD = (-4000.0, 0.0, 0.0, 4000.0)  # s of one clock before another
AT_REST = 80  # steps, more than any history needs to come to its end

POST, SEARCH, FOLLOW = "POST /jobs", "GET /search/jobs", "GET /jobs/*"
STACK, CHECK = "GET /v2/storage", "GET /v1/batches/*"

LOST_ANSWERS = (  # Keboola has started a job, and we are not told
    Fault.act_then_status(500),
    Fault.act_then_status(503, body="<h1>Bad gateway</h1>"),
    Fault.drop_reply(),
    Fault.act_then_reset(),
    Fault.act_then_garbage(),
    Fault.truncate(),
)
POST_FAULTS = (
    *LOST_ANSWERS,
    Fault.status(500),
    Fault.reset(),
    Fault.garbage(),
    Fault.redirect("http://127.0.0.1:1/"),
    Fault.rate_limited(None),
    Fault.rate_limited(30),
    Fault.status(400),
    Fault.status(401),
)
READ_FAULTS = (
    Fault.status(500),
    Fault.status(404),
    Fault.reset(),
    Fault.garbage(),
    Fault.truncate(),
)
QUEUE_FAULTS = (*READ_FAULTS, Fault.status(401), Fault.rate_limited(5), Fault.json({"jobs": []}))

FAULTS = [(POST, fault) for fault in POST_FAULTS]
FAULTS += [(route, fault) for route in (SEARCH, FOLLOW, STACK) for fault in QUEUE_FAULTS]
FAULTS += [(CHECK, fault) for fault in READ_FAULTS]

# Where a step is killed: the route, whether its request has taken effect by then, and whether it
# still does so afterwards.
KILLS = [
    (POST, True, True),
    (POST, False, True),
    (POST, False, False),
    (STACK, False, True),
    (SEARCH, True, True),
    (FOLLOW, True, True),
    (CHECK, True, True),
]


def is_reached(gate: standins.Gate) -> bool:
    try:
        gate.reached(0)
    except TimeoutError:
        return False
    return True


class Histories(RuleBasedStateMachine):
    """The life of one job: upstreams fail, the program dies, people interfere, time goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = contextlib.ExitStack()
        self.folder = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.openai = self.closing.enter_context(standins.OpenAI())
        self.keboola = self.closing.enter_context(standins.Keboola())
        self.loop = self.closing.enter_context(asyncio.Runner())
        self.batches: dict[str, standins.Batch] = {}
        self.born: dict[str, float] = {}  # when, by the steady clock, Keboola got a job
        self.begun = False
        self.world: World
        self.open(Clock())

    def open(self, clock: Clock) -> None:
        made = make_world(self.folder, self.openai, self.keboola, {})
        self.world, self.close = self.loop.run(made)
        self.world.clock.now, self.world.clock.passed = clock.now, clock.passed

    @initialize(
        trigger_when=st.sampled_from(["all_completed", "all_finished"]),
        on_ambiguous=st.sampled_from(["resend", "resend", "hold"]),
        lag=st.sampled_from(LAGS),
        statuses=st.tuples(*[st.sampled_from(STATUSES)] * len(BATCHES)),
        fault=st.sampled_from(LOST_ANSWERS),
        ahead=st.sampled_from(AHEAD),
    )
    def begin(
        self,
        trigger_when: str,
        on_ambiguous: str,
        lag: float,
        statuses: tuple[str, ...],
        fault: Fault,
        ahead: float,
    ) -> None:
        self.keboola.clock_ahead = ahead
        self.wanted = {"trigger_when": trigger_when, "on_ambiguous": on_ambiguous}
        self.lag = lag
        self.keboola.hide_from_search(lambda job: self.now() < self.seen(job) + self.lag)
        for name, status in zip(BATCHES, statuses, strict=True):
            self.batches[name] = self.openai.batch(name, status)
        self.loop.run(self.world.secret("openai", "openai", standins.OPENAI_KEY))
        self.loop.run(self.world.secret("keboola", "keboola", standins.KEBOOLA_TOKEN))
        self.definition({"batch_1"}, "cfg", fault)
        self.begun = True

    def seen(self, job: dict[str, Any]) -> float:
        return self.born.setdefault(job["id"], self.now())

    def now(self) -> float:
        return self.world.clock.steady()

    # What happens

    @rule()
    def step(self) -> None:
        self.went(self.loop.run(self.world.steps.step(JOB)).wait)

    def went(self, wait: float | None) -> None:
        for job in self.keboola.created:
            self.seen(job)
        self.world.clock.turn(wait or 0.0)

    @rule(seconds=st.sampled_from([1, 31, 125, 4000]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.clock.turn(seconds)

    @rule(seconds=st.sampled_from(AHEAD))
    def our_clock_is_set(self, seconds: float) -> None:
        self.world.clock.set_by(seconds)

    @rule(seconds=st.sampled_from([-40.0, 40.0, *AHEAD]))
    def their_clock_drifts_or_is_set(self, seconds: float) -> None:
        self.keboola.clock_ahead += seconds

    @rule(where=st.sampled_from(FAULTS), times=st.integers(1, 3))
    def fault(self, where: tuple[str, Fault], times: int) -> None:
        route, fault = where
        server = self.openai if route == CHECK else self.keboola
        server.fault(route, fault, times)
        self.step()

    @rule()
    def upstreams_mend(self) -> None:
        self.openai.heal()
        self.keboola.heal()
        self.step()

    @rule(name=st.sampled_from(BATCHES), status=st.sampled_from(STATUSES))
    def batch_ends(self, name: str, status: str) -> None:
        if self.batches[name].status == "in_progress":
            self.batches[name].become(status)
            self.step()

    @rule(status=st.sampled_from(["success", "warning", "error", "terminated"]))
    def keboola_jobs_end(self, status: str) -> None:
        self.keboola.end_with = status
        self.step()

    @rule(command=st.sampled_from(["retry_job", "pause_job", "resume_job"]))
    def person(self, command: str) -> None:
        with contextlib.suppress(tecko.Conflict):
            self.loop.run(getattr(self.world.store, command)(JOB, self.world.clock()))

    @rule(
        ids=st.sets(st.sampled_from(BATCHES), min_size=1),
        configuration=st.sampled_from(["cfg", "other"]),
        fault=st.sampled_from(POST_FAULTS),
    )
    def definition(self, ids: set[str], configuration: str, fault: Fault) -> None:
        """Changed, or back in the file; the next POST will go wrong."""
        self.ids = ids
        flat = flat_job(batch_ids=sorted(ids), keboola_stack_url=self.keboola.url)
        flat["keboola_configuration_id"] = configuration
        self.keboola.fault(POST, fault)
        self.sync(tecko.FlatJob.model_validate(flat | self.wanted).to_spec())

    @rule()
    def leaves_the_file(self) -> None:
        self.sync()

    def sync(self, *jobs: tecko.JobSpec) -> None:
        self.loop.run(self.world.store.sync_file_jobs(jobs, self.world.clock()))

    @rule()
    def dies(self) -> None:
        self.loop.run(self.close())
        self.open(self.world.clock)

    @rule(kill=st.sampled_from(KILLS))
    def dies_in_flight(self, kill: tuple[str, bool, bool]) -> None:
        route, acted, acts = kill
        server = self.openai if route == CHECK else self.keboola
        server.heal(route)
        before, gate = len(self.keboola.created), server.gate(route, after_acting=acted)
        if not acts:
            server.fault(route, Fault.hang())
        died = self.loop.run(self.step_until(gate))
        gate.release()
        if died and kill == (POST, False, True):  # now the request of a dead program takes effect
            until(lambda: len(self.keboola.created) > before, "a Keboola job")
        server.release_all()
        server.heal(route)
        self.went(None)
        self.dies()

    async def step_until(self, gate: standins.Gate) -> bool:
        """Step, and break it off where it stands when its request reaches the gate."""
        task = asyncio.create_task(self.world.steps.step(JOB))
        done: set[asyncio.Task[tecko.StepResult]] = set()
        while not done and not is_reached(gate):
            done, _ = await asyncio.wait([task], timeout=0.002)
        broken = task.cancel()
        await asyncio.wait([task])
        if not broken:
            task.result()  # raises what the step raised
        return broken

    # What holds

    @invariant()
    def at_most_once(self) -> None:
        known = {trigger.id for trigger in self.triggers()}
        variables = [self.keboola.variables(job) for job in self.keboola.created]
        got = Counter(values["teckochecker_trigger_id"] for values in variables)
        assert not got or max(got.values()) == 1
        assert got.keys() <= known  # on disk before it was on the wire

    def triggers(self) -> list[tecko.Trigger]:
        return self.loop.run(self.world.store.triggers(JOB))

    def teardown(self) -> None:
        try:
            if self.begun:
                self.openai.heal()
                self.keboola.heal()
                for batch in self.batches.values():
                    if batch.status == "in_progress":
                        batch.become("completed")
                self.comes_to_rest()
                self.at_most_once()
                self.nothing_is_lost()
        finally:
            self.loop.run(self.close())
            self.closing.close()

    def comes_to_rest(self) -> None:
        """Upstreams are well; what is held is retried, until nothing is left to do."""
        for _ in range(AT_REST):
            stepped = self.loop.run(self.world.steps.step(JOB))
            self.went(stepped.wait)
            if stepped.wait is None and not self.retried():
                return
        raise AssertionError(f"never at rest: {stepped}")

    def retried(self) -> bool:
        """Whether the trigger of this round was held, and a person could have it sent again."""
        held = [t.round for t in self.triggers() if t.state == "held"]
        if self.job().round in held:
            self.person("retry_job")
        return self.job().status == "triggering"

    def job(self) -> tecko.Job:
        return self.loop.run(self.world.get(JOB))

    def nothing_is_lost(self) -> None:
        job, triggers = self.job(), self.triggers()
        rounds = {trigger.round: trigger for trigger in triggers}
        assert len(rounds) == len(triggers)
        for trigger in triggers:
            made = [made["id"] for made in self.keboola.jobs_of(trigger.id)]
            if trigger.state in ("succeeded", "failed"):
                assert made == [trigger.keboola_job_id]
            else:
                assert trigger.state in ("rejected", "held")
                assert made == []
        self.job_is_right(job, rounds.get(job.round))

    def job_is_right(self, job: tecko.Job, trigger: tecko.Trigger | None) -> None:
        """A job at rest: what it says is what its batches and its Keboola job say."""
        ends = {self.batches[name].status for name in self.ids}
        fine = ends == {"completed"}
        if job.status in ("completed", "completed_with_failures"):
            assert trigger is not None and trigger.state == "succeeded"
            assert trigger.keboola_status in ("success", "warning")
            assert (job.status == "completed") == fine
            assert fine or self.wanted["trigger_when"] == "all_finished"
        elif job.status == "failed":
            bad_batch = not fine and self.wanted["trigger_when"] == "all_completed"
            assert job.last_error
            again = "have started this Keboola job before" in job.last_error
            refused = trigger is not None and trigger.state in ("rejected", "failed", "held")
            assert bad_batch or again if trigger is None else refused
        else:
            assert job.status == "paused" or (job.status == "active" and job.removed_at)
            assert trigger is None


def test_random_histories() -> None:
    """Never two effects of a trigger, never a lost one, never a job that is done without being."""
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


# --- What has gone wrong elsewhere ----------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [None, Fault.act_then_status(500), Fault.drop_reply(), Fault.truncate(), Fault.status(401)],
    ids=["well", "500", "dropped", "truncated", "401"],
)
async def test_batches_that_are_done_already_send_one_post(
    world: World, tmp_path: Path, fault: Fault | None
) -> None:
    """Done before the job starts, and before the program restarts: one POST in a hundred steps."""
    world.openai.batch("batch_1", "completed")
    if fault:
        world.keboola.fault(POST, fault, None)
    job_id = await world.job()
    await step_often(world, job_id)
    restarted, close = await make_world(tmp_path, world.openai, world.keboola, {})
    await step_often(restarted, job_id)
    await close()
    refused = fault == Fault.status(401)
    assert world.keboola.count(POST) == len(await world.store.triggers(job_id)) == 1
    assert len(world.keboola.created) == (0 if refused else 1)
    assert (await world.get(job_id)).status == ("failed" if refused else "completed")


async def step_often(world: World, job_id: int) -> None:
    """Fifty steps without a pause, and without the clock going on."""
    for _ in range(50):
        await world.steps.step(job_id)


def locked_before_the_claim(site: Site) -> None:
    """Decided, and `sending` cannot be written down: nothing is sent before it is."""
    gate = site.keboola.gate(STACK, after_acting=True)
    with site.program() as program:
        stopped_at(gate)
        with site.locked():
            gate.release()
            until(lambda: "is locked by another process" in program.text(), "a word about the lock")
            assert site.posts() == []
        assert until(site.ended, "the job's end") == "completed"


def locked_after_the_post(site: Site) -> None:
    """Sent and answered, and for more than 15 s the answer cannot be written down (each try waits
    5 s for the lock): the program keeps it."""
    gate = site.keboola.gate(POST, after_acting=True)
    with site.program() as program:
        stopped_at(gate)
        with site.locked():
            gate.release()
            said = "cannot write down 'accept'"
            until(lambda: program.text().count(said) >= 3, "three words about the lock")
        assert until(site.ended, "the job's end") == "completed"
    assert site.searches() == 0  # the same process knew what Keboola had answered


Story = Callable[[Site], None]
LOCKED: tuple[Story, ...] = (locked_before_the_claim, locked_after_the_post)


@pytest.fixture(scope="module", autouse=True)
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Story, Future[None]]]:
    """Waiting for a lock takes long and computes nothing, so it goes on beside the other tests."""
    folder = tmp_path_factory.mktemp("locked")

    def run(story: Story) -> None:
        with Site(folder / story.__name__) as site:
            story(site)
            [trigger] = site.rows("SELECT id, state, attempts FROM triggers")
            assert (trigger["state"], trigger["attempts"]) == ("succeeded", 1)
            assert len(site.posts()) == len(site.keboola.jobs_of(trigger["id"])) == 1

    with ThreadPoolExecutor() as pool:
        yield {story: pool.submit(run, story) for story in LOCKED}


@pytest.mark.parametrize("story", LOCKED, ids=lambda story: story.__name__)
def test_a_store_locked_in_mid_trigger(locked: dict[Story, Future[None]], story: Story) -> None:
    """Locked by another process for longer than SQLite waits: one POST, and the job completes."""
    locked[story].result()
