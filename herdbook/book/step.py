"""A step: one frozen dataclass that is the YAML mapping, the flags and the Python call.

    @dataclass(frozen=True)
    class Merge(Step):
        \"\"\"Fold an adapter into the model it was trained on.\"\"\"

        kind: ClassVar[str] = "model"
        model: Input = ""
        adapter: Input = ""

        def make(self, bench: Bench) -> dict[str, Any]:
            ...write files into bench.out, read bench.artifact("model").path...
            return {"parameters": 134_515_008}          # metrics

`Step.run(book)` looks the step's key up in the book (same step, same settings, same parents: nothing
to do), gives it a desk to work at, and commits what it wrote, whole or not at all. The working folder
survives a kill; a step that wants to go on where it stopped keeps its state in `bench.work`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from herdbook import config, versions
from herdbook.book.book import Artifact, Book
from herdbook.book.hashing import digest
from herdbook.errors import BookError, CapacityError, ConfigError, HerdbookError
from herdbook.progress import Progress

INPUT = "reference to an artifact"
#: a step's field that names an artifact in the book (or, in a recipe, an earlier step)
Input = Annotated[str, INPUT]
#: several of them, in an order that matters
Inputs = Annotated[tuple[str, ...], INPUT]
HOW = "how it is computed, not what"
#: a step's field that says how the machines at hand are used. It is in neither the key nor the id:
#: what one process made need not be made again by eight. Floating-point numbers added in another
#: order may differ in their last bits; the id covers the bytes, so such artifacts have two ids.
How = Annotated[str, HOW]


@dataclass
class Bench:
    """What a step works with: its inputs, its folders, its progress."""

    book: Book
    inputs: dict[str, tuple[Artifact, ...]]  # by field name
    work: Path  # survives a kill; deleted once the artifact is in the book
    out: Path  # becomes the artifact's files
    progress: Progress = field(default_factory=Progress)
    teacher: Callable[[Artifact], Any] | None = None  # opens a model as a Teacher

    def artifact(self, name: str) -> Artifact:
        """The one artifact that field `name` refers to."""
        (one,) = self.inputs[name]
        return one


@dataclass(frozen=True)
class Step(ABC):
    """Base of all steps. Fields are the settings; their defaults have their one home here."""

    kind: ClassVar[str]  # of the artifact it makes
    revision: ClassVar[int] = 1  # raised when equal settings would now make other bytes
    #: the inputs that name the model of which this step makes another, the first that is given; a recipe
    #: compares the two
    changes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make(self, bench: Bench) -> dict[str, Any]:
        """Write the artifact's files into `bench.out`; return its metrics (flat: name → number, text)."""

    def check(self) -> None:  # noqa: B027 (most steps have nothing to check beforehand)
        """Raise for settings that cannot be. A recipe checks all its steps before it runs one."""

    def check_model(self, path: Path) -> None:  # noqa: B027 (most steps take any model)
        """Raise for a model of which the step could do nothing. A recipe asks about the one that the
        step's own will grow from as soon as it is there, before the steps between."""

    def fingerprint(self) -> dict[str, str]:
        """Hashes of what lies outside the book (a user's file), so that the key covers its bytes."""
        return {}

    @classmethod
    def input_fields(cls) -> tuple[str, ...]:
        return cls._marked(INPUT)

    @classmethod
    def _marked(cls, mark: str) -> tuple[str, ...]:
        """The fields whose type has this mark."""
        hints = get_type_hints(cls, include_extras=True)
        return tuple(
            f.name
            for f in dataclasses.fields(cls)
            if mark in getattr(hints[f.name], "__metadata__", ())
        )

    def settings(self) -> dict[str, Any]:
        """Plain data of all fields that decide what is made."""
        how = self._marked(HOW)
        return {name: value for name, value in config.to_mapping(self).items() if name not in how}

    @classmethod
    def many(cls, name: str) -> bool:
        """Whether input `name` takes several artifacts."""
        return get_type_hints(cls)[name] is not str

    def with_inputs(self, resolve: Callable[[str], str]) -> Step:
        """The same step with every reference passed through `resolve`; empty ones stay empty."""
        changes: dict[str, Any] = {}
        for name in self.input_fields():
            value = getattr(self, name)
            if isinstance(value, tuple):
                changes[name] = tuple(resolve(one) for one in value)
            elif value:
                changes[name] = resolve(value)
        return dataclasses.replace(self, **changes)

    def resolved(self, book: Book) -> Step:
        """The same step with ids in place of names: what its key is made from."""
        return self.with_inputs(lambda ref: book.get(ref).id)

    def called(self) -> str | None:
        """A name of its own in the book, whatever recipe it stands in (a base model has one)."""
        return None

    def key(self) -> str:
        """Hash of what decides the bytes: step, revision, settings, parents, outside files."""
        return digest(
            {
                "step": type(self).__name__,
                "revision": self.revision,
                "settings": self.settings(),
                "outside": self.fingerprint(),
            }
        )

    def run(
        self,
        book: Book,
        *,
        name: str | None = None,
        teacher: Callable[[Artifact], Any] | None = None,
        progress: Progress | None = None,
    ) -> Artifact:
        """The artifact of this step: from the book when it is there, else made and entered.

        name: its name in the book (default: the step's own, else its class in lower case).
        """
        self.check()
        step = self.resolved(book)
        inputs: dict[str, tuple[Artifact, ...]] = {}
        for one in step.input_fields():
            value = getattr(step, one)
            refs = value if isinstance(value, tuple) else (value,) if value else ()
            inputs[one] = tuple(book.get(ref) for ref in refs)
            for artifact in inputs[one]:
                if not book.whole(artifact):
                    raise BookError(
                        f"{artifact.ref} is damaged: its files are not those that its id covers",
                        rule="and nothing is made from it",
                        next=f"herd verify {artifact.ref}; its recipe, given again, makes it anew",
                    )
        name = name or self.called() or type(self).__name__.lower()
        key = step.key()
        if (known := book.by_key(key, name)) is not None:
            return known
        with book.desk(key) as work, _disk_errors():
            if (known := book.by_key(key, name)) is not None:
                return known
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            bench = Bench(book, inputs, work, out, progress or Progress(), teacher)
            metrics = step.make(bench)
            return book.add(
                out,
                kind=step.kind,
                name=name,
                parents=[a.id for group in inputs.values() for a in group],
                step=type(step).__name__,
                key=key,
                config=step.settings(),
                metrics=metrics,
                versions=versions.all(),
            )


