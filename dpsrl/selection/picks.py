"""Which B of the N prompts are taken, given what they are worth. numpy only.

A pick owns its options and no state; the random generator is the selector's and is passed in. It answers in entries:
0 stands for a prompt never touched, whichever, since all of them are believed to be alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from dpsrl.selection.options import check_number

# Scores closer than this are a tie: their last bits tell the order of a summation, not evidence.
TIE = 1e-12
NO_ENTRIES = np.empty(0, dtype=np.int64)
SAMPLE = 1 << 14  # scores looked at to guess where the best B begin


class Choices(NamedTuple):
    """What there is to choose from: E entries, of which the first stands for `num_fresh` prompts never touched."""

    score: Any  # a `scores.Score`
    belief: Any  # a `Belief`, with what `needs` names
    num_selected_E: np.ndarray
    blocked: np.ndarray  # entries that may not be taken
    num_fresh: int

    def values(self) -> np.ndarray:
        """The score of each entry, (E,), a copy; -inf where it may not be taken."""
        return self.without_blocked(self.score(self.belief, self.num_selected_E))

    def without_blocked(self, value_E: np.ndarray) -> np.ndarray:
        value_E = np.array(value_E, dtype=np.float64)
        value_E[self.blocked] = -np.inf
        return value_E


class Pick(Protocol):
    """Entries (num_picks,), best first; one prompt each, except 0, which comes once for every fresh prompt taken.

    `needs` names what the belief must give, `score_needs` what the score must have.
    """

    needs: tuple[str, ...]
    score_needs: tuple[str, ...]

    def __call__(self, choices: Choices, num_picks: int, generator: np.random.Generator) -> np.ndarray: ...


class TopK:
    """The highest scores; who gets the last places among equals is drawn at random, never by row order."""

    needs = ()
    score_needs = ()

    def __call__(self, choices: Choices, num_picks: int, generator: np.random.Generator) -> np.ndarray:
        value_E = choices.score(choices.belief, choices.num_selected_E)
        return top_k(value_E, choices.num_fresh, num_picks, generator, choices.blocked)


class GumbelTopK:
    """A draw without replacement in which chances follow exp(score / temperature): top-k of score + noise.

    temperature: above 0, in units of the score. Small ones come near top-k, large ones near uniform sampling.
    Source: Kool et al. 2019, arXiv 1903.06059.
    """

    needs = ()
    score_needs = ()

    def __init__(self, *, temperature: float = 0.05) -> None:
        self.temperature = check_number("temperature", temperature, lowest=1e-9)

    def __call__(self, choices: Choices, num_picks: int, generator: np.random.Generator) -> np.ndarray:
        value_E = choices.values()
        noisy_E = value_E + self.temperature * generator.gumbel(size=value_E.size)
        # Of the fresh prompts, which share one score, only the greatest noises matter: the order statistics of
        # num_fresh uniforms from the top, each a power of the one before, make drawing all of them needless.
        num_best = min(choices.num_fresh, num_picks)
        remaining = choices.num_fresh - np.arange(num_best)
        log_uniform = np.cumsum(np.log1p(-generator.random(num_best)) / remaining)
        best_fresh = value_E[0] - self.temperature * np.log(np.maximum(-log_uniform, 1e-300))
        return top_of_each(noisy_E, best_fresh, num_picks, generator)


class Thompson:
    """One pass rate drawn from each prompt's belief, and the best scores of those: uncertain prompts get their turn."""

    needs = ("draw",)
    score_needs = ("of_rate",)

    def __call__(self, choices: Choices, num_picks: int, generator: np.random.Generator) -> np.ndarray:
        def drawn(entries: np.ndarray) -> np.ndarray:
            return choices.score.of_rate(choices.belief.draw(entries, generator), choices.belief.num_rollouts)

        value_E = choices.without_blocked(drawn(np.arange(choices.num_selected_E.size)))
        value_of_fresh = drawn(np.zeros(choices.num_fresh, dtype=np.int64))
        return top_of_each(value_E, value_of_fresh, num_picks, generator)


