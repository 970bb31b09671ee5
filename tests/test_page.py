"""The report's page in a real browser: silent, self-contained, and no wider than the screen, in both themes."""

import json
import os
import runpy
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH; on Debian: apt-get install -y chromium"),
]

SEEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.requestWillBeSent")
SECONDS = 120  # until the browser has answered, on a machine that does other things too


class Browser:
    """Headless Chromium over `--remote-debugging-pipe`: JSON messages, each ended by a NUL, on descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        self.process = subprocess.Popen(
            [
                "bash", "-c", f'exec "$@" 3<&{in_read} 4>&{out_write}', "bash",
                str(CHROMIUM), "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--no-sandbox",  # which a container without user name spaces cannot have; the page is our own
                f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
            ],
            pass_fds=(in_read, out_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(in_read)
        os.close(out_write)
        self.to, self.of = in_write, out_read
        self.buffer, self.sent = b"", 0
        self.events: list[dict] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def receive(self) -> dict:
        """The next message; events are also kept in `events`."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.of], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.of, 1 << 16) if ready else b""
            assert data, "the browser ended or did not answer in time"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def visit(self, page: Path, width: int, theme: str) -> dict:
        """Open a page anew: what it said and asked for, how wide it is, and the theme it was shown in."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        for url in ("about:blank", page.as_uri()):  # the blank page's end too, or it would be taken for the page's
            self.events.clear()
            self.call("Page.navigate", url=url)
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.receive()
        found = self.evaluate(
            "new Promise(done => setTimeout(() => done({"  # a moment for what comes after the load
            "width: document.documentElement.scrollWidth,"
            "paper: getComputedStyle(document.body).backgroundColor,"
            "sections: document.querySelectorAll('h2').length}), 300))"
        )
        found |= self.evaluate(
            "(() => { document.querySelectorAll('details').forEach(fold => fold.open = true); return {"
            "unfolded: document.documentElement.scrollWidth,"
            "charts: [...document.querySelectorAll('svg.chart')].map(chart => chart.getBoundingClientRect().height),"
            # text of a chart that lies over another text of it by more than a pixel both ways
            "overlaps: [...document.querySelectorAll('svg.chart')].flatMap(chart => {"
            "  const boxes = [...chart.querySelectorAll('text')].map(text => [text.textContent,"
            "    text.getBoundingClientRect()]);"
            "  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>"
            "    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&"
            "    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1).map(([b]) => a + ' / ' + b)); })}; })()"
        )
        seen = [event for event in self.events if event["method"] in SEEN]
        asked = [e["params"]["request"]["url"] for e in seen if e["method"] == "Network.requestWillBeSent"]
        return found | {
            "requests": [url for url in asked if url != page.as_uri() and not url.startswith("data:")],
            "messages": [event["params"] for event in seen if event["method"] != "Network.requestWillBeSent"],
        }

    def evaluate(self, expression: str) -> dict:
        return self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)["result"][
            "value"
        ]

    def close(self) -> None:
        os.close(self.to)  # on which the browser ends
        os.close(self.of)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_runs = runpy.run_path(str(Path(__file__).with_name("test_report.py")))["make_runs"]
    return write_report([make_runs(folder)], folder / "out")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_report_is_silent_and_fits(browser: Browser, report: Path, width: int, theme: str) -> None:
    found = browser.visit(report, width, theme)
    assert found["messages"] == []
    assert found["requests"] == []
    assert found["width"] <= width
    # --paper of the two themes: the page is there, and follows the reader's
    assert found["paper"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[theme]
    assert found["sections"] >= 12
    assert found["unfolded"] <= width
    assert len(found["charts"]) >= 10 and min(found["charts"]) > 40
    assert found["overlaps"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_bad_page_is_noticed(browser: Browser, tmp_path: Path, width: int) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><div style="width: 2000px">wide</div>'
        '<svg class="chart"><text y="9">one</text><text y="9">two</text></svg><img src="missing.png"><script>console.log("said"); undefinedName</script>'
    )
    found = browser.visit(page, width, "light")
    assert found["width"] >= 2000
    assert [Path(url).name for url in found["requests"]] == ["missing.png"]
    assert found["overlaps"] == ["one / two"]
    said = json.dumps(found["messages"])
    assert '"said"' in said and "undefinedName" in said
