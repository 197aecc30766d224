"""What Tune trains on: the rows of its datasets, those that are too long left out and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from herdbook.book.step import Bench
from herdbook.errors import ConfigError, DataError
from herdbook.tokens.chat import Rendering
from herdbook.tokens.table import KEEP, TALK, TEXT, Table, tabulate
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import check
from herdbook.training.objective import Anchor

if TYPE_CHECKING:
    from herdbook.training.tune import Tune


class Rows(Sequence[Rendering]):
    """Some rows of several tables, by number; read from disk when asked for."""

    def __init__(self, tables: Sequence[tuple[str, Table]], chosen: np.ndarray) -> None:
        """tables: datasets' names and rows; chosen: int64 [rows, 2] of (table, its row)."""
        self.tables, self.chosen = tables, chosen

    @classmethod
    def all(cls, tables: Sequence[tuple[str, Table]]) -> Rows:
        parts = [
            np.stack([np.full(len(table), which), np.arange(len(table))], axis=1)
            for which, (_, table) in enumerate(tables)
        ]
        return cls(tables, np.concatenate(parts).astype(np.int64))

    def column(self, name: str) -> np.ndarray:
        """A value of each row: its sizes, kinds or lines."""
        whole = [getattr(table, name) for _, table in self.tables]
        out = np.zeros(len(self), np.int64)
        for which, values in enumerate(whole):
            here = self.chosen[:, 0] == which
            out[here] = values[self.chosen[here, 1]]
        return out

    def where(self, wanted: np.ndarray) -> Rows:
        return Rows(self.tables, self.chosen[wanted])

    def name(self, number: int) -> str:
        which, row = self.chosen[number]
        name, table = self.tables[which]
        return f"{name} line {table.lines[row]}"

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return self.column("sizes")

    def fingerprint(self) -> str:
        """Hash of what decides every row and their order; none of them is read."""
        seen = hashlib.sha256("\n".join(table.key for _, table in self.tables).encode())
        seen.update(np.ascontiguousarray(self.chosen, "<i8").data)
        return seen.hexdigest()

    def counts(self) -> tuple[int, ...]:
        """How many rows each dataset has here."""
        return tuple(np.bincount(self.chosen[:, 0], minlength=len(self.tables)).tolist())

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> Rendering: ...
    @overload
    def __getitem__(self, number: slice) -> list[Rendering]: ...
    def __getitem__(self, number: int | slice) -> Rendering | list[Rendering]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        which, row = self.chosen[number]
        table = self.tables[which][1]
        found = table[int(row)]
        return Anchor(found.ids, found.mask) if table.kinds[row] == KEEP else found


def gather(how: Tune, bench: Bench, tokenizer: Tokenizer) -> tuple[Rows, int]:
    """All rows as ids and mask, checked and shown; how many were too long."""
    tables = [
        (
            dataset.ref,
            tabulate(
                dataset.path / "train.jsonl",
                dataset.id,
                tokenizer,
                model=bench.artifact("model").path,
                length=how.length,
                cache=bench.book.home / "cache" / "rows",
            ),
        )
        for dataset in bench.inputs["data"]
    ]
    rows = Rows.all(tables)
    if how.kind == "model" and (kept := rows.where(rows.column("kinds") == KEEP)):
        raise ConfigError(
            f"{kept.tables[kept.chosen[0, 0]][0]} holds rows to keep",
            rule=f"and {how.method} tuning has no base beside it to keep them by",
            next="set method to lora, or leave it out of data",
        )
    rows, dropped = _short(how, rows, bench)
    if how.mix and not min(rows.counts()):
        empty = rows.tables[int(np.argmin(rows.counts()))][0]
        raise DataError(
            f"no row of {empty} is left",
            rule="and a mixture takes some of each dataset",
            next=f"leave {empty} out of data and mix, or raise length",
        )
    kinds = rows.column("kinds")
    learnt, sizes = rows.where(kinds == TALK), rows.column("sizes")
    if learnt or not (kinds == TEXT).any():
        check.before_training(learnt, learnt.name, tokenizer, bench.progress)
    if text := int((kinds == TEXT).sum()):
        tokens = int(sizes[kinds == TEXT].sum())
        bench.progress.say(f"{text:,} rows of plain text, {tokens:,} tokens, all of them trained")
    if keep := int((kinds == KEEP).sum()):
        bench.progress.say(f"on {keep:,} rows it will stay what the base is")
    return rows, dropped


def _short(how: Tune, rows: Rows, bench: Bench) -> tuple[Rows, int]:
    """The rows of at most `length` tokens, and how many are longer."""
    sizes = rows.column("sizes")
    fits = sizes <= how.length
    long = [(rows.name(n), int(sizes[n])) for n in np.flatnonzero(~fits)[:5]]
    dropped = int((~fits).sum())
    if dropped and (how.too_long == "refuse" or not fits.any()):
        raise DataError(
            f"{dropped} of {len(rows)} rows have more than {how.length} tokens "
            f"({', '.join(f'{name}: {size}' for name, size in long)}"
            f"{', …' if dropped > len(long) else ''})",
            rule="and rows are never cut",
            next=f"raise length (the longest needs {sizes.max()})"
            + (", or set too_long to drop" if fits.any() else ""),
        )
    if dropped:
        bench.progress.say(f"left out {dropped} of {len(rows)} rows: more than {how.length} tokens")
    return rows.where(fits), dropped
