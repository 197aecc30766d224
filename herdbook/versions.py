"""Versions of what decides results, as stored with every artifact."""

from __future__ import annotations

VERSION = "0.1.0"
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "gguf")


def all() -> dict[str, str]:
    """Herdbook, Python and the libraries, without importing them."""
    import platform
    from importlib import metadata

    found = {"herdbook": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
