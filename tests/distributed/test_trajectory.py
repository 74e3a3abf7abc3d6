"""The trajectory depends on K, the seed and the global batch: not on workers, meshes, kernels or interruptions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.kit import runs
from titan_hd.checkpoint.reader import CheckpointReader
from tools.convert_checkpoint import dcp_to_hf

# Runs on other numbers of workers add the same fp32 numbers in another order.
LOSS_TOLERANCE = 1e-5
# Change of a weight after three steps, relative; fp32 weights of size 1 that change by 1e-3.
DELTA_TOLERANCE = 1e-3
# The same after the six steps of `setup`: they move a weight further, and what is rounded stays as large.
LONGER_DELTA_TOLERANCE = 1e-4
# A bf16 master rounds an element the other way where its fp32 value differs in the last bit: 2^-8 of one weight.
BF16_LOSS_TOLERANCE = 1e-4


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=20)
    runs.write_records(tmp_path / "validation.jsonl", count=5, seed=1)

    def argv(dump: str, **overrides):
        values = {
            "training__global_batch_size": 8,
            "hdpissa__num_adapters": 4,
            "data__shuffle": "true",
            "training__steps": 6,
            "lr_scheduler__decay_type": "cosine",
            "lr_scheduler__warmup_steps": 2,
        } | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return argv


# Methods that every run below knows by name, beside hdpissa: what they change in the configuration.
ADAPTERS = {
    "lora": {"adapter__method": "lora", "adapter__rank": 3, "adapter__alpha": 4},
    "pissa": {"adapter__method": "pissa", "adapter__rank": 3},
    "dora": {"adapter__method": "dora", "adapter__rank": 3, "adapter__loraplus_lr_ratio": 4},
}


# Those that tensor parallelism does not split. Of bat's D of a row, and of most others, four workers have empty shards.
UNSPLIT = {
    "mora": {"adapter__method": "mora", "adapter__rank": 1, "adapter__dropout": 0.2},
    "hira": {"adapter__method": "hira", "adapter__rank": 3, "adapter__dropout": 0.2},
    "bone": {"adapter__method": "bone", "adapter__rank": 5, "adapter__dropout": 0.2},
    "bat": {"adapter__method": "bat", "adapter__rank": 1, "adapter__dropout": 0.2},
    "bat-row": {"adapter__method": "bat", "adapter__rank": 1, "adapter__bat_form": "row"},
}
MESHES = [
    (mesh, m) for mesh in ("tp", "tp-fsdp", "hsdp") for m in ("hdpissa", "full", "random", "all", "bfloat16", *ADAPTERS)
]
MESHES += [("hsdp", m) for m in UNSPLIT if m != "bat-row"]
# Every method on the mesh that asks most of it, and each mesh with some methods; the rest takes minutes more. DoRA has
# all that LoRA has, whose losses on this mesh are those of the test with dropout.
QUICK = [("tp-fsdp", m) for m in ("hdpissa", "full", "pissa", "dora")]
QUICK += [("hsdp", m) for m in ("hdpissa", "full", "bat")]


def quick_or_slow(cases, quick):
    """The cases, those that are not among the quick ones marked slow."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("mesh", "method"), quick_or_slow(MESHES, QUICK))
def test_same_losses_on_any_mesh(method, mesh, workers, setup, tmp_path):
    """Tensor parallelism and replicas, with resume from one mesh on another, and clipping that binds."""
    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    changes = {
        "hdpissa": {"training__max_norm": 0.1},
        "full": {"adapter__method": "full", "hdpissa__num_adapters": 0, "training__max_norm": 0.1},
        "random": {"hdpissa__slices": "random"},
        "all": {"hdpissa__samples": "all", "training__max_norm": 0.1},
        "bfloat16": {"training__master_dtype": "bfloat16", "optimizer__lr": 1e-3},
        **{name: {**settings, "training__max_norm": 0.1} for name, settings in (ADAPTERS | UNSPLIT).items()},
    }[method]
    world_size, degrees = {
        "tp": (2, {"parallelism__tensor_parallel_degree": 2}),
        "tp-fsdp": (4, {"parallelism__tensor_parallel_degree": 2}),
        "hsdp": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    }[mesh]
    changes |= {"checkpoint__enable": "true", "checkpoint__interval": 3}
    tolerance = BF16_LOSS_TOLERANCE if method == "bfloat16" else LOSS_TOLERANCE
    (plain,) = workers.run(1, runs.train, setup("plain", **changes))
    first = workers.run(world_size, runs.train, setup("m", **changes, **degrees), stop_after=3)[0]
    rest = workers.run(1, runs.train, setup("m", **changes))[0]
    assert first + rest == pytest.approx(plain, rel=tolerance)
    middle = Path("checkpoint", "step-3")
    shutil.copytree(tmp_path / "plain" / middle, tmp_path / "n" / middle)
    rest = workers.run(world_size, runs.train, setup("n", **changes, **degrees))[0]
    assert rest == pytest.approx(plain[3:], rel=tolerance)
    exported, want = runs.exported(tmp_path / "n"), runs.exported(tmp_path / "plain")
    assert exported.keys() == want.keys()
    error = sum((exported[k] - want[k]).norm() ** 2 for k in want) / sum(want[k].norm() ** 2 for k in want)
    assert error.sqrt() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hdpissa", "full"])
