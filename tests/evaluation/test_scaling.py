"""The scaling law: found again in points that follow it, and drawn where they lie."""

from __future__ import annotations

import re

import pytest

from herdbook.errors import ConfigError
from herdbook.evaluation.charts import power_law
from herdbook.evaluation.scaling import fit


def test_the_law_is_found_in_points_that_follow_it() -> None:
    points = [{"compute": c, "loss": (c / 5.98e22) ** -0.0737} for c in (1e18, 3e19, 2e21)]
    found = fit(points)
    assert found["alpha"] == pytest.approx(0.0737) and found["c0"] == pytest.approx(5.98e22)
    assert found["largest_error"] < 1e-9
    points[1]["loss"] += 0.3
    assert 0.1 < fit(points)["largest_error"] < 0.3


def test_one_size_gives_no_law() -> None:
    with pytest.raises(ConfigError, match="a law needs two sizes"):
        fit([{"compute": 1e9, "loss": 3.0}] * 2)


def test_points_lie_on_the_line_they_follow() -> None:
    points = [(c, (c / 1e20) ** -0.05) for c in (1e10, 1e11, 1e12)]
    chart = power_law(points, 0.05, 1e20)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    ends = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert ends is not None and dots[0][1] < dots[2][1], "less loss lies lower"
    assert (*dots[0], *dots[2]) == pytest.approx([float(one) for one in ends.groups()], abs=0.2)
