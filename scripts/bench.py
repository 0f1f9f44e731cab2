"""`make bench`: selection, full steps beside TRL's, large data, and what a cluster asks. Writes runs/bench.json.

    python scripts/bench.py [selection] [short] [long] [data] [scale] [keep]

Selection is measured beside copying 60 bytes a prompt in the same process: what a dense float32 copy of DPS's belief
takes (9 counts, posterior, prior). A step that touched every prompt once could not be faster than reading and writing
them. Times are medians, taken in turns.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_data
import bench_scale
import bench_step
import numpy as np
from rich.console import Console

from dpsrl import printed
from dpsrl.checkpoint import read_state, write_state
from dpsrl.selection import build_selector

BASELINE = Path(__file__).parent / "bench_baseline.json"  # ratios of an earlier run
BATCH, ROLLOUTS, BYTES, ROUNDS = 256, 8, 60, 15


def median_ms(*actions: Callable[[], None]) -> list[float]:
    """The median of each, in ms, taken in turns, after one turn that is not counted."""
    times = np.zeros((ROUNDS + 1, len(actions)))
    for turn in times:
        for place, action in enumerate(actions):
            start = time.perf_counter()
            action()
            turn[place] = 1e3 * (time.perf_counter() - start)
    return np.median(times[1:], axis=0).tolist()


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


class Steps:
    """One step: observe 256 groups, move the clock on, select the next 256."""

    def __init__(self, method: str, num_prompts: int, all_seen: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.selector = build_selector(method, num_prompts=num_prompts, num_rollouts=ROLLOUTS, seed=0)
        if all_seen:
            for rows in np.array_split(np.arange(num_prompts), max(2, num_prompts // 250_000)):
                self.observe(rows)
        self.ids = self.selector.select(BATCH)

    def observe(self, rows: np.ndarray) -> None:
        self.selector.observe(rows, self.rng.integers(0, ROLLOUTS + 1, rows.size), np.full(rows.size, ROLLOUTS))

    def __call__(self) -> None:
        self.observe(self.ids)
        self.ids = self.selector.select(BATCH)


def bench_steps(report: dict, num_prompts: int, name: str, method: str, all_seen: bool) -> None:
    source, target = np.ones(BYTES * num_prompts, dtype=np.uint8), np.ones(BYTES * num_prompts, dtype=np.uint8)
    before = resident_gib()
    step = Steps(method, num_prompts, all_seen)
    for _ in range(0 if all_seen else 20):  # some history
        step()
    step_ms, copy_ms = median_ms(step, lambda: np.copyto(target, source))
    put(report, f"selection/{name}/step", step_ms, "ms", copy_ms)
    put(report, f"selection/{name}/memory", resident_gib() - before, "GiB", BYTES * num_prompts / 2**30)
    if method == "dps":
        bench_state(report, name, step)


def bench_state(report: dict, name: str, step: Steps) -> None:
    """Saving and loading the state, beside writing and reading as many bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, state = Path(folder), step.selector.state_dict()
        raw = np.ones(sum(array.nbytes for array in state.values()), dtype=np.uint8)

        def save_state() -> None:
            shutil.rmtree(path / "state", ignore_errors=True)
            write_state(path / "state", step.selector.state_dict())

        save, load, write, read = median_ms(
            save_state,
            lambda: step.selector.load_state_dict(read_state(path / "state")),
            lambda: raw.tofile(path / "raw"),
            lambda: np.fromfile(path / "raw", dtype=np.uint8),
        )
    put(report, f"selection/{name}/save", save, "ms", write)
    put(report, f"selection/{name}/load", load, "ms", read)


def put(report: dict, name: str, value: float, unit: str, baseline: float) -> None:
    report[name] = {
        "value": value, "unit": unit, "baseline": baseline, "ratio": value / baseline, "higher_is_better": False,
    }  # fmt: skip


def bench_selection(report: dict) -> None:
    for size in (7_500, 1_000_000, 10_000_000):
        label = f"{size // 1_000_000}M" if size >= 1_000_000 else f"{size // 1000}k"
        bench_steps(report, size, f"dps_{label}", "dps", all_seen=False)
        bench_steps(report, size, f"dps_{label}_all_seen", "dps", all_seen=True)
        bench_steps(report, size, f"forecast_{label}", "forecast", all_seen=False)


PARTS = {
    "selection": bench_selection,
    "short": lambda report: bench_step.race_to_report(report, "short"),
    "long": lambda report: bench_step.race_to_report(report, "long"),
    "data": lambda report: bench_data.bench_data(report, 10_000_000),
    "scale": bench_scale.bench_scale,
}


def main(arguments: list[str]) -> int:
    """Runs the parts named, or all; `keep` makes their ratios those that later runs are held against."""
    parts = [name for name in arguments if name != "keep"] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        print(
            f"bench: there is no part {', '.join(sorted(unknown))}; use any of: {', '.join(PARTS)}, keep",
            file=sys.stderr,
        )
        return 2
    Path("runs").mkdir(exist_ok=True)
    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    report: dict = {}
    for name in parts:
        PARTS[name](report)
        Path("runs/bench.json").write_text(json.dumps(report, indent=1))
    lines = [["what", "value", "baseline", "ratio", "ratio kept"]]
    for name, row in report.items():
        before = f"{kept[name]:.3g}" if name in kept else ""
        lines.append(
            [name, f"{row['value']:.3g} {row['unit']}", f"{row['baseline']:.3g}", f"{row['ratio']:.3g}", before]
        )
    printed.show(Console(), "a ratio is value / baseline", lines, ("what", "value", "ratio", "ratio kept"))
    print("written to runs/bench.json")
    if "keep" in arguments:
        BASELINE.write_text(json.dumps(kept | {name: round(row["ratio"], 4) for name, row in report.items()}, indent=1))
        bench_scale.keep(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
