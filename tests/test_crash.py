"""The crash matrix: the real program, killed with -9 wherever a trigger can stand, and restarted.

Every point is reached from outside: a gate holds a request at a stand-in, or this process holds
SQLite's write lock. A case costs a second of computing and many of waiting, so all that were
selected run at once in threads, and each test looks at how its own ended.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import pytest
import standins
from conftest import JOB_YAML, RunningProgram, program_environment, run_program
from standins import Fault

SETTLE = 4  # s: a program that settles a trigger searches once a second, five times in all
PATIENCE = 40  # s for any one thing to happen; most take less than three
AT_ONCE = 12  # cases: most of the time they wait

T = TypeVar("T")


def until(condition: Callable[[], T], what: str) -> T:
    """Wait for something to be true, and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not in {PATIENCE} s")


class Site:
    """A folder with a jobs.yaml, the two upstreams, and the program that is run and killed there.

    The batch is done from the beginning. Keboola's search does not show a job in the first `lag`
    searches that could: a second lies between two of them.
    """

    def __init__(self, folder: Path, lag: int = 0, target: str = "") -> None:
        self.folder, self.lag, self.target = folder, lag, target
        self.openai, self.keboola = standins.OpenAI(), standins.Keboola()
        self.after_restart: Callable[[], object] = lambda: None
        self.asked_first: dict[str, int] = {}  # the number of the first search for a job
        self.programs: list[RunningProgram] = []

    def __enter__(self) -> Self:
        self.openai.start()
        self.keboola.start()
        self.openai.batch("batch_1", "completed")
        self.keboola.hide_from_search(self._lags)
        self.folder.mkdir()
        text = JOB_YAML.format(stack=self.keboola.url)
        text = text.replace("configuration_id: cfg", f"configuration_id: cfg{self.target}")
        (self.folder / "jobs.yaml").write_text(text)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note("\n--- next program ---\n".join(p.text() for p in self.programs))
        self.openai.stop()
        self.keboola.stop()

    @property
    def environment(self) -> dict[str, str]:
        return program_environment(self.openai, TRIGGER_SETTLE_SECONDS=str(SETTLE))

    def program(self) -> RunningProgram:
        """A process to start; whatever it has said is shown when the case fails."""
        self.programs.append(RunningProgram(self.folder, self.environment))
        return self.programs[-1]

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """What stands in the SQLite file, read without writing to it; [] before there is one."""
        if not (self.folder / "teckochecker.db").exists():
            return []
        uri = f"file:{self.folder / 'teckochecker.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            db.row_factory = sqlite3.Row
            return [{**row} for row in db.execute(sql)]

    def states(self) -> list[str]:
        return [row["state"] for row in self.rows("SELECT state FROM triggers")]

    def ended(self) -> str | None:
        """What the job ended as, once it has."""
        [row] = self.rows("SELECT status, completed_at FROM polling_jobs")
        return row["status"] if row["completed_at"] else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else can write to the store meanwhile."""
        db = sqlite3.connect(self.folder / "teckochecker.db", isolation_level=None)
        with contextlib.closing(db):
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("ROLLBACK")

    def posts(self) -> list[bytes]:
        """The bodies of every POST /jobs, whether or not it took effect."""
        requests = [*self.keboola.requests]
        return [r.body for r in requests if (r.method, r.path) == ("POST", "/jobs")]

    def searches(self) -> int:
        return self.keboola.count("GET /search/jobs")

    def _lags(self, job: Mapping[str, Any]) -> bool:
        searches = self.searches()
        return searches < self.asked_first.setdefault(job["id"], searches) + self.lag


def stopped_at(gate: standins.Gate) -> None:
    """Wait until the program's request stands at the gate."""
    gate.reached(PATIENCE)


# --- Where the program is killed, in the order of a trigger's life --------------------------------


def killed_before_it_is_written(site: Site, answered: standins.Gate, said: str) -> None:
    """An upstream has answered, and the answer could not be written down, as the log says."""
    with site.program() as program:
        stopped_at(answered)
        with site.locked():
            answered.release()
            until(lambda: said in program.text(), "a word about the lock")
            program.kill()


