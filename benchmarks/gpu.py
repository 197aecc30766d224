"""What Herdbook's engine does on this machine's GPU with SmolLM2-135M: prints figures, writes nothing.

    python benchmarks/gpu.py            (or: make gpu, which runs the tests of tests/engine/test_cuda.py first)

Each figure is the best of three after a warm-up, by the clock on the wall, with and without recorded
steps (engine/graphs.py), for the weights in bfloat16 and in 4 bits that are dequantised for each product.
"""

from __future__ import annotations

import random
import time

import torch

import herdbook
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling

PROMPT, NEW, CHATS = 512, 128, 8


def run(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Seconds to the first token of the last prompt, and from there to the end."""
    for ids in prompts:
        engine.submit(Request(ids, Sampling(max_tokens=new, ignore_eos=True)))
    begun, first, seen = time.perf_counter(), 0.0, set[str]()
    while engine.busy:
        seen |= {piece.request_id for piece in engine.step()}
        if not first and len(seen) == len(prompts):
            first = time.perf_counter()
    return first - begun, time.perf_counter() - first


def measure(engine: Engine, name: str) -> None:
    dice = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [dice.randrange(100, engine.model.config.vocab) for _ in range(tokens)]

    def best(prompts: int, new: int) -> tuple[float, float]:
        rounds = [run(engine, [prompt(PROMPT) for _ in range(prompts)], new) for _ in range(4)]
        firsts, rests = zip(*rounds[1:], strict=True)
        return min(firsts), min(rests)

    prefill, decode = best(1, NEW)
    print(f"{name}: prefill of {PROMPT} {PROMPT / prefill:,.0f} tokens/s")
    print(f"{name}: decode, one chat {(NEW - 1) / decode:,.0f} tokens/s")
    _, decode = best(CHATS, NEW)
    print(f"{name}: decode, {CHATS} chats {CHATS * (NEW - 1) / decode:,.0f} tokens/s")


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here (herd doctor)")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for quantised in (False, True):
        model = herdbook.load("smollm2", quantised=quantised)
        for recorded in (True, False):
            engine = Engine(model.decoder, model.tokenizer, max_batch_tokens=CHATS * PROMPT)
            if not recorded:
                engine.runner.plain.graphs = None
            weights = "4 bits" if quantised else str(model.decoder.dtype).removeprefix("torch.")
            measure(engine, f"{weights}, {'recorded' if recorded else 'step by step'}")


if __name__ == "__main__":
    main()
