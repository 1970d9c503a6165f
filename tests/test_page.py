"""The page at /, in a real browser: Debian's chromium, without which these tests are skipped."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import standins
from conftest import JOB_YAML, RunningProgram, program_environment

import teckochecker as tecko

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect
CHROMIUM = "/usr/bin/chromium"
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
).split()
TOKEN = "a-token-for-the-page-0123456789"
EVIL = "<script>alert(1)</script>"
MANY = 10_000
PICTURE = Path(__file__).with_name("page.png")  # for the README; made where PAGE_PICTURE is set
HEAD = JOB_YAML.partition("jobs:")[0].format()
PRODUCTS = """\
  - name: products
    poll_interval: 1h
    ingest: {type: csv, path: products.csv, id: sku, fields: {title: name, published_at: added}}
"""
WATCHED = {  # names, with the batches and how many of their 200 requests are done
    "nightly-classification": {"n1": 200, "n2": 120, "n3": 35},
    "support-tickets": {"live": 150},
    "weekly-embeddings": {"w1": 90},
    "bad-input": {"bad": 0},
    EVIL: {"x1": 60},
}


def watching(name: str, batches: dict[str, int], stack: str) -> str:
    ids = ", ".join(f"batch_{batch}" for batch in batches)
    return f"""\
  - name: "{name}"
    poll_interval: {"1s" if "live" in batches else "1h"}
    watch: {{secret: openai, batch_ids: [{ids}]}}
    trigger: {{secret: keboola, stack_url: "{stack}", component_id: app, configuration_id: "1"}}
"""


def fill_history(database: Path) -> None:
    """A month in which something was done on each day."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        for n in range(30):
            day = tecko.iso(time.time() - 86400 * n)[:10]
            checks, triggers = 2500 + n * 7919 % 1700, 3 + n * 31 % 11
            row = (day, checks, triggers, triggers * (22 + n * 13 % 25), n * 389 % 2800)
            db.execute("REPLACE INTO daily_sums VALUES (?, ?, ?, ?, ?)", row)


