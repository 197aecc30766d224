"""Pages that are written by a script say what is true now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[1] / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_page", DOCS / f"{name}.py")
    assert spec and spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def test_the_tables_of_recipes_are_up_to_date() -> None:
    page = load("recipes")
    for language, file in (("en", "recipes.md"), ("zh", "recipes.zh.md")):
        assert (DOCS / file).read_text(encoding="utf-8") == page.table(language), (
            "run: python docs/recipes.py"
        )


def test_the_table_of_families_is_up_to_date() -> None:
    table = load("families").table()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == table, (
        "run: python docs/families.py"
    )
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert all(not row.endswith("| – |") for row in rows), "each is compared with something"
