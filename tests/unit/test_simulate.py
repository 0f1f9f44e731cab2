import json
import sys

import numpy as np
import pytest

from dpsrl import simulate as module
from dpsrl.simulate import Plan, find_world, main, parse, simulate
from dpsrl.types import UserError
from dpsrl.worlds import WORLDS, World, chance_mixed, rate_of

pytestmark = pytest.mark.process

TINY = World(200, 30, ((0.7, -4.0, 1.0), (0.3, 0.0, 1.0)))
SMALL = dict(batch=16, seeds=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(WORLDS, "tiny", TINY)


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_start_and_move_as_they_say(name):
    world, rng = WORLDS[name], np.random.default_rng(0)
    logit, learnability = world.start(rng)
    share, mean, sd = np.array(world.parts).T
    assert logit.shape == (world.num_prompts,)
    assert logit.mean() == pytest.approx(share @ mean, abs=0.15)
    assert logit.std() == pytest.approx(np.sqrt(share @ (sd**2 + mean**2) - (share @ mean) ** 2), rel=0.05)
    assert (learnability == 0).mean() == pytest.approx(world.stuck, abs=0.02)
    assert learnability.mean() == pytest.approx(1 - world.stuck, rel=0.07)
    before = logit.copy()
    world.evolve(logit, learnability, np.array([3]), 0.5, 0, rng)
    moved = (logit - before)[4:]
    assert moved.mean() == pytest.approx(world.drift * 0.5 * learnability.mean(), abs=4 * world.noise / 40)
    assert moved.std() == pytest.approx(world.noise, rel=0.15)


def test_the_drifting_world_turns():
    drifts = [WORLDS["drifting"].drift_at(step) for step in (0, 79, 80, 139, 140)]
    assert drifts == pytest.approx([0.04, 0.04, -0.03, -0.03, 0.04])


def test_chances_by_hand():
    assert rate_of(np.array([0.0]))[0] == 0.5
    assert chance_mixed(np.array([0.5, 1.0]), 2).tolist() == [0.5, 0.0]


def test_a_run_is_repeatable_and_knowing_beats_guessing():
    plan = Plan(**SMALL)
    runs = {m: simulate("tiny", m, 0, plan) for m in ("uniform", "dps", "forecast", "clairvoyant", "uniform+mixed")}
    again = simulate("tiny", "forecast", 0, plan)
    assert again.mixed_T == runs["forecast"].mixed_T and again.brier_random == runs["forecast"].brier_random
    assert runs["uniform"].mixed_share < runs["forecast"].mixed_share < runs["clairvoyant"].mixed_share
    assert runs["uniform"].num_groups == 30 * 16 < runs["uniform+mixed"].num_groups
    assert all(len(run.mixed_T) == 30 and 0 < run.coverage <= 1 for run in runs.values())
    assert runs["uniform"].coverage == 1.0


def test_lag_makes_the_rates_old():
    """Prompts that are learned in three steps: late knowledge is worth less."""
    world = World(400, 40, ((1.0, -1.0, 0.3),), gain=1.5, noise=0.0)
    WORLDS["quick"] = world
    try:
        shares = [np.mean([simulate("quick", "clairvoyant", s, Plan(lag=lag, **SMALL)).mixed_share for s in (0, 1)])
                  for lag in (0, 6)]  # fmt: skip
        assert simulate("quick", "forecast", 0, Plan(lag=2, **SMALL)).mixed_share > 0.3
    finally:
        del WORLDS["quick"]
    assert shares[0] != shares[1]


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["worlds=tiny", "methods=uniform,dps,clairvoyant", "seeds=2", "batch=16", "dps.decay=0.5", "workers=1"]
    assert main([*arguments, f"out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    content = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    for method, row in rows.items():
        runs = [run for run in content["runs"] if run["method"] == method]
        assert len(runs) == 2
        assert row["mixed_share"] == pytest.approx(np.mean([np.mean(run["mixed_T"]) for run in runs]))
        assert f"{row['mixed_share']:.3f}" in text
    difference = np.subtract(
        *([r["mixed_share"] for r in content["runs"] if r["method"] == m] for m in ("dps", "uniform"))
    )
    assert rows["dps"]["difference"] == pytest.approx(difference.mean())
    assert (tmp_path / "simulate.png").stat().st_size > 10_000 and (tmp_path / "simulate.svg").exists()


def test_a_users_world_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom dpsrl.worlds import World\n\n\n@dataclass(frozen=True)\n"
        "class Mine(World):\n    num_prompts: int = 50\n    steps: int = 5\n    parts: tuple = ((1.0, 0.0, 1.0),)\n"
        "\n\nnothing = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert simulate("mine:Mine", "uniform", 0, Plan(**SMALL)).mixed_share > 0.5
    with pytest.raises(UserError, match="not a dpsrl.worlds.World"):
        find_world("mine:nothing")
    with pytest.raises(UserError, match="there is no Absent in mine"):
        find_world("mine:Absent")
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("wrlds=tiny", "unknown key 'wrlds'; did you mean 'worlds'"),
        ("worlds=bimodle", "did you mean 'bimodal'"),
        ("methods=dsp", "did you mean 'dps'"),
        ("seeds=0", "seeds=0 must be at least 1"),
        ("seeds=x", "seeds must be a whole number"),
        ("seeds", "not of the form key=value"),
        ("dps.dekay=0.5", "did you mean 'decay'"),
        ("dsp.decay=0.5", "did you mean 'dps'"),
        ("worlds=,", "must name at least one"),
        ("seeds=\u00b2", "seeds must be a whole number"),
        ("dps.decay=[", "'[' is no value"),
        ("against=foo", "against=foo is not among methods"),
        ("batch=100000000000", "batch=100000000000 is more than the 200 prompts of world tiny"),
    ],
)
def test_refused_arguments(argument, sentence, capsys):
    assert main([argument]) == 2
    assert sentence in capsys.readouterr().err


def test_options_of_a_method_left_out_are_refused():
    with pytest.raises(UserError, match="options of dps would have no effect"):
        parse(["methods=uniform", "dps.decay=0.5"])


def test_what_is_compared_with_must_run():
    for methods, against in (("dps,beta", "dps"), ("dps,uniform", "uniform")):
        assert parse([f"methods={methods}", "batch=16"]).against == against
    with pytest.raises(UserError, match="against=uniform is not among methods; use one of: beta, dps"):
        parse(["methods=dps,beta", "against=uniform"])


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "run_all", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/x"):
        assert main(["worlds=tiny", "batch=16", f"out={out}"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"dpsrl.simulate: out={out} cannot be written to (") and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_number_is_null_and_not_shown(tmp_path, capsys):
    """One seed has no interval; without the clairvoyant there is no share of it."""
    arguments = ["worlds=tiny", "methods=uniform,dps", "seeds=1", "batch=16", "steps=3", "workers=1"]
    assert main([*arguments, f"out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed and "\u00b1" not in printed
    text = (tmp_path / "summary.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (
        [row["half_width"] for row in content["rows"]] == [None, None] == [r["of_clairvoyant"] for r in content["rows"]]
    )


def test_help_names_every_method(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*module.METHODS, *WORLDS])
