"""Tokenizers that the `tokenizers` library encodes: byte-level BPE, and "▁" pieces in a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library

from herdbook.errors import FileError
from herdbook.files.atomic import write_bytes, write_text
from herdbook.tokens import bytebpe, sentence
from herdbook.tokens.codec import Span
from herdbook.tokens.sentence import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED


@contextmanager
def _told() -> Iterator[None]:
    """The library breaks off where a damaged file leads it out of a list; it stays usable."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which the library does not export
            raise
        raise FileError(
            f"the tokenizer's library failed: {error}",
            rule="so the model's tokenizer file is damaged",
            next="fetch the tokenizer's files again",
        ) from None


class LibraryCodec:
    """Safe to use from several threads: the library is never changed after this is made."""

    def __init__(
        self,
        library: Library,
        specials: Mapping[str, AddedToken],
        *,
        size: int | None = None,
        source: str = "",
        pieces: bytes = b"",
    ) -> None:
        """size: where the vocabulary says more than the library holds. source: the tokenizer.json that
        it came from, word for word ("" for another origin), pieces: the tokenizer.model beside that."""
        self._library, self._specials, self._source = library, dict(specials), source
        self._pieces = pieces
        # Three readings of one model (which they share): specials parsed; all text plain; plain text
        # that goes on after something else.
        self._parsing = _reading(library)
        self._plain = _reading(library, specials)
        self._following = _reading(library, specials, first=False)
        self._added = {
            id: token.content for id, token in library.get_added_tokens_decoder().items()
        }
        self._style, self.strip = _decoder_style(library)
        self.size = size or max(library.get_vocab().values()) + 1

    # --- text and ids

    def encode(self, text: str) -> list[int]:
        with _told():
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        reading = self._plain if first else self._following
        with _told():
            encoding = reading.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def parse(self, text: str) -> tuple[list[int], list[Span]] | None:
        """The library reads the text as a whole, as transformers does."""
        encoding = self._parsing.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def spell(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._library.id_to_token(id) if id >= 0 else None
        if token is None:  # an id of the embedding's padding, beyond the vocabulary
            return b""
        if self._style == "bytes":
            return bytebpe.spelled(token)
        if (byte := sentence.byte_of(token)) is not None:
            return bytes([byte])
        return token.replace(sentence.SPACE, " ").encode()

    def fallback(self, id: int) -> bool:
        token = self._library.id_to_token(id) if id >= 0 and self._style == "pieces" else None
        return token is not None and sentence.byte_of(token) is not None

    @cached_property
    def _bare(self) -> Library:
        """The model alone: nothing is put before a text, and it is cut nowhere."""
        return Library(self._library.model)

    def within(self, data: bytes) -> list[int]:
        if self._style == "bytes":
            text = "".join(bytebpe.ALPHABET[byte] for byte in data)
        else:
            try:
                text = data.decode().replace(" ", sentence.SPACE)
            except UnicodeDecodeError:  # a part of a character
                found = [self._library.token_to_id(f"<0x{byte:02X}>") for byte in data]
                return [id for id in found if id is not None]
        ids: list[int] = self._bare.encode(text, add_special_tokens=False).ids
        return ids

    # --- fewer tokens

    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = json.loads(self._library.to_str())["model"]
        if model["type"] != "BPE" or not model["merges"]:
            raise FileError(
                f"a tokenizer.json of type {model['type']}",
                rule="cannot be pruned (BPE can)",
                next="prune its tokenizer.model instead, if the model came with one",
            )
        return model

    def closure(self, ids: set[int]) -> set[int]:
        """The tokens that merging makes on the way to those of `ids`; bytes; added tokens."""
        model = self._model()
        vocabulary: dict[str, int] = model["vocab"]
        ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(_pairs(model)):
            ranks.setdefault(merge, rank)
        by_id = {id: token for token, id in vocabulary.items()}
        kept = {f"<0x{byte:02X}>" for byte in range(256)} | {sentence.SPACE}
        kept = set(bytebpe.BYTES) if self._style == "bytes" else kept
        kept.add(model.get("unk_token") or "")
        for id in ids & by_id.keys() - self._added.keys():
            kept |= sentence.made(by_id[id], lambda left, right: ranks.get((left, right)))
        found = {vocabulary[token] for token in kept if token in vocabulary}
        return ids | found | self._added.keys()

    def only(self, keep: Sequence[int]) -> LibraryCodec:
        model = self._model()
        new = {id: place for place, id in enumerate(keep)}
        whole = json.loads(self._library.to_str())
        vocabulary = {token: new[id] for token, id in model["vocab"].items() if id in new}
        model["merges"] = [
            [left, right]
            for left, right in _pairs(model)
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
        whole["model"] = model | {"vocab": vocabulary}
        whole["added_tokens"] = [
            one | {"id": new[one["id"]]} for one in whole["added_tokens"] if one["id"] in new
        ]
        _renumber(whole.get("post_processor"), new)
        library = Library.from_str(json.dumps(whole))
        added = {token.content for token in library.get_added_tokens_decoder().values()}
        for one in whole["added_tokens"]:
            if library.token_to_id(one["content"]) != one["id"]:
                raise FileError(
                    f"this tokenizer.json with the added token {one['content']!r} at {one['id']}",
                    rule="cannot be pruned: added tokens lie between ordinary ones",
                    next="prune its tokenizer.model instead, if the model came with one",
                )
        return LibraryCodec(library, {t: a for t, a in self._specials.items() if t in added})

    # --- writing

    def save(self, folder: Path, bos: int | None) -> None:
        write_text(folder / "tokenizer.json", self._source or self._library.to_str())
        if self._pieces:
            write_bytes(folder / "tokenizer.model", self._pieces)

    def gguf(self, special_ids: frozenset[int]) -> dict[str, Any]:
        model = json.loads(self._library.to_str())["model"]
        merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", [])]
        if model["type"] != "BPE" or not merges:
            raise FileError(
                f"a tokenizer.json of type {model['type']}",
                rule="cannot be written into a GGUF (byte-level BPE and LLaMA's pieces can)",
                next="export to a Hugging Face folder instead: --to hf",
            )
        tokens = [f"[PAD{id}]" for id in range(self.size)]
        types = [UNUSED] * self.size
        for token, id in model["vocab"].items():
            tokens[id], types[id] = token, NORMAL
        for id, added in self._added.items():
            tokens[id] = added
            types[id] = CONTROL if id in special_ids else USER_DEFINED
        out = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        if self._style == "bytes":
            return {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": bytebpe.detect(self._library),
                **out,
                "tokenizer.ggml.merges": merges,
            }
        # Pieces: a score for each, by the first merge that makes it; better merges score higher.
        scores = [0.0] * self.size
        for rank, merge in reversed(list(enumerate(merges))):
            left, _, right = merge.partition(" ")
            scores[model["vocab"][left + right]] = -float(rank)
        for id, token in enumerate(tokens):
            if sentence.byte_of(token) is not None:
                types[id] = BYTE
        unknown = model["vocab"].get(model.get("unk_token"), 0)
        types[unknown] = UNKNOWN
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            **out,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": self.strip,
            "tokenizer.ggml.unknown_token_id": unknown,
        }


def _pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges of a tokenizer.json, written "a b" or ["a", "b"]."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def bos_first(token: str, id: int) -> processors.TemplateProcessing:
    """BOS before every text that other tools encode with this tokenizer.json."""
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, id)],
    )


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Change the ids in a post-processor's JSON, in place."""
    if isinstance(processor, dict):
        for one in processor.get("processors", []):
            _renumber(one, new)
        if isinstance(tokens := processor.get("special_tokens"), dict):
            for token in tokens.values():
                token["ids"] = [new[id] for id in token["ids"]]


