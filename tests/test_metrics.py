"""The maths of the scores: streamed moments, the Fréchet distance, and nearest-neighbour manifolds."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial import KDTree

from neon.errors import RequestError, WorkError
from neon.metrics import (
    DirectionTarget,
    FrechetReference,
    Manifold,
    Moments,
    MomentTarget,
    Statistics,
    frechet_distance,
    manifold,
)
from neon.metrics.frechet import nuclear_norm

Array = NDArray[np.float64]


def gaussian(seed: int, num: int, dim: int) -> torch.Tensor:
    """Correlated features of unequal spread, float64 [num, dim]."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
    scale = torch.linspace(2.0, 0.1, dim, dtype=torch.float64)
    features = torch.randn(num, dim, generator=draw, dtype=torch.float64)
    return features * scale @ mixing + torch.randn(dim, generator=draw, dtype=torch.float64) / 3


def exact_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance from the samples themselves: their centred matrices are exact factors of the covariances."""
    x, y = ((f - f.mean(0)).numpy() / (len(f) - 1) ** 0.5 for f in (a, b))
    shift = (a.mean(0) - b.mean(0)).numpy()
    cross = scipy.linalg.svdvals(x @ y.T).sum()
    return float(shift @ shift + (x * x).sum() + (y * y).sum() - 2 * cross)


# Moments


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_moments_do_not_depend_on_how_the_samples_are_cut_into_blocks(cuts: list[int]) -> None:
    features = gaussian(0, 60, 5).float()
    moments = Moments(5)
    for block in features.tensor_split(sorted(cuts)):  # blocks may be empty
        moments.update(block)
    samples = features.double().numpy()
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean.numpy(), samples.mean(0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(samples, rowvar=False), rtol=1e-12, atol=1e-14)


def test_a_mean_far_larger_than_the_spread_costs_no_digits() -> None:
    features = gaussian(1, 300, 4)
    moments = Moments(4)
    for block in (features + 2.0**30).split(32):
        moments.update(block)
    # Adding 2^30 itself rounds each sample by up to 2^-23; sums of squares would be off by about 100.
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features.numpy(), rowvar=False), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_any_float_dtype_are_summed_in_float64(dtype: torch.dtype) -> None:
    features = gaussian(2, 50, 3).to(dtype)
    moments = Moments(3)
    moments.update(features)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)


def test_combined_moments_are_those_of_all_samples() -> None:
    features = gaussian(3, 70, 6)
    parts = [Moments(6), Moments(6), Moments(6)]
    for part, block in zip(parts, features.split([0, 21, 49]), strict=True):
        part.update(block)
    parts[0].combine(parts[1])
    parts[0].combine(parts[2])
    parts[0].combine(Moments(6))
    assert parts[0].count == 70
    np.testing.assert_allclose(parts[0].mean.numpy(), features.mean(0).numpy(), rtol=1e-13)
    np.testing.assert_allclose(parts[0].covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-12)


def test_moments_that_were_saved_and_restored_go_on_bit_identically() -> None:
    blocks = gaussian(4, 90, 7).float().split(13)
    straight, stopped = Moments(7), Moments(7)
    for block in blocks[:3]:
        straight.update(block)
        stopped.update(block)
    state = stopped.state()
    stopped.update(blocks[0])  # what happens after saving does not reach the saved state
    resumed = Moments.from_state(state)
    for block in blocks[3:]:
        straight.update(block)
        resumed.update(block)
    assert resumed.count == straight.count
    assert torch.equal(resumed.mean, straight.mean)
    assert torch.equal(resumed.covariance, straight.covariance)


@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.zeros(5), torch.zeros(4, 5, dtype=torch.int64)])
def test_features_of_another_size_or_kind_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(RequestError, match=r"floats of shape \[B, 5\]"):
        Moments(5).update(features)


def test_moments_of_different_feature_sizes_do_not_combine() -> None:
    with pytest.raises(RequestError, match="of 5 and of 4 features"):
        Moments(5).combine(Moments(4))


def test_saved_moments_with_missing_or_misshapen_entries_are_refused() -> None:
    state = Moments(3).state()
    with pytest.raises(RequestError, match="lack"):
        Moments.from_state({"count": state["count"], "mean": state["mean"]})
    with pytest.raises(RequestError, match="must be"):
        Moments.from_state({**state, "scatter": torch.zeros(3, 4, dtype=torch.float64)})


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(RequestError, match="at least 2 samples, found 1"):
        Statistics.from_features(torch.zeros(1, 3))


# Statistics


def test_statistics_survive_the_disk_bit_for_bit(tmp_path: Path) -> None:
    saved = Statistics.from_features(gaussian(5, 40, 6))
    saved.save(tmp_path / "a.npz")
    loaded = Statistics.load(tmp_path / "a.npz")
    assert np.array_equal(loaded.mu, saved.mu) and np.array_equal(loaded.sigma, saved.sigma)
    assert loaded.count == 40 and loaded.name == str(tmp_path / "a.npz")
    with pytest.raises(RequestError, match="already exists"):
        saved.save(tmp_path / "a.npz", overwrite=False)


def test_published_statistics_in_float32_with_other_arrays_beside_them_are_read(tmp_path: Path) -> None:
    sigma = np.cov(gaussian(6, 40, 6).numpy(), rowvar=False).astype(np.float32)
    np.savez(tmp_path / "a.npz", mu=np.zeros(6, np.float32), sigma=sigma, arr_0=np.zeros((2, 3), np.uint8))
    loaded = Statistics.load(tmp_path / "a.npz")
    assert loaded.mu.dtype == loaded.sigma.dtype == np.float64
    assert loaded.count is None and loaded.dim == 6


def test_a_file_that_holds_no_statistics_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        Statistics.load(tmp_path / "absent.npz")
    for content in (b"", b"<!DOCTYPE html><html></html>", b"PK\x03\x04 cut short"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RequestError, match=r"bad\.npz: cannot be read"):
            Statistics.load(tmp_path / "bad.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(RequestError, match="one bare array"):
        Statistics.load(tmp_path / "bare.npy")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(RequestError, match=r"no array mu or sigma, found \['mean'\]"):
        Statistics.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}]), sigma=np.eye(1))
    with pytest.raises(RequestError, match="cannot be read"):
        Statistics.load(tmp_path / "pickled.npz")


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.eye(2), r"found \[3\] and \[2, 2\]"),
        (np.zeros((1, 3)), np.eye(3), r"found \[1, 3\] and \[3, 3\]"),
        (np.zeros(0), np.zeros((0, 0)), r"found \[0\] and \[0, 0\]"),
        (np.zeros(2, np.int64), np.eye(2), "mu must hold floats, found int64"),
        (np.array([0.0, np.nan]), np.eye(2), "1 of the 2 entries of mu are not finite"),
        (np.zeros(2), np.diag([1.0, np.inf]), "1 of the 4 entries of sigma are not finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
    ],
)
def test_arrays_that_are_no_mean_and_covariance_are_refused(mu: Array, sigma: Array, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Statistics(mu=mu, sigma=sigma)


def test_features_that_are_not_finite_fail_the_work() -> None:
    with pytest.raises(WorkError, match="not finite"):
        Statistics.from_features(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]))


# Fréchet distance


def test_the_distance_of_axis_aligned_gaussians_is_that_of_means_and_of_standard_deviations() -> None:
    a = Statistics(mu=np.array([0.0, 1.0, 2.0]), sigma=np.diag([1.0, 4.0, 9.0]))
    b = Statistics(mu=np.array([1.0, 1.0, 0.0]), sigma=np.diag([4.0, 4.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 0.5) ** 2, rel=1e-14)


def test_the_distance_of_rotated_gaussians_matches_the_closed_form_in_two_dimensions() -> None:
    def rotated(angle: float) -> Statistics:
        c, s = np.cos(angle), np.sin(angle)
        turn = np.array([[c, -s], [s, c]])
        return Statistics(mu=np.zeros(2), sigma=turn @ np.diag([9.0, 1.0]) @ turn.T)

    a, b = rotated(0.3), rotated(1.1)
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), here with M = S S' and det M = 9 * 9.
    cross = np.sqrt(np.trace(a.sigma @ b.sigma) + 2 * 9)
    assert frechet_distance(a, b) == pytest.approx(20 - 2 * cross, rel=1e-13)


@pytest.mark.parametrize("dim", [1, 64, 200])
def test_full_rank_distances_equal_the_matrix_root_formula(dim: int) -> None:
    a, b = (Statistics.from_features(gaussian(seed, 5 * dim + 10, dim)) for seed in (7, 8))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
    shift = a.mu - b.mu
    expected = shift @ shift + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 400), (400, 20), (20, 35), (64, 65), (2, 2)])
def test_fewer_samples_than_features_on_either_or_both_sides_give_the_exact_distance(num_a: int, num_b: int) -> None:
    a, b = gaussian(9, num_a, 64), gaussian(10, num_b, 64)
    distance = frechet_distance(Statistics.from_features(a), Statistics.from_features(b))
    assert distance == pytest.approx(exact_distance(a, b), rel=1e-12)


def test_singular_covariances_that_rounding_makes_positive_definite_give_the_exact_distance() -> None:
    for seed in range(20):  # as many samples as features: rank F - 1, and Cholesky passes for about half of them
        a, b = gaussian(seed, 8, 8), gaussian(seed + 100, 80, 8)
        distance = frechet_distance(Statistics.from_features(a), Statistics.from_features(b))
        assert distance == pytest.approx(exact_distance(a, b), rel=1e-11)


def test_covariances_that_share_only_part_of_their_range_give_the_exact_distance() -> None:
    a, b = gaussian(11, 200, 30), gaussian(12, 200, 30)
    a[:, :20] = 0.5  # constant features: a lives in the last ten dimensions, b in all but the last five
    b[:, 25:] = -1.0
    distance = frechet_distance(Statistics.from_features(a), Statistics.from_features(b))
    assert distance == pytest.approx(exact_distance(a, b), rel=1e-12)


def test_a_point_mass_is_at_the_distance_of_means_plus_the_other_trace() -> None:
    point = Statistics(mu=np.zeros(3), sigma=np.zeros((3, 3)))
    other = Statistics(mu=np.array([3.0, 0.0, 4.0]), sigma=np.diag([1.0, 2.0, 3.0]))
    assert frechet_distance(point, other) == frechet_distance(other, point) == pytest.approx(25 + 6, rel=1e-14)
    assert frechet_distance(point, point) == 0


@pytest.mark.parametrize("num", [30, 300])
def test_the_distance_is_symmetric_zero_to_itself_and_blind_to_rotation(num: int) -> None:
    features_a, features_b = gaussian(13, num, 48), gaussian(14, 300, 48)
    a, b = Statistics.from_features(features_a), Statistics.from_features(features_b)
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert 0 <= frechet_distance(a, a) < 1e-12 * np.trace(a.sigma)
    turn = torch.linalg.qr(gaussian(15, 48, 48)).Q
    turned = frechet_distance(Statistics.from_features(features_a @ turn), Statistics.from_features(features_b @ turn))
    assert turned == pytest.approx(distance, rel=1e-11)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), num_a=st.integers(2, 12), num_b=st.integers(2, 12), dim=st.integers(1, 8))
def test_any_sample_counts_give_the_distance_of_the_samples(seed: int, num_a: int, num_b: int, dim: int) -> None:
    a, b = gaussian(seed, num_a, dim), gaussian(seed + 1, num_b, dim)
    distance = frechet_distance(Statistics.from_features(a), Statistics.from_features(b))
    assert distance == pytest.approx(exact_distance(a, b), rel=1e-7, abs=1e-9)


def test_a_reference_gives_the_same_bits_as_the_function_each_time() -> None:
    a, b, c = (Statistics.from_features(gaussian(seed, 100, 20)) for seed in (16, 17, 18))
    reference = FrechetReference(a)
    first = [reference.distance(b), reference.distance(c)]
    assert first == [frechet_distance(a, b), frechet_distance(a, c)]
    assert first == [reference.distance(b), reference.distance(c)]


def test_statistics_of_different_features_are_not_compared() -> None:
    a = Statistics(mu=np.zeros(3), sigma=np.eye(3), name="inception.npz")
    b = Statistics(mu=np.zeros(2), sigma=np.eye(2), name="small.npz")
    with pytest.raises(RequestError, match=r"inception\.npz has 3 features and small\.npz has 2"):
        frechet_distance(a, b)


def test_a_symmetric_matrix_that_is_no_covariance_is_refused() -> None:
    indefinite = Statistics(mu=np.zeros(2), sigma=np.diag([1.0, -0.5]), name="bad.npz")
    with pytest.raises(RequestError, match=r"bad\.npz: sigma has eigenvalues from -0\.5 to 1"):
        FrechetReference(indefinite)


# Manifolds


def scores_by_full_matrices(real: Array, generated: Array, k: int) -> list[float]:
    """Precision, recall, density and coverage by their definitions, every difference at once."""

    def distances(x: Array, y: Array) -> Array:
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))

    radius_real, radius_generated = (np.sort(distances(x, x), axis=1)[:, k] for x in (real, generated))
    cross = distances(real, generated)
    inside = cross < radius_real[:, None]
    return [
        inside.any(0).mean(),
        (cross < radius_generated).any(1).mean(),
        inside.sum(0).mean() / k,
        (cross.min(1) < radius_real).mean(),
    ]


def manifold_scores(real: Array, generated: Array, k: int) -> list[float]:
    scores = Manifold(torch.from_numpy(real), k).compare(torch.from_numpy(generated))
    assert (scores.k, scores.num_real, scores.num_generated) == (k, len(real), len(generated))
    return [scores.precision, scores.recall, scores.density, scores.coverage]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_scores_equal_those_of_full_distance_matrices(k: int) -> None:
    real, generated = gaussian(20, 150, 9).numpy(), gaussian(21, 131, 9).numpy()  # neither a multiple of a block
    np.testing.assert_allclose(manifold_scores(real, generated, k), scores_by_full_matrices(real, generated, k))


def test_scores_equal_those_of_an_independent_neighbour_search() -> None:
    real, generated = gaussian(22, 300, 12).numpy(), gaussian(23, 260, 12).numpy()
    radius_real = KDTree(real).query(real, k=5)[0][:, -1]  # the first neighbour is the point itself
    to_real, index = KDTree(real).query(generated, k=300)
    inside = to_real < radius_real[index]
    to_generated = KDTree(generated).query(real)[0]
    precision, _, density, coverage = manifold_scores(real, generated, 4)
    assert precision == inside.any(1).mean()
    assert density == pytest.approx(inside.sum() / (4 * 260), rel=1e-14)
    assert coverage == (to_generated < radius_real).mean()


def test_the_nearest_real_points_are_those_of_an_independent_neighbour_search() -> None:
    real, generated = gaussian(27, 300, 12), gaussian(28, 140, 12)
    found = Manifold(real, 3).nearest(generated, 4)
    assert found.tolist() == KDTree(real.numpy()).query(generated.numpy(), k=4)[1].tolist()
    assert Manifold(real[:3], 1).nearest(generated, 4).shape == (140, 3), "no more than there are"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 4))
def test_ties_on_a_grid_fall_outside_as_the_strict_inequality_says(seed: int, k: int) -> None:
    draw = np.random.default_rng(seed)
    real = draw.integers(0, 4, (70, 2)).astype(np.float64)  # many duplicates and equal distances, all exact
    generated = draw.integers(0, 5, (90, 2)).astype(np.float64)
    np.testing.assert_allclose(manifold_scores(real, generated, k), scores_by_full_matrices(real, generated, k))


@pytest.mark.parametrize("k", [1, 4])
def test_a_copy_of_a_neighbour_lies_exactly_on_the_radius_and_so_outside(k: int) -> None:
    # The coordinates' squares round, and each copy stands in another row of another block.
    real = gaussian(24, 200, 33) + 1e3
    scores = Manifold(real, k).compare(real[torch.randperm(200, generator=torch.Generator().manual_seed(0))])
    assert scores.density == 1  # each ball holds its centre and the k - 1 nearest, not the k-th


def test_a_set_compared_with_itself_has_perfect_scores() -> None:
    features = gaussian(25, 130, 8).float()
    scores = Manifold(features, 3).compare(features)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)


def test_sets_far_apart_have_none_in_common() -> None:
    scores = Manifold(gaussian(26, 80, 8), 3).compare(gaussian(26, 80, 8) + 1e6)
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (0, 0, 0, 0)


def test_a_set_whose_points_are_all_equal_has_no_inside() -> None:
    point = gaussian(26, 1, 33) + 1e3
    scores = Manifold(point.repeat(10, 1), 3).compare(point.repeat(70, 1))
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (0, 0, 0, 0)


def test_distances_are_summed_only_where_products_cannot_tell_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = gaussian(31, 300, 40).float(), gaussian(32, 280, 40).float()
    copies = torch.cat([generated, real[:30]])  # they lie on the radii of those whose third neighbours they copy
    summed, distances = [], manifold._distances

    def counted(rows: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        summed.append(len(rows) if rows.ndim == 2 else 0)  # not those of a few candidates
        return distances(rows, points)

    monkeypatch.setattr(manifold, "_distances", counted)
    ours = Manifold(real, 3)
    every = torch.cdist(real.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(ours._radii, every.sort().values[:, 3])
    scores = ours.compare(generated)
    assert sum(summed) == 0
    wide = scores_by_full_matrices(real.double().numpy(), generated.double().numpy(), 3)
    np.testing.assert_allclose([scores.precision, scores.recall, scores.density, scores.coverage], wide)
    ours.compare(copies)
    assert 0 < sum(summed) <= 30


@pytest.mark.parametrize("scale", [1e-200, 1e-140, 1e140])
def test_lengths_whose_squares_vanish_or_overflow_change_no_score(scale: float) -> None:
    real, generated = gaussian(33, 90, 5), gaussian(34, 80, 5)
    scores = [Manifold(real * s, 3).compare(generated * s) for s in (1.0, scale)]
    assert (scores[0] == scores[1]) == (scale != 1e-200)  # where differences of squares vanish, too


def test_one_manifold_serves_several_generated_sets() -> None:
    real = Manifold(gaussian(27, 90, 5), 3)
    first, second = gaussian(28, 70, 5), gaussian(29, 110, 5)
    once = [real.compare(first), real.compare(second)]
    assert once == [Manifold(gaussian(27, 90, 5), 3).compare(f) for f in (first, second)]


@pytest.mark.parametrize("k", [-1, 0, 5, 6])
def test_k_must_be_below_the_number_of_points(k: int) -> None:
    with pytest.raises(RequestError, match=rf"k must be in 1\.\.N-1, found k={k} with N=5 real points"):
        Manifold(torch.zeros(5, 2), k)


def test_generated_features_that_cannot_be_compared_are_refused() -> None:
    manifold = Manifold(gaussian(30, 20, 4), 3)
    with pytest.raises(RequestError, match="k=3 with N=3 generated points"):
        manifold.compare(torch.zeros(3, 4))
    with pytest.raises(RequestError, match="real points have 4 features and generated ones 5"):
        manifold.compare(torch.zeros(20, 5))
    with pytest.raises(RequestError, match=r"floats of shape \[N, F\], found torch.uint8 \[20, 4\]"):
        manifold.compare(torch.zeros(20, 4, dtype=torch.uint8))
    with pytest.raises(WorkError, match="not finite"):
        manifold.compare(torch.full((20, 4), float("inf")))


def test_distances_of_combined_moments_are_those_of_the_combined_features() -> None:
    """With weights that add up to 1 and a combined covariance that is one; and in the leading directions only."""
    random = np.random.default_rng(0)
    real, *made = (
        Statistics(mu=random.normal(size=6), sigma=(lambda a: a @ a.T / 6)(random.normal(size=(6, 9))))
        for _ in range(4)
    )
    weights = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.5, 0.52, -0.02]])
    target = MomentTarget(real)
    found = target.distances(target.moments(made), np.tile(weights, (200, 1)))
    for row, distance in zip(weights, found, strict=False):
        mu = sum(w * entry.mu for w, entry in zip(row, made, strict=True))
        sigma = sum(w * entry.sigma for w, entry in zip(row, made, strict=True))
        assert distance == pytest.approx(frechet_distance(real, Statistics(mu=mu, sigma=sigma)), rel=1e-9)
    assert np.array_equal(found[:3], found[-3:])
    few = MomentTarget(real, 4)
    assert few.distances(few.moments([real]), np.ones((1, 1)))[0] == pytest.approx(0, abs=1e-9)
    assert (few.distances(few.moments(made), weights[:2]) < found[:2]).all()


@pytest.mark.parametrize(("count", "dim"), [(30, 200), (200, 30), (64, 64)])
def test_the_gram_form_of_a_distance_is_that_of_the_whole_covariances(count: int, dim: int) -> None:
    """With fewer images than features, with more, and where both Gram matrices are of one size."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    real = Statistics.from_features(torch.randn(3 * dim, dim, generator=generator, dtype=torch.float64) @ mixing)
    images = torch.randn(count, dim, generator=generator, dtype=torch.float64) + 0.1
    statistics = Statistics.from_features(images)
    centred = (images.numpy() - statistics.mu) / (count - 1) ** 0.5
    norm = nuclear_norm(centred @ np.linalg.cholesky(real.sigma))
    shift = real.mu - statistics.mu
    found = float(shift @ shift) + np.trace(real.sigma) + np.trace(statistics.sigma) - 2 * norm
    assert found == pytest.approx(frechet_distance(real, statistics), rel=1e-6)


