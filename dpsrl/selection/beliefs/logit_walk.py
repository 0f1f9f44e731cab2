"""The belief of `forecast`: every prompt's pass rate is a random walk with a drift of its own, seen through a binomial.

The derivation is in docs/forecast.md. In short, for prompt i with logit pass rate x_i:

    x_i(t+1) = x_i(t) + drift + Normal(0, noise) + [its group at t was mixed, so it was trained on] gain_i
    gain_i ~ Normal(mean_gain, mean_gain^2)          solved of n ~ Binomial(n, sigmoid(x_i))

drift, noise and mean_gain are shared by all prompts and learned as the run goes; gain_i is the prompt's own. The belief
about (x_i, gain_i) is a Gaussian, kept as of the prompt's last observation: what it says later follows in closed form,
so that an idle prompt is never rewritten. Prompts never touched share one distribution over a grid of logits, the
population, which is fitted to the first groups of all prompts; a prompt seen once is what that fit makes of its group.
"""

from __future__ import annotations

import numpy as np

from dpsrl.selection.options import check_number

NEVER, ONCE, OFTEN = range(3)  # how often a prompt was observed
SINGLE_FROM = 200_000  # prompts from which float32 halves the bytes

GRID_G = np.linspace(-8.0, 8.0, 81)  # logits of the population
WIDE = 2.5  # standard deviation of the logits where nothing is known
WIDE_WEIGHT = 5.0  # groups that this knowledge is worth
EM_SWEEPS = 10

MEMORY = 0.97  # share of the shared evidence kept per step: the shared parameters look back some 30 steps
DRIFT_INFORMATION, GAIN_INFORMATION, NOISE_INFORMATION = 200.0, 50.0, 50.0  # 1 / prior variance, about 0
MAX_DRIFT, MIN_GAIN, MAX_GAIN, MIN_NOISE, MAX_NOISE = 0.2, -0.1, 0.5, 1e-4, 0.3
MAX_VAR, MIN_VAR = 9.0, 1e-4

# Group outcomes as functions of (mean, sd) of the logit: looked up, since there are as many as prompts.
MEAN_M = np.linspace(-9.0, 9.0, 145)
SD_D = np.linspace(0.0, 3.5, 36)
UNSOLVED, SOLVED, SQUARE, RATE, RATE_SQUARE = range(5)
STEPS_Q = np.linspace(-5.0, 5.0, 41)  # where a posterior is integrated, in standard deviations of its prior
MAX_FOLLOWED = 20  # times that these are moved after a posterior


