"""A tuned model as its difference from the base, for where the base itself may not be passed on.

    PATH/model.safetensors   target − base, tensor by tensor, in the target's own types (or shards)
    PATH/delta.safetensors   what this arithmetic does not give back, and whose difference it is
    PATH/config.json, tokenizer.json …   the target's

As in Vicuna's and ExpertLLaMA's deltas; where the target has more rows of vocabulary than the base,
the base's are padded with zeros. Other tools that add such a delta to its base find what they know.

Exact in every type, see herdbook/model/difference.py.

Both commands hold one tensor of each model at a time. delta.safetensors has the SHA-256 of every
tensor of base and target: another base is refused, and what is applied is known to be the target.

Layout of delta.safetensors: NAME.at (int32 or int64 positions), NAME.value (of the target's type);
in the header's metadata under `herdbook_delta` a JSON mapping: base (its name), tensors (NAME →
base, base_shape, target).

Deltas that others published (Vicuna's, ExpertLLaMA's) have no such record. They are applied where the
caller says that this may be, or names the digest that the result must have: names and shapes are
checked, and that every value is finite; nothing else can be. The base is brought to the delta's type
and added in it, which is what FastChat's apply_delta does in float16, to the bit. Rows that only the
tuned model has were padded there with zeros, in Stanford Alpaca's weight_diff with the mean of the
base's: nothing in a delta tells which, so the caller says it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from herdbook.errors import ConfigError, FileError
from herdbook.files import safetensors
from herdbook.files.atomic import new_folder
from herdbook.files.foreign import parse_json
from herdbook.model.checkpoint.base import Checkpoint
from herdbook.model.checkpoint.huggingface import DELTA_MARK, INDEX, LEGACY_INDEX, open_folder
from herdbook.model.checkpoint.opening import open_checkpoint
from herdbook.model.checkpoint.saving import SHARD_BYTES, write_weights
from herdbook.model.checkpoint.weights import NAMES, Part, PlainWeights, as_bytes
from herdbook.model.difference import Difference, difference, restore
from herdbook.model.family import SourceTensor
from herdbook.model.fetch import BESIDE
from herdbook.progress import Progress
from herdbook.tokens.reading import files as tokenizers

RECORD = "delta.safetensors"


# --- the two commands ------------------------------------------------------------------------------


def make(
    base_path: Path,
    tuned_path: Path,
    path: Path,
    *,
    progress: Progress,
    called: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the delta of the model at `tuned_path` from the one at `base_path`; what was written.

    called: the base's name for who applies it (default: its folder's).
    """
    path = _free(path)
    base, tuned = open_checkpoint(base_path), open_checkpoint(tuned_path)
    if not (tuned.path / "config.json").is_file():
        raise FileError(
            f"{tuned.path}",
            rule="is no Hugging Face folder, and a delta is made of the values of one",
            next="give the tuned model's folder, or write one: herd export MODEL PATH --to hf",
        )
    _check_pair(base, tuned)
    records: dict[str, dict[str, Any]] = {}
    kept: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: dict[str, tuple[int, int]] = {}
    plan, sources = _plan(tuned), {source.name: source for source in tuned.names.values()}
    total = sum(math.prod(shape) for _, shape in plan.values())
    with (
        new_folder(path) as desk,
        tempfile.TemporaryFile(dir=path.parent) as spool,
        progress.task("delta", total=total, unit="values") as task,
    ):

        def one(source: str) -> Tensor:
            target = tuned.weights.read(source, plan[source][0])
            of_base = _of(base, sources[source])
            records[source] = {
                "base": _hash(of_base),
                "base_shape": list(of_base.shape),
                "target": _hash(target),
            }
            change = difference(target, _padded(of_base, target.shape))
            for leaf, values in (("at", change.at), ("value", change.value)):
                if len(values):
                    name = f"{source}.{leaf}"
                    kept[name] = NAMES[values.dtype], tuple(values.shape)
                    places[name] = spool.tell(), values.nbytes
                    spool.write(as_bytes(values))
            task.advance(target.numel())
            return change.delta

        def spooled(name: str) -> memoryview:
            start, count = places[name]
            spool.seek(start)
            return memoryview(spool.read(count))

        write_weights(desk, plan, one, shard_bytes=shard_bytes, mark={DELTA_MARK: "1"})
        record = {"base": called or base_path.name, "tensors": records}
        safetensors.write(desk / RECORD, kept, spooled, {DELTA_MARK: json.dumps(record)})
        _copy_beside(tuned.path, desk)
        size = _size(desk)
    values = sum(shape[0] for name, (_, shape) in kept.items() if name.endswith(".value"))
    return {"tensors": len(plan), "values": total, "kept_values": values, "size_bytes": size}


