"""The documents say what the program does: README, jobs.yaml.example, requirements, the unit."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import teckochecker as tecko

ROOT = Path(tecko.__file__).resolve().parent
README = ROOT / "README.md"
UNIT = ROOT / "teckochecker.service"
EXAMPLE = (ROOT / "jobs.yaml.example").read_text()
MODELS = (
    tecko.JobsFile,
    tecko.AdminBlock,
    tecko.AlertTarget,
    tecko.SecretRef,
    tecko.JobSpec,
    tecko.OpenAIBatches,
    tecko.KeboolaTrigger,
    tecko.IngestSpec,
    tecko.CsvSource,
    tecko.ApiSource,
    tecko.Paging,
    tecko.Since,
)
YAML_KEYS = sorted({name for model in MODELS for name in model.model_fields})
PACKAGE_OF = {"yaml": "pyyaml", "dotenv": "python-dotenv"}  # where import and package differ


def readme() -> str:
    return README.read_text() if README.exists() else ""


def says(text: str, words: str) -> bool:
    """Whether the words stand in a text as they are, not as a part of longer ones."""
    return re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", text) is not None


def parsers(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, str]]:
    """Every command with each of its options, like "-c --config"; "" for the command itself."""
    if path:
        yield path, ""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from parsers(sub, f"{path} {name}".strip())
        if "--help" not in action.option_strings and action.option_strings:
            yield path, " ".join(action.option_strings)


COMMANDS = sorted(set(parsers(tecko.make_parser())))


@pytest.mark.parametrize("command", sorted({c for c, _ in COMMANDS if c not in ("", "secret")}))
def test_every_command_is_in_the_readme(command: str) -> None:
    """A command that a user cannot read about does not exist for them."""
    assert says(readme(), command)


@pytest.mark.parametrize("option", sorted({option for _, option in COMMANDS if option}))
def test_every_option_is_in_the_readme(option: str) -> None:
    """Options of every command, those that all share included, by their long or short name."""
    assert any(says(readme(), name) for name in option.split())


@pytest.mark.parametrize("name", [*tecko.ENVIRONMENT, "DATABASE_URL"])
def test_every_setting_is_in_the_readme(name: str) -> None:
    """Environment variables, by their full names."""
    assert says(readme(), name)


@pytest.mark.parametrize(
    "path", sorted({path for route in tecko.ROUTES for path in (route.path, route.also) if path})
)
def test_every_route_is_in_the_readme(path: str) -> None:
    """Paths of the HTTP surface."""
    assert re.search(rf"(?<![\w/]){re.escape(path)}(?![\w/])", readme())


@pytest.mark.parametrize("key", YAML_KEYS)
def test_every_yaml_key_is_in_readme_and_example(key: str) -> None:
    """Keys of jobs.yaml at every depth."""
    assert re.search(rf"\b{key}:", EXAMPLE)
    assert says(readme(), key)


def test_the_example_loads_as_it_is() -> None:
    """Who copies jobs.yaml.example has a good file, which uses every key but `file`."""
    config = tecko.load_config(ROOT / "jobs.yaml.example", {})
    assert config.problems == []
    [job] = config.jobs or []
    assert isinstance(job, tecko.JobSpec)
    assert job.model_fields_set == set(tecko.JobSpec.model_fields)
    assert job.watch.model_fields_set == set(tecko.OpenAIBatches.model_fields)
    assert job.trigger.model_fields_set == set(tecko.KeboolaTrigger.model_fields)


def test_the_ingests_of_the_example_load_when_they_are_taken_in(tmp_path: Path) -> None:
    """They stand behind a `#`, since they would fetch; without it they use every key there is."""
    lines = EXAMPLE.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("# - name:"))
    text = "\n".join([*lines[:begin], *(f" {line[1:]}" for line in lines[begin:])])
    (tmp_path / "jobs.yaml").write_text(text)
    config = tecko.load_config(tmp_path / "jobs.yaml", {})
    assert config.problems == []
    both = [job.ingest for job in config.jobs or [] if isinstance(job, tecko.IngestSpec)]
    assert [job.type for job in both] == ["csv", "api"]
    for source in (tecko.CsvSource, tecko.ApiSource):
        used = {key for job in both for key in job.model_fields_set}
        assert set(source.model_fields) <= used


def test_the_example_explains_every_key() -> None:
    """A key with a value has a comment on its line, where it first stands at the latest."""
    keys: dict[str, str] = {}
    for line in EXAMPLE.splitlines():
        if found := re.match(r"\s*(?:- )?(\w+): +[^#\s]", line):
            keys.setdefault(found[1], line)
    assert {"poll_interval", "trigger_when", "stack_url", "on_ambiguous"} <= keys.keys()
    assert [line for line in keys.values() if " # " not in line] == []


# ── Command lines in the README ───────────────────────────────────────────────────────────────


def shell_words(line: str) -> list[list[str]]:
    """The simple commands of a shell line: comments dropped, split at pipes, && and ;"""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def readme_commands() -> list[str]:
    """Every call of teckochecker.py in a ```sh block, as its arguments."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", readme(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for words in shell_words(line.removeprefix("$ ")):
            names = [Path(word).name for word in words if not re.match(r"[A-Z_]+=", word)]
            if "teckochecker.py" in names[:1] or re.match(
                r"python\S* teckochecker", " ".join(names)
            ):
                place = [Path(word).name for word in words].index("teckochecker.py")
                found.append(shlex.join(words[place + 1 :]))
    return found


def usage_error(arguments: str) -> str:
    """What the parser has against these arguments; nothing when it takes them."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            tecko.make_parser().parse_args(shlex.split(arguments))
        except SystemExit as e:
            return said.getvalue() if e.code else ""
    return ""


def test_the_readme_shows_commands() -> None:
    """The blocks are found: else the next test could not fail."""
    shown = {line.split()[0] for line in readme_commands() if line}
    assert {"init", "start", "secret", "job"} <= shown


def test_the_parser_takes_every_command_line_of_the_readme() -> None:
    """No command line in the README is wrong usage."""
    assert usage_error("job fly") != "" and usage_error("job list --json") == ""
    assert {line: said for line in readme_commands() if (said := usage_error(line))} == {}


# ── Requirements ──────────────────────────────────────────────────────────────────────────────


OPTIONAL = {"psycopg", "apprise"}  # imported where DATABASE_URL or `alerts:` asks for it


def required() -> set[str]:
    """The packages of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[^\w.-]", line.strip())[0] for line in lines if line.strip()]
    return {name.lower() for name in names if name}


def imported() -> set[str]:
    """The packages that the program imports beyond the standard library, anywhere in the file."""
    tops = set()
    for node in ast.walk(ast.parse((ROOT / "teckochecker.py").read_text())):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            tops.add(str(node.module).partition(".")[0])
    names = {top.replace("_", "-") for top in tops - sys.stdlib_module_names}
    return {PACKAGE_OF.get(name, name) for name in names}


def test_requirements_are_what_is_imported() -> None:
    """Nothing is missing for a fresh installation, and nothing is installed for nothing."""
    assert required() == imported() - OPTIONAL


@pytest.mark.parametrize("package", sorted(required()))
def test_every_requirement_is_explained(package: str) -> None:
    """A comment beside it says what it is for."""
    [line] = [
        x
        for x in (ROOT / "requirements.txt").read_text().splitlines()
        if re.match(rf"{package}\W", x)
    ]
    assert len(line.partition("#")[2].split()) >= 3


# ── The unit ──────────────────────────────────────────────────────────────────────────────────


def unit_values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_starts_what_there_is() -> None:
    """ExecStart is a command line that the parser takes, the settings are known ones, and the
    port that may be bound is the default one."""
    [start] = unit_values("ExecStart")
    assert usage_error(start.partition("teckochecker.py ")[2]) == ""
    names = {value.partition("=")[0] for value in unit_values("Environment")}
    assert names <= {*tecko.ENVIRONMENT, "DATABASE_URL", "PYTHONFAULTHANDLER"}
    assert unit_values("SocketBindAllow") == [
        f"tcp:{tecko.AdminBlock.model_fields['port'].default}"
    ]
    assert unit_values("Type") == ["notify"]


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A copy of the unit whose ExecStart exists on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    text = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    (tmp_path / UNIT.name).write_text(text)
    return tmp_path / UNIT.name


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_systemd_has_nothing_to_say_about_the_unit(unit: Path) -> None:
    """`systemd-analyze verify` knows every directive and finds no fault."""
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_hardly_exposed(unit: Path) -> None:
    """`systemd-analyze security` shows an exposure of at most 1.3."""
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= 1.3
