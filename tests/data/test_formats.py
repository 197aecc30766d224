"""Foreign files: the three formats by content, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.data import formats, records
from herdbook.data.records import Conversation, Message
from herdbook.data.rows import rows as rows_of
from herdbook.errors import DataError

ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
}


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def parse(tmp_path: Path) -> Callable[[str | bytes], formats.Parsed]:
    def parse(content: str | bytes) -> formats.Parsed:
        path = tmp_path / "data"  # no suffix: content alone decides
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            return formats.parse(path)
        finally:
            assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
            assert list(tmp_path.iterdir()) == [path], "nothing else was touched"

    return parse


@pytest.fixture
def refusal(parse: Callable[[Any], Any]) -> Callable[[str | bytes], str]:
    def refusal(content: str | bytes) -> str:
        with pytest.raises(DataError) as caught:
            parse(content)
        return str(caught.value)

    return refusal


# ------------------------------------------------------------------------------------ what is read


def test_alpaca_becomes_a_chat(parse: Any) -> None:
    no_input = {"instruction": "Say hi.", "input": "", "output": "Hi."}
    parsed = parse(jsonl(ALPACA, no_input, {"instruction": "Say A.", "output": "A"}))
    assert parsed.format == "Alpaca"
    first, second, third = (one.messages for one in parsed.conversations)
    assert first == (Message("user", "Add.\n\n2 and 3"), Message("assistant", "5"))
    assert second == (Message("user", "Say hi."), Message("assistant", "Hi."))
    assert third == (Message("user", "Say A."), Message("assistant", "A"))
    assert [one.extra["line"] for one in parsed.conversations] == [1, 2, 3]


@pytest.mark.parametrize(
    ("row", "format_", "roles"),
    [
        (ALPACA, "Alpaca", ["user", "assistant"]),
        (SHAREGPT, "ShareGPT", ["user", "assistant"]),
        (OPENAI, "OpenAI", ["system", "user", "assistant"]),
        (
            {"instruction": "Add.", "context": "2, 3", "response": "5", "category": "sum"},
            "Dolly",
            ["user", "assistant"],
        ),
        (
            {"prompt": "Add 2 and 3.", "response": "5", "source": "x"},
            "GPT4All",
            ["user", "assistant"],
        ),
        ({"kind": "sum", "input": "Add 2 and 3.", "target": "5"}, "Firefly", ["user", "assistant"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", ["jsonl", "array", "pretty array", "no last newline", "crlf"])
def test_recognised_by_content(
    parse: Any, row: dict[str, Any], format_: str, roles: list[str], packed: bool, shape: str
) -> None:
    text = {
        "jsonl": jsonl(row, row),
        "array": json.dumps([row, row]),
        "pretty array": "\ufeff\n" + json.dumps([row, row], indent=2) + "\n\n",
        "no last newline": "\ufeff" + jsonl(row, row)[:-1],
        "crlf": jsonl(row, row).replace("\n", "\r\n") + "\r\n",
    }[shape]
    content = gzip.compress(text.encode()) if packed else text
    parsed = parse(content)
    assert (parsed.format, parsed.rows, len(parsed.conversations)) == (format_, 2, 2)
    assert [m.role for m in parsed.conversations[1].messages] == roles
    if shape == "pretty array":
        line = parsed.conversations[1].extra["line"]
        assert text.replace("\ufeff", "").split("\n")[line - 1].strip() == "{"


def test_lines_end_at_newline_alone(parse: Any) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    parsed = parse(jsonl({"instruction": odd, "input": "", "output": odd}, ALPACA))
    assert parsed.conversations[0].messages[1].content == odd
    assert parsed.conversations[1].extra["line"] == 2


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_any_text_comes_through(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [Conversation.of(f"Q{text}Q", f"A{text}A", note=text) for text in texts]
    records.write(folder / "train.jsonl", rows)
    assert records.read(folder / "train.jsonl") == rows
    assert [c.messages for c in formats.read(folder / "train.jsonl")] == [c.messages for c in rows]


def test_openai_parts_of_text(parse: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    answer = {"role": "assistant", "content": "A cat."}
    rows = [{"messages": [{"role": "user", "content": c}, answer]} for c in (parts, picture)]
    parsed = parse(jsonl(*rows))
    assert parsed.conversations[0].messages[0].content == "What is this?"
    assert parsed.skipped == {"holds pictures or sound": 1}


# ------------------------------------------------------------------- what is left out, and counted


def turns(*roles: str) -> dict[str, Any]:
    return {
        "conversations": [{"from": role, "value": f"{role} {n}"} for n, role in enumerate(roles)]
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Add.", "input": "", "output": " \n"}, None),
        (turns(), "no question with an answer"),
        (turns("human"), "no question with an answer"),
        (turns("gpt", "human"), "no question with an answer"),
        (turns("human", "human", "gpt"), "two turns of one side in a row"),
        (turns("gpt", "gpt", "human", "gpt"), "two turns of one side in a row"),
        (turns("human", "gpt", "gpt"), "two turns of one side in a row"),
        (turns("human", "system", "gpt"), "a system turn in the middle"),
        (turns("human", "function_call", "observation", "gpt"), "uses tools"),
        ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]},
         "an empty turn"),
        ({"conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "x"}]},
         "half a character (lone surrogate)"),
    ],
)  # fmt: skip
def test_unusable_rows_are_counted_by_reason(parse: Any, row: Any, reason: str | None) -> None:
    good, reason = (SHAREGPT, reason) if reason else (ALPACA, "empty answer")
    parsed = parse(json.dumps(row) + "\n" + jsonl(good))
    assert parsed.skipped == {reason: 1}
    assert parsed.rows == 2 and len(parsed.conversations) == 1
    assert parsed.conversations[0].extra["line"] == 2


def test_chats_are_trimmed_to_question_first_and_answer_last(parse: Any) -> None:
    parsed = parse(jsonl(turns("gpt", "human", "gpt", "human"), turns("system", "human", "gpt")))
    contents = [[m.content for m in one.messages] for one in parsed.conversations]
    assert contents == [["human 1", "gpt 2"], ["system 0", "human 1", "gpt 2"]]
    assert parsed.trimmed == {"began with an answer": 1, "ended without an answer": 1}


def test_answers_labelled_bad_are_left_out(parse: Any) -> None:
    parsed = parse(jsonl(OPENAI | {"label": True}, OPENAI | {"label": False}))
    assert parsed.skipped == {"labelled as a bad answer": 1}


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (jsonl(ALPACA, ALPACA, SHAREGPT), ["line 3", "ShareGPT", "began as Alpaca (line 1)"]),
        (jsonl(OPENAI, ALPACA), ["line 2", "Alpaca", "began as OpenAI"]),
        (jsonl(ALPACA | SHAREGPT), ["line 1", "mixes formats"]),
        (jsonl(ALPACA) + "\n" + jsonl({"text": "x"}), ["line 3", "{text}", "was expected"]),
        (jsonl({"instruction": "x"}), ["line 1", "without 'output'"]),
        (jsonl(ALPACA | {"output": 5}), ["line 1", "'output' is a number", "text was expected"]),
        (jsonl(ALPACA, ALPACA | {"input": ["a"]}), ["line 2", "'input' is a list"]),
        (jsonl(ALPACA | {"output": None}), ["line 1", "'output' is nothing (null)"]),
        (jsonl(ALPACA, ["a"]), ["line 2", "a list"]),
        (jsonl("text"), ["line 1", "text where"]),
        (jsonl({"conversations": "x"}), ["line 1", "'conversations' is text", "list of turns"]),
        (jsonl({"conversations": ["x"]}), ["turn 1 is text"]),
        (jsonl({"conversations": [{"role": "user", "content": "x"}]}),
         ["turn 1", "{role, content}", "from and value were expected"]),
        (jsonl({"messages": [{"role": "boss", "content": "x"}]}),
         ["turn 1 is by 'boss'", "user, assistant, system"]),
        (jsonl({"messages": [{"role": "user", "content": 3}]}), ["turn 1", "'content' is a number"]),
        (jsonl({"prompt": "x", "chosen": "a", "rejected": "b"}), ["preference pair"]),
        (jsonl(ALPACA) + '{"instruction": "half', ["line 2", "is no JSON", '{"instruction": "half']),
        (jsonl(ALPACA) + "hello\n", ["line 2", "'hello' is no JSON"]),
        (json.dumps(ALPACA, indent=1), ["line 1", "'{' is no JSON", "array"]),
        ("[" * 100_000, ["is no JSON"]),
        ("1" * 5_000, ["line 1", "is no JSON"]),
        ("", ["is empty"]),
        (" \n\n", ["is empty"]),
        ("[]", ["holds no row"]),
        (json.dumps([ALPACA, ALPACA])[:-1], ["the end of the file", ", or ] was expected"]),
        (json.dumps([ALPACA, ALPACA], indent=1)[:-20], ["line 7 (row 1)", "is no JSON"]),
        (json.dumps([ALPACA]) + "x", ["line 1: 'x'", "follows the array"]),
        ("[\n" + json.dumps(ALPACA) + "\n" + json.dumps(ALPACA) + "]",
         ["line 3: '{' after row 0"]),
        ("[\n" + json.dumps(ALPACA) + ",\n" + json.dumps(SHAREGPT) + "]", ["line 3 (row 1)"]),
        (jsonl(ALPACA).encode() + b'{"instruction": "\xff"}\n', ["line 2", "0xff", "not UTF-8"]),
        (jsonl(ALPACA).encode("utf-16"), ["line 1", "iconv -f UTF-16"]),
        (jsonl({"instruction": "你好", "output": "好"}).encode("gb18030"), ["not UTF-8"]),
        (gzip.compress(jsonl(*[ALPACA] * 500).encode())[:-30], ["gzip", "breaks off in line"]),
        (gzip.compress(jsonl(ALPACA).encode())[:12], ["gzip", "breaks off in line 1"]),
        (b"\x1f\x8b" + b"junk" * 10, ["gzip", "is broken"]),
        (jsonl(ALPACA | {"output": ""}), ["none of its 1 rows", "1 × empty answer"]),
    ],
)  # fmt: skip
def test_refused_with_the_line_and_what_was_expected(
    refusal: Any, content: str | bytes, words: list[str]
) -> None:
    message = refusal(content)
    for word in words:
        assert word in message, message
    assert "\n  next: " in message
    assert ";;" not in message and " ;" not in message and "{}" not in message


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_wherever_the_file_is_cut_into_pieces(
    parse: Any, refusal: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, lines and faults, whether it is read by the byte or whole."""
    odd = {"instruction": '你好 \\ " \u2028 [1, {', "output": "好😀é" * 9}
    several = [ALPACA, odd, ALPACA | {"output": "7", "n": [1.5e-3, None, True, {"a": -12}]}]
    texts = [
        json.dumps(several, indent=2, ensure_ascii=False),
        jsonl(*several),
        f" {json.dumps(several)} ",
    ]
    files = [one.encode() for one in texts] + [gzip.compress(texts[0].encode())]
    files.append(gzip.compress(texts[1].encode()[:50]) + gzip.compress(texts[1].encode()[50:]))
    whole = [parse(one) for one in files]
    broken = [
        texts[0][:-30],
        texts[0].replace("-12", "-12 x"),
        "[1, 12345678901",
        texts[1] + "{",
        "[" * 9,
    ]
    said = [refusal(one) for one in broken]
    monkeypatch.setattr("herdbook.data.rows.PIECE", piece)
    assert [parse(one) for one in files] == whole
    assert [refusal(one) for one in broken] == said
    assert [len(one.conversations) for one in whole] == [3] * 5


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_numbers_and_padding_are_not_cut(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herdbook.data.rows.PIECE", piece)
    path = tmp_path / "a.json"
    path.write_text("[1.5e3, 2.25, -1E-2, 7]")
    assert [row for _, _, row in rows_of(path)] == [1500, 2.25, -0.01, 7]
    one, two = gzip.compress(b'{"a": 1}\n'), gzip.compress(b'{"a": 2}\n')
    path.write_bytes(one + bytes(40) + two)
    assert [row["a"] for _, _, row in rows_of(path)] == [1, 2]


def test_a_pipe_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no ordinary file"):
        formats.read(tmp_path / "pipe")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        formats.read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        formats.read(tmp_path)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "data"
    path.write_bytes(junk)
    with pytest.raises(DataError):
        formats.parse(path)


# ------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    ("name", "format_", "rows", "skipped", "trimmed"),
    [
        ("alpaca/alpaca_data.jsonl.gz", "Alpaca", 52_002, {"empty answer": 28}, {}),
        ("alpaca_zh/alpaca_zh.jsonl.gz", "Alpaca", 17_476,
         {"empty answer": 8, "empty instruction": 1}, {}),
        ("sharegpt/sharegpt_sample.jsonl.gz", "ShareGPT", 980,
         {"no question with an answer": 29, "an empty turn": 3, "two turns of one side in a row": 2},
         {"began with an answer": 377}),
        ("fastchat/dummy_conversation.jsonl.gz", "ShareGPT", 500, {}, {}),
        ("smilechat/smilechat_sample.jsonl.gz", "SMILE", 1500,
         {"two turns of one side in a row": 16, "no question with an answer": 1},
         {"ended without an answer": 231}),
        ("llama_factory_demo/alpaca_zh_demo.jsonl.gz", "Alpaca", 1000, {}, {}),
        ("llama_factory_demo/glaive_toolcall_en_demo.jsonl.gz", "ShareGPT", 300,
         {"uses tools": 153}, {}),
        ("llama_factory_demo/kto_en_demo.jsonl.gz", "OpenAI", 300,
         {"labelled as a bad answer": 150}, {}),
    ],
)  # fmt: skip
def test_real_files(
    shared_data: Any, name: str, format_: str, rows: int, skipped: dict[str, int], trimmed: Any
) -> None:
    parsed = formats.parse(shared_data(name))
    assert (parsed.format, parsed.rows) == (format_, rows)
    assert (dict(parsed.skipped), dict(parsed.trimmed)) == (skipped, trimmed)
    assert len(parsed.conversations) == rows - sum(skipped.values())
    for one in parsed.conversations:
        roles = [m.role for m in one.messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles


@pytest.mark.parametrize("name", ["c4_demo", "dpo_en_demo", "dpo_zh_demo"])
def test_real_files_that_are_no_conversations(shared_data: Any, name: str) -> None:
    with pytest.raises(DataError, match="line 1"):
        formats.parse(shared_data(f"llama_factory_demo/{name}.jsonl.gz"))
