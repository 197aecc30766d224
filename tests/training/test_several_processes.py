"""Two and four processes take the very steps that one takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several import launch, losses, tuned

FULL = {"method": "full", "dropout": 0.0, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"pack": 32, "length": 32}),  # LoRA with dropout
        (4, FULL | {"pack": 32, "length": 32}),
        (4, FULL),  # one pack a step: three processes have none
    ],
    ids=["lora", "full", "idle"],
)
def test_the_same_losses(size: int, changes: dict[str, Any], tmp_path: Path, tiny_folder: Path):
    one = tuned(tmp_path / "one", tiny_folder, changes)
    many = launch(size, tuned, tmp_path / "many", tiny_folder, changes)
    assert many.metrics["processes"] == size
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    assert many.key == one.key and many.config == one.config
