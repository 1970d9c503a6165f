"""jobs.yaml, .env and the environment: what is refused in which words, and what loads."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from conftest import secrets_forgotten
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import teckochecker as tecko

ENV = {"OPENAI_KEY": "an-openai-key-of-tests", "KEBOOLA_KEY": "a-keboola-token-of-tests"}
EXAMPLE = Path(tecko.__file__).with_name("jobs.yaml.example")
LOOKS_LIKE_A_KEY = "sk-proj-abcdefghijklmnop0123"
LOOKS_LIKE_A_TOKEN = "1234-567890-abcdefghijklmnopqrstuvwxyz0123"

GOOD = """\
database: teckochecker.db
admin:
  host: 127.0.0.1
  port: 8000
secrets:
  openai: {type: openai, env: OPENAI_KEY}
  keboola: {type: keboola, env: KEBOOLA_KEY}
jobs:
  - name: nightly
    poll_interval: 2m
    watch:
      type: openai_batches
      secret: openai
      batch_ids: [batch_1]
      trigger_when: all_completed
    trigger:
      type: keboola
      secret: keboola
      stack_url: https://connection.keboola.com
      component_id: comp
      configuration_id: "123"
      variables: {region: eu}
      on_ambiguous: resend
"""

WATCH_BLOCK = GOOD[GOOD.index("    watch:") : GOOD.index("    trigger:")]
TRIGGER_BLOCK = GOOD[GOOD.index("    trigger:") :]
REFERENCES = GOOD[GOOD.index("secrets:") : GOOD.index("jobs:")]
JOBS_BLOCK = GOOD[GOOD.index("jobs:") :]
JOB = GOOD[GOOD.index("  - name") :]
HEAD = GOOD.removesuffix(JOB)

IDS = "1 to 10 different ids, each batch_ with letters, digits, _ or -"
BOUNDS = "30 to 3600 seconds"
INTERVAL = "seconds, or 30s, 2m, 1h, or auto (not an interval)"
NAME = "1 to 255 characters, not only digits"
URL = "https://connection.keboola.com or another stack, without a path (not a stack URL)"
VARIABLES = "names with non-empty values, none of TeckoChecker's own names"
REFERENCE = "a block of name: {type, env or file}"
ONE_PLACE = f"{REFERENCE} (needs exactly one of env and file)"
TYPES = "openai, keboola or api"
VARIABLE_NAME = "the name of an environment variable"
NO_VALUE = "found an unknown key; allowed: env, file, type"
DATABASE = "the path of the SQLite file"
DATABASES = "sqlite:///path, a path, or postgresql://host/name"
TOP_KEYS = "admin, alerts, backup, database, jobs, ping, secrets"
FILE_KEYS = "database, admin, backup, secrets, jobs, alerts, ping"  # in their order
JOB_KEYS = "ingest, name, poll_interval, trigger, watch"
WATCH_KEYS = "batch_ids, secret, trigger_when, type"
TRIGGER_KEYS = "component_id, configuration_id, on_ambiguous, secret, stack_url, type, variables"
A_JOB = "a block with name, watch and trigger"
WATCH = "a block with type, secret and batch_ids"
TRIGGER = "a block with type, secret, stack_url, component_id and configuration_id"
COMPONENT = "a component id like kds-team.app-custom-python"
CONFIGURATION = "a configuration id, in quotes"
OPENAI_SECRET = "the name of a secret of type openai"


def load(folder: Path, text: str | bytes = "", env: Mapping[str, str] = ENV) -> tecko.Config:
    """jobs.yaml with this text, as every command loads it."""
    path = folder / "jobs.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tecko.load_config(path, env)


def refusal(
    folder: Path,
    text: str | bytes = "",
    env: Mapping[str, str] = ENV,
    stored: Mapping[str | int, str] = {},
) -> tuple[list[str], str]:
    """The lines and the hint with which `start` refuses this file; none where it does not."""
    try:
        if problems := tecko.all_problems(load(folder, text, env), stored):
            raise tecko.Invalid(problems)
    except tecko.Invalid as e:
        return str(e).replace(f"{folder}/", "").split("\n"), e.hint
    return [], ""


def problems(folder: Path, text: str | bytes, env: Mapping[str, str] = ENV) -> list[str]:
    return refusal(folder, text, env)[0]


def found_in(folder: Path, text: str) -> list[tecko.Problem]:
    """The problems of a file, with their places."""
    try:
        return tecko.all_problems(load(folder, text), {})
    except tecko.Invalid as e:
        return e.problems


def edited(old: str, new: str) -> str:
    """GOOD with one thing changed."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def watching(config: tecko.Config) -> list[tecko.JobSpec]:
    """The jobs of a configuration that watch batches."""
    return [job for job in config.jobs or [] if isinstance(job, tecko.JobSpec)]


def spec(folder: Path, old: str, new: str) -> tecko.JobSpec:
    """The job of GOOD with one thing changed, which loads without problems."""
    config = load(folder, edited(old, new))
    assert (tecko.all_problems(config, {}), len(config.jobs or [])) == ([], 1)
    return watching(config)[0]


def test_the_file_that_the_wrong_ones_are_made_of_is_good(tmp_path: Path) -> None:
    """Without an edit there is nothing to say, so each message comes from its edit."""
    assert refusal(tmp_path, GOOD) == ([], "")


# ── What is refused ───────────────────────────────────────────────────────────────────────────

Row = tuple[str, str, str]


def rows(old: str, place: str, allowed: str, *written: object) -> list[Row]:
    """A row for each thing written in the place of `old`; a pair says how the message shows it."""
    made = []
    for value in written:
        text, found = value if isinstance(value, tuple) else (value, repr(value))
        new = text if isinstance(text, str) else json.dumps(text)
        made.append((old, new, f"{place}: found {found}; allowed: {allowed}"))
    return made


def unknown(old: str, new: str, place: str, allowed: str, meant: str = "") -> Row:
    question = f" (did you mean {meant!r}?)" if meant else ""
    return (old, new, f"{place}: found an unknown key{question}; allowed: {allowed}")


def twice(old: str, new: str, line: int, place: str, first: int) -> Row:
    key = place.rpartition(".")[2]
    return (old, new, f'{line}: {place}: duplicate key "{key}" (first on line {first})')


HEAD_ROWS = [
    unknown("database:", "databse:", "1: databse", TOP_KEYS, "database"),
    unknown("database:", "1:", "1: 1", TOP_KEYS),
    unknown("  host:", "  hots:", "3: admin.hots", "host, port", "host"),
    *rows("127.0.0.1", "3: admin.host", "a host name or address", ("''", "''"), ["a"]),
    *rows("8000", "4: admin.port", "0 to 65535", 65536, -1, "http", "1.5", True),
    *rows(
        "teckochecker.db", "1: database", DATABASE, ["a"], ("''", "''"), ("{a: b}", "{'a': 'b'}")
    ),
    *rows(
        JOBS_BLOCK[5:], "8: jobs", "a list of jobs", (" soon\n", "'soon'"), (" false\n", "False")
    ),
    *rows(JOBS_BLOCK[5:], "8: jobs", "a list of jobs", (" 0\n", "0"), (" ''\n", "''")),
    *rows(JOBS_BLOCK[5:], "8: jobs", "a list of jobs", (" {a: 1}\n", "{'a': 1}")),
    ("teckochecker.db", "a${UNSET}", "1: database: ${UNSET} is not set in the environment"),
    (
        "teckochecker.db",
        "mysql://me:hunter2@host/db",
        f"1: database: found mysql://; allowed: {DATABASES}",
    ),
    twice("jobs:\n", "database: b.db\njobs:\n", 8, "database", 1),
    twice(JOBS_BLOCK, "jobs: []\njobs: []\n", 9, "jobs", 8),
]

