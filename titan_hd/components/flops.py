"""Floating-point operations that training does per token; with a frozen base that is not 6N. And what GPUs can do."""

from __future__ import annotations

from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig

# Dense TFLOP/s of tensor cores in bf16, from the vendors' data sheets, by a part of torch.cuda.get_device_name(). The
# first entry that fits counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


def peak_flops(device_name: str) -> float | None:
    """bf16 operations per second that a GPU could do at most; None for one that is not in the table."""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def flops_per_token(config: ModelConfig, length: float, trained_weights: int, adapters: float) -> float:
    """Model FLOPs per token of one training step, without recomputation.

    length: tokens of the sequence that an average token is in: E[L^2] / E[L] of the records' lengths L. A mean length
    would count too little, for the long records have the most tokens. The whole attention matrix is counted, as by PaLM
    and torchtitan, so that figures compare; causal kernels compute half of it.
    trained_weights: elements of the matrices for which dW is computed (0 with a frozen base).
    adapters: what the adapters do per token.

    Products with W: 2 per element forward, 2 for dx, 2 more for dW where it is computed. Attention: twice as much
    backward as forward.
    """
    per_layer = sum(out * width for out, width in config.linear_shapes().values())
    weights = config.num_hidden_layers * per_layer
    if not config.num_labels:  # a classification head meets one token of a sequence
        weights += config.vocab_size * config.hidden_size
    return 4 * weights + 2 * trained_weights + 3 * config.mixing_flops(length) + adapters


def trained_work(model: Model, tokens: float) -> tuple[int, float]:
    """`trained_weights` and `adapters` of `flops_per_token` for a model that a method was applied to.

    tokens: of one worker's micro-batch.
    """
    looked_up = set() if model.output_head() is None else {*model.embedding().parameters()}
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    head = model.trained_head()  # meets few tokens
    beside = looked_up | {*(p for module in (head, *layers) if module is not None for p in module.parameters())}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in beside)
    return trained, sum(layer.flops(tokens) for layer in layers)
