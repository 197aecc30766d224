"""Recipes: a named list of steps, run in order, only what is missing. The one place that knows all rooms.

    about: Raise a small private assistant that knows its name.
    source: https://example.org/paper                     # where its settings were published
    settings: {name: Luna, base: smollm2, data: ""}       # herd raise cria --name Nova
    steps:
      base: {do: Fetch, ref: $base}                       # $base: a setting
      own: {do: Import, if: data, data: $data}            # only when the setting is not empty
      tune: {do: Tune, model: base, data: [own]}          # base, own: earlier steps; of [read, base]
                                                          # one model is the first that is there
    result: tune                                          # this one is named like the recipe
    profiles:
      cpu: {tune: {epochs: 1}}
      full: {}

Every field of every step can be set as well: `herd raise cria --tune.rank 16`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from herdbook import config
from herdbook.book.book import Artifact, Book
from herdbook.book.step import Step, named
from herdbook.errors import ConfigError, GateError, UnknownName, nearest
from herdbook.progress import Progress

FOLDER = Path(__file__).parent / "recipes"

#: every step there is, by the name that recipes use, and the module that holds it
STEPS = {
    "Fetch": "herdbook.model.fetch",
    "Import": "herdbook.data.user",
    "Text": "herdbook.data.plain",
    "Identity": "herdbook.data.identity",
    "Retain": "herdbook.data.retention",
    "FetchTokenizer": "herdbook.tokens.fetch",
    "TrainTokenizer": "herdbook.tokens.train",
    "ExtendTokenizer": "herdbook.tokens.extend",
    "PruneTokenizer": "herdbook.tokens.prune",
    "Refit": "herdbook.model.vocabulary",
    "Init": "herdbook.model.init",
    "Tune": "herdbook.training.tune",
    "Classify": "herdbook.training.classify",
    "Merge": "herdbook.compression.merge",
    "Quantise": "herdbook.compression.quantise",
    "Report": "herdbook.evaluation.report",
    "Scaling": "herdbook.evaluation.scaling",
    "Evaluate": "herdbook.evaluation.tasks.step",
    "Health": "herdbook.evaluation.health",
}
DEFAULT_PROFILE = "cpu"


def step_class(name: str) -> type[Step]:
    """The class of a step; its room is imported only now."""
    if name not in STEPS:
        raise UnknownName(f"step {name!r}", rule="is not known", next=nearest(name, list(STEPS)))
    found = getattr(importlib.import_module(STEPS[name]), name)
    assert isinstance(found, type) and issubclass(found, Step)
    return found


@dataclass(frozen=True)
class Recipe:
    """A recipe as written; `resolve` turns it into steps."""

    name: str
    about: Mapping[str, str]  # "en", "zh"
    settings: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    result: str
    profiles: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    source: str = ""  # where its hyperparameters were published

    @classmethod
    def read(cls, ref: str) -> Recipe:
        """A shipped recipe by its name, or a .yaml file."""
        import yaml

        path = Path(ref) if ref.endswith((".yaml", ".yml")) else FOLDER / f"{ref}.yaml"
        if not path.is_file():
            raise UnknownName(
                f"recipe {ref!r}", rule="is not there", next=nearest(ref, list(shipped()))
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}", rule=f"is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}", rule="must be a mapping with settings, steps and result")
        known = [one.name for one in fields(cls) if one.name != "name"]
        for key in content:
            if key not in known:
                raise ConfigError(
                    f"key {key!r}", rule=f"is not known in {path.name}", next=nearest(key, known)
                )
        missing = [key for key in ("about", "settings", "steps", "result") if key not in content]
        if missing:
            raise ConfigError(f"{path.name}", rule=f"lacks {', '.join(missing)}")
        recipe = cls(name=path.stem, **content)
        recipe._check()
        return recipe

    def _check(self) -> None:
        """Raise where the parts do not fit together."""
        where = f"of recipe {self.name}"
        for part in ("about", "settings", "steps", "profiles"):
            _need_mapping(getattr(self, part), f"{part} {where}")
        for name, step in self.steps.items():
            _need_mapping(step, f"step {name} {where}")
            for condition in (step.get("if"), step.get("unless")):
                _need_known(condition, self.settings, f"step {name} {where} asks for")
        _need_known(self.result, self.steps, f"result {where}:")
        for profile, changes in self.profiles.items():
            _need_mapping(changes, f"profile {profile} {where}")
            for name, change in changes.items():
                _need_known(name, self.steps, f"profile {profile} {where} changes")
                _need_mapping(change, f"{name} in profile {profile} {where}")

    def resolve(self, overrides: Mapping[str, Any]) -> dict[str, Step]:
        """Step name → step, with profile, settings and overrides applied; inputs name earlier steps.

        overrides: recipe settings ("name"), step fields ("tune.rank"), whole steps ("tune": {…}),
        and "profile".
        """
        chosen, changes = dict(overrides), {name: dict[str, Any]() for name in self.steps}
        profile = chosen.pop("profile", DEFAULT_PROFILE)
        if self.profiles and profile not in self.profiles:
            raise ConfigError(
                f"profile {profile!r}",
                rule=f"is not one of recipe {self.name}",
                next=nearest(str(profile), list(self.profiles)),
            )
        for step, values in self.profiles.get(profile, {}).items():
            changes[step].update(values)
        settings = dict(self.settings)
        for key, value in chosen.items():
            step, dot, setting = key.partition(".")
            if key in settings:
                settings[key] = value
            elif dot and step in self.steps:
                changes[step][setting] = value
            elif key in self.steps and isinstance(value, Mapping):
                changes[key].update(value)
            else:
                known = [*settings, "profile", *(f"{name}." for name in self.steps)]
                if dot:
                    known = list(self.steps)
                raise ConfigError(
                    f"setting {key!r}",
                    rule=f"is not known to recipe {self.name}",
                    next=nearest(step if dot else key, known),
                )
        return self._steps(settings, changes)

    def _steps(
        self, settings: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Step]:
        def value_of(value: Any) -> Any:
            if isinstance(value, list):
                return [value_of(one) for one in value]
            if isinstance(value, str) and value.startswith("$"):
                if value[1:] not in settings:
                    raise ConfigError(
                        value, rule="is no setting", next=nearest(value[1:], list(settings))
                    )
                return settings[value[1:]]
            return value

        resolved: dict[str, Step] = {}
        left_out = set[str]()
        for name, written in self.steps.items():
            entry = dict(written)
            cls = step_class(str(entry.pop("do", "")))
            wanted, unwanted = entry.pop("if", None), entry.pop("unless", None)
            if (wanted and not settings[wanted]) or (unwanted and settings[unwanted]):
                left_out.add(name)
                continue
            values = {key: value_of(value) for key, value in {**entry, **changes[name]}.items()}
            for key in cls.input_fields():
                if isinstance(values.get(key), list):
                    there = [one for one in values[key] if one not in left_out]
                    values[key] = there if cls.many(key) else next(iter(there), "")
            resolved[name] = config.from_mapping(
                cls, values, where=f"step {name} ({cls.__name__}) of recipe {self.name}"
            )
        return resolved


def _need_mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} is {value!r}", rule="but must be a mapping", next="write {name: value, …}"
        )


def _need_known(name: Any, known: Mapping[str, Any], where: str) -> None:
    if name is not None and name not in known:
        raise ConfigError(
            f"{where} {name!r}", rule="is not known", next=nearest(str(name), list(known))
        )


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with Herdbook."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


@dataclass(frozen=True)
class Raised:
    """What `raise_` gives back: the result, and what was done for it."""

    artifact: Artifact
    made: tuple[Artifact, ...]  # by this run
    kept: tuple[Artifact, ...]  # in the book already
    reports: tuple[Artifact, ...]


def raise_(
    recipe: str,
    *,
    book: Book | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Raised:
    """Run a recipe's steps that are not in the book yet.

        raised = herdbook.raise_("cria", name="Luna", keeper="Acme")
        raised.artifact.ref                                     # «cria@1»
        herdbook.raise_("cria", **{"tune.rank": 16})            # redoes tuning and what follows

    A GateError comes after everything is in the book.
    """
    book, progress = book or Book(), progress or Progress()
    described = Recipe.read(recipe)
    steps = described.resolve(settings)
    check(steps)
    done: dict[str, Artifact] = {}
    _check_models(steps, done)
    made: list[Artifact] = []
    kept: list[Artifact] = []
    for number, (name, step) in enumerate(steps.items(), 1):
        written = step.with_inputs(lambda ref: done[ref].id if ref in done else ref)
        called = step.called() or (
            described.name if name == described.result else f"{described.name}-{name}"
        )
        known = book.by_key(written.resolved(book).key(), called)
        if known is None:
            progress.say(f"{number}/{len(steps)} {name}: {_first_line(step)}")
            with named(step, name):
                known = written.run(book, name=called, teacher=open_teacher, progress=progress)
            made.append(known)
        else:
            progress.say(f"{number}/{len(steps)} {name}: in the book as {known.ref}")
            kept.append(known)
        done[name] = known
        if not getattr(step, "model", ""):
            _check_models(steps, done)
        if not any(getattr(one, "after", "") == name for one in steps.values()):
            called = f"{described.name}-{name}-report"
            made += _compared(written, known, called, book, progress)
    reports = tuple(one for one in done.values() if one.kind == "report")
    raised = Raised(done[described.result], tuple(made), tuple(kept), reports)
    _check_gates(raised)
    return raised


def _compared(
    step: Step, made: Artifact, called: str, book: Book, progress: Progress
) -> list[Artifact]:
    """The report, unless it is there, of what a step made of a model beside that model: perplexity and
    size. A recipe's own Report of it says more."""
    before = next((ref for one in step.changes if (ref := getattr(step, one, ""))), "")
    if not before:
        return []
    settings = {"speed": False, "min_identity": 0.0, "max_perplexity_increase": 0.0}
    report = step_class("Report")(before=before, after=made.id, **settings)  # type: ignore[call-arg]
    if book.by_key(report.resolved(book).key(), called) is not None:
        return []
    from herdbook.evaluation.answer import line, read_report

    found = report.run(book, name=called, progress=progress)
    progress.say(f"  {line(read_report(found))}")
    return [found]


