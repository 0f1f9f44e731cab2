import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.selection import METHODS, build_selector
from dpsrl.selection.admission import build_admission
from dpsrl.selection.beliefs import BELIEFS
from dpsrl.selection.entries import Entries
from dpsrl.selection.picks import PICKS, Choices, GumbelTopK, top_k
from dpsrl.selection.scores import SCORES, diminished, entropy
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
    np.testing.assert_allclose(selector.predict(), selector.predict()[:1].repeat(20, axis=0))
    np.testing.assert_allclose(selector.predict().sum(axis=1), 1)
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


@pytest.mark.parametrize("diminish", [0.3, 0.5, 1.0, 2.0])
def test_what_was_met_often_is_worth_less_just_so_that_the_sum_is_largest(diminish):
    """Against all ways of sharing eight choices out."""
    value = np.array([0.9, 0.5, 0.4])

    def worth(uses):
        return sum(v * (np.arange(1, n + 1) ** -diminish).sum() for v, n in zip(value, uses, strict=True))

    uses = np.zeros(3, dtype=np.uint16)
    for _ in range(8):
        uses[np.argmax(diminished(value, uses, diminish))] += 1
    best = max(worth(shared) for shared in itertools.product(range(9), repeat=3) if sum(shared) == 8)
    assert worth(uses) == pytest.approx(best)


@pytest.mark.parametrize("method", ["dps", "forecast"])
def test_diminish_divides_the_score_by_uses(method):
    plain, less = (build(method, num_prompts=6, diminish=diminish) for diminish in (0.0, 0.5))
    for selector in (plain, less):
        selector.mark_selected([0, 1])
        selector.mark_selected([1])
        selector.observe(np.array([0, 1, 2]), np.array([4, 4, 4]), np.full(3, 8))
    np.testing.assert_allclose(less.score(), plain.score() / np.sqrt([2, 3, 1, 1, 1, 1]))
    np.testing.assert_array_equal(less.predict(), plain.predict())  # of what it predicts nothing changes


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


@pytest.mark.process
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


@pytest.mark.parametrize("num_picks", [2.5, "a", None, True, 0, -1])
def test_picks_that_are_no_count_are_refused(num_picks):
    with pytest.raises(UserError, match=f"num_picks is {num_picks!r}; it must be a whole number of at least 1"):
        build(num_prompts=10).select(num_picks)
    assert len(build(num_prompts=10).select(np.int64(3))) == 3


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
    assert run_steps(second, 50, 6, seed=2) == run_steps(first, 50, 6, seed=2)
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
        ("qqqq", {}, "selection method 'qqqq' is unknown; use one of: beta, dps, ema_variance"),
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
    with pytest.raises(UserError, match="selection admission 'al' is unknown"):
        build_admission("al")


# --- composition ----------------------------------------------------------------------------------------------


def test_pieces_can_be_exchanged_by_name():
    selector = build("dps", belief="beta", score="variance", pick="gumbel", temperature=0.2, decay=0.9, quota=0.5)
    assert len(set(run_steps(selector, 3, 6, seed=0)[0])) == 6


@pytest.mark.parametrize(
    ("method", "pieces", "sentence"),
    [
        (
            "dps",
            {"score": "variance"},
            "belief 'dirichlet_hmm', which has no expected variance",
        ),
        (
            "dps",
            {"pick": "thompson"},
            "belief 'dirichlet_hmm', which has no pass rates",
        ),
        ("ema_variance", {"score": "target"}, "use belief beta or kalman or logit_walk"),
        ("kalman", {"score": "optimistic"}, "has no uncertainty of the chance of a mixed group"),
        (
            "forecast",
            {"pick": "thompson"},
            "which has no value for a drawn pass rate",
        ),
        ("uniform", {"pick": "skipping"}, "has no chance of being kept; use belief streak"),
    ],
)
def test_impossible_combinations_are_refused(method, pieces, sentence):
    with pytest.raises(UserError) as error:
        build(method, **pieces)
    assert sentence in str(error.value)


