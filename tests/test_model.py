"""Decisions: the tables of states, and the pure functions that say what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any, get_args

import hypothesis
import pytest
from conftest import flat_job
from hypothesis import given
from hypothesis import strategies as st

import teckochecker as tecko

NOW = 1_760_000_000.0
unhurried = hypothesis.settings(deadline=None, max_examples=60)  # other work shares the machine
HOUR = 3600.0

JOB_TABLE = """
    active pause paused
    active fire triggering
    active give_up failed
    active new_round active
    paused resume active
    paused new_round paused
    triggering accept triggered
    triggering reject failed
    triggering hold failed
    triggering new_round active
    triggered succeed completed
    triggered succeed_partly completed_with_failures
    triggered fail failed
    triggered new_round active
    completed new_round active
    completed_with_failures new_round active
    failed retry active
    failed resettle triggering
    failed new_round active
"""
TRIGGER_TABLE = """
    pending claim sending
    pending reject rejected
    sending accept running
    sending postpone pending
    sending reject rejected
    sending lose unknown
    unknown accept running
    unknown resend pending
    unknown hold held
    held resettle unknown
    running succeed succeeded
    running fail failed
"""
TERMINAL = {"succeeded", "failed", "rejected"}
EVENTS: Sequence[tecko.Event] = get_args(tecko.Event)
FINISHED = ["completed", "failed", "expired", "cancelled"]
GOING_ON = ["", "validating", "in_progress", "finalizing", "cancelling", "pondering"]


def table(text: str) -> dict[tuple[str, str], str]:
    """The lines `state event next-state` as a mapping."""
    rows = (line.split() for line in text.strip().splitlines())
    return {(state, event): end for state, event, end in rows}


def batch(status: str, batch_id: str = "batch_1", **known: Any) -> tecko.Batch:
    """A batch as the store knows it; of its ten requests all succeeded unless told."""
    counts = {"requests_total": 10, "requests_completed": 10, "output_file_id": "file-out"}
    return tecko.Batch(**{"batch_id": batch_id, "status": status, **counts, **known})


def without_data(status: str = "completed", **known: Any) -> tecko.Batch:
    """A batch of which not one request succeeded."""
    nothing = {"requests_completed": 0, "requests_failed": 10, "output_file_id": None}
    return batch(status, **{**nothing, **known})


def watch(trigger_when: str = "all_completed") -> tecko.OpenAIBatches:
    given = {"secret": "openai", "batch_ids": ["batch_1"], "trigger_when": trigger_when}
    return tecko.OpenAIBatches.model_validate(given)


def trigger(state: tecko.TriggerState = "pending", **known: Any) -> tecko.Trigger:
    target = {"stack_url": "https://connection.keboola.com", "secret": "keboola", "body": "{}"}
    fixed = {"id": "t1", "job_id": 1, "round": 1, "partial": False, "on_ambiguous": "resend"}
    given: dict[str, Any] = {**target, **fixed, "state": state, "created_at": NOW, **known}
    return tecko.Trigger(**given)


def spec(name: str = "nightly", variables: Mapping[str, str] = {}) -> tecko.JobSpec:
    flat = flat_job(name=name, batch_ids=["batch_1"], variables=dict(variables))
    flat |= {"keboola_component_id": "kds-team.app-custom-python"}
    flat |= {"keboola_configuration_id": "123456"}
    return tecko.FlatJob.model_validate(flat).to_spec()


def settings(**changed: Any) -> tecko.Settings:
    return tecko.Settings(database=Path("teckochecker.db"), **changed)


def refusal(status: int | None, **facts: Any) -> tecko.KeboolaError:
    return tecko.KeboolaError("Keboola said no", status=status, **facts)


# ── The tables of states ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(tecko.JOB_STEPS, JOB_TABLE), (tecko.TRIGGER_STEPS, TRIGGER_TABLE)],
    ids=["job", "trigger"],
)
def test_every_cell_leads_where_the_table_says_or_is_refused(
    steps: dict[str, dict[tecko.Event, str]], expected: str
) -> None:
    """Of all pairs of a state and an event, the listed ones lead on and the others raise."""
    found = {}
    for state in steps:
        for event in EVENTS:
            with suppress(tecko.Conflict):
                found[state, event] = tecko.next_state(steps, state, event)
    assert found == table(expected)


@pytest.mark.parametrize(
    ("steps", "states", "start"),
    [
        (tecko.JOB_STEPS, tecko.JobStatus, "active"),
        (tecko.TRIGGER_STEPS, tecko.TriggerState, "pending"),
    ],
    ids=["job", "trigger"],
)
def test_every_state_has_a_row_and_can_be_reached(
    steps: dict[str, dict[tecko.Event, str]], states: Any, start: str
) -> None:
    """The table is complete, and no state in it is dead."""
    assert set(steps) == set(get_args(states))
    reached, edge = set(), {start}
    while edge:
        reached |= edge
        edge = {end for state in edge for end in steps[state].values()} - reached
    assert reached == set(steps)


def test_a_trigger_that_has_ended_takes_no_step() -> None:
    """Terminal states are empty rows, and no others are: an ended trigger cannot be sent again."""
    assert {state for state, row in tecko.TRIGGER_STEPS.items() if not row} == TERMINAL


@pytest.mark.parametrize("state", tecko.TRIGGER_STEPS)
def test_a_refused_step_changes_nothing(state: tecko.TriggerState) -> None:
    """`moved` raises Conflict for each unlisted event and leaves the trigger as it was."""
    before, same = trigger(state, sent_at=NOW), trigger(state, sent_at=NOW)
    for event in set(EVENTS) - tecko.TRIGGER_STEPS[state].keys():
        with pytest.raises(tecko.Conflict, match=f"^there is no step '{event}' from '{state}'$"):
            tecko.trigger_after(before, event, NOW + 1, keboola_job_id="9")
    assert before == same


def test_the_times_of_a_trigger_that_was_lost_and_sent_again() -> None:
    """A second POST counts, the first one's time stays, and a new window begins with no search."""
    first = tecko.trigger_after(trigger(), "claim", NOW)
    lost = tecko.trigger_after(first, "lose", NOW + 15)
    assert (first.attempts, first.sent_at) == (1, NOW)
    assert (lost.unknown_at, lost.searches, lost.sent_at) == (NOW + 15, 0, NOW)
    again = tecko.trigger_after(
        tecko.trigger_after(lost, "resend", NOW + 135, searches=4), "claim", NOW + 136
    )
    assert (again.attempts, again.sent_at) == (2, NOW)
    assert tecko.trigger_after(again, "lose", NOW + 150).searches == 0
    found = tecko.trigger_after(
        lost, "accept", NOW + 30, keboola_job_id="9", keboola_status="created"
    )
    assert (found.state, found.keboola_job_id, found.finished_at) == ("running", "9", None)


