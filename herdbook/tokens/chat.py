r"""Conversations → token ids and loss mask, by the model's own chat template. One rendering for all:
what the engine is asked with is, token for token, the beginning of what training saw.

A template is a Jinja program that writes the conversation as text; it runs in Jinja's sandbox. With
ChatML, user "Hi" and assistant "Hello!" become

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                          ^^^^^^^^^^^^^^^^ mask: what is trained

**The mask** covers what the model itself will have to write: everything after the generation prompt
(what `reply=True` ends with) up to and including what ends the turn: a stop token, or a text that the
template names as one (`stop_strings`). The newline behind <|im_end|> is the template's: the engine
stops before it. Where an answer starts, in order of trust:

1. `{% generation %}` … `{% endgeneration %}` in the template say it themselves;
2. the answer starts where the rendering of the messages before it, with generation prompt, ends;
3. where that is no beginning of the whole (a template that writes earlier turns differently), the
   answer starts with the assistant's content;
4. else a TemplateError says that it cannot be known.

A token that straddles an edge is trained as soon as one of its characters is the answer's.

**Nobody speaks for the assistant.** When a message's text holds "<|im_end|>" or another special
token, those characters stay characters: special tokens are parsed in the template's own text only.
To tell the two apart, contents are marked with private characters, rendered, and unmarked. Where a
template's marks of roles are ordinary text ("### Human:"), a user can write them: no token says who.

Left out: images, and tools in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2

from herdbook.data.records import Message
from herdbook.errors import DataError, TemplateError, nearest
from herdbook.tokens import sandbox, templates
from herdbook.tokens.codec import Span
from herdbook.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Rendering:
    ids: list[int]  # [T]
    mask: list[bool]  # [T] True where the assistant writes, so where the loss is


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    reply: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    now: datetime | None = None,
) -> Rendering:
    """Ids and mask of a conversation. reply: end with the generation prompt, ready for an answer.

    tools: what the template is given as such (functions as JSON schemas); it must know what to do with
    them. With reply=True nothing is to be learned and the mask is False throughout. now: what a template
    that writes the date is told, for who talks to the model today. Without it that is one fixed day
    (`sandbox.DAY`), so that what is trained or made of data is the same tomorrow.
    """
    rows = [_mapping(index, message) for index, message in enumerate(messages)]
    if not rows:
        raise DataError(
            "an empty conversation", rule="has nothing to render", next="give at least one message"
        )
    told = [*rows, *tools]
    for key in (key for one in told for key in _keys(one)):
        if tokenizer.holds_special(key):
            raise DataError(
                f"the key {key!r:.60}", rule="holds a special token", next="give it another name"
            )
    template = _Template.of(tokenizer, rows, tools, now)
    page = template.render(rows, reply=reply)
    contents = None if reply else template.locate(rows, page.text)
    plain: list[Span] = []
    held = any(tokenizer.holds_special(text) for row in told for text in _strings(row))
    if held or tokenizer.edged:
        contents = contents or template.locate(rows, page.text, reply=reply)
        plain = template.protect(rows, page.text, reply=reply)
        plain = _union(plain + [span for spans in (contents or {}).values() for span in spans])
    ids, spans = tokenizer.encode_spans(page.text, plain)
    mask = [False] * len(ids)
    if not reply:
        for start, end in page.generated or template.answers(rows, page.text, contents, ids, spans):
            for k, (a, b) in enumerate(spans):
                mask[k] = mask[k] or (start <= a < end if a == b else a < end and b > start)
    return Rendering(ids, mask)


def show(rendering: Rendering, tokenizer: Tokenizer) -> Text:
    """«This is what the model will learn»: trained text bold and coloured, the rest dim."""
    from rich.text import Text

    text = Text()
    for trained, part in _parts(rendering, tokenizer):
        text.append(part, style="bold green" if trained else "dim")
    return text


def show_plain(rendering: Rendering, tokenizer: Tokenizer) -> str:
    """The same for a pipe: trained text in ⟦double brackets⟧."""
    parts = _parts(rendering, tokenizer)
    return "".join(f"⟦{part}⟧" if trained else part for trained, part in parts)


def _parts(rendering: Rendering, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Runs of equal mask as text. Bytes are joined before they are read: characters stay whole."""
    runs: list[tuple[bool, bytearray]] = []
    for id, trained in zip(rendering.ids, rendering.mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, bytearray()))
        runs[-1][1].extend(tokenizer.token_bytes(id))
    return [(trained, data.decode("utf-8", errors="replace")) for trained, data in runs]


# --- messages