@pytest.mark.parametrize("whole", ["none", "sequence", "vocabulary"])
def test_same_losses_on_a_cube(whole, method, eight_workers, setup, tmp_path):
    """2 replicas x 2 shards x 2 tp ranks, to resume from one mesh on another."""
    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    changes = {"training__max_norm": 0.1, "checkpoint__enable": "true"}
    if method == "full":
        changes |= {"adapter__method": "full", "hdpissa__num_adapters": 0}
    cube = {"parallelism__tensor_parallel_degree": 2, "parallelism__data_parallel_replicate_degree": 2}
    cube |= {"none": {}, "sequence": {"parallelism__sequence_parallel": "false"}}.get(
        whole, {"parallelism__loss_parallel": "false"}
    )
    (plain,) = eight_workers.run(1, runs.train, setup("plain", **changes))
    first = eight_workers.run(8, runs.train, setup("m", **changes, **cube), stop_after=3)[0]
    rest = eight_workers.run(2, runs.train, setup("m", **changes))[0]
    assert first + rest == pytest.approx(plain, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("method", ["hdpissa", "lora"])
def test_dropout_with_tensor_parallelism(method, workers, setup, tmp_path):
    """The masks of one process: of a split input, each rank's columns of the mask of the whole."""
    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    changes = {"adapter__dropout": 0.3, "adapter__method": method, "training__steps": 4}
    if method == "lora":
        changes |= {"hdpissa__num_adapters": 0}
    tp = {"parallelism__tensor_parallel_degree": 2}
    (plain,) = workers.run(1, runs.train, setup("plain", **changes))
    assert workers.run(2, runs.train, setup("tp", **changes, **tp))[1] == pytest.approx(plain, rel=LOSS_TOLERANCE)
    assert workers.run(4, runs.train, setup("both", **changes, **tp))[3] == pytest.approx(plain, rel=LOSS_TOLERANCE)
    (without,) = workers.run(1, runs.train, setup("without", **changes | {"adapter__dropout": 0.0}))
    assert plain[-1] != pytest.approx(without[-1], rel=10 * LOSS_TOLERANCE)


VARIANTS = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2-tied": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
}


VARIANT_CASES = [(variant, method) for variant in VARIANTS for method in ("hdpissa", "full")]


@pytest.mark.parametrize(
    ("variant", "method"),
    quick_or_slow(VARIANT_CASES, [("biases", "hdpissa"), ("qwen3", "full")]),
)
def test_same_weights_of_every_variant_on_any_mesh(variant, method, workers, setup, tmp_path):
    """Biases (one is added once behind tensor parallelism's sum), norms of a rank's own heads, windows."""
    _, start = runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38, **VARIANTS[variant])
    changes = {"adapter__method": "full", "hdpissa__num_adapters": 0} if method == "full" else {}
    # SGD: proportional to the gradients, so that a wrong factor shows; at rates at which fp32 holds the change.
    rate = 0.1 if method == "full" else 1.0
    changes |= {"optimizer__name": "SGD", "optimizer__lr": rate, "training__steps": 3}
    for name, (world_size, tp) in {"one": (1, 1), "fsdp": (4, 1), "tp": (2, 2), "tp-fsdp": (4, 2)}.items():
        workers.run(world_size, runs.train, setup(name, **changes, parallelism__tensor_parallel_degree=tp))
    want = runs.exported(tmp_path / "one")
    if method == "full":
        assert all(not torch.equal(want[name], start[name]) for name in want), "everything is trained"
    for name in ("fsdp", "tp", "tp-fsdp"):
        errors = runs.delta_error(runs.exported(tmp_path / name), want, start)
        assert errors
        assert max(errors.values()) < DELTA_TOLERANCE, errors


