"""The templates for models that bring none: what they write, letter by letter, and what is learnt of it.

The expected strings are from the sources that each .jinja file names; ⟦ ⟧ stand around what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError, TemplateError, UnknownName
from herdbook.tokens import templates
from herdbook.tokens.bytebpe import ALPHABET
from herdbook.tokens.chat import render, show_plain
from herdbook.tokens.check import faults
from herdbook.tokens.sentence import CONTROL, NORMAL, USER_DEFINED
from herdbook.tokens.tokenizer import Tokenizer

INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
HUMAN, USER = CURIOUS.format("human"), CURIOUS.format("user")
EXPERT = "Hi. I am your assistant and I will provide expert full response in full details."
ANYTHING = " Please feel free to ask any question and I will always answer it."
YULAN = (
    "The following is a conversation between a human and an AI assistant namely YuLan, developed by "
    "GSAI, Renmin University of China. The AI assistant gives helpful, detailed, and polite answers "
    "to the user's questions."
)
HUATUO = "下面是一个问题，运用医学知识来正确回答提问."
LAWGPT = (
    "你是中国顶尖智能法律顾问 LaWGPT，具备强大的中文法律基础语义理解能力，能够出色地理解和执行与法律问题和"
    "指令。你只能回答与中国法律领域相关的问题，其余领域的问题请礼貌地拒绝回答。接下来，请依据中国法律来回答"
    "下面这个问题。"
)
ALPACA2 = "You are a helpful assistant. 你是一个乐于助人的助手。"

#: [system] be kind [user] Hi [assistant] Hello [user] Again [assistant] World
ROLES = ("system", "user", "assistant", "user", "assistant")
TALK = [
    {"role": role, "content": content}
    for role, content in zip(ROLES, ("be kind", "Hi", "Hello", "Again", "World"), strict=True)
]


class Form(NamedTuple):
    prompt: str  # asked "Hi", without a system message
    learnt: str  # TALK
    marks: tuple[str, ...] = ()  # tokens of the model's vocabulary that the form is made of


FORMS = {
    "alpaca": Form(
        f"<s>{INTRO}\n\n### Instruction:\nHi\n\n### Response:",
        "<s>be kind\n\n### Instruction:\nHi\n\n### Response:⟦Hello</s>⟧\n\n"
        "### Instruction:\nAgain\n\n### Response:⟦World</s>⟧",
    ),
    "alpaca-lora": Form(
        f"<s>{INTRO}\n\n### Instruction:\nHi\n\n### Response:\n",
        "<s>be kind\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello</s>⟧\n\n"
        "### Instruction:\nAgain\n\n### Response:\n⟦World</s>⟧",
    ),
    "aquila": Form(
        f"{HUMAN}###Human: Hi###Assistant:",
        "be kind###Human: Hi###Assistant:⟦ Hello###⟧Human: Again###Assistant:⟦ World###⟧",
    ),
    "aquila2": Form(
        "<|startofpiece|>Hi<|endofpiece|>",
        "be kind<|startofpiece|>Hi<|endofpiece|>⟦Hello</s>⟧"
        "<|startofpiece|>Again<|endofpiece|>⟦World</s>⟧",
        ("<|startofpiece|>", "<|endofpiece|>"),
    ),
    "aquila2-16k": Form(
        f"{HUMAN}###Human: Hi###Assistant:",
        "be kind###Human: Hi###Assistant:⟦ Hello</s>⟧Human: Again###Assistant:⟦ World</s>⟧",
    ),
    "aquila2-34b": Form(
        f"{HUMAN}\n\n### Human: Hi\n### Assistant: ",
        "be kind\n\n### Human: Hi\n### Assistant: ⟦Hello</s>⟧"
        "### Human: Again\n### Assistant: ⟦World</s>⟧",
    ),
    "baichuan": Form(
        "<reserved_102>Hi<reserved_103>",
        "be kind<reserved_102>Hi<reserved_103>⟦Hello<reserved_102>⟧Again<reserved_103>⟦World</s>⟧",
        ("<reserved_102>", "<reserved_103>"),
    ),
    "baichuan2": Form(
        "<reserved_106>Hi<reserved_107>",
        "be kind<reserved_106>Hi<reserved_107>⟦Hello<reserved_106>⟧Again<reserved_107>⟦World</s>⟧",
        ("<reserved_106>", "<reserved_107>"),
    ),
    "baize": Form(
        "sha256:1872934b4c44a397",
        "<s>be kind\n[|Human|]Hi\n[|AI|]⟦Hello\n[|Human|]⟧Again\n[|AI|]⟦World</s>⟧",
    ),
    "belle": Form(
        "Human: \nHi\n\nAssistant: \n",
        "be kind\n\nHuman: \nHi\n\nAssistant: \n⟦Hello</s>⟧Human: \nAgain\n\nAssistant: \n⟦World</s>⟧",
    ),
    "billa": Form(
        "<s>Human: Hi\nAssistant: ",
        "<s>be kind\nHuman: Hi\nAssistant: ⟦Hello\nHuman:⟧ Again\nAssistant: ⟦World</s>⟧",
    ),
    "bloomz": Form("Hi", "be kind\nHi⟦ Hello</s>⟧Again⟦ World</s>⟧"),
    "chatglm": Form(
        "Hi[gMASK]<sop>",
        "be kind\n[Round 0]\n问：Hi\n答：Hello\n[Round 1]\n问：Again\n答：[gMASK]<sop>⟦World<eop>⟧",
        ("[gMASK]", "<sop>", "<eop>"),
    ),
    "chatglm2": Form(
        "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：",
        "[gMASK]sopbe kind\n\n[Round 1]\n\n问：Hi\n\n答：⟦Hello\n\n[Round⟧ 2]\n\n问：Again\n\n答："
        "⟦World</s>⟧",
        ("[gMASK]", "sop"),
    ),
    "chatglm3": Form(
        "[gMASK]sop<|user|>\n Hi<|assistant|>\n",
        "[gMASK]sop<|system|>\n be kind<|user|>\n Hi<|assistant|>\n⟦ Hello<|user|>⟧\n Again"
        "<|assistant|>\n⟦ World</s>⟧",
        ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    "chatml": Form(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nAgain<|im_end|>\n"
        "<|im_start|>assistant\n⟦World<|im_end|>⟧\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "chatyuan": Form(
        r"用户：Hi\n小元：",
        r"be kind\n用户：Hi\n小元：⟦Hello\n用户：⟧Again\n小元：⟦World</s>⟧",
    ),
    "chinese-alpaca": Form(
        f"<s>{INTRO}\n\n### Instruction:\nHi\n\n### Response: ",
        "<s>be kind\n\n### Instruction:\nHi\n\n### Response: ⟦Hello</s>⟧\n\n"
        "### Instruction:\nAgain\n\n### Response: ⟦World</s>⟧",
    ),
    "chinese-alpaca-2": Form(
        f"<s>[INST] <<SYS>>\n{ALPACA2}\n<</SYS>>\n\nHi [/INST]",
        "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nHi [/INST]⟦ Hello</s>⟧"
        "<s>[INST] Again [/INST]⟦ World</s>⟧",
    ),
    "cpm-bee": Form(
        "<s><root></s><s>input</s><s>Hi</s><s><ans></s><s>",
        "<s><root></s><s>prompt</s><s>be kind</s><s>input</s><s>Hi\nHello\nAgain</s><s><ans></s><s>"
        "⟦World</s>⟧",
        ("<root>", "<ans>"),
    ),
    "dolly": Form(
        f"{INTRO}\n\n### Instruction:\nHi\n\n### Response:\n",
        "be kind\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello\n\n### End⟧\n\n"
        "### Instruction:\nAgain\n\n### Response:\n⟦World\n\n### End⟧",
    ),
    "expertllama": Form(
        "### Human:\nHi\n\n### Assistant:\n",
        "be kind\n\n### Human:\nHi\n\n### Assistant:\n⟦Hello</s>⟧\n\n"
        "### Human:\nAgain\n\n### Assistant:\n⟦World</s>⟧",
    ),
    "falcon": Form(
        "User: Hi\n\nAssistant:",
        "be kind\n\nUser: Hi\n\nAssistant:⟦ Hello\n\nUser⟧: Again\n\nAssistant:⟦ World</s>⟧",
    ),
    "firefly": Form("<s>Hi</s>", "<s>be kind\nHi</s>⟦Hello</s>⟧Again</s>⟦World</s>⟧"),
    "gpt4all-j": Form("Hi\n", "be kind\nHi\n⟦Hello</s>⟧Again\n⟦World</s>⟧"),
    "huatuo": Form(
        f"<s>{HUATUO}\n### 问题:\nHi\n### 回答:\n",
        "<s>be kind\n### 问题:\nHi\n### 回答:\n⟦Hello</s>⟧\n### 问题:\nAgain\n### 回答:\n⟦World</s>⟧",
    ),
    "internlm": Form(
        "<s><|User|>:Hi<eoh>\n<|Bot|>:",
        "be kind\n<s><|User|>:Hi<eoh>\n<|Bot|>:⟦Hello<eoa>⟧\n"
        "<s><|User|>:Again<eoh>\n<|Bot|>:⟦World<eoa>⟧\n",
        ("<eoh>", "<eoa>"),
    ),
    "internlm-1.1": Form(
        "<s><|User|>:Hi\n<|Bot|>:",
        "<s><|System|>:be kind\n<|User|>:Hi\n<|Bot|>:⟦Hello<eoa>⟧\n"
        "<|User|>:Again\n<|Bot|>:⟦World<eoa>⟧\n",
        ("<eoa>",),
    ),
    "internlm2": Form(
        "sha256:58e36809bb4a0d93",
        "<s><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nAgain<|im_end|>\n"
        "<|im_start|>assistant\n⟦World<|im_end|>⟧\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "koala": Form(
        "<s>BEGINNING OF CONVERSATION: USER: Hi GPT:",
        "<s>be kind USER: Hi GPT:⟦ Hello</s>⟧USER: Again GPT:⟦ World</s>⟧",
    ),
    "lawgpt": Form(
        f"<s>{LAWGPT}\n### 问题:\nHi\n### 回答:\n",
        "<s>be kind\n### 问题:\nHi\n### 回答:\n⟦Hello</s>⟧\n### 问题:\nAgain\n### 回答:\n⟦World</s>⟧",
    ),
    "linly": Form(
        "<s>### Instruction:Hi  ### Response:",
        "<s>be kind\n\n### Instruction:Hi  ### Response:⟦Hello</s>⟧"
        "### Instruction:Again  ### Response:⟦World</s>⟧",
    ),
    "llama-2": Form(
        "<s>[INST] Hi [/INST]",
        "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧"
        "<s>[INST] Again [/INST]⟦ World </s>⟧",
    ),
    "llama-3": Form(
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAgain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦World<|eot_id|>⟧",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Form(
        "<s>[INST] Hi [/INST]",
        "<s>[INST] be kind\nHi [/INST]⟦ Hello</s>⟧[INST] Again [/INST]⟦ World</s>⟧",
    ),
    "moss": Form(
        "sha256:b12258bdf25923cf",
        "be kind\n<|Human|>: Hi<eoh>\n<|MOSS|>:⟦ Hello<eom>⟧\n"
        "<|Human|>: Again<eoh>\n<|MOSS|>:⟦ World<eom>⟧\n",
        ("<|Human|>", "<|MOSS|>", "<eoh>", "<eom>"),
    ),
    "openbuddy": Form(
        "sha256:e3f45fb7c95dfbf9",
        "<s>be kind\n\nUser: Hi\nAssistant:⟦ Hello\nUser:⟧ Again\nAssistant:⟦ World</s>⟧",
    ),
    "panda": Form("<s>Hi", "<s>be kind\n\nHi\n\nHello\n\nAgain⟦ World</s>⟧"),
    "phoenix": Form(
        f"{HUMAN}\n\nHuman: <s>Hi</s>Assistant: <s>",
        "be kind\n\nHuman: <s>Hi</s>Assistant: <s>⟦Hello</s>⟧"
        "Human: <s>Again</s>Assistant: <s>⟦World</s>⟧",
    ),
    "rwkv-raven": Form(
        f"Bob: hi\n\nAlice: {EXPERT}{ANYTHING}\n\nBob: Hi\n\nAlice:",
        "be kind\n\nBob: Hi\n\nAlice:⟦ Hello\n\n⟧Bob: Again\n\nAlice:⟦ World\n\n⟧",
    ),
    "rwkv-world": Form(
        f"User: hi\n\nAssistant: {EXPERT}\n\nUser: Hi\n\nAssistant:",
        "be kind\n\nUser: Hi\n\nAssistant:⟦ Hello\n\n⟧User: Again\n\nAssistant:⟦ World\n\n⟧",
    ),
    "tigerbot": Form(
        "<s>\n\n### Instruction:\nHi\n\n### Response:\n",
        "<s>be kind\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello\n\n### Instruction:⟧\n"
        "Again\n\n### Response:\n⟦World</s>⟧",
    ),
    "vicuna": Form(
        f"<s>{USER} USER: Hi ASSISTANT:",
        "<s>be kind USER: Hi ASSISTANT:⟦ Hello</s>⟧USER: Again ASSISTANT:⟦ World</s>⟧",
    ),
    "vicuna-v0": Form(
        f"<s>{HUMAN}\n\n### Human: Hi\n### Assistant:",
        "<s>be kind\n\n### Human: Hi\n### Assistant:⟦ Hello\n###⟧ Human: Again\n### Assistant:"
        "⟦ World\n###⟧ ",
    ),
    "wizardlm": Form(
        "<s>Hi\n\n### Response:\n",
        "<s>be kind\n\nHi\n\n### Response:\n⟦Hello</s>⟧\n\nAgain\n\n### Response:\n⟦World</s>⟧",
    ),
    "yulan": Form(
        f"<s>{YULAN}\n[|Human|]:Hi\n[|AI|]:",
        "<s>be kind\n[|Human|]:Hi\n[|AI|]:⟦Hello\n[|Human|]:⟧Again\n[|AI|]:⟦World</s>⟧",
    ),
    "ziya": Form(
        "<s><human>:Hi\n<bot>:",
        "<s>be kind\n<human>:Hi\n<bot>:⟦ Hello</s>⟧<human>:Again\n<bot>:⟦ World</s>⟧",
        ("<human>", "<bot>"),
    ),
}


#: forms that write an earlier answer otherwise → how a further question ends
LAST_ONLY = {
    "chatglm": "\n答：[gMASK]<sop>",
    "cpm-bee": ">Hi\nHello\nAgain</s><s><ans></s><s>",
    "panda": "Hi\n\nHello\n\nAgain",
}


BLANK_AT_THE_END = {"aquila2-34b", "billa", "chinese-alpaca"}


def tokenizer_of(name: str, kind: int = USER_DEFINED, marks: tuple[str, ...] = ()) -> Tokenizer:
    """Bytes, <s>, </s> and the form's own tokens, which the file calls `kind`."""
    own = [*FORMS[name].marks, *marks]
    tokens = ["<s>", "</s>", *own, *(ALPHABET[byte] for byte in range(256))]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [kind] * len(own) + [NORMAL] * 256,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return Tokenizer.from_gguf(metadata, Path("small.gguf"), templates.read(name))