def _mapping(index: int, message: Mapping[str, Any] | Message) -> dict[str, Any]:
    """A message as templates take it, checked. DataError names it by its place, from 0."""
    where = f"message {index}"
    if isinstance(message, Message):
        row: dict[str, Any] = message.to_json()
    elif isinstance(message, Mapping):
        row = dict(message)
    else:
        raise DataError(
            f"{where}: {type(message).__name__}",
            rule="is no message",
            next='write {"role": "user", "content": "…"}',
        )
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{where}: role {role!r}", rule="is not known", next=nearest(str(role), list(ROLES))
        )
    if not isinstance(content, str):
        raise DataError(
            f"{where}: content of type {type(content).__name__}",
            rule="must be text",
            next='write {"role": "' + role + '", "content": "…"}',
        )
    for text in _strings(row):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"{where}: half a surrogate pair ({text!r:.60})",
                rule="is no Unicode text",
                next='send whole characters (in JSON, both halves: "\\ud83e\\udd99")',
            )
    return row


def _strings(value: Any) -> list[str]:
    """Every text in a message that is not its role."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [
            text
            for key, one in value.items()
            if key != "role" or one not in ROLES
            for text in _strings(one)
        ]
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _strings(one)]
    return []


def _keys(value: Any) -> list[str]:
    """Every key in a message, of whatever depth."""
    if isinstance(value, Mapping):
        return [*value, *(key for one in value.values() for key in _keys(one))]
    if isinstance(value, (list, tuple)):
        return [key for one in value for key in _keys(one)]
    return []


def _mapped(value: Any, change: Any) -> Any:
    """The message with `change` applied to all that `_strings` lists."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            k: one if k == "role" and one in ROLES else _mapped(one, change)
            for k, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(one, change) for one in value]
    return value


