"""Rows of tables, by number: a run over a million of them begins without reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raising import tune
from test_loop import PLAN

from herdbook.data import records
from herdbook.data.records import Conversation
from herdbook.tokens.table import Table, tabulate
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import fitting, loop
from herdbook.training.rows import Rows

WEIGHTS = {"w": torch.nn.Parameter(torch.zeros(2))}


@pytest.fixture
def tables(tmp_path: Path, tiny_folder: Path) -> list[tuple[str, Table]]:
    tokenizer = Tokenizer.load(tiny_folder)
    found = []
    for name, count in (("a", 9), ("b", 4)):
        records.write(
            tmp_path / name, [Conversation.of(f"{name} {n}", "x" * n) for n in range(1, count)]
        )
        table = tabulate(
            tmp_path / name, name, tokenizer, model=tiny_folder, length=64, cache=tmp_path / "cache"
        )
        found.append((name, table))
    return found


def test_a_run_is_known_and_measured_without_reading_its_rows(
    tables: list[tuple[str, Table]], monkeypatch: pytest.MonkeyPatch
):
    rows = Rows.all(tables)
    sizes = [len(row.ids) for row in rows]
    monkeypatch.setattr(Table, "__getitem__", lambda *_: pytest.fail("a row was read"))
    assert loop.sizes_of(rows).tolist() == sizes
    few = rows.where(np.arange(len(rows)) != 3)
    others = [rows, few, Rows(tables, rows.chosen[::-1].copy()), Rows.all(tables[::-1])]
    marks = [loop.fingerprint(one, PLAN, WEIGHTS) for one in others]
    assert len(set(marks)) == len(marks)
    assert loop.fingerprint(Rows.all(tables), PLAN, WEIGHTS) == marks[0]


def test_the_fullest_pack_is_found_from_sizes_alone(
    tables: list[tuple[str, Table]], monkeypatch: pytest.MonkeyPatch
):
    rows = Rows.all(tables)
    how = tune(batch=3, pack=64, length=64)
    listed: Any = list(rows)
    assert fitting.fullest(rows, how) == fitting.fullest(listed, how)
    read = []
    right = Table.__getitem__
    monkeypatch.setattr(Table, "__getitem__", lambda *a: read.append(a) or right(*a))
    fitting.fullest(rows, how)
    assert len(read) == 3  # of the fullest step
