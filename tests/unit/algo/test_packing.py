import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.algo.packing import balance, lay_out, padding_share
from dpsrl.types import Sequence


def sequence(prompt_len, response_len, advantage=1.0, first_token=1):
    num_tokens = prompt_len + response_len
    logprobs = -np.arange(1, response_len + 1, dtype=np.float32)
    return Sequence(np.arange(first_token, first_token + num_tokens, dtype=np.int32), prompt_len, logprobs, advantage)


def test_one_micro_batch_by_hand():
    sequences = [sequence(1, 1, advantage=-0.5, first_token=5), sequence(3, 2, advantage=2.0, first_token=10)]
    [[[micro]]] = lay_out(sequences, num_ranks=1, num_updates=1, max_tokens=10, pad_token_id=0)
    assert micro.token_ids_BT.tolist() == [[10, 11, 12, 13, 14], [5, 6, 0, 0, 0]]  # longest first
    assert micro.lengths_B.tolist() == [5, 2]
    assert micro.loss_mask_BT.astype(int).tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert micro.attention_mask_BT.astype(int).tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert micro.advantages_B.tolist() == [2.0, -0.5]
    assert micro.rollout_logprobs_BT.tolist() == [[0, 0, 0, -1, -2], [0, -1, 0, 0, 0]]
    np.testing.assert_allclose(micro.weights_BT, [[0, 0, 0, 1 / 3, 1 / 3], [0, 1 / 3, 0, 0, 0]])
    assert micro.num_loss_tokens == 3
    assert padding_share([[[micro]]]) == pytest.approx(0.3)


def test_sequence_mean_weights_by_hand():
    sequences = [sequence(1, 1), sequence(3, 2)]
    [[[micro]]] = lay_out(sequences, 1, 1, max_tokens=10, pad_token_id=0, aggregation="sequence_mean")
    np.testing.assert_allclose(micro.weights_BT, [[0, 0, 0, 1 / 4, 1 / 4], [0, 1 / 2, 0, 0, 0]])


def test_updates_are_contiguous_and_ranks_short_of_work_get_dummies():
    sequences = [sequence(2, 3, advantage=float(i)) for i in range(5)]
    layout = lay_out(sequences, num_ranks=3, num_updates=2, max_tokens=5, pad_token_id=0)
    seen = [sorted(m.advantages_B[0] for rank in ranks for m in rank if m.num_loss_tokens) for ranks in layout]
    assert seen == [[0.0, 1.0], [2.0, 3.0, 4.0]]
    [[_], [_], [dummy]] = layout[0]
    assert (dummy.num_loss_tokens, dummy.weights_BT.sum(), dummy.token_ids_BT.shape) == (0, 0.0, (1, 2))
    assert dummy.attention_mask_BT.all()


def test_longest_first_to_the_emptiest_rank():
    lengths = np.array([7, 3, 5, 4, 6])
    assert balance(lengths, 2) == [
        [0, 3, 1],
        [4, 2],
    ]  # 7 | 6 -> 5 to the second -> 4 and 3 to the first: 14 and 11
    assert balance(np.array([9]), 3) == [[0], [], []]


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    lengths,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 200),
    st.sampled_from(["token_mean", "sequence_mean"]),
)
def test_every_layout_holds_every_sequence_once(lengths, num_ranks, num_updates, max_tokens, aggregation):
    num_updates = min(num_updates, len(lengths))
    sequences = [sequence(p, r, advantage=float(i)) for i, (p, r) in enumerate(lengths)]
    layout = lay_out(sequences, num_ranks, num_updates, max_tokens, pad_token_id=0, aggregation=aggregation)
    assert len(layout) == num_updates
    order = []
    for ranks in layout:
        assert len(ranks) == num_ranks
        assert len({len(rank) for rank in ranks}) == 1
        micro_batches = [micro for rank in ranks for micro in rank]
        assert sum(micro.weights_BT.sum() for micro in micro_batches) == pytest.approx(1.0, abs=1e-12)
        for micro in micro_batches:
            num_rows, width = micro.token_ids_BT.shape
            assert num_rows == 1 or num_rows * width <= max_tokens
            assert width == micro.lengths_B.max()
        order.append(sorted(int(a) for m in micro_batches if m.num_loss_tokens for a in m.advantages_B))
        rank_tokens = [sum(int(m.lengths_B.sum()) for m in rank if m.num_loss_tokens) for rank in ranks]
        longest = max(max(m.lengths_B) for m in micro_batches)
        assert max(rank_tokens) - min(rank_tokens) <= longest
    assert sum(order, []) == list(range(len(sequences)))
    assert max(map(len, order)) - min(map(len, order)) <= 1
    assert 0 <= padding_share(layout) < 1


def test_sorting_keeps_padding_low():
    lengths = np.random.default_rng(0).integers(10, 500, 512)
    sequences = [sequence(20, int(n)) for n in lengths]
    layout = lay_out(sequences, 4, 2, max_tokens=4096, pad_token_id=0)
    unsorted_cells = sum(8 * (lengths[i : i + 8].max() + 20) for i in range(0, 512, 8))
    unsorted_share = 1 - (lengths + 20).sum() / unsorted_cells
    assert padding_share(layout) < unsorted_share / 2.5


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (sequence(3, 0), "0 response tokens"),
        (sequence(0, 3), "0 prompt and 3 response"),
        (sequence(3, 2, advantage=float("nan")), "advantage nan"),
        (Sequence(np.arange(5), 3, np.zeros(3, np.float32), 1.0), "3 logprobs came with 2 response tokens"),
    ],
)
def test_unusable_sequences_are_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        lay_out([sequence(2, 2), bad], 1, 1, max_tokens=100, pad_token_id=0)


def test_refusals():
    with pytest.raises(ValueError, match="2 sequences cannot be split into 3 updates"):
        lay_out([sequence(2, 2)] * 2, 1, 3, max_tokens=100, pad_token_id=0)
    with pytest.raises(ValueError, match="'mean' is unknown; use one of: token_mean, sequence_mean"):
        lay_out([sequence(2, 2)], 1, 1, max_tokens=100, pad_token_id=0, aggregation="mean")
