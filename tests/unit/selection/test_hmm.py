"""The vectorised equations against a second implementation, one prompt and one number at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.selection.beliefs.dirichlet_hmm import ALPHA_PRESETS, DirichletHMM
from dpsrl.selection.hmm import PARTIAL, SOLVED, UNSOLVED, observed_state

POSITIVE_PRESETS = ["uniform", "progress", "stability"]


class ScalarPrompt:
    """One prompt of the paper's model in plain Python floats; written from the equations, shares no code."""

    def __init__(self, alpha0: list[list[float]], pi: list[float], decay: float) -> None:
        self.alpha0, self.decay = alpha0, decay
        self.alpha = [list(row) for row in alpha0]
        self.post, self.next = list(pi), list(pi)

    def transition(self, to: int, source: int) -> float:
        return self.alpha[to][source] / sum(self.alpha[i][source] for i in range(3))

    def step(self, state: int | None) -> None:
        new = list(self.next) if state is None else [float(i == state) for i in range(3)]
        xi = [[new[i] * self.post[j] * self.transition(i, j) for j in range(3)] for i in range(3)]
        total = sum(map(sum, xi))
        for i in range(3):
            for j in range(3):
                learned = 0.0 if state is None else xi[i][j] / total
                self.alpha[i][j] = self.decay * self.alpha[i][j] + (1 - self.decay) * self.alpha0[i][j] + learned
        raw = [sum(self.transition(i, j) * new[j] for j in range(3)) for i in range(3)]
        self.next = [value / sum(raw) for value in raw]
        self.post = new


def build(num_prompts: int, **options) -> DirichletHMM:
    """Prompt n is entry n + 1; entry 0 is never observed."""
    belief = DirichletHMM(num_prompts + 1, 8, **options)
    belief.grow(num_prompts + 1)
    return belief


def observe_states(belief: DirichletHMM, states: list[int | None], made: int | None = None) -> None:
    """One step in which prompt n shows states[n], or nothing; `made`: the clock of the groups, if not the present."""
    rows = np.array([n for n, state in enumerate(states) if state is not None], dtype=np.int64)
    num_solved = np.array([(0, 3, 8)[states[n]] for n in rows], dtype=np.int64)
    made_B = np.full(rows.size, belief.clock if made is None else made)
    belief.observe(rows + 1, num_solved, np.full(rows.size, 8), made_B)
    belief.advance(belief.clock + 1)


def alpha_of(belief: DirichletHMM, row: int) -> np.ndarray:
    return belief._alpha(np.array([row + 1]), np.array([belief.clock - 1]))[:, :, 0]


def posterior_of(belief: DirichletHMM, row: int) -> np.ndarray:
    return belief._posterior_SE[:, row + 1]


histories = st.integers(1, 6).flatmap(
    lambda num_prompts: st.lists(
        st.lists(st.sampled_from([None, 0, 1, 2]), min_size=num_prompts, max_size=num_prompts),
        min_size=1,
        max_size=12,
    )
)
decays = st.one_of(st.sampled_from([0.0, 0.5, 0.7, 1.0]), st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(histories, decays, st.sampled_from(POSITIVE_PRESETS), st.sampled_from(["uniform", "unsolved", "solved"]))
def test_equals_the_scalar_model(history, decay, alpha, pi):
    shares = {"uniform": [1 / 3] * 3, "unsolved": [1.0, 0.0, 0.0], "solved": [0.0, 0.0, 1.0]}[pi]
    belief = build(len(history[0]), decay=decay, prior_alpha=alpha, prior_pi=pi)
    prompts = [ScalarPrompt([list(row) for row in ALPHA_PRESETS[alpha]], shares, decay) for _ in history[0]]
    for states in history:
        observe_states(belief, states)
        for prompt, state in zip(prompts, states, strict=True):
            prompt.step(state)
    for n, prompt in enumerate(prompts):
        np.testing.assert_allclose(alpha_of(belief, n), prompt.alpha, rtol=1e-12)
        np.testing.assert_allclose(posterior_of(belief, n), prompt.post, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(belief.predict()[n + 1], prompt.next, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(histories, decays)
def test_beliefs_stay_probabilities(history, decay):
    belief = build(len(history[0]), decay=decay)
    for states in history:
        observe_states(belief, states)
    for rows in (belief.predict(), belief._posterior_SE.T):
        assert (rows >= 0).all()
        np.testing.assert_allclose(rows.sum(axis=1), 1.0, atol=1e-14)
    assert all((alpha_of(belief, n) > 0).all() for n in range(len(history[0])))


@settings(max_examples=40, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_prompts_do_not_know_of_each_other(history, random):
    order = list(range(len(history[0])))
    random.shuffle(order)
    plain, permuted = build(len(order)), build(len(order))
    for states in history:
        observe_states(plain, states)
        observe_states(permuted, [states[n] for n in order])
    np.testing.assert_allclose(permuted.predict(), plain.predict()[[0, *(n + 1 for n in order)]], rtol=1e-13)


@pytest.mark.parametrize(("decay", "expected"), [(0.5, 0.600), (0.7, 0.684), (0.9, 0.846)])
def test_always_partial_has_the_closed_form(decay, expected):
    # alpha_22 -> n = 1 + 1 / (1 - decay), and the two other counts of its column stay 1: n / (n + 2)
    belief = build(1, decay=decay)
    for _ in range(400):
        observe_states(belief, [PARTIAL])
    n = 1 + 1 / (1 - decay)
    assert belief.predict()[1, PARTIAL] == pytest.approx(n / (n + 2), abs=1e-12)
    assert belief.predict()[1, PARTIAL] == pytest.approx(expected, abs=5e-4)


def test_an_idle_prompt_drifts_to_the_stationary_law_of_the_prior():
    belief = build(2, decay=0.7, prior_alpha="progress")
    observe_states(belief, [SOLVED, UNSOLVED])
    for _ in range(300):
        observe_states(belief, [None, None])
    alpha0 = np.array(ALPHA_PRESETS["progress"])
    values, vectors = np.linalg.eig(alpha0 / alpha0.sum(axis=0))
    stationary = np.real(vectors[:, np.argmax(values.real)])
    np.testing.assert_allclose(belief.predict(), [stationary / stationary.sum()] * 3, atol=1e-9)


def test_observed_state_by_counts():
    num_solved = np.array([0, 1, 7, 8, 0, 1, 4])
    num_rollouts = np.array([8, 8, 8, 8, 1, 1, 5])
    expected = [UNSOLVED, PARTIAL, PARTIAL, SOLVED, UNSOLVED, SOLVED, PARTIAL]
    assert observed_state(num_solved, num_rollouts).tolist() == expected
