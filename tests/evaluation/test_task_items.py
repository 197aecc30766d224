"""Tasks as they are written, and the items that come of them; what cannot be asked is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herdbook.errors import ConfigError, DataError, HerdbookError, UnknownName
from herdbook.evaluation.marks.scorers import contains, exact
from herdbook.evaluation.report import Report
from herdbook.evaluation.tasks import items, told
from herdbook.evaluation.tasks.step import Evaluate
from herdbook.evaluation.tasks.task import Group, Task, fetched, read, shipped

SharedData = Callable[[str], Path]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_task_is_one(name: str) -> None:
    found = read(name)
    assert found.name == name and set(found.about) == {"en", "zh"} and found.version >= 1
    if isinstance(found, Group):
        members = [read(one) for one in found.tasks]
        assert members and all(isinstance(one, Task) for one in members)
    else:
        assert found.source and found.licence


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_task_s_items_build(
    name: str, shared_data: SharedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = read(name)
    if isinstance(task, Group):
        pytest.skip("a group")
    folder = shared_data(task.data.partition("/")[0]).parent
    shared_data(task.data)
    monkeypatch.setenv("HERDBOOK_DATA", str(folder))
    asked = items.questions(task, limit=60)
    assert len(asked.items) == (1 if task.kind == "text" else min(60, asked.total))
    assert len({item.id for item in asked.items}) == len(asked.items)
    assert items.questions(task, limit=60) == asked
    assert items.questions(task, limit=3).prompt_hash == asked.prompt_hash
    for item in asked.items:
        assert len(item.shots) == task.shots and item.context().endswith(item.prompt)
        if task.kind == "choice":
            assert item.right and all(0 <= place < len(item.choices) for place in item.right)
            assert not task.pool or len(set(item.choices)) == len(item.choices) == task.pool
        elif task.kind == "generate":
            assert item.answer or task.judged


def test_mmlu_reads_as_lm_evaluation_harness_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mmlu"
    folder.mkdir()

    def row(question: str, answer: str, subject: str = "world_history") -> dict[str, str]:
        options = {"A": "1", "B": "2", "C": "3", "D": "4"}
        return {"subject": subject, "question": question, **options, "answer": answer}

    write(folder / "dev.jsonl", row("other", "A", "x"), *(row(f"q{n} ", "B") for n in range(6)))
    (folder / "test.jsonl.gz").write_bytes(write(folder / "t", row(" Why?\n", "D")).read_bytes())
    monkeypatch.setenv("HERDBOOK_DATA", str(tmp_path))
    task = read("mmlu")
    assert isinstance(task, Task)
    (item,) = items.questions(task.with_shots(1)).items
    assert item.context() == (
        "The following are multiple choice questions (with answers) about world history.\n\n"
        "q0\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Why?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert item.choices == ("A", "B", "C", "D") and item.right == (3,)
    with pytest.raises(DataError, match=r"holds 6 examples of world_history"):
        items.questions(task.with_shots(7))


def test_hashes_cover_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "own.jsonl"
    write(data, {"question": "1 + 1?", "answer": "2"})
    first = items.questions(items.users(data))
    write(data, {"question": "1 + 2?", "answer": "3"})
    second = items.questions(items.users(data))
    assert first.data_hash != second.data_hash and first.prompt_hash == second.prompt_hash
    moved = write(tmp_path / "moved.jsonl", {"question": "1 + 2?", "answer": "3"})
    assert items.questions(items.users(moved)).prompt_hash == first.prompt_hash


def own(tmp_path: Path, **changes: Any) -> Path:
    """A task of the user's own, with its data beside it."""
    import yaml

    write(tmp_path / "rows.jsonl", *({"q": f"{n}?", "a": str(n)} for n in range(9)))
    plain = {"about": "own", "version": 2, "kind": "generate", "data": "rows.jsonl"}
    plain |= {"prompt": "{{ q }}", "answer": "a", "metrics": ["exact"]} | changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({key: one for key, one in plain.items() if one is not None}))
    return path


