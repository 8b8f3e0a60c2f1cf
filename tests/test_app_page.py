"""The page in a browser: here, and as the Space that is written, which runs without this package."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys

import aligned_pairs
import pytest
from huggingface_hub import snapshot_download
from published import parts, saved  # noqa: F401 - fixtures
from tiny_hybrid import mixed_hybrid, word_tokenizer

from manticore_hf import publish
from manticore_hf.app.hybrid_page.reading import Hybrid
from manticore_hf.app.space import publish_space

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install gradio playwright; chromium"),
]
TEXT = "the cat sat\non a mat"
HOSTILE = "<img src=x onerror=window.bad=1> {{this}} ${window.bad=1} <b>cat</b>"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser, url, **options):
    """A tab at the page, and the addresses it asks; at its end no script has failed, and nobody else was asked."""
    tab, asked, errors = browser.new_page(**options), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.set_default_timeout(120_000)
    tab.goto(url)
    tab.wait_for_selector("#seen .hp-t")
    yield tab
    tab.close()
    assert asked and all(one.startswith((url, "data:", "blob:")) for one in asked), asked
    assert not errors


@pytest.fixture(scope="module")
def served():
    from manticore_hf.app.hybrid_page import serving

    hybrid = Hybrid(mixed_hybrid(num_blocks=1), word_tokenizer())
    page = serving.build(hybrid, "tiny <hybrid>")
    yield hybrid, serving.launch(page, "127.0.0.1", wait=False)
    page.close()


@contextlib.contextmanager
def started(arguments, **options):
    """A process that serves a page: (process, address)."""
    process = subprocess.Popen(
        [sys.executable, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    try:
        lines, url = [], None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"Open (http://127\.0\.0\.1:\d+/)", line):
                url = found[1]
                break
        assert url, "".join(lines)
        yield process, url
    finally:
        process.kill()
        process.wait()


def read(tab, text):
    """Types a text, has it read, and waits until it is shown."""
    tab.fill("#text textarea", text)
    tab.click("#read")
    tab.wait_for_function("n => document.querySelectorAll('#seen [data-place]').length === n", arg=len(text.split()))


def test_a_text_is_read_and_gone_on_from(browser, served):
    hybrid, url = served
    with opened(browser, url, viewport={"width": 1100, "height": 900}) as tab:
        assert tab.inner_text("h1") == "tiny <hybrid>"
        read(tab, TEXT)
        assert tab.evaluate("document.querySelector('#hp-text').textContent").replace("↵", "") == TEXT
        found = hybrid.read(TEXT)
        assert "after the text" in tab.inner_text("#expected")
        tab.click('#seen .hp-t[data-place="3"]')
        tab.wait_for_selector('#seen .hp-on[data-place="3"]')
        cards = tab.locator("#hp-next .hp-card")
        assert [cards.nth(i).locator("h4").inner_text() for i in range(3)] == ["hybrid", "part_0", "part_1"]
        for card, name in zip((cards.nth(i) for i in range(3)), found.likely):
            from manticore_hf.app.hybrid_page.drawing import percent

            first = card.locator("tr").first.locator("td")
            token, chance = found.likely[name][3][0]
            assert [first.nth(i).inner_text() for i in range(2)] == [token, percent(chance)]
        number = tab.locator("#place input[type=number]")
        assert number.input_value() == "4"
        number.fill("1")
        number.press("Enter")
        tab.wait_for_selector('#seen .hp-on[data-place="0"]')
        tab.locator("#tokens input[type=number]").fill("5")
        tab.click("#write")
        tab.wait_for_selector("#hp-costs tr:nth-child(4)")
        wanted = list(hybrid.write(TEXT, 5))
        outs = tab.locator("#hp-written .hp-out b")
        shown = [outs.nth(i).evaluate("one => one.textContent") for i in range(3)]
        assert shown == [one.text for one in wanted]
        tab.click("#table button")
        assert tab.locator("#hp-table tr").count() == 1 + len(found.pieces)
        tab.fill("#text textarea", "")
        tab.click("#read")
        tab.wait_for_selector("#notice >> text=There is no text")


def test_strangers_text_is_only_text(browser, served):
    with opened(browser, served[1]) as tab:
        read(tab, HOSTILE)
        assert tab.evaluate("document.querySelector('#hp-text').textContent") == HOSTILE
        tab.click('#seen .hp-t[data-place="1"]')
        tab.wait_for_selector('#seen .hp-on[data-place="1"]')
        tab.click("#write")
        tab.wait_for_selector("#hp-costs tr:nth-child(4)")
        assert tab.evaluate("window.bad") is None and tab.locator("#seen img, #expected img, #hp-text b").count() == 0


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (390, "light"), (390, "dark")])
def test_it_fits(browser, served, width, scheme):
    with opened(browser, served[1], viewport={"width": width, "height": 844}, color_scheme=scheme) as tab:
        read(tab, "the cat sat on a mat and saw two dogs run " * 4)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for part in ("#hp-text", "#hp-next", "#hp-bits"):
            box = tab.locator(part).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_the_written_space_serves_without_the_package(browser, saved, hub, owner, tmp_path):  # noqa: F811
    commit = publish(saved[1], f"{owner}/h").commit
    publish_space(f"{owner}/h", space=f"{owner}/try")
    folder = snapshot_download(f"{owner}/try", repo_type="space", local_dir=tmp_path / "cloned")
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); sys.modules['manticore_hf'] = None; "
        "runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONUNBUFFERED": "1"}
    with started(["-c", code], cwd=folder, env=environment) as (_, url), opened(browser, url) as tab:
        assert tab.inner_text("h1") == f"{owner}/h"
        read(tab, "w3 w4 w5 w6")
        tab.click("#write")
        tab.wait_for_selector("#hp-costs tr:nth-child(4)")
    assert list((tmp_path / "modules").rglob(f"*{commit}*/modeling_manticore.py"))


def test_the_command_serves_a_hybrid_with_several_tokenizers_until_it_is_interrupted(browser, tmp_path):
    model = aligned_pairs.hybrid(tmp_path)
    model.save_pretrained(tmp_path / "several")
    aligned_pairs.tokenizer("gpt").save_pretrained(tmp_path / "several")
    with started(["-m", "manticore_hf.cli", "app", str(tmp_path / "several")]) as (process, url):
        with opened(browser, url) as tab:
            assert tab.inner_text("h1") == "several" and "its own tokenizer" in tab.inner_text("#seen")
            tab.click("#write")
            tab.wait_for_selector("#hp-costs tr:nth-child(4)")
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Traceback" not in rest