EVERY = ["hdpissa", "full", "int8", "dropout", "random", "mute", *ADAPTERS, *UNSPLIT, "lora-dropout"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            m, marks=() if m in ("hdpissa", "full", "int8", "dora", "bone", "bat", "lora-dropout") else pytest.mark.slow
        )
        for m in EVERY
    ],
)
def test_same_losses_on_any_number_of_workers(method, workers, setup):
    changes = {
        "hdpissa": {},
        "full": {"adapter__method": "full", "hdpissa__num_adapters": 0},
        "dropout": {"adapter__dropout": 0.3},
        "int8": {"hdpissa__exchange_dtype": "int8"},
        "random": {"hdpissa__slices": "random"},
        "mute": {"hdpissa__mute_scalar": 1e-16},
        "lora-dropout": {**ADAPTERS["lora"], "adapter__dropout": 0.3},
        **ADAPTERS,
        **UNSPLIT,
    }[method]
    losses = {n: workers.run(n, runs.train, setup(f"{method}-{n}", **changes))[0] for n in (1, 2, 4)}
    assert losses[2] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    assert losses[4] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    assert len(set(losses[1])) == 6


def test_all_samples_are_one_adapter_of_all_directions(workers, setup, tmp_path):
    """Dropout, clipping that binds, accumulation: K = 4 of rank 1 on four workers against K = 1 of rank 4 on one."""
    changes = {"adapter__dropout": 0.3, "training__max_norm": 0.1}
    one = {"hdpissa__num_adapters": 1, "adapter__rank": 4}
    (want,) = workers.run(1, runs.train, setup("one", **changes, **one))
    dealt = workers.run(4, runs.train, setup("dealt", **changes, hdpissa__samples="all"))
    assert all(losses == pytest.approx(want, rel=LOSS_TOLERANCE) for losses in dealt)
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    errors = runs.delta_error(runs.exported(tmp_path / "dealt"), runs.exported(tmp_path / "one"), start)
    assert max(errors.values()) < LONGER_DELTA_TOLERANCE
    own = workers.run(1, runs.train, setup("own", **changes))[0]
    assert own[-1] != pytest.approx(want[-1], rel=10 * LOSS_TOLERANCE)


def test_dropout_changes_the_run(workers, setup):
    plain, dropped = (workers.run(1, runs.train, setup(f"d{p}", adapter__dropout=p))[0] for p in (0.0, 0.3))
    assert plain[0] == dropped[0], "the forward pass is the frozen layer's, with or without dropout"
    assert plain[-1] != dropped[-1]


def test_mute_scalar_of_the_paper_equals_the_exact_mute(workers, setup, tmp_path):
    for dump, scalar in (("exact", 0.0), ("scalar", 1e-16)):
        workers.run(2, runs.train, setup(dump, hdpissa__mute_scalar=scalar))
    exact, scalar = runs.exported(tmp_path / "exact"), runs.exported(tmp_path / "scalar")
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    assert max(runs.delta_error(scalar, exact, start).values()) < 1e-4


@pytest.mark.parametrize("method", ["hdpissa", "int8", "full"])
def test_resumed_run_equals_the_undisturbed_one(method, workers, setup, tmp_path):
    """3 steps, stop, 3 steps against 6 steps: bitwise on the same workers, to rounding on others, twice."""
    changes = {"checkpoint__enable": "true"}
    if method == "full":
        changes |= {"adapter__method": "full", "hdpissa__num_adapters": 0}
    elif method == "int8":  # what its rounding leaves belongs to the state
        changes |= {"hdpissa__exchange_dtype": "int8"}
    else:
        changes |= {"adapter__dropout": 0.1}
    (whole, _) = workers.run(2, runs.train, setup("whole", **changes))
    want = runs.exported(tmp_path / "whole")

    first = workers.run(2, runs.train, setup("same", **changes), stop_after=3)[0]
    rest = workers.run(2, runs.train, setup("same", **changes))[0]
    assert first + rest == whole
    got = runs.exported(tmp_path / "same")
    assert all(torch.equal(got[name], want[name]) for name in want)

    first = workers.run(4, runs.train, setup("other", **changes), stop_after=2)[0]
    second = workers.run(1, runs.train, setup("other", **changes), stop_after=2)[0]
    third = workers.run(2, runs.train, setup("other", **changes))[0]
    assert first + second + third == pytest.approx(whole, rel=LOSS_TOLERANCE)


