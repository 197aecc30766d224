"""`herd plan`: memory, time and disk of a training, before it runs."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from herdbook.terminal import book, print_json

#: settings of a plan on paper
PAPER = ("model", "on", "stack", "method", "length", "rows", "epochs", "tokens")


def plan(
    what: str = "cria",
    /,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Tell what a training will take in memory, time and disk, before it runs.

    What does not fit is refused, with the nearest settings that do. A trial of three packs says what
    arithmetic cannot; --no-probe leaves it out, and the time with it. --memory 8GB plans for so much in
    place of what is free. Settings as in `herd raise`.

    Example: herd plan alpaca --data my-rows.json --tune.recompute true

    One tuning: herd plan train --model smollm2 --data my-rows.json --method full

    On paper: herd plan train --model llama-7b --on 8xA100-80GB --stack plain --rows 52002 --epochs 3
    --length 512 (or --tokens 1.4e12)

    A new model: herd plan pretrain --budget 1e21 (or --size 1.3e9) --on 8xA100-80GB

    Parameters
    ----------
    what
        a recipe (see: herd recipes), train, or pretrain
    """
    from herdbook import config

    flags: dict[str, Any] = dict(config.parse_flags(settings))
    as_json = config.convert(flags.pop("json", False), bool, where="--json")
    if what == "pretrain":
        _tell([_pretrain(flags)], as_json)
        return
    if what == "train" and "on" in flags:
        _tell([_paper(flags)], as_json)
        return
    trial = not config.convert(flags.pop("no_probe", False), bool, where="--no-probe")
    memory = flags.pop("memory", None)
    room = config.size(str(memory), where="--memory") if memory else None
    from herdbook import planned

    if what == "train":
        plans = planned.plan_tune(flags, book(), room=room, trial=trial)
    else:
        plans = planned.plan_recipe(what, flags, book(), room=room, trial=trial)
    if as_json:
        print_json([one.to_mapping() for one in plans])
        return
    for one in plans:
        _show(one)


def _show(one: Any) -> None:
    from herdbook.training.fitting import gigabytes, parts

    print(f"{one.step}: {one.rows:,} rows, {one.tokens:,} tokens, {one.steps:,} steps")
    if one.assumed_rows:
        print(
            f"  of the rows {one.assumed_rows:,} are not there yet, and assumed as long as the others"
        )
    print(f"  memory  {gigabytes(one.peak)} of {gigabytes(one.room)}")
    print(f"          by arithmetic {gigabytes(one.memory.peak)}: {parts(one.memory)}")
    if one.seconds is not None:
        print(f"  time    {_time(one.seconds)}, without loading")
    print(f"  disk    {gigabytes(one.disk.total)}: result {gigabytes(one.disk.result)}, "
          f"states {gigabytes(one.disk.states)}"
          + (f", offloaded {gigabytes(one.disk.offloaded)}" if one.disk.offloaded else ""))  # fmt: skip


def _pretrain(flags: dict[str, Any]) -> dict[str, Any]:
    from herdbook.errors import ConfigError
    from herdbook.training import hardware, scaling

    _only(flags, ("budget", "size", "on", "stack"), "herd plan pretrain")
    if ("budget" in flags) == ("size" in flags):
        raise ConfigError(
            "herd plan pretrain",
            rule="needs one of --budget (operations) and --size (weights)",
            next="herd plan pretrain --budget 1e21",
        )
    name = "budget" if "budget" in flags else "size"
    value = _number(flags[name], f"--{name}")
    best = scaling.for_budget(value) if name == "budget" else scaling.for_size(value)
    found = {
        "weights": best.weights, "tokens": best.tokens, "operations": best.flops,
        "nearest of Cerebras-GPT": best.rung,
    }  # fmt: skip
    if "on" in flags:
        count, card = hardware.machine(str(flags["on"]))
        share = hardware.share_of(str(flags.get("stack", "tuned")))
        found["days"] = best.flops / (count * card.flops * share) / 86_400
    return found


def _paper(flags: dict[str, Any]) -> dict[str, Any]:
    from herdbook.errors import ConfigError
    from herdbook.training import hardware

    _only(flags, PAPER, "herd plan train --on")
    config = hardware.shape(str(flags.get("model", "")))
    count, card = hardware.machine(str(flags["on"]))
    method = str(flags.get("method", "full"))
    if method not in ("full", "lora"):
        raise ConfigError(f"--method is {method!r}", rule="but on paper must be full or lora")
    length = int(_number(flags.get("length", 2048), "--length"))
    rows, epochs = (_number(flags.get(one, 1), f"--{one}") for one in ("rows", "epochs"))
    tokens = rows * epochs * length
    if "tokens" in flags:
        tokens = _number(flags["tokens"], "--tokens")
    elif "rows" not in flags:
        raise ConfigError("herd plan train --on", rule="needs --rows or --tokens", next="give one")
    stack = str(flags.get("stack", "tuned"))
    speed = hardware.tokens_per_second(config, card, stack, length, frozen=method == "lora")
    memory = hardware.card_memory(config, length, method=method, recompute=True, cards=count)
    if memory.peak > card.memory:
        needed = next((n for n in (2**i for i in range(1, 16)) if hardware.card_memory(
            config, length, method=method, recompute=True, cards=n).peak <= card.memory), None)  # fmt: skip
        raise hardware.too_small(memory.peak, card, needed)
    return {
        "weights": hardware.weights_of(config),
        "tokens": tokens,
        "tokens/s of a card": speed,
        "hours": tokens / speed / count / 3600,
        "bytes on a card, one row at a time, recomputed": memory.peak,
    }


def _only(flags: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    from herdbook.errors import ConfigError, nearest

    for key in flags:
        if key not in known:
            raise ConfigError(
                f"--{key}", rule=f"is no setting of {where}", next=nearest(key, known)
            )


def _number(text: Any, where: str) -> float:
    """«1e21», «1.3e9»; above zero and finite."""
    from herdbook import config
    from herdbook.errors import ConfigError

    value: float = config.convert(text, float, where=where)
    if not 0 < value < float("inf"):
        raise ConfigError(f"{where} is {text}", rule="but must be a number above 0")
    return value


def _tell(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for one in found:
        for name, value in one.items():
            print(f"{name:<24} {value if isinstance(value, str) else f'{value:.4g}'}")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
