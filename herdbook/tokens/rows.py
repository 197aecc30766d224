"""Which tokens of an old vocabulary a new one's tokens are made of: what a model's new rows start from.

old: "▁The" 450, "中" 30275, "文" 30333      new: "▁The" 450, "中文" 32001
rows.of[450] = [450]                        the same token: its row is kept
rows.of[32001] = [30275, 30333]             new: the mean of its old pieces' rows
"""

from __future__ import annotations

from dataclasses import dataclass

from herdbook.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    of: list[list[int]]  # new id → old ids, in their order; empty where nothing of it is known
    same: dict[int, int]  # old id → the new id of the very same token

    @property
    def new(self) -> list[int]:
        """New ids of tokens that the old vocabulary does not have."""
        known = set(self.same.values())
        return [id for id in range(len(self.of)) if id not in known]


def rows(old: Tokenizer, new: Tokenizer) -> Rows:
    """Match the tokens by what they stand for, whatever kinds the two tokenizers are of."""
    known: dict[tuple[str, bytes], int] = {}
    for id in range(old.size):
        known.setdefault(_key(old, id), id)
    of: list[list[int]] = []
    same: dict[int, int] = {}
    for id in range(new.size):
        key = _key(new, id)
        if key[1] and key in known:
            of.append([known[key]])
            same.setdefault(known[key], id)
        else:
            other = known.get(("byte" if key[0] == "plain" else "plain", key[1]))
            of.append(old.codec.within(key[1]) if other is None else [other])
    return Rows(of, same)


def _key(tokenizer: Tokenizer, id: int) -> tuple[str, bytes]:
    """A token's kind and bytes. SentencePiece may spell a byte twice: as a fallback and as a piece."""
    kind = "plain"
    if id in tokenizer.special_ids:
        kind = "special"
    elif tokenizer.codec.fallback(id):
        kind = "byte"
    return kind, tokenizer.token_bytes(id)
