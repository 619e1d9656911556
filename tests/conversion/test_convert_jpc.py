"""Circuits saved by PyJuice become heads with the same parameters and the same likelihoods."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from jpc_files import FIXTURES, NAMES, dist, hmm_nodes, oracle_nodes, random_hmm, tiles_of, write
from safetensors.torch import load_file

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.conversion import convert_jpc, holds_circuit
from codd_hf.conversion.jpc import HiddenMarkovModel
from tiny import tiny_backbone

ORACLES = {name: load_file(FIXTURES / f"{name}.safetensors") for name in NAMES}
BOTH_VERSIONS = pytest.mark.parametrize("version", ["pyjuice241", "pyjuice263"])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.detach().double() - theirs.double()).abs().max()) < 1e-4


def assert_same_circuit(head: CoDDHead, other: CoDDHead) -> None:
    for ours, theirs in zip(head.potentials.tensors(), other.potentials.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def log_likelihood(head: CoDDHead, tokens: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """`log p(x_O)`, `[B]`: a flat prediction weighs each missing token 1 / V, a sum weighs it 1."""
    logits = torch.zeros(*tokens.shape, head.config.vocab_size)
    missing = (~observed).sum(-1) * float(np.log(head.config.vocab_size))
    return head(logits, tokens, observed).log_partition + missing


def summed_over_paths(initial, transitions, emissions, length) -> np.ndarray:
    """`p(x)` of all `x`, `[V] * L`, in float64, from the definition."""
    states, vocab = emissions[0].shape
    total = np.zeros([vocab] * length)
    for path in itertools.product(range(states), repeat=length):
        weight = float(initial[path[0]])
        rows = []
        for i, state in enumerate(path):
            if i > 0:
                weight *= float(transitions[min(i - 1, len(transitions) - 1)][path[i - 1], state])
            rows.append(emissions[min(i, len(emissions) - 1)][state].astype(np.float64))
        total += weight * functools.reduce(np.multiply.outer, rows)
    return total


def assert_holds(head: CoDDHead, initial, transitions, emissions, length) -> None:
    """The head gives every `x` its probability under these matrices."""
    expected = torch.from_numpy(summed_over_paths(initial, transitions, emissions, length))
    tokens = torch.tensor(list(itertools.product(range(len(expected)), repeat=length)))
    found = log_likelihood(head, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert torch.allclose(found.double().exp(), expected.flatten(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_pyjuices_bit_for_bit(name):
    oracle = ORACLES[name]
    with (FIXTURES / f"{name}.jpc").open("rb") as file:
        circuit = HiddenMarkovModel(file)
    assert circuit.length == oracle["tokens"].shape[1]
    (transition,), (emission,) = circuit.transitions, circuit.emissions
    found = [torch.tensor(part) for part in (circuit.initial, transition[None], emission[None])]
    head = convert_jpc(FIXTURES / f"{name}.jpc")
    for key, probabilities, logs in zip(
        ("init", "trans", "emit"), found, head.potentials.tensors(), strict=True
    ):
        assert torch.equal(probabilities, oracle[key])
        assert torch.allclose(logs, oracle[key].log(), rtol=0, atol=1e-6)


@BOTH_VERSIONS
def test_a_converted_head_has_pyjuices_likelihoods(version):
    for name in ("cat_hmm", "cat_hmm_blocks"):
        oracle, head = ORACLES[name], convert_jpc(FIXTURES / f"{name}.jpc")
        everywhere = torch.ones_like(oracle["observed_mask"])
        found = log_likelihood(head, oracle["tokens"], everywhere)
        assert_close(found, oracle[f"{version}.ll"])
        assert_close(found, oracle["brute_f64.ll"])
        found = log_likelihood(head, oracle["tokens"], oracle["observed_mask"])
        assert_close(found, oracle[f"{version}.ll_missing"])


@BOTH_VERSIONS
def test_a_converted_head_has_pyjuices_likelihoods_under_evidence(version):
    oracle, head = ORACLES["ext_hmm_v20"], convert_jpc(FIXTURES / "ext_hmm_v20.jpc")
    evidence = oracle["evidence_logp"]
    mass = evidence.logsumexp(-1).sum(-1)  # PyJuice's evidence is not normalised, ours is
    coupled = head(evidence)
    constant = coupled.log_partition + mass
    assert_close(constant, oracle[f"{version}.normalizing_constant"])
    whole = coupled.log_prob(oracle["tokens"]) + constant
    assert_close(whole, oracle[f"{version}.unnormalized_ll"])


@pytest.mark.parametrize(("name", "protocol"), [(NAMES[0], 5), (NAMES[2], 4)])
def test_all_pickle_protocols_give_the_same_head(name, protocol, tmp_path):
    nodes = oracle_nodes(name)
    kind = "ExternProductCategorical" if name == "ext_hmm_v20" else "Categorical"
    for node in nodes:
        if "dist" in node:
            node["dist"] = dist(20, kind, protocol)
    head = convert_jpc(write(tmp_path / "circuit.jpc", nodes, protocol))
    assert_same_circuit(head, convert_jpc(FIXTURES / f"{name}.jpc"))


def test_arrays_of_numpy_1_are_read(tmp_path):
    raw = pickle.dumps(oracle_nodes("cat_hmm"), protocol=4)
    assert raw.count(b"\x16numpy._core.multiarray") == 1
    path = tmp_path / "circuit.jpc"
    raw = raw[:2] + raw[11:]  # without the frame, whose length changes
    path.write_bytes(raw.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"))
    assert_same_circuit(convert_jpc(path), convert_jpc(FIXTURES / "cat_hmm.jpc"))


@pytest.mark.parametrize(
    ("tie_transitions", "tie_emissions", "num_blocks", "kind"),
    [
        (True, True, 1, "ExternProductCategorical"),
        (True, False, 2, "SoftEvidenceCategorical"),
        (False, True, 2, "Categorical"),
        (False, False, 1, "Categorical"),
    ],
)
def test_what_a_circuit_ties_the_head_ties(
    tie_transitions, tie_emissions, num_blocks, kind, tmp_path
):
    matrices = random_hmm(tie_transitions=tie_transitions, tie_emissions=tie_emissions)
    nodes = hmm_nodes(*matrices, num_blocks=num_blocks, kind=kind)
    head = convert_jpc(write(tmp_path / "circuit.jpc", nodes))
    assert head.config.tie_transitions == tie_transitions
    assert head.config.tie_emissions == tie_emissions
    assert_holds(head, *matrices)
    joint = summed_over_paths(*matrices)
    each = [joint.sum(tuple(j for j in range(3) if j != i)) for i in range(3)]
    expected = np.mean(each, 0) if tie_emissions else np.stack(each)
    found = head.token_marginal.numpy()
    assert np.allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


@pytest.mark.parametrize("length", [1, 2])
def test_short_windows_are_read(length, tmp_path):
    matrices = random_hmm(length=length)
    matrices = (*matrices[:3], length)
    head = convert_jpc(write(tmp_path / "circuit.jpc", hmm_nodes(*matrices)))
    assert head.config.window_length == length
    assert_holds(head, *matrices)


def test_tiles_lie_where_edge_ids_say(tmp_path):
    nodes = oracle_nodes("cat_hmm_blocks")
    order = np.random.default_rng(0).permutation(9)
    for node in nodes:
        if node["type"] == "Sum" and len(node["edge_ids"][0]) == 9:
            node["edge_ids"] = node["edge_ids"][:, order].copy()
            if "params" in node:
                node["params"] = node["params"][order]
    nodes[-1]["edge_ids"], nodes[-1]["params"] = (
        nodes[-1]["edge_ids"][:, ::-1].copy(),
        nodes[-1]["params"][::-1].copy(),
    )
    head = convert_jpc(write(tmp_path / "circuit.jpc", nodes))
    assert_same_circuit(head, convert_jpc(FIXTURES / "cat_hmm_blocks.jpc"))


def test_a_tied_sum_with_edges_of_its_own_has_a_law_of_its_own(tmp_path):
    initial, transitions, emissions, length = random_hmm()
    nodes = hmm_nodes(initial, transitions, emissions, length, num_blocks=2)
    tied = next(n for n in nodes if n["type"] == "Sum" and "source_node" in n)
    tied["edge_ids"] = tied["edge_ids"][::-1].copy()
    # The nearer the root, the earlier the step: the tied sum is the first of the two.
    tiles, _ = tiles_of(transitions[0], (2, 2))
    moved = np.block([[tiles[0], tiles[2]], [tiles[1], tiles[3]]])
    moved /= moved.sum(-1, keepdims=True)
    head = convert_jpc(write(tmp_path / "circuit.jpc", nodes))
    assert not head.config.tie_transitions
    assert_holds(head, initial, [moved, transitions[0]], emissions, length)


def test_missing_tiles_and_masked_parameters_are_zero(tmp_path):
    initial, transitions, emissions, length = random_hmm()
    nodes = hmm_nodes(initial, transitions, emissions, length, num_blocks=2)
    mask = np.zeros((3, 2, 2), dtype=bool)
    mask[0, 1, 0] = True
    for node in nodes:
        if node["type"] == "Sum" and node["edge_ids"].shape == (2, 4):
            node["edge_ids"] = node["edge_ids"][:, [0, 1, 3]].copy()
            if "params" in node:
                node["params"] = node["params"][[0, 1, 3]]
                node["zero_param_mask"] = mask
    sparse = transitions[0].copy()
    sparse[2:, :2] = 0
    sparse[1, 0] = 0
    sparse /= sparse.sum(-1, keepdims=True)  # as PyJuice does when it loads the file
    head = convert_jpc(write(tmp_path / "circuit.jpc", nodes))
    assert_holds(head, initial, [sparse], emissions, length)


def test_sources_and_distributions_that_are_shared_are_followed(tmp_path):
    matrices = random_hmm(length=4)
    nodes = hmm_nodes(*matrices[:3], 4)
    for node in nodes[1:4]:
        del node["dist"]
        node["dist_shared_with"] = 0
    assert_holds(convert_jpc(write(tmp_path / "circuit.jpc", nodes)), *matrices[:3], 4)


@pytest.mark.parametrize("tie_emissions", [True, False])
def test_the_correction_divides_by_the_token_marginal(tie_emissions, tmp_path):
    matrices = random_hmm(tie_emissions=tie_emissions)
    path = write(tmp_path / "circuit.jpc", hmm_nodes(*matrices))
    raw, corrected = convert_jpc(path), convert_jpc(path, alpha=0.5)
    assert (raw.config.alpha, corrected.config.alpha) == (0, 0.5)
    marginal = raw.token_marginal.reshape(-1, 5)[: 1 if tie_emissions else 3]
    expected = raw.emission.exp().reshape(-1, 4, 5) / marginal[:, None].sqrt()
    assert torch.allclose(corrected.emission.exp().reshape(-1, 4, 5), expected, rtol=1e-5)
    corrected.set_alpha(0)
    assert torch.allclose(corrected.emission, raw.emission, atol=1e-5)


def test_a_token_that_a_circuit_never_emits_gets_the_ratio_1(tmp_path):
    initial, transitions, emissions, length = random_hmm()
    emissions[0][:, 3] = 0
    emissions[0] /= emissions[0].sum(-1, keepdims=True)
    path = write(tmp_path / "circuit.jpc", hmm_nodes(initial, transitions, emissions, length))
    raw = convert_jpc(path)
    assert (raw.emission[:, 3] == -torch.inf).all()
    corrected = convert_jpc(path, alpha=1.0)
    assert torch.allclose(corrected.emission[:, 3], torch.zeros(4), atol=1e-4)
    raw.set_alpha(1.0)
    assert (raw.emission[:, 3] == -torch.inf).all()
    assert torch.allclose(raw.emission[:, :3], corrected.emission[:, :3], atol=1e-6)


def test_the_repository_loads_and_tells_where_it_comes_from(tmp_path):
    folder = tmp_path / "head"
    source = FIXTURES / "cat_hmm_blocks.jpc"
    head = convert_jpc(
        source,
        mask_token_id=19,
        forbidden_token_ids=[3],
        base_model_name_or_path="GSAI-ML/LLaDA-8B-Instruct",
    )
    head.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = CoDDHead.from_pretrained(folder)
    assert_same_circuit(head, again)
    assert again.config.mask_token_id == 19
    assert again.config.forbidden_token_ids == [3]
    assert again.config.base_model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct"
    card, config = (folder / "README.md").read_text(), (folder / "config.json").read_text()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for text in (card, config):
        assert "cat_hmm_blocks.jpc" in text
        assert digest in text
        assert "licence of the source: unknown" in text
        assert str(FIXTURES) not in text
    assert "license:" not in card
    assert "base_model: GSAI-ML/LLaDA-8B-Instruct" in card


@pytest.fixture
def hub_cache(tmp_path):
    """The Hub's cache with a repository that holds a circuit."""
    repository = tmp_path / "cache" / "models--someone--math-pc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(FIXTURES / "cat_hmm.jpc", snapshot / "model.jpc")
    return {"cache_dir": tmp_path / "cache", "local_files_only": True}