SECRET_ROWS = [
    unknown(
        "type: openai,", "type: openai, evn: A,", "6: secrets.openai.evn", "env, file, type", "env"
    ),
    ("type: openai,", "", f"6: secrets.openai.type: found nothing; allowed: {TYPES}"),
    ("type: openai,", "type: aws,", f"6: secrets.openai.type: allowed: {TYPES}"),
    ("env: OPENAI_KEY", "env: A, file: b", f"6: secrets.openai: allowed: {ONE_PLACE}"),
    (", env: OPENAI_KEY", "", f"6: secrets.openai: allowed: {ONE_PLACE}"),
    ("OPENAI_KEY", "[A]", f"6: secrets.openai.env: allowed: {VARIABLE_NAME}"),
    ("OPENAI_KEY", "''", f"6: secrets.openai.env: allowed: {VARIABLE_NAME}"),
    twice("env: OPENAI_KEY", "env: A, env: B", 6, "secrets.openai.env", 6),
    ("env: OPENAI_KEY", "value: hunter2", f"6: secrets.openai.value: {NO_VALUE}"),
    ("{type: openai, env: OPENAI_KEY}", "hunter2", f"6: secrets.openai: allowed: {REFERENCE}"),
    ("{type: openai, env: OPENAI_KEY}", "", f"6: secrets.openai: allowed: {REFERENCE}"),
    ("  openai: {", "  12: {", f"6: secrets.12: allowed: {REFERENCE}"),
]

# Rows of the job; each message begins with a line and "job 'nightly': " but for those of NAMELESS.

KEY_ROWS = [
    unknown(
        "    poll_interval:", "    pol_interval:", "10: pol_interval", JOB_KEYS, "poll_interval"
    ),
    unknown("poll_interval: 2m", "1: 2", "10: 1", JOB_KEYS),
    unknown("    poll_interval: 2m", "    inges: {type: csv}", "10: inges", JOB_KEYS, "ingest"),
    unknown("    poll_interval: 2m", "    batch_ids: [batch_2]", "10: batch_ids", JOB_KEYS),
    unknown("trigger_when:", "when:", "15: watch.when", WATCH_KEYS),
    unknown("on_ambiguous:", "ambiguous:", "23: trigger.ambiguous", TRIGGER_KEYS, "on_ambiguous"),
    (WATCH_BLOCK, "", f"9: watch: found nothing; allowed: {WATCH}"),
    (TRIGGER_BLOCK, "", f"9: trigger: found nothing; allowed: {TRIGGER}"),
    ("      secret: openai\n", "", f"11: watch.secret: found nothing; allowed: {OPENAI_SECRET}"),
    ("      batch_ids: [batch_1]\n", "", f"11: watch.batch_ids: found nothing; allowed: {IDS}"),
    (
        "      component_id: comp\n",
        "",
        f"16: trigger.component_id: found nothing; allowed: {COMPONENT}",
    ),
    (
        '      configuration_id: "123"\n',
        "",
        f"16: trigger.configuration_id: found nothing; allowed: {CONFIGURATION}",
    ),
    twice(" " * 6 + "type: keboola\n", 2 * "      type: keboola\n", 18, "trigger.type", 17),
    twice("region: eu", "region: eu, region: us", 22, "trigger.variables.region", 22),
    (
        "component_id: comp",
        "component_id: a-${UNSET}",
        "20: trigger.component_id: ${UNSET} is not set in the environment",
    ),
]

INTERVALS = [29, 3601, 0, -5, "10s", "61m", "2h"]
NO_INTERVALS = ["soon", "1.5", "60.0", "1:30", ("'1:30'", "'1:30'"), "1w", True, ("''", "''"), [60]]
NO_IDS = ["btch_1", "batch_", "batch_ä", "batch_a b", "batch_a/b", ('"batch_1\\n"', r"'batch_1\n'")]
TOO_MANY = [f"batch_{i}" for i in range(11)]
URLS = """
    http://connection.keboola.com https://connection.keboola.com/v2/storage connection.keboola.com
    ftp://connection.keboola.com https:// https://@connection.keboola.com
    https://connection.keboola.com?a=b https://keboola.com#part
    https://connection.keboola.com:99999 https://connection.keboola.com:http
    """.split()

VALUE_ROWS = [
    *rows("2m", "10: poll_interval", BOUNDS, *INTERVALS),
    *rows("2m", "10: poll_interval", INTERVAL, *NO_INTERVALS, None),
    *rows("batch_1", "14: watch.batch_ids[0]", IDS, *NO_IDS, 7, None),
    *rows("batch_1", "14: watch.batch_ids[0]", IDS, (f"batch_{'a' * 250}", f"'batch_{'a' * 73}")),
    *rows("[batch_1]", "14: watch.batch_ids", IDS, [], "batch_1", None, {"a": 1}),
    *rows("[batch_1]", "14: watch.batch_ids", IDS, (json.dumps(TOO_MANY), str(TOO_MANY)[:80])),
    *rows("[batch_1]", "14: watch.batch_ids", IDS, ["batch_1", "batch_1"]),
    *rows(
        WATCH_BLOCK[10:], "11: watch", WATCH, (" all\n", "'all'"), ("\n", "None"), (" []\n", "[]")
    ),
    *rows("openai_batches", "12: watch.type", "openai_batches", "other_batches"),
    *rows("all_completed", "15: watch.trigger_when", "all_completed or all_finished", "ALL", True),
    *rows("keboola\n      secret", "17: trigger.type", "keboola", ("x\n      secret", "'x'")),
    *rows("https://connection.keboola.com", "19: trigger.stack_url", URL, *URLS, "https://a b"),
    *rows("comp\n", "20: trigger.component_id", COMPONENT, ("''\n", "''"), ("\n", "None")),
    *rows('"123"', "21: trigger.configuration_id", CONFIGURATION, [1], True, None),
    *rows("eu}", "22: trigger.variables.region", VARIABLES, ("''}", "''"), ("}", "None")),
    *rows("eu}", "22: trigger.variables.region", VARIABLES, ("[eu]}", "['eu']")),
    *rows("{region: eu}", "22: trigger.variables", VARIABLES, ["region"], "region"),
    *rows(
        "{region: eu}",
        "22: trigger.variables",
        VARIABLES,
        {"a": "b", "batch_count_total": 1, "error_file_ids": "x"},
    ),
    *rows(
        "{region: eu}",
        "22: trigger.variables",
        VARIABLES,
        {"teckochecker_job": "x"},
        {" teckochecker_job ": "x"},
    ),
    *rows("resend", "23: trigger.on_ambiguous", "resend or hold", "maybe"),
]

MEANT, THERE_ARE = (
    " (did you mean 'openai'?)",
    "(there are: keboola, openai); `secret add --name opnai --type openai` stores it",
)