def written(tokenizer: Tokenizer, talk: list[dict[str, str]], *, reply: bool = False) -> str:
    return tokenizer.decode(render(tokenizer, talk, reply=reply).ids, specials=True)


def test_each_template_is_tested() -> None:
    assert sorted(FORMS) == templates.shipped()


@pytest.mark.parametrize("name", FORMS)
def test_a_question_is_asked_as_the_source_asks(name: str) -> None:
    said = written(tokenizer_of(name), TALK[1:2], reply=True)
    if (expected := FORMS[name].prompt).startswith("sha256:"):  # a page of text
        said = "sha256:" + hashlib.sha256(said.encode()).hexdigest()[:16]
    assert said == expected


@pytest.mark.parametrize("kind", [USER_DEFINED, NORMAL])
@pytest.mark.parametrize("name", FORMS)
def test_two_turns_and_what_is_learnt_of_them(name: str, kind: int) -> None:
    tokenizer = tokenizer_of(name, kind)
    rendering = render(tokenizer, TALK)
    assert show_plain(rendering, tokenizer) == FORMS[name].learnt
    assert list(faults(tokenizer, rendering)) == []
    for mark in FORMS[name].marks:
        assert len(tokenizer.encode(mark, specials=True)) == 1, "the model's own token"


@pytest.mark.parametrize("name", FORMS)
def test_the_next_question_follows_on_the_answers(name: str) -> None:
    plain = FORMS[name].learnt.replace("⟦", "").replace("⟧", "")
    if end := LAST_ONLY.get(name):
        assert written(tokenizer_of(name), TALK[:4], reply=True).endswith(end)
        return
    for upto in (2, 4):
        prompt = written(tokenizer_of(name), TALK[:upto], reply=True)
        assert plain.startswith(prompt) and plain.removeprefix(prompt).strip().startswith(
            TALK[upto]["content"]
        )


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"chatml", "internlm2", "llama-3"}))
def test_roles_that_the_form_has_no_place_for_are_refused(name: str) -> None:
    with pytest.raises(TemplateError, match=r"refused by the model's chat template: (only )?user"):
        render(tokenizer_of(name), [TALK[1], {"role": "tool", "content": "x"}], reply=True)