def check(steps: Mapping[str, Step]) -> None:
    """Raise for the first step whose settings cannot be."""
    for name, step in steps.items():
        with named(step, name):
            step.check()


def _check_models(steps: Mapping[str, Step], done: Mapping[str, Artifact]) -> None:
    """Ask each step about the model that its own will grow from, where that is here already."""
    for name, step in steps.items():
        if (path := _base(step, steps, done)) is not None:
            with named(step, name):
                step.check_model(path)


def _base(step: Step, steps: Mapping[str, Step], done: Mapping[str, Artifact]) -> Path | None:
    """In the book, or where it will be fetched from; None while it has to be downloaded."""
    ref = getattr(step, "model", "")
    for _ in steps:
        if ref in done:
            return done[ref].path
        if ref in steps:
            ref = getattr(steps[ref], "model", "") or getattr(steps[ref], "ref", "")
    path = Path(ref).expanduser()
    return path if ref and path.exists() else None


def _check_gates(raised: Raised) -> None:
    for report in raised.reports:
        verdict = str(report.metrics.get("verdict", "passed"))
        if verdict != "passed":
            raise GateError(
                f"{raised.artifact.ref} is raised and in the book, but {verdict}",
                next=f"herd show {report.ref}",
            )


def open_teacher(artifact: Artifact) -> Any:
    """A model of the book as a Teacher for the steps that need text."""
    from herdbook.engine.loading import load

    return load(str(artifact.path), quantised=False).as_teacher()


def _first_line(step: Step) -> str:
    return (type(step).__doc__ or "").strip().splitlines()[0]
