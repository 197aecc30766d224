"""What Hugging Face keeps beside a tokenizer's file.

tokenizer_config.json, special_tokens_map.json     names of BOS and EOS, added tokens, template
chat_template.jinja, chat_template.json            the template, in newer folders
generation_config.json, config.json                ids that end a reply
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from herdbook.errors import FileError
from herdbook.tokens import templates

#: how a turn's delimiter looks where a file calls it an ordinary added token
_DELIMITER = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(start|end)_of_turn>|<(human|bot|root|ans)>|\[/?INST\]|<eo[ham]>"
    r"|<reserved_\d+>|\[g?MASK\]|<?[se]op>?"
)
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
                ends = list(found) if isinstance(found, list) else [found]
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
    return found or templates.find(*names)


def delimits(token: str, template: str | None) -> bool:
    """Whether an ordinary added token opens or closes turns in the template."""
    return bool(template and token in template and _DELIMITER.fullmatch(token))
