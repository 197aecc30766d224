"""A model in few bits gets other scales (PEQA), in its own layout: the codes stay bit by bit.

A GGUF is copied, and of each block two bytes (with a minimum, four) are written anew. Of a
compressed-tensors folder the packed codes and zero points stay, in groups of 32.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herdbook.errors import ConfigError, GateError
from herdbook.files import atomic, gguf
from herdbook.model.checkpoint import Checkpoint, load_decoder, open_checkpoint, save_compressed
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.decoder import Decoder
from herdbook.model.family import SourceTensor
from herdbook.model.layers import Int4Linear
from herdbook.model.peqa import FewBits, scale_of
from herdbook.tokens.tokenizer import Tokenizer


def save_rescaled(
    decoder: Decoder, tokenizer: Tokenizer | None, source: Path, folder: Path
) -> None:
    """Write `decoder`, whose quantised layers have the codes of the model in `source`, as that is kept."""
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint.weights, GGUFWeights):
        file = checkpoint.weights.file
        shutil.copytree(source, folder, dirs_exist_ok=True)
        with atomic.replacing(folder / file.path.name) as new:
            shutil.copyfile(file.path, new)
            with new.open("rb+") as out:
                for name, raw in _blocks(decoder, checkpoint, file):
                    out.seek(file.tensors[name].offset)
                    out.write(raw.tobytes())
        return
    bits = {type(one).__name__ for one in decoder.blocks.modules() if isinstance(one, FewBits)}
    if len(bits) > 1:
        raise ConfigError(
            f"{source} keeps some matrices in 4 bits and others in 8",
            rule="and a folder of both is not written",
            next="use the adapter's own reference: it is served unmerged",
        )
    save_compressed(decoder, tokenizer, folder, checkpoint.dtype)


def _blocks(decoder: Decoder, checkpoint: Checkpoint, file: gguf.GGUF) -> Any:
    """Of each quantised matrix of the blocks: its tensor's name, and its bytes with the scales of now."""
    sources: dict[str, SourceTensor] = {one.name: one for one in checkpoint.names.values()}
    for name, source in sources.items():
        layers: list[Any] = [decoder.get_submodule(one.rpartition(".")[0]) for one in source.ours]
        if not source.ours[0].startswith("blocks.") or not isinstance(layers[0], FewBits):
            continue
        if not source.ours[0].endswith(".weight"):
            continue
        head = [_joined(checkpoint, source, [scale_of(one) for one in layers])]
        raw = file.raw(name)
        if file.tensors[name].type == "Q4_1":
            minima = [one.minimum.float() for one in layers]
            head.append(_joined(checkpoint, source, minima))
        size = gguf.row_bytes(file.tensors[name].type, gguf.BLOCK)
        blocks = raw.reshape(-1, size)
        for at, values in enumerate(head):
            narrow = values.half().contiguous().view(-1, 1).numpy()
            blocks[:, 2 * at : 2 * at + 2] = narrow.view(np.uint8)
        yield name, blocks


def _joined(checkpoint: Checkpoint, source: SourceTensor, parts: list[Tensor]) -> Tensor:
    """[O, B] of our parts in the order of the source's rows."""
    return parts[0] if source.fold is None else source.fold.join(parts, checkpoint.config)


def check_rescaled(decoder: Decoder, folder: Path) -> Decoder:
    """What was written, held against the decoder bit by bit. GateError where one differs."""
    saved = load_decoder(folder, dtype=torch.float32, quantised=True)
    for name, layer in decoder.blocks.named_modules():
        if not isinstance(layer, FewBits):
            continue
        found: Any = saved.blocks.get_submodule(name)
        same = type(found) is type(layer) and torch.equal(scale_of(found), scale_of(layer))
        same = same and torch.equal(found.codes, layer.codes)
        if same and isinstance(layer, Int4Linear) and isinstance(found, Int4Linear):
            same = torch.equal(found.minimum.float(), layer.minimum.float())
        if not same:
            raise GateError(
                f"blocks.{name} was not written as it was trained",
                rule="though its layout holds these very numbers",
                next="please report this, with the name of the model",
            )
    for one in saved.modules():
        if isinstance(one, Int4Linear):
            one.has_kernel = False  # as little as the decoder's own
    return saved
