"""What the exchange promises beyond its result: bytes, memory, order, refusals, precision."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit import runs
from tests.kit.exchange import SHAPES, build, draw, prepared
from titan_hd.distributed.adapter_samples import OwnSamples
from titan_hd.distributed.collectives import TRAFFIC
from titan_hd.distributed.flat import square_sum
from titan_hd.distributed.update.fold import Fold, FoldSettings, refuse_non_finite
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import Topology


def fill(registry, size=1.0):
    first = registry.mesh.get_local_rank("adapter") * registry.hosted
    for name, entry in registry.entries.items():
        for key in ("delta_A", "delta_B"):
            local = getattr(entry.layer, key).detach().to_local()
            full = draw(name + key, (registry.num_adapters, *local.shape[1:]))
            local.copy_(size * full[first : first + registry.hosted])


def weights(registry):
    return {name: e.layer.weight.detach().full_tensor() for name, e in registry.entries.items()}


# -- bytes ------------------------------------------------------------------------------------------------------------


def moved(num_adapters, replicate, shard, exchange, cache_gb, wire):
    registry, fold = prepared(num_adapters, replicate, shard, exchange, cache_gb, wire=wire)
    fill(registry)
    before = TRAFFIC.received
    fold(lr=0.0, step=0)
    return TRAFFIC.received - before, sum(w.received for w in fold.plan.weights)


@pytest.mark.parametrize("wire", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("world_size", "num_adapters", "replicate", "exchange", "cache_gb"),
    [
        (1, 4, 1, "auto", None),
        (2, 2, 1, "factors", None),
        (2, 4, 1, "factors", 0.0),
        (4, 4, 1, "factors", None),
        (4, 2, 1, "factors", None),
        (4, 4, 2, "factors", 0.0),
        (4, 4, 1, "dense", None),
        (4, 4, 2, "dense", None),
        (4, 2, 1, "auto", None),
    ],
)
def test_bytes_counted_at_the_collectives_are_the_plans(
    world_size, num_adapters, replicate, exchange, cache_gb, wire, workers
):
    shard = world_size // replicate
    results = workers.run(world_size, moved, num_adapters, replicate, shard, exchange, cache_gb, wire)
    for counted, planned in results:
        assert counted == planned


# -- memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, and the most that live at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        known_before = {t.untyped_storage()._cdata for t in _tensors((arguments, kwargs))}
        result = function(*arguments, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known and key not in known_before:
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size


def _tensors(tree):
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def peak_of_fold(num_adapters, exchange, cache_gb, in_flight, wire):
    registry, fold = prepared(num_adapters, 1, 2, exchange, cache_gb, in_flight=in_flight, wire=wire)
    fill(registry)
    gc.collect()
    with LiveBytes() as memory:
        fold(lr=0.1, step=0)
    buckets, topology = fold.plan.buckets, fold.plan.topology
    bounds = [ROUTES[b.route].memory([*b.shapes.values()], topology, b.cached, "cpu") for b in buckets]
    held, computing = zip(*bounds)
    return memory.peak, sum(sorted(held)[-in_flight:]) + max(computing)


@pytest.mark.parametrize("exchange", ["factors", "dense"])
@pytest.mark.parametrize("cache_gb", [None, 0.0])
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("wire", [torch.float32, torch.int8])
def test_memory_stays_under_the_stated_bound(exchange, cache_gb, in_flight, wire, workers):
    for peak, bound in workers.run(2, peak_of_fold, 4, exchange, cache_gb, in_flight, wire):
        assert 0 < peak <= bound + 4096  # a few scalars
        assert peak > bound / 3, "the bound says something"


# -- overlap, agreement, faults ---------------------------------------------------------------------------------------


def folded(in_flight, cache_gb=None, wire=torch.float32):
    registry, fold = prepared(4, 1, 4, "factors", cache_gb, in_flight=in_flight, wire=wire)
    fill(registry, size=1e-2)
    fold(lr=0.1, step=3)
    return weights(registry)


def test_overlap_does_not_change_a_bit(workers):
    one, three = (workers.run(4, folded, n)[0] for n in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in SHAPES)


def test_gathered_static_factors_do_not_change_a_bit(workers):
    cached, gathered = (workers.run(4, folded, 2, gb)[0] for gb in (None, 0.0))
    assert all(torch.equal(cached[name], gathered[name]) for name in SHAPES)


def test_bf16_on_the_wire_costs_its_rounding_only(workers):
    exact, rounded = (workers.run(4, folded, 2, None, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    for name in SHAPES:
        change = exact[name] - draw(name, SHAPES[name])
        error = (exact[name] - rounded[name]).norm() / change.norm()
        assert 1e-5 < error < 2**-8  # half a unit in the last place of bf16, relative to the factors


def proposals(registry, step):
    """Of a step, what an optimizer would add: per weight and tensor, [K, r, in] or [K, out, r], of unequal rows."""
    drawn = {}
    for name, entry in registry.entries.items():
        for key in ("delta_A", "delta_B"):
            local = getattr(entry.layer, key).detach().to_local()
            drawn[name, key] = 1e-2 * draw(f"{step}{name}{key}", (registry.num_adapters, *local.shape[1:])).exp()
    return drawn


def in_int8(num_adapters, replicate, shard, exchange, steps):
    """W, what has left, and what stays, after so many folds."""
    registry, fold = prepared(num_adapters, replicate, shard, exchange, rank=2, wire=torch.int8)
    first, left = registry.mesh.get_local_rank("adapter") * registry.hosted, {}
    take = fold._outgoing.take

    def taken(names):
        leaving = take(names)
        for name, hosted in zip(names, leaving):
            left[name] = [sent.double() + before for sent, before in zip(hosted.deltas(), left.get(name, (0, 0)))]
        return leaving

    fold._outgoing.take = taken
    for step in range(steps):
        for (name, key), values in proposals(registry, step).items():
            local = getattr(registry.entries[name].layer, key).detach().to_local()
            local.add_(values[first : first + registry.hosted])
        fold(lr=0.0, step=step)
    names = [(name, key) for name in SHAPES for key in ("delta_A", "delta_B")]
    whole = {name: getattr(registry.entries[name[0]].layer, name[1]).detach() for name in names}
    stays = {name: tensor.full_tensor() for name, tensor in whole.items()}
    proposed = {name: torch.stack([proposals(registry, step)[name] for step in range(steps)]) for name in names}
    return weights(registry), left, stays, proposed


@pytest.mark.parametrize("exchange", ["factors", "dense"])
def test_int8_loses_nothing_over_the_steps(exchange, workers):
    """What has left and what stays are what was proposed, to the rounding of fp32 sums."""
    ((_, left, stays, proposed),) = workers.run(1, in_int8, 4, 1, 1, exchange, 5)
    for (name, key), rest in stays.items():
        along, sent = (2, left[name][0]) if key == "delta_A" else (1, left[name][1])
        steps = proposed[name, key]
        whole = steps.double().sum(0)
        torch.testing.assert_close(sent + rest, whole, rtol=0, atol=1e-7 * whole.abs().max().item())
        # Of a row or column no more stays than half a 127th of the largest element that it ever had, by itself or with
        # what stayed of another step.
        half = steps.abs().amax(0).amax(along, keepdim=True) * (1 + 1 / 254) / 254
        assert (rest.abs() <= half).all()
        assert (rest.abs() > half / 10).float().mean() > 0.3, "something stays"


def test_int8_does_not_depend_on_workers_or_route(workers):
    """What leaves is the same bit for bit, so that W differs by the order of sums alone."""
    ((want, _, residuals, _),) = workers.run(1, in_int8, 4, 1, 1, "factors", 3)
    for world_size, replicate, exchange in ((1, 1, "dense"), (2, 1, "factors"), (4, 2, "factors"), (4, 1, "dense")):
        for got, _, stays, _ in workers.run(world_size, in_int8, 4, replicate, world_size // replicate, exchange, 3):
            assert all(torch.equal(stays[name], rest) for name, rest in residuals.items())
            for name, w in want.items():
                change = (w - draw(name, SHAPES[name])).norm()
                assert (got[name] - w).norm() < 1e-5 * change


def int8_of_nothing():
    """Of rows of zeros, and of numbers too small for a scale."""
    registry, fold = prepared(2, 1, 1, wire=torch.int8)
    registry.deltas.detach()[::7] = 1e-44
    before, kept = weights(registry), registry.deltas.detach().clone()
    fold(lr=0.0, step=0)
    return all(torch.equal(before[name], w) for name, w in weights(registry).items()), torch.equal(
        registry.deltas.detach(), kept
    )


def test_int8_of_nothing_is_nothing(workers):
    assert workers.run(1, int8_of_nothing) == [(True, True)]


def disagree():
    import torch.distributed as dist

    try:
        prepared(2, 1, 2, "factors" if dist.get_rank() else "dense")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_plan_differently_say_so(workers):
    messages = workers.run(2, disagree)
    assert messages[0] == messages[1]
    assert messages[0].startswith("hdpissa.exchange: rank 1 plans another update than rank 0")


def poisoned(value):
    import torch.distributed as dist

    registry, fold = prepared(2, 1, 2)
    fill(registry)
    before = weights(registry)
    if dist.get_rank() == 1:
        for name in ("layers.1.c", "layers.0.b"):
            registry.entries[name].layer.delta_B.detach().to_local()[0, 0, 0] = value
    squares = square_sum(registry.deltas)
    dist.all_reduce(squares)
    try:
        refuse_non_finite(registry, 0, 0.0, squares.item())
        fold(lr=0.1, step=0)
    except FloatingPointError as error:
        return str(error), all(torch.equal(before[n], w) for n, w in weights(registry).items())
    return "", False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_update_on_one_rank_stops_all_before_w_is_touched(value, workers):
    for message, untouched in workers.run(2, poisoned, value):
        assert message.startswith("step 1: the update of layers.0.b is not finite")
        assert untouched


# -- what a step touches ----------------------------------------------------------------------------------------------


class Constants(TorchDispatchMode):
    """Counts tensors that are made of Python values: on a GPU each is a copy that the host waits for."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.made += function is torch.ops.aten.lift_fresh.default
        return function(*arguments, **(kwargs or {}))


