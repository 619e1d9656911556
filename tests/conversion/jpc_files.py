"""Circuits as PyJuice writes them, made here by Python's own pickle from inert classes."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ["cat_hmm", "cat_hmm_blocks", "ext_hmm_v20"]
MODULES = {
    "Categorical": "pyjuice.nodes.distributions.categorical",
    "ExternProductCategorical": "pyjuice.nodes.distributions.external_categorical",
    "SoftEvidenceCategorical": "pyjuice.nodes.distributions.softevi_categorical",
}


class _WithState:
    def __init__(self, num_cats: int):
        self.post_fw_fns = []
        self.num_cats = num_cats


class _WithArguments(_WithState):
    def __reduce__(self):
        return type(self), (self.num_cats,)


@contextmanager
def pyjuice() -> Iterator[dict[str, type]]:
    """The names of PyJuice's distributions, importable while the block lasts."""
    classes, added = {}, ["pyjuice", "pyjuice.nodes", "pyjuice.nodes.distributions"]
    sys.modules |= {module: types.ModuleType(module) for module in added}
    for name, module in MODULES.items():
        base = _WithState if name == "Categorical" else _WithArguments
        classes[name] = type(name, (base,), {"__module__": module, "__qualname__": name})
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, classes[name])
    try:
        yield classes
    finally:
        for module in [*added, *MODULES.values()]:
            del sys.modules[module]


def dist(num_cats: int, name: str = "Categorical", protocol: int = 4) -> bytes:
    """A pickled distribution."""
    with pyjuice() as classes:
        return pickle.dumps(classes[name](num_cats), protocol)


def oracle_nodes(name: str) -> list[dict]:
    """The nodes in a file that PyJuice wrote (a fixture of this project, hence trusted)."""
    with pyjuice():
        return pickle.loads((FIXTURES / f"{name}.jpc").read_bytes())


def tiles_of(matrix: np.ndarray, blocks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The tiles `[n, block, child block]` of a dense matrix and where they lie, `[2, n]`."""
    rows, columns = blocks
    height, width = matrix.shape[0] // rows, matrix.shape[1] // columns
    places = [(i, j) for i in range(rows) for j in range(columns)]
    tiles = [matrix[i * height : (i + 1) * height, j * width : (j + 1) * width] for i, j in places]
    return np.stack(tiles), np.array(places).T.copy()


def hmm_nodes(
    initial: np.ndarray,
    transitions: list[np.ndarray],
    emissions: list[np.ndarray],
    length: int,
    num_blocks: int = 1,
    kind: str = "Categorical",
) -> list[dict]:
    """The nodes of a hidden Markov model; one transition or emission matrix stands for a tied one.

    Args:
        initial: `[H]`.
        transitions: `L - 1` matrices `[H, H]`, or one.
        emissions: `L` matrices `[H, V]`, or one.
        length: `L`.
        num_blocks: blocks of the `H` states.
        kind: class of the distributions.
    """
    states, vocab = emissions[0].shape
    block = {"num_node_blocks": num_blocks, "block_size": states // num_blocks}
    pickled = dist(vocab, kind)
    nodes = []
    for i in range(length):
        node = {"type": "Input", **block, "chs": (), "scope": [i], "dist": pickled}
        if len(emissions) > 1 or i == length - 1:
            node["params"] = emissions[i if len(emissions) > 1 else 0].reshape(-1)
        else:
            node["source_node"] = length - 1
        nodes.append(node)
    first_sum, cut, top_law = None, {}, initial[None]
    for i in reversed(range(length)):
        below = (i,) if i == length - 1 else (i, len(nodes) - 1)
        edges = np.tile(np.arange(num_blocks)[:, None], len(below))
        nodes.append({"type": "Product", **block, "chs": below, "edge_ids": edges})
        top = i == 0
        matrix = top_law if top else transitions[i - 1 if len(transitions) > 1 else 0]
        if id(matrix) not in cut:
            cut[id(matrix)] = tiles_of(matrix, (1 if top else num_blocks, num_blocks))
        tiles, places = cut[id(matrix)]
        node = {"type": "Sum", **block, "chs": (len(nodes) - 1,), "edge_ids": places}
        if top:
            node |= {"num_node_blocks": 1, "block_size": 1}
        if top or len(transitions) > 1 or first_sum is None:
            node["params"] = tiles
            first_sum = len(nodes)
        else:
            node["source_node"] = first_sum
        nodes.append(node)
    return nodes


def random_hmm(
    states: int = 4,
    vocab: int = 5,
    length: int = 3,
    tie_transitions: bool = True,
    tie_emissions: bool = True,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], int]:
    """The first four arguments of `hmm_nodes`, normalised, in float32."""
    draw = np.random.default_rng(0)

    def laws(*shape: int) -> np.ndarray:
        return draw.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)

    transitions = [laws(states, states) for _ in range(1 if tie_transitions else length - 1)]
    emissions = [laws(states, vocab) for _ in range(1 if tie_emissions else length)]
    return laws(states), transitions, emissions, length


def write(path: Path, nodes: object, protocol: int = 4) -> Path:
    """Pickles nodes into a file."""
    path.write_bytes(pickle.dumps(nodes, protocol))
    return path
