"""An engine that computes on the CPU as it would on a GPU, and the kernel written out in PyTorch."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.engine import Engine
from herdbook.engine.graphs import Graphs, recordable
from herdbook.engine.request import Request, Sampling
from herdbook.engine.store import Store
from herdbook.engine.tiled import Kernel, Tiles
from herdbook.model.attention import Look, alibi_slopes, attend
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.model.layout import Packed
from herdbook.model.modules import build

from .conftest import tiny

FIXTURES = sorted((Path(__file__).parents[1] / "model" / "families").glob("*.json"))


def written_out(q: Tensor, cache: Cache, layer: int, tiles: Tiles, look: Look, out: Tensor) -> None:
    """The kernel without a look at a value: each tile over the keys of all pages, masked."""
    keys = torch.arange(tiles.pages.shape[1] * cache.page_tokens, device=q.device)
    both = cache.read(layer, tiles.pages.long(), q.dtype)
    k, v = (one.flatten(1, 2).transpose(1, 2) for one in both)  # [B, KV, S, D]
    sequence, first, n, start = (one.long()[:, None] for one in tiles.where.unbind(1))
    at = torch.arange(tiles.rows, device=q.device)
    real = at < n  # what is missing in a tile is its first row once more
    rows, places = torch.where(real, first + at, first), torch.where(real, start + at, start)
    contexts = tiles.contexts[sequence].long()
    seen = (keys <= places[..., None]) | (keys < contexts[..., None])
    if look.window is not None:
        seen &= keys > places[..., None] - look.window
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)[:, None]
    if look.slopes:
        mask = torch.stack([look.bias(one, keys, q.dtype) for one in places])
    mask = mask.masked_fill(~seen[:, None], float("-inf"))
    its = attend(q[rows].transpose(1, 2), k[sequence[:, 0]], v[sequence[:, 0]], look, mask)
    out[rows] = its.transpose(1, 2)


def on_tiles(engine: Engine, kernel: Kernel = written_out, *, steps: bool = True) -> Engine:
    """The engine attends by tiles, and with `steps` decodes in steps that could be recorded."""
    plain, pool = engine.runner.plain, engine.pool
    engine.runner._native = None
    plain.kernel = kernel
    plain.cache = Cache(plain.decoder, pool.pages + 1, pool.page_tokens, plain.cache.dtype)
    if steps and recordable(plain.decoder):
        plain.graphs = Graphs(plain.decoder, plain.cache, kernel, lambda step: step.compute)
    return engine


def of_fixture(path: Path) -> DecoderConfig:
    source = json.loads(path.read_text())
    return by_source(source, path.stem).config(source, path.stem)


def random_decoder(config: DecoderConfig) -> Decoder:
    decoder = build(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
    return decoder.eval().requires_grad_(False)


def asked_of(config: DecoderConfig) -> list[list[int]]:
    dice = random.Random(5)
    marks = [config.prefix.whole, config.prefix.start] if config.prefix else []
    return [[dice.randrange(1, config.vocab) for _ in range(n)] + marks for n in (1, 9, 23, 23)]


def greedy(engine: Engine, asked: list[list[int]], tokens: int = 8) -> list[tuple[int, ...]]:
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return [reply.ids for reply in engine.generate([Request(ids, sampling) for ids in asked])]


@torch.inference_mode()
def plain(decoder: Decoder, ids: list[int], tokens: int = 8) -> tuple[int, ...]:
    """Greedy, everything computed anew for every token."""
    whole = decoder.prompt(ids)
    for _ in range(tokens):
        hidden = decoder(torch.tensor(whole), Packed([len(whole)]))
        whole.append(int(decoder.logits(hidden[-1:]).argmax()))
    return tuple(whole[-tokens:])


#: sequences of a batch: (tokens before this step, tokens of it, tokens of its context)
BATCH = [(0, 1, 0), (0, 21, 0), (5, 1, 0), (70, 1, 0), (30, 23, 0), (0, 12, 9)]
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16, "page_tokens": 4}
#: by how much an output may differ: of numbers around 1, and rounded to bfloat16 in another order
NEAR = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def differ(
    kernel: Kernel,
    look: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    *,
    first: bool = False,
    splits: int = 1,
    device: str = "cpu",
    **sizes: int,
) -> float:
    """The greatest difference between a kernel and the one that is written out, over prompts and decoding
    rows together."""
    torch.manual_seed(0)
    s = SIZES | sizes
    size, heads, kv_heads, page_tokens = (
        s[k] for k in ("head_dim", "heads", "kv_heads", "page_tokens")
    )
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "layers": 1}
    decoder = Decoder(replace(tiny().config, **shape)).to(device)
    counts = [-(-(before + n) // page_tokens) for before, n, _ in BATCH]
    pages, kept = 2 * sum(counts), cache_dtype or dtype
    kind = str(kept).removeprefix("torch.")
    store = Store(decoder.config, pages, page_tokens, kind) if first else None
    cache = Cache(decoder, pages, page_tokens, kept, store)
    for one in [*cache.keys, *cache.values, *cache.scales]:
        one.fill_(float("nan") if one.is_floating_point() else 99)  # nobody's: must not be felt
    order = torch.randperm(cache.pages).tolist()
    table: list[list[int]] = []
    ones: list[list[int]] = []
    more: list[list[int]] = []
    rows = 0
    for number, ((before, n, _), count) in enumerate(zip(BATCH, counts, strict=True)):
        mine, order = order[:count], order[count:]
        table.append(mine + [0] * (max(counts) - count))
        at = torch.arange(before + n)
        slots = torch.tensor(mine)[at // page_tokens] * page_tokens + at % page_tokens
        both = torch.randn(2, len(at), kv_heads, size).to(device, dtype)
        cache.write(0, slots.to(device), *both.unbind())
        for start in range(0, n, 5):
            tile = [number, rows + start, min(5, n - start), before + start]
            (more if n > 1 else ones).append(tile)
        rows += n
    held = torch.tensor(table, dtype=torch.int32, device=device)
    contexts = torch.tensor([context for *_, context in BATCH], dtype=torch.int32, device=device)
    q = torch.randn(rows, heads, size).to(device, dtype)
    found, expected = torch.full((2, *q.shape), torch.nan, dtype=dtype, device=device)
    calls = [
        Tiles(torch.tensor(some, dtype=torch.int32, device=device), most, held, contexts, parts)
        for some, most, parts in ((ones, 1, splits), (more, 5, 1))
    ]
    asked = Look(size**-0.5, **look)
    for tiles in calls:
        kernel(q, cache, 0, tiles, asked, found)
    for one in [*cache.keys, *cache.values, *cache.scales]:
        one.nan_to_num_()  # which the twin multiplies by 0
    for tiles in calls:
        written_out(q, cache, 0, tiles, asked, expected)
    return float((found.float() - expected.float()).abs().max())


LOOKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "softcap": {"softcap": 5.0},
    "alibi": {"slopes": alibi_slopes(4)},
    "rounded alibi": {"slopes": alibi_slopes(4), "rounded": True},
    "all": {"window": 20, "softcap": 2.0, "slopes": alibi_slopes(4)},
}
