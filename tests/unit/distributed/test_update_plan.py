"""The plan at true sizes, the runtime's order, and the rounding's bits: no process group needed."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from titan_hd.distributed.update.gradients import bound_elements, gradient_traffic
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.rounding import _add_rounded, random_bits, rounding_key, row_hashes, stochastic_round
from titan_hd.distributed.update.runtime import run_tasks
from titan_hd.distributed.update.topology import Topology
from titan_hd.models.registry import flavor_config

SHAPES_8B = {
    f"model.layers.{i}.{name}": shape
    for i in range(32)
    for name, shape in flavor_config("llama3", "8B").linear_shapes().items()
}


def received(plan) -> int:
    return sum(w.received for w in plan.weights)


class TestPlan:
    def test_llama_8b_moves_a_sixteenth_and_with_the_cache_a_thirtieth(self):
        """K = 8, r = 16 on 8 workers in fp32: 24.4 GB dense, 0.64 GB factors with the cache, 1.27 GB without."""
        topology = Topology(8, 16, 1, 8)
        dense = received(plan_update(SHAPES_8B, topology, "dense"))
        cached = received(plan_update(SHAPES_8B, topology, "factors"))
        gathered = received(plan_update(SHAPES_8B, topology, "factors", cache_gb=0.0))
        assert dense / 1e9 == pytest.approx(24.4, abs=0.05)
        assert cached / 1e9 == pytest.approx(0.64, abs=0.01)
        assert gathered == 2 * cached
        assert gathered < dense / 16
        assert cached < dense / 30

    def test_formulas_by_hand(self):
        plan = plan_update({"layers.0.w": (100, 60)}, Topology(8, 2, 2, 2, wire_bytes=2), "auto")
        (w,) = plan.weights
        assert w.received_by_route["factors"] == 3 * 2 * 2 * (60 + 50) * 2  # 3 others, 2 adapters each, rank 2, bf16
        assert w.received_by_route["dense"] == (50 * 60 + 2 * 50 * 60 // 2) * 2
        assert w.cache_bytes == 8 * 2 * (60 + 50) * 4

    def test_int8_by_hand(self):
        """A byte an element and a scale for each of the 2 * 2 * 2 rows of every other holder; sums stay fp32."""
        shapes = {"layers.0.w": (100, 60)}
        plan = plan_update(shapes, Topology(8, 2, 2, 2, wire_bytes=1), "auto")
        (w,), (whole,) = plan.weights, plan_update(shapes, Topology(8, 2, 2, 2)).weights
        assert w.received_by_route["factors"] == 3 * 2 * 2 * (60 + 50) + 3 * 2 * 2 * 2 * 4
        assert w.received_by_route["dense"] == whole.received_by_route["dense"]
        assert "1 byte per element and 4 per row (dense: 4 per element)" in plan.table()
        gathered = plan_update(shapes, Topology(8, 2, 2, 2, wire_bytes=1), "factors", cache_gb=0.0)
        assert received(gathered) == w.received + 3 * 2 * 2 * (60 + 50) * 4, "the fixed factors travel in fp32"

    def test_a_fold_every_few_steps(self):
        """The same plan, but for what it says: its bytes are a fold's."""
        shapes = {"layers.0.w": (100, 60)}
        every, fourth = (plan_update(shapes, Topology(8, 2, 2, 2, local_steps=n)) for n in (1, 4))
        assert fourth.weights == every.weights
        assert "received per worker and step:" in every.table()
        assert "received per worker and fold:" in fourth.table()
        assert "a fold every" not in every.table()
        large = plan_update({"layers.0.w": (10000, 20000)}, Topology(8, 2, 1, 8, local_steps=4))
        bytes_ = 7 * 2 * (20000 + 1250) * 4
        assert f"  a fold every 4 steps: {bytes_ / 4e9:.3f} GB per step on average" in large.table().splitlines()
        assert large.digest() != plan_update({"layers.0.w": (10000, 20000)}, Topology(8, 2, 1, 8)).digest()

    def test_int8_quarters_the_bytes_of_llama_8b(self):
        whole, rounded = (
            received(plan_update(SHAPES_8B, Topology(8, 16, 1, 8, wire_bytes=size), "factors")) for size in (4, 1)
        )
        assert whole / rounded == pytest.approx(4, rel=0.01)

    def test_auto_takes_the_cheaper_route(self):
        shapes = {"layers.0.wide": (64, 64), "layers.0.large": (4096, 4096)}
        plan = plan_update(shapes, Topology(8, 8, 1, 8), "auto", cache_gb=0.0)
        assert {w.name: w.route for w in plan.weights} == {"layers.0.wide": "dense", "layers.0.large": "factors"}
        for w in plan.weights:
            assert w.received == min(w.received_by_route.values())

    def test_one_worker_receives_nothing(self):
        for samples in ("own", "all"):
            plan = plan_update(SHAPES_8B, Topology(8, 16, 1, 1, samples=samples), "auto")
            assert received(plan) == plan.received_per_step == 0
            assert plan.summary() == "nothing travels: there is one worker"

    def test_many_workers_share_few_adapters(self):
        """On 1,024 workers with K = 8 a worker exchanges with 7 others, not with 1,023."""
        few = received(plan_update(SHAPES_8B, Topology(8, 16, 1, 1024), "auto"))
        eight = received(plan_update(SHAPES_8B, Topology(8, 16, 1, 8), "auto"))
        assert few < eight

    def test_the_cache_keeps_to_its_budget(self):
        plan = plan_update(SHAPES_8B, Topology(8, 16, 1, 8), "factors", cache_gb=0.3)
        cached = sum(w.cache_bytes for w in plan.weights if w.cached)
        assert 0.29 * 2**30 < cached <= 0.3 * 2**30
        for bucket in plan.buckets:  # what is gathered and what is cached do not share a bucket
            assert len({w.cached for w in plan.weights if w.name in bucket.shapes}) == 1

    def test_buckets_are_blocks_and_hold_every_weight_once(self):
        plan = plan_update(SHAPES_8B, Topology(8, 16, 1, 8), "auto")
        assert len(plan.buckets) == 32
        assert [name for bucket in plan.buckets for name in bucket.shapes] == list(SHAPES_8B)

    def test_gradients_of_all_directions_by_hand(self):
        """K = 4, r = 2 on 2 x 4 workers, 4 holders of one adapter each, two of which share it."""
        shapes = {"layers.0.w": (100, 60), "layers.0.v": (20, 60)}
        own, all_samples = (Topology(4, 2, 2, 4, samples=samples) for samples in ("own", "all"))
        slice_bytes = 4 * 2 * (160 + 80)
        received = {c.kind: c[1:] for c in gradient_traffic([*shapes.values()], all_samples)}
        assert received == {"all_reduce": (slice_bytes, 2, 1), "reduce_scatter": (3 * slice_bytes, 4, 2)}
        assert [c.kind for c in gradient_traffic([*shapes.values()], own)] == ["all_reduce"]
        assert [bound_elements([*shapes.values()], t) for t in (own, all_samples)] == [2 * 240, 8 * 240]
        plans = [plan_update(shapes, t) for t in (own, all_samples)]
        assert plans[0].weights == plans[1].weights, "the update travels alike"
        line = "gradients of 8 directions, 0.000 GB; their holders receive 0.000 GB"
        assert [line in plan.table() for plan in plans] == [False, True]

    @pytest.mark.parametrize("local_steps", [1, 4])
    @pytest.mark.parametrize("samples", ["own", "all"])
    @pytest.mark.parametrize("k", [1, 2, 8])
    def test_every_line_counts_updates_and_gradients(self, k: int, samples: str, local_steps: int):
        """128 directions on 8 workers, in fp32: from the other holders dA and this worker's rows of dB; gradients by an
        all-reduce among the workers that share an adapter, where all learn from all by a reduce-scatter as well."""
        shapes, r, sharing = {f"layers.{i}.w": (8192, 4096) for i in range(4)}, 128 // k, 8 // k
        topology = Topology(k, r, 1, 8, samples=samples, local_steps=local_steps)
        plan = plan_update(shapes, topology, "factors")
        updates = (k - 1) * r * 4 * 4 * (4096 + 1024) / local_steps
        adapter = r * 4 * 4 * (4096 + 8192)
        gradients = 2 * (sharing - 1) * adapter // sharing + (k - 1) * adapter * (samples == "all")
        assert plan.received_gradients == gradients
        assert plan.received_per_step == updates + gradients
        dense = sum(w.received_by_route["dense"] for w in plan.weights) / local_steps + gradients
        part = f", {gradients / 1e9:.3f} GB of it the adapters' gradients" if gradients else ""
        assert plan.summary() == (
            f"{(updates + gradients) / 1e9:.3f} GB received per worker and step{part}, factors for 4 of 4 weights; "
            f"all dense would be {dense / (updates + gradients):.1f} times that"
        )
        lines, size = plan.table().splitlines(), f"{gradients / 1e9:.3f} GB more"
        shared = f"  {sharing} workers share an adapter and add up its gradients: {size} in every step"
        assert (shared in lines) == (samples == "own" and sharing > 1)
        assert any(line.endswith(f"their holders receive {size}") for line in lines) == (samples == "all")
        total = f"  updates and gradients: {(updates + gradients) / 1e9:.3f} GB per step"
        assert (lines[-1] == total) == (gradients > 0)

    def test_it_needs_no_torch(self):
        code = (
            "import sys; sys.modules['torch'] = None; from titan_hd.distributed.update import plan, routes, topology; "
            "shapes = {f'layers.{i}.up_proj': (53248, 16384) for i in range(126)}; "
            "print(plan.plan_update(shapes, topology.Topology(512, 16, 8, 512)).table())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
        assert "8 x 512 workers" in done.stdout

    def test_digest_tells_plans_apart(self):
        digests = {
            plan_update(SHAPES_8B, Topology(8, r, 1, 8), exchange).digest()
            for r in (8, 16)
            for exchange in ("factors", "dense")
        }
        assert len(digests) == 4
        again = plan_update(SHAPES_8B, Topology(8, 8, 1, 8), "dense").digest()
        assert again in digests


class TestRuntime:
    @pytest.mark.parametrize("in_flight", [1, 2, 3, 10])
    def test_order_and_bound(self, in_flight):
        log, live, most = [], 0, 0

        def task(i):
            nonlocal live, most
            live += 1
            most = max(most, live)
            log.append(("start", i))
            yield
            log.append(("finish", i))
            live -= 1

        run_tasks((task(i) for i in range(6)), in_flight)
        assert most == min(in_flight, 6)
        for phase in ("start", "finish"):
            assert [i for what, i in log if what == phase] == list(range(6))

    def test_tasks_without_a_wait_and_with_two(self):
        log = []

        def task(i, waits):
            for _ in range(waits):
                yield
            log.append(i)

        run_tasks((task(i, waits) for i, waits in enumerate([0, 2, 1, 0])), 2)
        assert sorted(log) == [0, 1, 2, 3]


class TestStochasticRounding:
    def test_exact_values_stay(self):
        value = torch.tensor([0.0, -0.0, 1.0, -2.5, 1024.0])
        bits = torch.full_like(value, 0xFFFF, dtype=torch.int32)
        assert torch.equal(stochastic_round(value, bits).float(), value)

    def test_unbiased_in_both_signs(self):
        """A value 0.3 of the way between two bf16 numbers goes up in 30% of 100,000 tries, within 5 sigma."""
        low, unit = 1.0, 2.0**-7
        for sign in (1.0, -1.0):
            value = torch.full((100, 1000), sign * (low + 0.3 * unit))
            bits = random_bits(rounding_key(0, 0, "w"), torch.arange(100), torch.arange(1000))
            rounded = stochastic_round(value, bits).float().abs()
            assert set(rounded.unique().tolist()) == {low, low + unit}
            assert (rounded > low).float().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 1e5) ** 0.5)

    def test_bits_are_those_of_the_hash(self):
        """Written down with Python's integers: resumed runs round as they would have."""

        def mix(x: int) -> int:
            x = (x + 0x9E3779B9) % 2**32
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            return x ^ x >> 16

        key, rows, columns = rounding_key(42, 7, "w"), [0, 1, 128255, 2**31 - 1], [0, 5, 14335]
        expected = [[mix(mix(row ^ key) ^ column) >> 8 & 0xFFFF for column in columns] for row in rows]
        assert random_bits(key, torch.tensor(rows), torch.tensor(columns)).tolist() == expected

    @pytest.mark.slow  # the compiler takes half a minute
    @pytest.mark.parametrize("keep", [1.0, 0.9])
    def test_compiled_it_is_the_same(self, keep: float):
        w, update = torch.randn(5, 70).bfloat16(), 1e-3 * torch.randn(5, 70)
        operands = (update, torch.tensor(keep), row_hashes(3, torch.arange(5)), torch.arange(70, dtype=torch.int32))
        eager, compiled = w.clone(), w.clone()
        _add_rounded(eager, *operands)
        torch.compile(_add_rounded, dynamic=True)(compiled, *operands)
        assert torch.equal(eager, compiled)

    def test_bits_are_uniform_and_belong_to_the_element(self):
        key = rounding_key(42, 7, "model.layers.0.mlp.up_proj")
        whole = random_bits(key, torch.arange(512), torch.arange(512))
        part = random_bits(key, torch.arange(100, 200), torch.arange(30, 60))
        assert torch.equal(whole[100:200, 30:60], part)
        counts = torch.bincount(whole.flatten() >> 8, minlength=256).double()
        chi_square = ((counts - 1024) ** 2 / 1024).sum().item()
        assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, standard deviation 22.6
        other = random_bits(rounding_key(42, 8, "model.layers.0.mlp.up_proj"), torch.arange(512), torch.arange(512))
        centred = (whole.double() - whole.double().mean()) * (other.double() - other.double().mean())
        assert abs(centred.mean() / whole.double().var()) < 5 / 512  # steps are uncorrelated, within 5 sigma
        rows = whole.double() - whole.double().mean()
        assert abs((rows[:-1] * rows[1:]).mean() / whole.double().var()) < 5 / 512
        assert abs((rows[:, :-1] * rows[:, 1:]).mean() / whole.double().var()) < 5 / 512