def apply(
    base_path: Path,
    delta_path: Path,
    path: Path,
    *,
    progress: Progress,
    unchecked: bool = False,
    expect: str = "",
    new_rows: Literal["zeros", "mean"] = "zeros",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model that the delta at `delta_path` makes of the base; what was written.

    unchecked: the delta may be one without a record of its base. expect: the digest that the result
    must have, as an earlier application returned it (`digest`); else nothing is written. new_rows:
    what such a delta was taken from where the base has no row.
    """
    path = _free(path)
    recorded = (delta_path / RECORD).is_file()
    if not recorded and _is_marked(delta_path):
        raise FileError(
            f"{delta_path / RECORD}",
            rule="is missing: with it Herdbook made this delta, and nothing else gives the exact model",
            next="fetch the delta again, whole",
        )
    if recorded and new_rows != "zeros":
        raise ConfigError(
            f"--new-rows {new_rows}",
            rule=f"is for deltas of other tools, and this one has its {RECORD}",
            next="leave it out",
        )
    if not (recorded or unchecked or expect):
        raise FileError(
            f"{delta_path}",
            rule=f"holds no {RECORD}, so nothing tells whether the base is the right one (it is a "
            "delta of another tool, or none)",
            next="add --unchecked if you are sure of base and delta, or --expect DIGEST if you know "
            "what must come out",
        )
    base, delta = open_checkpoint(base_path), open_folder(delta_path, delta=recorded)
    _check_pair(base, delta)
    add = _exactly(base_path, delta) if recorded else _as_published(delta, new_rows)
    plan, sources = _plan(delta), {source.name: source for source in delta.names.values()}
    total = sum(math.prod(shape) for _, shape in plan.values())
    digests: dict[str, str] = {}
    with new_folder(path) as desk, progress.task("apply", total=total, unit="values") as task:

        def one(source: str) -> Tensor:
            target = add(source, _of(base, sources[source]))
            digests[source] = _hash(target)
            task.advance(target.numel())
            return target

        write_weights(desk, plan, one, shard_bytes=shard_bytes)
        lines = [f"{name} {digests[name]}\n" for name in sorted(digests)]
        digest = "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
        if expect and digest != expect:
            raise FileError(
                f"{base_path} + {delta_path} have the digest {digest}",
                rule=f"but {expect} was expected",
                next="check that base and delta are the very ones, and were fetched whole",
            )
        _copy_beside(delta_path, desk)
        size = _size(desk)
    checked = (
        "digest" if expect else "base and result" if recorded else "names and shapes alone, no hash"
    )
    done = {"tensors": len(plan), "values": total, "size_bytes": size}
    return done | {"digest": digest, "checked": checked}


#: the source's name of a tensor, the base's values → the target's
Add = Callable[[str, Tensor], Tensor]


def _exactly(base_path: Path, delta: Checkpoint) -> Add:
    """With the record of the base, of the target, and of what adding does not give."""
    record, kept = _record(delta.path)

    def add(source: str, of_base: Tensor) -> Tensor:
        said = record["tensors"].get(source, {})
        if said.get("base") != _hash(of_base):
            raise FileError(
                f"{base_path}: tensor {source!r}, {list(of_base.shape)}",
                rule=f"is not that of the model which the delta was made from "
                f"({record['base']!r}, {said.get('base_shape')})",
                next="give that very model as the base: the same version, unquantised",
            )
        change = _change(delta, source, kept)
        target = restore(change, _padded(of_base, change.delta.shape))
        if said.get("target") != _hash(target):
            raise FileError(
                f"{delta.path}: tensor {source!r}",
                rule="does not come out as the one that the delta was made of",
                next="fetch the delta again: it was damaged or changed",
            )
        return target

    return add


def _as_published(delta: Checkpoint, new_rows: Literal["zeros", "mean"]) -> Add:
    """The sum in the delta's type, as those compute it who publish deltas."""

    def add(source: str, of_base: Tensor) -> Tensor:
        values = delta.weights.read(source, delta.weights.dtype(source))
        change = Difference(values, torch.empty(0, dtype=torch.int32), values.new_empty(0))
        target = restore(change, _padded(of_base.to(values.dtype), values.shape, new_rows))
        if not torch.isfinite(target).all():
            raise FileError(
                f"{delta.path}: tensor {source!r}",
                rule="gives values that are not finite",
                next="give the base that the delta was made from; fetch both again",
            )
        return target

    return add


def _is_marked(folder: Path) -> bool:
    """Whether the weights in a folder are a delta that `make` wrote."""
    weights = folder.glob("*.safetensors")
    return any(DELTA_MARK in safetensors.read_header(one).metadata for one in weights)


def _plan(tuned: Checkpoint) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tuned model's tensors under its source's names: type and shape."""
    sources = (one.name for one in tuned.names.values())
    return {one: (tuned.weights.dtype(one), tuned.weights.shapes[one]) for one in sources}


def _of(base: Checkpoint, source: SourceTensor) -> Tensor:
    """The base's values in the place of this tensor, whatever layout the base is in."""
    parts = [base.read(name, base.dtype(name)) for name in source.ours]
    return parts[0] if source.fold is None else source.fold.join(parts, base.config).contiguous()


def _padded(
    base: Tensor, shape: torch.Size, new_rows: Literal["zeros", "mean"] = "zeros"
) -> Tensor:
    """With rows of zeros, or of the mean row, for the words that only the tuned model knows."""
    if base.shape == shape:
        return base
    whole = torch.zeros(shape, dtype=base.dtype)
    whole[: len(base)] = base
    if new_rows == "mean":
        whole[len(base) :] = base.mean(0, dtype=torch.float32)
    return whole


def _check_pair(base: Checkpoint, tuned: Checkpoint) -> None:
    """The same tensors, and in all but the vocabulary of the same shape."""
    next = "give the model that the other was tuned from"
    ours, theirs = set(base.names), set(tuned.names)
    if base.family is not tuned.family or ours != theirs:
        differ = sorted(ours ^ theirs)[:1]
        kinds = f"{base.family.model_type}, {tuned.family.model_type}"
        raise FileError(
            f"{base.path} and {tuned.path} ({kinds})",
            rule=f"are not one kind of model: {differ} is in one of them alone"
            if differ
            else "are not one kind of model",
            next=next,
        )
    for name, source in tuned.names.items():
        a, b = base.shapes[name], tuned.shapes[name]
        grown = name.startswith(("embed.", "head.")) and a[0] <= b[0]
        if a[1:] != b[1:] or (a[0] != b[0] and not grown):
            raise FileError(
                f"{source.name!r} has the shape {list(b)} in {tuned.path}",
                rule=f"but {list(a)} in the base {base.path}; only a vocabulary may have grown",
                next=next,
            )


def _record(folder: Path) -> tuple[dict[str, Any], PlainWeights]:
    """Whose difference the delta is, and the values that it keeps."""
    path = folder / RECORD
    header = safetensors.read_header(path)
    broken = FileError(f"{path}", rule="is no record of a delta", next="fetch the delta again")
    try:
        record = parse_json(header.metadata.get(DELTA_MARK, "").encode())
        whole = all(isinstance(one, dict) for one in record["tensors"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise broken from None
    if not whole or "base" not in record:
        raise broken
    return record, PlainWeights({name: [Part(path, e)] for name, e in header.tensors.items()})


def _change(delta: Checkpoint, source: str, kept: PlainWeights) -> Difference:
    """What the delta holds for one tensor."""
    values = delta.weights.read(source, delta.weights.dtype(source))
    at, value = torch.empty(0, dtype=torch.int32), values.new_empty(0)
    if f"{source}.at" in kept.shapes and f"{source}.value" in kept.shapes:
        at = kept.read(f"{source}.at", torch.int64)
        value = kept.read(f"{source}.value", kept.dtype(f"{source}.value"))
    inside = not len(at) or (int(at.min()) >= 0 and int(at.max()) < values.numel())
    if at.shape != value.shape or value.dtype != values.dtype or not inside:
        raise FileError(
            f"{kept.files[0]}: {source}.at",
            rule="does not fit the tensor that it belongs to",
            next="fetch the delta again: it was damaged or changed",
        )
    return Difference(values, at, value)


def _hash(tensor: Tensor) -> str:
    """«sha256:9f86d0…» of type, shape and bytes."""
    found = hashlib.sha256(f"{NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    found.update(as_bytes(tensor))
    return "sha256:" + found.hexdigest()


def _free(path: Path) -> Path:
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise ConfigError(f"{path}", rule="is there already", next="give a path that is not")
    return path


def _copy_beside(source: Path, target: Path) -> None:
    """Configuration and tokenizer. config.json comes last."""
    names = {*BESIDE, *(path.name for path in tokenizers(source))}
    for name in sorted(names, key="config.json".__eq__):
        if name not in (INDEX, LEGACY_INDEX) and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
