"""The report in a real browser: every width and colour scheme, the keyboard, hostile texts, a long run, and --watch."""

import json
import shutil
import threading
import time

import pytest

from dpsrl import report
from dpsrl.report.watch import Served
from tests.made_run import kept_line, make_run, write_lines

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
NASTY = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">\0\ud800"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page with what it said on the console and asked of the network."""

    def __init__(self, browser, width=1280, scheme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path):
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self.page


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Its first prompt is hostile: in text, answer and responses, one of which has a million characters."""
    run_dir = make_run(tmp_path_factory.mktemp("report") / "small")
    line = kept_line(1, 0, 4, 3)
    line["prompt_id"] = json.loads((run_dir / "groups.jsonl").read_text().splitlines()[0])["prompt_id"]
    line["prompt"] = f"findable {NASTY}"
    line["answer"] = line["responses"][0]["text"] = line["responses"][0]["finish_reason"] = NASTY
    line["responses"][1]["text"] = "x" * 1_000_000
    line["responses"][2] |= {"reward": None, "correct": None}
    others = map(json.loads, (run_dir / "responses.jsonl").read_text().splitlines())
    write_lines(run_dir / "responses.jsonl", [line, *(o for o in others if o["prompt_id"] != line["prompt_id"])])
    return report.write_report(run_dir)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme(browser, small, width, scheme):
    watched = Watched(browser, width, scheme)
    page = watched.open(small)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")
    for contrast in page.evaluate(CONTRASTS):
        assert contrast["ratio"] >= 4.5, contrast
    unnamed = "[...document.querySelectorAll('input,select')].filter(e => !e.labels.length).length"
    assert page.evaluate(unnamed) == 0
    assert page.locator("[role=img]:not([aria-label])").count() == 0
    assert watched.said == [] and watched.asked == [small.as_uri()]
    page.close()


# Contrast of text in figures, captions and tables with what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const color = rgb(getComputedStyle(e).backgroundColor);
    return color[3] === 0 ? behind(e.parentElement) : color;
  };
  const kinds = "figure svg text, figcaption, td, th, h1, h2, h4, .path, .cards span, button, summary";
  const elements = document.querySelectorAll(kinds);
  return [...elements].filter((e) => e.textContent.trim()).map((e) => {
    const style = getComputedStyle(e), color = rgb(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(color), light(behind(e))].sort((x, y) => y - x);
    return { text: e.textContent.slice(0, 30), color: color.join(), ratio: (a + 0.05) / (b + 0.05) };
  });
}"""


def test_a_prompt_is_found_and_opened_by_keyboard_alone(browser, small):
    watched = Watched(browser)
    page = watched.open(small)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "find":
            break
    page.keyboard.type("FINDABLE")
    page.wait_for_selector("#count:text-matches('^1 of')")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('ul').id") == "found"
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt:focus")
    assert page.locator("#prompt .answers > div").count() >= 8
    shown = page.locator("#prompt pre").all_text_contents()
    assert shown[0] == NASTY.replace("\0", "\u2400")
    assert "characters left out" in shown[1] and "no reward" in page.locator("#prompt").inner_text()
    assert page.locator("#prompt .history tbody tr").count() >= 1 and page.locator("#prompt svg circle").count() >= 1
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.press("Control+a")
    page.keyboard.type("no such prompt")
    page.wait_for_selector("#count:text-matches('^0 of')")
    assert page.title() == "small - dpsrl" and watched.said == [] and watched.asked == [small.as_uri()]
    again = Watched(browser)
    again.page.goto(page.url)
    again.page.wait_for_selector("#prompt .answers")
    assert page.url.count("#prompt=") == 1 and again.said == []


def test_lists_can_be_ordered_and_narrowed(browser, small):
    page = Watched(browser).open(small)
    page.select_option("#only", "kept")
    known = int(page.locator("#count").inner_text().split()[0])
    page.select_option("#only", "2")
    solved = page.locator("#found .sub").all_inner_texts()
    assert 0 < known and solved and all("last solved" in text for text in solved)
    page.select_option("#only", "")
    page.select_option("#order", "visits")
    visits = [int(text.split(" group")[0].split()[-1]) for text in page.locator("#found .sub").all_inner_texts()]
    assert visits == sorted(visits, reverse=True) and len(visits) > 10


def test_several_runs_share_one_explorer(browser, tmp_path):
    runs = [make_run(tmp_path / name, num_steps=5, num_prompts=num, seed=num) for name, num in (("a", 50), ("b", 90))]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    watched = Watched(browser, 390)
    page = watched.open(tmp_path / "both.html")
    page.select_option("#of-run", "r1")
    page.wait_for_selector("[data-run=r1]:not([hidden])")
    page.locator("#found button").first.click()
    page.wait_for_selector("#prompt .history")
    assert page.url.endswith("&run=r1") and watched.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_long_run_opens(browser, tmp_path, capsys):
    """1,000 steps and 100,000 groups. The time is printed beside an empty page's, not judged: it is the machine's."""
    path = report.write_report(make_run(tmp_path / "long", 1000, 100, 20_000, kept=4, words=100))
    empty = tmp_path / "empty.html"
    empty.write_text("<!doctype html><html data-ready='yes'><title>empty</title></html>")
    seconds = []
    for file in (empty, path):
        watched = Watched(browser)
        started = time.monotonic()
        page = watched.open(file)
        seconds.append(time.monotonic() - started)
        assert watched.said == [] and watched.asked == [file.as_uri()]
    assert int(page.locator("#count").inner_text().split()[0].replace(",", "")) > 1000
    with capsys.disabled():
        size = path.stat().st_size / 1e6
        print(f"\n100,000 groups ({size:.1f} MB) opened in {seconds[1]:.2f} s, an empty page in {seconds[0]:.2f} s")


def test_a_page_that_is_watched_loads_the_newer_one(browser, tmp_path):
    runs = [report.load_run(make_run(tmp_path / "run", num_steps=3))]
    server = Served(0, report.render(runs, watch=True))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    watched = Watched(browser)
    page, address = watched.page, f"http://127.0.0.1:{server.server_port}/"
    page.goto(address)
    page.wait_for_selector("text=this page follows it")
    server.show(report.render(runs, watch=True).replace("<h1>run</h1>", "<h1>newer</h1>"))
    page.wait_for_selector("h1:has-text('newer')", timeout=30_000)
    server.done = True
    page.wait_for_selector("text=this page is final", timeout=30_000)
    assert watched.said == [] and {url.replace(address, "") for url in watched.asked} == {"", "state"}
    server.shutdown()
    server.server_close()
