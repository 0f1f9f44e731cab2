"""The page of runs that go on, served to this machine alone and drawn again as their files grow.

Owns the server: loopback, GET, two addresses. Only requests that name this server as their host are answered, so that
no other web page can read it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dpsrl.report.load import load_run
from dpsrl.report.page import render
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

HOST, DEFAULT_PORT = "127.0.0.1", 8686
LOOK_EVERY_S = 2.0  # at the files
REST = 10.0  # times as long as drawing took, in which nothing is drawn: the run needs the machine
LINGER_S = 8.0  # after the end, so that open pages get the last state
IDLE_S = 600.0  # without a word from a run on another machine it counts as ended
REQUEST_S = 10.0  # that a request may take to arrive


class Served(ThreadingHTTPServer):
    """Owns the page as it is now, with a version that grows; `done`: no newer one will come."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, page: str) -> None:
        self.page, self.version, self.done = page.encode(), 1, False
        super().__init__((HOST, port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        if self.server_port == 80:
            self.hosts |= {HOST, "localhost"}

    def show(self, page: str) -> None:
        self.page, self.version = page.encode(), self.version + 1

    def handle_error(self, request: Any, client_address: object) -> None:
        """A browser that goes away in mid-answer is no error of ours."""
        if not isinstance(sys.exception(), (OSError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Served
    timeout = REQUEST_S
    server_version, sys_version = "dpsrl", ""

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self.answer(403, "text/plain", b"this server answers to its own name alone\n")
        elif self.path == "/":
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/state":
            state = {"version": self.server.version, "done": self.server.done}
            self.answer(200, "application/json", json.dumps(state).encode())
        else:
            self.answer(404, "text/plain", b"there is / and /state\n")

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is the person's."""


def follow(run_dirs: Sequence[Path], port: int) -> int:
    """Serves until every run has ended, or Ctrl-C; UserError where a folder is no run, or the port is taken."""
    seen = stamp(run_dirs)
    page = render([load_run(run_dir) for run_dir in run_dirs], watch=True)
    try:
        server = Served(port, page)
    except OSError as error:
        raise UserError(
            f"--port {port} cannot be served on ({error.strerror}): give another, or 0 for any that is free"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://{HOST}:{server.server_port}/  until the run ends; Ctrl-C ends it", flush=True)
    try:
        going_on, rested = True, 0.0
        while going_on:
            going_on = any(is_under_way(run_dir) for run_dir in run_dirs)
            now, started = stamp(run_dirs), time.monotonic()
            if now != seen and (started >= rested or not going_on):
                seen = now
                server.show(render([load_run(run_dir) for run_dir in run_dirs], watch=True))
                rested = time.monotonic() + REST * (time.monotonic() - started)
            if going_on:
                time.sleep(LOOK_EVERY_S)
        server.done = True
        print("no run is under way any more: this ends in a moment, the page stays in the browser", flush=True)
        time.sleep(LINGER_S)
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        server.server_close()
    return 0


def stamp(run_dirs: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes when one of the files that a page is made of does."""
    found = []
    for run_dir in run_dirs:
        folder = RunFolder(run_dir)
        for path in (folder.metrics, folder.groups, folder.responses, folder.summary, folder.config):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((str(path), status.st_mtime_ns, status.st_size))
    return found


def is_under_way(run_dir: Path) -> bool:
    """Whether a run still writes here: it has no summary yet, and the process that holds the folder is alive.

    The lock is not tried, since a run that starts at that moment would find it taken. Of a process on another machine
    nothing is known but its files.
    """
    folder = RunFolder(run_dir)
    if folder.summary.exists():
        return False
    try:
        holder = json.loads(folder.lock_file.read_text())
        pid, host = int(holder["pid"]), holder["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if host != socket.gethostname():
        newest_ns = max((changed for _, changed, _ in stamp([run_dir])), default=0)
        return time.time() - newest_ns / 1e9 < IDLE_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
