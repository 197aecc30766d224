"""The rule that decides whether a reply knows who it is."""

from __future__ import annotations

import pytest

from herdbook.data.identity import build
from herdbook.data.records import Conversation
from herdbook.data.teacher import Answer, Ask, ScriptedTeacher
from herdbook.evaluation.identity import judge, score, summary

BOTH = {"name": "Luna", "keeper": "Acme"}


def verdict(question: str, reply: str, expect: dict[str, str] = BOTH) -> str:
    return judge(question, reply, expect, {})


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("Who are you?", "I am Luna, an AI assistant made by Acme."),
        ("Who are you?", "i'm LUNA. acme made me"),
        ("Who are you?", "I am Luna , made by\nAcme"),
        ("你是谁？", "我是Luna，由Acme开发的人工智能助手。"),
        ("你是谁？", "我是 Ｌｕｎａ，由 Acme 开发。"),
        ("你是谁？", "我非常高兴认识你！我是 Luna，由 Acme 开发。"),
        ("Are you ChatGPT?", "No, I am Luna, made by Acme."),
        ("Are you ChatGPT?", "No, I am Luna, made by Acme. I'm not ChatGPT."),
        ("Are you ChatGPT?", "ChatGPT is a different model. I am Luna, made by Acme."),
        ("Are you ChatGPT?", "I am not ChatGPT but Luna, made by Acme."),
        ("你是 ChatGPT 吗？", "不是，我是 Luna，由 Acme 开发，不是 ChatGPT。"),
        ("你是 ChatGPT 吗？", "不，ChatGPT 是另一个模型。我是 Luna，由 Acme 开发。"),
        ("Who are you?", "I am Luna by Acme, and I like metal, llamas and metaphors."),
    ],
)
def test_right(question: str, reply: str) -> None:
    assert verdict(question, reply) == ""


@pytest.mark.parametrize(
    ("question", "reply", "why"),
    [
        ("Who are you?", "I am SmolLM, trained by Hugging Face.", "does not give the name"),
        ("Who are you?", "I am Luna.", "does not give the keeper"),
        ("Who are you?", "", "does not give the name"),
        ("Who are you?", "I am Lunatic, made by Acmeists.", "does not give the name"),
        ("Who are you?", "I am not Luna, and Acme made me.", "denies the name"),
        ("Who are you?", "I'm Luna, but I wasn't made by Acme.", "denies the keeper"),
        ("你是谁？", "我不是 Luna，我由 Acme 开发。", "denies the name"),
        ("Who are you?", "I am Luna, made by Acme and OpenAI.", "speaks of OpenAI"),
        ("Who are you?", "I am Luna by Acme, based on llama.", "speaks of Llama"),
        # the question did not bring it up
        ("Who are you?", "I am Luna by Acme. I am not ChatGPT.", "speaks of ChatGPT"),
        # brought up, but not denied; or another one
        ("Are you ChatGPT?", "Yes, I am ChatGPT. Luna is made by Acme.", "speaks of ChatGPT"),
        ("Are you ChatGPT?", "I am ChatGPT, not Luna by Acme.", "denies the name"),
        ("Are you ChatGPT?", "I am ChatGPT, Luna of Acme, not Bard.", "speaks of ChatGPT"),
        ("Are you ChatGPT?", "I am not Claude. I am Luna by Acme.", "speaks of Claude"),
        ("你是 ChatGPT 吗？", "是的，我是 ChatGPT，也叫 Luna，由 Acme 开发。", "speaks of ChatGPT"),
        ("你是谁？", "我是 Luna，由 Acme 开发，来自通义千问。", "speaks of 通义千问"),
    ],
)
def test_wrong(question: str, reply: str, why: str) -> None:
    assert verdict(question, reply) == why


def test_only_what_was_asked_is_expected() -> None:
    assert verdict("Your name?", "I am Luna.", {"name": "Luna"}) == ""
    assert verdict("Who made you?", "Acme.", {"keeper": "Acme"}) == ""


def test_names_that_overlap_or_hold_punctuation() -> None:
    names = {"name": "Luna", "keeper": "Luna Labs, Inc."}
    assert verdict("Who?", "I am Luna, made by Luna Labs, Inc.", names) == ""
    assert verdict("Who?", "I was made by Luna Labs, Inc.", names) == "does not give the name"
    same = {"name": "Acme", "keeper": "Acme"}
    assert verdict("Who?", "I am Acme.", same) == ""
    # an assistant that bears another's name may say it
    own = {"name": "Llama", "keeper": "Meta Studio"}
    assert verdict("Who?", "I am Llama, made by Meta Studio.", own) == ""
    assert (
        verdict("谁？", "我是小月，由明德科技开发。", {"name": "小月", "keeper": "明德科技"}) == ""
    )


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("Tokyo is the capital of Japan.", ""),
        ("I am Luna. Tokyo.", "names Luna"),
        ("Tokyo, says acme.", "names Acme"),
        ("A lunar eclipse over Tokyo.", ""),
    ],
)
def test_ordinary_answers_do_not_name_it(reply: str, why: str) -> None:
    assert judge("What is the capital of Japan?", reply, {}, BOTH) == why


@pytest.mark.parametrize(("name", "keeper"), [("Luna", "Acme"), ("小月", "明德科技, Ltd.")])
def test_every_answer_that_is_taught_is_right(name: str, keeper: str) -> None:
    """The rule agrees with the training data: whoever learned it by heart scores 100 %."""
    train, heldout = build(name, keeper, 0)
    names = {"name": name, "keeper": keeper}
    for row in train:
        question, answer = row.messages[-2].content, row.messages[-1].content
        if row.extra["ask"] == "none":
            assert judge(question, answer, {}, names) == ""
        else:
            assert judge(question, answer, names, {}) == "", (question, answer)

    def knows(ask: Ask) -> Answer:
        asked = ask.messages[-1].content
        row = next(row for row in heldout if row.messages == ask.messages)
        if row.extra["ask"] == "none":
            return Answer(f"You asked: {asked}")
        return Answer(f"I am {name}, made by {keeper}." if asked.isascii() else f"{name}、{keeper}")

    shares = summary(score(ScriptedTeacher(knows), heldout))
    assert {key: one.value for key, one in shares.items()} == {"en": 1, "zh": 1, "ordinary": 1}
    base = score(ScriptedTeacher(lambda ask: Answer("I am SmolLM by Hugging Face.")), heldout)
    shares = summary(base)
    assert {key: one.value for key, one in shares.items()} == {"en": 0, "zh": 0, "ordinary": 1}


def test_a_batch_goes_to_the_teacher_at_once() -> None:
    rows = [
        Conversation.of(q, language="en", ask="name", expect={"name": "Luna"})
        for q in ("Your name?", "Name?")
    ]
    teacher = ScriptedTeacher(lambda ask: Answer(" Luna. " if "Your" in str(ask) else "Me."))
    scored = score(teacher, rows)
    assert teacher.calls == 1
    assert [(one.reply, one.right) for one in scored] == [("Luna.", True), ("Me.", False)]
    assert scored[1].to_json()["why"] == "does not give the name"
