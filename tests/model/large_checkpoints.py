"""Too slow for `make test`: checkpoints of 1 GB in every layout, memory and speed. `make large`."""

from __future__ import annotations

import pytest

from tests.model.lean import LAYOUTS
from tests.model.test_memory import check, measure


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_is_the_result_and_one_tensor(layout: str) -> None:
    (found,) = measure(**{layout: 1000})
    print(
        f"{layout}: {found['file_bytes'] / 1e6:,.0f} MB become {found['final_bytes'] / 1e6:,.0f}, "
        f"peak {found['peak_bytes'] / 1e6:,.0f}, largest {found['largest_bytes'] / 1e6:,.0f}; "
        f"of the file from disk {found['cold_mb_s']:,.0f} MB/s (plain read "
        f"{found['cold_plain_mb_s']:,.0f}), cached {found['warm_mb_s']:,.0f} "
        f"({found['warm_plain_mb_s']:,.0f}), a second of the processor's "
        f"{found['warm_cpu_mb_s']:,.0f} ({found['warm_plain_cpu_mb_s']:,.0f})"
    )
    check(found)