def _reading(
    library: Library, plain: Mapping[str, AddedToken] | None = None, *, first: bool = True
) -> Library:
    """A copy that shares the model (cheap) and adds no token of its own.

    plain: these special tokens are not parsed. first=False: no space is put before the text, where
    the tokenizer does so only at its very beginning.
    """
    copy = Library(library.model)
    if library.normalizer is not None:
        copy.normalizer = library.normalizer
    if library.pre_tokenizer is not None:
        copy.pre_tokenizer = library.pre_tokenizer
        if not first and '"prepend_scheme":"first"' in (state := _state(library.pre_tokenizer)):
            never = state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
            document = json.loads(copy.to_str())
            document["pre_tokenizer"] = json.loads(never)
            copy = Library.from_str(json.dumps(document))
    added = sorted(library.get_added_tokens_decoder().items())
    tokens = []
    for _, token in added:
        if plain is not None and token.content in plain:
            token = AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
        tokens.append(token)
    copy.add_tokens(tokens)
    assert all(copy.token_to_id(token.content) == id for id, token in added)
    copy.encode_special_tokens = plain is not None
    return copy


def _state(step: Any) -> str:
    state = step.__getstate__()
    return state.decode() if isinstance(state, bytes) else str(state)


def _decoder_style(library: Library) -> tuple[str, bool]:
    """("bytes" or "pieces", whether decoding takes a leading space away)."""

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] != "Sequence":
            return [step]
        return [one for inner in step["decoders"] for one in flat(inner)]

    steps = flat(json.loads(_state(library.decoder))) if library.decoder is not None else []
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return "bytes", False
    if "Metaspace" in kinds:
        scheme = kinds["Metaspace"].get("prepend_scheme", "always")
        return "pieces", scheme != "never"
    if "Replace" in kinds and kinds["Replace"]["pattern"] == {"String": sentence.SPACE}:
        return "pieces", kinds.get("Strip", {}).get("start", 0) > 0
    raise FileError(
        f"a tokenizer.json with decoder {sorted(kinds) or None}",
        rule="is of a kind whose tokens are no bytes (known are ByteLevel and ▁ pieces)",
        next="use a generative model's tokenizer",
    )
