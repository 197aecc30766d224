"""The user's own data, as a dataset in the book."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.step import Bench, Step, require
from herdbook.data import formats, records
from herdbook.data.records import Conversation
from herdbook.data.rows import need_file
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import sha256_once


@dataclass(frozen=True)
class Import(Step):
    """Read a file of conversations (Alpaca, ShareGPT, OpenAI messages; JSON, JSONL, .gz).

    A part is held out: it is never trained on, and the report asks whether the raised model predicts
    its answers better than the base did.
    """

    kind: ClassVar[str] = "dataset"
    data: str = ""  # the file
    limit: int = 0  # at most so many conversations, drawn by seed; 0: all
    heldout: float = 0.02  # the share that is kept from training, at most 200 conversations
    seed: int = 0

    def fingerprint(self) -> dict[str, str]:
        return {"data": sha256_once(Path(self.data))} if Path(self.data).is_file() else {}

    def check(self) -> None:
        require(self, "data")
        need_file(Path(self.data))
        if not 0 <= self.heldout < 1:
            raise ConfigError(
                f"heldout = {self.heldout}", rule="is no share from 0 to below 1", next="try 0.02"
            )
        if self.limit < 0:
            raise ConfigError(f"limit = {self.limit}", rule="is negative", next="0 means all")

    def make(self, bench: Bench) -> dict[str, Any]:
        parsed = formats.Parsed(format="")
        last: dict[bytes, int] = {}  # a conversation's hash → the last line that it stands in
        kept = 0
        for row in formats.stream(self.data, parsed):
            last[_hash(row)] = row.extra["line"]
            kept += 1
        order = list(range(len(last)))
        random.Random(self.seed).shuffle(order)
        order = order[: self.limit or None]
        count = min(round(len(order) * self.heldout), 200, len(order) - 1)
        if self.heldout and not count and len(order) > 1:
            count = 1
        held, train = set(order[:count]), set(order[count:])
        records.write(bench.out / "train.jsonl", self._rows(last, train))
        if held:
            records.write(bench.out / "heldout.jsonl", self._rows(last, held))
        for reason, number in parsed.skipped.most_common():
            bench.progress.say(f"  left out {number:,} rows: {reason}")
        for reason, number in parsed.trimmed.most_common():
            bench.progress.say(f"  shortened {number:,} rows: {reason}")
        return {
            "format": parsed.format,
            "rows": parsed.rows,
            "conversations": len(train),
            "heldout": len(held),
            "repeated": kept - len(last),
            "skipped": sum(parsed.skipped.values()),
            "trimmed": sum(parsed.trimmed.values()),
            **{_key("skipped", reason): n for reason, n in sorted(parsed.skipped.items())},
            **{_key("trimmed", reason): n for reason, n in sorted(parsed.trimmed.items())},
        }

    def _rows(self, last: Mapping[bytes, int], wanted: Container[int]) -> Iterator[Conversation]:
        """Those of the file's different conversations, read once more."""
        new = dict.fromkeys(last)
        for row in formats.stream(self.data, formats.Parsed(format="")):
            if (mark := _hash(row)) not in new:
                if mark not in last:
                    raise _changed(self.data)
                continue
            del new[mark]
            if len(last) - len(new) - 1 in wanted:
                yield Conversation(row.messages, {"line": last[mark]})
        if new:
            raise _changed(self.data)


def _changed(path: str) -> DataError:
    return DataError(f"{path}", rule="was changed while it was read", next="give the command again")


def _hash(row: Conversation) -> bytes:
    text = json.dumps([message.to_json() for message in row.messages])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _key(what: str, reason: str) -> str:
    """A metric's name: «skipped» for «an empty answer» → skipped_an_empty_answer."""
    return "_".join([what, *re.findall(r"\w+", reason.lower())])
