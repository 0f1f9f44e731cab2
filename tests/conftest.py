"""How tests are spread over the cores: a file stays in one process, and so do all files that share a real run."""

from pathlib import Path

from xdist.scheduler import LoadFileScheduling

SHARED = ("single_run", "many_run")  # made once for a process: integration/conftest.py


class Spread(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        path = Path(str(self.config.rootpath), file)
        shares = "integration" in path.parts and any(run in path.read_text() for run in SHARED)
        return "shared runs" if shares else file


def pytest_xdist_make_scheduler(config, log):
    return Spread(config, log)