def test_a_task_of_the_users_own(tmp_path: Path) -> None:
    task = items.find(str(own(tmp_path)))
    assert isinstance(task, Task) and task.version == 2 and task.present
    assert [item.prompt for item in items.questions(task, limit=3).items] == ["0?", "3?", "6?"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "exact"},
            "key 'metric' is no setting of task own\n  next: did you mean 'metrics'",
        ),
        (
            {"metrics": None, "metric": ["exact"]},
            "key 'metric' is no setting of task own\n  next: did you mean 'metrics'",
        ),
        ({"kind": "chioce"}, "one of choice, generate, text"),
        ({"kind": "choice"}, "needs options"),
        ({"kind": "choice", "options": ["q", "a"], "metrics": ["ac"]}, "did you mean 'acc'"),
        ({"prompt": "{{ q "}, "is no Jinja template"),
        ({"prompt": ""}, "needs a prompt"),
        ({"data": None}, "lacks data"),
        ({"shots": 2}, "needs shots_data"),
        ({"folder": "/"}, "is the file's own"),
        ({"prompt": "{{ b }}"}, r"line 1: a row with the keys \{q, a\} lacks 'b'"),
        ({"prompt": "{{ q.x.y }}"}, "prompt fails"),
        ({"data": "none.jsonl"}, "HERDBOOK_DATA"),
        ({"data": "hf:org/name"}, "must be hf:org/name/file"),
        ({"metrics": ["exakt"]}, "did you mean 'exact'"),
    ],
)
def test_tasks_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("HERDBOOK_DATA", raising=False)
    with pytest.raises(HerdbookError) as raised:
        path = str(own(tmp_path, **changes))
        Evaluate("smollm2", path).check()
        task = items.find(path)
        assert isinstance(task, Task)
        items.questions(task)
    import re

    assert re.search(message, str(raised.value)), str(raised.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "is empty"),
        (b"[]", "holds no row"),
        (b"\xff\xfe{", "is not UTF-8"),
        (b'{"question": "a"}', "where rows of question and answer"),
        (b'{"question": "a", "answer": "b"}\n{', "line 2"),
        (b'{"question": "a", "answer": "b"}\n{"question": "c"}', "line 2: .* lacks 'answer'"),
        (b'{"question": "a", "answer": "b"}\n"c"', "line 2: 'c' is no object"),
        (b'{"question": "a", "answer": "b"}\n{"question": "a", "answer": []}', "line 2"),
        (b'{"question": "a", "answer": " "}', "answer is empty"),
        (b'{"id": 1, "question": "a", "answer": "b"}\n' * 2, "row 2: id '1' is row 1's already"),
        (b'{"question": "a", "choices": ["b"], "answer": "b"}', "two or more"),
        (b'{"question": "a", "choices": ["b", ""], "answer": "b"}', "option 2 of 2 is empty"),
        (b'{"question": "a", "choices": ["b", "c"], "answer": "d"}', "is none of the 2 options"),
        (b'{"question": "a", "choices": ["b", "c"], "answer": 2}', "is none of the 2 options"),
        (b'{"question": "a", "choices": ["b", "c"], "answer": true}', "is none of the 2 options"),
        (b'{"question": "a", "choices": ["B", "c"], "answer": "B"}', "may mean several options"),
        (b'{"question": "a", "A": "b", "B": "c", "answer": "C"}', "a letter of AB"),
    ],
)
def test_a_users_rows_that_cannot_be(tmp_path: Path, rows: bytes, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(rows)
    with pytest.raises(DataError, match=message) as raised:
        items.questions(items.users(path))
    assert str(path) in str(raised.value)


def test_a_text_of_rows(tmp_path: Path) -> None:
    path = own(tmp_path, kind="text", data="texts.jsonl", prompt="", metrics=["bits_per_byte"])
    write(tmp_path / "texts.jsonl", {"text": "who"}, {"text": "你"})
    task = items.find(str(path))
    assert isinstance(task, Task)
    assert [item.prompt for item in items.questions(task).items] == ["who", "你"]
    write(tmp_path / "texts.jsonl", {"text": "who"}, {"txt": "you"})
    with pytest.raises(DataError, match=r"line 2: .* lacks a text"):
        items.questions(task)
    with pytest.raises(DataError, match=r"is not there\n  next: check the path$"):
        items.find(str(tmp_path / "none.jsonl"))


def test_a_users_rows(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "choices": ["x", "y"], "answer": "B"},
        {"question": "b", "choices": ["x", "y", "z"], "answer": 2},
        {"question": "c", "choices": ["x", "y"], "answer": "x"},
    ]
    task = items.users(write(tmp_path / "own.jsonl", *rows))
    found = items.questions(task).items
    assert [item.right for item in found] == [(1,), (2,), (0,)]
    assert found[1].prompt == "b\nA. x\nB. y\nC. z\nAnswer:"
    chinese = items.users(write(tmp_path / "zh.jsonl", {"question": "谁？", "answer": "我"}))
    (item,) = items.questions(chinese).items
    assert item.prompt == "问题：谁？\n答案："


