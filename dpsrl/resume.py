"""Going on where a run was: which checkpoint, whether it belongs to this run, and what the driver itself has to keep.

A checkpoint has four parts: `model` (a Hugging Face folder), `trainer` (weights and optimizer, of any number of
ranks), `controller` (everything about selection), and `driver`, which is written and read here: counts, and the groups
that are generated and not yet trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpsrl import __version__
from dpsrl.checkpoint import Checkpoint, broken, open_checkpoint, reason
from dpsrl.config import Config, schema_keys, value_of
from dpsrl.data.prompts import PromptSet
from dpsrl.group_files import read_groups, write_groups
from dpsrl.ledger import Ledger
from dpsrl.metrics import plain_record
from dpsrl.run_folder import RunFolder
from dpsrl.types import Group, UserError

# Keys that a run may be resumed with another value of; whatever else differs makes another run.
FREE = (
    "run.", "resume", "dry_run", "log.", "cluster.", "checkpoint.", "eval.", "weight_sync.", "trainer.", "train.steps",
    "data.train", "data.eval_dir", "data.max_bad_share", "model.path", "rollout.num_workers", "rollout.max_num_seqs",
    "rollout.tensor_parallel", "rollout.gpu_memory_share", "rollout.kv_cache_gib", "rollout.enforce_eager",
    "reward.num_workers", "reward.deadline_s", "reward.max_missing_share", "algo.mismatch_alarm",
    "selection.prior_rates", "selection.warm_start",
)  # fmt: skip
MODEL_FILES = ("config.json", "tokenizer*", "vocab*", "merges*", "chat_template*", "*.safetensors")
BLOCK, NUM_BLOCKS = 1 << 16, 1 << 10  # bytes, and how many are read of a large file
SAID = ("trainer.lr", "trainer.weight_decay", "trainer.beta", "trainer.warmup", "trainer.max_grad", "train.steps")


def choose_checkpoint(config: Config, folder: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None for a new run, and what is to be said about it."""
    if config.resume == "no":
        return None, []
    if config.resume != "auto":
        chosen = open_checkpoint(Path(config.resume))
        later = [c.name for c in folder.list_checkpoints() if int(c.name.removeprefix("step_")) > chosen.step]
        if later:
            raise UserError(
                f"resume={config.resume} is of step {chosen.step}, and run.dir={folder.path} has later ones "
                f"({later[-1]}): choose another run.dir for a branch, or resume=auto"
            )
        return chosen, [f"going on after step {chosen.step}, from {chosen.path}"]
    newest, passed_over = folder.newest_checkpoint()
    lines = [f"passed over: {sentence}" for sentence in passed_over]
    if newest is None:
        refuse_if_lost(folder, passed_over)
        return None, [*lines, f"{folder.path} has no whole checkpoint: starting at the first step"]
    return newest, [*lines, f"going on after step {newest.step}, from {newest.path}"]


def refuse_if_lost(folder: RunFolder, passed_over: list[str]) -> None:
    """UserError where checkpoints were saved and none is whole: starting anew would write over what is left of them."""
    if folder.has_saved():
        raise UserError(
            f"none of the checkpoints in {folder.checkpoints} can be gone on from ({'; '.join(passed_over)}): bring "
            "one back from a copy, name another by resume=FOLDER, or start anew in another run.dir"
        )


def about_run(config: Config, prompts: PromptSet, benchmarks: Mapping[str, PromptSet]) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        "dpsrl": __version__,
        "config": {name: value_of(config, name) for name, _ in schema_keys()},
        "data": prompts.content_hash,
        "num_prompts": len(prompts),
        "benchmarks": {name: benchmark.content_hash for name, benchmark in benchmarks.items()},
        "model": model_fingerprint(config.model.path),
    }


