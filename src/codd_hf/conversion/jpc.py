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

from .arrays import Array, read_array, read_num_tokens
from .pickles import Payload, unpickle

KEYS = {"type", "num_node_blocks", "block_size", "chs", "edge_ids", "params", "zero_param_mask"}
KEYS |= {"scope", "dist", "dist_shared_with", "source_node"}
OLD_KEYS = {"num_node_groups": "num_node_blocks", "group_size": "block_size"}
LARGEST_DISTRIBUTION = 1 << 12
"""Bytes of a pickled distribution; a real one has 200."""
GROWTH, ALLOWANCE = 4, 1 << 24
"""A dense circuit may have `GROWTH` times the bytes of its file, and `ALLOWANCE` more."""
ROUNDING = 1e-3
"""PyJuice normalises a sum's rows when it loads them; rows that are closer to 1 are left alone."""


class _Node:
    """A checked dictionary of the list."""

    def __init__(self, index: int, fields: Any):
        self.index = index
        if type(fields) is not dict:
            self.refuse("is not a dictionary")
        self.fields = {OLD_KEYS.get(key, key): value for key, value in fields.items()}
        if unknown := sorted(set(self.fields) - KEYS):
            self.refuse(f"has the unknown entry {unknown[0]!r}")
        self.kind: str = self.get("type", str)
        self.blocks: tuple[int, int] = self.get("num_node_blocks", int), self.get("block_size", int)
        if min(self.blocks) < 1:
            self.refuse(f"has {self.blocks[0]} blocks of {self.blocks[1]} states")
        self.num_states = self.blocks[0] * self.blocks[1]
        self.children: tuple[int, ...] = self.get("chs", tuple)
        # Children precede their parents, hence there are no cycles.
        if any(type(child) is not int or not 0 <= child < index for child in self.children):
            self.refuse("has a child that does not precede it")

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"node {self.index} {reason}")

    def get(self, key: str, kind: type) -> Any:
        """An entry of the type."""
        if type(self.fields.get(key)) is not kind:
            self.refuse(f"has no {key!r} of the right type")
        return self.fields[key]

    def array(self, key: str, kinds: str) -> Array:
        """An entry that is an array with elements of one of numpy's kinds."""
        try:
            return read_array(self.fields.get(key), kinds)
        except ValueError as error:
            self.refuse(f"has {key!r} that {error}")

    @property
    def mask(self) -> Array | None:
        """The places where parameters are zero."""
        return self.array("zero_param_mask", "b") if "zero_param_mask" in self.fields else None