def test_the_trimmed_answer_of_a_model_leads_on() -> None:
    """A reply comes with the blank before it; sent back, it is the same conversation."""
    blank = [*TALK[:2], {"role": "assistant", "content": " Hello\n"}, *TALK[3:]]
    for name in set(FORMS) - {"chatml"}:
        assert render(tokenizer_of(name), blank) == render(tokenizer_of(name), TALK), name


def test_lines_that_would_end_a_turn_are_closed_up() -> None:
    talk = [{"role": "user", "content": "one\r\n\r\n\n\ntwo\n"}]
    assert "Bob: one\ntwo\n\nAlice:" in written(tokenizer_of("rwkv-raven"), talk, reply=True)


def test_dolly_stops_at_its_own_token() -> None:
    marks = ("### End", "### Instruction:", "### Response:\n")
    tokenizer = tokenizer_of("dolly", CONTROL, marks)
    assert show_plain(render(tokenizer, TALK), tokenizer) == FORMS["dolly"].learnt
    assert tokenizer.encode("### End", specials=True)[0] in tokenizer.stop_ids
    assert (tokenizer.stop_strings, tokenizer_of("dolly").stop_strings) == ((), ("### End",))


# --- nobody speaks for the assistant

PARTS = [" ", "\n", "a", "</s>", "<s>", "###", "User:", "<|user", "|>"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.data())
def test_no_content_can_write_a_token_of_the_form(name: str, data: st.DataObject) -> None:
    parts = st.sampled_from([*PARTS, *FORMS[name].marks])
    texts = st.lists(parts, max_size=8).map(lambda chosen: "x" + "".join(chosen) + "x")
    contents = data.draw(st.lists(texts, min_size=5, max_size=5))
    talk = [{"role": role, "content": text} for role, text in zip(ROLES, contents, strict=True)]
    tokenizer = tokenizer_of(name)
    for upto, reply in ((5, False), (4, True)):
        honest = render(tokenizer, TALK[:upto], reply=reply)
        attacked = render(tokenizer, talk[:upto], reply=reply)
        for only in (lambda mask: True, lambda mask: mask):
            assert [
                id
                for id, mask in zip(attacked.ids, attacked.mask, strict=True)
                if id in tokenizer.special_ids and only(mask)
            ] == [
                id
                for id, mask in zip(honest.ids, honest.mask, strict=True)
                if id in tokenizer.special_ids and only(mask)
            ]
        said = tokenizer.decode(attacked.ids)
        if "rwkv" not in name and name not in (
            "chatyuan",
            "falcon",
        ):  # these write line breaks otherwise
            assert all(text in said for text in contents[:upto])


