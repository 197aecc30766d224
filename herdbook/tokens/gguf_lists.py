"""The tokenizer in a GGUF's metadata: its lists become one of either library's.

tokenizer.ggml.model = gpt2     tokens, merges, and `pre`, which names how text is cut
tokenizer.ggml.model = llama    SentencePiece's pieces, scores and types
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from herdbook.errors import FileError
from herdbook.tokens import bytebpe
from herdbook.tokens.codec import Parts, plain_specials
from herdbook.tokens.library import LibraryCodec, bos_first
from herdbook.tokens.pieces import PieceCodec
from herdbook.tokens.sentence import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, PieceModel
from herdbook.tokens.settings import delimiters, find_template, understood

FLOAT_MOST = 3.4e38  # of a score, in SentencePiece's own file


def gguf_template(metadata: Mapping[str, Any], path: Path) -> str | None:
    """A GGUF's own chat template, or one of ours that fits its names."""
    own = {"chat_template": metadata.get("tokenizer.chat_template")}
    return find_template(path, own, path.stem, metadata.get("general.name"))


def from_gguf(metadata: Mapping[str, Any], path: Path, template: str | None = None) -> Parts:
    """From the metadata of the GGUF at `path`. template: to use instead of the file's own."""
    with understood(path):
        return _read(metadata, path, template)


def _read(metadata: Mapping[str, Any], path: Path, template: str | None) -> Parts:
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in own.items()}.get
    tokens, model = get("tokens"), get("model")
    if not tokens:
        raise FileError(
            f"{path}",
            rule="holds no tokenizer (no tokenizer.ggml.tokens)",
            next="use it by token ids, or load a folder that has a tokenizer.json",
        )
    template = template or gguf_template(metadata, path)
    if set(map(type, tokens)) != {str}:
        raise TypeError("a token is no text")
    if any(abs(one) > FLOAT_MOST for one in get("scores") or () if math.isfinite(one)):
        raise ValueError("a score is beyond float32")
    types = list(map(int, get("token_type") or [NORMAL] * len(tokens)))
    scores = list(map(float, get("scores") or [0.0] * len(tokens)))
    for what, values in (("types", types), ("scores", scores)):
        if len(values) != len(tokens):
            raise FileError(
                f"{path}: {len(values):,} token {what} for {len(tokens):,} tokens",
                rule="must be as many",
                next="get the file again; it may be damaged",
            )
    for id in delimiters(tokens, template):
        if types[id] in (NORMAL, USER_DEFINED):
            types[id] = CONTROL
    marked = [id for id, kind in enumerate(types) if kind != NORMAL]
    special = {tokens[id]: id for id in marked if types[id] in (CONTROL, UNKNOWN)}
    specials = plain_specials(list(special))
    bos, eos = _known(get("bos_token_id"), tokens), _known(get("eos_token_id"), tokens)
    named = [_known(get(f"{name}_token_id"), tokens) for name in ("eot", "eom")]
    codec: LibraryCodec | PieceCodec
    if model == "gpt2":
        cut = bytebpe.known_cut(get("pre", "default"))
        added = [
            AddedToken(tokens[id], normalized=False, special=types[id] != USER_DEFINED)
            for id in marked
            if types[id] in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
        library = bytebpe.build(tokens, get("merges") or [], added, cut)
        add_bos = bool(get("add_bos_token", cut.add_bos)) and bos is not None
        if add_bos and bos is not None:
            library.post_processor = bos_first(tokens[bos], bos)
        codec = LibraryCodec(library, specials, size=len(tokens))
    elif model == "llama":
        unknown = _known(get("unknown_token_id"), tokens) or 0
        if UNKNOWN not in types:  # SentencePiece insists on one
            types[unknown] = UNKNOWN
        add_bos = bool(get("add_bos_token", True)) and bos is not None
        codec = PieceCodec(
            PieceModel(
                list(tokens),
                scores,
                types,
                dummy_prefix=bool(get("add_space_prefix", True)),
                squeeze=bool(get("remove_extra_whitespaces", False)),
                character_map=bytes(list(get("precompiled_charsmap") or b"")),
                ids={"unk": unknown, "bos": -1 if bos is None else bos},
            )
        )
    else:
        raise FileError(
            f"{path}: tokenizer.ggml.model = {model!r}",
            rule="is not a kind of tokenizer that Herdbook knows (gpt2, llama)",
            next="take tokenizer.json from the model's own folder",
        )
    return Parts(
        codec,
        specials,
        special,
        bos_id=bos,
        eos_id=eos,
        ends=[id for id in named if id is not None],
        add_bos=add_bos,
        chat_template=template,
        metadata=own,
    )


def _known(id: int | None, tokens: Sequence[str]) -> int | None:
    """The id, unless it is none of the vocabulary's (some files say 4294967295 for none)."""
    return index(id) if id is not None and 0 <= id < len(tokens) else None
