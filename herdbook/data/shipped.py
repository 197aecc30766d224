"""The text that Herdbook ships: wordings in ``data/text/*.txt``, one a line under [section] heads."""

from __future__ import annotations

from pathlib import Path

from herdbook.files.atomic import sha256_once

FOLDER = Path(__file__).parent / "text"
LANGUAGES = ("en", "zh")


def fingerprint(name: str) -> dict[str, str]:
    """Hashes of the wordings `name`.* in every language: new wordings make another artifact."""
    return {language: sha256_once(FOLDER / f"{name}.{language}.txt") for language in LANGUAGES}


def sections(name: str) -> dict[str, list[str]]:
    """Section → its lines, in the file's order: ``sections("identity.en")["ask name"]``."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            found[line[1:-1]] = []
        elif line and not line.startswith("#"):
            list(found.values())[-1].append(line)
    return found


def pair(line: str) -> tuple[str, str]:
    """«question => answer»."""
    question, arrow, answer = line.partition(" => ")
    assert arrow, f"{line!r} is no pair"
    return question, answer
