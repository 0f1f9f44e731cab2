"""What the schema accepts and the sentence it refuses the rest with."""

import shutil

import pytest

from dpsrl.config import (
    EVALUATED,
    Config,
    check,
    config_dir,
    group_choices,
    help_text,
    load_config,
    read_run_config,
    schema_keys,
    value_of,
)
from dpsrl.types import UserError

pytestmark = pytest.mark.process  # each configuration takes a quarter of a second


def refusal(*arguments: str, entry: str = "train") -> str:
    with pytest.raises(UserError) as error:
        load_config(list(arguments), entry)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("recipe", group_choices("recipe"))
def test_every_recipe_is_complete_and_within_range(recipe):
    config = load_config([f"+recipe={recipe}"])
    assert config.run.name == recipe


@pytest.mark.parametrize("group", ["selection", "algo", "cluster"])
def test_every_choice_of_a_group_composes(group):
    for choice in group_choices(group):
        load_config(["+recipe=quickstart", f"{group}={choice}"])


def test_the_command_line_beats_the_recipe_and_the_recipe_beats_the_defaults():
    defaults = Config()
    recipe = load_config(["+recipe=math"])
    assert recipe.train.steps == 360 != defaults.train.steps
    # Order on the command line does not matter, and group choices of a recipe can be replaced.
    mine = load_config(["train.steps=2", "+recipe=math", "cluster=cpu", "model=tiny", "eval.benchmarks=[aime24]"])
    assert (mine.train.steps, mine.cluster.device, mine.trainer.num_workers) == (2, "cpu", 1)
    assert (mine.model.dtype, mine.model.max_response_tokens) == ("float32", 32)
    assert mine.selection.decay == 0.7  # what was not replaced is still the recipe's


def test_another_method_does_not_inherit_the_recipes_options():
    countdown = ["+recipe=countdown", "cluster=cpu", "model=tiny"]
    assert load_config(countdown).selection.decay is not None
    assert load_config([*countdown, "selection=dps"]) == load_config(countdown)
    assert load_config([*countdown, "selection=uniform"]).selection.decay is None
    # What the person sets stays, so that it can be refused where it has no effect.
    assert load_config([*countdown, "selection=uniform", "selection.decay=0.1"]).selection.decay == 0.1


def test_a_choice_of_method_brings_its_own_options_in_place_of_the_defaults():
    default = load_config(["+recipe=quickstart"]).selection
    assert (default.method, default.diminish) == ("forecast", 0.5)
    for method in ("forecast", "dps", "uniform"):
        chosen = load_config(["+recipe=quickstart", f"selection={method}"]).selection
        assert (chosen.method, chosen.diminish) == (method, None)
    assert load_config(["+recipe=quickstart", "selection.method=kalman"]).selection.diminish is None


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.stepss=3", ["'train.stepss'", "'train.steps'"]),
        ("+trainer.lrate=3", ["'trainer.lrate'", "'trainer.lr'"]),
        ("num_rollouts=3", ["'num_rollouts'", "num_rollouts'"]),
        ("train.steps=abc", ["train.steps=abc", "Integer"]),
        ("eval.benchmarks=aime24", ["eval.benchmarks=[aime24]"]),
        ("trainer.lr=fast", ["trainer.lr=fast", "Float"]),
        ("dry_run=perhaps", ["dry_run=perhaps", "bool"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("rollout.temperature=0", ["rollout.temperature=0", "at least 0.01"]),
        ("trainer.beta2=1", ["trainer.beta2=1", "below 1"]),
        ("trainer.zero_stage=4", ["trainer.zero_stage=4", "0, 1, 2, 3"]),
        ("algo.aggregation=mean", ["algo.aggregation=mean", "token_mean"]),
        ("train.num_updates=3", ["train.batch=64", "train.num_updates=3"]),
        ("data.instruction=hello", ["data.instruction", "{problem}"]),
        ("selection=hmmm", ["selection=hmmm", "dps"]),
        ("recipe=math", ["+recipe=math"]),
        ("+recipe=maths", ["recipe=maths", "math"]),
        ("train.steps", ["'train.steps'", "key=value"]),
        ("weight_sync.backend=nccl", ["weight_sync.backend=nccl", "auto"]),
        ("train.max_lag=-1", ["train.max_lag=-1"]),
        ("log.wandb=true", ["log.wandb", "log.to=[wandb]"]),
        ("log.to=wandb", ["log.to=[wandb]"]),
        ("seed=4294967296", ["seed=4294967296", "at most 4294967295"]),
        ("trainer.lr=inf", ["trainer.lr=inf", "no finite number"]),
        ("run.stall_s=nan", ["run.stall_s=nan", "no finite number"]),
        ("seed=0,1", ["several values make several runs, which -m starts"]),
        ("selection=dps,uniform", ["several values make several runs, which -m starts"]),
        ("train.steps=a=b", ["put it into quotes", "\"train.steps='a=b'\""]),
        ("log.to=[wandb,mlflow]", ["log.to=mlflow", "wandb, tensorboard"]),
    ],
)
def test_a_bad_argument_is_refused_with_its_value_and_the_remedy(argument, words):
    message = refusal("+recipe=quickstart", argument) if "recipe" not in argument else refusal(argument)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "value",
    [
        "{problem} Answer:",
        "It's {problem}: a, b = c",
        "{problem}\\n, please",
        "a\\'b = {problem}\\\\'c', \\",
        "runs/k\u00e4se {problem}",
        "'{problem}, quoted'",
    ],
)
def test_a_text_is_taken_as_it_is(value):
    config = load_config(["+recipe=quickstart", f"data.instruction={value}"])
    assert config.data.instruction == value.strip("'")


