"""Teach a model to tell texts apart: a linear head on the last token's hidden state, and the model under
it as its method says.

    {"text": "The soup was cold.", "label": "bad"}      one line of the file
    {"messages": [{"role": …}, …], "label": "spam"}

    scores [labels] = W · hidden of the last token      loss: −log softmax(scores)[label]

The result is a model as transformers has it for this (`LlamaForSequenceClassification`: score.weight,
id2label), adapters merged; `herdbook.load(ref).classify(texts)` asks it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from herdbook.book.step import Bench, Input, require
from herdbook.data.rows import lines
from herdbook.errors import ConfigError, DataError
from herdbook.files import atomic
from herdbook.model.checkpoint import save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Linear
from herdbook.model.layout import Packed
from herdbook.model.lora import merge_lora
from herdbook.tokens.chat import Rendering, render
from herdbook.tokens.packing import Pack
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import loop, methods, parallel
from herdbook.training.tune import Tune

METHODS = ("full", "freeze", "lora", "ia3")


@dataclass(frozen=True)
class Labelled(Rendering):
    """A text and what it is."""

    label: int = 0


@dataclass(frozen=True)
class LabelledPack(Pack):
    labels: tuple[int, ...] = ()  # of each document


class Labels:
    """The objective: each document's label by its last token. Weighed by documents."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def packs(self, rows: Sequence[Rendering], capacity: int) -> list[Pack]:
        """In the order of the rows, as many in a pack as fit."""
        groups: list[list[Labelled]] = []
        room = 0
        for row in rows:
            assert isinstance(row, Labelled)
            if len(row.ids) > room:
                groups.append([])
                room = capacity
            groups[-1].append(row)
            room -= len(row.ids)
        return [
            LabelledPack(
                [id for row in group for id in row.ids],
                [one for row in group for one in row.mask],
                [len(row.ids) for row in group],
                tuple(row.label for row in group),
            )
            for group in groups
        ]

    def weight(self, pack: Pack) -> int:
        return len(pack.lengths)

    def loss(self, pack: Pack) -> Tensor:
        assert isinstance(pack, LabelledPack)
        scores = self.scores(pack)
        return cross_entropy(
            scores, torch.tensor(pack.labels, device=scores.device), reduction="sum"
        )

    def scores(self, pack: Pack) -> Tensor:
        """float32 [documents, labels]; what a reward's pairs would compare, too."""
        where = self.decoder.device
        hidden = self.decoder(torch.tensor(pack.ids, device=where), Packed(pack.lengths, where))
        ends = torch.tensor(pack.lengths, device=where).cumsum(0) - 1
        return self.decoder.scores(hidden[ends])


