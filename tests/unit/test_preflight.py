"""What is known before any process starts: defaults resolved for a number of workers, all faults at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import save_file

from tests.kit.runs import write_model
from titan_hd.checkpoint.folder import STATE_FILE
from titan_hd.config.job_config import JobConfig
from titan_hd.config.manager import ConfigError, load
from titan_hd.preflight import plan_run, refresh_line


@pytest.fixture
def config(tmp_path: Path):
    """A configuration of the debug model with a training file that is there."""
    (tmp_path / "train.jsonl").write_text('{"input_ids": [1], "labels": [1]}\n')
    needed = ["--data.train", str(tmp_path / "train.jsonl"), "--training.steps", "1"]

    def build(*argv: str, model: tuple[str, ...] = ("--model.name", "llama3", "--model.flavor", "debugmodel")):
        return load([*needed, "--adapter.rank", "4", *model, *argv])

    return build


def errors_of(config: JobConfig, workers: int) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_run(config, workers)
    assert all("\n" not in line for line in caught.value.errors)
    return caught.value.errors


@pytest.mark.parametrize(
    ("argv", "workers", "adapters", "batch"),
    [
        ([], 1, 1, 1),
        ([], 4, 4, 4),
        (["--hdpissa.num_adapters", "8"], 2, 8, 8),
        (["--hdpissa.num_adapters", "2", "--training.local_batch_size", "3"], 8, 2, 24),
        (["--training.global_batch_size", "32"], 4, 4, 32),
        (["--hdpissa.num_adapters", "8", "--hdpissa.samples", "all"], 2, 8, 2),
        (["--hdpissa.num_adapters", "8", "--hdpissa.samples", "all", "--training.global_batch_size", "6"], 2, 8, 6),
        (["--adapter.method", "full"], 4, 1, 4),
    ],
)
def test_defaults_for_a_number_of_workers(config, argv: list[str], workers: int, adapters: int, batch: int):
    plan = plan_run(config(*argv), workers)
    assert (plan.num_adapters, plan.global_batch_size) == (adapters, batch)
    assert (plan.dp_replicate, plan.dp_shard) == (1, workers)


def test_all_samples_still_need_holders_for_all_adapters(config):
    (line,) = errors_of(config("--hdpissa.num_adapters", "3", "--hdpissa.samples", "all"), 2)
    assert line.startswith("hdpissa.num_adapters: 3 adapters cannot be dealt to 2 data-parallel workers")
    (line,) = errors_of(config("--hdpissa.samples", "all", "--training.global_batch_size", "3"), 2)
    assert line.startswith("training.global_batch_size: 3 must be a multiple of 2 (local_batch_size 1 x 2 workers)")


def test_what_slices_of_the_current_weights_cost(config):
    changes = ["--hdpissa.refresh_steps", "20", "--adapter.svd", "randomized", "--adapter.target_modules", "q_proj"]
    line = refresh_line(plan_run(config(*changes, "--hdpissa.num_adapters", "2"), 2))
    operations = 2 * 4 * 17 * 64 * 64 * (8 + 16) / 2  # two products with W in each of 17 rounds, 16 columns to spare
    assert line == (
        "slices of the current weights every 20 steps: 2 decompositions on 2 worker(s), "
        f"about {operations:.1e} operations on each; training waits for them"
    )
    random = config("--hdpissa.refresh_steps", "20", "--hdpissa.slices", "random")
    assert refresh_line(plan_run(random, 2)) == "slices are drawn anew every 20 steps"
    for without in ([], ["--adapter.method", "lora", "--hdpissa.refresh_steps", "20"]):
        assert refresh_line(plan_run(config(*without), 2)) is None


def test_what_happens_between_two_folds_is_said(config):
    def said(*argv: str) -> list[str]:
        local = ["--hdpissa.local_steps", "4", "--checkpoint.enable", "--checkpoint.interval"]
        return [line for line in plan_run(config(*local, *argv), 1).warnings if "local_steps" in line]

    (line,) = said("6")
    assert line.startswith(
        "checkpoint.interval: no multiple of hdpissa.local_steps = 4: between two folds validation sees"
    )
    assert said("8") == said("6", "--adapter.method", "lora") == []
    (line,) = said("8", "--metrics.update_freq", "10")
    assert line == (
        "metrics.update_freq: no multiple of hdpissa.local_steps = 4: update_size of a step between two folds is 0"
    )
    assert said("8", "--metrics.update_freq", "8") == []
    assert len(said("6", "--metrics.update_freq", "10")) == 2


def test_replicas(config):
    plan = plan_run(config("--parallelism.data_parallel_replicate_degree", "2"), 8)
    assert (plan.dp_replicate, plan.dp_shard) == (2, 4)


def test_all_faults_at_once(config, tmp_path: Path):
    faulty = config(
        *("--optimizer.name", "Sophia"),
        *("--data.validation", str(tmp_path / "no.jsonl")),
        *("--data.template", "nowhere.txt"),
        *("--parallelism.data_parallel_shard_degree", "3"),
        *("--hdpissa.num_adapters", "3"),
        *("--adapter.target_modules", "q_proj,qproj"),
        *("--adapter.rank", "64"),
    )
    lines = errors_of(faulty, 2)
    for key in (
        "optimizer.name",
        "data.validation",
        "data.template",
        "parallelism.data_parallel_shard_degree",
        "hdpissa.num_adapters",
        "adapter.target_modules",
        "adapter.rank",
    ):
        assert sum(line.startswith(f"{key}: ") for line in lines) == 1, (key, lines)
    assert len(lines) == 7


def test_data_may_be_a_folder_or_a_glob(config, tmp_path: Path):
    plan_run(config("--data.validation", str(tmp_path / "*.jsonl")), 1)
    plan_run(config("--data.validation", str(tmp_path)), 1)
    (line,) = errors_of(config("--data.train", str(tmp_path / "*.parquet")), 1)
    assert line == f"data.train: no file matches {tmp_path}/*.parquet"


def test_only_instructions_need_the_template(config):
    for name in ("chat", "text", "tokens"):
        plan_run(config("--data.format", name, "--data.template", "nowhere.txt"), 1)
    for name in ("auto", "instruction"):
        (line,) = errors_of(config("--data.format", name, "--data.template", "nowhere.txt"), 1)
        assert line.startswith("data.template: ")


def test_slices_must_fit_the_smallest_targeted_layer(config):
    """k_proj of the debug model is 32 x 64: four adapters of rank 8 fit, five do not, unless it is no target."""
    plan_run(config("--hdpissa.num_adapters", "4", "--adapter.rank", "8"), 1)
    (line,) = errors_of(config("--hdpissa.num_adapters", "5", "--adapter.rank", "8"), 1)
    assert line.startswith("adapter.rank: the slices need K * r = 5 * 8 = 40 singular directions, k_proj")
    plan_run(config("--hdpissa.num_adapters", "5", "--adapter.rank", "8", "--adapter.target_modules", "q_proj"), 1)
    plan_run(config("--hdpissa.num_adapters", "5", "--adapter.rank", "8", "--hdpissa.slices", "top"), 1)


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_a_rank_must_fit_the_smallest_targeted_layer(config, method: str):
    """k_proj of the debug model is 32 x 64. One adapter, whatever the number of workers."""
    plan = plan_run(config("--adapter.method", method, "--adapter.rank", "32", "--hdpissa.num_adapters", "7"), 2)
    assert plan.num_adapters == 1
    (line,) = errors_of(config("--adapter.method", method, "--adapter.rank", "33"), 1)
    assert line.startswith("adapter.rank: 33 is more than the smaller side of a weight, 32; k_proj")
    plan_run(config("--adapter.method", method, "--adapter.rank", "33", "--adapter.target_modules", "q_proj"), 1)


def test_full_fine_tuning_knows_no_rank(config):
    plan_run(config("--adapter.method", "full", "--adapter.rank", "9999", "--hdpissa.num_adapters", "7"), 2)


def test_the_model_directory_is_read(config, tmp_path: Path):
    write_model(tmp_path / "model", vocab_size=77)
    model = ("--model.hf_assets_path", str(tmp_path / "model"))
    assert plan_run(config(model=model), 1).decoder.vocab_size == 77
    (line,) = errors_of(config(model=("--model.hf_assets_path", str(tmp_path / "no"))), 1)
    assert line.startswith("model.hf_assets_path: cannot read")
    (line,) = errors_of(config(model=(*model, "--model.name", "mistral")), 1)
    assert line.startswith("model.name: ")


def test_weights_are_checked_before_anything_is_allocated(config, tmp_path: Path):
    """config.json is somebody else's: a size that it claims is believed when the weight files have it, too."""
    said, _ = write_model(tmp_path / "model")
    model = ("--model.hf_assets_path", str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**said, "intermediate_size": 2**30}))
    errors = errors_of(config(model=model), 1)
    assert len(errors) == 3 * said["num_hidden_layers"]
    assert all("mlp." in line and f"{2**30}" in line for line in errors)
    (tmp_path / "model" / "config.json").write_text(json.dumps(said))
    (tmp_path / "model" / "model.safetensors").unlink()
    (line,) = errors_of(config(model=model), 1)
    assert "holds no model.safetensors" in line
    plan_run(config(model=model), 1, needs_files=False)  # job.print_plan


