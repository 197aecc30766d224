"""lm-evaluation-harness's plain tasks: its YAML of multiple choice over a local file, as a Task.

    task: mine                                      output_type: multiple_choice
    dataset_path: json                              dataset_kwargs: {data_files: {test: rows.jsonl}}
    test_split: test                                doc_to_text: "{{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"                    doc_to_target: label

What needs more than that (functions, filters, other files, other outputs) is refused by the name of its
key, and can be asked with `python -m herdbook.evaluation.tasks.harness`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herdbook.errors import ConfigError

#: the keys that are read, and those that change no score
READ = (
    *("output_type", "dataset_path", "dataset_kwargs", "dataset_name"),
    *("test_split", "validation_split", "training_split", "fewshot_split", "fewshot_config"),
    *("doc_to_text", "doc_to_choice", "doc_to_target", "description", "num_fewshot"),
    *("target_delimiter", "fewshot_delimiter", "metric_list", "metadata"),
)
IDLE = (
    "task",
    "task_alias",
    "tag",
    "group",
    "should_decontaminate",
    "doc_to_decontamination_query",
)
METRICS = ("acc", "acc_norm", "acc_bytes")


def is_theirs(content: Mapping[str, Any]) -> bool:
    return "output_type" in content or "doc_to_text" in content


def translated(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of a Task that asks the same. ConfigError names what is not plain."""

    def refused(key: str, rule: str) -> ConfigError:
        return ConfigError(
            f"{path}: {key}",
            rule=rule,
            next="write it as a task of Herdbook's (herd tasks mmlu shows one), or give it to "
            "python -m herdbook.evaluation.tasks.harness",
        )

    for key in content:
        if key not in READ + IDLE:
            raise refused(key, "is more than a plain task of multiple choice over a local file")
    for key, plain in (("output_type", "multiple_choice"), ("dataset_path", "json")):
        if content.get(key) != plain:
            raise refused(key, f"is {content.get(key)!r}; only {plain} is read")
    if content.get("dataset_name") is not None:
        raise refused("dataset_name", "names a part of a hub's data set; only a local file is read")
    if content.get("fewshot_delimiter", "\n\n") != "\n\n":
        raise refused("fewshot_delimiter", "must be a blank line")
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        if key not in content:
            raise refused(key, "is not there, but needed")
    for key in ("dataset_kwargs", "fewshot_config"):
        if not isinstance(content.get(key) or {}, Mapping):
            raise refused(key, f"is {content[key]!r:.60}, but must be a mapping")
    metrics = content.get("metric_list") or []
    if not isinstance(metrics, list) or not all(
        isinstance(one, Mapping) and "metric" in one for one in metrics
    ):
        raise refused("metric_list", "must be a list of {metric: …}")
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, str):
        files = {"train": files}
    if not isinstance(files, Mapping) or not all(isinstance(one, str) for one in files.values()):
        raise refused("dataset_kwargs", "must name data_files, one file a split")
    split = content.get("test_split") or content.get("validation_split")
    shots_split = content.get("fewshot_split")
    for key, one in (("test_split", split), ("fewshot_split", shots_split)):
        if one not in files and (one or key == "test_split"):
            raise refused(key, f"is {one!r}, of which data_files names no file")
    first = (content.get("fewshot_config") or {}).get("sampler") == "first_n"
    if content.get("num_fewshot") and not (first and shots_split):
        raise refused("fewshot_config", "must have sampler: first_n, and fewshot_split a file")
    return {
        "kind": "choice",
        "version": _version(content.get("metadata")),
        "data": files[split],
        "shots_data": files[shots_split] if shots_split and first else "",
        "shots": content.get("num_fewshot") or 0,
        "intro": _template(content.get("description", "")),
        "prompt": _prompt(content["doc_to_text"]),
        "delimiter": content.get("target_delimiter", " "),
        "options": _options(content["doc_to_choice"]),
        "scored": "text",
        "answer": _template(str(content["doc_to_target"])),
        "metrics": _metrics(content, refused),
    }


def _version(metadata: Any) -> int:
    told = metadata.get("version", 1) if isinstance(metadata, Mapping) else 1
    found = re.match(r"\d+", str(told))
    return max(1, int(found[0])) if found else 1


def _metrics(content: Mapping[str, Any], refused: Any) -> list[str]:
    found = [str(one["metric"]) for one in content.get("metric_list") or ()] or ["acc", "acc_norm"]
    for one in found:
        if one not in METRICS:
            raise refused(f"metric_list: {one}", f"is none of {', '.join(METRICS)}")
    return found


def _template(source: str) -> str:
    """Theirs keeps the line's end behind a block, and the blanks before it."""
    return re.sub(r"(?<![-+])%\}", "+%}", re.sub(r"\{%(?![-+])", "{%+", source))


def _prompt(source: str) -> str:
    """A template, or a column's name."""
    return _template(source) if "{" in source or " " in source else f"{{{{ {source} }}}}"


def _options(source: Any) -> str:
    """A column, a template that writes a list, or the choices themselves."""
    return f"{{{{ {source!r} }}}}" if isinstance(source, list) else _template(str(source))