@pytest.mark.parametrize("dim", [20, 600])
@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_distances_of_few_images_are_those_of_many(dim: int, spread: float) -> None:
    """100 images each, ten times; without what few images add, of 600 features even real ones would be far from 0."""
    generator = torch.Generator().manual_seed(1)
    roots = (torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5).numpy()
    real, made = (Statistics(mu=np.zeros(dim), sigma=np.diag((a * roots) ** 2)) for a in (1.0, spread))
    sets = torch.randn(10, 100, dim, generator=generator, dtype=torch.float64).numpy() * roots * spread
    target = DirectionTarget(real, sets)
    found = target.distances(target.moments(np.arange(100)), np.eye(10)).mean()
    biased = np.mean([frechet_distance(real, Statistics.from_features(torch.from_numpy(one))) for one in sets])
    bias = biased - frechet_distance(real, made)
    assert biased - found == pytest.approx(bias, rel=0.15)


def test_images_that_do_not_vary_have_a_distance() -> None:
    real = Statistics(mu=np.zeros(3), sigma=np.diag([4.0, 1.0, 0.0]))
    target = DirectionTarget(real, np.ones((2, 10, 3)))
    assert target.distances(target.moments(np.arange(10)), np.eye(2)).tolist() == pytest.approx([8.0, 8.0])
