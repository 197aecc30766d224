"""`herd arena` and `herd judge`: models against each other, by people's votes or a judge's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from herdbook.terminal import Json, book, console, need_own_page, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from herdbook.evaluation.judging.judge import Case, Duel, Score, Summary


def arena(votes: Path, /, *, out: Path | None = None, draws: int = 300, json: Json = False) -> None:
    """Rate models by votes: Bradley–Terry with intervals, Elo, length and position.

    A line of the log: {"model_a": "cria", "model_b": "smollm2", "winner": "model_a", "anonymous": true}
    (winner: model_a, model_b or tie; lengths of the replies as length_a, length_b). Votes by those who
    saw the names are left out, and counted.

    Example: herd arena votes.jsonl --out arena.html

    Parameters
    ----------
    votes
        a log of votes, JSON lines
    out
        write a page to look at
    draws
        bootstrap draws for the intervals, 100 at least
    """
    from herdbook.errors import ConfigError
    from herdbook.evaluation.judging import votes as log
    from herdbook.evaluation.judging.arena import leaderboard

    if out:
        need_own_page(out)
    if draws < 100:
        raise ConfigError(f"--draws {draws}", rule="gives no 95 % interval", next="100 or more")
    found = log.read(votes)
    board = leaderboard(found.votes, draws=draws) | {"named_votes": found.named}
    if out:
        need_own_page(out)
        from herdbook.evaluation.judging.page import arena_page
        from herdbook.files.atomic import write_text

        write_text(out, arena_page(board, votes.name))
    if json:
        print_json(board)
        return
    _show(board)


def _show(board: dict[str, Any]) -> None:
    from rich.table import Table

    controlled = "controlled" in board["models"][0]
    names = ["rank", "model", "rating", "95 %", *(["at equal length"] * controlled), "Elo", "votes"]
    table = Table(*names, box=None)
    for row in board["models"]:
        cells = [str(row["rank"]), row["model"], f"{row['rating']:.0f}"]
        cells.append(f"{row['low']:.0f} … {row['high']:.0f}")
        cells += [f"{row['controlled']:.0f}"] if controlled else []
        table.add_row(*cells, f"{row['elo']:.0f}", f"{row['votes']:,}")
    told = console()
    told.print(table, markup=False)
    line = f"{board['votes']:,} votes, {board['ties']:,} ties"
    line += f", {board['named_votes']:,} not anonymous and left out" * bool(board["named_votes"])
    told.print(line)
    if board["position"]:
        told.print(f"what stood first won {100 * board['position']['value']:.0f} % of the decided")
    if "length_points" in board:
        told.print(f"twice the length is worth {board['length_points']:+.0f} points")
    if board["bounded"]:
        told.print(
            "a model won or lost all its votes: bounded by a tie of weight "
            f"{board['prior']:g} between every two models"
        )
    if not board["converged"]:
        told.print("the fit did not converge")


def judge(
    file: Path,
    /,
    *,
    by: str,
    by_model: str = "",
    model: str = "",
    against: str = "",
    reference: Path | None = None,
    language: Literal["en", "zh"] = "en",
    max_tokens: int = 1024,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Let a model judge answers: scores from 1 to 10, or pairs in both orders.

    A line of the file: {"question": "…", "answer": "…"}, perhaps with reference and category; or
    MT-Bench's {"turns": […]}. Replies without a verdict are dropped, and counted. A run that was stopped
    goes on when the same command is given again.

    Example: herd judge questions.jsonl --model cria --by http://127.0.0.1:8000/v1 --by-model big

    Parameters
    ----------
    file
        questions, with answers unless --model gives them
    by
        the judge: a reference to a model, or the URL of an OpenAI-compatible API (key from
        OPENAI_API_KEY)
    by_model
        the judge's name at that URL
    model
        who answers the questions, at MT-Bench's temperatures (default: the answers of the file)
    against
        compare with the answers of this model, or of this file
    reference
        a file of reference answers by question_id, such as MT-Bench's reference_answer/gpt-4.jsonl
    language
        the language that the judge is spoken to in
    max_tokens
        of an answer
    out
        write each judgement with the judge's own words, JSON lines
    """
    from functools import partial

    from herdbook.errors import ConfigError
    from herdbook.evaluation.judging import files, session, teachers
    from herdbook.evaluation.judging import judge as judging
    from herdbook.files.atomic import sha256_file
    from herdbook.progress import for_terminal

    if out:
        files.need_own_judgements(out)
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens}", rule="must be 1 or more")
    known, progress = book(), for_terminal()
    given = [file, *([reference] if reference else [])]
    opened = partial(teachers.opened, book=known)
    rival = Path(against) if against and Path(against).is_file() else None
    rows = files.read_rows(file)
    if reference:
        rows = files.with_references(rows, reference)
    cases = [] if model else files.cases_of(rows, file)
    rivals = files.cases_of(files.read_rows(rival), rival) if rival else []
    _need_same(rivals, rows, against, file)
    key = session.key(
        files=[sha256_file(one) for one in [*given, *([rival] if rival else [])]],
        models=[
            teachers.identity(*one, known)
            for one in ((by, by_model), (model, ""), ("" if rival else against, ""))
        ],
        settings=[language, max_tokens],
    )
    with known.desk(key) as work:
        if model:
            path = work / "answers.jsonl"
            cases = session.answers(partial(opened, model), rows, path, progress, max_tokens)
        if against and not rival:
            path = work / "against.jsonl"
            rivals = session.answers(partial(opened, against), rows, path, progress, max_tokens)
        ask = partial(opened, by, by_model)
        shown = [part for case in cases for part in judging.turns(case)]
        path = work / "judged.jsonl"
        judged: list[Score] | list[Duel]
        if rivals:
            others = [part for case in rivals for part in judging.turns(case)]
            pairs = list(zip(shown, others, strict=True))
            judged = session.duels(ask, pairs, language, path, progress)
        else:
            judged = session.scores(ask, shown, language, path, progress)
        if out:
            files.write_judged(out, shown, judged)
    summary = judging.summarise(judged)
    if json:
        print_json(summary.to_json())
        return
    _tell(summary, "share of wins, ties as half" if rivals else "mean of the scores")


def _tell(summary: Summary, what: str) -> None:
    if summary.mean:
        mean = summary.mean
        print(f"{what}: {mean.value:.2f} ({mean.low:.2f} … {mean.high:.2f})")
    print(f"judged {summary.judged}, without a verdict {summary.unparsed}")
    if summary.consistent is not None:
        print(f"alike in both orders: {100 * summary.consistent:.0f} %")
    if len(summary.by_turn) > 1:
        for turn, value in summary.by_turn.items():
            print(f"  turn {turn:<9} {value:.2f}")
    for name, value in summary.by_category.items():
        if name:
            print(f"  {name:<14} {value:.2f}")
    for example in summary.examples:
        print(f"  without a verdict: … {example[-200:]!r}")


def _need_same(
    rivals: Sequence[Case], rows: Sequence[Mapping[str, Any]], against: str, file: Path
) -> None:
    from herdbook.errors import DataError

    if rivals and [one.questions for one in rivals] != [tuple(row["turns"]) for row in rows]:
        raise DataError(against, rule=f"does not answer the questions of {file}", next="mend it")
