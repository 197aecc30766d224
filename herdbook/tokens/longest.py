r"""Tokenizers that take the longest token that fits, then go on behind it. Nothing is merged.

**RWKV World** matches bytes; each of the 256 is a token, so any text is covered:

    9 '\x08' 1          id, the token as a Python literal (text or b"…"), its length in bytes
    65529 '        …' 128     id 0 is not in the file: it ends a document

**CPM-Bee** matches characters; its vocab.txt has a token a line, the id is the line's number. "</n>"
stands for a newline, "</_>" for a space, other names in <…> are special. A run of characters that no
token covers becomes one <unk>; `encode_spans` says which text that was.

Sources: https://github.com/BlinkDL/ChatRWKV (tokenizer/rwkv_tokenizer.py), https://github.com/OpenBMB/
CPM-Bee (src/cpm_live/tokenizers/bee.py).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, AnyStr, Generic

from herdbook.errors import FileError
from herdbook.files.atomic import write_text
from herdbook.files.foreign import read_bytes
from herdbook.tokens.codec import Parts, Span, bytes_to_characters, plain_specials
from herdbook.tokens.settings import FILE_LIMIT, need_ids

RWKV_FILE, CPM_BEE_FILE = "rwkv_vocab_v20230424.txt", "vocab.txt"
END = "<|endoftext|>"
NEWLINE, BLANK, UNKNOWN = "</n>", "</_>", "<unk>"


class Longest(Generic[AnyStr]):
    """Cuts bytes or characters into the longest known pieces."""

    def __init__(self, ids: dict[AnyStr, int]) -> None:
        self.ids: dict[AnyStr, int] = ids
        # By the first two units, the lengths of the pieces that begin so, the longest first: a
        # handful of look-ups a piece, and no memory but this table.
        lengths: dict[AnyStr, set[int]] = {}
        for piece in ids:
            lengths.setdefault(piece[:2], set()).add(len(piece))
        self._lengths: dict[AnyStr, list[int]] = {
            head: sorted(found, reverse=True) for head, found in lengths.items()
        }

    def cut(self, text: AnyStr) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, id) of each piece; id None where nothing fits, one unit long."""
        at, size, ids, lengths = 0, len(text), self.ids, self._lengths
        while at < size:
            for length in lengths.get(text[at : at + 2], ()):
                end = at + length
                if end <= size and (id := ids.get(text[at:end])) is not None:
                    break
            else:
                end = at + 1
                id = ids.get(text[at:end])
            yield at, end, id
            at = end


