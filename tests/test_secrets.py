"""Secrets: what seals them, where its key comes from, rotation, and references to the outside."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import MASTER_KEY, run_program, secrets_forgotten
from hypothesis import given, settings
from hypothesis import strategies as st

import teckochecker as tecko

OTHER_KEY = base64.urlsafe_b64encode(bytes(range(100, 132))).decode()
THIRD_KEY = base64.urlsafe_b64encode(bytes(range(200, 232))).decode()
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6).filter(
    lambda text: text[0] not in "\"'"
)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with secrets_forgotten():
        yield


def vault_in(folder: Path, **env: str) -> tecko.Vault:
    """A vault that has read no key yet, for a database in `folder`."""
    return tecko.Vault(tecko.load_config(folder / "jobs.yaml", env).settings)


def loaded(folder: Path, **env: str) -> tecko.Vault:
    vault = vault_in(folder, **env)
    vault.load(required=True)
    return vault


def sealed(vault: tecko.Vault, value: str = "sk-value", name: str = "n") -> tecko.SealedSecret:
    box, key_id = vault.seal(name, "openai", tecko.SecretValue(value))
    return tecko.SealedSecret(1, name, "openai", box, key_id, 0.0)


def body(name: str) -> tecko.SecretBody:
    return tecko.SecretBody(name=name, type="api", value="a-value-of-tests")


def key_file(folder: Path, *keys: str, name: str = "teckochecker.key") -> Path:
    tecko.write_private(folder / name, "\n".join(keys) + "\n")
    return folder / name


# ── Sealing ───────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(name=st.text(), kind=st.text(), value=PRINTABLE)
def test_what_is_sealed_opens_again(name: str, kind: str, value: str) -> None:
    """Any printable value under any name and type comes back, and is nowhere in the box."""
    with secrets_forgotten():
        vault = loaded(Path(), SECRET_KEY=MASTER_KEY)
        box, key_id = vault.seal(name, kind, tecko.SecretValue(value))
        assert vault.open(tecko.SealedSecret(1, name, kind, box, key_id, 0.0)).reveal() == value
    assert len(box) == 12 + len(value) + 16  # nonce, as many bytes as the value, a whole tag


def test_a_nonce_is_never_used_twice(tmp_path: Path) -> None:
    """The same value sealed 500 times has 500 nonces and 500 ciphertexts."""
    vault = loaded(tmp_path, SECRET_KEY=MASTER_KEY)
    boxes = [sealed(vault).value for _ in range(500)]
    assert len({box[:12] for box in boxes}) == len({box[12:] for box in boxes}) == 500


@pytest.mark.parametrize("moved", [{"name": "m"}, {"type": "keboola"}, {"key_id": "the other one"}])
def test_a_row_moved_elsewhere_does_not_decrypt(tmp_path: Path, moved: dict[str, str]) -> None:
    """Name, type and key id belong to the value: a row with another one of them stays shut."""
    vault = loaded(tmp_path, SECRET_KEY=f"{MASTER_KEY},{OTHER_KEY}")
    row = sealed(vault)
    if "key_id" in moved:
        moved = {"key_id": loaded(tmp_path, SECRET_KEY=OTHER_KEY).key_id}
    with pytest.raises(tecko.SecretError, match="does not decrypt"):
        vault.open(replace(row, **moved))  # type: ignore[arg-type]
    assert vault.open(row).reveal() == "sk-value"


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """One bit changed anywhere in nonce, ciphertext or tag, and the row does not decrypt."""
    vault = loaded(tmp_path, SECRET_KEY=MASTER_KEY)
    row = sealed(vault, "v1")
    for bit in range(len(row.value) * 8):
        flipped = (int.from_bytes(row.value, "big") ^ (1 << bit)).to_bytes(len(row.value), "big")
        with pytest.raises(tecko.SecretError, match="does not decrypt"):
            vault.open(replace(row, value=flipped))


def test_a_row_cut_short_is_noticed(tmp_path: Path) -> None:
    """However much of a value is missing, it is a SecretError that names the secret."""
    vault = loaded(tmp_path, SECRET_KEY=MASTER_KEY)
    row = sealed(vault, "v1")
    for length in range(len(row.value)):
        with pytest.raises(tecko.SecretError, match="secret 'n' does not decrypt"):
            vault.open(replace(row, value=row.value[:length]))


def test_a_key_that_is_not_there_is_named_by_its_place(tmp_path: Path) -> None:
    """A row of a key that the key file does not hold says which secret and which file."""
    file = key_file(tmp_path, OTHER_KEY)
    row = sealed(loaded(tmp_path, SECRET_KEY=MASTER_KEY))
    with pytest.raises(tecko.SecretError, match="'n' was sealed with a key that is not in") as e:
        loaded(tmp_path).open(row)
    assert str(file) in str(e.value)


# ── The key ───────────────────────────────────────────────────────────────────────────────────

STANDARD_ALPHABET = base64.b64encode(bytes([251, 255, *range(30)])).decode()
WRONG_KEYS = {
    "16 bytes": base64.urlsafe_b64encode(bytes(range(16))).decode(),
    "24 bytes": base64.urlsafe_b64encode(bytes(range(24))).decode(),
    "31 bytes": base64.urlsafe_b64encode(bytes(range(31))).decode(),
    "33 bytes": base64.urlsafe_b64encode(bytes(range(33))).decode(),
    "43 characters": MASTER_KEY[:-1],
    "45 characters": MASTER_KEY + "=",
    "hexadecimal": bytes(range(32)).hex(),
    "the example's": "your-secret-key-for-encryption",
    "another example's": "your-generated-fernet-key-here",
    "one letter": "A" * 43 + "=",
    "another letter": "x" * 43 + "=",
    "zero bytes and one": base64.urlsafe_b64encode(bytes(31) + b"1").decode(),
    "standard alphabet": STANDARD_ALPHABET,
    "not ASCII": "é" * 44,
    "a sentence": "open sesame, says Ali Baba",
}


@pytest.mark.parametrize("key", WRONG_KEYS.values(), ids=list(WRONG_KEYS))
def test_a_wrong_key_is_refused(tmp_path: Path, key: str) -> None:
    """A key of wrong length or alphabet, or a made-up one, is refused without being shown."""
    with pytest.raises(tecko.SecretError, match="not 32 random bytes") as e:
        loaded(tmp_path, SECRET_KEY=key)
    assert e.value.code == 3002 and e.value.hint and key not in f"{e.value} {e.value.hint}"


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32).filter(lambda key: len(set(key)) >= 16))
def test_every_random_key_is_taken(key: bytes) -> None:
    """32 bytes as url-safe base64, with white space around them."""
    text = base64.urlsafe_b64encode(key).decode()
    assert tecko.parse_master_key(f" {text}\n") == key


def test_new_keys_are_good_and_differ() -> None:
    """What `init` writes is what is asked for: 32 bytes in 44 characters, never the same."""
    keys = {tecko.new_master_key() for _ in range(50)}
    assert len(keys) == 50 and {len(key) for key in keys} == {44}
    assert {len(tecko.parse_master_key(key)) for key in keys} == {32}


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    """SECRET_KEY wins over SECRET_KEY_FILE, over the credentials directory, over the file beside
    the database."""
    places = {
        "SECRET_KEY": MASTER_KEY,
        "SECRET_KEY_FILE": str(key_file(tmp_path, OTHER_KEY, name="named")),
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
    }
    (tmp_path / "credentials").mkdir()
    credential = key_file(tmp_path / "credentials", THIRD_KEY, name="secret_key")
    beside = key_file(tmp_path, tecko.new_master_key())
    files: list[Path | None] = []
    ids = []
    for _ in range(4):
        vault = loaded(tmp_path, **places)
        files.append(vault.file)
        ids.append(vault.key_id)
        places = dict(list(places.items())[1:])
    assert files == [None, tmp_path / "named", credential, beside]
    assert ids[:3] == [
        loaded(tmp_path, SECRET_KEY=k).key_id for k in (MASTER_KEY, OTHER_KEY, THIRD_KEY)
    ]
    assert len(set(ids)) == 4


def test_the_default_key_is_beside_the_database(tmp_path: Path) -> None:
    """Not beside jobs.yaml, and also when the credentials directory has no key."""
    (tmp_path / "data").mkdir()
    env = {"DATABASE_URL": "sqlite:///data/t.db", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert vault_in(tmp_path, **env).file == tmp_path / "data" / "teckochecker.key"


@pytest.mark.parametrize("env", [{}, {"SECRET_KEY_FILE": "gone.key"}, {"SECRET_KEY": "  "}])
def test_a_missing_key_is_a_clear_error(tmp_path: Path, env: dict[str, str]) -> None:
    """Without a key nothing is sealed or opened, and it says where one was looked for."""
    vault = vault_in(tmp_path, **env)
    row = sealed(loaded(tmp_path, SECRET_KEY=MASTER_KEY))
    for attempt in (lambda: sealed(vault), lambda: vault.open(row)):
        with pytest.raises(tecko.SecretError, match="no master key at") as e:
            attempt()
        assert env.get("SECRET_KEY_FILE", "teckochecker.key") in str(e.value)
        assert "init" in e.value.hint and e.value.code == 3002


def test_a_key_may_be_missing_until_it_is_needed(tmp_path: Path) -> None:
    """A service without stored secrets starts without a key; SECRET_KEY_FILE is meant, though."""
    vault_in(tmp_path).load(required=False)
    with pytest.raises(tecko.SecretError, match=r"no master key at .*gone\.key"):
        vault_in(tmp_path, SECRET_KEY_FILE="gone.key").load(required=False)


@pytest.mark.parametrize(
    "content", [b"", b"\n", bytes(range(128, 160)), None], ids=["empty", "blank", "raw", "folder"]
)
def test_an_unusable_key_file_is_a_clear_error(tmp_path: Path, content: bytes | None) -> None:
    """An empty key file, raw bytes in place of base64, or a directory: no traceback."""
    file = tmp_path / "teckochecker.key"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(tecko.SecretError, match="key"):
        loaded(tmp_path)


def test_a_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """0600 where it is new, never readable for all; a failure leaves no draft behind."""
    file = tmp_path / "k"
    tecko.write_private(file, "old")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    tecko.write_private(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and file.read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises((OSError, tecko.SecretError)):
        tecko.write_private(tmp_path / "folder", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"k", "folder"}


# ── Rotation ──────────────────────────────────────────────────────────────────────────────────


async def stored(store: tecko.Store, vault: tecko.Vault, count: int = 3) -> None:
    for n in range(count):
        seal = partial(vault.seal, f"name-{n}", "openai", tecko.SecretValue(f"value-{n}"))
        await store.add_secret(f"name-{n}", "openai", seal, 0.0)


async def opened(store: tecko.Store, vault: tecko.Vault) -> list[str]:
    return [vault.open(row).reveal() for row in await store.secrets()]


async def reseal(store: tecko.Store, vault: tecko.Vault) -> int:
    return await store.reseal_secrets(lambda r: vault.seal(r.name, r.type, vault.open(r)), 0.0)


async def rotate(store: tecko.Store, vault: tecko.Vault) -> None:
    """As `secret rotate` does it."""
    config = tecko.load_config(store.path.with_name("jobs.yaml"), {"DATABASE_URL": str(store.path)})
    await tecko.Operations(store, vault, lambda: config).rotate()


VALUES = ["value-0", "value-1", "value-2"]


async def test_rotation_encrypts_everything_anew(tmp_path: Path) -> None:
    """A new key, every secret under it, and the old key alone opens nothing any more."""
    file = key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path))
        await rotate(store, loaded(tmp_path))
        assert await opened(store, loaded(tmp_path)) == VALUES
        old = loaded(tmp_path, SECRET_KEY=MASTER_KEY)
        for row in await store.secrets():
            with pytest.raises(tecko.SecretError):
                old.open(row)
    assert MASTER_KEY not in file.read_text() and len(file.read_text().split()) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.with_name("teckochecker.key.old").read_text().split() == [MASTER_KEY]


async def test_a_rotation_that_would_seal_nothing_is_refused(tmp_path: Path) -> None:
    """In the wrong database: it is named, and the key of the right one stays."""
    file = key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        with pytest.raises(tecko.Conflict, match=r"nothing rotated: .*s\.db holds no secrets") as e:
            await rotate(store, loaded(tmp_path))
    assert "right database" in e.value.hint and file.read_text().split() == [MASTER_KEY]


async def test_a_key_that_a_row_needs_is_not_dropped(tmp_path: Path) -> None:
    """A row that another process sealed with the old key while we rotated opens afterwards."""
    key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        late = sealed(loaded(tmp_path), "value-3", "name-3")
        await stored(store, loaded(tmp_path))
        vault = loaded(tmp_path)
        vault.begin_rotation()
        await reseal(store, vault)
        await store.add_secret(late.name, late.type, lambda: (late.value, late.key_id), 0.0)
        vault.end_rotation({row.key_id for row in await store.secrets()})
        assert await opened(store, loaded(tmp_path)) == [*VALUES, "value-3"]


async def test_additions_and_rotations_at_once_lose_nothing(tmp_path: Path) -> None:
    """Two connections add, replace and rotate as fast as they can; all opens in the end."""
    key_file(tmp_path, MASTER_KEY)
    config = tecko.load_config(tmp_path / "jobs.yaml", {"DATABASE_URL": "s.db"})
    async with tecko.Store(tmp_path / "s.db") as one, tecko.Store(tmp_path / "s.db") as two:
        operations_of_each = [
            tecko.Operations(s, loaded(tmp_path), lambda: config) for s in (one, two)
        ]
        for n in range(3):
            await operations_of_each[0].add_secret(body(f"first-{n}"))
        work = [operations.rotate() for operations in operations_of_each for _ in range(4)]
        work += [operations_of_each[n % 2].add_secret(body(f"more-{n}")) for n in range(8)]  # type: ignore[misc]
        await asyncio.gather(*work)
        assert await opened(one, loaded(tmp_path)) == ["a-value-of-tests"] * 11
    assert len((tmp_path / "teckochecker.key").read_text().split()) == 1


async def test_a_rotation_keeps_owner_mode_and_symlink(tmp_path: Path) -> None:
    """A key file that root rotates for a service stays the service's, wherever it really is."""
    (tmp_path / "real").mkdir()
    real = key_file(tmp_path / "real", MASTER_KEY)
    os.chown(real, 65534, 65534)
    real.chmod(0o640)
    (tmp_path / "teckochecker.key").symlink_to(real)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path))
        await rotate(store, loaded(tmp_path))
        assert await opened(store, loaded(tmp_path)) == VALUES
    after = real.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (65534, 65534, 0o640)
    assert (tmp_path / "teckochecker.key").is_symlink() and MASTER_KEY not in real.read_text()


