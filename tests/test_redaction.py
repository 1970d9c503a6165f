"""Redaction: no secret's value comes out of a string, an error, a log line or a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from conftest import PROGRAM, clean_environment, secrets_forgotten
from hypothesis import example, given, settings
from hypothesis import strategies as st

import teckochecker as tecko

CANARY = "c4n4ry/\"quoted\" & 'spaced' \\ 100%"
# What `secret add` takes, but for *, of which the mask itself consists.
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="*"))
SECRETS = st.lists(VALUES.map(str.strip).filter(lambda v: len(v) >= 6), min_size=1, max_size=4)


@contextlib.contextmanager
def known(*values: str) -> Iterator[None]:
    """These, and these alone, are secrets in here; what was known before is known afterwards."""
    with secrets_forgotten():
        tecko.SecretValue.known, tecko.SecretValue.forms = {}, []
        for value in values:
            tecko.SecretValue(value)
        yield


@dataclass(frozen=True)
class Holder:
    secret: tecko.SecretValue
    others: list[tecko.SecretValue]


PRINTED: dict[str, Callable[[tecko.SecretValue], str]] = {
    "str": str,
    "repr": repr,
    "f-string": lambda s: f"{s} {s!r} {s!s} {s!a}",
    "format": lambda s: "{} {!r}".format(s, s),  # noqa: UP032
    "percent": lambda s: "%s %r" % (s, s),  # noqa: UP031
    "dataclass": lambda s: repr(Holder(s, [s])),
    "collections": lambda s: repr([{s: (s,)}, {s}]),
    "a copy": lambda s: repr([copy.copy(s), copy.deepcopy(s)]),
    "settings": lambda s: repr(
        tecko.Settings.model_validate({"database": "t.db", "admin_token": s, "secret_key": s})
    ),
}


@pytest.mark.parametrize("shown", PRINTED.values(), ids=list(PRINTED))
def test_a_secret_prints_as_three_stars(shown: Callable[[tecko.SecretValue], str]) -> None:
    """However it is turned into text, alone or inside of something."""
    with known():
        secret = tecko.SecretValue(CANARY)
    text = shown(secret)
    assert "***" in text and "c4n4ry" not in text
    assert secret.reveal() == CANARY


def test_a_secret_has_no_dictionary_and_no_json() -> None:
    """Nothing that walks over attributes or serializes finds the value by itself."""
    with known():
        secret = tecko.SecretValue(CANARY)
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError) as e:
        json.dumps(secret)
    assert "c4n4ry" not in str(e.value)


# ── redact ────────────────────────────────────────────────────────────────────────────────────

FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "repr": repr,
    "repr of a dict": lambda text: repr({"key": [text]}),
    "repr of bytes": lambda text: repr(text.encode()),
    "JSON": json.dumps,
    "a URL's query": quote_plus,
    "a URL's path": quote,
    "a URL's part": lambda text: quote(text, safe=""),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@settings(deadline=None)
@given(secrets=SECRETS, around=st.tuples(VALUES, VALUES), which=st.integers(0, 3))
@example(secrets=[CANARY], around=("", ""), which=0)
@example(secrets=["it's a secret"], around=('"', ""), which=0)
@example(secrets=["abcdef", "abcdefgh", "bcdefg", "cdefghij"], around=("ab", "ij"), which=1)
def test_no_secret_survives(
    form: Callable[[str], str], secrets: list[str], around: tuple[str, str], which: int
) -> None:
    """No value is left, nor what it looks like in a printed or quoted text, wherever it stands."""
    with known(*secrets):
        secret = secrets[which % len(secrets)]
        text = form(around[0] + secret + around[1])
        left = tecko.redact(text)
        bare = secret.replace("\\", "\\\\")  # as repr has it, which escapes a quote now and then
        for trace in (secret, quote(secret), quote_plus(secret), bare, bare.replace("'", "\\'")):
            assert trace not in left
        assert left != text


@settings(deadline=None)
@given(SECRETS, VALUES)
def test_redacting_changes_nothing_else(secrets: list[str], text: str) -> None:
    """A text without a secret stays as it is, and redacting twice is redacting once."""
    with known(*secrets):
        left = tecko.redact(text)
        assert tecko.redact(left) == left
        if not any(form in text for form in tecko.SecretValue.forms):
            assert left == tecko.KEY_SHAPES.sub("***", text)


@pytest.mark.parametrize(
    ("secrets", "text", "left"),
    [
        (["key-01", "key-01-and-more"], "a key-01-and-more b key-01", "a *** b ***"),
        (["key-01-and-more", "key-01"], "a key-01-and-more b key-01", "a *** b ***"),
        (["and-more", "key-and-more-1"], "key-and-more-1", "***"),
        (["key.01", "aa+b(c"], "key.01 keyx01 aa+b(c aaab(c", "*** keyx01 *** aaab(c"),
        (["twofold"], "twofoldtwofold twofold", "****** ***"),
    ],
)
def test_secrets_that_contain_each_other(secrets: list[str], text: str, left: str) -> None:
    """The longest goes first, so that no tail is left; a value is text, not a pattern."""
    with known(*secrets):
        assert tecko.redact(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Incorrect API key: sk-proj-AbC_12-3456789.", "Incorrect API key: ***."),
        ("token=1234-567890-abcdefghijklmnopqrstuvwxyz0123", "token=***"),
        ("risk-free, task-12345678, 2026-11-22, batch_abc123def456", None),
        ("task-nightly-classification-2026, sk-nightly-classification-2026", None),
        ("run-2026-11-classificationofproducts", None),
        ("0b1c7a3e-6a8e-4b52-9d5e-7c3f2a1b0d9e", None),
    ],
)
def test_what_looks_like_a_key_is_cut_out(text: str, left: str | None) -> None:
    """Keys that nobody told us, out of an upstream's own words; dates and ids stay."""
    with known():
        assert tecko.redact(text) == (text if left is None else left)


