"""What every test here starts from."""

import os
import signal

# The tensors of these tests are small, and threads on a busy machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has what it starts in the background ignore Ctrl-C, and so would all that is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path, config):
    """Files marked as a whole are not even imported where their mark is left out: some take seconds for that alone."""
    if collection_path.suffix == ".py" and "not process" in config.option.markexpr:
        return "\npytestmark = pytest.mark.process" in collection_path.read_text() or None
