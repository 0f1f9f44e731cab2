"""What is counted from groups.jsonl, against counting one group after the other."""

import json
import random

import numpy as np
import pytest

from dpsrl.report.figures import apart, ledger_parts, ledger_so_far
from dpsrl.report.history import calibration, flows, flows_over_time, read_history, wilson
from dpsrl.report.spending import expected_rounds, spending


def lines_of(num_steps=40, batch=15, num_prompts=60, seed=0):
    """Random groups, some without a reward or a prediction, the prompts of a step distinct."""
    draw, lines = random.Random(seed), []
    for step in range(1, num_steps + 1):
        for prompt in draw.sample(range(num_prompts), batch):
            num_rollouts = draw.choice([8, 8, 8, 7, 0])
            line = {"step": step, "prompt_id": f"id{prompt}", "policy_version": step - 1, "num_rollouts": num_rollouts}
            line |= {"num_solved": draw.choice([0, num_rollouts, draw.randint(0, num_rollouts)]), "admitted": True}
            lines.append(line | {"predicted": draw.choice([None, draw.random(), draw.random(), 1.0, 0.0])})
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_history(path)


def state_of(line):
    if line["num_rollouts"] == 0:
        return None
    share = line["num_solved"] / line["num_rollouts"]
    return "unsolved" if share == 0 else "solved" if share == 1 else "partial"


NAMES = ["unsolved", "partial", "solved"]


def counted_flows(lines, first=0, last=10**9):
    """By hand: a dictionary of each prompt's last state."""
    known, table = {}, {}
    for line in lines:
        state = state_of(line)
        if state is None:
            continue
        move = (known.get(line["prompt_id"], "unseen"), state)
        if first <= line["step"] <= last:
            table[move] = table.get(move, 0) + 1
        known[line["prompt_id"]] = state
    return [[table.get((before, after), 0) for after in NAMES] for before in ["unseen", *NAMES]]


def test_columns_are_the_lines(tmp_path):
    lines = lines_of()
    history = write(tmp_path / "groups.jsonl", lines)
    assert [history.prompt_ids[p] for p in history.prompt_G] == [line["prompt_id"] for line in lines]
    for column, name in ((history.step_G, "step"), (history.version_G, "policy_version"),
                         (history.num_solved_G, "num_solved"), (history.num_rollouts_G, "num_rollouts")):  # fmt: skip
        assert column.tolist() == [line[name] for line in lines]
    known = [None if np.isnan(p) else p for p in history.predicted_G]
    assert known == [line["predicted"] for line in lines] and history.num_unreadable == 0


@pytest.mark.parametrize("seed", range(5))
def test_flows_are_those_of_one_group_after_the_other(tmp_path, seed):
    lines = lines_of(seed=seed)
    history = write(tmp_path / "groups.jsonl", lines)
    assert flows(history).tolist() == counted_flows(lines)
    edges, tables = flows_over_time(history, num_windows=7)
    assert len(tables) <= 7 and tables.sum() == sum(state_of(line) is not None for line in lines)
    for first, after, table in zip(edges, edges[1:], tables):
        assert table.tolist() == counted_flows(lines, first, after - 1)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_against_counting_by_hand(tmp_path, seed):
    lines = lines_of(seed=seed)
    known = calibration(write(tmp_path / "groups.jsonl", lines))
    pairs = [(line["predicted"], state_of(line) == "partial") for line in lines
             if line["predicted"] is not None and state_of(line) is not None]  # fmt: skip
    assert known.brier == pytest.approx(sum((p - m) ** 2 for p, m in pairs) / len(pairs))
    share = sum(m for _, m in pairs) / len(pairs)
    assert known.base_brier == pytest.approx(sum((share - m) ** 2 for _, m in pairs) / len(pairs))
    error = 0.0
    for k in range(10):
        inside = [(p, m) for p, m in pairs if k / 10 <= p < (k + 1) / 10 or (k == 9 and p == 1.0)]
        assert known.num_groups_K[k] == len(inside)
        predicted, mixed = (sum(column) / len(inside) for column in zip(*inside))
        assert known.predicted_K[k] == pytest.approx(predicted) and known.mixed_K[k] == pytest.approx(mixed)
        assert 0 <= known.low_K[k] <= mixed <= known.high_K[k] <= 1
        error += abs(predicted - mixed) * len(inside) / len(pairs)
    assert known.error == pytest.approx(error)


def test_wilson_at_a_known_value():
    low, high = wilson(np.array([0.5, 0.0]), np.array([10, 10]))
    assert low == pytest.approx([0.2366, 0.0], abs=1e-4) and high == pytest.approx([0.7634, 0.2775], abs=1e-4)


