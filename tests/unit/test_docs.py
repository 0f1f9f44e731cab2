"""What README and guide tell people to type: every command is understood, every piece of Python runs or compiles."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpsrl.config import load_config
from dpsrl.sweep import plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
PAGES = [page for page in PAGES if page.name not in ("log.md", "decisions.md")]
PLACEHOLDERS = {"FILE.parquet": "x.parquet", "<run>": "quickstart-1", "NAME": "quickstart", "HOST:PORT": "head:6379"}


def blocks(page, *languages):
    """Fenced blocks of these languages; "" is a block without one."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page):
    """Command lines of the page's blocks, comments and continuation lines gone; what a program printed is left out."""
    for text in blocks(page, "", "bash", "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*$", "", line).strip().removeprefix("$ ")
            if re.match(r"(make|python|(\.\./\.\./)?\.venv/bin/python|[A-Z_]+=\S+ make) ", line + " "):
                yield line


pytestmark = pytest.mark.process

ALL = [pytest.param(line, id=f"{page.relative_to(ROOT)}: {line[:60]}") for page in PAGES for line in commands(page)]


def test_every_target_of_make_has_one_rule():
    text = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z-]+):", text, flags=re.M)
    assert sorted(rules) == sorted(re.search(r"^\.PHONY: (.*)$", text, flags=re.M)[1].split())


def test_there_are_commands_to_check():
    assert len(ALL) > 20


@pytest.mark.parametrize("line", ALL)
def test_a_command_is_understood(line):
    for name, value in PLACEHOLDERS.items():
        line = line.replace(name, value)
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) - {word for word in words if "=" in word} <= set(targets)
        return
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    module, arguments = words[2], words[3:]
    if "--help" in arguments or "..." in arguments:
        return
    if "-m" in arguments:
        plan([word for word in arguments if word != "-m"])
        return
    if module in ("dpsrl.train", "dpsrl.evaluate"):
        load_config(arguments, entry=module.removeprefix("dpsrl."))
        return
    known = set(re.findall(r"--[a-z-]+|\b[a-z_]+(?==)", help_of(module)))
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known, help_of(module)


@functools.cache
def help_of(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_site_is_built_and_no_link_in_it_is_broken(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stdout + done.stderr


READMES = [page for page in PAGES if page.name == "README.md"]


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_the_python_that_make_install_makes(page):
    """A bare `python` is another one, or none."""
    assert not re.findall(r"(?:^|`)python3? (?:-m |recipes/|scripts/)[^`\n]*", page.read_text(), flags=re.M)


def test_every_recipe_is_reached_from_the_guide():
    guide = (ROOT / "docs/recipes.md").read_text()
    names = {page.parent.name for page in PAGES if page.name == "README.md" and page.parent != ROOT}
    assert set(re.findall(r'--8<-- "recipes/(\w+)/README.md', guide)) == names


OWN_PARTS = """
from dpsrl.data.datasets import load_rows
from dpsrl.rewards import Scorer, try_function
from dpsrl.selection import build_selector

(rows, _), (heldout, _) = load_rows("my_data:train", max_bad_share=0), load_rows("my_data:heldout", max_bad_share=0)
assert len(rows) == 55 and len(heldout) == 8
assert try_function("my_reward:score", rows[0].answer, 10.0) == []
with Scorer("my_reward:score", deadline_s=10.0) as scorer:
    scores = scorer.score([(text, rows[0].answer) for text in ("2+2", "2+3", "\u00b2+2", "x", "")])
assert [score.reward for score in scores] == [1, 0, 0, 0, 0]
selector = build_selector("my_method:NearHalf", num_prompts=len(rows), num_rollouts=8, seed=0)
selector.observe([0, 1], [4, 8], [8, 8])
assert set(selector.select(54)) == set(range(55)) - {1}
"""


@pytest.mark.parametrize("where", ["README.md", "recipes/own_parts"])
def test_own_parts_are_accepted(where, tmp_path):
    if where == "README.md":
        for text in blocks(ROOT / where, "python"):
            if name := re.match(r"# (my_\w+\.py):", text):
                (tmp_path / name[1]).write_text(text)
        assert len(list(tmp_path.iterdir())) == 3
    folder = tmp_path if where == "README.md" else ROOT / where
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", OWN_PARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_compiles(page):
    for text in blocks(page, "python", "py"):
        compile(text, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


GUIDE = ROOT / "docs/other_trainers.md"
PROGRAMS = [text for text in blocks(GUIDE, "python") if "GRPOTrainer" not in text]


@pytest.mark.parametrize("program", PROGRAMS, ids=["loader", "numpy"])
def test_a_program_of_the_guide_runs(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
