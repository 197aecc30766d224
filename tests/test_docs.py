"""Pages that are written by a script say what is true now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_families_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("families_page", DOCS / "families.py")
    assert spec and spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    table = page.table()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == table, (
        "run: python docs/families.py"
    )
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert all(not row.endswith("| – |") for row in rows), "each is compared with something"