SECRET_NAME_ROWS = [
    *rows("openai\n", "13: watch.secret", OPENAI_SECRET, ("''\n", "''"), ("[a]\n", "['a']")),
    *rows("openai\n", "13: watch.secret", OPENAI_SECRET, ("true\n", "True"), ("\n", "None")),
    *(
        (old, new, f"13: watch.secret: {said}")
        for old, new, said in (
            ("openai\n", "opnai\n", f"there is no secret 'opnai'{MEANT} {THERE_ARE}"),
            ("openai\n", "keboola\n", "secret 'keboola' is of type keboola; needed: openai"),
            (
                "env: OPENAI_KEY",
                "env: NOT_THERE",
                "secret 'openai': the environment variable NOT_THERE is not set",
            ),
            (
                "env: OPENAI_KEY",
                "file: not/there",
                "secret 'openai': cannot read not/there: No such file or directory",
            ),
        )
    ),
]

NAMELESS_ROWS = [
    ("name: nightly\n    ", "", f"9: job number 1: name: found nothing; allowed: {NAME}"),
    *rows("nightly", "9: job number 1: name", NAME, ("''", "''"), None),
    *rows("nightly", "9: job 12: name", NAME, 12),
    *rows("nightly", "9: job '12': name", NAME, ("'12'", "'12'")),
    *rows("nightly", r"9: job 'a\tb': name", NAME, ('"a\\tb"', r"'a\tb'")),
    *rows("nightly", f"9: job '{'n' * 256}': name", NAME, ("n" * 256, f"'{'n' * 79}")),
    *rows(JOB[4:], "9: job number 1: job", A_JOB, "soon", None, ["a"]),
]

ROWS = [
    *HEAD_ROWS,
    *SECRET_ROWS,
    *NAMELESS_ROWS,
    *(
        (old, new, said.replace(": ", ": job 'nightly': ", 1))
        for old, new, said in KEY_ROWS + VALUE_ROWS + SECRET_NAME_ROWS
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), ROWS, ids=[said[:60] for _, _, said in ROWS])
def test_a_wrong_file_and_its_exact_message(tmp_path: Path, old: str, new: str, said: str) -> None:
    """File, line, job, field, what was found and what is allowed; one error, one line."""
    assert problems(tmp_path, edited(old, new)) == [f"jobs.yaml:{said}"]


ENDLESS = "nested more than 40 levels deep, or an alias that contains itself"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs:\n\t- name: a\n", ":2: not YAML: found character that cannot start any token"),
        ("jobs: [\n", ":2: not YAML: did not find expected node content"),
        ("jobs:\n  - a: 1\n   b: 2\n", ":3: not YAML: did not find expected '-' indicator"),
        ("jobs: []\n---\njobs: []\n", ":2: not YAML: but found another document"),
        ("jobs: *nobody\n", ":1: not YAML: found undefined alias"),
        ("jobs: &a [*a]\n", f":1: {ENDLESS}"),
        ("jobs:\n  - &a\n    watch: *a\n", f":2: {ENDLESS}"),
        ("- a\n", f":1: found a list; allowed: {FILE_KEYS}"),
        ("soon\n", f":1: found text; allowed: {FILE_KEYS}"),
        (b"jobs: \xff\n", ": cannot be read: it is not UTF-8: invalid start byte, byte 6"),
        (
            b"jobs: \x00\n",
            ": not a YAML text: unacceptable character #x0000: control characters are not allowed",
        ),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str | bytes, said: str) -> None:
    """Broken YAML, other encodings and other shapes are refused in one line, with the place."""
    assert problems(tmp_path, text) == [f"jobs.yaml{said}"]


@pytest.mark.parametrize(
    "line", ["!!float x", "!!int x", "!!timestamp soon", "!!python/object:os.system {}"]
)
def test_a_tag_that_does_not_fit_is_refused(tmp_path: Path, line: str) -> None:
    """A tag never ends in a traceback, and never makes an object: the line is named."""
    [said] = problems(tmp_path, edited("teckochecker.db", line))
    assert said.startswith("jobs.yaml:1: ")


def test_a_key_that_is_a_list_is_refused_in_words(tmp_path: Path) -> None:
    """A key that is no text is named by its line, not by the parser's insides."""
    [said] = problems(tmp_path, edited("  host:", "  [host]:"))
    assert said == "jobs.yaml:3: a list or block as a key; allowed: text"
    assert "Node(" not in said


def test_a_path_that_is_a_directory(tmp_path: Path) -> None:
    """What cannot be read is refused, with the system's reason."""
    (tmp_path / "jobs.yaml").mkdir()
    with pytest.raises(tecko.Invalid, match=r"jobs\.yaml: cannot be read: Is a directory$"):
        tecko.load_config(tmp_path / "jobs.yaml", ENV)


def test_an_unset_name_in_place_of_all_jobs(tmp_path: Path) -> None:
    """${NAME} may stand anywhere, and is said to be unset anywhere."""
    said = problems(tmp_path, "database: a.db\njobs: ${UNSET}\n")
    assert said[0] == "jobs.yaml:2: jobs: ${UNSET} is not set in the environment"


def test_two_jobs_of_one_name(tmp_path: Path) -> None:
    """The second one is refused and points to the first, white space or not."""
    second = JOB.replace("nightly", "' nightly '")
    said = "line 9 has a job of this name already"
    assert problems(tmp_path, GOOD + second) == [f"jobs.yaml:24: job ' nightly ': name: {said}"]


@pytest.mark.parametrize("value", ["  ", "two\nlines", "schlüssel"])
def test_a_secret_whose_value_is_none(tmp_path: Path, value: str) -> None:
    """An empty or impossible value is refused, with the secret's name and without the value."""
    said = problems(tmp_path, GOOD, ENV | {"OPENAI_KEY": value})
    assert len(said) == 1 and "'openai'" in said[0]
    assert value not in said[0]


ADDED = "; `secret add --name stored --type openai` stores it"


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, f"there is no secret 'stored' (there are: keboola, openai){ADDED}"),
        ({"mine": "api"}, f"there is no secret 'stored' (there are: keboola, mine, openai){ADDED}"),
        ({"stored": "keboola"}, "secret 'stored' is of type keboola; needed: openai"),
        ({"stored": "openai"}, None),
    ],
)
def test_a_secret_of_the_store(tmp_path: Path, stored: dict[str | int, str], said: str) -> None:
    """A job may name one that only the store has, when it has the right type."""
    found, _ = refusal(tmp_path, edited("secret: openai", "secret: stored"), stored=stored)
    assert [line.partition(": job 'nightly': ")[2] for line in found] == (
        [f"watch.secret: {said}"] if said else []
    )


def test_a_stored_secret_wins_over_a_reference(tmp_path: Path) -> None:
    """What jobs.yaml says of a name that the store has is not even read."""
    text = edited("env: OPENAI_KEY", "env: NOT_THERE")
    assert len(problems(tmp_path, text)) == 1
    assert refusal(tmp_path, text, stored={"openai": "openai"}) == ([], "")


# ── No message shows a secret ─────────────────────────────────────────────────────────────────

OPENAI_REFERENCE = "  openai: {type: openai, env: OPENAI_KEY}\n"


WRITTEN_SECRETS = [
    ("{type: openai, env: OPENAI_KEY}", "hunter2-canary"),
    ("{type: openai, env: OPENAI_KEY}", "[hunter2-canary]"),
    ("env: OPENAI_KEY", "value: hunter2-canary"),
    ("env: OPENAI_KEY", "token: hunter2-canary"),
    ("env: OPENAI_KEY", "env: [hunter2-canary]"),
    ("env: OPENAI_KEY", "env: A, file: hunter2-canary"),
    ("type: openai, env", "type: hunter2-canary, env"),
    (REFERENCES, "secrets: hunter2-canary\n"),
    (REFERENCES, "secrets: [hunter2-canary]\n"),
    *(
        (OPENAI_REFERENCE, f"  {name}: hunter2-canary\n")
        for name in ("admin", "database", "jobs", "secrets", "port", "type", "value")
    ),
    ("teckochecker.db", "mysql://me:hunter2-canary@host/db"),
    ("https://connection", "https://me:hunter2-canary@connection"),
]