def test_a_run_may_change_to_int8_and_back(workers, setup):
    """What int8 has left is folded by the first step that can; a checkpoint without it is one that left nothing."""
    changes = {"checkpoint__enable": "true"}
    losses = []
    for dtype, stop_after in (("int8", 2), ("float32", 2), ("int8", None)):
        argv = setup("switch", **changes, hdpissa__exchange_dtype=dtype)
        losses += workers.run(1, runs.train, argv, stop_after=stop_after)[0]
    (plain,) = workers.run(1, runs.train, setup("plain"))
    assert losses == pytest.approx(plain, rel=1e-3)
    assert losses != plain


def test_resume_within_a_period_of_refreshed_slices(workers, setup, tmp_path):
    """Steps 3 and 5 of 6 take slices anew. Bitwise on the same workers, in bf16, where a copy of the slices is bound,
    from within a period and from its end; to rounding on others. The cache holds what belongs to the start alone."""
    changes = {"checkpoint__enable": "true", "hdpissa__refresh_steps": 2, "metrics__log_freq": 1}
    bf16 = {"training__mixed_precision_param": "bfloat16", "adapter__svd_cache": tmp_path / "cache"}
    (whole, _) = workers.run(2, runs.train, setup("whole", **changes, **bf16))
    want = runs.exported(tmp_path / "whole")
    assert len(list((tmp_path / "cache").iterdir())) == 14
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r.get("refresh_seconds", 0) > 0] == [3, 5]
    assert [r["step"] for r in lines if "refresh_seconds" in r] == [3, 5]
    same = setup("same", **changes, **bf16)
    first, second = (workers.run(2, runs.train, same, stop_after=n)[0] for n in (3, 1))
    assert first + second + workers.run(2, runs.train, same)[0] == whole
    got = runs.exported(tmp_path / "same")
    assert all(torch.equal(got[name], want[name]) for name in want)

    (plain,) = workers.run(1, runs.train, setup("plain", **changes))
    first = workers.run(4, runs.train, setup("other", **changes), stop_after=3)[0]
    assert first + workers.run(2, runs.train, setup("other", **changes))[0] == pytest.approx(plain, rel=LOSS_TOLERANCE)


