"""The exported directory: what transformers makes of it, what its card says, and what an export never touches."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import runs
from tests.kit.tokenizers import llama3_directory
from titan_hd.config.job_config import Data
from titan_hd.data.build import Answering, DatasetBuilder
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.export import hf as export
from titan_hd.export.hf import check_folder, publish, start_folder, write_answering, write_assets
from titan_hd.export.model_card import base_name, final_metrics, model_card

SETTINGS = {
    "model": {"name": "", "flavor": ""},
    "data": {"train": "/home/me/data/metamath.jsonl"},
    "training": {"steps": None, "epochs": 1.0, "seq_len": 512},
    "optimizer": {"name": "AdamW", "lr": 2e-5},
    "adapter": {"method": "hdpissa", "rank": 16, "target_modules": ["q_proj", "k_proj"], "svd_cache": "/home/me"},
    "hdpissa": {"aggregate": "sum"},
}


def export_steps(model: Path, dump: Path, **overrides) -> None:
    """A run of one step that ends in an export, on each rank of the pool."""
    records = dump.parent / "records.jsonl"
    values = {"training__steps": 1, "training__global_batch_size": 4, "hdpissa__num_adapters": 2}
    runs.train(runs.options(model, records, dump, **(values | overrides)))


def export_unchanged(model: Path, folder: Path, dtype: str) -> None:
    """Load and export, nothing between."""
    from titan_hd.config import manager
    from titan_hd.distributed.parallel_dims import ParallelDims
    from titan_hd.distributed.parallelize import parallelize
    from titan_hd.distributed.shards import load_weights, materialize
    from titan_hd.export.hf import export_hf
    from titan_hd.models.decoder import Decoder
    from titan_hd.models.registry import read_hf_config

    dims = ParallelDims(1, torch.distributed.get_world_size(), "cpu")
    with torch.device("meta"):
        decoder = Decoder(read_hf_config(model))
    parallelize(decoder, dims, set(), torch.float32, "none", False)
    materialize(decoder, torch.device("cpu"))
    load_weights(decoder, dims, str(model))
    options = runs.options(model, model / "config.json", folder.parent, export__folder=folder.name, export__dtype=dtype)
    export_hf(decoder, dims, manager.load([*options, "--export.max_shard_size_gb=0.0005"]))


class TestInTransformers:
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_run_on_two_workers(self, workers, tmp_path: Path, tied: bool):
        """transformers computes what our decoder does; several files, and none of the run's own paths in them."""
        transformers = pytest.importorskip("transformers")
        from titan_hd.models.decoder import Decoder
        from titan_hd.models.registry import read_hf_config

        runs.write_model(tmp_path / "model", hidden_size=24, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
        runs.write_records(tmp_path / "records.jsonl")
        workers.run(2, export_steps, tmp_path / "model", tmp_path / "dump", export__max_shard_size_gb=1e-5)
        folder = tmp_path / "dump" / "hf"
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) > 1
        weights = {name: value for path in files for name, value in load_file(path).items()}
        ours = Decoder(read_hf_config(folder))
        ours.load_state_dict(weights)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.arange(40).view(2, 20)
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
        assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                assert str(tmp_path) not in path.read_text(), path
        card = (folder / "README.md").read_text()
        assert "base_model" not in card  # a folder's name is no name on the hub
        assert "| loss | " in card
        assert not list((tmp_path / "dump").glob("hf.*"))

    def test_a_real_pretrained_model(self, workers, shared_data: Path, tmp_path: Path):
        transformers = pytest.importorskip("transformers")
        original, folder = shared_data / "stories260k-hf", tmp_path / "hf"
        workers.run(4, export_unchanged, original, folder, "float32")
        ids = torch.arange(3, 67).view(2, 32)
        with torch.no_grad():
            want, got = (
                transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
                for path in (original, folder)
            )
        assert torch.equal(got, want)
        tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (original, folder)]
        one, other = (tokenizer("Once upon a time").input_ids for tokenizer in tokenizers)
        assert one == other

    def test_fp32_is_rounded_once(self, workers, shared_data: Path, tmp_path: Path):
        original, folder = shared_data / "stories260k-hf", tmp_path / "hf"
        workers.run(2, export_unchanged, original, folder, "bfloat16")
        want = load_file(original / "model.safetensors")
        got = {name: v for path in folder.glob("*.safetensors") for name, v in load_file(path).items()}
        assert all(torch.equal(got[name], want[name].bfloat16()) for name in got)
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_random_weights_without_a_tokenizer(self, workers, tmp_path: Path):
        runs.write_records(tmp_path / "records.jsonl")
        changes = {"model__name": "llama3", "model__flavor": "debugmodel", "training__seq_len": 8}
        workers.run(1, export_steps, "", tmp_path / "dump", **changes)
        card = (tmp_path / "dump" / "hf" / "README.md").read_text()
        assert "base_model" not in card
        assert "from llama3 debugmodel with random weights" in card


