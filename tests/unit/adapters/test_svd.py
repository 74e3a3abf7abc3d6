"""The fixed factors: what the slices are, and that they depend on nothing but the weight, or the seed and the name."""

from __future__ import annotations

import pytest
import torch

from tests.kit import oracle
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.adapters.svd import (
    FACTOR_SCALES,
    SvdSettings,
    captured_energy,
    cut_slices,
    orthogonality_error,
    principal_factors,
    random_factors,
    unit_factors,
)

# Factors are rounded to fp32 once; singular values reach about 10, so this is a few units in the last place.
SVD_TOLERANCE = 2e-5
K, R = 3, 2


def slice_factors(weight: torch.Tensor, num_adapters: int, rank: int, slices: str):
    """Slices of a weight: what `distributed.factor_init` does with the cache left out."""
    count = rank if slices == "top" else num_adapters * rank
    return cut_slices(*principal_factors(weight, count), num_adapters, rank, slices)


def weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=SVD_TOLERANCE)


SHAPES = [(8, 8), (12, 7), (7, 12), (6, 6)]


class TestPrincipalFactors:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_all_directions_give_the_weight_back(self, shape: tuple[int, int]):
        w = weight(*shape)
        a, b = principal_factors(w, min(shape))
        assert a.dtype == b.dtype == torch.float32
        close(b @ a, w)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("count", [1, 3, 5])
    def test_best_approximation_of_its_rank(self, shape: tuple[int, int], count: int):
        """Eckart-Young: what is left over has the remaining singular values, and no other rank does better."""
        w = weight(*shape)
        a, b = principal_factors(w, count)
        assert (a.shape, b.shape) == ((count, shape[1]), (shape[0], count))
        left = torch.linalg.svdvals((w - b @ a).double())
        values = torch.linalg.svdvals(w.double())
        close(left[: min(shape) - count], values[count:])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_side_has_the_root_of_the_singular_value(self, shape: tuple[int, int]):
        w = weight(*shape)
        a, b = principal_factors(w, 4)
        values = torch.linalg.svdvals(w.double())[:4]
        close(a @ a.T, values.diag())
        close(b.T @ b, values.diag())

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_sign_is_fixed(self, shape: tuple[int, int]):
        """The largest element of a row of A is positive, so that -W has the same A and the opposite B."""
        w = weight(*shape)
        a, b = principal_factors(w, 5)
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
        negative_a, negative_b = principal_factors(-w, 5)
        close(negative_a, a)
        close(negative_b, -b)

    def test_the_same_weight_gives_the_same_bits(self):
        w = weight(12, 7)
        for first, second in zip(principal_factors(w, 5), principal_factors(w.clone(), 5), strict=True):
            assert torch.equal(first, second)

    def test_the_weight_is_left_as_it_was(self):
        w = weight(8, 8)
        before = w.clone()
        principal_factors(w, 3)
        assert torch.equal(w, before)

    def test_computed_in_fp32_whatever_the_weight(self):
        w = weight(8, 8).bfloat16()
        for found, expected in zip(principal_factors(w, 3), principal_factors(w.float(), 3), strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)

    def test_singular_values_of_a_wide_range(self):
        """A weight whose small directions a Gram matrix alone would lose, and one that has fewer than are asked for."""
        u, v = (torch.linalg.qr(weight(8, 8, seed).double())[0] for seed in (1, 2))
        for values in (torch.logspace(0, -7, 8), torch.tensor([1.0, 0.5, 0, 0, 0, 0, 0, 0])):
            w = (u * values) @ v.T
            a, b = principal_factors(w.float(), 8)
            assert torch.isfinite(a).all()
            assert torch.isfinite(b).all()
            found = (a.norm(dim=1) * b.norm(dim=0)).double()
            torch.testing.assert_close(found, values.double(), rtol=0, atol=2e-7)  # w itself was rounded to fp32
            close(b @ a, w)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("last", [-1, -6])
    def test_the_smallest_directions_smallest_first(self, shape: tuple[int, int], last: int):
        """With either algorithm: a spectrum that falls to 1e-6 is too wide for a Gram matrix."""
        u, _, vh = torch.linalg.svd(weight(*shape).double(), full_matrices=False)
        values = torch.logspace(0, last, len(vh), dtype=torch.float64)
        a, b = principal_factors((u * values) @ vh, 3, SvdSettings("auto", smallest=True))
        assert (a.shape, b.shape) == ((3, shape[1]), (shape[0], 3))
        root = values.flip(0)[:3].sqrt()
        close((a @ vh.T.flip(1)[:, :3].float()).abs() / root, torch.eye(3))
        close((b.T @ u.flip(1)[:, :3].float()).abs() / root, torch.eye(3))
        close((b / root) @ (a / root[:, None]), u[:, -3:] @ vh[-3:])

    def test_a_weight_of_zeros(self):
        a, b = principal_factors(torch.zeros(6, 4), 3)
        assert not a.any()
        assert not b.any()


