"""Validation: loss over held-out records, and exact match of greedily generated answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from titan_hd.components.generation import generate
from titan_hd.components.loss import token_loss_sum
from titan_hd.config.job_config import JobConfig
from titan_hd.data.loader import Records, validation_batches
from titan_hd.data.text.tokenizer import Tokenizer
from titan_hd.data.tokens.records import InstructionRecords
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import reshard
from titan_hd.models.decoder import Decoder


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    records: Records,
    worker: int,
    workers: int,
    batch_size: int,
    pad_to: int | None,
    limit: int,
    device: torch.device,
    group: dist.ProcessGroup,
    loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = token_loss_sum,
) -> float:
    """Mean loss per trained token over the records; every worker takes part in the same number of batches.

    group: the data-parallel workers that share out the records. loss_sum: of what the model returns, and targets.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in validation_batches(records, worker, workers, batch_size, pad_to, limit):
        loss = loss_sum(model(batch.input_ids.to(device)), batch.targets.to(device))
        totals += torch.stack((loss.double(), totals.new_tensor(batch.trained_tokens)))
    dist.all_reduce(totals, group=group)
    return (totals[0] / totals[1].clamp(min=1)).item()


def final_answer(text: str, marker: str) -> str | None:
    """What follows the last marker, up to the end of the line; None where the marker is missing."""
    _, found, answer = text.rpartition(marker)
    return answer.split("\n")[0].strip() if found else None


@torch.no_grad()
def exact_match(
    model: nn.Module,
    records: InstructionRecords,
    tokenizer: Tokenizer,
    samples: int,
    marker: str,
    worker: int,
    workers: int,
    generate: Callable[[list[list[int]]], list[list[int]]],
    device: torch.device,
    group: dist.ProcessGroup,
    batch_size: int,
) -> float:
    """Share of the first `samples` records whose generated final answer equals the reference's.

    generate: continues a batch of prompts; all workers call it equally often.
    """
    samples = min(samples, len(records))
    mine = list(range(worker, samples, workers))
    per_worker = -(-samples // workers)
    padded = (mine + [0] * per_worker)[:per_worker]  # equal numbers everywhere; the surplus is not scored
    answers: list[list[int]] = []
    for start in range(0, per_worker, batch_size):
        answers += generate([records.prompt_ids(i) for i in padded[start : start + batch_size]])
    right = 0
    for index, ids in zip(mine, answers):
        reference = final_answer(records.response(index), marker)
        right += reference is not None and final_answer(tokenizer.decode(ids), marker) == reference
    total = torch.tensor(right, device=device)
    dist.all_reduce(total, group=group)
    return total.item() / samples


class Validator:
    """What a run validates on, and how. tokenizer: called only to generate answers. loss_sum: see `validation_loss`."""

    def __init__(
        self,
        config: JobConfig,
        dims: ParallelDims,
        device: torch.device,
        records: Records,
        pad_to: int | None,
        loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tokenizer: Callable[[], Tokenizer],
    ):
        self.settings, self.dims, self.device, self.records = config.validation, dims, device, records
        self.batch_size = config.validation.batch_size or config.training.local_batch_size
        self.pad_to, self.loss_sum, self.tokenizer = pad_to, loss_sum, tokenizer

    def run(self, model: Decoder) -> dict[str, float]:
        """validation_loss and, if asked for, validation_exact_match. Collective; leaves the model as for training."""
        s, dims = self.settings, self.dims
        share, group = (dims.dp_rank, dims.dp_size), dims.dp_mesh.get_group()
        model.eval()
        loss = validation_loss(
            model, self.records, *share, self.batch_size, self.pad_to, s.steps, self.device, group, self.loss_sum
        )
        values = {"validation_loss": loss}
        if s.exact_match_samples:
            values["validation_exact_match"] = exact_match(
                model,
                self.records,
                self.tokenizer(),
                s.exact_match_samples,
                s.answer_marker,
                *share,
                lambda prompts: self._generate(model, prompts),
                self.device,
                group,
                self.batch_size,
            )
        model.train()
        reshard(model)
        return values

    def _generate(self, model: Decoder, prompts: list[list[int]]) -> list[list[int]]:
        return generate(
            model,
            prompts,
            self.records.stop_ids(),
            self.settings.max_new_tokens,
            self.device,
            group=dist.group.WORLD,
            tp_group=self.dims.world["tp"].get_group() if self.dims.tp > 1 else None,
        )
