"""Heads, models, pipelines and adapters to a Hub and back, by the real huggingface_hub.

`pushing.py` runs in one process, `pulling.py` in another with an empty cache; each of their checks
is a test here.
"""

from __future__ import annotations

import json

import pytest
from card_rules import errors_in_card
from checks import names_in, run_script
from huggingface_hub import ModelCard
from server import TOKEN, LocalHub, Repository

from codd_hf.data.tokenizers import train_tokenizer
from tiny import SENTENCES


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """The server after both processes, and what they report."""
    work = tmp_path_factory.mktemp("round_trip")
    train_tokenizer(SENTENCES, vocab_size=300).save_pretrained(work / "tokenizer")
    with LocalHub() as hub:
        signed_in = {"HF_TOKEN": TOKEN}
        report = run_script("pushing", work, hub.environment(work / "home-1") | signed_in)
        add_backbone_with_code(hub, work)
        report |= run_script("pulling", work, hub.environment(work / "home-2"))
    return hub, report


def add_backbone_with_code(hub: LocalHub, work) -> None:
    """A repository whose code leaves a trace if it runs."""
    folder = work / "with-code"
    folder.mkdir()
    config = {
        "model_type": "brings-code",
        "vocab_size": 12,
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(work / 'it-ran')!r}, 'w')\n")
    hub.add("tester/with-code", folder)
    for name, removed in (("no-config", "config.json"), ("no-weights", "model.safetensors")):
        files = hub.repositories["tester/model"]
        kept = {path: blob for path, blob in files.commits[files.refs["main"]].items()}
        del kept[removed]
        hub.repositories[f"tester/{name}"] = Repository()
        hub.repositories[f"tester/{name}"].commit("main", kept, "incomplete")


@pytest.mark.parametrize("name", names_in("pushing") + names_in("pulling"))
def test_client(name, round_trip):
    failure = round_trip[1][name]
    assert failure is None, failure


def card_of(hub: LocalHub, repo_id: str, ref: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, ref)["README.md"].decode())


def test_repositories_hold_weights_as_safetensors_and_a_card_that_the_hub_accepts(round_trip):
    hub, _ = round_trip
    for repo_id, weights in (
        ("tester/head", "model.safetensors"),
        ("tester/model", "model.safetensors"),
        ("tester/pipeline", "model/model.safetensors"),
    ):
        files = hub.files(repo_id)
        assert weights in files
        assert not errors_in_card(files["README.md"].decode())
    assert not {path for path in hub.files("tester/pipeline") if path.endswith("/README.md")}
    assert "tokenizer.json" in hub.files("tester/model")
    assert not {path for path in hub.files("tester/model") if path.endswith(".py")}
    index = json.loads(hub.files("tester/pipeline")["model_index.json"])
    assert index["_class_name"] == "CoDDPipeline"
    assert index["model"] == ["codd_hf.modeling_codd", "CoDDModel"]
    assert index["scheduler"] == ["codd_hf.schedulers.scheduling_codd", "CoDDScheduler"]
    assert hub.repositories["tester/pipeline"].messages[-1] == "The first pipeline"


def test_cards_say_what_was_said_of_licence_data_and_results(round_trip):
    hub, _ = round_trip
    head, model = card_of(hub, "tester/head").data, card_of(hub, "tester/model").data
    assert (head.license, head.datasets, head.base_model) == (
        "mit",
        "openai/gsm8k",
        "tester/backbone",
    )
    assert head.library_name == model.library_name == "codd-hf"
    assert model.eval_results[0].metric_value == 0.5
    assert card_of(hub, "tester/pipeline").data.license is None


def test_paths_of_a_machine_are_not_shared_and_ids_are(round_trip, tmp_path_factory):
    hub, _ = round_trip
    machine = str(tmp_path_factory.getbasetemp()).encode()
    for repo_id in ("tester/clean-head", "tester/clean-model", "tester/clean-pipeline"):
        for path, content in hub.files(repo_id).items():
            assert machine not in content, (repo_id, path)
    assert "adapter/adapter_config.json" in hub.files("tester/clean-model")
    config = json.loads(hub.files("tester/named-pipeline")["model/config.json"])
    assert config["text_config"]["_name_or_path"] == "tester/backbone"
    assert config["head_config"]["base_model_name_or_path"] == "tester/backbone"


def test_trained_pipeline_is_pushed_with_its_figures_and_without_the_data(
    round_trip, tmp_path_factory
):
    hub, _ = round_trip
    machine = str(tmp_path_factory.getbasetemp()).encode()
    files = hub.files("tester/trained")
    assert {"model_index.json", "model/model.safetensors", "generative/config.json"} <= set(files)
    assert {"training/run.json", "training/conditional_history.json"} <= set(files)
    for path, content in files.items():
        assert not path.endswith((".jsonl", "/README.md"))
        assert b"secret eggs" not in content or path.startswith("tokenizer/"), path
        assert machine not in content, path


def test_card_of_a_trained_pipeline_is_written_anew_and_that_of_somebody_kept(round_trip):
    hub, _ = round_trip
    card = card_of(hub, "tester/trained")
    assert not errors_in_card(str(card))
    assert card.data.base_model == "tester/backbone"
    assert card.text.strip().startswith("# trained")
    assert 'from_pretrained("tester/trained")' in card.text
    shas = list(hub.repositories["tester/trained"].commits)
    texts = [hub.repositories["tester/trained"].commits[sha]["README.md"].data for sha in shas[1:]]
    assert [b"Measured gap" in text for text in texts] == [True, False]
    own = card_of(hub, "tester/own-card")
    assert own.text.strip() == "My own words."
    assert own.data.base_model == "tester/backbone"
    assert "training/run.json" in hub.files("tester/own-card")


def test_what_is_private_is_private_and_the_rest_is_not(round_trip):
    repositories = round_trip[0].repositories
    private = {repo_id for repo_id, repository in repositories.items() if repository.private}
    assert private == {"tester/private", "tester/converted-private", "tester/private-run"}


def test_refused_pushes_leave_nothing(round_trip):
    hub, _ = round_trip
    assert "tester/refused" not in hub.repositories
    assert "converted" not in str(card_of(hub, "tester/already-public"))


def test_text_of_a_card_stays_and_its_metadata_are_completed(round_trip):
    card = card_of(round_trip[0], "tester/branches")
    assert card.text.strip() == "My own words."
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "codd-hf"
    assert card.data.tags[0] == "mine"
    assert "codd" in card.data.tags


def test_placeholder_card_is_replaced(round_trip):
    card = card_of(round_trip[0], "tester/tokenizer-first")
    assert card.data.library_name == "codd-hf"
    assert "automatically generated" not in card.text


def test_branch_and_pull_request_have_weights_of_their_own(round_trip):
    hub, _ = round_trip
    weights = {
        ref: hub.files("tester/branches", ref)["model.safetensors"]
        for ref in ("main", "second", "refs/pr/1")
    }
    assert len(set(weights.values())) == 3


def test_code_of_a_repository_that_nobody_named_never_ran(round_trip, tmp_path_factory):
    assert not list(tmp_path_factory.getbasetemp().glob("round_trip*/it-ran"))
