"""`python -m dpsrl.export RUN [--out FILE.parquet] [--posterior]`: what a run thought of its prompts, as data.

One row per scored group of `groups.jsonl`, which is read line by line; with --posterior one row per prompt, out of
the last checkpoint. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from dpsrl.checkpoint import read_state
from dpsrl.config import read_run_config, selector_of
from dpsrl.controller import part_of
from dpsrl.data.files import first_line
from dpsrl.data.prompts import id_text
from dpsrl.files import written_beside
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

BATCH_ROWS = 1 << 16
STATES = ("unsolved", "partial", "solved")
GROUPS = pyarrow.schema(
    {
        "step": pyarrow.int32(),
        "prompt_id": pyarrow.string(),
        "predicted": pyarrow.float64(),  # P(mixed) when it was selected; null where nothing was predicted
        "num_solved": pyarrow.int32(),
        "num_rollouts": pyarrow.int32(),  # those that have a reward
        "admitted": pyarrow.bool_(),
        "audited": pyarrow.bool_(),  # drawn at random, not chosen; null in runs that did not write it down
        "policy_version": pyarrow.int32(),
        "state": pyarrow.string(),  # what the group showed; null without a reward
    }
)
POSTERIOR = pyarrow.schema(
    {"prompt_id": pyarrow.string(), "num_selected": pyarrow.int32()} | {state: pyarrow.float64() for state in STATES}
)


def export_groups(path: Path, out: Path) -> tuple[int, int]:
    """(rows written, lines left out because they could not be read, as the last of a run that was killed)."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run of dpsrl.train that has scored a group")
    num_bad = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal num_bad
        with path.open("rb") as lines:
            for line in lines:
                row = group_of(line)
                if row is None:
                    num_bad += 1
                else:
                    yield row

    source = rows()
    parts = iter(lambda: list(islice(source, BATCH_ROWS)), [])
    return write_parquet(out, GROUPS, (pyarrow.Table.from_pylist(part, GROUPS) for part in parts)), num_bad


def group_of(line: bytes) -> dict[str, Any] | None:
    """The row of one line; None where it is none."""
    try:
        record = {"audited": None} | json.loads(line)
        row = {name: record[name] for name in GROUPS.names[:-1]}
        row["prompt_id"].encode()  # half a surrogate pair is no text
        float(row["predicted"] or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    num_solved, num_rollouts = row["num_solved"], row["num_rollouts"]
    counts = (row["step"], row["policy_version"], num_solved, num_rollouts)
    if type(row["admitted"]) is not bool or type(row["audited"]) not in (bool, type(None)):
        return None
    if type(row["predicted"]) not in (int, float, type(None)):
        return None
    if not all(type(count) is int and 0 <= count < 1 << 31 for count in counts):
        return None
    place = int(num_solved > 0) + int(num_solved == num_rollouts)
    return row | {"state": STATES[place] if num_rollouts else None}


def export_posterior(run: Path, out: Path) -> tuple[int, Path]:
    """(rows written, the checkpoint they are from): what is thought of each prompt's next group."""
    checkpoints = RunFolder(run).list_checkpoints()
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint, which --posterior reads: leave it out, or set checkpoint.every")
    config, state = read_run_config(run / "config.yaml"), read_state(checkpoints[-1] / "controller")
    ids_N = state["prompt_ids"]
    selector = selector_of(config, len(ids_N))
    if not selector.predicts:
        raise UserError(f"selection.method={config.selection.method} predicts nothing: leave out --posterior")
    selector.load_state_dict(part_of(state, "selector."))

    def tables() -> Iterator[pyarrow.Table]:
        states_NS, num_selected_N = selector.predict(), selector.num_selected_N
        for start in range(0, len(ids_N), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            ids = [id_text(number) for number in ids_N[part]]
            yield pyarrow.table([ids, num_selected_N[part].astype(np.int32), *states_NS[part].T], schema=POSTERIOR)

    return write_parquet(out, POSTERIOR, tables()), checkpoints[-1]


def write_parquet(out: Path, schema: pyarrow.Schema, tables: Iterator[pyarrow.Table]) -> int:
    """The number of rows."""
    num_rows = 0
    try:
        with (
            written_beside(out) as partial,
            pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)
                num_rows += len(table)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{out} cannot be written ({first_line(error)}): give another --out") from error
    return num_rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpsrl.export", description="A run's groups and beliefs as Parquet.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: groups.parquet in the run folder")
    parser.add_argument("--posterior", action="store_true", help="also the last checkpoint's beliefs, beside it")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "groups.parquet"
    beside = out.with_name("posterior.parquet")
    try:
        if options.posterior and out == beside:
            raise UserError(f"{out} is where --posterior writes the beliefs: give another --out")
        num_rows, num_bad = export_groups(RunFolder(options.run).groups, out)
        left_out = f"; lines that could not be read and are left out: {num_bad:,}" if num_bad else ""
        print(f"{out}: {num_rows:,} groups{left_out}")
        if options.posterior:
            num_rows, checkpoint = export_posterior(options.run, beside)
            print(f"{beside}: {num_rows:,} prompts, after {checkpoint.name}")
    except UserError as error:
        print(f"dpsrl.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
