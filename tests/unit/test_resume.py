"""Which checkpoint a run goes on from, and whether it is of the same run."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dpsrl.resume
from dpsrl.checkpoint import BrokenCheckpoint
from dpsrl.config import PACKAGE_DIR, load_config
from dpsrl.launch import open_run, preflight, run_path
from dpsrl.resume import Driver, about_run, check_same_run, choose_checkpoint, model_fingerprint, read_driver
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

pytestmark = pytest.mark.process

TINY = PACKAGE_DIR / "assets" / "tiny"


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (100, 200):
        driver = Driver(step)
        parts = {
            "driver": lambda folder, driver=driver: driver.write(folder, 1.0, {}),
            "trainer": lambda folder: np.save(folder / "weights.npy", np.zeros(9)),
        }
        run.save_checkpoint(step, parts, {}, keep=2)
    return run


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder):
    config = load_config(["+recipe=quickstart", "resume=auto", f"run.dir={folder.path}"])
    flip(folder.checkpoints / "step_200/trainer/weights.npy")
    chosen, lines = choose_checkpoint(config, folder)
    assert chosen.step == 100 and "SHA-256" in lines[0] and "going on after step 100" in lines[1]
    flip(folder.checkpoints / "step_100/manifest.json")
    with pytest.raises(UserError, match="none of the checkpoints in .*: bring one back from a copy, name another by"):
        choose_checkpoint(config, folder)
    assert choose_checkpoint(config, RunFolder(folder.path / "new"))[0] is None


def test_a_save_that_was_never_finished_is_no_checkpoint_that_was_lost(tmp_path):
    (tmp_path / "checkpoints/step_1.tmp").mkdir(parents=True)
    config = load_config(["+recipe=quickstart", "resume=auto", f"run.dir={tmp_path}"])
    chosen, lines = choose_checkpoint(config, RunFolder(tmp_path))
    assert chosen is None and lines[-1].endswith("has no whole checkpoint: starting at the first step")


def test_a_driver_of_another_version_is_a_broken_checkpoint(folder):
    checkpoint, _ = folder.newest_checkpoint()
    assert read_driver(checkpoint).step == 200
    state = checkpoint.path / "driver/state.json"
    state.write_text(json.dumps({"num_generated": 3}))
    with pytest.raises(BrokenCheckpoint, match="driver/ is whole, but of another version of dpsrl"):
        read_driver(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_another_model_has_another_fingerprint(tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    assert model_fingerprint(str(model)) == model_fingerprint(str(TINY)) != "owner/name"
    assert model_fingerprint("owner/name") == "owner/name"
    if (model / name).exists():
        flip(model / name)
    else:
        (model / name).write_text("{{ messages }}")
    assert model_fingerprint(str(model)) != model_fingerprint(str(TINY))


def test_of_a_large_file_blocks_from_all_over_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(dpsrl.resume, "BLOCK", 16)
    monkeypatch.setattr(dpsrl.resume, "NUM_BLOCKS", 8)
    file = tmp_path / "model.safetensors"
    found = set()
    for number in range(3):  # as trainings of one model differ: everywhere
        file.write_bytes(np.random.default_rng(number).bytes(5000))
        found.add(model_fingerprint(str(tmp_path)))
    assert len(found) == 3


def test_another_benchmark_is_remarked_on_and_another_model_refused(tmp_path):
    config = load_config(["+recipe=quickstart"])

    class Prompts(list):
        content_hash = "p"

    prompts = Prompts([1, 2, 3])
    benchmark = SimpleNamespace(content_hash="b")
    about = about_run(config, prompts, {"countdown": benchmark})
    checkpoint = SimpleNamespace(path="step_1", manifest=SimpleNamespace(about=about))
    assert check_same_run(checkpoint, config, about) == []
    (remark,) = check_same_run(checkpoint, config, about | {"benchmarks": {"countdown": "c", "new": "d"}})
    assert remark.startswith("warning: benchmark countdown has other content than at the checkpoint")
    with pytest.raises(UserError, match="configuration, tokenizer or weights differ"):
        check_same_run(checkpoint, config, about | {"model": "other"})


@pytest.mark.parametrize("steps, is_over", [(200, True), (300, False)])
def test_a_longer_run_is_no_longer_one_that_reached_its_end(folder, monkeypatch, steps, is_over):
    arguments = ["+recipe=quickstart", "data.countdown.num_train=64", "data.countdown.num_test=8", "resume=auto"]
    config = load_config([*arguments, f"run.dir={folder.path}", f"train.steps={steps}"])
    monkeypatch.setattr("dpsrl.launch.check_same_run", lambda *_: [])
    folder.config.touch()
    folder.summary.write_text("{}")
    with ExitStack() as stack:
        open_run(config, preflight(config), stack)
    assert folder.summary.exists() == is_over


def test_an_unnamed_run_is_taken_up_where_one_of_its_recipe_was_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(["+recipe=quickstart", "resume=auto"])
    for name in ("quickstart-20260101-000000", "quickstart-20260102-000000", "quickstart-sweep-20260103-000000"):
        Path("runs", name).mkdir(parents=True)
    for name in ("quickstart-20260101-000000", "quickstart-20260102-000000"):
        Path("runs", name, "config.yaml").touch()
    Path("runs/quickstart-20260102-000000/summary.json").touch()
    assert run_path(config) == Path("runs/quickstart-20260101-000000")


def test_a_run_that_another_took_further_meanwhile_is_not_taken_back(folder):
    keys = ["+recipe=quickstart", "data.countdown.num_train=64", "data.countdown.num_test=8"]
    config = load_config([*keys, f"run.dir={folder.path}", "resume=auto"])
    shutil.rmtree(folder.checkpoints)
    (folder.path / "config.yaml").touch()
    checked = preflight(config)
    folder.save_checkpoint(300, {"model": lambda path: (path / "weights").touch()}, {}, keep=2)
    with ExitStack() as stack, pytest.raises(UserError, match="was written to by another run just now: start again"):
        open_run(config, checked, stack)