def constants_of_a_fold():
    """Of HSDP with K < W: the holders of the adapters are not the shards in their order."""
    with Constants() as control:
        torch.tensor([1])
    assert control.made == 1
    registry, fold = prepared(2, 2, 2, "factors")
    fill(registry)
    with Constants() as constants:
        fold(lr=0.1, step=0)
    return constants.made


def test_a_fold_makes_no_constants(workers):
    assert workers.run(4, constants_of_a_fold) == [0] * 4


def shared_memory():
    """After writing through the flat tensors and through a bound leaf: what the layers' own tensors see."""
    registry, _ = prepared(4, 1, 2, "factors")
    entry = registry.entries["layers.0.b"]
    OwnSamples(registry, torch.bfloat16, in_flight=2).activate(1, last=True)
    a, b, da, db = entry.layer.bound
    (da.sum() + 2 * db.sum()).backward()
    with torch.no_grad():
        registry.deltas.fill_(3.0)
    seen = [entry.layer.delta_A, entry.layer.delta_B, entry.layer.delta_A.grad, entry.layer.delta_B.grad]
    seen = [t.detach().to_local().flatten(1).unique(dim=1).flatten().tolist() for t in seen]
    fixed = [torch.equal(t, whole.to_local()[1].bfloat16()) for t, whole in ((a, entry.a), (b, entry.b))]
    moments = dict(registry.named_views(registry.gradients))
    views = torch.equal(moments["layers.0.b.delta_B"].full_tensor(), entry.layer.delta_B.grad.full_tensor())
    return seen, [da.unique().tolist(), db.unique().tolist()], fixed, views, registry.gradients.sum().item()


