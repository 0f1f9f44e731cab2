"""Simulated prompts whose pass rates move as prompts do under training. numpy only.

A world is a dataclass: how many prompts, where their logit pass rates begin, and how a step moves them. To add one,
subclass `World`, override `start` or `evolve`, and name it on the command line: `worlds=my_module:MyWorld`.

Axes: N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Part = tuple[float, float, float]  # share of the prompts, mean and standard deviation of their logits


@dataclass(frozen=True)
class World:
    """Logits start as a mixture of normals. Every step: a gain for prompts trained on, a drift for all, and noise.

    A prompt's learnability is lognormal with mean 1, and 0 for the `stuck` share. It scales the gain, which a prompt
    gets for each of its own mixed groups, and the drift, which all get in proportion to the mixed share of the step.
    """

    num_prompts: int
    steps: int
    parts: tuple[Part, ...]
    gain: float = 0.15
    drift: float = 0.01
    noise: float = 0.05
    stuck: float = 0.0

    def start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Logits and learnabilities, float32 (N,) each."""
        share, mean, sd = np.array(self.parts).T
        part_N = rng.choice(len(self.parts), self.num_prompts, p=share)
        logit_N = mean[part_N] + sd[part_N] * rng.standard_normal(self.num_prompts)
        learnability_N = rng.lognormal(-0.125, 0.5, self.num_prompts)
        learnability_N[rng.random(self.num_prompts) < self.stuck] = 0.0
        return logit_N.astype(np.float32), learnability_N.astype(np.float32)

    def drift_at(self, step: int) -> float:
        return self.drift

    def evolve(
        self,
        logit_N: np.ndarray,
        learnability_N: np.ndarray,
        trained: np.ndarray,
        mixed_share: float,
        step: int,
        rng: np.random.Generator,
    ) -> None:
        """Moves the logits in place by one step; `trained` are the rows whose mixed groups were trained on."""
        logit_N[trained] += self.gain * learnability_N[trained]
        logit_N += self.drift_at(step) * mixed_share * learnability_N
        if self.noise:
            logit_N += np.float32(self.noise) * rng.standard_normal(self.num_prompts, dtype=np.float32)


@dataclass(frozen=True)
class Tides(World):
    """The policy improves for 80 steps, loses ground for 60, and improves again: pass rates also fall."""

    def drift_at(self, step: int) -> float:
        return -0.75 * self.drift if 80 <= step < 140 else self.drift


WORLDS: dict[str, World] = {
    "bimodal": World(7_500, 200, ((0.45, -4.0, 1.0), (0.35, 3.5, 1.0), (0.2, 0.0, 1.0))),
    "mid_heavy": World(2_000, 120, ((1.0, 0.0, 1.5),), gain=0.1, drift=0.005),
    "hard": World(17_000, 150, ((0.75, -4.0, 1.5), (0.25, 0.0, 1.2)), stuck=0.3),
    "drifting": Tides(5_000, 200, ((1.0, -1.0, 2.0),), drift=0.04, noise=0.1),
    "large": World(100_000, 150, ((0.8, -4.5, 1.5), (0.2, 0.5, 1.5))),
}


def rate_of(logit: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logit))


def chance_mixed(rate: np.ndarray, num_rollouts: int) -> np.ndarray:
    """1 - p^n - (1 - p)^n."""
    return 1.0 - rate**num_rollouts - (1.0 - rate) ** num_rollouts