def test_a_postponed_trigger_counts_as_sent_only_if_it_may_have_arrived_before() -> None:
    """A POST that surely did not arrive leaves no time; after a lost one the time stays."""
    fresh = tecko.trigger_after(tecko.trigger_after(trigger(), "claim", NOW), "postpone", NOW + 1)
    assert (fresh.state, fresh.sent_at, fresh.attempts) == ("pending", None, 1)
    resent = trigger("sending", sent_at=NOW, unknown_at=NOW + 1)
    assert tecko.trigger_after(resent, "postpone", NOW + 200).sent_at == NOW


def test_a_held_trigger_that_is_retried_is_searched_for_afresh() -> None:
    """`job retry` opens a new window: old searches prove nothing about now."""
    held = trigger("held", unknown_at=NOW, searches=5, sent_at=NOW)
    after = tecko.trigger_after(held, "resettle", NOW + HOUR, on_ambiguous="resend")
    assert (after.state, after.unknown_at, after.searches) == ("unknown", NOW + HOUR, 0)


@unhurried
@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_what_holds_for_every_history_of_a_trigger(events: list[tecko.Event]) -> None:
    """Attempts are the claims, an end has a time and nothing follows it, what may have arrived
    is remembered."""
    now, claims, lost, state = NOW, 0, False, trigger()
    for event in events:
        now += 1
        if event not in tecko.TRIGGER_STEPS[state.state]:
            continue
        assert state.finished_at is None
        state = tecko.trigger_after(state, event, now)
        claims, lost = claims + (event == "claim"), lost or event == "lose"
        assert state.attempts == claims
        assert (state.finished_at == now) == (state.state in TERMINAL)
        assert (state.unknown_at is not None) == lost
        assert (state.sent_at is not None) >= (lost or state.state in ("sending", "running"))


