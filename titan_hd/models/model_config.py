"""What every family's configuration says, and the properties by which the rest of the package tells families apart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in HF's names, whichever family they are of. A family's own configuration is a frozen dataclass that
    inherits from this, with these fields and others, in an order of its own: its repr is what a checkpoint remembers of
    the model.

    max_position_embeddings: the longest row that the model knows. ignored: keys of the config.json that have no
    meaning here. hf: the whole config.json, for the export.

    Properties of a family:
        causal: a token sees none that follows it, so that the model can learn to predict the next one, and generate.
            False: an encoder, whose tokens see the whole of their document.
        attention_free: what a token sees of those before it is a state of one size; there are no scores.
        tensor_parallel: its blocks have a plan for tensor parallelism (`distributed.tp`).
        packs: several documents in one row do not see each other.
        endless: it can compute beyond max_position_embeddings.
        num_labels: outputs of its classification head, which is trained beside any method; 1: a score, 0: it has none.
        draws: it has dropout of its own.
        new_weights: first parts of the names of weights that its files may lack: they are of a head for another task.
            They are drawn then.
        other_weights: first parts of names that its files may have and that are passed over, of heads for other tasks.
        base_prefix: of the names of its weights but the head's, which files of the model without a head leave out.
        blocks_name: of the list of the blocks in the names of its weights.
    """

    if TYPE_CHECKING:  # a field of a base class would come first
        vocab_size: int
        hidden_size: int
        num_hidden_layers: int
        max_position_embeddings: int
        tie_word_embeddings: bool
        ignored: tuple[str, ...]
        hf: dict[str, Any]

    causal: ClassVar[bool] = True
    attention_free: ClassVar[bool] = False
    tensor_parallel: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    endless: ClassVar[bool] = True
    new_weights: ClassVar[tuple[str, ...]] = ()
    base_prefix: ClassVar[str] = ""
    blocks_name: ClassVar[str]

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def other_weights(self) -> tuple[str, ...]:
        return ()

    @property
    def draws(self) -> bool:
        return False

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer of a block by its kind: its path in the block, or the end of it where that is
        no other's."""
        raise NotImplementedError

    def linear_paths(self) -> dict[str, str]:
        """Kind -> path in the block."""
        return {kind: kind for kind in self.linear_shapes()}

    def linear_layers(self) -> dict[str, str]:
        """Full name -> kind of every linear layer of the blocks."""
        paths = self.linear_paths().items()
        return {f"{self.blocks_name}.{i}.{path}": kind for i in range(self.num_hidden_layers) for kind, path in paths}

    def mixing_flops(self, length: float) -> float:
        """Operations per token of a forward pass, in all blocks together, that are no product with a linear layer's
        weight. length: of the sequence that the token is in."""
        raise NotImplementedError

    def changed(self, **values: Any) -> ModelConfig:
        """The same model with other values of some fields."""
        return dataclasses.replace(self, **values)

    def with_blocks(self, count: int) -> ModelConfig:
        """The same model with its first blocks alone."""
        return self.changed(num_hidden_layers=count)
