"""A study of stand-ins for dpsrl.train: what is made, kept, taken up again, refused."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from dpsrl.config import load_config
from dpsrl.guard import children, parents
from dpsrl.run_folder import RunFolder
from dpsrl.study import entry, origin, peer, runs
from dpsrl.study.origin import code_version, setups_of
from dpsrl.study.plan import Job, Plan, read_plan
from dpsrl.study.record import is_whole
from dpsrl.study.runs import make_runs, read_record
from dpsrl.sweep import Runs
from dpsrl.types import UserError
from tests.made_record import made_record

STAND_IN = """
import json, os, pathlib, sys
import numpy as np

keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder, steps = pathlib.Path(keys["run.dir"].strip("'")), int(keys["train.steps"])
with open("started", "a") as file:
    file.write(f"{keys['selection']}{keys['seed']} ")
folder.parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(f"{folder}.cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
if keys["selection"] == "dps" and keys["seed"] == "0" and not pathlib.Path("mended").exists():
    sys.exit("dpsrl: it is [broken]")
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
from dpsrl.checkpoint import write_checkpoint
write_checkpoint(folder / "checkpoints/step_2", {"controller": lambda to: np.save(
    to / "audit.judged.npy", np.array([[0.9, 1, 1, 1], [0.8, 0, 1, 0], [0.1, 1, 0, 0], [0.1, 0, 0, 1]]))},
    2, 1, None, {})
records = [
    {"step": 0, "eval/countdown/avg@4": 0.2, "eval/countdown/pass@4": 0.9, "time/start_s": 9.0, "time/eval_s": 3.0},
    {"step": 1, "rollout/num_rollouts": 100, "rollout/response_tokens": 10.0, "selection/mixed_share": 0.5,
     "selection/num_generated": 25, "selection/coverage": 0.1, "selection/uses_max": 1, "time/step_s": 2.0,
     "time/select_ms": 4.0, "time/train_s": 1.0},
    {"step": steps, "eval/countdown/avg@4": 0.4, "rollout/num_rollouts": 400, "rollout/response_tokens": 20.0,
     "selection/num_generated": 75, "selection/mixed_share": 0.25, "selection/coverage": 0.2,
     "selection/uses_max": 2, "time/step_s": 8.0,
     "time/eval_s": 3.0, "time/checkpoint_s": 1.0, "time/select_ms": 2.0, "time/train_s": 1.5,
     "selection/num_short": 3, "selection/occupancy/unseen": 6, "selection/occupancy/partial": 4},
]
groups = [
    {"step": step, "prompt_id": prompt, "policy_version": step, "num_solved": solved, "num_rollouts": 4,
     "admitted": True, "audited": audited, "predicted": predicted}
    for step, prompt, solved, audited, predicted in [
        (1, "a", 2, False, 0.75), (1, "b", 0, False, 0.5), (1, "c", 0, True, 1.0), (2, "a", 4, False, 0.5)]
]
(folder / "groups.jsonl").write_text("".join(json.dumps(group) + chr(10) for group in groups))
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + chr(10) for record in records))
(folder / "report.html").write_text("a page")
from dpsrl.metrics import summarize
records = records[:1] if pathlib.Path("cut").exists() else records
(folder / "summary.json").write_text(json.dumps(summarize(records, 2, 21.0)))
"""
METHODS = ["uniform", "dps"]
SHARED = ["+recipe=quickstart", "train.steps=2"]


def made_plan(*more):
    jobs = [
        Job("easy", method, seed, [*SHARED, f"selection={method}", *more, f"seed={seed}"], "stand_in")
        for seed in (0, 1)
        for method in METHODS
    ]
    return Plan("made", "uniform", "dps", False, {"easy": METHODS}, "", {}, jobs)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return tmp_path / "runs"


def quiet():
    return Console(quiet=True)


def made(plan, folder):
    """The records there are after making what is missing, and why others are not there."""
    unfinished = make_runs(plan, folder, quiet())
    return [record for job in plan.jobs if (record := read_record(folder, job))], unfinished


@pytest.mark.process
def test_one_run_fails_the_others_are_made_and_it_is_taken_up_again(folder, tmp_path):
    records, unfinished = made(made_plan(), folder)
    assert (tmp_path / "started").read_text().split() == ["uniform0", "dps0", "uniform1", "dps1"]  # seeds outermost
    assert unfinished == {"easy/dps/seed_0": "failed: dpsrl: it is [broken]"}
    assert [(r["method"], r["seed"]) for r in records] == [("uniform", 0), ("uniform", 1), ("dps", 1)]
    assert (folder / "easy/dps/seed_0.log").read_text().strip() == "dpsrl: it is [broken]"
    left = sorted(path.name for path in (folder / "easy/uniform/seed_0").iterdir())
    assert left == ["groups.jsonl", "metrics.jsonl", "record.json", "summary.json"]

    (tmp_path / "mended").touch()
    records, unfinished = made(made_plan(), folder)
    assert (tmp_path / "started").read_text().split()[4:] == ["dps0"] and unfinished == {} and len(records) == 4


@pytest.mark.process
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_lanes_share_out_the_cores(folder, tmp_path):
    (tmp_path / "mended").touch()
    plan, mine = made_plan(), os.sched_getaffinity(0)
    assert make_runs(plan, folder, quiet(), lanes=2) == {}
    used = {tuple(json.loads(path.read_text())) for path in folder.rglob("*.cores")}
    assert len(used) == 2 and set().union(*used) == mine and sum(map(len, used)) == len(mine)
    assert {read_record(folder, job)["num_cores"] for job in plan.jobs} == {len(cores) for cores in used}
    assert os.sched_getaffinity(0) == mine
    with pytest.raises(UserError, match="is more than the"):
        make_runs(plan, tmp_path / "other", quiet(), lanes=1000)


@pytest.mark.process
def test_a_finished_run_that_was_not_yet_read_is_read(folder, tmp_path):
    (tmp_path / "mended").touch()
    plan = made_plan()
    make_runs(plan, folder, quiet())
    record = folder / "easy/uniform/seed_0/record.json"
    record.unlink()
    records, unfinished = made(plan, folder)
    assert len((tmp_path / "started").read_text().split()) == 4 and unfinished == {} and record.exists()
    # its checkpoint was gone by then, and with it what was judged
    assert records[0]["audit"] is None and records[1]["audit"]["all"]["alarms"] == 2


@pytest.mark.process
def test_other_settings_in_the_same_folder_are_refused(folder, tmp_path):
    (tmp_path / "mended").touch()
    make_runs(made_plan(), folder, quiet())
    with pytest.raises(UserError, match=re.escape("seed_0 was made with other settings (train.steps=3)")):
        make_runs(made_plan("train.steps=3"), folder, quiet())
    with pytest.raises(UserError, match="'train.stepss'"):
        make_runs(made_plan("train.stepss=3"), tmp_path / "other", quiet())


@pytest.mark.process
def test_a_run_that_was_stopped_is_not_taken_up_with_other_settings(folder, tmp_path):
    """Neither with other arguments, nor where a default has changed, nor without a word on what it was."""
    make_runs(made_plan(), folder, quiet())
    job, run_dir = made_plan().jobs[1], folder / "easy/dps/seed_0"
    longer = replace(made_plan(), jobs=[made_plan("train.steps=3").jobs[1]])
    assert read_record(folder, job) is None
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    said = json.loads(origin.job_file(run_dir).read_text())
    assert said["arguments"] == job.arguments and said["commits"] == [code_version()] * (code_version() is not None)
    with pytest.raises(UserError, match=re.escape("easy/dps/seed_0 was made with other settings (train.steps=3)")):
        make_runs(longer, folder, quiet())
    origin.job_file(run_dir).write_text(json.dumps(said | {"configuration": "of yesterday"}))
    with pytest.raises(UserError, match="dps/seed_0 was made with these arguments when they meant another conf"):
        make_runs(made_plan(), folder, quiet())
    origin.job_file(run_dir).unlink()
    with pytest.raises(UserError, match=r"dps/seed_0 holds a run, but .*job.json does not say of what: remove it"):
        make_runs(made_plan(), folder, quiet())
    assert (tmp_path / "started").read_text().split() == ["uniform0", "dps0", "uniform1", "dps1"]


@pytest.mark.process
def test_other_code_is_written_down_and_told_of(folder, tmp_path, monkeypatch):
    plan = made_plan()
    for commit in ("0ddba11", "badc0de"):  # the run that failed under the first goes on under the second
        monkeypatch.setattr(runs, "code_version", lambda commit=commit: commit)
        make_runs(plan, folder, quiet())
        (tmp_path / "mended").touch()
    assert [read_record(folder, job)["commits"] for job in plan.jobs] == [
        ["0ddba11"], ["badc0de"], ["0ddba11"], ["0ddba11"],
    ]  # fmt: skip


def test_a_configuration_is_the_same_wherever_the_code_lies_and_whatever_the_seed(monkeypatch, tmp_path):
    first, _, other_seed, _ = made_plan().jobs
    assert origin.setup_of(first) == origin.setup_of(other_seed) != origin.setup_of(made_plan("train.steps=3").jobs[0])
    before = origin.setup_of(first)
    monkeypatch.setattr(origin, "PACKAGE_DIR", tmp_path)
    assert origin.setup_of(first) != before  # the path was in it


def test_a_key_that_older_code_did_not_have_makes_no_other_configuration():
    """Where it is left to its method, as `selection.diminish` is; not where it says something."""
    older = {"selection": {"method": "dps"}, "seed": 3}
    newer = {"selection": {"method": "dps", "diminish": None}, "seed": 3, "extra": {"more": None, "on": False}}
    assert origin.given(older) == older
    assert origin.given(newer) == older | {"extra": {"on": False}}


@pytest.mark.process
def test_a_run_that_cannot_be_kept_has_failed_and_the_others_go_on(folder, tmp_path, monkeypatch):
    (tmp_path / "mended").touch()
    keep = runs.keep

    def broken(run_dir, job, busy_share):
        if job.method == "uniform" and job.seed == 0:
            raise KeyError("eval/countdown/avg@4")
        keep(run_dir, job, busy_share)

    monkeypatch.setattr(runs, "keep", broken)
    records, unfinished = made(made_plan(), folder)
    assert unfinished == {"easy/uniform/seed_0": "failed: KeyError: 'eval/countdown/avg@4'"} and len(records) == 3
    monkeypatch.setattr(runs, "keep", keep)
    assert made(made_plan(), folder)[1] == {} and len((tmp_path / "started").read_text().split()) == 4


class AlreadyStopped(Runs):
    def __init__(self):
        super().__init__()
        self.num_stops = 1


def test_after_a_stop_nothing_is_begun_or_waited_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(runs, "Runs", AlreadyStopped)
    monkeypatch.setattr(runs, "busy_share_here", lambda: pytest.fail("a second for each run that is left"))
    monkeypatch.setattr(entry, "read_plan", lambda *_: made_plan())
    assert entry.main(["study=made", f"out={folder}"]) == 1
    assert {path.name for path in folder.rglob("*")} == {"lock"}
    assert f"0 of 4 runs in {folder}; the same command goes on" in capsys.readouterr().out


@pytest.mark.process
def test_damaged_records_are_left_out_and_made_again(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mended").touch()
    plan = made_plan()
    monkeypatch.setattr(entry, "read_plan", lambda *_: plan)
    before = made(plan, folder)[0]
    cut = before[3] | {"curve": {name: values[:1] for name, values in before[3]["curve"].items()}}
    for job, content in zip(plan.jobs[1:], [b"", b"\xff\x00[]", json.dumps(cut).encode()], strict=True):
        runs.record_file(folder, job).write_bytes(content)
    assert entry.main(["study=made", f"out={folder}", "runs=no"]) == 0
    said = capsys.readouterr().out
    for job in plan.jobs[1:]:
        assert f"{job.name}/record.json is cut short or broken: left out" in said
    assert entry.main(["study=made", f"out={folder}"]) == 0
    assert capsys.readouterr().out.count("record.json is cut short or broken: the run is made again") == 3
    again = [read_record(folder, job) for job in plan.jobs]
    assert [r["audit"] for r in again] == [r["audit"] for r in before] and again[3]["curve"] == before[3]["curve"]


@pytest.mark.process
@pytest.mark.parametrize("damage", ["", "[]", '{"steps": 1}'])
def test_a_summary_that_is_damaged_or_of_fewer_steps_is_no_finished_run(damage, folder, tmp_path):
    (tmp_path / "mended").touch()
    plan = replace(made_plan(), jobs=made_plan().jobs[:1])
    run_dir = folder / plan.jobs[0].name
    origin.claim(run_dir, plan.jobs[0], origin.setup_of(plan.jobs[0]), "0ddba11")
    run_dir.mkdir()
    (run_dir / "summary.json").write_text(damage)
    assert made(plan, folder)[1] == {} and read_record(folder, plan.jobs[0])["steps"] == 2


@pytest.mark.process
def test_a_run_that_ends_early_has_failed(folder, tmp_path):
    (tmp_path / "cut").touch()
    plan = replace(made_plan(), jobs=made_plan().jobs[:1])
    records, unfinished = made(plan, folder)
    assert records == [] and "has 0 of 2 steps in its summary.json: remove it" in unfinished["easy/uniform/seed_0"]


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"arguments": ['])
def test_a_damaged_word_on_what_a_run_was_made_from_is_named(damage, folder, monkeypatch, capsys):
    monkeypatch.setattr(entry, "read_plan", lambda *_: made_plan())
    run_dir = folder / "easy/uniform/seed_0"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    origin.job_file(run_dir).write_text(damage)
    assert entry.main(["study=made", f"out={folder}"]) == 2
    assert f"{origin.job_file(run_dir)} does not say of what: remove it" in capsys.readouterr().err


def published_in(tmp_path, monkeypatch):
    """A published study without runs of its own."""
    plan = made_plan()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "read_plan", lambda *_: plan)
    path = tmp_path / "docs/study/made.json"
    path.parent.mkdir(parents=True)
    made = [made_record(job.setting, job.method, job.seed, arguments=job.arguments) for job in plan.jobs]
    path.write_text(entry.compact(plan, made))
    return path


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"records": [{}]}', '{"records": [{"steps": 1}, 7]}'])
def test_damaged_published_records_are_named(damage, tmp_path, monkeypatch, capsys):
    published_in(tmp_path, monkeypatch).write_text(damage)
    assert entry.main(["study=made", "runs=no"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpsrl.study: docs/study/made.json ") and "`git checkout docs/study/made.json`" in said


@pytest.mark.parametrize("out", ["a_file", "a_file/below", "/proc/x"])
def test_tables_that_cannot_be_written_are_told_of(out, tmp_path, monkeypatch, capsys):
    published_in(tmp_path, monkeypatch)
    (tmp_path / "a_file").touch()
    assert entry.main(["study=made", "runs=no", f"out={out}"]) == 2
    assert f"out={out} cannot be written to" in capsys.readouterr().err
    assert entry.main(["study=made", "runs=no", "out=here"]) == 0


@pytest.mark.parametrize("lacks", ["commits", "audit"])
def test_a_record_lacks_nothing(lacks):
    whole = made_record("easy", "dps", 0)
    assert is_whole(whole) and not is_whole({name: value for name, value in whole.items() if name != lacks})
    for arguments in (["train.steps=3"], ["eval.every=2"]):
        assert not is_whole(whole | {"arguments": arguments})
    assert is_whole(whole | {"arguments": ["train.steps=2", "eval.every=1", "+recipe=quickstart"]})


# --- TRL's runs -------------------------------------------------------------------------------------------


def test_two_peers_do_not_share_a_folder(tmp_path, capsys):
    with RunFolder(tmp_path / "run").lock():
        assert peer.main(["+recipe=quickstart", f"run.dir={tmp_path}/run"]) == 2
    assert "is in use by another run" in capsys.readouterr().err


STUDY = """
import sys
from pathlib import Path
from dpsrl.sweep import Runs

