"""The sampled mask of a network: its frequencies, its limits and its rescaling."""

import pytest
import torch
from torch import Generator

from pai_bench.core import Selection
from pai_bench.errors import UserError
from pai_bench.masks import sampling, selection
from pai_bench.studies import sketches

# The sampled mask of a network ----------------------------------------------------------------------------------------

SIZES = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)


def draw(
    sizes: dict[str, torch.Tensor], k: int, generator: Generator, *, beta: float = 1.0, scope: str = "global"
) -> Selection:
    """A sampled mask that keeps k, with its rescaling."""
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in sizes.items()}
    sketch = sampling.sampled(sizes, candidates, k, generator, beta=beta, scope=scope, rescale=True)
    assert sketch.scale is not None
    return sketch


def frequencies(k: int, number: int, *, beta: float = 1.0) -> torch.Tensor:
    generator = Generator().manual_seed(k)
    return torch.stack([draw({"a": SIZES}, k, generator, beta=beta).mask["a"] for _ in range(number)]).double().mean(0)


def assert_frequencies(found: torch.Tensor, expected: torch.Tensor, number: int) -> None:
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / number).sqrt()).all(), (found, expected)


def layers(seed: int) -> dict[str, torch.Tensor]:
    generator = Generator().manual_seed(seed)
    return {
        "a": torch.rand(4, 3, 2, 2, generator=generator),
        "b": torch.rand(10, 7, generator=generator) * 3,
        "c": torch.rand(5, 10, generator=generator) * 0.01,
    }


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_sampled_keeps_exactly_k_and_is_decided_by_its_generator(beta: float, scope: str) -> None:
    sizes = layers(0)
    generator = Generator().manual_seed(5)
    candidates = {name: torch.rand(values.shape, generator=generator) > 0.2 for name, values in sizes.items()}
    for sparsity in (0.4, 0.9, 0.99):
        k = round((1 - sparsity) * 168)
        masks, again, other = (
            sampling.sampled(
                sizes, candidates, k, Generator().manual_seed(seed), beta=beta, scope=scope, rescale=False
            ).mask
            for seed in (0, 0, 1)
        )
        assert sum(int(mask.sum()) for mask in masks.values()) == k
        assert not any((mask & ~candidates[name]).any() for name, mask in masks.items())
        assert all((mask == again[name]).all() for name, mask in masks.items())
        assert any((mask != other[name]).any() for name, mask in masks.items())


def test_sampled_is_uniform_at_beta_zero() -> None:
    assert_frequencies(frequencies(3, 4000, beta=0.0), torch.full((8,), 3 / 8, dtype=torch.float64), 4000)


def test_sampled_draws_the_first_in_proportion_to_the_score() -> None:
    assert_frequencies(frequencies(1, 6000), SIZES / SIZES.sum(), 6000)
    assert_frequencies(frequencies(1, 4000, beta=2.0), SIZES**2 / (SIZES**2).sum(), 4000)


def test_sampled_includes_a_pair_as_without_replacement() -> None:
    expected = torch.as_tensor(sketches.pair_inclusion((SIZES / SIZES.sum()).numpy()))
    assert_frequencies(frequencies(2, 10_000), expected, 10_000)


def test_sampled_tends_to_the_largest() -> None:
    # Neighbours differ by a factor of 1.2, so that at beta 150 the lesser comes first once in 10^11 draws.
    order = torch.randperm(24, generator=Generator().manual_seed(0))
    sizes = {"a": (1.2 ** order[:10].double()).view(2, 5), "b": 1.2 ** order[10:].double()}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in sizes.items()}
    for k in (1, 7, 20):
        largest = selection.keep_largest(sizes, candidates, k).mask
        for seed in range(5):
            mask = draw(sizes, k, Generator().manual_seed(seed), beta=150).mask
            assert all((mask[name] == largest[name]).all() for name in mask)


def test_sampled_tends_to_the_largest_however_large_beta() -> None:
    sizes = {"a": torch.rand(50, generator=Generator().manual_seed(0), dtype=torch.float64)}
    largest = selection.keep_largest(sizes, {"a": torch.ones(50, dtype=torch.bool)}, 25).mask
    sketch = draw(sizes, 25, Generator().manual_seed(1), beta=1e5)
    assert (sketch.mask["a"] == largest["a"]).all()
    assert sketch.scale["a"].isfinite().all()


def test_sampled_scales_are_positive_for_scores_of_many_orders() -> None:
    sizes = {"a": torch.tensor([1e-30, 1.0, 1.0, 1.0], dtype=torch.float64)}
    for seed in range(5):
        scale = draw(sizes, 4, Generator().manual_seed(seed)).scale["a"]
        assert (scale > 0).all()
        assert scale.isfinite().all()


def test_sampled_by_layer_keeps_the_layer_counts_of_the_largest() -> None:
    sizes = layers(1)
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in sizes.items()}
    for k in (5, 60, 150):
        largest = selection.keep_largest(sizes, candidates, k).mask
        mask = draw(sizes, k, Generator().manual_seed(0), scope="layer").mask
        assert {name: int(kept.sum()) for name, kept in mask.items()} == {
            name: int(kept.sum()) for name, kept in largest.items()
        }
        assert any((mask[name] != largest[name]).any() for name in mask)


def test_sampled_takes_zero_scores_last_and_at_random() -> None:
    sizes = {"a": torch.tensor([0.0, 3.0, 0.0, 0.01]), "b": torch.tensor([1.0, 0.0, 1e-20])}
    chosen = []
    for seed in range(60):
        few, more = (draw(sizes, k, Generator().manual_seed(seed)).mask for k in (4, 5))
        assert few["a"].tolist() == [False, True, False, True]
        assert few["b"].tolist() == [True, False, True]
        assert all((more[name] | ~few[name]).all() for name in few)
        chosen.append([*more["a"][[0, 2]].tolist(), bool(more["b"][1])].index(True))
    assert set(chosen) == {0, 1, 2}


def test_sampled_refuses_negative_scores_of_candidates() -> None:
    sizes = {"a": torch.tensor([1.0, -1.0, 2.0])}
    with pytest.raises(UserError, match="a has negative ones"):
        draw(sizes, 2, Generator())
    candidates = {"a": torch.tensor([True, False, True])}
    sketch = sampling.sampled(sizes, candidates, 2, Generator(), beta=1.0, scope="global", rescale=True)
    assert sketch.scale is not None
    assert sketch.mask["a"].tolist() == [True, False, True]
    assert sketch.scale["a"][sketch.mask["a"]].isfinite().all()


def test_sampled_rescales_by_counts_over_expected_counts() -> None:
    p = SIZES / SIZES.sum()
    for seed in range(20):
        sketch = draw({"a": SIZES}, 5, Generator().manual_seed(seed))
        kept = sketch.mask["a"]
        shares = (sketch.scale["a"] * p)[kept]  # c / s
        assert shares.sum() == pytest.approx(1)
        assert any((shares * s - (shares * s).round()).abs().max() < 1e-9 for s in range(5, 5000))


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_sampled_rescaling_is_unbiased(k: int) -> None:
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, -1.0, 1.0, 4.0], dtype=torch.float64)
    generator = Generator().manual_seed(0)
    sketches = [draw({"a": SIZES}, k, generator) for _ in range(5000)]
    sums = torch.stack([(sketch.scale["a"] * values)[sketch.mask["a"]].sum() for sketch in sketches])
    error = abs(float(sums.mean() - values.sum()))
    assert error < 4.5 * float(sums.std()) / len(sums) ** 0.5
