"""CSV files as they really are: what is taken, what is rejected and where, what is read again."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import standins
from conftest import World, make_world
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from standins import Fault

import teckochecker as tecko

Given = pytest.mark.parametrize
PATIENCE = 10.0  # s for what is waited for; it takes milliseconds


def put(world: World, content: str | bytes, name: str = "data.csv") -> Path:
    """Write a file beside jobs.yaml, in place of the one before."""
    path = world.config.base / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


HOUR = 3600.0  # s: a file is that old, and nobody is writing it, once the clock was turned so far


async def ingest(world: World, content: str | bytes, **block: Any) -> tecko.Run:
    """Write data.csv, let it come to rest, and run a fresh job over it."""
    put(world, content)
    world.clock.turn(HOUR)
    return await world.run(await world.ingest(**{"type": "csv", "path": "data.csv"} | block))


async def again(world: World, job_id: int) -> tecko.Run:
    """The next run, a minute later."""
    world.clock.turn(60)
    return await world.run(job_id)


def counts(run: tecko.Run) -> dict[str, int]:
    """What became of a run's records, without the zeros; they add up to `processed`."""
    found = {name: getattr(run, f"records_{name}") for name in tecko.COUNTED}
    assert found["processed"] == sum(n for name, n in found.items() if name != "processed")
    return {name: number for name, number in found.items() if number}


async def titles(world: World) -> dict[str, str]:
    return {key: record.get("title", "") for key, record in (await world.records()).items()}


async def rejects(world: World) -> list[tuple[str, str, Any]]:
    """Place, reason and record of the rejects, in the order in which they were met."""
    rows = [*reversed(await world.store.rejects(None, 1000))]
    read = [json.loads(r["record"]) if r["record"][:1] == "{" else r["record"] for r in rows]
    return [(row["place"], row["reason"], record) for row, record in zip(rows, read, strict=True)]


async def places(world: World) -> list[str]:
    return [place for place, _, _ in await rejects(world)]


def rows(world: World, sql: str) -> list[tuple[Any, ...]]:
    """Ask the database file from outside."""
    with closing(sqlite3.connect(world.config.settings.database)) as db:
        return db.execute(sql).fetchall()


def raws(world: World) -> dict[str, tuple[Any, bool]]:
    """The raw rows: the record as received and whether it was normalized, by id."""
    found = rows(world, "SELECT external_id, raw_data, processed FROM raw_data_csv")
    return {key: (json.loads(record), bool(processed)) for key, record, processed in found}


def written(world: World, table: str) -> dict[str, float]:
    """When each row of a table was last written."""
    if table == "raw_data_csv":
        return dict(rows(world, "SELECT external_id, ingested_at FROM raw_data_csv"))
    return dict(rows(world, "SELECT source_id, updated_at FROM normalized_data"))


def written_at(world: World, now: float) -> set[str]:
    """The ids of what was written at this moment: the same in both tables."""
    raw, unified = (
        {key for key, at in written(world, table).items() if at == now}
        for table in ("raw_data_csv", "normalized_data")
    )
    assert raw == unified
    return raw


def table(numbers: Iterable[int], mark: str = "title") -> str:
    """A file with one row for each number."""
    return "id,title\n" + "".join(f"{n},{mark} {n}\n" for n in numbers)


OPENED: list[str] = []  # files that were opened while somebody listened
LISTENING = threading.Event()


def note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and LISTENING.is_set():
        OPENED.append(str(args[0]))


