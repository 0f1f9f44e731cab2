"""How well a run predicted: .venv/bin/python recipes/analysis/calibration.py RUN/groups.parquet (see README.md)."""

import sys

import pandas

groups = pandas.read_parquet(sys.argv[1]).dropna(subset=["predicted", "state"])
groups["mixed"] = groups["state"] == "partial"
groups["bin"] = (10 * groups["predicted"]).astype(int).clip(upper=9) / 10
print("predicted against observed share of mixed groups")
print(groups.groupby("bin").agg(predicted=("predicted", "mean"), observed=("mixed", "mean"), groups=("mixed", "size")))

groups["next"] = groups.sort_values("step", kind="stable").groupby("prompt_id")["state"].shift(-1)
print("\nfrom one group of a prompt to its next")
print(pandas.crosstab(groups["state"], groups["next"], normalize="index").round(2))