def test_blocks_that_do_not_divide_a_weight(config):
    """bat is refused by name with the layer; so is tensor parallelism for the methods that it does not split."""
    (line,) = errors_of(config("--adapter.method", "bat", "--adapter.rank", "24"), 1)
    assert line.startswith("adapter.rank: method bat cuts weights in blocks of adapter.rank, 24 x 24")
    assert "q_proj has shape [64, 64]" in line
    for method in ("mora", "hira", "bone", "bat"):
        options = ("--adapter.method", method, "--adapter.rank", "4")
        plan_run(config(*options), 2)
        (line,) = errors_of(config(*options, "--parallelism.tensor_parallel_degree", "2"), 2)
        assert line == f"parallelism.tensor_parallel_degree: method {method} has no tensor parallelism; set it to 1"


def test_a_run_that_resumes_needs_no_weights(config, tmp_path: Path):
    write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "checkpoint" / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-3" / STATE_FILE).write_text("{}")
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.enable")
    model = ("--model.hf_assets_path", str(tmp_path / "model"))
    plan_run(config(*argv, model=model), 1)
    adapter = ("--adapter.method", "pissa", "--adapter.rank", "2", "--export.enable", "--export.format", "peft")
    (line,) = errors_of(config(*argv, *adapter, model=model), 1)
    assert "holds no model.safetensors" in line, "the adapter of rank 2r is relative to them"
    *_, line = errors_of(config(*argv, "--metrics.update_freq", "5", model=model), 1)
    assert line == "metrics.update_freq: changes are measured from the base model on; 0 goes on without its files"
    (line,) = errors_of(config(*argv, "--checkpoint.load_step", "2", model=model), 1)
    assert line.startswith("checkpoint.load_step: ")
    (line,) = errors_of(config(*argv, "--checkpoint.load_step", "0", model=model), 1)
    assert "holds no model.safetensors" in line


