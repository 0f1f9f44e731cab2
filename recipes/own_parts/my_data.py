"""Prompts: a function without arguments that returns or yields rows, as dicts or as (problem, answer)."""


def train():
    for a in range(2, 12):
        for b in range(a, 12):
            target = a + b
            yield f"{a} {b}={target}:", {"numbers": [a, b], "target": target}


def heldout():
    return [(f"1 {b}={1 + b}:", {"numbers": [1, b], "target": 1 + b}) for b in range(12, 20)]
