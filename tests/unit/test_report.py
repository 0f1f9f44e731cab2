"""Run folders as a page: whole runs, killed ones, several at once, and folders that are none."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from dpsrl import plots, report
from dpsrl.metrics import read_lines, summarize, write_summary
from tests import made_run

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
            "selection/num_generated": 32,
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

    VOID = {"meta", "br", "link", "img", "use", "path", "input"}

    def __init__(self, html):
        super().__init__()
        self.stack, self.words, self.addresses, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        self.scripts += [dict(attributes).get("type")] if tag == "script" else []
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
        if self.stack[-1:] not in (["script"], ["style"]):
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
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", html)
    assert page.scripts == ["application/octet-stream", "application/octet-stream", None] and "<b>&" not in html
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
    assert run.summary["num_rollouts"] == 320 and "no summary.json" in run.notes[-1]


def test_a_run_killed_before_its_first_step(tmp_path):
    run_dir = make_run(tmp_path / "run", finished=False)
    for content in ("", None):
        (run_dir / "metrics.jsonl").unlink() if content is None else (run_dir / "metrics.jsonl").write_text(content)
        page = Page(report.write_report(run_dir).read_text())
        assert "stopped before its first step ended" in page.text
        assert ("no metrics.jsonl: how it went, step by step, cannot be shown" in page.text) == (content is None)
        assert "no groups.jsonl: what selection did and its prompts cannot be shown" in page.text


@pytest.mark.parametrize("num_steps", [1, 10_000])
def test_short_and_long_runs(tmp_path, num_steps):
    path = report.write_report(make_run(tmp_path / "run", num_steps))
    assert f"{num_steps * 64:,}" in Page(path.read_text()).text
    assert path.stat().st_size < 600_000


@pytest.fixture
def quick_pngs(monkeypatch):
    """How figures become PNGs is tested beside them, and takes as long as all the rest here."""
    monkeypatch.setattr(plots, "to_png", lambda figure: b"png")


def test_several_runs_are_compared_and_shown_one_by_one(tmp_path, capsys, quick_pngs):
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


def test_a_run_given_twice_counts_once(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run")
    assert report.main([str(run_dir), f"{run_dir}/../run"]) == 0
    assert "Comparison" not in Page((run_dir / "report.html").read_text()).text


def test_a_file_and_a_folder_of_runs_are_told_from_a_run(tmp_path, capsys):
    runs = [make_run(tmp_path / f"seed={seed}") for seed in (0, 1)]
    assert report.main([str(runs[0] / "metrics.jsonl")]) == 2
    assert f"metrics.jsonl' is a file: give its run folder, {str(runs[0])!r}" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert f"is not a run folder, but holds 2: give those, {runs[0]} {runs[1]}" in capsys.readouterr().err


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


def test_the_one_script_that_may_run_is_ours(tmp_path):
    html = report.write_report(make_run(tmp_path / "run")).read_text()
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", html)
    script = html[html.rindex("<script>") + len("<script>") : html.rindex("</script>")]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == digest
    assert "</script" not in script and "default-src 'none'" in html and "connect-src 'none'" in html


HOSTILE = [
    b"", b"\0\0\0", b"{", b"[1, 2]", b"\xff\xfe", b'{"step": 1}', b'{"step": 1, "prompt_id": 3}', b"[" * 100_000,
    b"1" * 5000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 2, "rollout/reward": "x", "selection/coverage": [1]}',
    b'{"step": 3, "eval/a/b": {}, "</script><b>": 1, "time/step_s": 1e999, "selection/occupancy/unseen": "many"}',
    b'{"step": 4, "eval/x/avg@8": "high", "rollout/num_rollouts": -1e400}', b'{"step": true}', b'{"step": -5}',
    b'{"step": 1, "event": ["<img src=x>"], "text": null}', b'{"step": ' + b"9" * 400 + b"}",
    b'{"step": 5, "time/train_s": "x", "time/select_ms": [], "time/eval_s": 1e299, "rollout/reward": -1e299}',
    b'{"step": 6, "selection/audit_mixed_share": 7, "rollout/num_trained": {}, "selection/num_generated": 1e299}',
]  # fmt: skip


def test_broken_lines_in_every_file_give_a_page_with_notes(tmp_path):
    run_dir = make_run(tmp_path / "run")
    good = json.dumps(group_line(3))
    for name in ("metrics.jsonl", "groups.jsonl", "responses.jsonl"):
        before = (run_dir / name).read_bytes() if (run_dir / name).exists() else good.encode() + b"\n"
        (run_dir / name).write_bytes(b"\n".join(HOSTILE) + b"\n" + before + b"\n".join(HOSTILE[::-1]) + b'{"step": 1, ')
    (run_dir / "config.yaml").write_bytes(b"\0\xff: [{&a *b !!python/object")
    (run_dir / "summary.json").write_text('{"steps": "many"}')
    page = Page(report.write_report(run_dir).read_text())
    for name in ("metrics", "groups", "responses"):
        assert f"Lines of {name}.jsonl that could not be read and are left out" in page.text
    assert "0.250" in page.text and "<img" in page.text


def group_line(step, prompt="p", num_solved=3, predicted=0.5):
    line = {"step": step, "prompt_id": prompt, "policy_version": step, "num_solved": num_solved, "num_rollouts": 8}
    return line | {"admitted": True, "predicted": predicted}


def test_what_selection_did_and_what_it_cost(tmp_path, capsys, quick_pngs):
    run_dir = made_run.make_run(tmp_path / "run")
    assert report.main([str(run_dir), "--svg", str(tmp_path / "svg"), "--png", str(tmp_path / "png")]) == 0
    page = Page((run_dir / "report.html").read_text())
    titles = [
        "Held-out accuracy over rollouts", "What selection got", "From one group of a prompt to its next",
        "Prompts that changed state", "Prediction and outcome", "Coverage", "How often each prompt was rolled out",
        "What the mixed groups cost", "Where the rollouts went", "Time by phase", "Prompts",
    ]  # fmt: skip
    assert [title for title in titles if title not in page.text] == []
    assert "Brier score" in page.text and "uniform sampling (estimated)" in page.text
    names = {path.stem for path in (tmp_path / "svg").iterdir()}
    assert names == {path.stem for path in (tmp_path / "png").iterdir()} and len(names) == 15
    svg = (tmp_path / "svg" / "flow.svg").read_text()
    assert svg.startswith("<?xml") and "var(" not in svg and "From one group of a prompt to its next" in svg
    assert str(tmp_path / "svg" / "flow.svg") in capsys.readouterr().out


def test_a_run_whose_other_costs_cannot_be_told_says_so(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "groups.jsonl").write_text(json.dumps(group_line(1)) + "\n")
    assert "cannot be estimated for this run: it has no figure of prompts drawn" in Page(report_of(run_dir)).text
    (run_dir / "groups.jsonl").write_text(json.dumps(group_line(1, num_solved=8)) + "\n")
    assert "cannot be estimated for this run: none of its groups was mixed" in Page(report_of(run_dir)).text


def report_of(run_dir):
    return report.write_report(run_dir).read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [(["--port", "8000"], "--port 8000 would have no effect"), (["--watch", "--port", "70000"], "--port 70000 is none"),
     (["--watch", "--out", "x.html"], "--out has no effect with --watch")],
)  # fmt: skip
def test_options_without_effect_are_refused(tmp_path, capsys, arguments, words):
    assert report.main([str(make_run(tmp_path / "run")), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    run_dir, folder = make_run(tmp_path / "run"), tmp_path / "page.html"
    folder.mkdir()
    assert report.main([str(run_dir), "--out", str(folder)]) == 2
    assert f"--out {folder} is a folder: give a file, as {folder}/report.html" in capsys.readouterr().err
    (run_dir / "report.html").mkdir()
    assert report.main([str(run_dir)]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("predicts", [True, False])
def test_predictions_are_spoken_of_where_there_are_any(tmp_path, predicts):
    run_dir = made_run.make_run(tmp_path / "run")
    if not predicts:
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in r.items() if name != "selection/predicted_share"} for r in records]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert report.main([str(run_dir)]) == 0
    page = Page((run_dir / "report.html").read_text()).text
    assert ("beside what was predicted when they were selected" in page) == predicts
