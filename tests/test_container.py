"""The container's files. No engine runs where the tests do, so they are read, and the steps of the
Dockerfile are carried out in a folder: see `Image`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROGRAM, clean_environment

import teckochecker as tecko

ROOT = PROGRAM.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
NODES = [COMPOSE["services"][name] for name in ("teckochecker", "reserve")]
REFERENCES = {"OPENAI_API_KEY", "KEBOOLA_TOKEN"}  # as jobs.yaml.example names them


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with their continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def instruction(name: str) -> str:
    """The last one of this name, which is the one that counts."""
    return [value for kind, value in instructions() if kind == name][-1]


def exec_form(name: str) -> list[str]:
    found: list[str] = json.loads(instruction(name)[instruction(name).index("[") :])
    return found


class Image:
    """What the Dockerfile makes, in a folder that stands for the root of its file system. The
    packages of this process stand for those that pip would fetch, so that its command line is
    carried out, and finds each of them in the version that is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for kind, value in instructions():
            if kind == "COPY" and not value.startswith("--from"):
                *sources, target = value.split()
                folder = self.inside(target)
                folder.mkdir(parents=True, exist_ok=True)
                for source in sources:
                    shutil.copy(ROOT / source, folder)
            elif kind == "RUN" and (os.getuid() == 0 or "--owner" not in value):
                self.run(value)
        self.inside("/data").mkdir(exist_ok=True)

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def here(self, text: str) -> str:
        return re.sub(r"(?<![\w/.:])/(venv|app|data)\b", rf"{self.root}/\1", text)

    def run(self, command: str) -> None:
        made = re.sub(
            r"python -m venv (\S+)", rf"{sys.executable} -m venv --without-pip \1", command
        )
        script = self.here(made).replace("/venv/bin/pip ", "/venv/bin/python -m pip ")
        if "-m venv" in script:
            site = sysconfig.get_path("purelib")
            lib = f"{self.root}/venv/lib/python{sysconfig.get_python_version()}/site-packages"
            beside = f"echo {shlex.quote(site)} > {lib}/beside.pth"
            script = script.replace("&&", f"&& {beside} &&", 1)
        env = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        subprocess.run(["sh", "-ec", script], check=True, env=env, capture_output=True)

    def command(self, *names: str) -> list[str]:
        return [self.here(word) for name in names for word in exec_form(name)]

    def environment(self, **more: str) -> dict[str, str]:
        set_by = dict(pair.split("=", 1) for pair in instruction("ENV").split())
        return clean_environment(set_by | more)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    made = Image(tmp_path_factory.mktemp("image"))
    (made.inside("/data") / "jobs.yaml").write_text("jobs: []\n")
    return made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_it_is_ready_when_the_health_check_says_so_and_ends_with_sigterm(image: Image) -> None:
    """The check fails before; then it succeeds, without any tool but Python; and 0 at the end."""
    token = {"ADMIN_TOKEN": "a-token-of-the-tests", "API_HOST": "127.0.0.1"}
    env, data = image.environment(API_PORT=str(free_port()), **token), image.inside("/data")

    def check() -> int:
        test = image.command("HEALTHCHECK")
        return subprocess.run(test, env=env, check=False, capture_output=True).returncode

    assert check() == 1
    start = image.command("ENTRYPOINT", "CMD")
    with (data / "output.log").open("w") as output:
        program = subprocess.Popen(start, cwd=data, env=env, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 60
        while check() != 0:
            assert program.poll() is None and time.monotonic() < until
        program.terminate()
        assert program.wait(20) == 0
    finally:
        program.kill()
        program.wait()
    assert (data / "teckochecker.db").exists() and check() == 1


def test_without_a_token_it_does_not_start(image: Image) -> None:
    """It listens on all addresses, as a container must: one line says what is needed."""
    start, data = image.command("ENTRYPOINT", "CMD"), image.inside("/data")
    done = subprocess.run(
        start, cwd=data, env=image.environment(), check=False, capture_output=True, text=True
    )
    assert done.returncode == 1 and "set ADMIN_TOKEN" in done.stderr


def test_the_image_has_a_user_a_volume_and_no_more_than_it_needs() -> None:
    """Two stages of one slim Python; not root; one volume, in which it works; the exec form."""
    stages = [value.split()[0] for kind, value in instructions() if kind == "FROM"]
    assert len(stages) == 2 and len({*stages}) == 1 and stages[0].endswith("-slim")
    assert int(instruction("USER").partition(":")[0]) > 0
    assert instruction("VOLUME") == instruction("WORKDIR") == "/data"
    assert instruction("EXPOSE") == str(tecko.AdminBlock.model_fields["port"].default)
    kinds = [kind for kind, _ in instructions()]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT") and "ADD" not in kinds


def test_the_build_sends_what_is_copied_and_nothing_else() -> None:
    """No key, no database and no history gets into an image."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [v.split()[:-1] for kind, v in instructions() if kind == "COPY" and v[:2] != "--"]
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and allowed == {name for names in copied for name in names}


@pytest.mark.parametrize("node", NODES, ids=["teckochecker", "reserve"])
def test_a_node_has_the_settings_it_needs(node: dict[str, Any]) -> None:
    """Each variable is a setting or what jobs.yaml.example names; secrets come from outside."""
    environment = node["environment"]
    names = {*environment} - REFERENCES
    assert names <= {*tecko.ENVIRONMENT, "DATABASE_URL"}
    assert names >= {"DATABASE_URL", "ADMIN_TOKEN", "SECRET_KEY"}
    assert all("${" in value for value in environment.values())
    assert all(
        environment[name].startswith("${" + name + ":?") for name in ("ADMIN_TOKEN", "SECRET_KEY")
    )
    example = (ROOT / "jobs.yaml.example").read_text()
    assert [name for name in REFERENCES if name not in example] == []


@pytest.mark.parametrize("node", NODES, ids=["teckochecker", "reserve"])
def test_a_node_runs_as_the_image_means_it(node: dict[str, Any]) -> None:
    """The image's own command, user and health check; a root that cannot be written; published on
    loopback alone; with time for its 10 s to end."""
    assert not {"command", "entrypoint", "user", "healthcheck", "privileged"} & node.keys()
    assert node["read_only"] and node["cap_drop"] == ["ALL"]
    assert any(place.startswith("/data:") for place in node["tmpfs"])
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in node["ports"])
    assert int(node["stop_grace_period"].removesuffix("s")) > 10


def test_both_nodes_share_a_database_and_nothing_else() -> None:
    """One server, whose password all three have from one place; its data is the one volume."""
    first, second = (dict(node) for node in NODES)
    assert first.pop("ports") != second.pop("ports") and first == second
    server = COMPOSE["services"]["postgres"]
    url = first["environment"]["DATABASE_URL"].replace(
        server["environment"]["POSTGRES_PASSWORD"], "x"
    )
    settings = tecko.database_of(url, ROOT, "compose.yaml")
    assert settings["database_url"].reveal() == "postgresql://teckochecker:x@postgres/teckochecker"
    assert server["environment"]["POSTGRES_USER"] == "teckochecker"
    volume = server["volumes"][0].partition(":")[0]
    assert {volume} == {*COMPOSE["volumes"]} and server["healthcheck"]["test"][1] == "pg_isready"
