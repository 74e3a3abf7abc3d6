"""Generation on the wrapped model of a run: the tokens of one process, on any mesh, whatever the workers' shares."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.kit import runs
from titan_hd.components.beam_search import beam_search
from titan_hd.components.generation import Sampling, generate
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import parallelize
from titan_hd.distributed.shards import load_weights, materialize
from titan_hd.distributed.tp.tensor_parallel import apply_tensor_parallel
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import read_hf_config

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 44, 3], [33], [12, 40], [7, 7, 7, 7], [21]]
NEW = 16


def wrapped(folder: Path, dims: ParallelDims, compile_blocks: bool = False) -> Decoder:
    with torch.device("meta"):
        model = Decoder(read_hf_config(folder))
    if dims.tp > 1:
        apply_tensor_parallel(model, dims.world["tp"])
    parallelize(model, dims, set(), torch.float32, "full" if compile_blocks else "none", compile_blocks)
    materialize(model, torch.device("cpu"))
    load_weights(model, dims, str(folder))
    return model.eval()


def share(dims: ParallelDims, stop: int, model: Decoder, sampling: Sampling) -> list[list[int]]:
    """This worker's rows: the first data-parallel worker has three prompts, the others one each."""
    bounds = [0, 3, *range(4, 3 + dims.dp_size)]
    first, last = bounds[dims.dp_rank], bounds[dims.dp_rank + 1]
    return generate(
        model,
        PROMPTS[first:last],
        {stop},
        NEW,
        torch.device("cpu"),
        sampling,
        first_index=first,
        group=dist.group.WORLD,
        tp_group=dims.world["tp"].get_group() if dims.tp > 1 else None,
    )


def generate_all(folder: Path, replicate: int, tp: int, stop: int, samplings: list[Sampling]) -> list[list[list[int]]]:
    dims = ParallelDims(replicate, dist.get_world_size() // tp // replicate, "cpu", tp)
    model = wrapped(folder, dims)
    return [share(dims, stop, model, sampling) for sampling in samplings]


@pytest.mark.parametrize(
    ("world_size", "replicate", "tp"),
    [(2, 1, 1), (2, 1, 2), (4, 1, 2), (4, 2, 1)],
    ids=["fsdp", "tp", "tp-fsdp", "hsdp"],
)
def test_the_tokens_of_one_process(workers, tmp_path, world_size: int, replicate: int, tp: int):
    runs.write_model(tmp_path, num_key_value_heads=2, intermediate_size=38)
    alone = Decoder(read_hf_config(tmp_path)).eval()
    alone.load_state_dict(runs.load_file(tmp_path / "model.safetensors"))
    device, samplings = torch.device("cpu"), [Sampling(), Sampling(1.0, top_k=30, top_p=0.95, seed=3)]
    stop = generate(alone, PROMPTS[:1], (), NEW, device)[0][6]
    want = [generate(alone, PROMPTS, {stop}, NEW, device, sampling) for sampling in samplings]
    assert len({len(row) for row in want[0]}) > 1
    results = workers.run(world_size, generate_all, tmp_path, replicate, tp, stop, samplings)
    for number in range(len(samplings)):
        by_rank = [result[number] for result in results]
        assert all(by_rank[rank] == by_rank[rank - rank % tp] for rank in range(world_size))
        rows = [row for rank in range(0, world_size, tp) for row in by_rank[rank]]
        assert rows == want[number][: len(rows)]


def generate_by_the_second(folder: Path, stop: int) -> tuple[list[list[int]], list[list[int]], int]:
    """The first worker has no prompts: it passes as often, and is given no tokens. Greedily, and with two beams."""
    model, device = wrapped(folder, ParallelDims(1, dist.get_world_size(), "cpu")), torch.device("cpu")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    prompts, group = PROMPTS[:4] if dist.get_rank() else [], dist.group.WORLD
    greedy = generate(model, prompts, {stop}, NEW, device, group=group)
    return greedy, beam_search(model, prompts, {stop}, NEW, device, 2, group), len(passes)


def test_a_worker_without_prompts_takes_part(workers, tmp_path):
    runs.write_model(tmp_path, num_key_value_heads=2, intermediate_size=38)
    alone = Decoder(read_hf_config(tmp_path)).eval()
    alone.load_state_dict(runs.load_file(tmp_path / "model.safetensors"))
    device = torch.device("cpu")
    stop = generate(alone, PROMPTS[:1], (), NEW, device)[0][6]
    first, second = workers.run(2, generate_by_the_second, tmp_path, stop)
    assert first[:2] == ([], [])
    assert second[0] == generate(alone, PROMPTS[:4], {stop}, NEW, device)
    assert second[1] == beam_search(alone, PROMPTS[:4], {stop}, NEW, device, 2)
    assert first[2] == second[2] > 1


def generate_with_noise(folder: Path) -> list[list[int]]:
    """The second tp rank computes other logits."""
    dims = ParallelDims(1, 1, "cpu", 2)
    model = wrapped(folder, dims)
    if dims.tp_rank:
        model.register_forward_hook(lambda module, args, logits: logits.flip(-1))
    return share(dims, -1, model, Sampling())


def test_tp_ranks_take_the_tokens_of_the_first(workers, tmp_path):
    """Were two of them to differ once, by a last bit, their halves of the model would go on with two texts."""
    runs.write_model(tmp_path, num_key_value_heads=2, intermediate_size=38)
    first, second = workers.run(2, generate_with_noise, tmp_path)
    assert first == second


def generate_compiled(folder: Path) -> tuple[list[list[int]], int]:
    from torch._dynamo.utils import counters

    counters.clear()
    dims = ParallelDims(1, dist.get_world_size(), "cpu")
    rows = share(dims, -1, wrapped(folder, dims, compile_blocks=True), Sampling())
    return rows, counters["stats"]["unique_graphs"]


def test_compiled_blocks_run_without_compilation(workers, tmp_path):
    """Every pass has another shape: each would be a compilation of many seconds."""
    runs.write_model(tmp_path)
    alone = Decoder(read_hf_config(tmp_path)).eval()
    alone.load_state_dict(runs.load_file(tmp_path / "model.safetensors"))
    want = generate(alone, PROMPTS[:3], (), NEW, torch.device("cpu"))
    assert workers.run(1, generate_compiled, tmp_path) == [(want, 0)]


def fails(folder: Path) -> str:
    dims = ParallelDims(1, 2, "cpu")
    model = wrapped(folder, dims)
    # Files cannot hold NaN: they are refused. Token 12 is of the second worker's prompt.
    model.model.embed_tokens.register_forward_hook(lambda _, ids, h: h.masked_fill((ids[0] == 12)[..., None], math.nan))
    try:
        share(dims, -1, model, Sampling())
    except FloatingPointError as error:
        return str(error)
    return ""


def test_logits_that_are_not_finite_on_one_worker_stop_all(workers, tmp_path):
    runs.write_model(tmp_path)
    messages = workers.run(2, fails, tmp_path)
    assert messages == ["new token 1: the logits are not finite, so there is no next token"] * 2
