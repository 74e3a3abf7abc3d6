"""How well a classifier does on held-out records: loss, and the metrics of GLUE, by scikit-learn and scipy."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist

from titan_hd.data.example import IGNORE
from titan_hd.data.loader import Batch
from titan_hd.models.classification import classification_loss, scores_of
from titan_hd.models.roberta import Roberta

OF_CLASSES, OF_SCORES = ("accuracy", "f1", "matthews"), ("pearson", "spearman")


def metric_names(num_labels: int) -> tuple[str, ...]:
    """What is measured beside the loss, without "validation_" in front."""
    return OF_SCORES if num_labels == 1 else OF_CLASSES


def missing_library(num_labels: int) -> str | None:
    """The package that the metrics need and that is not installed."""
    package, module = ("scipy", "scipy") if num_labels == 1 else ("scikit-learn", "sklearn")
    return None if importlib.util.find_spec(module) else package


@torch.no_grad()
def predict(
    model: Roberta, batches: Iterable[Batch], workers: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, L] in fp32 and labels int64 [N] of the records in the batches of all workers, on the host of each.
    Every worker has equally many batches of one size; rows without a label are left out."""
    rows: list[torch.Tensor] = []
    for batch in batches:
        here = batch.on(device)
        logits = model(here.input_ids, documents=here.documents)
        labels = batch.targets[:, :1].to(device, torch.float64)  # exact: they have 32 bits
        rows.append(torch.cat((logits.double(), labels), 1))
    own = torch.cat(rows)
    everyones = [torch.empty_like(own) for _ in range(workers)]
    dist.all_gather(everyones, own, group=group)
    found = torch.cat(everyones).cpu()
    found = found[found[:, -1] != IGNORE]
    return found[:, :-1].float(), found[:, -1].long()


def measure(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Loss per record, and the metrics of `metric_names`; correlations with predictions that are all the same are 0.

    f1: of class 1 where there are two classes, else the mean over the classes.
    """
    values = {"loss": classification_loss(logits, labels).item() / max(1, len(labels))}
    if logits.shape[1] == 1:
        return values | _correlations(logits[:, 0].double().numpy(), scores_of(labels).double().numpy())
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    truth, chosen = labels.numpy(), logits.argmax(1).numpy()
    average = "binary" if logits.shape[1] == 2 else "macro"
    return values | {
        "accuracy": float(accuracy_score(truth, chosen)),
        "f1": float(f1_score(truth, chosen, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, chosen)),
    }


def _correlations(predicted, truth) -> dict[str, float]:
    """Of float64 arrays [N]."""
    from scipy.stats import pearsonr, spearmanr

    if len(truth) < 2 or predicted.std() == 0 or truth.std() == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():  # that the predictions are nearly the same
        warnings.simplefilter("ignore")
        return {
            "pearson": float(pearsonr(predicted, truth).statistic),
            "spearman": float(spearmanr(predicted, truth).statistic),
        }
