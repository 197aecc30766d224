"""Stop strings never show, whatever bits the text comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.engine.text import TextOut, escapes, held


class Letters:
    """A tokenizer's stream whose tokens are pieces of a given text."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts

    def push(self, id: int) -> str:
        return self.parts[id]

    def flush(self) -> str:
        return ""


def run(parts: list[str], stops: tuple[str, ...]) -> tuple[list[str], TextOut]:
    out = TextOut(Letters(parts), stops)
    shown = []
    for i in range(len(parts)):
        shown.append(out.push(i))
        if out.stopped:
            break
    shown.append(out.flush())
    return shown, out


def test_held() -> None:
    assert held("Hello.\n\nUs", ("\n\nUser",)) == 4
    assert held("abab", ("abac",)) == 2
    assert held("xyz", ("abc",)) == 0
    assert held("ab", ("ab",)) == 0  # a whole stop string is found, not held
    assert held("anything", ()) == 0


def test_stop_in_bits() -> None:
    shown, out = run(["Hi", " th", "ere E", "N", "D more"], ("END",))
    assert shown == ["Hi", " th", "ere ", "", "", ""]
    assert out.stopped and out.text == "Hi there "


def test_what_looked_like_a_stop_is_shown_in_the_end() -> None:
    shown, out = run(["a E", "N", "d", " E"], ("END",))
    assert shown == ["a ", "", "ENd", " ", "E"]
    assert not out.stopped and out.text == "a ENd E"


def test_the_earliest_stop_counts() -> None:
    _, out = run(["one two three"], ("three", "two"))
    assert out.text == "one "


@pytest.mark.parametrize("stops", [(), ("\n#",)])
def test_the_blanks_before_a_reply_are_left_out(stops: tuple[str, ...]) -> None:
    out = TextOut(Letters([" ", "\n", " He", " y", "o", " "]), stops, trim=True)
    assert "".join(out.push(i) for i in range(6)) + out.flush() == out.text == "He yo "


def test_without_tokenizer_there_is_no_text() -> None:
    out = TextOut(None, ())
    assert out.push(3) == "" and out.flush() == "" and out.text == ""


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_like_cutting_the_whole_text(parts: list[str], stops: list[str]) -> None:
    """The sum of the pieces is the text before the first stop, and no piece was taken back."""
    shown, out = run(parts, tuple(stops))
    whole = "".join(parts)
    # the stop that is complete first ends the text; among those complete at one token, the earliest
    ends = []
    for n in range(len(parts) + 1):
        sofar = "".join(parts[:n])
        ends = [sofar.find(stop) for stop in stops if stop in sofar]
        if ends:
            break
    expected = whole[: min(ends)] if ends else whole
    assert "".join(shown) == out.text == expected
    assert out.stopped == bool(ends)
    assert not any(stop in out.text for stop in stops)


@pytest.mark.parametrize("bit", [1, 2, 3, 5])
def test_a_character_in_several_tokens_is_not_torn(bit: int) -> None:
    """The stop check sees characters only after the tokenizer's stream has put them together."""
    text = "你好，世界。完毕！再见"
    parts = [text[i : i + bit] for i in range(0, len(text), bit)]
    _, out = run(parts, ("完毕",))
    assert out.text == "你好，世界。"


ESCAPED = {"\n": "\\n", "\t": "\\t"}


def test_what_a_template_writes_otherwise() -> None:
    template = r"{{ '\\n用户：' ~ content | replace('\n', '\\n') | replace('\t', '\\t') }}"
    assert escapes(template) == ESCAPED
    assert escapes(r"{{ content | replace('\n', ' ') }}") == escapes(None) == {}


@given(st.text(alphabet="\\nt\n用", max_size=30), st.lists(st.integers(1, 4)), st.booleans())
def test_escapes_are_undone_however_the_text_is_cut(
    written: str, cuts: list[int], stops: bool
) -> None:
    parts, at = [], 0
    for size in cuts:
        parts.append(written[at : at + size])
        at += size
    parts.append(written[at:])
    stop = ("\\n用用",) if stops else ()
    out = TextOut(Letters(parts), stop, escaped=ESCAPED)
    shown = [out.push(i) for i in range(len(parts)) if not out.stopped]
    shown.append(out.flush())
    whole = written.partition(stop[0])[0] if stops else written
    assert "".join(shown) == out.text == whole.replace("\\n", "\n").replace("\\t", "\t")