def test_tensor_parallelism_splits_the_vocabulary_or_leaves_it_whole(config):
    """The debug model has 2 key/value heads and a vocabulary of 256; 257 of a config.json divide by nothing."""
    tp = ("--parallelism.tensor_parallel_degree", "2")
    plan_run(config(*tp), 2)
    odd = dataclasses.replace(plan_run(config(*tp), 2).decoder, vocab_size=257)
    with mock.patch("titan_hd.preflight.decoder_config", return_value=odd):
        (line,) = errors_of(config(*tp), 2)
        assert line == (
            "parallelism.tensor_parallel_degree: 2 does not divide vocab_size = 257; "
            "parallelism.loss_parallel = false keeps the vocabulary whole"
        )
        plan_run(config(*tp, "--parallelism.loss_parallel", "false"), 2)


class TestWhatWouldBeLostAtTheEnd:
    """Known before the first step, so said before it."""

    def model(self, folder: Path) -> tuple[str, ...]:
        write_model(folder)
        (folder / "tokenizer.json").write_text("{}")
        return (
            "--model.hf_assets_path",
            str(folder),
            "--export.enable",
            "--job.dump_folder",
            str(folder.parent / "run"),
        )

    def test_files_that_an_export_does_not_copy(self, config, tmp_path: Path):
        """A directory of links to a shared copy: weights may be links, what would be published may not."""
        shared, mine = tmp_path / "shared", tmp_path / "mine"
        model = self.model(shared)
        (shared / "vocab.json").write_text("{}")
        plan_run(config(model=model), 1)
        mine.mkdir()
        for path in shared.iterdir():
            (mine / path.name).symlink_to(path)
        (mine / "config.json").unlink()
        (mine / "config.json").write_text((shared / "config.json").read_text())
        linked = ("--model.hf_assets_path", str(mine), *model[2:])
        lines = errors_of(config(model=linked), 1)
        assert len(lines) == 2
        for line, name in zip(sorted(lines), ("tokenizer.json", "vocab.json")):
            assert line.startswith(f"{mine / name}: is a link out of the directory")
        plan_run(config("--adapter.method", "lora", "--export.format", "peft", model=linked), 1)
        plan_run(config(model=linked[:2]), 1)

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (("--checkpoint.enable", "--checkpoint.folder=hf"), "is checkpoint.folder"),
            (("--checkpoint.enable", "--checkpoint.folder=./x/../hf"), "is checkpoint.folder"),
            (("--checkpoint.enable", "--checkpoint.folder=hf/checkpoint"), "checkpoint.folder lies in it"),
            (("--checkpoint.enable", "--checkpoint.folder=hf.old"), "is checkpoint.folder with hf.old"),
            (("--checkpoint.enable", "--checkpoint.folder=hf.partial"), "is checkpoint.folder with hf.partial"),
            (("--profiling.enable_profiling", "--export.folder=profile_traces"), "is profiling.save_traces_folder"),
            (
                ("--profiling.enable_memory_snapshot", "--export.folder=memory_snapshots"),
                "is profiling.save_memory_snapshot_folder",
            ),
            (("--export.folder=metrics.jsonl",), "is metrics.jsonl"),
            (("--export.folder=tb",), "is tb"),
            (("--adapter.svd_cache={run}/hf/svd",), "adapter.svd_cache lies in it"),
            (("--data.cache_dir={run}/hf",), "is data.cache_dir"),
            (("--export.folder={run}",), "is job.dump_folder"),
        ],
    )
    def test_folders_that_the_export_would_replace(self, config, tmp_path: Path, argv: tuple[str, ...], says: str):
        model = self.model(tmp_path / "model")
        (line,) = errors_of(config(*(word.format(run=tmp_path / "run") for word in argv), model=model), 1)
        assert line.startswith("export.folder: ")
        assert says in line

    def test_a_model_or_data_in_the_folder_of_an_earlier_export(self, config, tmp_path: Path):
        """The folder is a model's, so an export may replace it, were it not for what lies in it."""
        model = self.model(tmp_path / "run" / "hf" / "base")
        (tmp_path / "run" / "hf" / "config.json").write_text("{}")
        (tmp_path / "run" / "hf" / "data.jsonl").write_text((tmp_path / "train.jsonl").read_text())
        argv = ("--data.train", str(tmp_path / "run" / "hf" / "data.jsonl"), "--job.dump_folder", str(tmp_path / "run"))
        lines = errors_of(config(*argv, model=model[:3]), 1)
        assert [line.split(", and ")[1].split()[0] for line in lines] == ["model.hf_assets_path", "data.train"]

    def test_other_folders_are_fine(self, config, tmp_path: Path):
        model = self.model(tmp_path / "model")
        argv = ("--checkpoint.enable", "--profiling.enable_profiling", "--export.folder=checkpoint-model")
        plan_run(config(*argv, f"--adapter.svd_cache={tmp_path}/run/svd", model=model), 1)
        plan_run(config("--checkpoint.folder=hf", model=model), 1)  # checkpoint.enable is not set

    def test_a_disk_without_room_for_the_export(self, config, tmp_path: Path):
        model = self.model(tmp_path / "model")
        needed = 2 * sum(weight.numel() for weight in write_model(tmp_path / "model")[1].values())
        for free, warnings in ((needed, 0), (needed - 1, 1)):
            with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=free)):
                found = plan_run(config("--training.seq_len", "8", model=model), 1).warnings
                assert len(found) == warnings
                assert all(f"run/hf: the weights will need {needed / 1e3:.2f} kB, " in line for line in found)

    @pytest.mark.parametrize("package", ["tensorboard", "wandb"])
    def test_trackers_without_their_package(self, config, package: str):
        absent = mock.patch(
            "titan_hd.components.trackers.registry.find_spec", lambda name: None if name == package else object()
        )
        with absent:
            (line,) = errors_of(config(f"--metrics.enable_{package}"), 1)
            assert line == f"metrics.enable_{package}: needs the package {package}: pip install {package}"
            plan_run(config(), 1)
        with mock.patch("titan_hd.components.trackers.registry.find_spec", return_value=object()):
            plan_run(config(f"--metrics.enable_{package}"), 1)


