"""One tokenizer for all: training, engine, server and export read text through this class.

Three kinds of file, two libraries underneath:

    tokenizer.json                             tokenizers (byte-level BPE, or pieces with "▁")
    .gguf with tokenizer.ggml.model = gpt2     tokenizers, built from tokens, merges and `pre`
    .gguf with tokenizer.ggml.model = llama    SentencePiece, built from pieces and scores
    tokenizer.model                            SentencePiece

    >>> t = Tokenizer.load(Path("SmolLM2-135M-Instruct.gguf"))
    >>> t.encode("Hi<|im_end|>"), t.encode("Hi<|im_end|>", specials=True)
    ([26843, 44, 108, 306, 79, 486, 108, 46], [26843, 2])

A *special* token (end of turn, start of turn, BOS …) is only ever written by a template or by
Herdbook, never by text that came from a user: `specials=False`, the default, reads "<|im_end|>" as
twelve ordinary characters.

Decoding joins the tokens' bytes and reads them as UTF-8, so a stream of tokens, decoded as it comes,
gives the same text as all of them at once. Left out: tokenizers whose tokens are no bytes (WordPiece).
"""

from __future__ import annotations

import bisect
import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Library

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.files.atomic import write_bytes, write_json, write_text
from herdbook.tokens import bytebpe, sentence, templates
from herdbook.tokens.sentence import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
)

Span = tuple[int, int]

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
#: how a turn's delimiter looks where a file calls it an ordinary added token
_DELIMITER = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(start|end)_of_turn>|\[/?INST\]|<eo[ham]>"
    r"|<reserved_\d+>|\[g?MASK\]|<?[se]op>?"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"

#: where a folder keeps its tokenizer, in the order in which they are looked for
FILES = ("tokenizer.json", "tokenizer.model", "model.gguf")