# ── What a batch amounts to ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seen", "end"),
    [
        (batch("completed"), "completed"),
        (batch("completed", requests_completed=1, requests_failed=9), "completed"),
        (without_data(), "failed"),
        (without_data(output_file_id="file-empty"), "failed"),
        (without_data(requests_total=0, requests_failed=0), "failed"),
        (batch("completed", requests_total=0, requests_completed=0), "completed"),
        (batch("failed"), "failed"),
        (batch("expired"), "failed"),
        (batch("cancelled"), "failed"),
        (without_data("expired"), "failed"),
        *((batch(status), None) for status in GOING_ON),
        (batch("COMPLETED"), None),
    ],
)
def test_what_a_batch_amounts_to(seen: tecko.Batch, end: str | None) -> None:
    """Status, counts and files together: only `completed` with a success counts as completed."""
    assert tecko.outcome(seen) == end


@pytest.mark.parametrize(
    ("seen", "has"),
    [
        (batch("expired", requests_completed=1), True),
        (without_data("expired", output_file_id="file-empty"), False),
        (batch("cancelled", requests_total=0, requests_completed=0), True),
        (without_data("cancelled", requests_total=0), False),
    ],
)
def test_whether_any_request_succeeded(seen: tecko.Batch, has: bool) -> None:
    """The counts say so; where there are none, the output file does."""
    assert tecko.has_data(seen) is has


@pytest.mark.parametrize(
    ("raw", "end"),
    [
        ({"output_file_id": None}, "failed"),
        ({"output_file_id": ""}, "failed"),
        ({"output_file_id": "file-1"}, "completed"),
        ({"output_file_id": "", "request_counts": {"total": 3, "completed": 0}}, "failed"),
        ({"output_file_id": "file-1", "request_counts": {"total": 3, "completed": 2}}, "completed"),
    ],
)
def test_an_answer_with_a_null_or_empty_output_file(raw: dict[str, Any], end: str) -> None:
    """`completed` promises no success: without counts and without a file there is none."""
    seen = tecko.parse_batch("batch_1", {"id": "batch_1", "status": "completed", **raw})
    assert tecko.outcome(seen) == end


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (batch("completed"), "batch_1 completed: 10 of 10 requests succeeded"),
        (without_data(), "batch_1 completed without data: not one request succeeded"),
        (batch("expired", requests_completed=4), "batch_1 expired: 4 of 10 requests succeeded"),
        (without_data("cancelled"), "batch_1 cancelled: 0 of 10 requests succeeded"),
        (batch("failed", error="line 3 is not JSON"), "batch_1 failed: line 3 is not JSON"),
    ],
)
def test_a_finished_batch_in_a_few_words(seen: tecko.Batch, said: str) -> None:
    """What a log line and `last_error` say of it."""
    assert tecko.describe_end(seen) == said


# ── What is known of a batch ──────────────────────────────────────────────────────────────────


def seen_of(known: tecko.Batch, **news: Any) -> tecko.BatchSeen:
    """An answer about `known`, the same as before but for `news`."""
    names = tecko.BatchSeen.__dataclass_fields__
    return tecko.BatchSeen(**{name: getattr(known, name) for name in names} | news)


