"""Serving SmolLM2-135M on two cores: Herdbook's engine, llama.cpp's own server, transformers.

    python benchmarks/engine.py                 everything; writes RESULTS.md; some minutes
    python benchmarks/engine.py --quick         a trial in small sizes; writes nothing
    python benchmarks/engine.py --only decode   one of the works; writes nothing

Everybody gets the same token ids, never seen before by its cache, and as many threads. The peers:

- llama.cpp, the server inside the wheel xllamacpp, called in its process (no HTTP), at Q4_0, which it
  repacks for speed, and at the Q4_1 that the model is packaged in. It is given room for just the
  tokens that it needs. With several chats it has two ways to keep them, each in its own part of the
  cache or all in one; the faster one counts. Prefill and decode of one chat are its own timings.
  The wheel is built for any x86-64 with AVX2; its own build for a newer processor may be faster.
- transformers with all weights in the format that this machine computes fastest.

Our side is `herdbook.load(...)`'s model, int4 as packaged, behind `Engine`, by the clock on the
wall.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import THREADS, Claim, Recorder, conditions, say, spread
from side import Side, data_folder, environment, memory, serve

PEERS = ("xllamacpp", "transformers")
QUESTION = "Who are you, and what can you do for me?"

# ------------------------------------------------------------------ the contestants, each a process


class Ours:
    """herdbook.load, and an Engine with room for so many tokens."""

    def open(self, path: str, slots: int, slot_tokens: int) -> None:
        import herdbook
        from herdbook.engine.engine import Engine

        self.model = herdbook.load(path)
        page = 16
        pages = slots * -(-slot_tokens // page)
        self.engine = Engine(self.model.model, self.model.tokenizer, page_tokens=page, pages=pages)
        self.chats([[5, 6, 7, 8] * 16] * min(2, slots), 4)

    def about(self) -> dict[str, Any]:
        return {"dtype": self.model.model.kind}

    def first(self, ids: list[int]) -> float:
        """Seconds from the prompt to the first token."""
        begun = time.perf_counter()
        self._submit(ids, 1)
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - begun

    def decode(self, ids: list[int], new: int) -> float:
        """Tokens a second after the first."""
        self._submit(ids, new)
        times: list[float] = []
        while self.engine.busy:
            pieces = self.engine.step()
            times += [time.perf_counter()] * sum(len(piece.ids) for piece in pieces)
        assert len(times) == new, f"{len(times)} tokens, asked for {new}"
        return (new - 1) / (times[-1] - times[0])

    def chats(self, prompts: list[list[int]], new: int) -> float:
        """Tokens a second, all chats together, from the first prompt to the last token."""
        begun = time.perf_counter()
        for ids in prompts:
            self._submit(ids, new)
        made = 0
        while self.engine.busy:
            made += sum(len(piece.ids) for piece in self.engine.step())
        assert made == new * len(prompts), f"{made} tokens, asked for {new * len(prompts)}"
        return made / (time.perf_counter() - begun)

    def nats(self, windows: list[list[int]]) -> float:
        """Surprise of every token but the first of each window."""
        scores = [self.engine.score(ids[:1], [ids[1:]])[0] for ids in windows]
        return -sum(score.total for score in scores)

    def resident(self) -> int:
        return memory("VmRSS")

    def _submit(self, ids: list[int], new: int) -> None:
        from herdbook.engine.request import Request, Sampling

        self.engine.submit(Request(ids, Sampling(max_tokens=new, ignore_eos=True)))


class LlamaCpp:
    """llama.cpp's server. unified: all chats in one part of the cache."""

    def open(self, path: str, slots: int, slot_tokens: int, unified: bool = False) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = path
        settings.n_parallel, settings.n_ctx = slots, slots * slot_tokens
        settings.kv_unified = unified
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
        settings.fit_params = False  # it is told all sizes
        self.server = xllamacpp.Server(settings)
        self.chats([[5, 6, 7, 8] * 16] * min(2, slots), 4)

    def about(self) -> dict[str, Any]:
        import xllamacpp

        return {"build": xllamacpp.get_system_info().strip(" |\n")}

    def first(self, ids: list[int]) -> float:
        timings = self._complete(ids, 1, cache_prompt=False)["timings"]
        assert timings["prompt_n"] == len(ids), f"{len(ids) - timings['prompt_n']} were cached"
        return float(timings["prompt_ms"]) / 1000

    def decode(self, ids: list[int], new: int) -> float:
        timings = self._complete(ids, new)["timings"]
        assert timings["predicted_n"] == new, timings
        return float((new - 1) * 1000 / timings["predicted_ms"])  # the first came with the prompt

    def chats(self, prompts: list[list[int]], new: int) -> float:
        made: list[int] = []

        def one(ids: list[int]) -> None:
            made.append(self._complete(ids, new)["usage"]["completion_tokens"])

        threads = [threading.Thread(target=one, args=(ids,)) for ids in prompts]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        assert sum(made) == new * len(prompts), f"{made} tokens, asked for {new} each"
        return sum(made) / seconds

    def nats(self, windows: list[list[int]]) -> float:
        """The server scores no prompts. So each next token is forced by a bias, one request a token;
        the log-probability that it reports for it is taken before the bias."""
        total = 0.0
        for ids in windows:
            for end in range(1, len(ids)):
                force = {"logit_bias": [[ids[end], 1e4]], "n_probs": 1}
                (choice,) = self._complete(ids[:end], 1, **force)["choices"]
                (told,) = choice["logprobs"]["content"]
                assert told["id"] == ids[end], f"forced {ids[end]}, got {told['id']}"
                total -= told["logprob"]
        return total

    def resident(self) -> int:
        return memory("VmRSS")

    def _complete(self, ids: list[int], new: int, **more: Any) -> dict[str, Any]:
        """One completion, greedy; what the slot's cache holds of the prompt is reused."""
        asked = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, **more}
        if "logit_bias" in more:
            del asked["ignore_eos"]  # which is itself a bias, and would take the forced one's place
        answer: dict[str, Any] = self.server.handle_completions(asked)
        assert "choices" in answer, answer
        return answer


