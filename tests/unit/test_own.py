"""Parts of a user's own: found from the working directory, and refused in one sentence that says what is expected."""

import shutil

import numpy as np
import pytest
import torch

from dpsrl.algo.losses import Rows, load_loss, policy_loss
from dpsrl.checkpoint import read_state, write_state
from dpsrl.config import config_dir, load_config, selector_config
from dpsrl.controller import Controller, Outcome
from dpsrl.data.datasets import Row, load_rows
from dpsrl.own import check_call, is_own, load_own
from dpsrl.rewards.scorer import try_function
from dpsrl.selection import build_selector
from dpsrl.simulate import Plan, main, parse, simulate
from dpsrl.types import UserError

MODULE = """
import numpy as np, torch

def rows():
    yield {"problem": "2+2?", "answer": np.int64(4)}
    yield "1+1?", "2"
    yield 3
    yield {"problem": "3+3?"}

def rows_of(path): return []
def no_rows(): return "text"
def huge():
    yield "1+1?", "2"
    yield "2+2?", {"target": 10**5000}
    yield "3+3?", 10**5000
    yield "4+4?", {1: 2, "b": 3}
def exits():
    yield "1+1?", "2"
    raise SystemExit(0)
def late():
    yield "1+1?", "2"
    raise OSError("gone")

def by_length(response, answer): return len(response) == len(answer)
def text(response, answer): return "1.0"
def broken(response, answer): return response.no_such_thing
def hanging(response, answer):
    while True: pass
def leaving(response, answer): raise SystemExit(3)
def picky(response, answer): return float(response.split("know")[1] == answer)

def loss(logprobs, old_logprobs, advantages, rows): return -advantages * logprobs
def summed(*arguments): return loss(*arguments).sum()
def detached(*arguments): return loss(*arguments).detach()
def infinite(logprobs, old_logprobs, advantages, rows): return advantages * (logprobs - old_logprobs).abs().log()
def raising(logprobs, old_logprobs, advantages, rows): return logprobs @ torch.zeros(3)

class Mine:
    def __init__(self, num_prompts, num_rollouts, *, smoothing=0.3):
        self.smoothing, self.num_steps = smoothing, 0
        self.rate = np.full(num_prompts, 0.5, dtype=np.float32)
        self.random = np.random.default_rng(0)
    def observe(self, ids, num_solved, num_rollouts):
        self.rate[ids] += self.smoothing * (num_solved / num_rollouts - self.rate[ids])
        self.num_steps += 1
    def score(self):
        return self.rate * (1 - self.rate) + 0.01 * self.random.random(self.rate.size)

class Predicting(Mine):
    score = None
    def predict(self):
        return np.stack([(1 - self.rate) / 2, np.full(self.rate.size, 0.5), self.rate / 2], axis=1)

class Deaf: pass
class Unbuilt(Mine):
    def __init__(self, num_prompts): pass
class Narrow(Mine):
    def observe(self, ids, num_solved): pass
class Short(Mine):
    def score(self): return np.zeros(3)
class Unsure(Predicting):
    def predict(self): return np.ones((self.rate.size, 3))
class Failing(Mine):
    def observe(self, *groups): raise KeyError("x")
class Keeping(Mine):
    def __init__(self, num_prompts, num_rollouts):
        super().__init__(num_prompts, num_rollouts)
        self.memory = {}
class Growing(Mine):
    def observe(self, *groups): self.smoothing = np.zeros(3)
class Late(Mine):
    def observe(self, *groups): self.last = groups[0].size
class Hiding(Mine):
    def score(self): return np.random.random(self.rate.size)
class Yielding(Mine):
    def observe(self, ids, num_solved, num_rollouts): yield
class Awaiting(Mine):
    async def score(self): return self.rate
class Leaving(Mine):
    def score(self): raise SystemExit(3)
class Empty(Mine):
    def score(self): return self.rate / np.where(self.rate > 0, np.nan, 1)
class Endless(Mine):
    def score(self): return self.rate + np.inf
class Placed(Mine):
    def __init__(self, num_prompts, num_rollouts, alpha=1.0, *others, smoothing=0.3, **more):
        super().__init__(num_prompts, num_rollouts, smoothing=smoothing)
        self.alpha = alpha

number = 3
"""


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """A folder with mine.py in it, found from the working directory alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work")
        (folder / "own_module.py").write_text(MODULE)
        (folder / "own_broken.py").write_text("import numpy\nnumpy.nothing\n")
        (folder / "own_needy.py").write_text("import no_such_package\n")
        (folder / "own_leaving.py").write_text("raise SystemExit(3)\n")
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", "")
        yield folder


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_counts_as_a_path():
    assert is_own("my_module:name") and is_own("package.module:name") and is_own("größe:maß")
    assert not any(map(is_own, ["name", "my_module:", ":name", "a/b:name", "a b:name", "1a:b", "a:b:c", 3, None]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_nowhere:f", "there is no module own_nowhere in /"),
        ("own_module.inner:f", "own_module.inner"),
        ("own_needy:f", "own_needy needs no_such_package, which is not installed"),
        ("own_broken:f", "failed on import with AttributeError: module 'numpy' has no attribute"),
        ("own_leaving:f", "failed on import with SystemExit: 3 (own_leaving.py, line 1)"),
        ("own_module:rwos", "own_module.py); did you mean 'rows'"),
    ],
)
def test_what_cannot_be_found(name, words):
    assert words in refusal(load_own, name, "part")


def test_what_cannot_be_called():
    assert "part is int, which cannot be called" in refusal(check_call, 3, "part", 1, "def f(x)")
    check_call(max, "part", 2, "")  # written in C, without a signature


def test_rows_of_a_function():
    rows, report = load_rows("own_module:rows")
    assert rows == [Row("2+2?", "4", 1), Row("1+1?", "2", 2)]
    for words in ("1 neither a mapping nor a pair of problem and answer (row 3)", "1 without an answer (row 4)"):
        assert words in report.sentences()[0]
    assert "larger share than data.max_bad_share=0.1" in refusal(load_rows, "own_module:rows", max_bad_share=0.1)


def test_answers_that_no_file_could_hold_are_dropped():
    rows, report = load_rows("own_module:huge")
    assert rows == [Row("1+1?", "2", 1)]
    assert report.dropped == {
        "with an answer that maps to what JSON cannot hold": [2, 4],
        "with a number of thousands of digits": [3],
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows_of", "takes (path) (missing a required argument: 'path'); write it as def rows_of(): with a return or"),
        ("no_rows", "returned str, not rows"),
        ("late", "failed after row 1 with OSError: gone (own_module.py, line"),
        ("exits", "failed after row 1 with SystemExit: 0 (own_module.py, line"),
    ],
)
def test_refused_data(name, words):
    assert words in refusal(load_rows, f"own_module:{name}")


@pytest.mark.process
def test_a_reward_is_tried_before_anything_is_started():
    assert try_function("own_module:by_length", "12", 5.0) == []
    assert "'1.0', not a Score, a bool or a finite number" in refusal(try_function, "own_module:text", "1", 5.0)
    (remark,) = try_function("own_module:picky", "1", 5.0)
    assert "IndexError" in remark and "missing, which is not 0" in remark


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "failed on both: AttributeError: 'str' object has no attribute 'no_such_thing' (own_module"),
        ("hanging", "failed on both: it took over 1 s; mend it"),
        ("leaving", "failed on both: SystemExit: 3 (own_module.py, line"),
    ],
)
def test_a_reward_that_scores_nothing_is_refused(name, words):
    assert words in refusal(try_function, f"own_module:{name}", "1", 1.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("summed", "returned a tensor () for 5 tokens; return a tensor with a loss for each"),
        ("detached", "has no gradient in the logprobs"),
        ("infinite", "is not finite on a tiny batch"),
        ("raising", "failed with RuntimeError"),
        ("by_length", "write it as def by_length(logprobs, old_logprobs, advantages, rows)"),
    ],
)
def test_refused_losses(name, words):
    assert words in refusal(load_loss, f"own_module:{name}")


def test_a_loss_is_corrected_weighted_and_summed_as_the_others():
    rows, (new, old, advantages) = Rows(torch.tensor([0, 0, 1]), 2), torch.randn(3, 3)
    weights, correction = torch.tensor([0.5, 0.5, 2.0]), torch.tensor([1.0, 2.0, 0.5])
    own, built_in = (
        policy_loss(new, old, advantages, weights, rows, kind, correction_L=correction)
        for kind in (load_loss("own_module:loss"), "reinforce")
    )
    assert own[0] == built_in[0] and own[1] == built_in[1]


def test_keys_without_effect_beside_own_parts():
    quickstart = ["+recipe=quickstart"]
    assert load_config([*quickstart, "selection.method=own_module:Mine"]).selection.decay is None  # is dps's
    assert "does not clip" in refusal(load_config, [*quickstart, "algo.loss=own_module:loss", "algo.clip_low=0.1"])
    assert "or my_module:function" in refusal(load_config, [*quickstart, "algo.loss=pppo"])
    data = ["data.train=own_module:rows", "eval.benchmarks=[countdown_of_mine:rows]"]
    assert load_config([*quickstart, *data]).eval.benchmarks == ["countdown_of_mine:rows"]
    for argument in ("data.split=test", "data.eval_dir=data", "data.countdown.num_test=3"):
        assert "no effect" in refusal(load_config, [*quickstart, *data, argument])


# --- selection ----------------------------------------------------------------------------------------


def test_options_of_any_name_reach_the_method():
    own = ["+recipe=quickstart", "selection.method=own_module:Placed"]
    config = load_config([*own, "selection.options.alpha=0.5", "selection.smoothing=0.2"])
    selector = build_selector(**selector_config(config), num_prompts=3, num_rollouts=4, seed=0)
    assert (selector.belief._object.alpha, selector.belief._object.smoothing) == (0.5, 0.2)
    assert load_config([*own, "selection.options={alpha:2,beta:[1]}"]).selection.options == {"alpha": 2, "beta": [1]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["selection.options.alpha=1"], "no effect: selection.method is none of your own"),
        (["selection.method=own_module:Mine", "selection.alpha=1"], "of your own is selection.options.alpha"),
        (["selection.method=own_module:Mine", "selection.options.decay=1"], "write selection.decay="),
        (["selection.method=own_module:Mine", "selection.options.seed=1"], "is given seed anyway"),
        (["selection.method=own_module:Mine", "selection.options=1"], "selection.options=1"),
    ],
)
def test_options_that_no_method_gets_are_refused(arguments, words):
    assert words in refusal(load_config, ["+recipe=quickstart", *arguments])


def test_a_method_from_the_command_line_leaves_the_options_of_the_recipes(tmp_path, monkeypatch):
    """A recipe whose method is the user's own."""
    shutil.copytree(config_dir(), tmp_path / "configs")
    recipe = (tmp_path / "configs/recipe/quickstart.yaml").read_text()
    mine = "selection:\n  method: own_module:Placed\n  options: {alpha: 2}\n"
    (tmp_path / "configs/recipe/mine.yaml").write_text(recipe.replace("train:\n", f"{mine}train:\n"))
    monkeypatch.setattr("dpsrl.config.config_dir", lambda: tmp_path / "configs")
    assert load_config(["+recipe=mine"]).selection.options == {"alpha": 2}
    assert load_config(["+recipe=mine", "selection.options.alpha=3"]).selection.options == {"alpha": 3}
    assert load_config(["+recipe=mine", "selection=dps"]).selection.options == {}
    other = ["+recipe=mine", "selection.method=own_module:Mine", "selection.options.beta=1"]
    assert load_config(other).selection.options == {"beta": 1}


