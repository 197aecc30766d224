"""Writes docs/recipes.md and docs/recipes.zh.md: a row a recipe, from the recipes and what was measured.

python docs/recipes.py             writes both; a test keeps them up to date
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from herdbook.recipe import Recipe, shipped
from herdbook.training.tune import Tune

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "recipes.json"
HEAD = {
    "en": """# Recipes

Written by `python docs/recipes.py` from `herdbook/recipes/*.yaml` and `benchmarks/recipes.json` (made by
`benchmarks/recipes.py`).

    herd raise NAME --data FILE                   # the cpu profile: small counts, on the machine that is there
    herd raise NAME --data FILE --profile full    # the published settings; set --base to a model of that size
    herd raise NAME --tune.epochs 2 …             # any field of any step
    herd recipes NAME                             # all of them

FILE holds conversations or instructions in any format that `Import` reads; `--text` takes plain text (.txt, or JSON
lines with "text"). Every result goes into the book with its parents and a report: base against raised model.

The full profile is what the authors published (`source` in the recipe; a test pins it), their prompt included where it
is known (`herd templates`); with a chat model as the base, `--base.template ""` keeps its own. What is known to differ:
rows are packed and never cut (theirs are cut at the length), and only the assistant's words are learnt. Of Koala and of
CaMA's first stage no rates were found; the recipes say what stands in for them. A cpu profile changes sizes and counts
alone, but for pretraining, whose small models learn at a higher rate.

Preference learning, data generation and evaluation of these families are steps of their own and are not in these
recipes yet (Koala's and BELLE's ranked answers, Baize's self-chat, ExpertLLaMA's rewriting).

Measured: perplexity of 16 held-out replies (or documents), raised model against base, with the relative change; loss of
the first and the last step; time of the whole command. So few rows show that a recipe runs and learns, not how good its
full profile is. «not measured»: its cpu profile is tested on a tiny model only.

| recipe | what | published settings | cpu profile | measured |
|---|---|---|---|---|
""",
    "zh": """# 配方

由 `python docs/recipes.py` 根据 `herdbook/recipes/*.yaml` 和 `benchmarks/recipes.json`（由 `benchmarks/recipes.py`
生成）写成。

    herd raise 名称 --data 文件                    # cpu 档位：数量缩小，在现有机器上运行
    herd raise 名称 --data 文件 --profile full     # 论文公布的设置；用 --base 指定相应大小的模型
    herd raise 名称 --tune.epochs 2 …              # 任何步骤的任何字段
    herd recipes 名称                              # 列出全部设置

文件可以是 `Import` 能读的任何格式的对话或指令；`--text` 接受纯文本（.txt，或含 "text" 的 JSON 行）。每个结果连同其来源和
报告（底座对比养成的模型）一起记入谱系。

full 档位即作者公布的设置（配方中的 `source`；有测试固定），已知的提示格式也包括在内（`herd templates`）；底座本身是对话模
型时，用 `--base.template ""` 保留它自己的格式。已知的不同：样本打包而从不截断（原作按长度截断），只学习助手说的话。Koala 的
学习率以及 CaMA 第一阶段的设置没有公布，配方中写明了代替的数值。cpu 档位只改变大小和数量；预训练除外，小模型用更高的学习率。

偏好学习、数据生成和评测是各自的步骤，还不在这些配方里（Koala 和 BELLE 的排序回答、白泽的自我对话、ExpertLLaMA 的改写）。

实测：16 条留出回答（或文档）的困惑度，养成的模型相对底座的变化；第一步与最后一步的损失；整条命令的时间。样本这么少，只说明
配方能运行、能学习，不代表 full 档位的质量。「未测」：cpu 档位只在极小的模型上测试过。

| 配方 | 内容 | 公布的设置 | cpu 档位 | 实测 |
|---|---|---|---|---|
""",
}
WORDS = {
    "en": {"none": "not measured", "loss": "loss", "heldout": "held out", "rows": "rows"},
    "zh": {"none": "未测", "loss": "损失", "heldout": "留出", "rows": "行"},
}


def settings(step: Tune) -> Iterator[str]:
    """The hyperparameters that make a recipe what it is."""
    yield step.method if step.base == "dense" else f"{step.method} ({step.base})"
    if step.method == "lora":
        yield f"r {step.rank} α {step.alpha:g}"
        yield " ".join(step.targets) or "all matrices"
    if step.method == "prefix":
        yield f"{step.virtual_tokens} virtual tokens"
    if step.method == "freeze":
        yield f"{' '.join(step.parts)} of the last {step.last_layers}"
    if step.whole:
        yield f"whole {' '.join(step.whole)}"
    yield f"{step.learning_rate:g} {step.schedule}"
    yield f"batch {step.batch}"
    if step.tokens_per_parameter:
        yield f"{step.tokens_per_parameter:g} tokens a parameter"
    else:
        yield f"{step.steps:,} steps" if step.steps else f"{step.epochs} epochs"
    yield f"length {step.length}"


def row(name: str, language: str, measured: dict[str, Any]) -> str:
    recipe = Recipe.read(name)
    given = {key: "x" for key in ("data", "text", "tasks", "base") if key in recipe.settings}
    full = recipe.resolve({"profile": "full", **given})
    tunes = {key: step for key, step in full.items() if isinstance(step, Tune)}
    published = "<br>".join(f"{key}: {', '.join(settings(step))}" for key, step in tunes.items())
    less = "; ".join(
        f"{key}: " + ", ".join(f"{field} {value}" for field, value in changes.items())
        for key, changes in recipe.profiles["cpu"].items()
    )
    source = f" ([source]({recipe.source.split(' ')[0].rstrip(',')}))" if recipe.source else ""
    cells = [f"`{name}`", recipe.about[language] + source, published, less or "–"]
    return "| " + " | ".join([*cells, told(measured.get(name), WORDS[language])]) + " |"


def told(found: dict[str, Any] | None, words: dict[str, str]) -> str:
    if found is None:
        return words["none"]
    parts = [
        f"{words['loss']} {one['first_loss']:.2f} → {one['loss']:.2f} ({one['rows']} {words['rows']})"
        for one in found["tune"]
    ]
    for which in ("replies", "documents"):
        if (change := found["report"].get(f"perplexity_{which}_change_share")) is not None:
            after = found["report"][f"perplexity_{which}"]
            parts.append(f"{words['heldout']} {after / (1 + change):.2f} → {after:.2f}")
    if "alpha" in found["report"]:
        parts.append(f"α {found['report']['alpha']:.3f}")
    return "; ".join([*parts, f"{found['seconds']} s, load {found['load']}"])


def table(language: str) -> str:
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    return HEAD[language] + "".join(f"{row(name, language, measured)}\n" for name in shipped())


def main() -> None:
    for language, file in (("en", "recipes.md"), ("zh", "recipes.zh.md")):
        (ROOT / "docs" / file).write_text(table(language), encoding="utf-8")


if __name__ == "__main__":
    main()