def _union(spans: list[Span]) -> list[Span]:
    """Sorted and disjoint."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif start < end:
            out.append((start, end))
    return out


# --- the template


@dataclass(frozen=True)
class _Page:
    """A rendered conversation."""

    text: str
    generated: list[Span] = field(default_factory=list)  # by {% generation %}


@dataclass(frozen=True)
class _Template:
    """The tokenizer's template, with private characters that this conversation does not use."""

    tokenizer: Tokenizer
    program: jinja2.Template
    marks: str  # generation starts, ends; content starts, its number ends, content ends
    tools: Sequence[Mapping[str, Any]] = ()
    now: datetime | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        rows: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        now: datetime | None = None,
    ) -> _Template:
        source = tokenizer.chat_template
        if source is None:
            raise TemplateError(
                "this model",
                rule="has no chat template",
                next="use a chat model (…-Instruct, …-Chat), or choose one with --template: a file "
                f"of Jinja, or one of {', '.join(templates.shipped())}",
            )
        told = [*rows, *tools]
        used = set(source).union(*(set(text) for row in told for text in _strings(row)))
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        marks = "".join(mark for mark, _ in zip(free, range(5), strict=False))
        if len(marks) < 5:
            raise DataError(
                "a conversation with all 6,400 private-use characters",
                rule="leaves none to mark its parts with",
                next="take such characters out of the data",
            )
        try:
            return cls(tokenizer, sandbox.compile(source), marks, tools, now)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise TemplateError(
                "the chat template",
                rule=f"is no Jinja that can be read: {error}",
                next="mend chat_template in tokenizer_config.json",
            ) from error

    def _raw(self, rows: Sequence[Mapping[str, Any]], reply: bool) -> str:
        """The template's output, marks included."""
        tokenizer = self.tokenizer
        words: dict[str, str] = {}  # without a BOS the variable stays undefined
        for name, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if id is not None:
                words[name] = tokenizer.token_bytes(id).decode()
        try:
            return sandbox.render(
                self.program,
                {
                    "messages": rows,
                    "tools": list(self.tools) or None,
                    "documents": None,
                    "add_generation_prompt": reply,
                    "_generation_marks": self.marks[:2],
                    **words,
                },
                self.now,
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            roles = ", ".join(row["role"] for row in rows)
            raise TemplateError(
                f"a conversation of {roles or 'no messages'}",
                rule=f"is refused by the model's chat template: {error}",
                next="give the roles in the order that the template expects",
            ) from error

    def render(self, rows: Sequence[Mapping[str, Any]], *, reply: bool) -> _Page:
        start, end = self.marks[0], self.marks[1]
        raw = self._raw(rows, reply)
        if start not in raw:
            return _Page(raw)
        text, spans, open_at = "", [], 0
        for part in re.split(f"([{start}{end}])", raw):
            if part == start:
                open_at = len(text)
            elif part == end:
                spans.append((open_at, len(text)))
            else:
                text += part
        return _Page(text, spans)

    def _unmark(self, raw: str, text: str) -> list[tuple[str, Span]] | None:
        """(number, span in `text`) of every marked part; None unless all else is as in `text`."""
        _, _, first, second, third = list(self.marks)
        raw = raw.replace(self.marks[0], "").replace(self.marks[1], "")
        found: list[tuple[str, Span]] = []
        clean, at, open_at, number = "", 0, -1, ""
        for mark in re.finditer(f"{first}(\\d*){second}|{third}", raw):
            clean += raw[at : mark.start()]
            at = mark.end()
            if (mark[0] == third) == (open_at < 0):
                return None  # the template took a content apart
            if mark[0] == third:
                found.append((number, (open_at, len(clean))))
                open_at = -1
            else:
                open_at, number = len(clean), mark[1]
        clean += raw[at:]
        return found if clean == text and open_at < 0 else None

    def _marked(self, text: str, number: int | str = "") -> str:
        _, _, first, second, third = list(self.marks)
        return f"{first}{number}{second}{text}{third}"

    def locate(
        self, rows: Sequence[dict[str, Any]], text: str, *, reply: bool = False
    ) -> dict[int, list[Span]] | None:
        """Where in `text` each message's content stands, without the blanks around it.

        None where it cannot be told: the template takes contents apart, or writes other text as soon
        as they are marked (it asks how one begins). A content that is blank is not in the answer.
        """
        marked = []
        for index, row in enumerate(rows):
            content = row["content"]
            if core := content.strip():
                content = content.replace(core, self._marked(core, index), 1)
            marked.append({**row, "content": content})
        try:
            found = self._unmark(self._raw(marked, reply), text)
        except TemplateError:  # it asks what a content is; the marks are in its way
            return None
        if found is None:
            return None
        places: dict[int, list[Span]] = {}
        for number, span in found:
            places.setdefault(int(number), []).append(span)
        return places

    def protect(self, rows: Sequence[dict[str, Any]], text: str, *, reply: bool) -> list[Span]:
        """Where in `text` stand special tokens' texts that came out of messages."""

        def mark(value: str) -> str:
            out, at = "", 0
            for start, end in self.tokenizer.special_spans(value):
                out += value[at:start] + self._marked(value[start:end])
                at = end
            return out + value[at:]

        marked = replace(self, tools=_mapped(self.tools, mark))
        found = self._unmark(marked._raw([_mapped(row, mark) for row in rows], reply), text)
        if found is None:
            names = [
                *(f"message {index}" for index in range(len(rows))),
                *("a tool" for _ in self.tools),
            ]
            name, special = next(
                (name, value[start:end])
                for name, row in zip(names, [*rows, *self.tools], strict=True)
                for value in _strings(row)
                for start, end in self.tokenizer.special_spans(value)
            )
            raise TemplateError(
                f"{name} holds the special token {special!r} as text",
                rule="and the chat template rewrites it, so it cannot be kept apart from real ones",
                next="take that text out of the message",
            )
        return [span for _, span in found]

    def answers(
        self,
        rows: Sequence[dict[str, Any]],
        text: str,
        contents: Mapping[int, list[Span]] | None,
        ids: Sequence[int],
        spans: Sequence[Span],
    ) -> list[Span]:
        """The characters of `text` that the assistant writes, a span for each of its turns."""
        contents = contents or {}
        starts = {
            index: self._start(rows, index, text, contents)
            for index, row in enumerate(rows)
            if row["role"] == "assistant"
        }
        stops = [span for id, span in zip(ids, spans, strict=True) if id in self.tokenizer.stop_ids]
        texts = "|".join(map(re.escape, self.tokenizer.stop_strings))
        found = []
        for index, start in starts.items():
            own = contents.get(index)
            after = max(start, own[0][1]) if own else start
            # Never past the beginning of what comes next.
            following = [place[0][0] for i, place in contents.items() if i > index]
            following += [begin for i, begin in starts.items() if i > index]
            limit = min((place for place in following if place >= after), default=len(text))
            ends = [b for a, b in stops if after <= a and b <= limit]
            if texts and (text_end := re.compile(texts).search(text, after, limit)):
                ends.append(text_end.end())
            found.append((start, min(ends, default=after if own else limit)))
        return found

    def _start(
        self,
        rows: Sequence[dict[str, Any]],
        index: int,
        text: str,
        contents: Mapping[int, list[Span]],
    ) -> int:
        """Where the assistant begins to write turn `index`."""
        refusal = ""
        if index > 0:
            try:
                prompt = self.render(rows[:index], reply=True).text
            except TemplateError as error:  # it refuses this beginning; the content tells, below
                refusal = f" ({error.rule})"
            else:
                if text.startswith(prompt):
                    return len(prompt)
        if len(contents.get(index, [])) == 1:
            return contents[index][0][0]
        raise TemplateError(
            f"message {index}, the assistant's",
            rule="cannot be found in what the chat template writes, so what to train is not known"
            + refusal,
            next="put {% generation %} … {% endgeneration %} around the assistant's text in the "
            "template",
        )
