"""What Hugging Face keeps beside a tokenizer's file.

tokenizer_config.json, special_tokens_map.json     names of BOS and EOS, added tokens, template
chat_template.jinja, chat_template.json            the template, in newer folders
generation_config.json, config.json                ids that end a reply
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from herdbook.errors import FileError
from herdbook.files.foreign import MEGABYTE, read_json
from herdbook.tokens import templates

#: how a turn's delimiter looks where a file calls it an ordinary added token
_DELIMITER = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(start|end)_of_turn>|<(human|bot|root|ans)>|\[/?INST\]|<eo[ham]>"
    r"|<reserved_\d+>|\[g?MASK\]|<?[se]op>?"
)
#: ids that a file may name; the largest vocabularies have 262,144
MOST_IDS = 1 << 20
#: of a tokenizer's own file in bytes; the largest tokenizer.json has 34 MB
FILE_LIMIT = 64 * MEGABYTE
CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
#: all that is read beside a tokenizer's file
FILES = (
    *(CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *(TEMPLATE, "chat_template.json", _GENERATION, "config.json"),
)


@dataclass(frozen=True)
class Settings:
    config: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json
    bos: str | None
    eos: str | None
    template: str | None
    ends: list[int]  # ids that end a reply
    declared: dict[int, AddedToken]  # added_tokens_decoder

    @classmethod
    def of(cls, path: Path, template: str | None = None) -> Settings:
        """What lies beside the file at `path`. template: to use instead of the one that it brings."""
        config = {**beside(path, "special_tokens_map.json"), **beside(path, CONFIG)}

        def text(name: str) -> str | None:
            value = config.get(name)
            return value["content"] if isinstance(value, dict) else value

        ends: list[int] = []
        for name in (_GENERATION, "config.json"):
            found = beside(path, name).get("eos_token_id")
            if found is not None:
                ends = [index(id) for id in (found if isinstance(found, list) else [found])]
                break
        declared = {
            int(id): AddedToken(
                one["content"],
                lstrip=one.get("lstrip", False),
                rstrip=one.get("rstrip", False),
                normalized=one.get("normalized", False),
                special=one.get("special", False),
            )
            for id, one in config.get("added_tokens_decoder", {}).items()
        }
        need_ids(path, declared)
        names = templates.folder_name(path.parent), beside(path, "config.json").get("_name_or_path")
        return cls(
            config,
            text("bos_token"),
            text("eos_token"),
            template or find_template(path, config, *names),
            ends,
            dict(sorted(declared.items())),
        )


def beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    return read_json(file) if file.is_file() else {}


def find_template(path: Path, config: Mapping[str, Any], *names: str | None) -> str | None:
    """The chat template: chat_template.jinja, or in tokenizer_config.json ("default" of several).

    Where the model brings none: one of ours that fits one of its names.
    """
    file = path.parent / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template") or beside(path, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    if found and not isinstance(found, str):
        raise TypeError(f"chat_template is {str(found)[:100]}")
    return found or templates.find(*names)


def delimits(token: str, template: str | None) -> bool:
    """Whether an ordinary added token opens or closes turns in the template."""
    return bool(template and token in template and _DELIMITER.fullmatch(token))


def delimiters(tokens: Sequence[str], template: str | None) -> list[int]:
    """The ids of those that do, of a whole vocabulary."""
    first = "<[se"  # what a delimiter begins with: most tokens are done with here
    return [id for id, one in enumerate(tokens) if one[:1] in first and delimits(one, template)]


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """A value of a kind that is not expected is the file's fault."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise FileError(
            f"{path}: {type(error).__name__}: {str(error)[:200]}",
            rule="so a value in it, or in a file beside it, is not what a tokenizer has there",
            next="get the tokenizer's files again from the original model",
        ) from error


def need_ids(path: Path, ids: Iterable[int]) -> None:
    """Before lists of that length are made."""
    for id in ids:
        if not 0 <= id < MOST_IDS:
            raise FileError(
                f"{path}: a token with the id {id}",
                rule=f"but ids, and their number, are below {MOST_IDS:,}",
                next="get the tokenizer's files again from the original model",
            )
