"""The one schema: every key with its unit, range and meaning, and how a configuration is put together.

Owns composition (train.yaml < +recipe= < command line), types, ranges, and the refusal of keys that are
unknown or would have no effect. Knows no torch, no Ray and no data: what depends on files or hardware is
checked where the files are read and in `cluster.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpsrl.own import is_own
from dpsrl.selection import Selector, build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import UserError

PACKAGE_DIR = Path(__file__).parent


def key(default: Any, text: str, *, ge=None, gt=None, le=None, lt=None, choices: tuple = (), own: bool = False) -> Any:
    """A configuration key: its default, what it means (with unit), and the values it accepts.

    own: beside `choices`, a function of the user's own, my_module:function.
    """
    metadata = {"text": text, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "own": own}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = key("run", "first part of the default run folder's name")
    dir: str = key("", "run folder; empty: runs/<run.name>-<time>, of an evaluation runs/evaluate-<time>")
    stall_s: float = key(
        1800.0, "seconds that another process may keep silent before it is taken for lost; more than a step takes", gt=0
    )
    start_s: float = key(1800.0, "seconds that a process may take to start", gt=0)
    max_restarts: int = key(
        3, "times that a run goes back to its last checkpoint by itself, a trainer or the controller being lost", ge=0
    )


@dataclass
class ModelConfig:
    path: str = key(MISSING, "folder or Hugging Face name of the model to train")
    dtype: str = key("bfloat16", "compute type on both ends", choices=("bfloat16", "float32"))
    max_prompt_tokens: int = key(1024, "longer prompts are dropped when the data is read", ge=1)
    max_response_tokens: int = key(1024, "responses are cut here", ge=1)


@dataclass
class CountdownConfig:
    num_train: int = key(2000, "training prompts", ge=1)
    num_test: int = key(512, "held-out prompts of each countdown benchmark", ge=1)
    numbers: list[int] = key([3, 4], "how many numbers a prompt has, in equal shares")
    max_number: int = key(99, "largest number given", ge=4)
    max_target: int = key(100, "largest target", ge=1)
    operators: str = key("+-*/", "drawn evenly to make a target; one written twice comes twice as often")
    format: str = key("paper", "wording of the prompt", choices=("paper", "short"))


@dataclass
class DataConfig:
    train: str = key(
        MISSING, "'countdown', a .jsonl/.json/.parquet file, a Hugging Face dataset name, or 'my_module:function'"
    )
    eval_dir: str = key("", "folder that holds <benchmark>.jsonl or .parquet")
    split: str = key("train", "split of a Hugging Face dataset")
    prompt_key: str = key("problem", "column of the problem text")
    answer_key: str = key("answer", "column of the reference answer")
    instruction: str = key("{problem}", "the user message; {problem} is replaced by the problem text")
    max_bad_share: float = key(0.3, "share of rows that may be unusable (malformed, without problem or answer, "
                               "duplicated, too large) before the data set is refused", ge=0, le=1)  # fmt: skip
    countdown: CountdownConfig = field(default_factory=CountdownConfig)


@dataclass
class RewardConfig:
    fn: str = key("math", "'math', 'countdown', or 'my_module:function' of (response, answer)")
    num_workers: int = key(1, "scoring processes", ge=1)
    deadline_s: float = key(5.0, "seconds one response may take; over it the reward is missing, not 0", gt=0)
    max_missing_share: float = key(
        0.5, "share of a batch's rewards that may be missing before the run ends", ge=0, le=1
    )
    overlong_tokens: int = key(0, "over the last so many tokens of the limit the reward falls by up to 1; 0: off", ge=0)


@dataclass
class SelectionConfig:
    """Options left at null take the method's own default; one the method does not use is refused."""

    method: str = key(
        "forecast",
        "how prompts are chosen: a preset of belief, score and pick, or 'my_module:MyMethod'; where nothing is chosen, "
        "selection=forecast_diminish, which sets selection.diminish too",
    )
    belief: str | None = key(None, "what is thought of each prompt, in place of the method's own")
    score: str | None = key(None, "what a prompt is worth, in place of the method's own")
    pick: str | None = key(None, "who is taken given the scores, in place of the method's own")
    quota: float | None = key(None, "share of a batch kept for prompts never selected, while there are any", ge=0, le=1)
    rest: int | None = key(None, "steps for which a selected prompt is not selected again", ge=0)
    admission: str = key("all", "groups trained on; mixed: those that carry a gradient", choices=("all", "mixed"))
    max_rounds: int = key(4, "admission=mixed: at most this many batches of prompts are rolled out in a step", ge=1)
    audit_share: float = key(0.02, "share of a batch drawn at random, to judge predictions by", ge=0, le=1)
    unsolved_at: float = key(0.0, "rewards up to this count as unsolved")
    solved_at: float = key(1.0, "rewards from this on count as solved; in between, in proportion")
    min_spread: float = key(0.0, "a group is mixed when its rewards differ by more than this", ge=0)
    prior_rates: str = key(
        "", "file of prompt_id, num_solved, num_rollouts, as dpsrl.evaluate writes it: known at start"
    )
    warm_start: str = key("", "checkpoint of an earlier run whose beliefs are taken over, prompt by prompt")
    decay: float | None = key(None, "share of the evidence kept each step (dps, beta, mopps)", ge=0, le=1)
    prior_alpha: Any = key(None, "dps: prior transition counts (uniform, progress, stability, a number, 3x3)")
    prior_pi: Any = key(None, "dps: prior over states before the first step (uniform, or three numbers)")
    entropy_weight: float | None = key(None, "weight of the belief's entropy in the score", ge=0)
    first_transition: bool | None = key(None, "dps: the first observation counts as a move, as published")
    evidence_weight: float | None = key(None, "dps: what one move adds to the counts, 1 as published", ge=0)
    target_rate: float | None = key(None, "score target: the pass rate to be near to", ge=0, le=1)
    diminish: float | None = key(
        None, "power of 1 + times selected that a score is divided by: what was met often teaches less", ge=0
    )
    bonus: float | None = key(None, "score optimistic: standard deviations added to the expected chance", ge=0)
    noise: float | None = key(None, "forecast: variance of a step of the walk, to begin with", gt=0, le=0.3)
    gain: float | None = key(None, "forecast: shift of a prompt's logit when trained on, to begin with")
    smoothing: float | None = key(None, "ema_variance: weight of the latest group", ge=0, le=1)
    idle_decay: bool | None = key(None, "beta, mopps: also prompts that were not observed forget")
    drift: float | None = key(None, "kalman: drift per step, in place of the fitted one")
    walk_noise: float | None = key(None, "kalman: noise per step, in place of the fitted one", ge=0)
    target_waste: float | None = key(None, "greso: share of groups without spread that is aimed at", ge=0, le=1)
    temperature: float | None = key(None, "pick gumbel: how far from the top it draws, in units of the score", gt=0)
    options: dict[str, Any] = key(
        {}, "arguments of a method of your own that are no keys here: selection.options.NAME=VALUE"
    )


