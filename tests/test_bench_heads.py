import pytest
import torch

from physnb.bench import operations
from physnb.bench_heads import bench_heads, guided_steps, predicted_ratio
from physnb.config import ModelConfig, Perturbation

TINY = ModelConfig(frames=8, size=16, width=32, depth=3, heads=4)


def test_every_way_makes_the_same_guided_step(make_model):
    work = guided_steps(make_model(depth=3), Perturbation("L1H2,L1H0"), batch=3)
    ours, plain = work["ours"](), work["plain"]()
    for name in ("separate passes", "explicit maps"):
        torch.testing.assert_close(work[name](), ours, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-2


def test_rows_of_the_benchmark():
    result = bench_heads(rounds=1, config=TINY, batches=(1, 2))
    assert len(result["rows"]) == 2 * 2 * 3  # baselines, batches, first layers 0, 1 and 2
    for row in result["rows"]:
        assert row["measured"]["median"] > 0 and row["peak_memory_mb"] > row["plain_peak_memory_mb"] > 0


def test_predicted_ratio_grows_with_the_first_layer():
    ratios = [predicted_ratio(TINY, first) for first in range(3)]
    assert 1 < ratios[0] < ratios[1] < ratios[2] < 2
    # with nothing but blocks: two passes of 3 against 3 + 3 - first
    embed, block, head = operations(TINY)
    assert ratios[2] == pytest.approx(2 * (embed + 3 * block + head) / (embed + 4 * block + 2 * head))


def test_bad_rounds_are_named():
    with pytest.raises(ValueError, match="rounds must be positive"):
        bench_heads(rounds=0)