class Transformers:
    """A Hugging Face folder in transformers' own generate."""

    def open(self, path: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model.eval()
        self.first([5, 6, 7, 8] * 16)

    def first(self, ids: list[int]) -> float:
        begun = time.perf_counter()
        self._generate(ids, 1)
        return time.perf_counter() - begun

    def decode(self, ids: list[int], new: int) -> float:
        first = self.first(ids)
        begun = time.perf_counter()
        self._generate(ids, new)
        return (new - 1) / (time.perf_counter() - begun - first)

    def _generate(self, ids: list[int], new: int) -> None:
        import torch

        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == len(ids) + new


#: `herd chat -p` for llama.cpp: load, render, stream. Nothing is warmed up, as that costs time.
FIRST_TOKEN = """
import sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx = 2048
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(sys.argv[3])
settings.warmup = settings.fit_params = False
def show(chunk):
    text = chunk["choices"][0]["delta"].get("content")
    if text:
        print(text, end="", flush=True, file=answer)
import os
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
xllamacpp.Server(settings).handle_chat_completions(
    {"messages": [{"role": "user", "content": sys.argv[2]}], "max_tokens": 16, "stream": True,
     "temperature": 0}, show)
"""


def seconds_to_first_byte(command: Sequence[str]) -> float:
    """From the start of the process to the first byte on its stdout; then it is killed."""
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0
    ) as process:
        assert process.stdout and process.stderr
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.kill()
        if not byte:
            raise SystemExit(f"{command[:4]} said nothing: {process.stderr.read()[-4000:]!r}")
    return seconds


# ------------------------------------------------------------------ the works


