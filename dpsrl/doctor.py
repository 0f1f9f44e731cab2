"""`python -m dpsrl.doctor [+recipe=NAME key=value ...] [--json] [--deadline=SECONDS]`: what this machine has and lacks.

Prints a row for each finding with its status (ok, warning, missing), then what to do. Exit code 0 when the quickstart,
or the recipe that is named, can run here; 1 when not, naming what prevents it; 2 for arguments it cannot read.
Needs nothing installed, and shows no secrets. Packages are loaded in processes of their own, so that one that is broken
is a row and not the end.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpsrl import __version__, installed, machine
from dpsrl.findings import MISSING, OK, WARNING, Finding, Tried, attempt, end_attempts

DEADLINE_S = 180.0  # to load a package; vLLM takes two minutes on a busy laptop
AREAS = {"machine": "this machine", "gpu": "GPUs", "packages": "packages", "recipes": "recipes"}
MACHINE_CHECKS = (
    machine.system, machine.python, machine.cores, machine.memory, machine.disks, machine.shared_memory, machine.limits,
    machine.ports, machine.proxies, machine.compiler, machine.clock,
)  # fmt: skip
ASK_RECIPES = """
import sys
from dpsrl.resources import needs_here
report([needs_here(line.split("\\t")) for line in sys.argv[1:]])
"""
STYLES = {OK: "", WARNING: "yellow", MISSING: "red"}
TO_DO = "what to do (* it cannot run without)"


def examine(arguments: list[str], deadline_s: float = DEADLINE_S) -> list[Finding]:
    """All findings. arguments: the recipe whose needs decide what is fatal, as dpsrl.train takes it; none: quickstart.

    Raises SystemExit with a sentence if dpsrl.train would refuse them.
    """
    build = installed.build() or ("gpu" if machine.ask(["nvidia-smi", "-L"]) else "cpu")
    wanted = installed.pins(build)
    names = [["+recipe=" + name] for name in recipes()] if not arguments else [arguments]
    with ThreadPoolExecutor(4) as pool:
        loading = pool.submit(installed.load_all, [*wanted, installed.Pin("huggingface_hub", "")], deadline_s)
        asking = pool.submit(attempt, ASK_RECIPES, deadline_s, *["\t".join(name) for name in names])
        try:
            found = [row for check in MACHINE_CHECKS for row in safely(check)]
            tried, needs = wait_for(loading), wait_for(asking)
        except KeyboardInterrupt:
            end_attempts()
            os._exit(130)  # the pool would wait for packages that are still to be loaded
    endpoint, cache = facts(tried, "huggingface_hub") or ("", "")
    found += safely(lambda: [machine.hub(endpoint, cache), machine.wandb_login()])
    found += safely(lambda: machine.gpus(facts(tried, "torch"), installed.build()))
    found.append(Finding("packages", "dpsrl", OK, f"{__version__} in {Path(__file__).parent}"))
    found += safely(lambda: installed.findings(wanted, tried))
    reached = not any(row.name == "torch on the GPU" and row.status != OK for row in found)
    return found + recipe_findings(names, needs, arguments or ["+recipe=quickstart"], reached)


def recipes() -> list[str]:
    """Names of configs/recipe, without reading any; of an installed package, those beside its code."""
    folders = [Path(__file__).parent / "configs/recipe", Path(__file__).parent.parent / "configs/recipe"]
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def facts(tried: dict[str, Tried], name: str) -> Any:
    return tried[name].facts if name in tried else None


def safely(check: Callable[[], list[Finding]]) -> list[Finding]:
    """The rows of a check; one that fails is a row itself."""
    try:
        return check()
    except Exception as error:  # on machines unlike any that this was tried on
        name = getattr(check, "__name__", "check").strip("<>")
        words = f"could not be looked at ({type(error).__name__}: {error})"
        return [Finding("machine", name, WARNING, words, "a fault of the doctor: the other rows hold without it")]


def wait_for(future: Future) -> Any:
    """The result; on a terminal a line says that it takes a while."""
    show = sys.stderr.isatty() and not future.done()
    if show:
        print("loading each package once, which takes a minute or two ...", end="", file=sys.stderr, flush=True)
    try:
        return future.result()
    finally:
        if show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def recipe_findings(names: list[list[str]], needs: Tried, decisive: list[str], reached: bool = True) -> list[Finding]:
    """A row for each recipe: what it needs, and what of it is short here. reached: by torch, the GPUs there are."""
    if needs.fault:
        words = f"cannot be read: {needs.fault}"
        return [Finding("recipes", "recipes", MISSING, words, "install the packages that are missing first", True)]
    rows = []
    for name, need in zip(names, needs.facts):
        label = " ".join(name).replace("+recipe=", "")
        if "refused" in need:
            if name == decisive:
                raise SystemExit(need["refused"])
            rows.append(Finding("recipes", label, MISSING, need["refused"], "mend or remove that recipe"))
            continue
        short = list(need["short"])
        if need["device"] == "cpu" and installed.build() == "gpu":
            short.append(
                "engines on a CPU need vLLM's CPU build, and this is the GPU build: add cluster=gpu1, or "
                "DPSRL_EXTRA=cpu make install"
            )
        if need["device"] == "gpu" and not reached:
            short.append("torch does not reach the GPUs, see there")
        status = MISSING if short else OK
        fatal = bool(short) and name == decisive
        rows.append(Finding("recipes", label, status, need["needs"], "; ".join(short), fatal))
    return rows


def obstacles(findings: list[Finding]) -> list[Finding]:
    """What the recipe asked for cannot run with."""
    return [row for row in findings if row.fatal and row.status == MISSING]


# --- what is printed ----------------------------------------------------------------------------------


def verdict(findings: list[Finding], arguments: list[str]) -> str:
    what = " ".join(arguments).replace("+recipe=", "") or "the quickstart"
    if not (rows := obstacles(findings)):
        return f"{what} can run here"
    return f"{what} cannot run here, for want of {', '.join(row.name for row in rows)}"


def what_to_do(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """(names of findings, their fix, worst status), those first that the run cannot do without."""
    fatal = obstacles(findings)
    by_fix: dict[str, list[Finding]] = {}
    for row in findings:
        if row.fix:
            by_fix.setdefault(row.fix, []).append(row)
    items = []
    for fix, rows in by_fix.items():
        names = ", ".join(row.name + " *" * (row in fatal) for row in rows)
        items.append((names, fix, MISSING if any(row.status == MISSING for row in rows) else WARNING))
    return sorted(items, key=lambda item: " *" not in item[0])


def as_json(findings: list[Finding], arguments: list[str]) -> str:
    return json.dumps(
        {
            "ready": not obstacles(findings),
            "verdict": verdict(findings, arguments),
            "fatal": [row.name for row in obstacles(findings)],
            "findings": [asdict(row) for row in findings],
        },
        indent=1,
    )


def print_plain(findings: list[Finding], width: int) -> None:
    longest = max(len(row.name) for row in findings)
    for area, title in AREAS.items():
        print(f"\n{title}")
        for row in findings:
            if row.area == area:
                print(f"  {row.status:<8}{row.name:<{longest}}  {row.found}")
    if fixes := what_to_do(findings):
        print(f"\n{TO_DO}")
    for names, fix, _ in fixes:
        print(textwrap.fill(f"{names}: {fix}", width, initial_indent="  ", subsequent_indent="    ",
                            break_long_words=False, break_on_hyphens=False))  # fmt: skip


def print_rich(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for area, title in AREAS.items():
        table.add_row()
        table.add_row(title, style="bold")
        for row in findings:
            if row.area == area:
                table.add_row(row.name, row.status, row.found, style=STYLES[row.status])
    console.print(table)
    if fixes := what_to_do(findings):
        console.print(f"\n{TO_DO}", style="bold")
    for names, fix, status in fixes:
        console.print(Padding(Text.assemble((f"{names}: ", STYLES[status]), fix), (0, 0, 0, 2)))


def show(findings: list[Finding], arguments: list[str]) -> None:
    if sys.stdout.isatty() and any(row.name == "rich" and row.status != MISSING for row in findings):
        print_rich(findings)
    else:
        print_plain(findings, width=max(60, shutil.get_terminal_size((120, 24)).columns))
    print(f"\n{verdict(findings, arguments)}")


# --- the entry ----------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    keys = [text for text in arguments if not text.startswith("--")]
    options = dict(text[2:].partition("=")[::2] for text in arguments if text.startswith("--"))
    if unknown := set(options) - {"json", "deadline"}:
        print(f"dpsrl.doctor: unknown option --{min(unknown)}: use --json or --deadline=SECONDS", file=sys.stderr)
        return 2
    try:
        deadline_s = float(options.get("deadline") or DEADLINE_S)
    except ValueError:
        print(f"dpsrl.doctor: --deadline={options['deadline']} is no number of seconds", file=sys.stderr)
        return 2
    try:
        findings = examine(keys, deadline_s)
        print(as_json(findings, keys)) if "json" in options else show(findings, keys)
        sys.stdout.flush()
    except SystemExit as refusal:
        print(f"dpsrl.doctor: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has seen enough
        return 1
    except Exception as error:  # whatever it is, a traceback is no answer
        words = f"{type(error).__name__}: {error}"
        print(f"dpsrl.doctor: cannot go on, by a fault of its own ({words})", file=sys.stderr)
        return 1
    return 1 if obstacles(findings) else 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