entry = (sys.executable, "-c", "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
with Runs() as runs:
    runs.run(entry, [], Path("run"))
"""


def wait_until(condition, within_s=30.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the guard is idle")
def test_a_run_without_a_guard_of_its_own_ends_with_the_study_however_that_ends(tmp_path):
    study = subprocess.Popen([sys.executable, "-c", STUDY], cwd=tmp_path)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text())
    wait_until(lambda: len(children(study.pid)) == 2)  # the run and its guard
    time.sleep(1.0)  # until the guard has been told
    study.kill()
    study.wait()
    wait_until(lambda: int(pid.read_text()) not in parents())


@pytest.mark.process
def test_what_belongs_to_another_plan_is_refused_before_hours_are_spent(folder, tmp_path, monkeypatch, capsys):
    """Also where a part of the plan is asked for, which has no such folder."""
    (tmp_path / "mended").touch()
    make_runs(made_plan(), folder, quiet())
    whole = made_plan("train.steps=3")
    part = replace(whole, jobs=[replace(whole.jobs[0], seed=7)])
    monkeypatch.setattr(entry, "read_plan", lambda name, *filters: part if filters else whole)
    assert entry.main(["study=made", f"out={folder}"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert len((tmp_path / "started").read_text().split()) == 4


@pytest.mark.process
def test_the_command_ends_with_a_summary_tables_and_figures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entry, "read_plan", lambda *_: made_plan())
    assert entry.main(["study=made", f"out={folder}"]) == 1
    printed = capsys.readouterr().out
    assert "easy/dps/seed_0: failed: dpsrl: it is [broken]" in printed and "3 of 4 runs" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert not (tmp_path / "runs/study/summary.json").exists()  # the place of a study that is published
    assert len(summary["records"]) == 3 and summary["unfinished"] == {
        "easy/dps/seed_0": "failed: dpsrl: it is [broken]"
    }
    (row,) = [row for row in summary["tables"]["easy/cost"]["rows"] if row["method"] == "dps"]
    assert row["seeds"] == 1 and row["rollouts/all"] == {
        "state": "reached", "spent": 1.0, "value": 1.0, "interval": None, "dropped": 0,
    }  # fmt: skip
    text = (folder / "tables.md").read_text()
    assert "| `uniform` | 1 |" in text and "Over the 1 of 2 seeds that all methods have; `dps` has fewer." in text
    assert {path.name for path in folder.glob("*.svg")} == {"accuracy.svg", "mixed.svg", "calibration.svg", "cost.svg"}
    (tmp_path / "mended").touch()
    assert entry.main(["study=made", f"out={folder}"]) == 0


@pytest.mark.process
def test_what_is_published_is_taken_over_and_never_lost(folder, tmp_path, monkeypatch, capsys):
    plan = made_plan()
    published = replace(plan, publish=True)
    monkeypatch.setattr(entry, "read_plan", lambda *_: published)
    (tmp_path / "mended").touch()
    assert entry.main(["study=made", f"out={folder}"]) == 0
    docs = tmp_path / "docs/study/made.json"
    before = docs.read_text()
    assert (tmp_path / "runs/study/summary.json").read_text() == (folder / "summary.json").read_text()
    (tmp_path / "started").unlink()
    assert entry.main(["study=made", "out=elsewhere", "published=yes"]) == 0
    assert not (tmp_path / "started").exists() and docs.read_text() == before
    assert "4 of 4 runs" in (printed := capsys.readouterr().out) and "4 of them as published" in printed
    mixed = replace(published, jobs=made_plan("trainer.lr=1e-4").jobs[:1] + plan.jobs[1:])
    monkeypatch.setattr(entry, "read_plan", lambda *_: mixed)
    assert entry.main(["study=made", "out=elsewhere", "published=yes"]) == 0
    assert (tmp_path / "started").read_text() == "uniform0 "  # made anew: its settings are other ones
    records = json.loads(docs.read_text())["records"]
    assert [r["arguments"] for r in records] == [job.arguments for job in mixed.jobs]


@pytest.mark.process
def test_a_record_by_hand(folder, tmp_path):
    (tmp_path / "mended").touch()
    (job, *_) = made_plan("train.batch=16", "rollout.num_rollouts=4").jobs
    make_runs(Plan("made", "uniform", "dps", False, {"easy": METHODS}, "", {}, [job]), folder, quiet())
    record = read_record(folder, job)
    assert record["curve"] == {
        "step": [0, 2], "accuracy": [0.2, 0.4], "rollouts": [0, 400], "seconds": [0.0, 6.0],  # 2 + 8 - 3 - 1
        "tokens": [0, 7000],  # 100 x 10 + 300 x 20
        "whole_batches": [0, 448],  # of 64: two for 100, five for 300
    }  # fmt: skip
    assert record["response_tokens"] == 17.5 and record["select_ms"] == 3.0 and record["coverage"] == 0.2
    assert record["mixed_share"] == pytest.approx((100 * 0.5 + 300 * 0.25) / 400) and record["mixed_T"] == [0.5, 0.25]
    assert record["seconds"] == {"generate": 0, "train": 2.5, "sync": 0, "eval": 3.0} and record["short_steps"] == 1
    assert record["coverage_chosen"] == 0.2  # a and b of ten; c was audited
    assert record["mixed_prompts"] == 1  # a, with two right of four; later it is solved
    assert record["selected"]["brier"] == pytest.approx((0.25**2 + 0.5**2 + 0.5**2) / 3)
    audit, seen = record["audit"]["all"], record["audit"]["seen"]
    assert (audit["alarms"], audit["hits"], audit["mixed"]) == (2, 1, 2)
    assert (seen["alarms"], seen["hits"], seen["mixed"], sum(seen["num_K"])) == (1, 1, 1, 2)
    assert audit["squared_error"] == pytest.approx(0.01 + 0.64 + 0.81 + 0.01)
    assert audit["num_K"] == [0, 2, 0, 0, 0, 0, 0, 0, 1, 1] and audit["mixed_K"] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", ["main", "smoke"])
def test_a_plan_is_balanced_and_names_each_run_once(name):
    plan = read_plan(name)
    names = [job.name for job in plan.jobs]
    assert plan.name == name and len(set(names)) == len(names)
    seeds = np.array([job.seed for job in plan.jobs])
    assert (np.diff(seeds) >= 0).all()
    assert plan.reference in plan.methods_of["countdown"] and plan.ours in plan.methods_of["countdown"]
    made = {(job.setting, job.method) for job in plan.jobs}
    assert {(s, m) for s, methods in plan.methods_of.items() for m in methods} <= made
    assert {(plan.ablated, name) for variants in plan.ablations.values() for name in variants} <= made
    seeds = {name: sum(job.setting == plan.ablated and job.method == name for job in plan.jobs) for _, name in made}
    for variants in plan.ablations.values():
        assert len({seeds[name] for name in variants}) == 1
        assert all(seeds[variant.beside] >= seeds[name] for name, variant in variants.items())


def test_the_order_within_a_seed_is_drawn_anew_for_each_and_the_same_each_time():
    plan, part = read_plan("main"), read_plan("main", {"settings": ["hard"]}, 3)
    assert [job.name for job in plan.jobs] == [job.name for job in read_plan("main").jobs]
    assert [job.name for job in part.jobs] == [j.name for j in plan.jobs if j.setting == "hard" and j.seed < 3]
    orders = [[job.method for job in plan.jobs if job.setting == "hard" and job.seed == seed] for seed in range(8)]
    assert len({tuple(order) for order in orders}) == 8 and len({order[0] for order in orders}) > 3


def test_one_prompt_of_a_step_is_audited():
    for name in ("main", "smoke"):
        config = load_config(read_plan(name).jobs[0].arguments)
        assert config.selection.audit_share * config.train.batch == 1


def test_a_part_of_a_plan():
    plan = read_plan("main", {"settings": ["hard"], "methods": ["dps", "uniform"]}, 2)
    names = [{job.name for job in plan.jobs if job.seed == seed} for seed in (0, 1)]
    assert names == [{f"hard/{method}/seed_{seed}" for method in ("uniform", "dps")} for seed in (0, 1)]
    assert len(plan.jobs) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study=mian"], "study=mian does not exist: choose one of main, smoke"),
        (["methods=dpss"], "methods=dpss is not in this study"),
        (["study=../study/main"], "study=../study/main does not exist: choose one of main, smoke"),
        (["settings=hard", "methods=trl"], "settings=hard methods=trl: "),
        (["seeds=none"], "seeds=none: seeds must be a whole number"),
        (["lanes=²"], "lanes=²: lanes must be a whole number"),
        (["steps=3"], "unknown key 'steps'"),
        (["runs=maybe"], "runs must be yes or no"),
        (["smoke"], "'smoke' is not of the form key=value"),
        (["study=smoke", "runs=no"], "has no finished run"),
    ],
)
def test_refused_before_anything_starts(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entry.main(arguments) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("name", ["main", "smoke"])
def test_every_run_of_a_plan_would_be_accepted(name):
    setups_of(read_plan(name).jobs)
