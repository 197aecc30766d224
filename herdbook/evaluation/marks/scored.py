"""Marks of replies by reference, by tests and by constraints; named in `SCORERS` (scorers.py)."""

from __future__ import annotations

from collections.abc import Sequence

from herdbook.evaluation.code import running
from herdbook.evaluation.marks import constraints, extraction, ifeval, overlap
from herdbook.evaluation.marks.scorers import Mark, references
from herdbook.evaluation.tasks.task import Item


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
    """Over 100, so that a mark is a share."""
    return Mark(overlap.sentence_bleu(reply, references(item), "13a") / 100)


def sentence_bleu_zh(item: Item, reply: str) -> Mark:
    return Mark(overlap.sentence_bleu(reply, references(item), "zh") / 100)


def corpus_bleu(item: Item, reply: str) -> Mark:
    """BLEU of all replies together, over 100."""
    counts = overlap.bleu_counts(reply, references(item), "13a")
    return Mark(sentence_bleu(item, reply).value, counts=counts)


def corpus_bleu_zh(item: Item, reply: str) -> Mark:
    counts = overlap.bleu_counts(reply, references(item), "zh")
    return Mark(sentence_bleu_zh(item, reply).value, counts=counts)


def fields(item: Item, reply: str) -> Mark:
    """F1 of extracted fields; the row's `fields`, or its answer, is the reference."""
    wanted = item.extra.get("fields", item.answer)
    found, counts = extraction.extraction_f1(reply, wanted), extraction.counts(reply, wanted)
    return Mark(found, "" if found is not None else "no JSON object or list of values", counts)


def micro_f1(sums: Sequence[float]) -> float:
    """Of values in common, said and wanted; 1 where none was either."""
    common, said, wanted = sums
    return 2 * common / (said + wanted) if said + wanted else 1.0


def code(items: Sequence[Item], replies: Sequence[str]) -> list[Mark]:
    """HumanEval's rows have `test`, MBPP's `test_list`. What runs and fails is wrong, not unparsed."""
    tasks = [
        (running.human_eval if "test" in item.extra else running.mbpp)(item.extra, reply)
        for item, reply in zip(items, replies, strict=True)
    ]
    return [Mark(float(one.passed), one.why) for one in running.check_all(tasks)]


def _followed(item: Item, reply: str) -> constraints.Followed:
    read = ifeval.read if "instruction_id_list" in item.extra else constraints.read
    return constraints.follows(read(item.extra), reply)


def followed(item: Item, reply: str) -> Mark:
    """All of a prompt's constraints, strictly."""
    return Mark(float(all(_followed(item, reply).strict)))


def followed_loose(item: Item, reply: str) -> Mark:
    return Mark(float(all(_followed(item, reply).loose)))


def instructions(item: Item, reply: str) -> Mark:
    """A prompt's constraints, strictly. IFEval's figure weighs every constraint alike."""
    return _each(_followed(item, reply).strict)


def instructions_loose(item: Item, reply: str) -> Mark:
    return _each(_followed(item, reply).loose)


def _each(followed: Sequence[bool]) -> Mark:
    counts = float(sum(followed)), float(len(followed))
    return Mark(share(counts), counts=counts)


def share(sums: Sequence[float]) -> float:
    """The first of the second."""
    return sums[0] / sums[1]
