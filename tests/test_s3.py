"""Files in S3: against a real S3 server on this machine, with every request counted."""

from __future__ import annotations

import gzip
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import obstore
import pytest
from conftest import World, run_program
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import S3Store
from test_csv import counts, table, titles
from warm import Script
from werkzeug.serving import make_server

import teckochecker as tecko

Given = pytest.mark.parametrize
KEYS = "AKIAEXAMPLE:a-secret-of-the-tests"


class S3:
    """moto's server, which notes what it is asked, and one bucket."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.asked: list[str] = []
        self.heard: list[str] = []  # the requests as they came
        self.vanishing = ""  # a key that is deleted as soon as it is asked for
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.post("/moto-api/reset")
        key_id, _, key = KEYS.partition(":")
        self.bucket = S3Store(
            "exports",
            endpoint=self.url,
            access_key_id=key_id,
            secret_access_key=key,
            client_options={"allow_http": True},
        )
        self.request("PUT", "/exports", b"")

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        path, lists = environ["PATH_INFO"], "list-type" in environ["QUERY_STRING"]
        self.asked += [f"LIST {path}" if lists else f"GET {path}"] * (
            environ["REQUEST_METHOD"] == "GET"
        )
        self.heard.append(str(environ))
        if self.vanishing and path.endswith(self.vanishing):
            self.vanishing = ""
            self.delete(path.removeprefix("/exports/"))
        return self.app(environ, start)

    def request(self, method: str, path: str, body: bytes) -> None:
        owner = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": owner, "Content-Type": "text/plain"}
        asked = urllib.request.Request(self.url + path, body, headers, method=method)  # noqa: S310
        urllib.request.urlopen(asked).close()  # noqa: S310

    def post(self, path: str, body: bytes = b"") -> None:
        self.request("POST", path, body)

    def put(self, key: str, content: str | bytes) -> None:
        obstore.put(self.bucket, key, content.encode() if isinstance(content, str) else content)

    def delete(self, key: str) -> None:
        obstore.delete(self.bucket, key)

    def requests(self) -> list[str]:
        """What was asked since this was called last."""
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """With one certificate to trust: obstore wants some, and all of them take long to read."""
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    file.write_text(first[first.index("-----BEGIN") :] + end)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(file))
        made = S3()
        yield made
        made.server.shutdown()


@pytest.fixture
def s3(server: S3) -> S3:
    """The server with an empty bucket."""
    server.post("/moto-api/reset")
    server.request("PUT", "/exports", b"")
    server.requests()
    return server


async def job(world: World, s3: S3, path: str = "s3://exports/daily/*.csv", **block: Any) -> int:
    """A job over a bucket, with its secret."""
    if not await world.store.secret("s3"):
        await world.secret("s3", "api", KEYS)
    block = {"type": "csv", "path": path, "endpoint": s3.url, "secret": "s3"} | block
    return await world.ingest(**block)


async def test_unchanged_objects_cost_one_list(world: World, s3: S3) -> None:
    """What is new is read; nothing else is fetched, and nothing but the bucket's list is asked."""
    s3.put("daily/1.csv", table([1]))
    s3.put("daily/2.csv", table([2]))
    ingest = await job(world, s3)
    assert counts(await world.run(ingest)) == {"processed": 2, "inserted": 2}
    lists = "LIST /exports"
    assert s3.requests() == [lists, "GET /exports/daily/1.csv", "GET /exports/daily/2.csv"]
    assert counts(await world.run(ingest)) == {}
    assert s3.requests() == [lists]
    s3.put("daily/10.csv", table([10]))
    assert counts(await world.run(ingest)) == {"processed": 1, "inserted": 1}
    assert s3.requests() == [lists, "GET /exports/daily/10.csv"]


async def test_a_changed_object_is_read_again_and_the_last_one_wins(world: World, s3: S3) -> None:
    """As among files: of an id in several objects the last in natural order counts."""
    s3.put("daily/2.csv", table([1], "old"))
    s3.put("daily/10.csv", table([1], "new"))
    ingest = await job(world, s3)
    await world.run(ingest)
    s3.put("daily/2.csv", table([1, 2], "late"))
    await world.run(ingest)
    assert await titles(world) == {"1": "new 1", "2": "late 2"}


