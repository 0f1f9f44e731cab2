"""Starting on a large data set, seconds and memory of the reader and the controller: python scripts/bench_data.py N.

Each part runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMITS = {"start_s": 60.0, "memory_gib": 2.0}


def write_prompts(path: Path, num_prompts: int) -> None:
    """Distinct problems of about 100 bytes with whole-number answers."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("problem", pyarrow.string()), ("answer", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, num_prompts, 250_000):
            numbers = range(start, min(start + 250_000, num_prompts))
            problems = [f"Problem {i}: find the sum of {i % 9973} and {i // 7} and explain in a sentence or two why it "
                        "cannot be any other number." for i in numbers]  # fmt: skip
            writer.write_table(pyarrow.table({"problem": problems, "answer": [str(i % 1000) for i in numbers]}, schema))


def peak_gib() -> float:
    """Most memory that this process had of its own or shared, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def read_start(path: str, ids_file: str) -> dict:
    """As the driver starts: rows, ids, filters; then a few hundred prompts at random."""
    from dpsrl.config import load_config
    from dpsrl.data.build import load_tokenizer, training_prompts

    started = time.perf_counter()
    config = load_config(["+recipe=quickstart", f"data.train={path}", "reward.fn=math", "eval.benchmarks=[]"])
    prompts = training_prompts(config, load_tokenizer(config.model.path))
    start_s = time.perf_counter() - started
    np.save(ids_file, prompts.ids)
    started = time.perf_counter()
    for index in np.random.default_rng(0).integers(0, len(prompts), 256).tolist():
        prompts[index]
    return {"start_s": start_s, "gib": peak_gib(), "batch_ms": 1e3 * (time.perf_counter() - started), "n": len(prompts)}


def controller_start(ids_file: str) -> dict:
    from dpsrl.controller import Controller, Outcome

    ids = np.load(ids_file, mmap_mode="r")
    started = time.perf_counter()
    controller = Controller(ids, 256, {"method": "dps"}, num_rollouts=8, seed=0)
    for _ in range(3):
        controller.admit([Outcome(index, 4, 8) for index, _ in controller.select()])
        controller.observe()
    return {"start_s": time.perf_counter() - started, "gib": peak_gib()}


def bench_data(report: dict, num_prompts: int) -> None:
    """Adds `data/<size>/...`: start-up beside 60 s, memory of both processes beside 2 GiB."""
    with tempfile.TemporaryDirectory() as folder:
        path, ids_file = f"{folder}/prompts.parquet", f"{folder}/ids.npy"
        write_prompts(Path(path), num_prompts)
        environment = os.environ | {"XDG_CACHE_HOME": folder}

        def part(*arguments: str) -> dict:
            command = [sys.executable, __file__, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            return json.loads(done.stdout.splitlines()[-1])

        first, again = (part("read", path, ids_file) for _ in range(2))
        controller = part("controller", ids_file)
    label = f"data/{num_prompts // 1_000_000}M" if num_prompts >= 1_000_000 else f"data/{num_prompts // 1000}k"
    for name, value, unit, baseline in (
        ("first_start", first["start_s"] + controller["start_s"], "s, beside 60", LIMITS["start_s"]),
        ("next_start", again["start_s"] + controller["start_s"], "s, beside 60", LIMITS["start_s"]),
        ("memory", first["gib"] + controller["gib"], "GiB, beside 2", LIMITS["memory_gib"]),
        ("memory_of_reader", first["gib"], "GiB, beside 2", LIMITS["memory_gib"]),
        ("batch", first["batch_ms"], "ms for 256 prompts, beside 100", 100.0),
    ):
        report[f"{label}/{name}"] = {
            "value": value, "unit": unit, "baseline": baseline, "ratio": value / baseline, "higher_is_better": False,
        }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "read":
        print(json.dumps(read_start(*sys.argv[2:])))
    elif sys.argv[1] == "controller":
        print(json.dumps(controller_start(*sys.argv[2:])))
    else:
        made: dict = {}
        bench_data(made, int(sys.argv[1]))
        print(json.dumps(made, indent=1))
