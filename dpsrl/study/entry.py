"""`python -m dpsrl.study [study=main] [key=value ...]`: the command, and the files that a study ends with.

The summary, the tables and the figures are drawn anew each time from whatever runs are finished, so that a study can be
stopped, looked at and taken up again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from dpsrl import printed
from dpsrl.exits import code_of
from dpsrl.files import check_writable, write_text, written_to
from dpsrl.metrics import Record, write_summary
from dpsrl.run_folder import RunFolder
from dpsrl.selection.options import nearest
from dpsrl.study.figures import draw
from dpsrl.study.origin import check_origin
from dpsrl.study.plan import Plan, read_plan
from dpsrl.study.record import is_whole
from dpsrl.study.runs import make_runs, read_record, record_file
from dpsrl.study.stored import Damaged, of_git, read_object
from dpsrl.study.tables import Table, fill, kind_of, lines_of, markdown, tables_of
from dpsrl.sweep import PLAIN, log_of
from dpsrl.types import UserError

DOCS = Path("docs")
PAGES = (DOCS / "results.md", Path("README.md"))  # with tables of a study that is published
KEYS = {"study", "settings", "methods", "seeds", "lanes", "runs", "published", "out"}
PRINTED = {  # columns that stay where not all fit, by kind of table; of other kinds none is shown
    "accuracy": ("seeds", "at the end", "minus uniform's", "rollouts"),
    "selection": ("mixed share", "ours minus it", "prompts with mixed groups"),
    "ablations": ("compared with", "minus the other's accuracy", "minus the other's mixed share"),
}
USAGE = """usage: python -m dpsrl.study [key=value ...]

  study=main       a plan in configs/study
  settings=a,b     these settings of it alone
  methods=a,b      these methods alone
  seeds=8          at most so many seeds
  lanes=1          runs at a time, each on cores of its own
  runs=yes         no: only tables and figures of what is finished
  published=no     yes: runs whose records are in docs/study are not made again
  out=             folder of the runs; default runs/study/<study>

