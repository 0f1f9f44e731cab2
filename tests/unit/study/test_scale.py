"""The cost model against sums by hand, its limits, and the page against the constants."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpsrl.study import scale
from dpsrl.study.marks import markdown_of
from dpsrl.study.scale import CLUSTERS, MODELS, Cost, Method, Model, Step

ROOT = Path(__file__).parents[3]
ENTRIES = json.loads((ROOT / "docs/study/constants.json").read_text())
PUBLISHED = {name: entry["value"] for name, entry in ENTRIES.items()}
# Numbers that are easy to reckon with: a memory of 1 GB/s, a card of 1 TFLOP/s trained at half of that.
EASY = {
    "mixed_share_uniform": 0.25, "mixed_share_dps": 0.5, "train_share_of_peak": 0.5, "copy_gb_per_s": 1.0,
    "sync_fixed_s": 3.0, "memory_gb_per_s": 1.0, "generate_share_of_bandwidth": 1.0, "peak_tflops": 1.0,
    "gpu_memory_gb": 10.0, "nvlink_gb_per_s": 2.0, "network_gb_per_s": 1.0, "engine_memory_share": 0.5,
    "max_num_seqs": 8, "controller_128_ms": 20.0, "controller_8192_ms": 8084.0, "request_ms": 1.0, "rollouts_ms": 2.0,
    "lay_out_ms": 3.0, "update_ms": 4.0, "call_ms": 5.0, "request_mb": 1.0, "rollouts_mb": 10.0, "update_mb": 100.0,
}  # fmt: skip
TINY = Model("tiny", num_parameters=1e6, num_layers=2, hidden=10, kv_heads=1)
STEP = Step(prompts_per_gpu=2, num_rollouts=2, prompt_tokens=10, response_tokens=20, longest=30)
NO_OVERHEAD = {name: 0.0 for name in EASY if name.endswith("_ms") or name == "sync_fixed_s"} | {
    name: math.inf for name in ("nvlink_gb_per_s", "network_gb_per_s", "copy_gb_per_s")
}


def test_generating_reads_weights_once_a_decoding_step_and_the_cache_once_a_token():
    weights, cache = (
        30 * 2e6,
        8 * 20 * 20 * 1024,
    )  # 30 steps; 8 rollouts x 20 tokens x 20 in the cache, 1,024 bytes each
    assert scale.generate_s(TINY, STEP, 4, EASY) == pytest.approx((weights + cache) / 1e9)
    # Forty rollouts, eight at once: 40 x 20 / 8 = 100 decoding steps.
    assert scale.generate_s(TINY, STEP, 20, EASY) == pytest.approx((100 * 2e6 + 40 * 400 * 1024) / 1e9)
    # Memory for 5 GB - 2 MB of cache; 2,100,000 bytes leave room for 100,000, which is 4.88 rollouts of 20 tokens.
    small = EASY | {"gpu_memory_gb": 4.2e-3}
    steps = 40 * 20 / (100_000 / 20 / 1024)
    assert scale.generate_s(TINY, STEP, 20, small) == pytest.approx((steps * 2e6 + 40 * 400 * 1024) / 1e9)


def test_generating_is_bound_by_arithmetic_where_memory_is_fast():
    fast = EASY | {"memory_gb_per_s": 1e9}
    assert scale.generate_s(TINY, STEP, 4, fast) == pytest.approx(2 * 1e6 * 8 * 20 / 1e12)
    assert scale.generate_s(replace(TINY, gpus_per_engine=2), STEP, 4, fast) == pytest.approx(1e6 * 8 * 20 / 1e12)


def test_training_counts_a_prompt_once_and_attention_by_pairs():
    flop = 6 * 1e6 * 3 * (10 + 2 * 20) + 12 * 10 * 2 * (3 * 2 * 30**2 / 2)
    assert scale.train_s(TINY, STEP, 3, EASY) == pytest.approx(flop / 0.5e12)


def test_a_sync_passes_the_link_twice_and_is_copied_once():
    assert scale.sync_s(TINY, 8, EASY) == pytest.approx(3 + 2 * 2e6 / 2e9 + 2e6 / 1e9)
    assert scale.sync_s(replace(TINY, gpus_per_engine=4), 16, EASY) == pytest.approx(3 + 2 * 2e6 / 1e9 + 0.5e6 / 1e9)


def test_selection_follows_the_line_through_what_was_measured():
    assert scale.select_s(128, EASY) == pytest.approx(0.020)
    assert scale.select_s(8192, EASY) == pytest.approx(8.084)
    assert scale.select_s(1128, EASY) == pytest.approx(1.020)  # a millisecond a prompt
    assert scale.select_s(1, EASY) == pytest.approx(0.020)  # never below the smallest


def test_messages_of_a_step():
    one = scale.cost(TINY, 8, Method("dps", 0.5), replace(STEP, response_tokens=2048), EASY)  # 16 groups, 8 trained
    engines, generate = 4, one.parts["generate"]
    assert one.num_trained == 8
    assert one.parts["controller"] == pytest.approx((16 + 4) * 0.005)
    assert one.parts["store"] == pytest.approx(16 * 0.003 + 8 * 0.004 + engines * (generate + 4) * 0.005)
    assert one.parts["lay_out"] == pytest.approx(8 * 0.003)
    assert scale.store_gb(Method("dps", 0.5), 8, EASY) == pytest.approx((128 * 11 + 64 * 100) / 1e3)


def test_hours_and_gpu_hours_of_a_thousand_groups():
    one = Cost({"generate": 2.0, "train": 4.0, "sync": 1.2}, num_trained=100, num_gpus=8)
    assert (one.step_s, one.hours, one.gpu_hours) == pytest.approx((7.2, 0.02, 0.16))
    assert replace(one, ahead=True).step_s == pytest.approx(5.2)
    assert one.share("train") == pytest.approx(4 / 7.2)


def test_what_a_method_generates_and_trains_on():
    assert Method("dynamic", 0.25, refills=True).groups(128) == (512, 128)
    assert Method("dps", 0.5).groups(128) == (128, 64)
    paper = Method("dynamic", 0.3, refills=True, whole_batches=True)
    assert paper.rounds == 4 and paper.groups(128) == (512, 128)


def test_whole_batches_pay_for_the_longest_response_each_time():
    once, paper = (Method("dynamic", 0.25, refills=True, whole_batches=whole) for whole in (False, True))
    costs = [scale.cost(TINY, 8, method, STEP, EASY | {"max_num_seqs": 1e9}) for method in (once, paper)]
    cache = 32 * 20 * 20 * 1024  # of an engine: 64 groups on four, two rollouts each
    assert [one.parts["generate"] for one in costs] == pytest.approx([(n * 30 * 2e6 + cache) / 1e9 for n in (1, 4)])


def test_longer_responses_are_generated_and_not_trained_on():
    plain, longer = (scale.cost(TINY, 8, Method("dps", 0.5, longer=by), STEP, EASY) for by in (1.0, 1.5))
    assert longer.parts["generate"] > plain.parts["generate"] and longer.parts["store"] > plain.parts["store"]
    assert all(longer.parts[part] == plain.parts[part] for part in ("train", "lay_out", "select", "sync"))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_where_every_group_is_mixed_nothing_is_saved(model):
    constants = PUBLISHED | {"mixed_share_uniform": 1.0, "mixed_share_dps": 1.0}
    costs = {
        name: scale.cost(model, 64, method, Step(), constants) for name, method in scale.methods(constants).items()
    }
    assert scale.saving(costs["dps"], costs["dynamic"]) == scale.saving(costs["dps"], costs["uniform"]) == 0


def test_with_free_training_and_sync_rollouts_are_all_that_counts():
    """Where the cache is all that is read, groups cost the same each, and the saving is that of the shares."""
    constants = EASY | NO_OVERHEAD | {"train_share_of_peak": math.inf, "max_num_seqs": 1e9, "gpu_memory_gb": 1e9}
    weightless = replace(TINY, num_parameters=0.0)
    costs = {
        name: scale.cost(weightless, 8, method, STEP, constants) for name, method in scale.methods(constants).items()
    }
    assert costs["dps"].parts["sync"] == 0
    assert scale.saving(costs["dps"], costs["dynamic"]) == pytest.approx(1 - 0.25 / 0.5)
    assert scale.saving(costs["dps"], costs["uniform"]) == pytest.approx(1 - 0.25 / 0.5)


def test_with_free_generating_dynamic_sampling_is_never_beaten():
    constants = EASY | NO_OVERHEAD | {"memory_gb_per_s": math.inf}
    costs = {
        name: scale.cost(replace(TINY, num_parameters=0.0), 8, method, STEP, constants)
        for name, method in scale.methods(constants).items()
    }
    assert scale.saving(costs["dps"], costs["dynamic"]) == pytest.approx(0)


def test_a_limit_is_the_smallest_cluster_with_a_tenth():
    for part in scale.ONE_PLACE:
        size = scale.limit_gpus(MODELS[0], part, PUBLISHED)
        dps = scale.methods(PUBLISHED)["dps"]
        if math.isfinite(size):
            assert scale.cost(MODELS[0], size, dps, Step(), PUBLISHED).share(part) > 0.1
            assert size == 8 or scale.cost(MODELS[0], size // 2, dps, Step(), PUBLISHED).share(part) <= 0.1
    assert math.isinf(scale.limit_gpus(MODELS[0], "select", PUBLISHED | NO_OVERHEAD))


def test_every_constant_says_where_it_comes_from():
    for name, entry in ENTRIES.items():
        assert entry["value"] > 0 and entry["unit"] and entry["where"], name
        assert entry["from"] in ("measured", "derived", "data sheet", "setting"), name
        assert entry["from"] != "measured" or (entry["date"] and entry["command"]), name
    assert set(EASY) <= set(ENTRIES)


def test_measuring_keeps_units_and_replaces_values(tmp_path):
    path = tmp_path / "constants.json"
    scale.write_constants(path, {name: ENTRIES[name] for name in ("call_ms", "peak_tflops")})
    scale.record_measured(path, {"call_ms": 0.123456}, load=2.0)
    kept = json.loads(path.read_text())
    assert kept["call_ms"]["value"] == 0.123 and kept["call_ms"]["unit"] == ENTRIES["call_ms"]["unit"]
    assert "load 2.0" in kept["call_ms"]["where"] and kept["peak_tflops"] == ENTRIES["peak_tflops"]


@pytest.mark.parametrize(
    "damage", ["", "{}", "[]", "{", '{"peak_tflops": 7}', json.dumps(ENTRIES | {"peak_tflops": {"value": None}})]
)
def test_damaged_constants_and_a_page_that_is_gone_are_named(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs/study").mkdir(parents=True)
    scale.CONSTANTS.write_text(damage)
    assert scale.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpsrl.study.scale: docs/study/constants.json ") and "`git checkout docs/study/" in said
    scale.CONSTANTS.write_text(json.dumps(ENTRIES))
    assert scale.main([]) == 2 and "docs/results.md is not here" in capsys.readouterr().err
    scale.PAGE.touch()
    assert scale.main([]) == 0


def test_the_page_says_what_the_constants_give():
    page = (ROOT / "docs/results.md").read_text()
    assert scale.fill(page, ENTRIES) == page
    assert set(re.findall(r"<!-- scale: (\w+) -->", page)) == {*scale.tables(ENTRIES), "sentences"}
    assert scale.fill(page, ENTRIES | {"mixed_share_dps": ENTRIES["mixed_share_dps"] | {"value": 0.9}}) != page


def test_every_table_is_whole():
    for name, lines in scale.tables(ENTRIES).items():
        assert len({len(line) for line in lines}) == 1, name
        assert len({line.count("|") for line in markdown_of(lines).splitlines()}) == 1, name
    assert len(scale.savings(PUBLISHED)) == 1 + len(MODELS) * len(CLUSTERS)
