"""Quantiles of an interval's observations."""

from math import inf

import pytest

from mlx_server.services.history import quantile


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    counts = [(1.0, 0.0), (2.0, 10.0), (4.0, 20.0), (inf, 20.0)]
    assert quantile(counts, 0.25) == pytest.approx(1.5)
    assert quantile(counts, 0.75) == pytest.approx(3.0)


def test_beyond_the_last_bound_a_quantile_is_that_bound() -> None:
    assert quantile([(1.0, 1.0), (inf, 10.0)], 0.9) == 1.0


def test_without_observations_there_is_no_quantile() -> None:
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 0.0), (inf, 0.0)], 0.5) is None
