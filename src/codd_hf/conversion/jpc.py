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

import functools
import io
import math
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from .pickles import read_array, unpickle

KEYS = {"type", "num_node_blocks", "block_size", "chs", "edge_ids", "params", "zero_param_mask"}
KEYS |= {"scope", "dist", "dist_shared_with", "source_node"}
OVER_TOKENS = ("Categorical", "ExternProductCategorical", "SoftEvidenceCategorical")
GROWTH, ALLOWANCE = 4, 1 << 24
"""A dense circuit may have `GROWTH` times the bytes of its file, and `ALLOWANCE` more."""
ROUNDING = 1e-3
"""PyJuice normalises a sum's rows when it loads them; rows that are closer to 1 are left alone."""

Node = dict[str, Any]
"""The dictionary of the file with its place (`index`), its children themselves and its `blocks`,
their number and size; the source of what is not tied is the node itself."""


class _Matrix(NamedTuple):
    """A sum: the node that has its tiles, the places of these, and the blocks of both sides."""

    source: int
    edges: bytes
    rows: tuple[int, int]
    columns: tuple[int, int]


class HiddenMarkovModel:
    """A hidden Markov model in a `.jpc` file.

    Attributes:
        length: positions `L`.
        num_latents: states `H`.
        vocab_size: tokens `V`.
        initial: `[H]` probabilities, as all others in float32.
        transitions: `L - 1` matrices `[H, H]`, or one that is tied.
        emissions: `L` matrices `[H, V]`, or one that is tied, on the bytes of the file.

    Raises:
        ValueError: the file holds another circuit.
        Exception: of many kinds, where the file is damaged.
    """

    def __init__(self, file: BinaryIO):
        self._nodes: list[Node] = []
        for index, fields in enumerate(unpickle(file)):
            if not fields.keys() <= KEYS:
                raise ValueError(f"node {index} is none that PyJuice saves")
            children = [self._nodes[i] for i in fields["chs"]]  # they precede their parents
            children.sort(key=lambda child: child["type"])
            node = {"index": index, "source_node": index, **fields, "chs": children}
            node["blocks"] = fields["num_node_blocks"], fields["block_size"]
            self._nodes.append(node)
        # A small file can name one value in many places: it is read once.
        self._edges = functools.cache(lambda array: read_array(array, "<i8").tobytes())
        self._distribution = functools.cache(lambda pickled: unpickle(io.BytesIO(pickled)))
        (initial, *transitions), leaves = self._walk()
        blocks = {node["blocks"] for node in self._nodes[:-1]}
        if len(blocks) > 1 or initial.rows != (1, 1):
            raise ValueError("its positions have different numbers or sizes of blocks")
        self.length, self.num_latents = len(leaves), math.prod(initial.columns)
        transitions, emissions = _tied(transitions), _tied([leaf["source_node"] for leaf in leaves])
        sizes = {self._probabilities(index).size for index in emissions}
        self.vocab_size = max(sizes) // self.num_latents
        if sizes != {self.num_latents * self.vocab_size}:
            raise ValueError(f"its inputs are no emissions of {self.num_latents:,} states each")
        size = file.seek(0, io.SEEK_END)
        columns = self.num_latents * len(transitions) + self.vocab_size * len(emissions)
        dense = 4 * self.num_latents * columns
        if dense > GROWTH * size + ALLOWANCE:
            raise ValueError(
                f"its potentials would take {dense:,} bytes, but the file has {size:,}: it is no "
                "circuit that PyJuice has saved, or one with parameters tied in part"
            )
        self.initial = self._dense(initial)[0]
        self.transitions = [self._dense(matrix) for matrix in transitions]
        shape = self.num_latents, self.vocab_size
        self.emissions = [self._probabilities(index).reshape(shape) for index in emissions]

    def _walk(self) -> tuple[list[_Matrix], list[Node]]:
        """The sums and the inputs along the chain."""
        matrices: list[_Matrix] = []
        leaves: list[Node] = []
        above = [self._nodes[-1]]
        while above:
            match above:
                case [{"type": "Sum", "chs": [{"type": "Product"} as product]} as node]:
                    types = [child["type"] for child in product["chs"]]
                case _:
                    _refuse(above[0], "is not a sum over one product, as in a hidden Markov model")
            if types not in (["Input"], ["Input", "Sum"]):
                _refuse(product, "is not a product of one input and at most one sum, as in one")
            leaf, *above = product["chs"]
            if leaf["scope"] != [len(leaves)]:
                _refuse(leaf, f"is not about position {len(leaves)}: tokens are out of order")
            pickled = self._nodes[leaf.get("dist_shared_with", leaf["index"])]["dist"]
            if getattr(self._distribution(pickled), "name", None) not in OVER_TOKENS:
                _refuse(leaf, "has a distribution that is none over tokens")
            matrices.append(self._matrix(node, product))
            leaves.append(leaf)
        return matrices, leaves

    def _matrix(self, node: Node, product: Node) -> _Matrix:
        """A sum over a product, which joins equal states of its children."""
        joined = read_array(product["edge_ids"], "<i8")
        number, size = product["blocks"]
        shapes = [(rows, len(product["chs"])) for rows in (number, number * size)]
        if joined.shape not in shapes or (joined != np.arange(len(joined))[:, None]).any():
            _refuse(product, "does not join equal states of its children")
        edges = self._edges(node["edge_ids"])
        return _Matrix(node["source_node"], edges, node["blocks"], product["blocks"])

    def _probabilities(self, index: int) -> np.ndarray:
        values = read_array(self._nodes[index]["params"], "<f4")
        if not (values.min() >= 0 and values.max() < np.inf):
            _refuse(self._nodes[index], "has parameters that are no probabilities")
        return values

    def _dense(self, matrix: _Matrix) -> np.ndarray:
        """The matrix `[rows, columns]`, float32."""
        source, (row_blocks, height), (column_blocks, width) = matrix.source, *matrix[2:]
        rows, columns = np.frombuffer(matrix.edges, np.int64).reshape(2, -1)
        tiles = self._probabilities(source).copy()
        if tiles.shape != (len(rows), height, width):
            _refuse(
                self._nodes[source], f"has parameters of shape {tiles.shape}, which are no tiles"
            )
        if "zero_param_mask" in self._nodes[source]:
            tiles[read_array(self._nodes[source]["zero_param_mask"], "|b1")] = 0
        placed = np.zeros((row_blocks, height, column_blocks, width), np.float32)
        placed[rows, :, columns] = tiles
        dense = placed.reshape(row_blocks * height, -1)
        total = dense.sum(-1, keepdims=True)
        np.divide(dense, total, out=dense, where=(abs(total - 1) > ROUNDING) & (total > 0))
        return dense


def _tied(parts: list[Any]) -> list[Any]:
    """One for all positions if they are the same."""
    return parts[:1] if len(set(parts)) == 1 else parts


def _refuse(node: Node, reason: str) -> NoReturn:
    raise ValueError(f"node {node['index']} {reason}")
