"""Runs one after another, with a stand-in for dpsrl.train that writes what a run folder has."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpsrl import sweep, train
from dpsrl.sweep import folder_name, plan

STAND_IN = """
import json, pathlib, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(keys["run.dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("seed: 1")
with (folder / "starts").open("a") as file:
    file.write(keys["resume"] + " ")
if keys["seed"] == "1" and keys["selection"] == "uniform" and not pathlib.Path("mended").exists():
    sys.exit("dpsrl: it is [broken]")
while pathlib.Path("slow").exists():
    time.sleep(0.05)
record = {"step": 1, "selection/mixed_share": 0.5, "rollout/num_rollouts": 8}
(folder / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
summary = {"steps": 1, "num_rollouts": 8, "wall_s": 61.0, "eval_first": {"countdown": 0.25},
           "eval_last": {"countdown": 0.5}, "mixed_share": 0.5, "policy_version": 1,
           "eval_measure": {"countdown": "avg@8"}, "time_s": {}}
(folder / "summary.json").write_text(json.dumps(summary))
"""
GRID = ["-m", "+recipe=quickstart", "selection=dps,uniform", "seed=0,1", "run.dir=grid"]


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return [sys.executable, "stand_in.py"]


def starts(tmp_path):
    return {path.parent.name: path.read_text().split() for path in (tmp_path / "grid").glob("*/starts")}


@pytest.mark.process
def test_one_fails_the_others_run_and_the_same_command_goes_on(entry, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    names = [f"selection={method},seed={seed}" for method in ("dps", "uniform") for seed in (0, 1)]
    assert sweep.main(GRID, entry) == 1
    printed = capsys.readouterr().out
    assert sorted(starts(tmp_path)) == names
    assert "[4/4] selection=uniform,seed=1: failed with exit code 1: dpsrl: it is [broken]" in printed
    assert printed.count("countdown 0.250 to 0.500") == 3 and printed.count("1:01") == 3
    assert "1 of 4 runs are not finished: the same command with run.dir=grid goes on" in printed
    page = (tmp_path / "grid/report.html").read_text()
    assert all((name in page) == (name != names[3]) for name in names)

    (tmp_path / "mended").touch()
    assert sweep.main(GRID, entry) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert starts(tmp_path) == {name: ["auto"] * (1 + (name == names[3])) for name in names}
    assert names[3] in (tmp_path / "grid/report.html").read_text()

    assert sweep.main([*GRID[:3], "seed=0,1,2", "run.dir=grid"], entry) == 0  # one seed more
    assert len(starts(tmp_path)) == 6
    assert sweep.main([*GRID, "train.steps=3"], entry) == 2
    assert "holds a sweep of +recipe=quickstart: give the same" in capsys.readouterr().err


@pytest.mark.process
def test_a_sweep_that_is_stopped_ends_its_run_and_starts_no_other(entry, tmp_path):
    (tmp_path / "slow").touch()
    code = f"import sys; from dpsrl import sweep; sys.exit(sweep.main({GRID}, {entry}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (starts(tmp_path) or time.monotonic() > until):
        time.sleep(0.1)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert list(starts(tmp_path)) == ["selection=dps,seed=0"]
    assert (tmp_path / "grid/selection=dps,seed=0.log").read_text() == "saved\n"
    assert "stopped" in printed and printed.count("not started") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+recipe=quickstart", "seed=0"], "-m has nothing to go through"),
        (["+recipe=quickstart", "seed=interval(0,1)"], "seed=interval(0,1) cannot be gone through"),
        (["+recipe=quickstart", "seed=0,1", "resume=auto"], "resume=auto: each run of a sweep"),
        (["+recipe=quickstart", "seed=0,1", "run.dir=a,b"], "run.dir=a,b: each run of a sweep"),
        (["+recipe=quickstart", "seed=0,1", "train.stepss=2"], "'train.stepss'"),
        (["+recipe=quickstart", "selection=dps,upniform"], "selection=upniform does not exist"),
        (["+recipe=quickstart", "seed=0,-1"], "seed=-1 is out of range"),
        (["+recipe=quickstart", "seed=glob(*)"], "seed=glob(*) cannot be gone through (ConfigLoader is not set)"),
        (["+recipe=quickstart", "seed=range(3,0)"], "seed=range(3,0) has no value to go through"),
        (["+recipe=quickstart", "seed=range(0,3,0)"], "seed=range(0,3,0) cannot be gone through (range() arg 3"),
        (
            ["+recipe=quickstart", "selection=dps,uniform", "selection.decay=0.5"],
            "the run of selection=uniform: selection option 'decay' has no effect with method 'uniform'",
        ),
        (["seed 0"], "'seed 0' is not of the form key=value"),
    ],
)
def test_refused_before_anything_starts(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--multirun", *arguments]) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("written", ["true", "True", "yes"])
def test_a_dry_run_starts_nothing(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*GRID, f"dry_run={written}"], [sys.executable, "-c", "pass"]) == 0
    assert not (tmp_path / "grid").exists()


@pytest.mark.process
def test_folders_of_others_are_left_alone(entry, tmp_path, capsys):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid/thesis.tex").touch()
    assert sweep.main(GRID, entry) == 2
    assert "occupied, but not by a sweep" in capsys.readouterr().err
    (tmp_path / "grid/sweep.json").write_text('["+recipe=quick')
    assert sweep.main(GRID, entry) == 2
    assert 'broken: if this is the same sweep, write ["+recipe=quickstart"] into it' in capsys.readouterr().err


@pytest.mark.process
def test_runs_are_the_product_of_all_values():
    asked = plan(["+recipe=quickstart", "trainer.lr=1e-4,1e-5", "seed=range(0,3)", "eval.benchmarks=[countdown]"])
    assert asked.shared == ["+recipe=quickstart", "eval.benchmarks=[countdown]"]
    assert list(asked.runs.values())[:4] == [
        ["trainer.lr=0.0001", "seed=0"], ["trainer.lr=0.0001", "seed=1"], ["trainer.lr=0.0001", "seed=2"],
        ["trainer.lr=1e-05", "seed=0"],
    ]  # fmt: skip
    assert len(asked.runs) == 6 and asked.folder.name.startswith("quickstart-sweep-")


def test_names_of_folders():
    assert folder_name(["selection=dps", "seed=0"]) == "selection=dps,seed=0"
    awkward = [["data.train=a/b"], ["data.train=a_b"], ["+recipe=x"], ["a=" + 200 * "b"], ["a=" + 201 * "b"]]
    names = [folder_name(values) for values in awkward]
    assert len(set(names)) == 5 and all("/" not in name and len(name) < 120 for name in names)


@pytest.mark.process
def test_what_stands_in_is_read_as_a_run_folder(entry, tmp_path):
    """So that the tests above speak of what dpsrl.train writes."""
    subprocess.run([*entry, "run.dir='x'", "seed=0", "selection=dps", "resume=auto"], check=True)
    from dpsrl.report import load_run

    assert load_run(tmp_path / "x").summary == json.loads((tmp_path / "x/summary.json").read_text())


@pytest.mark.process
@pytest.mark.parametrize(
    "own", ["reward.fn=mine:fn", "data.train=mine:rows", "algo.loss=mine:loss", "eval.benchmarks=[train,mine:rows]"]
)
def test_modules_of_ones_own_do_not_outlast_their_run(own, entry, tmp_path, monkeypatch):
    happened = []

    class StandIn:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

        def __init__(self, log):
            happened.append("a lane")

        def run(self, arguments, log):
            happened.append("a run")
            return 0

        def close(self):
            happened.append("its end")

    monkeypatch.setattr(sweep, "Lane", StandIn)
    monkeypatch.setattr(sweep, "ENTRY", tuple(entry))
    arguments = ["+recipe=quickstart", "seed=0", "selection=uniform"]
    with sweep.Runs() as runs:
        for place, more in enumerate([[], [], [own], []]):
            assert runs.run(entry, [*arguments, *more], tmp_path / str(place)) == 0
            happened.append(place)
        unknown = ["+recipe=nothing", "seed=0", "selection=uniform"]  # its own process says so, and others go on
        assert runs.run(entry, unknown, tmp_path / "4") == 0 and (tmp_path / "4/starts").exists()
    StandIn.process.communicate()
    assert happened == ["a lane", "a run", 0, "a run", 1, "its end", 2, "a lane", "a run", 3, "its end"]
    assert (tmp_path / "2/starts").exists() and (tmp_path / "0.log").exists()
