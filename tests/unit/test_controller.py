import math

import numpy as np
import pytest

from dpsrl.controller import Controller, Outcome
from dpsrl.types import UserError


def build(num_prompts=10, batch=4, seed=0, **selector_config):
    config = {"method": "dps"} | selector_config
    return Controller([f"p{i}" for i in range(num_prompts)], batch, config, num_rollouts=8, seed=seed)


def outcomes_of(selected, num_solved):
    return [Outcome(index, solved, 8) for (index, _), solved in zip(selected, num_solved, strict=True)]


def run_step(controller, num_solved=(0, 3, 5, 8)):
    selected = controller.select()
    controller.admit(outcomes_of(selected, num_solved))
    return [index for index, _ in selected], controller.observe()


def test_select_marks_in_flight_and_never_selects_twice():
    controller = build()
    first, second = controller.select(), controller.select(4)
    assert controller.in_flight == first + second
    indices = [index for index, _ in first + second]
    assert len(set(indices)) == 8
    assert all(isinstance(index, int) and predicted == pytest.approx(1 / 3) for index, predicted in first)
    with pytest.raises(UserError, match="cannot select 4 prompts: 2 of 10 are available"):
        controller.select(4)
    assert len(controller.select(2)) == 2
    assert controller.select() == []  # more than a batch is under way


def test_a_prompt_that_came_back_waits_for_the_next_step():
    controller = build(num_prompts=5, batch=4)
    controller.admit(outcomes_of(controller.select(), [4, 4, 4, 4]))
    assert controller.in_flight == []
    [(refill, _)] = controller.select(1)
    controller.admit([Outcome(refill, 0, 8)])
    with pytest.raises(UserError, match="0 of 5 are available"):
        controller.select(1)
    controller.observe()
    assert len(controller.trained()) == 4
    assert len(controller.select()) == 3  # the fifth is carried over


def test_a_step_with_spare_prompts_ends_with_a_batch_and_the_rest_goes_on():
    config = {"method": "uniform"}
    controller = Controller([f"p{i}" for i in range(40)], 4, config, num_rollouts=8, seed=0, num_spare=3)
    selected = controller.select()
    assert len(selected) == 7
    controller.admit(outcomes_of(selected[:5], [4] * 5))
    metrics = controller.observe(ahead=True)
    assert (metrics["selection/num_carried"], metrics["selection/num_lost"]) == (1, 0)
    assert controller.trained() == sorted(index for index, _ in selected[:5])[:4]
    assert controller.in_flight == selected[5:]
    more = controller.select()
    assert len(more) == 4  # with one carried over and two in flight seven again
    controller.admit([Outcome(index, 4, 8, policy_version=0) for index, _ in selected[5:]])  # by the earlier weights
    controller.admit(outcomes_of(more[:1], [4]))
    controller.observe(ahead=True)
    carried = sorted(index for index, _ in selected[:5])[4:]
    assert controller.trained() == carried + sorted(index for index, _ in [*selected[5:], more[0]])


def test_groups_that_training_has_begun_on_are_in_the_batch():
    config = {"method": "uniform"}
    controller = Controller([f"p{i}" for i in range(40)], 2, config, 8, 0, admission="mixed", max_rounds=2)
    selected = [index for index, _ in controller.select()] + [index for index, _ in controller.select(2)]
    controller.admit([Outcome(index, 4, 8) for index in selected])
    begun = sorted(selected)[-2:]
    controller.observe(begun=begun)
    assert controller.trained() == begun


def test_nothing_is_learned_before_observe():
    controller = build()
    selected = controller.select()
    assert controller.admit(outcomes_of(selected, [4, 4, 0, 8])) == [True] * 4
    np.testing.assert_allclose(controller.selector.predict(), 1 / 3)
    controller.observe()
    partial = controller.selector.predict()[[index for index, _ in selected], 1]
    np.testing.assert_allclose(partial, [0.4, 0.4, 0.3, 0.3])  # one observation under flat counts


