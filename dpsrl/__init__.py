"""dpsrl: reinforcement-learning finetuning that knows which prompts are worth rolling out."""

__version__ = "0.1.0"