def test_resume_between_two_folds(workers, setup, tmp_path, caplog):
    """L = 4, 6 steps: folds after steps 4 and 6. Bitwise on the same workers, in bf16, from between two folds and from
    a fold; to rounding on others. Validation, which leaves no trace, sees the W of the last fold."""
    changes = {"checkpoint__enable": "true", "checkpoint__keep_latest_k": 0}
    changes |= {"hdpissa__local_steps": 4, "optimizer__weight_decay": 0.3}
    bf16 = {"training__mixed_precision_param": "bfloat16", "adapter__dropout": 0.1}
    validation = {"validation__enable": "true", "validation__freq": 1}
    validation["data__validation"] = tmp_path / "validation.jsonl"
    (whole, _) = workers.run(2, runs.train, setup("whole", **changes, **bf16, **validation))
    want = runs.exported(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert [seen.index(loss) for loss in seen] == [0, 0, 0, 0, 4, 4, 6]
    same = setup("same", **changes, **bf16)
    first, second = (workers.run(2, runs.train, same, stop_after=n)[0] for n in (3, 1))
    assert first + second + workers.run(2, runs.train, same)[0] == whole
    got = runs.exported(tmp_path / "same")
    assert all(torch.equal(got[name], want[name]) for name in want)
    kept = {n: CheckpointReader(tmp_path / "same" / "checkpoint" / f"step-{n}").holds for n in (3, 4, 6)}
    assert [holds("unfolded.rates") for holds in kept.values()] == [True, False, False]
    assert [holds("residuals.model.layers.0.mlp.up_proj.delta_A") for holds in kept.values()] == [True, False, False]
    for step, said in ((3, True), (4, False)):
        caplog.clear()
        folder, out = tmp_path / "same" / "checkpoint" / f"step-{step}", tmp_path / f"hf-{step}"
        dcp_to_hf(folder, out, str(tmp_path / "model"), None, 1e9)
        lines = [record.getMessage() for record in caplog.records if "two folds" in record.getMessage()]
        assert (
            lines
            == [f"{folder}: saved between two folds of hdpissa.local_steps: its weights are those of the last one"]
            * said
        )

    (plain,) = workers.run(1, runs.train, setup("plain", **changes))
    first = workers.run(4, runs.train, setup("other", **changes), stop_after=2)[0]
    assert first + workers.run(2, runs.train, setup("other", **changes))[0] == pytest.approx(plain, rel=LOSS_TOLERANCE)
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    errors = runs.delta_error(runs.exported(tmp_path / "other"), runs.exported(tmp_path / "plain"), start)
    assert max(errors.values()) < LONGER_DELTA_TOLERANCE


def test_more_steps_than_before(workers, setup, tmp_path):
    """L = 2, from 3 steps to 4: bitwise from a checkpoint between two folds, not behind a fold that cut a period short.
    What waits for a fold is neither left out nor folded as something else."""
    changes = {"checkpoint__enable": "true", "hdpissa__local_steps": 2, "training__steps": 3}
    changes |= {"lr_scheduler__decay_type": "constant"}
    more = {**changes, "training__steps": 4}
    whole = workers.run(1, runs.train, setup("whole", **more))[0]
    first = workers.run(1, runs.train, setup("within", **changes), stop_after=1)[0]
    with pytest.raises(RuntimeError, match=r"training\.steps, training\.epochs: the checkpoint of step 1, with which"):
        workers.run(1, runs.train, setup("within", **changes | {"training__steps": 1}))
    other = {"hdpissa__local_steps": 1, "checkpoint__allow_mismatch": "hdpissa.local_steps"}
    with pytest.raises(RuntimeError, match=r"hdpissa\.local_steps: the checkpoint of step 1 lies between two folds"):
        workers.run(1, runs.train, setup("within", **changes | other))
    assert first + workers.run(1, runs.train, setup("within", **more))[0] == whole
    cut = workers.run(1, runs.train, setup("cut", **changes))[0] + workers.run(1, runs.train, setup("cut", **more))[0]
    assert cut[:3] == whole[:3]
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    got, want = runs.exported(tmp_path / "cut"), runs.exported(tmp_path / "whole")
    assert max(runs.delta_error(got, want, start).values()) > 0


def largest_residual(argv) -> float:
    run = runs.trainer(argv)
    run.close()
    return run.update.registry.deltas.abs().max().item()


def test_what_int8_has_left_goes_on_or_is_dropped(workers, setup):
    int8 = {"checkpoint__enable": "true", "hdpissa__exchange_dtype": "int8"}
    workers.run(1, runs.train, setup("int8", **int8), stop_after=1)
    assert workers.run(1, largest_residual, setup("int8", **int8))[0] > 0
    other = {"hdpissa__aggregate": "sum", "checkpoint__allow_mismatch": "hdpissa.aggregate"}
    assert workers.run(1, largest_residual, setup("int8", **int8, **other)) == [0]


def test_random_slices_are_drawn_anew_for_every_period(workers, setup):
    """As anywhere the same on any number of workers; other than those of the start."""
    changes = {"hdpissa__slices": "random", "hdpissa__refresh_steps": 2, "training__steps": 4}
    (one,), kept = (
        workers.run(1, runs.train, setup(f"one-{s}", **changes | {"hdpissa__refresh_steps": s})) for s in (2, 0)
    )
    assert workers.run(2, runs.train, setup("two", **changes))[0] == pytest.approx(one, rel=LOSS_TOLERANCE)
    assert one[:3] == kept[0][:3]  # step 3 is the first with other slices, and shows in the loss of step 4
    assert one[3] != pytest.approx(kept[0][3], rel=10 * LOSS_TOLERANCE)


@pytest.mark.parametrize(("tied", "method"), quick_or_slow([(False, "hdpissa"), (True, "full")], [(False, "hdpissa")]))
def test_validation_leaves_no_trace(method, tied, workers, setup, tmp_path):
    """Forward passes without a backward pass once left the head gathered: a checkpoint after them was not sharded."""
    runs.write_model(tmp_path / "model", tie_word_embeddings=tied)
    changes = {"checkpoint__enable": "true", "checkpoint__interval": 2, "checkpoint__keep_latest_k": 0}
    if method == "full":
        changes |= {"adapter__method": "full", "hdpissa__num_adapters": 0}
    validation = {
        "validation__enable": "true",
        "validation__freq": 2,
        "data__validation": json.dumps(
            [{"name": n, "path": str(tmp_path / "validation.jsonl")} for n in ("main", "again")]
        ),
    }
    plain = workers.run(2, runs.train, setup("plain", **changes))[0]
    validated = workers.run(2, runs.train, setup("validated", **changes, **validation))[0]
    assert validated == plain
    lines = [json.loads(line) for line in (tmp_path / "validated" / "metrics.jsonl").read_text().splitlines()]
    measured = [(r["validation_loss"], r["validation_loss/again"]) for r in lines if "validation_loss" in r]
    assert len(measured) == 4
    assert all(main == again for main, again in measured), "two sets of the same records"
    got, want = runs.exported(tmp_path / "validated"), runs.exported(tmp_path / "plain")
    assert all(torch.equal(got[name], want[name]) for name in want)
    again = setup("validated", **changes, **validation, checkpoint__load_step=4)
    assert workers.run(2, runs.train, again)[0] == plain[4:]


def test_resume_refuses_another_number_of_adapters(workers, setup):
    workers.run(2, runs.train, setup("k", checkpoint__enable="true"), stop_after=1)
    with pytest.raises(RuntimeError, match=r"hdpissa\.num_adapters: the checkpoint has 4, this run 2"):
        workers.run(2, runs.train, setup("k", checkpoint__enable="true", hdpissa__num_adapters=2))


def test_checkpoints_are_complete_and_few(workers, setup, tmp_path):
    workers.run(2, runs.train, setup("c", checkpoint__enable="true", checkpoint__interval=1))
    folders = sorted(p.name for p in (tmp_path / "c" / "checkpoint").iterdir())
    assert folders == ["step-5", "step-6"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_torn_checkpoint_is_not_loaded(workers, setup, tmp_path):
    argv = setup("t", checkpoint__enable="true")
    workers.run(2, runs.train, argv, stop_after=2)
    (tmp_path / "t" / "checkpoint" / "step-4.partial").mkdir()
    assert len(workers.run(2, runs.train, argv)[0]) == 4


def test_compile_and_checkpointing_with_virtual_adapters(workers, setup):
    """Four adapters on one worker take turns inside one compiled block: no recompilation, same losses."""
    plain = workers.run(1, runs.train, setup("plain", training__steps=3))[0]
    changes = {"training__steps": 3, "compile__enable": "true", "activation_checkpoint__mode": "full"}
    both = workers.run(1, runs.train_traced, setup("both", **changes))[0]
    assert both == pytest.approx(plain, rel=LOSS_TOLERANCE)


def fails_with_a_bad_weight(argv) -> str:
    try:
        runs.train(argv)
    except FloatingPointError as error:
        return str(error)
    return ""


def test_a_non_finite_gradient_stops_every_rank_and_names_the_weight(workers, setup, tmp_path):
    """A weight of v_proj in block 1 whose products overflow makes the loss NaN: no weight is touched, nobody hangs."""
    weights = runs.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0] = 3e38
    runs.save_file(weights, tmp_path / "model" / "model.safetensors")
    messages = workers.run(2, fails_with_a_bad_weight, setup("bad", hdpissa__slices="random"))
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        "step 1: the gradient of model.layers.0.self_attn.q_proj is not finite; W is as it was"
    )


