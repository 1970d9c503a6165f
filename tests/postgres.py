"""A PostgreSQL server for tests: Debian's package, a socket in a temporary folder, no network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
MISSING = "PostgreSQL is not installed: apt-get install postgresql, pip install 'psycopg[binary]'"


def installed() -> bool:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return False
    return bool(FOUND)


class Server:
    """A cluster of its own, which runs from `start` to `stop`. It does not run as root."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=memory))
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self._as |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync").wait(60)

    def _run(self, program: str, *args: str) -> subprocess.Popen[bytes]:
        command = [str(FOUND[-1].with_name(program)), "-D", str(self.folder / "data"), *args]
        log = open(self.folder.parent / f"{self.folder.name}.log", "ab")  # noqa: SIM115
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, **self._as)

    def start(self) -> None:
        """Start it, and wait until it answers; after a kill it recovers first."""
        settings = "listen_addresses= fsync=off max_connections=300 deadlock_timeout=10s".split()
        options = [word for setting in settings for word in ("-c", setting)]
        self.process = self._run("postgres", "-k", str(self.folder), *options)
        until = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < until and self.process.poll() is None, "it does not start"
            time.sleep(0.02)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, schema: str = "public") -> str:
        options = f"options=-csearch_path%3D{schema}"
        return f"postgresql:///postgres?host={self.folder}&user=postgres&{options}"

    def schema(self) -> str:
        """The URL of a fresh schema, which is as good as a database."""
        import psycopg

        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {name}".encode())
        return self.url(name)

    def dump(self, url: str) -> bytes:
        """What pg_dump writes of a schema."""
        return self._client("pg_dump", "-n", url.rpartition("%3D")[2])

    def restore(self, url: str, dump: bytes) -> None:
        """Put a dump in the place of its schema."""
        name = url.rpartition("%3D")[2]
        self._client("psql", "-c", f"DROP SCHEMA {name} CASCADE")
        self._client("psql", "-v", "ON_ERROR_STOP=1", input=dump)

    def _client(self, program: str, *args: str, input: bytes = b"") -> bytes:
        at = ["-h", str(self.folder), "-U", "postgres", "-d", "postgres"]
        command = [str(FOUND[-1].with_name(program)), *at, *args]
        return subprocess.run(command, input=input, capture_output=True, check=True).stdout

    def crash(self) -> None:
        """End it as a power loss would: nothing is finished, and the next start recovers."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(20)

    def stop(self) -> None:
        self.crash()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_name(f"{self.folder.name}.log").unlink(missing_ok=True)