class Skipping:
    """A stream of all prompts, best score first, ties at random, in which each is skipped or kept by chance.

    GRESO's filter (arXiv 2506.02177) takes prompts from a shuffled epoch until the batch is full. When ROUNDS epochs
    did not fill it, those that were skipped do.
    """

    needs = ("keep", "visit")
    score_needs = ()
    ROUNDS = 8

    def __call__(self, choices: Choices, num_picks: int, generator: np.random.Generator) -> np.ndarray:
        free = np.setdiff1d(np.arange(1, choices.num_selected_E.size), choices.blocked)
        # Fresh prompts are never skipped and nobody had fewer turns, so they fill the batch as far as they go.
        num_fresh = min(choices.num_fresh, num_picks)
        kept = [np.zeros(num_fresh, dtype=np.int64)]
        missing = num_picks - num_fresh
        for last_round in [False] * self.ROUNDS + [True]:
            if not missing:
                break
            value = choices.score(choices.belief, choices.num_selected_E)[free]
            order = np.lexsort((generator.random(free.size), -value))
            stays = (
                np.ones(free.size, dtype=bool)
                if last_round
                else generator.random(free.size) < choices.belief.keep()[free[order]]
            )
            turn = np.searchsorted(np.cumsum(stays), missing) + 1  # the stream stops when the batch is full
            taken = free[order[:turn][stays[:turn]]]
            choices.belief.visit(free[order[:turn]])
            kept.append(taken)
            missing -= taken.size
            free = np.setdiff1d(free, taken)
        return np.concatenate(kept)


PICKS: dict[str, type] = {"top_k": TopK, "gumbel": GumbelTopK, "thompson": Thompson, "skipping": Skipping}


def top_of_each(value_E: np.ndarray, value_of_fresh: np.ndarray, num_picks: int, generator) -> np.ndarray:
    """Top-k where every fresh prompt has a value of its own; `value_E[0]` is not looked at."""
    joined = np.concatenate([[-np.inf], value_E[1:], value_of_fresh])
    picked = top_k(joined, 0, num_picks, generator)
    return np.where(picked < value_E.size, picked, 0)


def top_k(
    value_E: np.ndarray,
    num_fresh: int,
    num_picks: int,
    generator: np.random.Generator,
    blocked: np.ndarray = NO_ENTRIES,
) -> np.ndarray:
    """The best `num_picks` entries outside `blocked`, best first, ties at random; entry 0 counts `num_fresh` times."""
    own = candidates(value_E, num_picks + blocked.size)
    own = own[np.isin(own, blocked, invert=True)]
    own_value = value_E[own]
    num_copies = min(num_fresh, num_picks)
    fresh_value = value_E[0] if num_fresh else -np.inf
    # Sorted, not partitioned: where most are equal, which is the usual case, np.partition is many times slower.
    lowest = np.sort(np.concatenate([own_value, np.full(num_copies, fresh_value)]))[-num_picks]

    sure = own[own_value > lowest + TIE]
    tied = own[np.abs(own_value - lowest) <= TIE]
    num_sure_fresh = num_copies if fresh_value > lowest + TIE else 0
    num_tied_fresh = num_fresh if abs(fresh_value - lowest) <= TIE else 0
    num_open = num_picks - sure.size - num_sure_fresh
    num_drawn_fresh = generator.hypergeometric(num_tied_fresh, tied.size, num_open) if num_tied_fresh else 0
    drawn = tied[generator.choice(tied.size, num_open - num_drawn_fresh, replace=False)]
    picks = np.concatenate([sure, drawn, np.zeros(num_sure_fresh + num_drawn_fresh, dtype=np.int64)])
    picks = generator.permutation(picks)
    return picks[np.argsort(-value_E[picks], kind="stable")]


def candidates(value_E: np.ndarray, num_picks: int) -> np.ndarray:
    """Entries from 1 up among which the best `num_picks`, and all that tie with the last of them, are.

    Of millions, a sample tells a value that a few thousand exceed; one comparison with it spares sorting the rest.
    """
    own = value_E[1:]
    if own.size > 8 * SAMPLE:
        sample = np.sort(own[:: own.size // SAMPLE])
        rank = min(max(16, 2 * num_picks * sample.size // own.size), sample.size)
        above = np.flatnonzero(own >= sample[-rank] - TIE)
        if above.size >= num_picks:
            return above + 1
    return np.arange(1, value_E.size)
