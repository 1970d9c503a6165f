"""The rules of ingests: where a line and a source end, what a date is, what is still provisional,
and that one bad part stops nothing. The corpus holds small awkward files, and what is right."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import itertools
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from datetime import date
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import PROGRAM, World
from hypothesis import example, given, settings
from hypothesis import strategies as st
from standins import Answer, Fault, Source
from test_api_source import Api, ids, until
from test_csv import HOUR, again, counts, places, put, rejects, titles
from test_ingest_crash import opened

import teckochecker as tecko

Given = pytest.mark.parametrize
CORPUS = Path(__file__).parent / "corpus"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CORPUS / "expected.json").read_text())


async def csv_job(world: World, path: str = "data.csv", **block: Any) -> int:
    """A job over files that came to rest."""
    world.clock.turn(HOUR)
    return await world.ingest(**{"type": "csv", "path": path} | block)


async def api_run(world: World, shows: Callable[[dict[str, str]], object], **block: Any) -> Any:
    """One run of a fresh job over an API that answers so; its end, and what it was asked."""
    with Api(shows) as server:
        run = await world.run(await world.ingest(type="api", url=server.url, **block))
    return run, server.asked


# ── A line ────────────────────────────────────────────────────────────────────────────────────


@Given("name", EXPECTED)
async def test_corpus(world: World, name: str) -> None:
    """Each small awkward file gives the records that a person sees in it, and says the rest."""
    wanted = EXPECTED[name]
    put(world, (CORPUS / name).read_bytes(), name)
    run = await world.run(await csv_job(world, name, **wanted.get("block", {})))
    assert (run.status, wanted.get("error", "") in (run.error_message or "")) == (
        wanted.get("status", "success"), True
    )  # fmt: skip
    assert "internal error" not in str(run.error_message)
    found = await titles(world)
    if "__count__" in wanted["titles"]:
        assert len(found) == int(wanted["titles"]["__count__"])
    else:
        assert found == wanted["titles"]
    lines = wanted.get("rejects", {})
    assert [place for place, _, _ in await rejects(world)] == [f"{name} line {n}" for n in lines]
    for (_, reason, _), words in zip(await rejects(world), lines.values(), strict=True):
        assert words in reason
    assert all(any(words in note for note in run.notes) for words in wanted.get("notes", []))
    assert bool(run.notes) == bool(wanted.get("notes")) or "notes" not in wanted


ENDS = st.sampled_from(["\n", "\r\n", "\r"])
VALUES = st.text(st.sampled_from("ab ,;\t|'\"\n\ré\ufeff€"), max_size=6)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES), max_size=8),
    ends=st.lists(ENDS, min_size=1, max_size=3),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(ENCODINGS),
    cut=st.integers(0, 400),
    grown=st.booleans(),
)
def test_as_pythons_csv_reads_it(
    rows: list[tuple[str, str]],
    ends: list[str],
    delimiter: str,
    encoding: str,
    cut: int,
    grown: bool,
) -> None:
    """Whatever the delimiter, encoding and line ends, mixed ones too, whatever is in quotes, and
    wherever a file was cut before it grew: the records are those that Python's csv finds."""
    lines = [["id", "title", "other"], *([f"r{n}", *row] for n, row in enumerate(rows))]
    text = ""
    for row, end in zip(lines, itertools.cycle(ends), strict=False):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator=end).writerow(
            row
        )
        text += file.getvalue()
    text = text.replace("\ufeff", "x") if encoding == "cp1252" else text
    content, head = text.encode(encoding), len(delimiter.join(lines[0]).encode(encoding)) * 2 + 12
    wanted = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))[1:]
    source = tecko.CsvSource.model_validate(
        {"type": "csv", "path": "x", "encoding": None if "utf" in encoding else encoding}
    )
    found = dict[str, list[str]]()
    state: Any = None
    wide = 4 if encoding == "utf-32" else 2 if encoding == "utf-16" else 1
    for part in [content[: (head + cut) // wide * wide], content] if grown else [content]:
        with tempfile.TemporaryFile() as file_:
            file_.write(part)
            file_.seek(0)
            reader = tecko.CsvFile(file_, "x", source, growing=part is not content)
            _ = state and reader.resume(state)
            while not reader.ended:
                fetched = reader.read()
                found |= {record["id"]: [*record.values()] for _, record in fetched.records}
                state = fetched.state
    assert [found.get(row[0]) for row in wanted] == wanted


@Given("count", [2_000, 4_000])
def test_column_names_cost_what_they_are(count: int) -> None:
    """So many equal names get so many different ones, at once."""
    names = tecko.column_names(["a"] * count + ["a_3"])
    assert len({*names}) == count + 1 and names[:3] == ["a", "a_2", "a_3"]


@Given("filler", ["\n", " \r\n", "#\n"])
def test_what_is_no_record_costs_little(tmp_path: Path, filler: str) -> None:
    """Any number of blank lines and comments, before the header and behind it."""
    (tmp_path / "x").write_text(filler * 200_000 + "id,title\n" + filler * 200_000 + "1,a\nbad\n")
    source = tecko.CsvSource.model_validate({"type": "csv", "path": "x", "comment": "#"})
    with (tmp_path / "x").open("rb") as opened:
        fetched = tecko.CsvFile(opened, "x", source, growing=False).read()
    assert fetched.records == [(400_002, {"id": "1", "title": "a"})]
    assert [rejected.number for rejected in fetched.rejects] == [400_003]


READ_WHOLE = """
import os, resource, sys
import teckochecker as tecko

if child := os.fork():  # whose peak does not include that of the import
    sys.exit(os.waitpid(child, 0)[1])
source, found = tecko.CsvSource.model_validate({"type": "csv", "path": "x"}), [0, 0]
with open(sys.argv[1], "rb") as opened:
    reader = tecko.CsvFile(opened, "x", source, growing=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while not reader.ended:
        fetched = reader.read()
        found = [found[0] + len(fetched.records), found[1] + len(fetched.rejects)]
unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
print(*found, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def read_whole(path: Path, text: str) -> tuple[int, int, int]:
    """Records, rejects, and by how many bytes a process grows that reads a file of this text."""
    path.write_text(text)
    command = [sys.executable, "-c", READ_WHOLE, str(path)]
    done = subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    records, rejected, grown = map(int, done.stdout.split())
    return records, rejected, grown


@Given("line", ["2,{},b\n", "2,{}\n"], ids=["ragged", "whole"])
def test_an_open_quote_costs_its_line_and_little_memory(tmp_path: Path, line: str) -> None:
    """However much of a file it swallows."""
    text = 'id,title\n1,"x\n' + line.format("x" * 90) * 60_000
    records, rejected, grown = read_whole(tmp_path / "x", text)
    assert records + rejected == 60_001
    assert grown < (60e6 if "b" in line else 12e6)


PROSE = "x" * 79 + "\n"


@Given(
    ("line", "count", "quote"),
    [(PROSE, 320_000, ""), ("x\n", 700_000, ""), (PROSE, 60_000, '"\n')],
    ids=["long", "short", "closed"],
)
def test_prose_behind_an_open_quote_costs_little_memory(
    tmp_path: Path, line: str, count: int, quote: str
) -> None:
    """It is not gathered in vain; if the quote is closed in the end, it is one record."""
    text = 'id,title,other\n1,a,"x\n' + line * count + quote
    *found, grown = read_whole(tmp_path / "x", text)
    assert found == ([1, 0] if quote else [0, count + 1])
    assert quote or grown < 55e6


# ── A date ────────────────────────────────────────────────────────────────────────────────────

TEN = "2024-01-15T10:00:00Z"
DATES: list[tuple[Any, str | None, str]] = [
    ("Mon Jan 15 2024 10:00:00 GMT+0200 (CEST)", None, "2024-01-15T08:00:00Z"),
    ("Mon Jan 15 2024 05:00:00 GMT-0500 (Eastern Standard Time)", None, TEN),
    ("Mon Jan 15 10:00:00 2024", None, TEN),
    ("Mon Jan 15 10:00:00 UTC 2024", None, TEN),
    ("Mon Jan 15 10:00:00 +0000 2024", None, TEN),
    ("2024-01-15 10:00:00.123456789 +0000 UTC", None, "2024-01-15T10:00:00.123456Z"),
    ("2024-01-15 12:00:00 +0200 CEST m=+0.001", None, TEN),
    ("2024-01-15T11:00:00+01:00[Europe/Prague]", None, TEN),
    ("2024-W03-1T10:00:00Z", None, TEN),
    ("2024-015", None, "2024-01-15T00:00:00Z"),
    ("20240115100000", None, TEN),
    ("202401151000", None, TEN),
    ("20240115T100000.5Z", None, "2024-01-15T10:00:00.500000Z"),
    (20240115, None, "2024-01-15T00:00:00Z"),
    (1705312800, None, TEN),
    (1705312800000, None, TEN),
    (1705312800.0, None, TEN),
    ("20:15 5.6.2024", None, "2024-06-05T20:15:00Z"),
    ("15. 1. 2024 10:00", None, TEN),
    ("Mon 03/04/2024", "dmy", "2024-04-03T00:00:00Z"),
    ("10:00 03/04/2024", "mdy", "2024-03-04T10:00:00Z"),
    ("3/ 4/2024", "dmy", "2024-04-03T00:00:00Z"),
    ("10:00 15/01/2024", None, TEN),
    ("15-Jan-24", "dmy", "2024-01-15T00:00:00Z"),
    ("12:30 AM Jan 15, 2024", None, "2024-01-15T00:30:00Z"),
    ("15th January 2024, 10 am", None, ""),
    ("Mon 03/04/2024", None, ""),
    ("10:00 03/04/2024", None, ""),
    ("3/ 4/2024", None, ""),
    ("01/15/2024", "dmy", ""),
    ("24-03-04", None, ""),
    ("15-Jan-24", None, ""),
    ("2024-01-15/2024-01-20", None, ""),
    ("2024-01-15+02:00", None, ""),
    ("2024-01-15T25:00:00", None, ""),
    ("2024-W03", None, ""),
    ("13:00 PM 2024-01-15", None, ""),
    (2024, None, ""),
    (45306, None, ""),
    (10**8, None, ""),
    (True, None, ""),
    (5e9, None, ""),
    ("a" + " " * 100_000 + "b", None, ""),
]


@Given(("value", "order", "wanted"), DATES, ids=[f"{v} {o}"[:60] for v, o, _ in DATES])
def test_a_date_is_read_in_one_way_or_refused(value: Any, order: str | None, wanted: str) -> None:
    """In the forms that programs print; nothing is guessed."""
    with contextlib.nullcontext() if wanted else pytest.raises(ValueError, match="a date"):
        assert tecko.utc_text(value, order) == wanted


@settings(max_examples=300, deadline=None)
@given(
    st.dates(min_value=date(2000, 1, 1)),
    st.sampled_from(["{d}/{m}/{y}", "Mon {d}/{m}/{y}", "10:00 {d}/{m}/{y}", "{d}-{m}-{y} 10:00"]),
)
def test_day_and_month_agree_or_the_date_is_refused(day: Any, form: str) -> None:
    """Wherever in the text the date stands."""
    text = form.format(d=day.day, m=day.month, y=day.year)
    if day.day <= 12 and day.day != day.month:
        with pytest.raises(ValueError, match="one way"):
            tecko.utc_text(text)
    else:
        assert tecko.utc_text(text)[:10] == day.isoformat()
    assert tecko.utc_text(text, "dmy")[:10] == day.isoformat()


# ── The end of paging, and what is beyond it ──────────────────────────────────────────────────


def rows(first: int, count: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [{"id": n, "title": f"title {n}"} | more for n in range(first, first + count)]


def paged(*pages: object, by: str = "page") -> Callable[[dict[str, str]], object]:
    """Answers by number; beyond the last one the last."""
    return lambda query: pages[min(int(query.get(by, "1")), len(pages)) - 1]


REFUSED = Answer(400, b'{"code": "invalid_page_number"}')
ENDS_OF: dict[str, tuple[Any, dict[str, Any], int]] = {  # answers, block, requests
    "null": (paged({"items": rows(1)}, {"items": rows(4)}, {"items": None, "total": 6}),
        {"next": "page", "items": "items"}, 3),
    "absent": (paged({"items": rows(1)}, {"items": rows(4)}, {"total": 6}), {"next": "page"}, 3),
    "empty": (paged(rows(1), rows(4), []), {"next": "page"}, 3),
    "204": (paged(rows(1), rows(4), Answer(204, b"")), {"next": "page"}, 3),
    "400": (paged(rows(1), rows(4), REFUSED), {"next": "page"}, 3),
    "404": (paged(rows(1), rows(4), Answer(404, b"")), {"next": "page"}, 3),
    "416": (paged(rows(1), rows(4), Answer(416, b"")), {"next": "page"}, 3),
    "422": (paged(rows(1), rows(4), Answer(422, b"{}")), {"next": "page"}, 3),
    "clamped": (paged(rows(1), rows(4)), {"next": "page"}, 4),
    "the same cursor": (
        lambda query: {"results": [] if "since" in query else rows(1, 6), "last_seq": 9},
        {"next": {"type": "cursor", "path": "last_seq", "param": "since"}}, 2),
    "more": (
        lambda query: {"users": rows(1, 6), "meta": {"has_more": False, "after_cursor": "9"}},
        {"more": "meta.has_more", "next": {"type": "cursor", "path": "meta.after_cursor"}}, 1),
    "has_more": (
        lambda query: {"data": rows(4) if query else rows(1), "has_more": not query},
        {"next": {"type": "last", "path": "id", "param": "starting_after"}}, 2),
    "a relative URL": (
        lambda query: {"records": rows(4 if query else 1), "next": None if query else "/x?page=2"},
        {"next": {"type": "cursor", "path": "next"}}, 2),
    "a cursor that is no text": (
        lambda query: {"rows": rows(4 if query else 1), "next_cursor": None if query else {"a": 1}},
        {"next": "cursor"}, 2),
    "an empty page within": (
        lambda query: {"rows": {"": rows(1), "a": [], "b": rows(4)}[query.get("cursor", "")],
            "next_cursor": {"": "a", "a": "b"}.get(query.get("cursor", ""))},
        {"next": "cursor"}, 3),
    "an answer of nothing": (paged(rows(1), rows(4), Answer(200, b"")), {"next": "page"}, 3),
    "PHP's empty list": (paged({"items": rows(1)}, {"items": rows(4)}, {"items": {}}),
        {"next": "page", "items": "items"}, 3),
    "a link that is an object": (
        lambda query: {"d": rows(4 if query else 1),
            "_links": {"next": None if query else {"href": "/x?page=2"}}},
        {"next": {"type": "cursor", "path": "_links.next"}}, 2),
    **{f"more is {word!r}": (
        lambda query, word=word: {"d": rows(1, 6), "more": word, "next_cursor": "9"},
        {"more": "more", "next": "cursor"}, 1) for word in ("false", "0", 0, "no", "")},
    "a link that is followed by 204": (
        lambda query: Answer(204, b"") if query else
            Answer(200, standins.as_json(rows(1, 6)), {"Link": "</?page=2>; rel=next"}),
        {}, 2),
}  # fmt: skip


@Given(("shows", "block", "requests"), ENDS_OF.values(), ids=ENDS_OF)
async def test_the_end(world: World, shows: Any, block: dict[str, Any], requests: int) -> None:
    """Each of its forms ends a good run that has everything, and costs no more requests."""
    run, asked = await api_run(world, shows, **block)
    assert (run.status, run.error_message) == ("success", None)
    assert await ids(world) == [1, 2, 3, 4, 5, 6] and len(asked) == requests


async def test_what_the_cursor_was_sent_as(world: World) -> None:
    """What is no text goes as JSON, a URL as itself, the last record's id under its parameter."""
    for name, sent in (
        ("a cursor that is no text", {"cursor": '{"a":1}'}),
        ("a relative URL", {"page": "2"}),
        ("has_more", {"starting_after": "3"}),
    ):
        shows, block, _ = ENDS_OF[name]
        with Api(shows) as server:
            await world.run(await world.ingest(name, type="api", url=server.url, **block))
        assert server.asked[1] == sent


TOO_EARLY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "next": ({"count": 9, "next": "http://h/x?page=2", "results": rows(1)}, {}, "says by next"),
    "link": ({"data": rows(1), "_links": {"next": {"href": "/2"}}}, {}, "says by _links.next"),
    "has_more": ({"data": rows(1), "has_more": True}, {}, "says by has_more"),
    "total": ({"data": rows(1), "meta": {"total": 9}}, {}, "3 records came of 9"),
    "another path": ({"data": rows(1), "meta": {"next": "abc"}},
        {"next": {"type": "cursor", "path": "meta.nxt"}}, "there is no meta.nxt in the answer"),
    "a path that is nowhere": ({"data": rows(1)}, {"next": "cursor"}, "there is no next_cursor"),
    "header": (Answer(200, standins.as_json(rows(1)), {"Next-Page": "2"}), {"next": "link"},
        "says by next-page"),
    "a header's word": (Answer(200, standins.as_json(rows(1)), {"X-Has-More": "true"}), {},
        "says by x-has-more"),
    "a header's total": (Answer(200, standins.as_json(rows(1)), {"X-Total-Count": "9"}), {},
        "3 records came of 9"),
    "a range": (Answer(200, standins.as_json(rows(1)), {"Content-Range": "items 0-2/9"}), {},
        "3 records came of 9"),
    "a total as text": ({"data": rows(1), "total_count": "9"}, {}, "3 records came of 9"),
    "pages": ({"data": rows(1), "meta": {"total_pages": 3}}, {}, "1 pages came of 3"),
    "a header's pages": (Answer(200, standins.as_json(rows(1)), {"X-WP-TotalPages": "3"}), {},
        "1 pages came of 3"),
    "not the last": ({"content": rows(1), "last": False}, {}, "says by last"),
    "a key that is an object": ({"Items": rows(1), "LastEvaluatedKey": {"id": 3}}, {},
        "says by LastEvaluatedKey"),
    "truncated": ({"data": rows(1), "IsTruncated": True}, {}, "says by IsTruncated"),
    "`more` that is nowhere": ({"data": rows(1), "cursor": None},
        {"next": {"type": "cursor", "path": "cursor"}, "more": "meta.more"}, "is no meta.more"),
    "more that nobody follows": ({"data": rows(1), "more": {"on": True}, "next_cursor": None},
        {"next": "cursor", "more": "more.on"}, "says by more.on"),
}  # fmt: skip


@Given(("answer", "block", "said"), TOO_EARLY.values(), ids=TOO_EARLY)
async def test_more_than_was_taken_fails_the_first_run(
    world: World, answer: Any, block: dict[str, Any], said: str
) -> None:
    """With what is there; once a run was whole, it is noted."""
    run, _ = await api_run(world, lambda query: answer, **block)
    assert run.status == "failed" and said in str(run.error_message)
    assert await ids(world) == [1, 2, 3]


async def test_more_than_was_taken_is_noted_later(world: World) -> None:
    """An API that begins to page goes on being read, and says so in each run."""
    answers: list[object] = [{"data": rows(1)}, {"data": rows(1), "next": "/2"}]
    with Api(lambda query: answers[min(len(server.asked), 2) - 1]) as server:
        job = await world.ingest(type="api", url=server.url)
        assert (await world.run(job)).notes == []
        run = await world.run(job)
    assert run.status == "success" and "says by next" in run.notes[0]


async def test_a_total_that_was_not_reached(world: World) -> None:
    """An empty page in the middle is told by the total."""
    pages = [{"total": 9, "data": rows(1)}, {"total": 9, "data": []}, {"total": 9, "data": rows(4)}]
    run, _ = await api_run(world, paged(*pages), next="page")
    assert (run.status, run.records_inserted) == ("success", 3)
    assert "3 records came of 9" in run.notes[0]


async def test_an_error_in_place_of_a_list_is_not_the_end(world: World) -> None:
    """Behind other pages, and where an ingest asks for what is new."""
    run, _ = await api_run(world, paged({"d": rows(1)}, {"error": {"code": 5}}), next="page")
    assert run.status == "failed" and "the answer is an error: {'code': 5}" in run.error_message
    answers = [{"d": rows(1, at=1_700_000_000)}, {"errors": ["invalid token"]}]
    with Api(lambda query: answers["since" in query]) as server:
        job = await world.ingest("new", type="api", url=server.url, since="at", items="d")
        assert (await world.run(job)).status == "success"
        assert "invalid token" in str((await world.run(job)).error_message)


async def test_a_list_that_is_null_is_empty(world: World) -> None:
    """As Go writes it: on the first page of a run, too."""
    answers: list[object] = [{"items": rows(1)}, {"items": None}]
    with Api(lambda query: answers[min(len(server.asked), 2) - 1]) as server:
        job = await world.ingest(type="api", url=server.url, items="items")
        assert [(await world.run(job)).status for _ in range(2)] == ["success"] * 2


async def test_what_is_named_and_nowhere(world: World) -> None:
    """A field of `since` that no record has, a first run without records, a Link header."""
    run, _ = await api_run(world, lambda query: rows(1), since="updatedAt", next="link")
    assert "no record has updatedAt" in " ".join(run.notes)
    assert "no answer had a Link header" in " ".join(run.notes)
    with Api(lambda query: []) as server:
        run = await world.run(await world.ingest("none", type="api", url=server.url))
    assert run.notes == ["no records came"]


@Given("answer", [{"error": "invalid token", "errors": []}, {"warnings": []}])
async def test_a_list_of_errors_holds_no_records(world: World, answer: object) -> None:
    """An answer with no other list is none."""
    run, _ = await api_run(world, lambda query: answer)
    assert run.status == "failed" and "the answer is" in str(run.error_message)


@Given("piece", ["<", '"', '"\\', "<a>; rel=", "; rel=", "; ", '<a>; title="\\"', '<a>; rel="x" '])
def test_a_link_header_costs_what_it_is_long(piece: str) -> None:
    """However often anything comes in it: twice as long takes twice as long, not four times."""

    def seconds(count: int) -> float:
        began = time.process_time()
        tecko.next_link(piece * count)
        return time.process_time() - began

    assert (
        min(seconds(64_000) for _ in range(3)) < 16 * min(seconds(8_000) for _ in range(3)) + 0.05
    )


@settings(max_examples=200, deadline=None)
@given(st.text('<>;, ="\\relnxtRELNXT', max_size=60))
@example('<a>; title="<b>; rel=next"; rel=prev, <c>; rel="prev next"')
@example("<a>; rel=first, <c>; REL = NEXT")
@example('<a>; rel="prev"; rel="next", <c>; title="a, \\"b"; rel=next')
def test_a_link_header_is_read_to_its_end(header: str) -> None:
    """Whatever is in it; a link behind it is found unless a quote or bracket before it is open."""
    found = tecko.next_link(f"{header}, <c>; rel=next")
    assert found is not None or header.count('"') or "<" in header
    if "title" in header or "REL" in header:
        assert tecko.next_link(header) in ("c", None) or "<c>" not in header


# ── What is provisional ───────────────────────────────────────────────────────────────────────


async def test_an_unended_line_of_a_fresh_file_waits(world: World) -> None:
    """12 of 1234 is no record, however the next run finds it."""
    put(world, "id,name\nann,12\nbob,12")
    job_id = await world.ingest(type="csv", path="data.csv", id="name")
    run = await world.run(job_id)
    assert {*await world.records()} == {"12"}
    assert "has no end yet" in run.notes[0]
    put(world, "id,name\nann,12\nbob,1234\n")
    await again(world, job_id)
    found = await world.records()
    assert {*found} == {"12", "1234"} and found["12"]["metadata"] == {"id": "ann"}


async def test_an_unended_line_is_taken_once_the_file_rests(world: World) -> None:
    """A file may well end without a line end."""
    put(world, "id,title\n1,a\n2,b")
    job_id = await world.ingest(type="csv", path="data.csv")
    await world.run(job_id)
    assert await titles(world) == {"1": "a"}
    world.clock.turn(HOUR)
    assert counts(await again(world, job_id)) == {"processed": 1, "inserted": 1}


async def test_half_a_quoted_field_of_a_fresh_file_waits(world: World) -> None:
    """Its lines are no records of their own."""
    put(world, 'id,title\n1,a\n2,"b\n3,c\n4')
    job_id = await world.ingest(type="csv", path="data.csv")
    await world.run(job_id)
    assert await titles(world) == {"1": "a"}
    put(world, 'id,title\n1,a\n2,"b\n3,c\n4"\n')
    await again(world, job_id)
    assert await titles(world) == {"1": "a", "2": "b\n3,c\n4"} and await places(world) == []


@Given(("age", "asked"), [(0, None), (1, None), (2, "x"), (3600, "x")])
async def test_a_time_of_change_of_this_very_second_tells_nothing(
    world: World, age: int, asked: str | None
) -> None:
    """It may have changed once more since, so it is not sent back."""
    now = 1_700_000_000
    sent_at, changed = (formatdate(at, usegmt=True) for at in (now, now - age))
    headers = {"Date": sent_at, "Last-Modified": changed, "ETag": '"1"', "Content-Type": "text/csv"}
    with Api(lambda query: Answer(200, b"id,title\n1,a\n", headers)) as server:
        job_id = await world.ingest(type="csv", path=server.url + "/a.csv")
        await world.run(job_id)
        await world.run(job_id)
        sent = server.requests[-1].headers
    assert ("if-modified-since" in sent, "if-none-match" in sent) == (asked is not None,) * 2


async def test_a_watermark_waits_where_records_moved(world: World) -> None:
    """One that was updated while pages were read hid another, which the next run finds."""
    records = [{"id": n, "at": 1_700_000_000 + n} for n in range(8)]

    def shows(query: dict[str, str]) -> object:
        at = int(query["offset"])
        some = sorted(
            (r for r in records if r["at"] >= int(query.get("since", 0))), key=lambda r: r["at"]
        )
        page = some[at : at + 2]
        if at == 0 and len(server.asked) == 1:
            records[0] = {"id": 0, "at": 1_700_001_000}
        return page

    with Api(shows) as server:
        job = await world.ingest(type="api", url=server.url, next="offset", since="at")
        run = await world.run(job)
        assert 2 not in await ids(world) and "waits for the next run" in " ".join(run.notes)
        await world.run(job)
        assert sorted(await ids(world)) == [*range(8)]
        await world.run(job)
    assert "since" in server.asked[-1]


# ── One bad part stops nothing ────────────────────────────────────────────────────────────────


async def test_a_control_character_in_a_string_is_kept(world: World) -> None:
    """JSON forbids it, but what is meant is plain."""
    run, _ = await api_run(world, lambda query: Answer(200, b'[{"id": 1, "title": "a\tb\n"}]'))
    assert run.status == "success" and await titles(world) == {"1": "a\tb\n"}


@Given("value", ["NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\xff"', '{"a": [NaN]}'])
async def test_one_odd_value_costs_its_record(world: World, value: str) -> None:
    """Not the page, nor the others on it."""
    body = f'[{{"id": 1, "v": {value}}}, {{"id": 2, "v": 1}}]'.encode("latin-1")
    run, _ = await api_run(world, lambda query: Answer(200, body))
    assert (run.status, counts(run)) == ("success", {"processed": 2, "inserted": 1, "failed": 1})
    assert await ids(world) == [2]


@Given("bad", [b"Notes\nsee wiki\n", b"\x1f\x8b broken", b"PK\x03\x04", b'id,"title\n1'])
async def test_a_bad_file_of_a_glob_stops_no_other(world: World, bad: bytes) -> None:
    """The others are read, and the run fails at its end with its name, until it is mended."""
    for name, content in (("a", b"id,title\n1,a\n"), ("b", bad), ("c", b"id,title\n3,c\n")):
        put(world, content, f"d/{name}.csv")
    job_id = await csv_job(world, "d/*.csv")
    run = await world.run(job_id)
    assert run.status == "failed" and "d/b.csv" in str(run.error_message)
    assert await titles(world) == {"1": "a", "3": "c"}
    put(world, "id,title\n2,b\n", "d/b.csv")
    run = await again(world, job_id)
    assert (run.status, counts(run)) == ("success", {"processed": 1, "inserted": 1})


async def test_a_glob_is_read_in_natural_order(world: World) -> None:
    """Of an id in several files the last one's record counts: 10 is behind 9."""
    for n in (9, 10):
        put(world, f"id,title\n1,{n}\n", f"d/export-{n}.csv")
    await world.run(await csv_job(world, "d/*.csv"))
    assert await titles(world) == {"1": "10"}


EDITS = st.lists(
    st.tuples(st.sampled_from(["2", "9", "10"]), st.dictionaries(
        st.integers(1, 4), st.sampled_from("abc"), max_size=4)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(edits=EDITS)
async def test_the_same_files_give_the_same_records(
    edits: list[tuple[str, dict[int, str]]],
) -> None:
    """Whatever they were before: what stands in them now is as a first run has it."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder, several in ((Path(one), True), (Path(other), False)):
            async with opened(folder) as world:
                world.clock.turn(HOUR)
                job_id = await world.ingest(type="csv", path="f*.csv")
                put(world, "id,title\n", "f1.csv")
                for name, records in edits:
                    lines = "".join(f"{n},{title}\n" for n, title in records.items())
                    put(world, f"id,title\n{lines}", f"f{name}.csv")
                    _ = several and await again(world, job_id)
                await again(world, job_id)
                found = await titles(world)
            if several:
                before = found
        assert {key: before.get(key) for key in found} == found


async def test_another_order_of_columns_makes_no_other_record(world: World) -> None:
    """The values count."""
    put(world, "id,title,x\n1,ann,5\n")
    job_id = await csv_job(world)
    await world.run(job_id)
    put(world, "id,x,title\n1,5,ann\n")
    assert counts(await again(world, job_id)) == {"processed": 1, "unchanged": 1}


async def test_rejects_of_a_part_go_when_it_is_read_again(world: World) -> None:
    """A file that was mended, or got shorter, has none; those of other files stay."""
    put(world, "id,published_at\n1,2024-13-01\n2,\n3,never\n", "d/a.csv")
    put(world, "id,published_at\n4,2024-13-01\n5,\n", "d/b.csv")
    job_id = await csv_job(world, "d/*.csv")
    await world.run(job_id)
    assert await places(world) == ["d/a.csv line 2", "d/a.csv line 4", "d/b.csv line 2"]
    put(world, "id,published_at\n1,2024-12-01\n2,\n", "d/a.csv")
    await again(world, job_id)
    assert await places(world) == ["d/b.csv line 2"]


async def test_a_reject_of_a_page_goes_when_it_is_read_again(world: World) -> None:
    """And so do those of pages that are there no more."""
    answers = [[*rows(1), {"id": None}], rows(1)]
    with Api(lambda query: answers[min(len(server.asked), 2) - 1]) as server:
        job = await world.ingest(type="api", url=server.url)
        await world.run(job)
        assert await places(world) == ["page 1 record 4"]
        await world.run(job)
    assert await places(world) == []


async def test_a_trace_stays_until_a_run_with_work_in_it_succeeds(world: World) -> None:
    """An idle run does not overwrite what was rejected, or why a run failed."""
    put(world, "id,title\n1,a\nbad\n")
    job_id = await csv_job(world)
    run = await world.run(job_id)
    said = f"1 of 2 records were rejected in the run of {tecko.iso(run.start_time)}: data rejects"
    await again(world, job_id)
    assert (await world.get(job_id)).last_error == said
    put(world, "id,title\n1,a\n2,b\n")
    await again(world, job_id)
    assert (await world.get(job_id)).last_error is None


async def test_all_rejected_is_a_failure_until_it_is_mended(world: World) -> None:
    """Each run says so, though the file is as it was."""
    put(world, "id,title\n1,a,\n2,b,\n")
    job_id = await csv_job(world)
    for _ in range(2):
        run = await again(world, job_id)
        assert (run.status, run.records_failed) == ("failed", 2)
        assert str((await world.get(job_id)).last_error).startswith("all 2 records were rejected")
    put(world, "id,title\n1,a\n2,b\n")
    assert (await again(world, job_id)).status == "success"


# ── What it costs others, and what a source may cost ──────────────────────────────────────────


async def test_a_run_that_waits_holds_up_no_other(world: World, source: Source) -> None:
    """Slow sources, more of them than chunks are worked on at once, and a file beside them."""
    source.records = rows(1)
    gates = [source.gate("GET /items", after_acting=False) for _ in range(3)]
    slow = [
        asyncio.create_task(
            world.steps.step(await world.ingest(f"slow {n}", type="api", url=source.items_url))
        )
        for n in range(3)
    ]
    await gates[0].areached()
    put(world, "id,title\n1,a\n")
    assert (await world.run(await csv_job(world))).status == "success"
    assert not any(task.done() for task in slow)
    for gate in gates:
        gate.release()
    source.release_all()
    await asyncio.gather(*slow)


async def test_a_locked_store_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than SQLite itself waits; then the run goes on, and ends well."""
    put(world, "id,title\n" + "".join(f"{n},x\n" for n in range(5000)))
    job_id, looks = await csv_job(world), itertools.count(1)
    with contextlib.closing(sqlite3.connect(world.config.settings.database)) as other:

        def clock() -> float:
            if next(looks) == 3:
                other.execute("BEGIN IMMEDIATE")
            return world.clock.now

        world.steps.clock = clock
        task = asyncio.create_task(world.steps.step(job_id))
        await until(lambda: "waits for the store" in caplog.text, 30)
        other.rollback()
        await task
    [run] = await world.store.runs("source", 1)
    assert (run.status, run.records_inserted) == ("success", 5000)


async def test_jobs_of_one_host_share_its_budget(world: World, source: Source) -> None:
    """Whatever rates they have: the second waits for what the first has taken."""
    source.records = rows(1)
    jobs = [
        await world.ingest(
            f"job {rate}", type="api", url=source.items_url, max_requests_per_minute=rate
        )
        for rate in (1, 60_000)
    ]
    await world.run(jobs[0])
    task = asyncio.create_task(world.steps.step(jobs[1]))
    done, _ = await asyncio.wait([task], timeout=0.3)
    assert (done, len(source.requests)) == (set(), 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_wait_for_the_rate_is_no_part_of_an_answers_time(
    world: World, source: Source
) -> None:
    """Ten requests that wait a second in all, each allowed a part of it."""
    source.style, source.records = "page", rows(1, 95)
    job = await world.ingest(
        type="api", url=source.items_url, next="page", max_requests_per_minute=500, timeout=1
    )
    run = await world.run(job)
    assert (run.status, run.records_inserted) == ("success", 95)


async def test_a_source_has_the_time_that_its_job_gives_it(hasty: World, source: Source) -> None:
    """`timeout` is how long an answer may take."""
    source.fault("GET /items", Fault.hang())
    run = await hasty.run(await hasty.ingest(type="api", url=source.items_url, timeout=1))
    assert run.status == "failed" and "in time" in str(run.error_message)


async def test_a_page_that_is_too_long_is_asked_for_once(world: World, source: Source) -> None:
    """And the key that helps is named."""
    url = source.file("/x", b" " * (tecko.PAGE_BYTES + 1), "application/json")
    run = await world.run(await world.ingest(type="api", url=url))
    assert "next.size" in str(run.error_message) and len(source.requests) == 1


async def test_what_a_source_says_of_its_refusal_is_told(world: World, source: Source) -> None:
    """The begin of its answer."""
    body = {"detail": [{"msg": "less than or equal to 100"}]}
    source.fault("GET /items", Fault.status(422, body=body))
    run = await world.run(await world.ingest(type="api", url=source.items_url))
    assert "less than or equal to 100" in str(run.error_message)


async def test_no_download_is_left_behind(world: World, source: Source) -> None:
    """While it goes on, no file of it has a name: no crash can leave one."""
    folder = world.config.settings.database.parent
    before = {*folder.iterdir()}
    url = source.file("/data.csv", b"id,title\n1,a\n")
    gate = source.gate("GET /data.csv", after_acting=False)
    task = asyncio.create_task(world.steps.step(await world.ingest(type="csv", path=url)))
    await gate.areached()
    assert {*folder.iterdir()} == before
    gate.release()
    await task
    assert await titles(world) == {"1": "a"}


FORMATS = [
    ("%Y-%m-%d %H:%M", "2024-01-15 09:55"),
    ("s", "1705312500"),
    ("ms", "1705312500000"),
    ("us", "1705312500000000"),
]


@Given(("form", "sent"), FORMATS)
async def test_since_in_a_form_of_its_own(
    world: World, source: Source, form: str, sent: str
) -> None:
    """`format` says how, for an API that is asked in another form than it answers."""
    source.records = [{"id": 1, "at": "2024-01-15T12:00:00+02:00"}]
    since = {"field": "at", "format": form}
    job = await world.ingest(type="api", url=source.items_url, since=since)
    await world.run(job)
    await world.run(job)
    assert source.asked()[-1]["since"] == sent


@Given("value", ["a\rb", "a\nb", "a\r\nb", 'a"b', "a,b"])
async def test_what_is_exported_is_one_row(
    world: World, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """A line end in a value is quoted on the way out."""
    put(world, f'id,title\n1,"{value.replace(chr(34), chr(34) * 2)}"\n')
    await world.run(await csv_job(world))
    operations = tecko.Operations(world.store, world.vault, lambda: world.config)

    async def rows() -> AsyncIterator[tecko.StoredRecord]:
        for record in (await operations.data(None, 10))[0]:
            yield record

    await tecko.export(argparse.Namespace(csv=True), tecko.StoredRecord, rows())
    printed = capsys.readouterr().out
    [row] = csv.DictReader(io.StringIO(printed, newline=""))
    assert row["title"] == value and "\r" not in printed.replace(value, "")


async def test_the_parts_of_an_id_are_kept(world: World) -> None:
    """Several columns that identify together are in the metadata, too; one that does is not."""
    put(world, "state,year,title\nTX,2020,a\n")
    await world.run(await csv_job(world, id=["state", "year"]))
    [record] = (await world.records()).values()
    assert (record["source_id"], record["metadata"]) == (
        '["TX","2020"]', {"state": "TX", "year": "2020"}
    )  # fmt: skip
