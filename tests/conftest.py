"""How tests are spread over the cores: a file stays in one process, and files that share what starts slowly too."""

import re
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

# Fixtures of integration/conftest.py that are made once for a process, and the process that has them.
PROCESS_OF = {"single_run": "runs", "many_run": "runs", "ranks": "ranks"}


class Spread(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        path = Path(str(self.config.rootpath), file)
        if "integration" not in path.parts:
            return file
        text = path.read_text()
        taken = (name for name in PROCESS_OF if re.search(rf"def \w+\(.*\b{name}\b", text))
        return next((PROCESS_OF[name] for name in taken), file)


def pytest_xdist_make_scheduler(config, log):
    return Spread(config, log)