@pytest.mark.parametrize(
    "news",
    [
        {"status": "finalizing"},
        {"requests_completed": 4},
        {"requests_failed": 1},
        {"requests_total": 11},
        {"output_file_id": "file-late"},
        {"error_file_id": "file-err"},
        {"error": "bad line"},
    ],
    ids=lambda news: next(iter(news)),
)
def test_an_answer_with_news_is_progress(news: dict[str, Any]) -> None:
    """Whatever has changed is taken over, and the time of the last progress moves."""
    known = batch("in_progress", requests_completed=3, changed_at=NOW)
    after = tecko.batch_after_answer(known, seen_of(known, **news), NOW + 60)
    assert after == replace(known, **news, changed_at=NOW + 60)


def test_an_answer_without_news_is_no_progress() -> None:
    """The time of the last progress stays, and earlier denials are forgotten."""
    known = batch("in_progress", changed_at=NOW, missing_since=NOW, missing_checks=2)
    after = tecko.batch_after_answer(known, seen_of(known), NOW + 60)
    assert after == batch("in_progress", changed_at=NOW)


@pytest.mark.parametrize(
    ("checks", "lost"),
    [
        ([0.0], False),
        ([0.0, 600.0], False),
        ([0.0, 30.0, 60.0], False),
        ([0.0, 300.0, 599.0], False),
        ([0.0, 300.0, 600.0], True),
        ([0.0, 600.0, 601.0], True),
        ([float(30 * n) for n in range(20)], False),
        ([float(30 * n) for n in range(21)], True),
    ],
)
def test_a_denied_batch_is_lost_after_three_checks_over_ten_minutes(
    checks: list[float], lost: bool
) -> None:
    """Neither many denials in a moment nor two far apart are believed."""
    known = batch("")
    for at in checks:
        known = tecko.batch_after_404(known, NOW + at)
    assert tecko.is_lost(known, NOW + checks[-1]) is lost
    assert (known.missing_since, known.missing_checks) == (NOW, len(checks))


def test_a_batch_that_was_found_again_is_denied_from_the_start() -> None:
    """An answer in between takes back what the denials before it proved."""
    known = tecko.batch_after_404(tecko.batch_after_404(batch("validating"), NOW), NOW + 599)
    known = tecko.batch_after_answer(known, seen_of(known), NOW + 600)
    known = tecko.batch_after_404(known, NOW + 660)
    assert (known.missing_since, known.missing_checks) == (NOW + 660, 1)
    assert not tecko.is_lost(known, NOW + 660)
    assert not tecko.is_lost(known, NOW + 9999)


@unhurried
@given(st.floats() | st.integers() | st.sampled_from([1_732_600_000_000, 253_402_300_800, -1e14]))
def test_no_time_raises(at: float) -> None:
    """Whatever number stands for a time becomes a date."""
    assert datetime.fromisoformat(tecko.iso(at)).tzinfo is UTC


@unhurried
@given(st.none() | st.booleans() | st.text() | st.lists(st.integers()) | st.just(10**400))
def test_a_time_that_is_no_number_is_none(at: object) -> None:
    """An upstream may write anything there."""
    seen = tecko.parse_batch("b", {"id": "b", "status": "x", "created_at": at, "expires_at": at})
    assert (seen.created_at, seen.expires_at) == (None, None)


# ── Whether a job fires ───────────────────────────────────────────────────────────────────────

DONE, RUNNING = batch("completed", "batch_1"), batch("in_progress", "batch_2")
EXPIRED = batch("expired", "batch_3", requests_completed=4)
EMPTY = without_data(batch_id="batch_4")
ODD = batch("pondering", "batch_5")
BROKEN = batch("failed", "batch_6", error="bad line")
GOES_ON, FIRES = tecko.Verdict(None), tecko.Verdict("fire")
FIRES_PARTLY = tecko.Verdict("fire", partial=True)
SAYS_EXPIRED = "batch_3 expired: 4 of 10 requests succeeded"
SAYS_EMPTY = "batch_4 completed without data: not one request succeeded"