@dataclass(frozen=True)
class Classify(Tune):
    """Train a model to give texts one of several labels."""

    kind: ClassVar[str] = "model"

    #: a file of lines {"text": …, "label": …}, or with messages in place of text
    file: str = ""
    #: a dataset is not asked for
    data: tuple[Input, ...] = ()
    #: the share that is not trained on, and that accuracy is measured on
    heldout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", "model")

    def fingerprint(self) -> dict[str, str]:
        file = Path(self.file)
        return {"file": atomic.sha256_once(file)} if file.is_file() else {}

    def check(self) -> None:
        super().check()
        if self.method not in METHODS or self.base != "dense":
            raise ConfigError(
                f"classify.method is {self.method} and classify.base is {self.base}",
                rule="but a classifier is a model of its own: adapters are merged into dense weights",
                next=f"set method to {' or '.join(METHODS)}, and base to dense",
            )
        if "base" in self.offload:
            raise ConfigError(
                "classify.offload is base",
                rule="but a classifier is a model of its own, whose weights are merged and written",
                next="leave base out of it",
            )
        if not 0 <= self.heldout < 1:
            raise ConfigError(
                f"classify.heldout is {self.heldout}", rule="is no share from 0 to below 1"
            )

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "model", "file")
        if not parallel.Team().alone:
            raise ConfigError(
                "Classify in several processes",
                rule="is not there yet: it trains in one",
                next="run it without torchrun",
            )
        source = bench.artifact("model")
        tokenizer = Tokenizer.load(source.path)
        labels, rows = self._labelled(bench, tokenizer)
        order = list(range(len(rows)))
        random.Random(f"heldout/{self.seed}").shuffle(order)
        count = max(1, round(self.heldout * len(rows))) if self.heldout else 0
        held, train = order[:count], sorted(order[count:])
        decoder = self._load(source, torch.float32)
        put_score(decoder, labels, self.seed)
        parameters = methods.prepare(decoder, self)
        assert decoder.score is not None
        parameters["score.weight"] = decoder.score.weight
        decoder.score.requires_grad_(True)
        objective = Labels(decoder)
        learnt = [rows[n] for n in train]
        plan = self._plan(learnt, decoder.parameter_count())
        state = loop.train(
            objective,
            parameters,
            learnt,
            plan,
            bench.work,
            bench.progress,
            offload="optimiser" in self.offload,
        )
        merge_lora(decoder)
        records = state.records
        lines = "".join(json.dumps(record) + "\n" for record in records)
        atomic.write_text(bench.out / "losses.jsonl", lines)
        save_hf(decoder, tokenizer, bench.out, torch.float32)
        found: dict[str, Any] = {}
        if held:
            decoder.eval()
            with torch.no_grad():
                packs = objective.packs([rows[n] for n in held], plan.pack)
                chosen = torch.cat([objective.scores(one).argmax(-1).cpu() for one in packs])
            right = chosen == torch.tensor([rows[n].label for n in held])
            found = {"heldout_accuracy_share": float(right.float().mean()), "heldout": len(held)}
        return found | {
            "loss": records[-1]["loss"],
            "first_loss": records[0]["loss"],
            "steps": state.step,
            "rows": len(train),
            "labels": len(labels),
            "seconds": round(state.seconds, 2),
            "trainable_parameters": sum(p.numel() for p in parameters.values()),
        }

    def _labelled(self, bench: Bench, tokenizer: Tokenizer) -> tuple[list[str], list[Labelled]]:
        """The labels in alphabetical order, and the rows that are short enough."""
        named = list(read(Path(self.file)))
        labels = sorted({label for _, label in named})
        if len(labels) < 2:
            raise DataError(
                f"{self.file} names {labels or 'no label'}",
                rule="and to tell apart there must be two",
                next="give rows of each label",
            )
        rows: list[Labelled] = []
        for asked, label in named:
            if isinstance(asked, str):
                ids = tokenizer.prompt(asked)
            else:
                ids = render(tokenizer, asked).ids
            if 0 < len(ids) <= self.length:
                last = [False] * (len(ids) - 1) + [True]
                rows.append(Labelled(ids, last, labels.index(label)))
        if left := len(named) - len(rows):
            bench.progress.say(
                f"left out {left} of {len(named)} rows: empty, or more than {self.length} tokens"
            )
        if len(rows) < 2:
            raise DataError(
                f"{self.file}: {len(rows)} rows of at most {self.length} tokens",
                rule="are too few to learn from",
                next="raise length, or give more rows",
            )
        return labels, rows


def read(path: Path) -> Iterator[tuple[Any, str]]:
    """(text or messages, label) of each line. DataError names the line that is neither."""
    if not path.is_file():
        raise DataError(f"{path}", rule="is no file", next="check the path")
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            asked, label = row.get("text", row.get("messages")), row["label"]
            assert isinstance(asked, (str, list)) and isinstance(label, (str, int))
        except (ValueError, KeyError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{path}, line {number}: {line.rstrip()[:80]}",
                rule="is no text with a label",
                next='write {"text": "…", "label": "…"}',
            ) from error
        yield asked, str(label)


def put_score(decoder: Decoder, labels: Sequence[str], seed: int) -> None:
    """A head for these labels in place of another one, drawn near zero by the seed. The one that gives
    words is left out."""
    decoder.config = dataclasses.replace(decoder.config, labels=tuple(labels))
    score = Linear(decoder.config.hidden, len(labels))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(score.weight.shape).normal_(0, 0.02, generator=generator)
    score.weight = nn.Parameter(drawn.to(decoder.device), requires_grad=False)
    decoder.score, decoder.head = score, None
    decoder.headless = not decoder.config.tied
