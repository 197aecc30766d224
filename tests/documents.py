"""The examples in the documents."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(document: str) -> list[str]:
    """Each command of the sh blocks, in one line."""
    whole = [block.replace("\\\n", " ") for block in blocks(document, "sh")]
    lines = [line.strip() for block in whole for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