OWN_OPTIONS = "selection.options"
SELECTOR_ARGUMENTS = ("num_prompts", "num_rollouts", "seed")  # of `build_selector`, beside the options
# Keys of SelectionConfig that are not `build_selector`'s.
CONTROLLER_KEYS = (
    "admission", "max_rounds", "audit_share", "unsolved_at", "solved_at", "min_spread", "prior_rates", "warm_start",
)  # fmt: skip


@dataclass
class RolloutConfig:
    num_workers: int = key(1, "vLLM engines", ge=1)
    num_rollouts: int = key(8, "rollouts per prompt", ge=2)
    temperature: float = key(1.0, "sampling temperature, applied in the trainer too", ge=0.01)
    spare_share: float = key(
        0.0,
        "share of a batch rolled out beyond it: a step ends with a batch, the rest goes on after the sync",
        ge=0,
        le=1,
    )
    max_num_seqs: int = key(256, "sequences one engine decodes at once", ge=1)
    tensor_parallel: int = key(1, "GPUs one engine spans", ge=1)
    gpu_memory_share: float = key(0.8, "share of a GPU's memory that an engine takes", gt=0, le=1)
    kv_cache_gib: int = key(1, "CPU engines: GiB of key-value cache", ge=1)
    enforce_eager: bool = key(False, "GPU engines: no CUDA graphs")


