import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.selection import METHODS, build_selector
from dpsrl.selection.admission import build_admission
from dpsrl.selection.picks import top_k
from dpsrl.selection.scores import entropy
from dpsrl.types import UserError


def build(method="dps", num_prompts=20, seed=0, **options):
    return build_selector(method, num_prompts=num_prompts, num_rollouts=8, seed=seed, **options)


def run_steps(selector, num_steps, num_picks, seed):
    """Selections of a few closed-loop steps with seeded outcomes."""
    outcomes = np.random.default_rng(seed)
    selections = []
    for _ in range(num_steps):
        ids = selector.select(num_picks)
        selector.observe(ids, outcomes.integers(0, 9, num_picks), np.full(num_picks, 8))
        selections.append(ids.tolist())
    return selections


@pytest.mark.parametrize("method", METHODS)
def test_surface(method):
    selector = build(method)
    ids = selector.select(5)
    assert ids.dtype == np.int64 and ids.shape == (5,) and len(set(ids.tolist())) == 5
    assert selector.predict().shape == (20, 3)
    np.testing.assert_allclose(selector.predict(), 1 / 3)
    assert selector.score().shape == (20,)


def test_dps_ranks_partial_above_unseen_above_the_rest():
    selector = build(num_prompts=5)
    selector.observe(np.array([0, 1, 2]), np.array([0, 4, 8]), np.full(3, 8))
    np.testing.assert_allclose(selector.score(), [0.3, 0.4, 0.3, 1 / 3, 1 / 3], atol=1e-15)
    ids = selector.select(3)
    assert ids[0] == 1 and set(ids[1:].tolist()) == {3, 4}


def test_entropy_weight_adds_the_entropy_of_the_prior():
    selector = build(num_prompts=2, entropy_weight=0.1)
    selector.observe(np.array([0]), np.array([4]), np.array([8]))
    # prior (0.3, 0.4, 0.3): H = -(0.6 ln 0.3 + 0.4 ln 0.4) = 1.0889; prior (1/3, ..): H = ln 3 = 1.0986
    np.testing.assert_allclose(selector.score(), [0.4 + 0.10889, 1 / 3 + 0.10986], atol=1e-5)


def test_entropy_of_certainty_is_zero():
    assert entropy(np.array([[0.0, 1.0, 0.0]])).tolist() == [0.0]


def test_num_rollouts_may_vary_and_no_reward_is_no_evidence():
    varied, idle = build(num_prompts=3), build(num_prompts=3)
    varied.observe(np.array([0, 1, 2]), np.array([3, 5, 0]), np.array([3, 6, 0]))
    idle.observe(np.array([1, 0]), np.array([1, 8]), np.array([8, 8]))
    np.testing.assert_array_equal(varied.predict(), idle.predict())
    np.testing.assert_allclose(varied.predict()[2], 1 / 3)


def test_a_step_without_groups_still_moves_the_clock():
    selector = build(num_prompts=1)
    selector.observe(np.array([0]), np.array([4]), np.array([8]))
    before = selector.predict()[0, 1]
    selector.observe([], [], [])
    assert selector.predict()[0, 1] < before


def test_ties_are_drawn_evenly_and_by_seed():
    draws = np.zeros(10)
    for seed in range(400):
        draws[build(num_prompts=10, seed=seed).select(3)] += 1
    assert draws.sum() == 1200
    assert (abs(draws - 120) < 45).all()  # 5 standard deviations of a binomial(400, 0.3)
    assert build(seed=7).select(8).tolist() == build(seed=7).select(8).tolist()


def test_rounding_does_not_break_ties():
    score = np.full(21, 0.3)  # entry 0 stands for 5 prompts
    score[:5] = np.nextafter(0.3, 1.0)  # equal but for the last bit, as unsolved and solved prompts can be
    counts = np.zeros(21)
    for seed in range(300):
        np.add.at(counts, top_k(score, 5, 10, np.random.default_rng(seed)), 1)
    assert abs(counts[0] / 5 - 120) < 25
    assert (abs(counts[1:] - 120) < 45).all()  # 5 standard deviations of a binomial(300, 0.4)