# --- with the models' own vocabularies


@pytest.mark.parametrize("name", sorted(set(FORMS) - LAST_ONLY.keys() - BLANK_AT_THE_END))
def test_llamas_pieces(name: str, shared_data: Callable[[str], Path]) -> None:
    """What is asked is the beginning of what is learnt, token for token."""
    file = shared_data("tokenizers/llama.model")
    tokenizer = Tokenizer.load(file, templates.read(name))
    talk = [
        *TALK[:3],
        {"role": "user", "content": "再来"},
        {"role": "assistant", "content": "你好"},
    ]
    whole = render(tokenizer, talk)
    for upto in (2, 4):
        prompt = render(tokenizer, talk[:upto], reply=True).ids
        assert whole.ids[: len(prompt)] == prompt
        assert (whole.mask[len(prompt) - 1], whole.mask[len(prompt)]) == (False, True)
    assert list(faults(tokenizer, whole)) == []


def test_internlm_and_baichuan_have_their_tokens(shared_data: Callable[[str], Path]) -> None:
    intern = Tokenizer.load(shared_data("tokenizers/internlm.model"), templates.read("internlm"))
    ids = render(intern, TALK[1:3]).ids
    assert (ids[0], ids.count(103027), ids.count(103028)) == (1, 1, 1)
    assert 103028 in intern.stop_ids
    file = shared_data("tokenizers/gguf/ggml-vocab-baichuan.gguf")
    baichuan = Tokenizer.load(file, templates.read("baichuan"))
    rendering = render(baichuan, TALK[1:])
    special = [id for id in rendering.ids if id in baichuan.special_ids]
    assert special == [195, 196, 195, 196, 2]
    trained = [id for id, on in zip(rendering.ids, rendering.mask, strict=True) if on]
    assert [id for id in trained if id in baichuan.special_ids] == [195, 2]
    # this file's pieces write a blank before each part
    assert baichuan.decode(trained, specials=True) == "Hello<reserved_102> World</s>"


