"""Ctrl-C and waits of the Ray session."""

import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from dpsrl.cluster import Cluster, _remembered_interrupts

pytestmark = pytest.mark.process  # imports the stack


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_remembered():
    """Raised in a destructor, KeyboardInterrupt goes nowhere; the next wait raises it again."""
    with ExitStack() as stack:
        interrupts = _remembered_interrupts(stack)

        class Dropping:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        thing = Dropping()
        del thing
        assert interrupts == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        cluster = SimpleNamespace(_interrupts=interrupts)
        with pytest.raises(KeyboardInterrupt):
            Cluster.ready(cluster, [None], 1.0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
