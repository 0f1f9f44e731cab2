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
    first, second = controller.select(), controller.select()
    assert controller.in_flight == first + second
    indices = [index for index, _ in first + second]
    assert len(set(indices)) == 8
    assert all(isinstance(index, int) and predicted == pytest.approx(1 / 3) for index, predicted in first)
    with pytest.raises(UserError, match="cannot select 4 prompts: 2 of 10 are available"):
        controller.select()
    assert len(controller.select(2)) == 2


def test_a_prompt_that_came_back_waits_for_the_next_step():
    controller = build(num_prompts=5, batch=4)
    controller.admit(outcomes_of(controller.select(), [4, 4, 4, 4]))
    assert controller.in_flight == []
    [(refill, _)] = controller.select(1)
    controller.admit([Outcome(refill, 0, 8)])
    with pytest.raises(UserError, match="0 of 5 are available"):
        controller.select(1)
    controller.observe()
    assert len(controller.select()) == 4


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
        }
    )


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
    assert metrics == {"selection/coverage": 0.4, "selection/num_lost": 4, "selection/num_unscored": 0}


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
    with pytest.raises(UserError, match="selection.admission is 'none'"):
        Controller(["a"], 1, {"method": "dps"}, num_rollouts=8, seed=0, admission="none")
