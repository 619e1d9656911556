"""Circuits saved by PyJuice (`.jpc`): a list of node dictionaries, read as a hidden Markov model.

PyJuice writes the nodes in topological order, the root last. A hidden Markov model over tokens
`x_1 ... x_L` is the chain

    root: Sum -> Product -> Input of x_1
                         -> Sum -> Product -> Input of x_2
                                           -> Sum -> ...

whose root holds the initial law, whose other sums hold the transitions (rows `z_i`, columns
`z_{i+1}`) and whose inputs hold the emissions, `H * V` numbers, state by state. The parameters of
a sum are tiles `[n, block, child block]`, and column `k` of `edge_ids [2, n]` says where tile `k`
lies. A tied node has none of its own and follows `source_node`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from .stand_ins import Array, Distribution, Payload
from .unpickling import Budget, unpickle

KEYS = {
    "type",
    "num_node_blocks",
    "block_size",
    "chs",
    "edge_ids",
    "params",
    "zero_param_mask",
    "scope",
    "dist",
    "dist_shared_with",
    "source_node",
}
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
        unknown = sorted(set(self.fields) - KEYS)
        if unknown:
            self.refuse(f"has the unknown entry {unknown[0]!r}")
        self.kind = self.get("type", str)
        self.num_blocks: int = self.get("num_node_blocks", int)
        self.block_size: int = self.get("block_size", int)
        if self.num_blocks < 1 or self.block_size < 1:
            self.refuse(f"has {self.num_blocks} blocks of {self.block_size} states")
        self.children: tuple[int, ...] = self.get("chs", tuple)
        # Children precede their parents, hence there are no cycles.
        if any(type(child) is not int or not 0 <= child < index for child in self.children):
            self.refuse("has a child that does not precede it")

    @property
    def num_states(self) -> int:
        return self.num_blocks * self.block_size

    def refuse(self, reason: str):
        raise ValueError(f"node {self.index} {reason}")

    def get(self, key: str, kind: type) -> Any:
        """An entry of the given type."""
        value = self.fields.get(key)
        if type(value) is not kind or (kind is Array and value.payload is None):
            self.refuse(f"has no {key!r} of the right type")
        return value

    def get_array(self, key: str, kinds: str) -> Array:
        """An entry that is an array with elements of one of numpy's kinds."""
        array = self.get(key, Array)
        if array.dtype.kind not in kinds:
            self.refuse(f"has {key!r} of type {array.dtype}")
        return array