def before_the_outbox_commit(site: Site) -> None:
    """OpenAI has said that the batch is done, and that could not be written down."""
    answered = site.openai.gate("GET /v1/batches/*", after_acting=True)
    killed_before_it_is_written(site, answered, "is locked by another process")
    assert site.states() == []


def killed_at(site: Site, gate: standins.Gate) -> None:
    with site.program() as program:
        stopped_at(gate)
        program.kill()


def after_the_outbox_commit(site: Site) -> None:
    """The trigger is decided on, and Keboola's service index is being asked for the queue."""
    killed_at(site, site.keboola.gate("GET /v2/storage", after_acting=False))
    assert site.states() == ["pending"]


def sent_and_lost(site: Site) -> None:
    """The POST was on its way and never takes effect."""
    site.keboola.fault("POST /jobs", Fault.hang())
    with site.program() as program:
        until(site.posts, "a POST")
        program.kill()
    assert (site.states(), len(site.keboola.created)) == (["sending"], 0)


def sent_and_late(site: Site) -> None:
    """The POST was on its way and takes effect when the next program has searched for it once."""
    gate = site.keboola.gate("POST /jobs", after_acting=False)
    killed_at(site, gate)
    assert (site.states(), len(site.keboola.created)) == (["sending"], 0)

    def arrives() -> None:
        until(site.searches, "a search")
        gate.release()

    site.after_restart = arrives


def taken_but_not_answered(site: Site) -> None:
    """The POST took effect, and its answer has not come."""
    gate = site.keboola.gate("POST /jobs", after_acting=True)
    killed_at(site, gate)
    assert (site.states()[-1:], len(site.keboola.created)) == (["sending"], 1)


def answered_but_not_recorded(site: Site) -> None:
    """The POST was answered, and that could not be written down."""
    answered = site.keboola.gate("POST /jobs", after_acting=True)
    killed_before_it_is_written(site, answered, "cannot write down 'accept'")
    assert (site.states(), len(site.keboola.created)) == (["sending"], 1)


def followed(site: Site) -> None:
    """The Keboola job is known and being asked for."""
    killed_at(site, site.keboola.gate("GET /jobs/*", after_acting=True))
    assert site.states() == ["running"]


def settling(site: Site) -> None:
    """The answer was lost, and the first search did not show the trigger."""
    site.keboola.fault("POST /jobs", Fault.drop_reply() if site.lag else Fault.reset())
    with site.program() as program:
        until(lambda: site.rows("SELECT 1 FROM triggers WHERE searches = 1"), "a search")
        program.kill()
    assert (site.states(), len(site.keboola.created)) == (["unknown"], 1 if site.lag else 0)


def twice_while_settling(site: Site) -> None:
    """Killed before the answer, and once more in the first search after the restart."""
    taken_but_not_answered(site)
    killed_at(site, site.keboola.gate("GET /search/jobs", after_acting=True))
    assert site.states() == ["unknown"]


def twice_while_sending(site: Site) -> None:
    """Killed before the POST took effect, and once more after the second POST did."""
    sent_and_lost(site)
    taken_but_not_answered(site)


class Case(NamedTuple):
    """How the program is killed, and what the whole story amounts to at Keboola."""

    killed: Callable[[Site], None]
    lag: int  # searches, a second apart, that do not show the job yet
    posts: int  # in all
    searched: bool  # whether Keboola's search had to be asked


CASES = [
    Case(before_the_outbox_commit, 2, posts=1, searched=False),
    Case(after_the_outbox_commit, 2, posts=1, searched=False),
    Case(sent_and_lost, 0, posts=2, searched=True),
    Case(sent_and_lost, 2, posts=2, searched=True),
    Case(sent_and_late, 0, posts=1, searched=True),
    Case(sent_and_late, 1, posts=1, searched=True),
    Case(taken_but_not_answered, 0, posts=1, searched=True),
    Case(taken_but_not_answered, 2, posts=1, searched=True),
    Case(answered_but_not_recorded, 0, posts=1, searched=True),
    Case(answered_but_not_recorded, 2, posts=1, searched=True),
    Case(followed, 2, posts=1, searched=False),
    Case(settling, 0, posts=2, searched=True),  # nothing to be shown: the POST was reset
    Case(settling, 2, posts=1, searched=True),
    Case(twice_while_settling, 0, posts=1, searched=True),
    Case(twice_while_settling, 2, posts=1, searched=True),
    Case(twice_while_sending, 0, posts=2, searched=True),
    Case(twice_while_sending, 2, posts=2, searched=True),
]
IDS = [f"{case.killed.__name__}-lag{case.lag}" for case in CASES]


