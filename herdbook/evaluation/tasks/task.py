"""What a model is asked. A task is one short YAML file; `herd tasks` lists those that come along.

    about: {en: Knowledge of 57 subjects, zh: 57 个学科的知识}
    version: 1                        # raised with every change of a prompt or a rule
    kind: choice                      # choice | generate | text
    data: mmlu/test.jsonl.gz          # in $HERDBOOK_DATA; or hf:org/name/file; or beside this file
    source: cais/mmlu on the Hugging Face hub
    licence: MIT
    shots: 5                          # examples before the question, the first of shots_data
    shots_data: mmlu/dev.jsonl
    shots_by_group: true              # … of the question's own group
    group: subject                    # the column that sorts questions
    intro: "Questions about {{ group }}.\\n\\n"
    prompt: "{{ question }}\\n{% for one in options %}{{ letters[loop.index0] }}. {{ one }}\\n…"
    options: [A, B, C, D]             # columns, one each; or the one column that holds them all
    answer: answer                    # the column, or a template (options too, if it writes a list)
    metrics: [acc]                    # the first is the headline

Templates are Jinja in the sandbox (tokens/sandbox.py). They see the row's columns, `group` (by its
name in `names`), `options` and `letters`. A column of a column is written a.b. The text that a model
gets is

    intro + (example's prompt + delimiter + its answer + blank line) for each + prompt
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from herdbook import config
from herdbook.errors import ConfigError, DataError, FetchError, UnknownName, nearest
from herdbook.evaluation.tasks import foreign
from herdbook.tokens import sandbox

FOLDER = Path(__file__).parent / "shipped"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: what templates are given besides a row's columns
GIVEN = frozenset({"group", "options", "letters"})
#: what can be told from the likelihoods of choices (choices.py)
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "mrr", "mrr_bytes", "mass")
TEXT_METRICS = ("bits_per_byte", "perplexity")
#: what a judge says of a reply (judged.py)
JUDGED_METRICS = ("safe",)
#: how a score over questions becomes one: each question, or each group, counts the same
Average = Literal["question", "group"]


@dataclass(frozen=True)
class Task:
    """One task; every field is a key of its YAML file, `name` the file's own name."""

    name: str
    about: Any
    version: int
    kind: Literal["choice", "generate", "text"]
    data: str
    metrics: tuple[str, ...]
    source: str = ""
    licence: str = ""
    shots: int = 0
    shots_data: str = ""
    shots_by_group: bool = False
    id: str = ""  # column; empty: the row's number, from 1
    group: str = ""
    names: Any = field(default_factory=dict)  # group → what the prompt calls it
    intro: str = ""
    prompt: str = ""
    delimiter: str = " "  # between the prompt and an answer
    target: str = ""  # template of an example's answer; empty: the answer itself
    options: Any = ()
    scored: Literal["letter", "text"] = "letter"  # what of an option is scored
    pool: int = 0  # options are filled up to so many, drawn from the other rows'
    answer: str = "answer"  # empty: replies are told by a judge, and need none
    #: how the answer names an option; labels: each option has its own mark, 1 or 0
    answer_is: Literal["any", "letter", "number", "text", "labels"] = "any"
    average: Average = "question"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    window: int = 1024  # text: tokens seen at once
    chat: bool = False  # asked by the model's chat template, always
    language: Literal["en", "zh"] = "en"  # that a judge is spoken to in
    folder: Path | None = None  # of a user's own YAML

    def __post_init__(self) -> None:
        for name in ("intro", "prompt", "target"):
            columns(getattr(self, name), f"task {self.name}: {name}")
        if not self.metrics or not self.data or self.version < 1:
            raise self.wrong("needs data, metrics and a version from 1")
        if self.kind != "text" and not self.prompt:
            raise self.wrong("needs a prompt")
        if self.kind == "choice" and not self.options:
            raise self.wrong("is of kind choice, so it needs options")
        known = {"choice": CHOICE_METRICS, "text": TEXT_METRICS}.get(self.kind)
        for metric in self.metrics:
            if known and metric not in known:
                raise ConfigError(
                    f"task {self.name}: metric {metric!r}",
                    rule=f"is none of a task of kind {self.kind}",
                    next=nearest(metric, known),
                )
        if self.shots and not self.shots_data:
            raise self.wrong("has shots, so it needs shots_data")
        if not self.answer and not self.judged:
            raise self.wrong("has no judge to tell a reply's worth, so it needs an answer")

    @property
    def judged(self) -> bool:
        """Whether a judge must look at the replies."""
        return self.kind == "generate" and any(one in JUDGED_METRICS for one in self.metrics)

    def wrong(self, rule: str) -> ConfigError:
        return ConfigError(f"task {self.name}", rule=rule, next="herd tasks mmlu shows one")

    def with_shots(self, shots: int | None) -> Task:
        """The same with so many examples; None leaves the task's own number."""
        if shots is None or shots == self.shots:
            return self
        if shots < 0:
            raise ConfigError(f"{shots} shots", rule="cannot be", next="give 0 or more")
        if shots and not self.shots_data:
            raise ConfigError(
                f"{shots} shots",
                rule=f"but task {self.name} has no file of examples (shots_data)",
                next="leave --shots out, or write the task as YAML (herd tasks mmlu shows one)",
            )
        return replace(self, shots=shots)

    def fill(self, which: str, words: Mapping[str, Any]) -> str:
        """The template in field `which`, with a row's words."""
        return self.rendered(getattr(self, which), words, which)

    def rendered(self, source: str, words: Mapping[str, Any], which: str) -> str:
        """What a template writes; `which` field it stands in, for the error."""
        body = source.rstrip("\n")  # Jinja drops the last line's end
        try:
            return sandbox.render(sandbox.compile(body), words) + source[len(body) :]
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"task {self.name}: {which}", rule=f"fails: {error}") from error

    def asked(self) -> dict[str, Any]:
        """What decides how a row is asked and scored, for the hash of prompts."""
        other = {"name", "about", "data", "shots_data", "source", "licence", "folder"}
        return {key: value for key, value in config.to_mapping(self).items() if key not in other}

    def file(self, name: str) -> Path:
        """Where a file of this task lies; fetched if it is one of the hub's. DataError if nowhere."""
        if name.startswith("hf:"):
            return fetched(name)
        here = (self.folder or Path()) / name
        if Path(name).is_absolute() or (self.folder is not None and here.is_file()):
            return here
        home = os.environ.get("HERDBOOK_DATA")
        if home and (path := Path(home).expanduser() / name).is_file():
            return path
        where = f"{home} ($HERDBOOK_DATA)" if home else "any folder: HERDBOOK_DATA is not set"
        raise DataError(
            f"task {self.name}: {name} is not in {where};",
            rule="Herdbook brings no test sets along",
            next=f"get {self.source or 'the data'} (licence: {self.licence or 'see there'}), put it "
            f"as FOLDER/{name}, one JSON object a line{self._columns()}, and set "
            "HERDBOOK_DATA=FOLDER",
        )

    def _columns(self) -> str:
        named = sorted(self.needs())
        return f" with {', '.join(named)}" if named else ""

    def needs(self) -> set[str]:
        """The columns that a row must have."""
        if self.kind == "text":
            return set()
        of = [self.options] if isinstance(self.options, str) else [*self.options]
        of += [one for one in (self.answer, self.group, self.id) if one]
        read = {one.partition(".")[0] for one in of if "{" not in one}
        for source in (self.prompt, self.intro, *(one for one in of if "{" in one)):
            read |= columns(source, self.name) - GIVEN
        return read

    @property
    def present(self) -> bool:
        """Whether its files are here already."""
        names = [self.data, *([self.shots_data] if self.shots else [])]
        try:
            return not any(one.startswith("hf:") for one in names) and all(map(self.file, names))
        except DataError:
            return False


