"""Attention over pages for a whole batch in one kernel, in Triton: what the engine uses on a GPU.

Shapes: T rows (tokens) of the batch, H query heads, KV key/value heads, G = H / KV, D size of a head,
N tiles, B sequences, P pages of the longest.

A program takes a tile (some rows of one sequence) and one head of keys, so that keys are read once for
all G query heads that share them: G · rows make the left side of its matrix products. It walks over
the sequence's keys with a running maximum and sum (Milakov & Gimelshein, 2018, arXiv:1805.02867; Dao
et al., "FlashAttention", 2022, arXiv:2205.14135) and finds each key's page in the sequence's table.
Where there are few programs, each walks over a part of the keys only (`splits`) and the parts are put
together by their sums (Dao et al., "Flash-Decoding", 2023).

Keys and values are read with the strides they have, in float32, bfloat16 or int8; nothing behind a
sequence's last key is read, so what an unfilled page holds does not matter. `paged.Paged` is the twin.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.tiled import Tiles
from herdbook.model.attention import Look

#: what the hardware multiplies; the interpreter, on the CPU, knows no products of bfloat16
FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _walk(
    q, keys, values, scales, tiles, pages, contexts, slopes, out, sums,
    scale, softcap, window, page_tokens, width,
    q_row, q_head, k_page, k_at, k_head, k_dim, v_page, v_at, v_head, v_dim, s_page, s_at, s_of, s_head,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, SLOPES: tl.constexpr, ROUNDED: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One tile × head of keys × split. WIDE ≥ D and ROWS ≥ tokens · G are powers of two; FACTOR is the
    type of what is multiplied."""
    head, split = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * 4
    sequence, first, n, start = (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
    )
    context = tl.load(contexts + sequence)
    each = tl.arange(0, ROWS)
    token, query_head = each // G, head * G + each % G
    row = (first + token).to(tl.int64)
    real = token < n
    place = start + token
    dims = tl.arange(0, WIDE)
    inside = dims < D
    x = tl.load(
        q + row[:, None] * q_row + query_head[:, None] * q_head + dims[None, :],
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    if SLOPES:
        slope = tl.load(slopes + query_head, mask=real, other=0.0)

    end = tl.maximum(start + n, context)
    begin = tl.maximum(start - window + 1, 0) // KEYS if WINDOW else 0
    part = tl.cdiv(tl.cdiv(end, KEYS) - begin, SPLITS)
    begin += split * part
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for block in range(begin, tl.minimum(begin + part, tl.cdiv(end, KEYS))):
        key = block * KEYS + tl.arange(0, KEYS)
        there = key < end
        page = tl.load(pages + sequence * width + key // page_tokens, mask=there, other=0)
        page = page.to(tl.int64)
        at = key % page_tokens
        k = tl.load(
            keys + (page * k_page + at * k_at + head * k_head)[None, :] + dims[:, None] * k_dim,
            mask=there[None, :] & inside[:, None],
            other=0,
        )
        v = tl.load(
            values + (page * v_page + at * v_at + head * v_head)[:, None] + dims[None, :] * v_dim,
            mask=there[:, None] & inside[None, :],
            other=0,
        )
        if INT8:
            where = scales + page * s_page + at * s_at + head * s_head
            k = k.to(tl.float32) * tl.load(where, mask=there, other=0.0)[None, :]
            v = v.to(tl.float32) * tl.load(where + s_of, mask=there, other=0.0)[:, None]
        k, v = k.to(x.dtype), v.to(x.dtype)
        score = tl.dot(x.to(FACTOR), k.to(FACTOR), input_precision="ieee") * scale
        if SOFTCAP:  # tanh(a) = 2 · sigmoid(2a) − 1
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        if SLOPES:
            if ROUNDED:  # as Look.bias does it
                at_place = key.to(tl.float32).to(tl.bfloat16).to(tl.float32)
                bias = slope[:, None] * at_place[None, :]
                bias = bias.to(tl.bfloat16).to(tl.float32) * scale
            else:
                bias = slope[:, None] * (key[None, :] - place[:, None]).to(tl.float32)
            score += bias.to(x.dtype).to(tl.float32)
        sees = (key[None, :] <= place[:, None]) | (key < context)[None, :]
        if WINDOW:
            sees = sees & (key[None, :] > place[:, None] - window)
        score = tl.where(sees & there[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        chance = tl.exp(score - base[:, None])
        fade = tl.exp(best - base)
        total = total * fade + tl.sum(chance, 1)
        mixed = mixed * fade[:, None]
        share = chance.to(x.dtype)
        mixed += tl.dot(share.to(FACTOR), v.to(FACTOR), input_precision="ieee")
        best = higher
    seen = tl.where(total > 0, total, 1.0)
    mean = mixed / seen[:, None]
    # a part of the keys is of a tile that is one row
    owner = row if SPLITS == 1 else tl.program_id(0).to(tl.int64)
    spot = (owner * HEADS + query_head) * SPLITS + split
    tl.store(
        out + spot[:, None] * D + dims[None, :],
        mean.to(out.dtype.element_ty),
        mask=real[:, None] & inside[None, :],
    )
    if SPLITS > 1:
        tl.store(sums + spot, best + tl.log(seen), mask=real)


def look(q: Tensor, cache: Cache, layer: int, tiles: Tiles, look: Look, out: Tensor) -> None:
    """For the rows of the tiles: q [T, H, D] looks at the keys of its sequence → out [T, H, D]."""
    keys, values = cache.keys[layer], cache.values[layer]
    scales = cache.scales[layer] if cache.scales else None
    _, heads, size = q.shape
    kv_heads = keys.shape[2]
    assert q.stride(2) == 1 and out.is_contiguous()
    splits = tiles.splits
    parts = sums = out
    if splits > 1:  # [N, H, splits, D], and the logarithms of each part's sum
        shape = (len(tiles.where), heads, splits, size)
        parts = out.new_empty(shape, dtype=torch.float32)
        sums = parts.new_empty(shape[:3])
    wide = max(16, triton.next_power_of_2(size))
    bytes_wide = wide * q.element_size()
    _walk[len(tiles.where), kv_heads, splits](
        q, keys, values, keys if scales is None else scales, tiles.where, tiles.pages,
        tiles.contexts, _slopes(look, q.device) if look.slopes else sums, parts, sums,
        look.scale, look.softcap, look.window or 0, cache.page_tokens, tiles.pages.stride(0),
        *q.stride()[:2], *keys.stride(), *values.stride(),
        *((0, 0, 0, 0) if scales is None else scales.stride()),
        HEADS=heads, G=heads // kv_heads, D=size, WIDE=wide,
        ROWS=max(16, triton.next_power_of_2(tiles.rows * (heads // kv_heads))),
        KEYS=64 if bytes_wide <= 256 else 32 if bytes_wide <= 512 else 16,
        SPLITS=splits, INT8=scales is not None, SOFTCAP=bool(look.softcap),
        WINDOW=look.window is not None, SLOPES=bool(look.slopes), ROUNDED=look.rounded,
        FACTOR=FACTORS[q.dtype] if q.is_cuda else tl.float32,
        num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    if splits > 1:
        mean = (parts * sums.softmax(-1)[..., None]).sum(2)
        out[tiles.where[:, 1]] = mean.to(out.dtype)


@functools.cache
def _slopes(look: Look, device: torch.device) -> Tensor:
    slopes = torch.tensor(look.slopes, device=device)
    return slopes.bfloat16().float() if look.rounded else slopes