def comes_to_its_end(site: Site, case: Case) -> None:
    """Kill, restart, and look at what has become of the trigger in the file and at Keboola."""
    case.killed(site)
    with site.program():
        site.after_restart()
        assert until(site.ended, "the job's end") == "completed"
    [trigger] = site.rows("SELECT id, round, state, attempts, keboola_job_id FROM triggers")
    [job] = site.keboola.jobs_of(trigger["id"])
    assert [job] == site.keboola.created
    assert trigger == {
        "id": trigger["id"],
        "round": 1,
        "state": "succeeded",
        "attempts": case.posts,
        "keboola_job_id": job["id"],
    }
    assert len(site.posts()) == case.posts
    assert len(set(site.posts())) == 1  # sent again as it was frozen
    assert (site.searches() > case.lag) == case.searched


# --- When the search never shows it ---------------------------------------------------------------


def hidden_and_resent(site: Site) -> None:
    """The documented limit, pinned: two jobs with one trigger id, and the second is followed."""
    taken_but_not_answered(site)
    with site.program():
        assert until(site.ended, "the job's end") == "completed"
    [trigger] = site.rows("SELECT id, keboola_job_id FROM triggers")
    first, second = site.keboola.jobs_of(trigger["id"])
    assert site.keboola.created == [first, second]
    assert trigger["keboola_job_id"] == second["id"]
    assert site.searches() >= 3  # so often was it asked before


def hidden_and_held(site: Site) -> None:
    """Nothing is sent again, a person decides, and `job retry` asks the search before it sends."""
    taken_but_not_answered(site)
    with site.program():
        assert until(site.ended, "the job's end") == "failed"
        assert site.states() == ["held"]
        site.keboola.hide_from_search(False)
        done = run_program("job", "retry", "job", cwd=site.folder, env=site.environment)
        assert done.returncode == 0, done.stderr
        assert until(lambda: site.ended() == "completed", "the job's end after its retry")
    assert len(site.posts()) == len(site.keboola.created) == 1
    assert site.states() == ["succeeded"]


# --- All at once, and a test for each -------------------------------------------------------------

Story = Callable[[Site], None]
HIDDEN: Mapping[Story, str] = {hidden_and_resent: "", hidden_and_held: ", on_ambiguous: hold"}


def run_case(folder: Path, case: Case) -> None:
    with Site(folder, case.lag) as site:
        comes_to_its_end(site, case)


def run_hidden(folder: Path, story: Story) -> None:
    with Site(folder, target=HIDDEN[story]) as site:
        site.keboola.hide_from_search()
        story(site)


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[object, Future[None]]]:
    """Every case whose test was selected, started; the result raises what went wrong in it."""
    chosen = {
        value
        for item in request.session.items
        if hasattr(item, "callspec") and item.path == request.path
        for value in item.callspec.params.values()
    }
    folder = tmp_path_factory.mktemp("crash")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[object, Future[None]] = {}
        for number, case in enumerate(CASES):
            if case in chosen:
                futures[case] = pool.submit(run_case, folder / f"case{number}", case)
        for story in HIDDEN:
            if story in chosen:
                futures[story] = pool.submit(run_hidden, folder / story.__name__, story)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_killed_and_restarted_triggers_once(ran: Mapping[object, Future[None]], case: Case) -> None:
    """Killed anywhere, once or twice: one trigger, one Keboola job, and the job completes."""
    ran[case].result()


@pytest.mark.parametrize("story", HIDDEN, ids=lambda story: story.__name__)
def test_a_search_that_never_shows_the_job(
    ran: Mapping[object, Future[None]], story: Story
) -> None:
    """What the search never shows is sent once more with the same id, or held for a person."""
    ran[story].result()