async def test_an_object_that_grew_makes_no_other_one_be_read(world: World, s3: S3) -> None:
    """It is fetched once, and its new records alone are gone through; one that was rewritten has
    all of them read again, so that the last one wins."""
    for number in (1, 2, 3):
        s3.put(f"daily/{number}.csv", table([number]))
    ingest = await job(world, s3)
    await world.run(ingest)
    s3.requests()
    s3.put("daily/2.csv", table([2, 20]))
    assert counts(await world.run(ingest)) == {"processed": 1, "inserted": 1}
    assert s3.requests() == ["LIST /exports", "GET /exports/daily/2.csv"]
    s3.put("daily/2.csv", table([20, 2]))
    assert counts(await world.run(ingest)) == {"processed": 4, "unchanged": 4}


async def test_a_single_object_that_grew_is_read_from_where_it_ended(world: World, s3: S3) -> None:
    """It is fetched whole, but its old records are not gone through again."""
    s3.put("one.csv", table([1, 2]))
    ingest = await job(world, s3, "s3://exports/one.csv")
    await world.run(ingest)
    s3.put("one.csv", table([1, 2, 3]))
    assert counts(await world.run(ingest)) == {"processed": 1, "inserted": 1}


async def test_gzip_and_keys_that_urls_escape(world: World, s3: S3) -> None:
    """Packed objects and odd names are read as any file; a place names the object."""
    s3.put("daily/a b+ü#?.csv.gz", gzip.compress(b"id,title\n1,one\n,none\n"))
    run = await world.run(await job(world, s3, "s3://exports/daily/*.csv.gz"))
    assert counts(run) == {"processed": 2, "inserted": 1, "failed": 1}
    [reject] = await world.store.rejects(None, 10)
    assert reject["place"] == "s3://exports/daily/a b+ü#?.csv.gz line 3"


@Given(
    ("path", "read"),
    [
        ("s3://exports/daily/*.csv", {"1", "3"}),
        ("s3://exports/*/1.csv", {"1", "2", "6"}),
        ("s3://exports/daily/[!1].csv", {"3"}),
        ("s3://exports/daily/?.csv", {"1", "3"}),
        ("s3://exports/daily/1.csv", {"1"}),
        ("s3://exports/**/*.csv", {"1", "2", "3", "4", "6"}),
        ("s3://exports/daily/**/?.csv", {"1", "3", "4"}),
        ("s3://exports/**", {"1", "2", "3", "4", "5", "6"}),
        ("s3://exports/[x]/1.csv", {"6"}),
    ],
)
async def test_which_objects_a_path_means(world: World, s3: S3, path: str, read: set[str]) -> None:
    """The same as among files: * stops at a slash, ** does not, and a name is itself first."""
    keys = ["daily/1.csv", "other/1.csv", "daily/3.csv", "daily/deep/4.csv", "daily/1.csv.bak"]
    for number, key in enumerate([*keys, "[x]/1.csv"], 1):
        s3.put(key, table([number]))
    await world.run(await job(world, s3, path))
    assert {*await world.records()} == read


async def test_an_object_that_is_gone_is_forgotten(world: World, s3: S3) -> None:
    """What had to give way to its records comes back, as with files."""
    s3.put("daily/1.csv", table([1], "first"))
    s3.put("daily/2.csv", table([1], "second"))
    ingest = await job(world, s3)
    await world.run(ingest)
    s3.delete("daily/2.csv")
    await world.run(ingest)
    assert await titles(world) == {"1": "first 1"}


async def test_an_object_that_vanishes_between_list_and_fetch(world: World, s3: S3) -> None:
    """The others are read; the run fails with its name, and the next one is well."""
    for number in (1, 2, 3):
        s3.put(f"daily/{number}.csv", table([number]))
    s3.vanishing = "2.csv"
    ingest = await job(world, s3)
    run = await world.run(ingest)
    assert run.status == "failed" and "daily/2.csv said 404" in (run.error_message or "")
    assert "The specified key does not exist." in (run.error_message or "")
    assert {*await world.records()} == {"1", "3"}
    assert (await world.run(ingest)).status == "success"


