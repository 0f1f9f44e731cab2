"""scripts/slurm.sh against stand-ins for sbatch, srun and scontrol: one machine plays all of the cluster's.

`sbatch` queues a copy of the script, as Slurm does; the test starts the job, and again whenever it was put back.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 900
JOB = "4711"

STAND_INS = {
    "sbatch": """
        import json, os, pathlib, shutil, sys
        arguments = sys.argv[1:]
        options = [a for a in arguments if a.startswith("--")]
        script, *keys = arguments[len(options):]
        folder = pathlib.Path(os.environ["STAND_IN"])
        shutil.copy(script, folder / "slurm_script")
        job = {"options": options, "keys": keys, "env": dict(os.environ), "cwd": os.getcwd()}
        (folder / "job.json").write_text(json.dumps(job))
    """,
    "srun": """
        import json, os, pathlib, sys
        arguments = sys.argv[1:]
        options = [a for a in arguments if a.startswith("--")]
        (pathlib.Path(os.environ["STAND_IN"]) / "srun.json").write_text(json.dumps(options))
        command = arguments[len(options):]
        os.execvp(command[0], command)
    """,
    "scontrol": """
        import os, pathlib, sys
        with (pathlib.Path(os.environ["STAND_IN"]) / "requeued").open("a") as file:
            file.write(" ".join(sys.argv[1:]) + "\\n")
    """,
    # Runs the driver in the image's place, with the container's variables.
    "apptainer": """
        import json, os, pathlib, sys
        arguments = sys.argv[1:]
        (pathlib.Path(os.environ["STAND_IN"]) / "apptainer.json").write_text(json.dumps(arguments))
        place = arguments.index("python")
        driver = str(pathlib.Path(__file__).with_name("driver"))
        os.execvp(driver, [driver, *arguments[place + 1 :]])
    """,
    # In place of .venv/bin/python: says its address, and as launch.py ends as the test has it end.
    "driver": """
        import os, pathlib, signal, sys, time
        folder = pathlib.Path(os.environ["STAND_IN"])
        if sys.argv[1] == "-c":
            print("10.0.0.1")
            sys.exit()
        role = sys.argv[2] if sys.argv[2] in ("head", "worker") else "run"
        token = os.environ.get("RAY_AUTH_TOKEN_PATH")
        mode = oct(os.stat(token).st_mode & 0o777) if token else ""
        address, run_dir = os.environ.get("DPSRL_ADDRESS", ""), os.environ["DPSRL_RUN_DIR"]
        def note(*words):
            with (folder / role).open("a") as file:
                file.write(" ".join(words) + "\\n")
        signal.signal(signal.SIGTERM, lambda *_: note("TERM"))
        note(address, run_dir, mode, *sys.argv[2:])
        end = time.monotonic() + 60
        while time.monotonic() < end and "TERM" not in (folder / role).read_text():
            if role == "run" and "ends" in sys.argv:
                break
            time.sleep(0.05)
        time.sleep(0.5)  # a second signal would be seen
        sys.exit({"head": 75, "worker": 0, "run": 2}[role])
    """,
}


class Slurm:
    """A cluster of one machine and one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "work").mkdir()
        for name, code in STAND_INS.items():
            file = folder / "bin" / name
            lines = [line.removeprefix(8 * " ") for line in code.splitlines()]
            file.write_text(f"#!{sys.executable}\n" + "\n".join(lines))
            file.chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "STAND_IN": str(folder), "PYTHONPATH": str(ROOT)}
        self.log = (folder / "slurm.log").open("w+")

    def submit(self, *keys: str, **variables: str) -> dict:
        command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *keys]
        subprocess.run(command, check=True, env=self.env | variables, cwd=self.folder / "work", timeout=60)
        return json.loads((self.folder / "job.json").read_text())

    def start(self, num_nodes: int, restarts: int = 0) -> subprocess.Popen:
        """What slurmd does on the first machine."""
        job = json.loads((self.folder / "job.json").read_text())
        env = job["env"] | {
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": str(num_nodes), "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_SUBMIT_DIR": job["cwd"], "SLURM_CPUS_ON_NODE": "1",
        }  # fmt: skip
        command = ["bash", str(self.folder / "slurm_script"), *job["keys"]]
        return subprocess.Popen(
            command, env=env, cwd=job["cwd"], stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def notes(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def output(self) -> str:
        return (self.folder / "slurm.log").read_text()


@pytest.fixture
def slurm(tmp_path):
    cluster = Slurm(tmp_path)
    yield cluster
    cluster.log.close()
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


def wait_until(condition, process: subprocess.Popen, within_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)


def test_the_submission_asks_for_what_the_variables_say(slurm):
    job = slurm.submit("+recipe=math", "data.instruction={problem}, think", DPSRL_NODES="4", DPSRL_GPUS="8")
    assert job["keys"] == ["+recipe=math", "data.instruction={problem}, think"]
    for option in ("--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=1", "--requeue", "--open-mode=append"):
        assert option in job["options"]
    assert job["env"]["SBATCH_SIGNAL"] == "B:TERM@600"
    assert not any("gpus" in option for option in slurm.submit(DPSRL_GPUS="0")["options"])


def test_a_warned_job_tells_its_driver_once_and_puts_itself_back(slurm):
    slurm.submit("+recipe=math", "train.steps=7", "data.instruction=a b", PYTHON=str(slurm.folder / "bin" / "driver"))
    job = slurm.start(num_nodes=3)
    wait_until(lambda: slurm.notes("head") and slurm.notes("worker"), job, 30)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0, slurm.output()
    begun, *signals = slurm.notes("head")
    address = f"10.0.0.1:{20000 + int(JOB) % 12000}"
    assert begun == f"{address} runs/slurm-{JOB} 0o600 head +recipe=math train.steps=7 data.instruction=a b"
    assert signals == ["TERM"]
    assert slurm.notes("requeued") == [f"requeue {JOB}"]
    assert slurm.notes("worker")[0] == f"{address} runs/slurm-{JOB} 0o600 worker"
    assert slurm.notes("worker")[1:] == ["TERM"]  # ended with the job
    assert {"--nodes=2", "--ntasks=2", "--relative=1"} <= set(json.loads((slurm.folder / "srun.json").read_text()))
    assert not list((slurm.folder / "work").rglob(".ray-token*"))


def test_an_image_runs_with_a_cache_that_it_can_write_to(slurm):
    slurm.env.pop("HF_HOME", None)
    slurm.submit("ends", DPSRL_IMAGE="dpsrl.sif")
    job = slurm.start(num_nodes=1)
    assert job.wait(30) == 2, slurm.output()
    arguments, work = json.loads((slurm.folder / "apptainer.json").read_text()), slurm.folder / "work"
    assert arguments[arguments.index("--env") + 1] == f"HF_HOME={work / 'hf'}" and (work / "hf").is_dir()
    assert str(work / "hf") in arguments[arguments.index("--bind") + 1].split(",")
    assert arguments[arguments.index("--pwd") + 1 :] == [
        str(work), "dpsrl.sif", "python", "/opt/dpsrl/scripts/launch.py", "ends"
    ]  # fmt: skip


def test_a_job_that_fails_is_not_put_back_and_fails(slurm):
    slurm.submit("ends", PYTHON=str(slurm.folder / "bin" / "driver"))
    job = slurm.start(num_nodes=1)
    assert job.wait(timeout=30) == 2
    assert slurm.notes("run") == [f" runs/slurm-{JOB}  ends"] and not slurm.notes("requeued")


def test_overrides_and_signals_of_a_job_on_one_machine_reach_the_driver(slurm):
    slurm.submit("a=1", PYTHON=str(slurm.folder / "bin" / "driver"), DPSRL_RUN_DIR="runs/mine")
    job = slurm.start(num_nodes=1)
    wait_until(lambda: slurm.notes("run"), job, 30)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 2
    assert slurm.notes("run") == [" runs/mine  a=1", "TERM"]


@pytest.mark.slow
def test_a_preempted_run_on_two_nodes_goes_on_where_it_was(slurm):
    few = ["data.countdown.num_train=64", "data.countdown.num_test=16", "train.batch=16", "eval.num_rollouts=4"]
    slurm.submit("+recipe=quickstart", *few, "train.steps=400", "eval.every=0", PYTHON=sys.executable)
    metrics = slurm.folder / "work" / "runs" / f"slurm-{JOB}" / "metrics.jsonl"
    job = slurm.start(num_nodes=2)
    wait_until(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 0, slurm.output()
    assert slurm.notes("requeued") == [f"requeue {JOB}"]
    saved = [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1]

    queued = json.loads((slurm.folder / "job.json").read_text())
    queued["keys"] = [key.replace("train.steps=400", f"train.steps={saved + 2}") for key in queued["keys"]]
    (slurm.folder / "job.json").write_text(json.dumps(queued))
    assert slurm.start(num_nodes=2, restarts=1).wait(timeout=DEADLINE_S) == 0, slurm.output()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(saved + 3))
    assert f"going on after step {saved}" in slurm.output() and "start 2, 2 machines" in slurm.output()
    assert slurm.notes("requeued") == [f"requeue {JOB}"]  # done, not put back again