@settings(deadline=None)
@given(st.integers(0, 320))
def test_a_secret_is_not_cut_in_half(place: int) -> None:
    """What an upstream says is redacted before it is shortened: a half would not be known."""
    with known("Hunter2-is-not-a-good-one"):
        said = tecko.one_line("x" * place + "Hunter2-is-not-a-good-one" + "y" * 100)
        left = str(tecko.KeboolaError(said))
        assert "Hun" not in left and "-good-one" not in left and len(left) <= 303


def test_a_secret_that_changes_for_ever_costs_nothing() -> None:
    """A rewritten file: the last two values of its secret are known, and no more is kept."""
    with known():
        for n in range(2000):
            tecko.SecretValue(f"value-number-{n}", "rewritten")
        assert len(tecko.SecretValue.forms) == 2
        assert tecko.redact("value-number-1999 value-number-1998") == "*** ***"


def test_a_value_that_is_too_short_is_cut_out_of_nothing() -> None:
    """A secret of one letter would make every text unreadable, and JSON invalid."""
    with known("admin", "1"):
        assert tecko.redact('{"admin": 1}') == '{"admin": 1}'


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 5000))
def test_an_excerpt_of_an_endless_text(place: int, after: int) -> None:
    """It is cut before it is redacted, and yet never in the middle of a secret."""
    with known("Hunter2-is-not-a-good-one" * 9):
        text = "x" * place + "Hunter2-is-not-a-good-one" * 9 + "y" * after
        left = tecko.excerpt(text, 300)
        assert len(left) <= 300 and ("x" * place + "***" + "y" * after).startswith(left)


@pytest.mark.parametrize("error", [tecko.TeckoError, tecko.StoreError, tecko.OpenAIError])
def test_an_error_has_no_secret_in_it(error: Callable[[str], Exception]) -> None:
    """An error's text is redacted when it is made, wherever it goes from there."""
    with known(CANARY):
        made = error(f"it said {CANARY}")
    assert str(made) == "it said ***" and "c4n4ry" not in repr(made)


