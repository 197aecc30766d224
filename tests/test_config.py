"""Settings: strict, helpful, and the same from YAML, flags and Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.config import duration, from_mapping, parse_flags, size, to_mapping
from herdbook.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    learning_rate: float = 1e-3
    method: Literal["lora", "full"] = "lora"
    targets: tuple[str, ...] = ("q", "v")
    betas: tuple[float, float] = (0.9, 0.999)
    limit: int | None = None
    shuffle: bool = True
    file: Path = Path("a")
    model: Annotated[str, "reference"] = ""


def read(**values: object) -> Settings:
    return from_mapping(Settings, values, where="step tune")


def test_text_becomes_the_field_s_type() -> None:
    assert read(
        rank="16",
        learning_rate="2e-5",
        targets="q,k",
        betas=[0.9, "0.95"],
        limit="none",
        shuffle="off",
        file="b/c",
        model=7,
    ) == Settings(16, 2e-5, "lora", ("q", "k"), (0.9, 0.95), None, False, Path("b/c"), "7")


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        read(ranc=4)
    assert (
        str(caught.value) == "key 'ranc' is no setting of step tune\n  next: did you mean 'rank'?"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rank", "many", "a whole number"),
        ("rank", 1.5, "a whole number"),
        ("rank", True, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("method", "qlora", "one of lora, full"),
        ("shuffle", "maybe", "true or false"),
        ("betas", [1.0], "2 values"),
        ("targets", 3, "a list"),
        ("model", ["a"], "text"),
    ],
)
def test_wrong_values_say_what_was_expected(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"step tune: {key} is .* must be {expected}"):
        read(**{key: value})


@given(
    rank=st.integers(),
    rate=st.floats(allow_nan=False),
    targets=st.lists(st.text(alphabet="abc", min_size=1)).map(tuple),
    shuffle=st.booleans(),
)
def test_plain_data_and_back(
    rank: int, rate: float, targets: tuple[str, ...], shuffle: bool
) -> None:
    settings = Settings(rank, rate, targets=targets, shuffle=shuffle)
    assert read(**to_mapping(settings)) == settings


def test_flags() -> None:
    assert parse_flags(
        ["--name", "Luna", "--tune.rank=16", "--plan", "--tune.warm-up", "-0.5"]
    ) == {"name": "Luna", "tune.rank": "16", "plan": True, "tune.warm_up": "-0.5"}
    with pytest.raises(ConfigError, match="'Luna' is not a setting"):
        parse_flags(["Luna"])
    with pytest.raises(ConfigError, match="--name is given twice"):
        parse_flags(["--name", "a", "--name", "b"])


def test_sizes_and_times_have_units() -> None:
    assert size("4GB", where="--memory") == 4 * 10**9
    assert size("1.5 gib", where="--memory") == 3 * 2**29
    assert duration("10m", where="--idle") == 600
    assert duration("1.5h", where="--idle") == 5400
    for wrong in ("", "4", "GB", "4 lots", "0MB", "-1GB", "4GB4"):
        with pytest.raises(ConfigError, match=r"--memory is .* must be a size"):
            size(wrong, where="--memory")