def build(name="Mine", num_prompts=20, **options):
    return build_selector(f"own_module:{name}", num_prompts=num_prompts, num_rollouts=4, seed=0, **options)


def test_the_highest_scores_are_selected():
    selector = build()
    ids = np.arange(20)
    selector.observe(ids, np.where(ids < 5, 2, 4), np.full(20, 4))  # five at one half, the others solved
    assert set(selector.select(5)) == set(range(5))
    assert set(selector.select(5, exclude=[0, 1])) > {2, 3, 4}
    assert selector.coverage == 7 / 20
    np.testing.assert_allclose(selector.predict(), 1 / 3)
    assert not selector.predicts and build("Predicting").predicts


def test_a_prediction_alone_will_do():
    selector = build("Predicting")
    selector.observe(np.array([3]), np.array([4]), np.array([4]))
    np.testing.assert_allclose(selector.predict([3])[0], [0.175, 0.5, 0.325])
    assert selector.score().tolist() == [0.5] * 20


def test_pieces_and_options_go_with_it():
    assert build(smoothing=0.9).belief._object.smoothing == 0.9
    assert len(set(build(pick="gumbel", temperature=0.1, rest=2).select(7))) == 7
    placed = build("Placed", alpha=2.0, smoothing=0.9).belief._object
    assert (placed.alpha, placed.smoothing) == (2.0, 0.9) and build("Placed").belief._object.alpha == 1.0
    for options, words in (
        ({"quota": 0.1}, "'quota' has no effect"),
        ({"smoothin": 0.1}, "did you mean 'smoothing'"),
        ({"pick": "thompson"}, "no pass rates to draw from"),
        ({"score": "variance"}, "no expected variance"),
        ({"belief": "beta"}, "would leave nothing of method"),
    ):
        assert words in refusal(build, **options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "is function; it must be a class"),
        ("Deaf", "has nothing of what a method needs"),
        ("Unbuilt", "write it as def __init__(self, num_prompts, num_rollouts)"),
        ("Narrow", "write it as def observe(self, ids, num_solved, num_rollouts)"),
        ("Short", "score returned an array (3,); it must be (20,) finite numbers"),
        ("Unsure", "predict returned rows that are no probabilities"),
        ("Failing", "observe failed with KeyError: 'x' (own_module.py, line"),
        ("Keeping", "a checkpoint cannot hold its attribute memory, dict"),
        ("Growing", "attribute smoothing was float64 after __init__ and is float64 (3,) now"),
        ("Late", "attribute last was not there after __init__ and is int64 now"),
        ("Hiding", "does not go on alike after a restart"),
        ("Yielding", "observe is a generator, whose call runs none of it; write it as def observe(self, ids"),
        ("Awaiting", "score is a coroutine, whose call runs none of it; write it as def score(self)"),
        ("Leaving", "score failed with SystemExit: 3 (own_module.py, line"),
        ("Empty", "score returned an array (20,) that holds NaN; it must be (20,) finite numbers"),
        ("Endless", "score returned an array (20,) that holds inf; it must be"),
    ],
)
def test_refused_methods(name, words):
    assert words in refusal(build, name)


