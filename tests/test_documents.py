"""The documents say what the program does: README, jobs.yaml.example, requirements, the unit."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import standins
from conftest import clean_environment
from test_cli import until

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


def blocks(language: str) -> list[str]:
    """The README's blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme(), re.DOTALL | re.MULTILINE)


STARTERS = {"sudo", "uv", "uvx", "run", "--from", ".", "python"}


def readme_commands() -> list[str]:
    """Every call of TeckoChecker in a ```sh block, as its arguments."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for words in shell_words(line):
            names = [Path(word).name for word in words if not re.match(r"[A-Z_]+=", word)]
            while names and names[0] in STARTERS:
                names.pop(0)
            if names and names[0] in ("teckochecker", "teckochecker.py"):
                found.append(shlex.join(words[len(words) - len(names) + 1 :]))
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
    assert {"init", "start", "secret", "job", "demo", "data", "doctor"} <= shown


def test_the_parser_takes_every_command_line_of_the_readme() -> None:
    """No command line in the README is wrong usage."""
    assert usage_error("job fly") != "" and usage_error("job list --json") == ""
    assert {line: said for line in readme_commands() if (said := usage_error(line))} == {}


# ── Requirements ──────────────────────────────────────────────────────────────────────────────


OURS = {"standins", "teckochecker"}
OPTIONAL = {"psycopg", "apprise", "obstore"}  # imported where the configuration asks for it


def required() -> set[str]:
    """The packages of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[^\w.-]", line.strip())[0] for line in lines if line.strip()]
    return {name.lower() for name in names if name}


def imported() -> set[str]:
    """The packages that the program and its demo import beyond the standard library."""
    tops = set()
    files = [ROOT / name for name in ("teckochecker.py", "tests/demo.py")]
    for node in itertools.chain(*(ast.walk(ast.parse(file.read_text())) for file in files)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            tops.add(str(node.module).partition(".")[0])
    names = {top.replace("_", "-") for top in tops - sys.stdlib_module_names - OURS}
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


def test_the_readme_can_be_read_in_some_minutes() -> None:
    """At most 250 lines; its links lead somewhere."""
    assert len(readme().splitlines()) <= 250
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme())
    assert links and not [link for link in links if not (ROOT / link).exists()]


# ── A stranger's path ─────────────────────────────────────────────────────────────────────────


PLACES = ("/opt/teckochecker", "/etc/", "/var/lib/teckochecker", "/usr/local/bin")
SUDO = """\
set -e
sudo() { "$@"; }
systemctl() { echo "$*" >> "$ROOT/systemctl"; }
python3() { "$PYTHON" "$@"; }
"""


