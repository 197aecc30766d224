"""What a reply is worth, by hand."""

from __future__ import annotations

import pytest

from herdbook.errors import UnknownName
from herdbook.evaluation.marks.scorers import contains, exact, last_number, letter, number, scorer
from herdbook.evaluation.tasks.task import Item


def item(answer: str, choices: str = "ABCD") -> Item:
    right = (choices.index(answer),) if answer in choices else ()
    return Item("1", "", "", (), "", "", tuple(choices), right, answer)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Paris", 1),
        (" paris.\n", 1),
        ("「ＰＡＲＩＳ」", 1),
        ("Paris, France", 0),
        ("", 0),
        ("Pari s", 0),
    ],
)
def test_exact(reply: str, value: float) -> None:
    assert exact(item("Paris"), reply).value == value


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [
        ("Paris", "It is PARIS, I think.", 1),
        ("art", "a party", 0),
        ("巴黎", "首都是巴黎。", 1),
        ("12", "112", 0),
        ("12", "It is 12!", 1),
    ],
)
def test_contains(answer: str, reply: str, value: float) -> None:
    assert contains(item(answer), reply).value == value


@pytest.mark.parametrize(
    ("reply", "strict", "loose"),
    [
        ("so 9 * 2 = 18\n#### 18", 1, 1),
        ("#### $1,8", 0, 0),
        ("####18.00", 1, 1),
        ("#### 18 eggs, not 17", 1, 1),
        ("The answer is 18.", None, 1),
        ("18 and then 17", None, 0),
        ("none", None, None),
        ("", None, None),
        ("#### -18", 0, 0),
        ("####", None, None),
    ],
)
def test_numbers(reply: str, strict: float | None, loose: float | None) -> None:
    asked = item("9 * 2 = <<9*2=18>>18\n#### 18")
    assert number(asked, reply).value == strict
    assert last_number(asked, reply).value == loose
    assert bool(number(asked, reply).why) == (strict is None)


def test_a_number_with_commas_on_either_side() -> None:
    assert number(item("#### 1,234"), "#### 1234").value == 1
    assert number(item("#### 70000"), "#### $70,000.00").value == 1
    assert number(item("no number"), "#### 1").why == "the reference 'no number' is no number"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("Ｂ。", "B"),
        ("B. Paris", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("First … therefore the correct answer is (B), since …", "B"),
        ("Answer: B", "B"),
        ("answer is \\boxed{B}", "B"),
        ("the best option is option B", "B"),
        ("让我们一步一步思考，\n1. A 不对。\n所以答案是B。", "B"),
        ("正确答案：B", "B"),
        ("答案为：选项B", "B"),
        ("故选B", "B"),
        ("因此，选择 B", "B"),
        ("选B", "B"),
        ("A and B are wrong; the answer is C.", "C"),
        ("The answer is A. No, the answer is B.", None),
        ("The answer is A or B.", None),
        ("A, B", None),
        ("答案是A和C", None),
        ("The answer is a number.", None),
        ("A. one\nB. two\nC. three", None),
        ("I think so.", None),
        ("The answer is E.", None),
        ("The answer is not B.", None),
        ("", None),
        ("A dog", None),
    ],
)
def test_letters(reply: str, said: str | None) -> None:
    for right in "ABCD":
        mark = letter(item(right), reply)
        assert mark.value == (None if said is None else float(said == right)), mark
        assert bool(mark.why) == (said is None)


def test_marks_that_mean_something_stay() -> None:
    assert exact(item("C"), "C#").value == 0 and exact(item("C#"), "c#.").value == 1
    assert exact(item("50"), "50%").value == 0
    assert last_number(item("12"), "The area is 12 m².").value == 1
    assert letter(item("A"), "本题不应选A。").value is None
    assert letter(item("A"), "本题应选A。").value == 1


def test_the_registry() -> None:
    assert scorer("exact") is exact
    with pytest.raises(UnknownName, match="did you mean 'exact'"):
        scorer("exakt")
