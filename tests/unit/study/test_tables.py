"""Rows by hand, the Markdown, and the published tables recomputed from the published runs."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dpsrl import plots
from dpsrl.study.figures import draw, mixed
from dpsrl.study.plan import Plan, Variant, read_plan
from dpsrl.study.tables import COLUMNS, FIGURES, above_all, fill, markdown, ratio, tables_of
from tests.made_record import made_record

ROOT = Path(__file__).parents[3]
DRAWN_BY = "3.11.2"  # the matplotlib of the published figures
METHODS = ["uniform", "dynamic", "forecast"]
LATE = {"lag": {"late": Variant("forecast", "forecast")}}
PLAN = Plan(
    "made", "dynamic", "forecast", False, {"easy": METHODS}, "easy", LATE, [], ("forecast",), frozenset({"dynamic"})
)


def rising(shift, end):
    """From 0.2 to `end` in two steps."""
    return (0.2 + shift, 0.1 + end / 2 + shift, end + shift)


def records(num_seeds=3):
    """Dynamic sampling spends 400 rollouts a step and ends at 0.4; forecast is as good a step for a quarter of them."""
    made = []
    for seed in range(num_seeds):
        shift = 0.02 * seed
        made += [
            made_record("easy", "uniform", seed, rising(shift, 0.3), mixed=0.4 + shift, selected=None),
            made_record("easy", "dynamic", seed, rising(shift, 0.4), rollouts=400),
            made_record("easy", "forecast", seed, rising(shift, 0.4), mixed=0.7 + shift),
        ]
    return [*made, made_record("easy", "late", 0, (0.2, 0.3, 0.35), mixed=0.6)]


@pytest.fixture(scope="module")
def tables():
    return tables_of(PLAN, records())


@pytest.fixture(scope="module")
def eight():
    return tables_of(PLAN, records(8))


def row(tables, name, method):
    return next(row for row in tables[name].rows if row["method"] == method)


def test_accuracies_and_their_paired_differences(tables):
    mine = row(tables, "easy/accuracy", "forecast")
    half = 4.303 * 0.02 / 3**0.5  # t for two degrees of freedom
    assert mine["accuracy"] == pytest.approx([0.42, half], abs=1e-4)
    assert mine["minus_uniform"] == pytest.approx([0.1, 0.0])  # the same for each seed, whatever the seeds' own spread
    assert mine["minus_reference"] == pytest.approx([0.0, 0.0])
    # dynamic sampling has 0.25 after 200 of its 800 rollouts, halfway to its first evaluation
    assert mine["at_equal_rollouts"] == pytest.approx([0.15, 0.0])
    assert row(tables, "easy/accuracy", "uniform")["at_equal_rollouts"] == pytest.approx([0.05, 0.0])
    assert row(tables, "easy/accuracy", "dynamic")["at_equal_rollouts"] is None
    assert (mine["seeds"], mine["before"], mine["rollouts"], mine["seconds"]) == (3, pytest.approx(0.22), 200, 1.0)
    assert row(tables, "easy/accuracy", "dynamic")["minus_reference"] is None


def test_costs_and_what_is_never_reached(tables, eight):
    for found, interval in ((tables, None), (eight, [0.25, 0.25])):
        mine, uniform = (row(found, "easy/cost", method) for method in ("forecast", "uniform"))
        whole = {"state": "reached", "spent": 0.25, "value": 0.25, "interval": interval, "dropped": 0}
        assert mine["rollouts/all"] == whole and mine["seconds/all"]["value"] == 1.0
        assert mine["reached"] == mine["seeds"] and uniform["reached"] == 0
        assert uniform["rollouts/all"]["state"] == "censored" and uniform["rollouts/all"]["spent"] == 0.25
        # uniform's 0.3 is where forecast is after half of as many rollouts; dynamic has it after 400
        assert mine["rollouts/uniform"]["value"] == pytest.approx(0.5)
        assert row(found, "easy/cost", "dynamic")["rollouts/uniform"]["value"] == pytest.approx(2.0)
    # 95% of 0.42 is 0.399, 179/200 of the way: all that uniform spent is 200 of the 716 that dynamic needed for it
    assert row(tables, "easy/cost", "uniform")["rollouts/95%"]["spent"] == pytest.approx(200 / 716)


def test_a_run_that_was_held_up_does_not_count_by_its_seconds(eight):
    slow = records(8)
    for record in slow:
        if record["seed"] == 3:
            record["curve"]["seconds"] = [10 * value for value in record["curve"]["seconds"]]
    found = tables_of(PLAN, slow)
    for name in ("easy/accuracy", "easy/cost"):
        for key in row(eight, name, "forecast").keys() & {"seconds", "seconds/all", "seconds/95%"}:
            assert row(found, name, "forecast")[key] == row(eight, name, "forecast")[key], key


def test_how_a_ratio_is_written():
    def said(state, value, interval, spent=0.43):
        return ratio({"state": state, "value": value, "interval": interval, "spent": spent, "dropped": 0})

    assert said("reached", 0.31, [0.25, 0.4]) == "31% [25%, 40%]"
    assert said("reached", 0.31, None) == "31%"
    assert said("reached", 0.31, [0.25, None]) == "31% [25%, ...]"
    assert said("censored", None, [0.29, None]) == "not within 43% [29%, ...]"
    assert said("censored", None, [None, None]) == "not within 43%"
    assert said("at the start", None, None, None) == "at the start"
    assert ratio(None) == ""


def test_a_reference_that_has_it_at_once_is_said_so_and_resamples_that_do_are_counted():
    flat = [made_record("easy", "dynamic", s, (0.4, 0.4, 0.4)) for s in range(8)]
    others = [r for r in records(8) if r["method"] != "dynamic"]
    found = row(tables_of(PLAN, others + flat), "easy/cost", "uniform")
    assert ratio(found["rollouts/95%"]) == ratio(found["rollouts/all"]) == "at the start"
    rising = [made_record("easy", "dynamic", s, (0.2, 0.3, 0.4) if s < 4 else (0.4, 0.4, 0.4)) for s in range(8)]
    table = tables_of(PLAN, others + rising)["easy/cost"]
    dropped = row({"easy/cost": table}, "easy/cost", "forecast")["rollouts/95%"]["dropped"]
    # eight draws of a flat seed: one that rises takes 0.2 / 8 off the start, more than 5% of 0.4
    assert dropped / 10_000 == pytest.approx(0.5**8, abs=0.003)
    assert table.notes == [f"Of the 10,000 resamples behind an interval, up to {dropped:,} have no value."]


def test_the_mixed_share_is_paired_and_predictions_are_pooled(tables, eight):
    assert row(tables, "easy/selection", "uniform")["ours_minus_it"] == pytest.approx([0.3, 0.0])
    mine = row(eight, "easy/prediction", "forecast")
    assert (mine["num/all"], mine["num/seen"]) == (64, 16)
    assert mine["precision/all"] == {"value": 0.75, "interval": [0.75, 0.75], "dropped": 0}
    assert mine["precision/seen"]["value"] == 0.5 and mine["recall/seen"]["value"] == 1.0
    assert mine["brier/all"]["value"] == pytest.approx(1.7 / 8)
    share = mine["mixed/all"]["value"]
    assert mine["brier_of_mean/all"] == pytest.approx(share - share**2) and mine["alarms/all"] == 32
    assert mine["calibration/all"]["value"] == pytest.approx((0.8 + 0.8) / 8)  # |0.2 - 1| and |3.8 - 3|
    assert mine["calibration/seen"]["value"] == pytest.approx(0.9 / 2)
    assert "| 0.750 [0.750, 0.750] |" in markdown("easy/prediction", eight["easy/prediction"])


def test_a_method_that_calls_nothing_mixed_recalls_nothing_and_one_that_predicts_nothing_has_no_figure():
    shy = records()
    for record in shy:
        for part in record["audit"].values():
            part |= {"alarms": 0, "hits": 0}
    found = tables_of(PLAN, shy)
    mine, uniform = (row(found, "easy/prediction", method) for method in ("forecast", "uniform"))
    assert mine["recall/all"]["value"] == 0.0 and mine["precision/all"]["value"] is None
    assert not uniform.keys() & {"recall/all", "brier/all"} and uniform["mixed/all"]["value"] == 0.5
    assert "| 0.000 |" in markdown("easy/prediction", found["easy/prediction"])


def test_a_variant_is_compared_with_its_method_on_the_seeds_that_both_have(tables):
    late = row(tables, "ablations/lag", "late")
    assert late["accuracy_difference"] == [pytest.approx(-0.05), None]
    assert late["mixed_difference"] == [pytest.approx(-0.1), None]


def test_a_variant_is_compared_with_what_it_is_beside_and_mixed_shares_with_groups_of_one_size():
    variants = {"dps_4": Variant("dps", "uniform_4"), "uniform_4": Variant("uniform", "uniform")}
    plan = Plan("made", "dynamic", "forecast", False, {"easy": METHODS}, "easy", {"rollouts": variants}, [])
    made = [made_record("easy", "uniform_4", 0, (0.2, 0.3), mixed=0.2, group_size=4)]
    made += [made_record("easy", "dps_4", 0, (0.2, 0.35), mixed=0.5, group_size=4)]
    found = tables_of(plan, records() + made)
    mine, uniform = (row(found, "ablations/rollouts", name) for name in variants)
    assert mine["accuracy_difference"][0] == pytest.approx(0.05) and mine["mixed_difference"][0] == pytest.approx(0.3)
    assert uniform["accuracy_difference"][0] == pytest.approx(0.0) and uniform["mixed_difference"] is None


# --- the verdict ------------------------------------------------------------------------------------------


def verdict_of(made, methods=(*METHODS, "dps")):
    judged = ("forecast", "dps")
    plan = Plan(
        "made", "dynamic", "forecast", False, {"easy": list(methods)}, "", {}, [], judged, frozenset({"dynamic"})
    )
    return {r["method"]: r for r in tables_of(plan, made)["verdict"].rows}


def test_the_verdict_is_computed_for_the_methods_that_are_judged():
    made = [r for r in records(8) if r["method"] != "dynamic"]
    for seed in range(8):
        shift = 0.02 * seed
        made.append(made_record("easy", "dynamic", seed, rising(shift, 0.4), rollouts=360, mixed=0.9))
        made.append(made_record("easy", "dps", seed, rising(shift, 0.45), mixed=0.6))
    found = verdict_of(made)
    assert list(found) == ["forecast", "dps"]
    ours, dps = found.values()
    assert ours["rollouts/within"] == "no" and ours["rollouts"]["value"] == pytest.approx(100 / 360)
    assert ours["whole_batches/within"] == "yes" and ours["whole_batches"]["value"] == 0.25  # 360 are 5 batches of 80
    # dynamic sampling, which chooses afterwards, does not count
    assert [name for name, *_ in ours["margins"]] == ["uniform", "dps"] and above_all(ours).startswith("yes: +0.170 ± ")
    assert dps["rollouts/within"] == "yes" and above_all(dps).startswith("no: -0.170 ± ")
    assert above_all(dps).endswith(" above `forecast`")
    papers = ("uniform", "history_resampling")
    assert above_all(dps, papers).startswith("yes, without `history_resampling`: ")
    papers = papers[:1]
    assert above_all(dps, papers) == "yes: +0.130 ± 0.041 above `uniform`"  # 0.6 against 0.4 to 0.54
    exact, above = "yes: 25% [25%, 25%]", "yes: +0.300 ± 0.000 above `uniform`"
    text = markdown("verdict", tables_of(PLAN, records(8))["verdict"])
    papers = above.replace("yes", "yes, without `history_resampling`")
    assert f"| `forecast` | easy | 8 | {exact} | {exact} | {papers} | {above} |" in text


def test_what_these_seeds_do_not_decide():
    few = verdict_of(records(5), METHODS)["forecast"]
    assert few["rollouts/within"] == "not decided by these seeds" and few["rollouts"]["interval"] is None
    made = [r for r in records(8) if r["method"] != "forecast"]
    uneven = [(0.2, 0.3, 0.4 + 0.02 * s + (0.1 if s % 2 else -0.1)) for s in range(8)]
    made += [made_record("easy", "forecast", s, uneven[s], rollouts=110, mixed=0.5) for s in range(8)]
    found = verdict_of(made, METHODS)["forecast"]
    assert found["rollouts/within"] == "not decided by these seeds"
    assert above_all(found) == "no: +0.030 ± 0.041 above `uniform`"  # 0.5 against 0.4 to 0.54


def test_what_never_gets_there_is_no_where_more_than_the_claimed_share_was_spent():
    made = [r for r in records(8) if r["method"] != "forecast"]
    low = [made_record("easy", "forecast", s, (0.2, 0.2, 0.2), rollouts=200) for s in range(8)]
    assert verdict_of(made + low, METHODS)["forecast"]["rollouts/within"] == "no"
    cheap = [made_record("easy", "forecast", s, (0.2, 0.2, 0.2), rollouts=80) for s in range(8)]
    assert verdict_of(made + cheap, METHODS)["forecast"]["rollouts/within"] == "not decided by these seeds"


# --- notes ------------------------------------------------------------------------------------------------


def test_methods_are_compared_on_the_seeds_that_all_have(tables):
    more = [*records(), made_record("easy", "forecast", 3, (0.2, 0.9, 0.9))]
    found = tables_of(PLAN, more)
    assert found["easy/accuracy"].rows == tables["easy/accuracy"].rows
    assert found["easy/accuracy"].notes == [
        "Over the 3 of 4 seeds that all methods have; `uniform`, `dynamic` have fewer."
    ]


def test_seconds_of_other_cores_are_left_out_and_told_of():
    made = records()
    for record in made:
        record["num_cores"] = 1 if record["method"] == "uniform" else 2
    found = tables_of(PLAN, made)
    uniform = row(found, "easy/cost", "uniform")
    assert uniform["seconds/all"] is None and uniform["rollouts/all"] is not None
    assert row(found, "easy/accuracy", "uniform")["seconds"] is None
    for name in ("easy/cost", "easy/accuracy"):
        assert found[name].notes == ["Seconds of `uniform` are left out: not all runs had the same number of cores."]
        assert found[name].notes[0] in markdown(name, found[name])


def test_several_versions_of_the_code_are_told_of():
    made = records()
    made[0]["commits"] = ["0ddba11", "badc0de+"]
    assert tables_of(PLAN, made)["easy/cost"].notes == [
        "These runs were made by 2 versions of the code: 0ddba11, badc0de+."
    ]


def test_how_many_intervals_chance_would_take_off_zero(eight):
    # accuracy: 2 against dynamic, 2 against it after as many rollouts, forecast against uniform, which against dynamic
    # was there before; mixed share: 2 against ours; the variant has one seed and none
    assert eight["multiplicity"].notes == [
        "These tables have 7 intervals of differences. Were there no difference anywhere, about 0 of them would "
        "exclude zero by chance; 6 do."  # all but forecast against dynamic
    ]


# --- the page ---------------------------------------------------------------------------------------------


def test_every_row_can_be_written_and_is_json(eight):
    for name, table in eight.items():
        json.dumps([table.rows, table.notes], allow_nan=False)
        lines = markdown(name, table).splitlines()
        if table.rows:
            head = lines[: 2 + len(table.rows)]
            assert len({line.count("|") for line in head}) == 1 and lines[len(head) + 1 :] == table.notes
    text = markdown("easy/cost", eight["easy/cost"])
    assert "| not within 25% |" in text and "| 25% [25%, 25%] |" in text


@pytest.mark.filterwarnings("error")
def test_a_partial_study_without_the_reference_has_tables_and_figures_too(tmp_path):
    only = [record for record in records() if record["method"] == "uniform"]
    tables = tables_of(PLAN, only)
    (uniform,) = tables["easy/cost"].rows
    assert uniform == {"method": "uniform", "seeds": 0}
    for name, table in tables.items():
        markdown(name, table)
    draw(PLAN, only, tables, tmp_path)


def test_a_judged_method_without_the_reference_has_its_mixed_share_compared():
    few = [record for record in records(8) if record["method"] != "dynamic"]
    text = markdown("verdict", tables_of(PLAN, few)["verdict"])
    above = "yes: +0.300 ± 0.000 above `uniform`"
    papers = above.replace("yes", "yes, without `history_resampling`")
    assert f"| `forecast` | easy | 8 |  |  | {papers} | {above} |" in text


def test_marks_are_filled_and_filled_again(tables):
    page = "before\n<!-- study: easy/cost -->\nold\n<!-- /study -->\nafter <!-- study: other/cost -->\nx<!-- /study -->"
    once = fill(page, tables)
    assert (
        "old" not in once
        and once.startswith("before\n")
        and once.endswith("<!-- study: other/cost -->\nx<!-- /study -->")
    )
    assert fill(once, tables) == once and "`forecast`" in once


@pytest.fixture(scope="module")
def published():
    """The plan that is published, its records and its tables."""
    plan, made = read_plan("main"), json.loads((ROOT / "docs/study/main.json").read_text())["records"]
    return plan, made, tables_of(plan, made)


def test_the_page_says_what_its_runs_say(published):
    _, _, tables = published
    page = (ROOT / "docs/results.md").read_text()
    assert fill(page, tables) == page
    marked = re.findall(r"<!-- study: ([\w/]+) -->", page)
    assert set(marked) <= tables.keys() | {f"figure/{name}" for name in FIGURES} and "countdown/cost" in marked
    readme = (ROOT / "README.md").read_text()
    assert fill(readme, tables) == readme and "<!-- study: hard/accuracy -->" in readme


@pytest.mark.skipif(matplotlib.__version__ != DRAWN_BY, reason="another matplotlib writes other bytes")
def test_the_figures_show_what_the_runs_say(published, tmp_path):
    draw(*published, tmp_path)
    for name in FIGURES:
        assert (tmp_path / f"{name}.svg").read_bytes() == (ROOT / f"docs/study/{name}.svg").read_bytes(), name


def test_the_prose_says_what_the_runs_say(published):
    """Of its numbers those that no table has."""
    plan, made, tables = published
    page = (ROOT / "docs/results.md").read_text()
    with_prompts, with_share = zip(*(correlations(tables, setting) for setting in ("countdown", "hard", "large")))
    for said, found in (("{:.2f} in `countdown`, {:.2f} in `hard` and {:.2f} in `large`", with_prompts),
                        ("with the share of mixed groups {:.2f}, {:.2f} and {:.2f};", with_share)):  # fmt: skip
        assert said.format(*found) in page
    falls = [1 - after / before for *_, before, after in (record["curve"]["accuracy"] for record in made)]
    assert f"up to {max(falls):.0%} is lost" in page
    words = "that of the mean is {:+.3f} in `countdown`, {:+.3f} in `hard`, {:+.3f} in `large` and {:+.3f} in `few`"
    assert words.format(*(over_mean(tables, setting, "dps") for setting in plan.methods_of)) in page
    words = "`forecast_diminish` are better ({:.3f}, {:.3f}, and {:.3f} in `few`"
    assert words.format(*(over_mean(tables, s, "forecast_diminish") for s in ("countdown", "hard", "few"))) in page


def over_mean(tables, setting, method):
    """Its Brier score minus that of the mean."""
    found = row(tables, f"{setting}/prediction", method)
    return found["brier/all"]["value"] - found["brier_of_mean/all"]


def correlations(tables, setting):
    """Of mean accuracies, by rank, with prompts that had mixed groups and with mixed shares, at uniform's rollouts."""
    rows = zip(tables[f"{setting}/accuracy"].rows, tables[f"{setting}/selection"].rows, strict=True)
    spent = row(tables, f"{setting}/accuracy", "uniform")["rollouts"]
    same = [
        (accuracy["accuracy"][0], selection["mixed_prompts"], selection["mixed_share"][0])
        for accuracy, selection in rows
        if accuracy["rollouts"] == spent and selection["mixed_prompts"]
    ]
    values_3M = np.array(same).T[:, :, None]
    ranks_3M = np.sign(values_3M - values_3M.transpose(0, 2, 1)).sum(axis=-1)
    return np.corrcoef(ranks_3M)[0, 1:]


def test_a_legend_is_within_its_figure():
    """Of a single setting, whose figure is a panel wide."""
    methods = read_plan("main").methods_of["countdown"]
    plan = Plan("made", "dynamic", "forecast", False, {"countdown": methods}, "", {}, [])
    with matplotlib.rc_context(plots.STYLE):
        figure = mixed(plan, [made_record("countdown", method, 0) for method in methods])
        plots.lay_out(figure)
        figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    drawn, panel = legend.get_window_extent(), axes.get_window_extent()
    assert figure.bbox.x0 <= drawn.x0 and drawn.x1 <= figure.bbox.x1 and drawn.y1 < panel.y0
    assert panel.height > 2 * figure.dpi


def test_every_table_of_the_plan_is_on_the_page():
    plan = read_plan("main")
    marked = set(re.findall(r"<!-- study: ([\w/]+) -->", (ROOT / "docs/results.md").read_text()))
    kinds = [kind for kind in COLUMNS if kind not in ("ablations", "verdict")]
    assert marked == {"verdict", "multiplicity"} | {f"figure/{name}" for name in FIGURES} | {
        f"{s}/{kind}" for s in plan.methods_of for kind in kinds
    } | {f"ablations/{w}" for w in plan.ablations}