def decaying(out_features: int, in_features: int) -> torch.Tensor:
    """A weight whose singular values fall by a fifth from one to the next: 1, 0.8, 0.64, ..."""
    small = min(out_features, in_features)
    u = torch.linalg.qr(weight(out_features, small, 1).double())[0]
    v = torch.linalg.qr(weight(in_features, small, 2).double())[0]
    return ((u * 0.8 ** torch.arange(small)) @ v.T).float()


class TestRandomized:
    SETTINGS = SvdSettings("randomized", 8)

    @pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
    def test_the_exact_factors_where_the_spectrum_decays(self, shape: tuple[int, int]):
        w = decaying(*shape)
        for found, expected in zip(principal_factors(w, 6, self.SETTINGS), principal_factors(w, 6), strict=True):
            assert found.dtype == torch.float32
            close(found, expected)

    def test_more_iterations_come_nearer_on_a_flat_spectrum(self):
        w = weight(120, 100)
        best = captured_energy(w, principal_factors(w, 8)[0])
        shares = [captured_energy(w, principal_factors(w, 8, SvdSettings("randomized", n))[0]) for n in (0, 2, 8)]
        assert shares == sorted(shares)
        assert shares[0] < 0.9 * best
        assert 0.995 * best < shares[2] <= best * (1 + SVD_TOLERANCE)

    def test_directions_are_orthogonal_whatever_the_spectrum(self):
        a, b = principal_factors(weight(60, 40), 12, self.SETTINGS)
        assert orthogonality_error(a, b) < SVD_TOLERANCE

    def test_a_function_of_the_weight_and_the_seed_alone(self):
        w = weight(60, 40)
        first = principal_factors(w, 6, SvdSettings("randomized", 1), seed=3)
        torch.manual_seed(1)
        again = principal_factors(w, 6, SvdSettings("randomized", 1), seed=3)
        other = principal_factors(w, 6, SvdSettings("randomized", 1), seed=4)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])

    def test_as_many_directions_as_there_are(self):
        w = weight(12, 7)
        a, b = principal_factors(w, 7, self.SETTINGS)
        close(b @ a, w)

    def test_auto_is_decided_by_sizes(self):
        auto = SvdSettings("auto")
        assert auto.resolve((4096, 14336), 128) == auto.resolve((14336, 4096), 128)
        assert auto.resolve((4096, 4096), 16) == "randomized"
        assert auto.resolve((4096, 4096), 4096) == "exact"
        assert auto.resolve((64, 64), 32) == "exact"
        for name in ("exact", "randomized"):
            assert SvdSettings(name).resolve((4096, 14336), 128) == name


class TestReports:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_captured_energy(self, shape: tuple[int, int]):
        w = weight(*shape)
        values = torch.linalg.svdvals(w.double()) ** 2
        for count in (1, 3, min(shape)):
            share = captured_energy(w, principal_factors(w, count)[0])
            assert share == pytest.approx((values[:count].sum() / values.sum()).item(), abs=SVD_TOLERANCE)

    def test_orthogonality_error(self):
        a, b = principal_factors(weight(8, 8), 4)
        assert orthogonality_error(a, b) < SVD_TOLERANCE
        turned = a.clone()
        turned[1] = turned[0] + turned[1] * turned[0].norm() / turned[1].norm()  # 45 degrees
        assert orthogonality_error(turned, b) == pytest.approx(0.5**0.5, abs=SVD_TOLERANCE)
        assert orthogonality_error(a, turned.T) == pytest.approx(0.5**0.5, abs=SVD_TOLERANCE)