@pytest.mark.parametrize(
    ("old", "new"), WRITTEN_SECRETS, ids=[new.strip() for _, new in WRITTEN_SECRETS]
)
def test_a_secret_written_into_the_file_is_refused_and_not_shown(
    tmp_path: Path, old: str, new: str
) -> None:
    """Whatever stands where a secret's value could stand is in no message."""
    said = problems(tmp_path, edited(old, new))
    assert said and not any("hunter2" in line for line in said)


WRITTEN_KEYS = [
    ("teckochecker.db", "[LEAK]"),
    ("database", "LEAK"),
    ("secret: openai", "secret: LEAK"),
    ("OPENAI_KEY", "LEAK"),
    ("env: OPENAI_KEY", "file: /run/LEAK"),
    ("[batch_1]", "[LEAK]"),
    ("2m", "LEAK"),
    ("resend", "LEAK"),
    ("    poll_interval", "    LEAK"),
    ("https://connection.keboola.com", "https://a/LEAK"),
    ("https://connection.keboola.com", f"https://{'a' * 50}/LEAK"),
    (GOOD, "LEAK"),
    (GOOD, "- LEAK"),
    (GOOD, "- some longer words\n- LEAK"),
    (GOOD, f"jobs:\n  {'a' * 58}: LEAK"),
]


@pytest.mark.parametrize("key", [LOOKS_LIKE_A_KEY, LOOKS_LIKE_A_TOKEN], ids=["key", "token"])
@pytest.mark.parametrize(("old", "new"), WRITTEN_KEYS, ids=[new.strip() for _, new in WRITTEN_KEYS])
def test_no_message_shows_what_looks_like_a_key(
    tmp_path: Path, old: str, new: str, key: str
) -> None:
    """Not even the part of it that is left when a long value is cut."""
    said = problems(tmp_path, edited(old, new).replace("LEAK", key))
    assert said
    assert not any(key[:n] in line for line in said for n in range(len(key), 16, -1))


# ── All errors at once ────────────────────────────────────────────────────────────────────────

SECOND_JOB = """\
  - name: second
    poll_interval: 1s
    watch: {secret: nobody, batch_ids: []}
    trigger:
      secret: openai
      stack_url: http://keboola.com
      component_id: comp
      configuration_id: "1"
"""


def test_all_errors_of_the_jobs_at_once(tmp_path: Path) -> None:
    """Everything wrong with several jobs, in the order of the file."""
    text = edited("2m", "1").replace("resend", "maybe").replace("eu}", "'${UNSET}!'}")
    second = SECOND_JOB.replace("nobody", "openai").replace("secret: openai\n", "secret: keboola\n")
    assert problems(tmp_path, text + second) == [
        "jobs.yaml:10: job 'nightly': poll_interval: found 1; allowed: 30 to 3600 seconds",
        "jobs.yaml:22: job 'nightly': trigger.variables.region:"
        " ${UNSET} is not set in the environment",
        "jobs.yaml:23: job 'nightly': trigger.on_ambiguous: found 'maybe'; allowed: resend or hold",
        "jobs.yaml:25: job 'second': poll_interval: found '1s'; allowed: 30 to 3600 seconds",
        f"jobs.yaml:26: job 'second': watch.batch_ids: found []; allowed: {IDS}",
        "jobs.yaml:29: job 'second': trigger.stack_url: found 'http://keboola.com';"
        f" allowed: {URL}",
    ]


def test_errors_of_the_head_and_of_the_jobs_at_once(tmp_path: Path) -> None:
    """A wrong port does not hide a wrong job: nobody starts the program twice to see both."""
    text = edited("8000", "http").replace("2m", "1").replace("type: openai,", "type: aws,")
    assert problems(tmp_path, text) == [
        "jobs.yaml:4: admin.port: found 'http'; allowed: 0 to 65535",
        "jobs.yaml:6: secrets.openai.type: allowed: openai, keboola or api",
        "jobs.yaml:10: job 'nightly': poll_interval: found 1; allowed: 30 to 3600 seconds",
    ]


def test_an_unknown_secret_beside_other_errors(tmp_path: Path) -> None:
    """A job with a bad value is also told of its unknown and wrong secrets, in file order."""
    said = problems(tmp_path, GOOD.replace("secret: openai", "secret: opnai") + SECOND_JOB)
    found = [re.findall(r"jobs\.yaml:(\d+): job '(\w+)': ([\w.]+):", line) for line in said]
    assert [row[0] if row else said for row in found] == [
        ("13", "nightly", "watch.secret"),
        ("25", "second", "poll_interval"),
        *[("26", "second", "watch.secret"), ("26", "second", "watch.batch_ids")],
        ("28", "second", "trigger.secret"),
        ("29", "second", "trigger.stack_url"),
    ]


def test_a_name_taken_by_a_job_that_is_itself_wrong(tmp_path: Path) -> None:
    """A duplicate name is said even when the first of the two has another error."""
    said = problems(tmp_path, edited("2m", "1") + SECOND_JOB.replace("second", "nightly"))
    assert "jobs.yaml:24: job 'nightly': name: line 9 has a job of this name already" in said


def test_a_message_is_one_line_whatever_the_file_says(tmp_path: Path) -> None:
    """Escape sequences and line ends in keys and names do not reach a terminal raw."""
    text = edited("    poll_interval", '    "a\\nb\\e[31m"').replace("nightly", '"x\\ny"')
    said = problems(tmp_path, text)
    assert len(said) == 2 and all(line.isprintable() for line in said)


KEYS = st.sampled_from(
    "database admin host port secrets openai type env file value jobs name poll_interval watch"
    " secret batch_ids trigger_when trigger stack_url component_id variables batch_1".split()
) | st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | KEYS
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5)
)
YAML_TEXTS = st.lists(
    st.sampled_from(
        "jobs: secrets: name: - [ ] { } , : & *a &a << ${X} !!int !!float ? | > ' \" # 1 ~ true"
        " --- ... % @ ` a openai env: file: watch: ingest: type: csv".split()
    )
    | st.sampled_from(["\n", "\n  ", "\n    ", " "]),
    max_size=25,
).map("".join)
JOBS = st.lists(st.dictionaries(KEYS, ANYTHING, max_size=6) | ANYTHING, max_size=3)


@hypothesis.settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({"jobs": JOBS}, optional={"secrets": ANYTHING, "admin": ANYTHING}))
def test_no_file_ends_in_a_traceback(data: dict[str, Any]) -> None:
    """Whatever stands under the known keys: it loads, or every line of the refusal says where."""
    with tempfile.TemporaryDirectory() as folder:
        for line in problems(Path(folder), json.dumps(data)):
            assert line.startswith(("jobs.yaml:", "the admin surface would listen on"))