def controller(ids):
    config = {"method": "own_module:Mine"}
    return Controller(np.array(ids, dtype=np.uint64), 4, config, num_rollouts=4, seed=0, num_audit=1)


def play(control, num_steps):
    chosen = []
    for _ in range(num_steps):
        rows = [row for row, _ in control.select()]
        control.admit([Outcome(row, row % 5, 4) for row in rows])
        control.observe()
        chosen.append(rows)
    return chosen


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_been_stopped(tmp_path):
    whole, cut, resumed = (controller(range(100, 130)) for _ in range(3))
    chosen = play(whole, 8)
    assert play(cut, 5) == chosen[:5]
    write_state(tmp_path, cut.state_dict())
    resumed.load_state_dict(read_state(tmp_path))
    assert play(resumed, 3) == chosen[5:]


def test_a_warm_start_goes_by_prompt():
    earlier, later = controller(range(100, 130)), controller(range(150, 110, -1))
    play(earlier, 6)
    touched = np.flatnonzero(earlier.selector.num_selected_N)
    assert later.warm_start(earlier.state_dict()) == sum(row > 10 for row in touched)
    theirs, ours = (c.selector.belief._object.rate for c in (earlier, later))
    np.testing.assert_array_equal(ours[21:], theirs[:10:-1])  # ids 129 to 111
    np.testing.assert_array_equal(ours[:21], np.float32(0.5))
    assert not later.selector.num_selected_N.any()
    with pytest.raises(UserError, match="another selection method"):
        later.warm_start(Controller(list("abcd"), 2, {"method": "dps"}, 4, 0).state_dict())


def test_simulated_beside_the_others(capsys):
    plan = parse(["methods=uniform,own_module:Mine,own_module:Mine+mixed", "own_module:Mine.smoothing=0.6", "batch=16"])
    assert plan.options == {"own_module:Mine": {"smoothing": 0.6}}
    shares = {m: simulate("mid_heavy", m, 0, Plan(batch=64, steps=20)).mixed_share for m in plan.methods}
    assert shares["own_module:Mine"] > shares["uniform"]
    assert main(["methods=own_module:Absent"]) == 2
    assert "there is no Absent in own_module" in capsys.readouterr().err
