"""The demo as its user meets it: two runs at once, one that ends and one that goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, clean_environment
from test_cli import Terminal
from warm import Program

LIMIT = 60.0  # s in which the demo promises to end; it takes about eight


class Demo:
    """A `demo` under way in a folder of its own."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.output = folder / "cwd", folder / "output"
        self.temporary = folder / "tmp"
        self.folder.mkdir()
        self.temporary.mkdir()
        with self.output.open("w") as file:
            self.process = Program(
                *("demo", *args),
                cwd=self.folder,
                env=clean_environment({"TMPDIR": str(self.temporary)}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.DEVNULL if "--json" in args else subprocess.STDOUT,
            )

    def shows(self, words: str) -> str:
        """What it has printed by the time that it shows these words."""
        until = time.monotonic() + LIMIT
        while words not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)
        return self.output.read_text()

    def curl(self, path: str) -> Any:
        """The answer to the printed curl line for this path, which has nothing but a URL."""
        [url] = re.findall(rf"^ *curl (http://\S+{path})$", self.output.read_text(), re.MULTILINE)
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
            return json.load(answer)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Demo, Demo, Demo]]:
    """`demo`, `demo --keep` and `--json demo`, side by side since each takes its time."""
    running = [
        Demo(tmp_path_factory.mktemp("ends")),
        Demo(tmp_path_factory.mktemp("keeps"), "--keep"),
        Demo(tmp_path_factory.mktemp("json"), "--json"),
    ]
    try:
        yield running[0], running[1], running[2]
    finally:
        for demo in running:
            demo.process.kill()
            demo.process.wait(10)


def test_the_demo_ends_by_itself_and_shows_what_happened(demos: tuple[Demo, Demo, Demo]) -> None:
    """Exit code 0 within its minute; all three batch jobs are followed to their ends, both Keboola
    jobs are named with their variables, and the file's change is seen."""
    demo, _, _ = demos
    assert demo.process.wait(LIMIT) == 0
    said = demo.output.read_text()
    assert re.search(r"^ *[\d.]+ s +nightly +completed ", said, re.MULTILINE)
    assert re.search(r"^ *[\d.]+ s +three-parts +completed ", said, re.MULTILINE)
    assert re.search(r"^ *[\d.]+ s +bad-input +failed ", said, re.MULTILINE)
    assert "ingested: 25 inserted" in said and "ingested: 1 inserted, 1 updated" in said
    received = re.findall(r"^ *job \d+: teckochecker_job=(\S+),", said, re.MULTILINE)
    assert sorted(received) == ["nightly", "three-parts"]
    assert "OK: 2 Keboola jobs started" in said and "Traceback" not in said
    assert "curl " not in said, "its addresses are gone when it has ended"
    assert max(map(len, said.partition("Next, ")[0].splitlines())) <= 80
    assert said.endswith(f"{PROGRAM} init\n")


def test_the_demo_leaves_nothing_behind(demos: tuple[Demo, Demo, Demo]) -> None:
    """Its throw-away store is gone, and nothing was written where it was called."""
    demo, _, _ = demos
    demo.process.wait(LIMIT)
    assert [*demo.temporary.iterdir()] == [*demo.folder.iterdir()] == []


def test_the_demo_as_a_document(demos: tuple[Demo, Demo, Demo]) -> None:
    """With --json stdout is one document: what became of each job, and what Keboola received."""
    _, _, demo = demos
    assert demo.process.wait(LIMIT) == 0
    told = json.loads(demo.output.read_text())
    assert told["ok"] and told["wrong"] == [] and told["jobs"]["bad-input"] == "failed"
    assert [values["teckochecker_job"] for values in told["received"]] == ["nightly", "three-parts"]


def test_the_demo_can_be_kept_and_looked_at(demos: tuple[Demo, Demo, Demo]) -> None:
    """--keep serves on: the curl lines that it printed answer."""
    _, demo, _ = demos
    demo.shows("Ctrl-C")
    assert demo.curl("/health")["status"] == "healthy"
    stats = demo.curl("/stats")
    assert (stats["total_jobs"], stats["completed_jobs"], stats["failed_jobs"]) == (5, 2, 1)
    assert (stats["total_records"], demo.curl("/data")["total_count"]) == (29, 29)


def test_ctrl_c_ends_a_kept_demo(demos: tuple[Demo, Demo, Demo]) -> None:
    """SIGINT: exit code 0, and no traceback."""
    _, demo, _ = demos
    demo.shows("Ctrl-C")
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(15) == 0
    assert "Traceback" not in demo.output.read_text()


def test_a_terminal_shows_one_line_a_job(tmp_path: Path) -> None:
    """It is drawn anew, with bars, within 80 columns; Ctrl-C ends it with 130 and a word."""
    terminal = Terminal(tmp_path, "demo", {"COLUMNS": "100"}, stdout_too=True)
    code, screen, _ = terminal.run(b"", b"in_progress", signal.SIGINT)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    rows = [row.rstrip() for row in plain.replace("\r", "\n").splitlines() if row.strip()]
    assert max(map(len, rows)) <= 80
    assert any(re.match("nightly +● active +[━╸╺ ]+batch_nightly in_progress", row) for row in rows)
    assert (code, rows[-1], "Traceback" in screen) == (130, "stopped", False)