@pytest.mark.parametrize("belief", BELIEFS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pick", PICKS)
def test_every_combination_works_or_is_refused(belief, score, pick):
    try:
        selector = build("dps", num_prompts=30, belief=belief, score=score, pick=pick)
    except UserError as error:
        assert "cannot work with" in str(error)
        return
    for ids in run_steps(selector, 12, 7, seed=0):
        assert len(set(ids)) == 7
    assert not {3, 4} & set(selector.select(28, exclude=[3, 4]).tolist())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_every_prompt_when_asked_for_all(method):
    selector = build(method, num_prompts=40)
    run_steps(selector, 10, 9, seed=0)
    assert sorted(selector.select(40)) == list(range(40))
    assert selector.coverage == 1.0


def test_the_quota_goes_to_prompts_never_selected():
    greedy, covering = build("dps", num_prompts=200), build("dps", num_prompts=200, quota=0.25)
    for selector in (greedy, covering):
        for _ in range(40):
            ids = selector.select(8)
            selector.observe(ids, np.full(8, 4), np.full(8, 8))  # all mixed: greed stays where it is
    assert greedy.coverage == 8 / 200
    assert covering.coverage == (8 + 39 * 2) / 200


def test_a_prompt_rests_as_long_as_others_are_left():
    selector = build("dps", num_prompts=40, rest=3)
    history = []
    for _ in range(30):
        ids = selector.select(8)
        assert not set(ids) & {i for past in history[-3:] for i in past}
        selector.observe(ids, np.full(8, 4), np.full(8, 8))
        history.append(ids.tolist())
    assert len(build("dps", num_prompts=10, rest=3).select(8)) == 8
    crowded = build("dps", num_prompts=10, rest=3)
    assert all(len(set(ids)) == 8 for ids in run_steps(crowded, 5, 8, seed=0))


# --- entries and picks ----------------------------------------------------------------------------------------


def test_a_selector_of_many_prompts_keeps_only_what_it_touched():
    selector = build("dps", num_prompts=300_000)
    run_steps(selector, 5, 100, seed=0)
    state = selector.state_dict()
    assert state["row"].size <= 501 and sum(array.nbytes for array in state.values()) < 100_000
    again = build("dps", num_prompts=300_000, seed=4)
    again.load_state_dict(state)
    assert run_steps(again, 5, 100, seed=1) == run_steps(selector, 5, 100, seed=1)


def test_fresh_rows_are_drawn_evenly():
    counts = np.zeros(60)
    for seed in range(600):
        entries = Entries(60)
        entries.touch(np.arange(0, 60, 10))
        rows = entries.draw_fresh(4, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == 4
        counts[rows] += 1
    assert counts[::10].sum() == 0
    touched = np.arange(60) % 10 == 0
    assert (abs(counts[~touched] - 600 * 4 / 54) < 34).all()  # 5 standard deviations


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_k_equals_sorting_all_prompts(data):
    values = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12)), dtype=float)
    num_fresh = data.draw(st.integers(0, 6))
    num_picks = data.draw(st.integers(1, max(1, num_fresh + values.size - 1)))
    if num_picks > num_fresh + values.size - 1:
        return
    picked = top_k(values, num_fresh, num_picks, np.random.default_rng(data.draw(st.integers(0, 9))))
    everyone = np.concatenate([np.full(num_fresh, values[0]), values[1:]])
    assert values[picked].tolist() == sorted(everyone, reverse=True)[:num_picks]
    own = picked[picked != 0]
    assert len(set(own.tolist())) == own.size and (picked == 0).sum() <= num_fresh


def test_top_k_of_millions_equals_sorting_them():
    rng = np.random.default_rng(0)
    for values in (rng.random(1_200_000), np.repeat(rng.random(12), 100_000), np.zeros(600_000)):
        picked = top_k(values, 0, 256, rng)
        assert values[picked].tolist() == np.sort(values[1:])[::-1][:256].tolist()
        assert np.unique(picked).size == 256 and 0 not in picked
    values, blocked = rng.random(150_000), np.arange(1, 140_001)
    assert top_k(values, 0, 100_000, rng).tolist() == (1 + np.argsort(-values[1:]))[:100_000].tolist()
    assert top_k(values, 0, 256, rng, blocked).tolist() == (140_001 + np.argsort(-values[140_001:]))[:256].tolist()


@pytest.mark.process
def test_gumbel_draws_follow_the_softmax():
    """First pick of scores 0, 0.1, 0.3 and two fresh prompts at 0.2: chances follow exp(score / T)."""
    score = np.array([0.2, 0.0, 0.1, 0.3])
    weight = np.exp(score / 0.1) * [2, 1, 1, 1]

    class Fixed:
        def __call__(self, belief, num_selected_E):
            return score

    choices = Choices(Fixed(), None, np.zeros(4), np.empty(0, dtype=np.int64), 2)
    rng, counts = np.random.default_rng(0), np.zeros(4)
    for _ in range(20_000):
        counts[GumbelTopK(temperature=0.1)(choices, 1, rng)] += 1
    np.testing.assert_allclose(counts / 20_000, weight / weight.sum(), atol=0.015)


def test_predictions_that_somebody_holds_do_not_change():
    selector = build(num_prompts=6)
    kept = [selector.predict()[:, 1]]
    for _ in range(4):
        selector.observe(np.array([0, 1]), np.array([4, 0]), np.full(2, 8))
        kept.append(selector.predict()[:, 1])
    copies = [values.copy() for values in kept]
    run_steps(selector, 3, 2, seed=0)
    selector.predict()
    for values, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(values, copy)
    assert len({float(values[0]) for values in kept}) == 5
    with pytest.raises(ValueError, match="read-only"):
        selector.predict()[0, 0] = 1.0


def test_history_resampling_leaves_out_what_was_all_correct():
    selector = build("history_resampling", num_prompts=12)
    selector.observe(np.arange(12), np.where(np.arange(12) < 4, 8, 3), np.full(12, 8))
    assert sorted(selector.select(8).tolist()) == list(range(4, 12))
    assert set(selector.select(4).tolist()) <= set(range(4, 12))


def test_greso_skips_what_never_has_a_spread():
    selector = build("greso", num_prompts=100)
    for _ in range(60):
        ids = selector.select(10)
        selector.observe(ids, np.where(ids < 50, 0, 4), np.full(10, 8))
    uses = selector.num_selected_N
    assert uses[50:].mean() > 2 * uses[:50].mean() and uses.min() >= 1


def test_forecast_finds_the_prompts_worth_rolling_out():
    rate = np.where(np.arange(2000) % 5 == 0, 0.5, 0.002)
    rng, selector, mixed = np.random.default_rng(0), build("forecast", num_prompts=2000), []
    for _ in range(40):
        ids = selector.select(64)
        solved = rng.binomial(8, rate[ids])
        selector.observe(ids, solved, np.full(64, 8))
        mixed.append(((solved > 0) & (solved < 8)).mean())
    assert np.mean(mixed[20:]) > 0.75
