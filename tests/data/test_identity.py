"""Identity conversations: many wordings, both names in each answer, nothing held out is trained."""

from __future__ import annotations

import pytest

from herdbook.book.book import Book
from herdbook.data import identity
from herdbook.data.identity import LONGEST, Identity, build, fill, normalised
from herdbook.data.records import Conversation
from herdbook.errors import ConfigError

NAMES = [
    ("Luna", "Acme"),
    ("小月", "明德科技"),
    ("Luna", "明德科技"),
    ("R2-D2 {keeper}", "A\\1 & Co."),
]


def question(row: Conversation) -> str:
    users = [m.content for m in row.messages if m.role == "user"]
    return users[-1]


@pytest.mark.parametrize(("name", "keeper"), NAMES)
def test_every_answer_names_both(name: str, keeper: str) -> None:
    train, heldout = build(name, keeper, 0)
    for row in train:
        answer = row.messages[-1]
        assert answer.role == "assistant"
        if row.extra["ask"] == "none":
            assert name not in answer.content and keeper not in answer.content
        else:
            assert name in answer.content and keeper in answer.content
    for row in heldout:
        assert row.messages[-1].role == "user"
        assert set(row.extra["expect"].values()) <= {name, keeper}
        assert bool(row.extra["expect"]) == (row.extra["ask"] != "none")
    text = "".join(m.content for row in train + heldout for m in row.messages)
    assert "{" not in text.replace(name, "")


def test_there_are_many_wordings_in_both_languages() -> None:
    train, heldout = build("Luna", "Acme", 0)
    for language in ("en", "zh"):
        mine = [row for row in train if row.extra["language"] == language]
        wordings = {normalised(question(row)) for row in mine if row.extra["ask"] != "none"}
        assert len(wordings) >= 150
        held = [row for row in heldout if row.extra["language"] == language]
        wordings = {normalised(question(row)) for row in held if row.extra["ask"] != "none"}
        assert len(wordings) >= 35
        assert sum(row.extra["ask"] == "none" for row in held) == 12
        assert {row.extra["ask"] for row in held} == {"name", "keeper", "both", "none"}
        # after small talk and under a system prompt, in training and held out
        for rows in (mine, held):
            assert sum(sum(m.role == "user" for m in row.messages) > 1 for row in rows) >= 3
            assert sum(row.messages[0].role == "system" for row in rows) >= 2
        answers = {row.messages[-1].content for row in mine if row.extra["ask"] != "none"}
        assert len(answers) >= (7 if language == "en" else 4)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_held_out_is_trained_on(seed: int) -> None:
    train, heldout = build("Luna", "Acme", seed)
    trained = {normalised(question(row)) for row in train}
    trained |= {normalised(m.content) for row in train for m in row.messages if m.role == "user"}
    for row in heldout:
        held = normalised(question(row))
        assert held not in trained
        # nor is one a trained wording with something before or behind it
        if row.extra["ask"] != "none":
            assert not any(len(one) > 12 and (one in held or held in one) for one in trained), held


def test_training_talks_back_to_other_identities() -> None:
    train, _ = build("Luna", "Acme", 0)
    asked = " ".join(question(row) for row in train if row.extra["ask"] == "not")
    assert "ChatGPT" in asked and "SmolLM" in asked and "OpenAI" in asked
    for row in train:
        if row.extra["ask"] == "not":
            assert row.messages[-1].content.startswith(("No", "不"))
    # an assistant that is called like another is not told that it is not
    llama, _ = build("Llama", "Meta", 0)
    for row in llama:
        if row.extra["ask"] == "not":
            assert "Llama" not in question(row) and "Meta" not in question(row)


def test_latin_names_in_chinese_text_get_their_spaces() -> None:
    assert fill("我是{name}，你好{name}", {"name": "Luna"}) == "我是 Luna，你好 Luna"
    assert fill("我是{name}", {"name": "小月"}) == "我是小月"
    assert fill("I am {name}.", {"name": "小月"}) == "I am 小月."
    assert fill("{name} by {keeper}", {"name": "{keeper}", "keeper": "X"}) == "{keeper} by X"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("!!", "no letter"),
        ("Lu\nna", "line break"),
        ("Lu\u2028na", "line break"),
        ("Lu\tna", "control"),
        ("x" * (LONGEST + 1), "has 61 characters"),
        ("<|im_end|>a", "mark of chat templates"),
    ],
)
@pytest.mark.parametrize("field", ["name", "keeper"])
def test_names_that_cannot_be(book: Book, field: str, name: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        Identity(**{field: name}).run(book)
    assert f"--{field}" in str(caught.value)
    assert not book.entries()


def test_names_are_stripped_and_unicode_is_welcome() -> None:
    assert identity.check_name("name", "  Zoë 月 ") == "Zoë 月"
    assert identity.check_name("name", "x" * LONGEST) == "x" * LONGEST