@pytest.mark.parametrize("phases", [0, 1, 2, 3])
@pytest.mark.parametrize("then", ["read", "rotate again"])
async def test_a_crash_in_a_rotation_loses_nothing(tmp_path: Path, phases: int, then: str) -> None:
    """Stopped after any of its three phases, all is readable, and the next rotation completes."""
    file = key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path))
        vault = loaded(tmp_path)
        if phases > 0:
            vault.begin_rotation()
        if phases > 1:
            await reseal(store, vault)
        if phases > 2:
            vault.end_rotation(set())
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        if then == "rotate again":
            await rotate(store, loaded(tmp_path))
            assert len(file.read_text().split()) == 1
        assert await opened(store, loaded(tmp_path)) == VALUES


async def test_resealing_is_all_or_nothing(tmp_path: Path) -> None:
    """One secret that does not open stops the transaction, and every row is as it was."""
    key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path))
        key_id = loaded(tmp_path).key_id
        await store.add_secret("zz", "openai", lambda: (bytes(40), key_id), 0.0)
        before = await store.secrets()
        vault = loaded(tmp_path)
        vault.begin_rotation()
        with pytest.raises(tecko.SecretError, match="'zz' does not decrypt"):
            await reseal(store, vault)
        assert await store.secrets() == before


async def test_a_running_vault_follows_a_rotation(tmp_path: Path) -> None:
    """A service that read its key before another process rotated opens and seals on."""
    key_file(tmp_path, MASTER_KEY)
    running = loaded(tmp_path)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, running)
        await rotate(store, loaded(tmp_path))
        assert await opened(store, running) == VALUES


