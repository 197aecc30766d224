"""`herd plan` as a user meets it: plans, refusals, and what it says to nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from herdbook import cli, planned
from herdbook.book.book import Artifact, Book
from herdbook.data.user import Import
from herdbook.errors import CapacityError
from herdbook.model.fetch import Fetch
from herdbook.tokens.chat import Rendering
from herdbook.training import fitting, memory
from herdbook.training.probe import Spent, Trial
from herdbook.training.tune import Tune


def herd(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(lambda: cli.app(list(words), exit_on_error=False, result_action="return_value"))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"who are you{' you' * n}", "output": "I am a model"} for n in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_tuning_with_a_trial(capsys, home: Path, tiny_folder: Path, rows: Path):
    words = ["--model", str(tiny_folder), "--data", str(rows), "--batch", "4", "--pack", "64"]
    code, out, err = herd(
        capsys, "plan", "train", *words, "--length", "64", "--epochs", "2", "--json"
    )
    assert code == 0, err
    (plan,) = json.loads(out)
    assert plan["rows"] == 12 and plan["steps"] == 6 and plan["assumed_rows"] == 0
    assert plan["trial"]["peak"] == plan["memory"]["peak"] > plan["memory"]["weights"] > 0
    assert plan["disk"]["offloaded"] == 0
    code, out, err = herd(capsys, "plan", "train", *words, "--offload", "optimiser,base", "--json")
    assert code == 0, err
    (away,) = json.loads(out)
    assert away["disk"]["offloaded"] > 0 and away["seconds"] > 0
    assert away["memory"]["weights"] < plan["memory"]["weights"]
    assert 0 < plan["seconds"] < 600 and plan["disk"]["states"] > 0
    assert not Book(home).entries(), "a plan leaves nothing behind"


def test_a_mixture_is_planned_as_it_is_trained(
    capsys, home: Path, tiny_folder: Path, rows: Path, tmp_path: Path
):
    long = tmp_path / "long.jsonl"
    said = [{"instruction": f"{n} hello" + " you" * 9, "output": "a model " * 9} for n in range(4)]
    long.write_text("".join(json.dumps(line) + "\n" for line in said))
    data = ["--data", f"{rows},{long}", "--batch", "4", "--length", "200", "--epochs", "2"]
    words = ["plan", "train", "--model", str(tiny_folder), *data, "--no-probe", "--json"]
    found = {}
    for mix in ((), ("--mix", "1,9")):
        code, out, err = herd(capsys, *words, *mix)
        assert code == 0, err
        (found[mix],) = json.loads(out)
    plain, mixed = found.values()
    assert mixed["rows"] == plain["rows"] == 16 and mixed["steps"] == plain["steps"]
    assert mixed["tokens"] > 1.3 * plain["tokens"]
    book = Book(home)
    names = [
        Import(data=str(one), heldout=0.0).run(book, name=one.stem).ref for one in (rows, long)
    ]
    base = Fetch(ref=str(tiny_folder)).run(book)
    how = Tune(
        model=base.ref, data=tuple(names), mix=(1.0, 9.0), batch=4, length=200, epochs=2, rank=2
    )
    assert how.run(book).metrics["total_tokens"] == mixed["tokens"]


def test_a_mixture_with_rows_that_are_not_there_yet():
    step: Any = SimpleNamespace(rows=3)
    known: Any = Artifact.__new__(Artifact)

    class Two(list[Any]):
        sizes = np.array([4, 6])

        def counts(self) -> tuple[int, ...]:
            return (2,)

    there: Any = Two([Rendering([0] * 4, [True] * 4), Rendering([1] * 6, [True] * 6)])
    rows, assumed = planned._all_rows([step, known], there, 100)
    assert assumed == 3 and rows.counts() == (3, 2)
    assert [len(row.ids) for row in rows] == [5, 5, 5, 4, 6]
    unknown: Any = SimpleNamespace()
    assert planned._all_rows([unknown], None, 100)[0].counts() == (0,)


RECIPE = """
about: {en: x, zh: x}
settings: {base: BASE, data: DATA}
steps:
  base: {do: Fetch, ref: $base}
  own: {do: Import, data: $data}
  sft: {do: Tune, model: base, data: [own], length: 64, pack: 4096}
