"""Before a model learns: show what it will learn, and refuse rows that would teach it wrong."""

from __future__ import annotations

from collections.abc import Sequence

from herdbook.errors import DataError
from herdbook.progress import Progress, RichProgress
from herdbook.tokens.chat import Rendering, show, show_plain
from herdbook.tokens.check import check_training_rows
from herdbook.tokens.tokenizer import Tokenizer


def before_training(
    named: Sequence[tuple[str, Rendering]], tokenizer: Tokenizer, progress: Progress
) -> None:
    """named: (where a row comes from, the row). DataError names the rows that are wrong."""
    if not named:
        raise DataError(
            "the datasets hold no row", rule="so there is nothing to learn", next="add rows"
        )
    names, rows = [name for name, _ in named], [row for _, row in named]
    check_training_rows(tokenizer, rows, names)
    trained, total = sum(sum(row.mask) for row in rows), sum(len(row.ids) for row in rows)
    progress.say(
        f"{len(rows):,} rows, {total:,} tokens, {trained:,} of them trained; "
        f"this is what the model will learn, in {names[0]}:"
    )
    if isinstance(progress, RichProgress):
        progress.console.print(show(rows[0], tokenizer))
    else:
        progress.say(show_plain(rows[0], tokenizer))