@pytest.fixture(scope="module")
def openai() -> Iterator[standins.OpenAI]:
    with standins.OpenAI() as server:
        yield server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, openai: standins.OpenAI) -> Iterator[str]:
    """A service with a job of each kind and state."""
    folder = tmp_path_factory.mktemp("page")
    for batches in WATCHED.values():
        for batch, done in batches.items():
            status = "completed" if done == 200 else "in_progress" if done else "failed"
            openai.batch(f"batch_{batch}", status, total=200, completed=done)
    with standins.Keboola() as keboola:
        jobs = "".join(watching(name, ids, keboola.url) for name, ids in WATCHED.items())
        (folder / "jobs.yaml").write_text(f"{HEAD}jobs:\n{jobs}{PRODUCTS}")
        products = "sku,name,added\nA1,Kettle,2024-01-15\nA2,Cup,2024-13-45\nA3,Jug,2024-03-09\n"
        (folder / "products.csv").write_text(products)
        with RunningProgram(folder, program_environment(openai)) as program:
            fill_history(folder / "teckochecker.db")
            yield program.url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with a token and ten thousand jobs, which have ended."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "jobs.yaml").write_text("admin: {host: 127.0.0.1, port: 0}\n")
    with RunningProgram(folder, {"ADMIN_TOKEN": TOKEN}) as program:
        trigger = {"stack_url": "https://keboola.example", "secret": "keboola"}
        trigger |= {"component_id": "app", "configuration_id": "1"}
        watch = {"secret": "openai", "batch_ids": ["batch_1"]}
        context = tecko.load_config(folder / "jobs.yaml", {}).settings.job_context
        spec = tecko.job_spec({"name": "x", "watch": watch, "trigger": trigger}, context)
        columns = tecko.spec_columns(spec) | {"origin": "store", "status": "completed", "pace": 1}
        columns |= {"last_ok_at": 1.0, "created_at": 1.0}
        names, places = ", ".join(columns), ", ".join("?" * len(columns))
        rows = [[*(columns | {"name": f"job {n}"}).values()] for n in range(1, MANY + 1)]
        with contextlib.closing(sqlite3.connect(folder / "teckochecker.db")) as db, db:
            db.executemany(f"INSERT INTO polling_jobs ({names}) VALUES ({places})", rows)
        yield program.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not os.path.exists(CHROMIUM):
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """A page in a profile of its own. No other host may be asked, and the browser may find fault
    with nothing: no violation of the Content-Security-Policy, no error, no dialog."""
    hosts, faults = set[str](), list[str]()
    with contextlib.closing(browser.new_context(**context)) as profile:
        page = profile.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda said: faults.append(said.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
        page.goto(url)
        yield page
    assert (hosts, faults) == ({urlsplit(url).netloc}, [])


def row_of(page: Page, name: str) -> Locator:
    return page.locator("#jobs tr", has=page.get_by_role("link", name=name, exact=True))


LOGIN = {"username": "anyone", "password": TOKEN}


@pytest.mark.parametrize("given", [None, LOGIN | {"password": "not-the-token"}])
def test_without_the_token_nothing_is_shown(browser: Browser, guarded: str, given: Any) -> None:
    """The browser is asked for a password, and gets no page."""
    statuses = set[int]()
    with contextlib.closing(browser.new_context(http_credentials=given)) as profile:
        page = profile.new_page()
        page.on("response", lambda answer: statuses.add(answer.status))
        with contextlib.suppress(playwright.Error):  # it has nobody to ask
            page.goto(guarded)
        page.wait_for_load_state()  # of the browser's own page that says so
        expect(page.locator("table")).to_have_count(0)
        assert statuses <= {401}


def test_ten_thousand_jobs_come_page_by_page(browser: Browser, guarded: str) -> None:
    """With the token as its password a browser shows fifty at a time, and finds one by name or
    by state, without loading all."""
    with opened(browser, guarded, http_credentials=LOGIN) as page:
        expect(page.locator("#pages")).to_contain_text("1 to 50 of 10,000")
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#pages")).to_contain_text("51 to 100 of 10,000")
        expect(page.locator("#jobs tr")).to_have_count(50)
        expect(row_of(page, "job 51")).to_be_visible()
        page.get_by_role("button", name="Previous").click()
        expect(row_of(page, "job 1")).to_be_visible()
        page.get_by_role("searchbox").fill("JOB 9998")
        expect(page.locator("#jobs tr")).to_have_count(1)
        expect(row_of(page, "job 9998")).to_contain_text("completed")
        page.get_by_role("combobox").select_option("failed")
        expect(page.locator("#jobs")).to_contain_text("No job is like this")


def test_a_batch_that_completes_changes_the_page(
    browser: Browser, url: str, openai: standins.OpenAI
) -> None:
    """By itself: the page is the same one, and tells what has happened to who cannot see it."""
    with opened(browser, url) as page:
        live = row_of(page, "support-tickets")
        expect(live).to_contain_text("150/200")
        page.evaluate("window.sameOne = true")
        openai.batch("batch_live", "completed", total=200, completed=200)
        expect(page.get_by_role("status")).to_contain_text(
            re.compile("support-tickets is (trigg|compl)")
        )
        expect(live.locator(".state")).to_have_text("completed")
        expect(live).to_contain_text(re.compile("[0-9]{4,}success"))
        assert page.evaluate("window.sameOne")


def test_pause_and_resume(browser: Browser, url: str) -> None:
    """Pausing wants a second click, resuming does not; the row follows both."""
    with opened(browser, url) as page:
        row = row_of(page, "weekly-embeddings")
        row.get_by_role("button", name="pause").click()
        expect(row.get_by_role("button", name="really pause?")).to_be_focused()
        expect(row.locator(".state")).to_have_text("active")
        row.get_by_role("button", name="really pause?").click()
        expect(row.locator(".state")).to_have_text("paused")
        expect(page.get_by_role("status")).to_have_text("weekly-embeddings is paused now")
        row.get_by_role("button", name="resume").click()
        expect(row.locator(".state")).to_have_text("active")


def test_a_failed_job_needs_you(browser: Browser, url: str, openai: standins.OpenAI) -> None:
    """It stands on top with its reason and leads to its own view, where a second click retries."""
    with opened(browser, url, viewport={"width": 1400, "height": 900}) as page:
        needs = page.get_by_role("region", name="What needs you")
        expect(needs).to_contain_text("batch_bad failed")
        if os.environ.get("PAGE_PICTURE"):
            row_of(page, EVIL).evaluate("row => row.remove()")
            page.screenshot(path=PICTURE, full_page=True)
        needs.get_by_role("link", name="bad-input").click()
        expect(page.get_by_role("heading", name="bad-input")).to_be_focused()
        for name in ("Batches", "Log"):
            expect(page.get_by_role("heading", name=name)).to_be_visible()
        openai.batch("batch_bad", "in_progress", total=200)
        page.get_by_role("button", name="retry").click()
        page.get_by_role("button", name="really retry?").click()
        expect(page.locator("#job .state").first).to_have_text("active")
        page.get_by_role("link", name="All jobs").click()
        expect(row_of(page, "bad-input")).to_be_visible()


def test_a_key_presses_a_button(browser: Browser, url: str) -> None:
    """Without a mouse: Tab gets to a button, Enter presses it, and a refresh keeps the focus."""
    with opened(browser, url) as page:
        row = row_of(page, EVIL)
        check = row.get_by_role("button", name="check")
        expect(check).to_be_visible()
        for _ in range(60):
            page.keyboard.press("Tab")
            if check.evaluate("button => button === document.activeElement"):
                break
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("is checked now")
        expect(check).to_be_focused()


def test_an_ingest_shows_records_and_runs(browser: Browser, url: str) -> None:
    """With its rejects, and a mark for each of the last runs that has a text."""
    with opened(browser, url) as page:
        row = row_of(page, "products")
        expect(row).to_contain_text("2 records, 1 rejected")
        expect(row.get_by_role("img", name="last runs: rejected")).to_be_visible()
        row.get_by_role("link").click()
        for name in ("Runs", "Rejected records"):
            expect(page.get_by_role("heading", name=name)).to_be_visible()
        expect(page.locator("#job")).to_contain_text("products.csv line 3")


def test_history_is_drawn(browser: Browser, url: str) -> None:
    """Thirty days of checks, triggers, delays and records, each also as a text."""
    with opened(browser, url) as page:
        drawn = page.get_by_role("img", name=re.compile(r"^of 30 days: (\d+, ){29}\d+$"))
        expect(drawn).to_have_count(4)
        expect(page.locator("#days")).to_contain_text("Checks today")


def test_without_javascript_there_is_a_table(browser: Browser, url: str) -> None:
    """The first jobs, as texts: a name is never markup."""
    with opened(browser, url, java_script_enabled=False) as page:
        texts = page.locator("#jobs tr").all_inner_texts()
        assert len(texts) == len(WATCHED) + 1
        assert any(text.startswith(EVIL) for text in texts)
        assert any("nightly-classification" in text and "355/600" in text for text in texts)


def test_a_service_that_is_gone(browser: Browser, url: str) -> None:
    """A banner says that it does not answer, what was there stays, and the banner goes with it."""
    with contextlib.closing(browser.new_context()) as profile:
        page = profile.new_page()
        page.goto(url)
        expect(row_of(page, "products")).to_be_visible()
        profile.set_offline(True)
        expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
        expect(row_of(page, "products")).to_be_visible()
        profile.set_offline(False)
        page.evaluate("turn()")
        expect(page.get_by_role("alert")).to_be_hidden()


CONTRAST = """() => {
  const probe = document.body.appendChild(document.createElement("i"));
  const shown = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color.match(/[0-9]+/g).map((part) => part / 255);
  };
  const light = (name) => shown(name)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const texts = ["--ink", "--soft", "--accent", "--good", "--warn", "--bad"];
  const pairs = ["--bg", "--card"].flatMap((ground) => texts.map((text) => [ground, text]));
  return Math.min(...pairs.map((pair) => pair.map(light).sort((a, b) => b - a))
    .map(([more, less]) => (more + 0.05) / (less + 0.05)));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_can_be_read(browser: Browser, url: str, width: int, scheme: Any) -> None:
    """On a phone and on a desktop nothing is cut off sideways, and every colour of a text has the
    contrast of WCAG AA, in both schemes."""
    size = {"width": width, "height": 900}
    with opened(browser, url, viewport=size, color_scheme=scheme) as page:
        expect(row_of(page, "products")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) >= 4.5
        row_of(page, "nightly-classification").get_by_role("link").click()
        expect(page.get_by_role("heading", name="Batches")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_empty_service_says_how_to_begin(browser: Browser, tmp_path: Path) -> None:
    """No empty table: what to do for a first job."""
    (tmp_path / "jobs.yaml").write_text("jobs: []\nadmin: {host: 127.0.0.1, port: 0}\n")
    with RunningProgram(tmp_path) as program, opened(browser, program.url) as page:
        expect(page.locator("#jobs")).to_contain_text("No jobs yet")