@dataclass
class AlgoConfig:
    """Defaults are DAPO's (arXiv 2503.14476); algo=grpo and the others in configs/algo give their papers'."""

    advantage: str = key("grpo", "baseline and scale of rewards", choices=("grpo", "dr_grpo", "rloo", "reinforce_pp"))
    loss: str = key(
        "ppo", "policy loss; or 'my_module:function'", choices=("ppo", "gspo", "cispo", "reinforce"), own=True
    )
    aggregation: str = key(
        "token_mean",
        "how token losses are averaged",
        choices=("token_mean", "sequence_mean", "prompt_mean", "sequence_sum"),
    )
    clip_low: float = key(0.2, "the ratio is clipped below at 1 - clip_low", gt=0, le=1)
    clip_high: float = key(0.28, "and above at 1 + clip_high", gt=0)
    dual_clip: float | None = key(10.0, "bound on the ratio where the advantage is negative; null: none", gt=1)
    correction: str = key(
        "token_truncate",
        "importance weight trainer/engine of a token or a response: cut at its maximum, or set to 0 out of bounds",
        choices=("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    max_importance_weight: float = key(2.0, "upper bound of the importance weight", ge=1)
    min_importance_weight: float = key(0.5, "correction=*_mask: lower bound of the importance weight", ge=0, le=1)
    mismatch_alarm: float = key(0.05, "nats of KL between engine and trainer from which a step warns", gt=0)
    entropy_coef: float = key(0.0, "entropy bonus", ge=0)
    kl_coef: float = key(0.0, "weight of the KL to the model as it was before the first step", ge=0)
    kl_kind: str = key("k3", "its estimate when it is in the loss", choices=("k1", "k2", "k3"))
    kl_in: str = key("loss", "where it counts; in the reward it is k1", choices=("loss", "reward"))
    mask_truncated: bool = key(False, "responses cut at the token limit are not trained on")


@dataclass
class TrainerConfig:
    num_workers: int = key(1, "DeepSpeed ranks", ge=1)
    zero_stage: int = key(1, "DeepSpeed ZeRO stage; bfloat16 runs 0 and 1 as 2", choices=(0, 1, 2, 3))
    micro_batch_tokens: int = key(16384, "tokens of one forward and backward pass", ge=1)
    lr: float = key(1e-6, "peak learning rate", gt=0)
    lr_schedule: str = key("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_updates: int = key(0, "updates over which the learning rate rises from 0", ge=0)
    weight_decay: float = key(0.1, "AdamW weight decay", ge=0)
    beta1: float = key(0.9, "AdamW beta 1", ge=0, lt=1)
    beta2: float = key(0.999, "AdamW beta 2", ge=0, lt=1)
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm", gt=0)
    max_skipped: int = key(5, "updates in a row that may be skipped, not being finite, before the run ends", ge=1)
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass")
    offload: str = key("none", "kept in the host's memory; all: parameters too", choices=("none", "optimizer", "all"))
    compile: bool = key(False, "torch.compile: minutes at the first step, faster afterwards")


@dataclass
class TrainConfig:
    steps: int = key(100, "select-to-sync cycles", ge=1)
    batch: int = key(256, "prompts per step", ge=1)
    num_updates: int = key(1, "optimizer updates per step, each on an equal share of the batch", ge=1)
    max_lag: int = key(0, "steps that generation may run ahead of training", ge=0)
    streaming: bool = key(False, "the trainer begins on groups as they are admitted; needs max_lag=0, num_updates=1")


@dataclass
class EvalConfig:
    every: int = key(0, "steps between evaluations; 0: only before and after", ge=0)
    benchmarks: list[str] = key(
        [],
        "'countdown', 'countdown3', 'countdown4', a file's stem in data.eval_dir, owner/name, 'my_module:function', "
        "or 'train'",
    )
    num_rollouts: int = key(16, "samples per prompt: the K of avg@K", ge=1)
    temperature: float = key(0.6, "sampling temperature; 0: the likeliest token, with eval.num_rollouts=1", ge=0)


@dataclass
class CheckpointConfig:
    every: int = key(0, "steps between checkpoints; 0: only the last step's", ge=0)
    keep: int = key(2, "checkpoints kept, besides the best one by the first benchmark", ge=1)


@dataclass
class WeightSyncConfig:
    backend: str = key(
        "auto",
        "auto: shared_memory on CPU, nccl for split and ipc for colocate placement",
        choices=("auto", "shared_memory", "nccl", "ipc"),
    )
    bucket_mib: int = key(512, "MiB sent at a time", ge=1)
    checksum: bool = key(False, "after each sync, hashes of every tensor on both ends are compared")
    canary_tolerance: float = key(0.05, "mean |logprob| difference of both ends on one fixed sequence, nats", gt=0)


@dataclass
class ClusterConfig:
    device: str = key("gpu", "what engines and trainers run on", choices=("gpu", "cpu"))
    placement: str = key(
        "split",
        "split: engines and trainers on GPUs of their own; colocate: shared",
        choices=("split", "colocate"),
    )
    address: str = key("", "address of a running Ray cluster; empty: start one here")
    cpus_per_worker: int = key(1, "CPU threads of each engine and trainer", ge=1)


@dataclass
class LogConfig:
    to: list[str] = key(
        [], "copies of metrics.jsonl: wandb (offline unless WANDB_MODE=online), tensorboard (in run.dir/tensorboard)",
        choices=("wandb", "tensorboard"),
    )  # fmt: skip
    wandb_project: str = key("dpsrl", "Weights & Biases project")
    responses: int = key(8, "groups of each step whose responses are kept in responses.jsonl; 0: none", ge=0)


@dataclass
class Config:
    seed: int = key(0, "every random generator starts from it", ge=0, le=2**32 - 1)
    dry_run: bool = key(False, "check everything, print the plan, start nothing")
    resume: str = key("no", "'no', 'auto' (the newest whole checkpoint in run.dir, if any), or a checkpoint folder")
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)


# Keys of earlier versions, and what is written today.
REPLACED = {"log.wandb": "log.to=[wandb]"}

# What an evaluation of a checkpoint takes over from its run.
INHERITED = (
    "data.", "model.", "reward.", "eval.", "selection.unsolved_at", "selection.solved_at", "selection.min_spread",
)  # fmt: skip

# What an evaluation reads: other keys and groups are training's, and would have no effect there.
EVALUATED = (
    "seed", "dry_run", "run.dir", "run.stall_s", "run.start_s", "model.", "data.", "reward.fn", "reward.num_workers",
    "reward.deadline_s", "selection.unsolved_at", "selection.solved_at", "selection.min_spread", "rollout.num_workers",
    "rollout.max_num_seqs", "rollout.tensor_parallel", "rollout.gpu_memory_share", "rollout.kv_cache_gib",
    "rollout.enforce_eager", "eval.benchmarks", "eval.num_rollouts", "eval.temperature", "cluster.",
)  # fmt: skip
EVALUATED_GROUPS = ("cluster", "model", "recipe")

# --- composition ------------------------------------------------------------------------------------


def config_dir() -> Path:
    """The folder of YAML files: inside an installed package, at the repository's top in a checkout."""
    installed = PACKAGE_DIR / "configs"
    return installed if installed.is_dir() else PACKAGE_DIR.parent / "configs"


def load_config(arguments: list[str], entry: str = "train") -> Config:
    """The checked configuration of `train.yaml < +recipe= < arguments`.

    Raises UserError, one sentence, on the first key that is unknown, of the wrong type, out of range,
    missing, or set without effect.
    """
    _register()
    arguments = [as_read(argument) for argument in arguments]
    set_keys = _check_overrides(arguments, entry)
    overrides = [f"++{text}" if text.startswith(OWN_OPTIONS) else text for text in arguments]  # its names are free
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            raw = compose(entry, overrides=overrides)
            _drop_options_of_another_method(raw, overrides, set_keys, entry)
        if entry == "evaluate":
            _inherit_run_config(raw, set_keys)
        OmegaConf.resolve(raw)
        missing = sorted(OmegaConf.missing_keys(raw))
        if missing:
            raise UserError(
                f"{missing[0]} is not set: choose a recipe (+recipe={'|'.join(group_choices('recipe'))}) "
                f"or give {missing[0]}=..."
            )
        config: Any = OmegaConf.to_object(raw)
    except YAMLError as error:
        raise UserError(f"a file in {config_dir()} cannot be read: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_composition_sentence(error, arguments)) from error
    check(config, set_keys, entry)
    return config


@cache
def _register() -> None:
    """Makes the schema, and `${package:NAME}`, known to hydra."""
    OmegaConf.register_new_resolver("package", lambda name: str(PACKAGE_DIR / name), replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def _drop_options_of_another_method(raw: Any, overrides: list[str], set_keys: set[str], entry: str) -> None:
    """A selection method chosen on the command line comes with its own options, not with the recipe's for another."""
    choices = [text for text in overrides if text.startswith(("selection=", "selection.method="))]
    if not choices:
        return
    preset: Any = {}
    for text in choices:
        if text.startswith("selection="):
            preset |= OmegaConf.to_container(OmegaConf.load(config_dir() / f"{text.replace('=', '/')}.yaml"))
    if "method" in preset and "selection.method" not in set_keys:
        raw.selection.method = preset["method"]  # a recipe that names its method by the key stands above the group
    of_recipe = compose(entry, overrides=[text for text in overrides if text not in choices]).selection
    if of_recipe.method == raw.selection.method:
        return
    kept = set_keys | {f"selection.{name}" for name in ("method", *CONTROLLER_KEYS)}
    given = {name.split(".")[2] for name in set_keys if name.startswith(f"{OWN_OPTIONS}.")}
    own = {"options": {name: raw.selection.options[name] for name in given}}
    for name, value in (vars(SelectionConfig()) | preset | own).items():
        if f"selection.{name}" not in kept:
            raw.selection[name] = value


def _inherit_run_config(raw: Any, set_keys: set[str]) -> None:
    """Gives a checkpoint inside a run folder that run's data, model, reward and evaluation keys, where none was set."""
    if OmegaConf.is_missing(raw.model, "path"):
        return
    parents = Path(raw.model.path).absolute().parents
    path = next((parent / "config.yaml" for parent in parents if os.path.isfile(parent / "config.yaml")
                 and os.path.isdir(parent / "checkpoints")), None)  # fmt: skip
    if path is None:
        return
    with _read_as_run_config(path):
        run = OmegaConf.to_container(_load_run_config(path))
        for name, _ in schema_keys():
            if name.startswith(INHERITED) and name not in set_keys | {"model.path"}:
                with suppress(KeyError):  # an older run has not all of them
                    OmegaConf.update(raw, name, value_of(run, name))


def group_names() -> list[str]:
    """Folders of presets; `study` has plans of many runs, which no run takes."""
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir() and path.name != "study")


def group_choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def schema_keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every dotted key of the schema with its field, in order."""
    for item in dataclasses.fields(cls):
        nested = item.default_factory if dataclasses.is_dataclass(item.default_factory) else None
        if nested:
            yield from schema_keys(nested, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def parse_override(argument: str) -> Any:
    """Hydra's `Override` of one argument; UserError where it is not of the form key=value."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        name, sign, value = argument.partition("=")
        if not sign:
            raise UserError(f"{argument!r} is not of the form key=value") from None
        raise UserError(
            f"{argument!r} cannot be read: its value has signs in it that mean something here, as = , {{ }} [ ] ( ): "
            f"put it into quotes, and these into others for the shell: \"{name}='{value}'\""
        ) from None


def as_read(argument: str) -> str:
    """The argument with its value in quotes where only so it can be read, and the key is a text: a path, say."""
    try:
        OverridesParser.create().parse_override(argument)
        return argument
    except HydraException:
        name, sign, value = argument.partition("=")
        is_text = any(known == name and item.type in ("str", str) for known, item in schema_keys())
        return f"{name}={quoted(value)}" if sign and is_text else argument


def quoted(value: str) -> str:
    """A text as hydra takes it, whatever is in it: a backslash means something to it before a quote alone."""
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), value)
    return f"'{text}'"


def _check_overrides(arguments: list[str], entry: str) -> set[str]:
    """The keys set on the command line; refuses those that the entry does not read, and names the nearest known."""
    groups = set(group_names())
    known = [name for name, _ in schema_keys()]
    set_keys = set()
    for argument in arguments:
        override = parse_override(argument)
        name = override.key_or_group
        if override.is_sweep_override():
            raise UserError(
                f"{argument}: several values make several runs, which -m starts; a single value with commas goes into "
                f"quotes, as \"{name}='a,b'\""
            )
        if name in groups:
            _check_choice(name, override.value(), argument)
        elif name in known or name.startswith(f"{OWN_OPTIONS}."):
            set_keys.add(name)
        else:
            raise UserError(_unknown_key(name, known + sorted(groups)))
        if not _is_read(name, entry):
            twin = name.replace("rollout.", "eval.")
            remedy = f"set {twin}" if twin in EVALUATED else "leave it out"
            raise UserError(f"{argument} would have no effect: dpsrl.{entry} does not read it; {remedy}")
    return set_keys


def _is_read(name: str, entry: str) -> bool:
    """Whether the entry reads a key or group at all."""
    return entry == "train" or name in EVALUATED_GROUPS or name.startswith(EVALUATED)


def _check_choice(group: str, value: Any, argument: str) -> None:
    choices = group_choices(group)
    if value not in choices:
        raise UserError(f"{group}={value} does not exist: choose one of {', '.join(choices)}")
    if group == "recipe" and not argument.startswith("+"):
        raise UserError(f"recipe={value} is written with a plus: +recipe={value}")


def _unknown_key(name: str, known: list[str]) -> str:
    if name in REPLACED:
        return f"{name} is no longer a key: write {REPLACED[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    leaves = [candidate for candidate in known if candidate.split(".")[-1] == name.split(".")[-1]]
    of_selection, _, leaf = name.rpartition(".")
    own = f"; an argument of a method of your own is {OWN_OPTIONS}.{leaf}" * (of_selection == "selection")
    return f"unknown key {name!r}: the nearest known key is {(leaves or near)[0]!r}{own}"


def _composition_sentence(error: Exception, arguments: list[str]) -> str:
    """One sentence out of hydra's and omegaconf's several lines."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    full_key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    known = [name for name, _ in schema_keys()]
    if full_key and full_key not in known and "not in" in lines[0]:
        return _unknown_key(full_key, known)
    given = next((text for text in arguments if text.lstrip("+").startswith(f"{full_key}=")), full_key)
    if "not a ListConfig" in lines[0]:
        return f"{given} is not a list: write {full_key}=[{given.partition('=')[2]}]"
    return f"{given}: {lines[0]}" if given else lines[0]


def selector_config(config: Config) -> dict[str, Any]:
    """`build_selector`'s arguments: the method, and those options that are not left to it."""
    options = vars(config.selection).items()
    given = {name: value for name, value in options if value is not None and name not in CONTROLLER_KEYS}
    return given | given.pop("options")


def selector_of(config: Config, num_prompts: int) -> Selector:
    """A selector as the keys have it; UserError where they do not go together."""
    return build_selector(
        **selector_config(config), num_prompts=num_prompts, num_rollouts=config.rollout.num_rollouts, seed=config.seed
    )


def read_run_config(path: Path) -> Config:
    """What a run wrote into its folder."""
    with _read_as_run_config(path):
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _load_run_config(path)))
    return config


