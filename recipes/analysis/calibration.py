"""How well a run predicted: .venv/bin/python recipes/analysis/calibration.py RUN/groups.parquet (see README.md)."""

import sys

import pandas

groups = pandas.read_parquet(sys.argv[1]).dropna(subset=["state"])
judged = groups.dropna(subset=["predicted"])
judged = judged.assign(mixed=judged["state"] == "partial", bin=(10 * judged["predicted"] // 1).clip(upper=9) / 10)
if len(judged):
    print("predicted against observed share of mixed groups")
    means = dict(predicted=("predicted", "mean"), observed=("mixed", "mean"), groups=("mixed", "size"))
    print(judged.groupby("bin").agg(**means))
else:
    print("this run's method predicts nothing")

groups["next"] = groups.sort_values("step", kind="stable").groupby("prompt_id")["state"].shift(-1)
print("\nfrom one group of a prompt to its next")
print(pandas.crosstab(groups["state"], groups["next"], normalize="index").round(2))