class LogitWalk:
    """Gaussian belief about each prompt's logit and gain; a population for prompts never seen.

    noise: variance of a step of the walk at the start; it is learned from there.
    gain: mean shift of the logit of a prompt that was trained on, at the start; learned likewise.
    """

    predicts = True

    def __init__(self, max_entries: int, num_rollouts: int, *, noise: float = 0.01, gain: float = 0.05) -> None:
        self.num_rollouts = num_rollouts
        self.clock, self.num_entries = 0, 1
        dtype = np.float64 if max_entries <= SINGLE_FROM else np.float32
        self._moments_5E = np.zeros((5, max_entries), dtype=dtype)  # mean, var, gain, var of gain, covariance
        self._first_E = np.zeros(max_entries, dtype=np.int32)  # the group of a prompt seen once, as a row of `pairs`
        self._last_E = np.zeros(max_entries, dtype=np.int32)  # clock of the last observation
        self._seen_E = np.zeros(max_entries, dtype=np.int8)
        self._trained_E = np.zeros(max_entries, dtype=bool)  # was its last group mixed?
        # Shared: drift, mean gain, noise; their information; counts of first groups, and how old they are.
        self._shared = np.array(
            [0.0, check_number("gain", gain, MIN_GAIN, MAX_GAIN), check_number("noise", noise, MIN_NOISE, MAX_NOISE)]
        )
        self._information_22 = np.diag([DRIFT_INFORMATION, GAIN_INFORMATION])
        self._noise_information = np.array(NOISE_INFORMATION)
        self._wide_G = np.exp(-0.5 * (GRID_G / WIDE) ** 2) / np.exp(-0.5 * (GRID_G / WIDE) ** 2).sum()
        self._fit_G = self._wide_G.copy()
        sizes = np.arange(1, num_rollouts + 1)
        self._pairs_P2 = np.array([(m, n) for n in sizes for m in range(n + 1)])
        self._weight_P = np.zeros(len(self._pairs_P2))
        self._age = np.zeros(1)
        self._table_MD5 = outcome_table(num_rollouts)
        self._outcome_E5: np.ndarray | None = None
        self._refresh()

    def grow(self, num_entries: int) -> None:
        new = slice(self.num_entries, num_entries)
        self._seen_E[new] = NEVER
        self._trained_E[new] = False
        if num_entries > self.num_entries and self._outcome_E5 is not None:
            fresh = np.broadcast_to(self._outcome_E5[:1], (num_entries - self.num_entries, 5))
            self._outcome_E5 = np.concatenate([self._outcome_E5, fresh])
        self.num_entries = num_entries

    # --- what it says ---------------------------------------------------------------------------------------

    def predict(self) -> np.ndarray:
        outcome_E5 = self._outcomes()
        unsolved_E, solved_E = outcome_E5[:, UNSOLVED], outcome_E5[:, SOLVED]
        return np.stack([unsolved_E, 1.0 - unsolved_E - solved_E, solved_E], axis=1)

    def spread(self) -> np.ndarray:
        """Standard deviation, under the belief, of the chance f(p) = 1 - p^n - (1 - p)^n of a mixed group, (E,)."""
        outcome_E5 = self._outcomes()
        mixed_E = 1.0 - outcome_E5[:, UNSOLVED] - outcome_E5[:, SOLVED]
        return np.sqrt(np.maximum(outcome_E5[:, SQUARE] - mixed_E**2, 0.0))

    def rate(self) -> np.ndarray:
        return self._outcomes()[:, RATE]

    def variance(self) -> np.ndarray:
        return self._outcomes()[:, RATE] - self._outcomes()[:, RATE_SQUARE]

    def draw(self, entries: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        mean, var, _ = self._at(entries, self.clock)
        logit = mean + np.sqrt(var) * generator.standard_normal(entries.size)
        never = self._seen_E[entries] == NEVER
        logit[never] = generator.choice(GRID_G, size=int(never.sum()), p=self._population_G)
        return 1.0 / (1.0 + np.exp(-logit))

    def _outcomes(self) -> np.ndarray:
        """Expected UNSOLVED .. RATE_SQUARE of every entry, (E, 5); worked out once per step."""
        if self._outcome_E5 is None:
            mean_E, var_E, _ = self._at(np.arange(self.num_entries), self.clock)
            self._outcome_E5 = interpolate(self._table_MD5, mean_E, np.sqrt(var_E))
            never_E = self._seen_E[: self.num_entries] == NEVER
            self._outcome_E5[never_E] = self._population_G @ outcomes_at(GRID_G, self.num_rollouts)
        return self._outcome_E5

    def _at(self, entries: np.ndarray, clock: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and variance of the logit, and its covariance with the gain, at `clock`; float64."""
        drift, mean_gain, noise = self._shared
        mean, var, gain, gain_var, cov = self._moments_5E[:, entries].astype(np.float64)
        once = self._seen_E[entries] == ONCE
        first = self._first_E[entries][once]
        mean[once], var[once] = self._once_mean_P[first], self._once_var_P[first]
        gain[once], gain_var[once], cov[once] = mean_gain, mean_gain**2 + MIN_VAR, 0.0
        gap, trained = clock - self._last_E[entries], self._trained_E[entries]
        var = var + noise * gap + trained * (2.0 * cov + gain_var)
        return mean + drift * gap + trained * gain, np.clip(var, MIN_VAR, MAX_VAR), cov + trained * gain_var

    # --- what it learns -------------------------------------------------------------------------------------

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        made_B = np.where(self._seen_E[entries_B] == NEVER, made_B, np.maximum(made_B, self._last_E[entries_B] + 1))
        self._weight_P *= MEMORY
        self._age *= MEMORY
        never_B = self._seen_E[entries_B] == NEVER
        self._observe_first(entries_B[never_B], num_solved_B[never_B], num_rollouts_B[never_B])
        again_B = ~never_B
        if again_B.any():
            self._observe_again(entries_B[again_B], num_solved_B[again_B], num_rollouts_B[again_B], made_B[again_B])
        self._last_E[entries_B] = made_B
        self._trained_E[entries_B] = (num_solved_B > 0) & (num_solved_B < num_rollouts_B)
        self._age += self._weight_P.sum()

    def _observe_first(self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> None:
        """First groups inform the population; the prompt's own belief is read off the fit for its outcome."""
        usual = num_rollouts_B <= self.num_rollouts
        pair_B = num_rollouts_B[usual] * (num_rollouts_B[usual] + 1) // 2 - 1 + num_solved_B[usual]
        np.add.at(self._weight_P, pair_B, 1.0)
        self._first_E[entries_B[usual]] = pair_B
        self._seen_E[entries_B[usual]] = ONCE
        # A group larger than any in the table, as of a separate pass over the data, gets its moments at once.
        large, solved_L, rollouts_L = entries_B[~usual], num_solved_B[~usual], num_rollouts_B[~usual]
        self._moments_5E[:, large] = first_moments(self._population_G, solved_L, rollouts_L, self._shared[1])
        self._seen_E[large] = OFTEN

    def _observe_again(self, entries_B, num_solved_B, num_rollouts_B, made_B) -> None:
        """Bayes' rule for the logit by quadrature, moments matched; its gain follows by regression on the logit."""
        once_B = self._seen_E[entries_B] == ONCE
        mean_B, var_B, cov_B = self._at(entries_B, made_B)
        new_mean_B, new_var_B = posterior_moments(mean_B, var_B, num_solved_B, num_rollouts_B)
        surprise_B, learned_B = new_mean_B - mean_B, np.clip(1.0 - new_var_B / var_B, 1e-6, 1.0)
        gap_B, trained_B = (made_B - self._last_E[entries_B]).astype(float), self._trained_E[entries_B]

        gain_B = np.where(once_B, self._shared[1], self._moments_5E[2, entries_B])
        gain_var_B = np.where(once_B, self._shared[1] ** 2 + MIN_VAR, self._moments_5E[3, entries_B])
        slope_B = cov_B / var_B
        self._moments_5E[:, entries_B] = np.stack(
            [
                new_mean_B,
                new_var_B,
                gain_B + slope_B * surprise_B,
                np.maximum(gain_var_B - slope_B**2 * (var_B - new_var_B), 1e-6),
                cov_B * new_var_B / var_B,
            ]
        )
        self._seen_E[entries_B] = OFTEN
        self._learn_shared(surprise_B, learned_B, var_B, gap_B, trained_B, once_B)

    def _learn_shared(self, surprise_B, learned_B, var_B, gap_B, trained_B, once_B) -> None:
        """One natural-gradient step for drift, mean gain and noise.

        d log P(evidence) / d mean = surprise / var, with Fisher information learned / var; so it is for the variance.
        A prompt trained on more than once has a gain of its own, which would take what belongs to the drift, so it is
        left out there; the mean gain is learned from second observations, before prompts have gains of their own.
        """
        informs_drift_B = once_B | ~trained_B
        direction_2B = np.stack([gap_B * informs_drift_B, (trained_B & once_B).astype(float)])
        fresh_information = (1.0 - MEMORY) * np.diag([DRIFT_INFORMATION, GAIN_INFORMATION])
        self._information_22 *= MEMORY
        self._information_22 += fresh_information + (direction_2B * (learned_B / var_B)) @ direction_2B.T
        step_2 = np.linalg.solve(self._information_22, direction_2B @ (surprise_B / var_B))
        gradient = 0.5 * (gap_B * (surprise_B**2 / var_B**2 - learned_B / var_B)).sum()
        self._noise_information *= MEMORY
        self._noise_information += (1.0 - MEMORY) * NOISE_INFORMATION + 0.5 * ((gap_B * learned_B / var_B) ** 2).sum()
        proposed = self._shared + (*step_2, gradient / self._noise_information)
        self._shared[:] = np.clip(proposed, (-MAX_DRIFT, MIN_GAIN, MIN_NOISE), (MAX_DRIFT, MAX_GAIN, MAX_NOISE))

    def advance(self, clock: int) -> None:
        self.clock = clock
        self._fit_population()
        self._refresh()

    def resume(self, clock: int) -> None:
        self.clock = clock
        self._refresh()

    def _fit_population(self) -> None:
        """EM for the distribution of logits among the first groups, with `WIDE_WEIGHT` groups of prior knowledge."""
        used = np.flatnonzero(self._weight_P > 1e-6)
        likelihood_UG = binomial_likelihood(GRID_G, *self._pairs_P2[used].T)
        for _ in range(EM_SWEEPS):
            share_UG = self._fit_G * likelihood_UG
            share_UG /= share_UG.sum(axis=1, keepdims=True)
            self._fit_G[:] = self._weight_P[used] @ share_UG + WIDE_WEIGHT * self._wide_G
            self._fit_G /= self._fit_G.sum()

    def _refresh(self) -> None:
        """What follows from the fit: the population now, and the belief about a prompt seen once, by its group."""
        age = self._age[0] / max(self._weight_P.sum(), 1e-9)
        moved_G = np.interp(GRID_G - self._shared[0] * age, GRID_G, self._fit_G)
        self._population_G = moved_G / moved_G.sum()
        self._once_mean_P, self._once_var_P = grid_moments(self._fit_G, *self._pairs_P2.T)
        self._outcome_E5 = None

    def fit_in(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What differs in another run's arrays where its groups were larger or smaller.

        Of a prompt seen once the group is kept, as a row of `pairs`, whose order does not depend on where they end; one
        that ends beyond gets its moments at once, as if it had been seen here.
        """
        theirs, num_pairs = arrays["weight"], len(self._pairs_P2)
        weight = np.zeros(num_pairs)
        weight[: theirs.size] = theirs[:num_pairs]
        moments_5E, seen_E = arrays["moments"].copy(), arrays["seen"].copy()
        beyond = np.flatnonzero((seen_E == ONCE) & (arrays["first"] >= num_pairs))
        rollouts = ((np.sqrt(8 * arrays["first"][beyond] + 9) - 1) / 2).astype(np.int64)
        solved = arrays["first"][beyond] + 1 - rollouts * (rollouts + 1) // 2
        moments_5E[:, beyond] = first_moments(arrays["fit"], solved, rollouts, arrays["shared"][1])
        seen_E[beyond] = OFTEN
        return {"weight": weight, "moments": moments_5E, "seen": seen_E}

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {
            "moments": self._moments_5E,
            "first": self._first_E,
            "last": self._last_E,
            "seen": self._seen_E,
            "trained": self._trained_E,
        }

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {
            "shared": self._shared,
            "information": self._information_22,
            "noise_information": self._noise_information,
            "fit": self._fit_G,
            "weight": self._weight_P,
            "age": self._age,
        }


# --- pure functions -------------------------------------------------------------------------------------------


def binomial_likelihood(logit_G: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> np.ndarray:
    """p^m (1 - p)^(n - m), (B, G), each row divided by its greatest."""
    log_p_G, log_q_G = -np.logaddexp(0.0, -logit_G), -np.logaddexp(0.0, logit_G)
    log_BG = num_solved_B[:, None] * log_p_G + (num_rollouts_B - num_solved_B)[:, None] * log_q_G
    return np.exp(log_BG - log_BG.max(axis=1, keepdims=True))


def grid_moments(prior_G: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray):
    """Mean and variance, (B,) each, of the logit under a prior on GRID_G and a group."""
    weight_BG = prior_G * binomial_likelihood(GRID_G, num_solved_B, num_rollouts_B)
    weight_BG /= weight_BG.sum(axis=1, keepdims=True)
    mean_B = weight_BG @ GRID_G
    return mean_B, np.maximum(weight_BG @ GRID_G**2 - mean_B**2, 1e-3)


def first_moments(prior_G: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, gain: float) -> np.ndarray:
    """Mean, variance, gain, its variance and the covariance, (5, B), after a prompt's first group."""
    mean_B, var_B = grid_moments(prior_G, num_solved_B, num_rollouts_B)
    return np.stack(
        [mean_B, var_B, np.full_like(mean_B, gain), np.full_like(mean_B, gain**2 + MIN_VAR), np.zeros_like(mean_B)]
    )


def posterior_moments(mean_B: np.ndarray, var_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray):
    """Mean and variance, (B,) each, of a Normal logit after a group, by quadrature over +-5 standard deviations.

    Where a group was so great a surprise that the posterior ends outside of these, they follow it.
    """
    sd_B, shift_B = np.sqrt(var_B), np.zeros_like(mean_B)  # shift: of the nodes, in standard deviations
    missed_B = num_rollouts_B - num_solved_B
    for _ in range(MAX_FOLLOWED):
        steps_BQ = shift_B[:, None] + STEPS_Q
        logit_BQ = mean_B[:, None] + sd_B[:, None] * steps_BQ
        log_BQ = -0.5 * steps_BQ**2 - num_solved_B[:, None] * np.logaddexp(0.0, -logit_BQ)
        log_BQ -= missed_B[:, None] * np.logaddexp(0.0, logit_BQ)
        weight_BQ = np.exp(log_BQ - log_BQ.max(axis=1, keepdims=True))
        weight_BQ /= weight_BQ.sum(axis=1, keepdims=True)
        new_mean_B = (weight_BQ * logit_BQ).sum(axis=1)
        new_shift_B = (new_mean_B - mean_B) / sd_B
        far_B = np.abs(new_shift_B - shift_B) > STEPS_Q[-1] - 1.0
        if not far_B.any():
            break
        shift_B = np.where(far_B, new_shift_B, shift_B)
    return new_mean_B, np.maximum((weight_BQ * (logit_BQ - new_mean_B[:, None]) ** 2).sum(axis=1), MIN_VAR)


def outcomes_at(logit: np.ndarray, num_rollouts: int) -> np.ndarray:
    """(1 - p)^n, p^n, f(p)^2, p, p^2 on a new last axis, with f the chance of a mixed group."""
    rate = 1.0 / (1.0 + np.exp(-logit))
    unsolved, solved = (1.0 - rate) ** num_rollouts, rate**num_rollouts
    return np.stack([unsolved, solved, (1.0 - unsolved - solved) ** 2, rate, rate**2], axis=-1)


def outcome_table(num_rollouts: int) -> np.ndarray:
    """Expectations of `outcomes_at` under Normal(MEAN_M, SD_D^2), (M, D, 5), by Gauss-Hermite quadrature."""
    nodes_K, weights_K = np.polynomial.hermite_e.hermegauss(31)
    logit_MDK = MEAN_M[:, None, None] + SD_D[:, None] * nodes_K
    return np.einsum("mdko,k->mdo", outcomes_at(logit_MDK, num_rollouts), weights_K / weights_K.sum())


def interpolate(table_MDO: np.ndarray, mean_E: np.ndarray, sd_E: np.ndarray) -> np.ndarray:
    """Bilinear interpolation in a table over MEAN_M x SD_D, (E, O); values outside take the border's."""
    row_E = np.clip((mean_E - MEAN_M[0]) / (MEAN_M[1] - MEAN_M[0]), 0.0, MEAN_M.size - 1.001)
    column_E = np.clip(sd_E / SD_D[1], 0.0, SD_D.size - 1.001)
    i_E, j_E = row_E.astype(np.int64), column_E.astype(np.int64)
    right_E1, down_E1 = (column_E - j_E)[:, None], (row_E - i_E)[:, None]
    upper = table_MDO[i_E, j_E] * (1.0 - right_E1) + table_MDO[i_E, j_E + 1] * right_E1
    lower = table_MDO[i_E + 1, j_E] * (1.0 - right_E1) + table_MDO[i_E + 1, j_E + 1] * right_E1
    return upper * (1.0 - down_E1) + lower * down_E1
