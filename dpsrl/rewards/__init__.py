"""Rewards: what one response to one prompt is worth. Importing this needs the standard library and numpy alone."""

from dpsrl.rewards.scorer import Scorer
from dpsrl.types import Score

__all__ = ["Score", "Scorer"]