def test_layers_are_views_of_the_flat_tensors(workers):
    """Two adapters on each worker, of which the second was bound. b is [8, 30], r = 1."""
    for seen, leaves, fixed, views, total in workers.run(2, shared_memory):
        assert seen == [[3.0, 3.0], [3.0, 3.0], [0.0, 1.0], [0.0, 2.0]]
        assert leaves == [[3.0], [3.0]]
        assert all(fixed)
        assert views
        assert total == 30 + 2 * 8


# -- gradients of all samples -----------------------------------------------------------------------------------------


def order_of_gradients(argv: list[str]) -> list[str]:
    """What happens in a step to the gradients of adapters that learn from all samples."""
    run, log = runs.trainer(argv), []
    update, samples = run.update, run.update.samples

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def logged(*args, **kwargs):
            log.append(f"{name} {kwargs.get('last', '')}".strip())
            return original(*args, **kwargs)

        setattr(owner, name, logged)

    for owner, name in ((update, "bind"), (samples, "_send"), (samples, "_receive"), (update, "finish_gradients")):
        watch(owner, name)
    run.train_step()
    run.close()
    return log


@pytest.mark.parametrize("in_flight", [1, 2])
def test_gradients_travel_beside_the_last_backward_pass(in_flight, workers, tmp_path):
    """Those of two blocks, in a step of two micro-batches: each starts when it is complete, and few are under way."""
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    changes = {"hdpissa__samples": "all", "hdpissa__exchange_in_flight": in_flight, "training__global_batch_size": 4}
    argv = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "out", **changes)
    travel = {1: ["_send", "_send", "_receive", "finish_gradients", "_receive"]}
    travel[2] = ["_send", "_send", "finish_gradients", "_receive", "_receive"]
    for log in workers.run(2, order_of_gradients, argv):
        assert log == ["bind False", "bind True", *travel[in_flight]]