def effective_rank(delta: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    p = torch.linalg.svdvals(delta.double())
    p = p / p.sum()
    return torch.exp(-(p * p.clamp(min=1e-30).log()).sum()).item()


@pytest.mark.slow
def test_effective_rank_grows_with_the_number_of_adapters(workers, tmp_path):
    """Section 6 of the paper: eight slices of rank 4 change W in many more directions than one."""
    runs.write_model(
        tmp_path / "model",
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_key_value_heads=4,
        num_hidden_layers=1,
    )
    runs.write_records(tmp_path / "records.jsonl", count=64)
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    ranks = {}
    for k in (1, 8):
        argv = runs.options(
            tmp_path / "model",
            tmp_path / "records.jsonl",
            tmp_path / f"k{k}",
            hdpissa__num_adapters=k,
            hdpissa__aggregate="sum",
            adapter__rank=4,
            training__global_batch_size=16,
            training__steps=8,
            optimizer__lr=1e-3,
        )
        workers.run(2, runs.train, argv)
        got = runs.exported(tmp_path / f"k{k}")
        ranks[k] = {n: effective_rank(got[n] - start[n]) for n in got if "proj" in n}
    for name, rank in ranks[1].items():
        assert ranks[8][name] > 3 * rank, (name, rank, ranks[8][name])
