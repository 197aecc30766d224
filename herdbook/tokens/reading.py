"""Where a tokenizer lies, and reading it: every kind of file becomes `Parts`.

    tokenizer.json                          the `tokenizers` library
    tokenizer.model, spiece.model, *.model  SentencePiece; or, by its content, tiktoken (LLaMA 3)
    ice_text.model                          SentencePiece with ChatGLM-6B's rules of white space
    *.gguf, model.gguf                      either library, from the file's lists
    *.tiktoken                              ranks (Qwen 1)
    vocab.json with merges.txt              byte-level BPE (GPT-2, MOSS)
    rwkv_vocab_v20230424.txt                RWKV World
    20B_tokenizer.json                      RWKV before World: GPT-NeoX's
    vocab.txt                               CPM-Bee

What lies beside them is read by settings.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.files.foreign import read_bytes
from herdbook.tokens import ice, longest, ranks, rwkv, templates
from herdbook.tokens.codec import Parts, plain_specials
from herdbook.tokens.gguf_lists import from_gguf, gguf_template
from herdbook.tokens.library import LibraryCodec, bos_first
from herdbook.tokens.pieces import PieceCodec
from herdbook.tokens.sentence import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, PieceModel
from herdbook.tokens.settings import (
    FILE_LIMIT,
    Settings,
    beside,
    delimiters,
    delimits,
    need_ids,
    understood,
)

#: where a folder keeps its tokenizer, in the order in which they are looked for
FILES = ("tokenizer.json", "tokenizer.model", "model.gguf")
#: the same for tokenizers of a kind of their own
OTHERS = (
    *("spiece.model", ice.FILE, "*.tiktoken", "vocab.json", *rwkv.WORLD, rwkv.NEOX),
    longest.CPM_BEE_FILE,
)
#: what a ChatGLM 2 or 3 has behind its SentencePiece model, in this order
_CHATGLM = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)


def find(folder: Path) -> Path | None:
    """The file that a folder's tokenizer is read from."""
    for pattern in (*FILES, *OTHERS):
        for path in sorted(folder.glob(pattern)):
            if path.name == longest.CPM_BEE_FILE and not longest.is_words(path):
                continue
            if path.name == "tokenizer.json" and (original := _better(folder)):
                return original
            return path
    return None


def _better(folder: Path) -> Path | None:
    """A tokenizer.model that says more than the tokenizer.json beside it can."""
    path = folder / "tokenizer.model"
    if not path.is_file() or ranks.is_ranks(path):
        return None
    try:
        exact = PieceModel.parse(read_bytes(path, FILE_LIMIT)).translates
    except (ValueError, TypeError):
        return None  # of another kind: the tokenizer.json stands alone
    return None if exact else path


def files(folder: Path) -> list[Path]:
    """The files of a tokenizer of a kind of its own, for copying a model's folder."""
    return [path for pattern in OTHERS for path in sorted(folder.glob(pattern))]


def exists(path: Path) -> bool:
    """Whether `read` would find a tokenizer there (not whether it is a good one)."""
    if rwkv.weights(path) is not None:
        return True  # with its weights alone: `read` says which file is missing
    if path.is_dir():
        return find(path) is not None
    if path.suffix == ".gguf" and path.is_file():
        return "tokenizer.ggml.tokens" in gguf.read(path).metadata
    return path.is_file() and path.suffix in (".json", ".model", ".tiktoken", ".txt")


def template(path: Path) -> str | None:
    """The chat template that `read` would find, its own or one of ours that fits its name."""
    file = find(path) if path.is_dir() else path
    if file is None:
        return None
    with understood(file):
        if file.suffix == ".gguf":
            return gguf_template(gguf.read(file).metadata, file)
        return Settings.of(file).template


def read(path: Path, template: str | None = None) -> Parts:
    """The tokenizer of a Hugging Face folder or of one file; of an RWKV's .pth the one beside it.

    template: the source of a chat template to use instead of the one that it brings.
    """
    with understood(path):
        return _read(path, template)


