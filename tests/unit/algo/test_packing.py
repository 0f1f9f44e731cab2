import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.algo.packing import AGGREGATIONS, balance, lay_out, loss_weights, shares
from dpsrl.types import TrainGroup


def group(prompt_len, *response_lens, advantages=None, first_token=1):
    responses, token = [], first_token + prompt_len
    for length in response_lens:
        responses.append(np.arange(token, token + length, dtype=np.int32))
        token += length
    logprobs = [-np.arange(1, response.size + 1, dtype=np.float32) for response in responses]
    prompt = np.arange(first_token, first_token + prompt_len, dtype=np.int32)
    made = np.ones(len(responses)) if advantages is None else np.array(advantages, dtype=np.float64)
    return TrainGroup(prompt, responses, logprobs, made)


def test_one_micro_batch_by_hand():
    groups = [group(1, 1, advantages=[-0.5], first_token=5), group(2, 2, 1, advantages=[2.0, -1.0], first_token=10)]
    [update] = lay_out(groups, num_ranks=1, num_updates=1, max_tokens=10)
    [[micro]] = update.ranks
    assert micro.token_ids_N.tolist() == [10, 11, 12, 13, 14, 5, 6]  # the larger group first, its prompt once
    assert micro.position_ids_N.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert micro.row_tokens_M.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert micro.row_lengths_S.tolist() == [4, 3, 2]
    assert micro.predictor_L.tolist() == [1, 2, 1, 5]
    assert micro.target_L.tolist() == [12, 13, 14, 6]
    assert micro.row_L.tolist() == [0, 0, 1, 2]
    assert micro.rollout_L.tolist() == [-1, -2, -1, -1]
    assert micro.weights_L.tolist() == [1, 1, 1, 1]
    assert micro.advantages_S.tolist() == [2.0, -1.0, -0.5]
    assert micro.ids_S.tolist() == [1, 2, 0]
    assert (update.total_weight, update.trained_weight) == (4.0, 4.0)
    assert shares([update]) == {"padding": 0.0, "shared": pytest.approx(1 - 7 / 9)}


def test_indices_do_not_travel():
    [update] = lay_out([group(100, *[900] * 8), group(200, *[400] * 8)], num_ranks=1, num_updates=1, max_tokens=10_000)
    for micro in (micro for rank in update.ranks for micro in rank):
        derived = ("position_ids_N", "row_tokens_M", "row_lengths_S", "predictor_L", "target_L", "row_L", "weights_L")
        before = {name: getattr(micro, name) for name in derived}
        sent = pickle.dumps(micro)
        assert len(sent) < 8 * micro.token_ids_N.size + 2000  # a token id and a logprob each
        for name, array in before.items():
            assert np.array_equal(getattr(pickle.loads(sent), name), array)


def test_weights_by_hand():
    groups = [group(1, 1, 3), group(3, 2)]
    by_kind = {kind: loss_weights(groups, kind, max_response_tokens=4) for kind in AGGREGATIONS}
    per_token = {kind: ([w.tolist() for w in weights], total) for kind, (weights, total) in by_kind.items()}
    assert per_token == {
        "token_mean": ([[1, 1], [1]], 6),
        "sequence_mean": ([[1, 1 / 3], [1 / 2]], 3),
        "prompt_mean": ([[1 / 4, 1 / 4], [1 / 2]], 2),
        "sequence_sum": ([[1 / 4, 1 / 4], [1 / 4]], 3),
    }


def test_updates_are_contiguous_and_ranks_short_of_work_get_dummies():
    groups = [group(2, 3, advantages=[i + 1.0]) for i in range(5)]
    updates = lay_out(groups, num_ranks=3, num_updates=2, max_tokens=5)
    seen = [sorted(m.advantages_S[0] for rank in u.ranks for m in rank if m.num_loss_tokens) for u in updates]
    assert seen == [[1.0, 2.0], [3.0, 4.0, 5.0]]
    [[_], [_], [dummy]] = updates[0].ranks
    assert (dummy.num_loss_tokens, dummy.token_ids_N.size) == (0, 2)
    assert shares(updates)["padding"] == pytest.approx(2 / 27)


def test_a_group_too_large_is_cut_and_its_prompt_repeated():
    [update] = lay_out([group(3, 4, 4, 4)], 1, 1, max_tokens=11)
    assert [micro.token_ids_N.size for micro in update.ranks[0]] == [11, 7]
    [update] = lay_out([group(3, 4, 4, 4)], 1, 1, max_tokens=1)  # each rollout alone
    assert [micro.row_lengths_S.tolist() for micro in update.ranks[0]] == [[7], [7], [7]]


