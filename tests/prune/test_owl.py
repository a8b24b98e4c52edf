"""OWL's arithmetic, against its formulas written out."""

from __future__ import annotations

import pytest
import torch

from seft_ds.prune.choose import Quota
from seft_ds.prune.owl import OwlSettings, densities, outlier_share, owl_quotas


def test_outliers_are_scores_above_m_times_the_blocks_mean():
    torch.manual_seed(0)
    pairs = [
        (torch.randn(4, 6) ** 3, torch.rand(6).double()),
        (torch.randn(5, 3), torch.rand(3).double()),
    ]
    scores = [abs(float(w[i, j])) * float(s[j]) ** 0.5
              for w, s in pairs for i in range(len(w)) for j in range(w.shape[1])]  # fmt: skip
    mean = sum(scores) / len(scores)
    for factor in (1.0, 2.0, 5.0):
        expected = sum(score > factor * mean for score in scores) / len(scores)
        assert outlier_share(pairs, factor) == pytest.approx(expected)
    assert outlier_share(pairs, 1.0) > 0


def test_densities_are_stretched_around_the_mean():
    found = densities([0.01, 0.03, 0.02, 0.02], sparsity=0.7, density_range=0.08)
    # Stretched to 0 ... 0.16: 0, 0.16, 0.08, 0.08, whose mean is 0.08.
    assert found == pytest.approx([0.22, 0.38, 0.30, 0.30])
    assert densities([0.5, 0.5], 0.6, 0.08) == pytest.approx([0.4, 0.4])


def test_a_density_that_no_block_can_have_is_refused():
    with pytest.raises(ValueError, match="lower --owl_lambda"):
        densities([0.0, 0.1], sparsity=0.95, density_range=0.2)
    with pytest.raises(ValueError, match="--owl_m 0"):
        OwlSettings(0.0)
    with pytest.raises(ValueError, match="--owl_lambda 0.5"):
        OwlSettings(5.0, 0.5)


def test_the_quotas_add_up_to_the_uniform_ones():
    shapes = {f"{b}.{n}": s for b in range(3) for n, s in {"a": (5, 7), "b": (3, 4)}.items()}
    blocks = [{f"{b}.a": Quota(21, by_row=True), f"{b}.b": Quota(7, by_row=True)} for b in range(3)]
    found = owl_quotas(blocks, shapes, [0.5, 0.4, 0.3])
    assert sum(q.dead for q in found.values()) == 3 * 28
    dead = [found[f"{b}.a"].dead + found[f"{b}.b"].dead for b in range(3)]
    exact = [84 * (1 - d) / 1.8 for d in (0.5, 0.4, 0.3)]
    assert all(abs(d - e) < 1 for d, e in zip(dead, exact)) and dead == sorted(dead)
    assert all(abs(found[f"{b}.a"].dead - dead[b] * 35 / 47) < 1 for b in range(3))
    assert all(q.by_row for q in found.values())
