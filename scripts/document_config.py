"""Writes docs/config.md, a table of all config fields, from the docstrings and defaults of the config's sections.

    python scripts/document_config.py

A test fails if the page is not what this script writes.
"""

import argparse
import dataclasses
import inspect
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mnist_flax.config import Config
from mnist_flax.data.augment import AUGMENTATIONS
from mnist_flax.data.registry import DATASETS
from mnist_flax.losses import LOSSES
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.layers import ACTIVATIONS, INITIALIZERS
from mnist_flax.optimizer import OPTIMIZERS, SCHEDULES

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRODUCTION = """# Config fields

```sh
python -m mnist_flax.main --config=configs/default.py --config.train.epochs=3 --config.model.widths="(16,32,64)"
```

Every field, its default and its meaning. A preset sets only what differs from these defaults; a run's `config.json`
holds the value of every field. `scripts/document_config.py` writes this page from the code.
"""
REGISTRIES: dict[str, Iterable[str]] = {
    "ACTIVATIONS": ACTIVATIONS,
    "DATASETS": DATASETS,
    "INITIALIZERS": INITIALIZERS,
    "LOSSES": LOSSES,
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULES": SCHEDULES,
}
HEAD = "| field | default | meaning |\n|---|---|---|"


def attributes(section: type) -> Iterator[tuple[list[str], str]]:
    """Yields the names and the text of each entry of the `Attributes:` in a class's docstring."""
    listed = (inspect.getdoc(section) or "").partition("Attributes:\n")[2]
    for entry in re.split(r"\n(?=  \S)", listed):
        names, _, text = entry.strip().partition(": ")
        if text:
            yield names.split(", "), re.sub(r"a key of `([A-Z]+)`", one_of, " ".join(text.split()))


def one_of(registry: re.Match[str]) -> str:
    """Returns the keys of a registry, instead of its name."""
    return ", ".join(f"`{name}`" for name in REGISTRIES[registry[1]])


def cell(value: Any) -> str:
    """Returns a value as code, in a cell of a table."""
    return f"`{value!r}`".replace("|", "\\|")


def rows(section: type, prefix: str) -> Iterator[str]:
    """Yields a line of a table for each entry of a section's docstring."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for names, text in attributes(section):
        fields = ", ".join(f"`{prefix}{name}`" for name in names)
        yield f"| {fields} | {', '.join(cell(defaults[name]) for name in names)} | {text} |"


def model_tables() -> Iterator[str]:
    """Yields the table of the fields that all model families share, then one for each family."""
    yield "## model\n"
    yield "`model.name` selects a family; the default is `cnn`. If you choose a family other than the preset's,"
    yield "all other model fields are reset to the defaults of that family. All families have these fields:\n"
    yield from (HEAD, *rows(ModelConfig, "model."))
    for name, family in MODELS.items():
        parent = family.__mro__[1]
        inherited = {field.name: field.default for field in dataclasses.fields(parent)}
        changed = [
            f"`{field.name}` is {cell(field.default)}"
            for field in dataclasses.fields(family)
            if field.name in inherited and inherited[field.name] != field.default
        ]
        own = list(rows(family, "model."))
        summary = " ".join((inspect.getdoc(family) or "").partition("\n\nAttributes:")[0].split())
        more = "" if parent is ModelConfig else " It has the fields of the family above."
        more += f" Its default for {', '.join(changed)}." if changed else ""
        yield f"\n### {name}\n\n{summary}{more}"
        yield from (("", HEAD, *own) if own else ())


def augment_table() -> Iterator[str]:
    """Yields the table of the augmentations."""
    yield "\n## augment\n\nEach field is the strength of an operation, drawn anew for every image; 0 turns it off.\n"
    yield "| field | range | strength |\n|---|---|---|"
    for name, entry in AUGMENTATIONS.items():
        yield f"| `augment.{name}` | 0 to {'below ' if entry.open_high else ''}{entry.high:g} | {entry.strength} |"


def page() -> str:
    """Returns the whole page."""
    lines = [INTRODUCTION, HEAD, *rows(Config, ""), ""]
    for field in dataclasses.fields(Config):
        if field.name == "model":
            lines += model_tables()
        elif field.name == "augment":
            lines += augment_table()
        elif field.name != "seed":
            lines += [f"\n## {field.name}\n", HEAD]
            lines += [*rows(field.default_factory, f"{field.name}."), ""]  # type: ignore[arg-type]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
