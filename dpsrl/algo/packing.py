"""Packs the groups of a step as updates x ranks x micro-batches, without padding and with every prompt held once.

numpy only; knows nothing of models, losses or processes.

A micro-batch is one line of tokens. A group's prompt stands in it once, followed by the responses to it, so that the
model's layers run over each prompt once instead of once a rollout. Only attention sees rows: row s is the prompt and
the response of rollout s, as indices into the line.

Axes: N tokens of the line, S rows (rollouts), M tokens of all rows end to end, L loss tokens (those of responses).

Every loss token has a weight, and an update has a total weight: its loss is sum(weight x token loss) / total, over all
micro-batches of all ranks. So it is the same whatever the layout, and its gradient too.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from dpsrl.types import TrainGroup

AGGREGATIONS = ("token_mean", "sequence_mean", "prompt_mean", "sequence_sum")


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once. Its fields travel, 8 bytes a token; indices are made where they are needed.

    Prompt [5, 6] with responses [8, 2] and [9]: token_ids [5, 6, 8, 2, 9], prompt_lengths [2], num_responses [2],
    response_lengths [2, 1]; hence position_ids [0, 1, 2, 3, 2], row_tokens [0, 1, 2, 3, 0, 1, 4], row_lengths [4, 3],
    predictor [1, 2, 1], target [8, 2, 9], row [0, 0, 1].
    """

    token_ids_N: np.ndarray  # int32
    prompt_lengths_P: np.ndarray  # int32
    num_responses_P: np.ndarray  # int32, which follow the prompt on the line
    response_lengths_S: np.ndarray  # int32
    rollout_L: np.ndarray  # float32, the logprob of each loss token when it was sampled
    weights_S: np.ndarray  # float32, of each loss token of a row, not normalised
    advantages_S: np.ndarray  # float32
    ids_S: np.ndarray  # int32, which rollout of the step a row is

    def __reduce__(self) -> tuple:  # without what was made of them
        return MicroBatch, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def num_loss_tokens(self) -> int:
        """0 marks a dummy: it takes part in the collectives of its rank and adds nothing."""
        return self.rollout_L.size

    @cached_property
    def row_lengths_S(self) -> np.ndarray:
        """int64, of prompt and response."""
        return np.repeat(self.prompt_lengths_P, self.num_responses_P).astype(np.int64) + self.response_lengths_S

    @cached_property
    def row_tokens_M(self) -> np.ndarray:
        """int64, the place on the line of each token of each row."""
        starts, lengths = np.stack([self._prompt_starts_S, self._response_starts_S], axis=1), self.response_lengths_S
        return ranges(starts.ravel(), np.stack([self.row_lengths_S - lengths, lengths], axis=1).ravel())

    @cached_property
    def position_ids_N(self) -> np.ndarray:
        """int64, from 0 in each row."""
        positions_N = np.empty(self.token_ids_N.size, dtype=np.int64)
        positions_N[self.row_tokens_M] = ranges(np.zeros_like(self.row_lengths_S), self.row_lengths_S)
        return positions_N

    @cached_property
    def predictor_L(self) -> np.ndarray:
        """int64, the place on the line whose output says what comes next: the token before, in its row."""
        predictor_L, has_any = self._places_L - 1, self.response_lengths_S > 0
        first = (np.cumsum(self.response_lengths_S) - self.response_lengths_S)[has_any]
        ends_S = self._prompt_starts_S + self.row_lengths_S - self.response_lengths_S
        predictor_L[first] = ends_S[has_any] - 1
        return predictor_L

    @cached_property
    def target_L(self) -> np.ndarray:
        """int64, the token that came."""
        return self.token_ids_N[self._places_L].astype(np.int64)

    @cached_property
    def row_L(self) -> np.ndarray:
        """int64, the row of each loss token."""
        return np.repeat(np.arange(self.response_lengths_S.size), self.response_lengths_S)

    @cached_property
    def weights_L(self) -> np.ndarray:
        return np.repeat(self.weights_S, self.response_lengths_S)

    @cached_property
    def _places_L(self) -> np.ndarray:
        return ranges(self._response_starts_S, self.response_lengths_S)

    @cached_property
    def _response_starts_S(self) -> np.ndarray:
        """Behind the prompts up to a response's own, and all responses before it."""
        prompts_S = np.repeat(np.cumsum(self.prompt_lengths_P), self.num_responses_P)
        return prompts_S + np.cumsum(self.response_lengths_S) - self.response_lengths_S

    @cached_property
    def _prompt_starts_S(self) -> np.ndarray:
        first_S = np.repeat(np.cumsum(self.num_responses_P) - self.num_responses_P, self.num_responses_P)
        return self._response_starts_S[first_S] - np.repeat(self.prompt_lengths_P, self.num_responses_P)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: the micro-batches of each rank, equally many (ZeRO-3 ranks keep step)."""

    ranks: list[list[MicroBatch]]
    total_weight: float  # what the loss is divided by: of all groups, those left out for want of a gradient too
    trained_weight: float  # of the loss tokens that are here
    num_rollouts: int = 0  # of all groups


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt with some or all of its group's responses: what a micro-batch is made of."""

    group: TrainGroup
    rollouts: range
    first_id: int  # of the group's first rollout
    weights: np.ndarray  # per rollout of the group, of each of its tokens

    @property
    def num_tokens(self) -> int:
        return self.group.prompt_token_ids.size + sum(self.group.responses[i].size for i in self.rollouts)


