"""How surprised a model is by a text that it was not tuned on: the price of tuning, measured.

    perplexity = exp(total surprise in nats / tokens)

A text is cut into passages of a few lines, the same for every model whatever its tokenizer, so that
two models can be compared passage by passage (`statistics.perplexity_ratio`). Passages are put
together into windows of `window` tokens; within a window each token sees all tokens before it. The
first token of a window is only scored after a BOS.

The default texts, one per language, are ours (`text/*.txt`): a published test set may be in a
model's training data.

T tokens of a window · V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from herdbook.data.records import Conversation, Message
from herdbook.engine.loaded import LoadedModel
from herdbook.errors import DataError
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "text"
#: passages are at least so long; Chinese characters have three bytes, and say more
PASSAGE_BYTES = 160
#: characters of a held-out conversation that are scored
REPLY_CHARACTERS = 1500
#: rows of logits that are turned into probabilities at once
ROWS = 128


def default_texts() -> dict[str, str]:
    """Language → Herdbook's own text."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.txt"))}


def read_text(path: Path) -> str:
    """A user's text for the perplexity."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}", rule="is not there", next="check the path of --text") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start}", rule="is not UTF-8; a text must be UTF-8"
        ) from error
    if len(text.split()) < 2 and len(text.strip()) < 20:
        raise DataError(f"{path} holds {len(text)} characters", rule="where a text was expected")
    return text


def perplexity(model: LoadedModel, text: str, window: int = 512) -> dict[str, Any]:
    """{"perplexity", "nll" (nats, total), "tokens", "passages": [(nll, tokens), …]}.

    ``passages`` lists every passage of the text, so that it pairs with another model's.
    """
    tokenizer = model.tokenizer
    start = tokenizer.prompt("")
    scores: list[tuple[float, int]] = []
    for ids, lengths in _windows(tokenizer, text, window - len(start)):
        nll = nlls(model, start + ids)[max(len(start) - 1, 0) :]  # one per scored token of ids
        lost = len(ids) - len(nll)  # 1 where there is no BOS
        at = 0
        for length in lengths:
            end = max(at + length - lost, 0)
            first = max(at - lost, 0)
            scores.append((float(nll[first:end].sum()), end - first))
            at += length
    return _summary(scores)


def replies(
    model: LoadedModel, rows: Sequence[Conversation], characters: int = REPLY_CHARACTERS
) -> dict[str, Any]:
    """Perplexity of the assistant's turns in held-out conversations, each a passage.

    The conversations go through the same rendering as in training; `characters` of each count, the
    same text whatever a model's tokens are.
    """
    scores = []
    for row in rows:
        rendering = render(model.tokenizer, _shortened(row.messages, characters))
        most = model.config.max_pos
        some = rendering.ids[:most], rendering.mask[:most]
        parts = [
            nlls(model, ids)[torch.tensor(mask)[1:]] for ids, mask in model.decoder.examples(*some)
        ]
        scores.append((sum(float(nll.sum()) for nll in parts), sum(map(len, parts))))
    return _summary(scores)


def _shortened(messages: Sequence[Message], characters: int) -> list[Message]:
    """So many characters of a conversation's contents, its last turn the assistant's."""
    kept: list[Message] = []
    for one in messages:
        if characters <= 0:
            break
        kept.append(replace(one, content=one.content[:characters]))
        characters -= len(one.content)
    if any(one.role == "assistant" for one in kept):
        while kept[-1].role != "assistant":
            kept.pop()
        return kept
    return list(
        messages
    )  # a first question longer than that: all of it, so that something is scored


def nlls(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Surprise of ids[1:], each given all before it: float64 [T-1]."""
    with torch.inference_mode():
        logits = model.logits(ids)[:-1]
        targets = torch.tensor(ids[1:], device=logits.device)
        parts = [
            torch.nn.functional.cross_entropy(rows, wanted, reduction="none")
            for rows, wanted in zip(
                torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True
            )
        ]
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)


def passages(text: str) -> list[str]:
    """The text in pieces of some lines or sentences; joined they are the text again."""
    pieces: list[str] = []
    current = ""
    for part in re.findall(r"[^\n]*?(?:[.!?。！？]+[\"”’)」]*(?=\s|[^\x00-\x7f]|$)|\n+|$)", text):
        if not current.strip() and pieces and not part.strip():
            pieces[-1] += part
            continue
        current += part
        while len(current.encode()) > 8 * PASSAGE_BYTES:  # no sentence ends: cut anyway
            pieces.append(current[: 2 * PASSAGE_BYTES])
            current = current[2 * PASSAGE_BYTES :]
        if len(current.encode()) >= PASSAGE_BYTES and current.strip():
            pieces.append(current)
            current = ""
    if current.strip() or not pieces:
        pieces.append(current)
    else:
        pieces[-1] += current
    assert "".join(pieces) == text
    return pieces


def _windows(tokenizer: Tokenizer, text: str, window: int) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, tokens of each passage in it); a passage longer than a window is cut to it."""
    ids: list[int] = []
    lengths: list[int] = []
    for passage in passages(text):
        new = tokenizer.encode(passage)[:window]
        if ids and len(ids) + len(new) > window:
            yield ids, lengths
            ids, lengths = [], []
        ids, lengths = ids + new, [*lengths, len(new)]
    if ids:
        yield ids, lengths


def _summary(scores: list[tuple[float, int]]) -> dict[str, Any]:
    nll, tokens = sum(s for s, _ in scores), sum(n for _, n in scores)
    if not tokens:
        raise DataError("the text gives no token to score", rule="where at least two are needed")
    return {
        "perplexity": math.exp(nll / tokens),
        "nll": nll,
        "tokens": tokens,
        "passages": scores,
    }
