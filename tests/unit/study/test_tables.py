"""Rows by hand, the Markdown, and the published tables recomputed from the published runs."""

import json
import re
from pathlib import Path

import pytest

from dpsrl.study.plan import Plan, read_plan
from dpsrl.study.tables import COLUMNS, FIGURES, fill, markdown, rows_of
from tests.made_record import made_record

ROOT = Path(__file__).parents[3]
METHODS = ["uniform", "dynamic", "forecast"]
PLAN = Plan("made", "dynamic", "forecast", False, {"easy": METHODS}, "easy", {"lag": {"late": "forecast"}}, [])


def records():
    """Dynamic sampling spends 400 rollouts a step and ends at 0.4; forecast is as good a step for a quarter of them."""
    made = []
    for seed, shift in enumerate((0.0, 0.02, 0.04)):
        made += [
            made_record("easy", "uniform", seed, (0.2 + shift, 0.25 + shift, 0.3 + shift), mixed=0.4 + shift),
            made_record("easy", "dynamic", seed, (0.2 + shift, 0.3 + shift, 0.4 + shift), rollouts=400),
            made_record("easy", "forecast", seed, (0.2 + shift, 0.3 + shift, 0.4 + shift), mixed=0.7 + shift),
        ]
    return [*made, made_record("easy", "late", 0, (0.2, 0.3, 0.35), mixed=0.6)]


@pytest.fixture(scope="module")
def tables():
    return rows_of(PLAN, records())


def row(tables, name, method):
    return next(row for row in tables[name] if row["method"] == method)


def test_accuracies_and_their_paired_differences(tables):
    mine = row(tables, "easy/accuracy", "forecast")
    half = 4.303 * 0.02 / 3**0.5  # t for two degrees of freedom
    assert mine["accuracy"] == pytest.approx([0.42, half], abs=1e-4)
    assert mine["minus_uniform"] == pytest.approx([0.1, 0.0])  # the same for each seed, whatever the seeds' own spread
    assert mine["minus_reference"] == pytest.approx([0.0, 0.0])
    assert (mine["seeds"], mine["before"], mine["rollouts"], mine["seconds"]) == (3, pytest.approx(0.22), 200, 1.0)


def test_costs_and_what_is_never_reached(tables):
    mine, uniform = (row(tables, "easy/cost", method) for method in ("forecast", "uniform"))
    assert mine["rollouts/all"] == pytest.approx([0.25, 0.25, 0.25]) and mine["seconds/all"] == pytest.approx([1, 1, 1])
    assert mine["reached"] == 3
    assert uniform["rollouts/all"] == [None, None, None] and uniform["rollouts/spent"] == 0.25
    assert uniform["reached"] == 0


def test_selection_pools_the_audit_and_pairs_the_mixed_share(tables):
    uniform = row(tables, "easy/selection", "uniform")
    assert uniform["ours_minus_it"] == pytest.approx([0.3, 0.0])
    assert (uniform["audited"], uniform["precision"], uniform["recall"]) == (24, 0.75, 0.75)
    assert uniform["brier_audit"] == pytest.approx(1.7 / 8)
    assert uniform["calibration_audit"] == pytest.approx((0.8 + 0.8) / 8)  # |0.2 - 1| and |3.8 - 3|


def test_a_variant_is_compared_with_its_method_on_the_seeds_that_both_have(tables):
    late = row(tables, "ablations/lag", "late")
    assert late["accuracy_difference"] == [pytest.approx(-0.05), None]
    assert late["mixed_difference"] == [pytest.approx(-0.1), None]


def test_every_row_can_be_written_and_is_json(tables):
    json.dumps(tables, allow_nan=False)
    for name, rows in tables.items():
        lines = markdown(name, rows).splitlines()
        assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert "| not within 25% |" in markdown("easy/cost", tables["easy/cost"])
    assert "| 25% [25%, 25%] |" in markdown("easy/cost", tables["easy/cost"])


def test_a_partial_study_without_the_reference_has_tables_too():
    only = [record for record in records() if record["method"] == "uniform"]
    tables = rows_of(PLAN, only)
    assert [r["method"] for r in tables["easy/cost"]] == ["uniform"] and tables["easy/cost"][0]["seeds"] == 0
    markdown("easy/cost", tables["easy/cost"])


def test_marks_are_filled_and_filled_again(tables):
    page = "before\n<!-- study: easy/cost -->\nold\n<!-- /study -->\nafter <!-- study: other/cost -->\nx<!-- /study -->"
    once = fill(page, tables)
    assert (
        "old" not in once
        and once.startswith("before\n")
        and once.endswith("<!-- study: other/cost -->\nx<!-- /study -->")
    )
    assert fill(once, tables) == once and "`forecast`" in once


DATA = ROOT / "docs/study/main.json"


@pytest.mark.skipif(not DATA.exists(), reason="the study has not been published yet")
def test_the_page_says_what_its_runs_say():
    plan = read_plan("main")
    tables = rows_of(plan, json.loads(DATA.read_text())["records"])
    page = (ROOT / "docs/results.md").read_text()
    assert fill(page, tables) == page
    marked = re.findall(r"<!-- study: ([\w/]+) -->", page)
    assert set(marked) <= tables.keys() | {f"figure/{name}" for name in FIGURES} and "countdown/cost" in marked


def test_every_table_of_the_plan_is_on_the_page():
    plan = read_plan("main")
    marked = set(re.findall(r"<!-- study: ([\w/]+) -->", (ROOT / "docs/results.md").read_text()))
    kinds = [kind for kind in COLUMNS if kind != "ablations"]
    assert marked == {f"figure/{name}" for name in FIGURES} | {
        f"{s}/{kind}" for s in plan.methods_of for kind in kinds
    } | {f"ablations/{w}" for w in plan.ablations}