sys.addaudithook(note_opened)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that this process opens meanwhile."""
    OPENED.clear()
    LISTENING.set()
    yield OPENED
    LISTENING.clear()


# --- The corpus ------------------------------------------------------------------------------


class Case(NamedTuple):
    """A file, the titles by id that come of it, and the rejects: line and part of the reason."""

    content: bytes
    titles: dict[str, str]
    rejects: Sequence[tuple[int, str]] = ()
    block: Mapping[str, Any] = MappingProxyType({})


AB = {"1": "a", "2": "b"}
ABC = {"1": "a", "2": "b", "3": "c"}
OPEN = "never closed"
WIDE = "id,title\r\n1,ä\r\n2,a,b\r\n3,𝄞\r\n"

CORPUS = {
    "quotes": Case(b'id,title\n1,"say ""a"""\n"2","b"\n', {"1": 'say "a"', "2": "b"}),
    "newline in a field": Case(b'id,title\n1,"a\n\nz"\n2,b\n', {"1": "a\n\nz", "2": "b"}),
    "CRLF in a field": Case(b'id,title\r\n1,"a\r\nz"\r\n2,b\r\n', {"1": "a\r\nz", "2": "b"}),
    "CR in a field": Case(b'id,title\n1,"a\rz"\n2,b\n', {"1": "a\rz", "2": "b"}),
    "delimiter in a field": Case(b'id,title\n1,"a,z"\n2,b\n', {"1": "a,z", "2": "b"}),
    "byte order mark": Case(b"\xef\xbb\xbfid,title\n1,a\n2,b\n", AB),
    "mark and quoted header": Case(b'\xef\xbb\xbf"id","title"\n1,a\n2,b\n', AB),
    "semicolon": Case(b'id;title\n1;a\n2;"b,b;b"\n', {"1": "a", "2": "b,b;b"}),
    "tab": Case(b"id\ttitle\n1\ta\n2\tb\n", AB),
    "pipe": Case(b"id|title\n1|a\n2|b\n", AB),
    "commas in a header with ;": Case(b'id;"a,b";title\n1;x;a\n2;y;b\n', AB),
    "sep=;": Case(b"sep=;\nid;title\n1;a\n2;b\n", AB),
    "sep=; after a mark": Case(b"\xef\xbb\xbfsep=;\r\nid;title\r\n1;a\r\n2;b,b;x\r\n3;c\r\n",
        {"1": "a", "3": "c"}, [(4, "found 3 fields; the header has 2")]),
    "delimiter is set": Case(b"id#title,x\n1#a\n2#b\n", {"1": "", "2": ""}, (), {"delimiter": "#"}),
    "delimiter tab is set": Case(b"id\ttitle\n1\ta\n2\tb\n", AB, (), {"delimiter": "tab"}),
    "ragged": Case(b"id,title\n1,a\n5\n6,x,y\n2,b\n", AB,
        [(3, "found 1 fields; the header has 2"), (4, "found 3 fields; the header has 2")]),
    "blank lines": Case(b"id,title\n\n1,a\n   \n2,b\n\n\n", AB),
    "blank lines before the header": Case(b"\n\nid,title\n1,a\n2,b\n", AB),
    "blank line before a header with ;": Case(b"\nid;title\n1;a\n2;b\n", AB),
    "header only": Case(b"id,title\n", {}),
    "header without an end": Case(b"id,title", {}),
    "no newline at the end": Case(b"id,title\n1,a\n2,b", AB),
    "CRLF": Case(b"id,title\r\n1,a\r\n2,b\r\n", AB),
    "old Mac": Case(b"id,title\r1,a\r5\r2,b\r", AB, [(3, "found 1 fields")]),
    "old Mac with quotes": Case(b'id,title\r1,"a\rz"\r2,b', {"1": "a\rz", "2": "b"}),
    "old Mac with a wrong byte": Case(b"id,title\r1,a\r5,\xe9\r2,b\r", AB, [(3, "0xe9")]),
    "line ends mixed": Case(b"id,title\n1,a\r\n2,b\n", AB),
    "ids doubled": Case(b"id,title\n1,x\n2,b\n1,a\n", AB),
    "a header twice": Case(b"id,title,title\n1,a,x\n2,b,y\n", AB),
    "an empty header": Case(b"id,,title\n1,x,a\n2,y,b\n", AB),
    "spaces around headers": Case(b" id , title \n1,a\n2,b\n", AB),
    "capitals in headers": Case(b"id,TITLE\n1,a\n2,b\n", AB),
    "no header": Case(b"1,a\n2,b\n", AB, (), {"columns": ["id", "title"]}),
    "unclosed quote at the start": Case(b'id,title\n5,"x\n1,a\n2,b\n', AB, [(2, OPEN)]),
    "unclosed quote in the middle": Case(b'id,title\n1,a\n5,"x\n2,b\n', AB, [(3, OPEN)]),
    "unclosed quote at the end": Case(b'id,title\n1,a\n2,b\n5,"x', AB, [(4, OPEN)]),
    "two unclosed quotes": Case(b'id,title\n5,"x\n1,a\n6,"y\n2,b\n', AB, [(2, "'\"'"), (4, OPEN)]),
    "unclosed quote that another ends": Case(
        b'id,title,x\n5,"x,y\n1,a,x\n6,size,5"\n2,b,x\n',
        AB | {"6": "size"}, [(2, "a quote swallows the lines after it")]),
    "unclosed quote before a wrong byte": Case(
        b'id,title,x\n5,"x,y\n1,a,x\n6,\xe9,x\n7,b,5"\n2,b,x\n',
        AB | {"7": "b"}, [(2, "a quote swallows"), (4, "0xe9")]),
    "unclosed quote before a blank line": Case(
        b'id,title,x\n5,"x,y\n\n1,a,x\n7,b,5"\n2,b,x\n',
        AB | {"7": "b"}, [(2, "a quote swallows")]),
    "stray quotes": Case(b'id,title\n1,a\n5,"x" y\n6,"x"y"\n2,5" b\n',
        {"1": "a", "2": '5" b'}, [(3, "'\"'"), (4, "'\"'")]),
    "lone CR": Case(b"id,title\n1,a\r5,x\ry\n2,b\n", AB | {"5": "x"}, [(4, "found 1 fields")]),
    "NUL": Case(b"id,title\n1,a\x00z\n2,b\n", {"1": "a\0z", "2": "b"}),
    "no id": Case(b"id,title\n,x\n1,a\n  ,y\n2,b\n", AB,
        [(2, "no id: id is empty"), (4, "no id: id is empty")]),
    "not UTF-8": Case(b"id,title\n1,a\n5,caf\xe9\n2,b\n", AB,
        [(3, "byte 0xe9 is not utf-8; `encoding` names another")]),
    "cp1252": Case(b"id,title\n1,\x80\n2,\x81\n", {"1": "€"}, [(3, "0x81")],
        {"encoding": "cp1252"}),
    "header not in UTF-8": Case(b"id,title,caf\xe9\n1,a,x\n2,b,y", AB),
    "UTF-16": Case(WIDE.encode("utf-16"), {"1": "ä", "3": "𝄞"}, [(3, "found 3")]),
    "UTF-16 BE": Case(b"\xfe\xff" + WIDE.encode("utf-16-be"), {"1": "ä", "3": "𝄞"},
        [(3, "found 3")]),
    "UTF-16 without a mark": Case(WIDE.encode("utf-16-le"), {"1": "ä", "3": "𝄞"},
        [(3, "found 3")], {"encoding": "utf-16-le"}),
    "UTF-16 marked and named": Case(WIDE.encode("utf-16"), {"1": "ä", "3": "𝄞"},
        [(3, "found 3")], {"encoding": "utf-16-le"}),
    "UTF-32": Case(WIDE.encode("utf-32"), {"1": "ä", "3": "𝄞"}, [(3, "found 3")]),
    "half a pair in UTF-16": Case(
        "id,title\n1,a\n5,\ud800\n2,b\n".encode("utf-16", "surrogatepass"), AB, [(3, "")]),
    "gzip": Case(gzip.compress(b"id,title\n1,a\n5\n2,b\n"), AB, [(3, "found 1 fields")]),
    "gzip in two members": Case(gzip.compress(b"id,title\n1,a\n") + gzip.compress(b"2,b\n"), AB),
    "gzip of UTF-16": Case(gzip.compress("id,title\n1,a\n2,b\n".encode("utf-16")), AB),
}  # fmt: skip


@Given("case", CORPUS.values(), ids=CORPUS)
async def test_nasty_csv(world: World, case: Case) -> None:
    """Each odd file gives the records that a person sees in it, and says the line of the others."""
    run = await ingest(world, case.content, **case.block)
    assert (run.status, await titles(world)) == ("success", case.titles)
    found = await rejects(world)
    assert [place for place, _, _ in found] == [f"data.csv line {n}" for n, _ in case.rejects]
    for (_, reason, _), (_, words) in zip(found, case.rejects, strict=True):
        assert words in reason
    inserted = {"inserted": len(case.titles)} if case.titles else {}
    assert counts(run).get("failed", 0) == len(case.rejects)
    assert counts(run).items() >= inserted.items()


CANNOT: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "no such column": (b"sku;title\n1;a\n", {}, "has no column 'id'; there are: 'sku', 'title'"),
    "a field's column": (b"id,name\n1,a\n", {"fields": {"title": "nome"}}, "no column 'nome'"),
    "cut gzip": (gzip.compress(b"id,title\n1,a\n")[:-9], {}, "Compressed file ended"),
    "wrong gzip": (gzip.compress(b"id,title\n1,a\n")[:-8] + b"\0" * 8, {}, "CRC check failed"),
    "odd UTF-16": ("id,title\n1,a\n".encode("utf-16")[:-1], {}, "truncated data"),
    "not UTF-16": (b"id,title\n1,a", {"encoding": "utf-16"}, ""),
    "open quote in the header": (b'id,"title\n1,a\n', {}, "a quote is opened and never closed"),
}


@Given(("content", "block", "words"), CANNOT.values(), ids=CANNOT)
async def test_what_cannot_be_read_fails_the_run_and_says_why(
    world: World, content: bytes, block: dict[str, Any], words: str
) -> None:
    """A file that is none fails its run with its name and the reason, and nothing is written."""
    run = await ingest(world, content, **block)
    assert run.status == "failed"
    assert run.error_message is not None and words in run.error_message
    assert run.error_message.startswith("data.csv") and "defect" not in run.error_message
    assert await world.records() == {}
    [job] = await world.store.jobs(None, 10, 0)
    assert (job.status, job.last_error) == ("active", run.error_message)


async def test_empty_file_is_a_success_with_a_note(world: World) -> None:
    """Nothing in a file is no fault, but worth a word; what comes later is taken."""
    run = await ingest(world, b"")
    assert (run.status, counts(run), run.notes) == ("success", {}, ["data.csv is empty"])
    put(world, table([1]))
    assert counts(await again(world, 1)) == {"processed": 1, "inserted": 1}