def test_groups_without_a_gradient_can_be_left_out_and_still_count():
    groups = [group(2, 3, 3, advantages=[0, 0]), group(2, 3, 1, advantages=[1, -1])]
    [update] = lay_out(groups, 1, 1, 100, skip_constant=True)
    assert (update.total_weight, update.trained_weight) == (10.0, 4.0)
    assert [micro.ids_S.tolist() for micro in update.ranks[0]] == [[2, 3]]
    [update] = lay_out(groups[:1], 2, 1, 100, skip_constant=True)  # nothing is left
    assert [[micro.num_loss_tokens for micro in rank] for rank in update.ranks] == [[0], [0]]


def test_longest_first_to_the_emptiest_rank():
    sizes = np.array([7, 3, 5, 4, 6])
    # 7 | 6 -> 5 to the second -> 4 and 3 to the first: 14 and 11
    assert balance(sizes, 2) == [[0, 3, 1], [4, 2]]
    assert balance(np.array([9]), 3) == [[0], [], []]


shapes = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=12
)


@pytest.mark.process
@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 300), st.sampled_from(AGGREGATIONS))
def test_every_layout_holds_every_token_once(shapes, num_ranks, num_updates, max_tokens, aggregation):
    num_updates = min(num_updates, len(shapes))
    groups = [group(p, *rs, first_token=100 * i) for i, (p, rs) in enumerate(shapes)]
    updates = lay_out(groups, num_ranks, num_updates, max_tokens, aggregation, max_response_tokens=40)
    rows = [(g.prompt_token_ids, r) for g in groups for r in g.responses]
    seen = []
    for update in updates:
        assert len(update.ranks) == num_ranks and len({len(rank) for rank in update.ranks}) == 1
        micro_batches = [micro for rank in update.ranks for micro in rank if micro.num_loss_tokens]
        if aggregation != "sequence_sum":
            total = sum(float(micro.weights_L.sum()) for micro in micro_batches)
            assert total == pytest.approx(update.total_weight, rel=1e-6) == update.trained_weight
        for micro in micro_batches:
            assert micro.token_ids_N.size <= max_tokens or micro.ids_S.size == 1
            starts = np.cumsum(micro.row_lengths_S) - micro.row_lengths_S
            for place, row_id in enumerate(micro.ids_S.tolist()):
                prompt, response = rows[row_id]
                line = micro.row_tokens_M[starts[place] : starts[place] + micro.row_lengths_S[place]]
                assert micro.token_ids_N[line].tolist() == [*prompt, *response]
                assert micro.position_ids_N[line].tolist() == list(range(line.size))
                mine = micro.row_L == place
                assert micro.target_L[mine].tolist() == response.tolist()
                assert micro.predictor_L[mine].tolist() == line[prompt.size - 1 : -1].tolist()
                seen.append(row_id)
    assert sorted(seen) == list(range(len(rows)))


def test_ranks_have_nearly_equal_tokens_and_micro_batches_are_full():
    rng = np.random.default_rng(0)
    groups = [group(40, *rng.integers(10, 500, 8)) for _ in range(64)]
    [update] = lay_out(groups, 4, 1, max_tokens=8192)
    loads = [sum(micro.token_ids_N.size for micro in rank) for rank in update.ranks]
    assert max(loads) / min(loads) < 1.05
    needed = max(loads) / 8192
    assert len(update.ranks[0]) <= needed * 1.25 + 1
    assert shares([update])["padding"] < 0.001


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (group(3, 2, 0), "responses of \\[2, 0\\] tokens"),
        (group(0, 3), "0 prompt tokens"),
        (group(3, 2, advantages=[float("nan")]), "leave out those without a reward"),
        (group(3, 2, advantages=[1.0, 2.0]), "of 1 rollouts"),
        (TrainGroup(np.arange(3), [np.arange(2)], [np.zeros(3)], np.ones(1)), "3 logprobs came with 2 response tokens"),
    ],
)
def test_unusable_groups_are_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        lay_out([group(2, 2), bad], 1, 1, max_tokens=100)


def test_refusals():
    with pytest.raises(ValueError, match="2 groups cannot be split into 3 updates"):
        lay_out([group(2, 2)] * 2, 1, 3, max_tokens=100)
    with pytest.raises(ValueError, match="'mean' is unknown; use one of: token_mean, sequence_mean"):
        lay_out([group(2, 2)], 1, 1, max_tokens=100, aggregation="mean")