@hypothesis.settings(deadline=None, max_examples=150)
@given(st.text() | YAML_TEXTS | st.binary(max_size=40))
def test_any_text_gives_a_configuration_or_a_refusal(text: str | bytes) -> None:
    """Nothing that stands in jobs.yaml ends in any other way, whatever is asked of it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(tecko.Invalid):
        config = load(
            Path(folder), text.encode(errors="replace") if isinstance(text, str) else text
        )
        tecko.all_problems(config, {}, unused=True)


TIMES_TEN = ", ".join(["*{0}"] * 10)
LEVELS = [f"{b}: &{b} [{TIMES_TEN.format(a)}]" for a, b in itertools.pairwise("abcdefghij")]
MERGES = [f"{b}: &{b} {{<<: [{TIMES_TEN.format(a)}]}}" for a, b in itertools.pairwise("abcdefghij")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x, x, x]\n" + "\n".join(LEVELS), "aliases repeat more than 100000 values"),
        ("a: &a {x: 1}\n" + "\n".join(MERGES), "aliases repeat more than 100000 values"),
        ("jobs: " + "[" * 900 + "]" * 900, "nested more than 40 levels deep"),
        ("jobs: " + "[" * 10**5, "nesting depth"),
        ("- " * 10**5, "nesting depth"),
        ("x" * (11 << 20), "more than 10485760 bytes"),
    ],
    ids=["laughs", "merged laughs", "deep", "too deep", "deep block", "large"],
)
def test_a_small_file_that_means_much_is_refused_at_once(
    tmp_path: Path, text: str, said: str
) -> None:
    """Aliases are counted while they are followed, depth and size are bounded, each honestly."""
    with pytest.raises(tecko.Invalid, match=said):
        load(tmp_path, text)


def test_what_aliases_share_is_not_printed_whole() -> None:
    """A shared structure that is small in memory is cut before it becomes a text of gigabytes."""
    shared: list[Any] = ["x"]
    for _ in range(40):
        shared = [shared] * 10
    assert len(tecko.repr_excerpt(shared)) <= 80


def test_a_pipe_in_place_of_a_file_blocks_nobody(tmp_path: Path) -> None:
    """jobs.yaml and .env are read when they are regular files, and refused at once otherwise."""
    for name in ("jobs.yaml", ".env"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(tecko.Invalid, match=name):
            tecko.load_config(tmp_path / "jobs.yaml", ENV)
        (tmp_path / name).unlink()


def test_a_problem_knows_its_line_and_column(tmp_path: Path) -> None:
    """Line, column and the line's text, for broken YAML and for a wrong value alike."""
    [broken] = found_in(tmp_path, "jobs:\n\t- name: a\n")
    assert (broken.line, broken.column, broken.source) == (
        2,
        1,
        "\t- name: a".replace("\t", "\\x09"),
    )
    [wrong] = found_in(tmp_path, edited("resend", "maybe"))
    assert (wrong.where, wrong.found) == ("job 'nightly': trigger.on_ambiguous", "'maybe'")
    assert (wrong.line, wrong.column, wrong.allowed) == (23, 7, "resend or hold")
    assert wrong.source == "      on_ambiguous: maybe"


@pytest.mark.parametrize(
    "text",
    [
        edited("env: OPENAI_KEY", "value: hunter2-canary"),
        edited("env: OPENAI_KEY}", "value: hunter2-canary, port: {}}"),
        edited("secret: openai\n", "secret: openai\n      value: hunter2-canary\n"),
        "secrets: {a: {type: openai, value: hunter2-canary",
        "hunter2-canary",
    ],
)
def test_the_shown_line_has_no_secret(tmp_path: Path, text: str) -> None:
    """A line with what may be a secret's value is shown without it."""
    shown = [problem.source for problem in found_in(tmp_path, text)]
    assert shown and not any("hunter2" in line for line in shown)


@pytest.mark.parametrize(
    "jobs", ["{a: 1, a: 2}", "{a: '${UNSET}'}", "{a: !!float x}", "[!!float x]", "{1: {2: '${X}'}}"]
)
def test_jobs_of_another_shape(tmp_path: Path, jobs: str) -> None:
    """A mapping with a duplicate key, a tag or an unset name in it is refused in words."""
    assert all(line.startswith("jobs.yaml:1: ") for line in problems(tmp_path, f"jobs: {jobs}"))


@pytest.mark.parametrize("field", ["variables: {key: '${TOKEN}'}", "component_id: 'a-${TOKEN}'"])
def test_the_value_of_a_secret_is_refused_as_a_text(tmp_path: Path, field: str) -> None:
    """What is known as a secret is neither stored with a job nor shown in an answer."""
    old = "variables: {region: eu}" if field.startswith("v") else "component_id: comp"
    env = ENV | {"TOKEN": ENV["KEBOOLA_KEY"]}
    [said] = problems(tmp_path, edited(old, field), env)
    assert "the value of a secret" in said and "name it in `secret`" in said
    assert ENV["KEBOOLA_KEY"] not in said


def test_a_reference_that_no_job_uses(tmp_path: Path) -> None:
    """`validate` says that it cannot be read; `start`, which does not need it, goes on."""
    text = edited("jobs:", "  spare: {type: api, file: '${CREDENTIALS_DIRECTORY}/x'}\njobs:")
    config = load(tmp_path, text)
    assert tecko.all_problems(config, {}) == []
    [problem] = tecko.all_problems(config, {}, unused=True)
    assert (problem.line, problem.where) == (8, "secrets.spare")
    assert "${CREDENTIALS_DIRECTORY} is not set" in problem.found


def test_a_reference_that_needs_what_is_unset(tmp_path: Path) -> None:
    """${CREDENTIALS_DIRECTORY} outside of its service is an error only of the job that needs it."""
    text = edited("env: OPENAI_KEY", "file: '${CREDENTIALS_DIRECTORY}/openai'")
    [said] = problems(tmp_path, text)
    assert said.startswith("jobs.yaml:13: job 'nightly': watch.secret:") and "not set" in said


# ── What loads ────────────────────────────────────────────────────────────────────────────────


def test_words_that_older_yaml_takes_for_something_else(tmp_path: Path) -> None:
    """No, octal numbers, floats, dates and minutes are the text that was written."""
    written = (
        "no: no, on: Yes, octal: 0123, float: 1.10, exponent: 1e3, hex: 0x1F, date: 2024-01-02"
    )
    job = spec(tmp_path, "{region: eu}", f"{{{written}, time: 12:30, under: 1_000, nan: .nan}}")
    assert job.trigger.variables == {
        **{"no": "no", "on": "Yes", "octal": "0123", "float": "1.10", "exponent": "1e3"},
        **{"hex": "0x1F", "date": "2024-01-02", "time": "12:30", "under": "1_000", "nan": ".nan"},
    }


def test_numbers_and_truth_as_variables_are_text(tmp_path: Path) -> None:
    """Keboola takes only texts."""
    job = spec(tmp_path, "{region: eu}", "{n: 7, yes: true, no: false, quoted: 'true', 5: -3}")
    expected = {"n": "7", "yes": "true", "no": "false", "quoted": "true", "5": "-3"}
    assert job.trigger.variables == expected


