"""The panel: its figures from records, and that it fits whatever terminal there is."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dpsrl.panel import NUM_ROWS, SPARE_COLUMNS, Figures, Stage, View, sparks, with_bar
from dpsrl.usage import Machine

MACHINE = Machine(0.87, (12.0, 62.0))
MANY_GPUS = Machine(0.5, (600.0, 2048.0), ((0.99, 70.0, 80.0),) * 7 + ((0.02, 70.0, 80.0),))


def record(step, **extra):
    return {
        "step": step, "rollout/reward": 0.1 * step, "selection/mixed_share": 0.64, "selection/predicted_share": 0.7,
        "rollout/num_rollouts": 512 * step, "rollout/num_trained": 256 * step, "time/generate_s": 3.0,
        "time/train_s": 1.0, "time/select_ms": 40.0, **extra,
    }  # fmt: skip


def figures(*records):
    result = Figures()
    for values in records:
        result = result.take(values)
    return result


def shown(view, width, height=24):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    return console.file.getvalue().splitlines()


RUN = figures(
    {"step": 0, "eval/countdown/avg@8": 0.344}, record(1), record(2, **{"eval/countdown/avg@8": 0.43}),
    record(3, **{"eval/countdown/avg@8": 0.425, "eval/math500/avg@4": 0.9, "eval/countdown/pass@8": 0.99}),
)  # fmt: skip
VIEW = View("runs/mine", 32, 3, 41.0, 70.0, Stage("generating", 37, 64, "groups", 12.0), RUN, MACHINE)


def test_figures_worked_by_hand():
    assert (RUN.accuracy, RUN.best, RUN.best_step) == (0.425, 0.43, 2)
    assert RUN.seconds == pytest.approx({"generate": 9.0, "train": 3.0, "select": 0.12})
    assert RUN.reward == pytest.approx((0.1, 0.2, 0.3)) and RUN.mixed == (0.64,) * 3
    assert RUN.record["rollout/num_rollouts"] == 1536


@pytest.mark.parametrize("width", [60, 80, 120])
def test_everything_is_on_the_panel_at_any_width(width):
    lines = shown(VIEW, width)
    text = "\n".join(lines)
    for part in (
        "runs/mine", "step 3/32", "41 s, 1:10 left", "generating 37/64 groups", "12 s", "0.30", "64%", "70%",
        "accuracy   0.425  best 0.430", "1,536", "768  50%", "generate 74%", "train 25%", "CPU 87%  memory 12/62 GiB",
    ):  # fmt: skip
        assert part in text, part
    assert ("at step 2" in text) == (width >= 80)


@pytest.mark.parametrize("machine", [None, MACHINE, MANY_GPUS])
@pytest.mark.parametrize("view_figures", [Figures(), RUN])
@pytest.mark.parametrize("width", [20, 40, 49, 50, 60, 80, 120, 300])
def test_its_rows_are_as_many_and_as_wide_as_said(width, machine, view_figures):
    for height in (4, 24):
        for stage in (Stage(), Stage("a stage of a rather long name, of sixty columns and then some", 1, 9, "groups")):
            view = View("/a/very/long/path" * 9, 1_000_000, 3, 1e6, 1e7, stage, view_figures, machine)
            lines = shown(view, width, height)
            assert len(lines) == view.height(width, height) == (NUM_ROWS if width >= 50 and height == 24 else 2)
            assert {cell_len(line) <= width - SPARE_COLUMNS for line in lines} == {True}
            if len(lines) == NUM_ROWS:
                assert len({cell_len(line) for line in lines}) == 1, "its right edge is straight"


def test_before_the_first_step_it_is_one_line():
    (line,) = shown(View(stage=Stage("starting the engines", seconds=75.0)), 80)
    assert line.endswith("starting the engines  1:15")


def test_an_idle_gpu_stands_out():
    assert any("GPU ███████▁ 87%  560/640 GiB" in line for line in shown(View("", 9, 1, machine=MANY_GPUS), 120))


def test_small_curves():
    assert sparks([]) == "" and sparks([0.5]) == "▁"
    assert sparks([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparks([0.2], [0.0, 0.4]) == "▅"
    assert sparks([0.50, 0.51]) == "▁▁", "noise is not blown up"


@pytest.mark.parametrize(
    "done, bar", [(0, "────────"), (1, "╸───────"), (8, "━━━━────"), (16, "━━━━━━━━"), (99, "━━━━━━━━")]
)
def test_a_bar_by_halves(done, bar):
    assert with_bar("ab", "cd", done, 16, 12, "").plain == f"ab{bar}cd"


def test_a_method_that_predicts_nothing_has_a_dash():
    view = View("runs/mine", 9, 1, figures=figures(record(1, **{"selection/predicted_share": float("nan")})))
    (line,) = [line for line in shown(view, 80) if "predicted" in line]
    assert "nan" not in line and line.split("predicted")[1].split()[0] == "-"
