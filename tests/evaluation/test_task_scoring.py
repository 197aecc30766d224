"""Scores by hand, and by a plain pass; the same whatever the order, the batches and what ran before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.evaluation.statistics import wilson
from herdbook.evaluation.tasks import choices, items, results, scoring
from herdbook.evaluation.tasks.task import Item, Task

from .toy import toy

SharedData = Callable[[str], Path]


def task(kind: str = "choice", **more: Any) -> Task:
    metrics = {"choice": ("acc",), "text": ("bits_per_byte",), "generate": ("exact",)}
    plain: dict[str, Any] = {"about": "", "version": 1, "data": "x", "prompt": "{{ q }}"}
    plain |= {"name": "made", "kind": kind, "metrics": metrics[kind]}
    return Task(**(plain | ({"options": ["A"]} if kind == "choice" else {}) | more))


def item(id: str, prompt: str, several: tuple[str, ...], right: int, **more: Any) -> Item:
    plain: dict[str, Any] = {"group": "", "intro": "", "shots": (), "delimiter": " "}
    return Item(id=id, prompt=prompt, choices=several, right=(right,), **(plain | more))


def every(model: Any, one: Task, some: list[Item], **how: Any) -> dict[str, dict[str, Any]]:
    rows = [
        row
        for batch in scoring.batches(model, one, some)
        for row in scoring.run(model, one, batch, **how)
    ]
    return {row["id"]: row for row in rows}


def test_likelihoods_by_hand() -> None:
    """log p: blank 0, a −1, b −2, c −3, each character by itself."""
    model = toy({" ": 0.0, "a": -1.0, "b": -2.0, "c": -3.0})
    asked = task(metrics=("acc", "acc_norm", "acc_bytes", "mrr", "mrr_bytes", "mass"))
    some = [
        item("sum", "q", ("aaa", "b", "c"), 1),  # −3, −2, −3; a character: −1, −2, −3
        item("tie", "q", ("aaa", "c", "bb"), 0),  # −3, −3, −4
        item("last", "q", ("a", "b", "c"), 2),
    ]
    rows = every(model, asked, some)
    assert rows["sum"]["logprobs"] == [-3.0, -2.0, -3.0] and rows["sum"]["choice"] == 1
    assert rows["sum"]["values"] == {
        "acc": 1,
        "acc_norm": 0,
        "acc_bytes": 0,
        "mrr": 1,
        "mrr_bytes": 1 / 2,
        "mass": pytest.approx(1 / (1 + 2 * math.exp(-1))),
    }
    tied = rows["tie"]["values"]
    assert (tied["acc"], tied["acc_norm"], tied["mrr"]) == (0.5, 1, 0.75)
    assert rows["last"]["values"]["mrr"] == 1 / 3
    order = ("sum", "tie", "last")
    found = results.summarise(asked, some, {0: [rows[one] for one in order]})
    assert found["value"] == 0.5 and found["chance"] == pytest.approx(1 / 3)
    assert found["metrics"]["mrr"]["value"] == pytest.approx((1 + 0.75 + 1 / 3) / 3)
    assert found["n"] == 3 and found["unparsed"]["count"] == 0


def test_metrics_of_choices_at_their_edges() -> None:
    alike = [-1.0] * 4
    assert choices.worth("acc", alike, "ABCD", {3}) == 0.25 == choices.chance("acc", 4, 1)
    assert choices.worth("mrr", alike, "ABCD", {0}) == pytest.approx(25 / 48)
    # two right ones among four alike: the first of them at rank 1, 2 or 3 in 3, 2, 1 of 6 orders
    assert choices.chance("mrr", 4, 2) == pytest.approx((3 * 1 + 2 / 2 + 1 / 3) / 6)
    assert choices.worth("mass", alike, "ABCD", {0, 1}) == 0.5
    assert choices.worth("acc_bytes", [-4.0, -3.0], ["一", "bb"], {0}) == 1  # −4/3 against −3/2
    assert choices.worth("acc_norm", [-4.0, -3.0], ["一", "bb"], {0}) == 0  # −4/1 against −3/2
    assert choices.worth("mass", [-2000.0, -2001.0], ["a", "b"], {0}) == pytest.approx(0.7310586)


def test_blanks_go_to_the_choice_and_what_is_too_long_loses_examples() -> None:
    shots = (("q1", " a"), ("q2", " b"))
    model = toy(most=12)
    one = item("1", "x  ", ("A", "B"), 0, shots=shots)
    (row,) = every(model, task(), [one]).values()
    assert model.engine.asked == ["q1 a\n\nx"]  # one example of two: 8 + 4 of 12
    assert row["shots"] == 1 and row["logprobs"] == [-36.0, -36.0]  # three blanks and a letter
    (row,) = every(toy(most=3), task(), [one]).values()
    assert row["values"] == {"acc": None} and row["why"] == {
        "acc": "2 tokens where the model takes 3"
    }


def test_unparsed_replies_are_counted_shown_and_wrong() -> None:
    said = ["#### 1", "#### 2", "no idea", "one"]
    some = [item(str(n), f"{n}", (), 0, answer="#### 1") for n in range(4)]
    some = [replace(one, right=()) for one in some]
    model = toy(reply=lambda request: said[int(chr(request.ids[-1]))])
    asked = task("generate", metrics=("number",))
    rows = every(model, asked, some)
    found = results.summarise(asked, some, {0: [rows[str(n)] for n in range(4)]})
    assert found["value"] == 0.25 and found["low"] == wilson(1, 4).low
    assert found["unparsed"]["share"] == 0.5
    assert found["unparsed"]["examples"] == [
        {"id": "2", "reply": "no idea", "why": "no number after ####"},
        {"id": "3", "reply": "one", "why": "no number after ####"},
    ]


def test_groups_and_seeds() -> None:
    asked = task("generate", average="group", temperature=1.0)
    some = [
        replace(item(str(n), "q", (), 0, group=group), right=()) for n, group in enumerate("xxxy")
    ]

    def rows(*values: float) -> list[dict[str, Any]]:
        return [{"id": str(n), "values": {"exact": one}} for n, one in enumerate(values)]

    found = results.summarise(asked, some, {0: rows(1, 1, 1, 0), 1: rows(1, 1, 0, 0)})
    assert found["averages"] == {"by question": 5 / 8, "by group": pytest.approx(5 / 12)}
    assert found["value"] == pytest.approx(5 / 12) and found["average"] == "by group"
    x = found["groups"]["x"]
    assert (x["n"], x["value"]) == (3, pytest.approx(5 / 6)) and x["low"] < x["value"] < x["high"]
    assert found["seeds"] == {"0": 0.75, "1": 0.5}
    assert found["spread"] == pytest.approx(0.25 / math.sqrt(2))
    assert found["low"] < found["value"] < found["high"]
    one, other = (
        {"value": value, "low": value - 0.03, "high": value + 0.04} for value in (0.2, 0.6)
    )
    whole = results.overall({"a": one, "b": other})
    assert whole["value"] == pytest.approx(0.4)
    assert whole["low"] == pytest.approx(0.4 - 0.03 / math.sqrt(2))
    assert whole["high"] == pytest.approx(0.4 + 0.04 / math.sqrt(2))


def test_few_questions_have_wide_intervals() -> None:
    """One question a group, all right: no proof of 100 %."""
    asked, some = (
        task("generate", average="group"),
        [replace(item(str(n), "q", (), 0, group=group), right=()) for n, group in enumerate("xyz")],
    )
    sure = [{"id": str(n), "values": {"exact": 1.0}} for n in range(3)]
    found = results.summarise(asked, some, {0: sure})
    below = 1 - wilson(1, 1).low
    assert (found["value"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(1 - below / math.sqrt(3))
    alike = [{"id": str(n), "values": {"exact": 0.5}} for n in range(3)]
    half = results.summarise(asked, some, {0: alike})["metrics"]["exact"]
    assert half["low"] == wilson(1.5, 3).low


def test_bits_of_a_text_by_hand() -> None:
    """«ab一»: nats 1, 2 and 9 over 5 bytes and 3 tokens."""
    text, asked = (
        Item("1", "", "", (), "ab一", ""),
        task("text", window=2, metrics=("bits_per_byte",)),
    )
    model = toy({"a": -1.0, "b": -2.0})
    (batch,) = scoring.batches(model, asked, [text])
    rows = scoring.run(model, asked, batch)
    assert [(row["nll"], row["tokens"], row["bytes"]) for row in rows] == [(3, 2, 2), (9, 1, 3)]
    found = results.summarise(asked, [text], {0: rows})
    assert found["value"] == pytest.approx(12 / 5 / math.log(2))
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(4))


# --------------------------------------------------------------------------------- a real decoder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load(str(tiny_folder), dtype="float32", device="cpu")


def some_items(count: int) -> list[Item]:
    dice = random.Random(1)
    words = ["who", "are", "you", "I", "am", "a", "small", "model", "你好", "你是谁"]

    def text(n: int) -> str:
        return " ".join(dice.choice(words) for _ in range(n))

    shots = {group: tuple((text(9), f" {text(2)}") for _ in range(2)) for group in "xy"}
    found = []
    for n in range(count):
        group, several = dice.choice("xy"), tuple({text(3), text(1), text(2)})
        one = item(str(n), text(8), several, 0, group=group, intro=f"about {group}: ")
        found.append(replace(one, shots=shots[group], answer=text(1)))
    return found


def test_a_score_is_the_plain_pass_s(tiny: LoadedModel) -> None:
    for one in (rows := some_items(5)):
        for said, logprob in zip(
            one.choices, every(tiny, task(), rows)[one.id]["logprobs"], strict=True
        ):
            context, whole = (
                tiny.tokenizer.encode(text) for text in (one.context(), f"{one.context()} {said}")
            )
            logs = torch.log_softmax(tiny.logits(whole).double(), -1)
            places = range(len(context), len(whole))
            wanted = sum(float(logs[at - 1, whole[at]]) for at in places)
            assert logprob == pytest.approx(wanted, abs=1e-4 * len(places))


@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("chat", [False, True])
def test_neither_order_nor_what_ran_before_changes_a_bit(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, kind: str, chat: bool
) -> None:
    monkeypatch.setattr(scoring, "SCORED", 5)
    monkeypatch.setattr(scoring, "GENERATED", 5)
    asked, some = task(kind, max_tokens=6, temperature=0.8 * (kind == "generate")), some_items(12)
    first = every(tiny, asked, some, chat=chat)
    tiny.generate(some[0].context(), max_tokens=3)  # a warm cache
    shuffled = random.Random(3).sample(some, len(some))
    assert every(tiny, asked, shuffled, chat=chat) == first
    fresh = LoadedModel(tiny.model, tiny.tokenizer, tiny.path)
    assert every(fresh, asked, some, chat=chat) == first
    if kind == "choice":  # other batches: other sums, so a bound
        fresh.engine = Engine(fresh.model, fresh.tokenizer, max_batch_tokens=7)  # type: ignore[misc]
        monkeypatch.setattr(scoring, "SCORED", 1)
        for id, row in every(fresh, asked, some, chat=chat).items():
            assert row["logprobs"] == pytest.approx(first[id]["logprobs"], abs=1e-3)


def test_a_chat_s_choice_is_what_the_template_lets_the_assistant_say(tiny: LoadedModel) -> None:
    one = item("1", "who are you", ("I am", "a model"), 0)
    ask = scoring._Chat(tiny)
    context, found = ask.choices(one, 0)
    assert context == tiny.render([{"role": "user", "content": "who are you"}], reply=True).ids
    assert [tiny.tokenizer.decode(ids) for ids in found] == ["I am", "a model"]


def test_drawn_replies_differ_by_seed_and_item_alone(tiny: LoadedModel) -> None:
    asked, some = task("generate", max_tokens=8, temperature=1.5), some_items(4)
    zero, one = (every(tiny, asked, some, seed=seed) for seed in (0, 1))
    assert zero == every(tiny, asked, some, seed=0) != one


def test_every_token_of_a_text_is_scored_once(tiny: LoadedModel) -> None:
    text = "hello who are you? I am a small model. 你好，你是谁？\n" * 4
    asked, whole = task("text", window=16), Item("1", "", "", (), text, "")
    rows = list(every(tiny, asked, [whole]).values())
    ids = tiny.tokenizer.encode(text)
    assert sum(row["tokens"] for row in rows) == len(ids)
    assert sum(row["bytes"] for row in rows) == len(text.encode())
    assert len(scoring.batches(tiny, asked, [whole], limit=3)[0]) == 3
    start = tiny.tokenizer.bos_id
    logs = torch.log_softmax(tiny.logits([start, *ids[:16]]).double(), -1)
    wanted = -sum(float(logs[at, id]) for at, id in enumerate(ids[:16]))
    assert rows[0]["nll"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["mmlu", "cmmlu", "gsm8k"])
def test_the_embedded_model(
    name: str, smollm2_path: Path, shared_data: SharedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERDBOOK_DATA", str(shared_data(name).parent))
    shipped = items.find(name)
    assert isinstance(shipped, Task)
    asked = replace(shipped.with_shots(1), max_tokens=24)
    some = items.questions(asked, 3).items
    model = load(str(smollm2_path))
    found = every(model, asked, some)
    for row in found.values():
        if name == "gsm8k":
            assert row["reply"].strip()
        else:
            assert len(row["logprobs"]) == 4 and max(row["logprobs"]) < 0
            assert min(row["logprobs"]) > -12, "a letter is no surprise after «Answer:»"
    if model.engine.runner._native is not None and name != "gsm8k":
        monkeypatch.setattr(scoring, "SCORED", 1)
        assert every(model, asked, some) == found, "to the bit, in any batches"
