"""Writes docs/families.md: a row a family, from the descriptions and from the tests that hold them.

python docs/families.py            writes it; a test keeps it up to date
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

from herdbook.model.config import DecoderConfig
from herdbook.model.families import by_source, families
from herdbook.model.family import Family

ROOT = Path(__file__).parents[1]
HEAD = """# Families

Written by `python docs/families.py` from the descriptions in `herdbook/model/families/` and the tests.

Every family is checked with each of its fixtures (`tests/model/families/*.json`): names and packing go both ways
without loss, the configuration is written and read again, and the engine (chunked prefill, batches, cached decoding)
gives the tokens of a plain pass. Those of the one decoder are also tuned with LoRA, merged, carried over PEFT's layout
and, where GGUF can hold them, quantised to 8 and 4 bits (`tests/training/test_tuning_families.py`). Every family is
quantised to int4 and int8 in a Hugging Face folder as compressed-tensors, read back code by code and served by the
engine (`tests/model/test_compressed.py`; GPT-2, whose matrices lie the other way round, as GGUF alone); the column
int4, int8 names the layouts, Q4_1 and Q8_0 those of GGUF. The last column names what compares a family with other
implementations: transformers, llama.cpp, the golden files of the original code, or a computation written straight
from the paper.

| family | model_type | GGUF | int4, int8 | computed by | fixtures | compared with others in |
|---|---|---|---|---|---|---|
"""


def about(name: str) -> str:
    """The first sentence of the description's own words."""
    module = sys.modules[f"herdbook.model.families.{name}"]
    text = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[^.]):|(?<=\w)\.(?= |$)", text, maxsplit=1)[0].rstrip(".")


def oracles(name: str, family: Family) -> list[str]:
    """The tests of tests/oracles that speak of it."""
    stem = re.sub(
        r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$", "", family.architecture
    )
    words = {re.escape(name), re.escape(family.model_type)}
    pattern = re.compile(
        rf"\"({'|'.join(sorted(words))})\b|\b{stem}(ForCausalLM|LMHeadModel|Config)\b|\"{stem}\""
    )
    folder = ROOT / "tests" / "oracles"
    files = sorted(folder.glob("test_[!t]*.py"))
    files += sorted(folder.glob("test_t[!o]*.py"))  # not the tokenizers
    texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
    found = {stem for stem, text in texts.items() if pattern.search(text)}
    if f'"{family.architecture}"' in (folder / "shapes.py").read_text(encoding="utf-8"):
        table = re.compile(
            r'"shape", .*\b(SHAPES|IN_GGUF)\b' if family.gguf else r'"shape", SHAPES'
        )
        shared = {stem: text for stem, text in texts.items() if "oracles.shapes import" in text}
        found |= {stem for stem, text in shared.items() if table.search(text)}
    own = (ROOT / "tests" / "model").glob("test_*.py")  # written straight from the formulas
    return sorted(found) + [
        path.stem for path in own if path.stem.replace("_", "") == f"test{name}"
    ]


def layouts(family: Family) -> str:
    """What holds it in 4 and 8 bits."""
    found = ["Q4_1, Q8_0"] if family.gguf else []
    along_rows = not any(fold.transposed for fold in family.folds.values())
    return "; ".join(found + ["compressed-tensors"] * along_rows)


def table() -> str:
    """The whole page."""
    fixtures: dict[str, list[str]] = {}
    computed: dict[str, str] = {}
    for path in sorted((ROOT / "tests" / "model" / "families").glob("*.json")):
        source = json.loads(path.read_text(encoding="utf-8"))
        family = by_source(source, path.name)
        fixtures.setdefault(family.name, []).append(path.stem)
        config = family.config(source, path.name)
        own = type(config) is not DecoderConfig
        computed[family.name] = type(config).__name__.removesuffix("Config") if own else "Decoder"
    rows = [
        f"| {about(name)} | `{family.model_type}` | {f'`{family.gguf}`' if family.gguf else '–'} "
        f"| {layouts(family)} | {computed[name]} | {', '.join(fixtures[name])} | {', '.join(oracles(name, family)) or '–'} |"
        for name, family in families().items()
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(table(), encoding="utf-8")
