"""What a run needs to go on after a kill: one file, whole or not there.

Weights, what the optimiser keeps of each (all of it tensors), and what was recorded so far, in `state.safetensors`, written
beside itself and renamed. The random state is not in it: every step seeds its own (see `loop`),
and the order of the rows follows from seed and epoch. So a run that goes on takes the very steps
that it would have taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from herdbook.files import atomic
from herdbook.training.parallel import Team

NAME = "state.safetensors"


@dataclass
class State:
    """How far a run is."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent in them, over all starts
    records: list[dict[str, Any]] = field(default_factory=list)  # one a step


def save(
    folder: Path,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    fingerprint: str,
    team: Team,
) -> None:
    """Every process of the team calls it; what all of them hold, the first writes."""
    if not team.leads:
        team.barrier()
        return
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"{name}:weight"] = parameter.detach()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{name}:{key}"] = value
    about = {
        "fingerprint": fingerprint,
        "step": str(state.step),
        "seconds": repr(state.seconds),
        "records": json.dumps(state.records),
    }
    with atomic.replacing(folder / NAME) as new:
        save_file(tensors, new, metadata=about)
    team.barrier()


def load(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    fingerprint: str,
) -> State:
    """Put a saved state back into parameters and optimiser; a new State where there is none.

    fingerprint: of the rows and settings. One that differs is of another run (an older version of
    Herdbook, say) and is not continued.
    """
    if not (folder / NAME).exists():
        return State()
    with safe_open(folder / NAME, framework="pt") as file:
        about = file.metadata()
        if about["fingerprint"] != fingerprint:
            return State()
        saved: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            name, _, part = key.rpartition(":")
            # clone: a tensor that lies in the mapped file may be aligned otherwise than a fresh
            # one, and BLAS may then round otherwise
            saved.setdefault(name, {})[part] = file.get_tensor(key).clone()
    assert saved.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = saved[name]
            parameter.copy_(parts.pop("weight"))
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in parts.items()
            }
    return State(int(about["step"]), float(about["seconds"]), json.loads(about["records"]))
