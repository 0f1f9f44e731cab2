"""One thread a process: the tensors of these tests are small, and threads on a busy machine wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path, config):
    """Files marked as a whole are not even imported where their mark is left out: some take seconds for that alone."""
    if collection_path.suffix == ".py" and "not process" in config.option.markexpr:
        return "\npytestmark = pytest.mark.process" in collection_path.read_text() or None