@dataclass(frozen=True)
class Group:
    """Several tasks under one name, and how their headlines become one figure."""

    name: str
    about: Any
    version: int
    tasks: tuple[str, ...]
    average: Literal["task"] = "task"  # each task counts the same


def read(ref: str) -> Task | Group:
    """A shipped task or group by its name, or a .yaml file of the user's own."""
    path = Path(ref).expanduser() if ref.endswith((".yaml", ".yml")) else FOLDER / f"{ref}.yaml"
    own = path.parent != FOLDER
    if (not own and ref not in shipped()) or not path.is_file():
        rule = "is not there" if own else "is not known"
        raise UnknownName(f"task {ref!r}", rule=rule, next=nearest(ref, shipped()))
    return _parsed(path, own)


def _parsed(path: Path, own: bool) -> Task | Group:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())  # PyYAML's own takes several lines
        raise ConfigError(f"{path}", rule=f"is not YAML: {told}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}", rule="must be a mapping", next="herd tasks mmlu shows one")
    if foreign.is_theirs(content):
        content = foreign.translated(content, path)
    kind: type[Task | Group] = Group if "tasks" in content else Task
    given = {"name": path.stem, "about": "", "version": 1} | content
    known = {one.name: _needed(one) for one in fields(kind)}
    missing = [name for name, needed in known.items() if needed and name not in given]
    if missing and known.keys() >= given.keys():  # else an unknown key is told first: it may be it
        raise ConfigError(
            f"{path}", rule=f"lacks {', '.join(missing)}", next="herd tasks mmlu shows one"
        )
    if "folder" in content:
        raise ConfigError(f"{path}: folder", rule="is the file's own", next="leave it out")
    if kind is Task and own:
        given["folder"] = path.parent
    return config.from_mapping(kind, given, where=f"task {path.stem}")


