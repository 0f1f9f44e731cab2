"""Real DeepSpeed ranks, saved and loaded in any layout, and what they do with numbers that are not finite."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpsrl.algo.packing import Update, lay_out
from dpsrl.config import Config, load_config
from dpsrl.types import StateLost, TrainGroup, UserError
from tests.integration.ranks import FILE_BYTES


def configuration(layout: str, *arguments: str) -> Config:
    """`"2 3 bfloat16 offload"`: two ranks at ZeRO stage 3, and so on."""
    num, stage, *more = layout.split()
    return load_config(
        [
            "+recipe=quickstart", f"trainer.num_workers={num}", f"trainer.zero_stage={stage}", "train.steps=8",
            "trainer.lr=1e-3", "trainer.lr_schedule=linear", "trainer.warmup_updates=2", "trainer.weight_decay=0.1",
            f"model.dtype={'bfloat16' if 'bfloat16' in more else 'float32'}", "algo.correction=none",
            f"trainer.offload={'optimizer' if 'offload' in more else 'none'}", *arguments,
        ]
    )  # fmt: skip


def make_update(number: int, num_ranks: int) -> Update:
    """Two micro-batches for every rank, of random tokens."""
    rng = np.random.default_rng(number)
    groups = []
    for _ in range(4):
        prompt, *responses = [rng.integers(0, 256, rng.integers(5, 9)).astype(np.int32) for _ in range(3)]
        logprobs = [rng.normal(-6, 1, response.size).astype(np.float32) for response in responses]
        groups.append(TrainGroup(prompt, responses, logprobs, rng.normal(0, 1, 2)))
    (update,) = lay_out(groups, num_ranks, 1, max_tokens=60 // num_ranks)
    assert all(len(micro_batches) >= 2 for micro_batches in update.ranks)
    return update


def assert_equal(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in state if not np.array_equal(state[name], expected[name])] == []


def assert_close(state: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name in expected:
        distance = np.linalg.norm(state[name] - expected[name])
        assert distance <= tolerance * np.linalg.norm(expected[name]), name


# --- saved and loaded -------------------------------------------------------------------------------

LAYOUTS = ["1 0", "1 2 offload", "2 1 bfloat16", "2 3"]
MORE_LAYOUTS = [
    "1 1", "1 2", "1 3", "2 0", "2 1", "2 2", "1 1 offload", "2 2 offload", "1 3 offload", "2 3 offload",
    "1 0 bfloat16", "1 2 bfloat16", "1 3 bfloat16", "2 2 bfloat16", "2 3 bfloat16", "2 2 bfloat16 offload",
    "2 3 bfloat16 offload",
]  # fmt: skip
ALL_LAYOUTS = [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_were_not(ranks, tmp_path, layout):
    config = configuration(layout)
    pool = ranks(config.trainer.num_workers)
    updates = [make_update(number, pool.num) for number in range(6)]
    pool.start(config)
    for update in updates[:3]:
        pool.train([update])
    saved = pool.state()
    pool.save(str(tmp_path / "state"))
    metrics = [pool.train([update]) for update in updates[3:]]
    at_once = pool.state()

    pool.start(config)
    pool.load(str(tmp_path / "state"))
    assert_equal(pool.state(), saved)
    assert set(pool.steps()) == {3.0}
    assert [pool.train([update]) for update in updates[3:]] == metrics
    assert_equal(pool.state(), at_once)
    assert metrics[0]["num_updates_done"] == 4 and metrics[0]["lr"] > metrics[2]["lr"] > 0
    assert any((saved[name] != at_once[name]).any() for name in saved)
    if "bfloat16" in layout:
        name = "model.layers.0.mlp.up_proj.weight"
        assert (saved[f"weight {name}"] != saved[f"served {name}"]).any()  # the masters say more than the model


@pytest.mark.parametrize(
    "before, after",
    [
        ("2 3", "1 0"),
        ("1 0", "2 3"),
        pytest.param("2 2", "1 3", marks=pytest.mark.slow),
        pytest.param("2 0", "1 2 offload", marks=pytest.mark.slow),
        pytest.param("1 1", "2 1", marks=pytest.mark.slow),
        pytest.param("2 1 bfloat16", "1 3 bfloat16", marks=pytest.mark.slow),
        pytest.param("1 3 bfloat16", "2 2 bfloat16 offload", marks=pytest.mark.slow),
    ],
)
def test_another_layout_goes_on_with_the_same_numbers(ranks, tmp_path, before, after):
    old, new = configuration(before), configuration(after)
    pool = ranks(old.trainer.num_workers)
    pool.start(old)
    for number in range(3):
        pool.train([make_update(number, pool.num)])
    saved = pool.state()
    pool.save(str(tmp_path / "state"))
    metrics = pool.train([make_update(3, pool.num)])
    at_once = pool.state()

    other = ranks(new.trainer.num_workers)
    other.start(new)
    other.load(str(tmp_path / "state"))
    assert_equal(other.state(), saved)
    rounding = 1e-2 if "bfloat16" in before else 1e-6
    loaded_metrics = other.train([make_update(3, other.num)])
    assert loaded_metrics["lr"] == metrics["lr"]
    assert loaded_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=10 * rounding)
    weights = {name: value for name, value in at_once.items() if name.startswith("weight")}
    assert_close(other.state(), weights, rounding)


def test_a_state_before_the_first_update_is_one_too(ranks, tmp_path):
    pool = ranks(2)
    pool.start(configuration("2 3"))
    pool.save(str(tmp_path / "state"))
    pool.train([make_update(0, 2)])
    at_once = pool.state()
    pool.train([make_update(1, 2)])
    pool.load(str(tmp_path / "state"))
    assert set(pool.steps()) == {0.0}
    assert pool.train([make_update(0, 2)])["num_updates_done"] == 1
    assert_equal(pool.state(), at_once)


# --- the folder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    pool, folder = ranks(2), tmp_path_factory.mktemp("saved")
    pool.start(configuration("2 3"))
    pool.train([make_update(0, 2)])
    pool.save(str(folder / "state"))
    assert [path.name for path in folder.iterdir()] == ["state"]
    return folder / "state"


def test_files_are_small_and_shared_out_over_the_ranks(saved):
    files = sorted(path.name for path in saved.iterdir())
    assert sorted(json.loads((saved / "state.json").read_text())["files"]) + ["state.json"] == files
    assert "rank_1_of_2-00001.safetensors" in files
    sizes = [[path.stat().st_size for path in saved.glob(f"rank_{rank}_*")] for rank in (0, 1)]
    assert max(sum(sizes, [])) < FILE_BYTES + 10_000  # a header
    assert sum(sizes[0]) == pytest.approx(sum(sizes[1]), rel=0.05)


def spoil(folder: Path, how: str) -> None:
    path = folder / "state.json"
    state = json.loads(path.read_text())
    if how == "no state.json":
        path.unlink()
    elif how == "a file is missing":
        (folder / "rank_1_of_2-00003.safetensors").unlink()
    elif how == "a file is cut short":
        os.truncate(folder / "rank_1_of_2-00003.safetensors", 1000)
    elif how == "a file is not listed":
        state["files"].remove("rank_1_of_2-00003.safetensors")
    elif how == "another shape":
        state["parameters"]["lm_head.weight"]["shape"] = [300, 192]
    elif how == "another name":
        state["parameters"]["score.weight"] = state["parameters"].pop("lm_head.weight")
    if path.exists():
        path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    "how, message",
    [
        ("no state.json", "state.json is missing"),
        ("a file is missing", "rank_1_of_2-00003.safetensors is missing"),
        ("a file is cut short", "rank_1_of_2-00003.safetensors is damaged"),
        ("a file is not listed", "does not hold all of"),
        ("another shape", r"1 tensors; the first is lm_head.weight, \[300, 192\] there and \[261, 192\] in model.path"),
        ("another name", "2 tensors; the first is lm_head.weight, absent there"),
    ],
)
def test_what_is_not_whole_or_of_another_model_is_refused_and_changes_nothing(ranks, saved, tmp_path, how, message):
    folder, pool = tmp_path / "state", ranks(1)
    shutil.copytree(saved, folder)
    pool.start(configuration("1 1"))
    pool.train([make_update(5, 1)])
    before = pool.state()
    spoil(folder, how)
    with pytest.raises(UserError, match=message):
        pool.load(str(folder))
    assert_equal(pool.state(), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_cannot_write_holds_up_no_other(ranks, tmp_path, rank):
    pool = ranks(2)
    pool.start(configuration("2 2"))
    (tmp_path / f"rank_{rank}_of_2-00001.safetensors").mkdir()
    with pytest.raises(Exception, match="Is a directory|os error"):
        pool.save(str(tmp_path))
    assert not (tmp_path / "state.json").exists()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(Exception, match="Is a directory|os error"):
        pool.save_model(str(tmp_path))
    assert pool.train([make_update(0, 2)])["num_skipped"] == 0


# --- numbers that are not finite --------------------------------------------------------------------


def spoilt(update: Update, how: str) -> Update:
    """With something bad in the last micro-batch of the last rank."""
    micro = update.ranks[-1][-1]
    advantages, rollout = micro.advantages_S.copy(), micro.rollout_L.copy()
    if how == "NaN advantage":
        advantages[0] = np.nan
    elif how == "infinite advantage":
        advantages[0] = np.inf
    elif how == "NaN logprob":
        rollout[0] = np.nan
    elif how == "infinite gradient":
        advantages[:] = np.where(np.arange(advantages.size) % 2, 1e37, -1e37)
    bad = replace(micro, advantages_S=advantages, rollout_L=rollout)
    *others, last = update.ranks
    return Update([*others, [*last[:-1], bad]], update.total_weight, update.trained_weight)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_bad_update_is_skipped_on_all_ranks_and_leaves_no_trace(ranks, layout):
    config = configuration(layout)
    pool = ranks(config.trainer.num_workers)
    first, second = make_update(0, pool.num), make_update(1, pool.num)
    pool.start(config)
    pool.train([first])
    before = pool.state()
    good_metrics = pool.train([second])
    after = pool.state()

    pool.start(config)
    pool.train([first])
    skipped = {"num_skipped": 1.0, "num_updates_done": 1}
    bad = spoilt(make_update(2, pool.num), "infinite gradient")
    assert all(pool.all("loss_is_finite", bad))
    assert pool.all("step", bad) == [skipped] * pool.num
    assert pool.all("train", [spoilt(make_update(2, pool.num), "NaN advantage")]) == [skipped] * pool.num
    assert pool.all("train_on_a_loss_of_nan", make_update(2, pool.num)) == [skipped] * pool.num
    assert pool.all("stream", spoilt(make_update(2, pool.num), "infinite advantage")) == [skipped] * pool.num
    assert_equal(pool.state(), before)
    assert pool.stream(second) == good_metrics
    assert_equal(pool.state(), after)


def test_a_step_is_the_mean_of_the_updates_that_count(ranks):
    config = configuration("2 2", "algo.correction=token_truncate", "train.num_updates=2")
    pool, good = ranks(2), make_update(1, 2)
    pool.start(config)
    expected = pool.train([good])
    pool.start(config)
    metrics = pool.train([spoilt(make_update(2, 2), "NaN logprob"), good])
    assert metrics == expected | {"num_skipped": 1.0}
    assert expected["num_skipped"] == 0 and all(np.isfinite(value) for value in metrics.values())
    assert pool.train([good])["num_skipped"] == 0


@pytest.mark.parametrize("layout", ["1 0", "2 2 bfloat16"])
def test_weights_that_are_no_longer_finite_end_the_trainer(ranks, layout):
    # A weight of 1 is decayed to -3.3e38, and AdamW's first step is another 3.3e38 either way.
    config = configuration(
        layout, "trainer.lr=3.3e38", "trainer.weight_decay=1", "trainer.beta1=0", "trainer.warmup_updates=0"
    )
    pool = ranks(config.trainer.num_workers)
    pool.start(config)
    with pytest.raises(StateLost, match="the weights are no longer finite after update 1: "):
        pool.train([make_update(0, pool.num)])
