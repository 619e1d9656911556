"""Circuits that are no hidden Markov model over tokens are refused with the reason."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from jpc_files import hmm_nodes, random_hmm, write

from codd_hf.conversion import convert_jpc


def change(index: int, **entries):
    """Changes the entries of a node; None removes one."""

    def apply(nodes: list[dict]) -> None:
        for key, value in entries.items():
            if value is None:
                del nodes[index][key]
            else:
                nodes[index][key] = value

    return apply


def scaled(index: int, factor: float):
    def apply(nodes: list[dict]) -> None:
        nodes[index]["params"] = nodes[index]["params"] * np.float32(factor)

    return apply


DAMAGED = r"damaged \("
# The nodes are 0, 1, 2: inputs (2 is the source); 3, 5, 7: products; 4, 6, 8: sums, 8 the root.
TWO = np.array([[0, 0], [1, 1]])
OTHER_CIRCUITS = [
    (lambda nodes: nodes.clear(), DAMAGED),
    (lambda nodes: nodes.append("x"), DAMAGED),
    (lambda nodes: nodes.pop(), "node 7 is not a sum over one product"),
    (change(8, chs=(7, 7)), "node 8 is not a sum over one product"),
    (change(8, chs=(6,)), "node 8 is not a sum over one product"),
    (change(7, chs=(0, 1)), "node 7 is not a product of one input and at most one sum"),
    (change(7, chs=(0, 7)), DAMAGED),
    (change(7, edge_ids=TWO[::-1].copy()), "node 7 does not join equal states"),
    (change(0, scope=[1]), "node 0 is not about position 0: tokens are out of order"),
    (change(0, source_node=0), DAMAGED),
    (change(0, source_node=1), DAMAGED),
    (change(0, source_node=4), "its inputs are no emissions of 4 states each"),
    (change(0, source_node=None), DAMAGED),
    (
        change(0, dist=pickle.dumps({"num_cats": 5})),
        "node 0 has a distribution that is none over tokens",
    ),
    (change(0, dist=b"\0" * 5000), "opcode .* unknown"),
    (change(0, extra=1), "node 0 is none that PyJuice saves"),
    (change(2, params=np.ones(19, "f4")), "its inputs are no emissions of 4 states each"),
    (change(2, params=np.ones(20, "i8")), "other elements than <f4"),
    (change(4, params=np.ones((4, 2, 1), "f4")), r"has parameters of shape \(4, 2, 1\), which"),
    (
        change(4, edge_ids=np.zeros((2, 3), "i8")),
        r"has parameters of shape \(4, 2, 2\), which",
    ),
    (change(4, edge_ids=2 * np.array([[0, 0, 1, 1], [0, 1, 0, 1]])), DAMAGED),
    (change(4, zero_param_mask=np.zeros((4, 2, 1), "?")), DAMAGED),
    (change(5, block_size=1), "different numbers or sizes of blocks"),
    (change(0, num_node_blocks=1, block_size=4), "different numbers or sizes of blocks"),
    (
        change(8, block_size=2, params=np.ones((2, 2, 2), "f4")),
        "different numbers or sizes of blocks",
    ),
    (scaled(2, -1), "node 2 has parameters that are no probabilities"),
    (scaled(8, np.inf), "node 8 has parameters that are no probabilities"),
]


@pytest.mark.parametrize(("alter", "reason"), OTHER_CIRCUITS)
def test_another_structure_is_refused_with_the_reason(alter, reason, tmp_path):
    nodes = hmm_nodes(*random_hmm(), num_blocks=2)
    alter(nodes)
    with pytest.raises(ValueError, match=rf"`circuit.jpc` cannot be converted: .*({reason})"):
        convert_jpc(write(tmp_path / "circuit.jpc", nodes))


def test_a_circuit_that_would_be_far_larger_than_its_file_is_refused(tmp_path):
    initial, transitions, emissions, _ = random_hmm(states=64, vocab=600)
    nodes = hmm_nodes(initial, transitions, emissions, 300)
    nodes[0] = {**nodes[0], "params": nodes[299]["params"]}
    del nodes[0]["source_node"]
    with pytest.raises(ValueError, match=r"would take 46,096,384 bytes, but the file has"):
        convert_jpc(write(tmp_path / "circuit.jpc", nodes))