async def test_nothing_is_sealed_with_a_key_that_is_gone(tmp_path: Path) -> None:
    """Who read the key, then waited (at a prompt) while another rotated, seals with the new one."""
    key_file(tmp_path, MASTER_KEY)
    waiting = loaded(tmp_path)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path), 1)
        await rotate(store, loaded(tmp_path))
    assert loaded(tmp_path).open(sealed(waiting)).reveal() == "sk-value"


async def test_a_rotation_starts_from_the_key_file_of_now(tmp_path: Path) -> None:
    """A second rotation that read the key before the first one ended does not lose its key."""
    key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path))
        slow = loaded(tmp_path)
        await rotate(store, loaded(tmp_path))
        await rotate(store, slow)
        assert await opened(store, loaded(tmp_path)) == VALUES


def test_a_key_in_the_environment_is_not_rotated(tmp_path: Path) -> None:
    """The program cannot change its caller's environment; it says what to do instead."""
    vault = loaded(tmp_path, SECRET_KEY=MASTER_KEY)
    with pytest.raises(tecko.SecretError, match="SECRET_KEY is set in the environment") as e:
        vault.begin_rotation()
    assert "SECRET_KEY=NEW,OLD" in e.value.hint


@pytest.mark.parametrize("between", [",", ", ", " ", "\n"])
async def test_the_way_out_with_two_keys_in_the_environment(tmp_path: Path, between: str) -> None:
    """SECRET_KEY=NEW,OLD: all is sealed with NEW, which then does alone; no file is touched."""
    async with tecko.Store(tmp_path / "s.db") as store:
        await stored(store, loaded(tmp_path, SECRET_KEY=MASTER_KEY))
        await rotate(store, loaded(tmp_path, SECRET_KEY=f"{OTHER_KEY}{between}{MASTER_KEY}"))
        assert await opened(store, loaded(tmp_path, SECRET_KEY=OTHER_KEY)) == VALUES
    assert not [path for path in os.listdir(tmp_path) if path.endswith(".key")]


