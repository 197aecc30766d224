"""`herd`: dispatch only. Each command parses, calls one function of a room, and prints.

Heavy rooms are imported inside the commands, so that `herd --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from herdbook import cli_arena, cli_keys, cli_plan, cli_tokenizer, versions
from herdbook.errors import HerdbookError
from herdbook.terminal import Json, language, need_own_page
from herdbook.terminal import book as _book
from herdbook.terminal import console as _console
from herdbook.terminal import print_json as _print

app = App(
    name="herd",
    version=versions.VERSION,
    help="Raise your own LLaMA, and know its pedigree.\n\nStart with: herd raise cria --name Luna "
    "--keeper Acme, then: herd chat",
    version_flags=["--version"],
    help_format="markdown",
)
app.command(cli_tokenizer.app)
app.command(cli_keys.app)
app.command(cli_plan.plan)
app.command(cli_arena.arena)
app.command(cli_arena.judge)
Template = Annotated[
    str | None,
    Parameter(
        help="a chat template in place of the model's own: a file, or a name (see: herd templates)"
    ),
]

Device = Annotated[
    Literal["cpu", "cuda"] | None,
    Parameter(help="where to compute (default: cuda where torch sees a GPU, else cpu)"),
]


@app.command(name="raise")
def raise_command(
    recipe: str = "cria",
    /,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Raise a model by a recipe: only the steps that are missing are done.

    Settings of the recipe are given as --key value, fields of a step as --step.field value;
    `herd recipes cria` lists both. --profile full takes the published sizes, --plan prints the
    resolved configuration and stops. A stopped or killed run goes on where it was.

    Example: herd raise cria --name Luna --keeper "Acme"

    Parameters
    ----------
    recipe
        a shipped recipe (see: herd recipes) or a .yaml file
    """
    from herdbook import config, progress
    from herdbook import recipe as recipes
    from herdbook.training import processes

    flags: dict[str, Any] = dict(config.parse_flags(settings))
    as_json = config.convert(flags.pop("json", False), bool, where="--json")
    if config.convert(flags.pop("plan", False), bool, where="--plan"):
        steps = recipes.Recipe.read(recipe).resolve(flags)
        _print(
            {
                name: {"do": type(step).__name__, **config.to_mapping(step)}
                for name, step in steps.items()
            }
        )
        return
    with processes.crew() as leads:
        if not leads:
            return
        raised = recipes.raise_(recipe, progress=progress.for_terminal(), **flags)
    if as_json:
        _print(
            {
                "result": raised.artifact.to_mapping(),
                "made": [one.ref for one in raised.made],
                "kept": [one.ref for one in raised.kept],
                "reports": {one.ref: dict(one.metrics) for one in raised.reports},
            }
        )
        return
    console = _console()
    if not raised.made:
        console.print(f"Nothing to do: {raised.artifact.ref} is raised with these very settings.")
    else:
        from herdbook.book import tree

        console.print(tree.draw(_book(), raised.artifact))
    console.print(f"next: herd chat {raised.artifact.name}   (or: serve, show, tree)", markup=False)


