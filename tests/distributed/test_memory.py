"""The memory estimate against what torch's allocator counts in a step, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.kit import classifiers, runs
from titan_hd import fitting
from titan_hd.adapters.methods import METHODS
from titan_hd.config import manager
from titan_hd.preflight import plan_run

# What the estimate promises.
TOLERANCE = 0.10
LENGTH, VOCABULARY = 128, 1500
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODES = ("none", "selective", "full")


@pytest.fixture
def argv(tmp_path: Path):
    """Options of a run whose records all have the longest length."""
    runs.write_model(tmp_path / "model", **SIZES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (16, LENGTH), generator=generator).tolist()
    (tmp_path / "records.jsonl").write_text("".join(json.dumps({"input_ids": i, "labels": i}) + "\n" for i in ids))

    def options(**overrides):
        values = {
            "training__seq_len": LENGTH,
            "training__local_batch_size": 2,
            "training__global_batch_size": 4,
            "adapter__rank": 4,
            "hdpissa__num_adapters": 2,
            "hdpissa__slices": "random",  # the profiler does not see all of what LAPACK frees
            "parallelism__fsdp_reshard_after_forward": "always",
            "export__enable": "false",
        } | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "out", **values)

    return options


def peak_of_step(argv: list[str]) -> int:
    """The most bytes that torch has allocated at a time in the second step of a run, everything that the run has made
    before included."""
    from titan_hd.train import Trainer

    config = manager.load(argv)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))
        trainer.train_step()
        with record_function("measured step"):
            trainer.train_step()
    trainer.close()
    events = sorted(_all(profiler.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    step = next(event for event in events if event.name == "measured step")
    live: dict[int, int] = {}  # address -> bytes; what was there before is freed sometime in between, and not counted
    total = peak = 0
    for event in events:
        if event.tag != _EventType.Allocation:
            continue
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            total += size - live.get(address, 0)  # of what was there, the profiler has not seen the end
            live[address] = size
        else:
            total -= live.pop(address, 0)
        if step.start_time_ns <= event.start_time_ns <= step.end_time_ns:
            peak = max(peak, total)
    return peak


def _all(events):
    for event in events:
        yield event
        yield from _all(event.children)


def compare(argv: list[str], workers, size: int = 1) -> None:
    config = manager.load(argv)
    estimate = fitting.estimate_run(plan_run(config, size), "cpu")
    assert estimate.allocated == pytest.approx(workers.run(size, peak_of_step, argv)[0], rel=TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_mode(method: str, argv, workers):
    for mode in MODES:
        compare(argv(adapter__method=method, activation_checkpoint__mode=mode), workers)


@pytest.mark.parametrize("method", ["hdpissa", "lora", "full"])
def test_compute_in_bfloat16(method: str, argv, workers):
    compare(argv(adapter__method=method, training__mixed_precision_param="bfloat16"), workers)


@pytest.mark.parametrize("method", ["hdpissa", "lora", "full"])
def test_two_shards(method: str, argv, workers):
    compare(argv(adapter__method=method), workers, size=2)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_adapters_side_by_side(size: int, argv, workers):
    together = {"hdpissa__samples": "all", "hdpissa__num_adapters": 8, "adapter__rank": 24}
    compare(argv(training__mixed_precision_param="bfloat16", **together), workers, size)


@pytest.mark.slow
def test_local_models(argv, workers):
    """At a rank at which what they keep for the backward pass is seen."""
    compare(argv(hdpissa__local_steps=2, adapter__rank=24, training__mixed_precision_param="bfloat16"), workers)


@pytest.mark.parametrize("method", ["hdpissa", "lora"])
def test_weights_that_stay_gathered(method: str, argv, workers):
    compare(argv(adapter__method=method, parallelism__fsdp_reshard_after_forward="never"), workers)


def test_bfloat16_masters_and_another_optimizer(argv, workers):
    compare(argv(training__master_dtype="bfloat16", optimizer__name="SGD"), workers)


@pytest.mark.parametrize("size", [1, 2])
def test_what_passes_between_host_and_device(size: int, argv, workers):
    """On a CPU both lie in the same memory: what is copied comes on top."""
    offload = {"training__enable_cpu_offload": "true", "hdpissa__offload_moments": "true"}
    compare(argv(adapter__rank=16, **offload), workers, size)


class TestRemedy:
    """On the estimate alone."""

    def plan(self, argv, **overrides):
        return plan_run(manager.load(argv(**overrides)), 1)

    def test_what_fits_needs_none(self, argv):
        plan = self.plan(argv)
        assert fitting.too_little(plan, "cpu", fitting.estimate_run(plan, "cpu").total) is None

    def test_one_change_is_enough(self, argv):
        plan = self.plan(argv)
        needed = fitting.estimate_run(plan, "cpu").total
        line = fitting.too_little(plan, "cpu", needed - 1_000_000)
        assert line.startswith("memory: each worker will need about ")
        assert "it would fit with training.local_batch_size = 1, or activation_checkpoint.mode = selective" in line
        assert line.endswith(", or 2 workers")

    def test_several_together(self, argv):
        plan = self.plan(argv)
        smallest = plan
        while changes := list(fitting._changes(smallest)):
            smallest = fitting._with(smallest, changes[:1])
        available = fitting.estimate_run(smallest, "cpu").total
        assert "training.local_batch_size = 1 and activation_checkpoint.mode = full" in fitting.remedy(
            plan, "cpu", available
        )
        assert fitting.remedy(plan, "cpu", available // 100).startswith("no smaller setting")

    @pytest.mark.parametrize("part", [0.02, 0.6])
    def test_none_of_several_may_be_left_out(self, part: float, argv):
        """All of the changes fit, and all but one do not."""
        plan = smallest = self.plan(argv, adapter__rank=16)
        while changes := list(fitting._changes(smallest)):
            smallest = fitting._with(smallest, changes[:1])
        least, most = (fitting.estimate_run(of, "cuda").total for of in (smallest, plan))
        available = least + int(part * (most - least))

        def fits(changed) -> bool:
            return fitting.estimate_run(changed, "cuda").total <= available

        taken = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "_words", lambda change: taken.append(change) or change[0])
            assert fitting._together(plan, fits) == [" and ".join(key for key, _ in taken)]
        assert fits(fitting._with(plan, taken))
        for change in taken:
            assert not fits(fitting._with(plan, [other for other in taken if other != change])), change

    def test_slices_of_the_current_weights(self, argv):
        """Where the rest is small, a whole weight with its float64 copies is the most: here of down_proj."""
        plan = self.plan(argv, training__seq_len=2, training__local_batch_size=1, hdpissa__slices="orthogonal")
        assert fitting.estimate_run(plan, "cpu").phase != "refresh"
        estimate = fitting.estimate_run(fitting._with(plan, [("hdpissa.refresh_steps", 5)]), "cpu")
        decomposed = 8 * (352 * 128 + 4 * 128**2) + 4 * 2 * 4 * (352 + 128)
        assert estimate.phase == "refresh"
        assert estimate.passing == {"a weight and its decomposition": 4 * 352 * 128 + decomposed}
        random = fitting._with(plan, [("hdpissa.refresh_steps", 5), ("hdpissa.slices", "random")])
        assert fitting.estimate_run(random, "cpu").phase != "refresh"

    @pytest.mark.parametrize("offload", [False, True])
    def test_a_head_beside_adapters_has_gradients_and_moments_on_the_device(self, offload: bool, tmp_path: Path):
        classifiers.write_classifier(tmp_path / "model")
        classifiers.write_pairs(tmp_path / "records.tsv")
        changes = {"hdpissa__num_adapters": 1, "adapter__rank": 2, "hdpissa__offload_moments": str(offload).lower()}
        argv = classifiers.options(tmp_path / "model", tmp_path / "records.tsv", tmp_path / "out", **changes)
        plan = plan_run(manager.load(argv), 1)
        held = fitting.estimate_run(plan, "cuda").held
        width, adapters = plan.decoder.hidden_size, held["deltas dA, dB"]
        head = 4 * (width * width + width + 2 * width + 2)
        assert held["trained weights (fp32)"] == head
        assert held["gradients"] == adapters + head
        assert held["optimizer's moments"] == 2 * (head if offload else adapters + head)

    def test_bytes_of_a_fold_are_spread_over_its_steps(self, argv):
        plan = plan_run(manager.load(argv()), 2)
        local = fitting._with(plan, [("hdpissa.local_steps", 4)])
        every, fourth = (fitting.traffic_gb(of, 2, kept=False) for of in (plan, local))
        assert fourth["gather_gb"] == every["gather_gb"] > 0
        assert fourth["exchange_gb"] == every["exchange_gb"] / 4 > 0

    @pytest.mark.parametrize("samples", ["own", "all"])
    @pytest.mark.parametrize("k", [1, 2])
    def test_bytes_of_the_adapters_gradients(self, k: int, samples: str, argv):
        """On two workers: an all-reduce where they share one adapter, else a reduce-scatter if samples = "all"."""
        overrides = {"hdpissa__num_adapters": k, "hdpissa__samples": samples, "adapter__rank": 3}
        plan = plan_run(manager.load(argv(**overrides, hdpissa__exchange="factors")), 2)
        shapes = [*plan.decoder.linear_shapes().values()] * plan.decoder.num_hidden_layers
        gradients = 4 * 3 * sum(map(sum, shapes)) * (k == 1 or samples == "all")
        updates = (k - 1) * 4 * 3 * sum(-(-out // 2) + width for out, width in shapes)
        assert fitting.traffic_gb(plan, 2, kept=False)["exchange_gb"] == (updates + gradients) / 1e9

    def test_bytes_of_gradients_that_fsdp_sums(self, argv):
        """Two replicas of two shards: a reduce-scatter, then an all-reduce of the shard; once a step where that takes
        little, else for every micro-batch."""
        lora = {"adapter__method": "lora", "adapter__rank": 4, "parallelism__data_parallel_replicate_degree": 2}
        plan = plan_run(manager.load(argv(**lora, training__global_batch_size=8)), 4)
        shapes = [*plan.decoder.linear_shapes().values()] * plan.decoder.num_hidden_layers
        shard = sum(4 * width // 2 + out // 2 * 4 for out, width in shapes)
        assert fitting.traffic_gb(plan, 3, kept=False)["exchange_gb"] == 4 * shard * (1 + 2 * 1 / 2) / 1e9
        full = fitting._with(plan, [("adapter.method", "full")])
        one, three = (fitting.traffic_gb(full, n, kept=False)["exchange_gb"] for n in (1, 3))
        assert three == 3 * one > 0
        alone = plan_run(manager.load(argv(adapter__method="full")), 1)
        assert fitting.traffic_gb(alone, 3, kept=False) == {"gather_gb": 0, "exchange_gb": 0}

    def test_what_is_offloaded_takes_nothing_of_a_gpu(self, argv):
        plan = self.plan(argv)
        before = fitting.estimate_run(plan, "cuda").held
        moments = fitting._with(plan, [("hdpissa.offload_moments", True)])
        held = fitting.estimate_run(moments, "cuda").held
        assert {key for key in held if held[key] != before[key]} == {"optimizer's moments"}
        assert held["optimizer's moments"] == 0
        assert fitting.estimate_run(moments, "cpu").held == fitting.estimate_run(plan, "cpu").held
        held = fitting.estimate_run(fitting._with(plan, [("training.enable_cpu_offload", True)]), "cuda").held
        assert {key for key in held if held[key] != before[key]} == {"weights"}
        assert held["weights"] == 0

    def test_what_the_gathers_will_come_to(self, argv):
        always = self.plan(argv)
        assert fitting.gathering(always, "cuda", 10**12) is None
        plan = fitting._with(always, [("parallelism.fsdp_reshard_after_forward", "default")])
        assert fitting.gathering(plan, "cuda", 10**12).startswith("memory: W will stay gathered over the micro-batches")
        assert fitting.gathering(plan, "cuda", 10**9).startswith("memory: W will be gathered for every micro-batch")
        one = fitting._with(plan, [("training.local_batch_size", 4)])
        assert fitting.gathering(one, "cuda", 10**12) is None