@pytest.mark.parametrize(
    ("written", "text"),
    [("123456", "123456"), ("0123", "0123"), ("1.10", "1.10"), ("'  7 '", "7"), ("01abc", "01abc")],
)
def test_a_configuration_id_without_quotes(tmp_path: Path, written: str, text: str) -> None:
    """It stays as it was written: no octal, no lost zero."""
    assert spec(tmp_path, '"123"', written).trigger.configuration_id == text


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        *[("30", 30), ("'90'", 90), ("45s", 45), ("90 s", 90), ("2m", 120), ("' 2m '", 120)],
        *[("1h", 3600), ("60m", 3600), ("3600", 3600), ("3600s", 3600)],
    ],
)
def test_an_interval_in_every_notation(tmp_path: Path, written: str, seconds: int) -> None:
    """Seconds with or without s, minutes, hours, up to both bounds."""
    assert spec(tmp_path, "2m", written).poll_interval == seconds


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("https://connection.keboola.com/", "https://connection.keboola.com"),
        (
            "HTTPS://Connection.EU-Central-1.keboola.com",
            "https://connection.eu-central-1.keboola.com",
        ),
        ("https://stack.example:8443", "https://stack.example:8443"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost:1", "http://localhost:1"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_a_stack_url_is_kept_clean(tmp_path: Path, written: str, url: str) -> None:
    """One spelling of each, https, or http to this machine."""
    assert spec(tmp_path, "https://connection.keboola.com", written).trigger.stack_url == url


def test_a_presigned_url_is_taken(tmp_path: Path) -> None:
    """URLs and paths may have 2,000 characters, and no more."""
    job = "  - {{name: a, ingest: {{type: csv, path: 'https://s3.example/{}'}}}}\n"
    assert problems(tmp_path, f"jobs:\n{job.format('x' * 1981)}") == []
    assert len(problems(tmp_path, f"jobs:\n{job.format('x' * 1982)}")) == 1


def test_the_longest_names_and_ids(tmp_path: Path) -> None:
    """255 characters of a name, 255 of a batch id, ten ids."""
    ids = [f"batch_{'b' * 248}{i}" for i in range(10)]
    text = edited("nightly", "n" * 255).replace("[batch_1]", str(ids))
    [job] = watching(load(tmp_path, text))
    assert (job.name, job.watch.batch_ids) == ("n" * 255, ids)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    """A job needs a name, two secrets, batches and a target; the rest is as INTERFACE says."""
    short = """
      - name: a
        watch: {secret: openai, batch_ids: [batch_1]}
        trigger: {secret: keboola, stack_url: https://a.b, component_id: c, configuration_id: d}
    """
    [job] = watching(load(tmp_path, HEAD + short))
    assert (job.poll_interval, job.watch.type) == (120, "openai_batches")
    assert (job.watch.trigger_when, job.trigger.type) == ("all_completed", "keboola")
    assert (job.trigger.variables, job.trigger.on_ambiguous) == ({}, "resend")


FLAT_JOB = """\
  - name: nightly
    poll_interval_seconds: 120
    batch_id: batch_1
    openai_secret: openai
    keboola_secret: keboola
    keboola_stack_url: https://connection.keboola.com
    keboola_component_id: comp
    keboola_configuration_id: 123
    variables: {region: eu}
"""


def test_the_flat_form_is_the_nested_one(tmp_path: Path) -> None:
    """A job as the REST API writes it is the same job."""
    nested = load(tmp_path, GOOD).jobs
    assert load(tmp_path, HEAD + FLAT_JOB).jobs == nested
    renamed = FLAT_JOB.replace("batch_id: batch_1", "batch_ids: [batch_1]")
    assert load(tmp_path, HEAD + renamed).jobs == nested


def test_batch_id_and_batch_ids_together_are_refused(tmp_path: Path) -> None:
    """Neither of the two is dropped in silence."""
    both = FLAT_JOB.replace("batch_id:", "batch_ids: [batch_2]\n    batch_id:")
    assert problems(tmp_path, HEAD + both) == [
        "jobs.yaml:12: job 'nightly': batch_id: batch_ids means the same, and is there, too"
    ]


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    """A target written once serves several jobs, changed or not, and so does a changed one."""
    jobs = """\
  - name: a
    watch: {secret: openai, batch_ids: [batch_1]}
    trigger: &base
      {secret: keboola, stack_url: "https://a.b", component_id: comp, configuration_id: 1}
  - name: b
    watch: {secret: openai, batch_ids: [batch_2]}
    trigger: &changed
      <<: *base
      configuration_id: 2
  - name: c
    watch: {secret: openai, batch_ids: [batch_3]}
    trigger: *changed
  - name: d
    watch: {secret: openai, batch_ids: [batch_4]}
    trigger:
      <<: *changed
      component_id: other
"""
    text = HEAD + jobs
    assert problems(tmp_path, text) == []
    made = [job.trigger for job in watching(load(tmp_path, text))]
    assert [t.configuration_id for t in made] == ["1", "2", "2", "2"]
    assert [t.component_id for t in made] == ["comp", "comp", "comp", "other"]


def test_names_out_of_the_environment(tmp_path: Path) -> None:
    """${NAME} is replaced in any string, once: what comes out is not looked at again."""
    text = edited("id: comp", "id: a.${X}-${Y_1}").replace(
        "region: eu", "a: $X, b: '${Z}', c: '${}'"
    )
    [job] = watching(load(tmp_path, text, ENV | {"X": "one", "Y_1": "two", "Z": "${X}"}))
    assert job.trigger.component_id == "a.one-two"
    assert job.trigger.variables == {"a": "$X", "b": "${X}", "c": "${}"}


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    """Some editors write one."""
    assert load(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).jobs == load(tmp_path, GOOD).jobs


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "jobs:\nsecrets:\nadmin:\ndatabase:\n"])
def test_a_file_with_nothing_in_it(tmp_path: Path, text: str) -> None:
    """The defaults, and no word about jobs: only `jobs: []` says that there are none; a key without
    a value is as good as no key."""
    config = load(tmp_path, text, {})
    assert (config.jobs, dict(config.secrets), tecko.all_problems(config, {})) == (None, {}, [])
    assert (config.settings.api_host, config.settings.api_port) == ("127.0.0.1", 8000)
    assert config.settings.database == tmp_path / "teckochecker.db"


def test_a_missing_file(tmp_path: Path) -> None:
    """Without jobs.yaml there are settings and no word about jobs; a file asked for must exist."""
    config = tecko.load_config(tmp_path / "jobs.yaml", {"API_PORT": "9"})
    assert (config.jobs, config.settings.api_port) == (None, 9)
    with pytest.raises(tecko.Invalid) as refused:
        tecko.load_config(tmp_path / "jobs.yaml", {}, must_exist=True)
    assert str(refused.value) == f"{tmp_path}/jobs.yaml: there is no such file"
    assert refused.value.hint == f"{tecko.COMMAND} init writes a first one"


def test_two_thousand_jobs(tmp_path: Path) -> None:
    """A large file loads whole, each job known by its name."""
    text = HEAD + "".join(JOB.replace("nightly", f"job-{i}") for i in range(2000))
    config = load(tmp_path, text)
    assert [j.name for j in config.jobs or []] == [f"job-{i}" for i in range(2000)]
    assert config.problems == []