class TestFiles:
    def test_tokenizer_files_are_copied_and_nothing_else(self, tmp_path: Path):
        assets, partial = tmp_path / "assets", tmp_path / "hf.partial"
        (assets / "original").mkdir(parents=True)
        wanted = {
            *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
            *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
            "original/tokenizer.model",
        }
        for name in [*wanted, "pytorch_model.bin", "modeling_mine.py", "original/consolidated.00.pth", "config.json"]:
            (assets / name).write_text(name)
        start_folder(partial)
        write_assets(partial, {"hidden_size": 8, "eos_token_id": 2}, torch.bfloat16, str(assets), "card")
        found = {str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()}
        assert found == wanted | {"config.json", "README.md"}
        assert all((partial / name).read_text() == name for name in wanted)

    def test_config_and_generation_config(self, tmp_path: Path):
        hf = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": [2, 3]}
        start_folder(tmp_path / "p")
        write_assets(tmp_path / "p", {**hf, "_name_or_path": "/home/me/model"}, torch.bfloat16, "", "card")
        written = json.loads((tmp_path / "p" / "config.json").read_text())
        assert written == {**hf, "torch_dtype": "bfloat16", "dtype": "bfloat16"}
        generation = json.loads((tmp_path / "p" / "generation_config.json").read_text())
        assert generation == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3]}


class TestAnswering:
    """An export can be asked as the model was trained: chat template, and tokens that end an answer."""

    HF: ClassVar = {"bos_token_id": 1, "eos_token_id": 2}

    def written(self, tmp_path: Path, answering: Answering, generation: dict | None = None) -> dict | None:
        assets, partial = tmp_path / "assets", tmp_path / "hf.partial"
        assets.mkdir()
        if generation is not None:
            (assets / "generation_config.json").write_text(json.dumps(generation))
        start_folder(partial)
        write_assets(partial, self.HF, torch.bfloat16, str(assets), "card", answering)
        path = partial / "generation_config.json"
        return json.loads(path.read_text()) if path.exists() else None

    @pytest.mark.parametrize(
        ("base", "stops", "want"),
        [
            ({"eos_token_id": 596, "top_p": 0.9}, [596, 599], {"eos_token_id": [596, 599], "top_p": 0.9}),
            ({"eos_token_id": [7, 5]}, [5, 6, 7], {"eos_token_id": [7, 5, 6]}),
            ({"top_p": 0.9}, [599], {"top_p": 0.9, "eos_token_id": 599}),
            (None, [2, 9], {"bos_token_id": 1, "eos_token_id": [2, 9]}),
            ({"eos_token_id": [7, 5]}, [5], {"eos_token_id": [7, 5]}),
            ({"_from_model_config": True, "eos_token_id": 2}, [2], {"_from_model_config": True, "eos_token_id": 2}),
            ({"_from_model_config": True, "eos_token_id": 2}, [3], {"eos_token_id": [2, 3]}),
            ({"eos_token_id": 2}, [], {"eos_token_id": 2}),
        ],
    )
    def test_tokens_that_end_an_answer(self, base: dict | None, stops: list[int], want: dict, tmp_path: Path):
        """What the base model stops at stays; files of which nothing is missing are copied as they are."""
        assert self.written(tmp_path, Answering(stops), base) == want

    def test_a_template_that_the_model_directory_lacks(self, tmp_path: Path):
        self.written(tmp_path, Answering([], "{{ messages }} ü"))
        assert (tmp_path / "hf.partial" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }} ü"

    def test_an_adapter_has_them_beside_it_where_the_base_model_does_not(self, tmp_path: Path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 2}')
        (tmp_path / "out").mkdir()
        assert not write_answering(tmp_path / "out", tmp_path / "base", self.HF, Answering([2]))
        assert not list((tmp_path / "out").iterdir())
        assert write_answering(tmp_path / "out", tmp_path / "base", self.HF, Answering([2, 3], "x"))
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"


