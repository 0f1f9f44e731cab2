"""Records as `dpsrl.study.record` makes them, of runs that never were."""

import numpy as np


def made_record(setting, method, seed, accuracy=(0.2, 0.3, 0.4), rollouts=100, mixed=0.5, **changes):
    """An evaluation at each step; each step costs `rollouts`, half a second, and two tokens a rollout."""
    steps = np.arange(len(accuracy))
    record = {
        "setting": setting, "method": method, "seed": seed, "arguments": [f"seed={seed}"], "commits": ["0ddba11"],
        "configuration": "c0ffee", "batch": 10, "group_size": 8, "num_cores": 2, "busy_share": 0.0,
        "measure": "avg@4", "steps": int(steps[-1]), "num_rollouts": int(steps[-1]) * rollouts, "wall_s": 9.0,
        "num_restarts": 0,
        "curve": {
            "step": steps.tolist(), "accuracy": list(accuracy), "rollouts": (rollouts * steps).tolist(),
            "seconds": (0.5 * steps).tolist(), "tokens": (2 * rollouts * steps).tolist(),
            "whole_batches": (-(-rollouts // 80) * 80 * steps).tolist(),
        },
        "mixed_share": mixed, "mixed_T": [mixed] * int(steps[-1]), "response_tokens": 2.0, "coverage": 0.25,
        "coverage_chosen": 0.2, "uses_max": 3, "short_steps": 0, "num_missing": 0, "seconds": {}, "select_ms": 1.5,
        "selected": {"brier": 0.2, "base_brier": 0.25, "calibration_error": 0.1},
        "audit": {
            "all": {
                "num_K": [4, 0, 0, 0, 0, 0, 0, 0, 0, 4], "predicted_K": [0.2, 0, 0, 0, 0, 0, 0, 0, 0, 3.8],
                "mixed_K": [1, 0, 0, 0, 0, 0, 0, 0, 0, 3], "hits": 3, "alarms": 4, "mixed": 4, "squared_error": 1.7,
            },
            "seen": {
                "num_K": [0, 0, 0, 0, 0, 0, 0, 0, 0, 2], "predicted_K": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1.9],
                "mixed_K": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "hits": 1, "alarms": 2, "mixed": 1, "squared_error": 0.9,
            },
        },
    }  # fmt: skip
    return record | changes
