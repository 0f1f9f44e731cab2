"""A Kalman filter over the arcsine of each prompt's pass rate, as in ARCUS, with drift and noise fitted as it goes."""

from __future__ import annotations

import numpy as np

from dpsrl.selection.options import check_number

START_MEAN, START_VAR = np.pi / 4, np.pi**2 / 48  # a pass rate of which nothing is known
MEMORY = 0.95  # share of the fitting evidence kept per step
DRIFT_INFORMATION, NOISE_INFORMATION = 10.0, 10.0  # what the starting values of drift and noise are worth
MAX_DRIFT, MIN_NOISE, MAX_NOISE = 0.2, 1e-5, 0.05


class ArcsineKalman:
    """psi = arcsin(sqrt(p)) ~ Normal(mean, var). In psi the noise of a binomial share hardly depends on p.

    Per step: d psi = drift sin(2 psi), which is d logit(p) = 4 drift; var grows by `noise`. A mixed group reads
    z = arcsin sqrt((m + 3/8) / (n + 3/4)) with variance 1 / (4 n + 2) (Anscombe 1948); one without spread reads 0 or
    pi / 2 with variance 1 / (2 n). drift, noise: None: fitted to the errors of prediction; a number: held there.
    """

    predicts = True

    def __init__(
        self, max_entries: int, num_rollouts: int, *, drift: float | None = None, walk_noise: float | None = None
    ) -> None:
        self.num_rollouts = num_rollouts
        self.clock, self.num_entries = 0, 1
        self.fits_drift, self.fits_noise = drift is None, walk_noise is None
        start = (
            0.0 if drift is None else check_number("drift", drift, -MAX_DRIFT, MAX_DRIFT),
            1e-3 if walk_noise is None else check_number("walk_noise", walk_noise, 0.0, 1.0),
        )
        self._shared = np.array([*start, DRIFT_INFORMATION, NOISE_INFORMATION])
        self._moments_2E = np.zeros((2, max_entries), dtype=np.float32)
        self._last_E = np.zeros(max_entries, dtype=np.int32)
        self._seen_E = np.zeros(max_entries, dtype=bool)
        self._moments_2E[:, 0] = START_MEAN, START_VAR

    def grow(self, num_entries: int) -> None:
        new = slice(self.num_entries, num_entries)
        self._moments_2E[:, new] = self._moments_2E[:, :1]
        self._seen_E[new] = False
        self.num_entries = num_entries

    def _at(self, entries: np.ndarray | slice, clock: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of psi at `clock`. The drift in closed form: tan(psi) grows by exp(2 drift) a step."""
        drift, noise = self._shared[:2]
        mean, var = self._moments_2E[:, entries].astype(np.float64)
        seen = self._seen_E[entries]
        gap = np.where(seen, clock - self._last_E[entries], 0)
        mean = np.arctan2(np.sin(mean) * np.exp(2.0 * drift * gap), np.cos(mean))
        return mean, np.where(seen, np.minimum(var + noise * gap, START_VAR), START_VAR)

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        seen_B = self._seen_E[entries_B]
        made_B = np.where(seen_B, np.maximum(made_B, self._last_E[entries_B] + 1), made_B)
        mean_B, var_B = self._at(entries_B, made_B)
        mixed_B = (num_solved_B > 0) & (num_solved_B < num_rollouts_B)
        inner_B = np.arcsin(np.sqrt((num_solved_B + 0.375) / (num_rollouts_B + 0.75)))
        read_B = np.where(mixed_B, inner_B, np.where(num_solved_B > 0, np.pi / 2, 0.0))
        read_var_B = np.where(mixed_B, 1.0 / (4.0 * num_rollouts_B + 2.0), 1.0 / (2.0 * num_rollouts_B))
        error_B, error_var_B = read_B - mean_B, var_B + read_var_B
        kept_B = var_B / error_var_B
        gap_B = made_B - self._last_E[entries_B]
        self._fit(error_B[seen_B], error_var_B[seen_B], gap_B[seen_B], np.sin(2.0 * mean_B[seen_B]))
        self._moments_2E[:, entries_B] = mean_B + kept_B * error_B, var_B * (1.0 - kept_B)
        self._last_E[entries_B] = made_B
        self._seen_E[entries_B] = True

    def _fit(self, error_B: np.ndarray, error_var_B: np.ndarray, gap_B: np.ndarray, slope_B: np.ndarray) -> None:
        """One natural-gradient step for drift and noise on the errors of prediction, Normal(0, error_var)."""
        drift, noise, drift_information, noise_information = self._shared
        lever_B = gap_B * slope_B
        drift_information = MEMORY * drift_information + (1 - MEMORY) * DRIFT_INFORMATION
        drift_information += (lever_B**2 / error_var_B).sum()
        noise_information = MEMORY * noise_information + (1 - MEMORY) * NOISE_INFORMATION
        noise_information += 0.5 * (gap_B**2 / error_var_B**2).sum()
        if self.fits_drift:
            drift += (lever_B * error_B / error_var_B).sum() / drift_information
        if self.fits_noise:
            noise += 0.5 * (gap_B * (error_B**2 - error_var_B) / error_var_B**2).sum() / noise_information
            noise = np.clip(noise, MIN_NOISE, MAX_NOISE)
        self._shared[:] = np.clip(drift, -MAX_DRIFT, MAX_DRIFT), noise, drift_information, noise_information

    def advance(self, clock: int) -> None:
        self.clock = clock

    def resume(self, clock: int) -> None:
        self.clock = clock

    def predict(self) -> np.ndarray:
        """P(unsolved) = exp(-n mean^2 / a) / sqrt(a), a = 1 + 2 n var, from cos^2n(psi) ~ exp(-n psi^2)."""
        mean_E, var_E = self._at(slice(0, self.num_entries), self.clock)
        n, a_E = self.num_rollouts, 1.0 + 2.0 * self.num_rollouts * var_E
        unsolved_E = np.exp(-n * mean_E**2 / a_E) / np.sqrt(a_E)
        solved_E = np.exp(-n * (np.pi / 2 - mean_E) ** 2 / a_E) / np.sqrt(a_E)
        states_ES = np.stack([unsolved_E, np.maximum(1.0 - unsolved_E - solved_E, 0.0), solved_E], axis=1)
        return states_ES / states_ES.sum(axis=1, keepdims=True)

    def rate(self) -> np.ndarray:
        """E[sin^2 psi]."""
        mean_E, var_E = self._at(slice(0, self.num_entries), self.clock)
        return (1.0 - np.exp(-2.0 * var_E) * np.cos(2.0 * mean_E)) / 2.0

    def variance(self) -> np.ndarray:
        """E[p (1 - p)] = E[sin^2(2 psi)] / 4."""
        mean_E, var_E = self._at(slice(0, self.num_entries), self.clock)
        return (1.0 - np.exp(-8.0 * var_E) * np.cos(4.0 * mean_E)) / 8.0

    def draw(self, entries: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        mean, var = self._at(entries, self.clock)
        return np.sin(np.clip(mean + np.sqrt(var) * generator.standard_normal(entries.size), 0.0, np.pi / 2)) ** 2

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {"moments": self._moments_2E, "last": self._last_E, "seen": self._seen_E}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {"shared": self._shared}
