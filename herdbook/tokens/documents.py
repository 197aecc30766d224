"""Documents → token ids: every token is learnt, and nothing is cut off.

A document longer than `length` tokens goes on in the next row, which begins with the token that the last
one ended in: so each token but the very first is a target once. BOS stands where the model expects one,
EOS behind the last row alone, so that the model learns to stop where a text stops and nowhere else.

    9 tokens and EOS, length 4  →  [0 1 2 3] [3 4 5 6] [6 7 8 EOS]
"""

from __future__ import annotations

from herdbook.tokens.chat import Rendering
from herdbook.tokens.tokenizer import Tokenizer


def windows(tokenizer: Tokenizer, text: str, length: int) -> list[Rendering]:
    """A document in rows of at most `length` tokens, all of them trained."""
    ids = tokenizer.prompt(text)
    if tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    assert length > 1
    cuts = [ids[at : at + length] for at in range(0, len(ids) - 1, length - 1)]
    return [Rendering(cut, [True] * len(cut)) for cut in cuts]
