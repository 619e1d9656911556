"""Circuits saved by PyJuice (`.jpc`): a list of node dictionaries, read as a hidden Markov model.

PyJuice writes the nodes in topological order, the root last. A hidden Markov model over tokens
`x_1 ... x_L` is the chain

    root: Sum -> Product -> Input of x_1
                         -> Sum -> Product -> Input of x_2
                                           -> Sum -> ...

whose root holds the initial probabilities, whose other sums hold the transitions (rows `z_i`,
columns `z_{i+1}`) and whose inputs hold the emissions, `H * V` numbers, state by state. The
parameters of a sum are tiles `[n, block, child block]`, and column `k` of `edge_ids [2, n]` says
where tile `k` lies. A tied node has none of its own and follows `source_node`.
"""

from __future__ import annotations

import functools
import io
import itertools
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

from .pickles import Array, Payload, read_array, read_num_tokens, unpickle

KEYS = {"type", "num_node_blocks", "block_size", "chs", "edge_ids", "params", "zero_param_mask"}
KEYS |= {"scope", "dist", "dist_shared_with", "source_node"}
LARGEST_DISTRIBUTION = 1 << 12
"""Bytes of a pickled distribution; a real one has 200."""
GROWTH, ALLOWANCE = 4, 1 << 24
"""A dense circuit may have `GROWTH` times the bytes of its file, and `ALLOWANCE` more."""
COPIED = 1 << 18
"""Emissions are read so many at once."""
ROUNDING = 1e-3
"""PyJuice normalises a sum's rows when it loads them; rows that are closer to 1 are left alone."""


class _Node:
    """A checked dictionary of the list; children precede their parents."""

    def __init__(self, index: int, fields: Any):
        self.index = index
        match fields:
            case {
                "type": "Input" | "Product" | "Sum" as kind,
                "num_node_blocks": int(blocks),
                "block_size": int(size),
                "chs": tuple(children),
                **rest,
            } if min(blocks, size) > 0 and rest.keys() <= KEYS:
                self.kind, self.blocks, self.children = kind, (blocks, size), children
                self.fields = rest
            case _:
                self.refuse("is none that PyJuice saves")
        if any(type(child) is not int or not 0 <= child < index for child in children):
            self.refuse("has a child that does not precede it")

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"node {self.index} {reason}")

    def get(self, key: str, kind: type) -> Any:
        if type(self.fields.get(key)) is not kind:
            self.refuse(f"has no {key!r} of the right type")
        return self.fields[key]

    def array(self, key: str, dtype: str) -> Array:
        try:
            return read_array(self.fields.get(key), dtype)
        except ValueError as error:
            self.refuse(f"has {key!r} that {error}")

    def check_values(self, values: np.ndarray) -> None:
        if not (values.min(initial=0) >= 0 and values.max(initial=0) < np.inf):
            self.refuse("has parameters that are no probabilities")


@dataclass(frozen=True)
class _Matrix:
    """A sum: the node that has its tiles, the places of these, and the blocks of both sides."""

    source: _Node
    edges: bytes
    rows: tuple[int, int]
    columns: tuple[int, int]

    def dense(self) -> torch.Tensor:
        """The matrix `[rows, columns]`, float32."""
        source, (row_blocks, height), (column_blocks, width) = self.source, self.rows, self.columns
        rows, columns = np.frombuffer(self.edges, np.int64).reshape(2, -1)
        inside = (rows >= 0) & (rows < row_blocks) & (columns >= 0) & (columns < column_blocks)
        tiles = source.array("params", "<f4").numpy().copy()
        mask = np.zeros(tiles.shape, bool)
        if "zero_param_mask" in source.fields:
            mask = source.array("zero_param_mask", "|b1").numpy()
        if not tiles.shape == mask.shape == (len(rows), height, width):
            source.refuse(f"has parameters of shape {tiles.shape}, which do not fit its blocks")
        if not inside.all() or len(np.unique(rows * column_blocks + columns)) < len(rows):
            source.refuse("has `edge_ids` outside its blocks, or the same twice")
        source.check_values(tiles)
        tiles[mask] = 0
        placed = np.zeros((row_blocks, height, column_blocks, width), np.float32)
        placed[rows, :, columns] = tiles
        dense = placed.reshape(row_blocks * height, -1)
        total = dense.sum(-1, keepdims=True)
        np.divide(dense, total, out=dense, where=(abs(total - 1) > ROUNDING) & (total > 0))
        return torch.from_numpy(dense)