class Bench:
    """The files, the prompts, the recorder, and the sizes."""

    def __init__(self, folder: Path, quick: bool) -> None:
        import torch

        from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
        from herdbook.model.precision import compute_dtype
        from herdbook.model.references import resolve
        from herdbook.tokens.tokenizer import Tokenizer

        self.quick = quick
        self.rounds, self.many_rounds = (2, 2) if quick else (5, 3)
        self.prompt, self.new, self.chat_new = (64, 16, 8) if quick else (512, 128, 64)
        self.dtype = str(compute_dtype()).removeprefix("torch.")
        self.q4_1 = resolve("smollm2", None)
        self.q4_0, self.hf = folder / "smollm2-q4_0.gguf", folder / "smollm2"
        say("writing the model as Q4_0 and for transformers")
        tokenizer = Tokenizer.load(self.q4_1)
        decoder = load_decoder(self.q4_1, dtype=torch.float32)
        save_gguf(decoder, tokenizer, self.q4_0, quant="Q4_0")
        save_hf(decoder, tokenizer, self.hf, torch.float32)
        self.text, self.text_name = _text()
        self.ids = tokenizer.encode(self.text)
        self._fresh = itertools.count(1)
        self.recorder = Recorder(
            "engine",
            conditions(
                PEERS,
                model="SmolLM2-135M-Instruct, Q4_1 as packaged",
                **{
                    "ours": "int4 weights as packaged (no second quantisation)",
                    "llama.cpp's Q4_0": "made from the packaged Q4_1, as its origin is not "
                    "packaged: its speed is that of any Q4_0, its perplexity may be a little "
                    "worse than one made from the origin's",
                    "transformers computes in": self.dtype,
                },
            ),
        )

    def fresh(self, count: int) -> list[int]:
        """A prompt of so many tokens whose beginning no earlier one has."""
        start = next(self._fresh) * 101
        return [self.ids[(start + n) % len(self.ids)] for n in range(count)]

    def compare(
        self,
        sides: Sequence[Side],
        claim: str,
        how: str,
        ask: Callable[[Side, Any], float],
        prepare: Callable[[], Any],
        rounds: int,
        unit: str = "tokens/s",
    ) -> None:
        """Ask in turn, each round with a new prompt that all sides share; record the medians."""
        found: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds):
            prompt = prepare()
            for side in sides:
                found[side.name].append(ask(side, prompt))
            latest = ", ".join(f"{name} {values[-1]:.1f}" for name, values in found.items())
            say(f"{claim}, round {number + 1} of {rounds}: {latest} {unit}")
        self.claim(claim, how, unit, found)

    def claim(
        self, claim: str, how: str, unit: str, found: dict[str, list[float]], more: bool = True
    ) -> None:
        """A claim against each peer. Ways of the same peer (`name/way`) count as its best."""
        ours, words = spread(found.pop("Herdbook"))
        best: dict[str, tuple[float, str]] = {}
        for name, values in found.items():
            peer, _, way = name.partition("/")
            middle, its_words = spread(values)
            if peer not in best or (middle > best[peer][0]) == more:
                best[peer] = middle, its_words + (f", {way}" if way else "")
        for peer, (middle, its_words) in best.items():
            told = f"{how}. Ours: {words}. {peer}: {its_words}"
            self.recorder.add(Claim(claim, unit, ours, middle, peer, told, more))


def _text() -> tuple[str, str]:
    """WikiText-2 where it is at hand, else Herdbook's own text."""
    wikitext = data_folder() / "text" / "wikitext2_test.txt.gz"
    if wikitext.exists():
        with gzip.open(wikitext, "rt", encoding="utf-8") as file:
            return file.read(60_000), "WikiText-2 test"
    from herdbook.evaluation.perplexity import default_texts

    return default_texts()["en"], "Herdbook's own English text"


