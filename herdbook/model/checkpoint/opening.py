"""Which layout lies at a path."""

from __future__ import annotations

from pathlib import Path

from herdbook.errors import FileError
from herdbook.model.checkpoint.base import Checkpoint
from herdbook.model.checkpoint.ggufs import open_gguf
from herdbook.model.checkpoint.huggingface import open_folder
from herdbook.model.checkpoint.meta import is_meta, open_meta
from herdbook.model.checkpoint.sat import open_sat, sat_folder
from herdbook.model.gguf_config import gguf_file


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Understand what lies at `path`: a Hugging Face folder, one of Meta's, a .gguf or its folder,
    an RWKV-4's .pth or its folder, one of SAT's (GLM-130B)."""
    path = Path(path)
    if path.is_dir():
        if (shards := sat_folder(path)) is not None:
            return open_sat(shards)
        if is_meta(path) and not (path / "config.json").is_file():
            return open_meta(path)
    elif not path.exists():
        raise FileError(f"{path}", rule="is not there", next="check the path, or see `herd list`")
    file = gguf_file(path)
    return open_folder(path) if file is None else open_gguf(file)
