"""Replies that must obey a grammar: which tokens may come next, token by token.

    Sampling(grammar=Grammar("json", '{"type": "object"}'))
    Sampling(grammar=Grammar("regex", "[0-9]{4}-[0-9]{2}"))
    Sampling(grammar=Grammar("lark", 'start: "yes" | "no"'))       # or GBNF: root ::= "yes" | "no"
    Grammar.choice(["red", "green"])

The library llguidance follows the grammar; here it is given the model's tokens by the bytes that our
tokenizer decodes them to, so that a token may end in the middle of a character. Special tokens are no
text and never part of a grammar; the tokens that end a turn may come only where the grammar may end,
and where nothing else can follow the reply ends by itself.

A grammar comes from a stranger: its size and depth are limited before it is read, the work of reading
it and of each token after that. What the library cannot enforce (`"not"` in a schema, look-around in a
regex) is refused, not ignored. Between the tokens of JSON at most 32 blanks may stand, lest a small
model write blanks for ever.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from herdbook.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer

    from herdbook.tokens.tokenizer import Tokenizer

Kind = Literal["json", "regex", "lark"]

#: the most that a grammar may have, in bytes of UTF-8
MOST_BYTES: dict[Kind, int] = {"json": 2**16, "regex": 2**12, "lark": 2**16}
MOST_DEPTH = 32  # levels of a schema, or of brackets
BLANKS = r"[ \t\n\r]{1,32}"
#: grammars that are kept ready
KEPT = 32


@dataclass(frozen=True)
class Grammar:
    """What a reply must be. Only its size is checked here; `Grammars.matcher` reads it."""

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in MOST_BYTES or not isinstance(self.text, str):
            raise RequestError(
                f"a grammar of kind {self.kind!r}",
                rule="is not known",
                next=f"give one of {', '.join(MOST_BYTES)}, as text",
            )
        try:
            size, most = len(self.text.encode()), MOST_BYTES[self.kind]
        except UnicodeEncodeError:
            raise _refused(self.kind, "holds half a character (a lone surrogate)") from None
        if size > most:
            raise _refused(self.kind, f"has {size} bytes; at most {most} are read")
        if not self.text.strip():
            raise _refused(self.kind, "is empty")
        if _depth(self.text) > MOST_DEPTH:
            raise _refused(self.kind, f"is nested deeper than {MOST_DEPTH} levels")

    @classmethod
    def schema(cls, schema: Any) -> Grammar:
        """JSON that fits a JSON schema (an object, or the text of one)."""
        if isinstance(schema, str):
            return cls("json", schema)
        if not isinstance(schema, (dict, bool)):
            raise RequestError(
                f"a schema of type {type(schema).__name__}",
                rule="is none: a JSON schema is an object",
                next='give one, as {"type": "object"}',
            )
        try:
            return cls("json", json.dumps(schema, ensure_ascii=False))
        except RecursionError:
            raise _refused("json", f"is nested deeper than {MOST_DEPTH} levels") from None

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of these texts."""
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError(
                f"choices {texts!r:.80}", rule="must be texts, none of them empty", next="name some"
            )
        return cls("lark", "start: " + " | ".join(json.dumps(text) for text in texts))


class Grammars:
    """The grammars of one tokenizer. Safe to use from several threads: two that ask for the same at the
    same moment may both read it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._read = functools.lru_cache(KEPT)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the grammar's beginning. RequestError for one that cannot be read or satisfied."""
        return Matcher(self._read(grammar).deep_copy(), self._vocab)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            if grammar.kind == "json":
                blanks: Any = {"whitespace_pattern": BLANKS}
                text = LLMatcher.grammar_from_json_schema(grammar.text, None, blanks)
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            else:
                text = LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
        except Exception as error:  # whatever its converters raise, the text was at fault
            raise _refused(grammar.kind, f"cannot be read: {error}") from error
        limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000)
        read = LLMatcher(self._tokens, text, log_level=0, limits=limits)
        if read.is_error():
            raise _refused(grammar.kind, f"cannot be used: {_sentence(read.get_error())}")
        Matcher(read.deep_copy(), self._vocab).allowed()  # some show only here that nothing fits
        return read

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        wrapped: Any = _Wrapped(self._tokenizer, self._vocab)
        ends = [id for id in sorted(self._tokenizer.stop_ids) if id < self._vocab]
        found = LLTokenizer(wrapped, eos_token=ends or [self._vocab])
        wrapped.longest = found.greedy_tokenize
        return found


class _Wrapped:
    """What llguidance asks of a tokenizer, with tokens of ours behind the model's, which no mask shows:
    an end for a model without one, and every byte that no token spells. The library follows a grammar
    byte by byte into a character where all branches begin alike, and writes down where it is in tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        specials = tokenizer.special_ids | tokenizer.stop_ids
        self._tokenizer = tokenizer
        self.tokens = [
            tokenizer.token_bytes(id) if id < tokenizer.size else b"" for id in range(vocab)
        ]
        self.tokens.append(b"<|end|>")
        spelled = set(self.tokens)
        self.tokens += [bytes([byte]) for byte in range(256) if bytes([byte]) not in spelled]
        self.longest: Callable[[str], list[int]] | None = None  # by the longest token first
        self.special_token_ids = [*sorted(id for id in specials if id < vocab), vocab]
        self.eos_token_id = vocab

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.codec.within(data)
        if self.longest is None or b"".join(self.tokens[id] for id in ids) == data:
            return ids
        return self.longest(data.decode())  # what has no token, the codec calls unknown


class Matcher:
    """One reply on its way through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        """[V] bool: what may come next."""
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)
        if not mask.any():
            raise RequestError(
                "the grammar",
                rule="cannot be continued with this model's tokens",
                next="ask for a text that the model's tokenizer can write",
            )
        return mask

    def fork(self) -> Matcher:
        """A twin at the same place; neither moves the other."""
        return Matcher(self._matcher.deep_copy(), self._vocab)

    def took(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                "the grammar",
                rule=f"cannot be followed any further: {_sentence(self._matcher.get_error())}",
                next="make it simpler",
            )


def _depth(text: str) -> int:
    """Levels of brackets of any kind, those within strings included."""
    level = deepest = 0
    for bracket in re.findall(r"[(\[{]|[)\]}]", text):
        level += 1 if bracket in "([{" else -1
        deepest = max(deepest, level)
    return deepest


def _sentence(message: str) -> str:
    """The line of the library's words that says what is wrong."""
    lines = message.strip().splitlines() or ["no reason was given"]
    return next((line for line in lines if line.startswith("error: ")), lines[0])[:200]


def _refused(kind: str, rule: str) -> RequestError:
    name = "JSON schema" if kind == "json" else "grammar" if kind == "lark" else kind
    return RequestError(f"the {name}", rule=rule, next="correct it or make it simpler")