def test_a_recipe_that_is_no_yaml_is_named(tmp_path, monkeypatch):
    shutil.copytree(config_dir(), tmp_path / "configs")
    (tmp_path / "configs/recipe/mine.yaml").write_text("train: {steps: 3")
    monkeypatch.setattr("dpsrl.config.config_dir", lambda: tmp_path / "configs")
    message = refusal("+recipe=mine")
    assert "recipe/mine.yaml" in message and "line 1" in message and "\n" not in message


@pytest.mark.parametrize(
    "argument",
    [
        "checkpoint.keep=3",
        "data.eval_dir=somewhere",
        "rollout.gpu_memory_share=0.5",
        "algo.min_importance_weight=0.1",
        "algo.kl_kind=k2",
        "log.wandb_project=mine",
        "data.split=test",
    ],
)
def test_a_key_set_without_effect_is_refused(argument):
    message = refusal("+recipe=quickstart", argument)
    assert argument.split("=")[0] in message and "no effect" in message


def test_evaluation_can_be_turned_off():
    assert load_config(["+recipe=quickstart", "eval.benchmarks=[]"]).eval.benchmarks == []
    assert "no effect" in refusal("+recipe=quickstart", "eval.benchmarks=[]", "eval.temperature=1.0")


def test_a_run_without_a_recipe_names_the_recipes():
    message = refusal("train.steps=3")
    assert "+recipe=" in message and "quickstart" in message


def test_every_key_has_a_meaning_and_its_default_lies_in_its_range():
    for name, item in schema_keys():
        assert item.metadata["text"], name
    check(Config())
    assert all(f"  {name}" in help_text("train") for name, _ in schema_keys())


def test_value_of_reads_objects_and_dictionaries():
    assert value_of(Config(), "train.batch") == value_of({"train": {"batch": 256}}, "train.batch")


def test_a_checkpoint_is_evaluated_with_its_own_runs_keys(tmp_path):
    (tmp_path / "checkpoints/step_1/model").mkdir(parents=True)
    run = load_config(["+recipe=quickstart", "eval.num_rollouts=4"])
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(run), tmp_path / "config.yaml")
    path = f"model.path={tmp_path / 'checkpoints/step_1/model'}"
    config = load_config([path, "eval.temperature=0.3"], "evaluate")
    assert config.data.countdown.format == "short" and config.model.dtype == "float32"
    assert config.eval.num_rollouts == 4 and config.eval.benchmarks == ["countdown"]
    assert config.eval.temperature == 0.3 and config.model.path.startswith(str(tmp_path))


RUN = "model: {path: here}\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no model.path"),
        (b"hello", "it has no model.path"),
        (b"[1,2]", "it has no model.path"),
        (b"a: [", "while parsing a flow node"),
        (b"[" * 5000, "recursion"),
        (b"\x89PNG\r\n", "can't decode byte 0x89"),
        (f"{RUN}data: 3".encode(), "a value stands where keys are due"),
        (f"{RUN}eval: {{num_rollouts: many}}".encode(), "eval.num_rollouts: Value 'many'"),
    ],
)
def test_what_is_no_runs_config_is_named(tmp_path, content, reason):
    (tmp_path / "checkpoints/step_1/model").mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes(content)
    message = refusal(
        f"model.path={tmp_path}/checkpoints/step_1/model", "eval.benchmarks=[countdown]", entry="evaluate"
    )
    assert message.startswith(f"{tmp_path}/config.yaml cannot be read (") and reason in message
    with pytest.raises(UserError, match=f"^{tmp_path}/config.yaml cannot be read"):
        read_run_config(tmp_path / "config.yaml")


