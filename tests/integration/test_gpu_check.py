"""The GPU check runs to its end on a CPU, at toy sizes: on a card it must not fail for a typing error."""

import json
import subprocess
import sys


def test_every_check_gives_its_figures(tmp_path):
    out = tmp_path / "check.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["agreement/float32/logprob"] == 0 and report["agreement/bfloat16_blocks/gradient"] < 0.1
    assert report["trainer/toy/tokens_per_s"] > 0 and report["sync/to_the_host_gb_per_s"] > 0
    assert report["posterior/selector_step_ms"] > 0 and report["math_1.5B"].startswith("left out")
