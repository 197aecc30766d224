"""Several processes at one step: torchrun starts them, the first leads, the others help it.

    torchrun --nproc-per-node 2 -m herdbook raise cria --tune.parallel fsdp

    rank 0   raise ── fetch ── data ──┐ tune: call(…), and its own part ┌── report ── tree
    rank 1   crew: waits ─────────────┘ its own part                    └── waits ── gone

Only the leader runs the recipe, opens the book and writes artifacts. The others know nothing of
either: they wait until they are called to a function, take part, and wait again. So a recipe is the
same program whoever runs it, and a step that knows nothing of processes is done once.

The call goes through torchrun's own key-value store, which waits for as long as it takes; the
collectives inside a function have torch's time limits. A process that dies takes all others with it
(torchrun ends them) and with `--max-restarts` all begin again: the leader finds in the book what is
done, and the step at hand goes on from its last whole state.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from herdbook.errors import ConfigError, HerdbookError

#: the leader may be at other steps for long
FOREVER = timedelta(days=365)


class _Calls:
    """What the leader calls the others to, one after another; None: home."""

    def __init__(self, store: Any) -> None:
        self.store, self.count = store, 0

    def next(self) -> str:
        self.count += 1
        return f"herdbook/call/{self.count}"

    def send(self, what: Any) -> None:
        self.store.set(self.next(), pickle.dumps(what))

    def receive(self) -> Any:
        key = self.next()
        self.store.wait([key], FOREVER)
        return pickle.loads(self.store.get(key))  # of our own leader


_calls: _Calls | None = None


@contextmanager
def crew() -> Iterator[bool]:
    """Join the processes that torchrun started; true in the one that is to do the work.

    with crew() as leads:
        if leads:
            raise_("cria")

    In the others the block is entered when the leader has left its own. A process that is alone
    leads.
    """
    global _calls
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    _check_store()
    store, rank, size = next(iter(rendezvous("env://")))
    store = PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    _calls = _Calls(store)
    if rank == 0:
        try:
            yield True
        finally:
            _calls.send(None)
    else:
        while (call := _calls.receive()) is not None:
            function, arguments = call
            try:
                function(*arguments)
            except (HerdbookError, KeyboardInterrupt):
                continue  # the same has come to the leader, which tells it and sends us home
        yield False
    _calls = None
    dist.destroy_process_group()


def _check_store() -> None:
    """torchrun keeps its store over a restart, addresses of dead processes included. On one machine
    the number of the attempt keeps them apart; several machines do not agree on that number."""
    said = os.environ.get
    shared = said("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if (
        shared
        and int(said("GROUP_WORLD_SIZE", "1")) > 1
        and said("TORCHELASTIC_MAX_RESTARTS") != "0"
    ):
        raise ConfigError(
            "torchrun --max-restarts on several machines",
            rule="finds the addresses of dead processes in its store after a restart",
            next="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, or leave it out",
        )


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Let all other processes run the function, with copies of the arguments (they are pickled). The
    leader goes on at once, to its own part in it."""
    if _calls is not None:
        _calls.send((function, arguments))
