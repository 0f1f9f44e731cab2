"""The selection methods: each is a preset of belief x score x pick, whose pieces can be exchanged by name.

Owns the table of methods and the checks of what goes together. numpy only.
"""

from __future__ import annotations

import inspect
from typing import Any

from dpsrl.own import is_own
from dpsrl.selection.beliefs import BELIEFS
from dpsrl.selection.options import check_choice, check_count, nearest
from dpsrl.selection.own import OwnScore, OwnSelector, own_belief, rehearse
from dpsrl.selection.picks import PICKS
from dpsrl.selection.scores import SCORES
from dpsrl.selection.selectors import Selector
from dpsrl.types import UserError

# The pieces of each method, and the options in which it differs from its pieces' own defaults.
METHODS: dict[str, dict[str, Any]] = {
    "dps": {"belief": "dirichlet_hmm", "score": "partial", "pick": "top_k"},
    "forecast": {"belief": "logit_walk", "score": "optimistic", "pick": "top_k", "quota": 0.17},
    "uniform": {"belief": "none", "score": "least_selected", "pick": "top_k"},
    "history_resampling": {"belief": "last_group", "score": "resampled", "pick": "top_k"},
    "mopps": {"belief": "beta", "score": "target", "pick": "thompson", "decay": 1.0},
    "ema_variance": {"belief": "ema", "score": "variance", "pick": "top_k"},
    "beta": {"belief": "beta", "score": "variance", "pick": "top_k", "decay": 0.5},
    "kalman": {"belief": "kalman", "score": "partial", "pick": "top_k"},
    "greso": {"belief": "streak", "score": "least_visited", "pick": "skipping"},
}
PIECES: dict[str, dict[str, type]] = {"belief": BELIEFS, "score": SCORES, "pick": PICKS}
SELECTOR_OPTIONS = {"quota", "rest"}


def build_selector(
    method: str,
    *,
    num_prompts: int,
    num_rollouts: int,
    seed: int,
    belief: str | None = None,
    score: str | None = None,
    pick: str | None = None,
    **options: Any,
) -> Selector:
    """A selector of a published method, or of one with a piece exchanged.

    Example: `build_selector("dps", num_prompts=7500, num_rollouts=8, seed=0, decay=0.5)`.

    method: a key of METHODS, or `my_module:MyMethod`, a class as `selection.own` has it, which is tried out here;
    `belief`, `score` and `pick` replace its pieces, by name.
    num_rollouts: the usual size of a group, at least 2.
    options: what the chosen pieces take, and `quota`. Unknown ones, ones without effect, values out of range and
    pieces that do not go together are a UserError, so building a selector for one prompt is a check of a
    configuration.
    """
    own = is_own(method)
    if not own:
        check_choice("method", method, METHODS)
    elif belief is not None:
        raise UserError(f"selection belief {belief!r} would leave nothing of method '{method}'; leave it out.")
    check_count("num_prompts", num_prompts, 1)
    check_count("num_rollouts", num_rollouts, 2)
    check_count("seed", seed, 0)
    preset, pieces = preset_of_own(method) if own else (METHODS[method], PIECES)
    replaced = {"belief": belief, "score": score, "pick": pick}
    chosen = {piece: preset[piece] if name is None else name for piece, name in replaced.items()}
    for piece, name in chosen.items():
        check_choice(piece, name, pieces[piece])
    classes = {piece: pieces[piece][name] for piece, name in chosen.items()}
    check_options(options, method, chosen, classes, SELECTOR_OPTIONS - {"quota"} if own else SELECTOR_OPTIONS)
    check_fit(chosen, classes, pieces)
    used = SELECTOR_OPTIONS | options_of_all(classes)
    defaults = {name: value for name, value in preset.items() if name not in PIECES}
    options = {name: value for name, value in defaults.items() if name in used} | options
    parts = {piece: {k: options[k] for k in options_of(cls) & options.keys()} for piece, cls in classes.items()}

    def build() -> Selector:
        return (OwnSelector if own else Selector)(
            classes["belief"](num_prompts + 1, num_rollouts, **parts["belief"]),
            classes["score"](**parts["score"]),
            classes["pick"](**parts["pick"]),
            num_prompts,
            seed,
            **{name: options[name] for name in SELECTOR_OPTIONS & options.keys()},
        )

    if own:
        rehearse(build, num_prompts, num_rollouts)
    return build()


def preset_of_own(method: str) -> tuple[dict[str, Any], dict[str, dict[str, type]]]:
    """The preset of a user's own class, and all pieces with it among them."""
    belief = own_belief(method)
    scores = {method: OwnScore} if "score" in belief.methods else {}
    preset = {"belief": method, "score": method if scores else "partial", "pick": "top_k"}
    return preset, {"belief": BELIEFS | {method: belief}, "score": SCORES | scores, "pick": PICKS}


def options_of(cls: Any) -> set[str]:
    """The names of a piece's options: its keyword-only arguments."""
    if cls.__init__ is object.__init__:
        return set()
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def options_of_all(classes: dict[str, type]) -> set[str]:
    return {name for cls in classes.values() for name in options_of(cls)}


def check_options(
    options: dict[str, Any], method: str, chosen: dict[str, str], classes: dict[str, type], of_selector: set[str]
) -> None:
    """Refuses options that no piece knows, and options that the chosen pieces do not read."""
    used = of_selector | options_of_all(classes)
    known = used | SELECTOR_OPTIONS | {name for table in PIECES.values() for name in options_of_all(table)}
    for name in options:
        if name not in known:
            raise UserError(f"selection option {name!r} is unknown; {nearest(name, known | PIECES.keys())}.")
        if name not in used:
            pieces = ", ".join(f"{piece} '{choice}'" for piece, choice in chosen.items())
            raise UserError(f"selection option '{name}' has no effect with method '{method}' ({pieces}); remove it.")


def check_fit(chosen: dict[str, str], classes: dict[str, Any], pieces: dict[str, dict[str, type]]) -> None:
    """Refuses a score or pick with a belief that lacks what it reads."""
    belief, score, pick = classes["belief"], classes["score"], classes["pick"]
    needed = [("score", need, "belief", belief) for need in score.needs]
    needed += [("pick", need, "belief", belief) for need in pick.needs]
    needed += [("pick", need, "score", score) for need in pick.score_needs]
    for piece, need, giver, cls in needed:
        if not hasattr(cls, need):
            able = sorted(name for name, other in pieces[giver].items() if hasattr(other, need))
            raise UserError(
                f"selection {piece} '{chosen[piece]}' cannot work with {giver} '{chosen[giver]}', "
                f"which has no {WORDS[need]}; use {giver} {' or '.join(able)}."
            )


WORDS = {
    "own_score": "score of its own",
    "left_out": "memory of what was all correct",
    "visits": "count of turns",
    "visit": "count of turns",
    "keep": "chance of being kept",
    "rate": "expected pass rate",
    "variance": "expected variance",
    "spread": "uncertainty of the chance of a mixed group",
    "draw": "pass rates to draw from",
    "of_rate": "value for a drawn pass rate",
}
