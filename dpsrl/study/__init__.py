"""python -m dpsrl.study: what selection methods cost and bring, measured by many real runs with paired seeds.

`plan.py` says which runs there are, `runs.py` makes them, `record.py` keeps what matters of each, `analysis.py` has the
statistics, `tables.py` and `figures.py` what a person sees. Training itself is `dpsrl.train`, as in a sweep.
"""