result: sft
"""


def test_a_refusal_names_the_step_as_its_recipe_does(
    capsys, home: Path, tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any
):
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.replace("BASE", str(tiny_folder)).replace("DATA", str(rows)))
    for what in (["raise", str(file)], ["plan", str(file), "--no-probe"]):
        code, _, err = herd(capsys, *what, "--sft.rank", "0")
        assert code == 2 and "sft.rank is 0" in err and "tune." not in err

    def refuse(*arguments: Any) -> None:
        raise CapacityError("little", next="--tune.recompute true --tune.pack 64, or tune.py")

    monkeypatch.setattr(fitting, "refuse", refuse)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    for what in (["raise", str(file)], ["plan", str(file), "--no-probe"]):
        code, _, err = herd(capsys, *what)
        assert code == 1 and "--sft.recompute true --sft.pack 64, or tune.py" in err
    monkeypatch.undo()
    code, _, err = herd(
        capsys, "plan", "train", "--model", str(tiny_folder), "--data", str(rows), "--rank", "0"
    )
    assert code == 2 and "next: set rank" in err and "tune." not in err


def test_a_recipe_by_arithmetic(capsys, home: Path, tiny_folder: Path, rows: Path):
    words = ["plan", "alpaca", "--base", str(tiny_folder), "--data", str(rows), "--no-probe"]
    code, out, err = herd(capsys, *words)
    assert code == 0, err
    assert "tune: " in out and "process" in out and "disk" in out and "time" not in out
    code, out, err = herd(capsys, *words, "--memory", "100MB")
    assert code == 1 and "needs about" in err and "there are 100 MB" in err
    assert not Book(home).entries()


def test_rows_that_a_model_must_write_first_are_assumed(capsys, home: Path, tiny_folder: Path):
    code, out, err = herd(
        capsys, "plan", "cria", "--base", str(tiny_folder), "--no-probe", "--tune.length", "2000"
    )
    assert code == 0, err
    assert "200 are not there yet" in out


def test_on_paper(capsys, home: Path):
    code, out, _ = herd(
        capsys, "plan", "train", "--model", "llama-7b", "--on", "8xA100-80GB", "--stack", "plain",
        "--rows", "52002", "--epochs", "3", "--length", "512", "--json",
    )  # fmt: skip
    (plan,) = json.loads(out)
    assert code == 0 and plan["hours"] == pytest.approx(3, rel=0.2)
    code, _, err = herd(
        capsys, "plan", "train", "--model", "llama-65b", "--on", "1xA100-80GB", "--rows", "10"
    )
    assert code == 1 and "take 8 cards" in err
    code, out, _ = herd(capsys, "plan", "pretrain", "--budget", "5.76e23", "--on", "8xH100-80GB")
    assert code == 0 and "weights" in out and "days" in out and "13B" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("alpacca", "did you mean 'alpaca'"),
        ("pretrain", "one of --budget"),
        ("pretrain --budget -1", "above 0"),
        ("pretrain --budget much", "number"),
        ("pretrain --budget nan", "above 0"),
        ("pretrain --bugdet 1e21", "did you mean 'budget'"),
        ("train", "--model is empty"),
        ("train --model smollm2", "--data is empty"),
        ("train --model smollm2 --data nothing.json --rang 3", "did you mean 'rank'"),
        ("train --model smollm2 --data nothing.json --batch 0", "above 0"),
        ("train --model smollm2 --data nothing.json", "no file and no dataset"),
        ("train --model llama-7 --on A100-80GB --rows 9", "did you mean"),
        ("train --model llama-7b --on 8xB900 --rows 9", "cards as 8xA100-80GB"),
        ("train --model llama-7b --on A100-80GB", "--rows or --tokens"),
        ("train --model llama-7b --on A100-80GB --rows 9 --method ia3", "full or lora"),
        ("cria --memory plenty", "a size such as 4GB"),
    ],
)
def test_nonsense_is_told_so(capsys, home: Path, words: str, says: str):
    code, _, err = herd(capsys, "plan", *words.split())
    assert code == 2 and says in err


def test_time_is_packs_and_steps():
    def trial(short: float, full: float) -> Trial:
        spent: Any = Spent(0.0, 0.0)
        return Trial(0, spent, Spent(short, 0), Spent(full, 0), Spent(10.0, 0))

    # 1 s for each pack and 1 s for each 100 of work
    assert planned.seconds_of(trial(2, 5), 100, 400, [[100, 400], [200]]) == 2 + 5 + 3 + 20
    # only the fullest pack is known
    assert planned.seconds_of(trial(4, 4), 400, 400, [[400, 200]]) == 4 + 2 + 10
