"""Before a model learns: show what it will learn, and refuse rows that would teach it wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from herdbook.errors import DataError
from herdbook.progress import Progress, RichProgress
from herdbook.tokens.chat import Rendering, show, show_plain
from herdbook.tokens.check import check_training_rows
from herdbook.tokens.tokenizer import Tokenizer


def before_training(
    rows: Sequence[Rendering], name: Callable[[int], str], tokenizer: Tokenizer, progress: Progress
) -> None:
    """name: tells where a row comes from. DataError names the rows that are wrong."""
    if not rows:
        raise DataError(
            "the datasets hold no row", rule="so there is nothing to learn", next="add rows"
        )
    check_training_rows(tokenizer, rows, map(name, range(len(rows))))
    trained, total = (
        sum(some) for some in zip(*((sum(r.mask), len(r.ids)) for r in rows), strict=True)
    )
    progress.say(
        f"{len(rows):,} rows, {total:,} tokens, {trained:,} of them trained; "
        f"this is what the model will learn, in {name(0)}:"
    )
    if isinstance(progress, RichProgress):
        progress.console.print(show(rows[0], tokenizer))
    else:
        progress.say(show_plain(rows[0], tokenizer))