@pytest.mark.parametrize("phase", ["begin_rotation", "end_rotation"])
async def test_a_key_file_that_cannot_be_written(tmp_path: Path, phase: str) -> None:
    """A read-only credentials directory gives a SecretError that names the file."""
    folder = tmp_path / "keys"
    folder.mkdir()
    file = key_file(folder, MASTER_KEY)
    vault = loaded(tmp_path, SECRET_KEY_FILE=str(file))
    if phase == "end_rotation":
        vault.begin_rotation()
    shutil.rmtree(folder)  # as root no mode keeps from writing, but this does
    with pytest.raises(tecko.SecretError, match=r"teckochecker\.key"):
        getattr(vault, phase)(*([set()] if phase == "end_rotation" else []))


def told(folder: Path, *args: str, **env: str) -> tuple[int, str]:
    """How a command ended, and all that it said."""
    ran = run_program(*args, cwd=folder, env=env)
    return ran.returncode, ran.stdout + ran.stderr


async def test_init_makes_no_key_that_opens_nothing(tmp_path: Path) -> None:
    """Where secrets are sealed a lost key is not replaced, unless somebody insists."""
    file = key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "teckochecker.db") as store:
        await stored(store, loaded(tmp_path), 2)
    file.unlink()
    code, said = told(tmp_path, "init")
    assert code == 1 and not file.exists()
    assert "name-0, name-1" in said and "--new-key" in said and str(file) in said
    assert told(tmp_path, "init", "--new-key")[0] == 0 and file.exists()