@pytest.mark.parametrize("method", METHODS)
def test_exclude_is_never_selected(method):
    selector = build(method, num_prompts=10)
    assert set(selector.select(4, exclude=range(6)).tolist()) == {6, 7, 8, 9}
    with pytest.raises(UserError, match="cannot select 5 prompts: 4 of 10 are available"):
        selector.select(5, exclude=np.array([0, 1, 2, 3, 4, 5, 5]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.data())
def test_uniform_takes_every_prompt_once_before_any_twice(num_prompts, data):
    selector = build("uniform", num_prompts=num_prompts)
    counts = np.zeros(num_prompts, dtype=int)
    for num_picks in data.draw(st.lists(st.integers(1, num_prompts), max_size=12)):
        counts[selector.select(num_picks)] += 1
        assert counts.max() - counts.min() <= 1


def test_uniform_epochs_have_different_orders():
    selector = build("uniform", num_prompts=50)
    epochs = [selector.select(50).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_selector_goes_on_identically(method):
    first = build(method, seed=3)
    run_steps(first, 7, 6, seed=1)
    second = build(method, seed=99)
    second.load_state_dict(first.state_dict())
    assert run_steps(second, 10, 6, seed=2) == run_steps(first, 10, 6, seed=2)
    for name, array in first.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array)


def test_state_is_a_copy_of_plain_arrays(tmp_path):
    selector = build()
    state = selector.state_dict()
    run_steps(selector, 2, 5, seed=0)
    np.testing.assert_array_equal(state["belief.prior"], np.full((3, 1), 1 / 3))
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as loaded:
        selector.load_state_dict(dict(loaded))
    assert run_steps(selector, 4, 5, seed=0) == run_steps(build(), 4, 5, seed=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("generator"),
        lambda state: state.update(extra=np.zeros(3)),
        lambda state: state.update({"belief.prior": np.zeros((3, 19))}),
        lambda state: state.update(num_selected=np.zeros(20)),
    ],
)
def test_a_spoiled_state_is_refused_and_changes_nothing(spoil):
    selector = build()
    run_steps(selector, 2, 5, seed=0)
    before = selector.state_dict()
    state = build(seed=5).state_dict()
    spoil(state)
    with pytest.raises(UserError, match="the selector's state"):
        selector.load_state_dict(state)
    for name, array in before.items():
        np.testing.assert_array_equal(selector.state_dict()[name], array)


def test_a_state_of_another_method_is_refused():
    with pytest.raises(UserError, match="another selection method"):
        build("dps").load_state_dict(build("uniform").state_dict())


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("dpps", {}, "selection method 'dpps' is unknown; did you mean 'dps'"),
        ("qqqq", {}, "selection method 'qqqq' is unknown; use one of: dps, uniform"),
        ("dps", {"decai": 0.5}, "selection option 'decai' is unknown; did you mean 'decay'"),
        ("dps", {"pick": "topk"}, "selection pick 'topk' is unknown; did you mean 'top_k'"),
        ("uniform", {"decay": 0.5}, "'decay' has no effect with method 'uniform'"),
        ("dps", {"score": "least_selected", "entropy_weight": 1.0}, "'entropy_weight' has no effect"),
        ("dps", {"decay": 1.5}, "'decay' is 1.5; it must be a finite number from 0 to 1"),
        ("dps", {"decay": "0.5"}, "'decay' is '0.5'"),
        ("dps", {"decay": float("nan")}, "'decay' is nan"),
        ("dps", {"decay": True}, "'decay' is True"),
        ("dps", {"prior_alpha": "lokal"}, "'prior_alpha' is 'lokal'; use one of uniform, progress"),
        ("dps", {"prior_alpha": "local"}, "counts that are not positive"),
        ("dps", {"prior_alpha": 0}, "counts that are not positive"),
        ("dps", {"prior_alpha": [[1, 1], [1, 1]]}, "it must be 3 x 3 finite numbers"),
        ("dps", {"prior_pi": [0.5, 0.6, 0.1]}, "sum to 1"),
        ("dps", {"prior_pi": "1"}, "'prior_pi' is '1'"),
        ("dps", {"entropy_weight": "high"}, "'entropy_weight' is 'high'"),
    ],
)
def test_refused_options(method, options, sentence):
    with pytest.raises(UserError) as error:
        build(method, **options)
    assert sentence in str(error.value)
    assert str(error.value).endswith((".", "'"))


@pytest.mark.parametrize(("name", "value"), [("num_prompts", 0), ("num_rollouts", 1), ("seed", -1), ("seed", 0.5)])
def test_refused_counts(name, value):
    with pytest.raises(UserError, match=f"selection {name} is {value}"):
        build_selector("dps", **({"num_prompts": 4, "num_rollouts": 8, "seed": 0} | {name: value}))


@pytest.mark.parametrize("alpha", [2, 0.5, "stability", [[1, 1, 0.01], [1, 1, 1], [0.01, 1, 1]]])
def test_accepted_alphas(alpha):
    selector = build(prior_alpha=alpha, prior_pi=(0.2, 0.5, 0.3))
    np.testing.assert_allclose(selector.predict(), [[0.2, 0.5, 0.3]] * 20)


@pytest.mark.parametrize(
    ("ids", "num_solved", "num_rollouts", "sentence"),
    [
        ([1, 1], [0, 0], [8, 8], "observed twice"),
        ([20], [0], [8], "ids holds 20; the rows of the prompts are 0 to 19"),
        ([-1], [0], [8], "ids holds -1"),
        ([3], [9], [8], "prompt 3 has 9 solved of 8 rollouts"),
        ([3], [-1], [8], "prompt 3 has -1 solved"),
        ([3], [0.5], [8], "num_solved must be a flat list of whole numbers"),
        ([3, 4], [1], [8], "must be of one length"),
    ],
)
def test_refused_observations_change_nothing(ids, num_solved, num_rollouts, sentence):
    selector = build()
    with pytest.raises(ValueError, match=sentence):
        selector.observe(ids, num_solved, num_rollouts)
    np.testing.assert_allclose(selector.predict(), 1 / 3)


def test_admit_all_takes_every_group_with_a_reward():
    admit = build_admission("all")
    assert [admit(0, 8), admit(3, 8), admit(8, 8), admit(0, 1), admit(0, 0)] == [
        True,
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(UserError, match="selection.admission is 'al'"):
        build_admission("al")