def _read(path: Path, template: str | None) -> Parts:
    if (weights := rwkv.weights(path)) is not None:
        parts = read(rwkv.file(weights), template)
        return dataclasses.replace(
            parts, chat_template=parts.chat_template or templates.find(weights.stem)
        )
    if path.is_dir():
        found = find(path)
        if found is None:
            raise FileError(
                f"{path}",
                rule=f"holds no tokenizer ({', '.join(FILES[:-1])} or {FILES[-1]})",
                next="copy the tokenizer's files from the original model into that folder "
                f"({', '.join(OTHERS)} are read too)",
            )
        path = found
    if not path.is_file():
        raise FileError(
            f"{path}",
            rule="is not there",
            next="give a folder, .gguf, .model, .tiktoken or tokenizer.json",
        )
    if path.suffix == ".gguf":
        return from_gguf(gguf.read(path).metadata, path, template)
    if path.suffix == ".txt":
        parts = (longest.read_words if longest.is_words(path) else longest.read_world)(path)
        return dataclasses.replace(parts, chat_template=Settings.of(path, template).template)
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and ranks.is_ranks(path)):
        return _from_ranks(path, template)
    if path.suffix == ".model":
        return _from_model(path, template)
    if path.name == "vocab.json":
        return _from_merges(path, template)
    parts = _from_json(path, template)
    if path.name == rwkv.NEOX and parts.eos_id is None:
        return dataclasses.replace(parts, eos_id=parts.special_ids.get(rwkv.NEOX_END))
    return parts


# --- the kinds of file


def _pieces_beside(path: Path) -> bytes:
    """The SentencePiece model that a tokenizer.json was made from: it is kept, for extending."""
    original = path.with_name("tokenizer.model")
    if path.name != "tokenizer.json" or not original.is_file() or ranks.is_ranks(original):
        return b""
    data = read_bytes(original, FILE_LIMIT)
    try:
        PieceModel.parse(data)
    except (ValueError, TypeError):
        return b""  # of another kind: the tokenizer.json stands alone
    return data


def _from_json(path: Path, template: str | None) -> Parts:
    source = read_bytes(path, FILE_LIMIT).decode()
    try:
        library = Library.from_str(source)
    except Exception as error:  # the library raises bare Exception
        raise FileError(
            f"{path}",
            rule=f"is no tokenizer.json that the tokenizers library reads: {error}",
            next="get the file again, or update tokenizers",
        ) from error
    settings = Settings.of(path, template)
    extra = [
        token for token in settings.declared.values() if library.token_to_id(token.content) is None
    ]
    if extra:  # declared beside the tokenizer.json only, as transformers lets them be
        library.add_tokens(extra)
    declared = [(one["content"], one["id"]) for one in json.loads(source).get("added_tokens", [])]
    return _from_library(path, library, settings, declared, "" if extra else source)


def _from_merges(path: Path, template: str | None) -> Parts:
    settings = Settings.of(path, template)
    added = dict(settings.declared)
    named = settings.config.get("additional_special_tokens") or []
    special = {one["content"] if isinstance(one, dict) else one for one in named}
    listed = beside(path, "added_tokens.json")
    need_ids(path, listed.values())
    for text, id in listed.items():
        token = AddedToken(text, normalized=False, special=text in special)
        added.setdefault(id, token)
    library = ranks.read_merges(path, str(settings.config.get("tokenizer_class", "")), added)
    names = {settings.bos, settings.eos, settings.config.get("unk_token"), *special}
    library.add_special_tokens(
        [name for name in names if isinstance(name, str) and library.token_to_id(name) is not None]
    )
    return _from_library(path, library, settings, [(t.content, id) for id, t in added.items()])


def _from_ranks(path: Path, template: str | None) -> Parts:
    tokens, settings = ranks.read_ranks(path), Settings.of(path, template)
    known = ranks.known(path, len(tokens))
    names = {len(tokens) + place: text for place, text in enumerate(known.specials)}
    names |= {id: token.content for id, token in settings.declared.items()}
    added = [AddedToken(name, normalized=False, special=True) for _, name in sorted(names.items())]
    library = ranks.build(tokens, known.cut, added)
    bos, eos = settings.bos or known.bos, settings.eos or known.eos
    if bos is not None and (id := library.token_to_id(bos)) is not None:
        library.post_processor = bos_first(bos, id)
    settings = dataclasses.replace(settings, bos=bos, eos=eos)
    return _from_library(path, library, settings, [(name, id) for id, name in names.items()])