def _load_run_config(path: Path) -> DictConfig:
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig) or OmegaConf.select(config, "model.path") is None:
        raise ValueError("it has no model.path")
    return config


@contextmanager
def _read_as_run_config(path: Path) -> Iterator[None]:
    """UserError that names the file, where it is not what a run wrote."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise _unreadable(path, _composition_sentence(error, [])) from error
    except TypeError as error:
        raise _unreadable(path, "a value stands where keys are due") from error
    except (OSError, YAMLError, ValueError, RecursionError) as error:  # no YAML, no text, or nested without end
        raise _unreadable(path, " ".join(str(error).split())) from error


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read ({reason}): give a run folder of this version of dpsrl")


# --- checks -----------------------------------------------------------------------------------------


def value_of(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part] if isinstance(config, dict) else vars(config)[part]
    return config


def check(config: Config, set_keys: Set[str] = frozenset(), entry: str = "train") -> None:
    """Raises UserError on a value out of range, keys that contradict each other, or a set key without effect."""
    for name, item in schema_keys():
        _check_range(name, value_of(config, name), item.metadata)
    _check_together(config)
    if entry == "evaluate" and not config.eval.benchmarks:
        raise UserError("eval.benchmarks=[] names nothing to evaluate on: give eval.benchmarks=[math500] or the like")
    for prefix, has_effect, reason in _EFFECTS + _EFFECTS_IN_EVALUATION * (entry == "evaluate"):
        for name in sorted(set_keys):
            if name.startswith(prefix) and not has_effect(config):
                raise UserError(f"{name} would have no effect: {reason}; leave it out")


def _check_range(name: str, value: Any, limits: Any) -> None:
    if value is None:
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{name}={item} is no finite number: give one")
        if limits["choices"] and item not in limits["choices"] and not (limits["own"] and is_own(item)):
            or_own = " or my_module:function" * limits["own"]
            raise UserError(f"{name}={item} is not one of {', '.join(map(str, limits['choices']))}{or_own}")
    for bound, holds, words in (
        (limits["ge"], lambda v, b: v >= b, "at least"),
        (limits["gt"], lambda v, b: v > b, "above"),
        (limits["le"], lambda v, b: v <= b, "at most"),
        (limits["lt"], lambda v, b: v < b, "below"),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{name}={value} is out of range: it must be {words} {bound}")


def _check_together(config: Config) -> None:
    if config.train.batch % config.train.num_updates:
        raise UserError(
            f"train.batch={config.train.batch} does not divide into train.num_updates={config.train.num_updates} "
            "equal shares: choose a divisor"
        )
    if "{problem}" not in config.data.instruction:
        raise UserError(
            f"data.instruction={config.data.instruction!r} lacks {{problem}}, the place of the problem text"
        )
    if not config.data.countdown.numbers or not all(2 <= count <= 6 for count in config.data.countdown.numbers):
        raise UserError(f"data.countdown.numbers={config.data.countdown.numbers} must list counts from 2 to 6")
    backend, device = config.weight_sync.backend, config.cluster.device
    if backend != "auto" and (backend == "shared_memory") != (device == "cpu"):
        raise UserError(f"weight_sync.backend={backend} does not work with cluster.device={device}: use auto")
    stage, offload = config.trainer.zero_stage, config.trainer.offload
    if (offload == "all" and stage != 3) or (offload == "optimizer" and stage == 0):
        needed = "3" if offload == "all" else "1, 2 or 3"
        raise UserError(
            f"trainer.offload={offload} needs trainer.zero_stage={needed}, and it is {stage}: set one of them"
        )
    for name in config.selection.options:
        if name in vars(config.selection):
            raise UserError(f"{OWN_OPTIONS}.{name} is a key of its own: write selection.{name}=...")
        if name in SELECTOR_ARGUMENTS:
            raise UserError(f"{OWN_OPTIONS}.{name}: every method is given {name} anyway; choose another name")
    _check_overlap(config)
    if config.reward.overlong_tokens > config.model.max_response_tokens:
        raise UserError(
            f"reward.overlong_tokens={config.reward.overlong_tokens} is more than model.max_response_tokens="
            f"{config.model.max_response_tokens}: choose at most that"
        )
    if config.eval.temperature == 0 and config.eval.num_rollouts > 1:
        raise UserError(
            f"eval.temperature=0 gives the same answer each time, and eval.num_rollouts={config.eval.num_rollouts}: "
            "use eval.num_rollouts=1, or a temperature above 0"
        )
    OutcomeRule(config.selection.unsolved_at, config.selection.solved_at, config.selection.min_spread)


def _check_overlap(config: Config) -> None:
    train, algo = config.train, config.algo
    if config.cluster.placement == "colocate":
        for name, value in (("train.max_lag", train.max_lag), ("train.streaming", train.streaming),
                            ("rollout.spare_share", config.rollout.spare_share)):  # fmt: skip
            if value:
                raise UserError(f"{name}={value} needs cluster.placement=split: with colocate the sides take turns")
    if config.cluster.placement == "colocate" and config.cluster.device == "gpu" and config.trainer.zero_stage == 3:
        raise UserError(
            "cluster.placement=colocate with trainer.zero_stage=3: DeepSpeed cannot put its state aside there; use "
            "trainer.zero_stage=2, or cluster.placement=split"
        )
    if train.streaming and (train.max_lag or train.num_updates > 1):
        raise UserError(
            f"train.streaming=true needs train.max_lag=0 and train.num_updates=1, and they are {train.max_lag} and "
            f"{train.num_updates}: leave it out"
        )
    if train.streaming and (algo.advantage == "reinforce_pp" or (algo.kl_coef and algo.kl_in == "reward")):
        raise UserError(
            "train.streaming=true needs advantages that a group has by itself: choose another algo.advantage than "
            "reinforce_pp, and algo.kl_in=loss"
        )
    if config.weight_sync.checksum and config.rollout.tensor_parallel > 1:
        raise UserError(
            f"weight_sync.checksum=true needs rollout.tensor_parallel=1, and it is {config.rollout.tensor_parallel}: "
            "the tensors of wider engines are in pieces; leave it out"
        )


def is_countdown(benchmark: str) -> bool:
    return benchmark.startswith("countdown") and not is_own(benchmark)


def _has_countdown(config: Config) -> bool:
    return config.data.train == "countdown" or any(map(is_countdown, config.eval.benchmarks))


# (key prefix, does it have an effect?, why not): a key set on the command line for nothing is refused.
_EFFECTS: list[tuple[str, Callable[[Config], bool], str]] = [
    ("data.countdown.", _has_countdown, "neither data.train nor eval.benchmarks is countdown"),
    ("data.max_bad_share", lambda c: c.data.train != "countdown" or any(
        not is_countdown(b) and b != "train" for b in c.eval.benchmarks), "all data is Countdown's own"),
    ("data.eval_dir", lambda c: any(not (b == "train" or is_countdown(b) or "/" in b or is_own(b))
                                    for b in c.eval.benchmarks),
     "no benchmark in eval.benchmarks is read from a folder"),
    ("data.split", lambda c: not (c.data.train == "countdown" or is_own(c.data.train) or Path(c.data.train).suffix),
     "data.train is not a Hugging Face dataset"),
    *((f"eval.{name}", lambda c: bool(c.eval.benchmarks), "eval.benchmarks is empty")
      for name in ("every", "num_rollouts", "temperature")),
    (OWN_OPTIONS, lambda c: is_own(c.selection.method), "selection.method is none of your own"),
    ("selection.max_rounds", lambda c: c.selection.admission == "mixed", "selection.admission is not mixed"),
    ("algo.min_importance_weight", lambda c: c.algo.correction.endswith("mask"), "algo.correction does not mask"),
    ("algo.max_importance_weight", lambda c: c.algo.correction != "none", "algo.correction is none"),
    *((f"algo.{name}", lambda c: c.algo.loss in ("ppo", "gspo", "cispo"), "this algo.loss does not clip")
      for name in ("clip_low", "clip_high")),
    ("algo.dual_clip", lambda c: c.algo.loss in ("ppo", "gspo"), "only algo.loss=ppo and gspo have it"),
    ("algo.kl_kind", lambda c: c.algo.kl_coef > 0 and c.algo.kl_in == "loss", "no KL is in the loss"),
    ("algo.kl_in", lambda c: c.algo.kl_coef > 0, "algo.kl_coef is 0"),
    ("checkpoint.keep", lambda c: c.checkpoint.every > 0, "checkpoint.every=0 writes only the last one"),
    ("rollout.kv_cache_gib", lambda c: c.cluster.device == "cpu", "cluster.device is not cpu"),
    ("rollout.tensor_parallel", lambda c: c.cluster.device == "gpu", "cluster.device is cpu"),
    ("rollout.gpu_memory_share", lambda c: c.cluster.device == "gpu", "cluster.device is cpu"),
    ("rollout.enforce_eager", lambda c: c.cluster.device == "gpu", "cluster.device is cpu"),
    ("log.wandb_project", lambda c: "wandb" in c.log.to, "log.to does not name wandb"),
]  # fmt: skip

_EFFECTS_IN_EVALUATION: list[tuple[str, Callable[[Config], bool], str]] = [
    *((name, lambda c: "train" in c.eval.benchmarks, "eval.benchmarks does not name train")
      for name in ("data.train", "data.split", "data.countdown.num_train")),
    ("data.countdown.num_test", lambda c: any(map(is_countdown, c.eval.benchmarks)), "no benchmark is countdown"),
    ("data.countdown.", lambda c: any(_is_made(b, c) for b in c.eval.benchmarks), "nothing evaluated is countdown"),
    *((name, lambda c: not all(_is_made(b, c) for b in c.eval.benchmarks), "all that is evaluated is Countdown's own")
      for name in ("data.prompt_key", "data.answer_key", "data.instruction", "data.max_bad_share")),
    ("reward.fn", lambda c: not all(map(is_countdown, c.eval.benchmarks)), "Countdown checks itself"),
]  # fmt: skip


def _is_made(benchmark: str, config: Config) -> bool:
    """Whether its prompts are Countdown's own, which no file has."""
    return is_countdown(benchmark) or (benchmark == "train" and config.data.train == "countdown")


def help_text(entry: str) -> str:
    """The usage line and every key with its default and meaning."""
    first = "+recipe=NAME" if entry == "train" else "model.path=FOLDER eval.benchmarks=[NAME,...]"
    lines = [f"usage: python -m dpsrl.{entry} {first} [group=choice ...] [key=value ...]", ""]
    if entry == "train":
        lines += ["  -m goes through values that are separated by commas, a run for each: -m seed=0,1,2", ""]
    for name in filter(lambda name: _is_read(name, entry), group_names()):
        lines.append(f"  {'+' if name == 'recipe' else ''}{name}={'|'.join(group_choices(name))}")
    lines.append("")
    for name, item in schema_keys():
        if not _is_read(name, entry):
            continue
        made: Any = item.default_factory
        default = item.default if item.default is not dataclasses.MISSING else made()
        shown = "" if default == MISSING else f" [{default}]"
        choices = f" ({', '.join(map(str, item.metadata['choices']))})" if item.metadata["choices"] else ""
        lines.append(f"  {name}{shown}: {item.metadata['text']}{choices}")
    return "\n".join(lines)