@dataclass(frozen=True)
class _Step:
    """A sum of the chain: where its tiles lie, and the node that has them."""

    node: _Node
    source: _Node
    edge_ids: bytes


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
        size = file.seek(0, io.SEEK_END)
        self._budget = Budget.for_file(size)
        nodes = unpickle(file, self._budget)
        if type(nodes) is not list or not nodes:
            raise ValueError("it does not hold a list of nodes")
        self._nodes = [_Node(index, fields) for index, fields in enumerate(nodes)]
        # A small file can name the same array or node in many places: each is read once.
        self._edges: dict[tuple, bytes] = {}
        self._checked: set[tuple] = set()
        self._sources: dict[int, _Node] = {}
        self._vocab_sizes: dict[bytes, int] = {}
        self._root, self._steps, inputs = self._walk()
        self._check_sizes(inputs)
        self._emissions = [self._source(node) for node in inputs]
        self.length = len(inputs)
        self.num_latents = inputs[0].num_states
        sizes = {self._vocab_size(node) for node in inputs}
        if len(sizes) > 1:
            raise ValueError(f"its positions have vocabularies of {sorted(sizes)[:2]} tokens")
        self.vocab_size = sizes.pop()
        laws = {(step.source.index, step.edge_ids) for step in self._steps}
        self.tie_transitions = len(laws) <= 1
        self.tie_emissions = len({node.index for node in self._emissions}) == 1
        self._check_growth(size)

    def _walk(self) -> tuple[_Step, list[_Step], list[_Node]]:
        """The root, the other sums and the inputs, along the chain."""
        nodes, steps, inputs = self._nodes, [], []
        node: _Node | None = nodes[-1]
        while node is not None:
            if node.kind != "Sum" or len(node.children) != 1:
                node.refuse("is not a sum over one product, as in a hidden Markov model")
            product = nodes[node.children[0]]
            if product.kind != "Product":
                product.refuse(f"is a {product.kind!r} where a hidden Markov model has a product")
            children = [nodes[child] for child in product.children]
            kinds = sorted(child.kind for child in children)
            if kinds not in (["Input"], ["Input", "Sum"]):
                product.refuse(
                    "is not a product of one input and at most one sum, as in a hidden Markov model"
                )
            self._check_identity(product)
            steps.append(self._step(node, product))
            children.sort(key=lambda child: child.kind)
            if children[0].get("scope", list) != [len(inputs)]:
                children[0].refuse(f"is not about position {len(inputs)}: tokens are out of order")
            inputs.append(children[0])
            node = children[1] if len(children) == 2 else None
        if 3 * len(inputs) != len(nodes):
            raise ValueError("it has nodes beside the chain of a hidden Markov model")
        return steps[0], steps[1:], inputs

    def _check_identity(self, product: _Node) -> None:
        edges = product.get_array("edge_ids", "i")
        shapes = [(n, len(product.children)) for n in (product.num_blocks, product.num_states)]
        if edges.identity in self._checked and edges.shape in shapes:
            return
        if edges.shape in shapes:
            found = np.frombuffer(self._edge_bytes(edges), np.int64).reshape(edges.shape)
            if (found == np.arange(len(found))[:, None]).all():
                self._checked.add(edges.identity)
                return
        product.refuse("does not join equal states of its children")

    def _edge_bytes(self, array: Array) -> bytes:
        """An array of integers as int64 in C order."""
        if array.identity not in self._edges:
            self._edges[array.identity] = array.numpy().astype(np.int64).tobytes()
        return self._edges[array.identity]

    def _step(self, node: _Node, product: _Node) -> _Step:
        edges, source = node.get_array("edge_ids", "i"), self._source(node)
        tiles = source.get_array("params", "f").shape
        if tiles[1:] != (node.block_size, product.block_size) or len(tiles) != 3 or not tiles[0]:
            node.refuse(f"has parameters of shape {tiles}, which do not fit its blocks")
        if edges.shape != (2, tiles[0]) or tiles[0] > node.num_blocks * product.num_blocks:
            node.refuse(f"has {tiles[0]} tiles, but `edge_ids` of shape {edges.shape}")
        raw = self._edge_bytes(edges)
        sizes = (node.num_blocks, node.block_size, product.num_blocks, product.block_size)
        key = (source.index, edges.identity, *sizes)
        if key in self._checked:
            return _Step(node, source, raw)
        rows, columns = np.frombuffer(raw, np.int64).reshape(2, -1)
        places = rows * product.num_blocks + columns
        within = (rows >= 0) & (rows < node.num_blocks) & (columns >= 0)
        within &= columns < product.num_blocks
        if not within.all() or len(np.unique(places)) < len(places):
            node.refuse("has `edge_ids` outside its blocks, or the same twice")
        if "zero_param_mask" in source.fields:
            mask = source.get_array("zero_param_mask", "b")
            if mask.shape != tiles:
                source.refuse(f"has a `zero_param_mask` of shape {mask.shape}, not {tiles}")
        self._checked.add(key)
        return _Step(node, source, raw)

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

    def _check_sizes(self, inputs: list[_Node]) -> None:
        if self._root.node.num_states != 1:
            self._root.node.refuse(f"is the root, but has {self._root.node.num_states} states")
        expected = (inputs[0].num_blocks, inputs[0].block_size)
        for node in self._nodes[:-1]:
            if (node.num_blocks, node.block_size) != expected:
                node.refuse(f"has another number or size of blocks than {expected}")

    def _vocab_size(self, node: _Node) -> int:
        if "dist_shared_with" in node.fields:
            index = node.get("dist_shared_with", int)
            if not 0 <= index < node.index:
                node.refuse("shares the distribution of a node that does not precede it")
            node = self._nodes[index]
        payload = node.get("dist", Payload)
        if payload.size > LARGEST_DISTRIBUTION:
            node.refuse(f"has a distribution of {payload.size:,} bytes")
        raw = bytes(payload.read())
        if raw not in self._vocab_sizes:
            try:
                distribution = unpickle(io.BytesIO(raw), self._budget)
            except ValueError as error:
                node.refuse(f"has a distribution that cannot be read: {error}")
            number = distribution.num_cats if type(distribution) is Distribution else None
            if type(number) is not int or number < 1:
                node.refuse("has a distribution that is none over tokens")
            self._vocab_sizes[raw] = number
        return self._vocab_sizes[raw]

    def _check_growth(self, size: int) -> None:
        states, vocab = self.num_latents, self.vocab_size
        for node in self._emissions:
            found = node.get_array("params", "f").shape
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

    def write_initial(self, out: torch.Tensor) -> None:
        """Writes the initial law into `[H]`, float32 on the CPU."""
        out.copy_(torch.from_numpy(self._matrix(self._root)[0]))

    def write_transitions(self, out: torch.Tensor) -> None:
        """Writes the transitions into `[1, H, H]` if they are tied, else `[L-1, H, H]`."""
        for step, matrix in zip(self._steps, out, strict=False):
            matrix.copy_(torch.from_numpy(self._matrix(step)))

    def write_emissions(self, out: torch.Tensor) -> None:
        """Writes the emissions into a contiguous `[1, H, V]` if they are tied, else `[L, H, V]`.

        Needs no more memory than `out`.
        """
        for node, matrix in zip(self._emissions, out, strict=False):
            flat = matrix.view(-1).numpy()
            for part, values in node.get("params", Array).chunks():
                self._check_values(node, values)
                flat[part] = values

    @staticmethod
    def _check_values(node: _Node, values: np.ndarray) -> None:
        if not (values.min() >= 0 and values.max() < np.inf):
            node.refuse("has parameters that are no probabilities")

    def _matrix(self, step: _Step) -> np.ndarray:
        """The dense `[rows, columns]` of a sum, float32."""
        tiles = step.source.get("params", Array).numpy().astype(np.float32)
        self._check_values(step.source, tiles)
        if "zero_param_mask" in step.source.fields:
            tiles[step.source.get("zero_param_mask", Array).numpy()] = 0
        rows, columns = np.frombuffer(step.edge_ids, np.int64).reshape(2, -1)
        height, width = tiles.shape[1:]
        blocks = (step.node.num_blocks, self.num_latents // width)
        dense = np.zeros((blocks[0], height, blocks[1], width), np.float32)
        dense[rows, :, columns] = tiles
        dense = dense.reshape(blocks[0] * height, -1)
        total = dense.sum(-1, keepdims=True)
        np.divide(dense, total, out=dense, where=(abs(total - 1) > ROUNDING) & (total > 0))
        return dense
