"""What commands print in a terminal of 80 columns: nothing is cut or broken, and marks of a page are left out."""

import io
import json
from pathlib import Path

from rich.console import Console

from dpsrl import printed, simulate
from dpsrl.study import scale
from dpsrl.study.entry import PRINTED, show
from dpsrl.study.plan import read_plan
from dpsrl.study.tables import COLUMNS, kind_of, lines_of, tables_of

ROOT = Path(__file__).parents[2]


def printed_by(print_to, width=80):
    to = io.StringIO()
    print_to(Console(file=to, width=width))
    lines = to.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and not any("`" in line or "…" in line for line in lines)
    return lines


def test_every_row_of_the_published_study_is_one_line():
    records = json.loads((ROOT / "docs/study/main.json").read_text())["records"]
    tables = tables_of(read_plan("main"), records)
    lines = printed_by(lambda console: show(tables, console))
    for name, table in tables.items():
        columns = PRINTED.get(kind_of(name), ()) if table.rows else ()
        if columns:
            assert set(columns) <= COLUMNS[kind_of(name)].keys()
            head, *rows = lines_of(name, table.rows)
            at = lines.index(next(line for line in lines if line.strip() == name))
            below = lines[at : lines.index("", at)][-len(rows) :]
            shown = [i for i, column in enumerate(head) if column in ("method", *columns)]
            for row, line in zip(rows, below, strict=True):
                assert line.split() == " ".join(row[i].replace("`", "") for i in shown).split()
    text = " ".join(" ".join(lines).split())
    for method, setting, seeds, *answers in lines_of("verdict", tables["verdict"].rows)[1:]:
        assert f"{method}, {setting}, {seeds} seeds".replace("`", "") in text
        assert all(answer.replace("`", "") in text for answer in answers)


def test_where_all_columns_fit_all_are_shown():
    table = [["method", "a long name of figures", "other"], ["`one`", "0.1 ± 0.2", "[1, 2]"]]
    wide, narrow = (
        printed_by(lambda console: printed.show(console, "title", table, ["method", "`other`"]), width)
        for width in (25, 24)
    )
    assert wide[-1].split() == ["one", "0.1", "±", "0.2", "[1,", "2]"]
    assert narrow[-1].split() == ["one", "[1,", "2]"]


def test_a_simulation_of_all_methods():
    lines = printed_by(lambda console: simulate.show(simulated(), "bimodal", simulate.Plan(["bimodal"]), console))
    assert lines[-1].split() == "history_resampling 0.512 +0.100 ± 0.012 1.00 0.250 14,220 25.0".split()


def simulated():
    of_all = {"world": "bimodal", "mixed_share": 0.5123, "of_clairvoyant": 0.9, "difference": 0.1, "half_width": 0.012}
    of_all |= {"coverage": 1.0, "brier_random": 0.25, "brier_selected": 0.2, "num_groups": 14220, "ms_per_step": 25.0}
    return [of_all | {"method": method} for method in ("uniform", "forecast", "history_resampling")]


def test_what_selection_saves_at_scale(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.touch()
    monkeypatch.setattr(scale, "PAGE", page)
    monkeypatch.setattr(scale, "Console", lambda: Console(width=80))
    assert scale.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines) and not any("…" in line or "**" in line for line in lines)
    found = [line.split() for line in lines if line.startswith(("1.5B ", "7B ", "32B "))]
    assert len(found) == 3 * 3 + 3 and all(row[-1].endswith(("%", "never", "GPUs")) for row in found)
