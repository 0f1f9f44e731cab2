"""Figures drawn from records: what they show, and that odd runs draw too."""

import re
import subprocess
import sys

import numpy as np
import pytest

from dpsrl import plots
from dpsrl.metrics import KEYS, PHASES

pytestmark = pytest.mark.process


def run_of(num_steps, eval_every=20, **extra):
    """Records of a run in which every figure has something to show."""
    records = [{"step": 0, "eval/countdown/avg@8": 0.3, "time/eval_s": 3.0}]
    for step in range(1, num_steps + 1):
        record = {
            "step": step,
            "rollout/reward": step / num_steps,
            "rollout/solve_rate": 0.5 * step / num_steps,
            "selection/mixed_share": 0.6,
            "selection/predicted_share": 0.7,
            "selection/occupancy/unseen": 50,
            "selection/occupancy/unsolved": 20,
            "selection/occupancy/partial": 25,
            "selection/occupancy/solved": 5,
            "time/generate_s": 2.0,
            "time/train_s": 1.0,
            "time/select_ms": 500.0,
        }
        if step % eval_every == 0 or step == num_steps:
            record |= {"eval/countdown/avg@8": 0.3 + 0.2 * step / num_steps, "time/eval_s": 4.0}
        records.append(record | extra)
    return records


def lines_of(figure):
    """label -> (x, y) of the labelled lines."""
    (axes,) = figure.axes
    return {line.get_label(): line.get_data() for line in axes.lines if not line.get_label().startswith("_")}


def tops_of(figure):
    """label -> height of the top edge at each step of a stacked figure."""
    (axes,) = figure.axes
    return {area.get_label(): area.get_paths()[0].vertices[:, 1].max() for area in axes.collections}


def test_accuracy_shows_every_evaluation_and_labels_the_ends():
    figure = plots.accuracy({"quick": run_of(40)})
    steps, values = lines_of(figure)["countdown avg@8"]
    assert list(steps) == [0, 20, 40]
    assert values == pytest.approx([0.3, 0.4, 0.5])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.300", "0.500"]


def test_several_runs_share_the_axes_under_their_names():
    runs = {"dps": run_of(40), "uniform": run_of(20)}
    assert set(lines_of(plots.accuracy(runs))) == {"dps: countdown avg@8", "uniform: countdown avg@8"}
    assert set(lines_of(plots.reward(runs))) == set(lines_of(plots.mixed(runs))) == {"dps", "uniform"}
    assert set(plots.figures(runs)) == {"accuracy", "accuracy-rollouts", "reward", "reward-rollouts", "mixed"}


def test_over_rollouts_the_same_values_stand_at_the_rollouts_so_far():
    records = run_of(40)
    for record in records[1:]:
        record["rollout/num_rollouts"] = 64 * record["step"]
    rollouts, values = lines_of(plots.accuracy({"quick": records}, plots.ROLLOUTS))["countdown avg@8"]
    assert list(rollouts) == [0, 64 * 20, 64 * 40]
    assert values == pytest.approx([0.3, 0.4, 0.5])
    rollouts, _ = plots.series([*records, {"step": 41, "rollout/reward": 0.5}], "rollout/reward", plots.ROLLOUTS)
    assert list(rollouts[-2:]) == [64 * 40, 64 * 40], "a step without a count stands where the last one did"


def test_values_that_are_no_numbers_are_left_out():
    records = [
        {"step": i, "rollout/reward": value} for i, value in enumerate(["x", None, [1], float("nan"), 10**999, 2])
    ]
    steps, values = plots.series(records, "rollout/reward")
    assert (list(steps), list(values)) == ([5], [2])


def test_one_run_shows_what_the_beliefs_expected():
    lines = lines_of(plots.mixed({"quick": run_of(40)}))
    assert lines["mixed"][1] == pytest.approx([0.6] * 40)
    assert lines["predicted at selection"][1] == pytest.approx([0.7] * 40)


@pytest.mark.parametrize("num_steps", [1, 2, 30, 1000])
def test_states_stack_to_the_whole_in_their_order(num_steps):
    tops = tops_of(plots.occupancy(run_of(num_steps)))
    assert tops == pytest.approx({"solved": 0.05, "partial": 0.3, "unsolved": 0.5, "unseen": 1.0})


