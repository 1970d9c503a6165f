"""Set-up: what installs the program, and what `init` asks on a terminal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import standins
from conftest import PROGRAM, clean_environment, run_program
from test_cli import Terminal, Told, run_many

import teckochecker as tecko

ROOT = PROGRAM.parent

# ── Installed ─────────────────────────────────────────────────────────────────────────────────


def test_uv_finds_what_requirements_say() -> None:
    """The head of the file (PEP 723) names the same packages, for `uv run teckochecker.py`."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", PROGRAM.read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    head = tomllib.loads(re.sub("(?m)^# ?", "", block[1]))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    assert head["dependencies"] == [line for line in wanted if line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert head["requires-python"] == project["requires-python"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip install .` into a fresh virtual environment, which sees the packages of this one; its
    folder of commands."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "clone/tests").mkdir(parents=True)  # pip would build in the folder itself
    parts = ("teckochecker.py", "pyproject.toml", "README.md", "requirements.txt")
    for name in (*parts, "tests/demo.py", "tests/standins.py"):
        shutil.copy(ROOT / name, folder / "clone" / name)
    venv.create(folder / "venv", symlinks=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(here))
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv"), "install", *options]
    subprocess.run([*pip, str(folder / "clone")], check=True, timeout=60)
    return folder / "venv/bin"


def run_installed(
    bin: Path, line: str, cwd: Path, env: dict[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"} | env
    return subprocess.run(
        ["bash", "--norc", "-c", line],
        cwd=cwd,
        env=clean_environment(path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pip_installs_a_command(installed: Path, tmp_path: Path) -> None:
    """`teckochecker` is on PATH, needs what requirements.txt says, brings the demo's stand-ins,
    and its hints name itself."""
    said = run_installed(installed, "teckochecker --version; teckochecker validate", tmp_path)
    assert said.stdout == f"TeckoChecker {tecko.VERSION}\n"
    assert "hint: teckochecker init writes one\n" in said.stderr
    [facts] = installed.parent.glob("lib/*/site-packages/teckochecker-*/METADATA")
    needs = re.findall(r"^Requires-Dist: ([\w-]+)", facts.read_text(), re.MULTILINE)
    assert {"openai", "shtab"} <= {*needs} and len(needs) == 13
    there = {file.name for file in facts.parents[1].glob("teckochecker_demo/*.py")}
    assert there == {"demo.py", "standins.py"}


@pytest.mark.parametrize("line", ["python -X dev", "absolute"])
def test_a_hint_can_be_pasted(tmp_path: Path, line: str) -> None:
    """Whatever the program was started by, the command of a hint starts it, too."""
    (tmp_path / "teckochecker.py").symlink_to(PROGRAM)
    start = f"{sys.executable} {PROGRAM}" if line == "absolute" else f"{line} teckochecker.py"
    bin = Path(sys.executable).parent
    said = run_installed(bin, f"{start} validate", tmp_path)
    [hint] = re.findall(r"^hint: (.*) init writes one$", said.stderr, re.MULTILINE)
    again = run_installed(bin, f"{hint} --version", tmp_path)
    assert again.stdout == f"TeckoChecker {tecko.VERSION}\n"


# ── Completed ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two secrets, a job, and one whose name a shell would expand."""
    folder = tmp_path_factory.mktemp("stocked")
    target = "--keboola-secret kbc --keboola-stack https://x.keboola.com --component-id c"
    create = f"job create --openai-secret prod --config-id 1 {target} --name"
    done = run_many(
        folder,
        [
            "init",
            Told("secret add --name prod --type openai", typed="sk-12345678"),
            Told("secret add --name kbc --type keboola", typed="12345678"),
            f"{create} nightly --batch-id batch_1",
            f"{create} '$(touch owned)' --batch-id batch_2",
        ],
    )
    assert [each.code for each in done] == [0] * 5
    return folder


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("job show ", {"nightly"}),
        ("job create --openai-secret ", {"prod", "kbc"}),
        ("secret delete k", {"kbc"}),
        ("data list --source ", set[str]()),
    ],
)
def test_bash_completes_names(installed: Path, stocked: Path, line: str, replies: set[str]) -> None:
    """Jobs and secrets of the database; what a shell would expand is not among them."""
    words = " ".join(map(repr, line.split(" ")))
    script = f"""
        source <(teckochecker completion bash)
        COMP_WORDS=(teckochecker {words}) COMP_CWORD={len(line.split(" "))}
        $(complete -p teckochecker | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    said = run_installed(installed, script, stocked)
    assert ({*said.stdout.split()}, said.stderr) == (replies, "")
    assert not (stocked / "owned").exists()


def test_every_shell_asks_for_names(tmp_path: Path) -> None:
    """A script belongs to the installed command and asks it; asking makes nothing."""
    kinds, shells = ("jobs", "secrets", "sources"), ("bash", "zsh", "fish")
    done = run_many(tmp_path, [f"completion {word}" for word in (*shells, *kinds)])
    for script in done[:3]:
        assert re.search(r"(complete.*|compdef.*|-c) teckochecker\b", script.out)
        for what in kinds:
            assert f"teckochecker completion {what} 2>/dev/null" in script.out
    assert [(each.code, each.out.strip(), each.err) for each in done[3:]] == [(0, "", "")] * 3
    assert list(tmp_path.iterdir()) == []


# ── init on a terminal ────────────────────────────────────────────────────────────────────────

KEY, TOKEN = standins.OPENAI_KEY.encode(), standins.KEBOOLA_TOKEN.encode()
FILES = {"teckochecker.key", "teckochecker.db", "jobs.yaml"}


def interview(
    folder: Path, openai: standins.OpenAI, steps: Sequence[tuple[bytes, Any]]
) -> tuple[int, str, str]:
    """`init` on a terminal, where each answer is typed when its question is there; None is
    Ctrl-C."""
    *before, (after, typed) = steps
    terminal = Terminal(folder, "init", {"OPENAI_BASE_URL": openai.base_url})
    number = signal.SIGINT if typed is None else None  # the terminal is not the process's own
    return terminal.run(typed or b"", after, number, before=before)


def questions(keboola: standins.Keboola) -> list[tuple[bytes, bytes]]:
    """All of them, each with an answer, the first one wrong where one can be."""
    return [
        (b"OpenAI key", b"sk-wrong-key-0123\n"),
        (b"OpenAI key", KEY + b"\n"),
        (b"Batches", b"7\n"),
        (b"Batches", b"2, 1\n"),
        (b"Keboola stack", b"nowhere\n"),
        (b"Keboola stack", keboola.url.encode() + b"\n"),
        (b"Keboola token", TOKEN + b"\n"),
        (b"Number", b"2\n"),
    ]


def test_init_asks_and_writes_what_works(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola
) -> None:
    """The keys are stored and not shown, batches and configuration are chosen by number, and
    `check` runs with what was written."""
    openai.batch("batch_old", "completed")
    openai.batch("batch_new", "in_progress")
    keboola.only_configurations = {("app.a", "11"), ("app.b", "22")}
    code, screen, out = interview(tmp_path, openai, questions(keboola))
    assert code == 0 and "checked" in out and "secret add" not in out, screen + out
    assert not any(key in screen + out for key in (standins.OPENAI_KEY, standins.KEBOOLA_TOKEN))
    [job] = tecko.load_config(tmp_path / "jobs.yaml", {}).jobs or []
    assert isinstance(job, tecko.JobSpec)
    assert {*job.watch.batch_ids} == {"batch_old", "batch_new"}
    assert (job.trigger.component_id, job.trigger.configuration_id) in keboola.only_configurations
    env = {"OPENAI_BASE_URL": openai.base_url}
    assert run_program("check", cwd=tmp_path, env=env).returncode == 0
    assert keboola.created == []


def test_every_question_can_be_skipped(tmp_path: Path, openai: standins.OpenAI) -> None:
    """Then jobs.yaml is an example, which loads, and loads too when its # are taken away."""
    skipped = [(word, b"\n") for word in (b"OpenAI key", b"Keboola stack", b"Keboola token")]
    code, screen, out = interview(tmp_path, openai, skipped)
    assert code == 0 and "secret add --name openai-prod" in out, screen
    assert {*FILES} == {file.name for file in tmp_path.iterdir()}
    text = (tmp_path / "jobs.yaml").read_text()
    assert tecko.load_config(tmp_path / "jobs.yaml", {}).problems == []
    (tmp_path / "jobs.yaml").write_text(re.sub("(?m)^#(?=  )", "", text))
    config = tecko.load_config(tmp_path / "jobs.yaml", {})
    assert (len(config.jobs or ()), len(config.secrets), config.problems) == (1, 2, [])


@pytest.mark.parametrize("number", [0, 3, 5, 7])
def test_ctrl_c_at_a_question_leaves_nothing(
    tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola, number: int
) -> None:
    """Exit code 130, a word, and an empty folder."""
    openai.batch("batch_1", "completed")
    openai.batch("batch_2", "completed")
    keboola.only_configurations = {("app.a", "11"), ("app.b", "22")}
    *before, (question, _) = questions(keboola)[: number + 1]
    code, screen, _ = interview(tmp_path, openai, [*before, (question, None)])
    assert (code, "nothing was made" in screen, "Traceback" in screen) == (130, True, False)
    assert list(tmp_path.iterdir()) == []