# -- bf16 masters -----------------------------------------------------------------------------------------------------


def bf16_folds(replicate, shard, steps, exchange):
    registry, dims = build(2, replicate, shard, 1, torch.bfloat16)
    shapes = {n: e.shape for n, e in registry.entries.items()}
    plan = plan_update(shapes, Topology(2, 1, replicate, shard), exchange)
    fold = Fold(registry, dims, plan, FoldSettings(seed=7))
    fold.prepare()
    for step in range(steps):
        fill(registry, size=2e-4)
        fold(lr=0.0, step=step)
    return weights(registry)


@pytest.mark.parametrize("exchange", ["factors", "dense"])
def test_stochastic_rounding_does_not_depend_on_the_workers(exchange, workers):
    """Bits belong to (seed, step, element). Sums in another order change the last fp32 bits of what is rounded, so one
    element in many thousands may round the other way."""
    one = workers.run(1, bf16_folds, 1, 1, 3, exchange)[0]
    for world_size, replicate in ((2, 1), (4, 1), (4, 2)):
        other = workers.run(world_size, bf16_folds, replicate, world_size // replicate, 3, exchange)[0]
        different = sum((one[n] != other[n]).sum().item() for n in SHAPES)
        assert different <= 2, f"{different} elements"


def test_bf16_masters_keep_tiny_updates_on_average(workers):
    """100 folds of an update that a bf16 add loses: the sum of them arrives within statistics."""
    got = workers.run(2, bf16_folds, 1, 2, 100, "factors")[0]
    registry_change = workers.run(2, one_fp32_fold)[0]
    for name, shape in SHAPES.items():
        start = draw(name, shape).bfloat16().float()
        expected = 100 * registry_change[name]
        lost = (start.bfloat16() + registry_change[name].bfloat16()).float() - start
        moved = got[name].float() - start
        # Each rounding errs by at most one unit, 2^-7 of |w|, so a sum of 100 has a standard deviation of at most five.
        deviation = (moved - expected) / (start.abs().clamp(min=0.01) * 2**-7 * 5)
        assert deviation.pow(2).mean().sqrt() < 1.0
        slope = (moved * expected).sum() / (expected * expected).sum()
        assert slope == pytest.approx(1.0, abs=0.25), name
        assert (lost != 0).float().mean() < 0.1, "a plain bf16 add loses such an update"


def one_fp32_fold():
    registry, fold = prepared(2, 1, 2)
    for name, entry in registry.entries.items():
        entry.layer.weight.detach().to_local().copy_(entry.layer.weight.detach().to_local().bfloat16().float())
        del name
    before = weights(registry)
    fill(registry, size=2e-4)
    fold(lr=0.0, step=0)
    return {name: w - before[name] for name, w in weights(registry).items()}
