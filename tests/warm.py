"""The program as processes that need not import it first: they are forked from one that has.

To start Python, to compile the file and to import the SDK cost more than most commands do. What
is forked is a process like any other, with its own arguments, environment, folder, streams and
signals. Tests of how a user starts the program (shebang, wrapper, early signals, encodings, what
is imported) start the file instead: `Script`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "teckochecker.py"
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
IMPORTED = (
    "teckochecker aiosqlite apscheduler.schedulers.asyncio"
    " apscheduler.triggers.interval cryptography.hazmat.primitives.ciphers.aead dotenv httpx2"
    " openai openai.resources.batches prometheus_client yaml"
).split()
starting = threading.Lock()


class Script(subprocess.Popen[str]):
    """The file started as a user does: its arguments, and what Popen takes besides."""

    def __init__(self, *args: str, **given: Any) -> None:
        super().__init__([sys.executable, str(PROGRAM), *args], text=True, **given)


class Program(Script):
    """The same, forked from a process that has imported it."""

    def _execute_child(self, *given: Any) -> None:
        """Have it forked instead of fork and exec, and become its parent."""
        if sys.platform != "linux":  # which alone makes the forked process a child of this one
            super()._execute_child(*given)  # type: ignore[misc]
            return
        ordinary = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
        asked = ordinary.bind(self, *given).arguments
        ends = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        told = {name: asked[name] for name in ("args", "cwd", "env", "start_new_session")}
        told["args"] = told["args"][1:]
        with starting:
            forker().send(json.dumps(told, default=str).encode())
            socket.send_fds(forker(), [b"3"], [fd if e == -1 else e for fd, e in enumerate(ends)])
            self.pid = int(forker().recv(100))
            forker().recv(1)  # only now it is this process's child
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))  # type: ignore[attr-defined]


@cache
def forker() -> socket.socket:
    """The way to the process that forks the others, which ends with this one."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what it leaves behind becomes ours
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(there.fileno())]
    subprocess.Popen(command, pass_fds=[there.fileno()], start_new_session=True)
    there.close()
    return here


def fork_until_closed(asking: socket.socket) -> dict[str, Any]:
    """Fork a process for each message; in each new process, returns the message."""
    while message := asking.recv(1 << 20):
        _, streams, _, _ = socket.recv_fds(asking, 1, 3)
        between = os.fork()
        if not between:
            if pid := os.fork():
                asking.send(str(pid).encode())
                os._exit(0)
            asking.close()
            for fd, stream in enumerate(streams):
                os.dup2(stream, fd)
                os.close(stream)
            return dict(json.loads(message))
        os.waitpid(between, 0)
        asking.send(b"1")
        for stream in streams:
            os.close(stream)
    os._exit(0)


def become(told: dict[str, Any]) -> None:
    """Take on what a started Python would have."""
    if told["start_new_session"]:
        os.setsid()
    os.chdir(told["cwd"] or ".")
    if told["env"] is not None:
        os.environ.clear()
        os.environ.update(told["env"])
    time.tzset()
    sys.argv[:] = told["args"]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    out, err = (open(fd, "wb", 0, closefd=False) for fd in (1, 2))  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(out, "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
    import teckochecker

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, teckochecker.end_at_once)
    if "start" in sys.argv:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(teckochecker.main())


if __name__ == "__main__":
    asking = socket.socket(fileno=int(sys.argv.pop()))
    sys.path[0] = str(PROGRAM.parent)
    sys.argv[0] = str(PROGRAM)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    become(fork_until_closed(asking))
