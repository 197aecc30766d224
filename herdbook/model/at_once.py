"""Strips of tensors go from the file to their places several at once.

While one thread converts, another waits for the disk; where there are processors enough, they convert
and touch the result's new memory together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

#: puts one strip into its place; steps may run in any order, and beside each other
Step = Callable[[], None]

#: of strips that are in work; each holds its strip besides the result
THREADS = min(8, 1 + (os.cpu_count() or 1))


def at_once(steps: Iterable[Step]) -> None:
    """Run them all. Of those that fail the first is raised; what has not begun by then never does."""
    inference = torch.is_inference_mode_enabled()  # which each thread has for itself

    def run(step: Step) -> None:
        with torch.inference_mode(inference):
            step()

    with ThreadPoolExecutor(THREADS, "load") as pool:
        for _ in pool.map(run, steps):
            pass
