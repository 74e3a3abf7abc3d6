"""What a fine-tuning method says of itself. Every other room asks here, and none asks for a method by its name.

A method is one file: a subclass of `Method` (its facts and settings) and, where it has one, its layer. The table
of all of them is `methods.METHODS`. A method says what changes; it knows no process group.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from torch import nn

from titan_hd.config.job_config import Adapter, JobConfig


class Method(abc.ABC):
    """A fine-tuning method with the settings of one run.

    Facts of the class:
        name: the value of adapter.method. aliases: other values that mean the same.
        title, paper: for people; paper as "arXiv NUMBER", or another citation.
        idea: a clause on what is trained, for the start of a run; a run's method may have one of its own.
        how: half a sentence for the model card, on what becomes of the weights.
        trains, size, base: the trained tensors of a layer, their number of elements, and what becomes of W, for the
            table in docs/methods.md.
        keys: the keys of [adapter] and [hdpissa], beside method and target_modules, that it reads.
        resume_keys: those of them in which a checkpoint and the run that resumes from it must agree.
        folds: the trained tensors are zero when a run begins, and what the optimizer added to them is folded into W
            (`components.update.FoldUpdate`). Otherwise the optimizer's step is all.
        master_dtypes: what training.master_dtype may be: a frozen W is held in any of them, a fold rounds
            stochastically to bfloat16.
        scales_weight: it changes W by multiples of W's own elements, so that a W of zeros can never move. (Methods with
            `directions` have no such fact: what they cannot move is told from the SVD.)
        no_peft: why the peft library cannot hold it, for a method without `peft_config`.

    Facts of a run:
        num_adapters: K, the number of logical adapters. 1 for every method in which all workers train the same
            parameters.
        shares: K or 1, into how many the global batch is dealt: each has a loss of its own, for adapters of its own.
        directions: singular directions of each weight that the first values need; 0 for none.
        smallest: they are those of the smallest singular values, not the leading ones.
        changes_base: the base weights that it trains beside are not the model directory's.
        lr_ratios: last part of a parameter's name -> factor on optimizer.lr, where that is not 1.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    idea: str
    aliases: ClassVar[tuple[str, ...]] = ()
    how: ClassVar[str] = ""
    trains: ClassVar[str]
    size: ClassVar[str]
    base: ClassVar[str] = "frozen"
    keys: ClassVar[tuple[str, ...]]
    resume_keys: ClassVar[tuple[str, ...]]
    folds: ClassVar[bool] = False
    master_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    scales_weight: ClassVar[bool] = False
    no_peft: ClassVar[str] = ""

    num_adapters: int = 1
    shares: int = 1
    directions: int = 0
    smallest: bool = False
    changes_base: bool = False

    def __init__(self) -> None:
        self.lr_ratios: dict[str, float] = {}

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: JobConfig, num_adapters: int) -> Method:
        """The method with the settings that a configuration gives it. num_adapters: K, as `adapters_for` said."""

    @classmethod
    def adapters_for(cls, config: JobConfig, workers: int) -> int:
        """K, the number of logical adapters on so many data-parallel workers."""
        return 1

    @classmethod
    def config_errors(cls, config: JobConfig) -> list[str]:
        """Faults of a configuration that concern this method alone, one line each."""
        return []

    @classmethod
    def tensor_parallel(cls) -> bool:
        """Whether tensor parallelism knows how to split it."""
        return False

    @abc.abstractmethod
    def shape_error(self, name: str, shape: tuple[int, int]) -> str | None:
        """One line on why the layer `name` with a weight [out, in] cannot be trained so, or None."""

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Change a model in place: replace the targeted linear layers, set `requires_grad` of every parameter. A head
        that is trained beside any method is trained in fp32.

        target_modules: last parts of the names of linear layers; None for all but the head.

        Returns:
            names of the trained layers.

        Raises:
            UserError: a target matches no layer.
        """
        names = self.change(model, target_modules)
        head = getattr(model, "trained_head", lambda: None)()
        for parameter in head.parameters() if head is not None else ():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return names

    @abc.abstractmethod
    def change(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """`apply`, of what the method itself changes and trains."""

    def sentence(self) -> str:
        """The method with its paper, and its idea."""
        return f"{self.title}{f' ({self.paper})' if self.paper else ''}: {self.idea}"

    def trained_parameters(self, model: nn.Module) -> int:
        """Number of trained elements of a model that the method was applied to, over all logical adapters."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @classmethod
    def peft_error(cls, config: JobConfig) -> str | None:
        """Why export.format = "peft" cannot hold what a configuration trains, as one line, or None."""
        if not cls.no_peft:
            return None
        return f"export.format: peft cannot hold method {cls.name}: {cls.no_peft}; use hf"

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        """The method's own entries of peft's adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def identity(cls, config: JobConfig) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must have in common, by key."""
        identity = {key: setting(config, key) for key in cls.resume_keys}
        if "adapter.alpha" in identity:
            identity["adapter.alpha"] = config.adapter.effective_alpha
        return identity


class FoldingMethod(Method):
    """A method whose layers are `FoldingLinear`s: K logical adapters of rank r, folded into W after every step or every
    few.

    mute_scalar: 0, or what the adapters' gradients are to be divided by. slices: which singular directions the fixed
    factors take (`svd.cut_slices`). samples: what an adapter learns from, its "own" share of the global batch or "all".
    """

    folds = True
    master_dtypes = ("float32", "bfloat16")
    rank: int
    mute_scalar: float
    slices: str
    samples: str = "own"

    @property
    def together(self) -> int:
        """Adapters that a micro-batch trains: one, or all of them side by side, as one of rank K r."""
        return self.num_adapters // self.shares


def setting(config: JobConfig, key: str) -> Any:
    """The value of "section.key"."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
