"""A model to talk to: what `herdbook.load(ref)` gives.

    m = herdbook.load("smollm2")
    m.generate([{"role": "user", "content": "Who are you?"}], max_tokens=32)
    m.generate("The capital of France is")          # plain text goes on as it is
    m.logits(m.tokenizer.encode("Hello"))           # float32 [tokens, vocabulary]

Shapes: T tokens, hidden size, vocab size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from herdbook.data.records import Message
from herdbook.data.teacher import Answer, Ask
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.engine.text import escapes
from herdbook.errors import FileError, RequestError, nearest
from herdbook.model.config import DecoderConfig
from herdbook.model.interface import Model
from herdbook.model.sources import check_vocabulary
from herdbook.tokens.chat import Rendering, render
from herdbook.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from herdbook.model.decoder import Decoder

Messages: TypeAlias = Sequence[Mapping[str, Any] | Message]
#: a conversation that waits for its reply, a text to go on with, token ids, or (CPM-Bee) a tree
Prompt: TypeAlias = Messages | str | Sequence[int] | Mapping[str, Any]


class LoadedModel:
    """A model with its tokenizer and, once something is generated, an engine."""

    def __init__(self, model: Model, tokenizer: Tokenizer | None, path: Path) -> None:
        if tokenizer is not None:
            check_vocabulary(model.config, tokenizer.size)
        self.model, self.maybe_tokenizer, self.path = model, tokenizer, path

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def decoder(self) -> Decoder:
        """The model as PyTorch computes it."""
        return self.model.module()

    @property
    def tokenizer(self) -> Tokenizer:
        if self.maybe_tokenizer is None:
            raise FileError(
                f"{self.path}",
                rule="came without a tokenizer, so it takes token ids only",
                next="put its tokenizer.json beside the weights, or give ids",
            )
        return self.maybe_tokenizer

    @cached_property
    def engine(self) -> Engine:
        """The engine behind generate, stream and embed."""
        return Engine(self.model, self.maybe_tokenizer)

    def render(self, messages: Messages, *, reply: bool = False) -> Rendering:
        """Ids and loss mask of a conversation by the model's own template.

        reply: end with the beginning of the assistant's turn.
        """
        return render(self.tokenizer, messages, reply=reply)

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, hidden], after the final norm."""
        return self._forward(ids).float()

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, vocab]: row t scores what may follow ids[: t + 1]."""
        import torch

        self.model.need_head()
        with torch.no_grad():
            return self.decoder.logits(self._forward(ids))

    def _forward(self, ids: Sequence[int]) -> Tensor:
        import torch

        from herdbook.model.layout import Packed

        if not len(ids) or not all(0 <= i < self.model.ids for i in ids):
            raise RequestError(
                f"{len(ids)} token ids",
                rule=f"must be at least one, each from 0 to {self.model.ids - 1}",
                next="encode the text with this model's own tokenizer",
            )
        device = self.decoder.device
        with torch.no_grad():
            hidden: Tensor = self.decoder(
                torch.tensor(list(ids), device=device), Packed([len(ids)], device)
            )
        return hidden

    def generate(self, prompt: Prompt | Sequence[Prompt], **sampling: Any) -> Any:
        """The reply to one prompt (str), or the replies to a list of prompts (list of str).

        sampling: the fields of `Sampling`, such as max_tokens=64, temperature=0.7, stop=["\\n"].
        Without a tokenizer there is no text: use `engine.generate` for ids.
        """
        settings = _sampling(sampling)
        several = _is_many(prompt)
        prompts: Any = prompt if several else [prompt]
        replies = self.engine.generate([self._request(one, settings) for one in prompts])
        texts = [reply.text for reply in replies]
        return texts if several else texts[0]

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """The reply to one prompt in bits as they come; joined they are what generate gives."""
        request = self._request(prompt, _sampling(sampling))
        return (piece.text for piece in self.engine.stream(request) if piece.text)

    def classify(self, texts: Sequence[str | Messages]) -> list[dict[str, float]]:
        """Of each text (or conversation) the chance of each label, by a model that step Classify made."""
        import torch

        found: list[dict[str, float]] = []
        for one in texts:
            ids = self.tokenizer.prompt(one) if isinstance(one, str) else self.render(one).ids
            with torch.no_grad():
                chances = self.decoder.scores(self._forward(ids)[-1:]).softmax(-1)[0]
            found.append(dict(zip(self.config.labels, chances.tolist(), strict=True)))
        return found

    def embed(
        self, texts: str | Sequence[str | Sequence[int]], *, normalise: bool = False
    ) -> np.ndarray:
        """float32 [texts, hidden]: the mean of each text's hidden states after the final norm.

        texts: one, or several, each a text or its token ids. normalise: to length 1, so that
        products are cosines.
        """
        several = [texts] if isinstance(texts, str) else texts
        return self.engine.embed([self._ids(one) for one in several], normalise=normalise)

    def _ids(self, text: str | Sequence[int]) -> Sequence[int]:
        return self.tokenizer.prompt(self.written(text)) if isinstance(text, str) else text

    def written(self, text: str) -> str:
        """A plain text as the model was taught to read it: ChatGLM-6B's line ends are "<n>"."""
        for meant, written in escapes(self.tokenizer.chat_template).items():
            text = text.replace(meant, written)
        return text

    def _request(self, prompt: Prompt, sampling: Sampling) -> Request:
        if isinstance(prompt, str):
            return Request(self._ids(prompt), sampling)
        if isinstance(prompt, Mapping):
            tree = self.model.tree(prompt, partial(self.tokenizer.encode, specials=True))
            return Request(tree, sampling)
        if prompt and isinstance(prompt[0], int):
            return Request(list(prompt), sampling)  # type: ignore[arg-type]
        return self.ask(prompt, sampling, datetime.now())  # type: ignore[arg-type]

    def ask(self, messages: Messages, sampling: Sampling, now: datetime | None = None) -> Request:
        """The request for the next turn of a conversation. now: the date that a template may write."""
        ids = render(self.tokenizer, messages, reply=True, now=now).ids
        return Request(ids, sampling, stop=self.tokenizer.stop_strings, trim=True)

    def as_teacher(self) -> EngineTeacher:
        """This model as a source of answers for data generation and evaluation."""
        return EngineTeacher(self)


class EngineTeacher:
    """A Teacher (data/teacher.py): all asks of a call in one batch of the engine."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def generate(self, asks: Sequence[Ask], /) -> list[Answer]:
        """Answers in the order of the asks; they depend on the asks of this call alone."""
        engine = self.model.engine
        engine.forget()
        requests = [
            self.model.ask(
                ask.messages,
                Sampling(max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed),
            )
            for ask in asks
        ]
        replies = engine.generate(requests)
        return [Answer(reply.text, finished=reply.finish == "stop") for reply in replies]


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    known = list(Sampling.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise RequestError(
                f"{name}={settings[name]!r}",
                rule="is no setting of sampling",
                next=nearest(name, known),
            )
    return Sampling(**settings)


def _is_many(prompt: Any) -> bool:
    """A list of prompts, rather than one conversation, text, or list of ids."""
    if isinstance(prompt, (str, Mapping)) or not prompt:
        return False
    return not isinstance(prompt[0], (int, Mapping, Message))