@app.command
def chat(
    ref: str = "",
    /,
    *,
    prompt: Annotated[str | None, Parameter(name=["--prompt", "-p"])] = None,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tokens: int = 512,
    template: Template = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Talk to a model; with -p print one reply, alone, on stdout.

    Example: herd chat cria -p "Who are you?"

    Parameters
    ----------
    ref
        a name in the book, a folder, a .gguf file, smollm2 or hf:org/name (default: the model
        raised last)
    prompt
        one question; the reply goes to stdout and nothing else does
    system
        a system message
    temperature
        0 takes the likeliest token each time
    """
    from herdbook.engine.loading import load
    from herdbook.engine.request import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    name = ref or _latest()
    model = load(name, template=template, device=device)
    from herdbook.serving.chat import chat as talk  # while the weights are packed

    talk(model, name, sampling, prompt=prompt, system=system, as_json=json)


@app.command
def serve(
    *refs: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str = "",
    memory: str = "",
    idle: str = "",
    workers: int = 1,
    cluster: bool = False,
    template: Template = None,
    lora: list[str] | None = None,
    cache: Literal["float32", "bfloat16", "int8"] | None = None,
    speculate: bool = False,
    device: Device = None,
) -> None:
    """Serve models over OpenAI's API: chat, completions, embeddings, models, health, metrics.

    Listens on this machine only; another --host needs a key (herd keys add NAME, or --key).

    Example: herd serve cria smollm2 --memory 4GB --idle 10m

    Parameters
    ----------
    refs
        one or more models (default: the model raised last)
    key
        clients must send it as a bearer token (or set HERDBOOK_API_KEY)
    lora
        NAME=REF, an adapter that clients choose as the model NAME; may be given several times
    memory
        what all models together may take, caches included, such as 4GB: each is loaded when it is
        first asked for, and the one idle longest makes room (default: all are loaded, and stay)
    idle
        unload a model after so long without a request, such as 10m
    workers
        so many processes share the requests, each with the models in its own memory
    cluster
        spread the workers over the machines of the Ray cluster that RAY_ADDRESS names; --memory is
        then for each of them
    cache
        how keys and values are kept (default: as the model computes, or in less where room is short)
    speculate
        guess the next tokens from the text so far and check several at once: the same replies, sooner
        where texts repeat themselves
    """
    # Prompts hardly ever have the same length twice: kernels kept for each (a thousand by default) are
    # memory that only grows. Read when torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    from herdbook import config
    from herdbook.serving.server import serve as run
    from herdbook.serving.setup import named

    run(
        list(refs) or [_latest()],
        host=host,
        port=port,
        key=key or os.environ.get("HERDBOOK_API_KEY") or None,
        template=template,
        adapters=named(lora or []),
        memory_bytes=config.size(memory, where="--memory") if memory else None,
        idle_s=config.duration(idle, where="--idle") if idle else None,
        workers=workers,
        cluster=cluster,
        cache=cache,
        speculate=speculate,
        device=device,
    )


@app.command(name="eval")
def eval_command(
    ref: str = "",
    /,
    *,
    text: Path | None = None,
    task: list[str] | None = None,
    limit: int = 0,
    shots: int | None = None,
    seeds: str = "0",
    chat: bool = False,
    judge: str = "",
    judge_name: str = "",
    suite: Literal["health"] | None = None,
    prompts: str = "",
    samples: int = 3,
    json: Json = False,
) -> None:
    """Measure a model: perplexity, identity where it was taught one, size, speed, memory; or, with
    --task, how well it does a task; or, with --suite health, whether it repeats itself, loops, disagrees
    with itself or invents. What a task or a suite gives is a report in the book.

    Example: herd eval cria --task mmlu --limit 200

    Parameters
    ----------
    ref
        any reference to a model (default: the model raised last)
    text
        a UTF-8 text for the perplexity (default: a short text of Herdbook's own)
    task
        a task or group (see: herd tasks), a task's .yaml, a .jsonl of your own questions, or a .txt; may
        be given several times
    limit
        so many questions of each task or suite, spread evenly over its file (default: all)
    shots
        examples before each question (default: as the task says)
    seeds
        of replies that are drawn; several, such as 0,1,2, give mean and spread
    chat
        ask by the model's chat template (default: as plain text to go on with)
    judge
        who judges the replies, for tasks that need it: a reference to a model, or the URL of an
        OpenAI-compatible API (key from OPENAI_API_KEY)
    judge_name
        the judge's name at that URL
    suite
        health: loops, repetition, self-consistency, faithfulness to passages
    prompts
        a file of prompts for the suite, JSON lines (default: 20 of Herdbook's own in each language)
    samples
        of each prompt, for self-consistency
    """
    from herdbook.errors import ConfigError

    if task and suite:
        raise ConfigError("--task and --suite", rule="are two runs", next="give one of them")
    for flag, given, of, there in (
        ("--judge", judge or judge_name, "--task", task),
        ("--prompts", prompts, "--suite", suite),
    ):
        if given and not there:
            raise ConfigError(f"{flag} without {of}", rule="has nothing to do", next=f"give {of}")
    if suite:
        from herdbook.evaluation.health import lines as told_lines
        from herdbook.evaluation.run import health

        report, found = health(
            ref or _latest(), _book(), prompts=prompts, limit=limit, samples=samples
        )
        if json:
            _print({report.ref: found})
            return
        print("\n".join(told_lines(found)) + f"\n  in the book: {report.ref}")
        return
    if task:
        from herdbook import config
        from herdbook.evaluation.run import run

        drawn = config.convert(seeds, tuple[int, ...], where="--seeds")
        told = [*task, *([str(text)] if text else [])]
        reports = run(
            ref or _latest(), told, _book(), limit=limit, shots=shots, seeds=drawn, chat=chat,
            judge=judge, judge_name=judge_name,
        )  # fmt: skip
        if json:
            _print({report.ref: figures for report, figures in reports})
            return
        from herdbook.evaluation.tasks.told import lines

        for report, figures in reports:
            print("\n".join(lines(figures)) + f"\n  in the book: {report.ref}")
        return
    from herdbook.evaluation.evaluate import evaluate

    found = evaluate(ref or _latest(), _book(), text=text)
    if json:
        _print(found)
        return
    from herdbook.book.tree import human_metric

    for name, value in found.items():
        print(human_metric(name, value))


@app.command
def compare(
    before: str,
    after: str,
    /,
    *,
    task: list[str] | None = None,
    limit: int = 0,
    text: Path | None = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Is one model better than another: at what, by how much, with what certainty, at what cost?

    Example: herd compare smollm2 cria --task mmlu --limit 200 --out page.html

    Parameters
    ----------
    before
        any reference to a model: what the other is compared with
    after
        the other
    task
        a task or group that both are asked (see: herd tasks); may be given several times
    limit
        so many questions of each task (default: all)
    text
        a UTF-8 text for the perplexity (default: a short text of Herdbook's own)
    out
        a file for the page, with plots
    """
    from herdbook.evaluation import run
    from herdbook.evaluation.answer import answer, lines, read_report
    from herdbook.files.atomic import write_text

    if out is not None:
        need_own_page(out)
    report = run.compare(
        before, after, _book(), tasks=task or (), limit=limit, text=str(text) if text else ""
    )
    found = read_report(report)
    if out is not None:
        write_text(out, (report.path / "report.html").read_text(encoding="utf-8"))
    if json:
        _print(found | {"answer": answer(found)})
        return
    print("\n".join(lines(found)) + f"\n  in the book: {report.ref}")
    if out is not None:
        print(f"  the page: {out}")


@app.command
def tasks(name: str = "", /, *, json: Json = False) -> None:
    """List the tasks that herd eval knows: what they are and whether their data are here; with a name,
    show that one.

    Example: herd tasks mmlu

    Parameters
    ----------
    name
        a task or group of the list, a .yaml file, or a .jsonl of your own questions
    """
    from herdbook.evaluation.tasks import told

    found = told.task(name) if name else told.tasks()
    if json:
        _print(found)
    elif name:
        import yaml

        print(yaml.safe_dump(found, allow_unicode=True, sort_keys=False, width=100), end="")
    else:
        for one, row in found.items():
            print(f"{one:<15} {row['state']:<10} {row['about'][language()]}")
        print(
            "\nherd eval REF --task NAME asks one; herd tasks NAME shows its prompt and its source"
        )


@app.command
def export(
    ref: str,
    path: Path,
    /,
    *,
    to: Literal["hf", "gguf", "peft"],
    quant: str = "",
    json: Json = False,
) -> None:
    """Write a model for other tools, and check that it still says the same.

    hf: a Hugging Face folder. gguf: a file for llama.cpp (--quant F16, Q8_0, Q4_1 …). peft: the
    adapter that the model was tuned with.

    Example: herd export cria --to gguf luna.gguf

    Parameters
    ----------
    ref
        any reference to a model
    path
        where to write; must not be there yet
    """
    from herdbook.evaluation.export import export as write

    done = write(ref, path, to=to, quant=quant, book=_book())
    if json:
        _print(done)
        return
    from herdbook.book.tree import human_metric

    print(f"{path}: " + ", ".join(human_metric(name, value) for name, value in done.items()))


delta = App(
    name="delta",
    help="Keep a tuned model as its difference from the base: make one, or apply it.\n\n"
    "Example: herd delta make llama-7b vicuna-7b vicuna-7b-delta",
    help_format="markdown",
)
app.command(delta)


@delta.command(name="make")
def delta_make(base: str, tuned: str, path: Path, /, *, json: Json = False) -> None:
    """Write the difference of a tuned model from its base, exact to the last bit.

    Example: herd delta make llama-7b vicuna-7b vicuna-7b-delta

    Parameters
    ----------
    base
        any reference to the model that was tuned
    tuned
        any reference to what it became: a Hugging Face folder or a model in the book
    path
        the folder to write; must not be there yet
    """
    _delta("make", base, tuned, path, json, called=Path(base).name)


@delta.command(name="apply")
def delta_apply(
    base: str,
    difference: str,
    path: Path,
    /,
    *,
    unchecked: bool = False,
    expect: str = "",
    new_rows: Literal["zeros", "mean"] = "zeros",
    json: Json = False,
) -> None:
    """Make the tuned model again of its base and the difference; another base is refused.

    Example: herd delta apply llama-7b vicuna-7b-delta vicuna-7b

    Deltas that were made by other tools (Vicuna's, ExpertLLaMA's) do not say of which base they
    are: they are applied with --unchecked, or with --expect.

    Parameters
    ----------
    base
        any reference to the model that the difference was made from
    difference
        the folder that herd delta make wrote, or one of another tool's
    path
        the folder to write; must not be there yet
    unchecked
        take a difference that cannot tell whether the base is the right one
    expect
        the digest that the result must have (an earlier apply printed it)
    new_rows
        of another tool's delta, what its rows of words new to the base were taken from: zeros
        (FastChat's: Vicuna, ExpertLLaMA) or the mean of the base's rows (Stanford Alpaca's)
    """
    _delta(
        "apply", base, difference, path, json,
        unchecked=unchecked, expect=expect, new_rows=new_rows,
    )  # fmt: skip


def _delta(what: str, base: str, other: str, path: Path, as_json: bool, **more: Any) -> None:
    from herdbook.model import delta as deltas
    from herdbook.model.references import resolve
    from herdbook.progress import for_terminal

    book, progress = _book(), for_terminal()
    do: Callable[..., dict[str, Any]] = deltas.make if what == "make" else deltas.apply
    done = do(resolve(base, book), resolve(other, book), path, progress=progress, **more)
    if as_json:
        _print(done)
        return
    from herdbook.book.tree import human_metric

    print(f"{path}: " + ", ".join(human_metric(name, value) for name, value in done.items()))


@app.command(name="list")
def list_command(*, kind: str | None = None, json: Json = False) -> None:
    """List the artifacts of the book, oldest first.

    Example: herd list --kind model

    Parameters
    ----------
    kind
        dataset, tokenizer, model, adapter, report or index
    """
    from herdbook.book.book import KINDS
    from herdbook.errors import ConfigError, nearest

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"kind {kind!r}", rule="is not known", next=nearest(kind, KINDS))
    artifacts = _book().entries(kind)
    if json:
        _print([artifact.to_mapping() for artifact in artifacts])
        return
    from rich.table import Table

    from herdbook.book.tree import human_bytes

    table = Table("name", "kind", "step", "size", "id", "made", box=None)
    for one in artifacts:
        table.add_row(
            one.ref,
            one.kind,
            one.step,
            human_bytes(one.size_bytes),
            one.short[:8],
            one.created[:19],
        )
    console = _console()
    console.print(table if artifacts else "The book is empty. Start with: herd raise cria")


@app.command
def show(
    ref: str = "", /, *, out: Path | None = None, open: bool = False, json: Json = False
) -> None:
    """Write an artifact's page (HTML): pedigree, loss curve, before and after; print where it is.

    Example: herd show cria --open

    Parameters
    ----------
    ref
        an artifact of the book (default: the model raised last)
    out
        the file to write (default: pages/REF.html in the book's home)
    open
        open it in the browser
    """
    book = _book()
    artifact = book.get(ref or _latest())
    if json:
        _print(artifact.to_mapping())
        return
    from herdbook.evaluation.page import page
    from herdbook.files.atomic import write_text

    target = out or book.home / "pages" / f"{artifact.ref}.html"
    if out:
        need_own_page(out)
    write_text(target, page(artifact, book))
    print(target)
    if open:
        import webbrowser

        webbrowser.open(target.absolute().as_uri())


@app.command
def tree(ref: str = "", /, *, json: Json = False) -> None:
    """Draw the pedigree of an artifact, with metrics.

    Example: herd tree cria

    Parameters
    ----------
    ref
        an artifact of the book (default: the model raised last)
    """
    from herdbook.book import tree as drawing

    book = _book()
    artifact = book.get(ref or _latest())
    if json:
        _print(drawing.to_mapping(book, artifact))
    else:
        _console().print(drawing.draw(book, artifact))


@app.command
def verify(ref: str | None = None, /, *, json: Json = False) -> None:
    """Recompute the hashes of an artifact with its ancestors, or of the whole book.

    Ends with exit code 1 when something was changed.

    Example: herd verify cria
    """
    checked, problems = _book().verify(ref)
    if json:
        _print(
            {
                "checked": [one.ref for one in checked],
                "problems": [{"ref": one.artifact.ref, "what": one.what} for one in problems],
            }
        )
    else:
        for one in problems:
            print(f"{one.artifact.ref}: {one.what}")
        print(f"{len(checked)} artifacts checked, {len(problems)} problems")
    if problems:
        sys.exit(1)


@app.command
def recipes(name: str = "", /, *, json: Json = False) -> None:
    """List the recipes; with a name, list what can be set in it.

    Example: herd recipes cria
    """
    from herdbook import config
    from herdbook import recipe as recipes_

    if not name:
        abouts = {one: recipes_.Recipe.read(one).about for one in recipes_.shipped()}
        if json:
            _print(abouts)
        else:
            for one, about in abouts.items():
                print(f"{one:<18} {about[language()]}")
            print(
                "\nherd recipes NAME lists what can be set, herd raise NAME --data FILE raises one"
            )
        return
    recipe = recipes_.Recipe.read(name)
    steps = recipe.resolve({})
    plain = {
        "about": dict(recipe.about),
        "source": recipe.source,
        "settings": dict(recipe.settings),
        "profiles": {name: dict(changes) for name, changes in recipe.profiles.items()},
        "steps": {
            name: {"do": type(step).__name__, **config.to_mapping(step)}
            for name, step in steps.items()
        },
    }
    if json:
        _print(plain)
        return
    import yaml

    print(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=100), end="")


@app.command
def templates(name: str = "", /, *, json: Json = False) -> None:
    """List the chat templates for models that bring none; with a name, print that one.

    Example: herd templates vicuna

    Parameters
    ----------
    name
        a template of the list, or a file
    """
    from herdbook.tokens import templates as shipped

    sources = {one: shipped.read(one) for one in ([name] if name else shipped.shipped())}
    if json:
        _print(sources)
    elif name:
        print(sources[name], end="")
    else:
        for one, source in sources.items():
            print(f"{one:<17} {shipped.about(source)}")


@app.command
def doctor(*, json: Json = False) -> None:
    """Tell what this machine has, and what Herdbook will use of it.

    Example: herd doctor
    """
    from herdbook.doctor import examine

    found = examine()
    if json:
        _print(found)
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}")


def _latest() -> str:
    """The model raised last."""
    from herdbook.errors import UnknownName

    models = [one for one in _book().entries("model") if one.parents]
    if not models:
        raise UnknownName("the book", rule="has no raised model yet", next="herd raise cria")
    return str(models[-1].ref)


def run(command: Callable[[], Any]) -> int:
    """Run a command; its exit code. User errors are told, an interrupt says how to go on."""
    try:
        command()
    except HerdbookError as error:
        print(f"herd: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "while writing"
        print(f"herd: {where}: {error.strerror}\n  next: check the path", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nherd: stopped; what is done is kept. Give the same command again to go on.",
            file=sys.stderr,
        )
        return 130
    return 0


def main() -> None:
    """Entry point of `herd`."""
    # Imports and vocabularies make many objects that stay, and are looked through again and again.
    gc.set_threshold(100_000, 20, 100)
    # numpy's own threads start with it, and no product here is numpy's
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def command() -> None:
        try:
            app(sys.argv[1:], exit_on_error=False, print_error=False)
        except CycloptsError as error:
            print(f"herd: {error}\n  next: herd --help", file=sys.stderr)
            sys.exit(2)

    sys.exit(run(command))


if __name__ == "__main__":
    main()