async def test_a_rotation_says_which_files_it_changed(tmp_path: Path) -> None:
    """The database, the key file and where the key of before is; and that a copy is needed."""
    file = key_file(tmp_path, MASTER_KEY)
    async with tecko.Store(tmp_path / "teckochecker.db") as store:
        await stored(store, loaded(tmp_path), 2)
    code, said = told(tmp_path, "secret", "rotate")
    assert code == 0 and f"sealed 2 secrets of {tmp_path}/teckochecker.db" in said
    assert f"back up {file} (the one before is in {file}.old)" in said


def test_init_with_a_key_file_that_cannot_be_written(tmp_path: Path) -> None:
    """One line on stderr, exit code 1, and nothing half made."""
    ran = run_program("init", cwd=tmp_path, env={"SECRET_KEY_FILE": "nowhere/secret.key"})
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("teckochecker: ") and "nowhere/secret.key" in ran.stderr
    assert "Traceback" not in ran.stderr and not list(tmp_path.iterdir())


# ── References and values ─────────────────────────────────────────────────────────────────────


def read(folder: Path, environ: Mapping[str, str] = {}, **where: str) -> str:
    """The value that jobs.yaml in `folder` refers to."""
    reference = json.dumps({"type": "openai"} | where)
    (folder / "jobs.yaml").write_text(f"secrets: {{prod: {reference}}}")
    config = tecko.load_config(folder / "jobs.yaml", environ)
    return tecko.read_reference("prod", config.secrets["prod"], config).reveal()