def lay_out(
    groups: Sequence[TrainGroup],
    num_ranks: int,
    num_updates: int,
    max_tokens: int,
    aggregation: str = "token_mean",
    max_response_tokens: int = 1,
    skip_constant: bool = False,
) -> list[Update]:
    """The updates of a step, on contiguous and equal shares of its groups (to within one).

    A micro-batch has at most `max_tokens` tokens; a longer rollout goes alone. Ranks short of micro-batches get
    dummies. max_response_tokens: what `sequence_sum` divides by. skip_constant: leaves out groups whose advantages are
    all 0, which is exact where the loss is advantage x something. ValueError with fewer groups than updates.
    """
    assert num_ranks >= 1 and num_updates >= 1 and max_tokens >= 1
    for group in groups:
        check_group(group)
    if len(groups) < num_updates:
        raise ValueError(f"{len(groups)} groups cannot be split into {num_updates} updates; lower the updates.")
    first_ids = np.cumsum([0, *(len(group.responses) for group in groups)])
    bounds = np.linspace(0, len(groups), num_updates + 1).round().astype(int)
    updates = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        weights, total_weight = loss_weights(groups[start:stop], aggregation, max_response_tokens)
        pieces, trained_weight = [], 0.0
        for group, first_id, group_weights in zip(groups[start:stop], first_ids[start:stop], weights, strict=True):
            if skip_constant and not group.advantages.any():
                continue
            pieces += cut(group, int(first_id), group_weights, max_tokens)
            trained_weight += sum(w * r.size for w, r in zip(group_weights, group.responses, strict=True))
        num_rollouts = sum(len(group.responses) for group in groups[start:stop])
        updates.append(Update(pack(pieces, num_ranks, max_tokens), total_weight, float(trained_weight), num_rollouts))
    return updates


def check_group(group: TrainGroup) -> None:
    """Refuses what would train on nothing or on NaN, with a sentence."""
    if not group.prompt_token_ids.size or not group.responses or not all(r.size for r in group.responses):
        sizes = [response.size for response in group.responses]
        raise ValueError(
            f"a group has {group.prompt_token_ids.size} prompt tokens and responses of {sizes} tokens: "
            "it needs one of each"
        )
    for response, logprobs in zip(group.responses, group.rollout_logprobs, strict=True):
        if logprobs.size != response.size:
            raise ValueError(f"{logprobs.size} logprobs came with {response.size} response tokens.")
    if len(group.advantages) != len(group.responses) or not np.isfinite(group.advantages).all():
        raise ValueError(
            f"advantages {group.advantages.tolist()} of {len(group.responses)} rollouts: "
            "leave out those without a reward"
        )


