"""Hostile tokenizers: every kind of file, and what lies beside it, damaged or with odd values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.tokens.sentence import PieceModel
from herdbook.tokens.tokenizer import Tokenizer
from tests.fuzz.fuzz_layouts import changed
from tests.fuzz.hostile import JSON, NUMBER, again_and_again, common, damaged, holds
from tests.tokens import conftest, test_ice

TEXT = "Hello 你好  \n\t<|im_end|> 12 \U0001f600"


def use(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.encode(TEXT, specials=True, bos=True)
    for id in (0, tokenizer.size - 1, tokenizer.size):
        tokenizer.token_bytes(id)


def write(folder: Path, kind: str, tiny_folder: Path) -> Path:
    """A small tokenizer of this kind; its own file."""
    folder.mkdir()
    pieces = conftest.piece_metadata()
    model = PieceModel(
        pieces["tokenizer.ggml.tokens"],
        pieces["tokenizer.ggml.scores"],
        pieces["tokenizer.ggml.token_type"],
    )
    if kind == "tokenizer.json":
        for path in tiny_folder.glob("tokenizer*"):
            shutil.copy(path, folder)
    elif kind == "tokenizer.model":
        (folder / kind).write_bytes(model.serialise())
    elif kind == "ice_text.model":
        (folder / kind).write_bytes(test_ice.later().serialise())
    elif kind == "rwkv_vocab_v20230424.txt":
        lines = [f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)]
        (folder / kind).write_text("".join([*lines, "257 ' the' 4\n"]))
    elif kind == "vocab.txt":
        (folder / kind).write_text("<unk>\n</n>\n</_>\n<s>\n</s>\nH\n你好\n")
    else:
        spelled = json.loads((tiny_folder / "tokenizer.json").read_text())["model"]
        (folder / kind).write_text(json.dumps(spelled["vocab"]))
        merges = [" ".join(one) for one in spelled["merges"]]
        (folder / "merges.txt").write_text("\n".join(merges))
    return folder / kind


KINDS = (
    *("tokenizer.json", "tokenizer.model", "ice_text.model", "vocab.json", "vocab.txt"),
    "rwkv_vocab_v20230424.txt",
)
#: what the files beside a tokenizer may say
TOKEN = st.fixed_dictionaries(
    {},
    optional={
        "content": st.text(max_size=3) | JSON,
        "special": st.booleans() | JSON,
        "normalized": JSON,
    },
)
IDS = st.dictionaries(NUMBER.map(str) | st.text(max_size=3), TOKEN | JSON, max_size=3)
NAMED = st.text(max_size=4) | st.just("</s>") | TOKEN | JSON
SAID = st.fixed_dictionaries(
    {},
    optional={
        "added_tokens_decoder": IDS | JSON,
        "additional_special_tokens": st.lists(NAMED, max_size=3) | JSON,
        "bos_token": NAMED,
        "eos_token": NAMED,
        "unk_token": NAMED,
        "chat_template": st.text(max_size=9) | JSON,
        "tokenizer_class": st.sampled_from(["ChatGLMTokenizer", "Qwen2Tokenizer"]) | JSON,
        "extra_ids": NUMBER,
        "num_image_tokens": NUMBER,
        "add_bos_token": JSON,
    },
)


def test_files_of_tokenizers(tiny_folder: Path, tmp_path: Path) -> None:
    files = {kind: write(tmp_path / kind, kind, tiny_folder) for kind in KINDS}
    whole = {kind: path.read_bytes() for kind, path in files.items()}

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(KINDS))
        path, raw = files[kind], whole[kind]
        if kind.endswith(".json") and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(json.loads(raw), data)))
        else:
            path.write_bytes(damaged(raw, data))
        holds(lambda: use(path.parent))

    again_and_again(target)


def test_what_lies_beside_a_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    files = {kind: write(tmp_path / kind, kind, tiny_folder) for kind in KINDS}

    @common
    @given(
        st.sampled_from(KINDS),
        SAID | JSON,
        st.dictionaries(st.text(max_size=3), NUMBER | JSON, max_size=3) | JSON,
        st.fixed_dictionaries({"eos_token_id": st.lists(JSON) | JSON, "_name_or_path": JSON}),
    )
    def target(kind: str, said: Any, added: Any, config: Any) -> None:
        folder = files[kind].parent
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        (folder / "added_tokens.json").write_text(json.dumps(added))
        (folder / "config.json").write_text(json.dumps(config))
        holds(lambda: use(folder))

    again_and_again(target)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lists_of_a_gguf(kind: str) -> None:
    plain = conftest.byte_metadata() if kind == "gpt2" else conftest.piece_metadata()
    plain |= {"tokenizer.ggml.precompiled_charsmap": [], "tokenizer.chat_template": ""}
    keys = st.sampled_from(sorted(plain))

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        metadata: dict[str, Any] = dict(plain)
        for _ in range(data.draw(st.integers(1, 3))):
            key = data.draw(keys)
            value = metadata[key]
            if isinstance(value, list) and value and data.draw(st.integers(0, 5)):
                value = list(value)
                value[data.draw(st.integers(0, len(value) - 1))] = data.draw(JSON)
                metadata[key] = value
            else:
                metadata[key] = data.draw(JSON)

        def load() -> None:
            tokenizer = Tokenizer.from_gguf(metadata, Path("m.gguf"))
            tokenizer.decode(tokenizer.encode(TEXT))

        holds(load)

    again_and_again(target)