THEIRS = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "theirs.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{q}}:",
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "label",
    "metadata": {"version": 2.0},
}


def theirs(tmp_path: Path, **changes: Any) -> Task:
    import yaml

    write(tmp_path / "theirs.jsonl", {"q": "b?", "label": 1})
    path = tmp_path / "theirs.yaml"
    plain = {key: one for key, one in (THEIRS | changes).items() if one is not None}
    path.write_text(yaml.safe_dump(plain))
    found = items.find(str(path))
    assert isinstance(found, Task)
    return found


def test_a_plain_task_of_lm_evaluation_harness_s(tmp_path: Path) -> None:
    task = theirs(tmp_path)
    (item,) = items.questions(task).items
    assert item.context() == "b?:" and item.choices == ("no", "yes") and item.right == (1,)
    assert task.version == 2 and task.metrics == ("acc", "acc_norm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "generate_until"}, "output_type is 'generate_until'"),
        ({"process_docs": "x"}, "process_docs is more than a plain task"),
        ({"filter_list": []}, "filter_list is more"),
        ({"dataset_path": "org/name"}, "dataset_path is 'org/name'"),
        ({"dataset_name": "main"}, "dataset_name"),
        ({"dataset_kwargs": None}, "data_files"),
        ({"test_split": "dev"}, "test_split is 'dev'"),
        ({"doc_to_choice": None}, "doc_to_choice is not there"),
        ({"num_fewshot": 3}, "sampler: first_n"),
        ({"metric_list": [{"metric": "f1"}]}, "metric_list: f1 is none of acc"),
        ({"fewshot_delimiter": "\n"}, "must be a blank line"),
        ({"doc_to_text": "{{q|regex_replace('a', 'b')}}"}, "is no Jinja template"),
        ({"doc_to_choice": "{{q}}"}, "are no list"),
        ({"doc_to_target": "{{q}}"}, "is none of the 2 options"),
    ],
)
def test_what_is_not_plain_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(HerdbookError, match=message):
        items.questions(theirs(tmp_path, **changes))