Finished runs are not repeated; others go on from their last checkpoint. Ctrl-C saves the run under way and ends.
Tables and figures take runs that are not finished here from docs/study, as far as it has them."""


@dataclass
class Asked:
    """What the command line says."""

    study: str = "main"
    only: dict[str, list[str]] = field(default_factory=dict)
    seeds: int | None = None
    lanes: int = 1
    makes_runs: bool = True
    takes_published: bool = False
    out: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/study/{self.study}")


def parse(arguments: list[str]) -> Asked:
    asked = Asked()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not value:
            raise UserError(f"{argument!r} is not of the form key=value")
        if name in ("study", "out"):
            setattr(asked, name, value)
        elif name in ("settings", "methods"):
            asked.only[name] = value.split(",")
        elif name in ("seeds", "lanes"):
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"{argument}: {name} must be a whole number from 1 on")
            setattr(asked, name, int(value))
        elif name in ("runs", "published"):
            if value not in ("yes", "no"):
                raise UserError(f"{argument}: {name} must be yes or no")
            setattr(asked, {"runs": "makes_runs", "published": "takes_published"}[name], value == "yes")
        else:
            raise UserError(f"unknown key {name!r}; {nearest(name, KEYS)}")
    return asked


def study(asked: Asked, console: Console) -> int:
    """0 if all runs that were asked for are finished, else 1."""
    plan = read_plan(asked.study, asked.only, asked.seeds)
    unfinished: dict[str, str] = {}
    whole = read_plan(asked.study)
    for job in whole.jobs:  # before hours are spent on runs that could not be put beside the others
        check_origin(asked.folder / job.name, job)
    published = published_records(whole)
    check_writable(asked.folder, "out")
    if asked.makes_runs:
        with RunFolder(asked.folder).lock():
            done = published if asked.takes_published else {}
            unfinished = make_runs(plan, asked.folder, console, done, asked.lanes)
    own = {job.name: record for job in whole.jobs if (record := read_record(asked.folder, job))}
    both = published | own
    records = [both[job.name] for job in whole.jobs if job.name in both]
    if not (records or asked.makes_runs):
        raise UserError(f"{asked.folder} has no finished run, and docs/study/{plan.name}.json is not there: make some")
    for path in (record_file(asked.folder, job) for job in whole.jobs if job.name not in own):
        if path.exists():
            console.print(f"{path} is cut short or broken: left out until the run is made again", **PLAIN)
    if records:
        tables = tables_of(whole, records)
        with written_to(asked.folder, "out"):
            publish(whole, asked.folder, records, tables, unfinished)
        show(tables, console)
        console.print(f"\nall columns are in {asked.folder}/tables.md, the figures beside it", **PLAIN)
    for name, why in unfinished.items():
        if why.startswith("failed"):
            console.print(f"{name}: {why}; its output is {log_of(asked.folder / name)}", **PLAIN)
    source = f", {len(records) - len(own)} of them as published" if len(records) > len(own) else ""
    where = f"{asked.folder}/summary.json{source}" if records else f"{asked.folder}; the same command goes on"
    console.print(f"{len(records)} of {len(whole.jobs)} runs in {where}", **PLAIN)
    return 1 if unfinished else 0


def published_records(plan: Plan) -> dict[str, Record]:
    """By job name, those in docs/study that were made with the arguments that the plan has now."""
    path = DOCS / f"study/{plan.name}.json"
    if not path.is_file():
        return {}
    records = read_object(path, of_git(path)).get("records")
    if not isinstance(records, list) or not all(map(is_whole, records)):
        raise Damaged(f"{path} lacks records or parts of them: {of_git(path)}")
    found = {f"{r['setting']}/{r['method']}/seed_{r['seed']}": r for r in records}
    return {job.name: found[job.name] for job in plan.jobs if found.get(job.name, {}).get("arguments") == job.arguments}


def publish(
    plan: Plan, folder: Path, records: list[Record], tables: dict[str, Table], unfinished: dict[str, str]
) -> None:
    """summary.json and figures beside the runs, and, for a study that is published, in docs/ with the tables."""
    about = {name: asdict(table) for name, table in tables.items()}
    content = {"study": plan.name, "unfinished": unfinished, "tables": about, "records": records}
    for path in [folder / "summary.json", *[Path("runs/study/summary.json")] * plan.publish]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_summary(path, content)
    text = "\n\n".join(f"## {name}\n\n{markdown(name, table)}" for name, table in tables.items() if table)
    write_text(folder / "tables.md", text + "\n")
    draw(plan, records, tables, folder)
    if plan.publish:
        data = DOCS / f"study/{plan.name}.json"
        data.parent.mkdir(parents=True, exist_ok=True)
        write_text(data, compact(plan, records))
        draw(plan, records, tables, data.parent)
        for page in PAGES:
            if page.is_file():
                write_text(page, fill(page.read_text(), tables))


def compact(plan: Plan, records: list[Record]) -> str:
    """A run a line, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    return f'{{"study": "{plan.name}", "records": [\n{lines}\n]}}\n'


def show(tables: dict[str, Table], console: Console) -> None:
    """What came out, the verdict last, where it is read first."""
    for name, table in tables.items():
        if table.rows and (columns := PRINTED.get(kind_of(name))):
            printed.show(console, name, lines_of(name, table.rows), {"method", *columns})
    (_, _, _, *questions), *rows = lines_of("verdict", tables["verdict"].rows)
    for method, setting, seeds, *answers in rows:
        said = [f"{question}: {answer}" for question, answer in zip(questions, answers, strict=True) if answer]
        if said:  # seeds in common with others
            printed.tell(console, said, f"{method}, {setting}, {seeds} seeds")
    printed.tell(console, tables["multiplicity"].notes)


def main(arguments: list[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    return code_of("dpsrl.study", lambda: study(parse(arguments), Console()))
