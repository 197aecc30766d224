"""What an id covers. Hashes carry their algorithm: «sha256:…».

    id = sha256 of {kind, step, config, parents, files: {relative path: sha256}}

so two artifacts with the same id have the same bytes, the same settings and the same ancestors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herdbook.files.atomic import sha256_file


def digest(value: Any) -> str:
    """Hash of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path → hash, of every file below `folder`, in sorted order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def artifact_id(
    kind: str, step: str, config: Mapping[str, Any], parents: list[str], files: Mapping[str, str]
) -> str:
    """The id of an artifact; its first 16 hexadecimal digits are enough in daily use."""
    return digest(
        {
            "kind": kind,
            "step": step,
            "config": dict(config),
            "parents": parents,
            "files": dict(files),
        }
    ).removeprefix("sha256:")