def test_metrics_by_hand():
    controller = build()
    _, metrics = run_step(controller, num_solved=(0, 3, 5, 8))
    # every prediction is 1/3: two mixed, (2/3)^2 each, and two that are not, (1/3)^2 each
    assert metrics == pytest.approx(
        {
            "selection/coverage": 0.4,
            "selection/num_lost": 0,
            "selection/num_unscored": 0,
            "selection/mixed_share": 0.5,
            "selection/brier": (2 * 4 / 9 + 2 * 1 / 9) / 4,
            "selection/num_generated": 4,
            "selection/num_trained": 4,
            "selection/num_carried": 0,
            "selection/num_unmixed": 0,
            "selection/uses_mean": 1,
            "selection/uses_max": 1,
        }
    )


def test_a_method_without_beliefs_shows_no_prediction():
    ids = [f"p{i}" for i in range(10)]
    controller = Controller(ids, 4, {"method": "uniform"}, num_rollouts=8, seed=0, num_audit=4)
    for _ in range(6):
        selected = controller.select()
        assert all(math.isnan(predicted) for _, predicted in selected)
        controller.admit(outcomes_of(selected, [0, 3, 5, 8]))
        metrics = controller.observe()
    assert metrics["selection/brier"] == pytest.approx((2 * 4 / 9 + 2 * 1 / 9) / 4)  # every run has it: of a third each
    assert metrics["selection/audit_mixed_share"] == 0.5
    assert not metrics.keys() & {"selection/audit_brier", "selection/audit_calibration"}


def test_lost_and_unscored_groups_are_no_evidence():
    controller = build()
    selected = controller.select()
    lost, unscored, partial, mixed_of_two = (index for index, _ in selected)
    admitted = controller.admit([Outcome(unscored, 0, 0), Outcome(partial, 1, 8), Outcome(mixed_of_two, 1, 2)])
    assert admitted == [False, True, True]
    metrics = controller.observe()
    assert (metrics["selection/num_lost"], metrics["selection/num_unscored"]) == (1, 1)
    assert metrics["selection/mixed_share"] == 1.0
    assert metrics["selection/brier"] == pytest.approx(4 / 9)
    np.testing.assert_allclose(controller.selector.predict()[[lost, unscored]], 1 / 3)
    assert controller.in_flight == []
    assert controller.occupancy() == {"unseen": 8, "unsolved": 0, "partial": 2, "solved": 0}


def test_a_step_in_which_nothing_comes_back():
    controller = build()
    controller.select()
    metrics = controller.observe()
    assert {name: value for name, value in metrics.items() if value} == {
        "selection/coverage": 0.4,
        "selection/num_lost": 4,
        "selection/uses_mean": 1,
        "selection/uses_max": 1,
    }
    assert controller.trained() == []


def test_occupancy_follows_the_last_observation():
    controller = build(num_prompts=4, batch=4)
    assert controller.occupancy() == {"unseen": 4, "unsolved": 0, "partial": 0, "solved": 0}
    run_step(controller, (0, 0, 2, 8))
    assert controller.occupancy() == {"unseen": 0, "unsolved": 2, "partial": 1, "solved": 1}
    run_step(controller, (8, 8, 8, 8))
    assert controller.occupancy() == {"unseen": 0, "unsolved": 0, "partial": 0, "solved": 4}


def test_the_order_of_coming_back_does_not_change_a_bit():
    histories = []
    for seed in (1, 2):
        controller = build(num_prompts=40, batch=30)
        arrival, history = np.random.default_rng(seed), []
        for _ in range(8):
            outcomes = [Outcome(index, index % 9, 8) for index, _ in controller.select()]
            for i in arrival.permutation(30):
                controller.admit([outcomes[i]])
            history.append(controller.observe())
        histories.append((history, {k: np.asarray(v).tolist() for k, v in controller.state_dict().items()}))
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ([(99, 0, 8)], "prompt 99 came back but is not in flight"),
        ([(None, 1, 8), (None, 1, 8)], "not in flight"),
        ([(None, 9, 8)], "0 <= num_solved <= num_scored"),
    ],
)
def test_refused_outcomes_record_nothing(outcomes, sentence):
    controller = build()
    selected = controller.select()
    in_flight = selected[0][0]  # stands for None
    with pytest.raises(ValueError, match=sentence):
        controller.admit([Outcome(in_flight if index is None else index, m, n) for index, m, n in outcomes])
    assert controller.in_flight == selected