@Given(
    ("path", "changed", "said"),
    [
        ("s3://no-such-bucket/*.csv", {}, "The specified bucket does not exist"),
        ("s3://exports/none/*.csv", {}, "there is no object s3://exports/none/*.csv"),
        ("s3://exports/*.csv", {"endpoint": "http://127.0.0.1:9"}, "onnection refused"),
    ],
)
async def test_what_is_wrong_is_said_in_one_line(
    hasty: World, s3: S3, path: str, changed: dict[str, str], said: str
) -> None:
    """No bucket, no object, no network: in the run and, before it, by `validate --online`."""
    ingest = await job(hasty, s3, path, **changed)
    run = await hasty.run(ingest)
    assert run.status == "failed" and said in (run.error_message or "")
    assert len((run.error_message or "").splitlines()) == 1
    [found] = await tecko.examine(hasty.steps, [(await hasty.get(ingest)).spec])
    assert not found.good and said in found.said


async def test_a_key_that_s3_does_not_know(hasty: World, s3: S3) -> None:
    """S3's own reason, and never the key."""
    ingest = await job(hasty, s3)
    s3.post("/moto-api/reset-auth", b"0")
    try:
        run = await hasty.run(ingest)
    finally:
        s3.post("/moto-api/reset-auth", b"inf")
    assert run.status == "failed" and "does not exist in our records" in (run.error_message or "")
    assert KEYS.partition(":")[2] not in (run.error_message or "")


async def test_a_secret_of_another_form(hasty: World, s3: S3) -> None:
    """It is told how it is to be; it is not repeated."""
    await hasty.secret("s3", "api", "only-one-part-of-it")
    run = await hasty.run(await job(hasty, s3))
    assert "secret 's3' is not ACCESS_KEY_ID:SECRET_ACCESS_KEY" in (run.error_message or "")
    assert s3.requests() == []


async def test_the_doctor_counts_objects(world: World, s3: S3) -> None:
    s3.put("daily/1.csv", table([1]))
    ingest = await world.get(await job(world, s3))
    [found] = await tecko.examine(world.steps, [ingest.spec])
    assert found.good and found.said == "1 objects" and s3.requests() == ["LIST /exports"]


async def test_the_secret_is_not_sent(world: World, s3: S3) -> None:
    """Neither when listing nor when fetching: it signs."""
    s3.put("daily/1.csv", table([1]))
    s3.heard.clear()
    await world.run(await job(world, s3))
    assert len(s3.heard) == 2 and not [text for text in s3.heard if KEYS.partition(":")[2] in text]


async def test_only_jobs_yaml_may_use_the_environments_keys(
    world: World, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may call must not read with the machine's own access; a job of the file may."""
    operations = tecko.Operations(world.store, world.vault, lambda: world.config)
    source = {"type": "csv", "path": "s3://exports/daily/*.csv", "endpoint": s3.url}
    spec = tecko.job_spec({"name": "own", "ingest": source})
    with pytest.raises(tecko.Invalid, match=r"ingest.secret: found nothing; allowed: a secret"):
        await operations.create_job(spec)
    s3.put("daily/1.csv", table([1]))
    for name, value in zip(("ID", "SECRET"), KEYS.split(":"), strict=True):
        key = {"ID": "AWS_ACCESS_KEY_ID", "SECRET": "AWS_SECRET_ACCESS_KEY"}[name]
        monkeypatch.setenv(key, value)
    await world.store.sync_file_jobs([spec], world.clock())
    assert counts(await world.run(1)) == {"processed": 1, "inserted": 1}


@Given("path", ["s3://", "s3://Bucket", "s3://b/", "s3://a b/c.csv"])
def test_a_path_that_means_nothing_in_s3(path: str) -> None:
    """Bad input gets a clear error."""
    with pytest.raises(tecko.Invalid, match=r"allowed: s3://bucket/key"):
        tecko.job_spec({"name": "x", "ingest": {"type": "csv", "path": path}})


def test_without_obstore_validate_says_what_to_install(tmp_path: Path) -> None:
    """One line with the command; a program without s3:// needs no such package."""
    (tmp_path / "jobs.yaml").write_text(
        "jobs: [{name: x, ingest: {type: csv, path: 's3://exports/*.csv'}}]\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'obstore' else find(name, *rest)\n"
    )
    done = run_program("validate", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, kind=Script)
    assert done.returncode == 1 and "python -m pip install obstore" in done.stderr
    assert "jobs.yaml:1" in done.stderr