def loss_weights(
    groups: Sequence[TrainGroup], aggregation: str, max_response_tokens: int = 1
) -> tuple[list[np.ndarray], float]:
    """([weight of each loss token of each rollout, by group], what their weighted sum is divided by).

    token_mean:     1; loss tokens                  all tokens equal       (DAPO, arXiv 2503.14476, eq. 8)
    sequence_mean:  1 / response length; rollouts   all responses equal    (GRPO, arXiv 2402.03300, eq. 3)
    prompt_mean:    1 / the group's loss tokens; groups                    all prompts equal
    sequence_sum:   1 / max_response_tokens; rollouts                      (Dr. GRPO, arXiv 2503.20783, section 3.3)
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss aggregation {aggregation!r} is unknown; use one of: {', '.join(AGGREGATIONS)}.")
    lengths = [np.array([response.size for response in group.responses], dtype=np.float64) for group in groups]
    num_rollouts = float(sum(len(group.responses) for group in groups))
    if aggregation == "token_mean":
        return [np.ones_like(of_group) for of_group in lengths], float(sum(map(np.sum, lengths)))
    if aggregation == "sequence_mean":
        return [1.0 / of_group for of_group in lengths], num_rollouts
    if aggregation == "prompt_mean":
        return [np.full_like(of_group, 1.0 / of_group.sum()) for of_group in lengths], float(len(groups))
    return [np.full_like(of_group, 1.0 / max_response_tokens) for of_group in lengths], num_rollouts


def cut(group: TrainGroup, first_id: int, weights: np.ndarray, max_tokens: int) -> list[Piece]:
    """The group as pieces of at most `max_tokens` tokens, each with the prompt; one rollout at least in each."""
    pieces, start, size = [], 0, group.prompt_token_ids.size
    for place, response in enumerate(group.responses):
        if place > start and size + response.size > max_tokens:
            pieces.append(Piece(group, range(start, place), first_id, weights))
            start, size = place, group.prompt_token_ids.size
        size += response.size
    return [*pieces, Piece(group, range(start, len(group.responses)), first_id, weights)]


def pack(pieces: list[Piece], num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, the fullest first, so that a shortage of memory shows at once.

    Pieces go to the emptiest rank, longest first (Graham 1969: the fullest rank has at most 4/3 of the best possible),
    and there into the first micro-batch with room (first-fit decreasing).
    """
    sizes = np.array([piece.num_tokens for piece in pieces], dtype=np.int64)
    by_rank = []
    for mine in balance(sizes, num_ranks):
        bins: list[list[int]] = []
        rooms: list[int] = []
        for place in mine:
            fitting = next((i for i, room in enumerate(rooms) if room >= sizes[place]), None)
            if fitting is None:
                bins.append([place])
                rooms.append(max_tokens - int(sizes[place]))
            else:
                bins[fitting].append(place)
                rooms[fitting] -= int(sizes[place])
        by_rank.append([join([pieces[place] for place in places]) for places in bins])
    most = max(1, *(len(micro_batches) for micro_batches in by_rank))
    return [micro_batches + [dummy()] * (most - len(micro_batches)) for micro_batches in by_rank]


def balance(sizes: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Places of each rank, longest first, with nearly equal tokens per rank."""
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for place in np.argsort(-sizes, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        by_rank[rank].append(place)
        heapq.heappush(loads, (load + int(sizes[place]), rank))
    return by_rank


def join(pieces: list[Piece]) -> MicroBatch:
    tokens, logprobs, lengths = [], [], []
    for piece in pieces:
        mine = [piece.group.responses[i] for i in piece.rollouts]
        tokens += [piece.group.prompt_token_ids, *mine]
        lengths += [response.size for response in mine]
        logprobs += [piece.group.rollout_logprobs[i] for i in piece.rollouts]
    return MicroBatch(
        np.concatenate(tokens).astype(np.int32),
        np.array([piece.group.prompt_token_ids.size for piece in pieces], dtype=np.int32),
        np.array([len(piece.rollouts) for piece in pieces], dtype=np.int32),
        np.array(lengths, dtype=np.int32),
        np.concatenate(logprobs).astype(np.float32),
        np.concatenate([piece.weights[piece.rollouts] for piece in pieces]).astype(np.float32),
        np.concatenate([piece.group.advantages[piece.rollouts] for piece in pieces]).astype(np.float32),
        np.concatenate([np.array(piece.rollouts) + piece.first_id for piece in pieces]).astype(np.int32),
    )


def dummy() -> MicroBatch:
    """Two tokens that the model can run on and no loss is taken of."""
    none, zero = np.zeros(0, dtype=np.float32), np.zeros(1, dtype=np.float32)
    two, one, empty, nobody = (np.array([n], dtype=np.int32) for n in (2, 1, 0, -1))
    return MicroBatch(np.zeros(2, dtype=np.int32), two, one, empty, none, zero, zero, nobody)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: from each start as many numbers as its length, end to end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])


def shares(updates: Sequence[Update]) -> dict[str, float]:
    """Of the tokens that go through the model, those of no rollout (`padding`); of the tokens of all rows, those saved
    by holding each prompt once (`shared`).
    """
    micro_batches = [micro for update in updates for rank in update.ranks for micro in rank]
    run = sum(micro.token_ids_N.size for micro in micro_batches)
    padding = sum(micro.token_ids_N.size for micro in micro_batches if not micro.num_loss_tokens)
    rows = sum(int(micro.row_lengths_S.sum()) for micro in micro_batches if micro.num_loss_tokens)
    return {"padding": padding / run, "shared": 1.0 - (run - padding) / rows if rows else 0.0}