def test_transformers_chats_with_an_export_of_a_base_model(tmp_path: Path):
    """A base model with Llama 3's tokens and no chat template, trained on chats with the built-in one."""
    transformers = pytest.importorskip("transformers")
    model, records = llama3_directory(tmp_path / "model"), tmp_path / "chats.jsonl"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    records.write_text(json.dumps({"messages": chat}) + "\n")
    builder = DatasetBuilder(Data(train=str(records)), 400, 64, functools.partial(load_tokenizer, model))
    builder.training()
    answering = builder.answering()
    start_folder(tmp_path / "out")
    write_assets(tmp_path / "out", {"eos_token_id": 1}, torch.float32, str(model), "card", answering)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = theirs.apply_chat_template(chat, tokenize=False)
    assert text == load_chat_template(load_tokenizer(model)).render(chat)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == [1, theirs.convert_tokens_to_ids("<|eot_id|>")]


class TestFolder:
    def model(self, path: Path, content: str = "{}") -> Path:
        path.mkdir(parents=True)
        (path / "config.json").write_text(content)
        return path

    @pytest.mark.parametrize("name", ["hf", "hf.partial", "hf.old"])
    def test_what_holds_no_model_is_never_touched(self, tmp_path: Path, name: str):
        (tmp_path / name).mkdir()
        check_folder(tmp_path / "hf", "")
        (tmp_path / name / "thesis.tex").write_text("")
        with pytest.raises(UserError, match=rf"export.folder: {tmp_path / name} is there and holds no model"):
            check_folder(tmp_path / "hf", "")

    def test_a_file_is_no_folder(self, tmp_path: Path):
        (tmp_path / "hf").write_text("")
        with pytest.raises(UserError, match="holds no model"):
            check_folder(tmp_path / "hf", "")

    def test_the_base_model_is_not_overwritten(self, tmp_path: Path):
        self.model(tmp_path / "hf")
        check_folder(tmp_path / "hf", str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"is model\.hf_assets_path"):
            check_folder(tmp_path / "hf", str(tmp_path / "x" / ".." / "hf"))

    def test_publish_replaces(self, tmp_path: Path):
        self.model(tmp_path / "hf", "1")
        publish(self.model(tmp_path / "hf.partial", "2"), tmp_path / "hf")
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]
        assert (tmp_path / "hf" / "config.json").read_text() == "2"

    def test_a_crash_between_the_renames_keeps_the_old_model(self, tmp_path: Path):
        """Only hf.old is there then: it goes when the next export is in its place, not before."""
        self.model(tmp_path / "hf.old", "1")
        start_folder(tmp_path / "hf.partial")
        assert (tmp_path / "hf.old" / "config.json").exists()
        publish(tmp_path / "hf.partial", tmp_path / "hf")
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]

    def test_a_link_is_removed_and_not_what_it_names(self, tmp_path: Path):
        self.model(tmp_path / "precious", "1")
        (tmp_path / "hf").symlink_to(tmp_path / "precious")
        publish(self.model(tmp_path / "hf.partial", "2"), tmp_path / "hf")
        assert (tmp_path / "precious" / "config.json").read_text() == "1"
        assert (tmp_path / "hf" / "config.json").read_text() == "2"
        assert not (tmp_path / "hf").is_symlink()