def test_a_secret_file_stands_beside_jobs_yaml(tmp_path: Path) -> None:
    """A relative path counts from there, and may hold a name of the environment."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "openai").write_text("a-key-in-a-file\n")
    text = edited("env: OPENAI_KEY", "file: '${FOLDER}/openai'")
    assert problems(tmp_path, text, ENV | {"FOLDER": "keys"}) == []
    assert problems(tmp_path, text, ENV | {"FOLDER": str(tmp_path / "keys")}) == []


# ── Settings ──────────────────────────────────────────────────────────────────────────────────


def test_the_environment_wins_over_dot_env_wins_over_yaml(tmp_path: Path) -> None:
    """One setting from each place, each of them set in all the places below it."""
    (tmp_path / ".env").write_text("API_PORT=2\nexport API_HOST='localhost'\nDATABASE_URL=b.db\n")
    text = "database: a.db\nadmin: {host: 127.0.0.1, port: 1}\n"
    made = load(tmp_path, text, {"API_PORT": "3"}).settings
    assert (made.api_port, made.api_host, made.database) == (3, "localhost", tmp_path / "b.db")
    (tmp_path / ".env").unlink()
    made = load(tmp_path, text, {}).settings
    assert (made.api_port, made.api_host, made.database) == (1, "127.0.0.1", tmp_path / "a.db")


def test_dot_env_serves_secrets_and_names_too(tmp_path: Path) -> None:
    """What jobs.yaml takes out of the environment may stand there; the real one wins here too."""
    (tmp_path / ".env").write_text("KEBOOLA_KEY=a-token\nWHERE=file\nRAW='a ${WHERE} b'\n")
    text = edited("{region: eu}", "{from: '${WHERE}', raw: '${RAW}'}")
    [job] = watching(load(tmp_path, text, {"OPENAI_KEY": "a-key-of-tests", "WHERE": "process"}))
    assert job.trigger.variables == {"from": "process", "raw": "a ${WHERE} b"}
    assert problems(tmp_path, text, {"OPENAI_KEY": "a-key-of-tests"}) == []


def test_a_dot_env_that_is_no_text(tmp_path: Path) -> None:
    """It is named in a refusal, not in a traceback."""
    (tmp_path / ".env").write_bytes(b"API_PORT=\xff\n")
    [said] = problems(tmp_path, GOOD)
    assert said.startswith(".env")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///rel/a.db", "rel/a.db"),
        ("sqlite:////abs/a.db", "/abs/a.db"),
        ("plain.db", "plain.db"),
        ("./plain.db", "plain.db"),
        ("/abs/plain.db", "/abs/plain.db"),
    ],
)
def test_where_the_database_is(tmp_path: Path, url: str, path: str) -> None:
    """A URL or a path, relative to jobs.yaml, from the environment or the file alike."""
    assert load(tmp_path, "", {"DATABASE_URL": url}).settings.database == tmp_path / path
    assert load(tmp_path, f"database: {url}\n").settings.database == tmp_path / path


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("mysql+aiomysql://host/db", "mysql+aiomysql://"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///", "sqlite://"),
        (":memory:", "':memory:'"),
        ("sqlite:///:memory:", "sqlite://"),
    ],
)
def test_a_database_that_cannot_be_used(tmp_path: Path, url: str, found: str) -> None:
    """Other databases, and none at all, are refused with what is allowed; no password is shown."""
    said = problems(tmp_path, GOOD, ENV | {"DATABASE_URL": url})
    assert said == [f"DATABASE_URL: found {found}; allowed: {DATABASES}"]


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("API_PORT", ["-1", "65536", "http", "1.5"], "0 to 65535; 0 takes a free one"),
        ("DEFAULT_POLL_INTERVAL", ["0", "86401", "2m", "1.5"], "whole seconds, 1 to 86400"),
        ("MIN_POLL_INTERVAL", ["0", "86401", "30s"], "whole seconds, 1 to 86400"),
        ("MAX_POLL_INTERVAL", ["0", "86401", "1h"], "whole seconds, 1 to 86400"),
        ("MAX_RETRIES", ["-1", "101", "many"], "0 to 100"),
        ("RETRY_DELAY", ["0", "3601", "1m"], "whole seconds, 1 to 3600"),
        ("TRIGGER_SETTLE_SECONDS", ["0", "86401", "2m"], "whole seconds, 1 to 86400"),
        ("LOG_LEVEL", ["LOUD", "10"], "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        ("LOG_FORMAT", ["xml"], "text or json"),
    ],
)
def test_a_setting_out_of_range(tmp_path: Path, name: str, values: list[str], allowed: str) -> None:
    """Its variable, what was found and what is allowed."""
    for value in values:
        said = problems(tmp_path, GOOD, ENV | {name: value})
        assert said == [f"environment: {name}: found {value!r}; allowed: {allowed}"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"MIN_POLL_INTERVAL": "500", "MAX_POLL_INTERVAL": "100"},
            "DEFAULT_POLL_INTERVAL: found 120; allowed: 500 to 100, from MIN_POLL_INTERVAL",
        ),
        (
            {"OPENAI_BASE_URL": "http://api.openai.com/v1"},
            "OPENAI_BASE_URL: found 'http://api.openai.com/v1'; allowed: a URL like"
            " https://api.openai.com/v1 (a secret goes over https only)",
        ),
        ({"ADMIN_TOKEN": "a-token"}, "ADMIN_TOKEN: found fewer characters; allowed: at least 8,"),
    ],
)
def test_settings_that_would_do_harm(tmp_path: Path, given: dict[str, str], said: str) -> None:
    """Bounds that contradict each other, a key over plain http, a token that is soon guessed."""
    [line] = problems(tmp_path, GOOD, ENV | given)
    assert line.startswith(f"environment: {said}")


def test_openai_on_this_machine_may_be_plain(tmp_path: Path) -> None:
    """Nobody listens in on loopback."""
    made = load(tmp_path, GOOD, ENV | {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}).settings
    assert made.openai_base_url == "http://127.0.0.1:1/v1"


def test_what_dot_env_sets_in_vain_is_said(tmp_path: Path) -> None:
    """A line without `=`, and a name that is almost one of ours; foreign names are nobody's."""
    (tmp_path / ".env").write_text("API_PORT\n# a remark\nAPI_PRT=9000\nOPENAI_API_KEY=x\n\n")
    config = load(tmp_path, GOOD)
    assert [line.replace(f"{tmp_path}/", "") for line in config.warnings] == [
        ".env: API_PORT is ignored, for it is not NAME=value",
        ".env: API_PRT is no setting of TeckoChecker (did you mean 'API_PORT'?)",
    ]


def test_a_key_file_that_all_can_read_is_said(tmp_path: Path) -> None:
    """Not refused, since it works; but it is no secret then."""
    tecko.write_private(tmp_path / "teckochecker.key", "x")
    assert load(tmp_path, GOOD).warnings == []
    (tmp_path / "teckochecker.key").chmod(0o644)
    [said] = load(tmp_path, GOOD).warnings
    assert "teckochecker.key can be read by all" in said and "chmod 600" in said


def test_a_database_on_a_server(tmp_path: Path) -> None:
    """PostgreSQL's URL goes through as it is, and its password is a secret everywhere."""
    url = "postgresql://me:hunter2%40home@db.example:5433/tecko"
    with secrets_forgotten():
        made = load(tmp_path, GOOD, ENV | {"DATABASE_URL": url}).settings
        assert made.database_url is not None and made.database_url.reveal() == url
        assert "hunter2" not in repr(made)
        assert tecko.redact(f"{url} hunter2@home") == "*** ***"


def test_a_database_behind_a_symlink_is_the_one_it_leads_to(tmp_path: Path) -> None:
    """Two spellings of one file are one database, with one lock."""
    (tmp_path / "real.db").touch()
    (tmp_path / "link.db").symlink_to("real.db")
    made = load(tmp_path, "database: link.db\n").settings
    assert made.database == tmp_path.resolve() / "real.db"


def test_all_wrong_settings_at_once(tmp_path: Path) -> None:
    """A line for each."""
    wrong = {"API_PORT": "http", "MAX_RETRIES": "-1", "LOG_FORMAT": "xml"}
    said = problems(tmp_path, GOOD, ENV | wrong)
    assert [line.split(":")[1].strip() for line in said] == list(wrong)


