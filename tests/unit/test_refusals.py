"""Bad input ends in one sentence and exit code 2, before a folder is made or an actor is started."""

import json
import os
import shutil

import pytest

from dpsrl import evaluate, train
from dpsrl.config import PACKAGE_DIR

pytestmark = pytest.mark.process

TINY = PACKAGE_DIR / "assets/tiny"


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """Runs the entry with bad arguments; the sentence it ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments, entry=train):
        assert entry.main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured
        assert not (tmp_path / "runs").exists()
        return captured.err

    return run


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"What is {i}+{i}?", "answer": str(2 * i)}) for i in range(9)))
    return path


MATH = ["+recipe=math", "cluster=cpu", "model=tiny", "eval.benchmarks=[]"]


def test_keys(refuse):
    assert "'train.step'" in refuse("+recipe=quickstart", "train.step=3")
    assert "train.steps=many" in refuse("+recipe=quickstart", "train.steps=many")
    assert "selection.decay=1.5" in refuse("+recipe=quickstart", "selection=dps", "selection.decay=1.5")
    assert "decay" in refuse("+recipe=quickstart", "selection=uniform", "selection.decay=0.5")
    assert "local" in refuse("+recipe=quickstart", "selection=dps", "selection.prior_alpha=local")


def test_data(refuse, tmp_path, rows):
    assert "nowhere.jsonl" in refuse(*MATH, "data.train=nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl is empty" in refuse(*MATH, "data.train=empty.jsonl")
    assert "model.max_prompt_tokens=5" in refuse(*MATH, f"data.train={rows}", "model.max_prompt_tokens=5")
    message = refuse(*MATH, f"data.train={rows}", "train.batch=10", "train.num_updates=1")
    assert "train.batch=10" in message and "9 prompts" in message
    assert "data.answer_key=solution" in refuse(*MATH, f"data.train={rows}", "data.answer_key=solution")


def test_answers_that_countdown_cannot_check_are_found_at_once(refuse, tmp_path):
    answers = ["5", {"numbers": ["a"], "target": 3}, {"numbers": [3, 5]}, "7" * 5000]
    good = [{"problem": f"{i} 5={i + 5}:", "answer": {"numbers": [i, 5], "target": i + 5}} for i in range(8)]
    rows = good + [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = ["+recipe=quickstart", "data.train=own.jsonl", "eval.benchmarks=[]", "data.max_bad_share=0.1"]
    message = refuse(*keys, "train.batch=4")
    assert "4 with an answer that no response can match (rows 9, 10, 11, 12)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read(refuse, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    assert "cannot be read: Permission denied" in refuse("+recipe=quickstart", "run.dir=closed/run")


def test_names_that_no_disk_takes(refuse):
    for key in ("run.dir", "model.path", "selection.warm_start"):
        assert "File name too long" in refuse("+recipe=quickstart", f"{key}={'x' * 300}")


def test_bad_data(refuse, tmp_path, rows):
    clean = rows.read_text()
    rows.write_text(clean + "\nnonsense" * 3 + '\n{"problem": "x?"}\n')
    message = refuse(*MATH, f"data.train={rows}")
    for words in ("13 rows", "3 not JSON (rows 10, 11, 12)", "1 without an answer (row 13)", "data.max_bad_share=0.3"):
        assert words in message
    rows.write_text(clean + ("\n" + clean.splitlines()[0]) * 4)
    assert "4 duplicate (rows 10, 11, 12, 13)" in refuse(*MATH, f"data.train={rows}")
    benchmark = ["eval.benchmarks=[rows]", f"data.eval_dir={tmp_path}"]
    assert "4 duplicate" in refuse(f"model.path={TINY}", *benchmark, entry=evaluate)
    message = refuse(*MATH, f"data.train={rows}", "data.max_bad_share=1", "train.batch=10", "train.num_updates=1")
    assert "9 prompts" in message
    assert "data.max_bad_share=30" in refuse(*MATH, f"data.train={rows}", "data.max_bad_share=30")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + bytes(100))
    assert "cut.parquet is not a Parquet file" in refuse(*MATH, "data.train=cut.parquet")


def test_benchmarks(refuse, rows):
    with_benchmark = [*MATH[:3], f"data.train={rows}", "train.batch=8", f"data.eval_dir={rows.parent}"]
    message = refuse(*with_benchmark, "eval.benchmarks=[aime24]")
    assert "aime24" in message and "rows" in message
    assert "countdownx" in refuse("+recipe=quickstart", "eval.benchmarks=[countdownx]")


def test_model(refuse, tmp_path):
    assert "model.path=./nowhere does not exist" in refuse("+recipe=quickstart", "model.path=./nowhere")
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights" in refuse("+recipe=quickstart", "model.path=model")


def test_reward_function(refuse):
    assert "my_rewards" in refuse("+recipe=quickstart", "reward.fn=my_rewards:score")


def test_own_parts(refuse, tmp_path):
    for key in ("data.train", "selection.method", "algo.loss", "eval.benchmarks"):
        value = "[nowhere:part]" if key == "eval.benchmarks" else "nowhere:part"
        message = refuse("+recipe=quickstart", f"{key}={value}")
        assert "nowhere:part" in message and f"there is no module nowhere in {tmp_path}" in message
    (tmp_path / "texts.py").write_text("def score(response, answer): return 'good'\n")
    assert "returned 'good', not a Score" in refuse("+recipe=quickstart", "reward.fn=texts:score")


def test_run_folder(refuse, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/metrics.jsonl").touch()
    assert "run.dir=old is occupied" in refuse("+recipe=quickstart", "run.dir=old")
    for folder in ("/proc/run", f"{tmp_path}/old/metrics.jsonl/run"):
        for dry_run in ("true", "false"):
            words = f"run.dir={folder} cannot be written to"
            assert words in refuse("+recipe=quickstart", f"run.dir={folder}", f"dry_run={dry_run}")
            evaluated = [f"model.path={TINY}", "eval.benchmarks=[countdown]", f"dry_run={dry_run}"]
            assert words in refuse(*evaluated, f"run.dir={folder}", entry=evaluate)


def test_resources(refuse):
    message = refuse("+recipe=math")
    for words in ("needs 8 GPUs", "has 0", "cluster=cpu model=tiny"):
        assert words in message


def test_evaluation(refuse):
    assert "eval.benchmarks" in refuse(f"model.path={TINY}", entry=evaluate)
    assert "model.path" in refuse("eval.benchmarks=[countdown]", entry=evaluate)
    assert "no_such" in refuse(f"model.path={TINY}", "eval.benchmarks=[no_such]", entry=evaluate)


def test_dry_run_of_an_evaluation_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    evaluated = [f"model.path={TINY}", "eval.benchmarks=[countdown,countdown3]", "data.countdown.num_test=24"]
    assert evaluate.main([*evaluated, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "countdown: 24 prompts x 16 samples = 384 responses",
        "countdown3: 24 prompts",
        "1 engine on CPU cores",
    ):
        assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_on_a_cluster_elsewhere_needs_no_gpu_here(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elsewhere = ["cluster=gpu1", "cluster.address=there:6379", "dry_run=true"]
    assert evaluate.main([f"model.path={TINY}", "eval.benchmarks=[countdown]", *elsewhere]) == 0
    assert "1 engine on shared GPUs" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["+recipe=quickstart", "dry_run=true", "train.batch=32", "trainer.num_workers=2"]) == 0
    printed = capsys.readouterr().out
    for words in ("500 prompts", "256 sequences", "128 per trainer rank", "1 engine and 2 trainer ranks"):
        assert words in printed
    assert list(tmp_path.iterdir()) == []
