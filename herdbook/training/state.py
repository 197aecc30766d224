"""What a run needs to go on after a kill, whole or not there.

Weights, what the optimiser keeps of each (all of it tensors), and what was recorded so far: in
`state.safetensors`, written beside itself and renamed; or, where each process has a share of them, in
the folder `state-STEP`, written by all of them with torch.distributed.checkpoint under another name
and renamed. Either can be read by any number of processes, however they share the model.

The random state is not in it: every step seeds its own (see `loop`), and the order of the rows follows
from seed and epoch. So a run that goes on takes the very steps that it would have taken.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from herdbook.files import atomic, safetensors
from herdbook.model.checkpoint.weights import NAMES, as_bytes
from herdbook.training.moved import Moved
from herdbook.training.offload import Offload
from herdbook.training.parallel import Team, local

NAME = "state.safetensors"
FOLDERS = "state-*"
#: what a save that was killed leaves: of a file, of a folder
LEFT = ".state*.tmp"
ABOUT = "about.json"
#: a weight's name; itself ("weight") and what the optimiser keeps of it
Saved = tuple[str, dict[str, Tensor]]


@dataclass
class State:
    """How far a run is."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent in them, over all starts
    records: list[dict[str, Any]] = field(default_factory=list)  # one a step


def save(
    folder: Path,
    state: State,
    moved: Moved,
    optimiser: torch.optim.Optimizer,
    fingerprint: str,
    team: Team,
    offload: Offload | None = None,
) -> None:
    """Every process of the team calls it; what all of them hold, the first writes.

    offload: where the optimiser's state lies, if not in memory; a saved state is whole without it.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in moved.weights.items():
        tensors[f"{name}:weight"] = weight.detach()
        for key, value in optimiser.state[weight].items():
            tensors[f"{name}:{key}"] = value
    about = {
        "fingerprint": fingerprint,
        "step": str(state.step),
        "seconds": repr(state.seconds),
        "records": json.dumps(state.records),
    }
    older = list(folder.glob(FOLDERS))
    if team.apart:
        shares = {
            name: _shared(value, moved.parameters[name.rpartition(":")[0]])
            for name, value in tensors.items()
        }
        place = folder / FOLDERS.replace("*", f"{state.step:09}")
        _write(folder, place, shares, about, team)
        older = [*(one for one in older if one != place), folder / NAME]
    elif team.leads:
        _write_file(folder / NAME, tensors, about, offload)
    if team.leads:
        for one in older:
            shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)
    team.barrier()


def _write_file(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], offload: Offload | None
) -> None:
    """The one file, whole or not at all; of what lies on disk, one tensor is in memory at a time."""

    def values(name: str) -> memoryview:
        if offload is not None:
            offload.release()
        return as_bytes(tensors[name].cpu().contiguous())

    plan = {name: (NAMES[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    safetensors.write(path, plan, values, about)
    if offload is not None:
        offload.release()


def _write(
    folder: Path, place: Path, shares: dict[str, Any], about: Mapping[str, str], team: Team
) -> None:
    """The folder `place`, by all processes."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    new = folder / f".{place.name}.tmp"
    if team.leads:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    team.barrier()
    write(shares, storage_writer=FileSystemWriter(new))
    if team.leads:
        atomic.write_text(new / ABOUT, json.dumps(about))
        atomic.sync_tree(new)
        shutil.rmtree(place, ignore_errors=True)  # another run's, which is not continued
        os.rename(new, place)
        atomic.sync_folder(folder)


def clear(folder: Path) -> None:
    """Remove what a save that was killed left behind: nothing else would."""
    for one in folder.glob(LEFT):
        shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of the states that are in a run's folder."""
    places = [folder / NAME, *folder.glob(FOLDERS)]
    files = [file for one in places for file in ([one] if one.is_file() else one.glob("*"))]
    return sum(file.stat().st_size for file in files)


def load(
    folder: Path,
    moved: Moved,
    optimiser: torch.optim.Optimizer,
    fingerprint: str,
    offload: Offload | None = None,
) -> State:
    """Put a saved state back into weights and optimiser; a new State where there is none.

    fingerprint: of the rows and settings. One that differs is of another run (an older version of
    Herdbook, say) and is not continued.
    """
    found: dict[Path, dict[str, str]] = {}
    for place in folder.glob(FOLDERS):
        found[place] = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    if (folder / NAME).exists():
        with safe_open(folder / NAME, framework="pt") as file:
            found[folder / NAME] = file.metadata()
    ours = [place for place, about in found.items() if about["fingerprint"] == fingerprint]
    if not ours:
        return State()
    newest = max(ours, key=lambda place: int(found[place]["step"]))
    about, read = found[newest], _read_file if newest.name == NAME else _read
    seen = set()
    with torch.no_grad():
        for name, parts in read(newest, moved):
            weight = moved.weights[name]
            weight.copy_(parts.pop("weight"))
            state = optimiser.state[weight]
            state |= {key: value.to(weight.device) for key, value in parts.items()}
            if offload is not None:
                offload.keep(state)
            seen.add(name)
    assert seen == moved.weights.keys()
    return State(int(about["step"]), float(about["seconds"]), json.loads(about["records"]))


def _read_file(path: Path, moved: Moved) -> Iterator[Saved]:
    """What is here of each weight of the one file."""
    with safe_open(path, framework="pt") as file:
        for name, keys in _by_weight(file.keys(), moved).items():
            like = moved.parameters[name]
            # clone: a tensor that lies in the mapped file may be aligned otherwise than a fresh
            # one, and BLAS may then round otherwise
            yield (
                name,
                {part: _cut(file.get_tensor(key), like).clone() for part, key in keys.items()},
            )


def _by_weight(keys: Iterable[str], moved: Moved) -> dict[str, dict[str, str]]:
    """Weight → part of its state → key, for the weights that are here."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, part = key.rpartition(":")
        if name in moved.parameters:
            found.setdefault(name, {})[part] = key
    return found


def _read(place: Path, moved: Moved) -> Iterator[Saved]:
    """What is here of each weight of a folder, whatever shares it was written in."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as fill

    reader = FileSystemReader(place)
    shares: dict[str, Any] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata), key
        like = moved.parameters.get(key.rpartition(":")[0])
        if like is None:
            continue
        dtype = about.properties.dtype
        if about.size == like.shape:
            shares[key] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        else:
            shares[key] = torch.zeros(about.size, dtype=dtype)
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        fill(shares, storage_reader=reader, no_dist=alone)  # alone it says that it is
    for name, keys in _by_weight(shares, moved).items():
        yield name, {part: local(shares[key]) for part, key in keys.items()}


def _shared(tensor: Tensor, like: Any) -> Any:
    """A share as a part of the whole, cut as the parameter `like` is; others are as they are."""
    from torch.distributed.tensor import DTensor

    if not hasattr(like, "placements") or tensor.shape != local(like).shape:
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def _cut(tensor: Tensor, like: Any) -> Tensor:
    """The share of a whole tensor that `like` has of its own."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    here: Tensor = local(distribute_tensor(tensor, mesh, placements, src_data_rank=None))
    return here
