"""Tables of the guide that are made from the code: mkdocs calls `on_page_markdown` for each page.

`<!-- table: metrics -->`, `<!-- table: configuration -->` and `<!-- table: recipes -->` in a page stand for them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from omegaconf import OmegaConf

from dpsrl.config import Config, config_dir, group_choices, schema_keys
from dpsrl.metrics import KEYS


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"<!-- table: (\w+) -->", lambda match: TABLES[match[1]](), markdown)


def metrics() -> str:
    rows = ["| key | unit | of a step | meaning |", "|---|---|---|---|"]
    rows += [f"| `{name}` | {key.unit} | {key.reduce} | {escaped(key.text)} |" for name, key in KEYS.items()]
    return "\n".join(rows)


def configuration() -> str:
    """A table for each part of the schema."""
    parts: dict[str, list[str]] = {}
    for name, item in schema_keys():
        parts.setdefault(name.rpartition(".")[0], []).append(
            f"| `{name}` | {default_of(item)} | {escaped(item.metadata['text'])}{range_of(item.metadata)} |"
        )
    head = "| key | default | meaning |\n|---|---|---|\n"
    return "\n\n".join(f"## {part or 'The run'}\n\n{head}" + "\n".join(rows) for part, rows in parts.items())


def default_of(item: dataclasses.Field) -> str:
    value = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    return "must be given" if value == "???" else "left to the method" if value is None else f"`{value!r}`"


def range_of(limits: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    bounds = [f"{words[kind]} {limits[kind]}" for kind in words if limits[kind] is not None]
    if limits["choices"]:
        bounds.append("one of " + ", ".join(f"`{choice}`" for choice in limits["choices"]))
    return f" ({', '.join(bounds)})" if bounds else ""


def recipes() -> str:
    """What each recipe file sets, beside the groups it chooses."""
    rows = ["| recipe | model | cluster | selection | steps | prompts per step |", "|---|---|---|---|---|---|"]
    for name in group_choices("recipe"):
        recipe = OmegaConf.to_container(OmegaConf.load(config_dir() / f"recipe/{name}.yaml"))
        chosen = {group.split("/")[-1]: choice for entry in recipe["defaults"] for group, choice in entry.items()}
        train = Config().train
        steps, batch = (recipe["train"].get(key, getattr(train, key)) for key in ("steps", "batch"))
        rows.append(
            f"| `{name}` | {chosen['model']} | {chosen['cluster']} | {chosen['selection']} | {steps} | {batch} |"
        )
    return "\n".join(rows)


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


TABLES = {"metrics": metrics, "configuration": configuration, "recipes": recipes}