def test_profiling_of_ranks_and_devices_that_there_are_not(config):
    switch = "--profiling.enable_profiling"
    (line,) = errors_of(config(switch, "--profiling.profile_ranks=0,2,5"), 2)
    assert line == "profiling.profile_ranks: 2, 5: the ranks are 0 to 1"
    plan_run(config(switch, "--profiling.profile_ranks=0,1"), 2)
    for key in ("enable_memory_snapshot", "enable_nvtx"):
        asked = config(f"--profiling.{key}", "--training.seq_len=64")
        said = plan_run(asked, 1, device_type="cpu").warnings
        assert said == (f"profiling.{key}: there is no GPU; it is left out",)
        assert plan_run(asked, 1, device_type="cuda").warnings == ()


def test_positions_that_the_model_has_not_seen(config, tmp_path: Path):
    write_model(tmp_path / "model", max_position_embeddings=64)
    model = ("--model.hf_assets_path", str(tmp_path / "model"))
    assert plan_run(config("--training.seq_len", "64", model=model), 1).warnings == ()
    (line,) = plan_run(config("--training.seq_len", "65", model=model), 1).warnings
    assert line.startswith("training.seq_len: 65 is beyond the model's max_position_embeddings, 64: ")


def test_the_head_that_the_files_have(config, tmp_path: Path):
    _, weights = write_model(tmp_path / "model", tie_word_embeddings=True)
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    decoder = plan_run(config(model=("--model.hf_assets_path", str(tmp_path / "model"))), 1).decoder
    assert not decoder.tie_word_embeddings
    assert decoder.hf["tie_word_embeddings"] is False


def test_packing_needs_a_model_that_keeps_documents_apart(config):
    """Every family does today; a new one may not."""
    plan = plan_run(config("--data.pack=true"), 1)
    with mock.patch.object(type(plan.decoder), "packs", False), pytest.raises(ConfigError) as caught:
        plan_run(config("--data.pack=true"), 1)
    assert "data.pack: documents in one row would see each other in llama models; unset it" in str(caught.value)
