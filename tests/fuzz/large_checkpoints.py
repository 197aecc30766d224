"""Too slow for `make test`: checkpoints of 1 GB in every layout. `make large`."""

from __future__ import annotations

import pytest

from tests.model.lean import LAYOUTS
from tests.model.test_memory import measure


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_is_the_result_and_one_tensor(layout: str) -> None:
    found = measure(layout, 1000)
    print(layout, {name: round(value / 1e6) for name, value in found.items() if "bytes" in name})
    print(layout, {name: round(value) for name, value in found.items() if "mb_s" in name})
    assert found["peak_bytes"] <= 1.05 * found["final_bytes"] + found["largest_bytes"]