@dataclass
class Stranger:
    """Who follows the README in a clone, on a machine whose root folder is `root`."""

    root: Path
    clone: Path
    keys: Mapping[str, str]
    env: dict[str, str]

    def placed(self, text: str) -> str:
        """A text with the places of the machine beneath the root folder."""
        for place in PLACES:
            text = re.sub(rf"(?<![\w.}}/]){place}", f"{self.root}{place}", text)
        return text

    def runs(self, script: str, typed: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run lines of the README in the clone."""
        pip = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
        given = {"PYTHON": sys.executable, "ROOT": str(self.root)}
        path = f"{self.root}/usr/local/bin{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "--norc", "-c", SUDO + self.placed(script)],
            cwd=self.clone,
            env=clean_environment(pip | given | {"PATH": path} | self.env | env),
            input=typed,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def installs(self) -> None:
        """The block under "systemd", line by line: a key is typed where one is asked for."""
        unit = self.placed(UNIT.read_text())
        (self.clone / UNIT.name).write_text(unit)
        [block] = [block for block in blocks("sh") if "systemctl enable" in block]
        lines = re.sub(r"(<<'END'.*?\nEND)\n", r"\1\0", block, flags=re.DOTALL)
        for line in re.split(r"(?<!\0)\n(?!#!|export|exec|END)", lines.replace("\0", "\n")):
            name = line.partition("#")[0].strip().rpartition("/")[2]
            self.runs(line, self.keys.get(name, "") if "/dev/stdin" in line else "")

    def starts(self) -> subprocess.Popen[bytes]:
        """What systemd does with the unit: the command, the settings, copies of the keys."""
        unit = (self.root / "etc/systemd/system" / UNIT.name).read_text()
        private, env = self.root / "run", dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.M))
        private.mkdir(exist_ok=True)
        for name, file in re.findall(r"^LoadCredential=(\w+):(.*)$", unit, re.M):
            (private / name).write_text(Path(file).read_text())
        (self.root / "var/lib/teckochecker").mkdir(parents=True, exist_ok=True)
        [command] = re.findall(r"^ExecStart=(.*)$", unit, re.M)
        env |= {"CREDENTIALS_DIRECTORY": str(private)} | self.env
        process = subprocess.Popen(
            shlex.split(command), cwd="/", env=clean_environment(env), stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        for line in process.stderr:
            if b"admin surface at" in line:
                return process
        raise AssertionError(f"ended with {process.wait()}")


@pytest.fixture
def stranger(tmp_path: Path, openai: standins.OpenAI, keboola: standins.Keboola) -> Stranger:
    """With a batch that is done, and a jobs.yaml out of the README's: the service's head above the
    job of "Configuration"."""
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    parts = ("teckochecker.py", "pyproject.toml", "README.md", "requirements.txt")
    for name in (*parts, "tests/demo.py", "tests/standins.py"):
        shutil.copy(ROOT / name, clone / name)
    keys = {"openai": standins.OPENAI_KEY, "keboola": standins.KEBOOLA_TOKEN}
    here = [path for path in sys.path if path.endswith("site-packages")]  # no need to download
    env = {"OPENAI_BASE_URL": openai.base_url, "PYTHONPATH": os.pathsep.join(here)}
    made = Stranger(tmp_path / "root", clone, keys, env)
    for folder in ("etc/systemd/system", "usr/local/bin", "var/lib"):
        (made.root / folder).mkdir(parents=True)
    [head] = [text for text in blocks("yaml") if "/var/lib/" in text]
    [whole] = [text for text in blocks("yaml") if "\njobs:" in text]
    jobs = re.sub("https://connection[^,]*", f'"{keboola.url}"', whole[whole.index("jobs:") :])
    (clone / "jobs.yaml").write_text(f"{made.placed(head)}admin: {{port: 0}}\n{jobs}")
    openai.batch("batch_abc123", "completed")
    return made


def test_a_stranger_sees_the_demo_and_checks_own_batches(
    stranger: Stranger, keboola: standins.Keboola
) -> None:
    """The first block installs and runs the demo; with the jobs.yaml of "Configuration" and the
    keys where it says, the next block finds everything good, and a check starts the Keboola job."""
    demo, own, *_ = blocks("sh")
    assert stranger.runs(demo).stdout.splitlines()[-1].endswith("teckochecker init")
    [whole] = [text for text in blocks("yaml") if "\njobs:" in text]
    key = stranger.root / "run/keys/keboola"
    key.parent.mkdir(parents=True)
    key.write_text(standins.KEBOOLA_TOKEN)
    jobs = re.sub("https://connection[^,]*", f'"{keboola.url}"', whole)
    (stranger.clone / "jobs.yaml").write_text(jobs.replace("/run/keys/keboola", str(key)))
    path = f"{stranger.clone}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    script = own.replace("teckochecker start", "teckochecker check")  # which ends
    said = stranger.runs(script, OPENAI_API_KEY=standins.OPENAI_KEY, PATH=path).stdout
    assert "BAD" not in said and said.count("good  ") == 3
    assert len(keboola.created) == 1


def test_a_stranger_installs_the_service(stranger: Stranger, keboola: standins.Keboola) -> None:
    """The service runs out of the README's block; commands find its database and its keys; a
    rotation as printed keeps every secret; the command to uninstall names all that was made."""
    stranger.installs()
    assert (stranger.root / "systemctl").read_text() == "enable --now teckochecker\n"
    service = stranger.starts()
    try:
        said = stranger.runs("sudo teckochecker status; sudo teckochecker job list").stdout
        assert "running, pid" in said and "nightly" in said
        until(lambda: keboola.created, "the Keboola job", 20)
        stranger.runs("sudo teckochecker secret add --name more --type api", "a-secret-0123")
    finally:
        service.terminate()
        assert service.wait(15) == 0
    stranger.runs("sudo teckochecker secret rotate")
    again = stranger.starts()
    try:
        assert (
            "more" in stranger.runs("sudo teckochecker validate; teckochecker secret list").stdout
        )
    finally:
        again.terminate()
        assert again.wait(15) == 0
    assert len(keboola.created) == 1
    made = [path for path in stranger.root.rglob("*teckochecker*") if path.parent.name != "run"]
    named = re.findall(r"/[\w./]*teckochecker[\w.]*", readme().partition("**Uninstall**")[2])
    gone = tuple(f"{stranger.root}{name.rstrip('.')}".replace("/private", "") for name in named)
    assert [path for path in made if not str(path).startswith(gone)] == []


# ── The unit ──────────────────────────────────────────────────────────────────────────────────


def unit_values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_starts_what_there_is() -> None:
    """ExecStart is a command line that the parser takes, the settings are known ones, and the
    port that may be bound is the default one."""
    [start] = unit_values("ExecStart")
    assert usage_error(start.partition("bin/teckochecker ")[2]) == ""
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
