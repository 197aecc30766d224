"""Instruction following: every kind with replies that follow it and replies that do not."""

from __future__ import annotations

from typing import Any

import pytest

from herdbook.errors import DataError
from herdbook.evaluation.marks import constraints
from herdbook.evaluation.marks.constraints import KINDS, Followed, follows, read

CASES: list[tuple[dict[str, Any], str, str]] = [  # constraint, a reply that follows, one that does not
    ({"kind": "words", "at_least": 3, "at_most": 4}, "One two, three.", "One two."),
    ({"kind": "words", "exactly": 5}, "我爱北京城。", "我爱北京。"),
    ({"kind": "words", "exactly": 4}, "It's 你好 today!", "It is 你好 today"),
    ({"kind": "characters", "at_most": 4}, "你好 世界", "你好，世界"),
    ({"kind": "sentences", "exactly": 2}, "Pi is 3.14. So what?", "Yes. No. Maybe."),
    ({"kind": "sentences", "exactly": 3}, "早上好！吃了吗？我吃了。", "早上好，吃了吗，我吃了。"),
    ({"kind": "paragraphs", "exactly": 2}, "One.\n\nTwo.\nStill two.\n", "One.\nTwo."),
    ({"kind": "bullets", "exactly": 2}, "List:\n- one\n* two", "- one\n-two\n- three"),
    ({"kind": "bullets", "at_least": 2}, "1、苹果\n2、梨", "苹果和梨"),
    ({"kind": "placeholders", "at_least": 2}, "Dear [name], at [place]", "Dear [name]"),
    ({"kind": "placeholders", "at_least": 1}, "尊敬的【姓名】", "尊敬的先生"),
    ({"kind": "keywords", "words": ["Cat", "猫"]}, "a cat, 小猫", "a category, 小猫"),
    ({"kind": "no keywords", "words": ["cat"]}, "a category", "A CAT!"),
    ({"kind": "no keywords", "words": ["猫"]}, "小狗", "小猫咪"),
    ({"kind": "frequency", "word": "no", "exactly": 2}, "No, no note", "no"),
    ({"kind": "frequency", "word": "AI", "at_least": 1}, "用AI写作", "他说main"),
    ({"kind": "language", "is": "zh"}, "我用 Python 写程序", "I like 北京"),
    ({"kind": "language", "is": "en"}, "I like 北京", "Я люблю Пекин"),
    ({"kind": "json"}, '```json\n{"a": [1]}\n```', 'Here:\n{"a": [1]}'),
    ({"kind": "json"}, " [1, 2] ", "{'a': 1}"),
    ({"kind": "no comma"}, "No comma. 没有逗号。", "苹果、梨"),
    ({"kind": "no comma"}, "fine; so", "one, two"),
    ({"kind": "upper case"}, "HELLO 你好 1!", "HELLO World"),
    ({"kind": "lower case"}, "hello, 你好", "123 你好"),
    ({"kind": "starts", "with": "亲爱的"}, " 亲爱的朋友", "朋友，亲爱的"),
    ({"kind": "ends", "with": "That is all."}, "Yes. That is all.\n", "That is all. Or not"),
    ({"kind": "title"}, "<<On Cats>>\nText", "On Cats\nText"),
    ({"kind": "title"}, "《论猫》\n正文", "论猫"),
    ({"kind": "title"}, "# Cats\nText", "#hashtag"),
    ({"kind": "postscript"}, "Bye.\nP.S. Call me.", "I use PS often"),
    ({"kind": "postscript"}, "再见。\n附言：别忘了", "别忘了附言"),
]  # fmt: skip


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES)
def test_kinds(constraint: dict[str, Any], good: str, bad: str) -> None:
    (one,) = read({"constraints": [constraint]})
    assert one.check(good) and not one.check(bad)


def test_every_kind_is_tried() -> None:
    assert {case[0]["kind"] for case in CASES} == set(KINDS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "are not a list"),
        ([], "are not a list"),
        (["words"], "are not a list"),
        ([{"at_least": 3}], "'None' is not known"),
        ([{"kind": "word", "at_least": 3}], "did you mean 'words'"),
        ([{"kind": "words"}], "needs at_least, at_most or exactly"),
        ([{"kind": "words", "atleast": 3}], "did you mean 'at_least'"),
        ([{"kind": "words", "at_least": "3"}], "must be a whole number"),
        ([{"kind": "words", "at_least": True}], "must be a whole number"),
        ([{"kind": "words", "at_least": -1}], "must be a whole number"),
        ([{"kind": "words", "at_least": 5, "at_most": 3}], "at least 5 and at most 3"),
        ([{"kind": "words", "at_least": 5, "exactly": 6}], "exactly alone"),
        ([{"kind": "keywords"}], "needs words"),
        ([{"kind": "keywords", "words": []}], "needs words"),
        ([{"kind": "keywords", "words": ["a", 3]}], "must be a list of words"),
        ([{"kind": "frequency", "word": "a"}], "needs at_least"),
        ([{"kind": "frequency", "at_least": 2}], "needs word"),
        ([{"kind": "language", "is": "fr"}], "knows zh and en"),
        ([{"kind": "starts", "with": ""}], "needs with"),
        ([{"kind": "json", "strict": 1}], "is no parameter"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read({"constraints": given})


def test_strict_and_loose() -> None:
    ones = read({"constraints": [{"kind": "starts", "with": "Dear"}, {"kind": "no comma"}]})
    polite = "Sure, here it is:\n**Dear** Ann how are you\nAnything else, Ann?"
    assert follows(ones, polite) == Followed((False, False), (True, True))
    assert follows(ones, "Dear Ann") == Followed((True, True), (True, True))
    assert follows(ones, " \n") == Followed((False, False), (False, False))
    few = read({"constraints": [{"kind": "words", "at_most": 3}]})
    assert follows(few, "") == Followed((False,), (False,))


def test_loose_never_refuses_what_strict_accepts() -> None:
    for constraint, good, bad in CASES:
        ones = constraints.read({"constraints": [constraint]})
        for reply in (good, bad):
            found = follows(ones, reply)
            assert found.loose[0] or not found.strict[0]
