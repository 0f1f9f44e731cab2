"""Rewards: what one response to one prompt is worth. Importing this needs numpy and nothing heavier."""

from dpsrl.rewards.scorer import Scorer, check_function, try_function
from dpsrl.types import Score

__all__ = ["Score", "Scorer", "check_function", "try_function"]
