"""Online prompt selection with numpy alone, so that it can be used inside any trainer.

selector = build_selector("dps", num_prompts=7500, num_rollouts=8, seed=0, decay=0.7)
ids = selector.select(256)
...                                                # roll out, score
selector.observe(ids, num_solved, num_rollouts)    # once per step
"""

from dpsrl.selection.methods import METHODS, build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.selection.selectors import Selector

__all__ = ["METHODS", "OutcomeRule", "Selector", "build_selector"]
