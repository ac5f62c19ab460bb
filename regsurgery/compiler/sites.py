"""Where the surgery takes place, as found by the matcher: names of graph nodes and paths of modules, no objects."""

from __future__ import annotations

from dataclasses import dataclass

from regsurgery.runtime.surgery import REGISTER_TOKENS


@dataclass(frozen=True)
class Block:
    """One transformer block; node names in the graph, module paths in the model ("" if the graph has none).

    Attributes:
        hidden: the MLP activation `[B, T, H]`, the input of the down projection.
        down: the down projection.
        ups: the linears that the activation is made of (two for a gated MLP with two projections).
        output: the residual add that ends the block.
        in_place: whether the activation is fresh, read once and not a view, so that it may be written into.
        attention_path: the module that computes attention.
        attention_weights: parameters of its query, key and value projections.
        attention_input: the tokens `[B, T, D]` that they read, usually normed; "" if they read different ones.
        attention_output: what attention adds to the stream.
    """

    index: int
    hidden: str
    down: str
    ups: tuple[str, ...]
    output: str
    hidden_size: int
    in_place: bool
    path: str
    down_path: str
    attention_path: str
    attention_weights: tuple[str, ...]
    attention_input: str = ""
    attention_output: str = ""


@dataclass(frozen=True)
class Sites:
    """Where the surgery takes place.

    Attributes:
        tokens: node of the token stream before any pre-norm, `[B, T, D]`, registers not included.
        last: the last residual add.
        num_prefix: prefix tokens at the beginning of `tokens`; `num_tokens` is T, `width` is D.
        tower_path: the module that holds the patch embedding and every block.
        insert_path: the module whose input the registers are added to: the pre-norm or the first block.
        placement: where registers go: `end`, after the patches, or `prefix`, after the prefix tokens, for attention
            that identifies patches by their position.
        register_name: the name of the tower's new parameter, which it must not have already.
    """

    tokens: str
    last: str
    blocks: tuple[Block, ...]
    num_prefix: int
    num_tokens: int
    width: int
    tower_path: str
    insert_path: str
    placement: str = "end"
    register_name: str = REGISTER_TOKENS

    @property
    def patches(self) -> slice:
        """The patches among the tokens of the original."""
        return slice(self.num_prefix, self.num_tokens)

    @property
    def register_start(self) -> int | None:
        """The index of the first register among the tokens; None if registers are at the end."""
        return self.num_prefix if self.placement == "prefix" else None

    def patched(self, num_registers: int) -> tuple[slice, slice]:
        """The patches and the registers among the tokens of a patched model."""
        if self.placement == "prefix":
            first_patch = self.num_prefix + num_registers
            return slice(first_patch, self.num_tokens + num_registers), slice(self.num_prefix, first_patch)
        return self.patches, slice(self.num_tokens, self.num_tokens + num_registers)

    @property
    def probe_block(self) -> int:
        """The block after which outlier tokens are counted: the last but one, as in the paper."""
        return max(0, len(self.blocks) - 2)
