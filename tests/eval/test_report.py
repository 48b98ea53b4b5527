"""zq.eval.report: the statistics against numpy, and JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from zq.eval.perplexity import summarize
from zq.eval.report import percentile, standard_error


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001])
def test_percentiles_are_numpys(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    shares = [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0]
    expected = np.percentile(values.double().numpy(), [100 * s for s in shares])
    np.testing.assert_allclose(percentile(values, *shares), expected, rtol=1e-12)


def test_percentile_of_infinity_is_no_nan():
    values = torch.tensor([0.0, math.inf, math.inf, math.inf])
    assert percentile(values, 0.0, 0.5, 0.99) == [0.0, math.inf, math.inf]


def test_standard_error_is_over_windows():
    means = torch.tensor([1.0, 2.0, 4.0, 7.0])
    assert standard_error(means) == pytest.approx(np.std(means.numpy(), ddof=1) / 2, rel=1e-7)
    assert standard_error(means[:1]) is None


def test_clustering_matters():
    """Windows that differ as wholes: the naive per-token error would be far too small."""
    losses = torch.arange(8.0)[:, None].expand(8, 100) + torch.randn(8, 100) * 1e-3
    report = summarize(losses)
    naive = losses.flatten().std().item() / math.sqrt(losses.numel())
    assert report.nll_standard_error == pytest.approx(np.std(np.arange(8), ddof=1) / math.sqrt(8), rel=1e-2)
    assert report.nll_standard_error > 8 * naive


def test_reports_are_json():
    report = summarize(torch.rand(1, 9))
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.nll_standard_error is None
    assert (report.tokens, report.windows, report.length) == (9, 1, 10)
    assert "independent windows of 10 tokens" in report.conventions
    assert summarize(torch.full((2, 2), 800.0)).ppl == math.inf
