"""Marks of replies by reference, by tests and by constraints; named in `SCORERS` (scorers.py)."""

from __future__ import annotations

from collections.abc import Sequence

from herdbook.evaluation.code import running
from herdbook.evaluation.marks import constraints, extraction, ifeval, overlap
from herdbook.evaluation.marks.scorers import Mark
from herdbook.evaluation.tasks.task import Item


def references(item: Item) -> Sequence[str]:
    """The row's `answers` (or SQuAD's answers.text), else its one answer."""
    more = item.extra.get("answers")
    if isinstance(more, dict):
        more = more.get("text")
    return [str(one) for one in more] if isinstance(more, list) and more else [item.answer]


def exact_match(item: Item, reply: str) -> Mark:
    return Mark(overlap.exact_match(reply, references(item)))


def f1(item: Item, reply: str) -> Mark:
    return Mark(overlap.token_f1(reply, references(item)))


def _rouge(item: Item, reply: str, name: str) -> Mark:
    return Mark(max(overlap.rouge(reply, one)[name].f1 for one in references(item)))


def rouge1(item: Item, reply: str) -> Mark:
    return _rouge(item, reply, "rouge1")


def rouge2(item: Item, reply: str) -> Mark:
    return _rouge(item, reply, "rouge2")


def rouge_l(item: Item, reply: str) -> Mark:
    return _rouge(item, reply, "rougeL")


def sentence_bleu(item: Item, reply: str) -> Mark:
    """Over 100, so that a mark is a share. A corpus's BLEU is `overlap.bleu` over all replies."""
    return Mark(overlap.sentence_bleu(reply, references(item), "13a") / 100)


def sentence_bleu_zh(item: Item, reply: str) -> Mark:
    return Mark(overlap.sentence_bleu(reply, references(item), "zh") / 100)


def fields(item: Item, reply: str) -> Mark:
    """F1 of extracted fields; the row's `fields`, or its answer, is the reference."""
    found = extraction.extraction_f1(reply, item.extra.get("fields", item.answer))
    return Mark(found, "" if found is not None else "no JSON object or list of values")


def code(item: Item, reply: str) -> Mark:
    """HumanEval's rows have `test`, MBPP's `test_list`. What runs and fails is wrong, not unparsed."""
    shape = running.human_eval if "test" in item.extra else running.mbpp
    found = running.check(shape(item.extra, reply))
    return Mark(float(found.passed), found.why)


def _followed(item: Item, reply: str) -> constraints.Followed:
    read = ifeval.read if "instruction_id_list" in item.extra else constraints.read
    return constraints.follows(read(item.extra), reply)


def followed(item: Item, reply: str) -> Mark:
    """All of a prompt's constraints, strictly."""
    return Mark(float(all(_followed(item, reply).strict)))


def followed_loose(item: Item, reply: str) -> Mark:
    return Mark(float(all(_followed(item, reply).loose)))


def instructions(item: Item, reply: str) -> Mark:
    """The share of a prompt's constraints, strictly; IFEval's own figure weighs every constraint
    alike: `constraints.accuracy`."""
    found = _followed(item, reply).strict
    return Mark(sum(found) / len(found))


def instructions_loose(item: Item, reply: str) -> Mark:
    found = _followed(item, reply).loose
    return Mark(sum(found) / len(found))