def _from_library(
    path: Path,
    library: Library,
    settings: Settings,
    declared: Sequence[tuple[str, int]],
    source: str = "",
) -> Parts:
    """declared: added tokens with the ids that the file gives them. source: tokenizer.json."""
    beside = [(token.content, id) for id, token in settings.declared.items()]
    for text, id in [*declared, *beside]:
        if library.token_to_id(text) != id:  # the library counts on, whatever the file says
            raise FileError(
                f"{path}: added token {text!r} with id {id}",
                rule=f"would be read as {library.token_to_id(text)}: added ids must go on from the "
                "vocabulary's without a gap",
                next="mend added_tokens, or take the tokenizer from the original model",
            )
    bos, eos, template = settings.bos, settings.eos, settings.template
    special: dict[str, int] = {}
    specials: dict[str, AddedToken] = {}
    for id, token in sorted(library.get_added_tokens_decoder().items()):
        if token.special or token.content in (bos, eos) or delimits(token.content, template):
            special[token.content], specials[token.content] = id, token
    bos_id = library.token_to_id(bos) if bos else None
    eos_id = library.token_to_id(eos) if eos else None
    if eos_id is None and settings.ends:
        eos_id = settings.ends[0]
    need_ids(path, library.get_vocab().values())
    first = library.encode("", add_special_tokens=True).ids[:1]
    return Parts(
        LibraryCodec(library, specials, source=source, pieces=_pieces_beside(path)),
        specials,
        special,
        bos_id=bos_id,
        eos_id=eos_id,
        ends=settings.ends,
        add_bos=bos_id is not None and first == [bos_id],
        chat_template=template,
        config=settings.config,
    )


def _from_model(path: Path, template: str | None) -> Parts:
    try:
        pieces = PieceModel.parse(read_bytes(path, FILE_LIMIT))
    except (ValueError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(
            f"{path}",
            rule=f"is no SentencePiece model: {error}",
            next="get the file again; it may be damaged",
        ) from error
    settings = Settings.of(path, template)
    if ice.is_ice(path, pieces):
        return ice.parts(pieces, settings)
    config, size = settings.config, len(pieces.pieces)
    declared = {
        id: (token.content, CONTROL if token.special else USER_DEFINED)
        for id, token in settings.declared.items()
    }
    added = beside(path, "added_tokens.json")
    need_ids(path, [*added.values(), int(config.get("extra_ids") or 0)])
    for text, id in added.items():
        declared.setdefault(id, (text, CONTROL))
    if glm := config.get("tokenizer_class") == "ChatGLMTokenizer":
        for place, text in enumerate(_CHATGLM):
            declared.setdefault(size + place, (text, CONTROL))
    for place in range(count := int(config.get("extra_ids") or 0)):  # T5 counts them down
        declared.setdefault(size + place, (f"<extra_id_{count - 1 - place}>", CONTROL))
    for id in range(size, max(declared, default=-1) + 1):
        text, kind = declared.get(id, (f"[PAD{id}]", UNUSED))
        pieces.pieces.append(text)
        pieces.scores.append(0.0)
        pieces.types.append(kind)
    for id in delimiters(pieces.pieces, settings.template):
        if pieces.types[id] in (NORMAL, USER_DEFINED):
            pieces.types[id] = CONTROL
    special = {
        pieces.pieces[id]: id for id, kind in enumerate(pieces.types) if kind in (CONTROL, UNKNOWN)
    }

    def id_of(text: str | None, name: str) -> int | None:
        if text is not None:
            return special.get(text)
        id = pieces.ids.get(name, -1)
        return id if 0 <= id < len(pieces.types) and pieces.types[id] == CONTROL else None

    bos_id, eos_id = id_of(settings.bos, "bos"), id_of(settings.eos, "eos")
    return Parts(
        PieceCodec(pieces),
        plain_specials(list(special)),
        special,
        bos_id=bos_id,
        eos_id=eos_id,
        ends=settings.ends,
        add_bos=bool(config.get("add_bos_token", not glm)) and bos_id is not None,
        chat_template=settings.template,
        config=config,
    )