@pytest.mark.parametrize(
    ("batches", "when_completed", "when_finished"),
    [
        ([DONE], FIRES, FIRES),
        ([DONE, DONE], FIRES, FIRES),
        ([RUNNING], GOES_ON, GOES_ON),
        ([DONE, RUNNING], GOES_ON, GOES_ON),
        ([RUNNING, DONE], GOES_ON, GOES_ON),
        ([DONE, ODD], GOES_ON, GOES_ON),
        ([DONE, batch("", "batch_7")], GOES_ON, GOES_ON),
        ([DONE, EXPIRED], SAYS_EXPIRED, FIRES_PARTLY),
        ([EXPIRED, RUNNING], SAYS_EXPIRED, GOES_ON),
        ([ODD, EXPIRED], SAYS_EXPIRED, GOES_ON),
        ([EMPTY], SAYS_EMPTY, FIRES_PARTLY),
        ([BROKEN], "batch_6 failed: bad line", FIRES_PARTLY),
        ([batch("cancelled")], "batch_1 cancelled: 10 of 10 requests succeeded", FIRES_PARTLY),
        ([EXPIRED, DONE, EMPTY], f"{SAYS_EXPIRED}; {SAYS_EMPTY}", FIRES_PARTLY),
    ],
)
def test_when_a_job_fires(
    batches: list[tecko.Batch], when_completed: tecko.Verdict | str, when_finished: tecko.Verdict
) -> None:
    """Under all_completed one failure fails the job at once; all_finished waits for every end."""
    if isinstance(when_completed, str):
        when_completed = tecko.Verdict("give_up", when_completed)
    assert tecko.decide(watch("all_completed"), batches, NOW) == when_completed
    assert tecko.decide(watch("all_finished"), batches, NOW) == when_finished


@pytest.mark.parametrize("trigger_when", ["all_completed", "all_finished"])
def test_a_lost_batch_fails_the_job(trigger_when: str) -> None:
    """Its reason names the batch and the likeliest cause; before that the job goes on."""
    lost = batch("", "batch_9", missing_since=NOW - 600, missing_checks=3)
    verdict = tecko.decide(watch(trigger_when), [DONE, lost], NOW)
    assert verdict.event == "give_up"
    assert verdict.reason == "OpenAI does not know batch_9 (a key of another project sees 404 too)"
    assert tecko.decide(watch(trigger_when), [DONE, lost], NOW - 1) == GOES_ON


STATUSES = st.sampled_from([*FINISHED, *GOING_ON]) | st.text(max_size=8)
COUNTS = st.integers(0, 50)
FILES = st.none() | st.text("abc-", min_size=1, max_size=6)
BATCH_LISTS = st.lists(
    st.tuples(STATUSES, COUNTS, COUNTS, FILES, FILES), min_size=1, max_size=10
).map(
    lambda rows: [
        tecko.Batch(f"batch_{i}", status, None, None, out, err, good + bad, good, bad)
        for i, (status, good, bad, out, err) in enumerate(rows)
    ]
)


@unhurried
@given(BATCH_LISTS, st.sampled_from(["all_completed", "all_finished"]))
def test_a_job_fires_only_when_every_batch_has_ended(
    batches: list[tecko.Batch], trigger_when: str
) -> None:
    """Whatever the batches: no fire with one under way, and never a clean one with a failure."""
    verdict = tecko.decide(watch(trigger_when), batches, NOW)
    if verdict.event == "fire":
        assert {b.status for b in batches} <= set(FINISHED)
        good = [b.status == "completed" and tecko.has_data(b) for b in batches]
        assert verdict.partial is not all(good)
        assert all(good) or trigger_when == "all_finished"
    if verdict.event != "fire":  # which has one where OpenAI named no output file
        assert bool(verdict.reason) == (verdict.event == "give_up")


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (batch("in_progress", changed_at=NOW - 3 * HOUR + 1), []),
        (batch("in_progress", changed_at=NOW - 3 * HOUR), ["batch_1 has made no progress for 3 h"]),
        (batch("in_progress", changed_at=NOW, expires_at=NOW), []),
        (
            batch("finalizing", changed_at=NOW, expires_at=NOW - 1),
            ["batch_1 is past its expires_at and still finalizing"],
        ),
        (
            batch("pondering", changed_at=NOW, expires_at=NOW + HOUR),
            ["batch_1 has a status we do not know: 'pondering'"],
        ),
        (batch("", changed_at=NOW - 9 * HOUR), []),
        *((batch(s, changed_at=0, expires_at=1), []) for s in FINISHED),
        *((batch(s, changed_at=NOW), []) for s in GOING_ON if s != "pondering"),
    ],
)
def test_what_is_remarked_of_a_batch(seen: tecko.Batch, said: list[str]) -> None:
    """Stalled for three hours, past its expires_at, a new status; nothing of one that is done."""
    assert tecko.remarks([seen], NOW) == said


