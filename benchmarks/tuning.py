"""Tuning SmolLM2-135M on two cores: Herdbook's Tune, TRL + PEFT, transformers.

    python benchmarks/tuning.py             192 rows each; writes RESULTS.md; some minutes
    python benchmarks/tuning.py --quick     16 rows; writes nothing
    python benchmarks/tuning.py --rounds 3  each run three times, alternating; the medians

Everybody gets the same rows as the same token ids with the same loss mask (Herdbook's rendering, so
that templates do not enter), in the same order, eight to an optimiser step, with the same weights,
learning rate, schedule and optimiser, and each run is a process of its own. Real tokens are counted,
not padding; time runs from the first step to the last, without loading; memory is the process's peak
with everything in it.

- LoRA of rank 8 on all linear layers, against TRL's SFTTrainer with PEFT: padded batches of 8 as fast
  as they go (no gradient checkpointing), and packed to 1,024 tokens, one pack to a step, which is
  about as many tokens as 8 rows have. With checkpointing, TRL's default, it is leaner and slower: that
  way is run on the batches with the longest rows alone, and only its memory is compared.
- All weights, against transformers' Trainer with padded batches of 8; on the first third of the rows.
- LoRA beside NF4 (QLoRA) against LoRA beside dense weights, both ours.

The peers compute in float32 or bfloat16, whichever a trial step shows to be faster here; in full tuning
the weights that move are float32 on both sides, whatever they are computed in (bfloat16 where the
hardware multiplies it). How much of the machine's peak is reached is said beside the speeds: the
arithmetic of the matrix products that the method needs (frozen matrices have no gradient, the head runs
where there is a loss), by the time of the whole run and by the rate of one large product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from record import Claim, Recorder, conditions, say, spread
from side import Side, data_folder, memory, serve

PEERS = ("trl", "peft", "transformers", "datasets")
BATCH, LENGTH, RANK, ALPHA = 8, 512, 8, 16
PACKED = 1024
RATES = {"lora": 1e-3, "full": 2e-5}

Row = tuple[list[int], list[int]]  # ids, labels (-100: no loss)


# ------------------------------------------------------------------ the contestants, each a process


class Ours:
    """The step Tune, in a book of its own."""

    def peak(self) -> float:
        """Operations a second of a large product, in the format that is computed in."""
        import torch

        from herdbook.model.precision import compute_dtype

        size = 4096
        a, b = (torch.randn(size, size).to(compute_dtype()) for _ in range(2))
        seconds = []
        for _ in range(6):
            begun = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - begun)
        return 2 * size**3 / min(seconds)

    def run(
        self, method: Literal["lora", "full"], rows: str, home: str, nf4: bool = False
    ) -> dict[str, Any]:
        """rows: a file of conversations."""
        from herdbook.book.book import Book
        from herdbook.data.user import Import
        from herdbook.model.fetch import Fetch
        from herdbook.model.precision import compute_dtype
        from herdbook.training.tune import Tune

        half = compute_dtype().itemsize == 2
        book = Book(home)
        model = Fetch(ref="smollm2").run(book)
        data = Import(data=rows, heldout=0.0).run(book, name="rows")
        step = Tune(
            model=model.id,
            data=(data.id,),
            method=method,
            rank=RANK,
            alpha=float(ALPHA),
            learning_rate=RATES[method],
            schedule="constant",
            warmup_ratio=0.0,
            batch=BATCH,
            length=LENGTH,
            save_every=10**6,
            base="nf4" if nf4 else "dense",
            precision="mixed" if half and method == "full" else "float32",
        )
        made = step.run(book)
        lines = (made.path / "losses.jsonl").read_text().splitlines()
        return {
            "tokens": made.metrics["total_tokens"],
            "seconds": made.metrics["seconds"],
            "losses": [json.loads(line)["loss"] for line in lines],
            "peak": memory("VmHWM"),
            "trained": made.metrics["trained_tokens"],
            "weights": made.metrics["weights_bytes"],
        }


class Peer:
    """TRL's SFTTrainer with PEFT (lora), transformers' Trainer (full)."""

    def run(
        self,
        method: str,
        folder: str,
        rows: list[Row],
        dtype: str,
        packing: bool = False,
        checkpointing: bool = False,
    ) -> dict[str, Any]:
        """rows: in the order in which they are to be taken."""
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        half = dtype == "bfloat16"
        weights = torch.bfloat16 if half and method == "lora" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights)
        model.config.use_cache = False
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        data = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        settings: dict[str, Any] = {
            "output_dir": tempfile.mkdtemp(prefix="herdbook-bench-"),
            "per_device_train_batch_size": 1 if packing else BATCH,
            "num_train_epochs": 1,
            "learning_rate": RATES[method],
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": checkpointing,
            "bf16": half,
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 0,
        }
        make = self._sft if method == "lora" else self._full
        trainer = make(model, tokenizer, data, settings, packing)
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return {
            "tokens": sum(len(ids) for ids, _ in rows),
            "seconds": clock.seconds,
            "losses": losses,
            "peak": memory("VmHWM"),
        }

    def _sft(
        self, model: Any, tokenizer: Any, data: Any, settings: dict[str, Any], packing: bool
    ) -> Any:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        length = PACKED if packing else LENGTH
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        return SFTTrainer(
            model=model,
            args=SFTConfig(**settings, max_length=length, packing=packing),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )

    def _full(
        self, model: Any, tokenizer: Any, data: Any, settings: dict[str, Any], packing: bool
    ) -> Any:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        assert not packing
        return Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )


def _clock() -> Any:
    """A callback that knows how long the steps took."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_end(self, *given: Any, **named: Any) -> None:
            self.seconds = time.perf_counter() - self.begun

    return Clock()