@dataclass(frozen=True)
class _Matrix:
    """A sum: the node that has its tiles, their places (int64), and the blocks of both sides."""

    source: _Node
    edges: bytes
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def places(self) -> np.ndarray:
        """`[2, n]`, the block row and the block column of each tile."""
        return np.frombuffer(self.edges, np.int64).reshape(2, -1)

    def check(self, node: _Node, tiles: tuple[int, ...]) -> None:
        """Raises unless all tiles lie within the blocks, at different places."""
        rows, columns = self.places
        within = (rows >= 0) & (rows < self.rows[0]) & (columns >= 0) & (columns < self.columns[0])
        different = len(np.unique(rows * self.columns[0] + columns))
        if not within.all() or different < len(rows):
            node.refuse("has `edge_ids` outside its blocks, or the same twice")
        mask = self.source.mask
        if mask is not None and mask.shape != tiles:
            self.source.refuse(f"has a `zero_param_mask` of shape {mask.shape}, not {tiles}")

    def dense(self) -> torch.Tensor:
        """The matrix `[rows, columns]`, float32."""
        tiles = self.source.array("params", "f").numpy().astype(np.float32)
        _check_values(self.source, tiles)
        if self.source.mask is not None:
            tiles[self.source.mask.numpy()] = 0
        (row_blocks, height), (column_blocks, width) = self.rows, self.columns
        dense = np.zeros((row_blocks, height, column_blocks, width), np.float32)
        rows, columns = self.places
        dense[rows, :, columns] = tiles
        dense = dense.reshape(row_blocks * height, -1)
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

    Raises:
        ValueError: the file is damaged, hostile, or another circuit than such a chain.
    """

    def __init__(self, file: BinaryIO):
        steps = itertools.count()
        nodes = unpickle(file, steps)
        if type(nodes) is not list or not nodes:
            raise ValueError("it does not hold a list of nodes")
        self._nodes = [_Node(index, fields) for index, fields in enumerate(nodes)]
        # A small file can name the same array or node in many places: each is read once.
        self._sources: dict[int, _Node] = {}
        self._matrices: set[_Matrix] = set()
        self._edges = functools.cache(lambda array: array.numpy().astype(np.int64).tobytes())
        self._identity = functools.cache(
            lambda number, width: np.arange(number).repeat(width).tobytes()
        )
        self._num_tokens = functools.cache(
            lambda raw: read_num_tokens(unpickle(io.BytesIO(raw), steps))
        )
        sums, products, inputs = self._walk()
        root, *others = reversed(self._nodes)
        if root.num_states != 1:
            root.refuse(f"is the root, but has {root.num_states} states")
        for node in others:
            if node.blocks != inputs[0].blocks:
                node.refuse(f"has another number or size of blocks than {inputs[0].blocks}")
        self.length, self.num_latents = len(inputs), inputs[0].num_states
        pairs = zip(sums, products, strict=True)
        self._initial, *self._transitions = [self._matrix(*pair) for pair in pairs]
        self._emissions = [self._source(node) for node in inputs]
        sizes = {self._vocab_size(node) for node in inputs}
        if len(sizes) > 1:
            raise ValueError(f"its positions have vocabularies of {sorted(sizes)[:2]} tokens")
        self.vocab_size = sizes.pop()
        self.tie_transitions = len(set(self._transitions)) <= 1
        self.tie_emissions = len(set(self._emissions)) == 1
        self._check_growth(file.seek(0, io.SEEK_END))

    def write(
        self, initial: torch.Tensor, transition: torch.Tensor, emission: torch.Tensor
    ) -> None:
        """Writes the probabilities into tensors in place, with little more memory than theirs.

        Args:
            initial: `[H]`, as all of them float32 on the CPU.
            transition: `[1, H, H]` if transitions are tied, else `[L-1, H, H]`.
            emission: `[1, H, V]` if emissions are tied, else `[L, H, V]`; contiguous.
        """
        initial.copy_(self._initial.dense()[0])
        for matrix, out in zip(self._transitions, transition, strict=False):
            out.copy_(matrix.dense())
        for node, out in zip(self._emissions, emission, strict=False):
            flat, start = out.view(-1).numpy(), 0
            for values in node.array("params", "f").parts():
                _check_values(node, values)
                flat[start : start + len(values)] = values
                start += len(values)

    def _walk(self) -> tuple[list[_Node], list[_Node], list[_Node]]:
        """The sums, the products and the inputs along the chain."""
        nodes, sums, products = self._nodes, [], []
        inputs: list[_Node] = []
        node: _Node | None = nodes[-1]
        while node is not None:
            if node.kind != "Sum" or len(node.children) != 1:
                node.refuse("is not a sum over one product, as in a hidden Markov model")
            product = nodes[node.children[0]]
            if product.kind != "Product":
                product.refuse(f"is a {product.kind!r} where a hidden Markov model has a product")
            children = sorted((nodes[i] for i in product.children), key=lambda child: child.kind)
            if [child.kind for child in children] not in (["Input"], ["Input", "Sum"]):
                product.refuse(
                    "is not a product of one input and at most one sum, as in a hidden Markov model"
                )
            if children[0].get("scope", list) != [len(inputs)]:
                children[0].refuse(f"is not about position {len(inputs)}: tokens are out of order")
            sums.append(node)
            products.append(product)
            inputs.append(children[0])
            node = children[1] if len(children) == 2 else None
        if 3 * len(inputs) != len(nodes):
            raise ValueError("it has nodes beside the chain of a hidden Markov model")
        return sums, products, inputs

    def _matrix(self, node: _Node, product: _Node) -> _Matrix:
        """A sum over a product, which joins equal states of its children."""
        edges, width = product.array("edge_ids", "i"), len(product.children)
        number = edges.shape[0] if edges.shape else 0
        if edges.shape not in ((product.blocks[0], width), (product.num_states, width)) or (
            self._edges(edges) != self._identity(number, width)
        ):
            product.refuse("does not join equal states of its children")
        edges, source = node.array("edge_ids", "i"), self._source(node)
        tiles = source.array("params", "f").shape
        if tiles[1:] != (node.blocks[1], product.blocks[1]) or len(tiles) != 3 or not tiles[0]:
            node.refuse(f"has parameters of shape {tiles}, which do not fit its blocks")
        if edges.shape != (2, tiles[0]) or tiles[0] > node.blocks[0] * product.blocks[0]:
            node.refuse(f"has {tiles[0]} tiles, but `edge_ids` of shape {edges.shape}")
        matrix = _Matrix(source, self._edges(edges), node.blocks, product.blocks)
        if matrix not in self._matrices:
            matrix.check(node, tiles)
            self._matrices.add(matrix)
        return matrix

    def _source(self, node: _Node) -> _Node:
        """The node that has the parameters of a node."""
        passed: set[int] = set()
        while "source_node" in node.fields and node.index not in self._sources:
            passed.add(node.index)
            index = node.get("source_node", int)
            if not 0 <= index < len(self._nodes) or index in passed:
                node.refuse("has no source of its parameters")
            if self._nodes[index].kind != node.kind:
                node.refuse(f"takes its parameters from a node of type {self._nodes[index].kind!r}")
            node = self._nodes[index]
        source = self._sources.get(node.index, node)
        self._sources |= dict.fromkeys(passed, source)
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
            return self._num_tokens(bytes(payload.read()))
        except ValueError as error:
            node.refuse(f"has a distribution that cannot be read: {error}")

    def _check_growth(self, size: int) -> None:
        states, vocab = self.num_latents, self.vocab_size
        for node in self._emissions:
            found = node.array("params", "f").shape
            if found != (states * vocab,):
                node.refuse(
                    f"has emissions of shape {found}, not the {states * vocab:,} numbers of "
                    f"{states:,} states and {vocab:,} tokens"
                )
        transitions = states**2 * (1 if self.tie_transitions else self.length - 1)
        emissions = states * vocab * (1 if self.tie_emissions else self.length)
        dense = 4 * (transitions + emissions)
        if dense > GROWTH * size + ALLOWANCE:
            raise ValueError(
                f"its potentials would take {dense:,} bytes, but the file has {size:,}: it is no "
                "circuit that PyJuice has saved, or one with parameters tied in part"
            )


def _check_values(node: _Node, values: np.ndarray) -> None:
    if not (values.min() >= 0 and values.max() < np.inf):
        node.refuse("has parameters that are no probabilities")