class Tokenizer:
    """Text ↔ token ids. Safe to use from several threads: nothing changes after it is made."""

    def __init__(
        self,
        *,
        library: Library | None = None,
        pieces: PieceModel | None = None,
        specials: Mapping[str, AddedToken],
        special_ids: Mapping[str, int],
        bos_id: int | None,
        eos_id: int | None,
        ends: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        """Use `load`. Exactly one of `library` and `pieces` is given.

        specials: the special tokens by their text; special_ids: their ids.
        config: the tokenizer_config.json it came with; metadata: the GGUF's tokenizer.* keys.
        source: the tokenizer.json it came from, word for word ("" for another origin).
        """
        assert (library is None) != (pieces is None)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.chat_template = chat_template
        self.add_bos = add_bos  # whether the model expects BOS before plain text
        self.special_ids = frozenset(special_ids.values())
        named = [id for text, id in special_ids.items() if text in ENDS]
        said = templates.stop_strings(chat_template)
        named += [special_ids[text] for text in said if text in special_ids]
        self.stop_ids = frozenset([*ends, *named, *([] if eos_id is None else [eos_id])])
        #: texts that end an answer of the chat template, where no token does
        self.stop_strings = tuple(text for text in said if text not in special_ids)
        self._special_ids = dict(special_ids)
        self._special = _pattern(specials)
        self._pieces, self._config = pieces, dict(config or {})
        self._metadata, self._source = dict(metadata or {}), source
        self._bytes: dict[int, bytes] = {}
        if library is not None:
            self._library = library
            # Three readings of one model (which they share): specials parsed; all text plain; plain
            # text that goes on after something else.
            self._parsing = _reading(library)
            self._plain = _reading(library, specials)
            self._following = _reading(library, specials, first=False)
            self._added = {
                id: token.content for id, token in library.get_added_tokens_decoder().items()
            }
            self._style, self._strip = _decoder_style(library)
            tokens = self._metadata.get("tokenizer.ggml.tokens")
            self.size = len(tokens) if tokens else max(library.get_vocab().values()) + 1
        else:
            assert pieces is not None
            self._style, self._strip = "pieces", pieces.dummy_prefix
            self._added = {
                id: pieces.pieces[id]
                for id, kind in enumerate(pieces.types)
                if kind in (CONTROL, UNKNOWN)
            }
            self.size = len(pieces.pieces)

    # --- loading

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether `load` would find a tokenizer there (not whether it is a good one)."""
        if path.is_dir():
            return any((path / name).is_file() for name in FILES)
        if path.suffix == ".gguf" and path.is_file():
            return "tokenizer.ggml.tokens" in gguf.read(path).metadata
        return path.is_file() and path.suffix in (".json", ".model")

    @classmethod
    def load(cls, path: Path, template: str | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, a .gguf, a .model or a tokenizer.json.

        template: the source of a chat template to use instead of the one that it brings.
        """
        path = Path(path)
        if path.is_dir():
            for name in FILES:
                if (path / name).is_file():
                    return cls.load(path / name, template)
            raise FileError(
                f"{path}",
                rule=f"holds no tokenizer ({', '.join(FILES[:-1])} or {FILES[-1]})",
                next="copy the tokenizer's files from the original model into that folder",
            )
        if not path.is_file():
            raise FileError(
                f"{path}",
                rule="is not there",
                next="give a folder, .gguf, .model or tokenizer.json",
            )
        if path.suffix == ".gguf":
            return cls.from_gguf(gguf.read(path).metadata, path, template)
        if path.suffix == ".model":
            return _from_model(path, template)
        return _from_json(path, template)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], path: Path, template: str | None = None
    ) -> Tokenizer:
        """From GGUF metadata (`path` for messages)."""
        own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        get = {key.removeprefix("tokenizer.ggml."): value for key, value in own.items()}.get
        tokens, model = get("tokens"), get("model")
        if not tokens:
            raise FileError(
                f"{path}",
                rule="holds no tokenizer (no tokenizer.ggml.tokens)",
                next="use it by token ids, or load a folder that has a tokenizer.json",
            )
        brought = {"chat_template": own.get("tokenizer.chat_template")}
        template = template or _template(path, brought, path.stem, metadata.get("general.name"))
        types = list(get("token_type") or [NORMAL] * len(tokens))
        if len(types) != len(tokens):
            raise FileError(
                f"{path}: {len(types):,} token types for {len(tokens):,} tokens",
                rule="must be as many",
                next="get the file again; it may be damaged",
            )
        for id, kind in enumerate(types):
            if kind in (NORMAL, USER_DEFINED) and _delimits(tokens[id], template):
                types[id] = CONTROL
        special = {tokens[id]: id for id, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
        specials = {text: AddedToken(text, normalized=False, special=True) for text in special}
        bos, eos = _known(get("bos_token_id"), tokens), _known(get("eos_token_id"), tokens)
        named = [_known(get(f"{name}_token_id"), tokens) for name in ("eot", "eom")]
        ends = [id for id in named if id is not None]
        if model == "gpt2":
            pre = get("pre", "default")
            added = [
                AddedToken(tokens[id], normalized=False, special=kind != USER_DEFINED)
                for id, kind in enumerate(types)
                if kind in (CONTROL, UNKNOWN, USER_DEFINED)
            ]
            library = bytebpe.build(tokens, get("merges") or [], added, pre)
            add_bos = bool(get("add_bos_token", bytebpe.CUTS[pre].add_bos)) and bos is not None
            if add_bos and bos is not None:
                library.post_processor = _bos_first(tokens[bos], bos)
            return cls(
                library=library,
                specials=specials,
                special_ids=special,
                bos_id=bos,
                eos_id=eos,
                ends=ends,
                add_bos=add_bos,
                chat_template=template,
                metadata=own,
            )
        if model == "llama":
            scores = get("scores") or [0.0] * len(tokens)
            unknown = get("unknown_token_id", 0)
            if UNKNOWN not in types:  # SentencePiece insists on one
                types[unknown] = UNKNOWN
            pieces = PieceModel(
                list(tokens),
                list(scores),
                types,
                dummy_prefix=bool(get("add_space_prefix", True)),
                squeeze=bool(get("remove_extra_whitespaces", False)),
                character_map=bytes(get("precompiled_charsmap") or b""),
                ids={"unk": unknown, "bos": -1 if bos is None else bos},
            )
            return cls(
                pieces=pieces,
                specials=specials,
                special_ids=special,
                bos_id=bos,
                eos_id=eos,
                ends=ends,
                add_bos=bool(get("add_bos_token", True)) and bos is not None,
                chat_template=template,
                metadata=own,
            )
        raise FileError(
            f"{path}: tokenizer.ggml.model = {model!r}",
            rule="is not a kind of tokenizer that Herdbook knows (gpt2, llama)",
            next="take tokenizer.json from the model's own folder",
        )

    # --- text → ids

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """Token ids of `text`. bos: BOS first (where there is one). specials: parse special tokens."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        if specials:
            return start + self.encode_spans(text)[0]
        if self._pieces:
            return start + self._pieces.encode(text)
        return start + self._plain.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, plain: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Ids with special tokens parsed, and the characters [start, end) that each id stands for.

        plain: spans of `text` (in order, disjoint) in which, or across whose edges, nothing is parsed.
        Without them the library reads the text as a whole, as transformers does.
        """
        if not self._pieces and not plain:
            encoding = self._parsing.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for start, end, id in [*self._find_specials(text, plain), (len(text), len(text), None)]:
            if at < start:
                part, where = self._encode_part(text[at:start], first=at == 0)
                ids += part
                spans += [(at + a, at + b) for a, b in where]
            if id is not None:
                ids.append(id)
                spans.append((start, end))
            at = end
        return ids, spans

    def _encode_part(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        if self._pieces:
            return self._pieces.encode_spans(text)
        reading = self._plain if first else self._following
        encoding = reading.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _find_specials(self, text: str, plain: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        ends = [end for _, end in plain]
        at = 0
        while found := self._special.search(text, at):
            name = found.lastgroup
            assert name is not None
            start, end = found.span(name)
            near = bisect.bisect_right(ends, start)  # the first span that ends after `start`
            if near < len(plain) and plain[near][0] < end:
                at = start + 1
                continue
            start, end = found.span()
            yield start, end, self._special_ids[found.group(name)]
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
            known = self._bytes[id] = self._spell(id)
        return known

    def _spell(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        if self._pieces:
            token = self._pieces.pieces[id] if 0 <= id < self.size else None
            byte = token is not None and self._pieces.types[id] == BYTE
        else:
            token = self._library.id_to_token(id) if id >= 0 else None
            byte = self._style == "pieces"
        if token is None:  # an id of the embedding's padding, beyond the vocabulary
            return b""
        if self._style == "bytes":
            return bytebpe.spelled(token)
        if byte and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return token.replace(sentence.SPACE, " ").encode()

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become "\\ufffd"; specials are left out unless asked."""
        stream = self.stream(specials=specials)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, *, specials: bool = False) -> Stream:
        """A decoder that takes ids one at a time."""
        return Stream(self, specials)

    # --- writing

    def save(self, folder: Path) -> None:
        """tokenizer.json and tokenizer_config.json, which transformers reads to the same ids.

        A SentencePiece model is written as BPE merges, and as tokenizer.model too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = self._source or self._as_library().to_str()
        write_text(folder / "tokenizer.json", text)
        if self._pieces:
            write_bytes(folder / "tokenizer.model", self._pieces.serialise())
        config = {k: v for k, v in self._config.items() if k not in ("auto_map", "legacy")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("clean_up_tokenization_spaces", False)
        config["add_bos_token"] = self.add_bos
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if id is not None:
                config[name] = self.token_bytes(id).decode()
        padding = self._metadata.get("tokenizer.ggml.padding_token_id")
        if padding is not None and 0 <= padding < self.size:
            config.setdefault("pad_token", self.token_bytes(padding).decode())
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / _CONFIG, config)

    def _as_library(self) -> Library:
        """This tokenizer as the `tokenizers` library has it."""
        if not self._pieces:
            return self._library
        pieces = self._pieces
        if pieces.kind != sentence.BPE or pieces.character_map or pieces.squeeze:
            raise FileError(
                "this SentencePiece model (unigram, or with a normaliser of its own)",
                rule="cannot be written as a tokenizer.json",
                next="copy its tokenizer.model along instead",
            )
        # Of equal pieces the first counts, as in SentencePiece.
        vocabulary: dict[str, int] = {}
        for id, piece in enumerate(pieces.pieces):
            vocabulary.setdefault(piece, id)
        unknown = pieces.pieces[pieces.types.index(UNKNOWN)] if UNKNOWN in pieces.types else None
        library = Library(
            models.BPE(
                vocab=vocabulary,
                merges=pieces.merges(),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=BYTE in pieces.types,
            )
        )
        space = normalizers.Replace(" ", sentence.SPACE)
        undo: list[Any] = [
            decoders.Replace(sentence.SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        if pieces.dummy_prefix:
            library.normalizer = normalizers.Sequence([normalizers.Prepend(sentence.SPACE), space])
            undo.append(decoders.Strip(" ", 1, 0))
        else:
            library.normalizer = normalizers.Sequence([space])
        library.decoder = decoders.Sequence(undo)
        library.add_tokens(
            [
                AddedToken(piece, normalized=False, special=kind != USER_DEFINED)
                for piece, kind in zip(pieces.pieces, pieces.types, strict=True)
                if kind in (CONTROL, UNKNOWN, USER_DEFINED)
            ]
        )
        if self.add_bos and self.bos_id is not None:
            library.post_processor = _bos_first(pieces.pieces[self.bos_id], self.bos_id)
        return library

    def gguf_metadata(self, rows: int | None = None) -> dict[str, Any]:
        """The tokenizer.* keys of a GGUF file. rows: of the embedding; missing tokens are padded."""
        if self._metadata:
            out = dict(self._metadata)
        elif self._pieces:
            if self._pieces.kind != sentence.BPE or self._pieces.character_map:
                raise FileError(
                    "this SentencePiece model (unigram, or with a normaliser of its own)",
                    rule="cannot be written into a GGUF as llama.cpp reads it",
                    next="export to a Hugging Face folder instead: --to hf",
                )
            out = {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.tokens": list(self._pieces.pieces),
                "tokenizer.ggml.scores": list(self._pieces.scores),
                "tokenizer.ggml.token_type": list(self._pieces.types),
                "tokenizer.ggml.add_space_prefix": self._pieces.dummy_prefix,
                "tokenizer.ggml.unknown_token_id": self._pieces.ids.get("unk", 0),
            }
        else:
            out = self._library_metadata()
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

    def _library_metadata(self) -> dict[str, Any]:
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
        for id, added in self._library.get_added_tokens_decoder().items():
            tokens[id] = added.content
            control = id in self.special_ids
            types[id] = CONTROL if control else USER_DEFINED
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
            if _BYTE_TOKEN.fullmatch(token):
                types[id] = BYTE
        unknown = model["vocab"].get(model.get("unk_token"), 0)
        types[unknown] = UNKNOWN
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            **out,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": self._strip,
            "tokenizer.ggml.unknown_token_id": unknown,
        }


class Stream:
    """Turns ids into text as they come; holds bytes back until they make a whole character.

    "🦙" is four bytes, in SmolLM2 three tokens: the first two pushes return "", the third "🦙". What
    all pushes and the flush return, joined, is `decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, specials: bool = False) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strip  # the space that encoding put before the text

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


# --- the `tokenizers` library


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


def _bos_first(token: str, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, id)],
    )


def _pattern(specials: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Finds the text of any special token, the longest first, with the blanks it swallows."""
    parts = []
    for place, (text, token) in enumerate(sorted(specials.items(), key=lambda one: -len(one[0]))):
        word = f"(?P<s{place}>{re.escape(text)})"
        if token.single_word:
            word = rf"(?<!\w){word}(?!\w)"
        parts.append((r"\s*" if token.lstrip else "") + word + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(parts) or r"(?!)")


def _delimits(token: str, template: str | None) -> bool:
    """Whether an ordinary added token opens or closes turns in the template."""
    return bool(template and token in template and _DELIMITER.fullmatch(token))


def _known(id: int | None, tokens: Sequence[str]) -> int | None:
    """The id, unless it is none of the vocabulary's (some files say 4294967295 for none)."""
    return id if id is not None and 0 <= id < len(tokens) else None


# --- Hugging Face folders


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(
            f"{file}", rule=f"is no JSON: {error}", next="get the file again; it may be damaged"
        ) from error
    if not isinstance(found, dict):
        raise FileError(f"{file}", rule="must hold a JSON object", next="get the file again")
    return found


def _template(path: Path, config: Mapping[str, Any], *names: str | None) -> str | None:
    """The chat template: chat_template.jinja, or in tokenizer_config.json ("default" of several).

    Where the model brings none: one of ours that fits one of its names.
    """
    file = path.parent / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template") or _beside(path, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found or templates.find(*names)


def _settings(
    path: Path, template: str | None
) -> tuple[dict[str, Any], str | None, str | None, str | None, list[int]]:
    """tokenizer_config.json, the texts of BOS and EOS, the template, the ids that end a reply."""
    config = {**_beside(path, "special_tokens_map.json"), **_beside(path, _CONFIG)}

    def text(name: str) -> str | None:
        value = config.get(name)
        return value["content"] if isinstance(value, dict) else value

    ends: list[int] = []
    for name in (_GENERATION, "config.json"):
        found = _beside(path, name).get("eos_token_id")
        if found is not None:
            ends = list(found) if isinstance(found, list) else [found]
            break
    names = templates.folder_name(path.parent), _beside(path, "config.json").get("_name_or_path")
    template = template or _template(path, config, *names)
    return config, text("bos_token"), text("eos_token"), template, ends


def _from_json(path: Path, template: str | None) -> Tokenizer:
    source = path.read_text(encoding="utf-8")
    try:
        library = Library.from_str(source)
    except Exception as error:  # the library raises bare Exception
        raise FileError(
            f"{path}",
            rule=f"is no tokenizer.json that the tokenizers library reads: {error}",
            next="get the file again, or update tokenizers",
        ) from error
    config, bos, eos, template, ends = _settings(path, template)
    beside = config.get("added_tokens_decoder", {})
    extra = [
        AddedToken(
            one["content"],
            lstrip=one.get("lstrip", False),
            rstrip=one.get("rstrip", False),
            normalized=one.get("normalized", False),
            special=one.get("special", False),
        )
        for id, one in sorted(beside.items(), key=lambda item: int(item[0]))
        if library.token_to_id(one["content"]) is None
    ]
    if extra:  # declared beside the tokenizer.json only, as transformers lets them be
        library.add_tokens(extra)
    declared = [(one["content"], one["id"]) for one in json.loads(source).get("added_tokens", [])]
    declared += [(one["content"], int(id)) for id, one in beside.items()]
    for text, id in declared:
        if library.token_to_id(text) != id:  # the library counts on, whatever the file says
            raise FileError(
                f"{path}: added token {text!r} with id {id}",
                rule=f"would be read as {library.token_to_id(text)}: added ids must go on from the "
                "vocabulary's without a gap",
                next="mend added_tokens, or take the tokenizer from the original model",
            )
    source = library.to_str() if extra else source
    special: dict[str, int] = {}
    specials: dict[str, AddedToken] = {}
    for id, token in sorted(library.get_added_tokens_decoder().items()):
        if token.special or token.content in (bos, eos) or _delimits(token.content, template):
            special[token.content], specials[token.content] = id, token
    bos_id = library.token_to_id(bos) if bos else None
    eos_id = library.token_to_id(eos) if eos else None
    if eos_id is None and ends:
        eos_id = ends[0]
    first = library.encode("", add_special_tokens=True).ids[:1]
    return Tokenizer(
        library=library,
        specials=specials,
        special_ids=special,
        bos_id=bos_id,
        eos_id=eos_id,
        ends=ends,
        add_bos=bos_id is not None and first == [bos_id],
        chat_template=template,
        config=config,
        source=source,
    )


def _from_model(path: Path, template: str | None) -> Tokenizer:
    try:
        pieces = PieceModel.parse(path.read_bytes())
    except (ValueError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(
            f"{path}",
            rule=f"is no SentencePiece model: {error}",
            next="get the file again; it may be damaged",
        ) from error
    config, bos, eos, template, ends = _settings(path, template)
    declared = {
        int(id): (one["content"], CONTROL if one.get("special") else USER_DEFINED)
        for id, one in config.get("added_tokens_decoder", {}).items()
    }
    for text, id in _beside(path, "added_tokens.json").items():
        declared.setdefault(id, (text, CONTROL))
    for id in range(len(pieces.pieces), max(declared, default=-1) + 1):
        text, kind = declared.get(id, (f"[PAD{id}]", UNUSED))
        pieces.pieces.append(text)
        pieces.scores.append(0.0)
        pieces.types.append(kind)
    for id, kind in enumerate(pieces.types):
        if kind in (NORMAL, USER_DEFINED) and _delimits(pieces.pieces[id], template):
            pieces.types[id] = CONTROL
    special = {
        pieces.pieces[id]: id for id, kind in enumerate(pieces.types) if kind in (CONTROL, UNKNOWN)
    }

    def id_of(text: str | None, name: str) -> int | None:
        if text is not None:
            return special.get(text)
        id = pieces.ids.get(name, -1)
        return id if 0 <= id < len(pieces.types) and pieces.types[id] == CONTROL else None

    bos_id, eos_id = id_of(bos, "bos"), id_of(eos, "eos")
    return Tokenizer(
        pieces=pieces,
        specials={text: AddedToken(text, normalized=False, special=True) for text in special},
        special_ids=special,
        bos_id=bos_id,
        eos_id=eos_id,
        ends=ends,
        add_bos=bool(config.get("add_bos_token", True)) and bos_id is not None,
        chat_template=template,
        config=config,
    )
