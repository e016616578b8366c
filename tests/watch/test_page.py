"""The page, in a real browser where there is one, and what it is made of."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.watch.browser import PROGRAM, Browser
from tests.watch.trainer import RULES, save, settle

from lagless.checkpoints import CheckpointError
from lagless.watch import Page, Settings, View, Watch
from lagless.watch._table import render

EVIL = "<img src=x onerror=document.title='evil'>[bold]"


@pytest.fixture
def shown(tmp_path: Path, watching: Callable[..., Any]) -> Iterator[Callable[..., tuple[Watch, View, Page]]]:
    """Serves a watch of a run whose name is markup."""
    with ExitStack() as stack:

        def serve() -> tuple[Watch, View, Page]:
            watch, _ = watching(run=tmp_path / EVIL.replace("/", ""), settings=Settings(settle=0.0))
            view = View(watch.metrics.rows())
            watch.sinks.append(view)
            page = stack.enter_context(Page(lambda: view.data(watch), lambda: view.version(watch)))
            watch.sinks.append(page.changed)
            return watch, view, page

        yield serve


def measure(watch: Watch, step: int) -> None:
    """Losses as an evaluation writes them."""
    for place, name in enumerate(("live", *RULES)):
        watch.write({"step": step, "name": name, "loss": 2.0 + 5.0 / step - 0.01 * place, "standard_error": 0.02})
    watch.write({"event": "lead", "step": step, "name": "window", "over": "live", "lead": 0.05, "standard_error": 0.01})


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(tmp_path: Path, shown: Callable[..., tuple[Watch, View, Page]]) -> None:
    async def look() -> None:
        watch, _, page = shown()
        for step in range(10, 60, 10):
            save(watch.run, step)
            settle(watch)
            measure(watch, step)
        watch.tell("evaluation failed", f"the command printed {EVIL}", step=50)
        async with Browser(tmp_path / "profile") as browser:
            await browser.open(page.url, 1280, 900)
            await browser.until("document.querySelectorAll('#losses polyline').length == 6")
            assert await browser.evaluate("document.title") == "50 · lagless watch"
            text = await browser.evaluate("document.body.innerText")
            assert EVIL.replace("/", "") in text and f"the command printed {EVIL}" in text
            assert "5 checkpoints in the averages" in text and "best at step 50: window" in text
            assert await browser.evaluate("document.querySelectorAll('img').length") == 0
            assert await browser.evaluate("document.querySelectorAll('#averages tr').length") == 7
            assert await browser.evaluate("document.querySelectorAll('#weights polyline').length") == 5
            await browser.screenshot(tmp_path / "desktop.png")
            save(watch.run, 60)
            settle(watch)
            await browser.until("document.title == '60 · lagless watch'")  # without a reload
            await browser.resize(360, 740)
            await browser.until("document.querySelector('#losses svg').viewBox.baseVal.height == 460")
            assert await browser.evaluate("document.documentElement.scrollWidth <= 360")
            await browser.screenshot(tmp_path / "phone.png")
            assert all(request.startswith(page.url) for request in browser.requests if request != "about:blank")
            assert not browser.problems
            page.__exit__()
            await browser.until("document.getElementById('status').textContent.startsWith('the watch has ended')")

    asyncio.run(look())


def test_the_document_says_what_averages_are_made_of(
    shown: Callable[..., tuple[Watch, View, Page]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, _, page = shown()
    for step in (10, 20, 30):
        save(watch.run, step)
    settle(watch)
    measure(watch, 30)
    with urllib.request.urlopen(f"{page.url}data.json") as answer:
        data = json.load(answer)
    window = next(average for average in data["averages"] if average["name"] == "window")
    assert window["weights"] == [[10, 0.0], [20, 0.5], [30, 0.5]]
    assert window["schedule"] == [[10, 1.0], [20, 1.0], [30, 0.5]]
    assert window["mean_age"] == 5.0 and window["on_start"] == 0.0
    assert data["losses"]["live"] == [[30, pytest.approx(2.0 + 5 / 30), 0.02]]
    assert data["best"]["step"] == 30 and data["disk"]["state"] > 0 and data["seconds"]["absorbing"] > 0
    monkeypatch.setattr("lagless.watch._page._HOLD", 0.05)
    with urllib.request.urlopen(f"{page.url}data.json?version={data['version']}") as answer:
        assert answer.status == 204  # there is no news


def test_nothing_but_the_page_is_served_and_only_to_this_machine(
    shown: Callable[..., tuple[Watch, View, Page]],
) -> None:
    _, _, page = shown()
    place = page.url.removeprefix("http://").rstrip("/")

    def get(path: str, host: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(place)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        policy = answer.getheader("Content-Security-Policy") or ""
        answer.read()
        connection.close()
        return answer.status, policy

    for path in ("/", "/page.js", "/page.css", "/data.json"):
        status, policy = get(path, "localhost:1")
        assert status == 200 and policy.startswith("default-src 'none'")
        assert get(path, "evil.example")[0] == get(path, "evil.example:80")[0] == 403
    for path in ("/../_page.py", "/_page.py", "/page/index.html", "/index.htm"):
        assert get(path, "127.0.0.1")[0] == 404
    with pytest.raises(CheckpointError, match=r"--serve \d+: the port cannot be used"):
        Page(dict, str, int(place.split(":")[1]))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    import lagless.watch

    for file in (Path(lagless.watch.__file__).parent / "page").iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text and "//cdn" not in text and "innerHTML" not in text, file


def test_the_table_shows_losses_and_no_markup(shown: Callable[..., tuple[Watch, View, Page]]) -> None:
    watch, view, _ = shown()
    console = Console(width=140, force_terminal=False, record=True)
    console.print(render(view.data(watch)))
    assert "no checkpoint yet, 0 checkpoints" in " ".join(console.export_text().split())
    for step in (10, 20):
        save(watch.run, step)
    settle(watch)
    measure(watch, 20)
    watch.tell("note", EVIL, step=20)
    console.print(render(view.data(watch)))
    text = console.export_text()
    assert EVIL in text and "step 20, 2 checkpoints in the averages" in " ".join(text.split())
    lines = [line for line in text.splitlines() if line.startswith("window")]
    assert "2.2000 ± 0.0200" in lines[0] and "+0.0500" in lines[0]


def test_losses_of_a_branch_that_was_left_are_not_shown() -> None:
    view = View()
    for step in (10, 20, 30):
        view({"step": step, "name": "live", "loss": float(step), "time": 0.0})
    view({"event": "rolled back", "step": 20, "text": "", "time": 0.0})
    assert view.losses() == {"live": {10: (10.0, None)}}
