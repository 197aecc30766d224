"""Multiple choice against lm-evaluation-harness: the same questions, prompts, choices and likelihoods."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from herdbook.data import rows as data
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.errors import ConfigError
from herdbook.evaluation.tasks import items, scoring
from herdbook.evaluation.tasks.task import Item, Task
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.tokens.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

#: nats, of float32 sums in another order
NEAR = 1e-3


def theirs(
    folder: Path, desk: Path, name: str, rows: list[dict[str, Any]], dev: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """lm-evaluation-harness's own samples, on its own MMLU task with these rows."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for split, some in (("test", rows), ("dev", dev)):
        written = [
            {
                "question": row["question"],
                "choices": [row[one] for one in "ABCD"],
                "answer": "ABCD".index(row["answer"]),
            }
            for row in some
        ]
        (desk / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))
    source = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / f"mmlu_{name}.yaml"
    files = {split: str(desk / f"{split}.jsonl") for split in ("test", "dev")}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    plain = {"include": str(source), "task": "mmlu_here", **local}
    (desk / "here").mkdir()
    (desk / "here" / "mmlu_here.yaml").write_text(yaml.safe_dump(plain))
    found = evaluator.simple_evaluate(
        model=HFLM(str(folder), dtype="float32", device="cpu", batch_size=4),
        tasks=["mmlu_here"],
        num_fewshot=len(dev),
        task_manager=TaskManager(include_path=str(desk / "here"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return sorted(found["samples"]["mmlu_here"], key=lambda one: one["doc_id"])


def compare(
    model: LoadedModel, asked: Task, some: list[Item], samples: list[dict[str, Any]]
) -> None:
    rows = {
        row["id"]: row
        for batch in scoring.batches(model, asked, some)
        for row in scoring.run(model, asked, batch)
    }
    assert len(samples) == len(some)
    for item, sample in zip(some, samples, strict=True):
        row = rows[item.id]
        (context, said), *_ = sample["arguments"]
        assert context == item.context() and said == f"{item.delimiter}{item.choices[0]}"
        want = [float(one[0]) for one in sample["filtered_resps"]]
        assert row["logprobs"] == pytest.approx(want, abs=NEAR)
        assert row["choice"] == want.index(max(want))
        assert row["values"]["acc"] == sample["acc"]


def of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Task, list[Item]]:
    monkeypatch.setenv("HERDBOOK_DATA", str(folder))
    asked = items.find("mmlu")
    assert isinstance(asked, Task)
    return asked, [one for one in items.questions(asked).items if one.group == name]


def lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, _, row in data.rows(path)]


def test_the_embedded_model_on_twenty_questions(
    smollm2_path: Path,
    shared_data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, name = shared_data("mmlu/test.jsonl.gz").parent, "global_facts"
    asked, some = of(name, folder.parent, monkeypatch)
    rows = [row for row in lines(folder / "test.jsonl.gz") if row["subject"] == name][:20]
    dev = [row for row in lines(folder / "dev.jsonl") if row["subject"] == name]
    hf = tmp_path / "hf"
    tokenizer = Tokenizer.load(smollm2_path)
    save_hf(load_decoder(smollm2_path, torch.float32), tokenizer, hf, torch.float32)
    model = load(str(hf), dtype="float32", device="cpu")
    compare(model, asked, some[:20], theirs(hf, tmp_path, name, rows, dev))


def test_a_tiny_model_on_made_up_questions(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(n: int) -> dict[str, str]:
        options = {"A": f"{n}", "B": "I am", "C": "你好", "D": " you "}
        answer = "ABCD"[n % 4]
        return {"subject": "anatomy", "question": f" who {n}?\n", **options, "answer": answer}

    made = {"dev": [row(n) for n in range(5)], "test": [row(n) for n in range(9, 18)]}
    (tmp_path / "mmlu").mkdir()
    for split, file in (("dev", "dev.jsonl"), ("test", "test.jsonl.gz")):
        text = "".join(json.dumps(one) + "\n" for one in made[split])
        (tmp_path / "mmlu" / file).write_text(text)
    asked, some = of("anatomy", tmp_path, monkeypatch)
    samples = theirs(tiny_folder, tmp_path, "anatomy", made["test"], made["dev"])
    compare(load(str(tiny_folder), dtype="float32", device="cpu"), asked, some, samples)


PLAIN = [
    {
        "doc_to_text": "Q: {{q.strip()}}\n{% if n > 2 %}\nmore\n{% endif %}\nA:",
        "doc_to_choice": "{{[one, two]}}",
        "doc_to_target": "{{label}}",
    },
    {"doc_to_text": "q", "doc_to_choice": "both", "doc_to_target": "n2", "target_delimiter": " = "},
    {"doc_to_text": "{{q}}", "doc_to_choice": ["you", " a model"], "doc_to_target": "label"},
    {
        "doc_to_text": "{{q}}\n",
        "doc_to_choice": "{{both}}",
        "doc_to_target": "{{both[n2]}}",
        "description": "who?\n\n",
        "num_fewshot": 2,
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc_norm"}, {"metric": "acc"}],
    },
]


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_their_plain_tasks_as_ours(number: int, tiny_folder: Path, tmp_path: Path) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def made(n: int) -> dict[str, Any]:
        pair = ["I am", f"small {n}"]
        return {"q": f" who {n}? ", "n": n, "n2": n % 2, "label": (n + 1) % 2, "both": pair} | dict(
            zip(("one", "two"), pair, strict=True)
        )

    for split, numbers in (("test", range(5)), ("dev", range(7, 11))):
        rows = [json.dumps(made(n)) for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("test", "dev")}
    plain = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        "test_split": "test",
        **PLAIN[number],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain))
    found = evaluator.simple_evaluate(
        model=HFLM(str(tiny_folder), dtype="float32", device="cpu", batch_size=4),
        tasks=["mine"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    asked = items.find(str(tmp_path / "mine.yaml"))
    assert isinstance(asked, Task)
    samples = sorted(found["samples"]["mine"], key=lambda one: one["doc_id"])
    model = load(str(tiny_folder), dtype="float32", device="cpu")
    compare(model, asked, items.questions(asked).items, samples)


# ------------------------------------------------------------------- their tasks on our engine


@dataclass
class Asked:
    """lm_eval's Instance, of which a model reads the arguments alone."""

    args: tuple[Any, ...]
    task_name: str = "made"


@pytest.fixture(scope="module")
def both(tiny_folder: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from herdbook.evaluation.tasks.harness import HerdbookLM

    length = {"max_length": 48}
    ours = HerdbookLM(str(tiny_folder), dtype="float32", device="cpu", **length)
    return ours, HFLM(str(tiny_folder), dtype="float32", device="cpu", batch_size=2, **length)


def test_likelihoods_as_a_model_of_theirs(both: tuple[Any, Any]) -> None:
    ours, theirs_ = both
    long = "hello who are you I am a small model " * 6
    pairs = [("who are", " you"), ("who are", " a model 你好"), ("who are ", "you"), ("", "hello")]
    pairs += [(long, " you"), (long, " small model"), ("Answer:", " A"), ("Answer:", " B")]
    asked = [Asked(pair) for pair in pairs]
    for mine, want in zip(ours.loglikelihood(asked), theirs_.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(want[0], abs=NEAR) and mine[1] == want[1]


def test_whole_texts_as_a_model_of_theirs(both: tuple[Any, Any]) -> None:
    ours, theirs_ = both
    texts = ["hello", "who are you? I am a small model. 你好，你是谁？\n" * 5]
    asked = [Asked((text,)) for text in texts]
    want = theirs_.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(want, abs=NEAR * 40)


def test_replies_as_a_model_of_theirs(both: tuple[Any, Any]) -> None:
    ours, theirs_ = both
    contexts = ["hello who are", "你好", "I am a small " * 20]
    settings = {"until": ["model"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = [Asked((context, dict(settings))) for context in contexts]
    assert ours.generate_until(asked) == theirs_.generate_until(asked)
    with pytest.raises(ConfigError, match="'num_beams' is no setting"):
        ours.generate_until([Asked(("hello", {"num_beams": 4}))])


def test_their_chat_templates(both: tuple[Any, Any]) -> None:
    ours, theirs_ = both
    turns = [{"role": "user", "content": "who are you"}]
    text = ours.apply_chat_template(turns)
    assert text == theirs_.apply_chat_template(turns)
    asked = [Asked((text, "I am"))]
    (mine,), (want,) = ours.loglikelihood(asked), theirs_.loglikelihood(asked)
    assert mine[0] == pytest.approx(want[0], abs=NEAR)


def test_their_command_on_our_engine(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"who {n}", "a": n % 2}) + "\n" for n in range(6)))
    plain = {
        "task": "made",
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a",
        "doc_to_choice": ["you", "a model"],
    }
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-W", "ignore", "-m", "herdbook.evaluation.tasks.harness"]
    command += ["--model", "herdbook", "--model_args", f"path={tiny_folder},dtype=float32"]
    command += ["--tasks", "made", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(told.read_text())["results"]["made"]["acc,none"] <= 1