@Given("size", [1 << 20, 5 << 20])
async def test_field_of_megabytes(world: World, size: int) -> None:
    """A field of 1 MB comes through whole, as does one that is longer than a chunk."""
    field = ("x" * 99 + "\n") * (size // 100)
    run = await ingest(world, f'id,title\n1,a\n2,"{field}"\n3,c\n')
    assert counts(run) == {"processed": 3, "inserted": 3}
    assert (await titles(world))["2"] == field


async def test_endless_line_is_rejected_and_the_next_one_taken(world: World) -> None:
    """A line of more than 16 MB costs itself alone, even behind an unclosed quote."""
    endless = "x" * (tecko.RECORD_BYTES + tecko.BLOCK_BYTES)
    run = await ingest(world, f'id,title\n1,a\n5,"x\n6,{endless}\n2,b\n')
    assert (run.status, await titles(world)) == ("success", AB)
    assert await places(world) == ["data.csv line 3", "data.csv line 4"]
    put(world, f'id,title\n1,a\n5,"x\n6,{endless}\n2,b\n3,c\n')
    await again(world, 1)
    assert await titles(world) == ABC


async def test_columns_renamed_are_noted(world: World) -> None:
    """No value is lost to a header that is empty or there twice, and the run says its new name."""
    run = await ingest(world, "id,,title,title,title_2\n1,a,b,c,d\n")
    found = (await world.records())["1"]["metadata"]
    assert found == {"column_2": "a", "title_2": "c", "title_2_2": "d"}
    assert [note.partition(" is called ")[2] for note in run.notes] == [
        "'column_2'", "'title_2'", "'title_2_2'"
    ]  # fmt: skip


async def test_cut_gzip_is_read_once_it_is_whole(world: World) -> None:
    """A truncated gzip fails its run; the whole one then gives every row, none doubled."""
    whole = gzip.compress(table(range(5000)).encode())
    run = await ingest(world, whole[: len(whole) // 2], path="data.csv")
    assert run.status == "failed"
    put(world, whole)
    run = await again(world, 1)
    assert (run.status, run.records_processed) == ("success", 3000)  # goes on behind the chunk
    assert await world.records() == {str(n): record for n, record in thousands(5000)}


def thousands(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """What `table` becomes."""
    for n in range(count):
        title = {"title": f"title {n}", "metadata": {}}
        yield n, {"source": "source", "source_id": str(n)} | title


# --- What the seed's system lost --------------------------------------------------------------


async def test_row_edited_in_the_middle_is_seen(world: World) -> None:
    """An edit in the middle of a file updates that row, and writes no other."""
    await ingest(world, table(range(100)))
    put(world, table(range(100)).replace("title 50", "edited"))
    run = await again(world, 1)
    assert counts(run) == {"processed": 100, "updated": 1, "unchanged": 99}
    assert written_at(world, world.clock()) == {"50"}
    assert (await titles(world))["50"] == "edited"


async def test_rows_added_on_top_are_seen(world: World) -> None:
    """A file that grows at its head (newest first) loses none, and writes only what is new."""
    await ingest(world, table(range(50, 0, -1)))
    put(world, table(range(52, 0, -1)))
    run = await again(world, 1)
    assert counts(run) == {"processed": 52, "inserted": 2, "unchanged": 50}
    assert written_at(world, world.clock()) == {"51", "52"}


async def test_shorter_file_in_its_place_is_read(world: World) -> None:
    """A file replaced by a shorter one is read from its head; what it lacks stays in /data."""
    await ingest(world, table(range(100)))
    put(world, table([7, 1000], "new"))
    run = await again(world, 1)
    assert counts(run) == {"processed": 2, "inserted": 1, "updated": 1}
    found = await titles(world)
    assert (len(found), found["7"], found["1000"], found["8"]) == (
        101, "new 7", "new 1000", "title 8"
    )  # fmt: skip


async def test_each_record_without_an_id_is_rejected(world: World) -> None:
    """The second record without an id is as much a reject as the first, even if they are alike."""
    run = await ingest(world, "id,title\n,x\n,x\n1,a\n")
    assert counts(run) == {"processed": 3, "inserted": 1, "failed": 2}
    assert await rejects(world) == [
        (f"data.csv line {n}", "no id: id is empty", {"id": "", "title": "x"}) for n in (2, 3)
    ]


async def test_every_row_of_a_file_with_a_mark_is_taken(world: World) -> None:
    """A byte order mark is no part of the first column's name, which is often the id."""
    run = await ingest(world, "\ufeff" + table(range(100)))
    assert counts(run) == {"processed": 100, "inserted": 100}
    assert raws(world)["0"] == ({"id": "0", "title": "title 0"}, True)


async def test_plain_dates_are_taken(world: World) -> None:
    """Rows with a date like 2024-01-15 are records like others, at midnight in UTC."""
    await ingest(world, "id,published_at\n1,2024-01-15\n2,\n")
    found = await world.records()
    assert found["1"]["published_at"] == "2024-01-15T00:00:00Z"
    assert "published_at" not in found["2"]


async def test_same_id_three_times(world: World) -> None:
    """Of three rows with one id the last wins, and the other two are counted as updates."""
    run = await ingest(world, "id,title\n1,x\n2,b\n1,y\n1,a\n")
    assert counts(run) == {"processed": 4, "inserted": 2, "updated": 2}
    assert await titles(world) == AB
    assert raws(world)["1"] == ({"id": "1", "title": "a"}, True)
    assert counts(await again(world, 1)) == {}


async def test_same_id_in_different_chunks(world: World) -> None:
    """The last of one id wins however far apart they stand."""
    run = await ingest(world, table(range(3000)) + "5,last\n")
    assert counts(run) == {"processed": 3001, "inserted": 3000, "updated": 1}
    put(world, table(range(3000)).replace("title 9\n", "edited\n") + "5,last\n")
    await again(world, 1)
    assert (await titles(world))["5"] == "last"


async def test_good_record_is_not_lost_to_a_bad_one_of_its_id(world: World) -> None:
    """A record that cannot be normalized costs itself, and no other record of the same id."""
    run = await ingest(world, "id,title,published_at\n1,a,2024-01-15\n1,x,never\n2,b,\n")
    assert (await titles(world), counts(run)["failed"]) == (AB, 1)
    assert counts(run) == {"processed": 3, "inserted": 2, "failed": 1}


@Given("key", ["k" * 300, "a\0b", "ключ", "𝄞", "00", " 7", "a,b\nc"])
async def test_odd_ids(world: World, key: str) -> None:
    """An id is kept to the letter: 300 characters, a NUL, other scripts, zeros, blanks."""
    text = io.StringIO()
    csv.writer(text).writerows([["id", "title"], [key, "a"], ["other", "b"]])
    await ingest(world, text.getvalue())
    assert await titles(world) == {key: "a", "other": "b"}
    put(world, text.getvalue() + "third,c\r\n")
    assert counts(await again(world, 1)) == {"processed": 1, "inserted": 1}


async def test_nul_byte_is_kept(world: World) -> None:
    """A NUL in a field reaches both tables, and the row can be found and updated."""
    await ingest(world, "id,content\n1,a\0b\n")
    assert raws(world)["1"][0]["content"] == "a\0b"
    put(world, "id,content\n1,a\0c\n")
    assert counts(await again(world, 1)) == {"processed": 1, "updated": 1}
    assert (await world.records())["1"]["content"] == "a\0c"


async def test_second_run_beside_one_is_refused(world: World) -> None:
    """Of two steps of one job at once one runs, and the other says so."""
    put(world, table(range(5000)))
    job_id = await world.ingest(type="csv", path="data.csv")
    one, other = await asyncio.gather(world.steps.step(job_id), world.steps.step(job_id))
    assert other.said == "a run goes on already"
    assert "5000 inserted" in one.said
    assert rows(world, "SELECT status, records_processed FROM etl_run") == [("success", 5000)]


async def test_failed_run_says_so_and_the_next_one_is_whole(world: World) -> None:
    """A missing file fails its run in etl_run and in the job; when it comes, all is well."""
    job_id = await world.ingest(type="csv", path="data.csv")
    run = await world.run(job_id)
    assert (run.status, run.error_message) == ("failed", "there is no file data.csv")
    assert (await world.get(job_id)).errors_in_row == 1
    put(world, table([1]))
    run = await again(world, job_id)
    job = await world.get(job_id)
    assert (run.status, job.errors_in_row, job.last_error) == ("success", 0, None)
    assert await world.store.last_failure() is not None


# --- Again: unchanged, appended, edited -------------------------------------------------------

KINDS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "no newline at the end": lambda text: text.encode().rstrip(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "UTF-16": lambda text: text.encode("utf-16"),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
    "with rejects": lambda text: (text + "ragged\n").encode(),
}


@Given("kind", KINDS)
async def test_unchanged_file_is_not_even_opened(world: World, kind: str) -> None:
    """A file as it was costs no read, whatever it is made of."""
    path = put(world, KINDS[kind](table(range(10))))
    world.clock.turn(HOUR)
    job_id = await world.ingest(type="csv", path="data.csv")
    with opened_files() as opened:
        await world.run(job_id)
        assert str(path) in opened
    with opened_files() as opened:
        run = await again(world, job_id)
    assert (run.status, counts(run)) == ("success", {})
    assert str(path) not in opened


@Given("kind", KINDS)
async def test_two_runs_write_nothing_the_second_time(world: World, kind: str) -> None:
    """A file that was only just written is looked at again, but no row is."""
    await ingest(world, KINDS[kind](table(range(10))))
    before = [written(world, name) for name in ("raw_data_csv", "normalized_data")]
    kept = await rejects(world)
    run = await again(world, 1)
    assert (run.status, run.records_inserted, run.records_updated) == ("success", 0, 0)
    assert [written(world, name) for name in ("raw_data_csv", "normalized_data")] == before
    assert await rejects(world) == kept


async def test_touched_file_is_known_by_its_hash(world: World) -> None:
    """A new time of change alone makes no row a new one: nothing of it is processed."""
    await ingest(world, table(range(10)))
    os.utime(world.config.base / "data.csv", (0, 0))
    world.clock.turn(HOUR)
    assert counts(await again(world, 1)) == {}


async def test_edit_that_keeps_size_and_time_is_seen(world: World) -> None:
    """An edit that sets size and mtime back is seen by the time that nobody can set."""
    path = put(world, table(range(10)))
    world.clock.turn(HOUR)
    job_id = await world.ingest(type="csv", path="data.csv")
    await world.run(job_id)
    before, until = path.stat(), time.monotonic() + PATIENCE
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock ticks slowly
        path.write_text(table(range(10)).replace("title 5", "tilte 5"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert time.monotonic() < until
    assert path.stat().st_size == before.st_size
    assert counts(await again(world, job_id)) == {"processed": 10, "updated": 1, "unchanged": 9}
    assert written_at(world, world.clock()) == {"5"}


def test_file_that_may_change_within_the_same_tick_has_no_identity(tmp_path: Path) -> None:
    """A file written this moment could be written again without a trace, whatever its mtime is."""
    path = tmp_path / "data.csv"
    path.write_text("id\n")
    now = path.stat().st_ctime
    assert tecko.identity_of(path.stat(), now) is None
    os.utime(path, (now - HOUR, now - HOUR))
    assert tecko.identity_of(path.stat(), now) is None
    later = path.stat().st_ctime + tecko.RACY_SECONDS
    assert tecko.identity_of(path.stat(), later) is not None


async def test_appended_rows_alone_are_read(world: World) -> None:
    """A file that grew is read from where it was left, however often."""
    job_id = 1
    assert counts(await ingest(world, table(range(2500))))["inserted"] == 2500
    for size in (2501, 2510, 6000):
        before = len(await world.records())
        put(world, table(range(size)))
        run = await again(world, job_id)
        assert counts(run) == {"processed": size - before, "inserted": size - before}
    assert await world.records() == {str(n): record for n, record in thousands(6000)}


@Given("block", [{"columns": ["id", "title"]}, {"skip": 1, "columns": ["id", "title"]}])
async def test_appended_rows_without_a_header(world: World, block: dict[str, Any]) -> None:
    """They alone are read, too, where `columns` names what the file does not."""
    run = await ingest(world, "1,a\n2,b\n", **block)
    put(world, "1,a\n2,b\n3,c\n")
    assert run.records_processed == 2 - block.get("skip", 0)
    assert counts(await again(world, 1)) == {"processed": 1, "inserted": 1}


async def test_reject_after_an_append_names_the_line(world: World) -> None:
    """Lines are counted on from where a file was left."""
    start = 'id,title\n1,"a\nz"\n'
    await ingest(world, start)
    put(world, start + "2,b\nragged\n")
    run = await again(world, 1)
    assert counts(run) == {"processed": 2, "inserted": 1, "failed": 1}
    assert await places(world) == ["data.csv line 5"]


ENDS = {  # what a writer had written when the file was read, and the rest of it
    "half a line": (b"1,a\n2", b",b\n3,c\n"),
    "half a field": (b"1,a\n2,", b"b\n3,c\n"),
    "no newline": (b"1,a\n2,b", b"\n3,c\n"),
    "half a CRLF": (b"1,a\r\n2,b\r", b"\n3,c\r\n"),
    "half a character": (b"1,a\n2,\xc3", b"\xa4\n3,c\n"),
    "half a quoted field": (b'1,a\n2,"b', b'"\n3,c\n'),
    "half a quoted field, a line of it": (b'1,a\n2,"b\n', b'z"\n3,c\n'),
    "half a quoted field, two lines of it": (b'1,a\n2,"b\ny\n', b'z"\n3,c\n'),
    "a quote that may be closed or doubled": (b'1,a\n2,"b"', b'"z"\n3,c\n'),
}


@Given(("start", "rest"), ENDS.values(), ids=ENDS)
async def test_file_read_while_it_is_written(world: World, start: bytes, rest: bytes) -> None:
    """Wherever a writer was when the file was read: the next run has every row as it ended up."""
    whole = b"id,title\n" + start + rest
    wanted = {row["id"]: row["title"] for row in csv.DictReader(io.StringIO(whole.decode(), ""))}
    await ingest(world, b"id,title\n" + start)
    put(world, whole)
    await again(world, 1)
    assert await titles(world) == wanted


async def test_header_read_while_it_is_written(world: World) -> None:
    """Half a header is drift that comes and goes, and costs no row."""
    await ingest(world, "id,ti")
    put(world, table(range(3)))
    run = await again(world, 1)
    assert counts(run) == {"processed": 3, "inserted": 3}
    assert (await titles(world))["2"] == "title 2"


async def test_gzip_that_grew_is_read_from_where_it_was_left(world: World) -> None:
    """What is packed is known by its text."""
    await ingest(world, gzip.compress(table(range(10)).encode()))
    put(world, gzip.compress(table(range(12)).encode()))
    run = await again(world, 1)
    assert counts(run) == {"processed": 2, "inserted": 2}


async def test_mend_of_a_bad_row_is_taken(world: World) -> None:
    """A row that was rejected is a record once it is mended; the reject of then goes."""
    await ingest(world, "id,title,published_at\n1,a,soon\n2,b,\n")
    assert await titles(world) == {"2": "b"}
    put(world, "id,title,published_at\n1,a,2024-01-15\n2,b,\n")
    assert counts(await again(world, 1)) == {"processed": 2, "inserted": 1, "unchanged": 1}
    assert await titles(world) == AB
    assert raws(world)["1"][1] and await places(world) == []


async def test_changed_mapping_renews_every_record(world: World) -> None:
    """Other fields make other records out of the same file, which is read again for that."""
    await ingest(world, "id,title,name\n1,a,x\n2,b,y\n", fields={})
    spec = {"type": "csv", "path": "data.csv", "fields": {"title": "name"}}
    new = tecko.parse(tecko.IngestSpec, {"name": "source", "poll_interval": 60, "ingest": spec})
    await world.store.update_job(1, lambda _: new, world.clock())
    assert counts(await again(world, 1)) == {"processed": 2, "updated": 2}
    assert await titles(world) == {"1": "x", "2": "y"}
    assert counts(await again(world, 1)) == {}


# --- Several files, and files behind URLs -----------------------------------------------------


async def test_glob_takes_every_file_and_each_on_its_own(world: World) -> None:
    """A glob is all its files, in order of their names; one that changes is the only one read."""
    put(world, table([1, 2]), "in/b.csv")
    put(world, "id;title\n3;c\nbad\n", "in/a.csv")
    put(world, table([9]), "in/c.txt")
    job_id = await world.ingest(type="csv", path="in/*.csv")
    assert counts(await world.run(job_id)) == {"processed": 4, "inserted": 3, "failed": 1}
    assert await places(world) == ["in/a.csv line 3"]
    put(world, table([1, 2, 4]), "in/b.csv")
    put(world, table([5]), "in/new.csv")
    assert counts(await again(world, job_id)) == {"processed": 2, "inserted": 2}
    assert {*await world.records()} == {"1", "2", "3", "4", "5"}


async def test_last_of_several_files_wins(world: World) -> None:
    """An id that is in several files has the record of the last one."""
    put(world, table([1], "a"), "a.csv")
    put(world, table([1], "b"), "b.csv")
    run = await world.run(await world.ingest(type="csv", path="?.csv"))
    assert counts(run) == {"processed": 2, "inserted": 1, "updated": 1}
    assert await titles(world) == {"1": "b 1"}


async def test_glob_in_depth_and_a_name_with_brackets(world: World) -> None:
    """`**` goes down into folders, and a file that is called like a pattern is that file."""
    put(world, table([1]), "in/a.csv")
    put(world, table([2]), "[x].csv")
    assert counts(await world.run(await world.ingest("deep", type="csv", path="**/a.csv")))
    assert counts(await world.run(await world.ingest("name", type="csv", path="[x].csv")))
    assert {*await world.records()} == {"1", "2"}


@Given("path", ["none/*.csv", "in", "é" * 200 + ".csv"])
async def test_no_file_fails_with_the_path(world: World, path: str) -> None:
    """A path with nothing behind it, a folder or a name that cannot be fails and names it."""
    (world.config.base / "in").mkdir()
    run = await world.run(await world.ingest(type="csv", path=path))
    assert (run.status, run.records_processed) == ("failed", 0)
    assert run.error_message is not None and path in run.error_message
    assert "defect" not in run.error_message


async def test_pipe_is_no_file(world: World) -> None:
    """A named pipe, on which an open waits for ever, fails the run and holds nobody up."""
    path = world.config.base / "data.csv"
    os.mkfifo(path)
    rescue = threading.Timer(1.0, lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
    rescue.start()  # where the program is caught in it, so that the test can end
    run = await world.run(await world.ingest(type="csv", path="*.csv"))
    assert rescue.is_alive(), "the program waited for somebody to write"
    rescue.cancel()
    assert run.status == "failed"


async def test_name_that_is_no_unicode(world: World) -> None:
    """A file's name may be any bytes; its rows are taken, and the run ends."""
    (world.config.base / os.fsdecode(b"\xff.csv")).write_text("id,title\n1,a\n2,b\nbad\n")
    run = await world.run(await world.ingest(type="csv", path="*.csv"))
    assert (run.status, run.records_failed) == ("success", 1)
    assert await titles(world) == AB


async def test_file_behind_a_url(world: World, source: standins.Source) -> None:
    """A URL is read like a file; unchanged, it costs one request and its answer of 304."""
    source.etags = source.dates = True
    url = source.file("/data.csv", table(range(10)).encode())
    job_id = await world.ingest(type="csv", path=url + "?key=1")
    assert counts(await world.run(job_id)) == {"processed": 10, "inserted": 10}
    run = await again(world, job_id)
    assert (run.status, counts(run), run.notes) == ("success", {}, [])
    assert len(source.asked("/data.csv")) == 2
    assert source.requests[1].headers["if-none-match"]
    assert source.requests[1].headers["if-modified-since"]
    source.file("/data.csv", (table(range(10)) + "bad\n").encode())
    assert counts(await again(world, job_id)) == {"processed": 1, "failed": 1}
    assert await places(world) == [f"{url} line 12"]


async def test_url_without_tags_is_known_by_its_hash(world: World, source: standins.Source) -> None:
    """A server that tells no change sends it all again; no row is processed for that."""
    url = source.file("/data.csv.gz", gzip.compress(table(range(10)).encode()))
    plain = source.file("/data.csv", table(range(10)).encode())
    for name, path in (("plain", plain), ("packed", url)):
        job_id = await world.ingest(name, type="csv", path=path)
        assert counts(await world.run(job_id)) == {"processed": 10, "inserted": 10}
        assert counts(await again(world, job_id)) == {}


BROKEN = {
    "truncated": (Fault.truncate(), ""),
    "reset": (Fault.reset(), ""),
    "error": (Fault.status(500), "said 500"),
    "refused": (Fault.status(403), "said 403: Forbidden"),
    "gone": (Fault.status(404), "said 404: "),
    "web page": (Fault.garbage(), "has no column 'id'"),
    "login": (Fault.redirect("/elsewhere"), "said 404"),
}


@Given(("fault", "words"), BROKEN.values(), ids=BROKEN)
async def test_download_that_breaks_off(
    hasty: World, source: standins.Source, fault: Fault, words: str
) -> None:
    """A download that fails or ends early writes nothing, and the next run has it all."""
    url = source.file("/data.csv", table(range(100)).encode())
    job_id = await hasty.ingest(type="csv", path=url)
    source.fault("GET /data.csv", fault)
    run = await hasty.run(job_id)
    assert (run.status, counts(run), await hasty.records()) == ("failed", {}, {})
    assert words in (run.error_message or "") and source.url in (run.error_message or "")
    assert counts(await again(hasty, job_id)) == {"processed": 100, "inserted": 100}


async def test_download_is_tried_again_from_its_start(
    tmp_path: Path, source: standins.Source, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """What came before a download broke off is no part of the next attempt in the same run."""
    made, close = await make_world(tmp_path, openai, keboola, {"RETRY_DELAY": "1"})
    url = source.file("/data.csv", table(range(3)).encode())
    half = Fault("truncate", code=200, body=table(range(100)).encode())
    source.fault("GET /data.csv", half)
    run = await made.run(await made.ingest(type="csv", path=url))
    assert (run.status, len(source.requests)) == ("success", 2)
    assert counts(run) == {"processed": 3, "inserted": 3}
    await close()


# --- Bad records ------------------------------------------------------------------------------


async def test_rejects_stand_in_the_order_of_the_file(world: World) -> None:
    """Whatever is wrong with a record, it is kept with its line, its reason and itself."""
    lines = [
        "id,title,published_at", "1,a,2024-01-15", ",x,", "ragged", "2,b,31.02.2024", "3,c,",
        "5,x,03/04/2024", '6,"x" y,', "7,\udce9,", "8,x,y,z", '9,"x,',
    ]  # fmt: skip
    run = await ingest(world, "\n".join(lines).encode(errors="surrogateescape"))
    assert counts(run) == {"processed": 10, "inserted": 2, "failed": 8}
    found = await rejects(world)
    assert [place for place, _, _ in found] == [
        f"data.csv line {n}" for n in (3, 4, 5, *range(7, 12))
    ]
    assert [record for _, _, record in found] == [
        {"id": "", "title": "x", "published_at": ""}, "ragged",
        {"id": "2", "title": "b", "published_at": "31.02.2024"},
        {"id": "5", "title": "x", "published_at": "03/04/2024"}, '6,"x" y,', "7,\\xe9,", "8,x,y,z",
        '9,"x,',
    ]  # fmt: skip
    assert found[2][1] == "published_at: found '31.02.2024'; allowed: a date"
    assert "`dates: dmy` or mdy decides" in found[3][1]
    said = f"8 of 10 records were rejected in the run of {tecko.iso(run.start_time)}: data rejects"
    assert (await world.get(1)).last_error == said


async def test_rejects_are_kept_once(world: World) -> None:
    """A bad record that is read again is the same reject; one that moved is another, and the old
    one goes."""
    await ingest(world, "id,title\nbad\n")
    put(world, "id,title\nbad\n1,a\n")
    await again(world, 1)
    put(world, "id,title\n1,a\nbad\n")
    run = await again(world, 1)
    assert counts(run) == {"processed": 2, "unchanged": 1, "failed": 1}
    assert await places(world) == ["data.csv line 3"]


async def test_bad_record_read_again_writes_nothing(world: World) -> None:
    """A record that could not be normalized, and is as it was, keeps its raw row as it is."""
    content = "id,title,published_at\n1,a,never\n"
    await ingest(world, content)
    before = written(world, "raw_data_csv")
    put(world, content.replace("\n1", "\n2,b,\n1"))
    run = await again(world, 1)
    assert counts(run) == {"processed": 2, "inserted": 1, "failed": 1}
    assert written(world, "raw_data_csv") == before | {"2": world.clock()}


async def test_raw_rows_are_as_received(world: World) -> None:
    """Raw rows hold the record as it came, and say whether it could be normalized."""
    await ingest(world, "id,title,published_at,x\n1,a,15.01.2024,\n2,b,never,7\n,c,,\n")
    assert raws(world) == {
        "1": ({"id": "1", "title": "a", "published_at": "15.01.2024", "x": ""}, True),
        "2": ({"id": "2", "title": "b", "published_at": "never", "x": "7"}, False),
    }
    assert {*await world.records()} == {"1"}


async def test_record_gone_bad_and_good_again(world: World) -> None:
    """A record that turns bad keeps its old form in /data; its raw row always is what came last."""
    good, bad = "id,title,published_at\n1,a,2024-01-15\n", "id,title,published_at\n1,x,never\n"
    await ingest(world, good)
    put(world, bad)
    assert counts(await again(world, 1)) == {"processed": 1, "failed": 1}
    assert (await titles(world), raws(world)["1"][0]["title"]) == ({"1": "a"}, "x")
    assert raws(world)["1"][1] is False
    put(world, good)
    await again(world, 1)
    assert (await titles(world), raws(world)["1"][0]["title"]) == ({"1": "a"}, "a")
    assert raws(world)["1"][1] is True


LIMITS: list[tuple[str, int, int, bool]] = [  # max_failed, good records, bad ones, too many
    ("0", 5, 0, False), ("0", 5, 1, True), ("3", 5, 3, False), ("3", 5, 4, True),
    ("10%", 9, 1, False), ("10%", 8, 1, True), ("0.1%", 999, 1, False), ("0.1%", 998, 1, True),
    ("0%", 5, 0, False), ("0%", 5, 1, True), ("99%", 0, 1, True),
]  # fmt: skip


@Given(("limit", "good", "bad", "too_many"), LIMITS)
async def test_max_failed(world: World, limit: str, good: int, bad: int, too_many: bool) -> None:
    """More rejects than `max_failed` allows, a number or a share, fail the run, which says so."""
    run = await ingest(world, table(range(good)) + "bad\n" * bad, max_failed=limit)
    said = f"{bad} of {good + bad} records were rejected; allowed: max_failed {limit}"
    assert (run.status, run.error_message) == (("failed", said) if too_many else ("success", None))
    assert (run.records_processed, run.records_failed) == (good + bad, bad)


async def test_share_is_judged_when_enough_were_seen(world: World) -> None:
    """Bad records at a file's head are no verdict on it; 2,000 with too many are, at once."""
    head = "id,title\n" + "bad\n" * 100
    rest = table(range(9900)).partition("\n")[2]
    assert (await ingest(world, head + rest, max_failed="5%")).status == "success"
    put(world, "id,title\n" + "bad\n" * 101 + rest, "worse.csv")
    run = await world.run(
        await world.ingest("worse", type="csv", path="worse.csv", max_failed="5%")
    )
    assert (run.status, run.records_processed, run.records_failed) == ("failed", 2000, 101)


async def test_run_failed_by_its_rejects_reads_all_again(world: World) -> None:
    """What failed by max_failed fails again as long as the file is so, and is whole once mended."""
    put(world, table(range(10)) + "bad\n")
    world.clock.turn(HOUR)
    job_id = await world.ingest(type="csv", path="data.csv", max_failed="0")
    for _ in range(2):
        run = await again(world, job_id)
        assert (run.status, run.records_processed, run.records_failed) == ("failed", 11, 1)
    put(world, table(range(11)))
    run = await again(world, job_id)
    assert (run.status, counts(run)) == (
        "success", {"processed": 11, "inserted": 1, "unchanged": 10}
    )  # fmt: skip


# --- Drift ------------------------------------------------------------------------------------

DRIFT = {"new": ("id,n,x\n2,2,y\n", "new field 'x'"), "gone": ("id\n2\n", "field 'n' is gone")}


@Given(("after", "note"), DRIFT.values(), ids=DRIFT)
async def test_drift_evolves(world: World, after: str, note: str) -> None:
    """A new or vanished field is noted on the run and in the log, once, and goes in."""
    await ingest(world, "id,n\n1,1\n")
    put(world, after)
    run = await again(world, 1)
    assert (run.status, run.notes, run.records_inserted) == ("success", [note], 1)
    assert f"source: {note}" in [row.message for row in await world.store.logs(1, 100)]
    put(world, after + after.partition("\n")[2].replace("2", "3", 1))
    assert (await again(world, 1)).notes == []


@Given(("after", "note"), DRIFT.values(), ids=DRIFT)
async def test_drift_is_frozen(world: World, after: str, note: str) -> None:
    """With `freeze` such a run fails before it writes, each time, until the file is as before."""
    await ingest(world, "id,n\n1,1\n", on_drift="freeze")
    put(world, after)
    for _ in range(2):
        run = await again(world, 1)
        assert (run.status, counts(run), run.notes) == ("failed", {}, [note])
        assert note in (run.error_message or "") and "freeze" in (run.error_message or "")
    assert {*raws(world)} == {"1"}
    put(world, "id,n\n2,2\n")
    assert counts(await again(world, 1)) == {"processed": 1, "inserted": 1}


async def test_what_is_no_drift(world: World) -> None:
    """Values of another type, none at all and moved columns freeze nothing."""
    await ingest(world, "id,n\n1,7\n", on_drift="freeze")
    put(world, "n,id\n,1\ntext,2\n2024-01-15,3\n")
    run = await again(world, 1)
    assert (run.status, run.notes) == ("success", [])


async def test_mapped_column_that_vanishes_is_drift(world: World) -> None:
    """Once known, a mapped column that is gone is drift, and its records are taken without it."""
    await ingest(world, "id,name\n1,a\n", fields={"title": "name"})
    put(world, "id,other\n2,b\n")
    run = await again(world, 1)
    assert (run.status, run.records_inserted) == ("success", 1)
    assert run.notes == ["new field 'other'", "field 'name' is gone"]


# --- Mapping and dates ------------------------------------------------------------------------


async def test_names_that_match_are_taken_without_fields(world: World) -> None:
    """Without `fields` columns named like unified fields fill them, and the rest is metadata."""
    await ingest(world, "id,Title,AUTHOR,url,price,empty\n1,a,me,https://x.example,3,\n")
    assert (await world.records())["1"] == {
        "source": "source", "source_id": "1", "title": "a", "author": "me",
        "url": "https://x.example", "metadata": {"price": "3", "empty": ""},
    }  # fmt: skip


async def test_fields_decide_over_names(world: World) -> None:
    """What `fields` maps goes there; a column of the same name that was passed over is metadata."""
    fields = {"title": "name", "description": "name", "published_at": "updated"}
    content = "sku,name,title,updated,category\ns,n,t,2024-01-15,c\n"
    await ingest(world, content, id="sku", fields=fields)
    assert (await world.records())["s"] == {
        "source": "source", "source_id": "s", "title": "n", "description": "n",
        "published_at": "2024-01-15T00:00:00Z", "category": "c", "metadata": {"title": "t"},
    }  # fmt: skip


async def test_id_may_be_a_unified_field(world: World) -> None:
    """The column of the id can be mapped too; it is not in the metadata."""
    await ingest(world, "url,x\nhttps://a.example,1\n", id="url", fields={"url": "url"})
    found = (await world.records())["https://a.example"]
    assert (found["url"], found["metadata"]) == ("https://a.example", {"x": "1"})


DAY, TEN = "2024-01-15T00:00:00Z", "2024-01-15T10:00:00Z"
DATES: list[tuple[str, str | None, str]] = [  # as written, `dates`, in UTC
    ("2024-01-15", None, DAY), ("2024-01-15T10:00:00Z", None, TEN),
    ("2024-01-15 10:00", None, TEN), ("2024-01-15T12:00:00+02:00", None, TEN),
    ("2024-01-15T05:00:00-0500", None, TEN), ("2024-01-15T10:00:00.250Z", None,
        "2024-01-15T10:00:00.250000Z"),
    ("20240115", None, DAY), ("20240115T100000Z", None, TEN), ("2024/01/15", None, DAY),
    ("2024-1-15", None, DAY), ("15.01.2024", None, DAY), ("15.1.2024 10:00", None, TEN),
    ("04.03.2024", None, "2024-03-04T00:00:00Z"), ("15/01/2024", None, DAY),
    ("01/15/2024", None, DAY), ("04/04/2024", None, "2024-04-04T00:00:00Z"),
    ("15 Jan 2024", None, DAY), ("January 15, 2024 10:00 AM", None, TEN),
    ("Mon, 15 Jan 2024 11:00:00 +0100", None, TEN), ("Mon, 15 Jan 2024 10:00:00 GMT", None, TEN),
    ("1705312800", None, TEN), ("1705312800.5", None, "2024-01-15T10:00:00.500000Z"),
    ("1705312800000", None, TEN), ("1705312800000000", None, TEN), (" 2024-01-15 ", None, DAY),
    ("1712051200000", None, "2024-04-02T09:46:40Z"),  # not the year 1712
    ("03/04/2024", "dmy", "2024-04-03T00:00:00Z"), ("03/04/2024", "mdy", "2024-03-04T00:00:00Z"),
    ("03-04-24", "dmy", "2024-04-03T00:00:00Z"), ("2024-01-02", "dmy", "2024-01-02T00:00:00Z"),
    ("2024/01/02", "dmy", "2024-01-02T00:00:00Z"), ("2024-1-2", "dmy", "2024-01-02T00:00:00Z"),
    ("2024/01/02 10:00", "mdy", "2024-01-02T10:00:00Z"),
]  # fmt: skip


@Given("order", [None, "dmy", "mdy"])
async def test_dates_as_people_write_them(world: World, order: str | None) -> None:
    """Dates in every common form are the same moment in UTC."""
    chosen = {text: wanted for text, how, wanted in DATES if how == order}
    text = io.StringIO()
    csv.writer(text).writerows([["id", "published_at"], *enumerate(chosen)])
    await ingest(world, text.getvalue(), **({"dates": order} if order else {}))
    found = await world.records()
    got = {text: found.get(str(n), {}).get("published_at") for n, text in enumerate(chosen)}
    assert got == chosen


NO_DATES = [
    "never", "03/04/2024", "3-4-2024", "3 4 2024", "1/2/3", "2024-13-01", "31.02.2024", "2024-01",
    "January 2024", "10:30", "12", "15 Jan 2024 EST", "9999-12-31T23:59:59-05:00",
    "0001-01-01T00:00:00+05:00", "9" * 400, "2024-01-15T10:00:00+99:00", "today", "-", "1e9",
]  # fmt: skip


async def test_what_is_no_date_is_rejected_not_guessed(world: World) -> None:
    """A date that is none, or that can be read in two ways, is a reject and stops nothing."""
    text = io.StringIO()
    csv.writer(text).writerows([["id", "published_at"], ["ok", ""], *enumerate(NO_DATES)])
    run = await ingest(world, text.getvalue())
    assert (run.status, run.error_message) == ("success", None)
    found = await world.records()
    guessed = {NO_DATES[int(key)]: found[key]["published_at"] for key in found if key != "ok"}
    assert (guessed, "ok" in found) == ({}, True)
    assert await places(world) == [f"data.csv line {n + 3}" for n in range(len(NO_DATES))]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=20),
        st.from_regex(r"[0-9./:TZ +-]{1,25}", fullmatch=True),
        st.lists(st.sampled_from("2024 01 1 Jan Mon T 10:00 pm + - / . , Z 99 am".split())).map(
            " ".join
        ),
        st.integers(), st.floats(), st.booleans(), st.none(),
    ),
    st.sampled_from([None, "dmy", "mdy"]),
)  # fmt: skip
def test_no_date_is_more_than_a_value_error(value: Any, order: str | None) -> None:
    """Whatever stands where a date belongs: it is a moment in UTC, or refused."""
    try:
        found = tecko.utc_text(value, order)
    except ValueError:
        return
    assert found.endswith("Z")
    assert tecko.utc_text(found, order) == found


# --- Properties -------------------------------------------------------------------------------

SOURCE = tecko.CsvSource.model_validate({"type": "csv", "path": "data.csv"})
COLUMNS = ["id", "title", "other"]
FIELD = st.text(st.characters(codec="utf-8"), max_size=8) | st.text("\",;\t| \n\r'\0xé", max_size=8)


class Table(NamedTuple):
    """Rows, and the file that csv.writer made of them."""

    rows: list[list[str]]
    content: bytes


@st.composite
def tables(draw: st.DrawFn, *, plain: bool = False) -> Table:
    """Any text in any dialect and encoding (`plain`: as files that grow have them); behind rows
    that move it to the ends of chunks, by their number or by their size, and of blocks."""
    many, width = draw(st.sampled_from([(0, 0)] * 9 + [(1995, 1), (1995, 258), (16, 262_100)]))
    rows = [[f"p{n}", "x" * width, ""] for n in range(many + draw(st.integers(0, 9)))]
    fields = draw(st.lists(st.tuples(FIELD, FIELD), max_size=6))
    rows += [[f"r{n}", *row] for n, row in enumerate(fields)]
    rows += [[f"q{n}", "y", "z"] for n in range(draw(st.integers(0, 9)))]
    end = draw(st.sampled_from(["\n", "\r\n"] if plain else ["\n", "\r\n", "\r"]))
    text = "".join(field for row in rows for field in row)
    assume(end != "\r" or "\n" not in text)
    bare = any(c in text and c not in end for c in "\r\n")  # which the writer leaves unquoted
    file = io.StringIO(newline="")
    writer = csv.writer(
        file,
        delimiter=draw(st.sampled_from(",;\t|")),
        lineterminator=end,
        quoting=csv.QUOTE_ALL if bare or draw(st.booleans()) else csv.QUOTE_MINIMAL,
    )
    writer.writerows([COLUMNS, *rows])
    encodings = ["utf-8", "utf-8-sig"] if plain else ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
    shown = file.getvalue().removesuffix(end if draw(st.booleans()) else "")
    return Table(rows, shown.encode(draw(st.sampled_from(encodings))))


def read(content: bytes, state: Mapping[str, Any] = MappingProxyType({})) -> list[tecko.Fetched]:
    """Read a file from where `state` left it to its end."""
    fetched = []
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with open(file.name, "rb") as opened:
            reader = tecko.CsvFile(opened, "data.csv", SOURCE, growing=False)
            _ = state and reader.resume(state)
            while not reader.ended:
                fetched.append(reader.read())
    return fetched


def records_in(fetched: Iterable[tecko.Fetched]) -> list[list[str]]:
    return [[*record.values()] for _, record in numbered(fetched)]


def numbered(fetched: Iterable[tecko.Fetched]) -> list[tuple[int, dict[str, str]]]:
    """Records with their lines' numbers."""
    return [record for some in fetched for record in some.records]


@settings(max_examples=40, deadline=None)
@given(tables(), st.booleans())
def test_what_csv_writes_is_what_is_read(table: Table, packed: bool) -> None:
    """Any table in any dialect and encoding is read back to the letter, wherever chunks end."""
    fetched = read(gzip.compress(table.content, 1) if packed else table.content)
    assert records_in(fetched) == table.rows
    assert not [rejected for some in fetched for rejected in some.rejects]
    assert all(len(some.records) <= tecko.CHUNK_ROWS for some in fetched)


A_CHUNK_WITHOUT_AN_END = Table(
    [[f"k{n}", "", ""] for n in range(tecko.CHUNK_ROWS)],
    b"id,title,other" + b"".join(b"\nk%d,," % n for n in range(tecko.CHUNK_ROWS)),
)


@settings(max_examples=30, deadline=None)
@given(tables(plain=True))
@example(A_CHUNK_WITHOUT_AN_END)
def test_resumed_anywhere_nothing_is_lost_or_doubled(table: Table) -> None:
    """From the state after any chunk the rest of a file is read: all of it, and nothing else but a
    last line without an end, which may have grown."""
    fetched = read(table.content)
    again = [] if table.content.endswith(b"\n") else numbered(fetched)[-1:]
    for at, some in enumerate(fetched, 1):
        assert numbered(read(table.content, some.state)) == (numbered(fetched[at:]) or again)


@settings(max_examples=60, deadline=None)
@given(tables(plain=True), st.data())
def test_file_cut_anywhere_is_whole_after_the_next_run(table: Table, data: st.DataObject) -> None:
    """A file that is read while it is written, up to any byte, has every row once it is whole."""
    header, end = table.content.find(b"\n") + 1 or len(table.content), len(table.content)
    cut = data.draw(st.integers(header, end) | st.integers(max(header, end - 60), end))
    first = read(table.content[:cut])
    second = read(table.content, first[-1].state)
    found = {row[0]: row for row in records_in([*first, *second])}
    assert [found.get(row[0]) for row in table.rows] == table.rows


@Given(
    ("begin", "kind"),
    [
        (b"7z\xbc\xaf\x27\x1c\0\x04", "packed by 7-Zip"),
        (b"Rar!\x1a\x07\x01\0", "packed by RAR"),
        (b"BZh91AY&SY", "packed by bzip2"),
        (b"\xfd7zXZ\0", "packed by xz"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"PAR1\x15\x04", "a Parquet file"),
    ],
)
async def test_what_is_no_csv_file_is_named(world: World, begin: bytes, kind: str) -> None:
    """A file of another kind under a CSV's name fails the run by what it is; nothing is taken."""
    run = await ingest(world, begin + b"\x80" * 300)
    assert run.status == "failed" and f"is no CSV file, but {kind}" in str(run.error_message)
    assert await world.records() == {}
