"""Lays the sequences of a step out as updates x ranks x micro-batches, with the loss weight of every token.

numpy only; knows nothing of models, losses or processes.

Axes: B rows of one micro-batch, T token positions, the width of the longest row; rows are padded
on the right. Every (B, T) array is about the token AT t: its logprob, whether it is a loss token.

A loss is sum over tokens of weight x per-token loss, and the weights are made here, once, from
the whole update. So the sum over the micro-batches of all ranks is the loss of the update
whatever the layout, and its gradient too. A backend that AVERAGES gradients over ranks (DeepSpeed,
DDP) needs the loss times the number of ranks; one that divides by the number of micro-batches,
times that too.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from dpsrl.types import Sequence

AGGREGATIONS = ("token_mean", "sequence_mean")
Layout = list[list[list["MicroBatch"]]]  # [update][rank][micro_batch]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together.

    Prompt [5, 6, 7] with response [8, 2], and prompt [5] with response [9]: token_ids
    [[5, 6, 7, 8, 2], [5, 9, 0, 0, 0]], lengths [5, 2], loss_mask [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]].
    """

    token_ids_BT: np.ndarray  # int64, pad_token_id beyond each row's length
    lengths_B: np.ndarray  # int64, prompt and response together
    loss_mask_BT: np.ndarray  # bool, True where the token is of a response
    advantages_B: np.ndarray  # float64, one per sequence
    weights_B: np.ndarray  # float64, the loss weight of each loss token of the row
    rollout_logprobs_BT: np.ndarray  # float32, 0 outside the loss mask

    @property
    def weights_BT(self) -> np.ndarray:
        """Loss weight of each token, float64, 0 outside the loss mask; they sum to 1 over an update."""
        return self.loss_mask_BT * self.weights_B[:, None]

    @property
    def attention_mask_BT(self) -> np.ndarray:
        """True where there is a token, bool."""
        return np.arange(self.token_ids_BT.shape[1]) < self.lengths_B[:, None]

    @property
    def num_loss_tokens(self) -> int:
        """0 marks a dummy: it takes part in the collectives of its rank and adds nothing."""
        return int(self.loss_mask_BT.sum())