def test_remarks_name_each_batch() -> None:
    """Two batches with something to say make two remarks, in order."""
    stalled = batch("in_progress", "batch_b", changed_at=NOW - 4 * HOUR)
    assert tecko.remarks([batch("new", "batch_a"), DONE, stalled], NOW) == [
        "batch_a has a status we do not know: 'new'",
        "batch_b has made no progress for 4 h",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45.9, "45 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_799, "47 h"),
        (172_800, "2 d"),
        (10 * 86400, "10 d"),
    ],
)
def test_a_duration_for_people(seconds: float, text: str) -> None:
    """At least two of a unit, else the smaller unit."""
    assert tecko.duration_text(seconds) == text


# ── What Keboola receives ─────────────────────────────────────────────────────────────────────


def values_of(body: dict[str, Any]) -> dict[str, str]:
    """The variables of a body, each name once."""
    rows = body["variableValuesData"]["values"]
    values = {row["name"]: row["value"] for row in rows}
    assert len(values) == len(rows) and all(row.keys() == {"name", "value"} for row in rows)
    return values


def trigger_body(spec: tecko.JobSpec, batches: Sequence[tecko.Batch], trigger_id: str) -> str:
    """What a trigger of such a job sends."""
    told = tecko.outcome_of(batches) | {"teckochecker_trigger_id": trigger_id}
    return str(tecko.target_of(spec, told)["body"])


def test_the_whole_body_of_a_trigger() -> None:
    """What INTERFACE lists, exactly, for one completed, one expired and one empty batch."""
    partial = replace(EXPIRED, output_file_id="file-3", error_file_id="file-4", requests_failed=6)
    batches = [partial, DONE, EMPTY]
    body = json.loads(trigger_body(spec(variables={"region": "eu"}), batches, "t-7"))
    assert {k: body[k] for k in body if k != "variableValuesData"} == {
        "mode": "run",
        "component": "kds-team.app-custom-python",
        "config": "123456",
    }
    assert values_of(body) == {
        "batch_ids_completed": '["batch_1"]',
        "batch_ids_failed": '["batch_3", "batch_4"]',
        "batch_count_total": "3",
        "batch_count_completed": "1",
        "batch_count_failed": "2",
        "output_file_ids": '["file-3", "file-out"]',
        "error_file_ids": '["file-4"]',
        "request_count_total": "30",
        "request_count_completed": "14",
        "request_count_failed": "16",
        "teckochecker_job": "nightly",
        "teckochecker_trigger_id": "t-7",
        "region": "eu",
    }


def test_the_names_that_a_job_may_not_set_are_those_that_keboola_receives() -> None:
    """No variable of a job can stand in the place of one of ours."""
    body = json.loads(trigger_body(spec(), [DONE], "t"))
    assert set(values_of(body)) == tecko.RESERVED_VARIABLES


@unhurried
@given(BATCH_LISTS, st.text(min_size=1, max_size=5).filter(lambda s: s.strip() and s.isalpha()))
def test_every_variable_is_a_text_and_none_is_empty(batches: list[tecko.Batch], name: str) -> None:
    """Whatever the batches: Keboola would refuse an empty value, and the lists parse and add up."""
    values = values_of(json.loads(trigger_body(spec(name, {"own": " "}), batches, "t-1")))
    assert all(isinstance(v, str) and v for v in values.values())
    ids = {end: json.loads(values[f"batch_ids_{end}"]) for end in ("completed", "failed")}
    assert sorted(ids["completed"] + ids["failed"]) == [b.batch_id for b in batches]
    assert all(values[f"batch_count_{end}"] == str(len(ids[end])) for end in ids)
    for kind in ("output", "error"):
        files = [getattr(b, f"{kind}_file_id") for b in batches]
        assert json.loads(values[f"{kind}_file_ids"]) == [f for f in files if f]


