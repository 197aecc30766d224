"""`herd arena` and `herd judge`: models against each other, by people's votes or a judge's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from herdbook.terminal import Json, book, console, need_own_page, print_json

if TYPE_CHECKING:
    from herdbook.data.teacher import Teacher
    from herdbook.evaluation.judging.judge import Case, Summary


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
    language: Literal["en", "zh"] = "en",
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Let a model judge answers: scores from 1 to 10, or pairs in both orders.

    A line of the file: {"question": "…", "answer": "…"}, perhaps with reference and category; or
    MT-Bench's {"turns": […]}. Replies without a verdict are dropped, and counted.

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
        who answers the questions (default: the answers of the file)
    against
        compare with the answers of this model, or of this file
    language
        the language that the judge is spoken to in
    out
        write each judgement with the judge's own words, JSON lines
    """
    from herdbook.errors import DataError
    from herdbook.evaluation.judging import judge as judging
    from herdbook.evaluation.judging.files import read_cases, write_judged

    cases = _answers(file, model) if model else read_cases(file)
    rivals: list[Case] = []
    if against:
        rivals = read_cases(Path(against)) if Path(against).is_file() else _answers(file, against)
        if [one.questions for one in rivals] != [one.questions for one in cases]:
            raise DataError(
                against, rule=f"does not answer the questions of {file}", next="mend it"
            )
    teacher = _teacher(by, by_model)
    shown = [part for case in cases for part in judging.turns(case)]
    if rivals:
        others = [part for case in rivals for part in judging.turns(case)]
        duels = judging.compare(teacher, list(zip(shown, others, strict=True)), language)
        summary = judging.summarise(duels)
        if out:
            write_judged(out, shown, duels)
    else:
        scores = judging.score(teacher, shown, language)
        summary = judging.summarise(scores)
        if out:
            write_judged(out, shown, scores)
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
    for name, value in summary.by_category.items():
        if name:
            print(f"  {name:<14} {value:.2f}")
    for example in summary.examples:
        print(f"  without a verdict: … {example[-200:]!r}")


def _answers(file: Path, ref: str) -> list[Case]:
    from herdbook.evaluation.judging.files import read_rows
    from herdbook.evaluation.judging.judge import answer_turns

    rows = read_rows(file)
    return answer_turns(_teacher(ref, ""), rows)


def _teacher(ref: str, name: str) -> Teacher:
    """A model of ours, or one behind a URL."""
    from herdbook.errors import ConfigError

    if ref.startswith(("http://", "https://")):
        from herdbook.data.url_teacher import UrlTeacher

        if not name:
            raise ConfigError(f"--by {ref}", rule="serves several models", next="--by-model NAME")
        return UrlTeacher(ref, name)
    from herdbook.engine.loading import load
    from herdbook.model.references import resolve

    known = book()
    return load(str(resolve(ref, known)), book=known).as_teacher()