def lay_out(
    sequences: list[Sequence],
    num_ranks: int,
    num_updates: int,
    max_tokens: int,
    pad_token_id: int,
    aggregation: str = "token_mean",
) -> Layout:
    """Micro-batches by [update][rank]; in an update every rank has equally many (ZeRO-3 ranks keep step).

    Updates are contiguous chunks of `sequences`, equal to within one. A micro-batch has at most
    `max_tokens` cells (rows x width); a longer sequence goes alone. Ranks short of micro-batches
    get dummies. ValueError when there are fewer sequences than updates, or a sequence is unusable.
    """
    assert num_ranks >= 1 and num_updates >= 1 and max_tokens >= 1
    if len(sequences) < num_updates:
        raise ValueError(f"{len(sequences)} sequences cannot be split into {num_updates} updates; lower the updates.")
    for sequence in sequences:
        check_sequence(sequence)
    bounds = np.linspace(0, len(sequences), num_updates + 1).round().astype(int)
    return [
        lay_out_update(sequences[start:stop], num_ranks, max_tokens, pad_token_id, aggregation)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def padding_share(layout: Layout) -> float:
    """Share of the cells that hold no token of any sequence, in [0, 1)."""
    micro_batches = [micro for ranks in layout for rank in ranks for micro in rank]
    num_cells = sum(micro.token_ids_BT.size for micro in micro_batches)
    num_tokens = sum(int(micro.lengths_B.sum()) for micro in micro_batches if micro.num_loss_tokens)
    return 1.0 - num_tokens / num_cells


def lay_out_update(
    sequences: list[Sequence], num_ranks: int, max_tokens: int, pad_token_id: int, aggregation: str
) -> list[list[MicroBatch]]:
    """The micro-batches of one update by rank, the widest first.

    So those that run at the same time are alike, and a shortage of memory shows at once.
    """
    weights = loss_weights(sequences, aggregation)
    lengths = np.array([sequence.token_ids.size for sequence in sequences])
    by_rank = []
    for rows in balance(lengths, num_ranks):
        batches = cut(rows, lengths, max_tokens)
        by_rank.append([join([sequences[i] for i in batch], weights[batch], pad_token_id) for batch in batches])
    most = max(len(micro_batches) for micro_batches in by_rank)
    return [micro + [dummy(pad_token_id) for _ in range(most - len(micro))] for micro in by_rank]


def loss_weights(sequences: list[Sequence], aggregation: str) -> np.ndarray:
    """Weight of each loss token of each sequence of one update, float64 (num_sequences,).

    token_mean:     1 / (loss tokens of the update), all tokens equal        (DAPO, arXiv 2503.14476, eq. 8)
    sequence_mean:  1 / (response length x sequences), all responses equal   (GRPO, arXiv 2402.03300, eq. 3)
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss aggregation {aggregation!r} is unknown; use one of: {', '.join(AGGREGATIONS)}.")
    num_response_tokens = np.array([sequence.token_ids.size - sequence.prompt_len for sequence in sequences])
    if aggregation == "token_mean":
        return np.full(len(sequences), 1.0 / num_response_tokens.sum())
    return 1.0 / (num_response_tokens * len(sequences))


def balance(lengths: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Rows of each rank, longest first, with nearly equal tokens per rank.

    Longest-processing-time rule (Graham 1969): each sequence, longest first, goes to the rank
    with the fewest tokens so far; the fullest rank has at most 4/3 of the best possible.
    """
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        by_rank[rank].append(row)
        heapq.heappush(loads, (load + int(lengths[row]), rank))
    return by_rank


def cut(rows: list[int], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Rows, longest first, cut into runs whose cells (first row x count) stay within `max_tokens`."""
    batches = []
    start = 0
    while start < len(rows):
        count = max(1, max_tokens // int(lengths[rows[start]]))
        batches.append(rows[start : start + count])
        start += count
    return batches


def join(sequences: list[Sequence], weights_B: np.ndarray, pad_token_id: int) -> MicroBatch:
    """One micro-batch of these sequences, padded to the longest."""
    lengths_B = np.array([sequence.token_ids.size for sequence in sequences], dtype=np.int64)
    shape = (len(sequences), int(lengths_B.max()))
    token_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    loss_mask_BT = np.zeros(shape, dtype=bool)
    rollout_logprobs_BT = np.zeros(shape, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        length = sequence.token_ids.size
        token_ids_BT[row, :length] = sequence.token_ids
        loss_mask_BT[row, sequence.prompt_len : length] = True
        rollout_logprobs_BT[row, sequence.prompt_len : length] = sequence.rollout_logprobs
    advantages_B = np.array([sequence.advantage for sequence in sequences], dtype=np.float64)
    return MicroBatch(token_ids_BT, lengths_B, loss_mask_BT, advantages_B, weights_B, rollout_logprobs_BT)


def dummy(pad_token_id: int) -> MicroBatch:
    """Two pad tokens that the model can run on and no loss is taken of."""
    shape = (1, 2)
    return MicroBatch(
        np.full(shape, pad_token_id, dtype=np.int64),
        np.array([2]),
        np.zeros(shape, dtype=bool),
        np.zeros(1),
        np.zeros(1),
        np.zeros(shape, dtype=np.float32),
    )


def check_sequence(sequence: Sequence) -> None:
    """Refuses what would train on nothing or on NaN, with a sentence."""
    num_response_tokens = sequence.token_ids.size - sequence.prompt_len
    if sequence.prompt_len < 1 or num_response_tokens < 1:
        raise ValueError(
            f"a sequence has {sequence.prompt_len} prompt and {num_response_tokens} response tokens; "
            "it needs one of each."
        )
    if sequence.rollout_logprobs.size != num_response_tokens:
        raise ValueError(f"{sequence.rollout_logprobs.size} logprobs came with {num_response_tokens} response tokens.")
    if not np.isfinite(sequence.advantage):
        raise ValueError(f"a sequence has advantage {sequence.advantage}; leave rollouts without a reward out.")