# ── What an answer of Keboola means ───────────────────────────────────────────────────────────

UNSURE = (408, 409, 425)  # of those below 500 that are no


def test_what_a_refused_post_means() -> None:
    """429 and what was never sent may go again; a clear no is a no; all else is unknown."""
    known = dict.fromkeys(set(range(400, 500)) - {*UNSURE}, "reject") | {429: "postpone"}
    statuses = [None, *range(100, 600)]
    assert [s for s in statuses if tecko.after_post(refusal(s)) != known.get(s or 0, "lose")] == []
    unsent = [tecko.after_post(refusal(s, sent=False)) for s in statuses]
    assert set(unsent) == {"postpone"}


@pytest.mark.parametrize(
    ("on_ambiguous", "searches", "waited", "event"),
    [
        ("resend", 0, 0, None),
        ("resend", 2, 119.9, None),
        ("resend", 9, 119.9, None),
        ("resend", 0, 120, None),
        ("resend", 1, 9999, None),
        ("resend", 2, 120, "resend"),
        ("resend", 5, 121, "resend"),
        ("hold", 2, 120, "hold"),
        ("hold", 2, 119.9, None),
        ("hold", 1, 9999, None),
    ],
)
def test_when_an_absence_is_believed(
    on_ambiguous: str, searches: int, waited: float, event: str | None
) -> None:
    """At least three successful searches, the last of them at the end of the window or later."""
    lost = trigger("unknown", unknown_at=NOW, searches=searches, on_ambiguous=on_ambiguous)
    assert tecko.after_search(lost, waited, 120.0) == event


@unhurried
@given(st.floats(1, 86400), st.floats(0, 3 * 86400))
def test_the_next_search_comes_soon_and_one_falls_on_the_end(window: float, waited: float) -> None:
    """The wait is never zero, at most a quarter of the window, and never jumps over its end."""
    wait = tecko.settle_wait(waited, window)
    assert 0 < wait <= window / 4
    assert waited >= window or waited + wait <= window + 1e-6


@unhurried
@given(st.integers(1, 86400), st.sampled_from(["resend", "hold"]))
def test_a_whole_settle_window(window: int, on_ambiguous: str) -> None:
    """Searching on, the verdict falls at the window's end, after about five searches."""
    lost, waited, searches = trigger("unknown", on_ambiguous=on_ambiguous), 0.0, 1
    while (event := tecko.after_search(lost, waited, float(window))) is None:
        waited += tecko.settle_wait(waited, float(window))
        lost, searches = replace(lost, searches=searches), searches + 1
        assert searches <= 7
    assert event == on_ambiguous
    assert searches >= 3
    assert waited == pytest.approx(window, abs=1e-3)


# ── Waiting ───────────────────────────────────────────────────────────────────────────────────

ATTEMPTS, LUCK, LONGEST = st.integers(1, 10**6), st.floats(0, 1), st.floats(1, 3600)


