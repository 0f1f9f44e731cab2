"""What this machine has and lacks: processors, memory, disks, limits, compiler, network, GPUs.

What returns findings returns rows for the doctor. Nothing is changed, nothing secret is shown, and nothing beyond the
standard library is needed.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from dpsrl.findings import MISSING, OK, WARNING, Finding, gib, read_text

GIB = 2**30
NEEDED_MEMORY = 4 * GIB  # the quickstart's processes together take 3.4
ROOM = 10 * GIB  # below that a disk is soon full of checkpoints, or of Ray's spilled objects
SOCKET_PATH = 107  # bytes that Linux allows
RAY_SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
ANSWERS_WITHIN_S = 3.0
ASKING_S = 20.0


def _row(name: str, status: str, found: str, fix: str = "", fatal: bool = False) -> Finding:
    return Finding("machine", name, status, found, "" if status == OK else fix, fatal and status == MISSING)


def system() -> list[Finding]:
    words = f"{platform.system()} {platform.release()}, {platform.machine()}"
    status = {"Linux": OK, "Darwin": WARNING}.get(platform.system(), MISSING)
    rows = [_row("system", status, words, "dpsrl is made for Linux: use a Linux machine, a container or WSL 2", True)]
    flags = read_text("/proc/cpuinfo")
    if platform.machine() == "x86_64" and flags and " avx2" not in flags:
        fix = "vLLM's CPU build needs it: use another machine, or GPUs"
        rows.append(_row("processor", WARNING, "no AVX2 instructions", fix))
    return rows


def python() -> list[Finding]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 15)
    fix = "dpsrl needs Python 3.11 to 3.14: PYTHON=/path/to/python3.12 make install"
    return [_row("python", OK if fits else MISSING, f"{version}, {sys.executable}", fix, True)]


def usable_cores() -> tuple[float, bool]:
    """Cores that this process may keep busy, and whether its container's limit makes them so few."""
    number = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    limited = quota.isdigit() and int(quota) < number * int(period)
    return (int(quota) / int(period) if limited else number), limited


def num_cores() -> int:
    """Whole ones, one at least."""
    return max(1, int(usable_cores()[0]))


def cores() -> list[Finding]:
    number, limited = usable_cores()
    words = f"{number:g}{' (the limit of this container)' if limited else ''}"
    fix = "the quickstart takes two: it will run, several times slower"
    return [_row("CPU cores", OK if number >= 2 else WARNING, words, fix)]