def open_side(
    bench: Bench, kind: str, name: str, slots: int = 1, slot_tokens: int = 0, **more: Any
) -> Side:
    """Start a contestant. name: as it is called in the results."""
    side = Side(__file__, kind)
    side.name = name
    if kind == "Transformers":
        side.ask("open", path=str(bench.hf), dtype=bench.dtype)
    else:
        path = bench.q4_0 if "Q4_0" in name else bench.q4_1
        side.ask("open", path=str(path), slots=slots, slot_tokens=slot_tokens, **more)
    return side


def close(sides: Sequence[Side]) -> None:
    for side in sides:
        side.close()


def one_chat(bench: Bench, only: str) -> None:
    """Prefill and decode of a single chat, against everybody."""
    size = {"slots": 1, "slot_tokens": bench.prompt + bench.new + 64}
    sides = [
        open_side(bench, "Ours", "Herdbook", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_0", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_1", **size),
        open_side(bench, "Transformers", f"transformers {bench.dtype}"),
    ]
    try:
        bench.recorder.conditions |= {
            f"Herdbook's {k}": v for k, v in sides[0].ask("about").items()
        }
        bench.recorder.conditions |= {
            f"llama.cpp's {k}": v for k, v in sides[1].ask("about").items()
        }
        if only in ("", "prefill"):
            bench.compare(
                sides,
                "prefill",
                f"{bench.prompt} new tokens in, one out",
                lambda side, ids: len(ids) / side.ask("first", ids=ids),
                lambda: bench.fresh(bench.prompt),
                bench.rounds,
            )
        if only in ("", "decode"):
            bench.compare(
                sides,
                "decode, one chat",
                f"64 tokens in, {bench.new} out, greedy; the time after the first",
                lambda side, ids: side.ask("decode", ids=ids, new=bench.new),
                lambda: bench.fresh(64),
                bench.rounds,
            )
    finally:
        close(sides)


def many_chats(bench: Bench, only: str) -> None:
    """Eight chats at once, with and without a common beginning, and the memory that this takes."""
    chats, new, prefix = 8, bench.chat_new, bench.prompt
    size = {"slots": chats, "slot_tokens": prefix + 32 + new + 32}
    sides = [
        open_side(bench, "Ours", "Herdbook", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_0/a part of the cache each", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_0/one cache for all", unified=True, **size),
    ]

    def shared() -> list[list[int]]:
        common = bench.fresh(prefix)
        return [common + bench.fresh(32) for _ in range(chats)]

    def distinct() -> list[list[int]]:
        return [bench.fresh(prefix) for _ in range(chats)]

    def ask(side: Side, prompts: Any) -> float:
        return float(side.ask("chats", prompts=prompts, new=new))

    what = "all submitted at once; tokens out by the time of all"
    try:
        if only in ("", "shared"):
            bench.compare(
                sides,
                f"{chats} chats, shared prefix",
                f"{prefix} common tokens, never seen before, and 32 of each chat's own; {new} out "
                f"each; {what}",
                ask,
                shared,
                bench.many_rounds,
            )
        if only in ("", "distinct"):
            bench.compare(
                sides,
                f"{chats} chats, distinct prompts",
                f"{prefix} tokens in, {new} out each; {what}",
                ask,
                distinct,
                bench.many_rounds,
            )
        if only in ("", "memory"):
            if only:
                for side in sides:
                    ask(side, distinct())
            found = {side.name: [side.ask("resident") / 2**20] for side in sides}
            bench.claim(
                "resident memory, serving",
                f"VmRSS after {chats} chats of {prefix} + {new} tokens, a cache of "
                f"{chats * size['slot_tokens']} tokens on either side (ours in its compute format, "
                "llama.cpp's in float16), Python included on both",
                "MiB",
                found,
                more=False,
            )
    finally:
        close(sides)