@pytest.mark.parametrize("lines", [[], [{"step": 1}], None])
def test_no_groups(tmp_path, lines):
    if lines is not None:
        (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(tmp_path / "groups.jsonl")
    assert len(history) == 0 and flows(history).sum() == 0 and calibration(history) is None
    assert spending(history, [], 8, True) is None and history.num_unreadable == len(lines or [])


def test_lines_that_are_none_of_a_group_are_counted(tmp_path):
    good = lines_of(num_steps=1, batch=1)[0] | {"num_solved": 1, "num_rollouts": 8}
    wrong = [good | change for change in (
        {"prompt_id": None}, {"prompt_id": "x" * 1000}, {"num_solved": 9}, {"num_solved": -1}, {"num_rollouts": 8.0},
        {"step": True}, {"step": 2**40}, {"admitted": "yes"}, {"policy_version": None},
    )]  # fmt: skip
    odd = [good | {"predicted": value} for value in ("x", 1.5, -0.1, True, [0.5])]
    history = write(tmp_path / "groups.jsonl", [*wrong, *odd, good])
    assert history.num_unreadable == len(wrong) and len(history) == len(odd) + 1


# --- what other ways would have spent -----------------------------------------------------------------


def test_uniform_sampling_takes_one_over_the_share_of_random_prompts(tmp_path):
    """30 first groups a step, of which a third is mixed, and as many groups again of prompts that are always mixed."""
    lines = []
    for step in range(1, 6):
        for place in range(30):
            common = {"step": step, "policy_version": step, "num_rollouts": 8, "admitted": True, "predicted": 0.5}
            lines.append(common | {"prompt_id": f"new{step}-{place}", "num_solved": 4 if place % 3 == 0 else 0})
            if step > 1:
                lines.append(common | {"prompt_id": f"new1-{place}", "num_solved": 4})
    known = spending(write(tmp_path / "groups.jsonl", lines), [], batch=30, first_is_random=True)
    assert known.random_share_T == pytest.approx([1 / 3] * 5) and known.num_audit == 0
    assert known.mixed_T.tolist() == [10, 50, 90, 130, 170]
    assert known.run_T.tolist() == [8 * 30 * n for n in (1, 3, 5, 7, 9)]
    assert known.uniform_T == pytest.approx([8 * 3 * mixed for mixed in known.mixed_T])
    assert known.dynamic_T == pytest.approx(8 * expected_rounds(1 / 3, 30) * known.mixed_T)
    assert spending(write(tmp_path / "groups.jsonl", lines), [], 30, first_is_random=False) is None


def test_the_audit_counts_where_the_run_has_it(tmp_path):
    lines = lines_of(num_steps=6)
    records = [{"step": 3, "selection/audit_mixed_share": 0.25}, {"step": 5, "selection/audit_mixed_share": 0.5}]
    known = spending(write(tmp_path / "groups.jsonl", lines), records, batch=15, first_is_random=False)
    assert known.random_share_T.tolist() == [0.25] * 4 + [0.5] * 2 and known.num_audit == 6
    mixed = [sum(state_of(line) == "partial" for line in lines if line["step"] == step) for step in range(1, 7)]
    assert known.uniform_T[-1] == pytest.approx(8 * (sum(mixed[:4]) / 0.25 + sum(mixed[4:]) / 0.5))
    none = spending(
        write(tmp_path / "groups.jsonl", lines), [{"step": 1, "selection/audit_mixed_share": 0.0}], 15, True, 300
    )
    assert np.isfinite(none.uniform_T).all() and none.uniform_T[-1] == pytest.approx(8 * sum(mixed) * 1024)


def test_the_audit_takes_over_once_it_knows_as_much(tmp_path):
    lines = lines_of()
    records = [{"step": step, "selection/audit_mixed_share": 0.9} for step in range(3, 41)]
    known = spending(write(tmp_path / "groups.jsonl", lines), records, 15, True, num_audited=8)
    met = [len({g["prompt_id"] for g in lines if g["step"] <= step and state_of(g)}) for step in range(1, 41)]
    before = next(t for t in range(40) if t >= 2 and 8 * (t + 1) >= met[t])
    assert 2 < before < 10 and known.num_audit == 40 - before
    assert (known.random_share_T[before:] == 0.9).all() and (known.random_share_T[:before] < 0.7).all()


@pytest.mark.parametrize("share, batch", [(0.3, 64), (0.43, 64), (0.5, 20), (0.9, 256), (0.05, 16), (1.0, 8)])
def test_rounds_of_dynamic_sampling_against_simulating_them(share, batch):
    rng, counts = np.random.default_rng(0), []
    for _ in range(4000):
        mixed = rounds = 0
        while mixed < batch:
            mixed += rng.binomial(batch, share)
            rounds += 1
        counts.append(rounds)
    assert expected_rounds(share, batch) == pytest.approx(np.mean(counts), rel=0.02)


def test_labels_move_apart_as_little_as_needed():
    assert apart([0.9, 0.5, 0.1], 0.1, 0.0) == [0.9, 0.5, 0.1]
    assert apart([0.5, 0.48, 0.1], 0.1, 0.0) == pytest.approx([0.5, 0.4, 0.1])
    assert apart([0.05, 0.04, 0.02], 0.1, 0.02) == pytest.approx([0.22, 0.12, 0.02])
    assert apart([], 0.1, 0.0) == []


def test_the_ledger_is_the_account_and_else_what_the_steps_say():
    account = {"generated": 100, "trained": 60, "carried": 8, "dropped": {"missing": 2, "not mixed": 30}, "holds": True}
    parts = [("trained", 60), ("carried", 8), ("dropped: missing", 2), ("dropped: not mixed", 30)]
    assert ledger_parts(account) == parts and sum(num for _, num in parts) == account["generated"]
    for none in (None, [], {"trained": 1}, {"trained": 1, "dropped": [1]}):
        assert ledger_parts(none) == []
    records = [
        {"step": 1, "rollout/num_rollouts": 64},
        {"step": 2, "rollout/num_rollouts": 128, "rollout/num_trained": 96},
    ]
    assert ledger_so_far(records) == [("trained", 96), ("waiting or dropped", 32)]
    assert ledger_so_far([]) == [("trained", 0), ("waiting or dropped", 0)]