def test_backoff_doubles_up_to_its_cap() -> None:
    """1, 2, 4, ... at most 60 s."""
    waits = [tecko.backoff(n, 60.0, 0.0) for n in range(1, 10)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@unhurried
@given(ATTEMPTS, LONGEST, LUCK)
def test_backoff_stays_within_bounds(attempt: int, longest: float, luck: float) -> None:
    """Never above the cap, never below half of what it is without jitter, and never shrinking."""
    plain = tecko.backoff(attempt, longest, 0.0)
    assert plain / 2 <= tecko.backoff(attempt, longest, luck) <= plain <= longest
    assert plain <= tecko.backoff(attempt + 1, longest, 0.0)


def wait_for(error: tecko.TeckoError, row: int = 1, interval: float = 120.0, **set_: Any) -> float:
    return tecko.wait_after_error(error, row, interval, settings(**set_), 0.0)


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [(0.0, 1.0), (7.0, 7.0), (900.0, 900.0), (1e9, 3600.0), (float("inf"), 3600.0)],
)
@pytest.mark.parametrize("status", [429, 503, 401])
def test_retry_after_wins(status: int, retry_after: float, wait: float) -> None:
    """Over back-off, interval and a bad key; at least a second, at most an hour."""
    error = tecko.OpenAIError("slow down", status=status, retry_after=retry_after)
    assert [wait_for(error, row) for row in (1, 50)] == [wait, wait]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_waits_longer_each_time(status: int) -> None:
    """It can be mended, so checks go on, more and more seldom, at last once an hour."""
    error = tecko.OpenAIError("wrong key", status=status)
    waits = [wait_for(error, row) for row in range(1, 8)]
    assert waits == [240, 480, 960, 1920, 3600, 3600, 3600]
    assert wait_for(error, 1, 7200.0) == 7200


@pytest.mark.parametrize("status", [None, 408, 409, 429, 500, 502, 503, 504])
def test_retries_in_a_row_and_then_the_interval(status: int | None) -> None:
    """MAX_RETRIES with back-off, then at the next interval, for ever."""
    error = tecko.OpenAIError("broken", status=status)
    assert [wait_for(error, row) for row in range(1, 7)] == [1, 2, 4, 120, 120, 120]
    assert [wait_for(error, row, max_retries=0) for row in (1, 2)] == [120, 120]
    assert wait_for(error, 30, max_retries=100, retry_delay=5) == 5
    assert wait_for(error, 6, interval=10.0, max_retries=9) == 10


@pytest.mark.parametrize(
    "error",
    [
        tecko.OpenAIError("no such batch", status=404),
        tecko.KeboolaError("a redirect", status=302),
        tecko.SecretError("the environment variable OPENAI_KEY is not set"),
    ],
)
def test_what_no_retry_mends_waits_for_the_interval(error: tecko.TeckoError) -> None:
    """A permanent error is not asked again within seconds."""
    assert [wait_for(error, row) for row in (1, 2, 9)] == [120, 120, 120]


@unhurried
@given(st.none() | st.integers(100, 599), st.integers(1, 10**6), st.integers(1, 86400), LUCK)
def test_a_wait_after_an_error_has_bounds(
    status: int | None, row: int, interval: int, luck: float
) -> None:
    """Whatever the error and however often: at least half a second, at most an hour or the
    interval."""
    error = tecko.OpenAIError("no", status=status)
    wait = tecko.wait_after_error(error, row, float(interval), settings(), luck)
    assert 0.5 <= wait <= max(3600.0, interval)
    assert wait <= interval or status in (401, 403)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("2 minutes", None),
        ("32 Foo 2026 99:99:99", None),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("-5", 0.0),
        ("nan", 0.0),
        ("9" * 400, float("inf")),
        (format_datetime(datetime.fromtimestamp(NOW + 90, UTC), usegmt=True), 90.0),
        (format_datetime(datetime.fromtimestamp(NOW - 90, UTC), usegmt=True), 0.0),
    ],
)
def test_retry_after_in_all_its_forms(header: str | None, seconds: float | None) -> None:
    """Seconds, a date, one that has passed, and what is neither."""
    assert tecko.parse_retry_after(header, NOW) == seconds


DATE_PARTS = st.lists(
    st.sampled_from("Wed, 21 Oct 2015 99999 0001 07:28:00 GMT -0000 +99999 1e999 nan - : ,".split())
).map(" ".join)


@unhurried
@given(st.text() | DATE_PARTS, LUCK)
def test_no_retry_after_header_hurts(header: str, luck: float) -> None:
    """Whatever the other side writes there, the wait that follows is between a second and an
    hour."""
    parsed = tecko.parse_retry_after(header, NOW)
    assert parsed is None or parsed >= 0
    wait = wait_for(tecko.OpenAIError("slow down", status=429, retry_after=parsed))
    assert 1 <= wait <= 3600
