"""A selection method: a moving average of each prompt's pass rate; whoever is near one half, or new, comes first."""

import numpy as np


class NearHalf:
    def __init__(self, num_prompts, num_rollouts, *, smoothing=0.3):
        self.smoothing = smoothing
        self.rate = np.full(num_prompts, 0.5)
        self.is_new = np.ones(num_prompts, dtype=bool)

    def observe(self, ids, num_solved, num_rollouts):
        self.rate[ids] += self.smoothing * (num_solved / num_rollouts - self.rate[ids])
        self.is_new[ids] = False

    def score(self):
        return self.rate * (1 - self.rate) + 0.1 * self.is_new
