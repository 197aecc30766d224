"""POST /v1/embeddings: texts or token ids → one vector each, as OpenAI's API has it.

A vector is the mean of the text's final hidden states, of length 1. The texts of a request go through
the worker's engine beside the chats, `AT_ONCE` of them at a time.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from herdbook.engine.reading import embedding, unit
from herdbook.engine.request import Request
from herdbook.errors import RequestError
from herdbook.serving.messages import Prompts
from herdbook.serving.worker import Worker

MAX_INPUTS = 2048  # OpenAI's limit
AT_ONCE = 32  # texts in the engine; a request with many leaves room for others


class EmbeddingAsk(BaseModel):
    """What a client may ask. Keys that OpenAI does not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    input: Prompts = Field(max_length=MAX_INPUTS)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


async def embed(
    ask: EmbeddingAsk, worker: Worker, texts: Sequence[Sequence[int]], adapter: str | None
) -> dict[str, Any]:
    """The body of the response, but for its usage. texts: token ids of each input."""
    width = worker.engine.model.config.hidden
    if ask.dimensions not in (None, width):
        raise RequestError(
            f"dimensions={ask.dimensions}",
            rule=f"is not what {ask.model} has: its vectors have {width} numbers, and none can go",
            next=f"leave it out, or give {width}",
        )
    data = []
    for start in range(0, len(texts), AT_ONCE):
        requests = [
            Request(ids, embed=True, adapter=adapter) for ids in texts[start : start + AT_ONCE]
        ]
        vectors: dict[int, np.ndarray] = {}
        async with contextlib.aclosing(worker.stream(requests)) as pieces:
            async for at, piece in pieces:
                if piece.reply is not None:
                    vectors[at] = unit(embedding(piece.reply))
        for at in range(len(requests)):
            values = _written(vectors[at], ask.encoding_format)
            data.append({"object": "embedding", "index": start + at, "embedding": values})
    return {"object": "list", "data": data, "model": ask.model}


def _written(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    """Numbers, or the bytes of little-endian float32 in base64."""
    if encoding != "base64":
        return [float(one) for one in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
