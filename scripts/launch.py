"""A run as a scheduler starts it; docs/launch.md has the variables and the launchers.

    python scripts/launch.py [KEY=VALUE ...]         the run, here or on the Ray cluster DPSRL_ADDRESS=HOST:PORT
    python scripts/launch.py head [KEY=VALUE ...]    starts Ray here as HOST:PORT, waits for DPSRL_NODES machines, runs
    python scripts/launch.py worker                  adds this machine to HOST:PORT until that ends
    python scripts/launch.py stop                    has the run on this machine saved and ended, and waits for that

Keys are those of dpsrl.train, after those in DPSRL_ARGS. The run goes into DPSRL_RUN_DIR and, started again, goes on
where it was. Exit codes are those of dpsrl.train, and 75 for a run that was asked to stop (SIGTERM), has saved and is
to be started again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HAS_TOKEN = bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"} | ({"RAY_AUTH_MODE": "token"} if HAS_TOKEN else {})

import ray  # noqa: E402  reads RAY_AUTH_MODE when it is imported

from dpsrl import train  # noqa: E402
from dpsrl.config import load_config  # noqa: E402
from dpsrl.evaluate import exit_code  # noqa: E402
from dpsrl.guard import Guard  # noqa: E402
from dpsrl.types import UserError  # noqa: E402

RECIPE = "+recipe="
UNFINISHED = 75  # "temporary failure, try again" in sysexits.h
GATHER_S = 600.0  # for all machines to be there, the image's download not included
RAY_ENDS_S = 30.0


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # until the run itself takes care of it
    role = arguments.pop(0) if arguments and arguments[0] in ROLES else "run"
    codes: list[int] = []
    failed = exit_code("launch", lambda: codes.append(ROLES[role](arguments, os.environ)))
    return failed or codes[0]


# --- the run ------------------------------------------------------------------------------------------


def run(arguments: list[str], environment: Mapping[str, str]) -> int:
    arguments = run_arguments(arguments, environment)
    config = load_config(arguments)
    if not config.run.dir:
        raise UserError("no run folder is named, so that this run could not be found again: set DPSRL_RUN_DIR")
    summary = Path(config.run.dir) / "summary.json"
    before = _written(summary)
    code = train.main(arguments)
    ended = _written(summary) not in (before, None)
    return UNFINISHED if code == 0 and not config.dry_run and not ended else code


def run_arguments(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """What dpsrl.train is given: a key set by hand goes before one that is set here."""
    given = shlex.split(environment.get("DPSRL_ARGS", ""))
    if any(argument.startswith(RECIPE) for argument in arguments):  # there is one recipe, the line's
        given = [argument for argument in given if not argument.startswith(RECIPE)]
    given += arguments
    own = {
        "run.dir": environment.get("DPSRL_RUN_DIR"),
        "resume": "auto",
        "cluster.address": environment.get("DPSRL_ADDRESS"),
    }
    names = {argument.partition("=")[0] for argument in given}
    return [*given, *(f"{name}={value}" for name, value in own.items() if value and name not in names)]


def _written(file: Path) -> int | None:
    """When, by the clock of its disk; None where it is not."""
    return file.stat().st_mtime_ns if file.exists() else None


def stop(arguments: list[str], environment: Mapping[str, str]) -> int:
    """For how long is up to the caller: it is the step under way that takes its time."""
    import psutil

    runs = [process for process in psutil.process_iter(["cmdline"]) if _is_run(process.info["cmdline"] or [])]
    for process in runs:
        process.terminate()
    psutil.wait_procs(runs)
    return 0


def _is_run(command: list[str]) -> bool:
    """Whether it is this file at work, as a run or as the head of one."""
    return [Path(word).name for word in command[1:2]] == ["launch.py"] and command[2:3] not in (["worker"], ["stop"])


# --- Ray on several machines --------------------------------------------------------------------------


def head(arguments: list[str], environment: Mapping[str, str]) -> int:
    host, port = _address(environment)
    num_nodes = _num_nodes(environment)
    load_config(run_arguments(arguments, environment))  # a mistake in it is told before anything starts
    options = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    try:
        with ray_node([*options, f"--temp-dir={_ray_folder(port)}"], environment) as node:
            gather(host, port, num_nodes, node)
            return run(arguments, environment)
    finally:
        shutil.rmtree(_ray_folder(port), ignore_errors=True)


def worker(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Ends with the cluster, well in any case: whether the run went well is what the head says.

    Until then it joins again: the first time may have been before the head was ready, and a node may crash.
    """
    host, port = _address(environment)
    _wait_for_port(host, port, None)
    try:
        while _answers(host, port):
            with ray_node([f"--address={host}:{port}"], environment) as node:
                node.wait()
            time.sleep(1.0)
    finally:  # not before: a node may share the folder with another on its machine
        shutil.rmtree(_ray_folder(port), ignore_errors=True)
    return 0