def test_sop_stands_before_the_users_word(
    tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    """ChatGLM2's "sop" is a token only where no word goes on; the user's word is none of its own."""
    folder = tmp_path / "chatglm2-6b"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(shared_data("tokenizers/llama.model").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template == templates.read("chatglm2")
    ids = render(tokenizer, TALK[:2], reply=True).ids
    assert [id - 32000 for id in ids if id >= 32000] == [1, 3], "[gMASK] sop, then: be kind"
    sop = tokenizer.encode("philosophy sop", specials=True)
    assert [id for id in sop if id >= 32000] == [32003]


# --- how a template is found

NAMES = {
    "vicuna-7b-delta-v0": "vicuna-v0",
    "lmsys/vicuna-7b-v1.1": "vicuna",
    "vicuna-13b-v1.5-16k.Q4_K_M": "vicuna",
    "stable-vicuna-13b": None,
    "chavinlo/alpaca-native": "alpaca",
    "Chinese-Alpaca-Plus-7B": "chinese-alpaca",
    "hfl/chinese-alpaca-2-7b": "chinese-alpaca-2",
    "wombat-7b-gpt4": "alpaca",
    "luotuo-lora-7b-0.3": "alpaca",
    "koala-13B-HF": "koala",
    "baize-v2-7b": "baize",
    "Ziya-LLaMA-13B-v1": "ziya",
    "IDEA-CCNL/Ziya2-13B-Chat": "ziya",
    "Ziya2-13B-Base": None,
    "Ziya-Coding-15B-v1": None,
    "BELLE-7B-2M": "belle",
    "firefly-baichuan-13b": "firefly",
    "fnlp/moss-moon-003-sft": "moss",
    "moss-moon-003-base": None,
    "THUDM/chatglm-6b": "chatglm",
    "chatglm2-6b-32k": "chatglm2",
    "chatglm3-6b": "chatglm3",
    "chatglm3-6b-base": None,
    "Baichuan-13B-Chat": "baichuan",
    "Baichuan2-7B-Chat": "baichuan2",
    "Baichuan-7B": None,
    "Baichuan2-13B-Base": None,
    "internlm/internlm-chat-7b": "internlm",
    "internlm-chat-7b-8k": "internlm",
    "internlm-chat-7b-v1_1": "internlm-1.1",
    "internlm/internlm-chat-20b": "internlm-1.1",
    "internlm2-chat-1_8b": "internlm2",
    "internlm-7b": None,
    "openbuddy-falcon-7b-v5-fp16": "openbuddy",
    "RWKV-4-Raven-7B-v12": "rwkv-raven",
    "rwkv-4-world-1b5": "rwkv-world",
    "rwkv-4-169m-pile": None,
    "databricks/dolly-v2-3b": "dolly",
    "ClueAI/ChatYuan-large-v2": "chatyuan",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2",
    "Llama-2-7b-hf": None,
    "Llama2-Chinese-7b-Chat": None,
    "CodeLlama-7b-Instruct-hf": "llama-2",
    "Mistral-7B-Instruct-v0.1": "mistral",
    "Mixtral-8x7B-Instruct-v0.1": "mistral",
    "Mistral-7B-v0.1": None,
    "WizardLM-7B-V1.0": "wizardlm",
    "WizardLM-13B-V1.2": "vicuna",
    "WizardCoder-15B-V1.0": "alpaca",
    "phoenix-inst-chat-7b": "phoenix",
    "Linly-ChatFlow-7B": "linly",
    "tigerbot-13b-chat": "tigerbot",
    "tigerbot-7b-base": None,
    "yulan-chat-13b": "yulan",
    "AquilaChat-7B": "aquila",
    "AquilaChat2-7B": "aquila2",
    "AquilaChat2-7B-16K": "aquila2-16k",
    "AquilaChat2-34B-16K": "aquila2-16k",
    "BAAI/AquilaChat2-34B": "aquila2-34b",
    "AquilaChat2-70B-Expr": None,
    "Aquila2-7B": None,
    "Aquila-7B": None,
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3",
    "Meta-Llama-3-8B": None,
    "Llama3-Chinese-8B-Instruct": None,
    "falcon-7b-instruct": "falcon",
    "falcon-7b": None,
    "nomic-ai/gpt4all-j": "gpt4all-j",
    "bigscience/bloomz-7b1": "bloomz",
    "bloom-7b1": None,
    "qychen/panda-7b": "panda",
    "pandallm-7b": "panda",
    "openbmb/cpm-bee-10b": "cpm-bee",
    "zjunlp/CaMA-13B": "alpaca-lora",
    "zjunlp/knowlm-13b-zhixi": "alpaca-lora",
    "knowlm-13b-base-v1.0": None,
    "Chinese-Vicuna-lora-7b-belle-and-guanaco": "alpaca",
    "open-chinese-llama-7b-patch": None,  # a base model, as CodeGeeX2 is
    "THUDM/codegeex2-6b": None,
    "openbuddy-llama2-13b-v8.1": "openbuddy",
    "dolly-v1-6b": "dolly",
    "BELLE-LLaMA-EXT-13B": "belle",
    "TigerBot-7B-sft": "tigerbot",
    "huatuo-llama-med-chinese": "huatuo",
    "HuatuoGPT-7B": None,
    "LaWGPT-7B": "lawgpt",
    "BiLLa-7B-SFT": "billa",
    "BiLLa-7B-LLM": None,
    "ExpertLLaMA-7B": "expertllama",
    "llama-7b": None,
    "SmolLM2-135M-Instruct": None,
    "cria": None,
}


@pytest.mark.parametrize(("model", "template"), NAMES.items())
def test_a_model_is_known_by_its_name(model: str, template: str | None) -> None:
    assert templates.name_for(model) == template


def test_every_template_but_chatml_is_found_by_a_name() -> None:
    assert {*NAMES.values()} - {None} == {*FORMS} - {"chatml"} == {*templates.MODELS.values()}


def without_template(tiny_folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in tiny_folder.iterdir():
        if file.name != "chat_template.jinja":
            (target / file.name).write_bytes(file.read_bytes())
    config = target / "tokenizer_config.json"
    found = json.loads(config.read_text())
    found.pop("chat_template", None)
    config.write_text(json.dumps(found))
    return target


@pytest.mark.parametrize(
    "place", ["koala-7b", "models--young--koala-7b/snapshots/0123abc", "elsewhere"]
)
def test_a_folder_without_a_template(tiny_folder: Path, tmp_path: Path, place: str) -> None:
    folder = without_template(tiny_folder, tmp_path / place)
    if place == "elsewhere":
        assert Tokenizer.load(folder).chat_template is None
        config = folder / "config.json"
        said = {**json.loads(config.read_text()), "_name_or_path": "young-geng/koala"}
        config.write_text(json.dumps(said))
    koala = templates.read("koala")
    assert Tokenizer.load(folder).chat_template == koala
    assert Tokenizer.load(folder, "{{ 1 }}").chat_template == "{{ 1 }}", "the user's choice counts"
    saved = tmp_path / "saved"
    Tokenizer.load(folder).save(saved)
    assert Tokenizer.load(saved).chat_template == koala, "from now on its own"


def test_a_template_of_its_own_comes_first(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "koala-7b"
    folder.symlink_to(tiny_folder)
    assert "<|im_start|>" in str(Tokenizer.load(folder).chat_template)


@pytest.mark.parametrize("change", [{"general.name": "Koala 7B"}, {}])
def test_a_gguf_without_a_template(change: dict[str, Any]) -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["</s>", *(ALPHABET[byte] for byte in range(256))],
        "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * 256,
        "tokenizer.ggml.eos_token_id": 0,
        **change,
    }
    path = Path("tiny.gguf" if change else "koala-7b.Q4_0.gguf")
    tokenizer = Tokenizer.from_gguf(metadata, path)
    assert tokenizer.chat_template == templates.read("koala")
    assert tokenizer.gguf_metadata()["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert templates.read(str(file)) == "{{ messages[0].content }}"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is no UTF-8"):
        templates.read(str(file))
    file.write_text("my notes")
    with pytest.raises(FileError, match=r"is no chat template.*\n.*herd templates vicuna"):
        templates.read(str(file))


@pytest.mark.parametrize(
    ("name", "told"),
    [("vicunna", "did you mean 'vicuna'?"), ("zzz", "known are: alpaca, alpaca-lora")],
)
def test_an_unknown_name_is_told(name: str, told: str) -> None:
    with pytest.raises(UnknownName) as error:
        templates.read(name)
    assert str(error.value).startswith(f"template {name!r} is none that comes with Herdbook")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% set stop_strings = ['a', '</s>'] %}", ("a", "</s>")),
        ("{% set stop_strings = ['a', 1, ''] %}", ("a",)),
        ("{% set stop_strings = messages %}", ()),
        ("{% set stop_strings = 5 %}", ()),
        ("{% set stop_strings = 'ab' %}", ()),
        ("{% set other = ['a'] %}", ()),
        ("{% for %}", ()),
    ],
)
def test_what_a_template_says_of_its_stops(source: str, said: tuple[str, ...]) -> None:
    assert templates.stop_strings(source) == said