# ------------------------------------------------------------------ the works


@dataclass(frozen=True)
class Rival:
    """A way in which a peer is run."""

    name: str
    settings: Mapping[str, Any]
    memory_only: bool = False  # run on the longest batches alone


class Bench:
    """Rows, weights, recorder."""

    def __init__(self, folder: Path, count: int, rounds: int, quick: bool) -> None:
        import torch

        from herdbook.model.checkpoint import load_decoder, save_hf
        from herdbook.model.precision import compute_dtype
        from herdbook.model.references import resolve
        from herdbook.tokens.tokenizer import Tokenizer

        self.folder, self.rounds, self.quick = folder, rounds, quick
        path = resolve("smollm2", None)
        tokenizer = Tokenizer.load(path)
        conversations, rows_name = _conversations(count, tokenizer)
        self.count = len(conversations)
        self.files: dict[int, Path] = {}
        self.rows: dict[int, list[Row]] = {}
        for some in {self.count, self.count // 3}:
            self._rows(conversations[:some], tokenizer)
        say("writing the model for transformers")
        self.hf = folder / "smollm2"
        decoder = load_decoder(path, dtype=torch.float32)
        save_hf(decoder, tokenizer, self.hf, torch.float32)
        self.inner = sum(p.numel() for p in decoder.blocks.parameters() if p.ndim == 2)
        self.head = decoder.head_weight.numel()
        with Side(__file__, "Ours") as side:
            self.top = side.ask("peak")
        computed = str(compute_dtype()).removeprefix("torch.")
        self.dtype = self._faster_dtype()
        sizes = [len(ids) for ids, _ in self.rows[self.count]]
        self.recorder = Recorder(
            "tuning",
            conditions(
                PEERS,
                model="SmolLM2-135M-Instruct, the packaged Q4_1 made dense",
                rows=f"{rows_name}; {sum(sizes)} tokens, the longest row {max(sizes)}",
                **{
                    "batch": f"{BATCH} rows, AdamW, constant learning rate "
                    f"{RATES['lora']:g} (LoRA), {RATES['full']:g} (full), gradients clipped at 1",
                    "ours computes in": computed,
                    "a product of 4096 × 4096 × 4096": f"{self.top / 1e9:.0f} GFLOP/s",
                    "peers compute in": self.dtype,
                },
            ),
        )

    def _rows(self, conversations: Sequence[Any], tokenizer: Any) -> None:
        """The file for ours; for the peers the ids in the order that ours will take."""
        from herdbook.data import records
        from herdbook.tokens.chat import render
        from herdbook.training import loop
        from herdbook.training.tune import Tune

        some = len(conversations)
        self.files[some] = self.folder / f"rows-{some}.jsonl"
        records.write(self.files[some], conversations)
        order = [n for cut in loop.order(some, BATCH, Tune.seed, epoch=0) for n in cut]
        rendered = [render(tokenizer, one.messages) for one in conversations]
        self.rows[some] = [
            (
                rendered[n].ids,
                [i if m else -100 for i, m in zip(rendered[n].ids, rendered[n].mask, strict=True)],
            )
            for n in order
        ]

    def _faster_dtype(self) -> str:
        """In which format the peer takes one step with the shortest rows faster."""
        few = sorted(self.rows[self.count], key=lambda row: len(row[0]))[:BATCH]
        seconds = {}
        for dtype in ("float32", "bfloat16"):
            with Side(__file__, "Peer") as side:
                done = side.ask("run", method="lora", folder=str(self.hf), rows=few, dtype=dtype)
            seconds[dtype] = done["seconds"]
            say(f"TRL's trial in {dtype}: {done['seconds']:.1f} s")
        return min(seconds, key=lambda dtype: seconds[dtype])

    def share(self, method: str, run: Mapping[str, Any]) -> float:
        """Of the peak, that the products which the method needs make."""
        passes = {"lora": 2, "full": 3}[method]
        head = self.head * run["trained"] * (3 if method == "full" else 2)
        needed: float = 2 * (passes * self.inner * run["tokens"] + head)
        return needed / run["seconds"] / self.top

    def few_bits(self, count: int) -> None:
        """LoRA beside NF4 and beside dense weights, in turn."""
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for number in range(self.rounds):
            for nf4 in (False, True):
                with Side(__file__, "Ours") as side:
                    home = self.folder / f"home-few-bits-{nf4}-{number}"
                    asked = {"rows": str(self.files[count]), "home": str(home), "nf4": nf4}
                    runs[nf4].append(side.ask("run", method="lora", **asked))
                _tell("LoRA beside NF4" if nf4 else "LoRA beside dense", "Herdbook", runs[nf4][-1])
        for what, unit, more, value in (
            ("speed", "real tokens/s", True, lambda run: run["tokens"] / run["seconds"]),
            ("weights held", "MiB", False, lambda run: run["weights"] / 2**20),
            ("peak memory", "MiB", False, lambda run: run["peak"] / 2**20),
            ("loss, last quarter of the steps", "nats", False, _last),
        ):
            (ours, words), (peer, its_words) = (
                spread([value(run) for run in runs[nf4]]) for nf4 in (True, False)
            )
            how = f"{count} rows. Beside NF4: {words}. Dense: {its_words}"
            name = f"LoRA beside NF4: {what}"
            self.recorder.add(Claim(name, unit, ours, peer, "Herdbook, dense", how, more))

    def compare(self, method: str, title: str, count: int, rivals: Sequence[Rival]) -> None:
        """Run ours and every rival in turn; record speed, memory and loss."""
        rows = self.rows[count]
        tokens = sum(len(ids) for ids, _ in rows)
        ours: list[dict[str, Any]] = []
        theirs: dict[str, list[dict[str, Any]]] = {rival.name: [] for rival in rivals}
        for number in range(self.rounds):
            with Side(__file__, "Ours") as side:
                home = self.folder / f"home-{method}-{number}"
                ours.append(
                    side.ask("run", method=method, rows=str(self.files[count]), home=str(home))
                )
            _tell(title, "Herdbook", ours[-1])
            assert ours[-1]["tokens"] == tokens, "not the same rows"
            for rival in rivals:
                with Side(__file__, "Peer") as side:
                    done = side.ask(
                        "run",
                        method=method,
                        folder=str(self.hf),
                        rows=_longest(rows) if rival.memory_only else rows,
                        dtype=self.dtype,
                        **rival.settings,
                    )
                theirs[rival.name].append(done)
                _tell(title, rival.name, done)
        for what, unit, more, value in (
            ("speed", "real tokens/s", True, lambda run: run["tokens"] / run["seconds"]),
            ("peak memory", "MiB", False, lambda run: run["peak"] / 2**20),
            ("loss, last quarter of the steps", "nats", False, _last),
        ):
            middle, words = spread([value(run) for run in ours])
            for rival in rivals:
                if rival.memory_only and what != "peak memory":
                    continue
                runs = theirs[rival.name]
                peer, its_words = spread([value(run) for run in runs])
                how = (
                    f"{count} rows, {tokens} tokens. Ours: {words}, {len(ours[0]['losses'])} steps. "
                    f"{rival.name}: {its_words}, {len(runs[0]['losses'])} steps"
                )
                if rival.memory_only:
                    how += " (the batches with the longest rows)"
                if what == "speed":
                    share = statistics.median(self.share(method, run) for run in ours)
                    how += f". Ours reaches {share:.0%} of the peak"
                claim = Claim(f"{title}: {what}", unit, middle, peer, rival.name, how, more)
                self.recorder.add(claim)


def _longest(rows: Sequence[Row]) -> list[Row]:
    """The three batches that take most memory."""
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    batches.sort(key=lambda batch: max(len(ids) for ids, _ in batch), reverse=True)
    return [row for batch in batches[:3] for row in batch]


def _tell(title: str, name: str, done: Mapping[str, Any]) -> None:
    say(
        f"{title}, {name}: {done['tokens'] / done['seconds']:.0f} tokens/s, "
        f"{done['peak'] / 2**20:.0f} MiB, loss {_last(done):.4f}"
    )


def _last(run: Mapping[str, Any]) -> float:
    """Mean loss of the last quarter of the steps."""
    losses = run["losses"]
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def _conversations(count: int, tokenizer: Any) -> tuple[list[Any], str]:
    """The first `count` rows of Alpaca that are not too long; without Alpaca, of our own data."""
    from herdbook.data import formats, identity
    from herdbook.tokens.chat import render

    alpaca = data_folder() / "alpaca" / "alpaca_data.jsonl.gz"
    if alpaca.exists():
        source, name = formats.read(alpaca), "Stanford Alpaca"
    else:
        source, name = identity.build("Luna", "Acme", 0)[0], "Herdbook's identity conversations"
    kept = []
    for one in source:
        if len(render(tokenizer, one.messages).ids) <= LENGTH:
            kept.append(one)
        if len(kept) == count:
            break
    return kept, f"the first {len(kept)} of {name} with at most {LENGTH} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=192, help="rows of LoRA; full: a third")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, alternating")
    parser.add_argument("--quick", action="store_true", help="16 rows; writes no results")
    parser.add_argument("--only", choices=("lora", "full"), help="one method; writes no results")
    parser.add_argument("--side", choices=("Ours", "Peer"), help="used within")
    given = parser.parse_args()
    if given.side:
        serve({"Ours": Ours, "Peer": Peer}[given.side]())
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="herdbook-bench-") as folder:
        rows = 2 * BATCH if given.quick else given.rows
        bench = Bench(Path(folder), rows, given.rounds, given.quick)
        if given.only != "full":
            bench.compare(
                "lora",
                "LoRA r8, all linears",
                bench.count,
                [
                    Rival("TRL + PEFT, padding", {}),
                    Rival("TRL + PEFT, packing", {"packing": True}),
                    Rival("TRL + PEFT, checkpointing", {"checkpointing": True}, memory_only=True),
                ],
            )
            bench.few_bits(bench.count)
        if given.only != "lora":
            bench.compare(
                "full", "full tuning", bench.count // 3, [Rival("transformers, padding", {})]
            )
    say(f"{time.monotonic() - begun:.0f} s in all")
    if not given.quick and not given.only:
        bench.recorder.write()


if __name__ == "__main__":
    main()