def test_a_repository_on_the_hub_is_converted_and_named_by_its_commit(hub_cache):
    head = convert_jpc("someone/math-pc", **hub_cache)
    assert_same_circuit(head, convert_jpc(FIXTURES / "cat_hmm.jpc"))
    assert f"`model.jpc` of someone/math-pc at commit `{COMMIT}`" in head.config.converted_from


def test_what_holds_a_circuit_is_recognised(hub_cache, tmp_path):
    circuit = FIXTURES / "cat_hmm.jpc"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert holds_circuit(circuit)
    assert not holds_circuit(folder)
    shutil.copy(circuit, folder / "model.jpc")
    assert holds_circuit(folder)
    assert_same_circuit(convert_jpc(folder), convert_jpc(circuit))
    (folder / "config.json").write_text(json.dumps({"model_type": "other"}))
    assert holds_circuit(folder)
    convert_jpc(folder).save_pretrained(folder)
    assert not holds_circuit(folder)
    assert holds_circuit("someone/math-pc", **hub_cache)
    with pytest.raises(OSError, match="'someone/else' is not in the cache"):
        holds_circuit("someone/else", **hub_cache)


@pytest.mark.parametrize("where", ["other name", "subfolder", "other model"])
def test_what_holds_a_circuit_can_be_given_as_a_head(where, tmp_path):
    circuit, hub = FIXTURES / "cat_hmm.jpc", {}
    source = tmp_path / ("circuit" if where == "other name" else "model.jpc")
    if where == "subfolder":
        (tmp_path / "inside").mkdir()
        source, hub = tmp_path / "inside" / "model.jpc", {"subfolder": "inside"}
    shutil.copy(circuit, source)
    if where == "other model":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    name = source if where == "other name" else tmp_path
    assert holds_circuit(name, **hub)
    model = CoDDModel.from_backbone(tiny_backbone(vocab_size=20), mask_token_id=19)
    model.load_head(name, **hub)
    assert_same_circuit(model.coupling_head, convert_jpc(circuit))