def _needed(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def shipped() -> tuple[str, ...]:
    """The names of the tasks and groups that come with Herdbook."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@functools.lru_cache(maxsize=256)
def columns(source: str, where: str) -> frozenset[str]:
    """The names that a template takes from a row."""
    try:
        return frozenset(sandbox.variables(source))
    except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
        raise ConfigError(where, rule=f"is no Jinja template: {error}") from error


def fetched(ref: str) -> Path:
    """hf:org/name/path/in/it.jsonl: one file of a data set on the Hugging Face hub, in its cache."""
    parts = ref.removeprefix("hf:").split("/", 2)
    if len(parts) < 3 or not parts[2].removesuffix(".gz").endswith((".jsonl", ".json", ".txt")):
        raise ConfigError(
            f"{ref}",
            rule="must be hf:org/name/file, the file .jsonl, .json or .txt (or one of them .gz)",
            next="turn another format, such as parquet, into JSONL and give that file",
        )
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            huggingface_hub.hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"{ref} could not be fetched ({reason})",
            rule="the hub must be reachable and hold that file in a public data set",
            next="check the name and the network, or name a file that is here",
        ) from error


@dataclass(frozen=True)
class Item:
    """One question, ready to be asked."""

    id: str
    group: str
    intro: str
    shots: Sequence[tuple[str, str]]  # prompt, delimiter and answer; shared by the items of a group
    prompt: str
    delimiter: str
    choices: tuple[str, ...] = ()  # what is scored of each option
    right: tuple[int, ...] = ()  # of the choices, those that are right
    answer: str = ""  # the reference for a generated reply
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row as it stands in the file

    def context(self, shots: int | None = None) -> str:
        """All that comes before the answer, with the first `shots` examples (default: all)."""
        some = self.shots if shots is None else self.shots[:shots]
        return self.intro + "".join(f"{asked}{said}\n\n" for asked, said in some) + self.prompt
