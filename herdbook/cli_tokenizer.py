"""`herd tokenizer`: train, extend, prune, fertility."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from herdbook.terminal import Json, book, console, print_json

if TYPE_CHECKING:
    from herdbook.book.book import Artifact

app = App(
    name="tokenizer",
    help="Train, extend, prune and compare tokenizers.\n\nText is files (plain or conversations, also "
    ".gz) or datasets of the book; what is made goes into the book.\n\n"
    "Example: herd tokenizer fertility my-notes.txt --before smollm2",
)


def _made(artifact: Artifact, as_json: bool) -> None:
    if as_json:
        print_json(artifact.to_mapping())
        return
    from herdbook.book.tree import human_metric

    told = ", ".join(human_metric(name, value) for name, value in artifact.metrics.items())
    print(f"{artifact.ref}: {told}\n{artifact.path}")


@app.command
def train(
    *text: str,
    algorithm: Literal["bpe", "unigram", "bytes"] = "bpe",
    size: int = 8_000,
    name: str = "",
    json: Json = False,
) -> None:
    """Train a tokenizer on your text. The same text and settings give the same tokenizer.

    Its pieces can extend a model's: herd tokenizer extend MODEL NAME.

    Example: herd tokenizer train my-notes.txt --size 8000 --name notes

    Parameters
    ----------
    text
        text files or datasets of the book
    algorithm
        bpe or unigram (SentencePiece, as LLaMA and T5), or bytes (byte-level BPE, as Qwen)
    size
        how many tokens, with the 256 bytes and the special ones
    name
        its name in the book (default: traintokenizer)
    """
    from herdbook.model.vocabulary import split
    from herdbook.progress import for_terminal
    from herdbook.tokens.train import TrainTokenizer

    files, data = split(text, book())
    step = TrainTokenizer(text=files, data=data, algorithm=algorithm, size=size)
    _made(step.run(book(), name=name or None, progress=for_terminal()), json)


@app.command
def extend(ref: str, pieces: str, /, *, name: str = "", json: Json = False) -> None:
    """Append the pieces of a second tokenizer, and give the model rows for them.

    Both are SentencePiece, as LLaMA's. Ids stay; each new row of the embedding and the head begins as
    the mean of its old pieces' rows. The model has to be trained before it writes the new pieces.

    Example: herd tokenizer extend path/to/llama chinese_sp.model --name llama-zh

    Parameters
    ----------
    ref
        a model, or a tokenizer alone
    pieces
        a tokenizer of the book or a file: notes, chinese_sp.model
    name
        its name in the book (default: the model's with -extended)
    """
    from herdbook.model import vocabulary
    from herdbook.progress import for_terminal

    _made(vocabulary.extend(ref, pieces, book(), name=name, progress=for_terminal()), json)


@app.command
def prune(ref: str, /, *text: str, name: str = "", json: Json = False) -> None:
    """Leave out the tokens that your text does not need, and their rows in the model.

    On that text the tokens stay the same, and the model gives the same logits for them. Special tokens
    and bytes are kept: other text still works, in more tokens.

    Example: herd tokenizer prune smollm2 my-notes.txt --name small

    Parameters
    ----------
    ref
        a model, or a tokenizer alone
    text
        text files or datasets of the book
    name
        its name in the book (default: the model's with -pruned)
    """
    from herdbook.model import vocabulary
    from herdbook.progress import for_terminal

    _made(vocabulary.prune(ref, text, book(), name=name, progress=for_terminal()), json)


@app.command
def fertility(*text: str, before: str, after: str = "", json: Json = False) -> None:
    """Count what a text costs: tokens a character and a word, for each script in it.

    Example: herd tokenizer fertility my-notes.txt --before smollm2 --after notes

    Parameters
    ----------
    text
        text files or datasets of the book
    before
        a model, a tokenizer of the book, a folder or a file
    after
        another one, to compare
    """
    from herdbook.model.vocabulary import split, tokenizer_of
    from herdbook.tokens import corpus
    from herdbook.tokens.fertility import fertility as measure

    files, data = split(text, book())
    texts = list(corpus.read(files, [book().get(one).path for one in data]))
    tokenizers = {"before": tokenizer_of(before, book())}
    if after:
        tokenizers["after"] = tokenizer_of(after, book())
    found = {which: measure(tokenizer, texts) for which, tokenizer in tokenizers.items()}
    if json:
        print_json(found)
        return
    for (which, tokenizer), ref in zip(tokenizers.items(), (before, after), strict=False):
        print(f"{which}: {ref}, {tokenizer.size:,} tokens")
    _table(found)


def _table(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A row a script; per tokenizer its tokens, tokens a character and tokens a word."""
    from rich.table import Table

    table = Table("script", "characters", "words", box=None)
    for which in found:
        for head in (f"tokens {which}", "per char", "per word"):
            table.add_column(head, justify="right")
    for script, count in found["before"].items():
        row = [script, f"{count['characters']:,}", f"{count['words']:,}" if count["words"] else "–"]
        for one in (counts[script] for counts in found.values()):
            word = one["tokens_per_word"]
            row += [f"{one['tokens']:,}", f"{one['tokens_per_character']:.3f}"]
            row.append("–" if word is None else f"{word:.3f}")
        table.add_row(*row)
    console().print(table)