class _LongestCodec:
    """What both have in common. tokens: id → what it stands for, special tokens left out."""

    strip = False

    def __init__(self, tokens: dict[int, bytes], specials: dict[str, int]) -> None:
        self.tokens, self.specials = tokens, specials
        self.size = max([*tokens, *specials.values()]) + 1
        self._names = {id: name.encode() for name, id in specials.items()}

    def encode(self, text: str) -> list[int]:
        return self.encode_spans(text, first=True)[0]

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        raise NotImplementedError

    def parse(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def spell(self, id: int) -> bytes:
        return self.tokens.get(id) or self._names.get(id, b"")

    def fallback(self, id: int) -> bool:
        return False

    def _closure(self, ids: set[int], always: set[bytes]) -> set[int]:
        """The longest of fewer tokens is the same wherever it was one of them before."""
        kept = {id for id, token in self.tokens.items() if token in always}
        return ids | kept | set(self.specials.values())

    def _only(self, keep: Sequence[int]) -> tuple[dict[int, bytes], dict[str, int]]:
        new = {id: place for place, id in enumerate(keep)}
        tokens = {new[id]: token for id, token in self.tokens.items() if id in new}
        return tokens, {name: new[id] for name, id in self.specials.items() if id in new}

    def gguf(self, special_ids: frozenset[int]) -> dict[str, Any]:
        raise FileError(
            "a tokenizer that takes the longest token first",
            rule="cannot be written into a GGUF (byte-level BPE and LLaMA's pieces can)",
            next="export to a Hugging Face folder instead: --to hf",
        )


class WorldCodec(_LongestCodec):
    """RWKV's World vocabulary: bytes."""

    def __init__(self, tokens: dict[int, bytes], specials: dict[str, int]) -> None:
        super().__init__(tokens, specials)
        self._longest = Longest({token: id for id, token in tokens.items()})

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        at = bytes_to_characters(text)
        ids, spans = [], []
        for start, end, id in self._longest.cut(text.encode()):
            assert id is not None  # every byte is a token
            ids.append(id)
            spans.append((at[start], at[end]))
        return ids, spans

    def encode(self, text: str) -> list[int]:
        return self.within(text.encode())

    def within(self, data: bytes) -> list[int]:
        return [id for _, _, id in self._longest.cut(data) if id is not None]

    def closure(self, ids: set[int]) -> set[int]:
        return self._closure(ids, {bytes([byte]) for byte in range(256)})

    def only(self, keep: Sequence[int]) -> WorldCodec:
        return WorldCodec(*self._only(keep))

    def save(self, folder: Path, bos: int | None) -> None:
        lines = []
        for id, token in sorted(self.tokens.items()):
            try:
                shown = repr(token.decode())
            except UnicodeDecodeError:
                shown = repr(token)
            lines.append(f"{id} {shown} {len(token)}\n")
        write_text(folder / RWKV_FILE, "".join(lines))


class WordCodec(_LongestCodec):
    """CPM-Bee's vocabulary: characters."""

    def __init__(self, tokens: dict[int, bytes], specials: dict[str, int]) -> None:
        super().__init__(tokens, specials)
        self._longest = Longest({token.decode(): id for id, token in tokens.items()})
        self._unknown = specials[UNKNOWN]

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for start, end, id in self._longest.cut(text):
            if id is None and ids and ids[-1] == self._unknown:
                spans[-1] = (spans[-1][0], end)
            else:
                ids.append(self._unknown if id is None else id)
                spans.append((start, end))
        return ids, spans

    def within(self, data: bytes) -> list[int]:
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:  # a part of a character: no word has it
            return []

    def closure(self, ids: set[int]) -> set[int]:
        return self._closure(ids, {b" ", b"\n"})

    def only(self, keep: Sequence[int]) -> WordCodec:
        return WordCodec(*self._only(keep))

    def save(self, folder: Path, bos: int | None) -> None:
        named = {b"\n": NEWLINE, b" ": BLANK}
        lines = {id: named.get(token, token.decode()) for id, token in self.tokens.items()}
        lines |= {id: name for name, id in self.specials.items()}
        write_text(folder / CPM_BEE_FILE, "".join(lines[id] + "\n" for id in sorted(lines)))


# --- reading


def read_world(path: Path) -> Parts:
    """RWKV's vocabulary file."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(path, FILE_LIMIT).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            id, rest = line.decode().strip().split(" ", 1)
            literal, size = rest.rsplit(" ", 1)
            token = ast.literal_eval(literal.strip())
            token = token.encode() if isinstance(token, str) else token
            if not isinstance(token, bytes) or len(token) != int(size):
                raise ValueError("the length is wrong")
            if int(id) == 0 or int(id) in tokens:
                raise ValueError("the id is taken")
            tokens[int(id)] = token
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise FileError(
                f"{path}, line {number}: {line[:60]!r}",
                rule=f"is no line of an RWKV vocabulary (id, Python literal, length): {error}",
                next="fetch the file again",
            ) from error
    need_ids(path, tokens)
    known = set(tokens.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    if missing:
        raise FileError(
            f"{path}: byte {missing[0]} and {len(missing) - 1} more have no token",
            rule="but then not every text can be encoded",
            next="fetch the file again; it may be cut off",
        )
    special = {END: 0}
    return Parts(WorldCodec(tokens, special), plain_specials([END]), special, eos_id=0)


def is_words(path: Path) -> bool:
    """Whether a vocab.txt is CPM-Bee's kind (BERT's has the same name)."""
    with path.open("rb") as file:
        lines = file.read(4096).split(b"\n")
    return {NEWLINE.encode(), BLANK.encode(), UNKNOWN.encode()} <= set(lines)


def read_words(path: Path) -> Parts:
    """CPM-Bee's vocab.txt. Empty lines count for nothing."""
    if not is_words(path):
        raise FileError(
            f"{path}",
            rule=f"is no vocabulary of CPM-Bee's kind ({NEWLINE}, {BLANK} and {UNKNOWN} at its top)",
            next="WordPiece vocabularies (BERT) are not for generative models; "
            "look for a tokenizer.json or tokenizer.model",
        )
    try:
        names = [name for name in read_bytes(path, FILE_LIMIT).decode().split("\n") if name]
    except UnicodeDecodeError as error:
        raise FileError(f"{path}", rule=f"is not UTF-8: {error}", next="fetch it again") from error
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise FileError(f"{path}: {twice!r}", rule="stands there twice", next="fetch it again")
    characters = {NEWLINE: "\n", BLANK: " "}
    tokens: dict[int, bytes] = {}
    special: dict[str, int] = {}
    for id, name in enumerate(names):
        if name.startswith("<") and name.endswith(">") and name not in characters:
            special[name] = id
        else:
            tokens[id] = characters.get(name, name).encode()
    return Parts(
        WordCodec(tokens, special),
        plain_specials(list(special)),
        special,
        bos_id=special.get("<s>"),
        eos_id=special.get("</s>"),
    )
