"""Prefix language models (ChatGLM-6B, GLM-130B): the context of a reply sees itself whole.

    ids     你   好   [gMASK]  <sop>  您   好
    sees    ├─ the context ─┤  itself and all before it
    place   0    1    2        2      2    2      where [gMASK] stands, in two dimensions
    block   0    0    0        1      2    3

A document's marks say where its context ends: at the first start mark (<sop>), which belongs to the
reply. Without one there is no context: every token sees itself and those before it. Marks that come
later change nothing, so what a reply says never moves the context that it answers.

Du et al., "GLM", 2022 (arXiv:2103.10360); Zeng et al., "GLM-130B", 2022 (arXiv:2210.02414).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from herdbook.model.config import DecoderConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What a document's marks say.

    tokens: so many stand before the start mark, see one another, and are seen by every row.
    reply: the place of all tokens from the mark on; None: the marks name none, places run on.
    blocks: a token has two places, its own and the one in such a reply (0 outside of it).
    front: so many of the tokens are virtual, and take no place.
    """

    tokens: int
    reply: int | None
    blocks: bool
    front: int = 0

    def behind(self, front: int) -> Context:
        """The same with so many virtual tokens before it, which are of the context."""
        return replace(self, tokens=self.tokens + front, front=front)

    def places(self, start: int, end: int, device: torch.device | str = "cpu") -> Tensor:
        """Of the document's tokens from `start` to `end`: int64 [n], or [n, 2] with blocks."""
        import torch

        at = (torch.arange(start, end, device=device) - self.front).clamp_min(0)
        tokens = self.tokens - self.front
        inside = at < tokens
        places = at if self.reply is None else torch.where(inside, at, self.reply)
        if not self.blocks:
            return places
        blocks = at * 0 if self.reply is None else torch.where(inside, 0, at - tokens + 1)
        return torch.stack([places, blocks], -1)


def find_context(ids: Sequence[int], config: DecoderConfig) -> Context:
    """The context of a document's ids, by the marks that this prefix model knows."""
    marks, blocks = config.prefix, config.position == "rope2d"
    assert marks is not None
    ids = list(ids)
    tokens = ids.index(marks.start) if marks.start in ids else 0
    before = ids[:tokens]
    if marks.whole in before:  # in one dimension the places behind it run on
        return Context(tokens, before.index(marks.whole) if blocks else None, blocks)
    return Context(tokens, before.index(marks.blank) if marks.blank in before else None, blocks)