@contextmanager
def ray_node(options: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """One Ray node for as long as the block lasts; whatever happens to this process, it is gone soon after."""
    if not HAS_TOKEN:
        raise UserError(
            "Ray on several machines runs whatever code it is sent, and needs a token that they share: set "
            "RAY_AUTH_TOKEN_PATH to a file that all of them can read, or RAY_AUTH_TOKEN"
        )
    if cores := environment.get("SLURM_CPUS_ON_NODE"):  # Ray counts those of other jobs as well
        options = [*options, f"--num-cpus={cores}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    with Guard() as guard:
        node = subprocess.Popen(command, start_new_session=True)  # out of reach of Ctrl-C
        guard.follow([node.pid])
        try:
            yield node
        finally:
            _end(node)


def _end(node: subprocess.Popen) -> None:
    node.terminate()
    try:
        node.wait(RAY_ENDS_S)
    except subprocess.TimeoutExpired:
        node.kill()


def gather(host: str, port: int, num_nodes: int, node: subprocess.Popen) -> None:
    """Returns when that many machines are in the cluster; UserError with the number that came in time."""
    deadline, num_there = time.monotonic() + GATHER_S, 0
    _wait_for_port(host, port, node)
    while num_there < num_nodes:
        if node.poll() is not None:
            raise UserError(f"Ray ended at {host}:{port}; why is said above")
        if time.monotonic() > deadline:
            raise UserError(
                f"{num_there} of DPSRL_NODES={num_nodes} machines joined Ray at {host}:{port} within {GATHER_S:.0f} s: "
                "see what the others say, and whether they reach that port"
            )
        time.sleep(0.5)
        num_there = _num_there(f"{host}:{port}")
    ray.shutdown()


def _num_there(address: str) -> int:
    """Machines in the cluster; 0 as long as its head is not ready."""
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # Ray has set one of its own
    except (ConnectionError, ray.exceptions.RayError):
        ray.shutdown()
        return 0
    return sum(node["Alive"] for node in ray.nodes())


def _wait_for_port(host: str, port: int, node: subprocess.Popen | None) -> None:
    deadline = time.monotonic() + GATHER_S
    while not _answers(host, port):
        if node is not None and node.poll() is not None:
            raise UserError(f"Ray did not start at {host}:{port}; why is said above")
        if time.monotonic() > deadline:
            raise UserError(f"nothing answers at DPSRL_ADDRESS={host}:{port} after {GATHER_S:.0f} s")
        time.sleep(0.5)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _address(environment: Mapping[str, str]) -> tuple[str, int]:
    host, _, port = environment.get("DPSRL_ADDRESS", "").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"DPSRL_ADDRESS={environment.get('DPSRL_ADDRESS', '')!r} is not HOST:PORT: give the head's address, as the "
            "other machines see it, and a free port"
        )
    return host, int(port)


def _num_nodes(environment: Mapping[str, str]) -> int:
    number = environment.get("DPSRL_NODES", "1")
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"DPSRL_NODES={number} is not a number of machines: give 1 or more")
    return int(number)


def _ray_folder(port: int) -> str:
    """Short, since Ray puts sockets there, and this user's own: Ray's default belongs to who came first."""
    return f"/tmp/dpsrl-{os.getuid()}-{port}"


ROLES = {"run": run, "head": head, "worker": worker, "stop": stop}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