class TestSlices:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_orthogonal_slices(self, shape: tuple[int, int]):
        """Rows of A of different adapters, and columns of B, are orthogonal to each other."""
        a, b = slice_factors(weight(*shape), K, R, "orthogonal")
        assert (a.shape, b.shape) == ((K, R, shape[1]), (K, shape[0], R))
        for i in range(K):
            for j in range(K):
                if i != j:
                    close(a[i] @ a[j].T, torch.zeros(R, R))
                    close(b[i].T @ b[j], torch.zeros(R, R))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_adapter_i_has_the_directions_from_i_times_r(self, shape: tuple[int, int]):
        w = weight(*shape)
        a, b = slice_factors(w, K, R, "orthogonal")
        whole_a, whole_b = principal_factors(w, K * R)
        for i in range(K):
            assert torch.equal(a[i], whole_a[i * R : (i + 1) * R])
            assert torch.equal(b[i], whole_b[:, i * R : (i + 1) * R])
            values = torch.linalg.svdvals(w.double())[i * R : (i + 1) * R]
            close(torch.linalg.svdvals(b[i].double() @ a[i].double())[:R], values)

    def test_together_they_are_the_best_approximation(self):
        w = weight(6, 6)  # K * r = 6: all of it
        a, b = slice_factors(w, K, R, "orthogonal")
        close(sum(b[i] @ a[i] for i in range(K)), w)

    def test_top_slices_are_all_the_first(self):
        w = weight(8, 8)
        a, b = slice_factors(w, K, R, "top")
        first_a, first_b = principal_factors(w, R)
        assert (a.shape, b.shape) == ((K, R, 8), (K, 8, R))
        for i in range(K):
            assert torch.equal(a[i], first_a)
            assert torch.equal(b[i], first_b)

    def test_minor_slices_are_cut_from_the_smallest(self):
        w = weight(8, 8)
        a, b = principal_factors(w, K * R, SvdSettings(smallest=True))
        sliced_a, sliced_b = cut_slices(a, b, K, R, "minor")
        for i in range(K):
            assert torch.equal(sliced_a[i], a[i * R : (i + 1) * R])
            assert torch.equal(sliced_b[i], b[:, i * R : (i + 1) * R])


class TestUnitFactors:
    def test_orthonormal_times_the_mean_root(self):
        w = weight(12, 7)
        a, b = unit_factors(*principal_factors(w, 4))
        u, values, vh = torch.linalg.svd(w.double(), full_matrices=False)
        mean = values[:4].sqrt().mean()
        assert a.dtype == b.dtype == torch.float32
        close(a @ a.T, mean**2 * torch.eye(4))
        close(b.T @ b, mean**2 * torch.eye(4))
        close(b @ a, mean**2 * u[:, :4] @ vh[:4])

    @pytest.mark.parametrize("scale", list(FACTOR_SCALES))
    @pytest.mark.parametrize("slices", ["orthogonal", "minor", "top"])
    def test_slices_of_either_scale_are_the_oracles(self, slices: str, scale: str):
        """The mean is over the directions that some adapter has: of top slices r, of the others K r."""
        w, method = weight(12, 9), HDPissa(K, R, slices=slices)
        factors = principal_factors(w, method.directions, SvdSettings(smallest=method.smallest))
        sliced_a, sliced_b = cut_slices(*FACTOR_SCALES[scale](*factors), K, R, slices)
        settings = oracle.Settings(K, R, 1, [], slices=slices, factor_scale=scale)
        for (_, i), (a, b) in oracle.fixed_factors({"w": w.double()}, ["w"], settings).items():
            close(sliced_a[i].norm(dim=1), a.norm(dim=1))
            for direction in range(R):  # the sign of a pair is open
                got = torch.outer(sliced_b[i][:, direction], sliced_a[i][direction])
                close(got, torch.outer(b[:, direction], a[direction]))

    def test_directions_without_a_singular_value_stay_zero(self):
        a, b = torch.zeros(3, 5), torch.zeros(4, 3)
        a[0, 1], b[2, 0] = 2.0, -2.0
        unit_a, unit_b = unit_factors(a, b)
        close(unit_a, a / 3)
        close(unit_b, b / 3)


class TestRandomFactors:
    SHAPE = (10, 64)

    def draw(self, adapters: range, seed: int = 0, name: str = "layer", rank: int = 4):
        return random_factors(self.SHAPE, adapters, rank, seed, name)

    def test_lora_initialisation(self):
        a, b = self.draw(range(50))
        assert (a.shape, b.shape) == ((50, 4, 64), (50, 10, 4))
        assert not b.any()
        bound = 1 / 8  # kaiming_uniform with a = sqrt(5): 1 / sqrt(in)
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.99 * bound
        # 12,800 draws: the standard error of the mean is 0.0006, of the standard deviation about 0.0004
        assert a.mean().abs() < 0.003
        assert abs(a.std() - bound / 3**0.5) < 0.002

    def test_an_adapter_does_not_depend_on_who_draws_it(self):
        whole, _ = self.draw(range(8))
        for hosted in (range(0, 2), range(3, 8), range(7, 8)):
            torch.manual_seed(hosted.start)  # the process' own generator plays no part
            part, _ = self.draw(hosted)
            assert torch.equal(part, whole[hosted.start : hosted.stop])

    def test_seed_layer_and_adapter_each_matter(self):
        draws = [
            self.draw(range(1))[0],
            self.draw(range(1), seed=1)[0],
            self.draw(range(1), name="other")[0],
            self.draw(range(1, 2))[0],
        ]
        for i, first in enumerate(draws):
            for second in draws[i + 1 :]:
                assert not torch.equal(first, second)

    def test_the_process_generator_is_left_alone(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        self.draw(range(2))
        assert torch.equal(torch.rand(3), expected)
