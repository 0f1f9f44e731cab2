"""dpsrl: reinforcement-learning finetuning that knows which prompts are worth rolling out."""

import sys

__version__ = "0.1.0"


def _say_what_is_broken(*failure):
    from dpsrl.installed import end_in_a_sentence

    end_in_a_sentence(*failure)


if sys.argv[:1] == ["-m"]:  # `python -m dpsrl.NAME` is about to import the rest
    if sys.hexversion < 0x03080000:  # not even the doctor can be read there; these lines can
        found = sys.version.split()[0]
        sys.exit("dpsrl: Python is " + found + ", not 3.11 to 3.14: PYTHON=/path/to/python3.12 make install")
    sys.excepthook = _say_what_is_broken
