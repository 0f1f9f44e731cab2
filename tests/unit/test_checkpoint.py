"""A checkpoint is what was written, or it is refused with a sentence."""

import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest

from dpsrl.checkpoint import BrokenCheckpoint, check_model_folder, open_checkpoint, read_state, verify, write_state
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError


def write_model(folder):
    (folder / "weights.bin").write_bytes(random.Random(0).randbytes(5000))
    (folder / "config.json").write_text('{"layers": 2}')


def write_trainer(folder):
    for rank in range(2):
        write_state(folder / f"rank_{rank}", {"moment": np.full(100, rank, dtype=np.float32), "updates": 7})
    (folder / "empty").touch()


PARTS = {
    "model": write_model,
    "trainer": write_trainer,
    "controller": lambda folder: write_state(folder, {"counts": np.arange(9.0), "clock": 3}),
}


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 1 and 2."""
    run = RunFolder(tmp_path / "run")
    for step in (1, 2):
        run.save_checkpoint(step, PARTS, {"seed": 5}, keep=2)
    return run


def assert_refused(run, *words):
    """Step 2 is broken, in these words, and step 1 is found in its place."""
    folder = run.checkpoints / "step_2"
    with pytest.raises(BrokenCheckpoint) as caught:
        verify(folder)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {folder} is broken: ") and "\n" not in message
    assert all(word in message for word in words), message
    newest, sentences = run.newest_checkpoint()
    assert newest.step == 1 and newest.path == run.checkpoints / "step_1" and sentences == [message]
    with pytest.raises(UserError, match="choose another one: .*step_1$"):
        open_checkpoint(folder)


def test_the_manifest_says_what_sha256sum_says(run):
    folder = run.checkpoints / "step_2"
    manifest = verify(folder)
    assert (manifest.step, manifest.score, manifest.about) == (2, None, {"seed": 5})
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.remove("manifest.json")
    assert list(manifest.files) == names and len(names) == 9
    listing = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert [f"{digest}  {name}" for name, (_, digest) in manifest.files.items()] == listing.splitlines()
    assert manifest.num_bytes == sum((folder / name).stat().st_size for name in names)
    assert json.loads((folder / "manifest.json").read_text())["step"] == 2


def test_a_flipped_byte_is_found_wherever_it_lies(run):
    draw = random.Random(7)
    folder = run.checkpoints / "step_2"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) == 9
    for path in files:
        raw = path.read_bytes()
        for place in {0, len(raw) - 1, *(draw.randrange(len(raw)) for _ in range(6))}:
            damaged = bytearray(raw)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert_refused(run, path.name, "SHA-256")
        path.write_bytes(raw)
    assert verify(folder).step == 2


@pytest.mark.process
def test_every_byte_of_the_manifest_counts(run):
    path = run.checkpoints / "step_2/manifest.json"
    raw = path.read_bytes()
    for place in range(len(raw)):  # blanks and line ends too, which JSON does not mind
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(BrokenCheckpoint, match="manifest.json"):
            verify(path.parent)


@pytest.mark.parametrize("name", ["model/weights.bin", "controller/plain.json", "manifest.json"])
@pytest.mark.parametrize("end", [0, 1, -1])
def test_a_truncated_or_grown_file_is_found(run, name, end):
    path = run.checkpoints / "step_2" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:end])
    assert_refused(run, name, "bytes")
    path.write_bytes(raw + b"\n")
    assert_refused(run, name, "bytes")


def test_missing_added_renamed_and_swapped_files_are_found(run):
    folder = run.checkpoints / "step_2"
    ranks = [folder / f"trainer/rank_{rank}/moment.npy" for rank in range(2)]
    aside = run.path / "aside"

    ranks[0].rename(aside)
    assert_refused(run, "trainer/rank_0/moment.npy is missing")
    aside.rename(folder / "trainer/rank_0/moments.npy")
    assert_refused(run, "trainer/rank_0/moments.npy does not belong to it")
    (folder / "trainer/rank_0/moments.npy").rename(aside)
    ranks[1].rename(ranks[0])
    aside.rename(ranks[1])
    assert_refused(run, "moment.npy has SHA-256")
    ranks[0].rename(aside)
    ranks[1].rename(ranks[0])
    aside.rename(ranks[1])
    assert verify(folder).step == 2

    (folder / "model/more").touch()
    assert_refused(run, "model/more does not belong to it")
    (folder / "model/more").unlink()
    (folder / "trainer/empty").unlink()
    assert_refused(run, "trainer/empty is missing")
    (folder / "trainer/empty").touch()
    (folder / "manifest.json").rename(aside)
    assert_refused(run, "manifest.json is missing")


def test_links_and_pipes_are_not_followed(run):
    folder = run.checkpoints / "step_2"
    weights = folder / "model/weights.bin"
    weights.rename(run.path / "elsewhere")
    weights.symlink_to(run.path / "elsewhere")
    assert_refused(run, "not a plain file", "model/weights.bin")
    weights.unlink()
    os.mkfifo(weights)
    assert_refused(run, "not a plain file", "model/weights.bin")


def test_another_checkpoint_under_its_name_is_found(run):
    folder = run.checkpoints / "step_2"
    shutil.rmtree(folder)
    shutil.copytree(run.checkpoints / "step_1", folder)
    with pytest.raises(BrokenCheckpoint, match="saved at step 1 and has been renamed"):
        verify(folder)
    folder.rename(run.path / "kept")  # any other name is a person's own
    assert open_checkpoint(run.path / "kept").step == 1


def test_what_is_no_checkpoint_is_said(run, tmp_path):
    with pytest.raises(UserError, match="is a run folder and not a checkpoint: name one of .*/step_N"):
        open_checkpoint(run.path)
    with pytest.raises(UserError, match="nowhere is broken: there is no such folder; there is no other one beside it"):
        open_checkpoint(tmp_path / "nowhere")


def test_state_comes_back_as_it_was(tmp_path):
    state = {
        "x": np.array([1.5, np.nan]), "n": np.array([3], dtype=np.int8), "clock": np.array(4), "none": np.zeros((0, 3)),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "name": "dps", "count": 4,
    }  # fmt: skip
    write_state(tmp_path / "s", state)
    loaded = read_state(tmp_path / "s")
    assert loaded.keys() == state.keys() and loaded["name"] == "dps" and loaded["count"] == 4
    for name in ("x", "n", "clock", "none", "columns"):
        np.testing.assert_array_equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype and loaded[name].shape == state[name].shape


def test_nothing_is_pickled_or_unpickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write_state(tmp_path / "s", {"x": np.array([{}])})
    write_state(tmp_path / "s", {"y": np.zeros(3)})
    np.save(tmp_path / "s/x.npy", np.array([open]), allow_pickle=True)
    with pytest.raises(BrokenCheckpoint, match="x.npy cannot be read .*allow_pickle=False"):
        read_state(tmp_path / "s")


@pytest.mark.process
def test_damaged_state_is_a_sentence(tmp_path):
    """Without a manifest in the way: headers cut, flipped, and lengthened."""
    draw = random.Random(3)
    folder = tmp_path / "s"
    write_state(folder, {"x": np.arange(4, dtype=np.int16)})
    for name in ("x.npy", "plain.json"):
        raw = (folder / name).read_bytes()
        flips = [(place, draw.randrange(256)) for place in range(len(raw)) for _ in range(3)]
        damaged = [raw[:place] + bytes([value]) + raw[place + 1 :] for place, value in flips]
        num_refused = 0
        for content in [*damaged, *(raw[:end] for end in range(len(raw))), raw + b"1"]:
            (folder / name).write_bytes(content)
            try:
                read_state(folder)
            except BrokenCheckpoint as error:
                num_refused += name in str(error)
        assert num_refused > len(raw)  # every cut one, and many others
        (folder / name).write_bytes(raw)
    (folder / "plain.json").unlink()
    with pytest.raises(BrokenCheckpoint, match="plain.json cannot be read"):
        read_state(folder)


def test_a_model_folder_is_checked_before_anything_loads_it(tmp_path):
    check_model_folder("owner/name")
    with pytest.raises(UserError, match="does not exist"):
        check_model_folder(str(tmp_path / "none"))
    for name, missing in (
        ("config.json", "tokenizer"),
        ("tokenizer.json", "weights"),
        ("model.safetensors", None),
    ):
        (tmp_path / name).write_text("{}")
        if missing:
            with pytest.raises(UserError, match=missing):
                check_model_folder(str(tmp_path))
    check_model_folder(str(tmp_path))
