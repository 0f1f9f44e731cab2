"""Run folders as a page: whole runs, killed ones, several at once, and folders that are none."""

import json
import re
from html.parser import HTMLParser

import pytest

from dpsrl import report
from dpsrl.metrics import read_lines, summarize, write_summary

pytestmark = pytest.mark.process


def make_run(folder, num_steps=5, finished=True):
    folder.mkdir()
    lines = [{"step": 0, "eval/countdown/avg@8": 0.25, "time/start_s": 10.0}]
    for step in range(1, num_steps + 1):
        line = {
            "step": step,
            "rollout/num_rollouts": 64 * step,
            "rollout/reward": 0.5,
            "rollout/solve_rate": 0.5,
        }
        line |= {
            "selection/mixed_share": 0.625,
            "time/step_s": 3.0,
            "time/generate_s": 2.0,
            "train/loss": None,
        }
        lines.append(line | ({"eval/countdown/avg@8": 0.5} if step == num_steps else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("seed: 0\nrun:\n  name: <script>alert('x')</script>\n")
    if finished:
        write_summary(folder / "summary.json", summarize(lines, policy_version=num_steps, wall_s=40.0))
    return folder


class Page(HTMLParser):
    """Text of a page, and every address it would load; fails on tags that do not match up."""

    VOID = {"meta", "br", "link", "img", "use", "path"}

    def __init__(self, html):
        super().__init__()
        self.stack, self.words, self.addresses = [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_finished_run_on_one_page(tmp_path):
    path = report.write_report(make_run(tmp_path / "quick"))
    assert path == tmp_path / "quick" / "report.html"
    page = Page(path.read_text())
    titles = ["Held-out accuracy", "Training rollouts", "Mixed groups", "Time by phase"]
    figures = ["0.250 → 0.500", "countdown, +0.250", "320", "62.5% of generated groups", "40 s", "generating"]
    assert [part for part in titles + figures if part not in page.text] == []
    assert "Lines of metrics.jsonl" not in page.text and "no summary.json" not in page.text


def test_the_page_loads_nothing_and_escapes_everything(tmp_path):
    html = report.write_report(make_run(tmp_path / "a<b>&'\"c")).read_text()
    page = Page(html)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "<script" not in html and "<b>&" not in html
    assert "alert('x')" in page.text and "a<b>&'\"c" in page.text


def test_a_killed_run_still_gives_a_page_with_notes(tmp_path):
    run_dir = make_run(tmp_path / "killed", finished=False)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    page = Page(report.write_report(run_dir).read_text())
    assert "no summary.json: it is under way, or stopped after step 4" in page.text
    assert "could not be read and are left out: 1" in page.text
    assert "256" in page.text and "22 s" in page.text  # 4 x 64 rollouts; 10 s of start and 4 x 3 s


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": 3}', '{"steps": 3, "eval'])
def test_a_summary_that_is_not_whole_is_made_again_from_the_metrics(tmp_path, text):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "summary.json").write_text(text)
    run = report.load_run(run_dir)
    assert run.summary["num_rollouts"] == 320 and len(run.notes) == 1


def test_a_run_killed_before_its_first_step(tmp_path):
    run_dir = make_run(tmp_path / "run", finished=False)
    for content in ("", None):
        (run_dir / "metrics.jsonl").unlink() if content is None else (run_dir / "metrics.jsonl").write_text(content)
        page = Page(report.write_report(run_dir).read_text())
        assert "stopped before its first step ended" in page.text


@pytest.mark.parametrize("num_steps", [1, 10_000])
def test_short_and_long_runs(tmp_path, num_steps):
    path = report.write_report(make_run(tmp_path / "run", num_steps))
    assert f"{num_steps * 64:,}" in Page(path.read_text()).text
    assert path.stat().st_size < 600_000


def test_several_runs_are_compared_and_shown_one_by_one(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    runs = [
        make_run(tmp_path / "dps"),
        make_run(tmp_path / "uniform", 8),
        make_run(tmp_path / "other" / "dps"),
    ]
    out, png = tmp_path / "both.html", tmp_path / "png"
    assert report.main([*map(str, runs), "--out", str(out), "--png", str(png)]) == 0
    page = Page(out.read_text())
    assert "3 runs" in page.text and "countdown 0.250 to 0.500" in page.text
    assert str(tmp_path / "other" / "dps") in page.text  # two folders of one name are told apart
    names = {path.name for path in png.iterdir()}
    assert {"accuracy.png", "reward.png", "mixed.png", "run1-phases.png", "run2-phases.png"} <= names
    assert str(out) in capsys.readouterr().out


def test_metrics_are_listed_with_unit_and_meaning_and_unknown_ones_too(tmp_path):
    run_dir = make_run(tmp_path / "run")
    records, _ = read_lines(run_dir / "metrics.jsonl")
    table = report.metrics_table([*records, {"step": 6, "eval/x/avg@4": 0.5, "from/elsewhere": 1.5}])
    text = Page(table).text
    assert "rollout/num_rollouts 320 rollouts" in text and "eval/x/avg@4 0.5 share" in text
    assert "from/elsewhere 1.5" in text


def test_the_command_line_writes_into_the_run_folder(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run")
    assert report.main([str(run_dir)]) == 0
    assert (run_dir / "report.html").exists()
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")


@pytest.mark.parametrize("case", ["missing", "empty", "file", "out"])
def test_what_is_no_run_folder_is_one_sentence(tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / case)]
    if case == "out":
        arguments = [str(make_run(tmp_path / "run")), "--out", str(tmp_path / "nowhere" / "x.html")]
    assert report.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert str(tmp_path) in captured.err
