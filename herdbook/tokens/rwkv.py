"""Which tokenizer belongs to an RWKV as it was published: a .pth file of bare tensors.

There are two, GPT-NeoX's and that of the World models; both come with ChatRWKV, not with the weights.
Source: https://github.com/BlinkDL/ChatRWKV
"""

from __future__ import annotations

from pathlib import Path

from herdbook.errors import FileError
from herdbook.files import pickles
from herdbook.tokens.longest import RWKV_FILE

NEOX, NEOX_END = "20B_tokenizer.json", "<|endoftext|>"
WORLD = ("rwkv_vocab*.txt",)
WORLD_WORDS = 65_536
#: what tells that a folder's model is another
OTHERS = ("config.json", "params.json", "model.gguf", "model.safetensors")


def weights(path: Path) -> Path | None:
    """The .pth file: the path itself, or the only one of a folder that holds no other model."""
    if path.is_file():
        return path if path.suffix == ".pth" else None
    if any((path / name).is_file() for name in OTHERS):
        return None
    found = list(path.glob("*.pth"))
    return found[0] if len(found) == 1 else None


def file(weights: Path) -> Path:
    """The tokenizer beside the weights; which of the two, their name (…-World-…) says or the number of
    words."""
    embed = pickles.read_table(weights).get("emb.weight")
    world = "world" in weights.name.lower() or (embed is not None and embed.shape[0] == WORLD_WORDS)
    for pattern in WORLD if world else (NEOX, "tokenizer.json"):
        for path in sorted(weights.parent.glob(pattern)):
            return path
    name = RWKV_FILE if world else NEOX
    raise FileError(
        f"{weights}",
        rule=f"needs the tokenizer {name}, which is not beside it",
        next=f"put {name} of ChatRWKV into {weights.parent}",
    )
