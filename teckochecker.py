#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiosqlite>=0.22", "annotated-types>=0.7", "apscheduler>=3.11,<4",
#   "cryptography>=46", "httpx2>=2.16", "openai>=3.54", "orjson>=3.11", "prometheus-client>=0.22",
#   "pydantic>=2.12", "python-dotenv>=1.1", "pyyaml>=6.0.2", "rich>=14", "shtab>=1.7.2",
# ]
# ///
r"""TeckoChecker: watch OpenAI batches and start a Keboola job when they are done, once; and
ingest records from CSV files and REST APIs into one schema.

The promise: a trigger is on disk before it is on the wire. Whatever is killed whenever, no
trigger is lost, and none is doubled as long as Keboola's search shows a job within the settle
window. Everything below serves that sentence. The file reads from top to bottom; a section
uses only what stands above it:

    Constants, Redaction, Errors     what many sections share
    Model, Job, Settings, Rows       what is validated where it comes in, and what the store has
    Decisions                        states as tables, and what to do next: no clock, no I/O
    Secrets                          master keys and encryption
    YAML, Configuration              jobs.yaml, .env and the environment into settings and jobs
    Schema to Backups                the store on two engines: the one place with SQL, no network
    Asking over HTTP to Web          OpenAI, Keboola and sources: the one place that calls them
    Ingest                           records out of files and pages; writes nothing
    Metrics                          what Prometheus reads
    Steps, Ingesting, Doctor         load, ask, decide, record, act
    Answers, Operations, Import      what people and programs may ask for, each rule once
    Run lock, Scheduler, Plan        one process a database; timers; what a new jobs.yaml would do
    Alerts                           what is new and bad is told once, and when it is over
    Timers, Service                  steps, ticks, reload, health, start, drain
    Routes, OpenAPI, HTTP            one table of routes serves, documents and is tested
    Output to Parser and main        the command line: the one place that prints and exits

A job                                     A trigger (the outbox row of one round of a job)

  active <--> paused                        pending --claim--> sending --+--> running --> succeeded
    |  \                                       ^   ^              |   |  |         \----> failed
    |   +--- a batch failed --> failed         |   +--- not sent --+   |  +--> rejected
    | all done                   ^   ^         |                      | outcome unknown
    v                            |   |         |                      v
  triggering -- refused, held ---+   |         +---- not found --- unknown --> running (found)
    | Keboola has it                 |                                |  ^
    v                                |                                v  | job retry
  triggered -- its job failed -------+                               held
    |
    v
  completed | completed_with_failures

An ingest is `active` or `paused`; its runs are in_progress, then success, failed or interrupted.
`failed` goes back to `active` with `job retry`, and every state does when the set of batches
changes: a new round. `removed` (the job has left jobs.yaml) is a mark on a job, not a state
of its own: no check is made any more, but what was decided is still carried out.
"""

from __future__ import annotations

import os
import signal
import sys


def end_at_once(number: int, frame: object) -> None:
    """Handle a signal that comes before there is anything to shut down. For a service that has
    not started yet, SIGTERM is a normal end."""
    os._exit(0 if "start" in sys.argv and number != signal.SIGINT else 128 + number)


if sys.version_info < (3, 11):  # noqa: UP036 all below is grammar that 3.9 can read, for this
    _found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"TeckoChecker needs Python 3.11 or later; this is {_found}")
if __name__ == "__main__" and os.name == "posix":
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end_at_once)
    if "start" in sys.argv:  # a service takes SIGHUP to mean: read jobs.yaml again
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

import argparse
import asyncio
import base64
import codecs
import contextlib
import csv
import difflib
import errno
import gc
import getpass
import glob
import gzip
import hashlib
import hmac
import html
import http.client
import http.cookiejar
import http.server
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import random
import re
import reprlib
import shlex
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import tempfile
import textwrap
import threading
import time
import uuid
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent import futures
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache, partial, partialmethod, wraps
from http import HTTPStatus
from operator import attrgetter
from pathlib import Path
from secrets import token_bytes
from types import MappingProxyType
from typing import (
    IO,
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
)
from urllib.parse import parse_qs, quote, quote_plus, unquote, urljoin, urlsplit


def install_hint(error: ImportError) -> str:
    """What to do about a module that cannot be imported."""
    if error.name == "fcntl":
        return "TeckoChecker runs on Linux, macOS and other Unix systems only"
    needs = Path(__file__).with_name("requirements.txt")
    fix = shlex.join([sys.orig_argv[0], "-m", "pip", "install", "-r", str(needs)])
    return f"the package {error.name} is missing; run: {fix}"


try:
    import fcntl

    import orjson
    from annotated_types import Predicate
    from pydantic import (
        AfterValidator,
        AliasChoices,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        PlainSerializer,
        PlainValidator,
        StrictStr,
        StringConstraints,
        ValidationError,
        ValidationInfo,
        WithJsonSchema,
        create_model,
        field_validator,
        model_validator,
    )
    from pydantic.json_schema import models_json_schema
except ModuleNotFoundError as e:
    if __name__ != "__main__":
        raise
    sys.exit(f"teckochecker: {install_hint(e)}")

if TYPE_CHECKING:  # imported where they are used: `job list` needs neither SDK nor scheduler
    import aiosqlite
    import httpx2
    import openai
    from apscheduler.schedulers.asyncio import AsyncIOScheduler
    from apscheduler.triggers.interval import IntervalTrigger
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from obstore.store import S3Store
    from psycopg import AsyncConnection

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=str)
M = TypeVar("M", bound=BaseModel)
log = logging.getLogger("teckochecker")

# ── Constants ─────────────────────────────────────────────────────────────────────────────────

VERSION = "1.0.0"
_started = [sys.orig_argv[0], sys.argv[0]] if sys.argv[0].endswith(".py") else [sys.argv[0]]
if shutil.which(os.path.basename(sys.argv[0])):
    _started = [os.path.basename(sys.argv[0])]
COMMAND = shlex.join(_started)  # as the user started it, so that hints can be pasted

CALL_TIMEOUT = 15.0  # s for a read: OpenAI answers a retrieve in well under a second
CONNECT_TIMEOUT = 5.0  # s; a host that does not answer by then is down
CALL_DEADLINE = 20.0  # s for a whole call: a server that drips bytes never hits CALL_TIMEOUT
IN_FLIGHT = 64  # calls to OpenAI at once: beyond some dozens each only gets slower
IN_FLIGHT_PER_KEY = 8  # of those, so that a key whose calls hang leaves room for the others
KEEPALIVE = 300.0  # s an idle connection is kept: longer than common poll intervals

BACKOFF_FIRST = 1.0  # s before the first retry; doubles
LONGEST_WAIT = 3600.0  # s, the most that a Retry-After or a refused key makes us wait
MISSING_CHECKS = 3  # 404s in a row after which a batch is missing: new ones can be unknown
MISSING_SECONDS = 600.0  # s at least between the first of these 404s and the last
STALLED_SECONDS = 3 * 3600.0  # s without progress after which a batch gets a remark
SETTLE_SEARCHES = 3  # successful searches, at least, before a trigger counts as not received
FOLLOW_FACTOR = 2  # a running Keboola job is looked at half as often as the batches were

AUTO_SHARE = 0.08  # of a batch's age: the longest wait of `auto`; the latency to expect is half
AUTO_STEP = 1.25  # ratio of the intervals of `auto`: with few of them, jobs are due together

STORE_RETRY = 1.0  # s between attempts to store what Keboola answered
HTTP_ANSWER = 5.0  # s after which the caller of a slow route is answered without the result
LOG_BYTES = 10_000_000  # per log file, five are kept


# ── Redaction ─────────────────────────────────────────────────────────────────────────────────

# No secret's value leaves the process: not in a log line, a traceback, an error, an answer, or a
# row of the log. The argument:
#
# - A value enters memory as a `SecretValue`, and that makes it known from then on, in every form in
#   which it may be written: as it is, in JSON, in a URL, as repr has it.
# - Every way out is a call of `redact`. A filter on each log handler redacts what our code and the
#   libraries log. A `TeckoError` redacts its message when it is made, so that nobody who shows one
#   has to think of it. The command line redacts what it prints, the store what it logs.
# - What looks like a key is cut out even where its value is not known: somebody may have pasted it
#   into the wrong place.
# - A text is cut to a bounded length before it is redacted, for an upstream may send one without
#   end; but never in the middle of a value, whose half would not be recognized.
#
# Not promised: a value that another program has transformed (base64, a hash), and core dumps.


KEY_SHAPES = re.compile(
    # OpenAI's; unlike in a name such as sk-nightly-2026, its words mix letters and digits
    r"(?<![\w-])sk-(?=[\w-]*([a-z][A-Z]|[A-Za-z]\d|\d[A-Za-z]))[\w-]{12,}"
    r"|\b\d+-\d+-(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}\b"  # Keboola's
    r"|(?<=://)[^/\s@]+(?=@)"  # a password in a URL
)
SHORTEST = 6  # characters of a secret


class SecretValue:
    """A secret in memory, which prints as ***. `reveal()` is for the one call that needs the value.

    `place` says where it comes from (the name of a secret or of a setting). The last two values of
    each place are known: a request with the previous one may still be under way. A value shorter
    than SHORTEST is not removed, since any text may contain it; `clean_secret` accepts none.
    """

    __slots__ = ("_value",)
    known: ClassVar[dict[str, deque[str]]] = {}  # by place
    forms: ClassVar[list[str]] = []  # all written forms, the longest first

    def __init__(self, value: str, place: str = "") -> None:
        self._value = value
        there = SecretValue.known.setdefault(place or value, deque(maxlen=2))
        if value not in there and len(value) >= SHORTEST:
            there.append(value)
            kept = itertools.chain(*SecretValue.known.values())
            forms = set().union(*map(written_forms, kept))
            SecretValue.forms = sorted(forms, key=len, reverse=True)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


@lru_cache(maxsize=10_000)
def written_forms(value: str) -> set[str]:
    """The value as it is, as JSON and URLs write it, and as repr does with either quote."""
    doubled = value.replace("\\", "\\\\")
    quoted = {doubled, doubled.replace("'", "\\'"), json.dumps(value)[1:-1]}
    return {value, *quoted, quote(value, safe=""), quote(value), quote_plus(value)}


def redact(text: str) -> str:
    """`text` without the values of secrets and without anything that looks like a key. Each value
    is searched for by itself: one pattern of all values would take a second to compile, again for
    each new value."""
    for form in SecretValue.forms:
        if form in text:
            text = text.replace(form, "***")
    return KEY_SHAPES.sub("***", text)


def excerpt(text: str, most: int) -> str:
    """The redacted beginning of a text, as text that can be encoded. A very long text is cut before
    it is redacted, `spare` characters later, so that a secret at the cut is still whole."""
    spare = max(1000, len(SecretValue.forms[0]) if SecretValue.forms else 0)
    if len(text) > most + spare:
        text = redact(text[: most + spare])[:-spare]
    return redact(text)[:most].encode(errors="replace").decode()


class RedactingFilter(logging.Filter):
    """Redacts message, traceback and stack. Every handler has it."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            said = record.getMessage()
        except (TypeError, ValueError):  # a library's format string that does not fit
            said = f"{record.msg!r} {record.args!r}"
        record.msg, record.args = excerpt(said, 20_000), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


# ── Errors ────────────────────────────────────────────────────────────────────────────────────


class TeckoError(Exception):
    """An error that is reported in one line; `hint` says what to do, where we know it."""

    code = 1000
    http_status = 400
    permanent = True  # trying again cannot help before something else has changed
    longest = 8_000  # characters of the message

    def __init__(self, message: str, *, hint: str = "", code: int = 0) -> None:
        super().__init__(excerpt(message, self.longest))
        self.hint = hint
        self.code = code or type(self).code


ERROR_NAMES = {  # what `error` is in an answer, by code
    1001: "secret_not_found",
    1002: "job_not_found",
    1003: "conflict",
    1004: "validation_error",
    2001: "openai_error",
    2002: "keboola_error",
    2003: "source_error",
    3001: "database_error",
    3002: "encryption_error",
}


MISSING = "nothing"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
Place = tuple[str | int, ...]  # ("jobs", 0, "watch", "batch_ids")


def dotted(place: Place) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input.

    `where` names the place as its author wrote it (keboola_stack_url, or job 'x': watch.secret);
    `place` is the same within the data. `found` is the value at that place, or the whole message if
    `allowed` is empty. A file adds `line` and `column` (from 1; 0: unknown) and `source`, the text
    of that line.
    """

    where: str = ""
    found: str = ""
    allowed: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    source: str = ""
    place: Place = ()

    @property
    def text(self) -> str:
        """The message without the place."""
        if not self.found or not self.allowed:
            return self.found or f"allowed: {self.allowed}"
        return f"found {self.found}; allowed: {self.allowed}"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(filter(None, (place, self.where, self.text)))


def problem_at(place: Place, found: str, allowed: str = "") -> Problem:
    return Problem(dotted(place), found, allowed, place=place)


class Invalid(TeckoError):
    """Input that was refused; the message has one line for each problem."""

    code = 1004
    http_status = 422
    longest = 1 << 20  # there may be many problems; each line is short

    def __init__(self, problems: Iterable[Problem | str], *, hint: str = "") -> None:
        self.problems = []
        for given in problems:
            p = Problem(found=given) if isinstance(given, str) else given
            texts = map(redact, (p.where, p.found, p.source))
            where, found, source = (CONTROL.sub(lambda c: rf"\x{ord(c[0]):02x}", t) for t in texts)
            self.problems.append(replace(p, where=where, found=found, source=source))
        super().__init__("\n".join(map(str, self.problems)), hint=hint)


class NotFound(TeckoError):
    """There is no such job (1002) or secret (1001)."""

    code = 1002
    http_status = 404


class Conflict(TeckoError):
    """The current state forbids this change."""

    code = 1003
    http_status = 409


class UpstreamError(TeckoError):
    """A call to another server failed.

    `status` is the HTTP status, None without an answer; `retry_after` is in seconds; `sent` is
    False only if the request is known not to have reached the other side.
    """

    http_status = 502

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        sent: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.sent = status, retry_after, sent
        final = status is not None and 300 <= status < 500
        self.permanent = final and status not in (408, 409, 425, 429)


class OpenAIError(UpstreamError):
    """OpenAI refused, failed, or could not be reached."""

    code = 2001


class KeboolaError(UpstreamError):
    """Keboola refused, failed, or could not be reached."""

    code = 2002


class SourceError(UpstreamError):
    """The source of an ingest refused, failed, or could not be reached or read."""

    code = 2003


class IngestFailed(TeckoError):
    """A run of an ingest failed although its source answers. `forget`: what the run has read has
    to be read again."""

    code = 2003

    def __init__(self, message: str, *, forget: bool = False) -> None:
        super().__init__(message)
        self.forget = forget


class Refused(TeckoError):
    """An HTTP request that is refused; `http_status` says why."""

    def __init__(
        self, status: int, message: str, *, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(message)
        self.http_status, self.headers = status, headers


class StoreError(TeckoError):
    """The database failed or stayed locked; nothing of the transaction was written."""

    code = 3001
    http_status = 503
    permanent = False


class SecretError(TeckoError):
    """A master key or secret is missing, unreadable, or does not decrypt."""

    code = 3002
    http_status = 500


# ── Model ─────────────────────────────────────────────────────────────────────────────────────


JobStatus = Literal[
    "active", "paused", "triggering", "triggered", "completed", "completed_with_failures", "failed"
]
TriggerState = Literal[
    "pending",  # to be sent
    "sending",  # on the wire, or it was when the program died
    "unknown",  # sent, outcome unknown; Keboola's search is asked whether it arrived
    "held",  # not found, and a person is to decide
    "running",  # Keboola has it
    "succeeded",
    "failed",  # Keboola's job ended so
    "rejected",  # Keboola refused it
]


LOOPBACK = ("127.0.0.1", "::1", "localhost")
ORIGIN = r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?"
ORIGINS = rf'(?i)^\s*\[?\s*("?{ORIGIN}"?\s*(,\s*|\]?\s*$))*$'  # a JSON list will do, too
BATCH_ID = re.compile(r"batch_[A-Za-z0-9_-]{1,249}")  # 255 characters with its prefix


def iso(at: float) -> str:
    """A unix time as ISO 8601 in UTC, to the second. A time outside of the years 1 to 9999 becomes
    the nearest one inside: one wrong time in a row must not break a whole list."""
    shown = min(253_402_300_799.0, max(-62_135_596_800.0, at))  # years 1 to 9999
    return datetime.fromtimestamp(shown, UTC).isoformat(timespec="seconds")[:19] + "Z"


def file_timestamp(at: float) -> str:
    """The same for the name of a file."""
    return iso(at).replace(":", "").replace("-", "")


At = Annotated[  # unix seconds, shown as a date in answers
    float,
    PlainSerializer(iso, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization"),
]


NEVER = 10**10  # s between two backups, 300 years


def parse_interval(value: object) -> object:
    """Seconds out of 90, "90", "30s", "2m", "1h", "1d" or never; auto stays, for what allows it."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,6})\s*([smhd]?)", value.strip())):
        return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[found[2]]
    if type(value) is int or value in ("auto", "never"):
        return NEVER if value == "never" else value
    raise ValueError("not an interval")


def within_bounds(value: int | str, info: ValidationInfo) -> int | str:
    low, high = (info.context or {}).get("bounds", (30, 3600))
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(f"allowed: {low} to {high} seconds")
    return value


def is_name(text: str) -> bool:
    return not CONTROL.search(text) and not text.isdigit()


def secret_name(value: object) -> str | int:
    """The name of a secret, or the id of a stored one."""
    text = value.strip() if isinstance(value, str) else ""
    if type(value) is not int and not (1 <= len(text) <= 255 and is_name(text)):
        raise ValueError
    return text or cast(int, value)


def reject_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError
    return value


def one_or_more(value: object) -> object:
    return value if isinstance(value, list) else [value]


def clean_stack_url(value: str) -> str:
    """`https://host` without a path; plain http only to this machine, where nobody can listen."""
    found = re.fullmatch(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?/?", value.lower())
    insecure = found and found[1] == "http" and found[2].strip("[]") not in LOOPBACK
    if not found or insecure or int(found[3] or 443) > 65535:
        raise ValueError("not a stack URL")
    return value.rstrip("/").lower()


def clean_url(value: str) -> str:
    """An http(s) URL with a host and without a password, for which there is `secret`."""
    parts = urlsplit(value)
    whole = parts.scheme in ("http", "https") and parts.hostname and not parts.fragment
    if not whole or re.search(r"\s", value) or parts.port == 0:  # .port may raise, too
        raise ValueError("not an http or https URL")
    if parts.username or parts.password:
        raise ValueError("a password in a URL; `secret` and `header` are for that")
    return value


def clean_source(value: str) -> str:
    if not value.startswith("s3://"):
        return clean_url(value) if "://" in value else value
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+/.+", value):
        raise ValueError("allowed: s3://bucket/key, which may be a glob")
    if importlib.util.find_spec("obstore") is None:
        raise ValueError("allowed: s3:// once there is obstore: python -m pip install obstore")
    return value


def safe_for_secret(url: str) -> str:
    """Secrets are sent over https only, except to this machine."""
    if url.lower().startswith("http://") and urlsplit(url).hostname not in LOOPBACK:
        raise ValueError("a secret goes over https only")
    return url


def one_character(value: str) -> str:
    delimiter = "\t" if value == "tab" else value
    if len(delimiter) != 1 or delimiter in '"\r\n\0 ':
        raise ValueError("not one character")
    return delimiter


def known_encoding(value: str) -> str:
    try:
        if not codecs.lookup(value)._is_text_encoding:
            raise LookupError
    except LookupError:
        raise ValueError("no encoding that Python knows") from None
    return value


def booleans_as_text(value: object) -> object:
    """Booleans as YAML writes them, since Keboola takes only texts."""
    if not isinstance(value, dict):
        return value
    return {k: str(v).lower() if isinstance(v, bool) else v for k, v in value.items()}


RESERVED_VARIABLES = frozenset(
    """
    batch_ids_completed batch_ids_failed batch_count_total batch_count_completed batch_count_failed
    output_file_ids error_file_ids request_count_total request_count_completed request_count_failed
    teckochecker_job teckochecker_trigger_id
    """.split()
)


def accepts(text: str, **rules: Any) -> Any:
    """A field with what error messages say is allowed in it: the first line. The others, for
    editors, say what the values do."""
    return Field(description=text, **rules)


def optional(text: str, default: Any = None, **rules: Any) -> Any:
    return accepts(text, default=default, **rules)


def flat_secret(kind: str) -> Any:
    """Takes the name of a secret or the id of a stored one, under either name."""
    names = AliasChoices(f"{kind}_secret", f"{kind}_secret_id")
    return accepts(f"the name of a secret of type {kind}", validation_alias=names)


Text255 = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Label = Annotated[  # a name or an id
    str,
    StringConstraints(min_length=1, max_length=255, strip_whitespace=True),
    # configuration_id: 123 is taken as well, see StrictModel
    BeforeValidator(lambda value: value, json_schema_input_type=Text255 | float),
]
Labels = Annotated[
    list[Label],
    Field(min_length=1),
    BeforeValidator(one_or_more, json_schema_input_type=Label | list[Label]),
]
Location = Annotated[  # a URL or a path; a presigned URL of S3 has some 1,500 characters
    str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=2000, strip_whitespace=True)
]
Url = Annotated[Location, AfterValidator(clean_url)]
Character = Annotated[str, AfterValidator(one_character)]
Name = Annotated[Label, Predicate(is_name), accepts("1 to 255 characters, not only digits")]
SecretType = Annotated[Literal["openai", "keboola", "api"], accepts("openai, keboola or api")]
SecretName = Annotated[str | int, PlainValidator(secret_name, json_schema_input_type=Text255 | int)]
OpenAISecret = Annotated[SecretName, flat_secret("openai")]
KeboolaSecret = Annotated[SecretName, flat_secret("keboola")]
BatchId = Annotated[str, StringConstraints(pattern=f"^{BATCH_ID.pattern}$")]
BatchIds = Annotated[
    list[BatchId],
    Predicate(lambda ids: len({*ids}) == len(ids)),
    accepts(
        "1 to 10 different ids, each batch_ with letters, digits, _ or -\n"
        "Another set of ids is a new round: the job fires again when those are done.",
        min_length=1,
        max_length=10,
        json_schema_extra={"uniqueItems": True},
    ),
]
FlatBatchIds = Annotated[  # also under the name batch_id
    BatchIds,
    BeforeValidator(one_or_more, json_schema_input_type=BatchIds | BatchId),
    Field(validation_alias=AliasChoices("batch_ids", "batch_id")),
]
IntervalText = Annotated[str, StringConstraints(pattern=r"^\s*\d{1,6}\s*[smhd]?\s*$")]
Seconds = Annotated[int, BeforeValidator(parse_interval, json_schema_input_type=int | IntervalText)]
LongSeconds = Annotated[
    int,
    BeforeValidator(parse_interval, json_schema_input_type=int | IntervalText | Literal["never"]),
]
Interval = Annotated[Seconds, AfterValidator(within_bounds), accepts("seconds, or 30s, 2m, 1h")]
PollInterval = Annotated[  # of a watch
    int | Literal["auto"],
    BeforeValidator(parse_interval, json_schema_input_type=int | IntervalText | Literal["auto"]),
    AfterValidator(within_bounds),
    accepts(
        "seconds, or 30s, 2m, 1h, or auto\n"
        "How often the batches are checked; auto: often while a batch is young, then less."
    ),
]
Integer = Annotated[int, BeforeValidator(reject_bool)]
Port = Annotated[int, Field(ge=0, le=65535), BeforeValidator(reject_bool)]
StackUrl = Annotated[
    str,
    AfterValidator(clean_stack_url),
    accepts(
        "https://connection.keboola.com or another stack, without a path",
        json_schema_extra={"pattern": r"^[Hh][Tt][Tt][Pp][Ss]?://[^/?#@\s]+/?$"},
    ),
]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Variables = Annotated[
    dict[Label, NonEmpty],
    BeforeValidator(
        booleans_as_text, json_schema_input_type=dict[Text255, NonEmpty | float | bool]
    ),
    Predicate(lambda variables: not RESERVED_VARIABLES & variables.keys()),
    accepts(
        "names with non-empty values, none of TeckoChecker's own names\n"
        "Sent to Keboola beside the outcome of the batches. Variables that are sent replace all"
        " defaults of a configuration."
    ),
]
Component = Annotated[Label, accepts("a component id like kds-team.app-custom-python")]
Configuration = Annotated[Label, accepts("a configuration id, in quotes")]
TriggerWhen = Annotated[
    Literal["all_completed", "all_finished"],
    accepts(
        "all_completed or all_finished\n"
        "all_completed fires when every batch has completed; one that fails, expires or is"
        " cancelled fails the job. all_finished takes those as done and fires all the same."
    ),
]
OnAmbiguous = Annotated[
    Literal["resend", "hold"],
    accepts(
        "resend or hold\n"
        "When it cannot be found out whether Keboola got a trigger: resend sends it again, which"
        " may start a second job; hold sends nothing and waits for `job retry`."
    ),
]


# ── Job ───────────────────────────────────────────────────────────────────────────────────────


def names_in_input(model: type[BaseModel]) -> dict[str, str]:
    """The fields of a model, by each name that the input may use for one."""
    return {
        str(written): name
        for name, info in model.model_fields.items()
        for written in getattr(info.validation_alias, "choices", [name])
    }


def add_other_names(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add to a JSON Schema the other names of fields, of which pydantic has only the first."""
    for name, first in names_in_input(model).items():
        if name not in schema["properties"]:
            schema["properties"][name] = schema["properties"][first]
            if first in schema.get("required", ()):
                schema["required"].remove(first)
                either = {"oneOf": [{"required": [first]}, {"required": [name]}]}
                schema.setdefault("allOf", []).append(either)


class StrictModel(BaseModel):
    """A model that refuses unknown keys. Numbers become text where text is meant
    (configuration_id: 12). Its title, which editors show, is how its docstring begins."""

    model_config = ConfigDict(
        defer_build=True,  # most commands need few of the models
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        hide_input_in_errors=True,
        json_schema_extra=add_other_names,
        model_title_generator=lambda model: re.split("[.:;,]", str(model.__doc__), maxsplit=1)[0],
    )


class OpenAIBatches(StrictModel):
    """The batches to watch, and when they count as done."""

    type: Literal["openai_batches"] = optional("openai_batches", "openai_batches")
    secret: SecretName = accepts("the name of a secret of type openai")
    batch_ids: BatchIds
    trigger_when: TriggerWhen = "all_completed"


class KeboolaTrigger(StrictModel):
    """The Keboola job to start."""

    type: Literal["keboola"] = optional("keboola", "keboola")
    secret: SecretName = accepts("the name of a secret of type keboola")
    stack_url: StackUrl
    component_id: Component
    configuration_id: Configuration
    variables: Variables = {}
    on_ambiguous: OnAmbiguous = "resend"


class ShortForm(StrictModel):
    """A block that can be shortened to the value of its first field."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, data: Any) -> Any:
        return {next(iter(cls.model_fields)): data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        block = handler(core)
        inner = handler.resolve_ref_schema(block)
        return {"anyOf": [inner["properties"][next(iter(cls.model_fields))], {**inner}]}


class Paging(ShortForm):
    """How to ask an API for the next page: by the answer's Link header (RFC 8288), by a cursor
    from the answer or from its last record, or by a number that counts pages or records."""

    type: Literal["link", "cursor", "last", "page", "offset"] = accepts(
        "link, cursor, last, page or offset\n"
        "link: the answer's Link header; cursor: a value out of the answer, found at `path`;"
        " last: a value of the page's last record; page and offset: a number that counts pages or"
        " records."
    )
    param: Label | None = optional("default cursor, starting_after, page or offset")
    path: Label | None = optional("where the cursor is, dotted; default next_cursor, or the id")
    start: Integer | None = optional("the first page's number; default 1 or 0", ge=0, le=10**9)
    size: Integer | None = optional("records a page, 1 to 100000", ge=1, le=100_000)
    size_param: Label | None = optional("the query parameter of `size`; default per_page or limit")


class Since(ShortForm):
    """Incremental ingest of an API: the greatest value of a field is remembered, and sent with the
    next run's requests."""

    field: Label = accepts("the field of a record that tells when it changed, dotted")
    param: Label = optional("the query parameter", "since")
    overlap: Seconds = optional(  # a source may be late to show a record under its own time stamp
        "seconds, or 30s, 5m, 1h; what is that old is asked for again", 300, ge=0, le=10**7
    )
    format: Label | None = optional("s, ms, us, or like %Y-%m-%d %H:%M:%S; default: as it came")


UnifiedField = Literal[
    "title", "description", "content", "author", "published_at", "url", "category"
]
UNIFIED = get_args(UnifiedField)
HEADER_LINE = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+: ?[ -~]*\{secret\}[ -~]*$"  # RFC 9110, section 5


class Source(StrictModel):
    """What CSV and API have in common."""

    type: str
    id: Labels = optional("the column or field that identifies a record, or a list of them", ["id"])
    fields: dict[UnifiedField, Label] = optional(
        f"a block of unified field: source field; unified: {', '.join(UNIFIED)}", {}
    )
    dates: Literal["dmy", "mdy"] | None = optional(
        "dmy or mdy: how to read 03/04/2024\nWithout it, such a record is rejected."
    )
    max_failed: Annotated[str, Field(pattern=r"^(\d{1,9}|\d{1,2}(\.\d+)?%)$")] | None = optional(
        "a number of records, or a share like 5%\nMore rejected ones fail the run."
    )
    on_drift: Literal["evolve", "freeze"] = optional(
        "evolve or freeze\nWhen a source's fields change: evolve goes on and notes it; freeze fails"
        " the run before records with other fields are written.",
        "evolve",
    )
    secret: SecretName | None = optional("the name of a secret of type api")
    header: Annotated[str, Field(pattern=HEADER_LINE)] = optional(
        "a header like X-Token: {secret}", "Authorization: Bearer {secret}"
    )
    max_requests_per_minute: Integer | None = optional("1 to 100000, per host", ge=1, le=100_000)
    timeout: Seconds | None = optional("1 to 3600 seconds, or 30s; default 2m", ge=1, le=3600)

    @field_validator("path", "url", check_fields=False)
    @classmethod
    def _secret_needs_https(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("secret") is None:
            return value
        if "://" not in value:
            raise ValueError("a secret goes with a URL, not with a file")
        return safe_for_secret(value)


class CsvSource(Source):
    """A CSV file, all files that a glob matches, or a file behind a URL."""

    type: Literal["csv"] = accepts("csv or api")
    path: Annotated[Location, AfterValidator(clean_source)] = accepts(
        "a path or glob, relative to jobs.yaml, or an https:// or s3:// URL"
    )
    endpoint: Url | None = optional("of s3://, the URL of MinIO or another server than Amazon's")
    region: Label | None = optional("of s3://; default us-east-1")
    delimiter: Character | None = optional("one character, or tab; default: what parts best")
    encoding: Annotated[Label, AfterValidator(known_encoding)] | None = optional(
        "a name like cp1252; default: that of a byte order mark, else utf-8"
    )
    columns: list[Label] | None = optional("of files without a header row", min_length=1)
    skip: Integer = optional("lines before the header, 0 to 10000", 0, ge=0, le=10_000)
    comment: Annotated[Label, Field(max_length=10)] | None = optional("how comments begin, like #")
    quote: Annotated[
        str, AfterValidator(lambda given: given if given in ("none", '"') else one_character(given))
    ] = optional("one character, or none", '"')
    escape: Character | None = optional("one character, like \\; default: a quote is doubled")

    place = property(attrgetter("path"))

    @property
    def remote(self) -> bool:
        return self.path.startswith(("https://", "http://"))

    @property
    def in_s3(self) -> bool:
        return self.path.startswith("s3://")


class ApiSource(Source):
    """A REST API that answers with JSON."""

    type: Literal["api"] = accepts("csv or api")
    url: Url = accepts("an https:// URL")
    params: Annotated[dict[Label, str], BeforeValidator(booleans_as_text)] = optional(
        "names and values of query parameters", {}
    )
    items: Label | None = optional("where the list is, dotted; default: the answer itself")
    next: Paging | None = optional(
        "link, cursor, last, page or offset, or a block with type; default: link, if any"
    )
    more: Label | None = optional("where the answer says whether there is a next page, dotted")
    since: Since | None = optional("a field, or a block with field, param, overlap, format")

    place = property(attrgetter("url"))


SOURCES: dict[str, type[Source]] = {"csv": CsvSource, "api": ApiSource}
POLL_INTERVAL = AliasChoices("poll_interval", "poll_interval_seconds")


class JobSpec(StrictModel):
    """The definition of a job that watches batches."""

    name: Name
    poll_interval: PollInterval = Field(120, validation_alias=POLL_INTERVAL)
    watch: OpenAIBatches = accepts("a block with type, secret and batch_ids")
    trigger: KeboolaTrigger = accepts(
        "a block with type, secret, stack_url, component_id and configuration_id"
    )


class IngestSpec(StrictModel):
    """The definition of a job that ingests records."""

    name: Name
    poll_interval: Interval = Field(120, validation_alias=POLL_INTERVAL)
    ingest: Annotated[CsvSource | ApiSource, Field(discriminator="type")] = accepts(
        "a block with type: csv and path, or type: api and url"
    )


Spec = JobSpec | IngestSpec


class FlatJob(StrictModel):
    """A job that watches batches, without nested blocks: for the REST API and the command line."""

    name: Name
    batch_ids: FlatBatchIds
    openai_secret: OpenAISecret
    trigger_when: TriggerWhen = "all_completed"
    keboola_secret: KeboolaSecret
    keboola_stack_url: StackUrl
    keboola_component_id: Component
    keboola_configuration_id: Configuration
    variables: Variables = {}
    on_ambiguous: OnAmbiguous = "resend"
    poll_interval_seconds: PollInterval = Field(
        120, validation_alias=AliasChoices(*reversed(POLL_INTERVAL.choices))
    )

    def to_spec(self) -> JobSpec:
        """The same job as JobSpec. Its values are valid already."""
        watch, trigger = (
            {inner: getattr(self, name) for inner, name in names.items()}
            for names in FLAT_NAMES.values()
        )
        return JobSpec.model_construct(
            name=self.name,
            poll_interval=self.poll_interval_seconds,
            watch=OpenAIBatches.model_construct(**watch),
            trigger=KeboolaTrigger.model_construct(**trigger),
        )


FLAT_NAMES = {  # what FlatJob calls the fields of a job's blocks
    "watch": {"batch_ids": "batch_ids", "secret": "openai_secret", "trigger_when": "trigger_when"},
    "trigger": {
        name: name if name in ("variables", "on_ambiguous") else f"keboola_{name}"
        for name in KeboolaTrigger.model_fields.keys() - {"type"}
    },
}


def flat_fields(spec: Spec) -> dict[str, Any]:
    """The fields of a job under FlatJob's names; an ingest has few of them."""
    flat: dict[str, Any] = {"name": spec.name, "poll_interval_seconds": spec.poll_interval}
    blocks = {} if isinstance(spec, IngestSpec) else FLAT_NAMES
    for block, names in blocks.items():
        flat |= {name: getattr(getattr(spec, block), inner) for inner, name in names.items()}
    return flat


OMITTED: Any = Field(default_factory=lambda: None)  # may be left out, but not set to null


class JobChanges(FlatJob):
    """Changes of a job that did not come from jobs.yaml."""

    name: Name = OMITTED
    batch_ids: FlatBatchIds = OMITTED
    openai_secret: OpenAISecret = OMITTED
    keboola_secret: KeboolaSecret = OMITTED
    keboola_stack_url: StackUrl = OMITTED
    keboola_component_id: Component = OMITTED
    keboola_configuration_id: Configuration = OMITTED


def job_form(data: object) -> type[JobSpec | IngestSpec | FlatJob]:
    """Which of the three forms this job is written in."""
    if not isinstance(data, dict):
        return JobSpec
    if "ingest" in data:
        return IngestSpec
    flat = data.keys() & names_in_input(FlatJob).keys() - names_in_input(JobSpec).keys()
    return FlatJob if flat and not {"watch", "trigger"} & data.keys() else JobSpec


SECRET_KINDS = {"watch": "openai", "trigger": "keboola", "ingest": "api"}  # by block of a job


def secrets_of(job: Mapping[str, Any]) -> Iterator[tuple[Place, str, str | int]]:
    """The secrets that a job in any form, valid or not, refers to: the place, the type that it has
    to be of, and its name or id."""
    for block, kind in SECRET_KINDS.items():
        inner = job.get(block)
        nested = inner.get("secret") if isinstance(inner, Mapping) else None
        flat = {(name,): job.get(name) for name in (f"{kind}_secret", f"{kind}_secret_id")}
        for place, value in ({(block, "secret"): nested} | flat).items():
            if type(value) in (str, int) and str(value).strip():
                yield place, kind, cast(str | int, value)


# ── Settings ──────────────────────────────────────────────────────────────────────────────────


class SecretRef(StrictModel):
    """A secret that is kept outside of the store, in a variable (`env`) or a file."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["env"]}, {"required": ["file"]}]}
    )

    type: SecretType
    env: Label | None = optional("the name of an environment variable")
    file: Location | None = optional("the path of a file with nothing but the value")

    @model_validator(mode="after")
    def _one_place(self) -> SecretRef:
        if (self.env is None) == (self.file is None):
            raise ValueError("needs exactly one of env and file")
        return self


PRINTABLE = f"printable ASCII without control characters, at least {SHORTEST} characters"


def clean_secret(value: str) -> str:
    """The value without white space around it, which pasting may add. No error shows it."""
    value = value.strip()
    if len(value) < SHORTEST or CONTROL.search(value) or not value.isascii():
        raise ValueError(f"allowed: {PRINTABLE}")
    if value[0] == value[-1] and value[0] in "\"'":
        raise ValueError("allowed: no quotes around it, which would be sent as a part of it")
    return value


class SecretBody(StrictModel):
    """A secret to store."""

    name: Name
    type: SecretType
    value: Annotated[StrictStr, AfterValidator(clean_secret)] = accepts(
        PRINTABLE, max_length=10_000
    )


HOSTS = r"^\s*(([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:\d+)?\s*(,\s*|$))*$"
SECONDS = "whole seconds, 1 to 86400"
DATABASES = "sqlite:///path, a path, or postgresql://host/name"


class BackupBlock(StrictModel):
    """The service's own backups of an SQLite database."""

    every: LongSeconds = optional("at least 60 seconds, like 6h, 1d; or never", 86400, ge=60)
    keep: Integer = optional("how many, at least 1", 7, ge=1)
    folder: Location | None = optional("default: the database's path and .backups")


class Settings(BaseModel):
    """Settings from the environment, .env and the head of jobs.yaml. Environment variables have the
    names of the fields in capitals."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    database: Path = Field(description="the SQLite file")
    backup: BackupBlock = BackupBlock()
    database_url: SecretValue | None = optional(DATABASES)
    api_host: str = optional("a host name or address", "127.0.0.1", min_length=1)
    api_port: Port = optional("0 to 65535; 0 takes a free one", 8000)
    admin_token: SecretValue | None = None
    default_poll_interval: int = optional(SECONDS, 120, ge=1, le=86400)
    min_poll_interval: int = optional(SECONDS, 30, ge=1, le=86400)
    max_poll_interval: int = optional(SECONDS, 3600, ge=1, le=86400)
    max_retries: int = optional("0 to 100", 3, ge=0, le=100)
    retry_delay: int = optional("whole seconds, 1 to 3600", 60, ge=1, le=3600)
    trigger_settle_seconds: int = optional(SECONDS, 120, ge=1, le=86400)
    max_requests_per_minute: int | None = optional("1 to 100000, for each key", ge=1, le=100_000)
    openai_base_url: Annotated[Url, AfterValidator(safe_for_secret)] | None = optional(
        "a URL like https://api.openai.com/v1"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = optional(
        "DEBUG, INFO, WARNING, ERROR or CRITICAL", "INFO"
    )
    log_format: Literal["text", "json"] = optional("text or json", "text")
    log_file: Path | None = None
    log_retention_days: int = optional("whole days, 1 to 36500", 90, ge=1, le=36500)
    log_retention_rows: int = optional("log rows, 100 to 1000000000", 100_000, ge=100, le=10**9)
    api_max_connections: int = optional("1 to 1000", 32, ge=1, le=1000)
    admin_hosts: Annotated[str, Field(pattern=HOSTS)] = optional("host names, with commas", "")
    cors_origins: Annotated[str, Field(pattern=ORIGINS)] = optional(
        "origins like https://app.example.com, separated by commas; no *", ""
    )
    secret_key: SecretValue | None = None
    secret_key_file: Path | None = None
    credentials_directory: Path | None = None

    @property
    def store(self) -> Path | str:
        """What `Store` opens: the file, or the URL of a PostgreSQL database."""
        return self.database_url.reveal() if self.database_url else self.database

    @property
    def shown_store(self) -> str:
        """The same for messages: a URL without user, password and options."""
        url = urlsplit(str(self.store))
        host = url.netloc.rpartition("@")[2]
        return f"{url.scheme}://{host}{url.path}" if self.database_url else str(self.database)

    @property
    def backups(self) -> Path:
        """The folder of the service's own backups."""
        return Path(self.backup.folder or f"{self.database}.backups")

    @property
    def has_store(self) -> bool:
        """Whether the database exists; on a server, only asking it would tell."""
        return self.database_url is not None or self.database.exists()

    @property
    def job_context(self) -> dict[str, Any]:
        """The settings that validating a job depends on."""
        bounds = (self.min_poll_interval, self.max_poll_interval)
        return {"bounds": bounds, "default_interval": self.default_poll_interval}


IN_FILE = ("database", "backup")  # settings that no variable of their own name sets
ENVIRONMENT = [name.upper() for name in Settings.model_fields if name not in IN_FILE]


class AdminBlock(StrictModel):
    """Where the admin surface listens."""

    host: Label = optional("a host name or address", "127.0.0.1")
    port: Port = optional("0 to 65535", 8000)


class AlertTarget(ShortForm):
    """A receiver of alerts: exactly one of `apprise`, `webhook` and `command`."""

    apprise: Annotated[Location, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://\S+$")] | None = (
        optional("a URL of Apprise, like slack://...")
    )
    webhook: Url | None = optional("an https:// URL that takes a POST of JSON")
    secret: SecretName | None = optional("the name of a secret of type api, sent to a webhook")
    command: list[Text255] | None = optional(
        "a list: a program, which reads JSON from stdin, and its arguments", min_length=1
    )
    remind: Seconds = optional("at least 60 seconds, or 90m, 4h, 1d", 86400, ge=60)

    @model_validator(mode="after")
    def _one_way(self) -> AlertTarget:
        if sum(way is not None for way in (self.apprise, self.webhook, self.command)) != 1:
            raise ValueError("needs exactly one of apprise, webhook and command")
        if self.secret is not None:
            safe_for_secret(self.webhook or "http://")  # nothing else takes one
        return self

    @property
    def shown(self) -> str:
        """Its name in messages, without the secret parts of a URL."""
        if self.command is not None:
            return f"command {self.command[0]}"
        url = urlsplit(self.webhook or self.apprise or "")
        return f"webhook at {url.netloc}" if self.webhook else f"{url.scheme}:// by Apprise"


class JobsFile(StrictModel):
    """jobs.yaml. Its jobs are validated later, one by one."""

    database: Location = optional("the path of the SQLite file", "teckochecker.db")
    admin: AdminBlock = optional("a block with host and port", AdminBlock())
    backup: BackupBlock = optional("a block with every, keep and folder", BackupBlock())
    secrets: dict[Name, SecretRef] | None = optional("a block of name: {type, env or file}")
    jobs: list[Any] | None = optional("a list of jobs")
    alerts: list[AlertTarget] = optional("a list of Apprise URLs, webhooks or commands", [])
    ping: Url | None = optional("an https:// URL, asked in each minute in which work went well")


# ── Rows ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)  # a frozen one takes five times as long to make, which each check does
class BatchSeen:
    """What an answer of OpenAI says about a batch. Times are unix seconds (Batch object, API
    reference: https://platform.openai.com/docs/api-reference/batch/object)."""

    batch_id: str
    status: Annotated[str, PlainSerializer(lambda said: said or "in_progress", return_type=str)]
    created_at: At | None = None
    expires_at: At | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    requests_total: int = 0
    requests_completed: int = 0
    requests_failed: int = 0
    error: str | None = None


@dataclass(slots=True)
class Batch(BatchSeen):
    """A batch as stored; `status` is "" until the first answer."""

    changed_at: At = 0.0  # when we last saw anything about it change
    missing_since: At | None = None  # first of the 404s in a row
    missing_checks: int = 0


@dataclass(frozen=True, slots=True)
class Trigger:
    """A row of the outbox: one Keboola job to be started exactly once."""

    id: str
    job_id: int
    round: int
    state: TriggerState
    stack_url: str
    secret: str
    body: Annotated[str, PlainSerializer(json.loads, return_type=dict)]  # frozen JSON
    partial: bool  # some batch did not complete
    on_ambiguous: str
    created_at: At
    attempts: int = 0
    searches: int = 0
    sent_at: At | None = None
    unknown_at: At | None = None
    keboola_job_id: str | None = None
    keboola_status: str | None = None
    message: str | None = None
    finished_at: At | None = None
    kind: str = "keboola"  # which `Action` carries it out


@lru_cache(maxsize=1024)
def parse_spec(text: str) -> Spec:
    """A job's definition from its row. Its interval was valid when it was stored; the bounds may
    have changed since. Cached, since each check needs it."""
    data = json.loads(text)
    spec = job_form(data).model_validate(data, context={"bounds": (0, sys.maxsize)})
    return cast(Spec, spec)


@dataclass(slots=True)  # not frozen: to make one would take as long as all the rest of a check
class Job:
    """A job as stored; its definition is parsed when it is first needed."""

    id: int
    name: str
    origin: str  # file or store
    text: str  # its definition, JSON
    secret: str  # that it watches batches with; empty: an ingest
    interval: int  # s; 0: auto
    pace: float  # s between checks at present
    status: JobStatus
    removed_at: float | None
    revision: int
    round: int
    errors_in_row: int
    last_error: str | None
    last_check_at: float | None
    last_ok_at: float
    next_check_at: float | None
    created_at: float
    completed_at: float | None
    has_open: bool = False  # a trigger that is not settled
    batches: list[Batch] = field(default_factory=list)

    @property
    def spec(self) -> Spec:
        """Raises TeckoError if it is damaged or this version refuses it."""
        try:
            return parse_spec(self.text)
        except ValueError as e:  # pydantic's is one
            said = f"the row of job {self.name!r} (ID {self.id}) is damaged"
            raise TeckoError(f"{said}: {' '.join(str(e).split())}") from e

    @property
    def damage(self) -> str | None:
        """Why its definition cannot be used; None if it can."""
        try:
            return None if self.spec else ""
        except TeckoError as e:
            return str(e)

    @property
    def watches(self) -> JobSpec:
        """The definition, for code that handles jobs that watch batches only."""
        assert isinstance(self.spec, JobSpec)
        return self.spec

    @property
    def is_ingest(self) -> bool:
        return not self.secret

    @property
    def is_active(self) -> bool:
        return self.status == "active" and self.removed_at is None

    @property
    def shown_status(self) -> str:
        return "removed" if self.removed_at is not None else self.status

    def differs(self, spec: Spec) -> bool:
        """Whether `spec` is another definition. Equal texts need not be parsed."""
        return self.text != spec.model_dump_json() and (bool(self.damage) or self.spec != spec)


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of polling_logs."""

    id: int
    job_id: int | None
    status: str
    message: str
    actor: str | None  # who asked for it; None: the program itself
    created_at: At


RunStatus = Literal["in_progress", "success", "failed", "interrupted"]
COUNTED = ("processed", "inserted", "updated", "unchanged", "failed")  # records, by what became


@dataclass(frozen=True, slots=True)
class Run:
    """A row of etl_run: one run of an ingest."""

    id: int
    run_id: str
    job_id: int | None
    source: str
    status: RunStatus
    records_processed: int
    records_inserted: int
    records_updated: int
    records_unchanged: int
    records_failed: int
    progress: float | None  # 0 to 1; None: total unknown
    start_time: At
    end_time: At | None
    error_message: str | None
    notes: list[str]  # what drifted, and what else is worth a word

    @property
    def summary(self) -> str:
        return ", ".join(f"{getattr(self, f'records_{name}')} {name}" for name in COUNTED)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rejected record: its place, the reason, and its text as far as it could be read."""

    place: str
    reason: str
    record: str
    number: int = 0  # line or number in the page, to list them in order


@dataclass(frozen=True, slots=True)
class Fetched:
    """One portion read from a source: numbered records, records that could not be read, and the
    position in the part after them."""

    label: str  # of the part, for people: "products.csv line", "page 3 record"
    records: Sequence[tuple[int, Any]]
    rejects: Sequence[Rejected]
    span: tuple[int, int] | None  # numbers read anew: what was rejected there before is forgotten
    part: str = ""  # its name in the checkpoint; empty: none is kept
    state: dict[str, Any] = field(default_factory=dict)  # of a part; empty: it is gone
    progress: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is stored of one `Fetched`, in one transaction."""

    fetched: Fetched
    raws: list[tuple[str, str, bool]]  # id, the record as JSON, whether it could be normalized
    unified: list[tuple[str, str, bytes]]  # id, unified record as JSON, hash
    rejects: list[Rejected]
    counts: Counter[str]  # by the names in COUNTED


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is stored about a source as a whole."""

    records: int
    watermark: str | None
    fields: Mapping[str, Any]  # see `Fields`
    whole: bool  # some run has read it to its end
    parts: Mapping[str, Mapping[str, Any]]  # by file or page: how far, and what tells a change


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended, and what that means for its job."""

    status: RunStatus
    error: str | None
    notes: Sequence[str]
    wait: float  # s until the next run
    watermark: str | None = None  # None: as it was
    forget: bool = False  # what this run read has to be read again


@dataclass(frozen=True, slots=True)
class KeboolaJob:
    """A job as Keboola describes it; statuses as in the OpenAPI description of its queue."""

    id: str
    status: str
    is_finished: bool
    message: str | None


# ── Decisions ─────────────────────────────────────────────────────────────────────────────────


Event = Literal[
    # to a job
    "pause", "resume", "retry", "new_round", "give_up", "fire", "succeed_partly",
    # to a trigger
    "claim", "postpone", "lose", "resend",
    # to a trigger, and with it to its job
    "accept", "reject", "hold", "resettle", "succeed", "fail",
]  # fmt: skip

JOB_STEPS: dict[JobStatus, dict[Event, JobStatus]] = {
    "active": {"pause": "paused", "fire": "triggering", "give_up": "failed", "new_round": "active"},
    "paused": {"resume": "active", "new_round": "paused"},
    "triggering": {
        "accept": "triggered",
        "reject": "failed",
        "hold": "failed",
        "new_round": "active",
    },
    "triggered": {
        "succeed": "completed",
        "succeed_partly": "completed_with_failures",
        "fail": "failed",
        "new_round": "active",
    },
    "completed": {"new_round": "active"},
    "completed_with_failures": {"new_round": "active"},
    "failed": {"retry": "active", "resettle": "triggering", "new_round": "active"},
}

TRIGGER_STEPS: dict[TriggerState, dict[Event, TriggerState]] = {
    "pending": {"claim": "sending", "reject": "rejected"},
    "sending": {
        "accept": "running",
        "postpone": "pending",
        "reject": "rejected",
        "lose": "unknown",
    },
    "unknown": {"accept": "running", "resend": "pending", "hold": "held"},
    "held": {"resettle": "unknown"},
    "running": {"succeed": "succeeded", "fail": "failed"},
    "succeeded": {},
    "failed": {},
    "rejected": {},
}

OUTPUT_SECONDS = 300.0  # s that OpenAI may take to name a finished batch's output file
EXPECTED_BATCH = ("validating", "in_progress", "finalizing", "cancelling")
FINISHED_BATCH = ("completed", "failed", "expired", "cancelled")
KNOWN_BATCH = EXPECTED_BATCH + FINISHED_BATCH
BAD_KEY = (401, 403)
CONFIRM_EVERY = 10  # checks of a batch by a list, at least, to each that asks for it singly
MANY_BATCHES = 1000  # of a key: from there on so many checks, or that would cost more than lists


def next_state(table: dict[S, dict[Event, S]], state: S, event: Event) -> S:
    """Where `event` leads from `state`; an unlisted step is a Conflict and changes nothing."""
    if event not in table[state]:
        raise Conflict(f"there is no step {event!r} from {state!r}")
    return table[state][event]


def trigger_after(trigger: Trigger, event: Event, now: float, **facts: Any) -> Trigger:
    """The trigger after `event`, with the times and counts that belong to it."""
    after = replace(trigger, state=next_state(TRIGGER_STEPS, trigger.state, event), **facts)
    if event == "claim":
        after = replace(after, attempts=after.attempts + 1, sent_at=after.sent_at or now)
    if event == "postpone" and after.unknown_at is None:
        after = replace(after, sent_at=None)  # never on the wire, so its target may still change
    if event in ("lose", "resettle"):
        after = replace(after, unknown_at=now, searches=0)
    if not TRIGGER_STEPS[after.state]:
        after = replace(after, finished_at=now)
    return after


def has_data(batch: BatchSeen) -> bool:
    """Whether any request succeeded. Where OpenAI gives no counts, an output file tells."""
    if batch.requests_total:
        return batch.requests_completed > 0
    return batch.output_file_id is not None


def outcome(batch: BatchSeen) -> Literal["completed", "failed"] | None:
    """What a batch amounts to; None while it is not finished or its status is unknown to us.

    `completed` promises no success: every line may have failed, and then there is no output.
    """
    if batch.status not in FINISHED_BATCH:
        return None
    return "completed" if batch.status == "completed" and has_data(batch) else "failed"


def lacks_output(batch: Batch, now: float) -> bool:
    """Whether a finished batch has output by its counts, and its file may still be named: the two
    need not become visible at once."""
    named = batch.output_file_id is not None or not batch.requests_completed
    return outcome(batch) is not None and not named and abs(now - batch.changed_at) < OUTPUT_SECONDS


def describe_end(batch: BatchSeen) -> str:
    """A finished batch in a few words, for logs and `last_error`."""
    if batch.status == "completed" and not has_data(batch):
        return f"{batch.batch_id} completed without data: not one request succeeded"
    done = f"{batch.requests_completed} of {batch.requests_total} requests succeeded"
    return f"{batch.batch_id} {batch.status}: {batch.error or done}"


seen_fields = attrgetter(*(f.name for f in fields(BatchSeen)))


def batch_after_answer(known: Batch, seen: BatchSeen, now: float) -> Batch:
    """What we know of a batch after an answer about it; `changed_at` moves with any progress."""
    news = seen_fields(seen)
    if (same := news == seen_fields(known)) and known.missing_since is None:
        return known
    return Batch(*(*news, known.changed_at if same else now))


def batch_after_404(known: Batch, now: float) -> Batch:
    """What we know of a batch after OpenAI said 404."""
    since = known.missing_since if known.missing_since is not None else now
    return replace(known, missing_since=since, missing_checks=known.missing_checks + 1)


def is_lost(batch: Batch, now: float) -> bool:
    """OpenAI denied it often and long enough to believe it."""
    waited = now - (batch.missing_since if batch.missing_since is not None else now)
    return batch.missing_checks >= MISSING_CHECKS and waited >= MISSING_SECONDS


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from the batches: go on (None), "fire", or "give_up" for `reason`."""

    event: Event | None
    reason: str = ""
    partial: bool = False


def decide(watch: OpenAIBatches, batches: Sequence[Batch], now: float) -> Verdict:
    """Whether a job fires, fails, or goes on waiting."""
    if lost := [b.batch_id for b in batches if is_lost(b, now)]:
        who = "a key of another project sees 404 too"
        return Verdict("give_up", f"OpenAI does not know {', '.join(lost)} ({who})")
    ends = [outcome(b) for b in batches]
    failed = [b for b, end in zip(batches, ends, strict=True) if end == "failed"]
    if failed and watch.trigger_when == "all_completed":
        return Verdict("give_up", "; ".join(map(describe_end, failed)))
    if not all(ends) or any(lacks_output(b, now) for b in batches):
        return Verdict(None)
    nameless = [b.batch_id for b in batches if b.requests_completed and not b.output_file_id]
    said = f"fired though OpenAI names no output file of {', '.join(nameless)}" if nameless else ""
    return Verdict("fire", said, partial=bool(failed))


def remarks(batches: Sequence[Batch], now: float) -> list[str]:
    """What a person should know of batches that go on being checked."""
    said = []
    for b in batches:
        if lacks_output(b, now):
            said.append(f"{b.batch_id} is {b.status}, and OpenAI has yet to name its output file")
        if outcome(b) is not None:
            continue
        if b.status and b.status not in EXPECTED_BATCH:
            said.append(f"{b.batch_id} has a status we do not know: {b.status!r}")
        elif b.expires_at is not None and now > b.expires_at:
            said.append(f"{b.batch_id} is past its expires_at and still {b.status}")
        elif b.status and now - b.changed_at >= STALLED_SECONDS:
            said.append(
                f"{b.batch_id} has made no progress for {duration_text(now - b.changed_at)}"
            )
    return said


def duration_text(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def outcome_of(batches: Sequence[Batch]) -> dict[str, str]:
    """What became of batches, as Keboola's job is told."""
    ends = {"completed": [b for b in batches if outcome(b) == "completed"]}
    ends["failed"] = [b for b in batches if b not in ends["completed"]]
    values = {"batch_count_total": str(len(batches))}
    for end, group in ends.items():
        values[f"batch_ids_{end}"] = json.dumps([b.batch_id for b in group])
        values[f"batch_count_{end}"] = str(len(group))
    for kind in ("output", "error"):
        ids = [getattr(b, f"{kind}_file_id") for b in batches]
        values[f"{kind}_file_ids"] = json.dumps([i for i in ids if i])
    for count in ("total", "completed", "failed"):
        done = sum(getattr(b, f"requests_{count}") for b in batches)
        values[f"request_count_{count}"] = str(done)
    return values


def target_of(spec: JobSpec, told: Mapping[str, str]) -> dict[str, Any]:
    """A trigger's columns that follow from its job's target: where it goes, and the body of
    Keboola's POST /jobs. In that every value is a non-empty string: Keboola refuses an empty one,
    and ignores variables that a configuration does not define."""
    target = spec.trigger
    values = {**told, "teckochecker_job": spec.name, **target.variables}
    body = {
        "mode": "run",
        "component": target.component_id,
        "config": target.configuration_id,
        "variableValuesData": {"values": [{"name": k, "value": v} for k, v in values.items()]},
    }
    return {
        "stack_url": target.stack_url,
        "secret": str(target.secret),
        "on_ambiguous": target.on_ambiguous,
        "body": json.dumps(body),
    }


def new_trigger(
    job: Job, batches: Sequence[Batch], verdict: Verdict, trigger_id: str, now: float
) -> Trigger:
    """The trigger as it is frozen: a fresh id, and a body that no later change touches."""
    told = outcome_of(batches) | {"teckochecker_trigger_id": trigger_id}
    return Trigger(
        id=trigger_id,
        job_id=job.id,
        round=job.round,
        state="pending",
        partial=verdict.partial,
        created_at=now,
        **target_of(job.watches, told),
    )


def retargeted(trigger: Trigger, spec: JobSpec) -> Trigger:
    """A trigger that is known not to have been sent, with the job's present target; what it says
    of the batches stays."""
    values = json.loads(trigger.body)["variableValuesData"]["values"]
    kept = {v["name"]: v["value"] for v in values if v["name"] in RESERVED_VARIABLES}
    return replace(trigger, **target_of(spec, kept))


def is_refusal(error: UpstreamError) -> bool:
    """Whether the other side understood and said no, so that nothing was started and to ask again
    is no use."""
    return error.permanent and (error.status or 0) >= 400


def after_post(error: UpstreamError) -> Event:
    """What a POST that brought no job id means for the trigger (INTERFACE, Triggering once)."""
    if not error.sent or error.status == 429:
        return "postpone"
    return "reject" if is_refusal(error) else "lose"


def after_search(trigger: Trigger, waited: float, window: float) -> Event | None:
    """What one more successful search without our trigger means, so many seconds after the window
    began; None: search again later.

    The index lags, so only a search made at the end of the window proves an absence.
    """
    if trigger.searches + 1 < SETTLE_SEARCHES or waited < window:
        return None
    return "hold" if trigger.on_ambiguous == "hold" else "resend"


def settle_wait(waited: float, window: float) -> float:
    """Seconds until the next search: four in a window, the last one at its very end."""
    step, left = window / 4, window - waited
    return left if 0 < left < step else step


def doubled(times: int) -> float:
    """2 to this power; after some, every wait has reached its bound."""
    return 2.0 ** min(times, 30)


def backoff(attempt: int, longest: float, jitter: float) -> float:
    """Seconds before retry number `attempt` (from 1): 1, 2, 4, ... at most `longest`, of which
    `jitter` (0 to 1) takes away up to half, so that clients that failed together part ways."""
    return min(BACKOFF_FIRST * doubled(attempt - 1), longest) * (1 - jitter / 2)


def wait_after_error(
    error: TeckoError, errors_in_row: int, interval: float, settings: Settings, jitter: float
) -> float:
    """Seconds until the next try, after the `errors_in_row`-th failure in a row."""
    if isinstance(error, UpstreamError) and error.retry_after is not None:
        return max(BACKOFF_FIRST, min(error.retry_after, LONGEST_WAIT))
    if isinstance(error, UpstreamError) and error.status in BAD_KEY:
        return min(interval * doubled(errors_in_row), max(LONGEST_WAIT, interval))
    if error.permanent or errors_in_row > settings.max_retries:
        return interval
    return min(backoff(errors_in_row, settings.retry_delay, jitter), interval)


def auto_interval(batches: Sequence[Batch], now: float, low: float, high: float) -> float:
    """Seconds until a job with `poll_interval: auto` checks its batches again, from `low` to
    `high`: the shortest wait that one of its unfinished batches asks for.

    A check sees half an interval late, on average, that a batch is done. An interval of AUTO_SHARE
    of the batch's age keeps that below 5 % of its run time: a young batch is checked soon, since it
    may be small, and an old one ever later. It is checked sooner where
    - it is `finalizing` or `cancelling`, which takes minutes: after `low`
    - its progress tells when it will be done: after half of that time
    - it expires: then, since it ends whatever its progress
    """
    waits = [auto_wait(batch, now) for batch in batches if outcome(batch) is None]
    wait = max(low, min(waits, default=low))
    step = math.floor(math.log(wait / low, AUTO_STEP) + 1e-9)
    return min(low * AUTO_STEP**step, high)


def auto_wait(batch: Batch, now: float) -> float:
    """What one batch asks for, without bounds."""
    if batch.created_at is None or batch.status in ("", "finalizing", "cancelling"):
        return 0.0
    age = max(now - batch.created_at, 0.0)
    waits = [AUTO_SHARE * age]
    done = batch.requests_completed + batch.requests_failed
    if 0 < done <= batch.requests_total:  # as fast as so far, from when that was seen
        left = (batch.changed_at - batch.created_at) * (batch.requests_total / done - 1)
        waits.append(max(left - (now - batch.changed_at), 0.0) / 2 or AUTO_SHARE * age)
    if batch.expires_at is not None and batch.expires_at > now:
        waits.append(batch.expires_at - now)
    return min(waits)


def is_turn_to_confirm(job_id: int, interval: float, batches: int, now: float) -> bool:
    """Whether it is this job's turn to have its batches asked for singly though a list, which
    shows so many batches, has them. Jobs take turns: each gets one in CONFIRM_EVERY checks or in an
    hour, and fewer where there are so many batches that this would cost more than the list."""
    period = max(CONFIRM_EVERY, min(batches // 2, int(3600 / interval)))
    period = MANY_BATCHES if batches >= MANY_BATCHES else period
    return batches > 0 and (job_id + int(now / interval)) % period == 0


def unix_time(header: str | None) -> float | None:
    """The date in a header (RFC 9110, section 5.6.7); None where it is none of this century."""
    try:
        date = parsedate_to_datetime(header or "")
    except (ValueError, OverflowError):
        return None
    at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return at if 946_684_800 <= at < 4_102_444_800 else None


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds out of a Retry-After header: a number or a date (RFC 9110, section 10.2.3)."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(value or ""))
    at = unix_time(value)
    return None if at is None else max(0.0, at - now)


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────


def read_text(path: Path, most: int) -> str:
    """The text of a regular file. Raises OSError, also for more than `most` bytes, for what is not
    UTF-8, and for a pipe, which would block the reader until somebody writes to it."""
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise OSError(errno.EILSEQ, f"it is not UTF-8: {e.reason}, byte {e.start}") from None


@dataclass(frozen=True, slots=True)
class SealedSecret:
    """A row of the table `secrets`."""

    id: int
    name: str
    type: str
    value: bytes
    key_id: str
    created_at: float


def parse_master_key(text: str) -> bytes:
    """32 bytes from url-safe base64. A key that is not random (an example, or one letter repeated)
    is refused, since anybody could guess it."""
    good = re.fullmatch(r"[A-Za-z0-9_-]{43}=", text.strip())
    key = base64.urlsafe_b64decode(good[0]) if good else b""
    if len(key) != 32 or len(set(key)) < 8:
        length = len(text.strip())
        said = f"the master key is not 32 random bytes in base64 ({length} of 44 characters)"
        raise SecretError(said, hint=f"{COMMAND} init makes one where there is none")
    return key


def new_master_key() -> str:
    return base64.urlsafe_b64encode(token_bytes(32)).decode()


@contextlib.contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """An empty file to write, which replaces `path` durably at the end of the block; after an error
    `path` is as before. Only its owner may read it (0600), or whoever could read the old one, but
    never everybody."""
    before = path.stat() if path.exists() else None
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        yield Path(draft)
        if before is not None:
            os.fchown(handle, before.st_uid, before.st_gid)
            os.fchmod(handle, before.st_mode & 0o660)
        os.fsync(handle)
        os.replace(draft, path)
    finally:
        os.close(handle)
        Path(draft).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # without it a power loss may bring the old file back
    os.close(folder)


def write_private(path: Path, text: str) -> None:
    """Write the file that `path` leads to, all or nothing, see `atomic_replacement`."""
    path = path.resolve()
    try:
        with atomic_replacement(path) as draft:
            draft.write_text(text)
    except OSError as e:
        raise SecretError(f"cannot write {path}: {e.strerror}") from None


class Vault:
    """The master keys, separated by commas or white space: the first one seals (encrypts) secrets,
    all of them open. After a `secret rotate` that was interrupted, there are two."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys: dict[str, str] = {}  # key id -> key in base64; the first one seals

    @property
    def file(self) -> Path | None:
        """The key file in use; None if the key comes from SECRET_KEY."""
        s = self._settings
        if s.secret_key is not None or s.secret_key_file is not None:
            return None if s.secret_key else s.secret_key_file
        credential = s.credentials_directory and s.credentials_directory / "secret_key"
        beside = s.database.parent / "teckochecker.key"
        return credential if credential and credential.exists() else beside

    def load(self, *, required: bool) -> None:
        """Read the keys. If none is `required`, it is no error that there is none."""
        s, file = self._settings, self.file
        if file is None:
            text = s.secret_key.reveal() if s.secret_key else ""
        elif file.exists():
            try:
                text = read_text(file, 10_000)
            except OSError as e:
                raise SecretError(f"cannot read the master key {file}: {e.strerror}") from None
        elif required or s.secret_key_file is not None:
            raise SecretError(f"there is no master key at {file}", hint=f"{COMMAND} init makes one")
        else:
            return
        texts = re.split(r"[\s,]+", text.strip())
        self._keys = {hashlib.sha256(parse_master_key(t)).hexdigest()[:16]: t for t in texts}
        for key in texts:
            SecretValue(key, "master key")  # so that it is redacted everywhere

    @property
    def key_id(self) -> str:
        """The id of the key that seals: 16 hexadecimal digits of its SHA-256."""
        if not self._keys:
            self.load(required=True)
        return next(iter(self._keys))

    def seal(self, name: str, kind: str, value: SecretValue) -> tuple[bytes, str]:
        """Nonce, ciphertext and tag (AES-256-GCM, NIST SP 800-38D), and the id of the key. Name,
        type and key id are authenticated: a value moved to another row does not decrypt."""
        self.load(required=True)  # another process may have rotated the key meanwhile
        key_id, nonce = self.key_id, token_bytes(12)
        bound = json.dumps([name, kind, key_id]).encode()
        box = self._cipher(key_id).encrypt(nonce, value.reveal().encode(), bound)
        return nonce + box, key_id

    def open(self, row: SealedSecret) -> SecretValue:
        from cryptography.exceptions import InvalidTag

        if row.key_id not in self._keys:
            self.load(required=True)  # another process may have rotated the key meanwhile
        if row.key_id not in self._keys:
            where = self.file or "SECRET_KEY"
            raise SecretError(f"secret {row.name!r} was sealed with a key that is not in {where}")
        bound = json.dumps([row.name, row.type, row.key_id]).encode()
        try:
            plain = self._cipher(row.key_id).decrypt(row.value[:12], row.value[12:], bound)
        except (InvalidTag, ValueError):
            said = f"secret {row.name!r} does not decrypt: its row was changed"
            raise SecretError(said) from None
        return SecretValue(plain.decode(), row.name)

    def _cipher(self, key_id: str) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(parse_master_key(self._keys[key_id]))

    def begin_rotation(self) -> None:
        """Add a new key as the first one of the key file, so that it seals from now on. No key is
        dropped, since secrets may still be sealed with any of them after an interrupted rotation.
        FILE.old keeps the previous content until the next rotation. Call it in a transaction of
        the store, so that a second rotation waits for this one."""
        self.load(required=True)
        if self.file is None:
            if len(self._keys) < 2:
                said = "SECRET_KEY is set in the environment, which this command cannot change"
                fix = "set SECRET_KEY=NEW,OLD, run this again, then drop OLD"
                raise SecretError(said, hint=fix)
            return
        kept = self._keys.values()
        write_private(self.old_file(), "\n".join(kept) + "\n")
        self._write([new_master_key(), *kept])

    def end_rotation(self, needed: Collection[str]) -> None:
        """Drop every key but the first one and those whose ids are `needed`, because rows are
        sealed with them. Call it in a transaction, too."""
        self.load(required=True)
        if self.file is not None:
            kept = [k for n, k in enumerate(self._keys) if n == 0 or k in needed]
            self._write([self._keys[key_id] for key_id in kept])

    def old_file(self) -> Path:
        """The copy of the key file from before the last rotation."""
        assert self.file is not None
        file = self.file.resolve()
        return file.with_name(f"{file.name}.old")

    def _write(self, texts: Sequence[str]) -> None:
        assert self.file is not None
        write_private(self.file, "\n".join(texts) + "\n")
        self.load(required=True)


# ── YAML ──────────────────────────────────────────────────────────────────────────────────────

Mark = tuple[int, int]  # line and column, from 1
PLAIN = re.compile("(?P<null>~|null|)|(?P<bool>true|false)|(?P<int>-?(?:0|[1-9][0-9]{0,17}))")
YAML_BYTES = 10 << 20  # of jobs.yaml: some 20,000 jobs
YAML_DEPTH = 40  # levels; a job has six
YAML_REPEATED = 100_000  # values that aliases may repeat: nested ones grow exponentially
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
PRIVATE = {"secrets", "alerts", "ping"}  # blocks whose values no message shows
# A line with one of these is not shown, whatever it has.
PRIVATE_LINE = re.compile("(?i)value|header|token|password|key|secrets|ping|webhook|- *.?[a-z]+://")


BRIEF = reprlib.Repr()  # some structures are small in memory, but endless when they are printed
BRIEF.maxlevel, BRIEF.maxlist, BRIEF.maxdict, BRIEF.maxstring = 3, 12, 12, 12_000


def repr_excerpt(value: object) -> str:
    """A value as Python writes it, short enough for a message, and redacted."""
    return excerpt(BRIEF.repr(value), 80)


def did_you_mean(word: object, names: Iterable[str], closeness: float = 0.65) -> str:
    """A question to add to an unknown word, if a known one is similar."""
    close = difflib.get_close_matches(str(word)[:80], names, 1, closeness)
    return f" (did you mean {close[0]!r}?)" if close else ""


class JobsYaml:
    """The data of jobs.yaml, with the line of each value and every problem met in reading it.

    Only null, true, false and decimal integers have types; everything else is text. So
    `region: no` is not False, `configuration_id: 0123` is not 83, and 1.10 stays 1.10.
    """

    def __init__(self, path: Path, env: Mapping[str, str]) -> None:
        self.path, self.env = path, env
        self.problems: list[Problem] = []
        self._lines: list[str] = []
        self._left = YAML_REPEATED  # values that there may still be
        self._marks: dict[int, dict[str | int, Mark]] = {}  # by id of a block or list, by key
        data = self._read() if path.exists() else None
        if data is not None and not isinstance(data, dict):
            kind = "a list" if isinstance(data, list) else "text"
            self.problems.append(problem_at((), kind, ", ".join(JobsFile.model_fields)))
            self._lines = []  # not shown: it may be a key
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}

    def _read(self) -> Any:
        import yaml

        try:
            text = read_text(self.path, YAML_BYTES)
            self._lines = text.splitlines()
            self._left += len(text)  # without aliases, there are fewer values than characters
            loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # all is text to it
            node = loader(text).get_single_node()
            return None if node is None else self._plain(node, ())
        except yaml.MarkedYAMLError as e:
            raise self._refused(e.problem_mark, f"not YAML: {e.problem or e.context}") from None
        except (yaml.YAMLError, RecursionError) as e:
            what = f"not a YAML text: {str(e).splitlines()[0]}"
        except OSError as e:
            what = f"cannot be read: {e.strerror}"
        raise Invalid([Problem(found=what, file=str(self.path))])

    def _refused(self, start: Any, what: str) -> Invalid:
        return Invalid([self._placed(Problem(found=what), mark_of(start))])

    def _plain(self, node: Any, at: Place) -> Any:
        """The value of a node. What an alias repeats is made anew, and counts again."""
        self._left -= 1
        if self._left < 0:
            what = f"its aliases repeat more than {YAML_REPEATED} values"
            raise self._refused(node.start_mark, what)
        if len(at) > YAML_DEPTH:
            what = f"nested more than {YAML_DEPTH} levels deep, or an alias that contains itself"
            raise self._refused(node.start_mark, what)
        make = {"mapping": self._block, "sequence": self._items}.get(node.id, self._scalar)
        return make(node, at)

    def _items(self, node: Any, at: Place) -> list[Any]:
        items = [self._plain(item, (*at, i)) for i, item in enumerate(node.value)]
        self._marks[id(items)] = {i: mark_of(item.start_mark) for i, item in enumerate(node.value)}
        return items

    def _block(self, node: Any, at: Place) -> dict[str, Any]:
        block: dict[str, Any] = {}
        marks = self._marks[id(block)] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.id != "scalar":
                what = "a list or block as a key; allowed: text"
                raise self._refused(key_node.start_mark, what)
            value = self._plain(value_node, (*at, key))
            if key == "<<" and not key_node.style:
                merged += value if isinstance(value, list) else [value]
                continue
            if key in block:
                said = f'duplicate key "{key}" (first on line {marks[key][0]})'
                self.problems.append(problem_at((*at, key), said))
            marks[key], block[key] = mark_of(key_node.start_mark), value
        for other in merged:
            if not isinstance(other, dict):
                raise self._refused(node.start_mark, "<< takes blocks only")
            for key in other.keys() - block.keys():
                block[key], marks[key] = other[key], self._marks[id(other)][key]
        return block

    def _scalar(self, node: Any, at: Place) -> str | int | None:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        found = None if kind == "str" and node.style else PLAIN.fullmatch(text)  # quoted: no style
        if found and kind in ("str", found.lastgroup):
            return int(text) if found["int"] else {"true": True, "false": False}.get(text)
        if kind != "str":
            self.problems.append(problem_at(at, f"the tag {kind}", "plain text and numbers"))
        for name in VARIABLE.findall(text):
            # under `secrets:` an unset one is an error only when the secret is used, for
            # $CREDENTIALS_DIRECTORY is set for the service alone
            if name not in self.env and at[:1] != ("secrets",):
                said = f"${{{name}}} is not set in the environment"
                self.problems.append(problem_at(at, said))
        return VARIABLE.sub(lambda found: self.env.get(found[1], found[0]), text)

    def mark(self, at: Place) -> Mark:
        """Line and column of a place, or of the innermost block around it that exists."""
        data: Any = self.data
        mark = (1, 1)
        for part in at:
            marks = self._marks.get(id(data), {})
            if part not in marks:
                break
            mark, data = marks[part], data[part]
        return mark

    def placed(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with file, line and job, in the order of the lines."""
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: self.mark(problem.place))
        return [self._placed(problem, self.mark(problem.place)) for problem in ordered]

    def _placed(self, problem: Problem, mark: Mark) -> Problem:
        line, column = mark
        source = self._lines[line - 1][:500] if line <= len(self._lines) else ""
        if {*problem.place[:1]} & PRIVATE or PRIVATE_LINE.search(source):
            source = ""
        where, file = self._who(problem.place), str(self.path)
        return replace(problem, where=where, file=file, line=line, column=column, source=source)

    def _who(self, at: Place) -> str:
        if at[:1] != ("jobs",) or len(at) < 2 or not isinstance(at[1], int):
            return dotted(at)
        item = self.data["jobs"][at[1]]
        name = item.get("name") if isinstance(item, dict) else None
        job = f"job {name!r}" if isinstance(name, str | int) and name else f"job number {at[1] + 1}"
        return f"{job}: {dotted(at[2:]) or 'job'}"


def mark_of(start: Any) -> Mark:
    """Line and column of PyYAML's mark, if it has set one."""
    return (start.line + 1, start.column + 1) if start else (1, 1)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that may occur in a field's value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def locate_error(model: type[BaseModel], path: Place) -> tuple[Place, type[BaseModel], str]:
    """Where an error of pydantic is in the input, the innermost model there, and what its field
    allows. pydantic's path also has the tags of unions, which are not in the input."""
    needed = [name for name, info in model.model_fields.items() if info.is_required()]
    allowed = f"a block with {', '.join(needed[:-1])} and {needed[-1]}" if needed else ""
    place: Place = ()
    choice = [model]
    for part in path:
        if len(choice) > 1 and part in SOURCES:
            choice = [SOURCES[str(part)]]
            continue
        if part == "[key]":
            continue
        place = (*place, part)
        name = names_in_input(choice[0]).get(str(part)) if choice else None
        if name is not None:
            model, info = choice[0], choice[0].model_fields[name]
            allowed, choice = info.description or allowed, models_in(info.annotation)
    return place, choice[0] if len(choice) == 1 else model, allowed.partition("\n")[0]


def unknown_key(place: Place, model: type[BaseModel]) -> Problem:
    name = str(place[-1])
    if same := names_in_input(model).get(name):
        return problem_at(place, f"{same} means the same, and is there, too")
    known = sorted({*model.model_fields, *(["ingest"] if model is JobSpec else [])})
    return problem_at(place, f"an unknown key{did_you_mean(name, known)}", ", ".join(known))


def problem_of(model: type[BaseModel], error: Any) -> Problem:
    """What was found and what is allowed, from an error of pydantic. A value is not shown where a
    secret could be."""
    place, inner, allowed = locate_error(model, error["loc"])
    if error["type"].startswith("union_tag") and isinstance(error["input"], dict):
        tag = error["ctx"].get("tag")
        found = repr_excerpt(tag) if tag else MISSING
        return problem_at((*place, "type"), found, " or ".join(SOURCES))
    if error["type"] == "extra_forbidden":
        return unknown_key(place, inner)
    if error["type"] == "missing":
        return problem_at(place, MISSING, allowed)
    why = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    if why.startswith("allowed: "):
        allowed = why.removeprefix("allowed: ")
    elif why:
        allowed += f" ({why})"
    hidden = inner in (SecretRef, SecretBody) or place[-1:] == ("header",)
    hidden = hidden or (model is JobsFile and bool({*place[:1]} & PRIVATE))
    return problem_at(place, "" if hidden else repr_excerpt(error["input"]), allowed)


def parse(model: type[M], data: Any, context: Mapping[str, Any] = MappingProxyType({})) -> M:
    """`data` as `model`. Raises Invalid, which names every wrong field as it was given."""
    try:
        return model.model_validate(data, context={**context})
    except ValidationError as e:
        errors = e.errors(include_url=False)
        raise Invalid([problem_of(model, error) for error in errors]) from None


def job_spec(data: Any, context: Mapping[str, Any] = MappingProxyType({})) -> Spec:
    """A job in any of its forms. Raises Invalid as `parse` does."""
    if isinstance(data, dict) and not {*POLL_INTERVAL.choices} & data.keys():
        data = {"poll_interval": context.get("default_interval", 120)} | data
    job = parse(job_form(data), data, context)
    return job.to_spec() if isinstance(job, FlatJob) else job


# ── Configuration ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Config:
    """Settings, references to secrets, and jobs. `jobs` is None if the file is missing, empty, or
    has no `jobs:`; then the stored jobs stay as they are.

    `problems` is what is wrong with the jobs; commands that run none go on despite it.
    """

    path: Path
    settings: Settings
    env: Mapping[str, str]
    secrets: Mapping[str, SecretRef]
    jobs: list[Spec] | None
    text: JobsYaml
    problems: list[Problem]
    warnings: list[str]
    alerts: Sequence[AlertTarget]
    ping: str | None

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self.path.absolute().parent


def database_of(url: str, base: Path, where: str) -> dict[str, Any]:
    """The settings from DATABASE_URL: sqlite:///relative, sqlite:////absolute, a path, or the URL
    of a PostgreSQL database, whose password is a secret. Symbolic links are followed, so that each
    file has one path."""
    scheme, found, rest = url.partition("://")
    if found and scheme in ("postgresql", "postgres"):
        SecretValue(unquote(urlsplit(url).password or ""), "DATABASE_URL's password")
        beside = base / "teckochecker.db"  # no such file, but key and lock have its name
        given = {"database": beside.resolve(), "database_url": SecretValue(url, "DATABASE_URL")}
        return given | {"backup": BackupBlock(every=NEVER)}
    path = rest.removeprefix("/") if found else url
    local = scheme == "sqlite" and rest.startswith("/") if found else ":" not in url
    if not local or path in ("", ":memory:") or "?" in path or "\0" in path:
        shown = f"{scheme}://" if found else repr_excerpt(url)
        raise Invalid([Problem(where, shown, DATABASES)])
    return {"database": (base / path).resolve()}


def settings_from(env: Mapping[str, str], file: JobsFile, base: Path, file_name: str) -> Settings:
    """Settings; the environment wins over jobs.yaml. Raises Invalid with every wrong value."""
    written = {name: env[name].strip() for name in ENVIRONMENT if env.get(name, "").strip()}
    given: dict[str, Any] = {"api_host": file.admin.host, "api_port": file.admin.port}
    folder = file.backup.folder and str(base / file.backup.folder)
    given["backup"] = file.backup.model_copy(update={"folder": folder})
    given |= {name.lower(): value for name, value in written.items()}
    url = given.pop("database_url", "")
    name = "DATABASE_URL" if url else f"{file_name}: database"
    given |= database_of(url or file.database, base, name)
    shapes: dict[str, Callable[[str], Any]] = {
        "admin_token": SecretValue,
        "secret_key": SecretValue,
        "log_level": str.upper,
        "log_format": str.lower,
        "secret_key_file": base.joinpath,
        "log_file": base.joinpath,
    }
    given |= {name: shape(given[name]) for name, shape in shapes.items() if name in given}
    try:
        settings = parse(Settings, given)
    except Invalid as e:
        named = [replace(p, where=f"environment: {p.where.upper()}") for p in e.problems]
        raise Invalid(named) from None
    if problems := [*contradictions(settings)]:
        raise Invalid(problems)
    return settings


def contradictions(s: Settings) -> Iterator[Problem]:
    """What is wrong with settings that are valid one by one."""
    low, usual, high = s.min_poll_interval, s.default_poll_interval, s.max_poll_interval
    if not low <= usual <= high:
        allowed = f"{low} to {high}, from MIN_POLL_INTERVAL to MAX_POLL_INTERVAL"
        yield Problem("environment: DEFAULT_POLL_INTERVAL", str(usual), allowed)
    if s.admin_token is not None and len(s.admin_token.reveal()) < 8:
        allowed = "at least 8, for it is all that keeps others out"
        yield Problem("environment: ADMIN_TOKEN", "fewer characters", allowed)
    if s.api_host not in LOOPBACK and s.admin_token is None:
        listens = f"the admin surface would listen on {s.api_host} without a token"
        yield Problem(found=f"{listens}; set ADMIN_TOKEN, or leave API_HOST at 127.0.0.1")


def read_dot_env(path: Path) -> tuple[dict[str, str], list[str]]:
    """The variables of .env, and a warning for each name without a value, or which may be a
    misspelt setting."""
    from dotenv import dotenv_values

    if not path.exists():
        return {}, []
    try:
        text = io.StringIO(read_text(path, 1 << 20))
    except OSError as e:
        raise Invalid([f"{path}: cannot be read: {e.strerror}"]) from None
    warnings = []
    written = dotenv_values(stream=text, interpolate=False)
    for name, value in written.items():
        if value is None:
            warnings.append(f"{path}: {name} is ignored, for it is not NAME=value")
        elif name not in ENVIRONMENT and (question := did_you_mean(name, ENVIRONMENT, 0.85)):
            warnings.append(f"{path}: {name} is no setting of TeckoChecker{question}")
    return {name: value for name, value in written.items() if value is not None}, warnings


def all_texts(value: object, at: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text in a job or block, with its place."""
    if isinstance(value, str):
        yield at, value
    elif len(at) < 5 and isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for part, inner in pairs:
            yield from all_texts(inner, (*at, part))


# In a URL: a password, and words that look like tokens, in any part of it.
TOKEN = re.compile(r"(?<=:)[^/:@]+(?=@)|[\w%+-]{16,}|\b(?=\w*\d)(?=\w*[A-Z])\w{8,}\b")


def register_secrets(data: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Have redacted what `secrets:` refers to, so that no error message shows it, and the URLs that
    alerts go to, as a whole and the secret parts of each."""
    for place, name in all_texts(data.get("secrets")):
        if place[-1:] == ("env",) and env.get(name, "").strip():
            SecretValue(env[name].strip(), name)
    for _, text in all_texts([data.get("alerts"), data.get("ping")]):
        for value in (text, *map(unquote, TOKEN.findall(text))) if "://" in text else ():
            SecretValue(value)


def load_config(path: Path, environ: Mapping[str, str], *, must_exist: bool = False) -> Config:
    """Read jobs.yaml, the .env beside it and the environment.

    Raises Invalid for wrong settings; what is wrong with jobs is in the result's `problems`.
    """
    base = path.absolute().parent
    if must_exist and not path.exists():
        raise Invalid([f"{path}: there is no such file"], hint=f"{COMMAND} init writes a first one")
    dot_env, warnings = read_dot_env(base / ".env")
    env = {**dot_env, **environ}
    text = JobsYaml(path, env)
    register_secrets(text.data, env)
    head = {k: v for k, v in text.data.items() if v is not None}
    wrong = [p for p in text.problems if len(p.place) < 2 or p.place[0] != "jobs"]
    file = JobsFile()
    try:
        file = parse(JobsFile, head)
    except Invalid as e:  # go on, to report all problems at once
        wrong += e.problems
    settings = settings_from(env, file, base, f"{path}:{text.mark(('database',))[0]}")
    key = Vault(settings).file
    if key is not None and key.exists() and key.stat().st_mode & 0o004:
        warnings.append(f"{key} can be read by all users of this machine: chmod 600 {key}")
    items = head.get("jobs")
    jobs, in_jobs = read_jobs(items if isinstance(items, list) else [], settings, text)
    if wrong:
        raise Invalid(text.placed([*wrong, *in_jobs]))
    specs, problems = None if items is None else jobs, text.placed(in_jobs)
    told = file.alerts, file.ping
    return Config(path, settings, env, file.secrets or {}, specs, text, problems, warnings, *told)


def read_jobs(
    items: list[Any], settings: Settings, text: JobsYaml
) -> tuple[list[Spec], list[Problem]]:
    """The valid jobs, and what is wrong with the others."""
    jobs: list[Spec] = []
    problems = [p for p in text.problems if len(p.place) > 1 and p.place[0] == "jobs"]
    firsts: dict[str, int] = {}
    for i, item in enumerate(items):
        try:
            jobs.append(job_spec(item, settings.job_context))
        except Invalid as e:
            problems += [replace(p, place=("jobs", i, *p.place)) for p in e.problems]
        named = isinstance(item, dict) and "name" in item
        first = firsts.setdefault(str(item["name"]).strip(), i) if named else i
        if first != i:
            said = f"line {text.mark(('jobs', first))[0]} has a job of this name already"
            problems.append(problem_at(("jobs", i, "name"), said))
    return jobs, problems


def read_reference(name: str, ref: SecretRef, config: Config) -> SecretValue:
    """A secret that jobs.yaml refers to. It is read at each use, since its file may change."""
    if unset := VARIABLE.search(f"{ref.env} {ref.file}"):
        raise SecretError(f"secret {name!r}: {unset[0]} is not set in the environment")
    try:
        text = config.env[ref.env] if ref.env else read_text(config.base / str(ref.file), 100_000)
        return SecretValue(clean_secret(text), name)
    except KeyError:
        why = f"the environment variable {ref.env} is not set"
    except OSError as e:
        why = f"cannot read {ref.file}: {e.strerror}"
    except ValueError as e:
        why = f"its value cannot be used; {e}"
    raise SecretError(f"secret {name!r}: {why}")


def secret_problems(
    job: Mapping[str, Any], stored: Mapping[str | int, str], config: Config
) -> list[Problem]:
    """Which secrets of a job do not exist, are of another type, or cannot be read, and where the
    job contains a secret's value instead of its name. `stored` has the types of the secrets in the
    store, by name and by id."""
    said: list[Problem] = []
    for place, kind, name in secrets_of(job):
        ref = config.secrets.get(str(name)) if name not in stored else None
        found = ref.type if ref else stored.get(name)
        if found is None and isinstance(name, int):
            of = "OpenAI" if kind == "openai" else kind.title()
            said.append(problem_at(place, f"{of} secret with ID {name} not found"))
        elif found is None:
            names = sorted({*config.secrets, *(n for n in stored if isinstance(n, str))})
            there = f"{did_you_mean(name, names)} (there are: {', '.join(names) or 'none yet'})"
            fix = f"`secret add --name {name} --type {kind}` stores it"
            said.append(problem_at(place, f"there is no secret {name!r}{there}; {fix}"))
        elif found != kind:
            said.append(problem_at(place, f"secret {name!r} is of type {found}; needed: {kind}"))
        elif ref and (why := why_unreadable(str(name), ref, config)):
            said.append(problem_at(place, why))
    held = "the value of a secret, which would be stored and shown; name it in `secret` instead"
    for place, text in all_texts(job):
        if any(form in text for form in SecretValue.forms):
            said.append(problem_at(place, held))
    return said


def why_unreadable(name: str, ref: SecretRef, config: Config) -> str:
    """Why the secret cannot be read; empty if it can."""
    try:
        read_reference(name, ref, config)
    except SecretError as e:
        return str(e)
    return ""


def apprise_of(url: str) -> Any:
    """Apprise's service for a URL. Raises TeckoError if there is none, or no Apprise."""
    try:
        import apprise
    except ImportError as e:
        said = "this needs a package that is missing; run: python -m pip install apprise"
        raise TeckoError(said) from e
    service = apprise.Apprise.instantiate(url)
    if service is None:
        raise TeckoError(f"Apprise does not know such a URL of {url.partition(':')[0]}")
    return service


def alert_problems(config: Config, stored: Mapping[str | int, str]) -> Iterator[Problem]:
    """What would keep alerts from being sent."""
    for i, target in enumerate(config.alerts):
        if target.secret is not None:
            for problem in secret_problems({"ingest": {"secret": target.secret}}, stored, config):
                yield replace(problem, place=("alerts", i, "secret"))
        try:
            if target.apprise is not None:
                apprise_of(target.apprise)
        except TeckoError as e:
            yield problem_at(("alerts", i), str(e))


def all_problems(
    config: Config, stored: Mapping[str | int, str], *, unused: bool = False
) -> list[Problem]:
    """Everything that keeps this configuration from running; if `unused`, also what is wrong with
    secrets that no job uses."""
    found: list[Problem] = []
    used: set[str | int] = set()
    for i, item in enumerate(config.text.data.get("jobs") or []):
        if isinstance(item, dict):
            used |= {name for _, _, name in secrets_of(item)}
            wrong = secret_problems(item, stored, config)
            found += [replace(p, place=("jobs", i, *p.place)) for p in wrong]
    found += alert_problems(config, stored)
    for name, ref in config.secrets.items():
        if unused and name not in used and (why := why_unreadable(name, ref, config)):
            found.append(problem_at(("secrets", name), why))
    problems = dict.fromkeys([*config.problems, *config.text.placed(found)])
    return sorted(problems, key=lambda problem: (problem.line, problem.column))


# ── Schema ────────────────────────────────────────────────────────────────────────────────────

# One schema for both engines: SQLite takes any type name. {id} becomes each engine's words for a
# number that is never used twice. Times are unix seconds, UTC. A new database is made as version 1
# and then takes the same steps to the newest version as an old one.
RAW_TABLE = """
CREATE TABLE raw_data_{kind} (
    id {id},
    source TEXT NOT NULL,                    -- name of the job
    external_id TEXT NOT NULL,               -- what the record says it is
    raw_data TEXT NOT NULL,                  -- the record as received, JSON
    ingested_at DOUBLE PRECISION NOT NULL,
    processed BOOLEAN NOT NULL,              -- false: it was rejected, see etl_reject
    UNIQUE (source, external_id)
);
"""
COUNTED_COLUMNS = ",\n    ".join(f"records_{n} BIGINT NOT NULL DEFAULT 0" for n in COUNTED)
SCHEMA = f"""
CREATE TABLE schema_version (
    version BIGINT NOT NULL,
    changes BIGINT NOT NULL                  -- by others than the service; not used on SQLite
);
CREATE TABLE secrets (
    id {{id}},
    name TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL,                      -- openai, keboola or api
    value BYTEA NOT NULL,                    -- nonce, ciphertext and tag
    key_id TEXT NOT NULL,                    -- the master key that sealed it
    created_at DOUBLE PRECISION NOT NULL
);
CREATE TABLE polling_jobs (
    id {{id}},
    name TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL,                    -- file (jobs.yaml) or store (command line, REST)
    spec TEXT NOT NULL,                      -- the job as its author wrote it, JSON
    watch_secret TEXT NOT NULL,              -- name of the secret it watches with; empty: an ingest
    trigger_secret TEXT NOT NULL,            -- name of the secret it triggers with; empty: likewise
    ingest_secret TEXT,                      -- name of an ingest's secret; NULL: none
    poll_interval_seconds BIGINT NOT NULL,   -- 0: auto
    pace DOUBLE PRECISION NOT NULL,          -- s between checks at present, also where it is auto
    status TEXT NOT NULL,                    -- see JOB_STEPS
    removed_at DOUBLE PRECISION,             -- when it left jobs.yaml; NULL: it is there
    revision BIGINT NOT NULL DEFAULT 1,      -- grows with each change of spec
    round BIGINT NOT NULL DEFAULT 1,         -- a round fires at most once: see triggers
    fires_again BOOLEAN NOT NULL DEFAULT FALSE, -- this round was asked for by `job retry`
    errors_in_row BIGINT NOT NULL DEFAULT 0,
    last_error TEXT,                         -- NULL: nothing to say
    last_check_at DOUBLE PRECISION,          -- NULL: never checked
    last_ok_at DOUBLE PRECISION NOT NULL,    -- last good check, or since when one is expected
    next_check_at DOUBLE PRECISION,          -- NULL: none is planned
    created_at DOUBLE PRECISION NOT NULL,
    completed_at DOUBLE PRECISION            -- NULL: it has not ended
);
CREATE INDEX jobs_by_key ON polling_jobs (watch_secret, id)
    WHERE status = 'active' AND removed_at IS NULL;
CREATE TABLE polling_batches (
    job_id BIGINT NOT NULL REFERENCES polling_jobs (id) ON DELETE CASCADE,
    position BIGINT NOT NULL,                -- its place in batch_ids
    batch_id TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT '',         -- as OpenAI says; empty: not seen yet
    created_at DOUBLE PRECISION,             -- NULL, here and below: OpenAI did not say
    expires_at DOUBLE PRECISION,
    output_file_id TEXT,
    error_file_id TEXT,
    requests_total BIGINT NOT NULL DEFAULT 0,
    requests_completed BIGINT NOT NULL DEFAULT 0,
    requests_failed BIGINT NOT NULL DEFAULT 0,
    error TEXT,                              -- why its input was refused
    changed_at DOUBLE PRECISION NOT NULL,    -- when we last saw it make progress
    missing_since DOUBLE PRECISION,          -- first of the latest 404s in a row; NULL: none
    missing_checks BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, position)
);
CREATE INDEX batches_by_id ON polling_batches (batch_id);
CREATE TABLE triggers (
    id TEXT PRIMARY KEY,                     -- also in the body, for Keboola's search
    job_id BIGINT NOT NULL REFERENCES polling_jobs (id) ON DELETE CASCADE,
    round BIGINT NOT NULL,
    state TEXT NOT NULL,                     -- see TRIGGER_STEPS
    kind TEXT NOT NULL,                      -- what it starts: keboola
    stack_url TEXT NOT NULL,
    secret TEXT NOT NULL,                    -- name of the Keboola token
    body TEXT NOT NULL,                      -- of POST /jobs, frozen with the decision
    aim TEXT NOT NULL,                       -- identifies batches and target, see aim_of
    partial BOOLEAN NOT NULL,                -- some batch did not complete
    on_ambiguous TEXT NOT NULL,              -- resend or hold
    created_at DOUBLE PRECISION NOT NULL,
    attempts BIGINT NOT NULL,                -- POSTs begun
    searches BIGINT NOT NULL,                -- successful ones since unknown_at
    sent_at DOUBLE PRECISION,                -- first POST that may have arrived; NULL: none
    unknown_at DOUBLE PRECISION,             -- when an answer was last lost; NULL: never
    keboola_job_id TEXT,                     -- NULL until Keboola named it
    keboola_status TEXT,
    message TEXT,                            -- Keboola's, on a failure
    finished_at DOUBLE PRECISION,            -- NULL while open or held
    UNIQUE (job_id, round)                   -- once: a second trigger of a round cannot exist
);
CREATE INDEX open_triggers ON triggers (job_id) WHERE finished_at IS NULL;
CREATE INDEX triggers_by_aim ON triggers (aim);
CREATE TABLE polling_logs (
    id {{id}},
    job_id BIGINT REFERENCES polling_jobs (id) ON DELETE CASCADE,
    status TEXT NOT NULL,                    -- created, checking, triggered, failed, error ...
    message TEXT NOT NULL,
    actor TEXT,                              -- who asked for it; NULL: the program itself
    created_at DOUBLE PRECISION NOT NULL
);
CREATE INDEX logs_of_a_job ON polling_logs (job_id, id);
CREATE INDEX logs_by_age ON polling_logs (created_at, id);
{RAW_TABLE.replace("{kind}", "csv")}
{RAW_TABLE.replace("{kind}", "api")}
CREATE TABLE normalized_data (
    id {{id}},                               -- what `after` counts by
    source TEXT NOT NULL,
    source_id TEXT NOT NULL,
    data TEXT NOT NULL,                      -- the unified record, JSON
    hash BYTEA NOT NULL,                     -- of the record as received and of how it is mapped
    created_at DOUBLE PRECISION NOT NULL,
    updated_at DOUBLE PRECISION NOT NULL,
    UNIQUE (source, source_id)
);
CREATE INDEX data_of_a_source ON normalized_data (source, id);
CREATE TABLE etl_checkpoint (
    source TEXT PRIMARY KEY,                 -- empty: the sums of all
    watermark TEXT,                          -- the greatest `since` of a whole run; NULL: none yet
    fields TEXT NOT NULL DEFAULT '{{}}',     -- the fields met and their types, JSON
    records BIGINT NOT NULL DEFAULT 0,       -- rows of normalized_data
    {COUNTED_COLUMNS},
    checkpoint_timestamp DOUBLE PRECISION    -- NULL: no chunk was committed yet
);
CREATE TABLE etl_part (
    source TEXT NOT NULL,
    part TEXT NOT NULL,                      -- a file, or the URL of a page
    state TEXT NOT NULL,                     -- how far it was read, and what tells a change; JSON
    run_id BIGINT NOT NULL,                  -- the last run that saw it
    PRIMARY KEY (source, part)
);
CREATE TABLE etl_run (
    id {{id}},
    run_id TEXT NOT NULL UNIQUE,
    job_id BIGINT,                           -- NULL: that job was deleted
    source TEXT NOT NULL,
    status TEXT NOT NULL,                    -- in_progress, success, failed or interrupted
    {COUNTED_COLUMNS},
    progress DOUBLE PRECISION,               -- 0 to 1; NULL: total unknown
    start_time DOUBLE PRECISION NOT NULL,
    end_time DOUBLE PRECISION,               -- NULL: it goes on
    error_message TEXT,                      -- NULL: none
    notes TEXT NOT NULL DEFAULT '[]'         -- what drifted and what else is worth a word, JSON
);
CREATE INDEX runs_of_a_source ON etl_run (source, id);
CREATE INDEX runs_by_status ON etl_run (status, id);
CREATE INDEX runs_by_age ON etl_run (start_time, id);
CREATE TABLE etl_reject (
    id {{id}},
    source TEXT NOT NULL,
    place TEXT NOT NULL,                     -- file and line, or page and number
    reason TEXT NOT NULL,
    record TEXT NOT NULL,                    -- as received, as far as it could be read
    digest BYTEA NOT NULL,                   -- of the record
    run_id BIGINT NOT NULL,                  -- the last run that met it
    created_at DOUBLE PRECISION NOT NULL,
    UNIQUE (source, place, digest)           -- read again, it is the same reject
);
CREATE INDEX rejects_by_age ON etl_reject (created_at, id);
CREATE INDEX rejects_of_a_source ON etl_reject (source, id);
CREATE TABLE alerts (
    target TEXT PRIMARY KEY,                 -- a digest of where they go
    told TEXT NOT NULL                       -- the problems reported to it, with times; JSON
);
CREATE TABLE backups (                       -- the backups that this database came from
    taken_at DOUBLE PRECISION NOT NULL,
    counts TEXT NOT NULL,                    -- the rows of each table then, JSON
    restored_at DOUBLE PRECISION,            -- NULL: this file is that backup
    reason TEXT                              -- why it was restored; NULL once acknowledged
);
CREATE TABLE daily_sums (
    day TEXT PRIMARY KEY,                    -- of UTC, like 2026-11-27
    checks BIGINT NOT NULL,
    triggers BIGINT NOT NULL,                -- sent to Keboola
    delay_ms BIGINT NOT NULL,                -- of all of them, see Day.done_to_post_ms
    records BIGINT NOT NULL                  -- inserted or updated
);
INSERT INTO schema_version VALUES (1, 0);
"""
MIGRATIONS: Sequence[str] = ()  # from version 1 to 2, from 2 to 3, and so on
ACTIVE = "j.status = 'active' AND j.removed_at IS NULL"
OPEN_TRIGGER = "finished_at IS NULL AND state <> 'held'"
NOTE_CHECK = (  # of a job that was not paused, removed, deleted or changed meanwhile
    "UPDATE polling_jobs AS j SET last_check_at = :now, next_check_at = :next_check_at,"
    " last_error = :error, errors_in_row = CASE WHEN :ok THEN 0 ELSE errors_in_row + 1 END,"
    " last_ok_at = CASE WHEN :ok THEN :now ELSE last_ok_at END, pace = coalesce(:pace, pace)"
    f" WHERE j.id = :id AND revision = :revision AND round = :round AND {ACTIVE}"
)

# ── Database ──────────────────────────────────────────────────────────────────────────────────

# What is guaranteed, and why:
# - One connection writes and another one reads, on both engines. A reader sees what is committed
#   and never waits (SQLite: WAL; PostgreSQL: MVCC). So while another process holds the lock, checks
#   can be read, health is answered, and the watchdog is notified.
# - Every transaction takes the write lock with its first statement: BEGIN IMMEDIATE, or an advisory
#   lock. So no process can change what it reads before it commits. It waits for the lock up to
#   `patience` seconds, in short turns, and then fails with nothing written.
# - A transaction runs to its end even if its caller is cancelled: stopped between BEGIN and COMMIT,
#   it would leave the database locked.
# - SQLite: synchronous = FULL, since NORMAL may lose the last commits at a power loss. If the file
#   was deleted or replaced, nothing is written any more: it would be gone at the next start.
# - PostgreSQL: the node that works (`hold_exclusively`) holds an advisory lock of the very session
#   that writes. A node that loses its connection loses both, and writes again only if it gets the
#   lock back. So only one of two nodes can claim a trigger. The other one takes over once the
#   server has noticed the end of the first one's connection: at once if its process dies, after
#   KEEPALIVES if its machine does.
# Not guaranteed: that a transaction was not committed if its connection broke during the commit.
# Each change has a condition on the state it starts from, so that repeating it does no harm.
PATIENCE = 5.0  # s that a transaction waits for another process's lock
LOCK_TURN = 0.05  # s that it waits at a time: the end of the program need not wait for longer
WAL_BYTES = 8 << 20  # to which the log is truncated after a long read has let it grow
SOLE_SECONDS = 1.0  # s between attempts of a node in reserve to take over
KEEPALIVES: dict[str, Any] = {"keepalives_idle": 10, "keepalives_interval": 5}  # s, on both sides:
KEEPALIVES |= {"keepalives_count": 2, "tcp_user_timeout": 20_000}  # ms; a silent peer is lost then
LARGEST = (1 << 63) - 1  # the largest integer of both engines
SQLITE_NEEDED = (3, 35)  # for RETURNING
SUMS = ("checks", "triggers", "delay_ms", "records")  # of daily_sums

ACTOR: ContextVar[str | None] = ContextVar("actor", default=None)  # for the log: who asks
INSIDE: ContextVar[object] = ContextVar("inside", default=None)  # database of our transaction
Values = Mapping[str, Any]
Rows = Sequence[Sequence[Any]]


def storable(value: Any) -> Any:
    """The value as both engines take it. Command-line arguments and environment variables that are
    not UTF-8 contain lone surrogates, which no database takes; they become question marks. So does
    NUL, which PostgreSQL's texts cannot contain."""
    if type(value) is int:
        return min(value, LARGEST)
    if isinstance(value, str):
        return value.replace("\0", "?").encode(errors="replace").decode()
    return value


class Sqlite:
    """One connection to an SQLite file."""

    begin_sql = "BEGIN IMMEDIATE"  # a deferred one that reads before it writes cannot wait
    commit_sql = "COMMIT"
    changes_sql = "PRAGMA data_version"  # a number that the commits of others change
    errors: type[Exception] = sqlite3.Error
    refused: type[Exception] = sqlite3.IntegrityError
    id = "INTEGER PRIMARY KEY AUTOINCREMENT"
    reserve_ids = (
        "INSERT INTO sqlite_sequence SELECT '{table}', 0"
        " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = '{table}')",
        "UPDATE sqlite_sequence SET seq = :next - 1 WHERE name = '{table}' AND seq < :next - 1",
    )
    has_schema = "SELECT 1 FROM sqlite_master WHERE name = 'schema_version'"
    busy = (sqlite3.SQLITE_BUSY,)  # error codes: another process holds the lock
    lasting = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)

    def __init__(self, path: Path, mode: Literal["ro", "rw"], *, writes: bool) -> None:
        self._path, self._mode, self._writes = path, mode, writes
        self._unwritten: tuple[int, int] | None = None  # see `_state_if_unwritten`
        self._db: aiosqlite.Connection | None = None

    def _state_if_unwritten(self) -> tuple[int, int] | None:
        """Time and size of a file that no process writes, so that reading it need not make a -wal
        beside it; None where a process writes, or this connection may."""
        if self._mode == "rw" or Path(f"{self._path}-wal").exists():
            return None
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size

    async def open(self) -> None:
        import aiosqlite

        self._unwritten = self._state_if_unwritten()
        uri = f"file:{quote(str(self._path))}?mode={self._mode}"
        uri += "&immutable=1" if self._unwritten else ""
        sqlite3.connect(uri, uri=True).close()  # or fail without a thread of aiosqlite
        opening = asyncio.ensure_future(aiosqlite.connect(uri, uri=True, isolation_level=None))
        try:
            await asyncio.wait([opening])
        finally:  # also when cancelled: its thread would report to an event loop that has closed
            self._db = await opening
        patience = LOCK_TURN if self._writes else PATIENCE  # transactions try again
        await self.run(f"PRAGMA busy_timeout = {int(1000 * patience)}")
        if not self._writes:
            await self.run("PRAGMA query_only = ON")
            return
        with contextlib.suppress(sqlite3.OperationalError):  # another process does it right now
            await self.run("PRAGMA journal_mode = WAL")
        await self.run("PRAGMA synchronous = FULL")
        await self.run("PRAGMA foreign_keys = ON")
        await self.run(f"PRAGMA journal_size_limit = {WAL_BYTES}")

    async def run(self, sql: str, values: Values | Sequence[Any] = ()) -> list[Any]:
        if self._db is not None and self._unwritten != self._state_if_unwritten():
            await self.close()  # a writer has come since, or has gone
            await self.open()
        if self._db is None:
            raise StoreError("the database is closed")
        return list(await self._db.execute_fetchall(sql, values))

    async def many(self, sql: str, rows: Sequence[Values]) -> int:
        assert self._db is not None
        async with self._db.executemany(sql, rows) as cursor:
            return cursor.rowcount

    async def upsert(self, table: str, columns: Sequence[str], rows: Rows, conflict: str) -> None:
        """Insert rows by one statement, which is a third cheaper than one for each. It may have
        32,766 values, twice as many as the rows of a chunk."""
        values = ", ".join([f"({', '.join('?' * len(columns))})"] * len(rows))
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES {values} {conflict}"
        await self.run(sql, [value for row in rows for value in row])

    @staticmethod
    def code(error: Exception) -> Any:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF

    async def close(self) -> None:
        if self._db is not None:  # an open connection keeps the interpreter from exiting
            await self._db.close()
            self._db = None


@lru_cache(maxsize=1024)
def psycopg_sql(sql: str) -> str:
    """A statement with its parameters as psycopg writes them."""
    return re.sub(r"(?<!:):([a-z]\w*)", r"%(\1)s", sql.replace("%", "%%"))


class Postgres:
    """One connection to PostgreSQL, which is opened again after a loss. psycopg is needed only if
    this is used."""

    id = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    reserve_ids = (
        "SELECT setval('{table}_id_seq', :next, FALSE) FROM {table}_id_seq"
        " WHERE last_value < :next",
    )
    has_schema = (
        "SELECT 1 FROM pg_tables WHERE schemaname = current_schema()"
        " AND tablename = 'schema_version'"
    )
    # An advisory lock has two numbers: a fixed one, and one of the schema, since several programs
    # may share a database.
    begin_sql = (
        f"BEGIN; SET LOCAL lock_timeout = {int(1000 * LOCK_TURN)};"
        " SELECT pg_advisory_xact_lock(7238, hashtext(current_schema()));"
        " SET LOCAL lock_timeout = 0"
    )
    claim_sql = "SELECT pg_try_advisory_lock(7239, hashtext(current_schema()))"
    changes_sql = "SELECT changes FROM schema_version"
    busy = ("55P03",)  # lock_not_available
    lasting = ("53100", "25006")  # disk_full, read_only_sql_transaction

    def __init__(self, url: str, *, writes: bool) -> None:
        try:
            import psycopg
        except ImportError as e:
            raise StoreError(
                "the driver for PostgreSQL is not installed",
                hint="pip install 'psycopg[binary]', or use an SQLite file",
            ) from e
        self._url, self._writes, self._psycopg = url, writes, psycopg
        self.errors: type[Exception] = psycopg.Error
        self.refused: type[Exception] = psycopg.IntegrityError
        self._db: AsyncConnection | None = None
        self._opening = asyncio.Lock()
        self._sole = self.superseded = False

    @property
    def commit_sql(self) -> str:
        """The node that works does not count its own commits as changes."""
        noted = "UPDATE schema_version SET changes = changes + 1; "
        return "COMMIT" if self._sole else f"{noted}COMMIT"

    async def open(self) -> None:
        on_server = {name.removeprefix("tcp_"): value for name, value in KEEPALIVES.items()}
        theirs = "; ".join(f"SET tcp_{name} = {value}" for name, value in on_server.items())
        db = await self._psycopg.AsyncConnection.connect(
            self._url, autocommit=True, connect_timeout=5, **KEEPALIVES
        )
        try:
            db.prepare_threshold = None  # so that a pooler may stand in between
            await db.execute(theirs)
            if not self._writes:
                await db.execute("SET default_transaction_read_only = on")
            if self._sole:
                [[got]] = await (await db.execute(self.claim_sql)).fetchall()
                self.superseded = not got
            if self.superseded:
                raise StoreError("another TeckoChecker has taken over this database")
        except BaseException:
            await db.close()
            raise
        self._db = db

    async def _execute(self, sql: str, values: Values) -> list[Any]:
        if self._db is None:
            raise StoreError("the database is closed")
        cursor = await self._db.execute(psycopg_sql(sql) if values else sql, values or None)
        return await cursor.fetchall() if cursor.description else []

    async def run(self, sql: str, values: Values = MappingProxyType({})) -> list[Any]:
        """Execute a statement. If the connection is lost, do it again on a new one, unless that was
        in a transaction, which is over then."""
        db, may_repeat = self._db, INSIDE.get() is None or sql == self.begin_sql
        try:
            return await self._execute(sql, values)
        except self._psycopg.OperationalError as e:
            lost = (e.sqlstate or "08")[:2] in ("08", "57")  # or the server shuts down
            if not (lost and may_repeat):
                raise
        async with self._opening:  # if several tasks met the loss, one opens for all
            if self._db is db and db is not None:
                await db.close()
                await self.open()
        return await self._execute(sql, values)

    async def many(self, sql: str, rows: Sequence[Values]) -> int:
        assert self._db is not None
        async with self._db.cursor() as cursor:
            await cursor.executemany(psycopg_sql(sql), rows)
            return cursor.rowcount

    async def upsert(self, table: str, columns: Sequence[str], rows: Rows, conflict: str) -> None:
        """Insert rows by COPY, at a fifth of the CPU time of executemany."""
        assert self._db is not None
        names = ", ".join(columns)
        await self.run(
            f"CREATE TEMP TABLE IF NOT EXISTS new_{table} ON COMMIT DELETE ROWS"
            f" AS SELECT {names} FROM {table} LIMIT 0"
        )
        async with (
            self._db.cursor() as cursor,
            cursor.copy(f"COPY new_{table} ({names}) FROM STDIN") as copy,
        ):
            for row in rows:
                await copy.write_row([storable(value) for value in row])
        await self.run(f"INSERT INTO {table} ({names}) SELECT {names} FROM new_{table} {conflict}")

    async def claim(self) -> bool:
        if not self._sole:
            [[self._sole]] = await self.run(self.claim_sql)
        return self._sole

    @staticmethod
    def code(error: Exception) -> Any:
        return getattr(error, "sqlstate", "")

    async def close(self) -> None:
        if self._db is not None:
            await self._db.close()
            self._db = None


# ── Transactions ──────────────────────────────────────────────────────────────────────────────


def transactional(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a method a transaction, or a part of its caller's. It is shielded from cancellation; see
    above why."""

    @wraps(method)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        database = cast(Database, args[0])
        if INSIDE.get() is database:
            return await method(*args, **kwargs)
        task = asyncio.ensure_future(database.transact(partial(method, *args, **kwargs)))
        # If the caller was cancelled, nobody else retrieves the result.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    return wrapper


class Database:
    """A database in an SQLite file or, if `place` is a URL, in PostgreSQL: its schema and its
    transactions.

    `read_only` makes no file and no tables. Raises StoreError if it cannot be used, Conflict if a
    constraint forbids a change.
    """

    def __init__(self, place: Path | str, *, read_only: bool = False) -> None:
        self.is_file = not str(place).startswith(("postgresql:", "postgres:"))
        self.place = Path(place) if self.is_file else str(place)
        self.path = Path(place)  # meaningless if it is a URL
        self.read_only, self.patience = read_only, PATIENCE
        self._writer: Sqlite | Postgres | None = None
        self._reader: Sqlite | Postgres | None = None
        self._identity: tuple[int, int] | None = None  # device and number of the open file
        self._lock = asyncio.Lock()  # held by the transaction under way
        self._end = math.inf  # from when on no transaction begins (monotonic seconds)
        self._blocked_since: float | None = None  # when we began to wait for another process
        self._cannot_write: str | None = None
        self._version = -1
        self._news: list[tuple[int, str]] = []  # log lines of the transaction under way
        self.on_write: Callable[[float], None] = lambda seconds: None  # after each transaction

    async def __aenter__(self) -> Self:
        try:
            self._reader, self._writer = self._engines()
            await self._translate_errors(self._reader.open())
            version = await self._check_schema()  # before anything of it is changed
            if self._writer is not None:
                await self._translate_errors(self._writer.open())
                if version <= len(MIGRATIONS):
                    await self._make_schema()
        except BaseException:
            await self.close()
            raise
        return self

    def _engines(self) -> tuple[Sqlite | Postgres, Sqlite | Postgres | None]:
        """The engine that reads, and the one that writes."""
        if isinstance(self.place, str):
            kind: Callable[..., Sqlite | Postgres] = partial(Postgres, self.place)
        else:
            kind = partial(Sqlite, self._find_file(self.path), "ro" if self.read_only else "rw")
        return kind(writes=False), None if self.read_only else kind(writes=True)

    def _find_file(self, path: Path) -> Path:
        """The database file, which is made if need be."""
        if sqlite3.sqlite_version_info < SQLITE_NEEDED:
            said = f"SQLite {sqlite3.sqlite_version} is too old; needed: 3.35 or newer"
            raise StoreError(said, hint="use a Python with a newer SQLite")
        try:
            if not path.exists():
                if any(Path(f"{path}.backups").glob("*.db")):
                    said = f"{path} is gone, and there are backups of it"
                    raise StoreError(said, hint="`start` puts the newest back, `restore` any")
                if self.read_only:
                    raise StoreError(f"there is no database at {path}", hint="`init` makes one")
                path.touch(mode=0o600)
            path = path.resolve()
            found = path.stat()
        except OSError as e:
            raise StoreError(f"cannot open the database {path}: {e.strerror}") from e
        if found.st_nlink > 1:
            said = f"{path} has {found.st_nlink} names, and each would have a log of its own"
            raise StoreError(said, hint="remove the other hard links, or copy the file")
        self._identity = found.st_dev, found.st_ino
        return path

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def touch(self) -> None:
        """Make the file and its tables if they do not exist."""
        async with self:
            pass

    async def close(self) -> None:
        async with self._lock:  # a transaction under way ends first
            for engine in (self._writer, self._reader):
                if engine is not None:
                    await engine.close()
            self._writer = self._reader = None

    def close_soon(self, seconds: float) -> None:
        """After `seconds` no transaction begins or waits any more, so that the program can end
        whoever holds the lock. What is not written by then is lost, as after a kill."""
        self._end = time.monotonic() + seconds

    async def hold_exclusively(self, in_reserve: Callable[[], None] = lambda: None) -> None:
        """Wait until no other node works on this database, and keep others out for as long as the
        connection lasts. `in_reserve` is called before each pause. On SQLite the run lock does
        this. If another node gets the lock after our connection was lost, `superseded` is true and
        every write fails."""
        while isinstance(self._writer, Postgres):
            try:
                if await self._translate_errors(self._writer.claim()):
                    return
            except StoreError as e:  # in reserve, wait for the server as well
                log.warning("%s", e)
            in_reserve()
            await asyncio.sleep(SOLE_SECONDS)

    @property
    def superseded(self) -> bool:
        return isinstance(self._writer, Postgres) and self._writer.superseded

    def file_problem(self) -> str | None:
        """Why the open file cannot be written, if a person has to mend that; costs one stat."""
        return self._lost_file() or self._cannot_write

    def _lost_file(self) -> str | None:
        with contextlib.suppress(OSError):
            found = self.path.stat() if self._identity is not None else None
            if found is None or (found.st_dev, found.st_ino) == self._identity:
                return None
        return "the database file was deleted or replaced while it was in use"

    async def transact(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` in a transaction of its own."""
        async with self._lock:
            inside, began = INSIDE.set(self), time.perf_counter()
            try:
                await self._begin()
                result = await work()
                await self._sql(self._engine().commit_sql)
                self._cannot_write = None
                self.on_write(time.perf_counter() - began)
                for level, text in self._news:  # only of what was committed
                    log.log(level, "%s", text)
                return result
            except BaseException:
                with contextlib.suppress(StoreError):  # it may be rolled back already
                    await self._sql("ROLLBACK")
                raise
            finally:
                self._news.clear()
                INSIDE.reset(inside)

    async def _begin(self) -> None:
        """Take the write lock. While another process holds it, `patience` counts once for all
        transactions that wait here one after the other."""
        engine = self._engine()
        if problem := self._lost_file():
            raise StoreError(problem, hint="put it back, or restart")
        while time.monotonic() < self._end:
            try:
                await engine.run(engine.begin_sql)
                self._blocked_since = None
                return
            except engine.errors as e:
                with contextlib.suppress(engine.errors):  # on PostgreSQL BEGIN has succeeded
                    await engine.run("ROLLBACK")
                if engine.code(e) not in engine.busy:
                    raise self._store_error(e) from e
                now = time.monotonic()
                if self._blocked_since is None:
                    log.info("waiting for another process that has locked the database")
                self._blocked_since = self._blocked_since or now
                if now - self._blocked_since >= self.patience:
                    said = f"the database {self.place} is locked by another process"
                    raise StoreError(said) from e
        raise StoreError("the program is ending: nothing more is written")

    def _engine(self) -> Sqlite | Postgres:
        engine = self._writer if INSIDE.get() is self else self._reader
        if engine is None:
            only = self.read_only and self._reader is not None
            raise StoreError(f"the database is {'open for reading only' if only else 'closed'}")
        return engine

    async def _translate_errors(self, answer: Awaitable[T]) -> T:
        """The answer of an engine; its errors become ours."""
        engine = self._reader
        assert engine is not None
        try:
            return await answer
        except engine.refused as e:
            raise Conflict(f"the database refuses this: {e}") from e
        except (engine.errors, OSError) as e:
            raise self._store_error(e) from e

    def _store_error(self, error: Exception) -> StoreError:
        said = f"database {self.place}: {error}"
        if self._reader is not None and self._reader.code(error) in self._reader.lasting:
            self._cannot_write = said  # full, read-only or broken, until a person mends it
        return StoreError(said)

    async def _sql(self, sql: str, values: Values = MappingProxyType({})) -> list[Any]:
        """The rows of a statement, which runs in this task's transaction or only reads."""
        given = {name: storable(value) for name, value in values.items()}
        return await self._translate_errors(self._engine().run(sql, given))

    async def _select_dicts(self, sql: str, values: Values) -> list[dict[str, Any]]:
        """The rows of a SELECT, by column names."""
        names = sql.removeprefix("SELECT ").partition(" FROM ")[0].split(", ")
        return [dict(zip(names, row, strict=True)) for row in await self._sql(sql, values)]

    async def _change(self, table: str, columns: Values, where: str, **given: Any) -> bool:
        """Set columns of the rows that match `where`; whether there was one."""
        sets = ", ".join(f"{name} = :{name}" for name in columns)
        sql = f"UPDATE {table} SET {sets} WHERE {where} RETURNING 1"
        return bool(await self._sql(sql, {**columns, **given}))

    async def _many(self, sql: str, rows: Sequence[Values]) -> int:
        """Run one statement for each of `rows`, inside of a transaction. How many rows changed."""
        given = [{name: storable(value) for name, value in row.items()} for row in rows]
        return await self._translate_errors(self._engine().many(sql, given)) if rows else 0

    async def _upsert(
        self, table: str, columns: Sequence[str], rows: Rows, key: int, where: str = ""
    ) -> None:
        """Insert rows, at most once per transaction and table. The first `key` columns identify a
        row; of one that exists, the others change, but for created_at."""
        changed = [f"{name} = excluded.{name}" for name in columns[key:] if name != "created_at"]
        then = f"UPDATE SET {', '.join(changed)} {where}" if changed else "NOTHING"
        conflict = f"ON CONFLICT ({', '.join(columns[:key])}) DO {then}"
        if rows:
            await self._translate_errors(self._engine().upsert(table, columns, rows, conflict))

    async def _check_schema(self) -> int:
        """The version of the schema; 0: there is none. Raises StoreError if the database cannot be
        used, or a file has tables of another program. A server may be shared."""
        version, newest = await self._schema_version(), 1 + len(MIGRATIONS)
        has_tables = self.is_file and await self._sql("SELECT 1 FROM sqlite_master LIMIT 1")
        if has_tables and not version:
            raise StoreError(
                f"{self.place} is a database of another program",
                hint="name another file; `import FILE` takes over what the original program has",
            )
        if version > newest:
            said = f"{self.place} was written by a newer TeckoChecker (schema {version})"
            raise StoreError(said, hint="run that version, or restore a backup made before it")
        if version < newest and self.read_only:
            what = "was written by an older TeckoChecker" if version else "holds no database"
            raise StoreError(f"{self.place} {what}", hint="`init` brings it up to date")
        return version

    async def _schema_version(self) -> int:
        if not await self._sql(self._engine().has_schema):
            return 0
        [[version]] = await self._sql("SELECT version FROM schema_version")
        return int(version)

    @transactional
    async def _make_schema(self) -> None:
        version = await self._schema_version()  # another process may have made it meanwhile
        for script in (SCHEMA, *MIGRATIONS)[version:]:
            for statement in script.split(";\n"):
                if statement.strip():
                    await self._sql(statement.replace("{id}", self._engine().id))
        await self._sql(f"UPDATE schema_version SET version = {1 + len(MIGRATIONS)}")

    async def data_version(self) -> int:
        """A number that changes whenever another process commits. During a transaction of our own
        it is the last one known: readers never wait."""
        engine = self._writer or self._engine()
        if not self._lock.locked():
            [[self._version]] = await self._translate_errors(engine.run(engine.changes_sql))
        return self._version

    async def _insert(self, table: str, row: Values) -> Any:
        """Insert a row; its id."""
        names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        sql = f"INSERT INTO {table} ({names}) VALUES ({places}) RETURNING id"
        [[key]] = await self._sql(sql, row)
        return key

    async def _log(self, job_id: int | None, status: str, message: str, now: float) -> None:
        message = excerpt(message, 20_000)
        row = {"job_id": job_id, "status": status, "message": message, "created_at": now}
        await self._insert("polling_logs", row | {"actor": ACTOR.get()})
        level = {"error": logging.WARNING, "failed": logging.ERROR}.get(status, logging.INFO)
        who = f"job {job_id}: " if job_id is not None else ""
        by = f" (by {ACTOR.get()})" if ACTOR.get() else ""
        self._news.append((level, f"{who}{status}: {message}".rstrip(": ") + by))

    async def _add_to_day(self, now: float, **sums: int) -> None:
        row = {"day": iso(now)[:10], **dict.fromkeys(SUMS, 0), **sums}
        places = ", ".join(f":{name}" for name in row)
        added = ", ".join(f"{name} = daily_sums.{name} + excluded.{name}" for name in SUMS)
        await self._sql(
            f"INSERT INTO daily_sums ({', '.join(row)}) VALUES ({places})"
            f" ON CONFLICT (day) DO UPDATE SET {added}",
            row,
        )


def columns_of(kind: type) -> str:
    """The fields of a dataclass as a list of columns."""
    return ", ".join(field.name for field in fields(kind))


def number_list(ids: Iterable[int]) -> str:
    """These numbers as a list for IN."""
    return f"({', '.join(map(str, ids)) or 'NULL'})"


def text_list(name: str, values: Collection[str]) -> tuple[str, dict[str, str]]:
    """These texts as a list for IN, and its parameters."""
    given = {f"{name}{at}": value for at, value in enumerate(values)}
    return f"({', '.join(':' + key for key in given) or 'NULL'})", given


# ── Stored records ────────────────────────────────────────────────────────────────────────────

RUN_COLUMNS = columns_of(Run)
RECORD_TABLES = ("normalized_data", "raw_data_csv", "raw_data_api", "etl_reject")
DELETE_ROWS = 2000  # rows deleted in one transaction, which so stays short


def digest_of(text: str | bytes) -> bytes:
    """16 bytes that tell two records apart."""
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()


class Records(Database):
    """What ingests write and /data reads: raw and normalized records, checkpoints, runs, rejects.

    `source` is the name of the ingest's job. All that one chunk brings is one transaction.
    """

    @transactional
    async def begin_run(self, job: Job, now: float) -> Run:
        """A new run of a job's ingest; one that a crash left open is `interrupted` from here on,
        and can write nothing more."""
        sources = [(job.name,), ("",)]
        await self._upsert("etl_checkpoint", ("source",), sources, key=1)
        left = await self._sql(
            "UPDATE etl_run SET status = 'interrupted', end_time = :now,"
            " error_message = 'the program ended before the run did'"
            " WHERE source = :source AND status = 'in_progress' RETURNING run_id",
            {"source": job.name, "now": now},
        )
        for row in left:
            said = f"run {row[0]} was interrupted; going on from its checkpoint"
            await self._log(job.id, "error", said, now)
        made = {"run_id": uuid.uuid4().hex, "job_id": job.id, "source": job.name}
        await self._insert("etl_run", made | {"status": "in_progress", "start_time": now})
        [run] = await self.runs(job.name, 1)
        return run

    async def checkpoint(self, source: str) -> Checkpoint:
        mine = {"source": source}
        parts = await self._sql("SELECT part, state FROM etl_part WHERE source = :source", mine)
        states = {part: json.loads(state) for part, state in parts}
        rows = await self._sql(
            "SELECT records, watermark, fields, EXISTS (SELECT 1 FROM etl_run r WHERE"
            " r.source = c.source AND r.status = 'success' AND r.job_id IS NOT NULL)"
            " FROM etl_checkpoint c WHERE c.source = :source",
            mine,
        )
        records, watermark, known, whole = rows[0] if rows else (0, None, "{}", False)
        return Checkpoint(records, watermark, json.loads(known), bool(whole), states)

    async def hashes(self, run: Run, ids: Sequence[str]) -> dict[str, tuple[bytes, bool]]:
        """The hash of each record that is stored already, by id, and whether `run` wrote it."""
        known, values = text_list("id", ids)
        rows = await self._sql(
            "SELECT source_id, hash, updated_at FROM normalized_data WHERE source = :source"
            f" AND source_id IN {known}",
            values | {"source": run.source},
        )
        return {row[0]: (row[1], row[2] > run.start_time) for row in rows}

    @transactional
    async def save_chunk(
        self, run: Run, revision: int, kind: str, chunk: Chunk, known: Mapping[str, Any], now: float
    ) -> bool:
        """Write a chunk, and the fields `known` after it. Returns False and writes nothing if the
        run was given up, or its job was paused, changed, removed or deleted meanwhile."""
        added, fetched = {f"records_{name}": chunk.counts[name] for name in COUNTED}, chunk.fetched
        sums = ", ".join(f"{name} = {name} + :{name}" for name in added)
        of_run = {"id": run.id, "job_id": run.job_id, "revision": revision}
        still = await self._sql(
            f"UPDATE etl_run SET {sums}, progress = :progress WHERE id = :id"
            " AND status = 'in_progress' AND EXISTS (SELECT 1 FROM polling_jobs j"
            f" WHERE j.id = :job_id AND revision = :revision AND {ACTIVE}) RETURNING id",
            {**added, **of_run, "progress": fetched.progress},
        )
        if not still:
            return False
        await self._save_records(run.source, kind, chunk, now)
        await self._save_rejects(run, chunk, now)
        if fetched.part and not fetched.state:
            mine = {"source": run.source, "part": fetched.part}
            await self._sql("DELETE FROM etl_part WHERE source = :source AND part = :part", mine)
        elif fetched.part:
            await self._upsert(
                "etl_part",
                ("source", "part", "state", "run_id"),
                [(run.source, fetched.part, json.dumps(fetched.state), run.id)],
                key=2,
            )
        await self._sql(
            f"UPDATE etl_checkpoint SET {sums}, records = records + :records_inserted,"
            " checkpoint_timestamp = :now,"
            " fields = CASE source WHEN '' THEN fields ELSE :fields END"
            " WHERE source IN (:source, '')",
            added | {"source": run.source, "fields": json.dumps(known), "now": now},
        )
        return True

    async def _save_records(self, source: str, kind: str, chunk: Chunk, now: float) -> None:
        """Insert what is new, and change only rows that differ."""
        raw = f"raw_data_{kind}"
        await self._upsert(
            raw,
            ("source", "external_id", "raw_data", "ingested_at", "processed"),
            [(source, key, text, now, good) for key, text, good in chunk.raws],
            key=2,
            where=f"WHERE {raw}.raw_data <> excluded.raw_data"
            f" OR {raw}.processed <> excluded.processed",
        )
        await self._upsert(
            "normalized_data",
            ("source", "source_id", "data", "hash", "created_at", "updated_at"),
            [(source, key, data, known_by, now, now) for key, data, known_by in chunk.unified],
            key=2,
        )
        await self._many(  # so that a corrected record counts as changed
            "UPDATE normalized_data SET hash = :none WHERE source = :source AND source_id = :id",
            [{"none": b"", "source": source, "id": key} for key, _, good in chunk.raws if not good],
        )

    async def _save_rejects(self, run: Run, chunk: Chunk, now: float) -> None:
        """Store the rejects of a chunk, and delete older ones of the same lines or numbers."""
        await self._upsert(
            "etl_reject",
            ("source", "place", "digest", "reason", "record", "run_id", "created_at"),
            [
                (run.source, r.place, digest_of(r.record), r.reason, r.record, run.id, now)
                for r in chunk.rejects
            ],
            key=3,
        )
        label, span = f"{chunk.fetched.label} ", chunk.fetched.span
        if span is not None:
            await self._sql(
                "DELETE FROM etl_reject WHERE source = :source AND run_id <> :run AND"
                " CASE WHEN substr(place, 1, :length) = :label"
                " THEN CAST(substr(place, :length + 1) AS BIGINT) ELSE -1 END"
                " BETWEEN :first AND :last",
                {"source": run.source, "run": run.id, "first": span[0], "last": span[1]}
                | {"label": label, "length": len(label)},
            )

    @transactional
    async def end_run(self, run: Run, end: RunEnd, now: float) -> Run:
        """Close a run and update its job. A run that was given up meanwhile stays as it is."""
        notes = json.dumps(end.notes)
        ended = await self._sql(
            "UPDATE etl_run SET status = :status, end_time = :now, error_message = :error,"
            " notes = :notes, progress = CASE :status WHEN 'success' THEN 1.0 ELSE progress END"
            " WHERE id = :id AND status = 'in_progress'"
            f" RETURNING {RUN_COLUMNS}",
            {"status": end.status, "error": end.error, "notes": notes, "now": now, "id": run.id},
        )
        if not ended:
            return run
        if end.forget:
            await self._sql("DELETE FROM etl_part WHERE run_id = :run", {"run": run.id})
        if end.watermark is not None:
            mark = {"watermark": end.watermark}
            await self._change("etl_checkpoint", mark, "source = :source", source=run.source)
        [(*told, notes)] = ended
        done = Run(*(*told, json.loads(notes)))
        if written := done.records_inserted + done.records_updated:
            await self._add_to_day(now, records=written)
        await self._tell_job(done, end, now)
        return done

    async def _tell_job(self, run: Run, end: RunEnd, now: float) -> None:
        ok, said, job_id = end.status == "success", end.error, None
        if run.records_failed and said is None:
            said = f"{run.records_failed} of {run.records_processed} records were rejected"
            said += f" in the run of {iso(run.start_time)}: data rejects"
        active = f"SELECT id, revision, round, last_error FROM polling_jobs j WHERE {ACTIVE}"
        for job in await self._select_dicts(f"{active} AND id = :id", {"id": run.job_id}):
            job_id, row = job["id"], job | {"now": now, "next_check_at": now + end.wait, "ok": ok}
            if end.status == "interrupted" or (ok and not run.records_processed):
                said = job["last_error"]
            await self._sql(NOTE_CHECK, row | {"error": said, "pace": None})
        for note in end.notes:
            await self._log(job_id, "updated", f"{run.source}: {note}", now)
        counts = [f"{getattr(run, f'records_{n}')} {n}" for n in COUNTED[1:] if n != "unchanged"]
        if not ok:
            await self._log(job_id, "error", f"{run.source}: {end.status}: {end.error}", now)
        elif run.records_inserted or run.records_updated or run.records_failed:
            await self._log(job_id, "completed", f"ingested: {', '.join(counts)}", now)

    async def runs(self, source: str | None, limit: int) -> list[Run]:
        """The last runs of a source, or of all (None), newest first."""
        where = "" if source is None else "WHERE source = :source AND job_id IS NOT NULL"
        rows = await self._sql(
            f"SELECT {RUN_COLUMNS} FROM etl_run {where} ORDER BY id DESC LIMIT :limit",
            {"limit": limit, "source": source},
        )
        return [Run(*(*told, json.loads(notes))) for *told, notes in rows]

    async def last_failure(self) -> float | None:
        """When the last failed run ended."""
        rows = await self._sql(
            "SELECT end_time FROM etl_run WHERE status = 'failed' ORDER BY id DESC LIMIT 1"
        )
        return rows[0][0] if rows else None

    async def totals(self, source: str = "") -> dict[str, int]:
        """The number of stored records (`records`), and what became of all that were ever read, of
        a source or of all. Each chunk updates these sums, so nothing is counted here."""
        names = ("records", *(f"records_{name}" for name in COUNTED))
        rows = await self._sql(
            f"SELECT {', '.join(names)} FROM etl_checkpoint WHERE source = :source",
            {"source": source},
        )
        return dict(zip(names, rows[0] if rows else [0] * len(names), strict=True))

    async def data(self, source: str | None, limit: int, after: int, offset: int) -> list[Any]:
        """Unified records with ids greater than `after`, in their order. `after` costs the same at
        any depth; `offset` costs as much as reading the rows that it skips."""
        where = "id > :after" + ("" if source is None else " AND source = :source")
        return await self._select_dicts(
            "SELECT id, data, created_at, updated_at FROM normalized_data"
            f" WHERE {where} ORDER BY id LIMIT :limit OFFSET :offset",
            {"limit": limit, "after": after, "offset": offset, "source": source},
        )

    async def rejects(self, source: str | None, limit: int) -> list[Any]:
        """The latest rejected records of a source, or of all (None), newest first."""
        where = "" if source is None else "WHERE source = :source"
        return await self._select_dicts(
            "SELECT source, place, reason, record, created_at FROM etl_reject"
            f" {where} ORDER BY id DESC LIMIT :limit",
            {"limit": limit, "source": source},
        )

    async def delete_rows(self, table: str, which: str, **given: Any) -> None:
        """Delete the rows of a table that match `which`, but for the first `skip`, in short
        transactions: others take their turns in between."""
        while await self._delete_some(table, which, given) == DELETE_ROWS:
            pass

    @transactional
    async def _delete_some(self, table: str, which: str, given: Values) -> int:
        rows = await self._sql(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE {which}"
            " LIMIT :some OFFSET :skip) RETURNING 1",
            {"some": DELETE_ROWS, "skip": 0, **given},
        )
        if table == "normalized_data":
            await self._sql(
                "UPDATE etl_checkpoint SET records = records - :n WHERE source IN (:source, '')",
                {**given, "n": len(rows)},
            )
        return len(rows)


# ── Stored secrets ────────────────────────────────────────────────────────────────────────────

SECRET_COLUMNS = columns_of(SealedSecret)
Sealed = tuple[bytes, str]  # a sealed value and the id of its key


class Secrets(Records):
    """Sealed secrets. `seal` is called in the transaction, so that no rotation comes between."""

    @transactional
    async def add_secret(self, name: str, kind: str, seal: Callable[[], Sealed], now: float) -> int:
        if await self._sql("SELECT 1 FROM secrets WHERE name = :name", {"name": name}):
            said = f"Secret with name {name!r} already exists"
            raise Conflict(said, hint="delete it first, or choose another name")
        value, key_id = seal()
        row = {"name": name, "type": kind, "value": value, "key_id": key_id, "created_at": now}
        secret_id: int = await self._insert("secrets", row)
        await self._log(None, "created", f"secret {name!r} of type {kind}", now)
        return secret_id

    @transactional
    async def replace_secret(
        self, name: str, kind: str, seal: Callable[[], Sealed], now: float
    ) -> None:
        value, key_id = seal()
        sealed, where = {"value": value, "key_id": key_id}, "name = :name AND type = :kind"
        if not await self._change("secrets", sealed, where, name=name, kind=kind):
            raise NotFound(f"there is no secret {name!r} of type {kind} to replace", code=1001)
        await self._sql(  # a changed job is due at once, however long its back-off was
            "UPDATE polling_jobs SET revision = revision + 1, errors_in_row = 0"
            " WHERE :name IN (watch_secret, trigger_secret, ingest_secret)",
            {"name": name},
        )
        await self._log(None, "updated", f"secret {name!r} has a new value", now)

    async def secret_types(self) -> dict[str | int, str]:
        """The type of each secret, by its name and by its id."""
        rows = await self.secrets()
        return {row.name: row.type for row in rows} | {row.id: row.type for row in rows}

    async def secrets(self) -> list[SealedSecret]:
        rows = await self._sql(f"SELECT {SECRET_COLUMNS} FROM secrets ORDER BY name")
        return [SealedSecret(*row) for row in rows]

    async def secret(self, name: str) -> SealedSecret | None:
        sql = f"SELECT {SECRET_COLUMNS} FROM secrets WHERE name = :name"
        rows = await self._sql(sql, {"name": name})
        return SealedSecret(*rows[0]) if rows else None

    @transactional
    async def delete_secret(self, name: str, now: float) -> None:
        users = await self._sql(
            "SELECT name FROM polling_jobs"
            " WHERE :name IN (watch_secret, trigger_secret, ingest_secret)"
            " AND (status IN ('triggering', 'triggered')"
            " OR status IN ('active', 'paused') AND removed_at IS NULL)"
            " OR id IN (SELECT job_id FROM triggers WHERE secret = :name AND finished_at IS NULL)",
            {"name": name},
        )
        if users:
            names = ", ".join(repr(row[0]) for row in users[:5])
            said = f"Cannot delete secret {name!r}: it is referenced by active jobs: {names}"
            raise Conflict(said, hint="delete those jobs first")
        delete = "DELETE FROM secrets WHERE name = :name RETURNING id"
        if not await self._sql(delete, {"name": name}):
            raise NotFound(f"there is no stored secret {name!r}", code=1001)
        await self._log(None, "deleted", f"secret {name!r}", now)

    @transactional
    async def reseal_secrets(self, reseal: Callable[[SealedSecret], Sealed], now: float) -> int:
        """Store every secret as `reseal` returns it. Returns how many."""
        rows = await self.secrets()
        for row in rows:
            value, key_id = reseal(row)
            sealed = {"value": value, "key_id": key_id}
            await self._change("secrets", sealed, "id = :id", id=row.id)
        await self._log(None, "rotated", f"{len(rows)} secrets sealed anew", now)
        return len(rows)

    @transactional
    async def change_keys(self, change: Callable[[Collection[str]], None]) -> None:
        """Call `change`, which may drop master keys, with the ids of the keys that rows need, while
        nobody can seal."""
        change({row.key_id for row in await self.secrets()})


# ── Stored jobs ───────────────────────────────────────────────────────────────────────────────

AUTO_PACE = 120.0  # s to the first check of `poll_interval: auto`; later its age decides
ENDED = ("completed", "completed_with_failures", "failed")
OF_JOB = (
    "j.id, j.name, j.origin, j.spec, j.watch_secret, j.poll_interval_seconds, j.pace, j.status,"
    " j.removed_at, j.revision, j.round, j.errors_in_row, j.last_error, j.last_check_at,"
    " j.last_ok_at, j.next_check_at, j.created_at, j.completed_at,"
    f" EXISTS (SELECT 1 FROM triggers t WHERE t.job_id = j.id AND {OPEN_TRIGGER})"
)
OF_BATCH = f"b.{columns_of(Batch).replace(', ', ', b.')}"
SHOWN_STATUS = "CASE WHEN j.removed_at IS NULL THEN j.status ELSE 'removed' END"
MATCHING = (  # the shown status, and a part of the name; empty: any
    f"(:status = '' OR :status = {SHOWN_STATUS})"
    " AND (:search = '' OR replace(lower(j.name), :search, '') <> lower(j.name))"
)
COLUMNS_OF_JOB = len(fields(Job)) - 1  # but for its batches


class TimerPlan(NamedTuple):
    """What a job's timer depends on. If it changes, the job is due at once."""

    interval: int  # s; 0: each check says when the next one is due
    revision: int
    round: int
    secret: str  # jobs that share one are due together


FileStep = Literal["created", "changed", "renamed", "returned", "removed"]


class FileChange(NamedTuple):
    """A change that jobs.yaml asks for. `renamed` is a job with another name, but the same batches
    and target as a job that has left the file: it is the same job and keeps its history."""

    what: FileStep
    name: str
    job: Job | None  # as it is; None: it is not there yet
    spec: Spec | None  # None: it has left the file


def aim_of(stack_url: str, body: str) -> str:
    """A digest of a trigger's batches and target, which does not depend on the job's name."""
    sent = json.loads(body)
    values = {given["name"]: given["value"] for given in sent["variableValuesData"]["values"]}
    ids = [*json.loads(values["batch_ids_completed"]), *json.loads(values["batch_ids_failed"])]
    target = [stack_url, sent["component"], sent["config"], *sorted(ids)]
    return digest_of(json.dumps(target)).hex()


def aim_of_spec(spec: JobSpec) -> str:
    """The same for a job that has not fired yet."""
    unseen = [Batch(batch_id, "") for batch_id in spec.watch.batch_ids]
    return aim_of(spec.trigger.stack_url, target_of(spec, outcome_of(unseen))["body"])


def spec_columns(spec: Spec) -> dict[str, Any]:
    """The columns of polling_jobs that come from a job's definition."""
    return {
        "name": spec.name,
        "spec": spec.model_dump_json(),
        "watch_secret": spec.watch.secret if isinstance(spec, JobSpec) else "",
        "trigger_secret": spec.trigger.secret if isinstance(spec, JobSpec) else "",
        "ingest_secret": spec.ingest.secret if isinstance(spec, IngestSpec) else None,
        "poll_interval_seconds": 0 if spec.poll_interval == "auto" else spec.poll_interval,
    }


def describe_changes(old: Spec, new: Spec) -> str:
    """The differences, in words."""
    before, after = old.model_dump(), new.model_dump()
    parts = [
        f"{k} {before[k]} -> {after[k]}" for k in ("name", "poll_interval") if before[k] != after[k]
    ]
    for block in after.keys() - {"name", "poll_interval"}:
        was = before.get(block, {})
        parts += [f"{block}.{k} changed" for k, v in after[block].items() if v != was.get(k)]
    return ", ".join(sorted(parts))


class Jobs(Secrets):
    """Jobs, their batches and triggers. Every change has a condition on the state it starts from,
    since the command line may write while the service runs. `now` is in unix seconds.

    """

    # reading jobs

    async def _jobs(self, where: str, values: Values = MappingProxyType({})) -> list[Job]:
        """The jobs that match `where`, by id, with their batches; one statement."""
        rows = await self._sql(
            f"SELECT {OF_JOB}, {OF_BATCH} FROM (SELECT * FROM polling_jobs j WHERE {where}) j"
            " LEFT JOIN polling_batches b ON b.job_id = j.id ORDER BY j.id, b.position",
            values,
        )
        found = dict[int, Job]()
        for row in rows:
            if (job := found.get(row[0])) is None:
                found[row[0]] = job = Job(*row[:COLUMNS_OF_JOB])
            if row[COLUMNS_OF_JOB] is not None:  # an ingest has no batches
                job.batches.append(Batch(*row[COLUMNS_OF_JOB:]))
        return list(found.values())

    async def jobs(
        self, status: str | None = None, limit: int = LARGEST, after: int = 0, search: str = ""
    ) -> list[Job]:
        """Jobs by id: those of a shown status (None: all) with `search` in their names and ids
        greater than `after`."""
        given = {"status": status or "", "search": search.lower(), "limit": limit, "after": after}
        return await self._jobs(f"{MATCHING} AND j.id > :after ORDER BY j.id LIMIT :limit", given)

    async def count_jobs(self, status: str | None, search: str) -> int:
        given = {"status": status or "", "search": search.lower()}
        [[n]] = await self._sql(f"SELECT count(*) FROM polling_jobs j WHERE {MATCHING}", given)
        return int(n)

    async def find_job(self, ref: str | int) -> Job:
        """The job with this id or name."""
        is_id = isinstance(ref, int) or (ref.isascii() and ref.isdigit())
        key = int(str(ref)[:30]) if is_id else ref  # more digits than that are no id either
        found = await self._jobs("j.id = :ref" if is_id else "j.name = :ref", {"ref": key})
        if not found:
            what = f"ID {ref}" if is_id else f"name {ref!r}"
            names = [row[0] for row in await self._sql("SELECT name FROM polling_jobs")]
            hint = did_you_mean(ref, names).strip(" ()") or f"{COMMAND} job list shows them"
            raise NotFound(f"Job with {what} not found", hint=hint)
        return found[0]

    async def jobs_among(self, ids: Iterable[int]) -> list[Job]:
        """Those of these jobs that exist, by id."""
        return await self._jobs(f"j.id IN {number_list(ids)}")

    async def job(self, job_id: int) -> Job | None:
        return next(iter(await self.jobs_among([job_id])), None)

    async def watched_batches(self, secrets: Collection[str], until: float) -> tuple[set[str], int]:
        """The ids of the unfinished batches of active jobs that use one of these secrets, and how
        many checks of them are due before `until`."""
        names, given = text_list("name", secrets)
        rows = await self._sql(
            "SELECT b.batch_id, coalesce(j.next_check_at, 0) < :until"
            " FROM polling_jobs j JOIN polling_batches b ON b.job_id = j.id"
            f" WHERE j.watch_secret IN {names} AND {ACTIVE}"
            f" AND b.status NOT IN {tuple(FINISHED_BATCH)}",
            {**given, "until": until},
        )
        return {row[0] for row in rows}, sum(bool(row[1]) for row in rows)

    async def schedule(self, ids: Collection[int] | None = None) -> dict[int, TimerPlan]:
        """The jobs that have something left to do, all of them or those among `ids`."""
        some = "" if ids is None else f" AND j.id IN {number_list(ids)}"
        rows = await self._sql(  # by two indexes, however many jobs have ended
            "SELECT j.id, j.poll_interval_seconds, j.revision, j.round, j.watch_secret"
            f" FROM polling_jobs j WHERE j.id IN (SELECT j.id FROM polling_jobs j WHERE {ACTIVE}"
            f" UNION SELECT job_id FROM triggers WHERE {OPEN_TRIGGER}){some}"
        )
        return {row[0]: TimerPlan(row[1], row[2], row[3], sys.intern(row[4])) for row in rows}

    # changing jobs

    @transactional
    async def create_job(self, spec: Spec, origin: str, now: float) -> int:
        await self._claim_name(spec.name)
        spec = await self._with_secret_names(spec)
        row = {"origin": origin, "status": "active", **spec_columns(spec)}
        row |= {"pace": row["poll_interval_seconds"] or AUTO_PACE}
        row |= {"last_ok_at": now, "created_at": now}
        job_id: int = await self._insert("polling_jobs", row)
        if isinstance(spec, JobSpec):
            await self._renew_batches(job_id, spec, now)
            said = f"watches {', '.join(spec.watch.batch_ids)}"
        else:
            said = f"ingests {spec.ingest.place}"
        await self._log(job_id, "created", said, now)
        return job_id

    async def _claim_name(self, name: str) -> None:
        if await self._sql("SELECT 1 FROM polling_jobs WHERE name = :name", {"name": name}):
            raise Conflict(f"there is a job {name!r} already", hint="choose another name")

    async def _with_secret_names(self, spec: Spec) -> Spec:
        """The job with names in place of ids of secrets."""
        for key, block in dict(spec).items():
            if isinstance(block, StrictModel) and isinstance(number := dict(block)["secret"], int):
                rows = await self._sql("SELECT name FROM secrets WHERE id = :id", {"id": number})
                if not rows:
                    raise NotFound(f"Secret with ID {number} not found", code=1001)
                named = block.model_copy(update={"secret": rows[0][0]})
                spec = spec.model_copy(update={key: named})
        return spec

    async def _renew_batches(self, job_id: int, spec: JobSpec, now: float) -> None:
        await self._sql("DELETE FROM polling_batches WHERE job_id = :id", {"id": job_id})
        ids = enumerate(spec.watch.batch_ids)
        await self._many(
            "INSERT INTO polling_batches (job_id, position, batch_id, changed_at)"
            " VALUES (:job, :at, :batch, :now)",
            [{"job": job_id, "at": at, "batch": batch_id, "now": now} for at, batch_id in ids],
        )

    @transactional
    async def update_job(self, ref: str | int, change: Callable[[Job], Spec], now: float) -> int:
        """Give a job the definition that `change` returns. It is read and written in one
        transaction, so that of two changes at once none is lost. Returns the job's id."""
        job = await self.find_job(ref)
        if job.origin == "file":
            said = f"Cannot update {job.name!r}: it comes from jobs.yaml"
            raise Conflict(said, hint="edit it there")
        spec = await self._with_secret_names(change(job))
        if job.differs(spec):
            await self._update(job, spec, now)
        return job.id

    async def _update(self, job: Job, spec: Spec, now: float) -> None:
        """Give a job its new definition.

        Other batches start a new round. Another target applies to triggers that are known not to
        have been sent; one that may have been sent keeps its target.
        """
        renamed = spec.name != job.name
        if isinstance(spec, IngestSpec) != job.is_ingest or (job.is_ingest and renamed):
            raise Conflict(
                f"job {job.name!r} keeps its kind, and an ingest its name, which its records have",
                hint="delete it, or give the new one another name",
            )
        if renamed:
            await self._claim_name(spec.name)
        columns = spec_columns(spec)
        if (interval := columns["poll_interval_seconds"]) != job.interval:
            columns["pace"] = interval or AUTO_PACE
        await self._set_job(job, revision=job.revision + 1, **columns)
        unread = "its old definition could not be read"
        said = unread if job.damage else describe_changes(job.spec, spec)
        await self._log(job.id, "updated", said, now)
        if isinstance(spec, IngestSpec):
            return
        for trigger in await self.triggers(job.id):
            if trigger.state == "pending" and trigger.unknown_at is None:
                await self._save_trigger(trigger, retargeted(trigger, spec))
        if {*spec.watch.batch_ids} != {batch.batch_id for batch in job.batches}:
            await self._start_round(job, "new_round", spec, now)

    async def _start_round(self, job: Job, event: Event, spec: JobSpec, now: float) -> None:
        """Forget what is known of the batches; they may fire again."""
        await self._renew_batches(job.id, spec, now)
        columns = dict.fromkeys(("last_error", "next_check_at", "completed_at"))
        columns |= {"status": next_state(JOB_STEPS, job.status, event), "round": job.round + 1}
        columns |= {"fires_again": event == "retry", "last_ok_at": now, "errors_in_row": 0}
        await self._set_job(job, **columns)

    async def _set_job(self, job: Job, **columns: Any) -> None:
        await self._change("polling_jobs", columns, "id = :id", id=job.id)

    async def file_changes(self, specs: Sequence[Spec]) -> list[FileChange]:
        """The changes that `specs`, as the content of jobs.yaml, would make."""
        known = {job.name: job for job in await self._jobs("j.origin = 'file'")}
        names = {spec.name for spec in specs}
        for (name,) in await self._sql("SELECT name FROM polling_jobs WHERE origin <> 'file'"):
            if name in names:
                said = f"job {name!r} of jobs.yaml was also made on the command line"
                raise Conflict(said, hint="delete that one, or rename one of the two")
        gone = [job for job in known.values() if job.name not in names]
        last = sorted(gone, key=lambda job: job.removed_at is None)
        watching = (job for job in last if not job.is_ingest and not job.damage)
        lost = {aim_of_spec(job.watches): job for job in watching}
        found: list[FileChange] = []
        for spec in specs:
            spec, job = await self._with_secret_names(spec), known.get(spec.name)
            if job is None and isinstance(spec, JobSpec):
                job = lost.pop(aim_of_spec(spec), None)
            if job is None:
                found.append(FileChange("created", spec.name, None, spec))
                continue
            if job.differs(spec):
                what: FileStep = "changed" if job.name == spec.name else "renamed"
                found.append(FileChange(what, spec.name, job, spec))
            if job.removed_at is not None:
                found.append(FileChange("returned", spec.name, job, spec))
        kept = {change.job.id for change in found if change.job is not None}
        left = [job for job in gone if job.removed_at is None and job.id not in kept]
        return found + [FileChange("removed", job.name, job, None) for job in left]

    async def sync_file_jobs(self, specs: Sequence[Spec], now: float) -> Counter[str]:
        """Take over the jobs of jobs.yaml; the number of changes of each kind. Without any, this
        neither writes nor waits for the lock."""
        return await self._sync(specs, now) if await self.file_changes(specs) else Counter()

    @transactional
    async def _sync(self, specs: Sequence[Spec], now: float) -> Counter[str]:
        done: Counter[str] = Counter()
        for what, _, job, spec in await self.file_changes(specs):
            done[what] += 1
            if job is None and spec is not None:
                await self.create_job(spec, "file", now)
            elif job is not None and what in ("returned", "removed"):
                gone = what == "removed"
                await self._set_job(job, removed_at=now if gone else None, last_ok_at=now)
                said = "left jobs.yaml" if gone else "is back in jobs.yaml"
                await self._log(job.id, "updated", said, now)
            elif job is not None and spec is not None:
                await self._update(job, spec, now)
        return done

    @transactional
    async def _step(self, event: Literal["pause", "resume"], job_id: int, now: float) -> None:
        job = await self.find_job(job_id)
        if job.removed_at is not None or event not in JOB_STEPS[job.status]:
            raise Conflict(f"Cannot {event} job {job.name!r}: it is {job.shown_status}")
        status = JOB_STEPS[job.status][event]
        await self._set_job(job, status=status, last_ok_at=now, next_check_at=None)
        await self._log(job.id, f"{event}d", "", now)

    pause_job = partialmethod(_step, "pause")
    resume_job = partialmethod(_step, "resume")

    @transactional
    async def retry_job(self, job_id: int, now: float) -> str:
        """Re-arm a failed job. Returns what happens next, in a few words.

        A held trigger is searched for once more and, if it is missing, sent with the same id.
        Otherwise the batches are checked from the start, and a new trigger may follow.
        """
        job = await self.find_job(job_id)
        if job.removed_at is not None or job.status != "failed":
            raise Conflict(f"Cannot retry job {job.name!r}: it is {job.shown_status}")
        last = (await self.triggers(job.id))[-1:]
        if last and (last[0].state, last[0].round) == ("held", job.round):
            what = "asks Keboola once more for its trigger, then sends it again"
            after = trigger_after(last[0], "resettle", now, on_ambiguous="resend")
            await self._save_trigger(last[0], after)
            await self._move_job(job, "resettle", None, now)
        else:
            what = "checks its batches from the start"
            await self._start_round(job, "retry", job.watches, now)
        await self._log(job.id, "updated", f"retry: {what}", now)
        return what

    async def _move_job(self, job: Job, event: Event, said: str | None, now: float) -> None:
        status = next_state(JOB_STEPS, job.status, event)
        error = said if status == "failed" else None
        ended_at = now if status in ENDED else None
        await self._set_job(
            job, status=status, last_error=error, errors_in_row=0, completed_at=ended_at
        )

    async def delete_job(self, job_id: int, now: float) -> None:
        """Delete a job with its history and, of an ingest, its records. How far it was read goes
        first: after a crash in the middle it is read again from its start."""
        job = await self._stop_for_good(job_id)
        for table in RECORD_TABLES if job.is_ingest else ():
            await self.delete_rows(table, "source = :source", source=job.name)
        await self._delete_job(job, now)

    @transactional
    async def _stop_for_good(self, job_id: int) -> Job:
        job = await self.find_job(job_id)
        if job.origin == "file" and job.removed_at is None:
            said = f"Cannot delete job {job.name!r}: it is in jobs.yaml and would come back"
            raise Conflict(said, hint="take it out of the file and reload, then delete it")
        if job.is_ingest:  # a run under way can write nothing any more
            await self._set_job(job, status="paused", revision=job.revision + 1)
            clean, mine = {"watermark": None, "fields": "{}"}, {"source": job.name}
            await self._change("etl_checkpoint", clean, "source = :source", **mine)
            await self._sql("DELETE FROM etl_part WHERE source = :source", mine)
        return job

    @transactional
    async def _delete_job(self, job: Job, now: float) -> None:
        if job.is_ingest:
            mine = {"source": job.name}
            await self._sql("DELETE FROM etl_checkpoint WHERE source = :source", mine)
            await self._sql("UPDATE etl_run SET job_id = NULL WHERE source = :source", mine)
        await self._sql("DELETE FROM polling_jobs WHERE id = :id", {"id": job.id})
        await self._log(None, "deleted", f"job {job.name!r} (ID {job.id})", now)

    # triggers

    async def triggers(self, *job_ids: int) -> list[Trigger]:
        """Those of some jobs, of each job the oldest first."""
        return await self._triggers(f"job_id IN {number_list(job_ids)}")

    async def open_triggers(self, job_id: int) -> list[Trigger]:
        """Those that are not settled or held."""
        return await self._triggers(f"job_id = :id AND {OPEN_TRIGGER}", id=job_id)

    async def _triggers(self, where: str, **values: Any) -> list[Trigger]:
        sql = f"SELECT {columns_of(Trigger)} FROM triggers WHERE {where} ORDER BY round"
        found = await self._select_dicts(sql, values)
        return [Trigger(**row | {"partial": bool(row["partial"])}) for row in found]

    async def _save_trigger(self, before: Trigger, after: Trigger) -> bool:
        """Compare and set; False if the trigger is not as it was `before`."""
        same = {f"{n}_before": getattr(before, n) for n in ("state", "secret", "stack_url", "body")}
        where = " AND ".join(f"{name.removesuffix('_before')} = :{name}" for name in same)
        row = asdict(after) | {"aim": aim_of(after.stack_url, after.body)}
        return await self._change("triggers", row, f"id = :id AND {where}", **same)

    async def fired(self, aim: str) -> list[tuple[Job, Trigger]]:
        """The triggers that started a Keboola job with this aim, or may have, with their jobs; the
        latest first."""
        found = await self._triggers("aim = :aim AND state <> 'rejected'", aim=aim)
        found.sort(key=lambda trigger: (trigger.created_at, trigger.round), reverse=True)
        jobs = {job.id: job for job in await self.jobs_among({t.job_id for t in found})}
        return [(jobs[trigger.job_id], trigger) for trigger in found]


# ── Checks and triggers ───────────────────────────────────────────────────────────────────────

# A job fires once per round: one transaction finds the job unchanged since its check, stores the
# trigger with its frozen body, and changes the job's status. UNIQUE (job_id, round) forbids a
# second trigger of a round. If this job, or one that has left jobs.yaml, has fired before for the
# same batches and target, a later round fires only after `job retry`, whatever the job is called.

LOG_STATUS = {"accept": "triggered", "succeed": "completed"}  # of the log row of a trigger's step
LOG_STATUS |= dict.fromkeys(("reject", "hold", "fail"), "failed")  # of the others: error
CLOCK_DOUBT = 86400.0  # s that OpenAI's clock and ours may differ at most


def describe_progress(batch: Batch) -> str:
    """The progress of a batch, for the log."""
    if outcome(batch) is not None:
        return describe_end(batch)
    done = batch.requests_completed + batch.requests_failed
    return f"{batch.batch_id} {batch.status}, {done} of {batch.requests_total} requests done"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A check of a job's batches, and its consequences."""

    job: Job  # as it was before
    batches: Sequence[Batch]
    verdict: Verdict
    trigger: Trigger | None  # to be fired
    error: str | None  # the job's new `last_error`
    errors: Sequence[TeckoError]  # why not every batch was seen
    wait: float  # s until the next check
    now: float
    pace: float | None = None  # s, of a job with `poll_interval: auto`

    def is_quiet(self) -> bool:
        """Whether nothing but its time is to be written down."""
        same = self.job.batches == self.batches and self.verdict.event is None
        return same and not self.errors and self.error is None and self.job.last_error is None

    def row(self) -> dict[str, Any]:
        """The values for NOTE_CHECK."""
        job, times = self.job, {"now": self.now, "next_check_at": self.now + self.wait}
        row = {"id": job.id, "revision": job.revision, "round": job.round, "pace": self.pace}
        return {**row, **times, "error": self.error, "ok": not self.errors}


class Checks(Jobs):
    """Writes of checks and triggers. Every change is a compare-and-set."""

    @transactional
    async def record_checks(self, checks: Sequence[CheckResult]) -> set[int]:
        """Write down checks and what was decided on them, in one transaction.

        The jobs of which that was done: nothing is written of one that was paused, removed,
        deleted or changed while it was being checked, for what was seen then decides nothing.
        """
        quiet = {check.job.id: check.row() for check in checks if check.is_quiet()}
        news = [check for check in checks if check.job.id not in quiet]
        recorded = {check.job.id for check in news if await self._record(check)}
        if done := await self._many(NOTE_CHECK, [*quiet.values()]) + len(recorded):
            await self._add_to_day(checks[0].now, checks=done)
        return recorded | quiet.keys()

    async def _record(self, check: CheckResult) -> bool:
        check = await self._refuse_second_firing(check)
        if not await self._sql(f"{NOTE_CHECK} RETURNING 1", check.row()):
            return False
        job, now, event = check.job, check.now, check.verdict.event
        if event is not None:
            status = next_state(JOB_STEPS, "active", event)
            ended_at = now if status == "failed" else None
            await self._set_job(job, status=status, next_check_at=None, completed_at=ended_at)
        for old, new in zip(job.batches, check.batches, strict=True):
            if old != new:
                await self._save_batch(job.id, new)
            if old.status != new.status:
                await self._log(job.id, "checking", describe_progress(new), now)
        if (trigger := check.trigger) is not None:
            await self._add_trigger(trigger)
            done = f"{len(check.batches)} of {len(check.batches)} batches done"
            does = "starting" if trigger.state == "pending" else "looking whether Keboola has had"
            said = f"{done}: {does} the Keboola job (trigger {trigger.id})"
            said += f"; {check.verdict.reason}" if check.verdict.reason else ""
            await self._log(job.id, "triggered", said, now)
        elif event is not None:
            await self._log(job.id, "failed", check.verdict.reason, now)
        elif check.error and check.error != job.last_error:
            await self._log(job.id, "error", check.error, now)
        return True

    async def unknown_if_restored(self, trigger: Trigger, batches: Sequence[Batch]) -> Trigger:
        """The trigger, with an unknown outcome if it may have been sent before this database was
        restored. Batches that are younger than the restore were in no trigger then."""
        youngest = max(batch.created_at or 0.0 for batch in batches) - CLOCK_DOUBT
        sql = "SELECT min(taken_at) FROM backups WHERE restored_at > :youngest"
        [[since]] = await self._sql(sql, {"youngest": youngest})
        if since is None:
            return trigger
        return replace(trigger, state="unknown", sent_at=since, unknown_at=trigger.created_at)

    async def _refuse_second_firing(self, check: CheckResult) -> CheckResult:
        """The check; if the same Keboola job was started before, a check that fails its job and
        says so."""
        if check.trigger is None or await self._sql(
            "SELECT 1 FROM polling_jobs WHERE id = :id AND fires_again", {"id": check.job.id}
        ):
            return check
        for job, trigger in await self.fired(aim_of(check.trigger.stack_url, check.trigger.body)):
            if job.removed_at is not None or job.id == check.job.id:
                said = f"in round {trigger.round} of job {job.name!r}, trigger {trigger.id}"
                reason = f"these batches have started this Keboola job before ({said});"
                reason += " run `job retry` to start it again"
                verdict = Verdict("give_up", reason)
                return replace(check, trigger=None, verdict=verdict, error=reason)
        return check

    async def _save_batch(self, job_id: int, batch: Batch) -> None:
        where = "job_id = :job_id AND batch_id = :batch_id"
        await self._change("polling_batches", asdict(batch), where, job_id=job_id)

    async def _add_trigger(self, trigger: Trigger) -> None:
        aim = aim_of(trigger.stack_url, trigger.body)
        await self._insert("triggers", asdict(trigger) | {"aim": aim})

    @transactional
    async def import_history(
        self, job: Job, trigger: Trigger | None, logs: Sequence[Values], **columns: Any
    ) -> None:
        """Give a new job its past in another program: columns, batches, log and trigger."""
        await self._set_job(job, **columns)
        for batch in job.batches:
            await self._save_batch(job.id, batch)
        for row in logs:
            await self._insert("polling_logs", {"job_id": job.id, **row})
        if trigger is not None:
            await self._add_trigger(trigger)

    @transactional
    async def move_trigger(
        self, trigger: Trigger, event: Event, said: str, now: float, **facts: Any
    ) -> Trigger | None:
        """Move a trigger to its next state, and its job with it if `JOB_STEPS` says so and the job
        is in the same round. None, and nothing is written, if the trigger has changed meanwhile."""
        after = trigger_after(trigger, event, now, **facts)
        if not await self._save_trigger(trigger, after):
            return None
        job = await self.find_job(trigger.job_id)
        if event == "postpone" and after.unknown_at is None and not job.damage:
            after = retargeted(after, job.watches)  # the target may have changed meanwhile
            await self._save_trigger(replace(trigger, state="pending"), after)
        job_event: Event = "succeed_partly" if event == "succeed" and trigger.partial else event
        if job.round == trigger.round and job_event in JOB_STEPS[job.status]:
            await self._move_job(job, job_event, said, now)
        elif job.round == trigger.round and said:
            await self._set_error(job, said)
        if event == "claim" and after.attempts == 1:
            delay = max(0, int(1000 * (now - trigger.created_at)))
            await self._add_to_day(now, triggers=1, delay_ms=delay)
        if said:
            await self._log(trigger.job_id, LOG_STATUS.get(event, "error"), said, now)
        return after

    @transactional
    async def note_trigger(
        self, trigger: Trigger, now: float, *, error: str | None = None, **facts: Any
    ) -> None:
        """Store news of a trigger that stays in its state (a search, Keboola's status), or an
        error. If its job is in another round by now, the job is left alone."""
        if not await self._save_trigger(trigger, replace(trigger, **facts)):
            return
        job = await self.find_job(trigger.job_id)
        if job.round == trigger.round:
            if error and error != job.last_error:
                await self._log(job.id, "error", error, now)
            await self._set_error(job, error)

    async def _set_error(self, job: Job, error: str | None) -> None:
        row = 0 if error is None else job.errors_in_row + 1
        await self._set_job(job, last_error=error, errors_in_row=row)


# ── Housekeeping ──────────────────────────────────────────────────────────────────────────────

KEPT_FOR_A_WHILE = {  # the column that tells a row's age, and which rows may go
    "polling_logs": ("created_at", "TRUE"),
    "etl_run": ("start_time", "status <> 'in_progress'"),
    "etl_reject": ("created_at", "TRUE"),
    "triggers": (  # one of the current round is kept: it proves that the round fired
        "finished_at",
        "finished_at IS NOT NULL"
        " AND round < (SELECT j.round FROM polling_jobs j WHERE j.id = job_id)",
    ),
    "polling_jobs": (  # jobs of jobs.yaml are kept: they would come back and fire again
        "completed_at",
        f"origin = 'store' AND status IN {ENDED} AND NOT EXISTS"
        " (SELECT 1 FROM triggers t WHERE t.job_id = polling_jobs.id AND t.finished_at IS NULL)",
    ),
}
# Times that are compared with the clock; all others are history.
LIVE_TIMES = {
    "polling_jobs": ("last_check_at", "last_ok_at", "next_check_at"),
    "polling_batches": ("changed_at", "missing_since"),
    "triggers": ("sent_at", "unknown_at"),
}
RESTORED = "backups WHERE reason IS NOT NULL"
MARK_RESTORED = (  # what is done to a database that was restored: see Backups
    "UPDATE triggers SET state = 'unknown', sent_at = coalesce(sent_at, :taken_at),"
    " unknown_at = :now, searches = 0 WHERE state IN ('pending', 'sending', 'unknown')",
    "UPDATE backups SET restored_at = :now, reason = :reason WHERE restored_at IS NULL",
)
LATER_IS_MISSING = "What was done later is missing. `restore --acknowledge` says that you know"
IDS_LOST = 10**9  # of records, at most, given since the backup
DAYS_KEPT = 90  # of daily_sums
FARTHEST = 86400.0  # s ahead that a check is planned at most, however long its interval


class Store(Checks):
    """The whole store, and the only place with its SQL. This class itself has what is kept for how
    long, changes of the clock, and figures."""

    async def prune(self, before: float, keep: int) -> None:
        """Delete what ended before `before` or is not among the newest `keep` of its table."""
        for table, (age, may_go) in KEPT_FOR_A_WHILE.items():
            await self.delete_rows(table, f"{may_go} AND {age} < :before", before=before)
            newest_first = f"{may_go} ORDER BY {age} DESC, id DESC"
            await self.delete_rows(table, newest_first, skip=keep)
        oldest = {"oldest": iso(time.time() - 86400 * DAYS_KEPT)[:10]}
        delete = "DELETE FROM daily_sums WHERE day <= :oldest"
        await self.transact(partial(self._sql, delete, oldest))

    @transactional
    async def shift_times(self, step: float, now: float) -> None:
        """After the clock was set by `step` seconds, to `now`: move the times that are compared
        with it, so that intervals and windows keep their lengths and no past time is in the
        future."""
        for table, columns in LIVE_TIMES.items():
            moved_on = ", ".join(f"{name} = {name} + :step" for name in columns)
            where = " WHERE finished_at IS NULL" if table == "triggers" else ""
            await self._sql(f"UPDATE {table} SET {moved_on}{where}", {"step": step})
        await self._log(None, "updated", f"the clock was set by {step:+.0f} s", now)

    @transactional
    async def clamp_times(self, now: float) -> None:
        """At the start: set past times that are in the future, as the clock was ahead, to now."""
        for table, columns in LIVE_TIMES.items():
            for name in columns:
                latest = now + (FARTHEST if name == "next_check_at" else 0.0)
                await self._change(table, {name: now}, f"{name} > :latest", latest=latest)

    async def logs(self, job_id: int | None, limit: int, after: int = 0) -> list[LogRow]:
        """The last rows of a job, or of all (None), the oldest first; ids greater than `after`."""
        mine = "" if job_id is None else " AND job_id = :job_id"
        rows = await self._sql(
            f"SELECT {columns_of(LogRow)} FROM polling_logs"
            f" WHERE id > :after{mine} ORDER BY id DESC LIMIT :limit",
            {"job_id": job_id, "limit": limit, "after": after},
        )
        return [LogRow(*row) for row in reversed(rows)]

    async def counts(self) -> dict[str, Any]:
        """The numbers of jobs by shown status, secrets, triggers and log rows."""
        sql = f"SELECT {SHOWN_STATUS}, count(*) FROM polling_jobs j GROUP BY 1"
        counted = {"secrets": "secrets", "triggers": "triggers", "logs": "polling_logs"}
        counted |= {"restored": RESTORED}
        numbers = ", ".join(f"(SELECT count(*) FROM {rows})" for rows in counted.values())
        [row] = await self._sql(f"SELECT {numbers}")
        return {"jobs": dict(await self._sql(sql)), **dict(zip(counted, row, strict=True))}

    async def daily_sums(self, days: int) -> list[Any]:
        """The last days on which anything was done, the oldest first."""
        sql = f"SELECT day, {', '.join(SUMS)} FROM daily_sums ORDER BY day DESC LIMIT :days"
        return (await self._select_dicts(sql, {"days": days}))[::-1]

    async def oldest_trigger(self, now: float) -> float:
        """The age in seconds of the oldest trigger that has not reached Keboola; 0 without one."""
        [[decided]] = await self._sql(
            "SELECT min(created_at) FROM triggers WHERE finished_at IS NULL"
            " AND state IN ('pending', 'sending', 'unknown')"
        )
        return max(0.0, now - decided) if decided is not None else 0.0

    async def overdue(self, now: float, since: float) -> list[str]:
        """Active jobs without a successful check for three intervals after `since`, when the
        service started."""
        rows = await self._sql(
            f"SELECT name FROM polling_jobs j WHERE {ACTIVE} AND last_ok_at < :now - 3 * pace"
            " AND :since < :now - 3 * pace ORDER BY id",
            {"now": now, "since": since},
        )
        return [row[0] for row in rows]

    async def undelivered(self, now: float, settle: float, limit: int = 100) -> list[str]:
        """Jobs whose trigger has not reached Keboola within three intervals and the settle window,
        or whose Keboola job could not be asked for three times in a row."""
        rows = await self._sql(
            "SELECT DISTINCT j.id, j.name FROM triggers t JOIN polling_jobs j ON j.id = t.job_id"
            f" WHERE {OPEN_TRIGGER} AND (t.state <> 'running' OR j.errors_in_row >= 3)"
            " AND t.created_at < :now - :settle AND t.created_at < :now - 3 * j.pace"
            " ORDER BY j.id LIMIT :limit",
            {"now": now, "settle": settle, "limit": limit},
        )
        return [name for _, name in rows]

    async def attention(self, limit: int) -> list[dict[str, Any]]:
        """Jobs that wait for a person, with the reason and one of: failed, held, refused (OpenAI
        refuses the key), ingest (the last run that did anything failed or rejected records)."""
        rows = await self._sql(
            "SELECT j.id, j.name, j.last_error, CASE WHEN j.watch_secret = '' THEN 'ingest'"
            " WHEN EXISTS (SELECT 1 FROM triggers t WHERE t.job_id = j.id AND t.round = j.round"
            " AND t.state = 'held') THEN 'held' WHEN j.status = 'active' THEN 'refused'"
            " ELSE 'failed' END FROM polling_jobs j"
            " WHERE j.removed_at IS NULL AND (j.status = 'failed' OR j.status = 'active'"
            " AND (j.watch_secret = '' AND j.last_error IS NOT NULL OR j.last_error LIKE :no_key"
            " OR j.last_error LIKE :no_right)) ORDER BY j.id LIMIT :limit",
            {"limit": limit, "no_key": "%OpenAI said 401%", "no_right": "%OpenAI said 403%"},
        )
        rows += await self._sql(f"SELECT NULL, 'database', reason, 'restored' FROM {RESTORED}")
        return [dict(zip(("id", "job", "reason", "what"), row, strict=True)) for row in rows]

    async def alerts(self) -> dict[str, Mapping[str, float]]:
        """The problems that were reported to each target of alerts, and when last."""
        return {name: json.loads(t) for name, t in await self._sql("SELECT * FROM alerts")}

    @transactional
    async def save_alerts(self, target: str, told: Mapping[str, float]) -> None:
        await self._upsert("alerts", ("target", "told"), [(target, json.dumps(told))], key=1)

    @transactional
    async def detect_restore(self, now: float) -> None:
        """On PostgreSQL: mark the database if pg_restore has made it since the last call. A dump
        has the oid that a table had then; the table that is made of it has another."""
        if self.is_file:
            return
        [[oid]] = await self._sql("SELECT 'triggers'::regclass::oid::text")
        known = await self._sql("SELECT taken_at, counts FROM backups WHERE restored_at IS NULL")
        for taken_at, made_as in known:
            if made_as != oid:
                said = f"this database was restored from a dump of {iso(taken_at)}."
                said += f" {LATER_IS_MISSING}"
                log.critical("%s", said)
                for sql in MARK_RESTORED:
                    await self._sql(sql, {"taken_at": taken_at, "now": now, "reason": said})
                await self._sql(  # who asks /data for what is `after` an id misses nothing
                    "SELECT setval('normalized_data_id_seq', last_value + :lost)"
                    " FROM normalized_data_id_seq",
                    {"lost": IDS_LOST},
                )
        if not await self._change("backups", {"taken_at": now}, "restored_at IS NULL"):
            insert = "INSERT INTO backups (taken_at, counts) VALUES (:now, :oid)"
            await self._sql(insert, {"now": now, "oid": oid})

    @transactional
    async def reserve_ids(self, table: Literal["polling_jobs", "secrets"], next_id: int) -> None:
        """See that the next row of a table gets this id, unless it was given before."""
        for sql in self._engine().reserve_ids:
            await self._sql(sql.replace("{table}", table), {"next": next_id})

    @transactional
    async def acknowledge(self) -> bool:
        """A person has taken note that a backup replaced the database; False if none did."""
        return await self._change("backups", {"reason": None}, "reason IS NOT NULL")

    @transactional
    async def note_failure(self, job_id: int, said: str, now: float, wait: float) -> None:
        """Store that a step of a job met an internal error."""
        for job in await self.jobs_among([job_id]):  # it may be deleted meanwhile
            await self._set_error(job, said)
            await self._set_job(job, next_check_at=now + wait)
            await self._log(job_id, "error", said, now)

    @transactional
    async def log_event(self, status: str, message: str, now: float) -> None:
        """A log row that belongs to no job."""
        await self._log(None, status, message, now)

    async def names(self, table: Literal["polling_jobs", "secrets"]) -> list[str]:
        """The names of all jobs or secrets."""
        return [row[0] for row in await self._sql(f"SELECT name FROM {table} ORDER BY name")]

    async def ingested(self, source: str = "") -> dict[str, tuple[int, int]]:
        """The numbers of records and of rejects of each source, or of this one."""
        rows = await self._sql(
            "SELECT source, records, (SELECT count(*) FROM etl_reject r WHERE r.source = c.source)"
            " FROM etl_checkpoint c WHERE source <> '' AND (:source = '' OR source = :source)",
            {"source": source},
        )
        return {row[0]: (row[1], row[2]) for row in rows}

    async def due_next(self, limit: int) -> list[tuple[str, float]]:
        """The names of the jobs that are checked next, and when."""
        rows = await self._sql(
            f"SELECT name, next_check_at FROM polling_jobs j WHERE {ACTIVE}"
            " AND next_check_at IS NOT NULL ORDER BY next_check_at LIMIT :limit",
            {"limit": limit},
        )
        return [(row[0], row[1]) for row in rows]


# ── Backups ───────────────────────────────────────────────────────────────────────────────────

# A backup is a copy of the whole SQLite file as one read transaction sees it, while others write.
# It gets a backup's name only after it was verified: its structure, its references, the rows of
# each table as counted in that transaction, and that the master key opens a secret of it. Old
# backups are deleted after that.
#
# Before a start opens the database, SQLite checks it. Where it is damaged, or gone while there are
# backups, the newest backup that still verifies takes its place; what was there is kept. A kill in
# between leaves no database, and the next start does the same again. Where no backup is good,
# nothing is changed and the start is refused.
#
# Once, all the same: a restore loses the triggers that were written after the backup, and with them
# the proof that they were sent. So the copy is marked before it becomes the database:
# - Each trigger in it that is not settled gets an unknown outcome.
# - A trigger that is missing in it is decided on again. That one, too, gets an unknown outcome,
#   unless its batches are younger than the restore (`unknown_if_restored`). Keboola's search is
#   asked for what was started since the backup under the same name for the same batches, and that
#   is adopted, unless the store knows it: `job retry` asks for a new one. Only after the settle
#   window is the trigger sent.
# A database that pg_restore has made is marked in the same way when a service starts on it.
# Not promised: what only the lost part knew. A job that was paused or deleted then comes back; one
# that got another name or target may fire again. And if somebody cuts off the end of SQLite's log
# (-wal), that looks as after a crash: the transactions in it are missing, and nothing tells.
BACKUP_SECONDS = 60.0  # s between looks whether one is due
LEFT_OVER = 86400.0  # s after which a draft was left by a program that was killed
ShouldEnd = Callable[[], bool]  # whether the program ends


def backups_in(folder: Path) -> list[Path]:
    """The automatic backups, oldest first."""
    return sorted(folder.glob("[0-9]*Z.db"))


@contextlib.contextmanager
def open_sqlite(file: Path, mode: str = "rw", ends: ShouldEnd | None = None) -> Iterator[Any]:
    """A connection of this thread's own, whose statements fail once the program `ends`."""
    uri = f"file:{quote(str(file))}?mode={mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
            db.set_progress_handler(ends, 100_000)
            yield db
    except sqlite3.Error as e:
        raise StoreError(f"{file}: {e}") from e


def rows_of_tables(db: sqlite3.Connection) -> str:
    """How many rows each table has, as JSON; not `backups`, of which a copy has one more."""
    names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'backups'"
    tables = [name for (name,) in db.execute(names).fetchall()]
    return json.dumps({t: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables})


def verify_backup(file: Path, vault: Vault, ends: ShouldEnd | None = None) -> float:
    """When a backup was made. Raises StoreError where it is none, or not whole, and SecretError
    where its secrets do not open."""
    with open_sqlite(file, "ro&immutable=1", ends) as db:
        found = [said for (said,) in db.execute("PRAGMA integrity_check(3)") if said != "ok"]
        found += [f"{row} refers to nothing" for row in db.execute("PRAGMA foreign_key_check")]
        if found:
            raise StoreError(f"{file} is damaged: {'; '.join(found[:3])}")
        [[version]] = db.execute("SELECT coalesce(max(version), 0) FROM schema_version")
        if version > 1 + len(MIGRATIONS):
            raise StoreError(f"{file} was written by a newer TeckoChecker (schema {version})")
        marks = "SELECT taken_at, counts FROM backups WHERE restored_at IS NULL"
        taken_at, counts = db.execute(marks).fetchone() or (0.0, "")
        if counts != rows_of_tables(db):
            raise StoreError(f"{file} has not the rows that `backup` has counted; is it a backup?")
        sealed = db.execute(f"SELECT {SECRET_COLUMNS} FROM secrets LIMIT 1").fetchone()
    if sealed is not None:
        vault.open(SealedSecret(*sealed))
    return float(taken_at)


def make_backup(
    database: Path, file: Path, vault: Vault, now: float, ends: ShouldEnd | None = None
) -> None:
    """Copy the database to `file`, which is there only if the copy was verified."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_replacement(file) as draft:
        with open_sqlite(database, ends=ends) as db, open_sqlite(draft) as copy:
            db.execute("BEGIN")
            counts = rows_of_tables(db)
            db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            copy.execute("INSERT INTO backups (taken_at, counts) VALUES (?, ?)", (now, counts))
        verify_backup(draft, vault, ends)


def restore(files: Iterable[Path], settings: Settings, why: str, now: float) -> str:
    """Let the first of these backups that is good take the place of the database; what a person
    has to know."""
    refused, vault = list[str](), Vault(settings)
    for file in files:
        try:
            taken_at = verify_backup(file, vault)
            return install_backup(file, taken_at, settings.database, why, now)
        except StoreError as e:
            refused.append(str(e))
        except SecretError as e:
            key = Path(f"{file}.key")
            refused.append(f"{e}; its key is in {key}: copy that first" if key.exists() else str(e))
    refused = refused or [f"there is no backup in {settings.backups}"]
    hint = "nothing was changed; `restore FILE` puts another backup back"
    raise StoreError(f"{why}; {'; '.join(refused)}", hint=hint)


def install_backup(file: Path, taken_at: float, database: Path, why: str, now: float) -> str:
    """Mark a backup as said above, and let it take the place of the database, which is kept."""
    kept = f"{database}.{file_timestamp(now)}"
    said = f"{why}; the backup {file} of {iso(taken_at)} took its place (what was there: {kept})."
    said += f" {LATER_IS_MISSING}"
    with atomic_replacement(database) as draft:
        shutil.copyfile(file, draft)
        with open_sqlite(draft) as db:
            for sql in MARK_RESTORED:
                db.execute(sql, {"taken_at": taken_at, "now": now, "reason": said})
            ids = "UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'normalized_data'"
            db.execute(ids, (IDS_LOST,))  # who asks /data for what is `after` an id misses nothing
        for suffix in ("", "-wal", "-shm"):  # it goes first: a log alone would be taken for all
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{database}{suffix}", f"{kept}{suffix}")
    return said


def ensure_usable_database(settings: Settings, now: float) -> None:
    """See that the database can be used; else the newest good backup takes its place. To be called
    under the run lock, before the store is opened. What is damaged is only read."""
    database, files = settings.database, backups_in(settings.backups)
    there = database.exists() and database.stat().st_size > 0
    found = ["it is gone"] if files and not there else []
    if there and database.stat().st_nlink == 1:  # two names are for its opening to refuse
        try:
            with open_sqlite(database, "ro") as db:
                found = [said for (said,) in db.execute("PRAGMA quick_check(3)") if said != "ok"]
        except StoreError as e:  # another error is for its opening to tell
            damages = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            code = getattr(e.__cause__, "sqlite_errorcode", 0) & 0xFF
            found = [str(e)] if code in damages else []
    if found and settings.database_url is None:
        why = f"the database {database} cannot be used: {' '.join('; '.join(found).split())}"
        log.critical("%s", restore(reversed(files), settings, why, now))


@dataclass
class Backups:
    """The backups that a service makes by itself, and how the last one went."""

    vault: Vault
    ends: ShouldEnd
    last: float | None = None  # when the last one was made; None: never
    error: str | None = None  # why the last attempt failed; None: it did not

    def run_if_due(self, settings: Settings, now: float) -> None:
        """Make one where it is time, or where the last one was made under another master key; for
        a thread."""
        try:
            if self._is_due(settings, now):
                file = settings.backups / f"{file_timestamp(now)}.db"
                for draft in file.parent.glob(".*.db.*"):
                    if now - draft.stat().st_mtime > LEFT_OVER:
                        draft.unlink()
                make_backup(settings.database, file, self.vault, now, self.ends)
                for old in backups_in(file.parent)[: -settings.backup.keep]:
                    old.unlink()
                self.last, self.error = now, None
        except (TeckoError, OSError) as e:
            if str(e) != self.error and not self.ends():
                log.error("a backup failed, and is tried again: %s", e)
            self.error = str(e)

    def _is_due(self, settings: Settings, now: float) -> bool:
        times = [file.stat().st_mtime for file in backups_in(settings.backups)]
        self.last = max((at for at in times if at <= now), default=None)  # by no clock ahead
        key, last = self.vault.file, self.last or 0.0
        since = key.stat().st_mtime if key is not None and key.exists() else 0.0
        return now - (last if last > since else 0.0) >= settings.backup.every


# ── Asking over HTTP ──────────────────────────────────────────────────────────────────────────

# One way to ask another server: bounded in bytes, time, depth and redirects, whatever it sends;
# and one way to say what went wrong.

ANSWER_BYTES = 4 << 20  # bytes of an answer of OpenAI or Keboola: a page of batches has 100 KB
ERROR_BYTES = 1 << 18  # bytes of an answer that is an error
ANSWER_VALUES = 100_000  # commas in an answer as JSON: each value takes some 100 bytes of memory
REASON = 200  # characters of an answer's body that an error repeats
CUT = 16_384  # characters looked at for that: to redact more would hold up the event loop
REDIRECTS = (301, 302, 303, 307, 308)
PACKING = ("content-encoding", "content-length", "transfer-encoding")
SET_BY = {OpenAIError: "OPENAI_BASE_URL", KeboolaError: "stack_url", SourceError: "the URL"}
OWN_ERROR = {  # keys of an error that the API itself answers; other bodies are a proxy's or a
    OpenAIError: {"error"},  # router's, who knows nothing of what was asked for
    KeboolaError: {"error", "code"},
}


def one_line(text: object, most: int = 300) -> str:
    """What another server said, in one line that fits a log."""
    return re.sub(r"\s+", " ", excerpt(str(text), CUT)).strip()[:most]


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port (RFC 6454)."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def run_in_daemon_thread(work: Callable[[], Any]) -> futures.Future[Any]:
    """The result of `work`, which is done in a thread of its own that does not keep the program
    from ending. Raises RuntimeError if no thread can be started."""
    answer = futures.Future[Any]()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as e:
            answer.set_exception(e)

    threading.Thread(target=run, name="detached", daemon=True).start()
    return answer


lookups_under_way: dict[tuple[Any, ...], futures.Future[Any]] = {}  # by what is looked up


async def resolve_host(host: Any, port: Any, **hints: int) -> Any:
    """The event loop's `getaddrinfo`, in one thread for each name. A name whose servers never
    answer would fill the loop's own pool, which files and the store need, and delay the end of the
    program."""
    query = (host, port, *hints.items())
    if (answer := lookups_under_way.get(query)) is None:
        try:
            answer = lookups_under_way[query] = run_in_daemon_thread(
                partial(socket.getaddrinfo, host, port, **hints)
            )
        except RuntimeError as e:  # no thread is left
            raise OSError(f"{host} cannot be looked up: {e}") from e
        answer.add_done_callback(lambda _: lookups_under_way.pop(query))
    return await asyncio.wrap_future(answer)


class Turns:
    """Spreads requests evenly over each minute, without bursts."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def wait(self, per_minute: int | None) -> None:
        """Wait until the next request may be sent; None: any time."""
        if per_minute is not None:
            now = asyncio.get_running_loop().time()
            at = max(now, self._free_at)
            self._free_at = at + 60 / per_minute
            await asyncio.sleep(at - now)


def make_client(error: type[UpstreamError], connections: int | None = None) -> httpx2.AsyncClient:
    """A client that keeps no cookies and follows no redirect. Raises `error` where the environment
    allows none (a SOCKS proxy without its library, a missing SSL_CERT_FILE)."""
    import httpx2

    no_cookies = http.cookiejar.DefaultCookiePolicy(allowed_domains=[])
    try:
        client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(CALL_TIMEOUT, connect=CONNECT_TIMEOUT),
            limits=httpx2.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=KEEPALIVE,
            ),
            headers={"User-Agent": f"TeckoChecker/{VERSION}"},
            cookies=http.cookiejar.CookieJar(no_cookies),
            follow_redirects=False,
        )
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as e:
        said = f"no HTTP client can be made: {one_line(e) or type(e).__name__}"
        raise error(f"{said} (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE)", sent=False) from e
    asyncio.get_running_loop().getaddrinfo = resolve_host  # type: ignore[method-assign]
    return client


async def http_request(
    client: httpx2.AsyncClient,
    error: type[UpstreamError],
    who: str,
    method: str,
    url: str,
    *,
    deadline: float = CALL_DEADLINE,
    limit: int = ANSWER_BYTES,
    about: str = "",
    redirects: int = 0,
    anywhere: bool = False,
    good: Collection[int] = (),
    sink: IO[bytes] | None = None,
    **request: Any,
) -> httpx2.Response:
    """The whole answer to a request, whose status is 2xx or one of `good`; the body of a 200 goes
    to `sink` where one is given. It may have `limit` bytes, unpacked, and take `deadline` seconds.
    At most `redirects` redirects are followed, within the origin or `anywhere`.

    Raises `error` for whatever goes wrong, naming `who` was asked and what `about`. Its `sent` is
    False where the request is known not to have been sent. Its `status` is None where no answer
    came, or one that is not in the API's own form (`OWN_ERROR`) and not 3xx, 429 or 5xx.
    """
    import httpx2

    unsent = (
        *(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError),
        *(httpx2.UnsupportedProtocol, httpx2.InvalidURL),
    )
    home, what = url, f" about {about}" if about else ""
    too_long = error(f"{who} answered with more than {limit:,} bytes")
    try:
        async with asyncio.timeout(deadline):
            for _ in range(redirects + 1):
                asked = partial(client.stream, method, url, **request)
                answer = await read_response(asked, limit, too_long, sink)
                status, target = answer.status_code, answer.headers.get("location")
                if status not in REDIRECTS or not target:
                    break
                url = str(answer.url.join(target))
                if not anywhere and origin_of(clean_url(url)) != origin_of(home):
                    break
    except unsent as e:
        said = f"{who} cannot be reached: {one_line(e) or type(e).__name__}"
        raise error(said, sent=False) from e
    except (httpx2.TimeoutException, TimeoutError) as e:
        raise error(f"{who} did not answer{what} in time") from e
    except (httpx2.HTTPError, ValueError, OSError) as e:
        said = f"{type(e).__name__}: {one_line(e)}".rstrip(": ")
        raise error(f"{who} gave no answer{what}: {said}") from e
    if 200 <= status < 300 or status in good:
        return answer
    raise error_of_response(answer, error, f"{who} said {status}{what}")


async def read_response(
    request: Callable[[], Any], limit: int, too_long: UpstreamError, sink: IO[bytes] | None
) -> httpx2.Response:
    """The answer to a request, unpacked as it comes. More than `limit` bytes are an error; of an
    answer whose status is an error, no more than ERROR_BYTES are read."""
    import httpx2

    parts, size = [], 0
    async with request() as answer:
        async for part in answer.aiter_bytes():
            size += len(part)
            if answer.status_code >= 300 and size > ERROR_BYTES:
                break
            if size > limit:
                too_long.permanent = True
                raise too_long
            if sink is None or answer.status_code != 200:
                parts.append(part)
            else:
                await asyncio.to_thread(sink.write, part)
    raw = answer.headers.raw  # bytes, which need not be ASCII (RFC 9110, section 5.5)
    headers = [item for item in raw if item[0].decode().lower() not in PACKING]
    content = b"".join(parts)
    return httpx2.Response(
        answer.status_code, headers=headers, content=content, request=answer.request
    )


def error_of_response(
    answer: httpx2.Response, error: type[UpstreamError], said: str
) -> UpstreamError:
    """The error for an answer with a bad status: the reason that it gives, and the time to wait."""
    status, data = answer.status_code, None
    with contextlib.suppress(UpstreamError):
        data = parse_json_answer(answer, error, said)
    own = isinstance(data, dict) and OWN_ERROR.get(error, set()) <= data.keys()
    kept = own or error not in OWN_ERROR or status < 400 or status == 429 or status >= 500
    reason = (
        reason_in(data) or describe_body(answer, error) or http.client.responses.get(status, "")
    )
    if 300 <= status < 400:
        target = one_line(answer.headers.get("location", "nowhere"))
        reason = f"a redirect to {target}, not followed: a secret goes to no other host"
    if not kept:
        reason += " (a proxy's or router's answer, by its form)"
    their_now = unix_time(answer.headers.get("date")) or time.time()  # our clock may be wrong
    wait = parse_retry_after(answer.headers.get("retry-after"), their_now)
    return error(f"{said}: {reason}", status=status if kept else None, retry_after=wait)


def reason_in(data: Any) -> str:
    """The message of an error as OpenAI, Keboola and most others write it."""
    found = data.get("error") or data.get("message") if isinstance(data, dict) else None
    said = one_line(found.get("message", "") if isinstance(found, dict) else found or "", REASON)
    number = data.get("exceptionId") if found is not None else None  # Keboola's support asks for it
    return f"{said} (exceptionId {one_line(number, REASON)})" if number else said


MESSAGE_IN_XML = re.compile("<Message>(.*?)</Message>", re.DOTALL)  # of S3


def describe_body(answer: httpx2.Response, error: type[UpstreamError]) -> str:
    """The beginning of a body that is not JSON, or that it is a web page."""
    text = answer.content[: 4 * CUT].decode(errors="replace")
    xml = MESSAGE_IN_XML.search(text)
    said = one_line(xml[1] if xml else text, REASON)
    html = "html" in answer.headers.get("content-type", "") or said.startswith("<")
    return f"a web page; is {SET_BY.get(error, 'the address')} right?" if html else said


def parse_json_answer(answer: httpx2.Response, error: type[UpstreamError], who: str) -> Any:
    """The JSON of an answer, called `who` in errors. What orjson refuses, a lone surrogate or a
    number, json may take."""
    if answer.content.count(b",") > ANSWER_VALUES:
        raise error(f"{who} has more than {ANSWER_VALUES:,} values")
    with contextlib.suppress(ValueError):
        return orjson.loads(answer.content)
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(answer.content.decode())
    raise error(f"{who} cannot be read: {describe_body(answer, error) or 'it is empty'}")


class Upstream:
    """What is asked through one client, which is made when it is first needed."""

    error: type[UpstreamError] = UpstreamError
    connections: int | None = None  # at most
    _client: httpx2.AsyncClient | None = None

    async def _request(self, who: str, method: str, url: str, **request: Any) -> httpx2.Response:
        """See `http_request`."""
        self._client = self._client or make_client(self.error, self.connections)
        return await http_request(self._client, self.error, who, method, url, **request)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


# ── Upstreams: OpenAI ─────────────────────────────────────────────────────────────────────────

# A batch is checked by a list of its key's batches where that takes fewer requests than asking for
# each (100 batches cost one page), else singly. A list only ever says that a batch goes on: one
# that is finished, or not shown, is asked for singly before anything follows from it. So a list
# that fails, lies or stands still costs requests or time, and never a wrong conclusion:
# - it fails, or brings few of the wanted batches: all are asked for singly for some minutes
# - it stands still: some batches are asked for singly all the time (`Steps`), and once a finished
#   one is listed as unfinished, all are
# A key rests as a whole after a 429 or an outage: a failure that says that nobody is there (no
# answer, 502, 503, 504), met five times in a row about different things. Then one call alone
# tries, and what had failed waits longer than the rest: one broken batch stops no other.

PAGE = 100  # batches in one page of a list, the most there is
BARE_PAGES = 2  # pages without a wanted batch, after which a list is read no further
LIST_AGAIN = 600.0  # s until a list that failed, lied or did not pay is tried again
THE_LIST = "the list of batches"  # as what a call is about
NOBODY_THERE = (None, 502, 503, 504)  # statuses of errors that say nothing of what was asked for
OUTAGE_FAILURES = 5  # of these in a row, about different things, before a key rests
OUTAGE_PAUSE = 10.0  # s that it does so first; doubles with each trial that fails
OUTAGE_LONGEST = 300.0  # s, to which that grows


class Provider(NamedTuple):
    """A service that runs batches: how it is asked, and what its answers mean. Another service
    whose API has the same form is another table."""

    base_url: str | None  # None: the SDK's own
    header: str  # the one that carries the key
    path: str  # of the list; a batch is one level below
    statuses: Mapping[str, str]  # its words, and ours
    fields: Mapping[str, str]  # of BatchSeen, and where a batch has them, if under another name


OPENAI = Provider(  # https://platform.openai.com/docs/api-reference/batch/object
    base_url=None,
    header="Authorization",
    path="/batches",
    statuses={status: status for status in KNOWN_BATCH},
    fields={
        "requests_total": "request_counts.total",
        "requests_completed": "request_counts.completed",
        "requests_failed": "request_counts.failed",
        "error": "errors.data.0.message",
    },
)


def value_at(data: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for name in path.split("."):
        if isinstance(data, list):
            data = data[int(name)] if name.isdecimal() and int(name) < len(data) else None
        else:
            data = data.get(name) if isinstance(data, dict) else None
    return data


def batch_field(name: str, value: Any) -> Any:
    """The value of a field of BatchSeen: a time before 2100, a count, or a text."""
    if name.endswith("_at") or name.startswith("requests_"):
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith("_at"):  # milliseconds are none
            return value if known and 0 <= value < 4_102_444_800 else None
        return int(value) if known and 0 <= value < 1e15 else 0  # nor NaN
    return one_line(value) or None if isinstance(value, str) else None


def parse_batch(batch_id: str, data: Any) -> BatchSeen:
    """A Batch object as BatchSeen. Raises OpenAIError where the answer has no status or is about
    another batch: the SDK does not validate, and would take any JSON for a batch."""
    status, given = value_at(data, "status"), value_at(data, "id")
    if given != batch_id or not isinstance(status, str):
        said = f"it is about {one_line(given, 80)!r}" if isinstance(given, str) else "it has no id"
        said = "it has no status" if given == batch_id else said
        raise OpenAIError(f"OpenAI's answer is not batch {batch_id}: {said}")
    names = [f.name for f in fields(BatchSeen)][2:]
    facts = (batch_field(name, value_at(data, OPENAI.fields.get(name, name))) for name in names)
    return BatchSeen(batch_id, OPENAI.statuses.get(status) or one_line(status), *facts)


def parse_page(data: Any) -> tuple[list[BatchSeen], str | None]:
    """The batches of a page of a list that can be read, and the id after which the next page
    begins, if there is one. Raises OpenAIError where the answer is no page."""
    items = value_at(data, "data")
    if not isinstance(items, list):
        raise OpenAIError("OpenAI's answer is no list of batches")
    page, last = [], value_at(items[-1], "id") if items else None
    for item in items:
        with contextlib.suppress(OpenAIError):
            page.append(parse_batch(str(value_at(item, "id")), item))
    more = value_at(data, "has_more") is True and isinstance(last, str)
    return page, last if more else None


@dataclass(frozen=True, slots=True)
class Pause:
    """A key of OpenAI that is not used for a while: it was rate-limited, or its calls failed."""

    secret: str  # its name
    until: At
    reason: str


@dataclass(slots=True)
class KeyState:
    """One key: what it may do, and what its list showed. Times are monotonic seconds."""

    value: SecretValue
    turns: Turns = field(default_factory=Turns)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT_PER_KEY))
    names: set[str] = field(default_factory=set)  # of the secrets with this value
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # the list
    listed_at: float = -math.inf  # when the list's first page was asked for
    listed: dict[str, BatchSeen] = field(default_factory=dict)  # those that were wanted of it
    list_from: float = -math.inf  # no list is read before: the last one was of no use
    finished: deque[str] = field(default_factory=lambda: deque(maxlen=PAGE))  # seen so singly
    failed: set[str] = field(default_factory=set)  # what nobody was there for, in a row
    until: float = -math.inf  # it rests; then one call tries
    pause: float = 0.0  # s that it last rested for; 0: it works
    error: OpenAIError | None = None  # why
    trying: asyncio.Lock = field(default_factory=asyncio.Lock)  # after a pause

    def record_outcome(
        self, about: str, error: OpenAIError | None, now: float, trial: bool
    ) -> None:
        """Learn from how a call ended. While the key rests only the trial counts, since all others
        began before. An error about one thing (404, 500) shows that OpenAI is there."""
        limited = error is not None and error.status == 429
        if self.pause and not trial and not limited:
            return
        if error is None or (error.status not in NOBODY_THERE and not limited):
            if self.failed and self.pause:  # nor was the list there
                self.list_from = -math.inf
            self.failed, self.pause, self.error = set(), 0.0, None
            return
        pause = min(error.retry_after or BACKOFF_FIRST, LONGEST_WAIT)
        if not limited:
            self.failed.add(about)
            pause = min(max(OUTAGE_PAUSE, 2 * self.pause), OUTAGE_LONGEST)
        if limited or trial or len(self.failed) >= OUTAGE_FAILURES:
            self.pause, self.until, self.error = pause, now + pause, error


class OpenAI(Upstream):
    """OpenAI's batches through the official SDK: one client and one pool for all keys.

    The SDK knows the API. Bounds and errors are those of `http_request`, retries are the
    scheduler's, and an answer is believed only as far as `parse_batch` does.
    """

    error = OpenAIError

    def __init__(
        self,
        base_url: str | None,
        per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_url, self.per_minute, self._clock = base_url, per_minute, clock
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self.on_request: Callable[[str], None] = lambda kind: None  # told: retrieve or list
        self._keys: dict[str, KeyState] = {}

    def _key(self, key: SecretValue) -> KeyState:
        if (value := key.reveal()) not in self._keys:
            self._keys[value] = KeyState(key)
        return self._keys[value]

    @cached_property
    def _sdk(self) -> openai.AsyncOpenAI:
        """Made when it is first needed: its import takes most of a second."""
        try:
            import httpx2
            import openai
        except (ImportError, OSError) as e:  # no file descriptor left, for one
            raise OpenAIError(f"the SDK cannot be loaded: {one_line(e)}", sent=False) from e
        return openai.AsyncOpenAI(
            api_key="set for each key",
            base_url=self._base_url or OPENAI.base_url,
            max_retries=0,
            # a transport that is a function, whatever the name of its class
            http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(self._transport)),
        )

    async def _transport(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request of the SDK. Of its headers only the key goes along: it would add what
        OPENAI_ORG_ID and the like say, which is not meant for every key."""
        url, path = str(request.url), request.url.path
        about = THE_LIST if path.endswith(OPENAI.path) else path.rpartition("/")[2]
        headers = {OPENAI.header: request.headers[OPENAI.header]}
        return await self._request("OpenAI", request.method, url, about=about, headers=headers)

    def register_secret(self, key: SecretValue, name: str) -> Collection[str]:
        """Note that the secret `name` has this value; the names of all that have it. A value that
        no secret has any more is forgotten."""
        if name not in (mine := self._key(key)).names:
            for value, other in [*self._keys.items()]:
                other.names.discard(name)
                if not other.names and other is not mine:
                    del self._keys[value]
            mine.names.add(name)
        return mine.names

    def pauses(self) -> list[Pause]:
        """The keys that rest."""
        now, wall, keys = self._clock(), time.time(), [*self._keys.values()]  # also from a thread
        return [
            Pause(name, wall + max(0.0, key.until - now), str(key.error))
            for key in keys
            if key.pause
            for name in sorted(key.names)
        ]

    async def retrieve(self, key: SecretValue, batch_id: str) -> BatchSeen:
        """One batch as it is now (GET /batches/{batch_id}). Raises OpenAIError."""
        mine = self._key(key)
        seen = parse_batch(batch_id, await self._call(mine, "retrieve", batch_id))
        if outcome(seen) is not None:
            mine.finished.append(batch_id)
        if batch_id in mine.listed:
            mine.listed[batch_id] = seen  # which is newer
        return seen

    def listing(self, key: SecretValue) -> tuple[float, Mapping[str, BatchSeen]]:
        """How many seconds ago the key's batches were listed, and those of the wanted ones that
        this showed. It says nothing of the others."""
        mine = self._key(key)
        return self._clock() - mine.listed_at, mine.listed

    async def latest(self, key: SecretValue) -> list[BatchSeen]:
        """The newest batches of a key, to choose from. Raises OpenAIError."""
        return parse_page(await self._call(self._key(key), "list", THE_LIST, limit=20))[0]

    async def read_list(
        self, key: SecretValue, wanted: set[str], checks: int, fresh: float
    ) -> None:
        """Read the list of a key's batches, for `listing`, unless it was read within `fresh`
        seconds: from the newest batch on, until all that are wanted were found, or two pages showed
        none of them, or half as many pages were read as there are checks. Raises OpenAIError where
        single calls would fail as well: the key is refused, or rests."""
        mine = self._key(key)
        async with mine.reading:
            now, useless = self._clock(), checks <= 2 * math.ceil(len(wanted) / PAGE)
            if useless or now < mine.list_from or now - mine.listed_at <= fresh:
                return
            if mine.pause:  # one batch is asked for before hundreds; it is told in its own turn
                first = min(wanted, key=lambda batch_id: batch_id in mine.failed)
                with contextlib.suppress(OpenAIError):
                    await self.retrieve(key, first)
            try:
                await self._read_list(mine, wanted, checks)
            except OpenAIError as e:
                if e.status == 401 or not e.sent:
                    raise
                mine.list_from = self._clock() + LIST_AGAIN
                if mine.pause:
                    raise
                log.info("batches are asked for singly, since their list fails: %s", e)

    async def _read_list(self, mine: KeyState, wanted: set[str], checks: int) -> None:
        at, seen, pages, bare = self._clock(), dict[str, BatchSeen](), 0, 0
        query: dict[str, Any] = {"limit": PAGE}
        while seen.keys() < wanted and bare < BARE_PAGES and 2 * pages < checks:
            page, after = parse_page(await self._call(mine, "list", THE_LIST, **query))
            if any(b.batch_id in mine.finished and outcome(b) is None for b in page):
                mine.listed = {}
                raise OpenAIError("it shows a finished batch as unfinished")
            before = len(seen)
            seen |= {batch.batch_id: batch for batch in page if batch.batch_id in wanted}
            pages, bare = pages + 1, 0 if len(seen) > before else bare + 1
            mine.listed_at, mine.listed = at, seen  # what came counts where a later page fails
            if after is None:
                break
            query["after"] = after
        if checks * len(seen) < pages * len(wanted):  # so many calls would have done as much
            mine.list_from = at + LIST_AGAIN

    async def _call(
        self, mine: KeyState, kind: Literal["retrieve", "list"], about: str, **query: Any
    ) -> Any:
        """The JSON that a call brings, within what its key may do: so many calls at once and a
        minute, none while the key rests, and then one alone. Raises OpenAIError."""
        sdk = self._sdk.with_options(api_key=mine.value.reveal())
        import httpx2
        import openai

        path = OPENAI.path if kind == "list" else f"{OPENAI.path}/{about}"
        async with mine.slots:
            self._refuse_while_paused(mine, about)
            await mine.turns.wait(self.per_minute)
            async with mine.trying if mine.pause else contextlib.nullcontext():
                self._refuse_while_paused(mine, about)
                trial = mine.pause > 0
                try:
                    async with self._slots:
                        self.on_request(kind)
                        options: Any = {"params": query}
                        answer = await sdk.get(path, cast_to=httpx2.Response, options=options)
                    data = parse_json_answer(answer, OpenAIError, f"OpenAI's answer about {about}")
                except (openai.OpenAIError, OpenAIError) as e:
                    # the SDK wraps some of what its transport raises
                    found = [x for x in (e, e.__cause__) if isinstance(x, OpenAIError)]
                    error = (found or [OpenAIError(f"OpenAI about {about}: {one_line(e)}")])[0]
                    mine.record_outcome(about, error, self._clock(), trial)
                    raise error from e
                mine.record_outcome(about, None, self._clock(), trial)
                return data

    def _refuse_while_paused(self, mine: KeyState, about: str) -> None:
        """Raises OpenAIError while the key rests, which it does twice as long for what failed."""
        wait = mine.until - self._clock() + mine.pause * (about in mine.failed)
        if mine.pause and wait > 0:
            names = " and ".join(sorted(mine.names)) or "this key"
            said = f"OpenAI is not asked with {names} for now: {mine.error}"
            status = mine.error.status if mine.error else None
            raise OpenAIError(said, status=status, retry_after=wait, sent=False)


# ── Upstreams: Keboola ────────────────────────────────────────────────────────────────────────

# Keboola has no idempotency key, so what may have arrived is searched for by our trigger id before
# it is sent again. The search asks for what was created since the first POST, by Keboola's own
# clock: ours may be wrong. Its time comes from the Date header of its answers and goes on by the
# monotonic clock. Before a trigger is sent again, one search more looks without that bound. The
# index lags: that it shows nothing proves something only after the settle window (`Steps`).

CALLS_PER_STACK = 8  # calls to a stack: one that hangs costs no other anything
SEARCH_SLACK = 300.0  # s before the first POST that a search begins
SEARCH_PAGE = 200  # jobs in one page of a search; of these ANSWER_BYTES hold 20 KB each
SEARCH_PAGES = 20  # of one search
UNBOUNDED = 86_400.0  # s before the first POST, where a search without bound in time ends


class Action(Protocol):
    """What a trigger starts. `target` is the trigger's address. Each raises an UpstreamError."""

    async def prepare(self, target: str) -> float | None:
        """All that can fail before a claim; the other side's time, in unix seconds, if known."""

    async def send(self, trigger: Trigger, secret: SecretValue) -> KeboolaJob:
        """Start it, once; the error's `sent` and `status` say what is known otherwise."""

    async def find(
        self, trigger: Trigger, secret: SecretValue, known: set[str], *, anytime: bool = False
    ) -> KeboolaJob | None:
        """What was started for this trigger, if the search shows it; that it does not proves
        nothing. A trigger that was never sent may have been sent under another id before a restore:
        for it, what was started for the same job and batches counts, unless its id is `known`."""

    async def follow(self, trigger: Trigger, secret: SecretValue) -> KeboolaJob:
        """What has become of it."""


def parse_keboola_job(data: Any) -> KeboolaJob:
    """A Job of the queue's description; one without id, status and isFinished is unreadable."""
    given, status, ended = (value_at(data, name) for name in ("id", "status", "isFinished"))
    known = type(given) is int or (isinstance(given, str) and given.isprintable() and given)
    if not known or not isinstance(status, str) or not isinstance(ended, bool):
        raise KeboolaError("Keboola's answer is not a job: it has no id, status and isFinished")
    message = value_at(data, "result.message")
    said = one_line(message) if message else None
    return KeboolaJob(str(given), one_line(status), ended, said)


def purpose_of(job: Any) -> tuple[str | None, tuple[str | None, list[str]]]:
    """What a job of Keboola was started for: our trigger's id; our job's name and its batches."""
    values = value_at(job, "variableValuesData.values")
    items = values if isinstance(values, list) else []
    given = {str(value_at(item, "name")): str(value_at(item, "value")) for item in items}
    batches = f"{given.get('batch_ids_completed')} {given.get('batch_ids_failed')}"
    named = given.get("teckochecker_job"), sorted(BATCH_ID.findall(batches))
    return given.get("teckochecker_trigger_id"), named


def keboola_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def queue_url(stack: str, index: Any) -> str:
    """The job queue that a stack's index names. Raises KeboolaError unless a token may go there:
    over https, or within this machine if the stack is on it, too."""
    services = value_at(index, "services")
    listed = services if isinstance(services, list) else []
    urls = [value_at(service, "url") for service in listed if value_at(service, "id") == "queue"]
    with contextlib.suppress(ValueError):
        found = clean_url(str(urls[0]) if urls else "")
        parts = urlsplit(found)
        local = parts.hostname in LOOPBACK and stack.startswith("http:")
        if not parts.query and (parts.scheme == "https" or local):
            return found.rstrip("/")
    said = f"found {one_line(urls[0], 100)!r}" if urls else "found no service with the id queue"
    raise KeboolaError(f"{stack} names no job queue that a token may go to: {said}", sent=False)


class Keboola(Upstream):
    """Keboola's job queue (its OpenAPI description, version 1.3.8), an `Action`. Its address comes
    from the stack's own service index, asked without a token."""

    error = KeboolaError

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queues: dict[str, asyncio.Task[str]] = {}
        self._ahead: dict[str, float] = {}  # s by which a stack's clock is ahead of the monotonic

    async def prepare(self, target: str) -> float | None:
        await self._queue(target)
        ahead = self._ahead.get(target)
        return None if ahead is None else ahead + self._clock()

    async def send(self, trigger: Trigger, secret: SecretValue) -> KeboolaJob:
        answer = await self._call("POST", trigger, "jobs", secret, content=trigger.body)
        return parse_keboola_job(answer)

    async def follow(self, trigger: Trigger, secret: SecretValue) -> KeboolaJob:
        wanted = str(trigger.keboola_job_id)
        path = f"jobs/{quote(wanted, safe='')}"
        job = parse_keboola_job(await self._call("GET", trigger, path, secret))
        if job.id != wanted:
            said = f"Keboola's answer about job {wanted} is about {one_line(job.id, 80)}"
            raise KeboolaError(said)
        return job

    async def storage(self, stack: str, token: SecretValue, path: str) -> Any:
        """GET a path of the stack's Storage API, for `validate --online`."""
        return await self._ask("GET", stack, f"{stack}/v2/storage/{path}", token)

    async def find(
        self, trigger: Trigger, secret: SecretValue, known: set[str], *, anytime: bool = False
    ) -> KeboolaJob | None:
        """Asked oldest first, so that the first one wins; `anytime`, newest first."""
        body, since = json.loads(trigger.body), trigger.sent_at or trigger.created_at
        wanted = purpose_of(body)[1] if trigger.attempts == 0 else None
        query = {
            "componentId": body["component"],
            "configId": body["config"],
            "sortBy": "createdTime",
            "sortOrder": "desc" if anytime else "asc",
            "limit": str(SEARCH_PAGE),
        }
        if not anytime:
            query["createdTimeFrom"] = keboola_time(since - SEARCH_SLACK)
        met, until = set[str](), time.monotonic() + CALL_DEADLINE
        for page in range(SEARCH_PAGES):
            query["offset"] = str(page * SEARCH_PAGE)
            bounds = {"params": query, "deadline": until - time.monotonic()}
            jobs = await self._call("GET", trigger, "search/jobs", secret, **bounds)
            if not isinstance(jobs, list):
                raise KeboolaError("Keboola's search answered with something else than a list")
            for job in jobs:
                found, purpose = purpose_of(job)
                same = found and purpose == wanted and str(value_at(job, "id")) not in known
                if found == trigger.id or same:
                    return parse_keboola_job(job)
            oldest = str(value_at(jobs[-1], "createdTime")) if jobs else ""
            if len(jobs) < SEARCH_PAGE or (anytime and oldest < keboola_time(since - UNBOUNDED)):
                return None
            if (ids := {str(value_at(job, "id")) for job in jobs}) <= met:
                raise KeboolaError("Keboola's search repeats its pages")
            met |= ids
        raise KeboolaError(f"Keboola's search did not end within {SEARCH_PAGES} pages")

    async def _queue(self, stack: str) -> str:
        """The URL of the stack's job queue (GET /v2/storage, services); asked once a stack."""

        async def ask() -> str:
            try:
                return queue_url(stack, await self._ask("GET", stack, f"{stack}/v2/storage"))
            except KeboolaError as e:
                e.sent = False  # the index was asked, nothing else
                raise

        if (asked := self._queues.get(stack)) is None or (asked.done() and asked.exception()):
            asked = self._queues[stack] = asyncio.create_task(ask())
        return await asyncio.shield(asked)

    async def _call(
        self, method: str, trigger: Trigger, path: str, token: SecretValue, **request: Any
    ) -> Any:
        url = f"{await self._queue(trigger.stack_url)}/{path}"
        return await self._ask(method, trigger.stack_url, url, token, **request)

    async def _ask(
        self, method: str, stack: str, url: str, token: SecretValue | None = None, **request: Any
    ) -> Any:
        """The JSON of an answer, whose Date tells the stack's time. Raises KeboolaError."""
        if token is not None:
            headers = {"X-StorageApi-Token": token.reveal(), "Content-Type": "application/json"}
            request["headers"] = headers
        about = f"{method} {urlsplit(url).path}"
        try:
            answer = await self._request("Keboola", method, url, about=about, **request)
        except KeboolaError as e:
            if not e.sent:
                self._queues.pop(stack, None)  # the index may name another host by now
            raise
        if (date := unix_time(answer.headers.get("date"))) is not None:
            self._ahead[stack] = date - self._clock()
        return parse_json_answer(answer, KeboolaError, f"Keboola's answer about {about}")

    async def close(self) -> None:
        for asked in self._queues.values():
            asked.cancel()
        await super().close()


# ── Web ───────────────────────────────────────────────────────────────────────────────────────

PAGE_BYTES = 64 << 20  # of one answer of a source, unpacked
MAX_REDIRECTS = 5
SOURCE_DEADLINE = 120.0  # s for one answer of a source
DOWNLOAD_DEADLINE = 3600.0  # s for a file behind a URL


def without_query(url: str) -> str:
    """A URL without its query, which may hold a token."""
    return url.partition("?")[0]


class RemoteFile(NamedTuple):
    name: str  # s3://bucket/key, or the URL without its query
    url: str
    tag: str | None = None  # another one where it has changed; None: unknown until it is fetched


SIGNED_FOR = timedelta(hours=12)  # a run that takes longer fails, and the next one goes on


def s3_store(source: CsvSource, secret: SecretValue | None) -> S3Store:
    """The bucket of a source. The secret signs requests and is never sent, so that http is good
    enough for an endpoint. With a secret, the environment's keys are ignored."""
    from obstore.store import S3Store

    key_id, colon, key = secret.reveal().partition(":") if secret else ("", ":", "")
    if not colon:
        raise SecretError(f"secret {source.secret!r} is not ACCESS_KEY_ID:SECRET_ACCESS_KEY")
    keys = {"access_key_id": key_id, "secret_access_key": key, "expires_at": None}
    said = {"aws_region": source.region, "aws_endpoint_url_s3": source.endpoint}
    return S3Store(
        urlsplit(source.path).netloc,
        config=cast(Any, {name: text for name, text in said.items() if text}),
        client_options={"allow_http": True},
        retry_config={"max_retries": 3},
        credential_provider=cast(Any, lambda: keys) if secret else None,
    )


def path_matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob; `**` stands for any number of folders."""
    if not pattern or not names:
        return not names and {*pattern} <= {"**"}
    if pattern[0] == "**":
        return path_matches(names, pattern[1:]) or path_matches(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and path_matches(names[1:], pattern[1:])


async def s3_objects(source: CsvSource, secret: SecretValue | None) -> list[RemoteFile]:
    """The objects that an s3:// path names: itself, or all that match it as a glob. A list of them
    is asked for once for a thousand objects. Raises SourceError."""
    import obstore.exceptions

    _, root, wanted = re.split("(s3://[^/]+/)", source.path, maxsplit=1)
    folder = re.split(r"[*?[]", wanted)[0].rpartition("/")[0]
    try:
        store = await asyncio.to_thread(s3_store, source, secret)  # which reads all certificates
        every = [each async for page in store.list(prefix=folder) for each in page]
        exact = [e for e in every if e["path"] == wanted]
        parts = wanted.split("/")
        found = exact or [e for e in every if path_matches(e["path"].split("/"), parts)]
        urls = await obstore.sign_async(store, "GET", [e["path"] for e in found], SIGNED_FOR)
    except (obstore.exceptions.BaseError, OSError) as e:  # which says pages
        said = str(e)
        why = MESSAGE_IN_XML.search(said) or re.search('message: "(.*?)"', said)
        text = f"{source.path}: {one_line(why[1] if why else said.partition(chr(10))[0])}"
        status = re.search(r"status code: (\d+)", said)
        raise SourceError(text, status=int(status[1]) if status else None) from None
    if not found:
        raise SourceError(f"there is no object {source.path}", status=404)
    tags = [f"{e['e_tag'] or e['last_modified']} {e['size']}" for e in found]
    names = [root + e["path"] for e in found]
    return [*map(RemoteFile, names, urls, tags)]


class Web(Upstream):
    """Sources of ingests over HTTP. A secret goes to the origin that it was given for and to no
    other. Jobs with a rate share it with all others that have one for the same host."""

    error, connections = SourceError, IN_FLIGHT

    def __init__(self) -> None:
        self._turns = defaultdict[tuple[str, str, int], Turns](Turns)  # by origin

    async def get(
        self,
        source: Source,
        url: str,
        secret: SecretValue | None,
        *,
        state: Mapping[str, Any] = MappingProxyType({}),
        sink: IO[bytes] | None = None,
        limit: int = PAGE_BYTES,
        good: Collection[int] = (),
    ) -> httpx2.Response:
        """GET `url`, if it changed since the etag or time that `state` has. Raises SourceError."""
        known = {"If-None-Match": state.get("etag"), "If-Modified-Since": state.get("modified")}
        asked = {name: value for name, value in known.items() if value}
        if isinstance(source, CsvSource) and source.in_s3:
            secret = None  # which has signed the URL
        await self._turns[origin_of(url)].wait(source.max_requests_per_minute)
        patience = float(source.timeout or SOURCE_DEADLINE)
        return await self._request(
            without_query(url),
            "GET",
            url,
            deadline=patience if sink is None else max(patience, DOWNLOAD_DEADLINE),
            limit=limit,
            redirects=MAX_REDIRECTS,
            anywhere=secret is None,
            good={*good, 304} if asked else good,
            sink=sink,
            headers=self._headers(source, secret) | asked,
            timeout=(CONNECT_TIMEOUT, patience, patience, None),  # connect, read, write, pool
        )

    @staticmethod
    def _headers(source: Source, secret: SecretValue | None) -> dict[str, str]:
        headers = {"Accept": "application/json" if source.type == "api" else "*/*"}
        if secret is not None:
            name, _, value = source.header.partition(":")
            headers[name] = value.strip().replace("{secret}", secret.reveal())
        return headers


# ── Ingest: what records become ───────────────────────────────────────────────────────────────

CHUNK_ROWS = 2000  # records that commit together: beyond that a transaction only gets longer
NESTED = 200  # levels of a record: what serves it knows 255, some of which are its own
DIGITS = 4000  # of an integer; Python converts no more than 4300
MAX_NOTES = 50  # of a run
LIMITS = {"secret", "header", "max_failed", "on_drift", "max_requests_per_minute", "timeout"}
# of a source: they change nothing about what a record becomes


class BadRecord(ValueError):
    """A record that cannot be taken, and why."""


def read_json(body: bytes) -> Any:
    """Parse JSON without losing a digit. What orjson refuses or would round is parsed by json: then
    a lone surrogate, or a number that is not finite (a Decimal), costs only its own record. Raises
    SourceError."""
    try:
        if not re.search(rb"\d{19}", body):  # beyond 64 bits orjson makes it a float
            with contextlib.suppress(orjson.JSONDecodeError):
                return orjson.loads(body)
        body = body.removeprefix(codecs.BOM_UTF8)
        return json.loads(
            body.decode(json.detect_encoding(body), "surrogateescape"),
            strict=False,  # a control character in a string costs nothing
            parse_constant=Decimal,
            parse_float=lambda text: float(text) if math.isfinite(float(text)) else Decimal(text),
            parse_int=lambda text: int(text) if len(text) <= DIGITS else Decimal(text),
        )
    except (ValueError, RecursionError) as e:
        raise SourceError(f"the answer is not JSON: {one_line(e)}: {one_line(body[:80])}") from e


def to_json(value: Any) -> bytes:
    """JSON with its keys sorted, so that their order makes no other record. Raises BadRecord for
    what could not be served again: lone surrogates, what is no number, and nesting without end."""
    try:
        try:
            return orjson.dumps(value, None, orjson.OPT_SORT_KEYS)
        except TypeError:  # as for integers beyond 64 bits, of which orjson knows nothing
            return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, UnicodeEncodeError, RecursionError) as e:
        kind = {TypeError: "a number that is not finite", RecursionError: "endless nesting"}
        found = kind.get(type(e), "half of a surrogate pair")
        raise BadRecord(f"found {found}; allowed: finite numbers and whole characters") from None


def lenient_json(value: Any) -> bytes:
    """JSON even of what `to_json` refuses, to keep it with the rejected records."""
    try:
        return json.dumps(value, separators=(",", ":"), default=str).encode()
    except RecursionError:
        return b"(nested too deep to be shown)"


def is_deeper(value: Any, allowed: int) -> bool:
    """Whether lists and objects are nested deeper than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return allowed < 0 or any(
        is_deeper(v, allowed - 1) for v in inner if isinstance(v, dict | list)
    )


Picker = Callable[[Mapping[str, Any]], Any]


def picker(path: str) -> Picker:
    """A function that returns the value at a dotted path; a field of that whole name wins."""
    keys = path.split(".")

    def pick(record: Any) -> Any:
        if path in record:
            return record[path]
        for key in keys:
            record = record.get(key) if isinstance(record, dict) else None
        return record

    return pick


# A date is of one of the forms below, with a time before or behind it or none, or it is refused:
# ISO 8601 and its variants, RFC 5322, what JavaScript, Go and C print, and unix time. Which of two
# numbers is the day is said by a dot (15.1.2024), by a number that is no month, or by `dates`.
USUAL_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
DATE_TAIL = re.compile(r"\s*(\([^()]*\)|\[[^][]*\]|(?<=\s)m=[+-][\d.]+)$")  # a zone's name, Go's m=
DATE_TIME = re.compile(
    r"(?:(?<=\d)T|\b)(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?(?:\s*([ap])\.?m\b\.?)?"
    r"(\s*(?:Z|UTC?|GMT)?\s*([+-])(\d\d):?(\d\d)?(?:\s+[A-Z]{3,5})?|\s*(?:Z|UTC?|GMT))?(?!\w)",
    re.ASCII | re.IGNORECASE,
)
DATE_NOISE = re.compile(  # in a day: its weekday, the end of an ordinal, dots and blanks
    r"^(mon|tues?|wed(nes)?|thu(rs?)?|fri|sat(ur)?|sun)(day)?\.? |(?<=\d)(st|nd|rd|th)\b"
    r"|(?<=[a-z])\.|(?<=[-/.]) "
)
DAY_FORMS = {  # with y for four digits, n for one or two, m for a month's name: what its parts are
    r"y([-/.])n\1n|y[- ]m[- ]n": "ymd",
    r"n[- ]m[- ][yn]": "dmy",
    r"m n y": "mdy",
    r"n([-/. ])n\1[yn]": "",
}
MONTHS = "january february march april may june july august september october november december"
MONTH_NUMBERS = {"sept": 9} | {
    text: number for number, name in enumerate(MONTHS.split(), 1) for text in (name, name[:3])
}
UNIX_UNITS = (1, 10**3, 10**6)  # a second in seconds, milliseconds and microseconds
UNIX_RANGE = range(946_684_800, 4_102_444_800)  # from 2000 to 2100; the units do not overlap there


@lru_cache(maxsize=4096)
def parse_datetime(text: str, order: str | None = None) -> datetime:
    """The moment that a text says, in its own zone; without one it is UTC. `order` (dmy or mdy)
    says how 03/04/2024 is meant. Raises ValueError, and OverflowError beyond the calendar."""
    if len(text) > 100:  # characters; JavaScript's has some 60
        raise ValueError("a date")
    if (unit := unix_unit(text)) is not None:
        return datetime.fromtimestamp(float(text) / unit, UTC)
    if compact := re.fullmatch(r"(\d{8})T?(\d\d)(\d\d)(\d\d)?(\D.*)?", text, re.ASCII):
        text = "{}T{}:{}:{}{}".format(*compact.groups("00")[:4], compact[5] or "")
    text, clock = DATE_TAIL.sub("", text), timedelta()
    zone: tzinfo = UTC
    if found := DATE_TIME.search(text):
        hour, minute, second = (int(found[n] or 0) for n in (1, 2, 3))
        if found[5]:
            hour = hour % 12 + 12 * (found[5] in "pP") if 1 <= hour <= 12 else 24
        time_of_day = datetime(1, 1, 1, hour, minute, second, int(f"{found[4] or 0:0<6}"[:6]))
        clock = time_of_day - datetime(1, 1, 1)
        if found[7]:
            offset = timedelta(hours=int(found[8]), minutes=int(found[9] or 0))
            zone = timezone(-offset if found[7] == "-" else offset)
        text = f"{text[: found.start()]} {text[found.end() :]}"
    day = DATE_NOISE.sub("", " ".join(text.lower().replace(",", " ").split()))
    return parse_day(day, order).replace(tzinfo=zone) + clock


def unix_unit(text: str) -> int | None:
    """How many units of a unix time make a second; None: it is no unix time."""
    number = float(text) if re.fullmatch(r"\d{9,16}(\.\d+)?", text, re.ASCII) else 0
    return next((unit for unit in UNIX_UNITS if int(number) // unit in UNIX_RANGE), None)


def parse_day(text: str, order: str | None) -> datetime:
    """The day that a text without a time says. Raises ValueError."""
    if re.fullmatch(r"\d{8}|\d{4}(-w\d\d-|w\d\d)\d", text, re.ASCII):
        return datetime.fromisoformat(text.upper())
    if re.fullmatch(r"\d{4}-\d{3}", text, re.ASCII):
        return datetime.strptime(text, "%Y-%j")
    words = re.findall(r"[0-9]+|[a-z]+", text)
    form = re.sub(r"[0-9]+|[a-z]+", lambda word: kind_of_word(word[0]), text)
    parts = next((DAY_FORMS[some] for some in DAY_FORMS if re.fullmatch(some, form)), None)
    if parts is None:
        raise ValueError("a date")
    numbers = [MONTH_NUMBERS.get(word) or int(word) for word in words]
    if "y" not in form:
        if order is None:
            raise ValueError("a date with a year of four digits")
        numbers[2] = datetime.strptime(words[2], "%y").year
    if not parts:
        one, two, _ = numbers
        if order is None and "." not in form and one != two and max(one, two) <= 12:
            raise ValueError("a date that can be read in one way only; `dates: dmy` or mdy decides")
        parts = order or ("dmy" if "." in form or two <= 12 else "mdy")
    named = dict(zip(parts, numbers, strict=True))
    return datetime(named["y"], named["m"], named["d"])


def kind_of_word(word: str) -> str:
    if word in MONTH_NUMBERS:
        return "m"
    return {1: "n", 2: "n", 4: "y"}.get(len(word), "?") if word.isdecimal() else "?"


def utc_text(value: Any, order: str | None = None) -> str:
    """A date as ISO 8601 in UTC. Raises ValueError, whose text says what is allowed."""
    text = str(value).strip() if type(value) in (str, int, float) else ""
    try:
        if USUAL_DATE.fullmatch(text):
            datetime.fromisoformat(text)
            return text
        return parse_datetime(text, order).astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
    except (OverflowError, ValueError) as e:
        raise ValueError(str(e) if str(e).startswith("a date") else "a date") from None


def plain_text(value: Any) -> str:
    """A value that is one of text. Raises ValueError, whose text says what is allowed."""
    if type(value) not in (str, int, float):
        raise ValueError("text or a number")
    return str(value)


class Mapper:
    """Maps the records of one source to the unified schema. The mapping goes into every hash, so
    that all records count as changed when it changes."""

    def __init__(self, name: str, source: Source) -> None:
        self.name, self.source = name, source
        mapping = [source.id, sorted(source.fields.items()), source.dates]
        self._salt = digest_of(json.dumps(mapping))
        self._ids = [(field, picker(field)) for field in source.id]
        self._plan = lru_cache(64)(self._make_plan)

    def identify(self, record: Mapping[str, Any]) -> str:
        """The record's id as text; of several fields a JSON list of theirs. Raises BadRecord."""
        texts = [id_text(field, pick(record)) for field, pick in self._ids]
        return texts[0] if len(texts) == 1 else to_json(texts).decode()

    def hash(self, record: bytes) -> bytes:
        return hashlib.blake2b(record, digest_size=16, salt=self._salt).digest()

    def unify(self, record: Mapping[str, Any], source_id: str) -> bytes:
        """The record in the unified schema, as JSON. Raises BadRecord."""
        picks, rest = self._plan(tuple(record))
        made, metadata = dict[str, str](), {key: record[key] for key in rest}
        for name, pick, matched in picks:
            value = pick(record)
            if matched and type(value) in (dict, list, bool):  # nobody mapped it
                metadata[matched] = value
            elif value not in (None, ""):
                try:
                    dated = name == "published_at"
                    made[name] = utc_text(value, self.source.dates) if dated else plain_text(value)
                except ValueError as e:
                    raise BadRecord(f"{name}: found {repr_excerpt(value)}; allowed: {e}") from None
        whole = {"source": self.name, "source_id": source_id, **made, "metadata": metadata}
        return to_json(whole)

    def _make_plan(self, keys: tuple[str, ...]) -> tuple[list[tuple[str, Picker, str]], list[str]]:
        """For records with these fields: how each unified field is picked, and the field that was
        matched to it only by its name, if any; and which fields go into the metadata."""
        given, ids, matched = self.source.fields, self.source.id, dict[str, str]()
        for key in keys:
            name = key.strip().lower()
            if name in UNIFIED and name not in given and key not in (*ids, *given.values()):
                matched.setdefault(name, key)
        alone = ids if len(ids) == 1 else ()  # which source_id is already
        used = {*alone, *given.values(), *matched.values()}
        picks: list[tuple[str, Picker, str]] = []
        picks += [(name, picker(path), "") for name, path in given.items()]
        picks += [(name, picker(key), key) for name, key in matched.items()]
        return picks, [key for key in keys if key not in used]


def id_text(field: str, value: Any) -> str:
    """A value that identifies a record. Raises BadRecord."""
    try:
        text = "" if value is None else plain_text(value)
    except ValueError as e:
        raise BadRecord(f"{field}: found {repr_excerpt(value)}; allowed: {e}") from None
    if not text.strip():
        raise BadRecord(f"no id: {field} is {'missing' if value is None else 'empty'}")
    return text


Fields = dict[str, bool]  # of a source: whether every record had it
BEYOND_ALL_RECORDS = 1 << 53  # the number of no record
Row = tuple[int, str, Any, bytes, bytes]  # its number, id, itself, itself as JSON, hash of that
Known = Mapping[str, tuple[bytes, bool]]  # by id: hash, and whether this run has written it


def identify_records(mapper: Mapper, fetched: Fetched) -> tuple[list[Row], list[Rejected], Fields]:
    """Identify and hash the records. Runs in a thread."""
    rows, rejects = list[Row](), [*fetched.rejects]
    for number, record in fetched.records:
        try:
            if not isinstance(record, dict):
                raise BadRecord(f"found {repr_excerpt(record)}; allowed: an object")
            text = to_json(record)
            if text.count(b"[") + text.count(b"{") > NESTED and is_deeper(record, NESTED):
                raise BadRecord(f"nested more than {NESTED} deep")
            rows.append((number, mapper.identify(record), record, text, mapper.hash(text)))
        except BadRecord as e:
            shown, place = lenient_json(record).decode(), f"{fetched.label} {number}"
            rejects.append(Rejected(place, str(e), shown, number))
    found = Counter(itertools.chain.from_iterable(row[2] for row in rows))
    return rows, rejects, {name: count == len(rows) for name, count in found.items()}


def normalize_records(
    mapper: Mapper, fetched: Fetched, rows: Sequence[Row], rejects: list[Rejected], known: Known
) -> tuple[Chunk, list[str]]:
    """Normalize the records whose hash is not `known`, and tell which ids came twice with other
    values. Runs in a thread. Of several records with one id the last good one wins, wherever chunks
    end; those before it count as updated."""
    now, unchanged, twice = dict(known), 0, list[str]()
    raws, unified = dict[str, tuple[str, str, bool]](), dict[str, tuple[str, str, bytes]]()
    for number, key, record, text, digest in rows:
        before = now.get(key)
        if before is not None and before[0] == digest:
            unchanged += 1
            continue
        if before is not None and before[1]:
            twice.append(key)
        try:
            unified[key] = key, mapper.unify(record, key).decode(), digest
            now[key] = digest, True
        except BadRecord as e:
            place = f"{fetched.label} {number}"
            rejects.append(Rejected(place, str(e), text.decode(), number))
            now[key] = b"", True
        raws[key] = key, text.decode(), bool(now[key][0])
    rejects.sort(key=lambda rejected: rejected.number)
    counts = Counter(processed=len(fetched.records) + len(fetched.rejects), unchanged=unchanged)
    counts |= {"inserted": len(unified.keys() - known.keys()), "failed": len(rejects)}
    counts["updated"] = counts["processed"] - unchanged - counts["inserted"] - counts["failed"]
    return Chunk(fetched, [*raws.values()], [*unified.values()], rejects, counts), twice


# ── Ingest: one CSV file ──────────────────────────────────────────────────────────────────────

CHUNK_BYTES = 4 << 20  # characters of a file after which a chunk ends early, however few records
RECORD_BYTES = 16 << 20  # characters of one line, or of one field; more is no record
RACY_SECONDS = 5.0  # s for which a file that changed may still be written to
BLOCK_BYTES = 1 << 20  # characters that are passed over at once
LINE_BYTES = 60  # that Python needs for a line beside its characters
LONG_RECORD = 12 << 20  # of a record of many lines, with these; one so long has an open quote
NOT_CSV = {  # how files begin that may be taken for a CSV file and are none
    rb"PK\x03\x04": "a zip archive, or a workbook of Excel, which is one",
    rb"\xd0\xcf\x11\xe0": "an old workbook of Excel",
    rb"BZh\d1AY&SY": "packed by bzip2",
    rb"\xfd7zXZ": "packed by xz",
    rb"\x28\xb5\x2f\xfd": "packed by zstd",
    rb"7z\xbc\xaf\x27\x1c": "packed by 7-Zip",
    rb"Rar!\x1a\x07": "packed by RAR",
    rb"(?s:.{257})ustar": "a tar archive",
    rb"SQLite format 3\0": "an SQLite database",
    rb"%PDF-\d": "a PDF",
    rb"PAR1\x15": "a Parquet file",
}
MARKS = {  # byte order marks
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # which begins like that of UTF-16
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF32_BE: "utf-32",
}
OPEN_QUOTE = "a quote is opened and never closed"


def column_names(row: Sequence[str]) -> list[str]:
    """A header's names; an empty one is named by its place, a second one of a name gets a
    number, so that no value is lost."""
    names, counts = dict[str, None](), Counter[str]()
    for place, text in enumerate(row, 1):
        base = name = text.strip() or f"column_{place}"
        while name in names:
            counts[base] += 1
            name = f"{base}_{counts[base] + 1}"
        names[name] = None
    return [*names]


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key that puts export-9 before export-10."""
    return [(int(t), t) if t.isdecimal() else (0, t) for t in re.split(r"(\d+)", path)]


def identity_of(stat: os.stat_result, now: float) -> list[int] | None:
    """What tells that a file is as it was; None while it may change again within the same tick of
    its clock (as git's index has it, "racy")."""
    if now - max(stat.st_mtime, stat.st_ctime) < RACY_SECONDS:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def tag_of(file: Path | RemoteFile, now: float) -> Any:
    return file.tag if isinstance(file, RemoteFile) else identity_of(file.stat(), now)


def quote_error(said: str) -> str:
    """An error of the csv module in words that help."""
    if said == OPEN_QUOTE or "unexpected end of data" in said or "field larger" in said:
        return OPEN_QUOTE
    return f"{said}; `escape` or `quote: none` say how else quotes are meant"


class LongLine(str):
    """The beginning of a line that is too long for a record."""


def validators_of(got: httpx2.Response) -> dict[str, str]:
    """The ETag and Last-Modified of a file behind a URL; none if it may have changed again within
    the same second."""
    told = {"etag": got.headers.get("etag", ""), "modified": got.headers.get("last-modified", "")}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        date, modified = map(parsedate_to_datetime, (got.headers["date"], told["modified"]))
        if (date - modified).total_seconds() < 2:
            return {}
    sent = {name: text for name, text in told.items() if text.isascii() and text.isprintable()}
    return dict.fromkeys(told, "") | sent


class CsvFile:
    """One CSV file (RFC 4180) as records, from where it was left; for a thread. A line ends with
    LF, CRLF or CR. What is malformed costs the line it starts on and no other: reading goes on
    with the next line. `growing`: somebody may be writing its last line at this moment."""

    def __init__(self, file: Any, part: str, source: CsvSource, growing: bool) -> None:
        self.part, self.source, self._file, self._growing = part, source, file, growing
        csv.field_size_limit(RECORD_BYTES)
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        head = stream.peek(512)
        if kind := next((NOT_CSV[begin] for begin in NOT_CSV if re.match(begin, head)), None):
            raise SourceError(f"{part} is no CSV file, but {kind}", status=400)
        marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
        encoding = marked or source.encoding or "utf-8"
        self._encoding = encoding.removesuffix("-sig")
        wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
        bad = "surrogatepass" if wide else "surrogateescape"  # and found in _lines
        self._text = io.TextIOWrapper(stream, encoding, errors=bad, newline="")
        self._dialect: dict[str, Any] = {"escapechar": source.escape, "strict": True}
        if source.quote == "none":
            self._dialect |= {"quoting": csv.QUOTE_NONE, "quotechar": None}
        else:
            self._dialect |= {"quotechar": source.quote}
        self._start()

    def _start(self) -> None:
        """Read the header."""
        self._text.seek(0)
        self.waits = False  # its last line has no end yet, and was not taken
        self._taken: list[str] = []  # lines since the last checkpoint
        self._line = 0  # lines before them
        self._begin = self._last = 0  # where the record under way begins in them, and the last one
        self._again: deque[str] = deque()  # lines that were given back
        self._digest = hashlib.blake2b(digest_size=16)  # of what need not be read again,
        self._safe = (0, 0)  # and its characters and lines
        self._frozen = False  # that stays as it is, whatever is read
        self._broken = ""  # why the record under way cannot be taken
        self._taken += [self._text.readline() for _ in range(self.source.skip)]
        self._begin = len(self._taken)
        self._dialect["delimiter"] = self.source.delimiter or ","
        first = next(self._lines(), "")
        self.ended = not first
        if told := re.fullmatch(r"sep=(.)\s*", first):  # Excel's way to name it
            self._dialect["delimiter"] = told[1]
            self._begin = len(self._taken)
        else:
            if self.source.delimiter is None:
                self._dialect["delimiter"] = self._delimiter_of(first)
            self._again.extend(self._taken[self._begin :])
            del self._taken[self._begin :]
        self._reader = csv.reader(self._lines(), **self._dialect)
        self._header: list[str] | None = None
        names = self.source.columns or []
        if first and not names:
            names = self._header = self._read_header()
        shown = [name.encode(errors="replace").decode() for name in names]
        self.columns = column_names(shown) if first else []
        self.notes = [
            f"column {place} {repr_excerpt(text)} of {self.part} is called {repr_excerpt(name)}"
            for place, (text, name) in enumerate(zip(names, self.columns, strict=False), 1)
            if text.strip() != name
        ]
        if self._broken:
            self.notes.append(f"the header of {self.part}: {self._broken}")
        self._broken = ""
        self._settle()

    def _read_header(self) -> list[str]:
        try:
            row = next(self._reader, [])
        except csv.Error as e:
            said = f"{self.part}: the header cannot be read: {quote_error(str(e))}"
            raise SourceError(said, status=400) from e
        self._last, self._begin = self._begin, len(self._taken)
        return row

    def _delimiter_of(self, line: str) -> str:
        """The delimiter that splits the header into most columns, preferably with the id among
        them; a comma if no other one is better."""

        def merit(delimiter: str) -> tuple[bool, int]:
            dialect, columns = {**self._dialect, "delimiter": delimiter, "strict": False}, []
            with contextlib.suppress(csv.Error):
                columns = column_names(next(csv.reader([line], **dialect), []))
            return {*self.source.id} <= {*columns}, len(columns)

        return max(",;\t|", key=merit)

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Continue after what was read before, and return True, if that is unchanged; else start
        again."""
        self._text.seek(0)
        left, digest = state["position"], hashlib.blake2b(digest_size=16)
        while left > 0 and (text := self._text.read(min(left, BLOCK_BYTES))):
            digest.update(text.encode(errors="surrogatepass"))
            left -= len(text)
        if state["position"] < max(self._safe[0], 1) or digest.hexdigest() != state["digest"]:
            self._start()
            return False
        self._digest, self._safe = digest, (state["position"], state["line"])
        self._line, self._begin, self._last = state["line"], 0, 0
        self._taken.clear()
        self._again.clear()
        return True

    def _lines(self) -> Iterator[str]:
        """The lines for the csv reader. Before a record, blank lines and comments are left out, and
        so is a byte order mark, which stands there where files were joined."""
        readline, again, taken = self._text.readline, self._again, self._taken
        comment, blank = self.source.comment, " \t\r\n".replace(self._dialect["delimiter"], "")
        unusual = f"\ufeff{blank}{comment or ''}"
        while line := again.popleft() if again else readline(RECORD_BYTES):
            if line[-1] != "\n" and not (line := self._odd_line(line)):
                return
            taken.append(line)
            text, count = line, len(taken) - self._begin
            if count == 1 and line[0] in unusual:
                text = line.lstrip("\ufeff")
                if not text.strip(blank) or (comment and text.startswith(comment)):
                    self._begin += 1
                    if self._begin > 10 * CHUNK_ROWS:
                        self._settle()
                    continue
            elif count % CHUNK_ROWS == 0 and self._never_ends():
                raise csv.Error(OPEN_QUOTE)
            if not line.isascii():
                self._check(line)
            yield text

    def _never_ends(self) -> bool:
        """Whether so many lines are one record because a quote is never closed. The csv module
        would find out, too, but hold four bytes for each character meanwhile."""
        lines = self._taken[self._begin :]
        size = sum(map(len, lines)) + LINE_BYTES * len(lines)
        return size > LONG_RECORD or (len(lines) == CHUNK_ROWS and self._swallows(lines))

    def _odd_line(self, line: str) -> str:
        """A line that does not end with LF: the last one, one that ends with CR, or one that is too
        long, whose rest is skipped."""
        if len(line) >= RECORD_BYTES:
            part, line = line, LongLine(line[:1000])
            while part[-1] not in "\r\n" and (more := self._text.readline(RECORD_BYTES)):
                part = more
        if isinstance(line, LongLine):
            self._frozen, self._broken = True, f"a line of more than {RECORD_BYTES} characters"
            return line
        self.waits = self._growing and line[-1] != "\r"
        return "" if self.waits else line

    def _check(self, line: str) -> None:
        try:
            line.encode()
        except UnicodeEncodeError as e:
            wrong = f"byte 0x{ord(line[e.start]) & 0xFF:02x} is not {self._encoding}"
            self._broken = f"{wrong}; `encoding` names another"

    def _settle(self) -> None:
        """Note that what was read need not be read again, except a last record without a line end,
        which may still grow."""
        whole = self._begin == 0 or self._taken[self._begin - 1].endswith("\n")
        upto = self._begin if whole else self._last
        if not self._frozen:
            text = "".join(self._taken[:upto])
            self._digest.update(text.encode(errors="surrogatepass"))
            self._safe = self._safe[0] + len(text), self._line + upto
        del self._taken[:upto]
        self._line += upto
        self._begin, self._last = self._begin - upto, 0

    def read(self) -> Fetched:
        """The next records, some thousand at most."""
        records, rejects, columns = list[tuple[int, Any]](), list[Rejected](), self.columns
        first, size, taken = self._line + self._begin + 1, 0, self._taken
        while len(records) + len(rejects) < CHUNK_ROWS and size < CHUNK_BYTES:
            row, error = None, ""
            try:
                row = next(self._reader, None)
            except csv.Error as e:
                if not self.waits:
                    row, error = [], str(e)
            if row is None:
                self.ended = True
                break
            reason, lines = "", taken[self._begin :]
            if error or len(row) != len(columns) or self._broken or len(lines) > 2:
                reason, lines = self._judge(row, lines, error)
            number = self._line + self._begin + 1
            self._last, self._begin = self._begin, len(taken)
            size += sum(map(len, lines))
            if reason:
                rejects.append(self._rejected(number, reason, lines))
            elif row == self._header:
                if len(self.notes) < MAX_NOTES:
                    self.notes.append(f"{self.part} line {number}: the header once more")
            else:
                records.append((number, dict(zip(columns, row, strict=True))))
        self._settle()
        span = first, BEYOND_ALL_RECORDS if self.ended else self._line + self._begin
        position, line = self._safe
        state = {"position": position, "line": line, "digest": self._digest.hexdigest()}
        state["done"] = self.ended
        share = min(self._file.tell() / (os.fstat(self._file.fileno()).st_size or 1), 1.0)
        return Fetched(f"{self.part} line", records, rejects, span, self.part, state, share)

    def _judge(self, row: Sequence[str], lines: list[str], error: str) -> tuple[str, list[str]]:
        """What is wrong with a record, empty where nothing is, and its lines. If a quote is, these
        are the first one; the others are read again."""
        reason, swallows = quote_error(error) if error else self._broken, False
        self._broken = ""
        if "unexpected end" in error:  # what is to come may close the quote
            self._settle()
            self._frozen = True
        elif len(row) != len(self.columns) and not error:
            reason = reason or f"found {len(row)} fields; the header has {len(self.columns)}"
            swallows = any(map(self._is_alone, lines[1:]))
        elif not error:
            swallows = self._swallows(lines)
        if swallows:
            reason = f"{reason}; a quote swallows the lines after it".removeprefix("; ")
        if error or swallows:
            self._again.extendleft(reversed(lines[1:]))
            del self._taken[self._begin + 1 :]
            self._reader = csv.reader(self._lines(), **self._dialect)
            lines = lines[:1]
        return reason, lines

    def _swallows(self, lines: Sequence[str]) -> bool:
        """Whether a stray quote joined these lines: 19 of 20 would be records of their own."""
        alone = sum(map(self._is_alone, lines)) if len(lines) > 2 and len(self.columns) > 1 else 0
        return 20 * alone >= 19 * len(lines)

    def _is_alone(self, line: str) -> bool:
        """Whether a line would be a record of its own if quotes meant nothing."""
        dialect = self._dialect | {"quoting": csv.QUOTE_NONE, "quotechar": None}
        row = next(csv.reader([line], **dialect), [])
        named = dict(zip(self.columns, row, strict=False))
        ids = (named.get(name, "").strip() for name in self.source.id)
        return len(row) == len(self.columns) and all(ids)

    def _rejected(self, number: int, reason: str, lines: Sequence[str]) -> Rejected:
        shown = re.sub("[\udc80-\udcff]", lambda m: f"\\x{ord(m[0]) & 0xFF:02x}", "".join(lines))
        shown = shown.rstrip("\r\n").encode(errors="backslashreplace").decode()
        return Rejected(f"{self.part} line {number}", reason, shown, number)


# ── Ingest: files ─────────────────────────────────────────────────────────────────────────────


DATA_FILES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")  # what HTTP may have read


def may_be_read(path: Path, config: Config) -> bool:
    """Whether a job that does not come from jobs.yaml may read a file: a data file beneath its
    folder, links followed, that holds no secret."""
    real, base = path.resolve(), config.base.resolve()
    private = [config.base / ref.file for ref in config.secrets.values() if ref.file]
    private += filter(None, [config.settings.secret_key_file, config.settings.log_file])
    inside = real.is_relative_to(base) and real.name.lower().endswith(DATA_FILES)
    return inside and real not in {file.resolve() for file in private}


class Rewritten(Exception):
    """A file is not as it was, up to where it was read."""


class Files:
    """A CSV source as a stream of records: a file, all that a glob matches in natural order, or one
    behind a URL. The same files give the same records, whatever was read before: if one was
    rewritten or is gone, all are read again, and if one changed records, those behind it are, which
    may have to win over it. For a run that goes on after a crash, the state of each tells in which
    run its reading began, and in which it, or one before it, last changed records."""

    def __init__(self, source: CsvSource, run: Ingesting) -> None:
        self.source, self.run, self.config = source, run, run.steps.config
        self._several = False

    async def read(self, states: Mapping[str, Mapping[str, Any]]) -> AsyncGenerator[Fetched]:
        """From where `states` say that parts were left. Raises SourceError, for a file that cannot
        be read once the others are."""
        files, failures, at, changed = await self._find(), list[SourceError](), 0, 0
        gone = states.keys() - {part for part, _ in files}
        self._several, fresh = len(files) > 1, bool(gone)
        while at < len(files):
            (part, file), state = files[at], states.get(files[at][0], {})
            marks = {"begun": state.get("begun", 0)}
            marks["changed"] = max(changed, state.get("changed", 0))
            at += 1
            if fresh or marks["begun"] < changed:
                state, marks["begun"] = {}, self.run.run.id
            try:
                async for fetched in self._read(part, file, state):
                    fetched.state.update(marks)
                    yield fetched
                    marks["changed"] = fetched.state["changed"]
            except SourceError as e:
                failures.append(e)
            except Rewritten:
                at, fresh = 0, True
                failures.clear()
            changed = marks["changed"]
        if failures:
            said = one_line("; ".join(map(str, failures)))
            raise failures[0] if len(failures) == 1 else SourceError(said, status=400)
        for part in gone:
            yield Fetched(f"{part} line", [], [], (0, BEYOND_ALL_RECORDS), part)

    async def _find(self) -> list[tuple[str, Path | RemoteFile]]:
        """The files to read in natural order, each with its name in the checkpoint."""
        path = self.source.path
        if self.source.remote:
            return [(without_query(path), RemoteFile(without_query(path), path))]
        found: list[tuple[str, Path | RemoteFile]]
        if self.source.in_s3:
            secret = await self.run.steps.secret_of(self.source)
            found = [(each.name, each) for each in await s3_objects(self.source, secret)]
        else:
            found = [*await self.run.in_thread(self._find_here)]
        return sorted(found, key=lambda file: natural_order(file[0]))

    def _find_here(self) -> Iterator[tuple[str, Path]]:
        base, path = self.config.base, self.source.path
        exact, trusted = base / path, self.run.job.origin == "file"
        try:
            found = [exact] if exact.is_file() else map(Path, glob.glob(str(exact), recursive=True))
            files = [file for file in found if file.is_file()]  # no pipe: it might block
            files = [file for file in files if trusted or may_be_read(file, self.config)]
        except OSError as e:
            raise SourceError(f"{path}: {e.strerror}", status=400) from e
        if not files:
            raise SourceError(f"there is no file {path}", status=404)
        names = (os.fsencode(os.path.relpath(file, base)) for file in files)
        return zip((name.decode(errors="backslashreplace") for name in names), files, strict=True)

    async def _read(
        self, part: str, file: Path | RemoteFile, state: Mapping[str, Any]
    ) -> AsyncGenerator[Fetched]:
        """The records of one file. What tells that it is as it was is remembered once it was read
        whole, unless it may have changed since. Raises Rewritten.

        One that is elsewhere is fetched whole before it is read: a server that breaks off then
        costs nothing but a retry. It has no name here, so that no crash leaves it behind."""
        run, temporary, told = self.run, tempfile.TemporaryFile, dict[str, Any]()
        try:
            if tag := await run.in_thread(tag_of, file, run.clock()):
                told["identity"] = tag
            if tag and tag == state.get("identity") and state.get("done"):
                return
            with file.open("rb") if isinstance(file, Path) else temporary(dir=run.folder) as opened:
                if isinstance(file, RemoteFile):
                    limit = min(4 << 30, shutil.disk_usage(run.folder).free // 2)
                    got = await run.fetch(file.url, state=state, sink=opened, limit=limit)
                    if got.status_code == 304:
                        return
                    opened.seek(0)
                    told = told or validators_of(got)
                csv_file = await run.in_thread(CsvFile, opened, part, self.source, not told)
                if state and not await run.in_thread(csv_file.resume, state) and self._several:
                    raise Rewritten
                self._check_columns(csv_file)
                while not csv_file.ended:  # not ahead of the writing: taking turns costs more
                    fetched = await run.in_thread(csv_file.read)
                    if csv_file.ended and not csv_file.waits:
                        fetched.state.update(told)
                    yield fetched
        except (OSError, EOFError, zlib.error, UnicodeError) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or str(e)
            raise SourceError(f"{part} cannot be read: {one_line(why)}", status=400) from e
        for note in csv_file.notes:
            run.note(note)
        if csv_file.waits:
            run.note(f"the last line of {part} has no end yet, and waits for the next run")

    def watermark(self) -> None:
        """Files have none."""

    def _check_columns(self, file: CsvFile) -> None:
        if not file.columns:
            if not file.waits:
                self.run.note(f"{file.part} is empty")
            return
        wanted = {*self.source.id}
        if not self.run.checkpoint.fields:  # later on it is drift that one is gone
            wanted |= {*self.source.fields.values()}
        if missing := sorted(wanted - {*file.columns}):
            lacks, there = (", ".join(map(repr_excerpt, n)) for n in (missing, file.columns))
            raise SourceError(f"{file.part} has no column {lacks}; there are: {there}", status=400)


# ── Ingest: pages ─────────────────────────────────────────────────────────────────────────────

# One rule says where paging ends, and its counterpart that it ended too early. The end is: nothing
# names a next page; 204; a list that is empty, null or absent where there was one before; a page
# beyond the first that is refused, where pages have numbers; what was asked for or shown already;
# `more` that is false. If the last answer, or a total, then says that there is more, the run says
# so; and it fails where that may be a mistake in the job: nobody said how to page, or what was said
# is in no answer.
MAX_PAGES = 100_000  # of one run; an API whose `next` never ends is cut off there
SAME_PAGES = 2  # pages in a row without anything new: the paging goes in circles, or is at its end
PAGE_REFUSED = (400, 404, 416, 422)  # what APIs answer to the number of a page that is not there
NO_LIST = ("errors", "warnings")  # lists that hold no records
NO = ("false", "no", "0", "", "none")
PAGE_SIGNS = {  # what a value tells, by its name in lower case and letters alone
    "whether": re.compile(r"has(more|next(page)?)"),
    "more": re.compile(  # unless it is one of NO
        r"(odata|link)?next(page|url|link|uri|cursor|token|offset|start|results?|records|marker)*"
        r"|has(more|next(page)?)|more(results|items|pages)?|continuation(token)?|lastevaluatedkey"
        r"|(is)?truncated"
    ),
    "last": re.compile(r"(is)?last(page)?"),  # what is false where there is more
    "records": re.compile(
        r"(count|total)|total(count|results|items|records|elements|hits)|recordstotal|numfound"
        r"|contentrange"
    ),
    "pages": re.compile(r"total(number)?(of)?pages|pages?total|pagecount|num(ber)?(of)?pages"),
}


def next_link(header: str) -> str | None:
    """The target of rel="next" in a Link header (RFC 8288, section 3), in linear time."""
    target, rels = "", list[str]()
    for found in LINK.finditer(header):
        if found["target"] is not None:
            target, rels = found["target"], []
        elif found["rel"] is not None and not rels:
            rels = found["rel"].strip('"').lower().split()
            if "next" in rels:
                return target
    return None


LINK = re.compile(
    r'<(?P<target>[^<>]*)>|;\s*rel\s*=\s*(?P<rel>"[^"]*"|[^\s,;"]+)|"(?:[^"\\]|\\.?)*"?',
    re.IGNORECASE | re.DOTALL,
)


class Sign(NamedTuple):
    """A value in an answer, or in its headers, that may tell about paging."""

    path: str  # dotted, or the header's name
    value: Any

    def tells(self, what: str) -> bool:
        name = re.sub("^x-(wp-|ms-)?|[^a-z]", "", self.path.rpartition(".")[2].lower())
        return PAGE_SIGNS[what].fullmatch(name) is not None

    @property
    def says_more(self) -> bool:
        if isinstance(self.value, list) or self.tells("last"):
            return self.value is False
        return self.tells("more") and str(self.value).lower() not in NO

    @property
    def number(self) -> int | None:
        """The value as a whole number, where it is one; of a Content-Range the total."""
        text = str(self.value) if type(self.value) in (int, float, str) else ""
        found = re.fullmatch(r"(?:.*/)?(\d{1,15})(\.0)?", text, re.ASCII)
        return int(found[1]) if found else None


def signs_in(answer: Any, path: str = "", depth: int = 3) -> Iterator[Sign]:
    """The values of an answer, down to a few levels; of a link that is an object its `href`."""
    for key, value in answer.items() if isinstance(answer, dict) and depth else ():
        where = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from signs_in(value, where, depth - 1)
            value = value.get("href", value if any(value.values()) else None)
        yield Sign(where, value)


class Pages:
    """An API as a stream of records, page after page."""

    def __init__(self, source: ApiSource, run: Ingesting) -> None:
        self.source, self.run = source, run
        no_matter: Any = dict.fromkeys((*LIMITS, "next", "more"), True)
        no_matter["since"] = {"param", "overlap", "format"}
        self._form = digest_of(source.model_dump_json(exclude=no_matter)).hex()
        mark = json.loads(run.checkpoint.watermark or "{}")  # counts for records read like these
        self._mark = mark if mark.get("map") == self._form else {}
        self.since = self._watermark_to_send()
        paging = self.paging = source.next or Paging.model_validate("link")
        self.numbered = paging.type in ("page", "offset")
        self._at = int(paging.type == "page") if paging.start is None else paging.start
        self._param = paging.param or ("starting_after" if paging.type == "last" else paging.type)
        self._path = paging.path or ("next_cursor" if paging.type == "cursor" else source.id[0])
        self._items = source.items  # where the list is
        self._taken = self._pages = 0
        self._signs: list[Sign] = []  # in the last answer,
        self._more: bool | None = None  # which says whether there is a next page,
        self._says = ""  # and by what it says that there is one
        named = {"cursor": self._path, "link": "link" if source.next else ""}.get(paging.type)
        self._unmet = {path for path in (named, source.more) if path}  # paths in no answer yet
        self._totals: dict[tuple[str, str], int] = {}  # that answers told, by kind and path
        self._shrank = False  # whether a total got less from page to page
        self._timed = False  # whether some record has what `since` names
        self._latest = "", -math.inf  # the greatest time among them: as it came, and unix seconds

    async def read(self, states: Mapping[str, Mapping[str, Any]]) -> AsyncGenerator[Fetched]:
        """From the first page on. Raises SourceError."""
        url: str | None = self._url()
        asked, seen, stale = set[str](), set[bytes](), 0
        answer: Any = None
        while url and url not in asked:
            if len(asked) >= MAX_PAGES:
                raise SourceError(f"more than {MAX_PAGES} pages: does `next` ever end?", status=400)
            asked.add(url)
            number = len(asked)
            got = await self._get(url, number)
            if got.status_code in (204, *PAGE_REFUSED):
                if got.status_code not in (204, 404):
                    self.run.note(f"page {number}: {got.status_code}: taken for the end")
                self._says = ""
                break
            answer, items, digest = await self.run.in_thread(self._open, got, number)
            stale = stale + 1 if digest in seen or not items else 0
            seen.add(digest)
            for fetched in self._fetched(items, number):
                yield fetched
            self._learn(answer)
            link = self._next(got, answer, items)
            try:
                url = clean_url(urljoin(str(got.url), link)) if link else None
            except ValueError as e:
                said = f"the next page cannot be asked for: {one_line(link)} is no URL"
                raise SourceError(said, status=400) from e
            if stale >= SAME_PAGES or (not items and self.numbered):
                if url and not self.numbered:
                    said = f"pages {number - 1} and {number} brought nothing new: is `next` right?"
                    self._complain(said, mistake=bool(items))
                break
        self._judge(answer, url)

    async def _get(self, url: str, number: int) -> httpx2.Response:
        if self.source.secret is not None and origin_of(url) != origin_of(self.source.url):
            said = f"`next` points to {origin_of(url)[1]}; a secret goes to no other host"
            raise SourceError(said, status=400)
        good = PAGE_REFUSED if self.numbered and number > 1 else ()
        try:
            return await self.run.fetch(url, good=good)
        except SourceError as e:
            if e.permanent and e.status is None:  # too long an answer
                raise SourceError(f"{e}; `next.size` asks for fewer records", status=400) from e
            raise

    def _open(self, got: httpx2.Response, number: int) -> tuple[Any, list[Any], bytes]:
        """An answer, the records in it, and a digest of these. Runs in a thread."""
        may_lack = number > 1 or self.since is not None
        answer = read_json(got.content) if got.content.strip() or not may_lack else None
        link = {"link next": next_link(got.headers.get("link", ""))}
        self._signs = [*signs_in(answer), *signs_in({**got.headers, **link})]
        items = self._list_in(answer, may_lack=may_lack)
        self._note_times(items)
        return answer, items, digest_of(lenient_json(items))

    def _list_in(self, answer: Any, *, may_lack: bool) -> list[Any]:
        """The list of records in an answer. Without a path the answer itself, or the only list in
        it. Raises SourceError."""
        block, lists = answer if isinstance(answer, dict) else {}, list[str]()
        if self._items is None:
            lists = [key for key, value in block.items() if isinstance(value, list)]
            if len(lists) == 1 and lists[0] not in NO_LIST:
                self._items = lists[0]
        found = answer if self._items is None else picker(self._items)(block)
        if isinstance(found, list):
            return found
        if error := block.get("error") or block.get("errors"):
            raise SourceError(f"the answer is an error: {repr_excerpt(error)}", status=400)
        null = found is None and any(sign.path == self._items for sign in self._signs)
        if null or (may_lack and not lists and (not found or found is block)):
            return []
        there = repr_excerpt(answer)
        said = f"there is no list at {self._items!r} in the answer: {there}"
        if self._items is None:
            said = "the answer is no list; `items` says where it is; "
            said += f"lists are at: {one_line(', '.join(lists))}" if lists else f"found {there}"
        raise SourceError(said, status=400)

    def _fetched(self, items: Sequence[Any], number: int) -> Iterator[Fetched]:
        """A page, in chunks where it is long."""
        self._taken += len(items)
        self._pages += bool(items)
        for start in range(0, len(items), CHUNK_ROWS):
            some = [*enumerate(items[start : start + CHUNK_ROWS], start + 1)]
            end = start + CHUNK_ROWS
            span = start, end if end < len(items) else BEYOND_ALL_RECORDS
            yield Fetched(f"page {number} record", some, [], span if self.since is None else None)

    def _url(self, cursor: str | None = None) -> str:
        """The URL of the page that a cursor names, or of the one at `_at`, or of the first one."""
        import httpx2

        asked, paging = dict(self.source.params), self.paging
        if self.source.since is not None and self.since is not None:
            asked[self.source.since.param] = self.since
        if paging.size is not None and paging.type in ("page", "offset", "last"):
            default = "per_page" if paging.type == "page" else "limit"
            asked[paging.size_param or default] = str(paging.size)
        cursor = str(self._at) if self.numbered else cursor
        if cursor is not None:
            asked[self._param] = cursor.encode(errors="backslashreplace").decode()
        return str(httpx2.URL(self.source.url).copy_merge_params(asked))

    def _next(self, got: httpx2.Response, answer: Any, items: Sequence[Any]) -> str | None:
        """The URL of the next page, relative perhaps, as far as this answer knows of one."""
        if self._more is False:
            self._unmet.discard(self._path)
            return None
        paging = self.paging
        if self.numbered:
            self._at += len(items) if paging.type == "offset" else 1
            return self._url()
        if paging.type == "link":
            return next_link(got.headers.get("link", ""))
        last = items[-1] if items else None
        cursor = self._value_at(self._path, last if paging.type == "last" else answer)
        if cursor in (None, "", False):
            return None
        if not isinstance(cursor, str):
            cursor = lenient_json(cursor).decode()
        elif re.match("https?://" if paging.param else "https?://|[/?]", cursor):
            return cursor
        return self._url(cursor)

    def _value_at(self, path: str, holder: Any) -> Any:
        value = picker(path)(holder) if isinstance(holder, dict) else None
        if value is not None:
            self._unmet.discard(path)
        return value.get("href", value) if isinstance(value, dict) else value

    def _learn(self, answer: Any) -> None:
        """Note what an answer tells: totals, and whether there is a next page, and by what."""
        self._unmet -= {sign.path for sign in self._signs}
        for sign, what in itertools.product(self._signs, ("records", "pages")):
            if sign.tells(what) and (number := sign.number) is not None:
                less = number < self._totals.get((what, sign.path), number)
                self._shrank |= less and not sign.path.endswith("count")
                self._totals[what, sign.path] = number
        told = [s.value for s in self._signs if s.tells("whether") and self.paging.type != "link"]
        if self.source.more is not None:
            told = [self._value_at(self.source.more, answer)]
        told = [str(value).lower() not in NO for value in told if value is not None]
        self._more = told[0] if told else None
        says = [self.source.more] if self.source.more and self._more else []
        says += [sign.path for sign in self._signs if sign.says_more]
        self._says = says[0] if says and self._more is not False and not self.numbered else ""

    def _judge(self, answer: Any, url: str | None) -> None:
        """Say what the answers say of more than was taken."""
        known = self.run.checkpoint.records
        more, nowhere = self._says, self._unmet - {"link"}
        if nowhere and self._taken:
            there = answer if isinstance(answer, dict) else [repr_excerpt(answer)]
            said = f"there is no {', '.join(sorted(nowhere))} in the answer; there are "
            said += one_line(", ".join(map(str, there)))
            self._complain(said, mistake=bool(more) or not known)
        elif more and not url:
            said = f"the answer says by {more} that there is more; `next` says how to ask for it"
            self._complain(said, mistake=self._pages <= 1)
        elif self.since is None and (short := self._falls_short()):
            asks_on = self.source.next is not None or self._pages > 1
            self._complain(f"{short}; `next` says how to ask for more", mistake=not asks_on)
        elif self._unmet:
            self.run.note("no answer had a Link header, which `next` names")
        if self.source.since is not None and self._taken and not self._timed:
            self.run.note(f"no record has {self.source.since.field}, which `since` names")
        if not self._taken and self.since is None and not known:
            self.run.note("no records came")

    def _falls_short(self) -> str:
        """What came of all that the answers tell of; empty: nothing is missing."""
        for what, came in (("records", self._taken), ("pages", self._pages)):
            total = max((n for (kind, _), n in self._totals.items() if kind == what), default=0)
            if came < total:
                return f"{came} {what} came of {total} that the answer tells of"
        return ""

    def _complain(self, said: str, *, mistake: bool) -> None:
        """Fail the run for a mistake in the job, until some run has succeeded; else only note
        it."""
        if mistake and not self.run.checkpoint.whole:
            raise SourceError(said, status=400)
        self.run.note(said)

    # since

    def _watermark_to_send(self) -> str | None:
        since = self.source.since
        if since is None or self._mark.get("at", 0) <= since.overlap:
            return None
        text = self._mark["text"]
        sent = since_text(text, since, self.source.dates)
        if sent == text and since.overlap:
            self.run.note(f"`since` sends {sent} without its overlap; `format` names another form")
        return sent

    def _note_times(self, records: Sequence[Any]) -> None:
        if self.source.since is None:
            return
        pick = picker(self.source.since.field)
        values = [pick(record) for record in records if isinstance(record, dict)]
        self._timed |= any(value is not None for value in values)
        for text in (str(value).strip() for value in values):
            with contextlib.suppress(ValueError, OverflowError):
                at = parse_datetime(text, self.source.dates).timestamp()
                if self._latest[1] < at <= self.run.run.start_time:
                    self._latest = text, at

    def watermark(self) -> str | None:
        """What to remember for `since` after a whole run; None: what is. A time after the run began
        does not count: a clock that is ahead would hide what comes."""
        text, at = self._latest
        if self.numbered and (self.run.moved or self._shrank):
            said = "records moved between the pages: what `since` sends waits for the next run"
            self.run.note(said)
        elif text and self._mark.get("at", 0) < at:
            return json.dumps({"map": self._form, "text": text, "at": at})
        elif self._timed and not text:
            said = "what `since` names is no time that can be read, or is ahead; `dates` may help"
            self.run.note(said)
        return None


# A watermark is the greatest value of a field, as it came. What is sent is that less the overlap,
# in its own form: the numbers of its date and time are replaced, and all else of it is kept.
SINCE_FORMS = (
    (r"\d{4}([-/.])\d\d\1\d\d", r"%Y\1%m\1%d"),
    (r"^\d{8}(?=T|$)", "%Y%m%d"),
    (r"\d\d\.\d\d\.\d{4}", "%d.%m.%Y"),
    (r"\b[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4}", "%a, %d %b %Y"),
    (r"\d\d:\d\d:\d\d(?!\s*[apAP])", "%H:%M:%S"),
    (r"(?<=[T ])\d\d:\d\d(?!:|\s*[apAP])", "%H:%M"),
    (r"(?<=T)\d{6}", "%H%M%S"),
)


def since_text(text: str, since: Since, order: str | None) -> str:
    """The moment that `text` says, less the overlap, in the form that it has, or in the one that
    was asked for; rounded down. A form that cannot be written here is sent as it came."""
    own = parse_datetime(text, order)
    before = own - timedelta(seconds=since.overlap)
    unix = {"s": 1, "ms": 10**3, "us": 10**6}
    if since.format is not None and since.format not in unix:
        return before.astimezone(UTC).strftime(since.format)
    if unit := unix.get(since.format or "") or unix_unit(text):
        return str(math.floor(before.timestamp()) * unit)
    form = text.replace("%", "%%")
    for pattern, directive in SINCE_FORMS:
        form = re.sub(pattern, directive, form, count=1)
    return before.strftime(form) if "%d" in form and own.strftime(form) == text else text


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────

METERED_JOBS = 1000  # jobs with series of their own: more would burden who collects them
GAUGES = {  # set when Prometheus asks
    "overdue_jobs": "Active jobs without a successful check for three poll intervals.",
    "oldest_open_trigger_seconds": "Age of the oldest trigger that Keboola has not got yet.",
    "store_writable": "1: the last write to the store succeeded.",
    "loop_lag_seconds": "How late the last tick of the event loop was.",
    "http_connections": "Open connections of the admin surface.",
    "config_last_reload_successful": "1: the last reload was taken up; 0: it was refused.",
    "config_last_reload_timestamp_seconds": "Time of the last reload, or of the start.",
    "backup_last_successful": "1: the last backup was verified; 0: it failed.",
    "backup_last_success_timestamp_seconds": "Time of the last verified backup; 0: none.",
}


class Metrics:
    """What Prometheus reads: objects of its library, filled as things happen or when it asks."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        # without it, each counter has a gauge beside it that nobody reads
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)

        kinds: Any = (prometheus.Counter, prometheus.Gauge, prometheus.Histogram)
        ours = {"namespace": "teckochecker", "registry": self.registry}
        counter, gauge, histogram = (partial(kind, **ours) for kind in kinds)
        self.checks = counter("checks", "Checks of a job's batches.", ["outcome"])
        self.triggers = counter("triggers", "What happened to triggers.", ["outcome"])
        self.ingest_runs = counter("ingest_runs", "Runs of ingests.", ["outcome"])
        self.openai_requests = counter("openai_requests", "Requests to OpenAI.", ["kind"])
        self.records = counter("records", "Records that ingests read.", ["became"])
        labels = ["upstream", "status"]
        self.upstream_errors = counter("upstream_errors", "Calls upstream that failed.", labels)
        self.internal_errors = counter("internal_errors", "Steps that met an unexpected error.")
        self.steps = histogram("check_duration_seconds", "Time that a step of a job took.")
        self.lateness = histogram(
            "check_lateness_seconds",
            "Time from when a job's step was due until it was done, if it met no error.",
            buckets=(0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0),
        )
        self.writes = histogram(
            "store_write_duration_seconds", "Time that a transaction of the store took."
        )
        self.jobs = gauge("jobs", "Jobs by state.", ["status"])
        self.paused_keys = gauge("paused_keys", "1: this key is not used for now.", ["secret"])
        self.job_state = gauge("job_state", "1: the state of a job.", ["job", "status"])
        self.job_ok = gauge(
            "job_last_success_timestamp_seconds", "Time of its last successful check.", ["job"]
        )
        self.gauges = {name: gauge(name, text) for name, text in GAUGES.items()}
        gauge("build_info", "The version that runs.", ["version"]).labels(VERSION).set(1)

    def jobs_are(self, jobs: Iterable[Job], counted: Mapping[str, int]) -> None:
        """How many jobs there are by state, and some of them by name."""
        for gauge in (self.jobs, self.job_state, self.job_ok):
            gauge.clear()  # what is gone must not be reported for ever
        for status, count in counted.items():
            self.jobs.labels(status).set(count)
        for job in jobs:
            self.job_state.labels(job.name, job.shown_status).set(1)
            self.job_ok.labels(job.name).set(job.last_ok_at)

    def total(self, *counters: Any, without: Collection[str] = ()) -> int:
        """The sum of counters over all their labels, but for some outcomes."""
        samples = [s for c in counters for family in c.collect() for s in family.samples]
        return int(sum(s.value for s in samples if s.labels.get("outcome") not in without))

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()


# ── Steps ─────────────────────────────────────────────────────────────────────────────────────

# How a trigger starts one Keboola job, though Keboola has no idempotency key. Each step leaves on
# disk what the next one needs, so that a crash between any two of them is met by the next start:
#
# 1. Decide. One transaction writes the trigger, `pending`, with a frozen body that carries its id,
#    and moves the job to `triggering` (see Checks and triggers). Nothing has been sent.
# 2. Prepare. All that can fail before sending is done first: the token, the queue's address, a
#    place among the calls to that stack, Keboola's time.
# 3. Claim. Compare-and-set makes it `sending`. Of two processes one wins.
# 4. POST. A job id: `running`. Known not to have been sent, or 429: back to `pending`. Refused by
#    Keboola itself: `rejected`. Everything else: `unknown`.
# 5. After a crash between 3 and the end of 4, it is found `sending`, and becomes `unknown`.
# 6. Settle what is `unknown`: ask Keboola's search for the trigger's id. If it is there: `running`.
#    A search that fails counts for nothing. If it is missing in at least SETTLE_SEARCHES searches,
#    the last of them at the end of the settle window, and in one more without a bound in time, it
#    is sent again under the same id, or held where `on_ambiguous: hold` asks for that.
#
# The settle window runs on the monotonic clock, the search's bound on Keboola's own, so that no
# clock that differs or is set can end a window early. Not promised: one job where Keboola's index
# lags for longer than the settle window. Both jobs then carry the same trigger id.

FIX_IT = "fix the cause, then run `job retry`"
ON_HOLD = "on hold: run `job retry` to search again and resend if missing"
CHECKS_PER_TRANSACTION = 100  # takes some 25 ms where all of them have news
OUTPUT_AGAIN = 15.0  # s until a batch without its output file is looked at again
REFUSED_LONG = 4 * 3600.0  # s that Keboola may refuse to search for a trigger before it is held


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: the seconds until the next one (None: nothing is left to do), what it saw
    in a few words, and the error that kept it from more."""

    wait: float | None
    said: str
    error: TeckoError | None = None


def open_batches(batches: Sequence[Batch], now: float) -> list[Batch]:
    """Those that are still to be asked for."""
    return [b for b in batches if outcome(b) is None or lacks_output(b, now)]


class Steps:
    """What is done for a job when it is due. The service's timer, `check` and the tests run the
    same `step`."""

    def __init__(
        self,
        config: Config,
        store: Store,
        vault: Vault,
        openai: OpenAI,
        keboola: Keboola,
        web: Web,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.store, self.vault = config, store, vault
        self.openai, self.keboola, self.web = openai, keboola, web
        self._actions: Mapping[str, Action] = {"keboola": keboola}  # by Trigger.kind
        # Places among the calls to a stack, taken before a claim: what waits for one is not sent.
        self._turns = defaultdict[str, asyncio.Semaphore](
            partial(asyncio.Semaphore, CALLS_PER_STACK)
        )
        self.ingesting: set[int] = set()  # ids of jobs whose run goes on
        self.stopping = False  # runs end at their next chunk
        self.ingest_slots = asyncio.Semaphore(INGESTS_AT_ONCE)
        self.clock, self.jitter, self.monotonic = clock, jitter, monotonic
        self.metrics = Metrics()
        openai.on_request = lambda kind: self.metrics.openai_requests.labels(kind).inc()
        self._unknown: dict[str, float] = {}  # triggers, and since when on the monotonic clock

    async def step(self, job_id: int) -> StepResult:
        """Advance a job's open triggers, then check its batches if it is active, each singly.
        Raises StoreError when the store cannot be used; then nothing was sent."""
        steps, row = list[StepResult](), await self.store.job(job_id)
        if row is not None and row.damage:  # others go on
            return StepResult(LONGEST_WAIT, row.damage, TeckoError(row.damage))
        if row is not None and row.has_open:
            for trigger in await self.store.open_triggers(job_id):
                steps.append(await self._advance(row, trigger))
            row = await self.store.job(job_id)
        if row is not None and row.is_active:
            steps.append(await (self._ingest(row) if row.is_ingest else self._check(row)))
        waits = [s.wait for s in steps if s.wait is not None]
        last = steps[-1] if steps else StepResult(None, "nothing to do")
        return replace(last, wait=min(waits, default=None))

    async def _secret(self, name: str) -> SecretValue:
        """Looked up at each use, so that a replaced secret counts at once."""
        row = await self.store.secret(name)
        if row is not None:
            return self.vault.open(row)
        if name not in self.config.secrets:
            hint = f"secret add --name {name}"
            raise SecretError(f"there is no secret {name!r}", hint=hint, code=1001)
        return read_reference(name, self.config.secrets[name], self.config)

    def _count_error(self, error: TeckoError) -> None:
        status = str(getattr(error, "status", None) or "no answer")
        self.metrics.upstream_errors.labels(ERROR_NAMES[error.code], status).inc()

    # checking

    async def by_key(self, ids: Collection[int]) -> dict[str, list[Job]]:
        """Those of the due jobs that only have to be checked, by the secret of their key. The
        others need a step of their own."""
        rows: dict[str, list[Job]] = {}
        for row in await self.store.jobs_among(ids):
            if row.is_active and not row.has_open and row.batches:
                rows.setdefault(row.secret, []).append(row)
        return rows

    async def check(self, secret: str, rows: Sequence[Job]) -> dict[int, StepResult]:
        """Check jobs of one key by a list of its batches. A job that is missing in the result needs
        a step of its own: the list does not show that all its batches go on, or it is the job's
        turn to have them asked for singly."""
        try:
            key = await self._secret(secret)
            names = self.openai.register_secret(key, secret)
        except SecretError:
            return {}  # each tells it in its own step
        count, now = len(self.openai.listing(key)[1]), self.clock()
        rows = [row for row in rows if not is_turn_to_confirm(row.id, row.pace, count, now)]
        error = await self._refresh_list(key, names, rows)
        done, checks, now = dict[int, StepResult](), list[CheckResult](), self.clock()
        for row in rows:
            batches = self._batches_from_list(key, row, now)
            if batches is not None and not (batches != row.batches and row.damage):
                checks.append(self._conclude(row, batches, []))
            elif batches is None and error is not None:
                checks.append(self._conclude(row, row.batches, [error]))
        checks = [check for check in checks if check.verdict.event is None]
        for at in range(0, len(checks), CHECKS_PER_TRANSACTION):  # others get their turns between
            some = checks[at : at + CHECKS_PER_TRANSACTION]
            recorded = await self.store.record_checks(some)
            done |= {c.job.id: self._count_check(c, c.job.id in recorded) for c in some}
        return done

    async def _refresh_list(
        self, key: SecretValue, names: Collection[str], rows: Sequence[Job]
    ) -> OpenAIError | None:
        """Read the list of the key's batches, unless the last one is fresh enough or single
        requests are fewer. Returns the error if single requests would meet it, too."""
        fresh, now = min((row.pace for row in rows), default=0.0) / 2, self.clock()
        checks = sum(len(open_batches(row.batches, now)) for row in rows)
        if checks <= 2 or self.openai.listing(key)[0] <= fresh:
            return None
        wanted, worth = await self.store.watched_batches(names, now + fresh)
        try:
            await self.openai.read_list(key, wanted, max(checks, worth), fresh)
        except OpenAIError as e:
            return e
        return None

    def _batches_from_list(self, key: SecretValue, row: Job, now: float) -> list[Batch] | None:
        """The batches as the last list has them; None where it is too old, or does not show that
        all of them go on."""
        age, listing = self.openai.listing(key)
        seen = {b.batch_id: listing.get(b.batch_id) for b in open_batches(row.batches, now)}
        if not seen or age > row.pace / 2:
            return None
        if any(s is None or outcome(s) is not None for s in seen.values()):
            return None
        return [
            batch_after_answer(b, s, now) if (s := seen.get(b.batch_id)) else b for b in row.batches
        ]

    async def _check(self, row: Job) -> StepResult:
        check = self._conclude(row, *await self._ask(row))
        if check.trigger is not None:
            trigger = await self.store.unknown_if_restored(check.trigger, check.batches)
            check = replace(check, trigger=trigger)
        recorded = row.id in await self.store.record_checks([check])
        result = self._count_check(check, recorded)
        if recorded and check.trigger is not None:
            row.errors_in_row = 0
            return await self._advance(row, check.trigger)
        return result

    async def _ask(self, row: Job) -> tuple[list[Batch], list[TeckoError]]:
        """The batches as they are now, and the errors met; finished ones are not asked again."""
        found, errors = dict[str, Batch](), list[TeckoError]()
        try:
            key = await self._secret(row.secret)
            self.openai.register_secret(key, row.secret)
        except SecretError as e:
            return row.batches, [e]

        async def ask(batch: Batch) -> None:
            try:
                seen = await self.openai.retrieve(key, batch.batch_id)
                found[batch.batch_id] = batch_after_answer(batch, seen, self.clock())
            except OpenAIError as e:
                errors.append(e)
                if e.status == 404:  # `decide` says when to believe it
                    found[batch.batch_id] = batch_after_404(batch, self.clock())

        await asyncio.gather(*map(ask, open_batches(row.batches, self.clock())))
        return [found.get(batch.batch_id, batch) for batch in row.batches], errors

    def _conclude(
        self, row: Job, batches: Sequence[Batch], errors: Sequence[TeckoError]
    ) -> CheckResult:
        """What follows from how the batches are now."""
        now, trigger = self.clock(), None
        verdict = Verdict(None)
        if any(outcome(b) is not None or b.missing_checks for b in batches):
            verdict = decide(row.watches.watch, batches, now)  # reads the job's definition
        if verdict.event == "fire":
            trigger = new_trigger(row, batches, verdict, uuid.uuid4().hex, now)
        pace, s = row.pace, self.config.settings
        if not row.interval:
            pace = auto_interval(batches, now, s.min_poll_interval, s.max_poll_interval)
        wait = max((self._retry(row, e) for e in errors), default=pace)
        if not errors and any(lacks_output(batch, now) for batch in batches):
            wait = min(wait, OUTPUT_AGAIN)
        said = [verdict.reason] if verdict.event else [*map(str, errors), *remarks(batches, now)]
        error = "; ".join(dict.fromkeys(filter(None, said))) or None
        return CheckResult(row, batches, verdict, trigger, error, errors, wait, now, pace)

    def _count_check(self, check: CheckResult, recorded: bool) -> StepResult:
        """Count a check, and say what came of it."""
        if not recorded:
            self.metrics.checks.labels("dropped").inc()
            return StepResult(0.0, "changed while it was checked")
        event, errors = check.verdict.event, check.errors
        self.metrics.checks.labels(event or ("error" if errors else "waiting")).inc()
        for error in errors:
            self._count_error(error)
        done = sum(outcome(b) is not None for b in check.batches)
        text = check.error or f"{done} of {len(check.batches)} batches done"
        return StepResult(None if event else check.wait, text, errors[0] if errors else None)

    # triggering

    async def _advance(self, row: Job, trigger: Trigger) -> StepResult:
        """One step for a trigger; a wait of 0 where the next follows at once."""
        try:
            if trigger.state == "sending":  # steps of a job never overlap
                said = "the program died while it sent the trigger; asking Keboola's search for it"
                return await self._record(trigger, "lose", said, wait=0.0)
            token = await self._secret(trigger.secret)
            act = {"pending": self._send, "unknown": self._settle, "running": self._follow}
            async with self._turns[trigger.stack_url]:
                return await act[trigger.state](row, trigger, token)
        except (UpstreamError, SecretError) as e:
            self._count_error(e)
            await self.store.note_trigger(trigger, self.clock(), error=str(e))
            return StepResult(self._retry(row, e), str(e), e)

    def _retry(self, job: Job, error: TeckoError) -> float:
        """Seconds until what failed is tried again."""
        settings = self.config.settings
        return wait_after_error(error, job.errors_in_row + 1, job.pace, settings, self.jitter())

    async def _record(
        self,
        trigger: Trigger,
        event: Event,
        said: str,
        *,
        wait: float | None = None,
        error: KeboolaError | None = None,
        **facts: Any,
    ) -> StepResult:
        """Write down what is known to have happened, however long the store stays locked: a
        Keboola job that is not written down would be searched for, or started again."""
        self.metrics.triggers.labels(event).inc()
        self._unknown.pop(trigger.id, None)
        if error is not None:
            facts["message"] = str(error)
        while True:
            try:
                await self.store.move_trigger(trigger, event, said, self.clock(), **facts)
                return StepResult(wait, said, error)
            except StoreError as e:
                log.error("trigger %s: cannot write down %r, trying on: %s", trigger.id, event, e)
                await asyncio.sleep(STORE_RETRY)

    async def _record_started(
        self, row: Job, trigger: Trigger, job: KeboolaJob, said: str
    ) -> StepResult:
        facts: Any = {"keboola_job_id": job.id, "keboola_status": job.status, "message": None}
        wait = 0.0 if job.is_finished else FOLLOW_FACTOR * row.pace
        return await self._record(trigger, "accept", said, wait=wait, **facts)

    async def _send(self, row: Job, trigger: Trigger, token: SecretValue) -> StepResult:
        action, now, claimed = self._actions[trigger.kind], self.clock(), False
        try:
            theirs = await action.prepare(trigger.stack_url)
            at = trigger.sent_at or theirs or now
            sending = await self.store.move_trigger(trigger, "claim", "", now, sent_at=at)
            if sending is None:
                return StepResult(0.0, "changed while it was triggered")
            trigger, claimed = sending, True
            job = await action.send(trigger, token)
        except KeboolaError as e:
            event = after_post(e) if claimed else "reject"
            if not claimed and not is_refusal(e):
                raise
            self._count_error(e)
            said, wait = str(e), self._retry(row, e) if event == "postpone" else None
            if event == "lose":
                said = f"whether Keboola took the trigger is unknown, asking its search: {said}"
                wait = 0.0
            if event == "reject":
                said = f"{said}; {FIX_IT}"
            return await self._record(trigger, event, said, wait=wait, error=e)
        return await self._record_started(row, trigger, job, f"Keboola job {job.id} started")

    async def _settle(self, row: Job, trigger: Trigger, token: SecretValue) -> StepResult:
        """Ask Keboola's search whether a trigger arrived; one that fails counts for nothing. The
        window is counted on the monotonic clock, from when this process first saw the trigger so: a
        wall clock that is set would end it early, or never."""
        window, searches = float(self.config.settings.trigger_settle_seconds), trigger.searches + 1
        since = self._unknown.setdefault(trigger.id, self.monotonic())
        try:
            known = {str(t.keboola_job_id) for t in await self.store.triggers(trigger.job_id)}
            find = partial(self._actions[trigger.kind].find, trigger, token, known)
            job = await find()
            waited = self.monotonic() - since
            event = after_search(trigger, waited, window)
            if job is None and event is not None:
                job = await find(anytime=True)
        except KeboolaError as e:
            if not is_refusal(e) or self.monotonic() - since < REFUSED_LONG:
                raise
            said = f"{e}, for {duration_text(REFUSED_LONG)}; {ON_HOLD}"
            return await self._record(trigger, "hold", said, error=e)
        if job is not None:
            said = f"found Keboola job {job.id} of this trigger"
            return await self._record_started(row, trigger, job, said)
        why = f"; its POST had failed: {trigger.message}" if trigger.message else ""
        if event is None:
            said = f"Keboola's search does not show the trigger (search {searches}){why}"
            await self.store.note_trigger(trigger, self.clock(), error=said, searches=searches)
            return StepResult(settle_wait(waited, window), said)
        said = f"Keboola's search did not show the trigger in {searches} searches; "
        said += (ON_HOLD if event == "hold" else "sending it again") + why
        wait = None if event == "hold" else 0.0
        return await self._record(trigger, event, said, wait=wait, searches=searches)

    async def _follow(self, row: Job, trigger: Trigger, token: SecretValue) -> StepResult:
        job = await self._actions[trigger.kind].follow(trigger, token)
        if not job.is_finished:
            await self.store.note_trigger(trigger, self.clock(), keboola_status=job.status)
            wait = FOLLOW_FACTOR * row.pace
            return StepResult(wait, f"Keboola job {job.id} is {job.status}")
        said = f"Keboola job {job.id} ended with {job.status}"
        said += f": {job.message}" if job.message else ""
        facts: Any = {"keboola_status": job.status, "message": job.message}
        event: Event = "succeed" if job.status in ("success", "warning") else "fail"
        return await self._record(trigger, event, said, **facts)

    # ingesting

    async def _ingest(self, job: Job) -> StepResult:
        """One run of an ingest, from its checkpoint to the end of its source."""
        if job.id in self.ingesting:
            return StepResult(job.pace, "a run goes on already")
        self.ingesting.add(job.id)
        try:
            checkpoint = await self.store.checkpoint(job.name)
            run = await self.store.begin_run(job, self.clock())
            return await Ingesting(self, job, run, checkpoint).go()
        finally:
            self.ingesting.discard(job.id)

    async def secret_of(self, source: Source) -> SecretValue | None:
        return None if source.secret is None else await self._secret(str(source.secret))


# ── Ingesting ─────────────────────────────────────────────────────────────────────────────────

# A run is one loop: fetch, identify, look up, normalize, commit. A reader (Files, Pages) fetches:
# its `read(states)` yields Fetched, from where `states` say that the parts were left. What keeps a
# processor busy runs in a thread, INGESTS_AT_ONCE of these at a time, so that a run which waits
# (for its source, its rate or the store) holds up no other. What one chunk brings, and how far its
# part has been read with it, is one transaction: whatever is killed whenever, the next run goes on
# from the last chunk. A row that comes again is known by its hash, and is not written.
#
# What is provisional decides nothing: a last line without an end in a file that was only just
# written, an ETag or time of change of this very second, a watermark of numbered pages that moved
# while they were read. They wait for the next run.
#
# Not promised: what vanishes from a source stays; of records that move between numbered pages one
# may be missed by a run, though not by the next one, unless it moved without a trace.

INGESTS_AT_ONCE = 2  # chunks worked on: more would only take turns on the same processor and store
STORE_PATIENCE = 30.0  # s between attempts to write a chunk to a locked store, to which they grow


class Interrupted(Exception):
    """A run ends before its source does, and the next one goes on from its checkpoint."""


class Ingesting:
    """One run of an ingest."""

    def __init__(self, steps: Steps, job: Job, run: Run, checkpoint: Checkpoint) -> None:
        assert isinstance(job.spec, IngestSpec)
        self.steps, self.job, self.run, self.checkpoint = steps, job, run, checkpoint
        self.clock, self.folder = steps.clock, steps.config.settings.database.parent
        self.source: CsvSource | ApiSource = job.spec.ingest
        self.mapper = Mapper(job.name, self.source)
        self.fields: Mapping[str, Any] = checkpoint.fields
        self.notes: list[str] = []
        self.counts = Counter[str]()
        self._reason = ""  # why the first of the rejected was
        self.moved = False  # an id came twice with other values
        self.reader: Files | Pages
        if isinstance(self.source, CsvSource):
            self.reader = Files(self.source, self)
        else:
            self.reader = Pages(self.source, self)

    async def go(self) -> StepResult:
        """Read the source to its end, and write down how that went. Raises StoreError."""
        steps, job = self.steps, self.job
        status: RunStatus = "failed"
        error: BaseException | None = None
        try:
            await self._read_source()
            status = "success"
        except StoreError:
            raise
        except (SourceError, IngestFailed, SecretError) as e:
            error = e
            steps._count_error(e)
        except (Interrupted, asyncio.CancelledError) as e:
            status, error = "interrupted", e
        except Exception as e:
            error = IngestFailed(f"internal error, see the log: {type(e).__name__}: {e}")
            log.exception("job %s: internal error", job.id)
        wait = BACKOFF_FIRST if isinstance(error, Interrupted) else job.pace
        wait = steps._retry(job, error) if isinstance(error, TeckoError) else wait
        said = str(error) or "the program was told to end" if error else None
        end = RunEnd(
            status=status,
            error=said,
            notes=self.notes,
            wait=wait,
            watermark=self.reader.watermark() if status == "success" else None,
            forget=isinstance(error, IngestFailed) and error.forget,
        )
        run = await self.retry_store(steps.store.end_run, self.run, end, steps.clock())
        steps.metrics.ingest_runs.labels(status).inc()
        for what in COUNTED:
            steps.metrics.records.labels(what).inc(getattr(run, f"records_{what}"))
        if isinstance(error, asyncio.CancelledError):
            raise error
        failure = error if isinstance(error, TeckoError) else None
        return StepResult(wait, f"{said}; {run.summary}" if said else run.summary, failure)

    async def _read_source(self) -> None:
        """Raises SourceError, SecretError, IngestFailed, Interrupted and StoreError."""
        form = digest_of(self.source.model_dump_json(exclude=LIMITS)).hex()
        known = self.checkpoint.parts.items()
        states = {part: state for part, state in known if state.get("map") == form}
        async with contextlib.aclosing(self.reader.read(states)) as chunks:
            async for fetched in chunks:
                if fetched.state:
                    fetched.state["map"] = form
                await self._take(fetched)
        self._judge(ended=True)

    async def _take(self, fetched: Fetched) -> None:
        """Identify, look up, normalize and store some records."""
        steps = self.steps
        rows, rejects, fields = await self.in_thread(identify_records, self.mapper, fetched)
        self._check_drift(fields)
        ids = {row[1] for row in rows}
        known = await self.retry_store(steps.store.hashes, self.run, [*ids]) if ids else {}
        if not self.checkpoint.records:  # all that is there came in this run
            known = {key: (digest, True) for key, (digest, _) in known.items()}
        chunk, twice = await self.in_thread(
            normalize_records, self.mapper, fetched, rows, rejects, known
        )
        if chunk.counts["updated"]:
            fetched.state["changed"] = self.run.id
        save = partial(steps.store.save_chunk, self.run, self.job.revision, self.source.type)
        if not await self.retry_store(save, chunk, self.fields, steps.clock()):
            raise Interrupted("the job was paused, changed or removed while it ran")
        if twice and not self.moved:
            self.moved = True
            which = repr_excerpt(twice[0])
            self.note(f"an id came twice with other values, {which} for one: the last wins")
        self._reason = self._reason or next((reject.reason for reject in chunk.rejects), "")
        self.counts.update(chunk.counts)
        self._judge(ended=False)
        if steps.stopping:
            raise Interrupted("the service was stopped while it ran")

    def _judge(self, *, ended: bool) -> None:
        """Fail a run of which too much was rejected; a share is judged from CHUNK_ROWS records on,
        and at the end."""
        failed, processed = self.counts["failed"], self.counts["processed"]
        limit = self.source.max_failed or "100%"
        share = limit.endswith("%")
        allowed = float(limit.removesuffix("%")) * (processed if share else 100)
        if failed * 100 > allowed and (ended or not share or processed >= CHUNK_ROWS):
            said = f"{failed} of {processed} records were rejected"
            raise IngestFailed(f"{said}; allowed: max_failed {limit}", forget=True)
        if ended and 0 < processed == failed:
            said = f"all {failed} records were rejected"
            raise IngestFailed(f"{said}, the first for: {self._reason}", forget=True)

    def _check_drift(self, seen: Fields) -> None:
        """What is new or gone, against what a whole run has met: the first one only learns."""
        known = self.checkpoint.fields if self.checkpoint.whole and seen else {}
        notes = [f"new field {repr_excerpt(name)}" for name in seen if known and name not in known]
        gone = (name for name, always in known.items() if always is True and name not in seen)
        notes += [f"field {repr_excerpt(name)} is gone" for name in gone]
        for note in notes:
            self.note(note)
        if notes and self.source.on_drift == "freeze":
            raise IngestFailed(f"the fields drifted, and on_drift is freeze: {'; '.join(notes)}")
        if seen:
            ever, first = self.fields, not self.fields
            always = {name for name in seen if seen[name] and ever.get(name, first) is True}
            self.fields = {name: name in always for name in {**ever, **seen}}

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Call something that keeps a processor busy, in a thread: one of a few at once."""
        async with self.steps.ingest_slots:
            return await asyncio.to_thread(work, *args)

    async def retry_store(self, ask_store: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Ask the store, however long it stays locked. Raises StoreError once the service stops."""
        for attempt in itertools.count(1):
            try:
                return await ask_store(*args)
            except StoreError as e:
                if self.steps.stopping:
                    raise
                log.error("an ingest waits for the store: %s", e)
                await asyncio.sleep(backoff(attempt, STORE_PATIENCE, self.steps.jitter()))
        raise AssertionError("counting ended")

    async def fetch(
        self, url: str, *, sink: IO[bytes] | None = None, **request: Any
    ) -> httpx2.Response:
        """Ask the source, and again after what passes by itself. Raises SourceError."""
        steps, settings = self.steps, self.steps.config.settings
        secret = await steps.secret_of(self.source)
        for attempt in itertools.count(1):
            try:
                return await steps.web.get(self.source, url, secret, sink=sink, **request)
            except SourceError as e:
                wait = backoff(attempt, settings.retry_delay, steps.jitter())
                wait = e.retry_after if e.retry_after is not None else wait
                passes = not e.permanent or (e.status == 403 and e.retry_after is not None)
                if not passes or attempt > settings.max_retries or wait > settings.retry_delay:
                    raise
                log.info("%s; again in %.0f s", e, wait)
                await asyncio.sleep(wait)
                if sink is not None:
                    sink.seek(0)
                    sink.truncate()
        raise AssertionError("counting ended")

    def note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(text)


# ── Doctor ────────────────────────────────────────────────────────────────────────────────────


class Finding(NamedTuple):
    """What one call has found about something that jobs.yaml names."""

    subject: str
    good: bool
    said: str  # and, where it is not good, whose fault it is


async def probe(subject: str, call: Callable[[], Awaitable[str]], missing: str) -> Finding:
    """What a call says, or what its failure means; `missing`: what a 404 means."""
    try:
        return Finding(subject, True, await call())
    except UpstreamError as e:
        why = {401: "the secret is refused: replace it", 403: "the secret may not do this"}
        why[404] = missing
        blame = why.get(e.status or 0, "the request is refused")
        if not e.permanent:
            blame = "the other side, or the network between; nothing to change here"
        return Finding(subject, False, f"{e} ({blame})")
    except TeckoError as e:
        return Finding(subject, False, str(e))


async def examine(steps: Steps, specs: Sequence[Spec]) -> list[Finding]:
    """Ask each key, batch, token, configuration, source and path of some jobs once, and change
    nothing: no trigger is sent and no record is stored."""
    once = {check[0]: check for spec in specs for check in questions(steps, spec)}
    return list(await asyncio.gather(*(probe(*check) for check in once.values())))


def questions(steps: Steps, spec: Spec) -> Iterator[tuple[str, Callable[[], Awaitable[str]], str]]:
    """What to ask for a job: the arguments of `probe`."""
    if isinstance(spec, IngestSpec):
        ask = partial(ask_source, steps, spec.ingest)
        yield f"source {without_query(spec.ingest.place)}", ask, "nothing is there"
        return
    key, target = str(spec.watch.secret), spec.trigger
    for batch_id in spec.watch.batch_ids:
        unknown = "a wrong id, or one of a project that the key is not of"
        yield (
            f"batch {batch_id} with key {key!r}",
            partial(ask_batch, steps, key, batch_id),
            unknown,
        )
    ask = partial(ask_storage, steps, target)
    token = f"Keboola token {str(target.secret)!r} at {target.stack_url}"
    shown = {"project": "owner.name", "expires": "expires"}
    yield token, partial(ask, "tokens/verify", shown), "no stack of Keboola is there"
    place = f"components/{quote(target.component_id)}/configs/{quote(target.configuration_id)}"
    missing = "no such configuration in the token's project"
    yield f"{place} with {token}", partial(ask, place, {"name": "name"}), missing


async def ask_batch(steps: Steps, key: str, batch_id: str) -> str:
    batch = await steps.openai.retrieve(await steps._secret(key), batch_id)
    return f"{batch.status}, {batch.requests_completed} of {batch.requests_total} requests"


async def ask_storage(
    steps: Steps, target: KeboolaTrigger, path: str, shown: Mapping[str, str]
) -> str:
    """What the Storage API answers; of it, some fields by their dotted paths."""
    token = await steps._secret(str(target.secret))
    told = await steps.keboola.storage(target.stack_url, token, path)
    return ", ".join(f"{name}: {one_line(value_at(told, at))}" for name, at in shown.items())


async def ask_source(steps: Steps, source: CsvSource | ApiSource) -> str:
    if isinstance(source, CsvSource) and not source.remote and not source.in_s3:
        return await asyncio.to_thread(readable_files, str(steps.config.base / source.place))
    secret = await steps.secret_of(source)
    if isinstance(source, CsvSource) and source.in_s3:
        return f"{len(await s3_objects(source, secret))} objects"
    with tempfile.TemporaryFile() as sink:
        try:
            async with asyncio.timeout(CALL_DEADLINE):
                got = await steps.web.get(source, source.place, secret, sink=sink)
        except TimeoutError:
            if not sink.tell():
                raise SourceError("no answer in time") from None
            return f"is sending, for more than {CALL_DEADLINE:.0f} s"
    return f"answered {got.status_code}"


def readable_files(path: str) -> str:
    files = [file for file in glob.glob(path, recursive=True) if Path(file).is_file()]
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable or not files:
        missing = f"cannot be read: {unreadable[0]}" if unreadable else f"there is no file {path}"
        raise SourceError(missing, status=403 if unreadable else 404)
    return f"{len(files)} files"


# ── Answers ───────────────────────────────────────────────────────────────────────────────────


class Answer(BaseModel):
    """What HTTP and --json say."""

    model_config = ConfigDict(defer_build=True, extra="forbid", from_attributes=True)


class SecretAnswer(Answer):
    """A stored secret, without its value."""

    id: int
    name: str
    type: str
    created_at: At


class SecretList(Answer):
    secrets: list[SecretAnswer]
    total: int


class Recent(Answer):
    """What a job has done, and what it did last."""

    done: str = Field(description="how far its batches are; of an ingest, its records and rejects")
    why: str | None = Field(description="why it is where it is: its error, or what it waits for")
    trigger: Trigger | None = Field(description="the last one")
    runs: list[str] = Field(description="of an ingest, how the last 20 ended, newest first")


class JobAnswer(Answer):
    """A job in the flat form, with its batches and their progress. An ingest has no batches; its
    definition is in `ingest`."""

    id: int
    name: str
    status: str
    last_error: str | None
    origin: str = Field(description="file: from jobs.yaml; store: from command line or HTTP")
    batch_id: str | None = Field(description="the first of batch_ids")
    batch_ids: list[str]
    trigger_when: str | None
    openai_secret: str | None
    openai_secret_id: int | None = Field(description="null: it is not in the store")
    keboola_secret: str | None
    keboola_secret_id: int | None = Field(description="null: it is not in the store")
    keboola_stack_url: str | None
    keboola_component_id: str | None
    keboola_configuration_id: str | None
    variables: dict[str, str]
    on_ambiguous: str | None
    ingest: dict[str, Any] | None = Field(description="as in jobs.yaml; null: it watches batches")
    poll_interval_seconds: int | Literal["auto"]
    batches: list[Batch]
    batch_count: int
    completed_count: int
    failed_count: int
    last_check_at: At | None
    next_check_at: At | None
    created_at: At
    completed_at: At | None
    recent: Recent | None = Field(None, description="null: not asked for")


class RejectAnswer(Answer):
    """A record that was rejected."""

    source: str
    place: str = Field(description="file and line, or page and number")
    reason: str
    record: str = Field(description="as received, as far as it could be read")
    created_at: At


class JobDetail(JobAnswer):
    """A job with its history."""

    triggers: list[Trigger]
    logs: list[LogRow] | None = Field(description="oldest first; null: not asked for")
    totals: dict[str, int] | None = Field(description="of an ingest: its records, by what became")
    runs: list[Run] = Field(description="of an ingest, newest first")
    rejects: list[RejectAnswer] = Field(description="of an ingest, newest first")


class JobList(Answer):
    jobs: list[JobAnswer]
    total: int = Field(description="how many there are, on all pages")
    next_after: int | None = Field(description="`after` of the next page; null: this is the last")


class Done(Answer):
    success: bool
    message: str


class Attention(Answer):
    """A job that waits for a person, or the database."""

    id: int | None = None
    job: str
    what: Literal["failed", "held", "refused", "ingest", "restored"] = Field(
        description="held: its trigger may have arrived, see `job retry`; refused: OpenAI does not"
        " take its key; ingest: its last run with work in it failed or rejected records; restored:"
        " a backup took the database's place, see `restore --acknowledge`"
    )
    reason: str | None


class Health(Answer):
    """The state of the service, judged by the work it has really done."""

    status: Literal["healthy", "degraded", "unhealthy"] = "healthy"
    problems: list[str] = Field([], description="why it is not healthy; without names")
    timestamp: At
    version: str
    uptime_seconds: float
    database: Literal["connected", "disconnected"] = "connected"
    db_connected: bool
    scheduler: Literal["running", "stopped", "stalled"]
    overdue_jobs: list[str] = Field([], description="no successful check for three intervals")
    undelivered_jobs: list[str] = Field([], description="their triggers are open for long")
    attention: list[Attention] = Field([], description="what waits for a person")
    paused_keys: list[Pause] = Field([], description="keys of OpenAI that are not used now")
    config_last_reload_successful: bool
    config_last_reload_at: At = Field(description="of the last reload, or of the start")
    config_last_reload_error: str | None
    backup_last_success_at: At | None = Field(None, description="of the last verified one")
    backup_last_error: str | None = Field(None, description="why the last one failed")
    backup_overdue: bool = Field(False, description="none was made in twice its interval")
    etl_last_run: At | None = Field(None, description="when the last ingest began; null: none did")
    etl_status: str | None = Field(None, description="in_progress, success, failed or interrupted")

    def anonymous(self) -> Health:
        """What a caller without a token may read: no names of jobs or secrets, and no reasons."""
        named = "overdue_jobs", "undelivered_jobs", "attention", "paused_keys"
        errors = "config_last_reload_error", "backup_last_error"
        return self.model_copy(update={name: [] for name in named} | dict.fromkeys(errors))


def count_of(count: int, one: str, many: str = "") -> str:
    """`1 job`, `2 jobs`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def with_status(health: Health, file_problem: str | None, store_error: str | None) -> Health:
    """Health with its status: `unhealthy` if the service cannot work, `degraded` if a part of its
    work fails. A store that another process has locked degrades it, for the lock will end."""
    overdue, undelivered = len(health.overdue_jobs), len(health.undelivered_jobs)
    locked = store_error is not None and "locked" in store_error
    stopping = {
        "the database does not answer": not health.db_connected,
        "the database was deleted, replaced or cannot be written; see the log":
            file_problem or (store_error and not locked),
        f"the scheduler is {health.scheduler}": health.scheduler != "running",
    }  # fmt: skip
    hindering = {
        "another process has locked the database": locked,
        f"{count_of(overdue, 'active job')} without a successful check for three poll intervals":
            overdue,
        f"{count_of(undelivered, 'trigger')} not delivered, or not followed, for long": undelivered,
        "the last reload was refused; see the log": not health.config_last_reload_successful,
        "a backup took the database's place, and what was done later is missing; see `status`":
            any(waits.what == "restored" for waits in health.attention),
        "no backup was made in twice its interval; see the log": health.backup_overdue,
    }  # fmt: skip
    bad, worse = ([t for t, holds in p.items() if holds] for p in (hindering, stopping))
    health.status = "unhealthy" if worse else "degraded" if bad else "healthy"
    health.problems = worse + bad
    health.database = "connected" if health.db_connected else "disconnected"
    return health


class StoredRecord(Answer):
    """A unified record, with the times of its arrival and of its last change."""

    source: str = Field(description="name of the ingest's job")
    source_id: str = Field(description="what identifies the record in its source")
    title: str | None = None
    description: str | None = None
    content: str | None = None
    author: str | None = None
    published_at: str | None = Field(None, description="ISO 8601 in UTC")
    url: str | None = None
    category: str | None = None
    metadata: dict[str, Any] = Field({}, description="what no field took")
    created_at: At
    updated_at: At


class DataPage(Answer):
    """A page of unified records, in the order of their arrival."""

    request_id: str
    total_count: int = Field(description="how many there are of that source, or in all")
    limit: int
    offset: int
    next_after: int | None = Field(description="`after` of the next page; null: this is the last")
    api_latency_ms: float = Field(description="time in the program, in milliseconds")
    data: list[StoredRecord]


class Day(Answer):
    """What the service did on one day (UTC)."""

    day: str
    checks: int
    triggers: int = Field(description="sent to Keboola")
    done_to_post_ms: int | None = Field(description="the mean of them, from the last batch's end")
    records: int = Field(description="that ingests inserted or updated")


class Stats(Answer):
    """Totals. Checks and errors are counted since the start, records and runs for ever."""

    total_jobs: int
    active_jobs: int
    paused_jobs: int
    completed_jobs: int
    failed_jobs: int
    jobs_by_status: dict[str, int]
    total_secrets: int
    total_logs: int
    uptime_seconds: float
    checks: int
    triggers: int
    errors: int
    total_records: int = Field(description="that /data has")
    total_records_processed: int
    total_records_inserted: int
    total_records_updated: int
    total_records_unchanged: int
    total_records_failed: int
    last_run_id: str | None
    last_run_status: str | None
    last_run_timestamp: At | None
    last_failure_timestamp: At | None
    restored: int = Field(description="backups that took the database's place, see `attention`")
    backup_last_success_at: At | None
    backup_last_error: str | None
    runs: list[Run] = Field(description="the last ones, newest first")
    history: list[Day] = Field(description="days on which anything was done, the oldest first")


def job_fields(job: Job, secrets: Mapping[str, int]) -> dict[str, Any]:
    """The fields of JobAnswer; `secrets`: the ids of the stored ones, by name."""
    ends = Counter(outcome(batch) for batch in job.batches)
    shown: dict[str, Any] = {n: getattr(job, n, None) for n in JobAnswer.model_fields}
    shown |= {"batch_ids": [], "variables": {}}
    if not job.damage:
        shown |= flat_fields(job.spec)
        if isinstance(job.spec, IngestSpec):
            shown["ingest"] = job.spec.ingest.model_dump(exclude_defaults=True)
    return shown | {
        "name": job.name,
        "status": job.shown_status,
        "last_error": job.damage or job.last_error,
        "batch_id": next(iter(shown["batch_ids"]), None),
        "openai_secret_id": secrets.get(str(shown["openai_secret"])),
        "keboola_secret_id": secrets.get(str(shown["keboola_secret"])),
        "poll_interval_seconds": job.interval or "auto",
        "batch_count": len(job.batches),
        "completed_count": ends["completed"],
        "failed_count": ends["failed"],
    }


WAITS = {  # what a job without an error does, in states without checks
    "triggering": "waits for Keboola to take its trigger",
    "triggered": "waits for its Keboola job to end",
    "paused": "waits for job resume",
    "failed": "waits for job retry or other batch IDs",
    "removed": "has left jobs.yaml",
}


def recent_of(job: JobAnswer, records: int, rejects: int, runs: Sequence[Run]) -> Recent:
    """What a job has done in its own terms, and why it is where it is."""
    left = [batch.batch_id for batch in job.batches if outcome(batch) is None]
    total = sum(batch.requests_total for batch in job.batches)
    ended = sum(batch.requests_completed + batch.requests_failed for batch in job.batches)
    done, why = f"{ended}/{total}", job.last_error or WAITS.get(job.status)
    if job.ingest is not None:
        done = count_of(records, "record") + (f", {rejects:,} rejected" if rejects else "")
    elif not total:
        done = f"{len(job.batches) - len(left)}/{count_of(len(job.batches), 'batch', 'batches')}"
    if why is None and rejects:
        why = f"{count_of(rejects, 'record')} rejected: data rejects --source {job.name}"
    elif why is None and job.status == "active" and left:
        why = f"waits for {left[0] if len(left) == 1 else f'{len(left)} batches'}"
    ends = ["rejected" if r.status == "success" and r.records_failed else r.status for r in runs]
    return Recent(done=done, why=why, trigger=None, runs=ends)


# ── Operations ────────────────────────────────────────────────────────────────────────────────

TRIGGER_MEANS: dict[TriggerState, str] = {
    "pending": "it has not reached Keboola yet",
    "sending": "it is on its way to Keboola",
    "unknown": "whether Keboola took it is unknown, and its search is asked again",
    "held": "whether Keboola took it is unknown; `job retry` asks again, and resends if missing",
    "running": "its Keboola job runs",
    "succeeded": "its Keboola job has ended",
    "failed": "its Keboola job has failed",
    "rejected": "Keboola refused it",
}


def explain(job: JobDetail, now: float) -> Iterator[str]:
    """Sentences: how far a job is and why, what was seen, whether it fired, what is next."""
    recent = cast(Recent, job.recent)
    why = f"; {recent.why.rstrip('.')}" if recent.why else ""
    yield f"Job {job.name!r} is {job.status}: {recent.done}{why}."
    if job.trigger_when is not None:
        ends = {"all_completed": "completed", "all_finished": "ended, well or not"}
        yield f"It starts a Keboola job once each batch has {ends[job.trigger_when]}."
    if job.ingest is not None:
        yield f"It ingests records from {job.ingest.get('path') or job.ingest['url']}."
    for run in job.runs[:1]:
        began = duration_text(now - run.start_time)
        yield f"Its last run began {began} ago: {run.status}; {run.summary}."
        yield from run.notes
    if job.last_check_at is None:
        yield "It has not been checked yet."
    else:
        yield f"It was last checked {duration_text(now - job.last_check_at)} ago."
    yield from (f"  {describe_progress(batch)}" for batch in job.batches if batch.status)
    if trigger := recent.trigger:
        facts = (trigger.keboola_job_id, trigger.keboola_status, trigger.message)
        known = ", ".join(fact.rstrip(".") for fact in facts if fact)
        fired = (
            f"It last fired {duration_text(now - trigger.created_at)} ago, as trigger {trigger.id}"
        )
        yield f"{fired}: {TRIGGER_MEANS[trigger.state]}{f' ({known})' if known else ''}."
    if job.status == "active":
        left, pace = (job.next_check_at or now) - now, job.poll_interval_seconds
        when = f"in {duration_text(left)}" if left > 0 else "now"
        every = "as often as its progress asks for" if pace == "auto" else f"every {pace} s"
        yield f"Its next check is {when}, {every}, while the service runs."


@dataclass
class Operations:
    """Everything that the command line and the HTTP API can ask for; each rule stands here once.
    `ref` is an id or a name. Raises Invalid, NotFound, Conflict, SecretError and StoreError."""

    store: Store
    vault: Vault
    config: Callable[[], Config]
    clock: Callable[[], float] = time.time

    async def add_secret(self, body: SecretBody, *, replace: bool = False) -> SecretAnswer:
        value = SecretValue(body.value)
        seal = partial(self.vault.seal, body.name, body.type, value)
        save = self.store.replace_secret if replace else self.store.add_secret
        await save(body.name, body.type, seal, self.clock())
        return await self.secret(body.name)

    async def secrets(self) -> SecretList:
        rows = [SecretAnswer.model_validate(row) for row in await self.store.secrets()]
        return SecretList(secrets=rows, total=len(rows))

    async def secret(self, ref: str) -> SecretAnswer:
        rows = await self.store.secrets()
        for row in rows:
            if ref in (row.name, str(row.id)):
                return SecretAnswer.model_validate(row)
        what = f"with ID {ref}" if ref.isdigit() else repr(ref)
        hint = did_you_mean(ref, [row.name for row in rows]).strip(" ()")
        raise NotFound(f"Secret {what} not found", code=1001, hint=hint or "see `secret list`")

    async def delete_secret(self, ref: str) -> Done:
        secret = await self.secret(ref)
        name = secret.name
        if any(target.secret in (name, secret.id) for target in self.config().alerts):
            said = f"Cannot delete secret {name!r}: `alerts:` in jobs.yaml refers to it"
            raise Conflict(said, hint="remove it there first")
        await self.store.delete_secret(name, self.clock())
        return Done(success=True, message=f"Secret {name!r} deleted successfully")

    async def rotate(self) -> int:
        """Put a new key in front of the old one, seal every secret with it, then drop the old key.
        After a crash between two of these steps, the key file still opens every secret. The
        transaction lets only one rotation run at a time."""

        def reseal(row: SealedSecret) -> tuple[bytes, str]:
            return self.vault.seal(row.name, row.type, self.vault.open(row))

        async def seal_all() -> int:
            if not await self.store.secrets():
                raise Conflict(
                    f"nothing rotated: {self.store.place} holds no secrets",
                    hint="is this the right database? DATABASE_URL and -c say which one",
                )
            self.vault.begin_rotation()
            return await self.store.reseal_secrets(reseal, self.clock())

        count = await self.store.transact(seal_all)
        await self.store.change_keys(self.vault.end_rotation)
        return count

    async def create_job(self, spec: Spec) -> JobDetail:
        if isinstance(spec, IngestSpec):
            self._check_path(spec.ingest)
        self._check_secrets(spec.model_dump(), await self.store.secret_types())
        return await self.job(str(await self.store.create_job(spec, "store", self.clock())))

    def _check_path(self, source: Source) -> None:
        """Allow a job from outside jobs.yaml only data files in or below the folder of jobs.yaml:
        a caller of the API must not read other files of this machine through /data."""
        if not isinstance(source, CsvSource) or source.remote:
            return
        if source.in_s3 and source.secret is None:
            allowed = "a secret of type api (in jobs.yaml also the environment's keys)"
            raise Invalid([Problem("ingest.secret", MISSING, allowed)])
        base = self.config().base
        if not source.in_s3 and not may_be_read(base / source.path, self.config()):
            allowed = f"beneath {base.name}, ending in {', '.join(DATA_FILES)}"
            text = f"found {repr_excerpt(source.path)}; allowed: {allowed} (in jobs.yaml: any)"
            raise Invalid([Problem("ingest.path", text)])

    async def update_job(self, ref: str, changes: Mapping[str, Any]) -> JobDetail:
        """Change the fields of a job's flat form that `changes` names."""
        if not changes:
            await self.store.find_job(ref)
            said = Problem("job", "nothing to change was named")
            raise Invalid([said], hint="job update --help lists it")
        stored = await self.store.secret_types()

        def change(job: Job) -> Spec:
            data = flat_fields(job.spec) | dict(changes)
            if isinstance(job.spec, IngestSpec):
                data |= {"ingest": job.spec.ingest.model_dump()}
            self._check_secrets(data, stored)
            return job_spec(data, self.config().settings.job_context)

        return await self.job(str(await self.store.update_job(ref, change, self.clock())))

    def _check_secrets(self, job: Mapping[str, Any], stored: Mapping[str | int, str]) -> None:
        if found := secret_problems(job, stored, self.config()):
            refused = Invalid(found)
            if not re.search("there is no secret|secret with ID", str(refused)):
                raise refused
            raise NotFound("; ".join(p.found for p in found), code=1001)

    async def jobs(
        self, status: str | None, limit: int, after: int, search: str = "", recent: bool = False
    ) -> JobList:
        """A page of jobs, by id."""
        rows = await self.store.jobs(status, limit + 1, after, search)
        page, ids = rows[:limit], await self._secret_ids()
        shown = [JobAnswer.model_construct(**job_fields(job, ids)) for job in page]
        if recent:
            await self._add_recent(shown)
        total = await self.store.count_jobs(status, search)
        more = page[-1].id if len(rows) > limit else None
        return JobList(jobs=shown, total=total, next_after=more)

    async def _add_recent(self, jobs: Sequence[JobAnswer]) -> None:
        """Add what each of these jobs has done, and what it did last."""
        ingested = await self.store.ingested(jobs[0].name if len(jobs) == 1 else "")
        last = {t.job_id: t for t in await self.store.triggers(*(job.id for job in jobs))}
        for job in jobs:
            runs = await self.store.runs(job.name, 20) if job.ingest else []
            brought = ingested.get(job.name, (0, 0))
            job.recent = recent_of(job, *brought, runs)
            job.recent.trigger = last.get(job.id)

    async def job(self, ref: str, logs: int | None = 20) -> JobDetail:
        job = await self.store.find_job(ref)
        fields_ = job_fields(job, await self._secret_ids())
        triggers = await self.store.triggers(job.id)
        rows = None if logs is None else await self.store.logs(job.id, logs)
        shown = JobDetail(**fields_, triggers=triggers, logs=rows, totals=None, runs=[], rejects=[])
        if job.is_ingest:
            shown.totals = await self.store.totals(job.name)
            shown.runs = await self.store.runs(job.name, 10)
            shown.rejects = await self.rejects(job.name, 10)
        await self._add_recent([shown])
        return shown

    async def rejects(self, source: str | None, limit: int) -> list[RejectAnswer]:
        return [RejectAnswer(**row) for row in await self.store.rejects(source, limit)]

    async def data(
        self, source: str | None, limit: int, after: int = 0, offset: int = 0
    ) -> tuple[list[StoredRecord], int | None]:
        """A page of unified records, which were validated when they were written, and the `after`
        of the next page."""
        rows = await self.store.data(source, limit + 1, after, offset)
        found = []
        for row in rows[:limit]:
            times = {"created_at": row["created_at"], "updated_at": row["updated_at"]}
            found.append(StoredRecord.model_construct(**json.loads(row["data"]), **times))
        return found, rows[limit - 1]["id"] if 0 < limit < len(rows) else None

    async def history(self, days: int) -> list[Day]:
        sums = await self.store.daily_sums(days)
        for day in sums:
            delay, sent = day.pop("delay_ms"), day["triggers"]
            day["done_to_post_ms"] = delay // sent if sent else None
        return [Day(**day) for day in sums]

    async def _secret_ids(self) -> dict[str, int]:
        return {row.name: row.id for row in await self.store.secrets()}

    async def step_job(self, ref: str, step: Literal["pause", "resume", "retry"]) -> JobDetail:
        job = await self.store.find_job(ref)
        store = self.store
        steps = {"pause": store.pause_job, "resume": store.resume_job, "retry": store.retry_job}
        await steps[step](job.id, self.clock())
        return await self.job(str(job.id))

    async def delete_job(self, ref: str) -> Done:
        job = await self.store.find_job(ref)
        await self.store.delete_job(job.id, self.clock())
        return Done(success=True, message=f"Job {job.name!r} deleted successfully")

    async def explain(self, ref: str) -> list[str]:
        return [*explain(await self.job(ref, None), self.clock())]


# ── Import ────────────────────────────────────────────────────────────────────────────────────

# What the original program has in its SQLite file comes over in one transaction: each secret and
# each job whole or not at all, by its name and under its id, unless that was given here; what is
# here already stays as it is. A job that has fired there gets a trigger that has ended, so that its
# batches start no second Keboola job; one that goes on is checked afresh. Not promised: that both
# programs may run side by side, for the original writes nothing down before it fires.

JOBS_THERE = (
    "SELECT j.*, o.name AS openai_secret, k.name AS keboola_secret,"
    " coalesce(strftime('%s', j.created_at), 0) + 0.0 AS made,"
    " coalesce(strftime('%s', coalesce(completed_at, j.created_at)), 0) + 0.0 AS ended"
    " FROM polling_jobs j LEFT JOIN secrets o ON o.id = openai_secret_id"
    " LEFT JOIN secrets k ON k.id = keboola_secret_id ORDER BY j.id"
)
LOGS_THERE = (
    "SELECT status, coalesce(message, '') AS message, 'the original' AS actor,"
    " coalesce(strftime('%s', created_at), 0) + 0.0 AS created_at"
    " FROM polling_logs WHERE job_id = ? ORDER BY id"
)


class Import:
    """Takes over what is in the original's database, whose SECRET_KEY opens its secrets."""

    def __init__(self, db: sqlite3.Connection, secret_key: str, operations: Operations) -> None:
        from cryptography.fernet import Fernet

        digest = hashlib.sha256(secret_key.encode()).digest()  # as the original derives its key
        self._fernet = Fernet(base64.urlsafe_b64encode(digest))
        self._db, self._operations, self._store = db, operations, operations.store
        db.row_factory = sqlite3.Row
        db.execute("BEGIN")  # all is read as it is at this moment
        tables = self._ask("SELECT name FROM sqlite_master WHERE name LIKE '%job_batches'")
        self._batches = tables[0]["name"] if tables else None  # in its first version: one a job

    def _ask(self, sql: str, *values: object) -> list[dict[str, Any]]:
        return [dict(row) for row in self._db.execute(sql, values)]

    async def run(self) -> list[tuple[str, bool, str]]:
        """Of each secret and job: which, whether it is here now, and its id or why not."""
        done, names = list[tuple[str, bool, str]](), Counter[str]()
        for row in self._ask("SELECT * FROM secrets ORDER BY id"):
            await self._store.reserve_ids("secrets", row["id"])  # its HTTP clients know the ids
            done.append(await self._take(f"secret {row['name']!r}", self._secret(row)))
        for row in self._ask(JOBS_THERE):
            names[row["name"]] += 1
            if names[row["name"]] > 1:  # names may repeat there
                row["name"] += f" ({row['id']})"
            await self._store.reserve_ids("polling_jobs", row["id"])
            done.append(await self._take(f"job {row['name']!r}", self._job(row)))
        return done

    async def _take(self, what: str, work: Awaitable[str]) -> tuple[str, bool, str]:
        from cryptography.fernet import InvalidToken

        try:
            return what, True, await work
        except Conflict:
            return what, True, "is here already, and stays as it is"
        except InvalidToken:
            return what, False, "the original's SECRET_KEY does not open it"
        except (Invalid, NotFound, SecretError) as e:
            return what, False, "; ".join(str(e).splitlines())

    async def _secret(self, row: Mapping[str, Any]) -> str:
        value = self._fernet.decrypt(str(row["value"]).encode()).decode()
        body = parse(SecretBody, {"name": row["name"], "type": row["type"], "value": value})
        return f"ID {(await self._operations.add_secret(body)).id}"

    async def _job(self, row: Mapping[str, Any]) -> str:
        sql = f"SELECT * FROM {self._batches} WHERE job_id = ? ORDER BY id"
        there = self._ask(sql, row["id"]) if self._batches else [row]
        data = {name: row[name] for name in FlatJob.model_fields.keys() & row.keys()}
        data["batch_ids"] = [batch["batch_id"] for batch in there]
        data["trigger_when"] = "all_finished" if self._batches else "all_completed"
        spec = job_spec(data, self._operations.config().settings.job_context)
        self._operations._check_secrets(spec.model_dump(), await self._store.secret_types())
        logs = [
            log | {"message": redact(log["message"])} for log in self._ask(LOGS_THERE, row["id"])
        ]
        sent = [log["message"] for log in logs if log["status"] == "keboola_triggered"]
        status = "completed" if sent and row["status"] in ("active", "paused") else row["status"]
        if status not in ("active", "paused", *ENDED):
            raise Invalid([f"status: found {repr_excerpt(status)}"])
        job_id = await self._store.create_job(spec, "store", self._operations.clock())
        job, trigger = await self._store.find_job(job_id), None
        columns = {"status": status, "created_at": row["made"]}
        if status in ENDED:  # the others are checked afresh
            columns["completed_at"] = row["ended"]
            for batch, before in zip(job.batches, there, strict=True):
                # without an output file, which is not known, `completed` would count as failed
                batch.status, batch.output_file_id = before["status"], "unknown"
        if status == "failed":
            errors = [log["message"] for log in logs if log["status"] in ("error", "failed")]
            columns["last_error"] = errors[-1] if errors else None
        elif status in ENDED:
            verdict = Verdict("fire", partial=status != "completed")
            fired = new_trigger(job, job.batches, verdict, uuid.uuid4().hex, row["ended"])
            its_id = sent[-1].split()[-1] if sent else "unknown"
            done = replace(fired, state="succeeded", finished_at=row["ended"])
            trigger = replace(done, keboola_job_id=its_id, message="started by the original")
        await self._store.import_history(job, trigger, logs, **columns)
        return f"ID {job_id}, {status}"


# ── Run lock ──────────────────────────────────────────────────────────────────────────────────

# Only one process works on a database. It holds a POSIX record lock on `<database>.lock`, beside
# the resolved path of the database:
#
# - The kernel releases the lock when its process ends in any way, and names the holder (F_GETLK).
#   So no command trusts a pid that a dead process, or one in another container, left in a file:
#   `stop` and `reload` signal the holder of the lock and no other process.
# - The path is resolved, so symbolic links lead to one lock. A database with a second hard link is
#   refused: two names would mean two locks and two write-ahead logs, which damages the file.
# - The file has mode 0600, so another user cannot lock it and keep the program out.
# - If the lock file is deleted while the service runs, the next tick makes and locks a new one.
#
# The lock does not stop a process on another host that shares the folder over a file system without
# record locks.


class Holder(NamedTuple):
    """The process that works on a database."""

    pid: int  # 0: the process is in another pid namespace
    started_at: float  # unix seconds; 0: unknown so far
    address: str  # of its admin surface; "": it has none, or none yet
    command: str  # start, check ...; "": unknown so far


FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi4x"  # struct flock, as <fcntl.h> has it


def lock_holder(file: IO[str]) -> int | None:
    """The pid of the process that has locked an open file; 0 if this pid namespace has no number
    for it, None if no other process has locked it."""
    is_mac = sys.platform == "darwin"
    whole = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if is_mac else (fcntl.F_WRLCK, 0, 0, 0, 0)
    found = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, *whole)))
    kind, pid = (found[3], found[2]) if is_mac else (found[0], found[4])
    return None if kind == fcntl.F_UNLCK else int(pid)


def holder(database: Path) -> Holder | None:
    """The process that works on this database; None: there is none."""
    try:
        with open(lock_path(database)) as file:
            if (pid := lock_holder(file)) is None:
                return None
            started_at, address, command, *_ = [*file.read().split("\n"), "", "", ""]
            return Holder(pid, float(started_at or 0), address, command)
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's process, which this one cannot signal either
        with contextlib.suppress(OSError, ValueError):
            pid = int(lock_path(database).with_suffix(".pid").read_text())
            try:
                os.kill(pid, 0)
            except PermissionError:
                return Holder(pid, 0.0, "", "start")
        return None


def lock_path(database: Path) -> Path:
    real = database.resolve()
    return real.with_name(real.name + ".lock")


class RunLock:
    """Holds the lock while its context lasts. If a `check` holds the lock, this waits at most
    `wait` seconds for it; if a service does, it raises Conflict at once."""

    def __init__(self, database: Path, command: str = "start", wait: float = 0.0) -> None:
        self.path, self.command = lock_path(database), command
        self.pid_file = self.path.with_suffix(".pid")
        self._database, self._wait = database.resolve(), wait
        self._said = ("", 0.0)  # address and start time
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        until, waited = time.monotonic() + self._wait, False
        while not self._take():
            found = holder(self._database) or Holder(0, 0.0, "", "")
            by = f"TeckoChecker {found.command} (pid {found.pid})"
            if found.command == "start" or time.monotonic() > until:
                hint = "`status` shows it, `stop` ends a service"
                raise Conflict(f"another {by} works on this database", hint=hint)
            if not waited:
                log.warning("waiting for %s to end its work on this database", by)
            waited = True
            time.sleep(0.1)
        return self

    def _take(self) -> bool:
        """Create the file if it is missing, and lock it; False if another process has locked it."""
        try:
            file = open(  # noqa: SIM115 held until __exit__
                self.path, "a+", opener=partial(os.open, mode=0o600)
            )
        except OSError as e:
            raise StoreError(f"cannot write {self.path}: {e.strerror}") from e
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        self.write(*self._said)
        return True

    def write(self, address: str, started_at: float) -> None:
        """Record the address of the admin surface and the start time; the pid file has the pid."""
        assert self._file is not None
        self._said = (address, started_at)
        self._file.truncate(0)
        self._file.write(f"{started_at}\n{address}\n{self.command}\n")  # at its end (mode "a")
        self._file.flush()
        if self.command == "start":
            self.pid_file.write_text(f"{os.getpid()}\n")

    def hold(self) -> None:
        """Lock the file again if somebody has deleted it. Raises Conflict if another process has
        locked the new one first."""
        assert self._file is not None
        if not self.path.exists() or not os.path.samestat(
            os.stat(self.path), os.fstat(self._file.fileno())
        ):
            log.error("the lock file %s was deleted or replaced; locking it again", self.path)
            if not self._take():
                raise Conflict(f"another process has locked {self.path} meanwhile")

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        if self.command == "start":
            self.pid_file.unlink(missing_ok=True)
        self._file.truncate(0)
        self._file.close()


# ── Scheduler ─────────────────────────────────────────────────────────────────────────────────

GRID = 0.25  # s; due times on a grid wake the event loop once for many jobs
START_RATE = 200  # first checks per second after a start: 10,000 jobs do not stampede
DUE_TOGETHER = 32  # jobs due together whose rows lie together: alone, each would cost a page
CLOCK_JUMP = 2.0  # s by which the wall clock may stray from the monotonic one between two looks


def make_scheduler(on_step: Callable[[float], Any] = lambda seconds: None) -> AsyncIOScheduler:
    """APScheduler with settings that drop no check, and with a guard for steps of the clock. Its
    due times are wall clock and its timer is monotonic, so a clock set back by ten minutes would
    stop all checks for ten minutes. The guard moves all due times by the same step, and calls
    `on_step` with its seconds."""
    from apscheduler.executors.debug import DebugExecutor
    from apscheduler.schedulers.asyncio import AsyncIOScheduler

    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it has two lines for each check

    class ClockGuarded(AsyncIOScheduler):  # type: ignore[misc]
        offset = time.time() - time.monotonic()

        def _process_jobs(self) -> Any:
            offset = time.time() - time.monotonic()
            step, self.offset = offset - self.offset, offset
            if abs(step) > CLOCK_JUMP:
                log.warning("the clock was set by %+.0f s; all due times move with it", step)
                for job in self.get_jobs():
                    job.modify(next_run_time=job.next_run_time + timedelta(seconds=step))
                on_step(step)
            return super()._process_jobs()

    # A missed time is caught up once, however late; a job never runs beside itself. Its function
    # is called at once and begins a task: a task of the scheduler's own would cost half a check.
    defaults = {"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
    executors = {"default": DebugExecutor()}
    return ClockGuarded(timezone=UTC, executors=executors, job_defaults=defaults)


def on_grid(at: float) -> datetime:
    """The next point of the grid, as the scheduler wants it."""
    return datetime.fromtimestamp(math.ceil(at / GRID) * GRID, UTC)


def phase(job_id: int, interval: float, jobs: int) -> float:
    """Seconds until a job's first check: START_RATE checks a second, over at most the interval. The
    golden ratio spreads any range of ids evenly."""
    return job_id * 0.6180339887 % 1 * min(interval, jobs / START_RATE)


def slot(secret: str, job_id: int, interval: float, jobs: int) -> float:
    """Seconds from the start to a job's first check. All jobs of one key fall within half of the
    interval, less a little for delays, so that one list of its batches is recent enough for all;
    and on whole seconds from its first one, since each tick has a cost."""
    key = phase(zlib.crc32(secret.encode()), interval / 2, jobs)
    return key + math.floor(0.9 * phase(job_id // DUE_TOGETHER, interval / 2, jobs))


@lru_cache(maxsize=4096)
def slots(interval: float, first: float) -> IntervalTrigger:
    """A trigger that fires at `first` plus multiples of `interval`. A job whose due time was moved
    returns to these times, after a quarter of the interval at the earliest."""
    from apscheduler.triggers.interval import IntervalTrigger

    class Slots(IntervalTrigger):  # type: ignore[misc]
        def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
            soonest = now.timestamp() + (interval / 4 if previous else 0)
            return on_grid(first + math.ceil((soonest - first) / interval) * interval)

    return Slots(seconds=interval, timezone=UTC)


# ── Plan ──────────────────────────────────────────────────────────────────────────────────────

PLANNED: dict[FileStep, str] = {
    "created": "job {name!r} is new",
    "changed": "job {name!r} changes: {changes}",
    "renamed": "job {old!r} is called {name!r} now, and keeps its history",
    "returned": "job {name!r} is back",
    "removed": "job {name!r} has left jobs.yaml: it is checked no more",
}


async def describe_plan(specs: Sequence[Spec], store: Store) -> list[str]:
    """Sentences: what loading these jobs from jobs.yaml would change in the store, and whether each
    job that is new or watches other batches will fire."""
    said: list[str] = []
    for what, name, job, spec in await store.file_changes(specs):
        differs = describe_changes(job.spec, spec) if job and spec and not job.damage else ""
        old = job.name if job else ""
        said.append(PLANNED[what].format(name=name, old=old, changes=differs))
        known = job is not None and not job.damage and isinstance(job.spec, JobSpec)
        if isinstance(spec, JobSpec) and not (
            known and job and aim_of_spec(job.watches) == aim_of_spec(spec)
        ):
            then = "will fire when its batches are done"
            for by, trigger in (await store.fired(aim_of_spec(spec)))[:1]:
                when = f"as trigger {trigger.id} of job {by.name!r}, {iso(trigger.created_at)}"
                then = f"fires again only by `job retry`, for these batches have fired: {when}"
            said.append(f"job {name!r} {then}")
    return said


async def every_problem(
    config: Config, store: Store, vault: Vault, *, thorough: bool = False
) -> list[Problem]:
    """Everything that prevents a start with this configuration, stored secrets included; and if
    `thorough`, that no client can be made, and what is wrong with secrets that no job uses."""
    rows = await store.secrets()
    problems = all_problems(config, await store.secret_types(), unused=thorough)
    try:
        if thorough:
            await make_client(UpstreamError).aclose()
    except UpstreamError as e:
        problems.append(Problem(found=str(e)))
    try:
        vault.load(required=bool(rows))
    except SecretError as e:
        return [*problems, Problem(found=str(e))]
    for row in rows:
        try:
            vault.open(row)
        except SecretError as e:
            problems.append(Problem(found=str(e)))
    return problems


# ── Alerts ────────────────────────────────────────────────────────────────────────────────────

# Each target is told once what is wrong, again after its `remind`, and when it is over; also where
# the program was restarted in between:
#
# - What is wrong is what /health says; nothing is judged a second time here.
# - What passes by itself is not told: a condition is told when it has lasted for some looks, and is
#   over when it was away for as many. What a new process cannot know yet is not over: a job stays
#   overdue until a good check.
# - That a target took a message is written to the store, or kept in memory while the store fails.
#   What it did not take is sent at the next look, with what is new by then.
#
# Not promised: a target that took a message just before the program was killed is told once more.
LOOK_SECONDS, PING_SECONDS = 30.0, 60.0
LASTING = {"limited": 300.0, "ingest": 300.0, "": 20.0}  # s; two mend themselves; else: two looks
SEND_SECONDS = 20.0  # s that a target may take
ALERTED = 10_000  # jobs of each kind
LISTED = 10  # conditions that the text of a message names
SERVICE_KINDS = ("backup", "reload", "database", "scheduler")  # words of the problems in /health
ToldAt = Mapping[str, float]  # conditions, and when they were last told
News = Mapping[str, str]  # conditions, and whether they are firing, a reminder or resolved
FAILED_WORK = ("error", "dropped", "failed", "interrupted")  # outcomes of checks and runs


def conditions(health: Health) -> dict[str, str]:
    """What is wrong: kind and subject of each condition, and a sentence."""
    late, stuck = "no good check for three intervals", "its trigger is not delivered or followed"
    wrong = {f"overdue job {name}": late for name in health.overdue_jobs}
    wrong |= {f"undelivered job {name}": stuck for name in health.undelivered_jobs}
    wrong |= {f"limited key {pause.secret}": pause.reason for pause in health.paused_keys}
    for row in health.attention:
        some = re.match(r"(\d+) of (\d+) records were rejected", row.reason or "")
        if some is None or some[1] == some[2]:  # fewer are within its `max_failed`
            wrong[f"{row.what} job {row.job}"] = row.reason or ""
    for said in health.problems:
        if not said[0].isdigit():  # how many jobs there are of a kind that is told one by one
            wrong[next((word for word in SERVICE_KINDS if word in said), "other")] = said
    return {redact(key): one_line(said) for key, said in wrong.items()}


def news_for(wrong: Collection[str], steady: Collection[str], told: ToldAt, due: float) -> News:
    """What a target is to be told: `steady` conditions are there, or gone, for long enough; those
    that it was told before `due` it is reminded of."""
    news = {key: "firing" for key in wrong if key in steady and key not in told}
    for key, at in told.items():
        if key in wrong and at <= due:
            news[key] = "reminder"
        elif key in steady and key not in wrong:
            news[key] = "resolved"
    return news


def alert_message(news: News, wrong: Mapping[str, str]) -> dict[str, Any]:
    """A title, some lines, and all of it for programs."""
    alerts = []
    for key, state in news.items():
        kind, _, subject = key.partition(" ")
        said = wrong.get(key, "it is over")
        alerts.append({"state": state, "kind": kind, "subject": subject or kind, "said": said})
    lines = [f"{a['state']}: {a['subject']}: {one_line(a['said'], 150)}" for a in alerts[:LISTED]]
    lines += [f"and {len(news) - LISTED:,} more"] if len(news) > LISTED else []
    counts = ", ".join(f"{n} {state}" for state, n in Counter(news.values()).items())
    return {"title": f"TeckoChecker: {counts}", "text": "\n".join(lines), "alerts": alerts}


def send_from_thread(target: AlertTarget, said: Mapping[str, Any]) -> None:
    """Send a message by a program, without a shell, which reads it from stdin; or by Apprise."""
    if target.command is not None:
        how: Any = {"stdout": subprocess.DEVNULL, "start_new_session": True, "check": False}
        how |= {"timeout": SEND_SECONDS + 1}  # when nobody waits for it any more
        done = subprocess.run(target.command, input=orjson.dumps(said), **how)
        if done.returncode:
            raise TeckoError(f"it ended with exit code {done.returncode}")
    else:
        deliver = apprise_of(str(target.apprise)).notify
        if not deliver(body=said["text"], title=said["title"], notify_type="warning"):
            raise TeckoError("Apprise could not send it; the log says why")


class Alerts:
    """Tells the targets of jobs.yaml what is wrong, and a dead-man switch that work is done."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._store = steps, steps.store
        self._client: httpx2.AsyncClient | None = None
        self._told: dict[str, ToldAt] | None = None  # by target; None: not read yet
        self._unsaved: set[str] = set()  # targets
        self._since: dict[tuple[str, bool], float] = {}  # when a condition came, or went
        self._failing: set[str] = set()  # targets that did not take the last message; "": `ping`
        self._worked = 0  # what was done until the last ping

    async def update(self, health: Health) -> None:
        """Tell each target what is new to it. Raises StoreError where the store cannot say what it
        was told before."""
        self._told = told = await self._store.alerts() if self._told is None else self._told
        targets = dict[str, AlertTarget]()
        for target in self._steps.config.alerts:
            way = repr((target.apprise, target.webhook, target.command))  # which may be secret
            targets[digest_of(way).hex()] = target
        wrong = await asyncio.to_thread(conditions, health)  # 10,000 texts are redacted
        now = self._steps.monotonic()
        known = {key for name in targets for key in told.get(name, {})}
        gone = known - wrong.keys() - await self._possibly_ongoing(health, known)
        seen = [*((key, True) for key in wrong), *((key, False) for key in gone)]
        self._since = {change: self._since.get(change, now) for change in seen}
        lasts = {key: now - since for (key, _), since in self._since.items()}
        steady = {k for k, s in lasts.items() if s >= LASTING.get(k.partition(" ")[0], LASTING[""])}
        asked = (self._notify(*named, wrong, steady) for named in targets.items())
        await asyncio.gather(*asked)

    async def _possibly_ongoing(self, health: Health, known: Collection[str]) -> set[str]:
        """What may go on though /health does not say so: all that the store would tell if it
        answered, and what a new process has not met yet."""
        if not health.db_connected:
            return {key for key in known if " " in key}
        late = await self._store.overdue(self._steps.clock(), 0.0)
        young = health.uptime_seconds < LONGEST_WAIT  # by then, each key was asked with again
        limited = {key for key in known if young and key.startswith("limited ")}
        return limited | {redact(f"overdue job {name}") for name in late}

    async def _notify(
        self, name: str, target: AlertTarget, wrong: Mapping[str, str], steady: Collection[str]
    ) -> None:
        now, told = self._steps.clock(), self._told
        assert told is not None
        mine = told.get(name, {})
        news = news_for(wrong, steady, mine, now - target.remind)
        send = partial(self._send, target, alert_message(news, wrong))
        if news and await self._is_taken(name, target.shown, send()):
            after = {**mine, **dict.fromkeys(news, now)}
            told[name] = {k: at for k, at in after.items() if news.get(k) != "resolved"}
            self._unsaved.add(name)
        if name in self._unsaved:
            with contextlib.suppress(StoreError):  # tried again at the next look
                await self._store.save_alerts(name, told[name])
                self._unsaved.discard(name)

    async def _is_taken(self, key: str, who: str, message: Awaitable[object]) -> bool:
        """Whether it was sent. That it was not is logged once, until one is sent."""
        try:
            await message
        except TeckoError as e:
            if key not in self._failing:
                log.warning("%s failed, and is tried again: %s", who, e)
            self._failing.add(key)
            return False
        self._failing.discard(key)
        return True

    async def _send(self, target: AlertTarget, said: Mapping[str, Any]) -> str:
        """Raises TeckoError, also where the target hangs. What blocks is done in a thread."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                if target.webhook is not None:
                    text = orjson.dumps(said)
                    await self._ask("POST", target.webhook, target.secret, content=text)
                else:
                    work = partial(send_from_thread, target, said)
                    await asyncio.wrap_future(run_in_daemon_thread(work))
        except TimeoutError:
            raise TeckoError(f"no answer within {SEND_SECONDS:.0f} s") from None
        except TeckoError:
            raise
        except Exception as e:  # of one of Apprise's services, for one
            raise TeckoError(f"{type(e).__name__}: {e}".rstrip(": ")) from e
        return "told"

    async def _ask(
        self, method: str, url: str, secret: str | int | None = None, **request: Any
    ) -> None:
        self._client = self._client or make_client(UpstreamError)
        headers = {"Content-Type": "application/json"}
        if secret is not None:
            value = await self._steps._secret(str(secret))
            headers["Authorization"] = f"Bearer {value.reveal()}"
        request |= {"headers": headers, "deadline": SEND_SECONDS, "limit": ERROR_BYTES}
        await http_request(
            self._client, UpstreamError, urlsplit(url).netloc, method, url, **request
        )

    async def ping(self) -> None:
        """Ask the URL of `ping:`, if any work was done since the last time."""
        metrics, url, before = self._steps.metrics, self._steps.config.ping, self._worked
        self._worked = metrics.total(metrics.checks, metrics.ingest_runs, without=FAILED_WORK)
        if url is not None and self._worked != before:
            await self._is_taken("", "the ping", self._ask("GET", url))

    async def test(self) -> list[Finding]:
        """Send each target a message; whether it went."""
        said = alert_message({"test": "test"}, {"test": "this is what `alert test` sends"})
        targets = self._steps.config.alerts
        asked = (probe(t.shown, partial(self._send, t, said), "nothing is there") for t in targets)
        findings = await asyncio.gather(*asked)
        await self.close()
        return findings

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


# ── Timers ────────────────────────────────────────────────────────────────────────────────────

# An unexpected error costs a job one step, and costs other jobs nothing:
#
# - A job is busy while the task that its `JobTimer` names is not done. No flag has to be cleared:
#   when that task ends in any way, the job is free.
# - The timer of a job fires at its interval, whatever the last step did.
# - If a group of jobs cannot be checked together, each is checked alone, so that an error is
#   reported at the job that causes it.
# - An unexpected exception in a step is logged with its traceback and shown in the job's
#   last_error. The job is tried again after its interval, then after twice that, up to an hour.
# - While the store cannot be written, no step begins: its result would be lost, and its requests
#   wasted. Each tick tries a small write; when one succeeds, the steps go on.

STORE_PAUSE = 5.0  # s until a step that met a failing store is tried again


def describe_error(error: Exception) -> tuple[str, Exception | None]:
    """What a caller may read of an error, and what the log shows with its traceback. Only our own
    errors show their text: that of others may name what a caller may not read."""
    if isinstance(error, TeckoError):
        return str(error), None
    return f"internal error; see the log: {type(error).__name__}", error


@dataclass(slots=True)
class JobTimer:
    """What the service remembers of a job."""

    plan: TimerPlan | None = None  # None: nothing is left to do, but a step may be under way
    timer: Any = None  # APScheduler's job
    task: asyncio.Task[None] | None = None  # runs the present step, perhaps with those of others
    began_with: TimerPlan | None = None  # the plan when that step began
    since: float = 0.0  # unix time at which that step fell due
    asked: bool = False  # it is to be checked at once, and not by a list of batches
    failures: int = 0  # steps in a row that met an error

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()


class Timers:
    """When each job's step is due, and the steps that are under way."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.store, self.metrics = steps, steps.store, steps.metrics
        self.store_error: str | None = None  # why the store cannot be written; None: it can
        self._scheduler = make_scheduler(
            lambda step: self._spawn(self.store.shift_times(step, time.time()))
        )
        self._timers: dict[int, JobTimer] = {}
        self._only: Collection[int] | None = None  # ids of the jobs that have timers; None: all
        self._due: dict[int, JobTimer] = {}  # begun together when the tick is over
        self._tasks: set[asyncio.Task[None]] = set()
        self._epoch = time.time()  # from which slots count
        self.stale = True  # the store has changed, and not by a step
        self._draining = False

    @property
    def settings(self) -> Settings:
        return self.steps.config.settings

    def _store_failed(self, error: StoreError) -> None:
        if str(error) != self.store_error:
            log.error("the store cannot be used; no step is begun meanwhile: %s", error)
        self.store_error = str(error)

    async def _sync(self, ids: Collection[int] | None = None) -> None:
        """Bring the timers in line with the store: all of them, or those of `ids`."""
        self.stale &= ids is not None
        wanted = await self.store.schedule(self._only if ids is None else ids)
        for job_id in [*self._timers] if ids is None else ids:
            if job_id not in wanted and job_id in self._timers:
                self._drop(job_id, self._timers[job_id])
        for job_id, plan in wanted.items():
            timer = self._timers.setdefault(job_id, JobTimer())
            if timer.plan != plan:
                self._schedule(job_id, timer, plan, max(len(self._timers), len(wanted)))

    def _drop(self, job_id: int, timer: JobTimer) -> None:
        """Remove the timer of a job that has nothing left to do. Its entry stays while a step is
        under way: if the job came back meanwhile, a second step would run beside the first."""
        if timer.plan is not None:
            self._scheduler.remove_job(str(job_id))
        timer.plan = None
        if not timer.busy:
            del self._timers[job_id]

    def _schedule(self, job_id: int, timer: JobTimer, plan: TimerPlan, jobs: int) -> None:
        """Give a job its timer. A new job, or a changed one, is due soon."""
        interval = plan.interval or self.settings.min_poll_interval
        first = slot(plan.secret, job_id, interval, jobs)
        timer.plan = plan
        timer.timer = self._scheduler.add_job(
            self._fall_due,
            slots(float(plan.interval or self.settings.max_poll_interval), self._epoch + first),
            (job_id,),
            id=str(job_id),
            name="check",
            replace_existing=True,
            next_run_time=on_grid(time.time() + first),
        )

    def _move(self, timer: JobTimer, at: float) -> None:
        """Give a job another due time."""
        if timer.plan is not None and self._scheduler.running:
            timer.timer.modify(next_run_time=on_grid(at))

    # steps

    def _fall_due(self, job_id: int) -> None:
        """A job's timer calls this. It does nothing while a step of the job is under way."""
        timer = self._timers.get(job_id)
        if self._draining or timer is None or timer.busy or job_id in self._due:
            return
        if not self._due:
            asyncio.get_running_loop().call_soon(self._begin)
        self._due[job_id] = timer
        timer.since, timer.began_with = timer.timer.next_run_time.timestamp(), timer.plan

    def _begin(self) -> None:
        """Begin the steps of all jobs that fell due in this turn of the event loop."""
        due, self._due = self._due, {}
        ids = [job_id for job_id, timer in due.items() if self._timers.get(job_id) is timer]
        self._spawn(self._run_due(ids), ids)

    def _spawn(self, work: Coroutine[Any, Any, Any], ids: Iterable[int] = ()) -> asyncio.Task[None]:
        """Run `work` in a task that holds the steps of `ids`, until it reports them or hands them
        to another task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        for job_id in ids:
            self._timers[job_id].task = task
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Log an error that is no job's own."""
        if isinstance(error, StoreError):
            self._store_failed(error)
        elif isinstance(error, OSError):
            log.error("this machine refused it: %s", error)
        else:
            log.error("internal error", exc_info=error)

    async def _run_due(self, ids: Sequence[int]) -> None:
        """Check jobs that fell due together: by a list of their batches where that is enough, the
        others one by one."""
        ACTOR.set(None)  # a timer inherits the context of whoever set it
        if self.store_error is not None:
            error = StoreError(self.store_error)
            for job_id in ids:
                self._finish_step(job_id, StepResult(STORE_PAUSE, str(error), error))
            return
        by_key: dict[str, list[Job]] = {}
        try:
            by_key = await self.steps.by_key([i for i in ids if not self._timers[i].asked])
        except Exception as e:
            self._report(e)  # each job then meets and reports it by itself
        for secret, rows in by_key.items():
            self._spawn(self._check_together(secret, rows), [row.id for row in rows])
        grouped = {row.id for rows in by_key.values() for row in rows}
        for job_id in ids:
            if job_id not in grouped:
                self._spawn(self._step(job_id), [job_id])

    async def _check_together(self, secret: str, rows: Sequence[Job]) -> None:
        """Check jobs of one key by a list of its batches."""
        done, began = dict[int, StepResult](), time.perf_counter()
        try:
            done = await self.steps.check(secret, rows)
        except Exception as e:
            self._report(e)  # as above
        self.metrics.steps.observe(time.perf_counter() - began)
        for row in rows:
            if row.id in done:
                self._finish_step(row.id, done[row.id])
            else:
                self._spawn(self._step(row.id), [row.id])

    async def _step(self, job_id: int) -> None:
        """A step of one job."""
        timer, began = self._timers[job_id], time.perf_counter()
        timer.asked = False
        try:
            stepped = await self.steps.step(job_id)
        except asyncio.CancelledError:
            log.warning("job %s: its step was cut off by the end of the service", job_id)
            return
        except StoreError as e:
            self._store_failed(e)
            wait = min(STORE_PAUSE * doubled(timer.failures + 1), LONGEST_WAIT)
            stepped = StepResult(wait, str(e), e)
        except Exception as e:
            stepped = await self._internal_error(job_id, timer, e)
        self.metrics.steps.observe(time.perf_counter() - began)
        self._finish_step(job_id, stepped)

    async def _internal_error(self, job_id: int, timer: JobTimer, error: Exception) -> StepResult:
        """Report an unexpected error of a step in the log and in the job's last_error."""
        said, traceback = describe_error(error)
        if traceback is not None:
            self.metrics.internal_errors.inc()
        pace = (timer.plan.interval if timer.plan else 0) or self.settings.default_poll_interval
        wait = min(pace * doubled(timer.failures), LONGEST_WAIT)
        log.error("job %s: %s; again in %.0f s", job_id, said, wait, exc_info=traceback)
        with contextlib.suppress(StoreError):  # which is told by the next step
            await self.store.note_failure(job_id, said, time.time(), wait)
        return StepResult(wait, said, TeckoError(said))

    def _finish_step(self, job_id: int, stepped: StepResult) -> None:
        """Count a step that has ended, and plan the next one."""
        log.debug("job %s: %s; again in %s s", job_id, stepped.said, stepped.wait)
        timer, now = self._timers[job_id], time.time()
        timer.task, plan = None, timer.plan
        timer.failures = timer.failures + 1 if stepped.error is not None else 0
        if stepped.error is None:  # how long a key that fails takes to do so is no lateness
            self.metrics.lateness.observe(max(0.0, now - timer.since))
        if plan is None or stepped.wait is None:  # the store knows whether something is left
            self._spawn(self._sync([job_id]))
        elif timer.began_with != plan or timer.asked:  # changed while we looked at the old one
            self._move(timer, now)
        elif abs(stepped.wait - plan.interval) > GRID:
            self._move(timer, now + stepped.wait)

    def has_stepped(self, job_id: int) -> bool:
        """Whether a step of the job has ended, and no other one follows it at once."""
        timer, soon = self._timers.get(job_id), on_grid(time.time() + GRID)
        if timer is None:
            return True
        waits = timer.plan is None or timer.timer.next_run_time > soon
        return timer.since > 0 and not timer.busy and waits

    async def check_now(self, ref: str) -> Done:
        """Make a job due at once."""
        job = await self.store.find_job(ref)
        await self._sync()  # what was changed a moment ago counts
        timer = self._timers.get(job.id)
        if timer is None or timer.plan is None:
            raise Conflict(f"Cannot check job {job.name!r}: it is {job.shown_status}")
        if job.id in self.steps.ingesting:
            raise Conflict(f"Cannot run job {job.name!r}: a run of it goes on already")
        if self.store_error is not None:
            raise StoreError(self.store_error)
        timer.asked = True
        self._move(timer, time.time())
        return Done(success=True, message=f"Job {job.name!r} is checked now")


# ── Service ───────────────────────────────────────────────────────────────────────────────────

TICK = 1.0  # s between looks at what other processes changed in the store
STALLED_TICKS = 60.0  # s without a tick after which the scheduler counts as stalled
DRAIN_SECONDS = 7.0  # s for work in flight after SIGTERM, of the 10 s promised in all
LOCK_WAIT = 60.0  # s that a start waits for another process's lock on the store
PRUNE_SECONDS = 3600.0  # s between looks for rows past their time
HEALTH_SECONDS = 2.5  # s that the store has to answer a question of /health
NAMED = 100  # jobs that /health names of each kind
BOUND_AT_START = (  # settings that a reload does not change
    *("database", "api_host", "api_port", "openai_base_url"),
    *("log_level", "log_format", "log_file", "secret_key", "secret_key_file"),
)


def notify(*states: str) -> None:
    """Tell systemd (sd_notify(3)): a datagram to $NOTIFY_SOCKET; nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)  # a manager that does not read must not stop the event loop
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            channel.sendall("\n".join(states).encode())
    except OSError as e:
        log.debug("cannot notify the service manager: %s", e)


class Service(Timers):
    """The running program: ticks, reload, health, statistics, drain. Everything runs on the event
    loop; signals only set `stop` and `reload`."""

    def __init__(self, steps: Steps, load: Callable[[], Config]) -> None:
        super().__init__(steps)
        self._load = load
        self.started_at = time.time()
        self.stop, self.reload = asyncio.Event(), asyncio.Event()
        self.operations = Operations(steps.store, steps.vault, lambda: steps.config)
        self.alerts = Alerts(steps)
        self.backups = Backups(steps.vault, lambda: steps.stopping)
        self.connections: Callable[[], int] = lambda: 0
        self.lock: RunLock | None = None
        self.reloaded_at, self.reload_error = self.started_at, cast(str | None, None)
        self._repeated: dict[Callable[..., Any], asyncio.Task[None]] = {}
        self._health: asyncio.Task[Health] | None = None  # the last that was asked for
        self._seen_version = -1  # of the store
        self._ticked, self._lag = time.monotonic(), 0.0

    async def start(self, *, timers: bool = True) -> None:
        """Bring the store in line with jobs.yaml and begin. Waits while another process holds the
        store's lock."""
        self.store.patience = LOCK_WAIT
        await self.store.clamp_times(time.time())
        await self.store.detect_restore(time.time())
        await self._apply_config(self.steps.config)
        self.store.patience = PATIENCE
        if timers:
            await self.begin()

    async def begin(self, only: Collection[int] | None = None) -> None:
        """Start the timers of all jobs and the service's own, or those of some jobs."""
        self._epoch, self._only = time.time(), only
        await self._sync()
        own = {self._tick: TICK}
        if only is None:
            own |= {self._prune: PRUNE_SECONDS, self._back_up: BACKUP_SECONDS}
            own |= {self._alert: LOOK_SECONDS, self.alerts.ping: PING_SECONDS}
        for work, seconds in own.items():
            every: Any = {"seconds": seconds, "next_run_time": datetime.now(UTC)}
            self._scheduler.add_job(self._repeat, "interval", (work,), **every)
        self.store.on_write = self._written
        self._scheduler.start()
        gc.collect()
        gc.freeze()  # full collections then skip all that exists now

    async def drain(self) -> None:
        """Begin no more steps, let those under way finish or be recorded, end the timers."""
        if not self._scheduler.running:
            return
        self._scheduler.pause()
        self._draining = self.steps.stopping = True
        until = time.monotonic() + DRAIN_SECONDS
        for work in (self._alert, self.alerts.ping):  # what was not delivered is tried again
            if work in self._repeated:
                self._repeated[work].cancel()
        self.store.close_soon(DRAIN_SECONDS + 0.5)  # however long its lock is held
        while self._tasks and (left := until - time.monotonic()) > 0:  # one may begin another
            await asyncio.wait(set(self._tasks), timeout=left)
        late = list(self._tasks)
        for task in late:  # a POST cut off here is found as `sending` at the next start
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self.alerts.close()
        self._scheduler.shutdown(wait=False)
        await asyncio.sleep(0)

    # configuration

    async def _apply_config(self, config: Config) -> None:
        if problems := await every_problem(config, self.store, self.steps.vault):
            raise Invalid(problems)
        for warning in config.warnings:
            log.warning("%s", warning)
        if config.jobs is None and any(j.origin == "file" for j in await self.store.jobs("active")):
            said = "is gone or names no jobs, but the store has active jobs that come from it"
            raise Invalid([f"{config.path} {said}"], hint="`jobs: []` removes them all")
        done = Counter[str]()
        if config.jobs is not None:
            for said in await describe_plan(config.jobs, self.store):
                log.info("%s: %s", config.path, said)
            done = await self.store.sync_file_jobs(config.jobs, time.time())
        self.steps.config = config
        self.stale = True
        words = ", ".join(f"{count} {what}" for what, count in done.items())
        log.info("%s: %s", config.path, words or "no job changed")

    async def _reload(self) -> None:
        """Read the configuration again. A bad file changes nothing, nor do settings bound at the
        start; both are logged. A job whose last step failed is tried at once."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        old, error = self.settings, None
        try:
            config = self._load()
            kept = {name: getattr(old, name) for name in BOUND_AT_START}
            changed = [n for n, value in kept.items() if getattr(config.settings, n) != value]
            await self._apply_config(
                replace(config, settings=config.settings.model_copy(update=kept))
            )
            self.steps.openai.per_minute = config.settings.max_requests_per_minute
            if changed:
                log.warning("changed, but taken up only by a restart: %s", ", ".join(changed))
        except Exception as e:
            error, traceback = describe_error(e)
            said = "reload refused, the configuration before it stays: %s"
            log.error(said, error, exc_info=traceback)
        self.reloaded_at, self.reload_error = time.time(), error
        for timer in self._timers.values():
            if timer.failures and not timer.busy:
                self._move(timer, time.time())
        notify("READY=1")

    # ticks

    def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The service's own timers call this: begin `work`, unless it is still running."""
        if not self._draining and ((task := self._repeated.get(work)) is None or task.done()):
            self._repeated[work] = self._spawn(work())

    async def _tick(self) -> None:
        """Once a second: check that the database is still ours, read what other processes changed
        in it, and notify the watchdog; before that, whenever `reload` is set, the configuration."""
        ACTOR.set(None)
        if self.reload.is_set():
            self.reload.clear()
            await self._reload()
        if self.lock is not None:
            self.lock.hold()
        if self.store.superseded:
            log.critical("another node has taken over this database; this one ends")
            self.stop.set()
        if problem := self.store.file_problem():
            self._store_failed(StoreError(problem))
        version = await self.store.data_version()
        if self.stale or version != self._seen_version:
            await self._sync()
            self._seen_version = version
        now = time.monotonic()
        self._lag, self._ticked = max(0.0, now - self._ticked - TICK), now
        notify("WATCHDOG=1")
        if self.store_error is not None:  # no step is begun, so that nothing else is tried
            await self.store.log_event("error", f"it failed: {self.store_error}", time.time())

    def _written(self, seconds: float) -> None:
        """The store calls this after each commit, with its duration."""
        self.metrics.writes.observe(seconds)
        if self.store_error is not None:
            log.info("the store can be written again")
        self.store_error = None

    async def _prune(self) -> None:
        """Delete rows past their time or number."""
        keep, days = self.settings.log_retention_rows, self.settings.log_retention_days
        await self.store.prune(time.time() - 86400 * days, keep)

    async def _alert(self) -> None:
        """Send the alerts that are due."""
        if self.steps.config.alerts:
            await self.alerts.update(await self.health(ALERTED))

    async def _back_up(self) -> None:
        await self.store.detect_restore(time.time())
        await asyncio.to_thread(self.backups.run_if_due, self.settings, time.time())

    # figures

    async def health(self, named: int = NAMED) -> Health:
        """Waits for no writer of the store. At most `named` jobs of each kind are listed."""
        now, settle = time.time(), float(self.settings.trigger_settle_seconds)
        seen: dict[str, Any] = {"db_connected": False}
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(HEALTH_SECONDS):
                run = next(iter(await self.store.runs(None, 1)), None)
                seen = {
                    "db_connected": True,
                    "overdue_jobs": (await self.store.overdue(now, self.started_at))[:named],
                    "undelivered_jobs": await self.store.undelivered(now, settle, named),
                    "attention": [Attention(**row) for row in await self.store.attention(named)],
                    "etl_last_run": run.start_time if run else None,
                    "etl_status": run.status if run else None,
                }
        stalled = time.monotonic() - self._ticked > STALLED_TICKS
        running: Any = "running" if self._scheduler.running else "stopped"
        health = Health(
            timestamp=now,
            version=VERSION,
            uptime_seconds=round(now - self.started_at, 1),
            scheduler="stalled" if stalled else running,
            paused_keys=self.steps.openai.pauses(),
            config_last_reload_successful=self.reload_error is None,
            config_last_reload_at=self.reloaded_at,
            config_last_reload_error=self.reload_error,
            backup_last_success_at=(last := self.backups.last),
            backup_last_error=self.backups.error,
            backup_overdue=now - (last or self.started_at) > 2 * self.settings.backup.every,
            **seen,
        )
        return with_status(health, self.store.file_problem(), self.store_error)

    async def shared_health(self) -> Health:
        """The same, made once for all who ask at one moment: monitors and balancers ask often."""
        if self._health is None or self._health.done():
            self._health = asyncio.create_task(self.health())
        return await asyncio.shield(self._health)

    async def ready(self) -> Done:
        health = await self.shared_health()
        said = f"database {health.database}, scheduler {health.scheduler}"
        return Done(success=health.status != "unhealthy", message=said)

    async def stats(self) -> Stats:
        counts, runs = await self.store.counts(), await self.store.runs(None, 10)
        jobs = Counter[str](counts["jobs"])
        last = runs[0] if runs else None
        return Stats(
            total_jobs=jobs.total(),
            active_jobs=jobs["active"],
            paused_jobs=jobs["paused"],
            completed_jobs=jobs["completed"] + jobs["completed_with_failures"],
            failed_jobs=jobs["failed"],
            jobs_by_status=jobs,
            total_secrets=counts["secrets"],
            total_logs=counts["logs"],
            triggers=counts["triggers"],
            uptime_seconds=round(time.time() - self.started_at, 1),
            checks=self.metrics.total(self.metrics.checks),
            errors=self.metrics.total(self.metrics.upstream_errors, self.metrics.internal_errors),
            **{f"total_{name}": n for name, n in (await self.store.totals()).items()},
            last_run_id=last.run_id if last else None,
            last_run_status=last.status if last else None,
            last_run_timestamp=last.start_time if last else None,
            last_failure_timestamp=await self.store.last_failure(),
            restored=counts["restored"],
            backup_last_success_at=self.backups.last,
            backup_last_error=self.backups.error,
            runs=runs,
            history=await self.operations.history(DAYS_KEPT),
        )

    async def metrics_text(self) -> str:
        """What /metrics answers, in Prometheus' text format."""
        now, jobs = time.time(), await self.store.jobs(None, METERED_JOBS)
        counted = dict.fromkeys((*JOB_STEPS, "removed"), 0) | (await self.store.counts())["jobs"]
        self.metrics.jobs_are(jobs, counted)
        figures: dict[str, float] = {
            "overdue_jobs": len(await self.store.overdue(now, self.started_at)),
            "oldest_open_trigger_seconds": await self.store.oldest_trigger(now),
            "store_writable": self.store_error is None,
            "loop_lag_seconds": self._lag,
            "http_connections": self.connections(),
            "config_last_reload_successful": self.reload_error is None,
            "config_last_reload_timestamp_seconds": self.reloaded_at,
            "backup_last_successful": self.backups.error is None,
            "backup_last_success_timestamp_seconds": self.backups.last or 0.0,
        }
        for name, value in figures.items():
            self.metrics.gauges[name].set(value)
        self.metrics.paused_keys.clear()
        for pause in self.steps.openai.pauses():
            self.metrics.paused_keys.labels(pause.secret).set(1)
        return self.metrics.text()


@contextlib.asynccontextmanager
async def make_steps(config: Config, store: Store) -> AsyncIterator[Steps]:
    """The steps with their upstream clients, which are closed at the end."""
    settings = config.settings
    openai = OpenAI(settings.openai_base_url, settings.max_requests_per_minute)
    upstreams = openai, Keboola(), Web()
    try:
        yield Steps(config, store, Vault(settings), *upstreams)
    finally:
        for upstream in upstreams:
            await upstream.close()


@contextlib.asynccontextmanager
async def make_service(
    config: Config,
    load: Callable[[], Config],
    *,
    timers: bool = True,
    in_reserve: Callable[[], None] = lambda: None,
) -> AsyncIterator[Service]:
    """The service with its store and upstreams, started; drained and closed at the end."""
    async with Store(config.settings.store) as store, make_steps(config, store) as steps:
        await store.hold_exclusively(in_reserve)
        service = Service(steps, load)
        try:
            await service.start(timers=timers)
            yield service
        finally:
            await service.drain()


# ── Page ──────────────────────────────────────────────────────────────────────────────────────

# `/` for browsers: a table of jobs that anybody can read, made here; and a script that keeps it up
# to date out of the routes below. It makes texts of all that it is told, never markup.

STATES = (*JOB_STEPS, "removed")
STATUS_PAGE = r"""
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TeckoChecker</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{color-scheme:light dark;--bg:light-dark(#f5f5f3,#111215);--card:light-dark(#fff,#1a1c20);
--ink:light-dark(#1c1e22,#e8e9eb);--soft:light-dark(#5b606a,#a0a5af);
--line:light-dark(#dfe0e4,#30333a);--accent:light-dark(#3550c4,#9db0ff);
--good:light-dark(#19753a,#62cb84);--warn:light-dark(#855300,#e3ae48);
--bad:light-dark(#b82020,#ff8b83)}*{box-sizing:border-box}body{margin:auto;max-width:78rem;
padding:1.5rem 1rem 5rem;color:var(--ink);background:var(--bg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem}h3{font-size:1rem}h1,h2,h3,p,ul{margin:0;padding:0}h2:focus{outline:0}
li{list-style:none;margin:.3rem 1rem 0 0}a{color:var(--accent)}.end{margin-left:auto}
small,th{display:block;color:var(--soft);font-size:.8125rem;font-weight:400}pre,.scroll{
overflow-x:auto}.line{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem}nav{columns:20rem}
.card,header,main>div>*{margin-bottom:1.25rem}.card,.tiles>div{background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:1rem 1.25rem}.alarm{border-left:4px solid
var(--bad)}.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem;min-height:7.75rem}
strong{font-size:1.5rem}.bars{display:flex;gap:2px;height:1.25rem;margin:.25rem 0;align-items:end}
.bars i{flex:1;max-width:8px;min-height:2px;background:currentColor}
progress{flex:1;min-width:0;width:100%;accent-color:currentColor}table{width:100%;border-spacing:0}
th,td{display:table-cell;text-align:left;vertical-align:top;padding:.6rem .75rem .6rem 0;
border-bottom:1px solid var(--line)}tr:last-child>td{border:0}.scroll{margin-bottom:1.5rem}
#list table{table-layout:fixed;overflow-wrap:anywhere}th::first-letter{text-transform:capitalize}
#list th:first-child{width:28%}td>a{font-weight:600;text-decoration:none}
.state::before{content:"●" / "";margin-right:.4em}.paused::before{content:"○" / ""}
.state:is(.completed,.success)::before{content:"✓" / ""}.state.failed::before{content:"✗" / ""}
.active,.triggering,.triggered,.in_progress,.days{color:var(--accent)}
.completed,.healthy,.success{color:var(--good)}.failed,.unhealthy,.expired{color:var(--bad)}
.completed_with_failures,.degraded,.rejected,.interrupted{color:var(--warn)}
button,input,select,textarea{font:inherit;color:inherit;background:var(--card);max-width:100%;
border:1px solid var(--line);border-radius:8px;padding:.25rem .7rem;min-height:2.1rem}
.sure{color:var(--card);background:var(--bad)}:focus-visible{outline:3px solid var(--accent)}
[hidden]{display:none!important}@media(max-width:50rem){.tiles{grid-template-columns:1fr 1fr}
#list thead{display:none}#list :is(table,tbody,td){display:block;border:0;padding:0}#list tr{
display:grid;grid-template-columns:1fr auto;gap:.5rem;padding:1rem 0}#list td:nth-child(3n){
grid-column:1/3}#list tr+tr{border-top:1px solid var(--line)}}
</style></head><body><header class="line"><h1>TeckoChecker</h1><span id="health"></span>
<small id="said" role="status"></small><a class="end" href="/docs">API</a></header>
<p id="alarm" class="card alarm" role="alert" hidden></p>
<section id="needs" class="card alarm" aria-label="What needs you" hidden></section>
<main><div id="list"><div id="days" class="tiles"></div><div class="line">
<input id="search" type="search" placeholder="Search by name" aria-label="Name">
<select id="status" aria-label="State"><option value="">all states</option><!-- states --></select>
<small id="counts"></small></div><div class="card"><table><thead><tr><th>Job<th>State<th>Progress
<th>Keboola job<th>Next check<th>Actions</thead><tbody id="jobs"><!-- jobs --></tbody></table>
<noscript>The first jobs, as they were at loading. JavaScript shows all.</noscript></div>
<div id="pages" class="line"></div></div><article id="job" class="card" hidden></article></main>
<script>
"use strict";
const STEPS = {active: ["check", "pause"], paused: ["resume"], triggering: ["check"],
  triggered: ["check"], failed: ["retry"]}; // what a person may do in a state
const TILES = {Checks: "checks", Triggers: "triggers", "Done to POST, ms,": "done_to_post_ms",
  Records: "records"};
const $ = (id) => document.getElementById(id), number = (n) => (n ?? 0).toLocaleString("en");
const drawn = {}, states = {};
let pages = [0], open = 0, sure = "", latest = 0, wait, seen, timer;

function make(tag, props, ...inside) { // what the service says becomes text, never markup
  const made = Object.assign(document.createElement(tag), props);
  made.append(...inside.flat(9).map((part) => part ?? "-"));
  return made;
}
function draw(id, build, ...data) { // anew only if it has changed; the focus stays where it was
  const text = JSON.stringify(data), focus = document.activeElement.id;
  if (drawn[id] === text) return;
  [drawn[id], wait] = [text, 2000];
  $(id).replaceChildren(...[build(...data)].flat(9));
  if (focus) ($(focus) ?? $(focus.replace(/^\w+-/, "job-")))?.focus({preventScroll: true});
}
async function ask(path, method = "GET") {
  const how = {method, headers: {Accept: "application/json"}, signal: AbortSignal.timeout(9000)};
  const answer = await fetch(path, how).catch(() => ({json: () => null}));
  const body = (await answer.json()) ?? {detail: "The service does not answer"};
  if (!answer.ok && !body.problems) throw Error(body.detail); // an unhealthy service says more
  return body;
}
function when(at) {
  const left = (Date.parse(at) - Date.now()) / 1000, s = Math.abs(left);
  const [n, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([n]) => s >= 2 * n) ?? [1, "s"];
  const text = `${Math.floor(s / n)} ${unit}`;
  return s < 3 ? "now" : left > 0 ? `in ${text}` : `${text} ago`;
}
const say = (text) => { $("said").textContent = text; };
const time = (at) => at && make("time", {dateTime: at, title: at}, when(at));
const small = (...inside) => make("small", {}, inside), words = (key) => key.replaceAll("_", " ");
const state = (name) => make("span", {className: `state ${name}`}, words(name));
const button = (id, text, onclick, more) => make("button", {id, onclick, ...more}, text);

function chart(className, ariaLabel, bars) {
  const each = bars.map(([percent, className, title]) =>
    make("i", {className, title, style: `height:${percent}%`}));
  return make("div", {role: "img", className, ariaLabel}, each);
}
function bar(b) {
  const value = b.requests_completed + b.requests_failed, max = b.requests_total || 1;
  const title = `${b.batch_id} ${b.status}, ${value} of ${b.requests_total} requests done`;
  return make("progress", {className: b.status, max, value, title, ariaLabel: title});
}
function bars(job) { // one for each batch, or for each of the last runs
  const ends = job.recent.runs.toReversed(), each = ends.map((end) => [100, end, end]);
  return job.ingest ? chart("bars", `last runs: ${ends.join(", ")}`, each)
    : make("div", {className: "bars"}, job.batches.slice(0, 12).map(bar));
}
function buttons(job) {
  return make("div", {className: "line"}, (STEPS[job.status] ?? []).map((step) => {
    const id = `${step}-${job.id}`, text = sure === id ? `really ${step}?` : step;
    const more = {className: sure === id ? "sure" : "", ariaLabel: `${text} ${job.name}`};
    return button(id, text, () => act(job, step, id), more);
  }));
}
async function act(job, step, id) { // pause and retry want a second click, within five seconds
  const asks = sure !== id && ["pause", "retry"].includes(step);
  sure = asks ? id : "";
  show();
  if (asks) return setTimeout(() => { sure = ""; show(); }, 5000);
  const done = await ask(`/api/jobs/${job.id}/${step}`, "POST").catch((error) => error);
  say(done.message ?? done.detail ?? `${job.name} is ${done.status} now`);
  return turn();
}
function row(job) {
  const {done, why, trigger: sent} = job.recent;
  const link = make("a", {id: `job-${job.id}`, href: `#${job.id}`}, job.name);
  const told = sent && small(sent.keboola_status ?? sent.state, " ", time(sent.created_at));
  const cells = [[link, small(why ?? "")], state(job.status), [bars(job), small(done)],
    sent ? [sent.keboola_job_id, told] : "", time(job.next_check_at) ?? "", buttons(job)];
  return make("tr", {}, cells.map((cell) => make("td", {}, cell)));
}
function rows(jobs, isNew) {
  const none = isNew ? "No jobs yet: write jobs.yaml, then run `reload`." : "No job is like this.";
  return jobs.length ? jobs.map(row) : make("tr", {}, make("td", {colSpan: 6}, none));
}
function table(title, rows, columns) { // of the fields that `columns` names
  const keys = columns.split(" "), line = (tag, cells) => make("tr", {}, cells.map(
    (cell) => make(tag, {}, cell)));
  const cell = (of, key) => key === "progress" ? bar(of) : key !== "status"
    ? /_(at|time)$/.test(key) ? time(of[key]) : of[key] : state(of.status || "not seen yet");
  const lines = rows.map((of) => line("td", keys.map((key) => cell(of, key))));
  return rows.length ? [make("h3", {}, title), make("div", {className: "scroll", tabIndex: 0},
    make("table", {}, line("th", keys.map(words)), lines))] : [];
}
function view(job) {
  const {why, trigger: sent} = job.recent;
  const times = {Created: job.created_at, "All done": sent?.created_at, Sent: sent?.sent_at,
    Ended: sent?.finished_at, Checked: job.last_check_at, "Next check": job.next_check_at};
  const steps = Object.entries(times).filter(([, at]) => at).map(([name, at]) =>
    make("li", {}, small(name), time(at)));
  return [make("a", {href: "#"}, "All jobs"), make("h2", {id: "title", tabIndex: -1}, job.name),
    make("p", {}, state(job.status), ` ${why ?? ""}`), bars(job), buttons(job),
    make("ul", {className: "line scroll"}, steps),
    table("Batches", job.batches, "batch_id status progress requests_completed requests_total"),
    table("Triggers", job.triggers, "created_at id state keboola_job_id keboola_status message"),
    table("Runs", job.runs, "start_time status records_inserted records_updated records_failed"),
    table("Rejected records", job.rejects, "place reason record"),
    table("Log", job.logs.toReversed(), "created_at status message actor")];
}
function needs(problems, attention, keys) {
  const jobs = attention.slice(0, 10).map(({id, job, reason, what}) =>
    [id ? make("a", {href: `#${id}`}, job) : job, `: ${reason ?? what}`]);
  if (attention.length > 10) jobs.push("and more, see below");
  const paused = keys.map((k) => [`Key ${k.secret} is paused: ${k.reason}; until `, time(k.until)]);
  const lines = [...problems, ...jobs, ...paused].map((line) => make("li", {}, line));
  $("needs").hidden = !lines.length;
  return [make("h3", {}, "Needs you"), make("ul", {}, lines)];
}
function tiles(days, today) {
  return Object.entries(TILES).map(([name, what]) => {
    const all = days.map((day) => day[what] ?? 0), most = Math.max(1, ...all) / 100;
    const last = number(days.at(-1)?.day === today ? all.at(-1) : 0);
    const label = `of ${days.length} days: ${all.join(", ")}`;
    return make("div", {}, small(`${name} today`), make("strong", {}, last),
      chart("bars days", label, days.map(({day}, at) => [all[at] / most, "", day])));
  });
}
function choose(to) { pages = to; turn(); }
function pager(at, here, total, next) {
  const first = 50 * (at.length - 1), before = at.slice(0, -1);
  return total <= 50 ? [] : [`${number(first + 1)} to ${number(first + here)} of ${number(total)}`,
    button("previous", "Previous", () => choose(before), {disabled: at.length < 2}),
    button("next", "Next", () => choose([...at, next]), {disabled: !next})];
}
function show() {
  const [health, stats, found] = seen, list = found.jobs !== undefined;
  for (const job of found.jobs ?? [found]) {
    if (states[job.id] && states[job.id] !== job.status) say(`${job.name} is ${job.status} now`);
    states[job.id] = job.status;
  }
  [$("list").hidden, $("job").hidden] = [!list, list];
  document.title = `${found.name ?? health.status} - TeckoChecker`;
  draw("health", state, health.status);
  draw("needs", needs, health.problems, health.attention, health.paused_keys);
  if (!list) return draw("job", view, found, sure);
  draw("days", tiles, stats.history.slice(-30), health.timestamp.slice(0, 10));
  draw("counts", (counts) => Object.entries(counts).map(([name, n]) =>
    `${number(n)} ${words(name)}`).join(", "), stats.jobs_by_status);
  draw("jobs", rows, found.jobs, !stats.total_jobs, sure);
  return draw("pages", pager, pages, found.jobs.length, found.total, found.next_after);
}
async function turn() { // soon again after a change, ever later without one
  clearTimeout(timer);
  wait = Math.min(1.5 * wait, 30000) || 2000;
  const mine = ++latest, status = $("status").value, query = new URLSearchParams({recent: true,
    limit: 50, after: pages.at(-1), search: $("search").value, ...(status && {status})});
  const jobs = open ? `/api/jobs/${open}?log_limit=100` : `/api/jobs?${query}`;
  const found = await Promise.all(["/health", "/stats", jobs].map((path) => ask(path)))
    .catch((error) => `${error.message}. It is asked again; below is how it was.`);
  if (mine !== latest) return;
  $("alarm").hidden = Array.isArray(found);
  if (Array.isArray(found)) show(seen = found);
  else $("alarm").textContent = found;
  timer = setTimeout(turn, document.hidden ? 60000 : wait);
}
async function visit() {
  const from = open;
  open = Number(location.hash.slice(1));
  await turn();
  if (from !== open) $(open ? "title" : `job-${from}`)?.focus();
}
$("search").oninput = $("status").onchange = () => choose([0]);
addEventListener("hashchange", visit);
addEventListener("visibilitychange", () => document.hidden || turn());
const refresh = (t) => { t.textContent = when(t.dateTime); };
setInterval(() => document.querySelectorAll("time").forEach(refresh), 1000);
visit();
</script></body></html>
"""
PAGE_STYLE, PAGE_SCRIPT = (
    STATUS_PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in ("style", "script")
)


def status_page(jobs: Sequence[JobAnswer]) -> str:
    rows = ""
    for job in jobs:
        recent = cast(Recent, job.recent)
        sent = recent.trigger.keboola_job_id if recent.trigger else None
        due = iso(job.next_check_at) if job.next_check_at else None
        cells = (job.name, job.status, recent.done, sent or "", due or "", recent.why or "")
        rows += "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells)
    states = "".join(f"<option>{status}" for status in STATES)
    return STATUS_PAGE.replace("<!-- jobs -->", rows).replace("<!-- states -->", states)


# ── Routes ────────────────────────────────────────────────────────────────────────────────────


class About(Answer):
    name: str = "TeckoChecker"
    version: str = VERSION
    description: str = "watches OpenAI batches and starts a Keboola job when they are done"
    docs: str = "/docs"
    health: str = "/api/health"


class ErrorAnswer(Answer):
    """Why a request was not done; `code` is also in the header X-Error-Code."""

    error: str
    detail: str
    code: int
    request_id: str
    message: str | None = Field(None, description="with 422: that validation failed")
    details: list[dict[str, str]] | None = Field(None, description="with 422: of each wrong field")


class JobsQuery(StrictModel):
    status: Literal[JobStatus, "removed"] | None = Field(None, description=", ".join(STATES))
    limit: int = Field(100, ge=1, le=1000, description="jobs a page, 1 to 1000")
    after: int = Field(0, ge=0, le=2**63 - 1, description="`next_after` of the page before")
    search: str = Field("", description="a part of the name, in either case")
    recent: bool = Field(False, description="true: with `recent`, what each job did last")


class DataQuery(StrictModel):
    source: str | None = Field(None, min_length=1, description="an ingest's job; default: all")
    limit: int = Field(10, ge=1, le=100, description="records a page, 1 to 100")
    offset: int = Field(0, ge=0, le=10**12, description="records to skip; costs as much as reading")
    after: int = Field(0, ge=0, le=2**63 - 1, description="`next_after` of the page before")


class JobQuery(StrictModel):
    include_logs: bool = Field(True, description="true or false")
    log_limit: int = Field(20, ge=1, le=1000, description="log rows, 1 to 1000")


class Request(NamedTuple):
    """The argument of a route's function: the service, and the validated parts of the request."""

    service: Service
    id: str
    query: Any
    body: Any
    request_id: str
    trusted: bool  # may see names of jobs and keys
    accept: str  # the header
    operations: Operations


@dataclass(frozen=True, slots=True)
class Route:
    """A row of the table that serves requests and writes /openapi.json and /docs."""

    method: str
    path: str  # {id} is a whole number
    does: str  # one line for the documentation
    run: Callable[[Request], Any]  # its answer, or a coroutine of it
    answer: Any  # an Answer, or the content type of a text
    body: Any = None  # what the body has to be
    example: Mapping[str, Any] | None = None  # of a body
    query: type[BaseModel] | None = None
    status: int = 200
    public: bool = False  # no token is asked for, and any Host will do: probes use addresses
    also: str = ""  # a second path

    def match(self, path: str) -> str | None:
        """The id in `path` ("" where the route has none); None where it is another's."""
        head, marker, tail = self.path.partition("{id}")
        if not marker:
            return "" if path in (self.path, self.also) else None
        middle = path.removeprefix(head).removesuffix(tail)
        return middle if path == head + middle + tail and "/" not in middle and middle else None


async def show_root(request: Request) -> About | str:
    if not re.match("text/html *(,|$)", request.accept):  # as browsers say it
        return About()
    return status_page((await request.operations.jobs(None, 50, 0, recent=True)).jobs)


async def show_health(request: Request) -> Health:
    health = await request.service.shared_health()
    return health if request.trusted else health.anonymous()


async def show_job(request: Request) -> JobDetail:
    query: JobQuery = request.query
    return await request.operations.job(request.id, query.log_limit if query.include_logs else None)


async def show_data(request: Request) -> DataPage:
    q, begun = cast(DataQuery, request.query), time.perf_counter()
    found, following = await request.operations.data(q.source, q.limit, q.after, q.offset)
    totals = await request.service.store.totals(q.source or "")
    return DataPage(
        request_id=request.request_id,
        total_count=totals["records"],
        limit=q.limit,
        offset=q.offset,
        next_after=following,
        api_latency_ms=round((time.perf_counter() - begun) * 1000, 2),
        data=found,
    )


def show_openapi(request: Request) -> str:
    return json.dumps(openapi())


SECRET_EXAMPLE = {"name": "openai-prod", "type": "openai", "value": "sk-..."}
JOB_EXAMPLE = {
    "name": "nightly",
    "batch_id": "batch_abc123",
    "openai_secret_id": 1,
    "keboola_secret_id": 2,
    "keboola_stack_url": "https://connection.keboola.com",
    "keboola_component_id": "kds-team.app-custom-python",
    "keboola_configuration_id": "123456",
    "poll_interval_seconds": 120,
}
METRICS = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus text format
HTML = "text/html; charset=utf-8"
ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "Name and version; for browsers a page with all jobs", show_root, About),
    Route("GET", "/health", "Overall health, judged by recent checks; 503: unhealthy", show_health,
          Health, public=True, also="/api/health"),
    Route("GET", "/livez", "Liveness: the event loop responds",  # for it runs this
          lambda r: Done(success=True, message="the event loop responds"), Done, public=True),
    Route("GET", "/readyz", "Readiness: the store is open and the scheduler runs; 503: not ready",
          lambda r: r.service.ready(), Done, public=True),
    Route("GET", "/stats", "Totals, and what was done since the start",
          lambda r: r.service.stats(), Stats, also="/api/stats"),
    Route("GET", "/data", "The records of all ingests, in one schema", show_data, DataPage,
          query=DataQuery, also="/api/data"),
    Route("GET", "/metrics", "Metrics for Prometheus", lambda r: r.service.metrics_text(), METRICS),
    Route("GET", "/openapi.json", "This description", show_openapi, "application/json"),
    Route("GET", "/docs", "This description, as a page", lambda r: docs(), HTML, also="/redoc"),
    Route("GET", "/api/admin/secrets", "The stored secrets, without their values",
          lambda r: r.operations.secrets(), SecretList),
    Route("POST", "/api/admin/secrets", "Store a secret", lambda r: r.operations.add_secret(r.body),
          SecretAnswer, body=SecretBody, example=SECRET_EXAMPLE, status=201),
    Route("GET", "/api/admin/secrets/{id}", "A stored secret, without its value",
          lambda r: r.operations.secret(r.id), SecretAnswer),
    Route("DELETE", "/api/admin/secrets/{id}", "Delete a secret that no running job uses",
          lambda r: r.operations.delete_secret(r.id), Done),
    Route("GET", "/api/jobs", "A page of jobs, by id",
          lambda r: r.operations.jobs(**r.query.model_dump()), JobList, query=JobsQuery),
    Route("POST", "/api/jobs", "Create a job, as in jobs.yaml or flat",
          lambda r: r.operations.create_job(r.body), JobDetail, body=JobSpec, example=JOB_EXAMPLE,
          status=201),
    Route("GET", "/api/jobs/{id}", "A job with its triggers and log", show_job, JobDetail,
          query=JobQuery),
    Route("PUT", "/api/jobs/{id}", "Change a job's name, interval or target",
          lambda r: r.operations.update_job(r.id, r.body.model_dump(exclude_unset=True)), JobDetail,
          body=JobChanges, example={"poll_interval_seconds": 300}),
    Route("DELETE", "/api/jobs/{id}", "Delete a job with its history",
          lambda r: r.operations.delete_job(r.id), Done),
    Route("POST", "/api/jobs/{id}/pause", "Stop checking a job",
          lambda r: r.operations.step_job(r.id, "pause"), JobDetail),
    Route("POST", "/api/jobs/{id}/resume", "Continue checking a paused job",
          lambda r: r.operations.step_job(r.id, "resume"), JobDetail),
    Route("POST", "/api/jobs/{id}/retry", "Re-arm a failed job",
          lambda r: r.operations.step_job(r.id, "retry"), JobDetail),
    Route("POST", "/api/jobs/{id}/check", "Check a job now, without waiting for its interval",
          lambda r: r.service.check_now(r.id), Done, status=202),
)  # fmt: skip


# ── OpenAPI ───────────────────────────────────────────────────────────────────────────────────


def content_of(*models: str) -> dict[str, Any]:
    """The content of a body or an answer that is one of these models."""
    forms = [{"$ref": f"#/components/schemas/{model}"} for model in models]
    return {"application/json": {"schema": {"anyOf": forms} if len(forms) > 1 else forms[0]}}


def operation(route: Route, path: str) -> dict[str, Any]:
    """A route in the words of OpenAPI 3.1. `default` is an error, or bad news in the same shape."""
    number = {"type": "integer", "minimum": 1, "description": "the number of it"}
    parameters = [{"name": "id", "in": "path", "required": True, "schema": number}]
    queries = route.query.model_json_schema()["properties"] if route.query else {}
    done: dict[str, Any] = {str(route.answer).partition(";")[0]: {"schema": {}}}
    errors = ["ErrorAnswer"]
    if not isinstance(route.answer, str):
        done = content_of(route.answer.__name__)
        done |= {"text/html": {"schema": {}}} if path == "/" else {}
        errors += [route.answer.__name__] * route.public
    late = {"202": {"description": "Under way", "content": content_of("Done")}}
    made: dict[str, Any] = {
        "summary": route.does,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "parameters": parameters * ("{id}" in path)
        + [{"name": name, "in": "query", "schema": schema} for name, schema in queries.items()],
        "responses": {
            str(route.status): {"description": "Done", "content": done},
            **(late if route.method != "GET" else {}),
            "default": {"description": "Not done", "content": content_of(*errors)},
        },
    }
    if route.public:
        made["security"] = []
    if route.body is not None:
        content = content_of("Job" if route.body is JobSpec else route.body.__name__)
        content["application/json"]["example"] = route.example
        made["requestBody"] = {"required": True, "content": content}
    return made


@cache
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document, made from ROUTES and the models."""
    inputs: set[Any] = {JobSpec, IngestSpec, FlatJob, JobChanges, SecretBody}
    answers = {r.answer for r in ROUTES if isinstance(r.answer, type)} | {ErrorAnswer}
    models = sorted(inputs | answers, key=attrgetter("__name__"))
    wanted: Any = [(m, "validation" if m in inputs else "serialization") for m in models]
    place = "#/components/schemas/{model}"
    _, schemas = models_json_schema(wanted, ref_template=place)
    forms = [{"$ref": place.format(model=name)} for name in ("JobSpec", "FlatJob", "IngestSpec")]
    schemas["$defs"]["Job"] = {"anyOf": forms, "description": "As in jobs.yaml, or flat."}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        for path in filter(None, (route.path, route.also)):
            paths.setdefault(path, {})[route.method.lower()] = operation(route, path)
    schemes = {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "TeckoChecker", "version": VERSION, "summary": "Admin surface"},
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": schemes},
        "security": [{"bearer": []}, {"basic": []}, {}],
    }


DOCS_SCRIPT = """
"use strict";
document.getElementById("url").textContent = location.origin;
async function send(form) {
  const {method, path} = form.dataset, headers = {}, query = new URLSearchParams();
  let target = path, body;
  for (const {name, value} of form.querySelectorAll("input, textarea")) {
    if (name === "body") { body = value; headers["Content-Type"] = "application/json"; }
    else if (name === "id") target = target.replace("{id}", encodeURIComponent(value));
    else if (value) query.set(name, value);
  }
  const token = document.getElementById("token").value;
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(`${target}?${query}`, {method, headers, body});
  return `${answer.status} ${answer.statusText}\\n${await answer.text()}`;
}
for (const form of document.forms) form.addEventListener("submit", async (event) => {
  event.preventDefault();
  form.lastElementChild.hidden = false;
  form.lastElementChild.textContent = await send(form).catch(String);
});
"""


def docs_section(method: str, path: str, described: Mapping[str, Any]) -> str:
    """A route of the page: what it does, its models, a curl line, and a form that sends it."""
    esc, method = html.escape, method.upper()
    names = dict.fromkeys(re.findall(r"schemas/(\w+)", json.dumps(described)))
    models = ", ".join(f'<a href="#{name}">{name}</a>' for name in names)
    curl = f'curl -X {method} "$URL{path.format(id=1)}"'
    fields = "".join(
        f'<p><label><code>{p["name"]}</code> <input name="{p["name"]}"> '
        f"{esc(p['schema']['description'])}</label></p>"
        for p in described["parameters"]
    )
    if body := described.get("requestBody"):
        example = body["content"]["application/json"]["example"]
        curl += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example)}'"
        text = esc(json.dumps(example, indent=1))
        fields += f'<p><label>Body <textarea name="body">{text}</textarea></label></p>'
    return f"""<section id="{described["operationId"]}"><h2><code>{method}</code> {esc(path)}</h2>
<p>{esc(described["summary"])}. Models: {models}</p><pre>{esc(curl)}</pre>
<form data-method="{method}" data-path="{esc(path)}">{fields}<button>Send {method}</button>
<pre hidden></pre></form></section>"""


def docs() -> str:
    """/docs: the OpenAPI document as a page, which loads nothing from other hosts. JavaScript is
    needed only to try a route."""
    api, esc, contents, sections = openapi(), html.escape, "", ""
    for path, ways in api["paths"].items():
        for method, way in ways.items():
            contents += f'<a href="#{way["operationId"]}">{method.upper()} {esc(path)}</a><br>'
            sections += docs_section(method, path, way)
    models = "".join(
        f'<h3 id="{name}">{name}</h3><p>{esc(schema.get("description", ""))}</p><details>'
        f"<summary>Schema</summary><pre>{esc(json.dumps(schema, indent=1))}</pre></details>"
        for name, schema in api["components"]["schemas"].items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TeckoChecker</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style></head><body><h1>TeckoChecker {VERSION}</h1>
<p>The same as <a href="/openapi.json">OpenAPI 3.1</a>. Where ADMIN_TOKEN is set, every route but
the health checks needs it: as the header <code>Authorization: Bearer ADMIN_TOKEN</code>, or as the
password of Basic authentication with any user name, which browsers ask for.</p>
<pre>URL=<span id="url">http://127.0.0.1:8000</span>
curl -H "Authorization: Bearer $ADMIN_TOKEN" "$URL/stats"</pre>
<p><label>Token for the forms below: <input id="token" type="password"></label></p>
<h2>Contents</h2><nav>{contents}<a href="#models">Models</a></nav>
{sections}<h2 id="models">Models</h2>{models}
<script>{DOCS_SCRIPT}</script></body></html>"""


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────
#
# asyncio reads and writes the sockets; the standard library's handler parses each request and
# formats each answer in memory. No client needs a thread, and no client delays another:
# - A head is accepted only if every parser reads it in the same way. A malformed one closes the
#   connection, so that the bytes behind it are not read as a request (RFC 9112, section 11.2).
# - A client that is slow to send a request or to take its answer has bounded time, and is dropped
#   first when there are too many connections. A client that waits for an answer is never dropped.
# - A change that has begun is carried out, even if its caller has gone. If it takes long, the
#   answer is 202 with the place to look, and not an error.
# - Three things decide who may call: Host (a name may point here by DNS rebinding, an address
#   cannot), Origin (the browser may add a password to requests of other sites' pages), the token.

HTTP_IDLE = 5.0  # s that a connection is kept between requests
HTTP_DEADLINE = 8.0  # s from a request's first byte to its last, and for its answer to be taken
HTTP_STOP = 1.5  # s for requests under way when the surface closes; 8 of the 10 s are the steps'
HTTP_HEAD = 1 << 16  # bytes before a request's body
HTTP_BODY = 1 << 20  # bytes of a request's body
READS_AT_ONCE = 2  # GETs worked on at once, so that checks take their turns at the event loop
ACCEPT_PAUSE = 1.0  # s after a connection that could not be accepted, for lack of descriptors

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
REQUEST_LINE = re.compile(rb"([!-~]+ [!-~]+ HTTP/\d\.\d)?\r\n")
FIELD_LINE = re.compile(rb"([\w!#$%&'*+.^`|~-]+:[\t -~\x80-\xff]*)?\r\n")  # RFC 9110, section 5.5
TARGET = re.compile(r"(?:(?i:https?)://([^/?#@]+))?(/[^?#]*)(?:\?([^#]*))?")  # host, path, query
SINGLE = ("Host", "Origin", "Content-Length", "Content-Type", "Authorization", "Sec-Fetch-Site")


STYLE_HASH, PAGE_HASH, DOCS_HASH = (  # as a Content-Security-Policy names inline ones
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in (PAGE_STYLE, PAGE_SCRIPT, DOCS_SCRIPT)
)
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Vary": "Accept, Origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; base-uri 'none';"
    f" script-src {PAGE_HASH} {DOCS_HASH}; style-src {STYLE_HASH};"
    " form-action 'none'; frame-ancestors 'none'",
}
CORS_HEADERS = {  # for pages of the origins that CORS_ORIGINS names
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Expose-Headers": "X-Request-ID, X-Error-Code, Retry-After",
}


async def read_head(reader: Reader, begun: bytes) -> bytes:
    """Read a request's head, whose first byte is `begun`. Each line is checked as it arrives: bare
    CR or LF, folded lines, control characters and invalid names are refused."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        try:
            line, begun = begun + await reader.readuntil(b"\n"), b""
        except asyncio.LimitOverrunError:
            line = b"x" * HTTP_HEAD
        if len(head) + len(line) > HTTP_HEAD:
            raise Refused(431, f"a head has at most {HTTP_HEAD} bytes")
        if not (FIELD_LINE if head else REQUEST_LINE).fullmatch(line):
            raise Refused(400, "malformed line; lines are ASCII, end in CR LF, and are not folded")
        head = (head + line).lstrip(b"\r\n")  # left over from the body before (RFC 9112, 2.2)
    return head


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request and its answer, both in memory."""

    protocol_version = "HTTP/1.1"
    wfile: io.BytesIO
    command, request_version, requestline = "", "HTTP/1.1", ""
    path = query = host = ""
    close_connection, length = True, 0

    def __init__(self) -> None:
        self.request_id, self.wfile = uuid.uuid4().hex, io.BytesIO()
        self.more_headers: dict[str, str] = {}  # of the answer

    def read(self, head: bytes) -> None:
        """Parse the head. Raises Refused if it could be read in two ways."""
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        self.parse_request()
        if not self.request_version.startswith("HTTP/1."):
            raise Refused(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        if twice := [name for name in SINGLE if len(self.headers.get_all(name, [])) > 1]:
            raise Refused(400, f"duplicate header {twice[0]}")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "a body needs a Content-Length; chunks are not accepted")
        length = self.header("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(400, "Content-Length must be a number")
        if int(length) > HTTP_BODY:
            raise Refused(413, f"a body has at most {HTTP_BODY} bytes")
        self.host, target = self.header("Host"), TARGET.fullmatch(self.path)
        if target is None or (target[1] or self.host).lower() != self.host.lower():
            raise Refused(400, "the target must be a path of the host that Host names")
        self.length, self.path, self.query = int(length), target[2], target[3] or ""
        self.close_connection |= self.request_version == "HTTP/1.0"
        self.close_connection |= "close" in self.header("Connection").lower()

    def header(self, name: str, default: str = "") -> str:
        return str(self.headers.get(name, default)).strip(" \t")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class calls this for another version of HTTP, or for too many headers."""
        raise Refused(code, message or "malformed request")

    def version_string(self) -> str:
        return f"TeckoChecker/{VERSION}"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("request %s: %s", self.request_id, format % args)

    def given_token(self) -> bytes:
        """The token of a Bearer header, or the password of a Basic one with any user name."""
        scheme, _, value = self.header("Authorization").partition(" ")
        raw = value.strip().encode("latin-1")  # as http.client decoded it
        with contextlib.suppress(ValueError):
            if scheme.lower() == "basic":
                return base64.b64decode(raw, validate=True).partition(b":")[2]
        return raw if scheme.lower() == "bearer" else b""

    def answer_with(self, route: Route, status: int, answer: Any) -> None:
        bad = isinstance(answer, Health) and answer.status == "unhealthy"
        bad |= isinstance(answer, Done) and not answer.success
        text = answer if isinstance(answer, str) else answer.model_dump_json()
        kind = HTML if isinstance(answer, str) else "application/json"
        kind = route.answer if isinstance(route.answer, str) else kind
        self.answer(503 if bad else status, kind, text)

    def answer(self, status: int, kind: str, text: str) -> None:
        data, self.wfile = text.encode(), io.BytesIO()
        self.close_connection |= status >= 500
        self.request_version = "HTTP/1.1"  # the base class answers HTTP/0.9 without a head
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data))}
        headers |= {"X-Request-ID": self.request_id} | SECURITY_HEADERS | self.more_headers
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 401:  # with Basic, a browser asks for the token
            self.send_header("WWW-Authenticate", "Bearer")
            self.send_header("WWW-Authenticate", 'Basic realm="TeckoChecker", charset="UTF-8"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, error: TeckoError) -> None:
        self.more_headers["X-Error-Code"] = str(error.code)
        self.more_headers |= error.headers if isinstance(error, Refused) else {}
        name, detail = ERROR_NAMES.get(error.code), str(error)
        if isinstance(error, (StoreError, SecretError)):  # its words name files of this machine
            log.error("request %s: %s", self.request_id, error)
            detail = f"{name}; see the log for request ID {self.request_id}"
        wrong = error.problems if isinstance(error, Invalid) else []
        shown = ErrorAnswer(
            error=name or re.sub(r"\W+", "_", HTTPStatus(error.http_status).phrase.lower()),
            detail=detail,
            code=error.code,
            request_id=self.request_id,
            message="Request validation failed" if isinstance(error, Invalid) else None,
            details=[{"field": p.where, "message": p.text} for p in wrong if p.where] or None,
        )
        text = shown.model_dump_json(exclude_none=True)
        self.answer(error.http_status, "application/json", text)


def bare_host(host: str) -> str:
    """A Host header, or an entry of ADMIN_HOSTS: in lower case, without port and final dot."""
    return re.sub(r"\.?(:\d*)?$", "", host.strip().lower())


def same_place(origin: str, host: str) -> bool:
    """Whether a page's origin is the host that it calls. A proxy may have ended the TLS, so the
    scheme and the default ports 80 and 443 are ignored."""
    found = re.fullmatch(r"https?://(.+?)(?::(?:80|443))?", origin)
    return found is not None and found[1] == re.sub(":(80|443)$", "", host.lower())


class Admin:
    """The admin surface: connections, access control, and running the routes."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        # connections on which we wait for the client, longest first; True: until it takes an answer
        self._waiting: dict[asyncio.StreamWriter, bool] = {}
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._work: set[asyncio.Task[Any]] = set()  # changes go on after their 202
        self._stopping = False
        self._hurry = asyncio.get_running_loop().create_future()  # done: answer 202 at once
        service.connections = lambda: len(self._connections)

    async def listen(self, listener: socket.socket) -> None:
        """Accept connections, until cancelled."""
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                streams = await asyncio.open_connection(sock=connection, limit=HTTP_HEAD)
                self._connections[streams[1]] = asyncio.create_task(self._serve(*streams))
            except Exception as e:  # mostly a lack of descriptors; nothing may end this loop
                log.warning("cannot accept a connection: %s", e)
                await asyncio.sleep(ACCEPT_PAUSE)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        """Serve one connection until a side closes it. Above the limit, requests are still read,
        for they may ask for health; above twice the limit, the connection is dropped."""
        most = self.service.settings.api_max_connections
        while len(self._connections) > most and self._waiting:
            self._drop(next(iter(self._waiting)))
        spare, full = len(self._connections) > most, len(self._connections) > 2 * most
        writer.transport.set_write_buffer_limits(0)  # so that drain() waits for all of it
        try:
            while not (full or self._stopping) and await self._exchange(reader, writer, spare):
                pass
        except (OSError, EOFError) as e:  # TimeoutError is an OSError
            log.debug("a connection ended: %r", e)
        except Exception:
            log.exception("a connection failed")
        finally:
            self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._connections.pop(writer, None)
        self._waiting.pop(writer, None)
        writer.transport.abort()

    async def _exchange(self, reader: Reader, writer: Writer, spare: bool) -> bool:
        """Serve one request; True if another may follow on the connection."""
        exchange, body = Exchange(), b""
        self._waiting[writer] = False
        try:
            async with asyncio.timeout(HTTP_IDLE) as limit:
                first = await reader.readexactly(1)
                limit.reschedule(asyncio.get_running_loop().time() + HTTP_DEADLINE)
                exchange.read(await read_head(reader, first))
                writer.write(exchange.wfile.getvalue())  # 100 Continue, where it was asked for
                body = await reader.readexactly(exchange.length)
        except Refused as e:  # what follows on the connection cannot be told from its body
            exchange.close_connection = True
            exchange.refuse(e)
        else:
            if writer not in self._waiting:
                return False  # it was dropped just before its last byte was seen
            del self._waiting[writer]
            await self._respond(exchange, body, spare)
        self._waiting[writer] = True
        async with asyncio.timeout(HTTP_DEADLINE):
            writer.write(exchange.wfile.getvalue())
            await writer.drain()
            self._waiting[writer] = False
            if exchange.close_connection and not self._stopping:
                writer.write_eof()  # to close at once could lose the answer (RFC 9112, 9.6)
                while await reader.read(HTTP_HEAD):
                    pass
        return not exchange.close_connection

    async def _respond(self, exchange: Exchange, body: bytes, spare: bool) -> None:
        """Answer a complete request, whatever happens."""
        try:
            found = {r.method: r for r in ROUTES if r.match(exchange.path) is not None}
            public = any(route.public for route in found.values())
            if spare and not public:
                raise Refused(503, "too many connections", headers={"Retry-After": "1"})
            here = self._check_host(exchange, public)
            if self._check_origin(exchange) and exchange.command == "OPTIONS":
                exchange.answer(200, "text/plain", "")  # the browser asks whether it may ask
                return
            token, given = self.service.settings.admin_token, exchange.given_token()
            knows = token is None or hmac.compare_digest(given, os.fsencode(token.reveal()))
            if not (here and knows) and not public:
                raise Refused(401, "this needs ADMIN_TOKEN, as Bearer token or as Basic password")
            route = self._route(exchange, found)
            request = self._request(exchange, route, body, here and knows)
            status, answer = await self._run_route(route, request)
            exchange.close_connection |= self._stopping
            exchange.answer_with(route, status, answer)
        except TeckoError as e:
            exchange.refuse(e)
        except Exception:
            log.exception("request %s: internal error", exchange.request_id)
            said = f"internal error; see the log for request ID {exchange.request_id}"
            exchange.refuse(Refused(500, said))

    def _check_host(self, exchange: Exchange, public: bool) -> bool:
        """Whether Host names this machine. Raises Refused if not, except on public routes."""
        name, s = bare_host(exchange.host), self.service.settings
        bound = self.url.removeprefix("http://")
        ours = ["localhost", bound, socket.gethostname(), *s.admin_hosts.split(",")]
        address = re.fullmatch(r"\[[0-9a-f:.]+\]|[0-9.]+", name)
        known = bool(address or (name and name in map(bare_host, ours)))
        if not known and not public:
            given = repr_excerpt(exchange.host)
            raise Refused(421, f"Host header {given} is not allowed; add it to ADMIN_HOSTS")
        return known

    def _check_origin(self, exchange: Exchange) -> bool:
        """Whether a page of CORS_ORIGINS calls. Raises Refused for pages of other hosts."""
        named = re.findall(ORIGIN, self.service.settings.cors_origins.lower())
        origin = exchange.header("Origin").lower()
        if origin in named:
            exchange.more_headers |= CORS_HEADERS | {"Access-Control-Allow-Origin": origin}
            return True
        if "Origin" in exchange.headers and not same_place(origin, exchange.host):
            given = repr_excerpt(origin)
            raise Refused(403, f"Origin {given} is not allowed; add it to CORS_ORIGINS")
        elsewhere = exchange.header("Sec-Fetch-Site").lower() == "cross-site"
        if elsewhere and exchange.command not in ("GET", "HEAD"):
            raise Refused(403, "pages of other sites may change nothing here")
        return False

    def _route(self, exchange: Exchange, found: dict[str, Route]) -> Route:
        if not found:
            said = f"there is no {repr_excerpt(exchange.path)} here; /docs lists the routes"
            raise Refused(404, said)
        found |= {"HEAD": found["GET"]} if "GET" in found else {}
        if exchange.command not in found:
            allowed = ", ".join(sorted(found))
            raise Refused(405, f"allowed: {allowed}", headers={"Allow": allowed})
        return found[exchange.command]

    def _request(self, exchange: Exchange, route: Route, body: bytes, trusted: bool) -> Request:
        """Validate what the route declares. Raises Invalid and Refused."""
        ref, query, data = route.match(exchange.path) or "", None, None
        if "{id}" in route.path and not re.fullmatch("[0-9]{1,18}", ref):
            said = f"must be a number; GET {route.path.partition('/{id}')[0]} lists them"
            raise Invalid([Problem("id", said)])
        if route.query:
            given = parse_qs(exchange.query, keep_blank_values=True)
            query = parse(route.query, {name: values[-1] for name, values in given.items()})
        if route.body:
            if exchange.headers.get_content_type() != "application/json":
                raise Refused(415, "the body must be application/json")
            try:  # it refuses NaN, infinite numbers and lone surrogates, which json would take
                given = orjson.loads(body)
            except orjson.JSONDecodeError as e:
                raise Invalid([Problem("body", f"it is not JSON: {e}")]) from None
            read = job_spec if route.body is JobSpec else partial(parse, route.body)
            data = read(given, self.service.settings.job_context)
        more = exchange.request_id, trusted, exchange.header("Accept"), self.service.operations
        return Request(self.service, ref, query, data, *more)

    async def _run_route(self, route: Route, request: Request) -> tuple[int, Any]:
        """The status and the answer of a route. A change that takes longer than HTTP_ANSWER seconds
        goes on, since half of one would be worse, and is answered 202 with where to look."""
        reads = route.method == "GET" and not route.public  # health waits for nobody

        async def run() -> Any:
            ACTOR.set(f"HTTP {request.request_id}")
            try:
                async with self._reads if reads else contextlib.nullcontext():
                    answer = route.run(request)
                    return await answer if isinstance(answer, Awaitable) else answer
            finally:
                if route.method != "GET":
                    self.service.stale = True

        work = asyncio.create_task(run(), name=f"request {request.request_id}")
        self._work.add(work)  # what fails after its 202 is logged by asyncio, under that name
        work.add_done_callback(self._work.discard)
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({work, self._hurry}, timeout=HTTP_ANSWER, return_when=first)
        if work.done() and not work.cancelled():
            return route.status, work.result()
        if route.method == "GET":
            work.cancel()
            raise Refused(503, "no answer in time", headers={"Retry-After": "5"})
        place = route.path.partition("/{id}")[0] + (f"/{request.id}" if request.id else "")
        said = f"still being carried out; GET {place} shows the outcome"
        return 202, Done(success=True, message=said)

    async def stop(self) -> None:
        """Take no new requests, and wait for those under way. Changes that take longer are answered
        202, and go on while the service drains."""
        self._stopping = True
        for writer in [w for w, answering in self._waiting.items() if not answering]:
            self._drop(writer)
        for share in (0.8, 0.2):
            if under_way := {*self._connections.values(), *self._work}:
                await asyncio.wait(under_way, timeout=share * HTTP_STOP)
            if not self._hurry.done():
                self._hurry.set_result(None)
        for writer in list(self._connections):
            self._drop(writer)


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Admin]:
    """The admin surface, for as long as the context lasts."""
    host, port = service.settings.api_host, service.settings.api_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as e:
        why = str(e.strerror).partition(" (while")[0]
        hint = "API_HOST and API_PORT, or admin: in jobs.yaml, choose another one"
        raise Conflict(f"cannot listen on {host}:{port}: {why}", hint=hint) from e
    with sock:
        sock.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        admin = Admin(service, f"http://{shown}:{sock.getsockname()[1]}")
        accepting = asyncio.create_task(admin.listen(sock))
        try:
            yield admin
        finally:
            accepting.cancel()
            await asyncio.wait({accepting})
            sock.close()
            await admin.stop()


# ── Output ────────────────────────────────────────────────────────────────────────────────────


class JsonLines(logging.Formatter):
    """One JSON object a line, for what collects logs; `extra={"job": name}` names the job."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line = {
            "timestamp": at.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "job": getattr(record, "job", None),
            "traceback": record.exc_text,
        }
        return json.dumps({key: value for key, value in line.items() if value is not None})


class LogFile(logging.handlers.RotatingFileHandler, logging.handlers.WatchedFileHandler):
    """LOG_FILE. A new file is begun at LOG_BYTES, or when another program has moved the old one. A
    failure to write it is reported once."""

    dev = ino = -1  # of the open file, for `reopenIfNeeded`
    failed = False

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        self.reopenIfNeeded()
        return bool(super().shouldRollover(record))

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            say(f"teckochecker: cannot write the log file: {sys.exc_info()[1]}")


def set_up_logging(settings: Settings, level: str, *, to_file: bool = True) -> None:
    """Log to stderr, and to LOG_FILE if it is set; every handler redacts."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if to_file and (file := settings.log_file) is not None:
        handlers.append(LogFile(file, maxBytes=LOG_BYTES, backupCount=5, encoding="utf-8"))
    text = logging.Formatter("%(asctime)s %(levelname)-8s %(message)s")
    for handler in handlers:
        handler.setFormatter(JsonLines() if settings.log_format == "json" else text)
        handler.addFilter(RedactingFilter())
    logging.raiseExceptions = False  # a stderr that nobody reads is no reason for a traceback
    logging.basicConfig(handlers=handlers, level="WARNING", force=True)  # libraries say too much
    log.setLevel(level)


def open_streams() -> None:
    """Open /dev/null for each standard stream that was closed: otherwise the next file to be
    opened, like the database, would become one. Characters that an encoding lacks are escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams(code: int) -> int:
    """Flush stdout and stderr; the exit code. If the interpreter flushed them at its end, a failure
    would give exit code 120 and a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout:
                code = code or 1
                if not isinstance(e, BrokenPipeError):  # `... | head` is no fault
                    say(f"teckochecker: cannot write to stdout: {e.strerror}")
    return code


def say(text: str) -> None:
    """Print a message on stderr, for stdout is for results. It is lost if nobody reads stderr."""
    with contextlib.suppress(OSError):
        print(redact(text), file=sys.stderr)


def when(at: float, now: float) -> str:
    text = duration_text(abs(at - now))
    return "now" if abs(at - now) < 1 else f"in {text}" if at > now else f"{text} ago"


GAP = 2  # blanks between two columns
SIGNS = {  # of states on a terminal, with the numbers of ANSI colours
    "active": ("●", 36),
    "triggering": ("▶", 36),
    "triggered": ("▶", 36),
    "paused": ("○", 35),
    "completed": ("✓", 32),
    "completed_with_failures": ("!", 33),
    "failed": ("✗", 31),
}
ISO_TIME = re.compile(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d):\d\dZ")


class Table(NamedTuple):
    """Rows under a header. Where a terminal is too narrow, the columns at the indexes in `spare`
    are left out, in that order."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    spare: Sequence[int] = ()


def fit_columns(columns: Sequence[Sequence[str]], spare: Iterable[int], room: int) -> list[int]:
    """The width of each column, 0 if it is left out: first that of its longest word, up to 40, then
    what is left to the narrow ones first."""
    widths = [min(max(map(len, " ".join(column).split(" "))), 40) for column in columns]

    def left() -> int:
        return room + GAP - sum(width + GAP for width in widths if width)

    for i in spare:
        widths[i] = widths[i] if left() >= 0 else 0
    while left() < 0:
        widths[widths.index(max(widths))] -= 1
    for whole, i in sorted((max(map(len, column)), i) for i, column in enumerate(columns)):
        widths[i] += min(whole - widths[i], left()) if widths[i] else 0
    return widths


def print_table(table: Table) -> None:
    """Print a table. On a terminal times are short, and it is made to fit: columns are left out,
    then cells wrap between words, then within words. Else each row is whole on one line."""
    terminal, lines = sys.stdout.isatty(), []
    colours = {f"{sign} {state}": colour for state, (sign, colour) in SIGNS.items()}
    for row in (table.columns, *table.rows):
        texts = ["-" if v in (None, "") else CONTROL.sub(" ", redact(str(v))) for v in row]
        if terminal:
            signed = (f"{SIGNS[t][0]} {t}" if t in SIGNS else t for t in texts)
            texts = [ISO_TIME.sub(r"\1 \2", t) for t in signed]
        lines.append(texts)
    room = shutil.get_terminal_size().columns if terminal else sys.maxsize
    widths = fit_columns([*zip(*lines, strict=True)], table.spare, room)
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        colours = {}
    for line in lines:
        shown = [(text, width) for text, width in zip(line, widths, strict=True) if width]
        cells = [textwrap.wrap(text, width, break_on_hyphens=False) for text, width in shown]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = [
                f"\x1b[{colours[part]}m{part:{width}}\x1b[0m"
                if part in colours
                else f"{part:{width}}"
                for part, (_, width) in zip(parts, shown, strict=True)
            ]
            print((" " * GAP).join(padded).rstrip())


def redacted(value: Any) -> Any:
    """A document with all secret values removed from its strings; keys and numbers are kept."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def as_document(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


Args = argparse.Namespace
Work = Callable[..., Awaitable[T]]


def table_of(rows: Iterable[Any], columns: str, *spare: int) -> Table:
    """A table of the fields of these answers that `columns` names."""
    keys = columns.split()
    cells = [[document[key] for key in keys] for document in map(as_document, rows)]
    return Table([key.replace("_", " ").capitalize() for key in keys], cells, spare)


def as_written(value: object) -> str:
    """A value of a document, as it could stand in jobs.yaml."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_written(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_document(
    document: Mapping[str, Any], head: Sequence[str], tables: Mapping[str, tuple[Any, ...]]
) -> Iterator[str | Table]:
    """A document as a table of its fields, and one more for each list that `tables` names."""
    facts = {k: v for k, v in document.items() if k not in tables and v not in (None, {})}
    yield Table(head, [(key.replace("_", " "), as_written(v)) for key, v in facts.items()])
    for name, (columns, *spare) in tables.items():
        if rows := document[name]:
            yield from ("", table_of(rows, columns, *spare))


def report(args: Args, document: Any, *shown: str | Table, good: bool = True) -> int:
    """Print a result on stdout: with --json one JSON document, else `shown`. The exit code."""
    if args.json:
        print(json.dumps(redacted(as_document(document)), indent=2))
        return int(not good)
    for item in shown:
        if isinstance(item, Table):
            print_table(item)
        else:
            print(redact(item))
    return int(not good)


def print_error(error: TeckoError, args: Args | None = None) -> None:
    """Print an error and its hint, a line each, with the line of the file that it is about; with
    --json also a JSON document on stdout."""
    problems = error.problems if isinstance(error, Invalid) else [Problem("", str(error))]
    for problem in problems:
        place, column = f"{problem.file}:{problem.line}:", problem.column
        exact = f"{place}{column}:" if column else place
        say(f"teckochecker: {str(problem).replace(place, exact, 1)}")
        line = CONTROL.sub(" ", problem.source)
        if line.strip() and column:
            say(f"{problem.line:>5} | {line}\n{'':5} | {' ' * (column - 1)}^")
    if error.hint:
        say(f"hint: {error.hint}")
    if args is None or not args.json:
        return
    wanted = ("file", "line", "column", "where", "found", "allowed")
    errors = [{name: getattr(problem, name) for name in wanted} for problem in problems]
    document: Any = {"valid": False, "errors": errors}
    if args.command != "validate":
        document = {"error": ERROR_NAMES.get(error.code, "error"), "detail": str(error)}
        document |= {"hint": error.hint or None, "errors": errors}
    with contextlib.suppress(OSError):  # that stdout takes nothing is told when it is closed
        report(args, document)


def prompt_line(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def prompt_or_exit(prompt: Callable[[], T], nothing: str) -> T:
    """A person's input. Ctrl-C and Ctrl-D print `nothing` and end the program."""
    try:
        return prompt()
    except (KeyboardInterrupt, EOFError) as e:
        say(f"\n{nothing}")
        raise SystemExit(130 if isinstance(e, KeyboardInterrupt) else 1) from None


def confirm(args: Args, question: str) -> None:
    """Ask before deleting, and end the program unless it is a yes. --force answers it."""
    if args.force:
        return
    if not sys.stdin.isatty():
        raise Conflict("without a terminal to ask on, nothing is deleted", hint="add --force")
    answer = prompt_or_exit(partial(prompt_line, f"{redact(question)} [y/N]: "), "nothing deleted")
    if answer.strip().lower() not in ("y", "yes"):
        say("nothing deleted")
        raise SystemExit(1)


# ── Commands ──────────────────────────────────────────────────────────────────────────────────

START_WAIT = 30.0  # s that a start waits for a `check` to end, and a `check` for a service to be up
CHECK_WAIT = 60.0  # s within which a service makes a check that it was asked for
FOLLOW_SECONDS = 0.2  # s between looks at what goes on elsewhere


def config_of(args: Args) -> Config:
    path = args.config or Path("jobs.yaml")
    needed = args.config is not None and args.command != "init"
    return load_config(path, os.environ, must_exist=needed)


def config_despite_mistakes(args: Args) -> Config:
    """The configuration, for commands that must work while jobs.yaml has a mistake: then defaults,
    with the database that jobs.yaml names, if that can be read."""
    path = args.config or Path("jobs.yaml")
    try:
        return config_of(args)
    except Invalid:
        if not path.is_file():
            raise
    text = path.read_bytes().decode(errors="replace")
    named = re.search(r"""^database: *["']?([^"'#\n]*[^"'#\s])""", text, re.MULTILINE)
    env = {"DATABASE_URL": named[1]} if named else {}
    env |= read_dot_env(path.absolute().parent / ".env")[0] | os.environ
    return replace(load_config(path.with_name(".no-jobs.yaml"), env), path=path)


def require_jobs(config: Config, *, or_store: bool = True) -> None:
    """Refuse to work without a jobs.yaml, or a database: a wrong folder would get a new one."""
    if not config.path.exists() and not (or_store and config.settings.has_store):
        text = f"no {config.path.name} in {config.base}"
        raise Invalid([text], hint=f"{COMMAND} init writes one")


def run_operation(config: Config, work: Work[T], *given: Any, mode: str = "change") -> T:
    """Run an operation in an event loop of its own, and return its result. With the mode `look` it
    may only read, and no key is needed; `peek`: if no database is there, it reads an empty one;
    `make`: one is made."""
    settings, vault = config.settings, Vault(config.settings)
    if mode == "peek" and not settings.has_store:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings.model_copy(update={"database": Path(folder) / "empty.db"})
            asyncio.run(Store(settings.store).touch())
            return run_operation(replace(config, settings=settings), work, *given, mode="look")
    there = mode == "make" or settings.has_store

    async def asking() -> T:
        read_only = mode in ("look", "peek") or not there  # then it says that there is no database
        async with Store(settings.store, read_only=read_only) as store:
            return await work(Operations(store, vault, lambda: config), *given)

    if there and mode in ("change", "make"):
        vault.load(required=False)
    return asyncio.run(asking())


def cmd_validate(args: Args, config: Config) -> int:
    """Report everything that `start` would refuse, secrets that do not decrypt, and what would
    change; with --online also ask each upstream."""
    require_jobs(config, or_store=False)
    for warning in config.warnings:
        say(f"warning: {warning}")
    jobs = config.jobs or []

    async def look(operations: Operations) -> tuple[list[str], list[str], list[Finding]]:
        store = operations.store
        problems = await every_problem(config, store, Vault(config.settings), thorough=True)
        if problems:
            pattern = r"(?:no secret '|secret '(?=[^']+': the environ))(.+?)'"
            lost = re.search(pattern, "\n".join(map(str, problems)))
            add = f"{COMMAND} secret add --name {lost[1] if lost else ''} --type openai|keboola|api"
            raise Invalid(problems, hint=add if lost else "")
        findings = list[Finding]()
        if args.online:
            async with make_steps(config, store) as steps:
                findings = await examine(steps, jobs)
        return await store.names("secrets"), await describe_plan(jobs, store), findings

    stored, changes, findings = run_operation(config, look, mode="peek")
    names = sorted({*config.secrets, *stored})
    head = {"valid": True, "jobs": [job.name for job in jobs], "secrets": names, "changes": changes}
    text = f"{config.path} is good: {count_of(len(jobs), 'job')}, {count_of(len(names), 'secret')}"
    return report_findings(args, head, "online", findings, text, *changes)


def report_findings(args: Args, head: Any, name: str, found: list[Finding], *said: str) -> int:
    document = head | {name: [f._asdict() for f in found]}
    lines = [f"{'good' if f.good else 'BAD '}  {f.subject}: {f.said}" for f in found]
    return report(args, document, *said, *lines, good=all(f.good for f in found))


def cmd_alert_test(args: Args, config: Config) -> int:
    """Send a message to each target, and report which ones were reached."""
    if not config.alerts:
        raise Conflict(f"{config.path} names nobody to tell", hint="`alerts:` does, see README.md")

    async def tell(operations: Operations) -> list[Finding]:
        async with make_steps(config, operations.store) as steps:
            steps.vault.load(required=False)
            return await Alerts(steps).test()

    return report_findings(args, {}, "targets", run_operation(config, tell, mode="make"))


def cmd_start(args: Args, config: Config) -> int:
    database = config.settings.database
    require_jobs(config)
    if args.daemon:
        return start_daemon(args, config)
    waiting = RunLock(database, "start", wait=START_WAIT)
    with waiting as lock, contextlib.suppress(asyncio.CancelledError):
        ensure_usable_database(config.settings, time.time())
        asyncio.run(serve(config, lambda: config_of(args), lock))
    return 0


def report_reserve(lock: RunLock) -> Iterator[None]:
    """Report each second that this node waits in reserve, because another node works on the
    database. systemd and `start --daemon` take that for a successful start."""
    said = "in reserve: another node works on this database"
    lock.write("", time.time())
    log.warning(said)
    while True:
        notify("READY=1", "WATCHDOG=1", f"STATUS={said}")
        yield


def not_beside_another() -> None:
    raise Conflict("a TeckoChecker of another host works on this database", hint="ask it there")


async def serve(config: Config, load: Callable[[], Config], lock: RunLock) -> None:
    """Run the service until SIGTERM or SIGINT. During the start, these cancel it."""
    loop, starting = asyncio.get_running_loop(), cast(asyncio.Task[None], asyncio.current_task())
    reload = asyncio.Event()  # may be set before there is a service to reload
    ends = (signal.SIGTERM, signal.SIGINT)
    for number in ends:
        loop.add_signal_handler(number, starting.cancel)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    waits = partial(next, report_reserve(lock))
    async with make_service(config, load, in_reserve=waits) as service:
        service.lock, service.reload = lock, reload
        for number in ends:
            loop.add_signal_handler(number, service.stop.set)
        async with serving(service) as admin:
            lock.write(admin.url, service.started_at)
            where = f"admin surface at {admin.url}"
            log.info("TeckoChecker %s, pid %s, %s", VERSION, os.getpid(), where)
            notify("READY=1", f"STATUS={where}")
            await service.stop.wait()
            notify("STOPPING=1")
            log.info("stopping")


def start_daemon(args: Args, config: Config) -> int:
    """Start this program in a session of its own, and wait until it works or is in reserve. If it
    ends before, its last message is the reason."""
    database = config.settings.database
    log_file = config.settings.log_file or database.with_suffix(".log")
    options = ["-v"] * args.verbose + ["-q"] * args.quiet
    options += ["-c", str(args.config)] if args.config else []
    env = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    child = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *options, "start"],
        env=env | {"LOG_FILE": str(log_file)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                lines = child.communicate(timeout=0.05)[1].splitlines()
            found = holder(database)
            if found is not None and found.pid == child.pid and found.started_at:
                document = {"running": True, "pid": child.pid, "log": str(log_file)}
                return report(args, document, f"started, pid {child.pid}; the log is {log_file}")
    except KeyboardInterrupt:  # or SIGTERM: whoever gives up waiting leaves no service behind
        child.terminate()
        child.wait()
        raise
    told = [line for line in lines if line.startswith("teckochecker: ")] or lines or [""]
    why = told[-1].removeprefix("teckochecker: ") or f"it ended with {child.returncode}"
    raise TeckoError(f"the service did not start: {why}", hint=f"the log is {log_file}")


def signal_holder(config: Config, number: signal.Signals) -> Holder:
    """Send a signal to the process that holds the lock, and return that."""
    found = holder(config.settings.database)
    if found is None:
        raise Conflict(f"no TeckoChecker runs on this database, {config.settings.database}")
    if not found.pid:
        text = "the TeckoChecker on this database is just starting, or in another container"
        raise Conflict(text, hint="try again in a second, or from inside of that container")
    try:
        os.kill(found.pid, number)
    except PermissionError:
        raise Conflict(f"pid {found.pid} belongs to another user, who has to do this") from None
    return found


def cmd_stop(args: Args, config: Config) -> int:
    stopped = signal_holder(config, signal.SIGTERM)
    until = time.monotonic() + DRAIN_SECONDS + 7  # the service's own 10 s, and some for the machine
    while (found := holder(config.settings.database)) and found.pid == stopped.pid:
        if time.monotonic() > until:
            raise Conflict(f"pid {stopped.pid} has not ended yet", hint="look at its log")
        time.sleep(0.05)
    return report(args, {"stopped": stopped.pid}, f"stopped, pid {stopped.pid}")


def cmd_reload(args: Args, config: Config) -> int:
    """Have the running service read its configuration again, and report the result."""
    if (found := service_of(config)) is None:
        raise Conflict("no service runs on this database", hint="each start reads jobs.yaml")
    ask = partial(ask_service, found.address, "GET", "/health", config.settings)
    before, until = ask()["config_last_reload_at"], time.monotonic() + START_WAIT
    while iso(time.time()) == before:  # which counts whole seconds
        time.sleep(0.05)
    signal_holder(config, signal.SIGHUP)
    while (health := ask())["config_last_reload_at"] == before:
        if time.monotonic() > until:
            raise Conflict(f"pid {found.pid} has not read it yet", hint="look at its log")
        time.sleep(0.05)
    if not health["config_last_reload_successful"]:
        why = str(health["config_last_reload_error"] or "see its log")
        raise Invalid(why.splitlines(), hint="the service goes on with what it had")
    document = {"reloaded": True, "at": health["config_last_reload_at"]}
    return report(args, document, f"the service has read {config.path} again")


def service_of(config: Config) -> Holder | None:
    """The service that works on the database, once it can be asked; None: there is none."""
    database, until = config.settings.database, time.monotonic() + START_WAIT
    while (found := holder(database)) and found.command == "start":
        if found.address:
            return found
        if not os.access(lock_path(database), os.R_OK):
            raise Conflict(f"pid {found.pid} belongs to another user, who has to do this")
        if found.started_at:
            said = f"the TeckoChecker here, pid {found.pid}, is in reserve: another node works"
            raise Conflict(f"{said} on this database", hint="ask it there")
        if time.monotonic() > until:
            raise Conflict(f"TeckoChecker, pid {found.pid}, starts or ends, and cannot be asked")
        time.sleep(0.1)
    return None


def ask_service(address: str, method: str, path: str, settings: Settings) -> Any:
    """The running service's answer. Raises Conflict with its own words."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=HTTP_DEADLINE)
    token = settings.admin_token
    headers = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        document = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise Conflict(f"the service at {address} does not answer: {e}") from e
    finally:
        connection.close()
    if answer.status >= 300 and path != "/health":  # which says 503 of itself
        hint = "set ADMIN_TOKEN as the service has it" if answer.status == 401 else ""
        raise Conflict(f"the service says {answer.status}: {document.get('detail')}", hint=hint)
    return document


def cmd_status(args: Args, config: Config) -> int:
    now, settings, found = time.time(), config.settings, holder(config.settings.database)

    async def look(operations: Operations) -> Any:
        counts, due = (await operations.store.counts())["jobs"], await operations.store.due_next(5)
        return counts, due, await operations.store.attention(10)

    counts, due, needs = run_operation(config, look, mode="peek")
    needs += refused_reload(found.address, settings) if found and found.address else []
    up = round(now - found.started_at, 1) if found and found.started_at else None
    does = "not running"
    if found is not None:
        does = "running" if found.command == "start" else f"not running; a {found.command} is"
        does = "in reserve" if up is not None and not found.address else does
        does += f", pid {found.pid or 'unknown'}, for {duration_text(up or 0.0)}"
    document = {
        "running": found is not None and found.command == "start",
        "command": found.command if found else None,
        "pid": found.pid if found else None,
        "uptime_seconds": up,
        "admin": (found.address or None) if found else None,
        "database": settings.shown_store + " (not there yet)" * (not settings.has_store),
        "jobs": counts,
        "due_next": [{"job": name, "next_check_at": iso(at)} for name, at in due],
        "attention": needs,
    }
    tables = {"due_next": ("job next_check_at",), "attention": ("job what reason", 1)}
    shown = {name: document[name] for name in ("admin", "database", "jobs", *tables)}
    return report(args, document, *show_document(shown, ("service", does), tables))


def cmd_stats(args: Args, config: Config) -> int:
    rows = [*map(as_document, run_operation(config, Operations.history, args.days, mode="look"))]
    columns = "day checks triggers done_to_post_ms records"
    return report(args, {"history": rows}, table_of(rows, columns))


def refused_reload(address: str, settings: Settings) -> list[dict[str, Any]]:
    """What needs a person and only the service knows: a refused reload, or that it is silent."""
    try:
        why = ask_service(address, "GET", "/health", settings)["config_last_reload_error"]
        return [{"job": "jobs.yaml", "what": "refused", "reason": why}] if why else []
    except Conflict as e:
        return [{"job": "service", "what": "silent", "reason": str(e)}]


# ── Backups by hand ───────────────────────────────────────────────────────────────────────────


def file_of(settings: Settings, command: str) -> Path:
    """The database's file. Raises Conflict where it is on a server."""
    if settings.database_url is not None:
        said = f"{settings.shown_store} is on a PostgreSQL server: {command} does this"
        raise Conflict(said, hint="README.md has the command line")
    return settings.database


def cmd_backup(args: argparse.Namespace, config: Config) -> int:
    settings, now, vault = config.settings, time.time(), Vault(config.settings)
    database = file_of(settings, "pg_dump")
    run_operation(config, Operations.secrets, mode="look")  # refuses where there is no database
    file = args.file or settings.backups / f"{file_timestamp(now)}.db"
    if file.exists() or (args.with_key and vault.file is None):
        there = f"{file} is there already" if file.exists() else "the key is in SECRET_KEY alone"
        raise Conflict(f"{there}; nothing was written")
    make_backup(database, file, vault, now)
    text = f"backup made and verified: {file}"
    if args.with_key and vault.file is not None:
        write_private(Path(f"{file}.key"), read_text(vault.file, 10_000))
        text += f", with its master key in {file}.key: who has both has every secret"
    return report(args, {"backup": str(file), "taken_at": iso(now)}, text)


def cmd_restore(args: argparse.Namespace, config: Config) -> int:
    if args.acknowledge:
        noted = run_operation(config, lambda operations: operations.store.acknowledge())
        return report(args, {"acknowledged": noted}, "noted" if noted else "nothing was restored")
    database = file_of(config.settings, "pg_restore")
    if args.file is None:
        raise Invalid(["which backup? name its FILE"])
    with RunLock(database, "restore"):
        said = restore([args.file], config.settings, "restore by hand", time.time())
    return report(args, {"restored": str(args.file), "said": said}, said)


# ── One round by hand ─────────────────────────────────────────────────────────────────────────


@dataclass
class JobRound:
    """A job of a `check`, and its result so far."""

    before: Job
    last: int  # id of the ingest's run before the round
    job: Job
    run: Run | None = None
    said: str = ""
    bad: bool = False  # an error, or the round has failed the job
    over: bool = False  # what was asked for has been done

    async def refresh(self, store: Store) -> bool:
        """Read the job's state from the store; True if its check is over."""
        job = self.job = await store.job(self.before.id) or self.before
        if isinstance(job.spec, IngestSpec):
            self.run = run = next(iter(await store.runs(job.name, 1)), None)
            self.over = run is not None and run.id > self.last and run.status != "in_progress"
            self.bad = run is None or not self.over or run.status != "success"
            said = (run.error_message, run.summary) if run and self.over else ("it did not run",)
            self.said = "; ".join(filter(None, said))
            return self.over
        seen = [describe_progress(b) for b in job.batches if b.status]
        self.said = job.last_error or "; ".join(seen) or "not checked yet"
        self.bad = job.errors_in_row > 0 or (job.status == "failed" != self.before.status)
        checked = job.last_check_at != self.before.last_check_at and job.status != "triggering"
        self.over = checked or self.before.status != "active"
        return self.over


async def show_progress(store: Store, turns: Sequence[JobRound]) -> None:
    """Print the progress of ingests on a terminal, on one line that is overwritten."""
    for turn in turns if sys.stderr.isatty() else ():
        for run in await store.runs(turn.job.name, 1) if turn.job.is_ingest else ():
            share = "" if run.progress is None else f", {run.progress:.0%}"
            text = f"\r{run.source}: {run.records_processed:,} records{share}\x1b[K"
            print(text * (run.status == "in_progress"), end="", file=sys.stderr, flush=True)


async def rounds_of(store: Store, args: argparse.Namespace) -> list[JobRound]:
    """The jobs of a round: those that are named, else all that have something left to do."""
    ready, verb = await store.schedule(), "run" if args.command == "job" else "check"
    jobs = [await store.find_job(ref) for ref in args.jobs]
    for job in jobs:
        if verb == "run" and not isinstance(job.spec, IngestSpec):
            raise Conflict(f"job {job.name!r} watches batches", hint="`check` looks at them now")
        if job.id not in ready:
            raise Conflict(f"Cannot {verb} job {job.name!r}: it is {job.shown_status}")
    if not args.jobs:
        jobs.extend(await store.jobs_among(ready))
    last = {run.source: run.id for job in jobs for run in await store.runs(job.name, 1)}
    return [JobRound(job, last.get(job.name, 0), job) for job in jobs]


def cmd_check(args: argparse.Namespace, config: Config) -> int:
    """Check jobs once: by the running service if there is one, else in this process."""
    require_jobs(config)
    found = service_of(config)
    try:
        turns = asyncio.run(check_there(args, config, found) if found else check_here(args, config))
    finally:  # clear the progress, so that the next message begins a line
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    bad = any(turn.bad for turn in turns)
    if args.command == "job" and turns[0].run is not None:
        return report_run(args, turns[0].run)
    rows = [(t.job.id, t.job.name, t.job.shown_status, t.said) for t in turns]
    document = [dict(zip(("id", "name", "status", "said"), row, strict=True)) for row in rows]
    report(args, document, Table(("ID", "Job", "State", "What was seen"), rows, (0,)))
    return int(bad)


def report_run(args: argparse.Namespace, run: Run) -> int:
    """Report how the run of an ingest ended; the exit code."""
    text = [f"{run.source}: {run.status}: {run.summary}", *(f"  {note}" for note in run.notes)]
    times = {"start_time": iso(run.start_time), "end_time": iso(run.end_time or run.start_time)}
    report(args, asdict(run) | times, "\n".join(text))
    if run.status != "success":
        print_error(IngestFailed(f"{run.source}: {run.error_message}"))
    elif run.records_failed:
        say(f"hint: {COMMAND} data rejects --source {run.source} lists what was rejected")
    return int(run.status != "success")


async def check_here(args: argparse.Namespace, config: Config) -> list[JobRound]:
    """Be a service for these jobs alone, until each has made a step. After Ctrl-C or SIGTERM no
    step begins, and those under way have some seconds; a second one ends at once."""
    loop, caught, ends = asyncio.get_running_loop(), list[int](), (signal.SIGINT, signal.SIGTERM)

    def stop(number: int) -> None:
        caught.append(number)
        for end in ends:
            loop.remove_signal_handler(end)

    with RunLock(config.settings.database, "check"):
        alone = partial(make_service, timers=False, in_reserve=not_beside_another)
        async with alone(config, lambda: config) as service:
            for end in ends:
                loop.add_signal_handler(end, stop, end)
            turns = await rounds_of(service.store, args)
            await service.begin([turn.job.id for turn in turns])
            while not caught and not all(service.has_stepped(turn.job.id) for turn in turns):
                await show_progress(service.store, turns)
                await asyncio.sleep(FOLLOW_SECONDS)
            for turn in turns:
                await turn.refresh(service.store)
            if service.store_error is not None:
                raise StoreError(service.store_error)
    if caught:
        raise SystemExit(128 + caught[0])
    return turns


async def check_there(args: argparse.Namespace, config: Config, found: Holder) -> list[JobRound]:
    """Have the running service check the jobs, and wait until the store shows the results."""
    async with Store(config.settings.store, read_only=True) as store:
        turns = await rounds_of(store, args)
        for turn in turns:
            path = f"/api/jobs/{turn.job.id}/check"
            try:
                await asyncio.to_thread(ask_service, found.address, "POST", path, config.settings)
            except Conflict as e:
                if len(turns) == 1:
                    raise
                turn.said, turn.bad, turn.over = str(e), True, True
        for turn in turns:
            if not turn.over:
                await await_round(store, turn, config)
    return turns


async def await_round(store: Store, turn: JobRound, config: Config) -> None:
    """Wait until the service has checked a job, at most CHECK_WAIT seconds; ingests take longer."""
    until, gone = time.monotonic() + CHECK_WAIT, False
    while not await turn.refresh(store):
        if gone:
            raise Conflict(f"job {turn.job.name!r} did not run to its end: the service has ended")
        if isinstance(turn.job.spec, JobSpec) and time.monotonic() > until:
            if turn.job.status == "active":
                turn.said, turn.bad = f"not checked within {duration_text(CHECK_WAIT)}", True
            return
        await show_progress(store, [turn])
        await asyncio.sleep(FOLLOW_SECONDS)
        gone = holder(config.settings.database) is None


# ── Secrets, jobs and records on the command line ─────────────────────────────────────────────


def cmd_secret_add(args: Args, config: Config) -> int:
    Vault(config.settings).load(required=True)  # before anything is typed in vain
    if args.value is not None:
        say("warning: --value shows the secret to all who list processes")
    elif sys.stdin.isatty():
        args.value = prompt_or_exit(partial(getpass.getpass, "Secret value: "), "nothing stored")
    else:
        args.value = sys.stdin.read()
    body = parse(SecretBody, {name: getattr(args, name) for name in ("name", "type", "value")})
    add = partial(Operations.add_secret, replace=args.replace)
    answer = run_operation(config, add, body, mode="make")
    return report(args, answer, f"stored secret {answer.name!r}")


def cmd_secret_list(args: Args, config: Config) -> int:
    answer = run_operation(config, Operations.secrets, mode="peek")
    rows: list[Any] = [(row.id, row.name, row.type, iso(row.created_at)) for row in answer.secrets]
    for name, ref in config.secrets.items():
        rows.append((None, name, ref.type, f"{config.path}: {ref.env or ref.file}"))
    columns = ("ID", "Name", "Type", "Created, or where it is")
    return report(args, answer, Table(columns, rows, (0,)))


def cmd_secret_delete(args: Args, config: Config) -> int:
    found = run_operation(config, Operations.secret, args.name, mode="look")
    confirm(args, f"Delete secret {found.name!r} of type {found.type}, for good?")
    answer = run_operation(config, Operations.delete_secret, args.name)
    return report(args, answer, answer.message)


def cmd_secret_rotate(args: Args, config: Config) -> int:
    count, vault = run_operation(config, Operations.rotate), Vault(config.settings)
    place = config.settings.shown_store
    text = f"sealed {count_of(count, 'secret')} of {place} with a new master key"
    if vault.file is not None:
        text += f": back up {vault.file} (the one before is in {vault.old_file()})"
    return report(args, {"resealed": count}, text)


def cmd_import(args: Args, config: Config) -> int:
    place = args.env or args.file.absolute().parent / ".env"
    if not (secret_key := read_dot_env(place)[0].get("SECRET_KEY", "")):
        raise SecretError(f"no SECRET_KEY in {place}", hint="--env names the original's .env")
    SecretValue(secret_key, "the original's SECRET_KEY")

    async def work(operations: Operations) -> list[tuple[str, bool, str]]:
        with open_sqlite(args.file, "ro") as db:
            return await operations.store.transact(Import(db, secret_key, operations).run)

    done = run_operation(config, work, mode="make")
    shown = [{"what": what, "here": here, "said": said} for what, here, said in done]
    lines = [f"{'here' if here else 'NOT '}  {what}: {said}" for what, here, said in done]
    good = all(here for _, here, _ in done)
    return report(args, {"imported": shown}, *lines or ["there is nothing to import"], good=good)


COMPLETED = {"JOB": "jobs", "SECRET": "secrets", "SOURCE": "sources"}  # by metavar
# of `job show`: their columns, and which may be left out
JOB_TABLES: dict[str, tuple[Any, ...]] = {
    "batches": ("batch_id status requests_completed requests_total",),
    "triggers": ("id state keboola_job_id keboola_status", 3),
    "runs": (f"start_time status {' '.join(f'records_{name}' for name in COUNTED)}", 5, 2),
    "rejects": ("source place reason record", 0, 3),
    "logs": ("created_at status actor message", 2),
}
JOB_OPTIONS = {  # of `job create` and `job update`, with what each takes; by flat field
    "name": ("--name", "NAME"),
    "batch_ids": ("--batch-id", "ID"),
    "openai_secret": ("--openai-secret", "SECRET"),
    "keboola_secret": ("--keboola-secret", "SECRET"),
    "keboola_stack_url": ("--keboola-stack", "URL"),
    "keboola_component_id": ("--component-id", "ID"),
    "keboola_configuration_id": ("--config-id", "ID"),
    "poll_interval_seconds": ("--poll-interval", "S"),
    "trigger_when": ("--trigger-when", None),
    "on_ambiguous": ("--on-ambiguous", None),
    "variables": ("--variable", "NAME=VALUE"),
}


def cmd_job_create(args: Args, config: Config) -> int:
    """create and update. In errors, the option is named in place of the field that it became."""
    names = {"poll_interval": "--poll-interval"} | {f: o for f, (o, _) in JOB_OPTIONS.items()}
    given = {name: getattr(args, name) for name in JOB_OPTIONS}
    given["variables"] = dict(given["variables"] or ()) or None
    flat = {name: value for name, value in given.items() if value is not None}
    try:
        if args.action == "update":
            answer = run_operation(config, Operations.update_job, args.job, flat)
        else:
            spec = job_spec(flat, config.settings.job_context)
            answer = run_operation(config, Operations.create_job, spec, mode="make")
    except Invalid as e:
        for n, problem in enumerate(e.problems):
            where = re.sub(r"^\w+", lambda field: names.get(field[0], field[0]), problem.where)
            e.problems[n] = replace(problem, where=where)
        raise
    return report(args, answer, f"{args.action}d job {answer.name!r} (ID {answer.id})")


def cmd_job_list(args: Args, config: Config) -> int:
    found = run_operation(config, Operations.jobs, args.status, 10**9, 0, "", True, mode="look")
    now, rows = time.time(), []
    for job in found.jobs:
        recent, pace = cast(Recent, job.recent), job.poll_interval_seconds
        every = pace if pace == "auto" else duration_text(pace)
        last = when(job.last_check_at, now) if job.last_check_at else None
        due = job.next_check_at if job.status == "active" else None
        times = (every, last, when(due, now) if due else None)
        rows.append((job.id, job.name, job.status, recent.done, recent.why, *times))
    columns = ("ID", "Name", "State", "Done", "Why", "Every", "Checked", "Next")
    return report(args, found, Table(columns, rows, (5, 6, 7, 0, 3, 4)))


def cmd_job_show(args: Args, config: Config) -> int:
    answer = run_operation(config, Operations.job, args.job, args.logs, mode="look")
    apart = {"recent", "batch_id", "batch_ids"}
    apart |= {"batch_count", "completed_count", "failed_count"} if answer.ingest else set()
    shown = answer.model_dump(mode="json", exclude=apart)
    return report(args, answer, *show_document(shown, ("Job", answer.name), JOB_TABLES))


def cmd_job_step(args: Args, config: Config) -> int:
    """pause, resume and retry."""
    before = run_operation(config, Operations.job, args.job, None, mode="look")
    answer = run_operation(config, Operations.step_job, args.job, args.action)
    report(args, answer, f"job {answer.name!r} is {answer.status} now")
    lost = [b.batch_id for b in before.batches if outcome(b) == "failed"]
    if args.action == "retry" and lost and before.trigger_when == "all_completed":
        where = "in jobs.yaml" if before.origin == "file" else "by job update"
        text = f"{', '.join(lost)} has failed at OpenAI for good and will fail the job again"
        say(f"hint: {text}; give other batch ids, or all_finished, {where}")
    return 0


def cmd_job_delete(args: Args, config: Config) -> int:
    job = run_operation(config, Operations.job, args.job, None, mode="look")
    records = f" and {count_of(job.totals['records'], 'record')} in /data" if job.totals else ""
    confirm(args, f"Delete job {job.name!r} (ID {job.id}) with its history{records}?")
    answer = run_operation(config, Operations.delete_job, str(job.id))
    return report(args, answer, f"{answer.message}, with its history{records}")


def cmd_explain(args: Args, config: Config) -> int:
    said = run_operation(config, Operations.explain, args.job, mode="look")
    if holder(config.settings.database) is None:
        said.append("The service does not run at the moment.")
    return report(args, {"job": args.job, "said": said}, *said)


def cmd_logs(args: Args, config: Config) -> int:
    """Print what was done and by whom, oldest first; with --follow go on until Ctrl-C."""
    after, limit = 0, args.lines

    async def look(operations: Operations) -> list[dict[str, Any]]:
        store = operations.store
        job_id = (await store.find_job(args.job)).id if args.job else None
        rows = [*map(asdict, await store.logs(job_id, limit, after))]
        jobs = await store.jobs_among({row["job_id"] for row in rows if row["job_id"]})
        names = {job.id: job.name for job in jobs}
        for row in rows:
            row |= {"job": names.get(row["job_id"]), "created_at": iso(row["created_at"])}
        return rows

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            rows = run_operation(config, look, mode="look")
            if args.json and not args.follow:
                return report(args, rows)
            for row in rows:
                said = f"{row['status']}: {row['message']}".removesuffix(": ")
                said += f" (by {row['actor']})" if row["actor"] else ""
                line = redact(f"{row['created_at']}  {row['job'] or '-'}  {said}")
                shown = json.dumps(redacted(row)) if args.json else CONTROL.sub(" ", line)
                print(shown, flush=True)
            if not args.follow:
                break
            after, limit = (rows[-1]["id"] if rows else after), 10**9
            time.sleep(1)
    return 0


async def data_rows(operations: Operations, args: Args, limit: int) -> AsyncIterator[Any]:
    """Up to `limit` records or rejects, in the order of their arrival."""
    after: int | None = 0
    if args.action == "rejects":
        for reject in (await operations.rejects(args.source, limit))[::-1]:
            yield reject
        return
    while after is not None and limit > 0:
        found, after = await operations.data(args.source, min(CHUNK_ROWS, limit), after)
        limit -= len(found)
        for record in found:
            yield record


def cmd_data(args: Args, config: Config) -> int:
    """list and rejects: some rows as a table, or all as JSON or CSV."""
    rejects, whole = args.action == "rejects", args.csv or (args.json and args.action == "list")
    limit = args.limit if args.limit is not None else 10**9 if whole else 100 if rejects else 20

    async def show(operations: Operations) -> None:
        known, rows = await operations.store.ingested(), data_rows(operations, args, limit)
        if (
            args.source
            and args.source not in known
            and (question := did_you_mean(args.source, known))
        ):
            say(f"hint: there is no source {args.source!r}{question}")
        if args.csv or args.json:
            return await export(args, RejectAnswer if rejects else StoredRecord, rows)
        found = [row async for row in rows]
        if rejects:
            return print_table(table_of(found, *JOB_TABLES["rejects"]))
        print_table(table_of(found, "source source_id title published_at url", 4, 3, 0))
        total = (await operations.store.totals(args.source or ""))["records"]
        if total > len(found):
            print(f"{len(found)} of {total:,}; --limit shows more, --csv and --json all")
        return None

    run_operation(config, show, mode="look")
    return 0


async def export(args: Args, model: type[BaseModel], rows: AsyncIterator[BaseModel]) -> None:
    """Print rows as they are read: as CSV, in which blocks are JSON, or as one JSON array."""
    # a writer whose lines end with CRLF quotes both; of those lines the CR is dropped
    out = argparse.Namespace(write=lambda line: sys.stdout.write(f"{line[:-2]}\n"))
    writer, joint = csv.DictWriter(out, [*model.model_fields]), "["
    if args.csv:
        writer.writeheader()
    async for row in rows:
        line = as_document(row)
        if args.csv:
            blocks = {key: value for key, value in line.items() if isinstance(value, dict)}
            texts = {key: json.dumps(v, ensure_ascii=False) for key, v in blocks.items()}
            writer.writerow(line | texts)
        else:
            print(joint, json.dumps(line), sep="", end="")
            joint = ",\n "
    if not args.csv:
        print("[]" if joint == "[" else "]")


def cmd_schema(args: Args) -> int:
    """The JSON Schema of jobs.yaml, for editors."""
    jobs: Any = list[JobSpec | FlatJob | IngestSpec] | None
    whole = create_model("JobsYaml", __base__=JobsFile, __doc__="jobs.yaml", jobs=(jobs, None))
    print(json.dumps(whole.model_json_schema(), indent=2))
    return 0


def cmd_completion(args: Args) -> int:
    """Print a completion script, or the names it asks for, without those a shell would expand."""
    import shtab

    def asking(names: str) -> Any:
        """At each completion; shtab's own way for zsh asks once, when the script is loaded."""
        ask = f"teckochecker completion {names} 2>/dev/null"
        return shtab.cmd(ask) | {"zsh": f"{{compadd -- \\$({ask})}}"}

    async def stored(operations: Operations) -> Iterable[str]:
        if args.shell == "sources":
            return await operations.store.ingested()
        table: Any = "secrets" if args.shell == "secrets" else "polling_jobs"
        return await operations.store.names(table)

    if args.shell not in COMPLETED.values():
        print(shtab.complete(make_parser("teckochecker", asking), args.shell))
        return 0
    config = config_despite_mistakes(args)
    names = {*config.secrets} if args.shell == "secrets" else set[str]()
    names |= {*run_operation(config, stored, mode="look")} if config.settings.has_store else set()
    print(*sorted(name for name in names if re.fullmatch(r"[\w.@/+-]+", name)), sep="\n")
    return 0


def cmd_demo(args: Args) -> int:
    here = Path(__file__).resolve().parent
    folders = (here / "teckochecker_demo", here / "tests")  # of an installation, of a checkout
    if not (folder := next((f for f in folders if (f / "demo.py").exists()), None)):
        text = f"the demo's stand-ins are not in {folders[1]}"
        raise TeckoError(text, hint="run it from a whole checkout, or install that")
    sys.path.insert(0, str(folder))
    sys.modules["teckochecker"] = sys.modules[__name__]
    return int(importlib.import_module("demo").main(keep=args.keep, as_json=args.json))


# ── Setting up ────────────────────────────────────────────────────────────────────────────────


FIRST_JOBS_FILE = """\
# TeckoChecker's jobs. A line behind a # is an example: take the # away and put in your own IDs.
# After an edit, `validate` says what would change, and `reload` has a running service read it.

database: teckochecker.db
admin: {host: 127.0.0.1, port: 8000}

secrets:  # where keys are; `secret add` stores one encrypted instead, and it needs no line here
#  openai-prod:  {type: openai,  env: OPENAI_API_KEY}
#  keboola-prod: {type: keboola, env: KEBOOLA_TOKEN}

jobs:
"""
FIRST_JOB = """\
  - name: nightly-classification
    poll_interval: 2m
    watch: {secret: openai-prod, batch_ids: [%s]}
    trigger: {secret: keboola-prod, stack_url: "%s", component_id: %s, configuration_id: %s}
"""
FIRST_STACK = "https://connection.keboola.com"


async def batch_table(base_url: str | None, key: SecretValue) -> Table:
    """The newest batches that a key may see."""
    openai = OpenAI(base_url)
    try:
        found = await openai.latest(key)
    finally:
        await openai.close()
    shown = [
        (n, batch.batch_id, batch.status, f"{batch.requests_completed}/{batch.requests_total}")
        for n, batch in enumerate(found, 1)
    ]
    return Table(("No.", "Batch", "Status", "Requests"), shown)


async def configuration_table(stack: str, token: SecretValue) -> Table:
    """The configurations of a token's project."""
    keboola, rows = Keboola(), list[tuple[object, ...]]()
    try:
        components = await keboola.storage(stack, token, "components")
    finally:
        await keboola.close()
    for component in components if isinstance(components, list) else ():
        for each in value_at(component, "configurations") or ():
            names = (value_at(component, "id"), value_at(each, "id"), value_at(each, "name"))
            rows.append((len(rows) + 1, *names))
    return Table(("No.", "Component", "Configuration", "Name"), rows)


def prompt_key_and_choice(
    name: str, listing: Callable[[SecretValue], Coroutine[Any, Any, Table]], what: str, most: int
) -> tuple[str, list[Sequence[Any]]]:
    """Ask for a key, list what it may see, and ask for the rows to use. Both results are empty if
    nothing is typed. A key that cannot list anything is asked for again."""
    while value := getpass.getpass(f"{name} (is not shown): "):
        try:
            table = asyncio.run(listing(SecretValue(clean_secret(value))))
        except ValueError as e:
            say(str(e))
            continue
        except TeckoError as e:
            print_error(e)
            continue
        print_table(table)
        while words := {*prompt_line(f"{what}: ").replace(",", " ").split()}:
            rows = [row for row in table.rows if str(row[0]) in words]
            if len(rows) == len(words) <= most:
                return value, rows
            say(f"at most {most} of the numbers above, or Enter for none")
        return value, []
    return "", []


def first_jobs_file(
    stack: str = FIRST_STACK, batches: Sequence[str] = (), target: Sequence[str] = ()
) -> str:
    """A jobs.yaml with one job, which is commented out unless batches and target are known."""
    ids = ", ".join(batches or ["batch_abc123"])
    component, configuration = target or ("kds-team.app-custom-python", "123456")
    job = FIRST_JOB % (ids, stack, json.dumps(component), json.dumps(configuration))
    return FIRST_JOBS_FILE + (job if batches and target else re.sub("(?m)^(?=.)", "#", job))


def interview(settings: Settings) -> tuple[list[SecretBody], str]:
    """Ask for secrets and a first job, for which nothing is written yet."""
    say("Enter skips a question. Ctrl-C ends this, and nothing is made.")
    ask = partial(batch_table, settings.openai_base_url)
    key, batches = prompt_key_and_choice("OpenAI key", ask, "Batches to watch, like 1, 2", 10)
    while text := prompt_line(f"Keboola stack (Enter: {FIRST_STACK}): ").strip():
        with contextlib.suppress(ValueError):
            text = clean_stack_url(text)
            break
        say(f"a stack is {FIRST_STACK} or another one, without a path")
    ask = partial(configuration_table, stack := text or FIRST_STACK)
    token, target = prompt_key_and_choice("Keboola token", ask, "Number of the one to start", 1)
    kinds = (("openai", key), ("keboola", token))
    given = [parse(SecretBody, {"name": f"{k}-prod", "type": k, "value": v}) for k, v in kinds if v]
    chosen = [str(name) for row in target for name in row[1:3]]
    return given, first_jobs_file(stack, [row[1] for row in batches], chosen)


def create_missing(config: Config, given: Sequence[SecretBody], jobs_file: str) -> Iterator[str]:
    """Create what is missing of key, database, secrets and jobs.yaml; a sentence for each."""
    settings, vault = config.settings, Vault(config.settings)
    if (file := vault.file) is not None and not file.exists():
        write_private(file, new_master_key() + "\n")
        yield f"made the master key {file} (back it up: without it no secret opens)"
    vault.load(required=True)
    if not settings.has_store:
        asyncio.run(Store(settings.store).touch())
        yield f"made the database {settings.shown_store}"
    for body in given:
        run_operation(config, Operations.add_secret, body, mode="make")
        yield f"stored the secret {body.name!r}"
    if not config.path.exists():
        config.path.write_text(jobs_file)
        yield f"wrote {config.path}"


def cmd_init(args: Args, config: Config) -> int:
    """Create what is missing, and change nothing that exists. On a terminal, ask what to watch."""
    settings, vault = config.settings, Vault(config.settings)
    sealed = list[str]()
    if settings.has_store:  # of a server, it makes the tables where they are missing
        sealed = [row.name for row in run_operation(config, Operations.secrets).secrets]
    if sealed and vault.file is not None and not vault.file.exists() and not args.new_key:
        raise SecretError(
            f"{vault.file} is missing, and a new key would not open what"
            f" {settings.shown_store} has sealed: {', '.join(sealed)}",
            hint="put the key file back, or --new-key, and store these secrets again",
        )
    given, jobs_file = list[SecretBody](), first_jobs_file()
    if sys.stdin.isatty() and not (config.path.exists() or sealed or args.json):
        given, jobs_file = prompt_or_exit(partial(interview, settings), "nothing was made")
    done = [*create_missing(config, given, jobs_file)]
    config, stored = config_of(args), {*sealed, *(body.name for body in given)}
    if given and config.jobs:
        check = partial(every_problem, config, vault=vault)
        if problems := run_operation(config, lambda operations: check(operations.store)):
            raise Invalid(problems)
        done.append(f"checked {config.path}: it is good")
    lacks = [kind for kind in ("openai", "keboola") if f"{kind}-prod" not in stored]
    steps = [f"{COMMAND} secret add --name {kind}-prod --type {kind}" for kind in lacks]
    steps += [] if config.jobs else [f"edit {config.path}"]
    steps += [f"{COMMAND} validate --online", f"{COMMAND} start"]
    text = done or ["everything is there already; nothing was changed"]
    shown = [*text, "", "Next:", *(f"  {step}" for step in steps)]
    return report(args, {"done": done, "next": steps}, *shown)


# ── Parser and main ───────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """For a misspelt word, it suggests the one that was probably meant."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"'(.*?)'", found[2]))
        super().error(message)


Argument = tuple[tuple[str, ...], dict[str, Any]]


def arg(*names: str, **how: Any) -> Argument:
    return names, how


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def whole_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at most 9 digits")
    return int(text)


def count(*names: str, **how: Any) -> Argument:
    return names, {"type": whole_number, "metavar": "N"} | how


def job_options(*, create: bool) -> Iterator[Argument]:
    """The options of `job create` and `job update`, with help from the models."""
    for name, (option, metavar) in JOB_OPTIONS.items():
        info = FlatJob.model_fields[name]
        shown = create and info.default in (120, "resend", "all_completed")
        needed = create and info.is_required()
        how: dict[str, Any] = {"dest": name, "metavar": metavar, "required": needed}
        how["help"] = str(info.description).splitlines()[0]
        how["help"] += f" (default: {info.default})" if shown else ""
        how |= {"choices": get_args(info.annotation)} if metavar is None else {}
        how |= {"action": "append"} if name in ("batch_ids", "variables") else {}
        yield arg(option, **how | ({"type": variable} if name == "variables" else {}))


JOB = arg("job", metavar="JOB", help="id or name")
FORCE = arg("--force", action="store_true", help="do not ask")
ROWS = (
    arg("--source", metavar="SOURCE", help="only of this ingest's job"),
    count("--limit", help="at most N"),
    arg("--csv", action="store_true", help="all of them, as CSV"),
)

# which need no jobs.yaml, and which work despite mistakes in it
CONFIGLESS = (cmd_schema, cmd_completion, cmd_demo)
TOLERANT = (cmd_stop, cmd_reload, cmd_status, cmd_backup, cmd_restore, cmd_logs)
COMMANDS: tuple[tuple[str, Callable[..., int], str, Sequence[Argument]], ...] = (
    ("init", cmd_init, "make the key, the database and a first jobs.yaml", (
        arg("--new-key", action="store_true", help="even where secrets are sealed already"),)),
    ("validate", cmd_validate, "check jobs.yaml and every secret; what would change", (
        arg("--online", action="store_true", help="ask every key, batch and source once, too"),)),
    ("doctor", cmd_validate, "validate --online", (
        arg("--online", action="store_true", default=True, help="as always here"),)),
    ("start", cmd_start, "run the service", (
        arg("--daemon", action="store_true", help="in the background"),)),
    ("stop", cmd_stop, "stop the service gracefully", ()),
    ("reload", cmd_reload, "have the service read jobs.yaml again", ()),
    ("status", cmd_status, "whether it runs, what is due, and what needs you", ()),
    ("backup", cmd_backup, "copy the database, while others use it", (
        arg("file", nargs="?", type=Path, metavar="FILE",
            help="where to (default: where the service has its own)"),
        arg("--with-key", action="store_true", help="put the master key beside it"))),
    ("restore", cmd_restore, "let a backup take the database's place", (
        arg("file", nargs="?", type=Path, metavar="FILE", help="a backup"),
        arg("--acknowledge", action="store_true",
            help="say that you know what may be missing since one did"))),
    ("check", cmd_check, "one round now, then exit", (
        arg("jobs", nargs="*", metavar="JOB", help="id or name (default: all)"),)),
    ("explain", cmd_explain, "what a job waits for, and why", (JOB,)),
    ("logs", cmd_logs, "what was done, when and by whom", (
        arg("job", nargs="?", metavar="JOB", help="id or name (default: all)"),
        arg("-f", "--follow", action="store_true", help="also what comes, until Ctrl-C"),
        count("-n", "--lines", default=20, help="how many (default: 20)"))),
    ("import", cmd_import, "take over what the original program has", (
        arg("file", type=Path, metavar="FILE", help="its SQLite database; stop it first"),
        arg("--env", type=Path, metavar="FILE", help="its .env with its SECRET_KEY (default: the"
            " one beside its database)"))),
    ("stats", cmd_stats, "checks, triggers, delay and records, by day", (
        count("--days", default=30, help="how many, up to 90 (default: 30)"),)),
    ("schema", cmd_schema, "print the JSON Schema of jobs.yaml", ()),
    ("completion", cmd_completion, "print a shell's completion script", (
        arg("shell", choices=("bash", "zsh", "fish", *COMPLETED.values()),
            metavar="bash|zsh|fish"),)),
    ("demo", cmd_demo, "the whole thing on this machine, without an account", (
        arg("--keep", action="store_true", help="go on until Ctrl-C"),)),
    ("secret add", cmd_secret_add, "store one, typed without echo or piped in", (
        arg("--name", required=True, help=SecretBody.model_fields["name"].description),
        arg("--type", required=True, choices=get_args(SecretBody.model_fields["type"].annotation)),
        arg("--value", help="the secret itself; shows up in the process list and the shell's"
            " history, prefer the prompt or a pipe"),
        arg("--replace", action="store_true", help="give a stored one a new value"))),
    ("secret list", cmd_secret_list, "names and types, never values", ()),
    ("secret delete", cmd_secret_delete, "delete one that no running job uses", (
        arg("name", metavar="SECRET"), FORCE)),
    ("secret rotate", cmd_secret_rotate, "new master key, every secret encrypted anew", ()),
    ("alert test", cmd_alert_test, "send each target of `alerts:` a message", ()),
    ("job create", cmd_job_create, "watch batches", (*job_options(create=True),)),
    ("job list", cmd_job_list, "all jobs, with what they have done and why", (
        arg("--status", choices=STATES, help="only of this state"),)),
    ("job show", cmd_job_show, "batches, triggers and the last log lines", (
        JOB, count("--logs", default=20, help="log lines (default: 20)"))),
    ("job update", cmd_job_create, "change a job", (JOB, *job_options(create=False))),
    ("job pause", cmd_job_step, "stop checking a job", (JOB,)),
    ("job resume", cmd_job_step, "go on checking a paused job", (JOB,)),
    ("job retry", cmd_job_step, "re-arm a failed job", (JOB,)),
    ("job delete", cmd_job_delete, "delete a job with its history and its records", (JOB, FORCE)),
    ("job run", cmd_check, "one run of an ingest now", (
        arg("jobs", nargs=1, metavar="JOB", help="id or name"),)),
    ("data list", cmd_data, "records in the unified schema", ROWS),
    ("data rejects", cmd_data, "records that were rejected, and why", ROWS),
)  # fmt: skip
GROUPS = {"secret": "API keys and tokens", "job": "jobs", "data": "what ingests brought",
          "alert": "who is told of what is wrong"}  # fmt: skip
EVERYWHERE = (
    arg("-c", "--config", type=Path, metavar="FILE",
        help="configuration file (default: ./jobs.yaml)"),
    arg("--json", action="store_true", help="print one JSON document instead of tables"),
    arg("-v", "--verbose", action="store_true", help="log more"),
    arg("-q", "--quiet", action="store_true", help="log errors only"),
)  # fmt: skip
EPILOG = f"""\
example: {COMMAND} job list --status failed
Options may also follow the command. While the service runs, /docs of its address (see `status`)
describes its HTTP surface; README.md and jobs.yaml.example say the rest."""


def make_parser(prog: str = COMMAND, completes: Any = None) -> argparse.ArgumentParser:
    """`completes`: what gives shtab the completion of an argument that is one of COMPLETED."""
    late = Parser(add_help=False)
    top = Parser(
        prog=prog,
        description="Watch OpenAI batches and start a Keboola job when they are done, once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"TeckoChecker {VERSION}")
    for names, how in EVERYWHERE:
        top.add_argument(*names, **how)
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        late.add_argument(*names, **how | hidden)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = {"": commands}
    for path, run, says, arguments in COMMANDS:
        group, _, name = path.rpartition(" ")
        if group not in groups:
            holds = commands.add_parser(group, help=GROUPS[group], allow_abbrev=False)
            groups[group] = holds.add_subparsers(dest="action", required=True, metavar="ACTION")
        shown: Any = {"help": says, "description": says, "parents": [late], "allow_abbrev": False}
        parser = groups[group].add_parser(name, **shown)
        parser.set_defaults(run=run)
        for names, how in arguments:
            action = parser.add_argument(*names, **how)
            if completes is not None and (what := COMPLETED.get(str(action.metavar))):
                vars(action)["complete"] = completes(what)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: it could not be done; 2: wrong usage."""
    open_streams()
    try:
        return close_streams(run_command(make_parser().parse_args(argv)))
    except SystemExit as e:  # argparse's, a signal's
        return close_streams(e.code if isinstance(e.code, int) else 0)


def run_command(args: Args) -> int:
    """Run a command and report what it raises; the exit code."""
    waits = args.command == "start" and not args.daemon  # until it can end in good order
    if not waits and signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ACTOR.set(None if args.command in ("start", "check") else "command line")
    try:
        if args.run in CONFIGLESS:
            return int(args.run(args))
        config = (config_despite_mistakes if args.run in TOLERANT else config_of)(args)
        level = {"start": config.settings.log_level, "check": "WARNING"}.get(args.command, "ERROR")
        level = "DEBUG" if args.verbose else "ERROR" if args.quiet else level
        set_up_logging(config.settings, level, to_file=args.command == "start")
        return int(args.run(args, config))
    except TeckoError as e:
        error = e
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`
        return 1
    except ModuleNotFoundError as e:
        error = TeckoError(install_hint(e))
    except (OSError, UnicodeError) as e:
        error = TeckoError(f"{type(e).__name__}: {e}")
    except Exception as e:
        error = TeckoError(f"internal error: {type(e).__name__}: {e}", hint="-v shows where")
        log.debug("internal error", exc_info=True)  # the handler redacts it
    print_error(error, args)
    return 1


if __name__ == "__main__":
    sys.exit(main())
