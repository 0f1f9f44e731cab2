import os
import signal

import pytest

from dpsrl.stops import StopRequests


def test_the_first_sigterm_is_noted_and_the_second_is_a_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stops:
        assert stops.num == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.num == 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a library that starts does
        stops.listen()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_patience_the_first_one_is():
    with StopRequests(patience=0), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