# ── Logs ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def listening(
    formatter: logging.Formatter, name: str
) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of its own, and what a redacting handler writes."""
    logger, heard = logging.getLogger(name), io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setFormatter(formatter)
    handler.addFilter(tecko.RedactingFilter())
    logger.addHandler(handler)
    logger.propagate, level = False, logger.level
    logger.setLevel("DEBUG")
    yield logger, heard
    logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(level)


def broken_twice() -> None:
    try:
        raise KeyError(CANARY)
    except KeyError as e:
        raise RuntimeError(f"while {CANARY}") from e


def raised(log: logging.Logger, **how: bool) -> None:
    try:
        broken_twice()
    except RuntimeError:
        log.exception("failed with %s", CANARY, **how)  # type: ignore[arg-type]


def grouped(log: logging.Logger) -> None:
    try:
        raise ExceptionGroup(CANARY, [ValueError(CANARY), OSError(2, CANARY)])
    except ExceptionGroup as e:
        e.add_note(CANARY)
        log.warning("all of it", exc_info=e)


LOGGED: dict[str, Callable[[logging.Logger], None]] = {
    "the message": lambda log: log.info("key " + CANARY),
    "an argument": lambda log: log.info("key %s %r", CANARY, CANARY),
    "a named argument": lambda log: log.info("key %(key)s", {"key": CANARY}),
    "split over message and argument": lambda log: log.info(CANARY[:9] + "%s", CANARY[9:]),
    "inside of arguments": lambda log: log.info("got %s", [{"headers": {"X": CANARY}}]),
    "bytes": lambda log: log.info("got %s", CANARY.encode()),
    "an exception as message": lambda log: log.error(ValueError(CANARY)),
    "exceptions, chained": raised,
    "exceptions and the stack": lambda log: raised(log, stack_info=True),
    "a group of exceptions": grouped,
    "no exception": lambda log: log.error(CANARY, exc_info=True),
}
FORMATTERS = {"text": logging.Formatter("%(levelname)s %(message)s"), "json": tecko.JsonLines()}


@pytest.mark.parametrize("formatter", FORMATTERS.values(), ids=list(FORMATTERS))
@pytest.mark.parametrize("write", LOGGED.values(), ids=list(LOGGED))
def test_a_log_record_is_redacted(
    formatter: logging.Formatter, write: Callable[[logging.Logger], None]
) -> None:
    """Message, arguments, tracebacks with their causes, notes and stacks, in both formats."""
    with known(CANARY), listening(formatter, "somebody.elses") as (logger, heard):
        write(logger)
    assert "c4n4ry" not in heard.getvalue() and "quoted" not in heard.getvalue()
    assert "***" in heard.getvalue()


def test_the_stack_is_redacted() -> None:
    """A source line that names a secret is shown in a stack; it is cut out there as well."""
    with known("the_words_of_this_line"), listening(FORMATTERS["text"], "stack") as (logger, heard):
        logger.info("here", stack_info=bool("the_words_of_this_line"))
    assert "Stack (most recent call last)" in heard.getvalue()
    assert "the_words_of_this_line" not in heard.getvalue()


def test_a_traceback_stays_readable() -> None:
    """Only the value goes: what failed, where and after what is still said."""
    with known(CANARY), listening(FORMATTERS["json"], "tracebacks") as (logger, heard):
        raised(logger)
    line = json.loads(heard.getvalue())
    assert line["message"] == "failed with ***" and line["level"] == "ERROR"
    for word in ("KeyError", "direct cause", "RuntimeError: while ***", "in broken_twice"):
        assert word in line["traceback"]


def test_a_record_that_cannot_be_formatted(capsys: pytest.CaptureFixture[str]) -> None:
    """A library's wrong format string neither breaks the caller nor shows the arguments."""
    with known(CANARY), listening(FORMATTERS["text"], "wrong") as (logger, heard):
        logger.info("%d bytes", CANARY)
        logger.info("still here")
    printed = heard.getvalue() + capsys.readouterr().err
    assert "still here" in printed and "c4n4ry" not in printed


PROCESS = """
import asyncio, logging, sys, warnings
import teckochecker as tecko
canary = sys.argv[1]
tecko.SecretValue(canary)
env = {"LOG_FORMAT": sys.argv[2], "LOG_FILE": "t.log"}
config = tecko.load_config(tecko.Path("jobs.yaml"), env)
tecko.set_up_logging(config.settings, "DEBUG")
for name in ("teckochecker", "asyncio", "openai", "httpx2", "apscheduler.scheduler", ""):
    try:
        raise RuntimeError(f"broken {canary}") from ValueError([canary])
    except RuntimeError:
        logging.getLogger(name).exception("from %s: %s", name or "root", canary, stack_info=True)
tecko.log.debug("debug %r", canary)
logging.getLogger("httpx2").info("GET https://example.com/")

async def main():
    async def fails():
        raise LookupError(canary)
    task = asyncio.ensure_future(fails())
    await asyncio.sleep(0)
    del task

asyncio.run(main())
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_handler_of_the_program_redacts(tmp_path: Path, log_format: str) -> None:
    """In a process of its own: stderr and LOG_FILE, our log and the libraries', both formats."""
    (tmp_path / "p.py").write_text(PROCESS)
    ran = subprocess.run(
        [sys.executable, "p.py", CANARY, log_format],
        cwd=tmp_path,
        env=clean_environment({"PYTHONPATH": str(PROGRAM.parent)}),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    written = (tmp_path / "t.log").read_text()
    assert ran.stdout == "" and ran.stderr == written
    assert "c4n4ry" not in written and "GET https" not in written
    if log_format == "json":
        lines = [json.loads(line) for line in written.splitlines()]
        assert len(lines) == 8 and lines[0]["traceback"].count("***") == 2
        assert lines[-1]["logger"] == "asyncio" and "LookupError" in lines[-1]["traceback"]
    assert written.count("from ") >= 6 and "debug " in written