def test_truthfulqa_in_both_of_its_shapes(tmp_path: Path) -> None:
    published = {"question": "a", "mc1_targets": {"x": 0, "y": 1}, "mc2_targets": {}}
    hub = {"question": "a", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 1]}}
    for row in (published, hub):
        (tmp_path / "truthfulqa").mkdir(exist_ok=True)
        (tmp_path / "truthfulqa" / "mc_task.json").write_text(json.dumps([row]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HERDBOOK_DATA", str(tmp_path))
            task = read("truthfulqa-mc1")
            assert isinstance(task, Task)
            (item,) = items.questions(task).items
        assert item.choices == ("x", "y") and item.right == (1,)
        assert item.context().endswith("in Barcelona, Spain.\n\nQ: a\nA:")
        assert item.context().startswith(
            "Q: What is human life expectancy in the United States?\nA:"
        )


def test_what_is_not_here_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDBOOK_DATA", "/nowhere")
    with pytest.raises(DataError) as raised:
        Evaluate("smollm2", "mmlu").check()
    told_ = str(raised.value)
    assert "mmlu/test.jsonl.gz is not in /nowhere" in told_ and "cais/mmlu" in told_
    assert "licence: MIT" in told_ and "set HERDBOOK_DATA=FOLDER" in told_
    with pytest.raises(UnknownName, match="did you mean 'mmlu'"):
        items.find("mlmu")
    with pytest.raises(ConfigError, match="parquet"):
        fetched("hf:org/name/x.parquet")
    assert told.tasks()["mmlu"]["state"] == "no data"
    assert told.task("safety")["tasks"][0] == "safetybench"


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    path, notes = str(own(tmp_path)), tmp_path / "notes.txt"
    notes.write_text("who are you?")
    for changes, message in (
        ({"limit": -1}, "limit -1"),
        ({"seeds": (1, 1)}, "different whole numbers"),
        ({"seeds": (0, 1)}, "nothing is drawn"),
        ({"task": str(notes), "chat": True}, "scored as it stands"),
        ({"shots": 3}, "no file of examples"),
        ({"task": ""}, "task is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            Evaluate(**({"model": "smollm2", "task": path} | changes)).check()  # type: ignore[arg-type]


def task_file(folder: Path, **keys: Any) -> str:
    """A task's YAML with its rows beside it."""
    folder.mkdir(exist_ok=True)
    given = {
        "about": "own", "version": 1, "kind": "generate", "data": "rows.jsonl",
        "prompt": "{{ question }}", "metrics": ["exact"],
    } | keys  # fmt: skip
    path = folder / f"{folder.name}.yaml"
    path.write_text(json.dumps(given))
    return str(path)


def test_keys_cover_each_tasks_own_files(tmp_path: Path) -> None:
    """Tasks whose files have one name, and a text beside a task called text."""
    for name in ("a", "text"):
        one = task_file(tmp_path / name)
        write(tmp_path / name / "rows.jsonl", {"question": "q", "answer": name})
    refs = tuple(str(tmp_path / name / f"{name}.yaml") for name in ("a", "text"))
    own = tmp_path / "own.txt"
    own.write_text("a text of mine")

    def prints() -> tuple[str, str]:
        report = Report(before="a", after="b", tasks=refs, text=str(own))
        (tmp_path / "both.yaml").write_text(
            json.dumps({"about": "both", "version": 1, "tasks": list(refs)})
        )
        group = Evaluate(model="a", task=str(tmp_path / "both.yaml"))
        return json.dumps(report.fingerprint()), json.dumps(group.fingerprint())

    before = prints()
    assert one.endswith("text.yaml")
    write(tmp_path / "a" / "rows.jsonl", {"question": "q", "answer": "changed"})
    changed = prints()
    assert changed[0] != before[0] and changed[1] != before[1]
    own.write_text("another text")
    assert prints()[0] != changed[0]


def test_a_question_is_not_its_own_example(tmp_path: Path) -> None:
    ref = task_file(tmp_path / "own", shots=1, shots_data="rows.jsonl")
    write(tmp_path / "own" / "rows.jsonl", {"question": "q", "answer": "a"})
    task = items.find(ref)
    assert isinstance(task, Task)
    with pytest.raises(ConfigError, match="its own example"):
        items.questions(task)


@pytest.mark.parametrize("question", [None, "", {"a": 1}])
def test_an_empty_question_is_refused(question: Any, tmp_path: Path) -> None:
    write(
        tmp_path / "own.jsonl",
        {"question": "q", "answer": "a"},
        {"question": question, "answer": "a"},
    )
    task = items.find(str(tmp_path / "own.jsonl"))
    assert isinstance(task, Task)
    with pytest.raises(DataError, match="line 2: question is"):
        items.questions(task)


def test_any_of_several_answers_is_right(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", {"question": "q", "answer": ["Paris", "巴黎"]})
    task = items.find(str(tmp_path / "own.jsonl"))
    assert isinstance(task, Task)
    (item,) = items.questions(task).items
    assert [exact(item, one).value for one in ("paris.", "巴黎", "Rome")] == [1, 1, 0]
    assert contains(item, "It is 巴黎.").value == 1


def test_an_option_that_comes_twice_moves_no_answer(tmp_path: Path) -> None:
    ref = task_file(
        tmp_path / "own", kind="choice", metrics=["mrr"], options="options", scored="text", pool=4
    )
    rows = [{"question": "q", "options": ["a", "a", "b", "c"], "answer": "b"}]
    rows.append({"question": "r", "options": ["d", "e", "f", "g"], "answer": "d"})
    write(tmp_path / "own" / "rows.jsonl", *rows)
    task = items.find(ref)
    assert isinstance(task, Task)
    first = items.questions(task).items[0]
    assert [first.choices[place] for place in first.right] == ["b"]
