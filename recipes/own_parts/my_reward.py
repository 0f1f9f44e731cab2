"""A reward: 1.0 and more counts as solved; the answer is what the data set gave with the prompt."""


def score(response: str, answer: dict) -> float:
    first, plus, second = response.strip().partition("+")
    if not (plus and first.isdecimal() and second.isdecimal()):
        return 0.0
    right = int(first) + int(second) == answer["target"]
    own_numbers = sorted([int(first), int(second)]) == sorted(answer["numbers"])
    return float(right and own_numbers)