def test_phases_stack_in_seconds_and_leave_out_what_was_never_timed():
    tops = tops_of(plots.phases(run_of(30, eval_every=100)[:-1]))
    assert tops == pytest.approx({"selecting": 0.5, "generating": 2.5, "training": 3.5})


def test_a_lone_peak_is_one_step_wide():
    figure = plots.phases(run_of(10, eval_every=5))
    evaluating = next(area for area in figure.axes[0].collections if area.get_label() == "evaluating")
    vertices = evaluating.get_paths()[0].vertices
    peak = vertices[vertices[:, 1] > 7.0]
    assert (peak[:, 0].min(), peak[:, 0].max()) == (4.5, 10.5)
    assert set(np.unique(peak[:, 0])) == {4.5, 5.5, 9.5, 10.5}


@pytest.mark.parametrize(
    "records",
    [[], [{"step": 0}], [{"step": 1, "rollout/reward": None}], [{"step": 1, "train/loss": 0.5}]],
)
def test_records_without_anything_to_draw_give_no_figures(records):
    assert plots.figures({"run": records}) == {}


def test_gaps_are_left_out():
    records = run_of(10)
    records[5]["rollout/solve_rate"] = None
    del records[6]["rollout/solve_rate"]
    steps, _ = lines_of(plots.reward({"run": records}))["solve rate"]
    assert list(steps) == [1, 2, 3, 4, 7, 8, 9, 10]


def test_thinning_keeps_the_mean_and_short_series_whole():
    rng = np.random.default_rng(0)
    values = rng.random((10_000, 3))
    assert plots.thin(values).shape == (plots.MAX_POINTS, 3)
    assert plots.thin(values).mean(axis=0) == pytest.approx(values.mean(axis=0))
    uneven = np.arange(plots.MAX_POINTS + 1.0)
    assert plots.thin(uneven)[-1] == np.mean([249.0, 250.0])
    assert np.array_equal(plots.thin(uneven[:-1]), uneven[:-1])


def test_smoothing_is_a_centred_mean_against_brute_force():
    values = np.random.default_rng(0).random(57)
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(57)]
    assert plots.smooth(values) == pytest.approx(expected)


def test_svg_is_text_and_the_same_each_time():
    svg = plots.to_svg(plots.mixed({"run": run_of(25)}))
    assert svg.startswith("<?xml") and svg.rstrip().endswith("</svg>")
    assert "predicted at selection" in svg and "Mixed groups" in svg
    assert svg == plots.to_svg(plots.mixed({"run": run_of(25)}))


def test_in_a_page_colours_are_variables_the_title_stands_outside_and_ids_do_not_clash():
    pages = [plots.to_element(plots.mixed({"run": run_of(25)}), salt) for salt in ("r0", "r1")]
    (title, svg), (_, other) = pages
    assert title == "Mixed groups" and title not in svg
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "var(--ink-0072b2, #0072b2)" in svg and not re.search(r"(?<!, )#[0-9a-f]{6}", svg)
    ids = [set(re.findall(r' id="([^"]+)"', one)) for one in (svg, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)) <= {(i, "") for i in ids[0]} | {
        ("", i) for i in ids[0]
    }


@pytest.mark.parametrize("name", ["a$b$c_{", "_hidden", "<b>&", "x" * 300, "\udcff"])
def test_a_run_may_have_any_name(name):
    """Dollars would be mathematics, and a label that begins with a line would not be shown."""
    figure = plots.mixed({name: run_of(5), "other": run_of(5)})
    svg = plots.to_element(figure, "r0")[1]
    assert svg.encode(errors="strict") and "other" in svg
    assert len(lines_of(figure)) == 2


def test_png_is_a_png():
    assert plots.to_png(plots.phases(run_of(5))).startswith(b"\x89PNG")


def test_figures_use_declared_keys_and_tell_colours_apart():
    used = {key for record in run_of(20) for key in record if not key.startswith("eval/")}
    assert used <= set(KEYS)
    assert set(plots.PHASE_COLORS) == set(PHASES)
    assert len(set(plots.STATES.values())) == 4 and len(set(plots.PHASE_COLORS.values())) == len(PHASES)
    styles = [plots.style_of(index) for index in range(28)]
    assert len(set(styles)) == 28


def test_matplotlib_waits_until_something_is_drawn():
    code = "import sys, dpsrl.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