def crash_in_the_middle(model: Path, dump: Path) -> str:
    """An export whose weights cannot be written; what it says."""

    def full_disk(*args):
        raise UserError("the disk is full")

    write, export.write_weights = export.write_weights, full_disk
    try:
        export_steps(model, dump)
    except UserError as error:
        return str(error)
    finally:
        export.write_weights = write
    return ""


def test_a_crash_in_the_middle_leaves_the_old_export(workers, tmp_path: Path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    workers.run(2, export_steps, tmp_path / "model", tmp_path / "dump")
    before = runs.exported(tmp_path / "dump")
    assert workers.run(2, crash_in_the_middle, tmp_path / "model", tmp_path / "dump") == ["the disk is full"] * 2
    after = runs.exported(tmp_path / "dump")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (tmp_path / "dump" / "hf.partial").is_dir()
    workers.run(2, export_steps, tmp_path / "model", tmp_path / "dump", training__steps=2)
    assert not (tmp_path / "dump" / "hf.partial").exists()
    assert any(not torch.equal(value, before[name]) for name, value in runs.exported(tmp_path / "dump").items())


class TestLinks:
    """A model directory is somebody else's; an export is published."""

    def test_a_link_out_of_the_directory_is_refused(self, tmp_path: Path):
        (tmp_path / "secret").write_text("SECRET")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "vocab.json").symlink_to(tmp_path / "secret")
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match=r"vocab.json: is a link out of the directory"):
            write_assets(tmp_path / "out", dict(runs.ODD), torch.float32, str(tmp_path / "model"), "card")

    def test_the_hubs_cache_is_full_of_links(self, tmp_path: Path):
        snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (tmp_path / "models--a--b" / "blobs").mkdir()
        (tmp_path / "models--a--b" / "blobs" / "77").write_text("{}")
        (snapshot / "vocab.json").symlink_to("../../blobs/77")
        (tmp_path / "out").mkdir()
        write_assets(tmp_path / "out", dict(runs.ODD), torch.float32, str(snapshot), "card")
        assert not (tmp_path / "out" / "vocab.json").is_symlink()
        assert (tmp_path / "out" / "vocab.json").read_text() == "{}"


