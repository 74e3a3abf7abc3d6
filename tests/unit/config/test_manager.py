"""The configuration: where a value comes from, what is refused and how it is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from titan_hd.config import job_config, keys, manager
from titan_hd.config.manager import ConfigError, load

# What a configuration cannot do without.
MODEL = ["--model.name", "llama3", "--model.flavor", "debugmodel"]
NEEDED = ["--data.train", "train.jsonl", *MODEL, "--training.steps", "3"]
NEEDED_TOML = """
[data]
train = "train.jsonl"
[model]
name = "llama3"
flavor = "debugmodel"
[training]
steps = 3
"""


def errors_of(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return caught.value.errors


@pytest.fixture
def toml(tmp_path: Path):
    """Writes a TOML file and returns its path as text."""

    def write(text: str, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


class TestPrecedence:
    def test_defaults(self):
        config = load(NEEDED)
        assert dataclasses.replace(config.training, steps=None) == job_config.Training()
        assert config.optimizer == job_config.Optimizer()

    def test_toml_over_defaults(self, toml):
        config = load(["--config", toml(NEEDED_TOML + "seed = 7\n[optimizer]\nlr = 1e-3")])
        assert (config.training.seed, config.optimizer.lr) == (7, 1e-3)
        assert config.optimizer.beta1 == job_config.Optimizer().beta1

    @pytest.mark.parametrize("before", [True, False], ids=["option-then-file", "file-then-option"])
    def test_command_line_over_toml(self, toml, before: bool):
        file, option = ["--config", toml(NEEDED_TOML + "seed = 7")], ["--training.seed", "8"]
        assert load(option + file if before else file + option).training.seed == 8

    def test_the_last_of_two_options_wins(self):
        assert load([*NEEDED, "--training.seed", "1", "--training.seed", "2"]).training.seed == 2

    def test_two_loads_share_nothing(self):
        load([*NEEDED, "--training.seed", "9"]).optimizer.lr = 5.0
        assert load(NEEDED).training.seed == job_config.Training().seed
        assert load(NEEDED).optimizer.lr == job_config.Optimizer().lr


class TestBase:
    def test_child_overrides_key_by_key(self, toml):
        toml(NEEDED_TOML + "seed = 1\nseq_len = 64", "base.toml")
        config = load(["--config", toml('base = "base.toml"\n[training]\nseed = 2')])
        assert (config.training.seed, config.training.seq_len, config.training.steps) == (2, 64, 3)
        assert config.model.flavor == "debugmodel"

    def test_grandparent_in_another_folder(self, toml):
        """`base` is relative to the file that names it, not to the working directory."""
        toml(NEEDED_TOML + "seed = 1\nseq_len = 64\nlocal_batch_size = 4", "root.toml")
        toml('base = "../root.toml"\n[training]\nseed = 2\nseq_len = 32', "sub/parent.toml")
        config = load(["--config", toml('base = "sub/parent.toml"\n[training]\nseed = 3')])
        assert (config.training.seed, config.training.seq_len, config.training.local_batch_size) == (3, 32, 4)

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_cycle_is_refused(self, toml, length: int):
        paths = [toml(f'base = "{(i + 1) % length}.toml"\n' + NEEDED_TOML, f"{i}.toml") for i in range(length)]
        (line,) = errors_of(["--config", paths[0]])
        assert "base: inherits from itself" in line
        assert "0.toml" in line

    def test_the_same_base_twice_is_no_cycle(self, toml):
        """A base of a base that is read again in another run of `load` is new: nothing is remembered."""
        toml(NEEDED_TOML, "base.toml")
        child = toml('base = "base.toml"')
        assert load(["--config", child]) == load(["--config", child])

    def test_missing_base_names_both_files(self, toml):
        child = toml('base = "nowhere.toml"\n' + NEEDED_TOML)
        (line,) = errors_of(["--config", child])
        assert child in line
        assert "base: cannot read" in line
        assert "nowhere.toml" in line

    def test_base_must_be_a_path(self, toml):
        (line,) = errors_of(["--config", toml("base = 3\n" + NEEDED_TOML)])
        assert "base: must be the path of a TOML file" in line

    def test_a_fault_in_the_base_names_the_base(self, toml):
        base = toml(NEEDED_TOML + "sed = 1", "base.toml")
        (line,) = errors_of(["--config", toml('base = "base.toml"')])
        assert line.startswith("training.sed: unknown key")
        assert base in line

    def test_a_fault_in_the_child_names_the_child(self, toml):
        toml(NEEDED_TOML, "base.toml")
        child = toml('base = "base.toml"\n[training]\nseed = "one"')
        (line,) = errors_of(["--config", child])
        assert line.startswith("training.seed: must be a whole number")
        assert child in line


class TestCommandLine:
    def test_equals_sign(self):
        config = load([*NEEDED, "--job.description=a = b", "--training.seed=5"])
        assert (config.job.description, config.training.seed) == ("a = b", 5)

    def test_negative_numbers_are_values(self):
        assert load([*NEEDED, "--checkpoint.load_step", "-1"]).checkpoint.load_step == -1

    @pytest.mark.parametrize(
        ("words", "value"),
        [
            (["--compile.enable"], True),
            (["--compile.enable", "true"], True),
            (["--compile.enable=True"], True),
            (["--compile.enable", "false"], False),
            (["--compile.enable", "--data.shuffle"], True),
        ],
    )
    def test_switches(self, words: list[str], value: bool):
        config = load(NEEDED + words)
        assert config.compile.enable is value
        assert load([*NEEDED, *words, "--job.print_config"]).job.print_config is True

    @pytest.mark.parametrize("text", ["yes", "1", "0", "on", "none"])
    def test_switches_take_true_and_false_alone(self, text: str):
        (line,) = errors_of([*NEEDED, "--compile.enable", text])
        assert line.startswith("compile.enable: must be true or false")

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("q_proj", ["q_proj"]),
            ("q_proj,v_proj", ["q_proj", "v_proj"]),
            ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
            ("none", None),
        ],
    )
    def test_lists_with_commas_and_as_json(self, text: str, value: list[str] | None):
        assert load([*NEEDED, "--adapter.target_modules", text]).adapter.target_modules == value

    @pytest.mark.parametrize("text", ["[1, 2]", '["q_proj", null]'])
    def test_lists_hold_strings(self, text: str):
        (line,) = errors_of([*NEEDED, "--adapter.target_modules", text])
        assert line.startswith("adapter.target_modules: must be a list of strings")

    def test_a_torn_list_says_what_would_fit(self):
        (line,) = errors_of([*NEEDED, "--adapter.target_modules", "[q_proj"])
        assert line.startswith("adapter.target_modules: must be a list of strings")

    def test_literals(self):
        assert load([*NEEDED, "--hdpissa.aggregate", "sum"]).hdpissa.aggregate == "sum"
        (line,) = errors_of([*NEEDED, "--hdpissa.aggregate", "median"])
        assert line.startswith('hdpissa.aggregate: must be "mean" or "sum"')
        assert "'median'" in line

    @pytest.mark.parametrize("text", ["none", "None", ""])
    def test_optional_values_can_be_unset(self, toml, text: str):
        path = toml(NEEDED_TOML + "[adapter]\nalpha = 8.0\n[lr_scheduler]\nwarmup_steps = 4")
        config = load(["--config", path, f"--adapter.alpha={text}", f"--lr_scheduler.warmup_steps={text}"])
        assert (config.adapter.alpha, config.lr_scheduler.warmup_steps) == (None, None)

    def test_optional_values_are_typed(self):
        alpha = load([*NEEDED, "--adapter.alpha", "8"]).adapter.alpha
        assert alpha == 8.0
        assert isinstance(alpha, float)

    def test_none_is_no_value_of_other_keys(self):
        (line,) = errors_of([*NEEDED, "--training.seed", "none"])
        assert line.startswith("training.seed: must be a whole number")

    @pytest.mark.parametrize("words", [["--training.seed"], ["--training.seed", "--compile.enable"], ["--config"]])
    def test_a_missing_value_is_named(self, words: list[str]):
        (line,) = errors_of(NEEDED + words)
        assert line == f"{words[0]}: needs a value"

    def test_words_without_dashes_are_refused(self):
        (line,) = errors_of(["run.toml", *NEEDED])
        assert line.startswith("run.toml: unexpected argument")

    def test_missing_file_names_the_option_and_the_file(self, tmp_path: Path):
        lines = errors_of(["--config", str(tmp_path / "no.toml"), *NEEDED])
        assert lines == [f"--config: cannot read {tmp_path / 'no.toml'}: No such file or directory"]

    def test_an_empty_file_name_is_refused(self):
        (line,) = errors_of(["--config=", *NEEDED])
        assert line.startswith("--config")


class TestRefusals:
    def test_unknown_key_with_a_hint(self, toml):
        (line,) = errors_of(["--config", toml(NEEDED_TOML + "sequence_len = 5")])
        assert line.startswith("training.sequence_len: unknown key (")
        assert line.endswith("did you mean training.seq_len?")
        (line,) = errors_of([*NEEDED, "--optimiser.lr", "1"])
        assert line == "optimiser.lr: unknown key (command line); did you mean optimizer.lr?"

    def test_unknown_key_without_a_likely_one(self):
        (line,) = errors_of([*NEEDED, "--zzz", "1"])
        assert line == "zzz: unknown key (command line)"

    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("training.lr", "optimizer.lr"),
            ("lr", "optimizer.lr"),
            ("chkpoint.folder", "checkpoint.folder"),
            ("validation.enabled", "validation.enable"),
            ("hlep", "help"),
            ("steps", "training.steps or validation.steps"),
        ],
    )
    def test_a_key_of_another_section_is_near(self, key: str, near: str):
        (line,) = errors_of([f"--{key}", "1"])
        assert line == f"{key}: unknown key (command line); did you mean {near}?"

    def test_dashes_are_underscores_on_the_command_line(self):
        options = ["--training.seq-len", "7", "--lr-scheduler.min_lr-factor=0.5", "--compile.enable"]
        config = load([*NEEDED, *options, "--job.print-config"])
        assert (config.training.seq_len, config.lr_scheduler.min_lr_factor, config.job.print_config) == (7, 0.5, True)

    def test_unknown_section_with_a_hint(self, toml):
        path = toml(NEEDED_TOML + "[optimiser]\nlr = 1.0")
        assert errors_of(["--config", path]) == [f"{path}: [optimiser]: unknown section; did you mean optimizer?"]

    def test_a_key_outside_a_section(self, toml):
        path = toml("lr = 1.0\n" + NEEDED_TOML)
        assert errors_of(["--config", path]) == [f"{path}: lr: must be a section, [lr]"]

    def test_a_section_inside_a_section(self, toml):
        (line,) = errors_of(["--config", toml(NEEDED_TOML + "[training.seed]\nx = 1")])
        assert line.startswith("training.seed: must be a whole number")

    def test_a_byte_order_mark(self, tmp_path: Path):
        (tmp_path / "base.toml").write_text("\ufeff[training]\nseed = 7\n", encoding="utf-8")
        (tmp_path / "run.toml").write_text("\ufeffbase = 'base.toml'\n", encoding="utf-8")
        assert load(["--config", str(tmp_path / "run.toml"), *NEEDED]).training.seed == 7

    @pytest.mark.parametrize("content", [b"[training\n", b"steps = \n", b'[job]\ndescription = "\xff"\n'])
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes):
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        lines = errors_of(["--config", str(path), *NEEDED])
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: not valid TOML: ")

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("training.seed", '"5"', "must be a whole number"),
            ("training.seed", "5.0", "must be a whole number"),
            ("training.seed", "true", "must be a whole number"),
            ("optimizer.lr", '"1e-3"', "must be a number"),
            ("optimizer.lr", "true", "must be a number"),
            ("optimizer.lr", "inf", "must be finite"),
            ("optimizer.lr", "nan", "must be finite"),
            ("compile.enable", "1", "must be true or false"),
            ("compile.enable", '"true"', "must be true or false"),
            ("job.description", "5", "must be a string"),
            ("adapter.target_modules", '"q_proj"', "must be a list of strings"),
            ("adapter.target_modules", "[1]", "must be a list of strings"),
            ("hdpissa.aggregate", "1", 'must be "mean" or "sum"'),
            ("hdpissa.aggregate", '["mean"]', 'must be "mean" or "sum"'),
            ("adapter.alpha", '"none"', "must be a number"),
            ("lr_scheduler.warmup_steps", "1.5", "must be a whole number"),
        ],
    )
    def test_wrong_types_in_toml(self, toml, key: str, value: str, says: str):
        """TOML has types, so its values are taken as they are: text is no number there."""
        section, _, name = key.partition(".")
        path = toml(f"[{section}]\n{name} = {value}")
        (line,) = errors_of(["--config", path, *NEEDED])
        assert line.startswith(f"{key}: {says}")
        assert line.endswith(f"({path})")

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("training.seed", "5.0", "must be a whole number"),
            ("training.seed", "1e3", "must be a whole number"),
            ("training.seed", "true", "must be a whole number"),
            ("optimizer.lr", "fast", "must be a number"),
            ("optimizer.lr", "inf", "must be finite"),
            ("optimizer.lr", "nan", "must be finite"),
            ("lr_scheduler.warmup_steps", "some", "must be a whole number"),
            ("adapter.alpha", "big", "must be a number"),
        ],
    )
    def test_wrong_types_on_the_command_line(self, key: str, value: str, says: str):
        (line,) = errors_of([*NEEDED, f"--{key}", value])
        assert line.startswith(f"{key}: {says}")
        assert line.endswith(f"not {value!r} (command line)")

    def test_whole_numbers_are_numbers(self, toml):
        lr = load(["--config", toml(NEEDED_TOML + "[optimizer]\nlr = 1")]).optimizer.lr
        assert lr == 1.0
        assert isinstance(lr, float)

    def test_a_huge_whole_number_is_refused(self):
        (line,) = errors_of([*NEEDED, "--training.seed", "1" + "0" * 400])
        assert line.startswith("training.seed")

    @pytest.mark.parametrize("value", ["true", "1.0"])
    def test_a_literal_number_has_its_type(self, toml, value: str):
        (line,) = errors_of(["--config", toml(NEEDED_TOML + f"[parallelism]\ntensor_parallel_degree = {value}")])
        assert line.startswith("parallelism.tensor_parallel_degree: ")

    @pytest.mark.parametrize(
        "argv",
        [
            ["--config", "no-such-file.toml"],
            ["--data.train", "t", *MODEL, "--training.epochs", "some"],
            ["--data.train", "t", *MODEL, "--training.step", "3"],
        ],
        ids=["unreadable-file", "wrong-epochs", "misspelt-steps"],
    )
    def test_one_fault_is_one_line(self, argv: list[str]):
        """The other keys are there, or would be: lines about them send the user to the wrong place."""
        assert len(errors_of(argv)) == 1

    def test_several_faults_are_reported_at_once(self, toml):
        path = toml(NEEDED_TOML + 'seed = "x"\nsed = 1\n[optimizer]\nlr = "fast"\n[optimiser]\nlr = 1')
        lines = errors_of(["--config", path, "--hdpissa.aggregate", "median", "--adapter.rnk", "4", "word"])
        keys = ("word", f"{path}: [optimiser]", "training.seed", "training.sed", "optimizer.lr")
        for key in (*keys, "hdpissa.aggregate", "adapter.rnk"):
            assert sum(line.startswith(f"{key}: ") for line in lines) == 1, (key, lines)
        assert len(lines) == 7

    def test_several_bad_combinations_are_reported_at_once(self):
        lines = errors_of(["--optimizer.beta1", "1.0", "--adapter.rank", "0", "--validation.enable"])
        for key in (
            "training.steps",
            "data.train",
            "model.hf_assets_path",
            "optimizer.beta1",
            "adapter.rank",
            "data.validation",
        ):
            assert sum(line.startswith(f"{key}: ") for line in lines) == 1, (key, lines)
        assert len(lines) == 6
        assert all("\n" not in line for line in lines)


class TestCombinations:
    def test_steps_xor_epochs(self):
        needed = ["--data.train", "t.jsonl", *MODEL]
        assert load([*needed, "--training.epochs", "1.5"]).training.epochs == 1.5
        for words in ([], ["--training.steps", "3", "--training.epochs", "1"]):
            (line,) = errors_of(needed + words)
            assert line == "training.steps: give either training.steps or training.epochs"

    def test_an_inherited_unit_can_be_changed(self, toml):
        toml(NEEDED_TOML, "base.toml")
        config = load(["--config", toml('base = "base.toml"'), "--training.steps=none", "--training.epochs=1"])
        assert (config.training.steps, config.training.epochs) == (None, 1.0)

    def test_warmup_steps_xor_ratio(self):
        assert load([*NEEDED, "--lr_scheduler.warmup_steps", "3"]).lr_scheduler.warmup_steps == 3
        assert load([*NEEDED, "--lr_scheduler.warmup_ratio", "0.1"]).lr_scheduler.warmup_ratio == 0.1
        (line,) = errors_of([*NEEDED, "--lr_scheduler.warmup_steps", "3", "--lr_scheduler.warmup_ratio", "0.1"])
        assert line == "lr_scheduler.warmup_ratio: give either warmup_steps or warmup_ratio"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("training.steps", "0"),
            ("training.seq_len", "1"),
            ("training.local_batch_size", "0"),
            ("training.global_batch_size", "0"),
            ("training.global_batch_size", "-2"),
            ("training.max_norm", "-0.1"),
            ("training.seed", "-1"),
            ("optimizer.lr", "-1e-5"),
            ("optimizer.beta1", "-0.1"),
            ("optimizer.beta2", "1"),
            ("lr_scheduler.warmup_steps", "-1"),
            ("lr_scheduler.warmup_ratio", "1.1"),
            ("lr_scheduler.min_lr_factor", "-0.1"),
            ("adapter.rank", "0"),
            ("adapter.alpha", "0"),
            ("adapter.dropout", "1"),
            ("adapter.target_modules", "[]"),
            ("hdpissa.num_adapters", "-1"),
            ("hdpissa.mute_scalar", "-1e-16"),
            ("parallelism.data_parallel_replicate_degree", "0"),
            ("parallelism.data_parallel_shard_degree", "0"),
            ("parallelism.context_parallel_degree", "2"),
            ("checkpoint.interval", "0"),
            ("checkpoint.load_step", "-2"),
            ("metrics.log_freq", "0"),
            ("validation.freq", "0"),
            ("validation.steps", "0"),
        ],
    )
    def test_values_out_of_range(self, key: str, value: str):
        (line,) = errors_of([*NEEDED, f"--{key}", value])
        assert line.startswith(f"{key}: ")

    @pytest.mark.parametrize("key", ["export.folder", "checkpoint.folder"])
    @pytest.mark.parametrize("folder", ["", ".", "..", "a/.."])
    def test_a_folder_that_is_replaced_is_one_of_its_own(self, key: str, folder: str):
        """An export never deletes a folder that is no model."""
        (line,) = errors_of([*NEEDED, f"--{key}={folder}"])
        assert line == f"{key}: must name a folder of its own, not {folder!r}"

    def test_epochs_above_zero(self):
        lines = errors_of(["--data.train", "t", *MODEL, "--training.epochs", "0"])
        assert lines == ["training.epochs: must be above 0"]

    def test_a_model_is_a_directory_or_a_flavor(self):
        needed = ["--data.train", "t", "--training.steps", "1"]
        for words in ([], ["--model.name", "llama3"], ["--model.flavor", "8B"]):
            (line,) = errors_of(needed + words)
            assert line.startswith("model.hf_assets_path: is missing")
        assert load([*needed, "--model.hf_assets_path", "some/dir"]).model.hf_assets_path == "some/dir"


class TestOldNames:
    def test_they_lead_to_real_keys(self):
        assert set(manager._RENAMED.values()) <= set(keys.every_key())

    def test_peft_needs_a_base_model(self):
        (line,) = errors_of([*NEEDED, "--export.enable", "--export.format", "peft", "--adapter.method", "lora"])
        assert line.startswith("export.format: peft's adapter needs a base model")

    def test_old_names_of_the_svds_keys(self, toml):
        path = toml("[hdpissa]\nsvd_cache = 'old'\nsvd_niter = 3")
        adapter = load([*NEEDED, "--config", path, "--hdpissa.svd", "exact"]).adapter
        assert (adapter.svd, adapter.svd_niter, adapter.svd_cache) == ("exact", 3, "old")
        assert load([*NEEDED, "--config", path, "--adapter.svd_cache", "new"]).adapter.svd_cache == "new"
        (line,) = errors_of([*NEEDED, "--hdpissa.svd_niter", "-1"])
        assert line.startswith("adapter.svd_niter: must be at least 0")

    def test_what_a_run_wrote_is_read_again(self):
        config = load([*NEEDED, "--adapter.method", "dora", "--adapter.rank", "3"])
        assert manager.from_toml(manager.to_toml(config), "here") == config
        with pytest.raises(manager.ConfigError, match=r"adapter.nosuch: unknown key \(here\)"):
            manager.from_toml("[adapter]\nnosuch = 1", "here")


class TestExits:
    def test_faults_exit_with_two_and_one_line_each(self, capsys):
        with pytest.raises(SystemExit) as caught:
            manager.load_or_exit([*NEEDED, "--training.sed", "1", "--optimizer.lr", "fast"])
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        first, second = captured.err.splitlines()
        assert first.startswith("titan_hd: error: training.sed: unknown key")
        assert second.startswith("titan_hd: error: optimizer.lr: must be a number")
