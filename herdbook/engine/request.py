"""What goes into the engine and what comes out: Sampling, Request, Piece, Reply.

    Request(ids=[1, 9690, 198], sampling=Sampling(max_tokens=32, temperature=0.7, seed=3))

goes into `Engine.submit`; pieces come out of `Engine.step`, the last one with the reply.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from herdbook.engine.grammar import Grammar
from herdbook.errors import RequestError

if TYPE_CHECKING:
    from herdbook.engine.reading import Reading

#: why a generation ended: a stop token or stop string, its length, a caller's abort, an exception
Finish = Literal["stop", "length", "abort", "error"]

#: the most alternatives of a token whose logprobs can be asked for
MOST_LOGPROBS = 20

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature=0` is greedy: the most probable token.

    The order in which the settings apply is told in engine/sampling.py.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # keep the k most probable; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose probabilities sum to at least p
    min_p: float = 0.0  # drop what is less probable than min_p × the most probable
    seed: int | None = 0  # None: another draw each time
    stop: tuple[str, ...] = ()  # strings that end the reply and are not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that do so too, besides the model's own
    min_tokens: int = 0  # no stop token may be drawn, no stop string counts, before so many
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    logprobs: int | None = None  # tell each token's logprob, and those of the k most probable
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    presence_penalty: float = 0.0  # subtracted once from each token the reply already has
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the reply
    repetition_penalty: float = 1.0  # divides (multiplies where < 0) logits of prompt and reply
    ignore_eos: bool = False  # go on past stop tokens (for measuring)
    grammar: Grammar | None = None  # what the reply must be (engine/grammar.py)

    def __post_init__(self) -> None:
        given: Any = self.stop
        stop = (given,) if isinstance(given, str) else given
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise _wrong("stop", self.stop, "must be a string or a list of non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        ids: Any = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(map(_is_whole, ids)):
            raise _wrong("stop_token_ids", ids, "must be a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        self._whole("max_tokens", 1, None)
        self._whole("min_tokens", 0, None)
        if self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"is above max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._whole(name, 0, MOST_LOGPROBS)
        self._whole("top_k", 0, None)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise _wrong("top_p", self.top_p, "must be above 0 and at most 1")
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.0, 100.0)
        if self.repetition_penalty == 0:
            raise _wrong("repetition_penalty", self.repetition_penalty, "must be above 0")
        if self.seed is not None:
            self._whole("seed", 0, 2**63 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", self.ignore_eos, "must be true or false")
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                raise _wrong("grammar", self.grammar, "must be a Grammar")
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    rule = "cannot be: a grammar says where the reply ends"
                    raise _wrong(name, getattr(self, name), rule)

    def _whole(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if not _is_whole(value) or value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            raise _wrong(name, value, f"must be a whole number, {bound}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise _wrong(name, value, f"must be a number between {low:g} and {high:g}")

    @property
    def penalised(self) -> bool:
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """{id: bias} or pairs of them, as sorted pairs."""
    try:
        biases = dict(given)
    except (TypeError, ValueError):
        raise _wrong("logit_bias", given, "must map token ids to numbers") from None
    for id, bias in biases.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not _is_whole(id) or not number or not -100 <= bias <= 100:
            raise _wrong("logit_bias", {id: bias}, "must map token ids to numbers, -100 to 100")
    return tuple(sorted(biases.items()))


def _wrong(name: str, value: Any, rule: str) -> RequestError:
    return RequestError(f"{name}={value!r}", rule=rule, next=f"correct {name} or leave it out")


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to go on from it.

    With `targets` or `embed` nothing is drawn; the reply's `reading` has what was asked for. Nor with
    `prompt_only`: then the sampling's `prompt_logprobs` are all there is.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # besides sampling.stop: what ends a turn in this prompt's format
    trim: bool = False  # leave out the blanks that the reply begins with: "ASSISTANT:" → " Hello"
    priority: int = (
        0  # the lower, the more urgent (as in vLLM); among equals first come, first served
    )
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    #: after each of the last len(targets) ids: the tokens whose log-likelihood is wanted there
    targets: tuple[tuple[int, ...], ...] = ()
    embed: bool = False  # the mean of the final hidden states is wanted
    prompt_only: bool = False
    adapter: str | None = None  # of those that the engine has loaded


@dataclass(frozen=True)
class Logprob:
    """How probable one token was to the model: of its raw logits, before bias, penalties, temperature
    or a grammar change them.

    Natural logarithms; -inf for what the model excludes.
    """

    id: int
    logprob: float
    rank: int  # 1: none was more probable
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens: id and logprob, best first


@dataclass(frozen=True)
class Reply:
    """All that one request produced.

    `ids` holds every token that was drawn, the stop token and the tokens of a stop string included;
    `text` holds neither of them.
    """

    text: str
    ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int  # of the prompt, taken from pages of earlier requests
    waiting_s: float  # from submit to the first token
    decoding_s: float  # from the first token to the last
    error: Exception | None = None  # with finish == "error"
    reading: Reading | None = None  # of a request with targets or embed
    logprobs: tuple[Logprob, ...] | None = None  # one for each of `ids`, if asked for
    prompt_logprobs: tuple[Logprob | None, ...] | None = None  # None for the first: nothing before

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.ids) - 1) / self.decoding_s if self.decoding_s > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """What one token added to one request; a step may add several. The last one carries the reason
    and the whole reply: it may come without a token, as after an abort."""

    request_id: str
    text: str
    ids: tuple[int, ...]
    finish: Finish | None = None
    reply: Reply | None = None
    logprobs: tuple[Logprob, ...] = ()  # of `ids`, if asked for
    prompt_logprobs: tuple[Logprob | None, ...] | None = None  # with the first piece, if asked for