class HiddenMarkovModel:
    """A hidden Markov model in a `.jpc` file; parameters stay in the file until they are written.

    Attributes:
        length: positions `L`.
        num_latents: states `H`.
        vocab_size: tokens `V`.
        tie_transitions: one transition matrix for all steps.
        tie_emissions: one emission matrix for all positions.
    """

    def __init__(self, file: BinaryIO):
        self._steps = itertools.count()
        nodes = unpickle(file, self._steps)
        if type(nodes) is not list or not nodes:
            raise ValueError("it does not hold a list of nodes")
        self._nodes = [_Node(index, fields) for index, fields in enumerate(nodes)]
        # A small file can name one array in many places: it is read once.
        self._edges = functools.cache(lambda array: array.payload.read())
        matrices, inputs = self._walk()
        blocks, self.length = inputs[0].blocks, len(inputs)
        for node in self._nodes:
            if node.blocks != (blocks if node.index < len(nodes) - 1 else (1, 1)):
                node.refuse(f"has another number or size of blocks than {blocks}, or (1, 1) atop")
        self._initial, *self._transitions = matrices
        self._emissions = [self._source(node) for node in inputs]
        sizes = {self._vocab_size(node) for node in inputs}
        if len(sizes) > 1:
            raise ValueError(f"its positions have vocabularies of {sorted(sizes)[:2]} tokens")
        self.num_latents, self.vocab_size = blocks[0] * blocks[1], sizes.pop()
        self.tie_transitions = len(set(self._transitions)) <= 1
        self.tie_emissions = len(set(self._emissions)) == 1
        self._check_growth(file.seek(0, io.SEEK_END))

    def write(
        self, initial: torch.Tensor, transition: torch.Tensor, emission: torch.Tensor
    ) -> None:
        """Writes the probabilities in place: `[H]`, `[1 or L-1, H, H]` and `[1 or L, H, V]`.

        All are contiguous, in float32, on the CPU; little more memory is taken.
        """
        initial.copy_(self._initial.dense()[0])
        for matrix, out in zip(self._transitions, transition, strict=False):
            out.copy_(matrix.dense())
        for node, out in zip(self._emissions, emission, strict=False):
            payload = node.array("params", "<f4").payload
            payload.file.seek(payload.offset)
            for part in np.split(out.view(-1).numpy(), range(COPIED, out.numel(), COPIED)):
                payload.file.readinto(part)  # type: ignore[attr-defined]
                node.check_values(part)

    def _walk(self) -> tuple[list[_Matrix], list[_Node]]:
        """The sums and the inputs along the chain."""
        nodes, matrices = self._nodes, []
        inputs: list[_Node] = []
        node: _Node | None = nodes[-1]
        while node is not None:
            if node.kind != "Sum" or len(node.children) != 1:
                node.refuse("is not a sum over one product, as in a hidden Markov model")
            product = nodes[node.children[0]]
            children = sorted((nodes[i] for i in product.children), key=lambda child: child.kind)
            kinds = [product.kind, *(child.kind for child in children)]
            if kinds not in (["Product", "Input"], ["Product", "Input", "Sum"]):
                product.refuse(
                    "is not a product of one input and at most one sum, as in a hidden Markov model"
                )
            if children[0].get("scope", list) != [len(inputs)]:
                children[0].refuse(f"is not about position {len(inputs)}: tokens are out of order")
            matrices.append(self._matrix(node, product))
            inputs.append(children[0])
            node = children[1] if len(children) == 2 else None
        if 3 * len(inputs) != len(nodes):
            raise ValueError("it has nodes beside the chain of a hidden Markov model")
        return matrices, inputs

    def _matrix(self, node: _Node, product: _Node) -> _Matrix:
        """A sum over a product, which joins equal states of its children."""
        joined, edges = product.array("edge_ids", "<i8"), node.array("edge_ids", "<i8")
        number, size = product.blocks
        shapes = [(rows, len(product.children)) for rows in (number, number * size)]
        equal = np.arange(joined.shape[0] if joined.shape else 0)[:, None]
        if joined.shape not in shapes or (joined.numpy() != equal).any():
            product.refuse("does not join equal states of its children")
        if edges.shape[:1] != (2,):
            node.refuse(f"has `edge_ids` of shape {edges.shape}")
        return _Matrix(self._source(node), self._edges(edges), node.blocks, product.blocks)

    def _source(self, node: _Node) -> _Node:
        """The node that has the parameters of a node."""
        if "source_node" not in node.fields:
            return node
        index = node.get("source_node", int)
        source = self._nodes[index] if 0 <= index < len(self._nodes) else node
        if source.kind != node.kind or "source_node" in source.fields:
            node.refuse("has no source of its parameters")
        return source

    def _vocab_size(self, node: _Node) -> int:
        if "dist_shared_with" in node.fields:
            index = node.get("dist_shared_with", int)
            if not 0 <= index < node.index:
                node.refuse("shares the distribution of a node that does not precede it")
            node = self._nodes[index]
        try:
            payload = node.get("dist", Payload)
            if payload.size > LARGEST_DISTRIBUTION:
                raise ValueError(f"it has {payload.size:,} bytes")
            return read_num_tokens(unpickle(io.BytesIO(payload.read()), self._steps))
        except ValueError as error:
            node.refuse(f"has a distribution that cannot be read: {error}")

    def _check_growth(self, size: int) -> None:
        states, vocab = self.num_latents, self.vocab_size
        for node in self._emissions:
            if node.array("params", "<f4").shape != (states * vocab,):
                node.refuse(f"has no emissions of {states:,} states and {vocab:,} tokens")
        transitions = states**2 * (1 if self.tie_transitions else self.length - 1)
        emissions = states * vocab * (1 if self.tie_emissions else self.length)
        dense = 4 * (transitions + emissions)
        if dense > GROWTH * size + ALLOWANCE:
            raise ValueError(
                f"its potentials would take {dense:,} bytes, but the file has {size:,}: it is no "
                "circuit that PyJuice has saved, or one with parameters tied in part"
            )
