"""What must hold before a model learns from rows: each has something to learn, and learns to stop.

A model that never sees its end-of-turn token trained talks on and on; a doubled BOS is a text that no
server ever sends; a row without a trained token costs time and teaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from herdbook.errors import DataError
from herdbook.tokens.chat import Rendering
from herdbook.tokens.tokenizer import Tokenizer

_SHOWN = 5  # rows named in the message


def check_training_rows(
    tokenizer: Tokenizer, renderings: Sequence[Rendering], names: Iterable[str]
) -> None:
    """Raise DataError naming the rows that must not be trained on; `names` says where each is from."""
    wrong: dict[str, list[str]] = {}
    for rendering, name in zip(renderings, names, strict=True):
        for fault in faults(tokenizer, rendering):
            wrong.setdefault(fault, []).append(name)
    if not wrong:
        return
    told = []
    for fault, rows in wrong.items():
        shown = ", ".join(rows[:_SHOWN]) + (" …" if len(rows) > _SHOWN else "")
        told.append(f"{fault}: {len(rows):,} of {len(renderings):,} rows ({shown})")
    advice = {
        _NOTHING: "give each conversation an answer of the assistant",
        _NO_END: "mend the chat template: an assistant's turn must end with the end-of-turn token",
        _TWO_BOS: "take bos_token out of the chat template, or out of the data",
    }
    raise DataError(
        "; ".join(told),
        rule="cannot be trained on",
        next="; ".join(advice[fault] for fault in wrong),
    )


_NOTHING = "no trained token"
_NO_END = "end-of-turn not trained"
_TWO_BOS = "BOS doubled"


def faults(tokenizer: Tokenizer, rendering: Rendering) -> Iterator[str]:
    """What is wrong with one row, in words; nothing for a good one."""
    ids, mask = rendering.ids, rendering.mask
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        yield _TWO_BOS
    if not any(mask):
        yield _NOTHING
        return
    at = 0
    for trained, run in groupby(mask):
        size = len(list(run))
        if trained and not _ends(tokenizer, ids[at : at + size]):
            yield _NO_END
            return
        at += size


def _ends(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether an answer holds what the engine stops at: a token, or a text of the template's."""
    if not tokenizer.stop_ids.isdisjoint(ids):
        return True
    text = b"".join(tokenizer.token_bytes(id) for id in ids).decode("utf-8", errors="replace")
    return any(stop in text for stop in tokenizer.stop_strings)
