"""Who answers: vllm, from a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from titan_hd.errors import UserError
from titan_hd.evaluation.backends import Request, without_stops
from titan_hd.seeding import stable_seed


class VllmBackend:
    """vllm's engine, which makes its own batches out of the prompts that it is given at once.

    It starts a process for each GPU by itself. Its kernels do not give the same bits for a prompt in every batch, so
    that answers may differ from run to run where two tokens are almost equally probable.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None, gpus: int, stop: Sequence[str]):
        """dtype: of the weights and of the computation; None: the files'.
        gpus: over which each matrix is split.
        stop: texts at which an answer ends.

        Raises:
            UserError: vllm is not there, or cannot load the directory.
        """
        if not (directory / "config.json").is_file():
            raise UserError(f"--backend: vllm reads HF directories; {directory} has no config.json")
        try:
            import vllm
        except ImportError:
            raise UserError("--backend: vllm is not installed: pip install vllm, or titan_hd[eval]") from None
        self._vllm, self._stop = vllm, list(stop)
        try:
            self._engine = vllm.LLM(
                model=str(directory),
                dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
                tensor_parallel_size=gpus,
                generation_config="vllm",  # not the directory's temperature and penalties
                enable_prefix_caching=True,  # several samples of a problem have one prompt
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{directory}: vllm cannot load it: {' '.join(str(error).split())}") from None

    def generate(self, prompts: list[list[int]], request: Request) -> list[list[int]]:
        """As `Backend.generate`; stop texts are the engine's own."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        if request.beams > 1:
            from vllm.sampling_params import BeamSearchParams

            params = BeamSearchParams(beam_width=request.beams, max_tokens=request.max_new_tokens)
            found = self._engine.beam_search(inputs, params)
            rows = [list(output.sequences[0].tokens) for output in found]
            rows = [row[len(prompt) :] if row[: len(prompt)] == prompt else row for row, prompt in zip(rows, prompts)]
        else:
            drawn_by = request.keys or [""] * len(prompts)
            found = self._engine.generate(inputs, [self._params(request, key) for key in drawn_by], use_tqdm=False)
            rows = [list(output.outputs[0].token_ids) for output in found]
        return without_stops(rows, request.stop_ids)

    def _params(self, request: Request, key: str):
        sampling = request.sampling
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=stable_seed("generate", sampling.seed, key) % 2**63 if sampling.temperature else None,
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(request.stop_ids),
            stop=self._stop or None,
            skip_special_tokens=False,
        )
