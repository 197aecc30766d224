"""Herdbook's engine as a model of lm-evaluation-harness, for the tasks that it has and Herdbook has not.

    python -m herdbook.evaluation.tasks.harness --model herdbook --model_args path=cria --tasks arc_easy

takes all that `lm_eval` takes (`pip install lm_eval`). path: any reference to a model. What requests
have in common, such as the examples of a task, is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from herdbook.engine.loading import load
from herdbook.engine.request import Request, Sampling
from herdbook.errors import ConfigError, nearest
from herdbook.evaluation.tasks import scoring
from herdbook.evaluation.tasks.task import Item

#: a task's generation_kwargs that the engine knows by other names, or need not know
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("herdbook")
class HerdbookLM(LM):
    """lm_eval's three questions, answered by one engine."""

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        device: str | None = None,
        max_length: int | str = 0,
        max_gen_toks: int | str = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """max_length: tokens of context that are used (default: all that the model has). device: lm_eval
        says cuda:0 where nothing was said, so all but cpu leaves the choice to Herdbook. batch_size and
        max_batch_size are lm_eval's own and change nothing: the engine makes its batches itself."""
        super().__init__()
        self.path = path
        self.model = load(path, dtype=dtype, device="cpu" if device == "cpu" else None)
        most = self.model.engine.most_tokens
        self.max_length = min(int(max_length) or most, most)
        self.max_gen_toks = int(max_gen_toks)
        self._chats: set[str] = set()  # contexts that apply_chat_template wrote

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding writes just this) of each continuation."""
        asked: dict[str, list[int]] = {}  # context → its requests
        for number, request in enumerate(requests):
            asked.setdefault(request.args[0], []).append(number)
        parts: list[tuple[list[int], list[list[int]]]] = []
        whose: list[list[int]] = []  # the requests of each part
        for context, numbers in asked.items():
            ids, several = self._split(context, [requests[number].args[1] for number in numbers])
            if len(ids) + max(map(len, several)) <= self.max_length + 1:
                parts.append((ids, several))
                whose.append(numbers)
                continue
            for number, one in zip(
                numbers, several, strict=True
            ):  # each loses its context's beginning
                room = max(1, self.max_length + 1 - len(one))
                parts.append((ids[-room:], [one]))
                whose.append([number])
        self.model.engine.forget()
        found: dict[int, tuple[float, bool]] = {}
        for numbers, scores in zip(whose, self.model.engine.score_many(parts), strict=True):
            told = [(score.total, score.greedy) for score in scores]
            found |= zip(numbers, told, strict=True)
        return [found[number] for number in range(len(requests))]

    def _split(self, context: str, several: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        tokenizer = self.model.tokenizer
        if not context:
            first = [scoring.first_token(self.model)]
            return first, [tokenizer.encode(self.model.written(one)) for one in several]
        return scoring.split(self.model, context, several, chat=context in self._chats)

    def _encode(self, context: str) -> list[int]:
        if context in self._chats:
            return self.model.tokenizer.encode(context, specials=True)
        return self.model.tokenizer.prompt(self.model.written(context))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each whole text, in nats."""
        pieces = []
        for number, request in enumerate(requests):
            text = Item(str(number), "", "", (), request.args[0], "")
            windows = scoring.windows(self.model, text, self.max_length)
            pieces += [(number, one) for one in windows]
        self.model.engine.forget()
        scores = self.model.engine.score_many([(one.before, [one.ids]) for _, one in pieces])
        totals = [0.0] * len(requests)
        for (number, _), (score,) in zip(pieces, scores, strict=True):
            totals[number] += score.total
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Replies, each up to its stop strings. Draws are seeded by their place."""
        self.model.engine.forget()
        asked = []
        for number, request in enumerate(requests):
            context, settings = request.args
            sampling = self._sampling(settings, number)
            room = max(1, self.max_length - sampling.max_tokens)
            asked.append(Request(self._encode(context)[-room:], sampling))
        return [reply.text for reply in self.model.engine.generate(asked)]

    def _sampling(self, settings: Mapping[str, Any], number: int) -> Sampling:
        left = dict(settings)
        until = left.pop("until", None) or []
        most = left.pop("max_gen_toks", self.max_gen_toks)
        drawn = left.pop("do_sample", left.get("temperature", 0) > 0)
        given = {name: left.pop(name) for name in SAMPLING if left.get(name) is not None}
        if unknown := [name for name in left if name not in SAMPLING]:
            raise ConfigError(
                f"generation_kwargs: {unknown[0]!r}",
                rule="is no setting of the engine",
                next=nearest(unknown[0], [*SAMPLING, "until", "max_gen_toks", "do_sample"]),
            )
        if not drawn:
            given["temperature"] = 0.0
        elif "temperature" not in given:
            given["temperature"] = 1.0
        stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
        return Sampling(max_tokens=int(most), stop=stop, seed=number, **given)

    # ------------------------------------------------------------------------------ chat templates

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.model.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as its template writes it; without a generation prompt lm_eval goes on with
        the last message, so what the template writes behind its content is left out."""
        ids = self.model.render(chat_history, reply=add_generation_prompt).ids
        text = self.model.tokenizer.decode(ids, specials=True)
        if not add_generation_prompt:
            content = chat_history[-1]["content"].rstrip()
            text = text[: text.rindex(content) + len(content)]
        self._chats.add(text)
        return text


def main() -> None:
    """lm_eval's own command, which now knows the model «herdbook»."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
