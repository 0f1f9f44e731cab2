"""dpsrl: reinforcement-learning finetuning that knows which prompts are worth rolling out."""

import sys

__version__ = "0.1.0"


def _say_what_is_broken(*failure):
    from dpsrl.installed import end_in_a_sentence

    end_in_a_sentence(*failure)


if sys.argv[:1] == ["-m"]:  # `python -m dpsrl.NAME` is about to import the rest
    sys.excepthook = _say_what_is_broken
