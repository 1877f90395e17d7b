"""Parameters, bytes and floating-point operations of a network and of its dense baseline."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from rich.table import Table


def name_within_block(name: str) -> str:
    """The name of a layer within its block; outside of blocks, the last part of it.

    >>> name_within_block("transformer.h.11.attn.c_attn"), name_within_block("model.embed_tokens")
    ('attn.c_attn', 'embed_tokens')
    """
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[index + 1 :])


class LayerKind(StrEnum):
    """What a layer does, as far as the budget cares."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    OTHER = "other"


@dataclass(frozen=True)
class LayerBudget:
    """One layer beside the layer it has in the dense baseline.

    Args:
        name: Full module name.
        kind: Kind of layer.
        in_block: Whether it belongs to a decoder block (else embedding, head, final norm).
        parameters: Stored numbers, shared ones counted at the layer that holds them first.
        dense_parameters: The same in the dense baseline.
        flops_per_token: Floating-point operations of the forward pass, 2 for a multiply-add.
        dense_flops_per_token: The same in the dense baseline.
        rank: The rank of its factors, None where it is dense.
    """

    name: str
    kind: LayerKind
    in_block: bool
    parameters: int
    dense_parameters: int
    flops_per_token: int
    dense_flops_per_token: int
    rank: int | None = None


class SameSizeDense(NamedTuple):
    """The dense network that is as deep as a low-rank one, of as many parameters, and so narrower.

    ``forward_flops_per_token`` are those of `ModelBudget`.
    """

    width: int
    parameters: int
    forward_flops_per_token: int


@dataclass(frozen=True)
class ModelBudget:
    """The sums over all layers, for the blocks alone and in total.

    A compression ratio is dense over stored: above 1 is smaller.
    """

    layers: tuple[LayerBudget, ...]
    sequence_length: int
    same_size: SameSizeDense | None = None
    """The other choice at this size, where it is known: shown beside the dense baseline."""

    def beside(self, dense: "ModelBudget") -> "ModelBudget":
        """The same network beside a dense baseline of other sizes, with layers of the same names.

        Args:
            dense: Budget of the dense baseline.
        """
        named = {layer.name: layer for layer in dense.layers}
        assert named.keys() == {layer.name for layer in self.layers}
        layers = (
            replace(
                layer,
                dense_parameters=named[layer.name].dense_parameters,
                dense_flops_per_token=named[layer.name].dense_flops_per_token,
            )
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    @property
    def total_parameters(self) -> int:
        """All stored numbers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_total_parameters(self) -> int:
        """All stored numbers of the dense baseline."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def block_parameters(self) -> int:
        """Stored numbers of the decoder blocks."""
        return sum(layer.parameters for layer in self.layers if layer.in_block)

    @property
    def dense_block_parameters(self) -> int:
        """Stored numbers of the dense baseline's decoder blocks."""
        return sum(layer.dense_parameters for layer in self.layers if layer.in_block)

    @property
    def block_compression_ratio(self) -> float:
        """Dense over stored parameters of the blocks."""
        return self.dense_block_parameters / self.block_parameters

    @property
    def total_compression_ratio(self) -> float:
        """Dense over stored parameters of the whole network."""
        return self.dense_total_parameters / self.total_parameters

    @property
    def forward_flops_per_token(self) -> int:
        """Matrix products of the forward pass, attention over the full square included."""
        return sum(layer.flops_per_token for layer in self.layers)

    @property
    def dense_forward_flops_per_token(self) -> int:
        """The same in the dense baseline."""
        return sum(layer.dense_flops_per_token for layer in self.layers)

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward, which costs twice the forward; recomputing is not counted.

        Source: https://arxiv.org/abs/2204.02311, appendix B.
        """
        return 3 * self.forward_flops_per_token

    @property
    def flop_ratio(self) -> float:
        """Dense over needed floating-point operations: the bound on what low rank can save."""
        return self.dense_forward_flops_per_token / self.forward_flops_per_token

    @property
    def linear_parameter_share(self) -> float:
        """Share of its parameters that a dense network has in linear layers, embedding and head."""
        linear = (LayerKind.LINEAR, LayerKind.EMBEDDING, LayerKind.HEAD)
        held = sum(layer.dense_parameters for layer in self.layers if layer.kind in linear)
        return held / self.dense_total_parameters

    @property
    def linear_flop_share(self) -> float:
        """Share of the dense baseline's floating-point operations in linear layers and head."""
        linear = (LayerKind.LINEAR, LayerKind.HEAD)
        spent = sum(layer.dense_flops_per_token for layer in self.layers if layer.kind in linear)
        return spent / self.dense_forward_flops_per_token

    def bytes_at(self, bits: int) -> int:
        """Bytes of all parameters at ``bits`` per number, without quantization constants."""
        return self.total_parameters * bits // 8

    def dense_bytes_at(self, bits: int) -> int:
        """`bytes_at` for the dense baseline."""
        return self.dense_total_parameters * bits // 8

    def block_bytes_at(self, bits: int) -> int:
        """Bytes of the decoder blocks' parameters at ``bits`` a number."""
        return self.block_parameters * bits // 8

    def dense_block_bytes_at(self, bits: int) -> int:
        """`block_bytes_at` for the dense baseline."""
        return self.dense_block_parameters * bits // 8

    def _ranks_by_kind(self) -> dict[str, list[int]]:
        """The ranks of the low-rank layers, by the layer's name within its block."""
        found: dict[str, list[int]] = {}
        for layer in self.layers:
            if layer.rank is not None and layer.kind is not LayerKind.HEAD:
                found.setdefault(name_within_block(layer.name), []).append(layer.rank)
        return found

    def to_table(self) -> Table:
        """A table of parameters, operations and bytes beside those of the dense baseline."""
        table = Table(title=f"Budget at {self.sequence_length} tokens a sequence")
        table.add_column("")
        for column in ("this network", "dense baseline", "dense / this"):
            table.add_column(column, justify="right")
        rows = [
            ("parameters, blocks (M)", self.block_parameters, self.dense_block_parameters, 1e6),
            ("parameters, total (M)", self.total_parameters, self.dense_total_parameters, 1e6),
            (
                "forward MFLOP per token",
                self.forward_flops_per_token,
                self.dense_forward_flops_per_token,
                1e6,
            ),
            *(
                (f"MiB at {bits} bits", self.bytes_at(bits), self.dense_bytes_at(bits), 2**20)
                for bits in (32, 16, 8, 4)
            ),
        ]
        for name, ours, dense, unit in rows:
            table.add_row(
                name, f"{ours / unit:,.2f}", f"{dense / unit:,.2f}", f"{dense / ours:.2f}x"
            )
        for kind, ranks in self._ranks_by_kind().items():
            smallest, largest = min(ranks), max(ranks)
            text = str(largest) if smallest == largest else f"{smallest} - {largest}"
            table.add_row(f"rank, {kind}", text, "", "")
        table.add_row("linear share of parameters", "", f"{self.linear_parameter_share:.1%}", "")
        table.add_row("linear share of FLOP", "", f"{self.linear_flop_share:.1%}", "")
        if self.same_size is not None:
            share = self.same_size.forward_flops_per_token / self.forward_flops_per_token
            table.caption = (
                f"a dense network of this size: width {self.same_size.width},"
                f" {self.same_size.parameters / 1e6:,.2f} M parameters, {share:.2f}x the operations"
                " per token of this network"
            )
        return table