def memory() -> list[Finding]:
    sizes = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, size = line.partition(":")
        if size.endswith("kB"):
            sizes[name] = int(size.split()[0]) * 1024
    if "MemTotal" not in sizes:
        return [_row("memory", WARNING, "cannot be told here", f"the quickstart takes {gib(NEEDED_MEMORY)}")]
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemTotal"])
    where = ""
    for limit_file, used_file in (("memory.max", "memory.current"),
                                  ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        limit, used = read_text(f"/sys/fs/cgroup/{limit_file}"), read_text(f"/sys/fs/cgroup/{used_file}")
        if limit.isdigit() and int(limit) < total:
            total, where = int(limit), " (the limit of this container)"
            free = min(free, total - int(used or 0))
    words = f"{gib(total)}{where}, {gib(max(free, 0))} of it free"
    status = MISSING if total < NEEDED_MEMORY else WARNING if free < NEEDED_MEMORY else OK
    fix = f"the quickstart takes {gib(NEEDED_MEMORY)}: " + (
        "use a machine or a container with more" if total < NEEDED_MEMORY else "end other programs first"
    )
    return [_row("memory", status, words, fix, True)]


# --- disks --------------------------------------------------------------------------------------------


def disks() -> list[Finding]:
    temp = ray_temp()
    rows = [
        _disk("disk of runs", Path("runs").absolute(), "set run.dir=/a/larger/disk/NAME"),
        _disk("disk of Ray", temp, "export RAY_TMPDIR=/a/larger/disk"),
    ]
    if len(os.fsencode(temp)) + RAY_SOCKET > SOCKET_PATH:
        words = f"{temp} is too long a path for Ray's sockets"
        rows.append(_row("path of Ray", MISSING, words, "export RAY_TMPDIR=/tmp", True))
    return rows


def ray_temp() -> Path:
    """Where Ray keeps its sockets, logs and spilled objects."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()


def _disk(name: str, path: Path, elsewhere: str) -> Finding:
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return _row(name, MISSING, f"{folder} cannot be written to ({error.strerror})", elsewhere, True)
    free = shutil.disk_usage(folder).free
    status = MISSING if free < GIB else WARNING if free < ROOM else OK
    return _row(name, status, f"{gib(free)} free in {folder}", f"make room, or {elsewhere}", True)


def shared_memory() -> list[Finding]:
    if platform.system() != "Linux":
        return []
    fix = "Ray keeps its objects on the disk then, and NCCL may fail: docker run --shm-size=8g in a container"
    if not os.path.isdir("/dev/shm"):
        return [_row("shared memory", WARNING, "no /dev/shm", fix)]
    size = os.statvfs("/dev/shm")
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    enough = min(total, free) >= 2 * GIB
    return [_row("shared memory", OK if enough else WARNING, f"{gib(free)} of {gib(total)} free in /dev/shm", fix)]


# --- limits -------------------------------------------------------------------------------------------


def limits() -> list[Finding]:
    try:
        import resource
    except ImportError:
        return []
    soft, hard = (2**31 if limit < 0 else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    status = OK if soft >= 4096 else WARNING if soft >= 512 else MISSING
    fix = f"ulimit -n {min(hard, 65535)}"
    if hard <= soft:
        fix = "raise it in /etc/security/limits.conf, or docker run --ulimit nofile=65535"
    rows = [_row("open files", status, "no limit" if soft == 2**31 else f"at most {soft:,}", fix, True)]
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0] if hasattr(resource, "RLIMIT_NPROC") else -1
    group = read_text("/sys/fs/cgroup/pids.max")
    most = min([number for number in (soft, int(group) if group.isdigit() else -1) if number >= 0], default=-1)
    status = OK if most < 0 or most >= 2048 else WARNING if most >= 512 else MISSING
    fix = "a run has some 500 threads: ulimit -u 4096, or docker run --pids-limit=-1"
    return [*rows, _row("threads", status, "no limit" if most < 0 else f"at most {most:,}", fix, True)]


# --- network ------------------------------------------------------------------------------------------


def ports() -> list[Finding]:
    """Ray's parts talk to each other over the machine's own address, and DeepSpeed's ranks over loopback."""
    rows, addresses = [], ["127.0.0.1"]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect(("192.0.2.1", 9))  # sends nothing: asks which address would be used
            addresses.append(route.getsockname()[0])
    except OSError:
        pass  # without a route Ray takes loopback too
    for address in dict.fromkeys(addresses):
        try:
            with socket.socket() as server:
                server.bind((address, 0))
                server.listen()
                socket.create_connection(server.getsockname(), timeout=ANSWERS_WITHIN_S).close()
        except OSError as error:
            fix = "Ray cannot work without it: allow local connections (firewall, sandbox, container network)"
            rows.append(_row("ports", MISSING, f"{address} does not take connections ({error})", fix, True))
    return rows or [_row("ports", OK, f"connections to {' and '.join(dict.fromkeys(addresses))} work")]


def proxies() -> list[Finding]:
    """Without user names and passwords. Ray does not send its own traffic through proxies."""
    found = {kind: urllib.parse.urlsplit(url if "//" in url else f"//{url}")
             for kind, url in urllib.request.getproxies().items() if kind not in ("no", "travis_apt")}  # fmt: skip
    words = [f"{kind} through {url.hostname}" for kind, url in sorted(found.items())]
    return [_row("proxies", OK, ", ".join(words) or "none")]


def wandb_login() -> Finding:
    """Whether Weights & Biases would know whom to log for; the key itself is never read."""
    mode = os.environ.get("WANDB_MODE", "")
    netrc = read_text(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    if mode in ("offline", "disabled", "dryrun"):
        words = f"WANDB_MODE={mode}"
    elif os.environ.get("WANDB_API_KEY") or "wandb" in netrc:
        words = "logged in"
    else:
        words = "not logged in: before log.to=[wandb], run wandb login or set WANDB_MODE=offline"
    return _row("wandb login", OK, words)


def hub(endpoint: str, cache: str) -> Finding:
    """Whether models and data sets can be fetched. endpoint, cache: as huggingface_hub has them; '' if unknown."""
    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
                    if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), "")  # fmt: skip
    token = os.environ.get("HF_TOKEN") or read_text(os.path.expanduser("~/.cache/huggingface/token"))
    who = "with a token" if token else "without a token"
    kept = sorted(path.name[8:].replace("--", "/") for path in Path(cache).glob("models--*")) if cache else []
    stock = f"{len(kept)} model{'s' * (len(kept) != 1)} in the cache"
    if offline:
        return _row("Hugging Face hub", OK, f"offline ({offline} is set), {stock}")
    if not endpoint:
        fix = "install the packages that are missing first"
        return _row("Hugging Face hub", WARNING, "not asked: huggingface_hub does not load", fix)
    if answers(endpoint):
        return _row("Hugging Face hub", OK, f"online, {who}, {stock}")
    fix = "give local folders (model.path=, data.train=), a mirror (HF_ENDPOINT), or HF_HUB_OFFLINE=1 to use the cache"
    return _row("Hugging Face hub", WARNING, f"{endpoint} does not answer; {stock}", fix)


