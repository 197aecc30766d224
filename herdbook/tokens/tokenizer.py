"""One tokenizer for all: training, engine, server and export read text through this class.

    tokenizer.json                             tokenizers (byte-level BPE, or pieces with "▁")
    .gguf with tokenizer.ggml.model = gpt2     tokenizers, built from tokens, merges and `pre`
    .gguf with tokenizer.ggml.model = llama    SentencePiece, built from pieces and scores
    tokenizer.model, spiece.model              SentencePiece
    ice_text.model                             SentencePiece with tokens of white space (ChatGLM-6B)
    *.tiktoken, LLaMA 3's tokenizer.model      tokenizers, built from the ranks
    vocab.json with merges.txt                 tokenizers
    rwkv_vocab_v20230424.txt, vocab.txt        the longest token first (RWKV World, CPM-Bee)

    >>> t = Tokenizer.load(Path("SmolLM2-135M-Instruct.gguf"))
    >>> t.encode("Hi<|im_end|>"), t.encode("Hi<|im_end|>", specials=True)
    ([26843, 44, 108, 306, 79, 486, 108, 46], [26843, 2])

A *special* token (end of turn, start of turn, BOS …) is only ever written by a template or by
Herdbook, never by text that came from a user: `specials=False`, the default, reads "<|im_end|>" as
twelve ordinary characters.

Decoding joins the tokens' bytes and reads them as UTF-8, so a stream of tokens, decoded as it comes,
gives the same text as all of them at once. Left out: tokenizers whose tokens are no bytes (WordPiece).

How each kind encodes stands in its codec (codec.py lists them), how it is read in reading.py.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from herdbook.files.atomic import write_json
from herdbook.tokens import gguf_lists, reading, templates
from herdbook.tokens.codec import Codec, Parts, Span
from herdbook.tokens.ice import IceCodec
from herdbook.tokens.sentence import UNUSED
from herdbook.tokens.settings import CONFIG

#: special tokens that end a turn or a document in any model that has them
ENDS = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|end_of_turn|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
        "<eos>",
        "<eom>",
        "<eoh>",
    ]
)


class Tokenizer:
    """Text ↔ token ids. Safe to use from several threads: nothing changes after it is made."""

    def __init__(self, parts: Parts) -> None:
        """Use `load`."""
        self._parts = parts
        self.codec: Codec = parts.codec
        self.size = parts.codec.size
        self.bos_id, self.eos_id = parts.bos_id, parts.eos_id
        self.chat_template = parts.chat_template
        self.add_bos = parts.add_bos  # whether the model expects BOS before plain text
        self.special_ids = frozenset(parts.special_ids.values())
        named = [id for text, id in parts.special_ids.items() if text in ENDS]
        said = templates.stop_strings(parts.chat_template)
        named += [parts.special_ids[text] for text in said if text in parts.special_ids]
        eos = [] if parts.eos_id is None else [parts.eos_id]
        self.stop_ids = frozenset([*parts.ends, *named, *eos])
        #: texts that end an answer of the chat template, where no token does
        self.stop_strings = tuple(text for text in said if text not in parts.special_ids)
        self._special = _pattern(parts.specials)
        #: whether a special token is none where a word goes on around it: "sop" in "philosophy"
        self.edged = any(token.single_word for token in parts.specials.values())
        self._bytes: dict[int, bytes] = {}

    # --- loading

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether `load` would find a tokenizer there (not whether it is a good one)."""
        return reading.exists(Path(path))

    @classmethod
    def load(cls, path: Path, template: str | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder or of one of the files above.

        template: the source of a chat template to use instead of the one that it brings.
        """
        return cls(reading.read(Path(path), template))

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], path: Path, template: str | None = None
    ) -> Tokenizer:
        """From the metadata of the GGUF at `path`."""
        return cls(gguf_lists.from_gguf(metadata, path, template))

    # --- text → ids

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """Token ids of `text`. bos: BOS first (where there is one). specials: parse special tokens."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        if specials:
            return start + self.encode_spans(text)[0]
        return start + self.codec.encode(text)

    def prompt(self, text: str) -> list[int]:
        """Ids of a plain text as its model expects to go on with it: BOS before it where there is one;
        of GLM's models [gMASK] and sop, of ChatGLM-6B's kind behind it."""
        sop = self._parts.special_ids.get("sop", self._parts.special_ids.get("<sop>"))
        mask = self._parts.special_ids.get("[gMASK]")
        if sop is None or mask is None:
            return self.encode(text, bos=self.add_bos)
        ids = self.codec.encode(text)
        return [*ids, mask, sop] if isinstance(self.codec, IceCodec) else [mask, sop, *ids]

    def encode_spans(self, text: str, plain: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Ids with special tokens parsed, and the characters [start, end) that each id stands for.

        plain: spans of `text` (in order, disjoint) in which, or across whose edges, nothing is parsed.
        Without them the library reads the text as a whole, as transformers does.
        """
        if not plain and (parsed := self.codec.parse(text)) is not None:
            return parsed
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for start, end, id in [*self._find_specials(text, plain), (len(text), len(text), None)]:
            if at < start:
                part, where = self.codec.encode_spans(text[at:start], first=at == 0)
                ids += part
                spans += [(at + a, at + b) for a, b in where]
            if id is not None:
                ids.append(id)
                spans.append((start, end))
            at = end
        return ids, spans

    def _find_specials(self, text: str, plain: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        at = 0
        for start, end in [*plain, (len(text), len(text))]:
            for found in self._special.finditer(text[at:start]):  # what is plain is no neighbour
                name = found.lastgroup
                assert name is not None
                id = self._parts.special_ids[found.group(name)]
                yield at + found.start(), at + found.end(), id
            at = end

    def holds_special(self, text: str) -> bool:
        """Whether `text` holds the text of a special token."""
        return self._special.search(text) is not None

    def special_spans(self, text: str) -> list[Span]:
        """Where `text` holds the text of special tokens."""
        found = self._special.finditer(text)
        return [one.span(one.lastgroup) for one in found if one.lastgroup]

    # --- ids → text

    def token_bytes(self, id: int) -> bytes:
        """What the token stands for: b" Hello", b"\\xf0\\x9f", b"<|im_end|>"."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self.codec.spell(id)
        return known

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become "\\ufffd"; specials are left out unless asked."""
        stream = self.stream(specials=specials)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, *, specials: bool = False) -> Stream:
        """A decoder that takes ids one at a time."""
        return Stream(self, specials)

    # --- more tokens, and fewer

    def extended(self, codec: Codec) -> Tokenizer:
        """The same tokenizer with a codec that knows all its tokens by their ids, and more."""
        config = self._settings()
        return Tokenizer(dataclasses.replace(self._parts, codec=codec, config=config, metadata={}))

    def only(self, keep: Collection[int]) -> Tokenizer:
        """The same tokenizer with these tokens alone, numbered anew in their old order."""
        order, parts = sorted(keep), self._parts
        new = {id: place for place, id in enumerate(order)}
        special = {text: new[id] for text, id in parts.special_ids.items() if id in new}
        return Tokenizer(
            dataclasses.replace(
                parts,
                codec=self.codec.only(order),
                specials={text: token for text, token in parts.specials.items() if text in special},
                special_ids=special,
                bos_id=None if self.bos_id is None else new.get(self.bos_id),
                eos_id=None if self.eos_id is None else new.get(self.eos_id),
                ends=[new[id] for id in parts.ends if id in new],
                config={k: v for k, v in self._settings().items() if k != "added_tokens_decoder"},
                metadata={},
            )
        )

    # --- writing

    def save(self, folder: Path) -> None:
        """The tokenizer's own files and tokenizer_config.json.

        Of byte-level BPE and SentencePiece a tokenizer.json, which transformers reads to the same
        ids; of SentencePiece tokenizer.model too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.codec.save(folder, self.bos_id if self.add_bos else None)
        write_json(folder / CONFIG, self._settings())

    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        left_out = ("auto_map", "legacy", "extra_ids")  # what these name is in the file already
        config = {k: v for k, v in self._parts.config.items() if k not in left_out}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("clean_up_tokenization_spaces", False)
        config["add_bos_token"] = self.add_bos
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if id is not None:
                config[name] = self.token_bytes(id).decode()
        padding = self._parts.metadata.get("tokenizer.ggml.padding_token_id")
        if padding is not None and 0 <= padding < self.size:
            config.setdefault("pad_token", self.token_bytes(padding).decode())
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    def gguf_metadata(self, rows: int | None = None) -> dict[str, Any]:
        """The tokenizer.* keys of a GGUF file. rows: of the embedding; missing tokens are padded."""
        out = dict(self._parts.metadata) or self.codec.gguf(self.special_ids)
        for name, id in (("bos_token_id", self.bos_id), ("eos_token_id", self.eos_id)):
            if id is not None:
                out[f"tokenizer.ggml.{name}"] = id
        out["tokenizer.ggml.add_bos_token"] = self.add_bos
        if self.chat_template is not None:
            out["tokenizer.chat_template"] = self.chat_template
        missing = (rows or 0) - len(out["tokenizer.ggml.tokens"])
        if missing > 0:
            last = len(out["tokenizer.ggml.tokens"])
            padding = [f"[PAD{last + place}]" for place in range(missing)]
            out["tokenizer.ggml.tokens"] = [*out["tokenizer.ggml.tokens"], *padding]
            types = out.get("tokenizer.ggml.token_type")
            if types is not None:
                out["tokenizer.ggml.token_type"] = [*types, *[UNUSED] * missing]
            if "tokenizer.ggml.scores" in out:
                out["tokenizer.ggml.scores"] = [*out["tokenizer.ggml.scores"], *[0.0] * missing]
        return out


class Stream:
    """Turns ids into text as they come; holds bytes back until they make a whole character.

    "🦙" is four bytes, in SmolLM2 three tokens: the first two pushes return "", the third "🦙". What
    all pushes and the flush return, joined, is `decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, specials: bool = False) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.codec.strip  # the space that encoding put before the text

    def push(self, id: int) -> str:
        if not self._specials and id in self._tokenizer.special_ids:
            return ""
        data = self._tokenizer.token_bytes(id)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: a character that was never finished, as "\\ufffd"."""
        return self._utf8.decode(b"", final=True)


def _pattern(specials: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Finds the text of any special token, the longest first, with the blanks it swallows."""
    parts = []
    for place, (text, token) in enumerate(sorted(specials.items(), key=lambda one: -len(one[0]))):
        word = f"(?P<s{place}>{re.escape(text)})"
        if token.single_word:
            word = rf"(?<!\w){word}(?!\w)"
        parts.append((r"\s*" if token.lstrip else "") + word + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(parts) or r"(?!)")