def test_keys_that_an_older_run_lacks_keep_their_defaults(tmp_path):
    (tmp_path / "checkpoints/step_1/model").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(f"{RUN}eval: {{benchmarks: [countdown], gone: 3}}\nlog: {{wandb: true}}")
    config = load_config([f"model.path={tmp_path}/checkpoints/step_1/model"], "evaluate")
    assert config.eval.benchmarks == ["countdown"] and config.eval.num_rollouts == Config().eval.num_rollouts


def test_an_evaluation_refuses_keys_that_only_training_reads():
    evaluated = ["model=tiny", "eval.benchmarks=[countdown]"]
    for argument in ("resume=auto", "train.steps=3", "trainer.lr=1e-5", "algo=grpo", "algo.loss=ppo", "selection=dps",
                     "selection.decay=0.5", "selection.options.mine=1", "log.to=[wandb]", "weight_sync.checksum=true",
                     "checkpoint.every=1", "eval.every=3", "run.name=mine", "rollout.spare_share=0.1"):  # fmt: skip
        assert f"{argument} would have no effect" in refusal(*evaluated, argument, entry="evaluate")
    assert "set eval.num_rollouts" in refusal(*evaluated, "rollout.num_rollouts=4", entry="evaluate")
    for argument, word in (("data.train=countdown", "train"), ("data.prompt_key=question", "Countdown's own"),
                           ("reward.fn=math", "Countdown"), ("data.countdown.num_train=9", "train")):  # fmt: skip
        assert f"{argument.split('=')[0]} would have no effect" in (
            message := refusal(*evaluated, argument, entry="evaluate")
        )
        assert word in message
    of_rows = ["model=tiny", "eval.benchmarks=[math500]"]
    of_another = ["+recipe=quickstart", *of_rows, "data.countdown.numbers=[3]"]
    assert "nothing evaluated is countdown" in refusal(*of_another, entry="evaluate")
    for arguments in (
        [
            *evaluated,
            "+recipe=quickstart",
            "data.countdown.num_test=9",
            "rollout.num_workers=2",
            "dry_run=true",
            "seed=1",
        ],
        [*of_rows, "data.prompt_key=question", "reward.fn=math", "data.eval_dir=here", "cluster.placement=split"],
        ["model=tiny", "eval.benchmarks=[train]", "data.train=countdown", "reward.fn=countdown"],
    ):
        load_config(arguments, "evaluate")


def test_help_lists_the_keys_that_an_entry_reads():
    evaluated, keys = help_text("evaluate"), [name for name, _ in schema_keys()]
    listed = [name for name in keys if f"  {name}" in evaluated]
    assert {"seed", "dry_run", "run.dir", "eval.temperature", "rollout.num_workers", "cluster.address"} <= set(listed)
    assert not [name for name in listed if name.startswith(("train.", "trainer.", "algo.", "resume", "checkpoint."))]
    assert "selection=" not in evaluated and "algo=" not in evaluated and "  cluster=" in evaluated
    for name in EVALUATED:  # a key that was renamed would no longer be read
        assert any(known.startswith(name) for known in keys), name


def test_the_configs_lie_where_they_are_looked_for():
    assert (config_dir() / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.streaming=true", "train.max_lag=1"], "train.streaming=true needs train.max_lag=0"),
        (["train.streaming=true", "algo=reinforce_pp"], "advantages that a group has by itself"),
        (["cluster.placement=colocate", "train.max_lag=1"], "train.max_lag=1 needs cluster.placement=split"),
        (["cluster.placement=colocate", "rollout.spare_share=0.5"], "rollout.spare_share=0.5 needs"),
        (["trainer.offload=all", "trainer.zero_stage=2"], "trainer.offload=all needs trainer.zero_stage=3"),
        (["trainer.offload=optimizer", "trainer.zero_stage=0"], "needs trainer.zero_stage=1, 2 or 3"),
        (["reward.overlong_tokens=1000"], "more than model.max_response_tokens=32"),
        (["eval.temperature=0"], "eval.num_rollouts=8: use eval.num_rollouts=1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(["+recipe=quickstart", *arguments])


@pytest.mark.parametrize("algo", sorted(path.stem for path in (config_dir() / "algo").glob("*.yaml")))
def test_every_algorithm_is_a_valid_choice(algo):
    load_config(["+recipe=quickstart", f"algo={algo}"])