@contextmanager
def named(step: Step, name: str) -> Iterator[None]:
    """Let errors speak of the step's settings as the user writes them: «sft.rank» in a recipe whose
    step is called sft, where the step itself says «tune.rank»; "": «rank»."""
    kinds = [one.__name__.lower() for one in type(step).__mro__ if issubclass(one, Step)]
    settings = "|".join(one.name for one in dataclasses.fields(step))
    said = re.compile(rf"\b(?:{'|'.join(kinds)})\.(?=(?:{settings})\b)")
    try:
        yield
    except HerdbookError as error:
        for part in ("what", "rule", "next"):
            setattr(error, part, said.sub(name and f"{name}.", getattr(error, part)))
        raise


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk and a read-only place, told as such."""
    import errno

    from safetensors import SafetensorError

    try:
        yield
    except (sqlite3.OperationalError, SafetensorError) as error:
        if "disk is full" in str(error) or f"os error {errno.ENOSPC}" in str(error):
            raise _full() from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full() from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise BookError(
                f"{error.filename}",
                rule="cannot be written",
                next="set HERDBOOK_HOME to a folder of yours",
            ) from error
        raise


def _full() -> CapacityError:
    return CapacityError(
        "the disk is full",
        rule="and the step could not be finished; the book is as it was",
        next="free some space, then give the same command again: it goes on from there",
    )


def require(step: Step, *names: str) -> None:
    """Raise where one of the named settings is empty."""
    for name in names:
        if not getattr(step, name):
            raise ConfigError(
                f"{type(step).__name__.lower()}.{name} is empty",
                rule="but the step needs it",
                next=f"set {name}",
            )