def test_a_loaded_controller_goes_on_identically():
    first = build(seed=1)
    for _ in range(3):
        run_step(first)
    second = build(seed=50)
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        assert run_step(second) == run_step(first)
    assert second.occupancy() == first.occupancy()


def test_a_state_from_mid_step_has_the_whole_step_to_do_again():
    first = build()
    run_step(first)
    selected = first.select()
    first.admit([Outcome(selected[0][0], 4, 8)])
    second = build(seed=9)
    second.load_state_dict(first.state_dict())
    assert sorted(second.in_flight) == sorted(selected)

    first.admit(outcomes_of(selected[1:], (0, 3, 8)))
    second.admit(outcomes_of(selected, (4, 0, 3, 8)))
    assert second.observe() == first.observe()
    assert second.select() == first.select()


def test_states_of_other_prompts_or_versions_are_refused():
    controller = build()
    other = Controller([f"q{i}" for i in range(10)], 4, {"method": "dps"}, num_rollouts=8, seed=0)
    with pytest.raises(UserError, match="belongs to other prompts"):
        controller.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="another selection method"):
        controller.load_state_dict(build(method="uniform").state_dict())
    state = controller.state_dict()
    del state["last_state"]
    with pytest.raises(UserError, match="has keys"):
        controller.load_state_dict(state)


def test_refused_configurations():
    with pytest.raises(UserError, match="train.batch is 11, but the data set has 10 prompts"):
        build(batch=11)
    with pytest.raises(UserError, match="did you mean 'decay'"):
        build(dekay=0.5)
    with pytest.raises(ValueError, match="1 are repeated"):
        Controller(["a", "b", "a"], 1, {"method": "dps"}, num_rollouts=8, seed=0)
    with pytest.raises(UserError, match="selection admission 'none' is unknown"):
        Controller(["a"], 1, {"method": "dps"}, num_rollouts=8, seed=0, admission="none")


# --- admission of mixed groups: refill, cap, carry-over ----------------------------------------------------


def mixed_build(num_prompts=400, batch=8, max_rounds=4, method="uniform", **options):
    ids = [f"p{i}" for i in range(num_prompts)]
    return Controller(ids, batch, {"method": method}, 8, seed=0, admission="mixed", max_rounds=max_rounds, **options)


def mixed_step(controller, is_mixed, rng, one_by_one=True):
    """One step in which groups come back in random order; returns (indices rolled out, trained, metrics)."""
    waiting = [index for index, _ in controller.select()]
    rolled_out = list(waiting)
    while waiting:
        rng.shuffle(waiting)
        back = [waiting.pop()] if one_by_one else [waiting.pop() for _ in range(len(waiting))]
        controller.admit([Outcome(index, 4 if is_mixed(index) else 0, 8) for index in back])
        more = [index for index, _ in controller.refill()]
        waiting += more
        rolled_out += more
    metrics = controller.observe()
    return rolled_out, controller.trained(), metrics


def test_the_order_of_coming_back_changes_no_refill():
    rng = np.random.default_rng(5)
    mixed_N = rng.random(400) < 0.3
    histories = []
    for seed, one_by_one in ((1, True), (2, True), (3, False)):
        controller, arrival = mixed_build(max_rounds=20), np.random.default_rng(seed)
        steps = [mixed_step(controller, mixed_N.__getitem__, arrival, one_by_one) for _ in range(12)]
        histories.append((steps, {k: np.asarray(v).tolist() for k, v in controller.state_dict().items()}))
    assert histories[0] == histories[1] == histories[2]
    assert sum(len(rolled_out) for rolled_out, *_ in histories[0][0]) > 12 * 8 * 2  # there were refills