def model_fingerprint(path: str) -> str:
    """SHA-256 of the configuration, tokenizer, chat template and weights; of a hub name, the name.

    Of a large file, blocks from all over it: another training of the same model differs in nearly every one.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        step = BLOCK if size <= NUM_BLOCKS * BLOCK else size // NUM_BLOCKS
        with file.open("rb") as content:
            for place in range(0, size, step):
                content.seek(place)
                digest.update(content.read(BLOCK))
    return digest.hexdigest()


def check_same_run(checkpoint: Checkpoint, config: Config, now: dict[str, Any]) -> list[str]:
    """UserError where the checkpoint is of another run than `now`; else what has changed and is worth saying."""
    saved = checkpoint.manifest.about
    changed = {name: value for name, value in now["config"].items() if saved["config"].get(name, value) != value}
    other = {name: value for name, value in changed.items() if not name.startswith(FREE)}
    if other:
        differences = ", ".join(f"{name}={value} (then {saved['config'][name]})" for name, value in other.items())
        raise UserError(
            f"{checkpoint.path} was made with other settings: {differences}: give the same, or start a new run"
        )
    if saved["data"] != now["data"]:
        raise UserError(
            f"{checkpoint.path} was made with other data: {saved['num_prompts']:,} prompts then and "
            f"{now['num_prompts']:,} in data.train={config.data.train} now, of other content: give it the same data, "
            "or start a new run with selection.warm_start to keep what is known of the prompts"
        )
    if saved["model"] != now["model"]:
        raise UserError(
            f"{checkpoint.path} was made from another model than model.path={config.model.path}: its "
            "configuration, tokenizer or weights differ; give the model that the run began with"
        )
    then = saved.get("benchmarks", {})
    return [
        f"changed since the checkpoint: {name}={value} (then {saved['config'][name]})"
        for name, value in changed.items()
        if name.startswith(SAID)
    ] + [
        f"warning: benchmark {name} has other content than at the checkpoint: accuracies do not compare across it"
        for name, content in now["benchmarks"].items()
        if then.get(name, content) != content
    ]


# --- the driver's part --------------------------------------------------------------------------------


@dataclass
class Driver:
    """What the driver keeps from step to step."""

    step: int = -1  # the last one finished before this process began; -1: none, evaluation before the first included
    num_generated: int = 0  # batches
    num_rollouts: int = 0
    elapsed_s: float = 0.0  # until `step`
    ledger: Ledger = field(default_factory=Ledger)
    admitted: dict[int, Group] = field(default_factory=dict)  # not yet in a batch
    batches: deque[list[Group]] = field(default_factory=deque)  # generated, not yet trained on
    measured: deque[dict[str, Any]] = field(default_factory=deque)  # of each of these, for the step that trains on it
    under_way: dict[int, tuple[int, float]] = field(default_factory=dict)  # step of selection and P(mixed), by prompt
    record: dict[str, Any] = field(default_factory=dict)  # of `step`, as it was when the checkpoint was written

    @property
    def num_carried(self) -> int:
        """Rollouts that wait to be trained on."""
        return sum(len(g.rollouts) for groups in [self.admitted.values(), *self.batches] for g in groups)

    def write(self, folder: Path, elapsed_s: float, record: dict[str, Any]) -> None:
        state = {
            "record": plain_record(record),
            "num_generated": self.num_generated,
            "num_rollouts": self.num_rollouts,
            "elapsed_s": elapsed_s,
            "ledger": asdict(self.ledger),
            "under_way": list(self.under_way.items()),
            "measured": [plain_record(measured) for measured in self.measured],
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        for place, groups in enumerate([self.admitted.values(), *self.batches]):
            write_groups(folder / f"groups_{place}", list(groups))


def read_driver(checkpoint: Checkpoint | None) -> Driver:
    """As it was at the checkpoint; that of a new run without one."""
    if checkpoint is None:
        return Driver()
    folder = checkpoint.path / "driver"
    try:
        state = json.loads((folder / "state.json").read_text())
        batches = [read_groups(folder / f"groups_{place}") for place in range(1 + len(state["measured"]))]
        return Driver(
            checkpoint.step, state["num_generated"], state["num_rollouts"], state["elapsed_s"],
            Ledger(**state["ledger"]), {group.index: group for group in batches[0]}, deque(batches[1:]),
            deque({n: math.nan if v is None else v for n, v in record.items()} for record in state["measured"]),
            {index: tuple(known) for index, known in state["under_way"]}, state["record"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(checkpoint.path, f"driver/ is whole, but of another version of dpsrl ({reason(error)})") from error