class TestCard:
    def card(self, assets: str = "/home/me/models/Tiny-1B", hf: dict | None = None, **sections) -> str:
        return model_card(hf or {}, assets, {**SETTINGS, **sections}, {"step": 100, "loss": 0.123456789})

    def test_it_says_method_settings_and_metrics_and_no_path(self):
        card = self.card()
        front, body = card.split("---\n")[1:]
        assert front.splitlines() == [
            'library_name: "transformers"',
            'pipeline_tag: "text-generation"',
            'tags: ["titan_hd", "hdpissa"]',
        ]
        assert "# Tiny-1B, fine-tuned" in body
        assert "Training data: metamath.jsonl." in body
        for row in (
            "| training.seq_len | 512 |",
            "| optimizer.lr | 2e-05 |",
            '| adapter.target_modules | ["q_proj", "k_proj"] |',
            "| hdpissa.aggregate | sum |",
            "| loss | 0.123457 |",
        ):
            assert row in body.splitlines()
        assert "/home" not in card
        assert "training.steps" not in card
        assert "hdpissa." not in self.card(adapter={"method": "full"})

    def test_names_of_the_base_model(self):
        assert base_name({}, "assets/hf/Tiny/") == "Tiny"
        assert base_name({"_name_or_path": "org/Tiny"}, "assets/hf/x") == "org/Tiny"
        assert base_name({"_name_or_path": "/home/me/Tiny"}, "assets/hf/x") == "x"
        assert base_name({}, "/cache/hub/models--org--Tiny-1B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659") == (
            "org/Tiny-1B"
        )

    def test_data_sets_of_the_hub(self):
        assert 'datasets: ["meta-math/MetaMathQA"]' in self.card(data={"train": "meta-math/MetaMathQA"})
        assert "datasets" not in self.card(data={"train": "data/train.jsonl"})
        several = [{"path": "org/data", "weight": 1.0}, {"path": "/x/y.jsonl", "weight": 2.0}]
        assert "Training data: org/data, y.jsonl." in self.card(data={"train": several})

    @pytest.mark.parametrize("name", ["\udce9t\udce9.jsonl", "half\ud800.jsonl"])
    def test_names_that_are_no_text(self, tmp_path: Path, name: str):
        """Latin-1, as older clusters have it, comes from the command line with surrogates; a TOML may hold others."""
        card = self.card(data={"train": f"/x/{name}"})
        start_folder(tmp_path / "p")
        write_assets(tmp_path / "p", {}, torch.bfloat16, "", card)
        shown = ascii(name)[1:-1]
        assert f"Training data: {shown}." in (tmp_path / "p" / "README.md").read_text(encoding="utf-8")

    def test_the_license_of_the_base_model(self, tmp_path: Path):
        readme = (
            "---\nlanguage: en\nlicense: llama3.1\nlicense_link: https://x.y/LICENSE\ninject: 1\n---\nlicense: mit\n"
        )
        (tmp_path / "README.md").write_text(readme)
        front = self.card(str(tmp_path)).split("---\n")[1]
        assert 'license: "llama3.1"' in front
        assert 'license_link: "https://x.y/LICENSE"' in front
        assert "inject" not in front
        (tmp_path / "README.md").write_text("no front matter\nlicense: mit\n")
        assert "license:" not in self.card(str(tmp_path))

    def test_final_metrics_are_the_last_of_each_key(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        assert final_metrics(path) == {}
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "validation_loss": 3.0}\n{"step": 2, "loss": 1.0}\n')
        assert final_metrics(path) == {"step": 2, "loss": 1.0, "validation_loss": 3.0}
        with path.open("a") as file:
            file.write('{"step": 3, "lo')  # what a full disk took
        assert final_metrics(path) == {"step": 2, "loss": 1.0, "validation_loss": 3.0}


def test_a_folder_that_cannot_be_used_is_said_before_the_run(tmp_path: Path):
    from titan_hd.config import manager
    from titan_hd.preflight import plan_run

    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    (tmp_path / "dump" / "hf").mkdir(parents=True)
    shutil.copy(tmp_path / "records.jsonl", tmp_path / "dump" / "hf")
    config = manager.load(runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump"))
    with pytest.raises(UserError, match=r"export\.folder: .* holds no model"):
        plan_run(config, 1)


def test_a_size_of_nothing_is_refused():
    from titan_hd.config import manager

    with pytest.raises(UserError, match=r"export\.max_shard_size_gb: must be above 0, not 0"):
        manager.load(["--export.max_shard_size_gb=0"])


def test_a_removal_that_is_cut_off_leaves_an_exports_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = tmp_path / "hf.old"
    (old / "inside").mkdir(parents=True)
    for name in ("a.safetensors", "config.json", "z.safetensors"):
        (old / name).touch()
    monkeypatch.setattr(export.shutil, "rmtree", lambda path: None)  # of the folder itself, where the mark is left
    export._remove(old)
    assert [path.name for path in old.iterdir() if path.is_file()] == ["config.json"]
    check_folder(tmp_path / "hf", "")