def answers(endpoint: str) -> bool:
    """Whether an address takes connections; taken for granted behind a proxy, which alone would know."""
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=ANSWERS_WITHIN_S).close()
    except OSError:
        return False
    return True


def clock() -> list[Finding]:
    now = time.time()
    newest = max((path.stat().st_mtime for path in Path(__file__).parent.glob("*.py")), default=0.0)
    words = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < newest - 86400:
        words += f", and dpsrl's own files are of {time.strftime('%Y-%m-%d', time.gmtime(newest))}"
        return [_row("clock", WARNING, words, "set it (timedatectl set-ntp true): certificates are refused otherwise")]
    return [_row("clock", OK, words)]


# --- tools --------------------------------------------------------------------------------------------


def compiler() -> list[Finding]:
    command = os.environ.get("CXX", "g++")
    fix = "apt-get install g++ python3-dev (Debian, Ubuntu), dnf install gcc-c++ python3-devel (Fedora), or set CXX"
    source = "#include <Python.h>\n#include <string>\n"
    options = ["-x", "c++", f"-I{sysconfig.get_paths()['include']}", "-fsyntax-only", "-"]
    words = ask([command, *options], source)
    if words is None:
        found = f"{command} is not there, or does not find Python's headers"
        rows = [_row("C++ compiler", MISSING, found, fix, True)]
    else:
        rows = [_row("C++ compiler", OK, f"{shutil.which(command) or command}, with Python's headers")]
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    fix = f"trainer.offload and trainer.compile need it: {sys.executable} -m pip install ninja"
    return [*rows, _row("ninja", OK if ninja else WARNING, ninja or "not on the PATH", fix)]


def ask(command: list[str], text: str = "") -> str | None:
    """What a command prints; None where it is not there, fails or does not end."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=ASKING_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# --- GPUs ---------------------------------------------------------------------------------------------


def gpus(torch: dict | None, build: str) -> list[Finding]:
    """Cards and their driver, and whether torch reaches them.

    torch: its `cuda` version, whether a card is `available`, and `num_cards`; None where it does not load.
    """
    listing = ask(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"])
    lines = [line.split(",") for line in (listing or "").splitlines()]
    cards = [[cell.strip() for cell in line] for line in lines if len(line) == 3]
    if not cards:
        return [_no_card()]
    names = [f"{name} ({int(size) / 1024:.0f} GiB)" if size.isdigit() else name for name, size, _ in cards]
    words = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    header = ask(["nvidia-smi"]) or ""
    newest = header.partition("CUDA Version:")[2].split("|")[0].split("\n")[0].strip()
    driver = f"driver {cards[0][2]}" + (f", up to CUDA {newest}" if newest else "")
    rows = [Finding("gpu", "GPUs", OK, f"{words}; {driver}")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        status = OK if visible.strip() not in ("", "-1") else WARNING
        fix = "unset CUDA_VISIBLE_DEVICES" if status == WARNING else ""
        rows.append(Finding("gpu", "visible GPUs", status, f"CUDA_VISIBLE_DEVICES={visible!r}", fix))
    if torch is not None:
        rows.append(_torch_and_cards(torch, build, driver, len(cards)))
    return rows


def _no_card() -> Finding:
    if Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists():
        fix = "restart after a driver update, reinstall the driver, or docker run --gpus=all in a container"
        return Finding("gpu", "GPUs", WARNING, "a driver is loaded, and nvidia-smi lists no card", fix)
    return Finding("gpu", "GPUs", OK, "none: recipes for GPUs run elsewhere, or as cluster=cpu model=tiny")


def _torch_and_cards(torch: dict, build: str, driver: str, num_cards: int) -> Finding:
    if torch["available"]:
        return Finding("gpu", "torch on the GPU", OK, f"{torch['num_cards']} of {num_cards}, CUDA {torch['cuda']}")
    if build == "cpu" or torch["cuda"] is None:
        fix = "for the GPU build: DPSRL_EXTRA=gpu make install"
        return Finding("gpu", "torch on the GPU", WARNING, "this torch is a CPU build", fix)
    words = f"torch is built for CUDA {torch['cuda']} and reaches no card; {driver}"
    fix = f"install a driver for CUDA {torch['cuda']} or newer, and see that CUDA_VISIBLE_DEVICES hides none"
    return Finding("gpu", "torch on the GPU", WARNING, words, fix)
