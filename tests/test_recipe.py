"""Recipes: every shipped one resolves; settings reach their step; only what is missing is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from herdbook import recipe
from herdbook.book.book import Book
from herdbook.book.step import Bench, Input, Inputs, Step, require
from herdbook.errors import ConfigError, GateError, UnknownName
from herdbook.recipe import Recipe, raise_

WHOLE = """
about: {en: words, zh: 词}
settings: {first: a}
steps:
  one: {do: Seed, if: first}
result: one
profiles:
  cpu: {one: {word: b}}
"""


@dataclass(frozen=True)
class Seed(Step):
    """A word."""

    kind: ClassVar[str] = "dataset"
    word: str = "a"

    def make(self, bench: Bench) -> dict[str, Any]:
        (bench.out / "word").write_text(self.word)
        return {}


@dataclass(frozen=True)
class Join(Step):
    """Words joined."""

    kind: ClassVar[str] = "model"
    words: Inputs = ()
    by: str = "-"

    def make(self, bench: Bench) -> dict[str, Any]:
        words = [(one.path / "word").read_text() for one in bench.inputs["words"]]
        (bench.out / "word").write_text(self.by.join(words))
        return {}


@dataclass(frozen=True)
class Judge(Step):
    """A verdict."""

    kind: ClassVar[str] = "report"
    after: Input = ""
    most: int = 10

    def make(self, bench: Bench) -> dict[str, Any]:
        length = len((bench.artifact("after").path / "word").read_text())
        (bench.out / "report.json").write_text("{}")
        return {"verdict": "passed" if length <= self.most else f"its length is {length}"}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(recipe, "STEPS", {"Seed": __name__, "Join": __name__, "Judge": __name__})
    path = tmp_path / "words.yaml"
    path.write_text(
        """
about: {en: words, zh: 词}
settings: {first: a, second: ""}
steps:
  one: {do: Seed, word: $first}
  two: {do: Seed, if: second, word: $second}
  other: {do: Seed, unless: second, word: z}
  join: {do: Join, words: [one, two, other]}
  judge: {do: Judge, after: join}
result: join
profiles:
  cpu: {}
  full: {join: {by: +}}
"""
    )
    return str(path)


def test_only_what_is_missing_is_done(words: str, book: Book) -> None:
    first = raise_(words, book=book)
    assert first.artifact.ref == "words@1"
    assert (first.artifact.path / "word").read_text() == "a-z"
    assert len(first.made) == 4 and not first.kept
    again = raise_(words, book=book)
    assert not again.made and again.artifact == first.artifact
    changed = raise_(words, book=book, **{"join.by": "/"})
    assert [one.name for one in changed.made] == ["words", "words-judge"]
    assert changed.artifact.ref == "words@2"


def test_an_input_of_several_names_takes_the_first_that_is_there(words: str, book: Book) -> None:
    text = Path(words).read_text().replace("after: join", "after: [two, other, join]")
    Path(words).write_text(text)
    assert Recipe.read(words).resolve({})["judge"] == Judge(after="other")
    assert Recipe.read(words).resolve({"second": "b"})["judge"] == Judge(after="two")


def test_steps_left_out_by_a_setting(words: str, book: Book) -> None:
    assert (raise_(words, book=book, second="b").artifact.path / "word").read_text() == "a-b"


@dataclass(frozen=True)
class Picky(Seed):
    """A word that must not be empty."""

    def check(self) -> None:
        require(self, "word")


def test_all_settings_are_checked_before_anything_is_made(
    words: str, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(words).read_text().replace("other: {do: Seed,", "other: {do: Picky,")
    Path(words).write_text(text)
    monkeypatch.setitem(recipe.STEPS, "Picky", __name__)
    with pytest.raises(ConfigError, match=r"other\.word is empty"):
        raise_(words, book=book, **{"other.word": ""})
    assert book.entries() == []


def test_profiles_and_overrides(words: str, book: Book) -> None:
    full = Recipe.read(words).resolve({"profile": "full"})["join"]
    assert full == Join(("one", "other"), "+")
    mine = Recipe.read(words).resolve({"profile": "full", "join": {"by": "."}})["join"]
    assert mine == Join(("one", "other"), ".")


def test_a_broken_gate_is_told_after_all_is_kept(words: str, book: Book) -> None:
    with pytest.raises(GateError, match="its length is 3\n  next: herd show words-judge@1"):
        raise_(words, book=book, **{"judge.most": 2})
    assert book.get("words").kind == "model"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frist": "b"}, "'frist' is not known to recipe words\n  next: did you mean 'first'"),
        ({"jion.by": "b"}, "'jion.by' is not known .*\n  next: did you mean 'join'"),
        ({"join.bye": "b"}, "'bye' is no setting of step join .*\n  next: did you mean 'by'"),
        ({"profile": "ful"}, "'ful' is not one of recipe words\n  next: did you mean 'full'"),
    ],
)
def test_unknown_settings_name_the_nearest(
    words: str, book: Book, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        raise_(words, book=book, **settings)
    assert book.entries() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("stepps: {}", "'stepps' is not known .*\n  next: did you mean 'steps'"),
        ("steps: {}", "lacks about, settings, result"),
        (WHOLE.replace("result: one", "result: oen"), "'oen' is not known\n  next: .* 'one'"),
        (WHOLE.replace("if: first", "if: frist"), "'frist' is not known\n  next: .* 'first'"),
        (WHOLE.replace("{one:", "{oen:"), "cpu of recipe broken changes 'oen' is not known"),
        (WHOLE.replace("{do: Seed, if: first}", "Seed"), "step one .* is 'Seed' but must be a map"),
        (WHOLE.replace("{first: a}", ""), "settings of recipe broken is None but must be a map"),
    ],
)
def test_broken_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.read(str(path))


def test_unknown_recipe_and_step(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'crya' is not there\n  next: did you mean 'cria'"):
        Recipe.read("crya")
    with pytest.raises(UnknownName, match="'Tuen' is not known\n  next: did you mean 'Tune'"):
        recipe.step_class("Tuen")


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_shipped_recipes_resolve_in_every_profile(name: str) -> None:
    described = Recipe.read(name)
    for profile in described.profiles:
        given = {key: "some/file.json" for key in ("data", "text") if key in described.settings}
        for overrides in ({}, dict([*given.items()][:1]), given):
            steps = described.resolve({"profile": profile, **overrides})
            assert described.result in steps
            seen: set[str] = set()
            for called, step in steps.items():
                step.with_inputs(lambda ref, seen=seen: ref if ref in seen else pytest.fail(ref))
                seen.add(called)
    assert set(described.about) == {"en", "zh"}