@pytest.mark.parametrize("around", ["{}", "{}\n", "{}\r\n", "  {}\t\n\n"])
def test_a_reference_by_env_and_by_file(tmp_path: Path, around: str) -> None:
    """The value stands alone in a variable or file; white space around it does not count."""
    (tmp_path / "token").write_bytes(around.format("sk-1 2").encode())
    assert read(tmp_path, file="token") == read(tmp_path, file=str(tmp_path / "token")) == "sk-1 2"
    assert read(tmp_path, {"KEY": around.format("sk-1 2")}, env="KEY") == "sk-1 2"


def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    """A mounted secret that is replaced is used at the next look, also through a symlink."""
    (tmp_path / "a").write_text("the-first")
    (tmp_path / "b").write_text("the-third")
    (tmp_path / "token").symlink_to("a")
    assert read(tmp_path, file="token") == "the-first"
    (tmp_path / "a").write_text("second")
    assert read(tmp_path, file="token") == "second"
    (tmp_path / "new").symlink_to("b")
    (tmp_path / "new").replace(tmp_path / "token")
    assert read(tmp_path, file="token") == "the-third"


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"env": "NOT_SET"}, "'prod'.*NOT_SET is not set"),
        ({"env": "EMPTY"}, "'prod'.*at least 6"),
        ({"env": "SHORT"}, "'prod'.*at least 6"),
        ({"env": "QUOTED"}, "'prod'.*quotes around it"),
        ({"env": "CONTROL"}, "'prod'.*control"),
        ({"file": "missing"}, "'prod': cannot read missing: No such file"),
        ({"file": "folder"}, "'prod': cannot read folder: Is a directory"),
        ({"file": "folder/x/y"}, "'prod': cannot read folder/x/y: No such file"),
        ({"file": "binary"}, "'prod': cannot read binary: it is no"),
        ({"file": "empty"}, "'prod'.*at least 6"),
        ({"file": "pipe"}, "'prod': cannot read pipe: it is not a regular file"),
        ({"file": "${CREDENTIALS_DIRECTORY}/key"}, r"\$\{CREDENTIALS_DIRECTORY\} is not set"),
    ],
)
def test_a_reference_that_cannot_be_read(tmp_path: Path, where: dict[str, str], told: str) -> None:
    """Which secret, which place and why, and never what stands there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00hidden")
    (tmp_path / "empty").write_text(" \n")
    os.mkfifo(tmp_path / "pipe")
    env = {"EMPTY": "", "CONTROL": "hid\x07den", "SHORT": "hid-e", "QUOTED": "'a-hidden-key'"}
    with pytest.raises(tecko.SecretError, match=told) as e:
        read(tmp_path, env, **where)
    assert "den" not in str(e.value) and e.value.code == 3002


@settings(deadline=None)
@given(
    before=st.text(st.sampled_from("ab"), min_size=1),
    bad=st.characters(max_codepoint=31) | st.characters(min_codepoint=127, max_codepoint=0x2FF),
    after=st.text(st.sampled_from("ab"), min_size=1),
)
def test_control_characters_are_refused(before: str, bad: str, after: str) -> None:
    """A value with anything but printable ASCII inside would break a header; it is not echoed."""
    with pytest.raises(ValueError, match="printable") as e:
        tecko.clean_secret(before + bad + after)
    assert before + bad not in str(e.value)


@settings(deadline=None)
@given(PRINTABLE, st.text(st.sampled_from(" \t\r\n")), st.text(st.sampled_from(" \t\r\n")))
def test_values_are_stripped(value: str, before: str, after: str) -> None:
    """What pasting leaves around a value does not count."""
    assert tecko.clean_secret(before + value + after) == value