def test_every_setting_at_its_bounds_and_in_its_spellings(tmp_path: Path) -> None:
    """What is allowed is taken, white space and case aside; an empty variable is an unset one."""
    given = {
        **{"API_PORT": " 0 ", "MAX_RETRIES": "100", "RETRY_DELAY": "3600", "LOG_FORMAT": "JSON"},
        **{"TRIGGER_SETTLE_SECONDS": "86400", "LOG_LEVEL": "debug", "LOG_FILE": "logs/a.log"},
        **{"SECRET_KEY_FILE": "my.key", "OPENAI_BASE_URL": "", "MIN_POLL_INTERVAL": " "},
    }
    made = load(tmp_path, GOOD, given).settings
    assert (made.api_port, made.max_retries, made.retry_delay) == (0, 100, 3600)
    assert (made.trigger_settle_seconds, made.log_level, made.log_format) == (
        86400,
        "DEBUG",
        "json",
    )
    assert (made.log_file, made.secret_key_file) == (tmp_path / "logs/a.log", tmp_path / "my.key")
    assert (made.openai_base_url, made.min_poll_interval) == (None, 30)


def test_the_settings_that_nobody_set(tmp_path: Path) -> None:
    """The defaults of INTERFACE."""
    made = load(tmp_path, "", {}).settings
    bounds = made.min_poll_interval, made.default_poll_interval, made.max_poll_interval
    assert bounds == (30, 120, 3600)
    assert (made.max_retries, made.retry_delay, made.trigger_settle_seconds) == (3, 60, 120)
    assert (made.api_host, made.api_port, made.admin_token) == ("127.0.0.1", 8000, None)
    assert (made.log_level, made.log_format, made.log_file) == ("INFO", "text", None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])  # noqa: S104
@pytest.mark.parametrize("place", ["file", "environment"])
def test_listening_elsewhere_needs_a_token(tmp_path: Path, host: str, place: str) -> None:
    """Only with ADMIN_TOKEN does the surface listen where others can reach it."""
    text = edited("127.0.0.1", f"'{host}'") if place == "file" else GOOD
    env = ENV if place == "file" else ENV | {"API_HOST": host}
    said = f"the admin surface would listen on {host} without a token"
    assert problems(tmp_path, text, env) == [
        f"{said}; set ADMIN_TOKEN, or leave API_HOST at 127.0.0.1"
    ]
    made = load(tmp_path, text, env | {"ADMIN_TOKEN": "a-long-admin-token"}).settings
    assert made.api_host == host
    assert "a-long-admin-token" not in repr(made)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listening_on_this_machine_needs_none(tmp_path: Path, host: str) -> None:
    """Loopback under its three names."""
    assert load(tmp_path, GOOD, ENV | {"API_HOST": host}).settings.api_host == host


def test_the_bounds_of_intervals_move(tmp_path: Path) -> None:
    """MIN_, MAX_ and DEFAULT_POLL_INTERVAL count for every job, and the message says so."""
    env = ENV | {"MIN_POLL_INTERVAL": "5", "MAX_POLL_INTERVAL": "60", "DEFAULT_POLL_INTERVAL": "7"}
    for text, seconds in (("5", 5), ("1m", 60)):
        [job] = watching(load(tmp_path, edited("2m", text), env))
        assert job.poll_interval == seconds
    [job] = watching(load(tmp_path, edited("    poll_interval: 2m\n", ""), env))
    assert job.poll_interval == 7
    for text in ("4", "61"):
        assert problems(tmp_path, edited("2m", text), env) == [
            f"jobs.yaml:10: job 'nightly': poll_interval: found {text}; allowed: 5 to 60 seconds"
        ]


@pytest.mark.parametrize(
    "moved",
    [
        {"MIN_POLL_INTERVAL": "121"},
        {"MAX_POLL_INTERVAL": "119"},
        {"DEFAULT_POLL_INTERVAL": "29"},
        {"DEFAULT_POLL_INTERVAL": "3601"},
    ],
)
def test_bounds_that_leave_the_default_outside(tmp_path: Path, moved: dict[str, str]) -> None:
    """A default that no job may have is refused rather than bent."""
    said = problems(tmp_path, GOOD, ENV | moved)
    assert len(said) == 1
    assert "DEFAULT_POLL_INTERVAL" in said[0] and "MAX_POLL_INTERVAL" in said[0]


# ── The files that come with the program ──────────────────────────────────────────────────────


def test_the_example_loads_as_it_is(tmp_path: Path) -> None:
    """Whoever copies it has only their own ids and keys to put in."""
    env = {"OPENAI_API_KEY": "an-openai-key-of-tests", "KEBOOLA_TOKEN": "a-keboola-token-of-tests"}
    assert refusal(tmp_path, EXAMPLE.read_text(), env) == ([], "")
    [job] = watching(load(tmp_path, EXAMPLE.read_text(), env))
    assert job.watch.batch_ids == ["batch_abc123", "batch_def456"]
    assert (job.poll_interval, job.trigger.variables) == (120, {"region": "eu"})


def test_the_schema_speaks_to_an_editor() -> None:
    """Completion and hover show words, no class names, and say what a value does."""
    schemas = [m.model_json_schema() for m in (tecko.JobSpec, tecko.FlatJob, tecko.IngestSpec)]
    models = [m for schema in schemas for m in (schema, *schema.get("$defs", {}).values())]
    assert not {m.get("title") for m in models} & set(vars(tecko))
    said = schemas[1]["properties"]["on_ambiguous"]["description"]
    block = schemas[0]["$defs"]["KeboolaTrigger"]["properties"]
    assert said == block["on_ambiguous"]["description"]
    assert "resend sends it again" in said and "hold sends nothing" in said


def test_the_flat_form_has_every_field_of_the_nested_one() -> None:
    """A new field of jobs.yaml cannot be forgotten in REST and on the command line."""
    text = GOOD.replace("all_completed", "all_finished").replace("resend", "hold")
    with tempfile.TemporaryDirectory() as folder:
        [job] = watching(load(Path(folder), text))
    flat = tecko.flat_fields(job)
    assert tecko.job_spec(flat) == job
    by_id = {k: v for k, v in flat.items() if "secret" not in k}
    by_id |= {"openai_secret": 0, "keboola_secret_id": 0}
    made = tecko.job_spec(by_id)
    assert isinstance(made, tecko.JobSpec) and (made.watch.secret, made.trigger.secret) == (0, 0)
    assert flat.keys() == tecko.FlatJob.model_fields.keys() == tecko.JobChanges.model_fields.keys()


MODELS = [
    *(tecko.JobsFile, tecko.AdminBlock, tecko.AlertTarget, tecko.SecretRef, tecko.JobSpec),
    *(tecko.OpenAIBatches, tecko.KeboolaTrigger),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_example_has_every_key(model: type[BaseModel]) -> None:
    """Nothing can be configured that it does not show."""
    text = EXAMPLE.read_text()
    assert [key for key in model.model_fields if not re.search(rf"\b{key}:", text)] == []


def test_the_first_file_loads_and_its_comments_are_good_too(tmp_path: Path) -> None:
    """What `init` writes names no jobs; with nothing but its # taken away it has one."""
    assert load(tmp_path, tecko.first_jobs_file()).jobs is None
    text = re.sub(r"^#(?=  )", "", tecko.first_jobs_file(), flags=re.MULTILINE)
    env = {"OPENAI_API_KEY": "an-openai-key-of-tests", "KEBOOLA_TOKEN": "a-keboola-token-of-tests"}
    assert problems(tmp_path, text, env) == []
    assert [job.name for job in load(tmp_path, text, env).jobs or []] == ["nightly-classification"]