@pytest.mark.parametrize("kind", ["head", "pipeline"])
def test_what_is_converted_already_is_no_circuit(kind, tmp_path):
    head = convert_jpc(FIXTURES / "cat_hmm.jpc", mask_token_id=19)
    model = CoDDModel.from_backbone(tiny_backbone(vocab_size=20), head)
    parts = {"head": head, "model": model, "pipeline": CoDDPipeline(model, CoDDScheduler())}
    parts[kind].save_pretrained(tmp_path)
    (tmp_path / "model.jpc").write_bytes(b"changed since")
    assert not holds_circuit(tmp_path)
    assert_same_circuit(CoDDModel.from_backbone(model.backbone, tmp_path).coupling_head, head)


def test_what_is_not_there_is_an_error_that_says_so(hub_cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no `model.jpc`"):
        convert_jpc(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        convert_jpc(tmp_path / "nowhere")
    with pytest.raises(OSError, match="someone/else"):
        convert_jpc("someone/else", **hub_cache)
    with pytest.raises(TypeError, match="`alhpa` is not an argument"):
        convert_jpc(tmp_path, alhpa=1)


def test_numbers_out_of_range_are_an_error():
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`alpha` must be"):
            convert_jpc(FIXTURES / "cat_hmm.jpc", alpha=alpha)
    with pytest.raises(ValueError, match=r"`mask_token_id`.* must lie in \[0, 20\), got \[20\]"):
        convert_jpc(FIXTURES / "cat_hmm.jpc", mask_token_id=20)


def test_an_argument_of_a_wrong_kind_is_no_damage_of_the_file():
    with pytest.raises(ValueError, match=r"^`mask_token_id` must be of type"):
        convert_jpc(FIXTURES / "cat_hmm.jpc", mask_token_id="x")