def test_carried_over_prompts_are_in_the_state():
    first = mixed_build(max_rounds=20)
    carried, rng = 0, np.random.default_rng(0)
    while not carried:
        *_, metrics = mixed_step(first, lambda index: index % 2 == 0, rng)
        carried = metrics["selection/num_carried"]
    second = mixed_build(max_rounds=20)
    second.load_state_dict(first.state_dict())
    steps = [mixed_step(c, lambda index: index % 2 == 0, np.random.default_rng(1)) for c in (first, second)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_refill_fills_the_batch_and_every_group_is_accounted_for(share, one_by_one):
    rng = np.random.default_rng(0)
    mixed_N = rng.random(400) < share
    controller = mixed_build(max_rounds=100)
    carried, wasted = [], 0
    for _ in range(25):
        rolled_out, trained, metrics = mixed_step(controller, mixed_N.__getitem__, rng, one_by_one)
        assert len(set(rolled_out)) == len(rolled_out) and not set(rolled_out) & set(carried)
        assert len(trained) == len(set(trained)) == 8 and mixed_N[trained].all()
        assert trained[: len(carried)] == carried[:8]
        ready = [*carried, *(i for i in rolled_out if mixed_N[i])]
        carried = [index for index in carried + sorted(rolled_out) if index in ready and index not in trained]
        assert metrics["selection/num_carried"] == len(carried)
        assert metrics["selection/num_generated"] == len(rolled_out)
        assert metrics["selection/num_unmixed"] == sum(not mixed_N[i] for i in rolled_out)
        wasted += len(carried)
    assert wasted / 25 < 8  # less than a batch waits at any time


def test_at_the_cap_it_trains_on_what_there_is():
    controller = mixed_build(max_rounds=3)
    rolled_out, trained, metrics = mixed_step(controller, lambda index: index < 20, np.random.default_rng(1))
    assert len(rolled_out) == 3 * 8
    assert sorted(trained) == sorted(i for i in rolled_out if i < 20)
    assert metrics["selection/num_trained"] == len(trained) < 8


@pytest.mark.parametrize("num_prompts", [8, 11, 400])
def test_nothing_is_ever_mixed(num_prompts):
    controller = mixed_build(num_prompts=num_prompts)
    for _ in range(300):
        rolled_out, trained, metrics = mixed_step(controller, lambda index: False, np.random.default_rng(0), False)
        assert trained == [] and len(rolled_out) == len(set(rolled_out)) == min(32, num_prompts)
        assert metrics["selection/num_unmixed"] == len(rolled_out)


def test_everything_is_mixed_asks_for_no_more_than_a_batch():
    controller = mixed_build()
    for _ in range(5):
        rolled_out, trained, _ = mixed_step(controller, lambda index: True, np.random.default_rng(0))
        assert len(rolled_out) == 8 and sorted(rolled_out) == trained


def test_all_has_no_refill():
    controller = build()
    controller.admit(outcomes_of(controller.select(), (0, 0, 0, 0)))
    assert controller.refill() == []


# --- lag, audit, prior knowledge ---------------------------------------------------------------------------


def test_a_late_group_enters_at_the_version_that_made_it():
    """Generation one step ahead: the belief is what it would be had the group come in time."""
    late, in_time = build(num_prompts=4, batch=1), build(num_prompts=4, batch=1)
    [(index, _)] = late.select()
    late.observe(ahead=True)  # the group is still being sampled
    assert [i for i, _ in late.in_flight] == [index]
    late.admit([Outcome(index, 4, 8, policy_version=0)])
    assert late.observe()["selection/mixed_share"] == 1.0
    in_time._take_off(np.array([index]), 0)
    in_time.admit([Outcome(index, 4, 8)])
    in_time.observe()
    in_time.observe()
    np.testing.assert_allclose(late.selector.predict(), in_time.selector.predict(), atol=1e-15)
    with pytest.raises(ValueError, match="the policy is at version 2"):
        late._take_off(np.array([index]), 0)
        late.admit([Outcome(index, 4, 8, policy_version=3)])


def test_audited_prompts_are_drawn_from_all_and_judged_apart():
    ids = [f"p{i}" for i in range(50)]
    controller = Controller(ids, 10, {"method": "dps"}, 8, seed=0, num_audit=4)
    counts = np.zeros(50)
    for step in range(200):
        selected = controller.select()
        assert len({index for index, _ in selected}) == 10
        counts[[index for index, _ in selected[-4:]]] += 1
        controller.admit([Outcome(index, 4 if index < 10 else 0, 8) for index, _ in selected])
        metrics = controller.observe()
        assert ("selection/audit_brier" in metrics) == (step >= 4)
    assert (abs(counts - 16) < 18).all()  # 200 draws of 4 of 50; the greedy picks are other prompts
    assert metrics["selection/audit_mixed_share"] == pytest.approx(
        0.2, abs=0.07
    )  # a random choice; the chosen have more
    assert metrics["selection/mixed_share"] > 0.5


def test_what_is_audited_is_told_and_so_is_what_had_been_scored_before():
    controller = Controller([f"p{i}" for i in range(30)], 10, {"method": "dps"}, 8, seed=0, num_audit=4)
    scored, expected = set(), []
    for _ in range(40):
        ids = [index for index, _ in controller.select()]
        controller.admit([Outcome(index, 4, 8 if index % 3 else 4) for index in ids])
        assert controller.audited(ids) == [False] * 6 + [True] * 4
        controller.observe()
        expected += [index in scored for index in sorted(ids[-4:])]
        scored |= set(ids)
    seen = controller.state_dict()["audit.judged"][:, 3]
    assert seen.tolist() == expected and 0 < sum(expected) < len(expected)


def test_an_anchor_pass_is_known_before_the_first_step():
    controller = build(num_prompts=40, batch=10)
    controller.anchor(np.arange(40), np.where(np.arange(40) < 10, 4, 0), np.full(40, 8))
    assert sorted(index for index, _ in controller.select()) == list(range(10))
    assert controller.selector.coverage == 0.25


def test_a_warm_start_matches_prompts_by_id():
    first = build(num_prompts=10, batch=10)
    run_step(first, [4 if i % 2 else 0 for i, _ in build(num_prompts=10, batch=10).select()])
    second = Controller([f"p{i}" for i in (12, 7, 3, 11, 4)], 2, {"method": "dps"}, 8, seed=5)
    assert second.warm_start(first.state_dict()) == 3
    old, new = first.selector.predict(), second.selector.predict()
    np.testing.assert_array_equal(new[[1, 2, 4]], old[[7, 3, 4]])
    np.testing.assert_array_equal(new[[0, 3]], 1 / 3)
    assert second.selector.coverage == 0
    with pytest.raises(UserError, match="another selection method"):
        mixed_build().warm_start(first.state_dict())


@pytest.mark.parametrize("num_rollouts", [2, 5, 16])
@pytest.mark.parametrize("method", ["dps", "forecast", "beta", "kalman", "ema_variance"])
def test_a_warm_start_may_have_other_groups_and_so_many_prompts_that_precision_is_single(method, num_rollouts):
    earlier = Controller([f"p{i}" for i in range(20)], 4, {"method": method}, 8, seed=0)
    earlier.anchor(np.arange(12), np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]), np.array([8] * 9 + [2, 4, 5]))
    earlier.anchor(np.arange(5), np.arange(5), np.full(5, 8))
    later = Controller([f"p{i}" for i in range(200_001)], 4, {"method": method}, num_rollouts, seed=1)
    assert later.warm_start(earlier.state_dict()) == 12
    belief, theirs = later.selector.belief, earlier.selector.belief
    if hasattr(belief, "rate"):  # of a prompt, whatever the number of rollouts that one asks about
        np.testing.assert_allclose(belief.rate()[1:], theirs.rate()[1:], atol=2e-3)
    ids = [index for index, _ in later.select()]
    later.admit([Outcome(index, 1, num_rollouts) for index in ids])
    later.observe()
    assert np.isfinite(later.selector.predict(ids)).all()
