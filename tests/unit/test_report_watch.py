"""--watch: what the server answers and refuses, and when it ends."""

import http.client
import json
import os
import socket
import threading
import time

import pytest

from dpsrl.report import watch
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError
from tests.made_run import make_run


@pytest.fixture
def served():
    server = watch.Served(0, "<p>one</p>")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # it ends within so many seconds
    yield server
    server.shutdown()
    server.server_close()


def ask(server, path="/", method="GET", host=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_page_and_its_version(served):
    status, headers, body = ask(served)
    assert (status, body) == (200, "<p>one</p>") and headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers
    assert json.loads(ask(served, "/state")[2]) == {"version": 1, "done": False}
    served.show("<p>two</p>")
    assert ask(served, host=f"localhost:{served.server_port}")[2] == "<p>two</p>"
    assert json.loads(ask(served, "/state")[2])["version"] == 2


def test_only_this_machine_is_served(served):
    assert served.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example:PORT", "x:PORT"]
)
def test_a_page_under_another_name_is_refused(served, host):
    status, _, body = ask(served, host=host.replace("PORT", str(served.server_port)))
    assert status == 403 and "<p>" not in body
    assert ask(served, "/state", host="evil.example")[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_only_get(served, method):
    assert ask(served, method=method)[0] == 501


@pytest.mark.parametrize("path", ["/x", "/../metrics.jsonl", "//etc/passwd", "/state/", "/%2e%2e/", "/?x=1"])
def test_nothing_else_is_there(served, path):
    assert ask(served, path)[0] == 404


def test_a_request_without_a_host_and_one_that_never_ends(served, monkeypatch):
    monkeypatch.setattr(watch.Handler, "timeout", 0.5)
    for text in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HT"):
        with socket.create_connection(("127.0.0.1", served.server_port), timeout=20) as connection:
            connection.sendall(text)
            answer = b""
            while part := connection.recv(4096):
                answer += part
        assert b"403" in answer.split(b"\r\n")[0] if text.endswith(b"\n") else answer == b""
    assert ask(served)[0] == 200


@pytest.mark.process
def test_a_port_that_is_taken_is_one_sentence(tmp_path, served):
    with pytest.raises(UserError, match=f"--port {served.server_port} cannot be served on"):
        watch.follow([make_run(tmp_path / "run")], served.server_port)


def test_a_run_that_goes_on_is_followed_until_it_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "REST", 0.0)
    monkeypatch.setattr(watch, "LINGER_S", 0.0)
    drawn, servers = [], []
    monkeypatch.setattr(watch, "render", lambda runs, watch: drawn.append(len(runs[0].records)) or f"{len(drawn)}")
    monkeypatch.setattr(watch, "Served", lambda *a, of=watch.Served: servers.append(of(*a)) or servers[-1])
    run_dir = make_run(tmp_path / "run", num_steps=3, finished=False)
    with RunFolder(run_dir).lock():
        assert watch.is_under_way(run_dir)
        thread = threading.Thread(target=watch.follow, args=([run_dir], 0))
        thread.start()
        wait_for(lambda: drawn == [4])
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4}\n')
        wait_for(lambda: drawn == [4, 5] and servers[0].version == 2)
        assert ask(servers[0])[2] == "2" and not servers[0].done
        (run_dir / "summary.json").write_text("{}")
        thread.join(20)
    assert not thread.is_alive() and servers[0].done and drawn == [4, 5, 5]
    assert f"http://127.0.0.1:{servers[0].server_port}/" in capsys.readouterr().out


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_which_runs_are_under_way(tmp_path):
    run_dir = make_run(tmp_path / "run", num_steps=2, finished=False)
    assert not watch.is_under_way(run_dir), "no lock file"
    lock = run_dir / "lock"
    for holder, expected in (
        ({"pid": os.getpid(), "host": socket.gethostname()}, True),
        ({"pid": 2**22 + 5, "host": socket.gethostname()}, False),
        ({"pid": 5, "host": "another"}, True),  # its files are new
        ({"pid": "x", "host": "another"}, False),
        ([], False),
    ):
        lock.write_text(json.dumps(holder))
        assert watch.is_under_way(run_dir) == expected, holder
    lock.write_text(json.dumps({"pid": 5, "host": "another"}))
    for path in run_dir.iterdir():
        os.utime(path, (1, 1))
    assert not watch.is_under_way(run_dir)
