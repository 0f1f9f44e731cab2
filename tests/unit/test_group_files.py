"""Groups come back from the disk to the bit, and damaged ones as a sentence."""

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsrl.checkpoint import BrokenCheckpoint, read_state, write_state
from dpsrl.group_files import read_groups, write_groups
from dpsrl.types import Group, Rollout, Score

INT64 = st.integers(-(2**63), 2**63 - 1)
ANY_DOUBLE = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("d", struct.pack("Q", bits))[0])  # every NaN too


def tokens(max_size=6):
    return st.lists(st.integers(-(2**31), 2**31 - 1), max_size=max_size).map(lambda ids: np.array(ids, dtype=np.int32))


@st.composite
def rollouts(draw):
    token_ids = draw(tokens())
    bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(token_ids), max_size=len(token_ids)))
    logprobs = np.array(bits, dtype=np.uint32).view(np.float32)
    versions = draw(st.lists(st.tuples(INT64, INT64), max_size=3))
    return Rollout(token_ids, logprobs, draw(st.sampled_from(["stop", "length", "aborted\0", ""])), versions)


SCORES = st.none() | st.builds(Score, ANY_DOUBLE, st.booleans())
GROUPS = st.builds(
    Group, INT64, st.text(max_size=8) | st.just("\udcff\0"), tokens(), st.lists(rollouts(), max_size=4),
    st.lists(SCORES, max_size=4),
)  # fmt: skip


def bits(group):
    """All that a group holds, as plain values in which equal means the same bits and the same types."""

    def array(values):
        return values.dtype.str, values.shape, values.tobytes()

    return (
        group.index, type(group.index), group.prompt_id, array(group.prompt_token_ids),
        [(array(r.token_ids), array(r.logprobs), r.finish_reason, r.versions) for r in group.rollouts],
        [s if s is None else (struct.pack("d", s.reward), type(s.reward), s.correct, type(s.correct))
         for s in group.scores],
    )  # fmt: skip


@pytest.mark.process
@settings(max_examples=80, deadline=None)
@given(groups=st.lists(GROUPS, max_size=4))
def test_groups_come_back_to_the_bit(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("groups")
    write_groups(folder, groups)
    assert [bits(group) for group in read_groups(folder)] == [bits(group) for group in groups]


def example(index):
    rollouts = [
        Rollout(np.array([8, 2], dtype=np.int32), np.array([-0.1, -0.3], dtype=np.float32), "stop", [(4, 1), (5, 1)]),
        Rollout(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), "length", []),
    ]
    return Group(index, f"id{index}", np.array([5, 6, 7], dtype=np.int32), rollouts, [Score(0.1 + 0.2, True), None])


def test_what_comes_back_is_used_like_what_was_written(tmp_path):
    write_groups(tmp_path, [example(3), example(4)])
    group = read_groups(tmp_path)[1]
    assert (group.policy_version, group.num_solved, group.num_scored) == (4, 1, 1)
    np.testing.assert_array_equal(group.rewards_G, [0.1 + 0.2, np.nan])
    assert group.rollouts[0].versions == [(4, 1), (5, 1)]
    assert list(tmp_path.glob("*.npy")) and not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize("name", ["tokens", "num_rollouts", "version", "reward", "index"])
def test_arrays_that_do_not_fit_each_other_are_a_sentence(tmp_path, name):
    write_groups(tmp_path, [example(3), example(4)])
    array = read_state(tmp_path)[name]
    for wrong in (array[:-1], np.concatenate([array, array]), array.astype(np.uint8), array.reshape(1, -1)):
        write_state(tmp_path, {name: wrong, **plain(tmp_path)})
        with pytest.raises(BrokenCheckpoint, match=rf"is broken: {name}.npy of its groups (has|is not)"):
            read_groups(tmp_path)
    (tmp_path / f"{name}.npy").unlink()
    with pytest.raises(BrokenCheckpoint, match=f"missing or unknown entries: {name}$"):
        read_groups(tmp_path)


def plain(folder):
    return {key: value for key, value in read_state(folder).items() if not isinstance(value, np.ndarray)}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_rollouts": np.array([5, -1])}, "num_rollouts.npy of its groups holds negative lengths"),
        ({"num_rollouts": np.array([2**62, 2**62])}, f"has 4 entries where {2**63:,} belong"),
        ({"finish_reason": np.array([0, 2, 0, 1])}, "points outside of its list"),
        ({"prompt_ids": ["one"]}, "index.npy of its groups has 2 entries where 1 belong"),
        ({"prompt_ids": ["one", 2]}, "prompt_ids of its groups is not a list of texts"),
        ({"more": 1}, "missing or unknown entries: more"),
    ],
)
def test_values_that_cannot_be_are_a_sentence(tmp_path, change, words):
    write_groups(tmp_path, [example(3), example(4)])
    write_state(tmp_path, plain(tmp_path) | change)
    with pytest.raises(BrokenCheckpoint, match=words):
        read_groups(tmp_path)


@pytest.mark.process
def test_random_damage_is_a_sentence_or_groups(tmp_path):
    """Values may be flipped unseen here, which the manifest's hashes are for; nothing else may come of it."""
    write_groups(tmp_path, [example(3), example(4)])
    draw, refused = random.Random(1), 0
    for path in sorted(tmp_path.iterdir()):
        raw = path.read_bytes()
        for _ in range(20):
            place = draw.randrange(len(raw))
            path.write_bytes(raw[:place] + draw.randbytes(1) + raw[place + 1 :])
            try:
                assert len(read_groups(tmp_path)) == 2
            except BrokenCheckpoint as error:
                assert str(error).startswith(f"checkpoint {tmp_path} is broken: ") and "\n" not in str(error)
                refused += 1
        path.write_bytes(raw)
    assert refused > 50 and len(read_groups(tmp_path)) == 2


def test_what_is_no_group_is_not_written(tmp_path):
    group = example(3)
    group.rollouts[0].token_ids = np.array([2**40, 1])
    with pytest.raises(AssertionError, match="not all of these are int32"):
        write_groups(tmp_path, [group])