def short_chats(bench: Bench, only: str) -> None:
    """Many small ones."""
    chats, prompt, new = (8 if bench.quick else 32), 32, bench.chat_new
    size = {"slots": chats, "slot_tokens": prompt + new + 32}
    sides = [
        open_side(bench, "Ours", "Herdbook", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_0/a part of the cache each", **size),
        open_side(bench, "LlamaCpp", "llama.cpp Q4_0/one cache for all", unified=True, **size),
    ]
    try:
        bench.compare(
            sides,
            f"{chats} short chats at once",
            f"{prompt} distinct tokens in, {new} out each; tokens out by the time of all",
            lambda side, prompts: side.ask("chats", prompts=prompts, new=new),
            lambda: [bench.fresh(prompt) for _ in range(chats)],
            bench.many_rounds,
        )
    finally:
        close(sides)


def start(bench: Bench, only: str) -> None:
    """From nothing to the first token, as a person at a terminal waits."""
    count = str(THREADS)
    commands = {
        "Herdbook": [str(Path(sys.executable).parent / "herd"), "chat", "smollm2", "-p", QUESTION],
        "llama.cpp Q4_0": [sys.executable, "-c", FIRST_TOKEN, str(bench.q4_0), QUESTION, count],
        "llama.cpp Q4_1": [sys.executable, "-c", FIRST_TOKEN, str(bench.q4_1), QUESTION, count],
    }
    commands["Herdbook"] += ["--max-tokens", "16"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for name, command in commands.items():
        say(f"start, {name}, warming the file cache: {seconds_to_first_byte(command):.2f} s")
    for number in range(bench.rounds):
        for name, command in commands.items():
            found[name].append(seconds_to_first_byte(command))
        latest = ", ".join(f"{name} {values[-1]:.2f}" for name, values in found.items())
        say(f"start, round {number + 1} of {bench.rounds}: {latest} s")
    bench.claim(
        "start to first token",
        "`herd chat smollm2 -p …` against a Python process that loads the wheel's server without "
        "warming it up and streams the same chat; to the first byte on stdout; warm file cache",
        "s",
        found,
        more=False,
    )


def quality(bench: Bench, only: str) -> None:
    """What the speed costs: perplexity of the same tokens."""
    size, count = (32, 1) if bench.quick else (256, 4)
    windows = [bench.ids[n * size : (n + 1) * size] for n in range(count)]
    scored = sum(len(ids) - 1 for ids in windows)
    found: dict[str, list[float]] = {}
    for kind, name in (
        ("Ours", "Herdbook"),
        ("LlamaCpp", "llama.cpp Q4_0"),
        ("LlamaCpp", "llama.cpp Q4_1"),
    ):
        with open_side(bench, kind, name, slots=1, slot_tokens=size + 64) as side:
            found[name] = [math.exp(side.ask("nats", windows=windows) / scored)]
        say(f"perplexity: {name} {found[name][0]:.3f}")
    bench.claim(
        "perplexity",
        f"{scored} tokens of {bench.text_name} in windows of {size}; ours by `logits` of whole "
        "windows, llama.cpp's token by token through its server",
        "",
        found,
        more=False,
    )


#: works by the names that --only takes
WORKS: dict[str, Callable[[Bench, str], None]] = {
    "prefill": one_chat,
    "decode": one_chat,
    "shared": many_chats,
    "distinct": many_chats,
    "memory": many_chats,
    "short": short_chats,
    "start": start,
    "perplexity": quality,
}


def works(only: str) -> Iterator[Callable[[Bench, str], None]]:
    """The functions to call, each once."""
    yield from dict.fromkeys(work for name, work in WORKS.items() if only in ("", name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no results")
    parser.add_argument("--only", choices=WORKS, default="", help="one work; writes no results")
    parser.add_argument("--side", choices=("Ours", "LlamaCpp", "Transformers"), help="used within")
    given = parser.parse_args()
    if given.side:
        serve({"Ours": Ours, "LlamaCpp": LlamaCpp, "Transformers": Transformers}[given.side]())
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="herdbook-bench-") as folder:
        bench = Bench(Path(folder), given.quick)
        for work in works(given.only):
            work(bench, given.only)
    say(f"{time.monotonic() - begun:.0f} s in all")
    if not given.quick and not given.only:
        bench.recorder.write()


if __name__ == "__main__":
    main()
