"""What the engine asks of a model before, and beside, computing it: its sizes, and how it reads.

A `Decoder` is one, and so is a file whose weights the native step reads as they lie there
(engine/packaged.py), which becomes a decoder only when something needs one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from herdbook.errors import FileError, RequestError
from herdbook.model.config import DecoderConfig

if TYPE_CHECKING:
    from herdbook.model.decoder import Decoder
    from herdbook.model.soft import Soft


class Model:
    """A model's configuration, its family, and how it reads prompts and rows."""

    config: DecoderConfig
    #: the name of its description
    family: str = "llama"
    headless: bool = False
    #: what the engine keeps of a sequence: its keys and values in pages, or the model's own state
    memory: Literal["pages", "state"] = "pages"
    #: whether a prompt has to be computed in one step
    whole_prompts = False
    #: virtual tokens that were trained to stand before every document
    soft: Soft | None

    @abstractmethod
    def module(self) -> Decoder:
        """The model as PyTorch computes it."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the format that PyTorch computes it in."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The kind of device that computes it."""

    @property
    def ids(self) -> int:
        """Token ids that it reads are below this."""
        return self.config.vocab

    def tree(self, data: Mapping[str, Any], encode: Callable[[str], Sequence[int]]) -> list[int]:
        """A prompt out of a tree of texts, for a model that reads such."""
        raise RequestError(
            f"a prompt with the keys {sorted(map(str, data))}",
            rule="is no text, list of ids or list of messages, and this model reads no trees",
            next='for one message write [{"role": "user", "content": "…"}]',
        )

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """What the model reads where these tokens wait for a reply."""
        return list(ids)

    def examples(
        self, ids: Sequence[int], mask: Sequence[bool]
    ) -> list[tuple[list[int], list[bool]]]:
        """Rows to learn from, and what of them is trained, out of a conversation's tokens."""
        return [(list(ids), list(mask))]

    def need_head(self) -> None:
        if self.headless:
            raise FileError(
                "this model has no head (no lm_head.weight, and its config does not tie one)",
                rule="so it gives hidden states but no logits",
                next="use its hidden states, or a checkpoint saved with the head",
            )
