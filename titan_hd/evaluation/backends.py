"""Who answers: the decoder of titan_hd, or the transformers library's model from the same directory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import torch

from titan_hd.components.beam_search import beam_search
from titan_hd.components.generation import stream
from titan_hd.errors import UserError
from titan_hd.models.decoder import Decoder


class Backend(Protocol):
    """Answers prompts with the most probable tokens."""

    def generate(
        self,
        prompts: list[list[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        beams: int,
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token.

        stop_ids: tokens that end an answer.
        beams: width of the beam search; 1: greedy.
        ended: whether the new tokens of a row so far hold a text that ends it. Only what saves time asks: the caller
            cuts off what stands behind such a text.
        """
        ...


class NativeBackend:
    """Our decoder: one batch at a time with a key/value cache."""

    def __init__(self, model: Decoder, device: torch.device):
        self._model, self._device = model, device

    def generate(
        self,
        prompts: list[list[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        beams: int,
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        if beams > 1:
            return beam_search(self._model, prompts, stop_ids, max_new_tokens, self._device, beams)
        rows: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        for tokens in stream(self._model, prompts, stop_ids, max_new_tokens, self._device):
            for index, token in enumerate(tokens):
                if going[index] and token is not None:
                    rows[index].append(token)
                going[index] = going[index] and token is not None and not ended(rows[index])
            if not any(going):
                break
        return rows


class TransformersBackend:
    """transformers' model of a HF directory, with its own generation."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, pad_id: int):
        """Raises:
        UserError: the library is not there, or cannot load the directory.
        """
        try:
            import transformers
        except ImportError:
            raise UserError(
                "--backend: transformers is not installed: pip install transformers, or titan_hd[eval]"
            ) from None
        if not (directory / "config.json").is_file():
            raise UserError(f"--backend: transformers reads HF directories; {directory} has no config.json")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory}: transformers cannot load it: {' '.join(str(error).split())}") from None
        self._model, self._device, self._pad_id = model.to(device).eval(), device, pad_id

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        beams: int,
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded at the left, where its generation wants it
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=beams,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stop_ids),
            pad_token_id=self._pad_id,
        )
        rows = out[:, width:].tolist()
        ends = [next((place for place, token in enumerate(row) if token in stop_ids), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends)]
