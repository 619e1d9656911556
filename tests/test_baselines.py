"""Promises of `examples/baselines`: they do what their papers say where the truth is known."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from codd_hf.data.tasks import draw_tasks
from tiny_pipeline import tiny_task_pipeline

FOLDER = Path(__file__).parents[1] / "examples" / "baselines"
NAMES = ("common", "loop", "learning", "copula", "adjust", "demask", "grpo", "table")


@pytest.fixture(scope="module", autouse=True)
def rivals():
    """The modules by name; they import each other as scripts in one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


@pytest.fixture(scope="module")
def backbone(rivals):
    """Random weights, far from uniform, a random head, and answers of two windows."""
    pipeline = tiny_task_pipeline()
    pipeline.model.generation_config.max_new_tokens = 64
    return rivals.common.Backbone(pipeline)


@pytest.fixture
def canvas(rivals, backbone):
    """Answers a few of whose tokens are in place."""
    tasks = list(islice(draw_tasks("train", 1, ["sums"]), 6))
    canvas = rivals.common.to_fill(backbone, [backbone.prompt(t.question) for t in tasks])
    generator = torch.Generator().manual_seed(0)
    for row, start in enumerate(canvas.start.tolist()):
        places = start + torch.randperm(32, generator=generator)[: 4 * row]
        canvas.tokens[row, places] = torch.randint(10, 300, (len(places),), generator=generator)
    return canvas


@pytest.fixture
def seen(rivals, backbone, canvas):
    return rivals.loop.Pass.over(backbone, canvas, canvas.start, passes_left=4)


def fill(rivals, backbone, sampler, passes):
    tasks = list(islice(draw_tasks("validation", 0, ["dates"]), 4))
    canvas = rivals.common.to_fill(backbone, [backbone.prompt(t.question) for t in tasks])
    return rivals.loop.decode(backbone, sampler, canvas, passes)


@pytest.mark.parametrize("passes", [1, 3, 32])
def test_decode_loop_is_the_librarys(rivals, backbone, passes):
    questions = [task.question for task in islice(draw_tasks("validation", 0), 4)]
    own = rivals.loop.answering(backbone, rivals.loop.Factorized())(questions, passes)
    choice = {"sampling": "factorized"}
    assert own == rivals.table.codd(backbone, None, choice)(questions, passes)


class IndependentTokens:
    """An autoregressive model that says what it is told, whatever stands before."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def generate(self, tokens, logits_processor, **_):
        (processor,) = logits_processor
        for place in range(self.log_probs.shape[1]):
            processor(tokens, self.log_probs[:, place])


@pytest.mark.parametrize("reading", ["causal", "exact"])
def test_copula_of_independent_tokens_leaves_the_backbones_marginals(rivals, seen, reading):
    copula = rivals.copula
    left = {"causal": copula.causal_reading, "exact": copula.exact_reading}[reading](seen)
    combine = copula.Combine(seen, seen.log_probs - left)
    combine.ratio[~combine.ratio.isfinite()] = 0
    for place in range(left.shape[1]):
        combine(None, left[:, place])
    drawn, log_probs = torch.stack(combine.tokens, 1), torch.stack(combine.log_probs, 1)
    best = seen.log_probs.max(-1)
    assert torch.equal(drawn[seen.open], best.indices[seen.open])
    assert torch.allclose(log_probs[seen.open], best.values[seen.open], atol=1e-4)
    sampler = copula.Copula(IndependentTokens(left), 1.0, reading, "surest")
    tokens, chosen = sampler.draw(seen)
    expected, same = rivals.loop.Factorized().draw(seen)
    assert torch.equal(chosen, same)
    assert torch.equal(tokens[chosen], expected[chosen])


def test_readings_of_the_left_do_not_see_what_is_on_the_right(rivals, backbone, canvas, seen):
    loop, copula = rivals.loop, rivals.copula
    place = 20
    other = canvas.tokens.clone()
    behind = (torch.arange(other.shape[1]) > (canvas.start + place)[:, None]) & canvas.real
    other[behind & (other != backbone.mask_id)] = 17
    changed = loop.Pass.over(backbone, canvas.with_tokens(other), canvas.start)
    assert not torch.allclose(seen.log_probs[:, :place], changed.log_probs[:, :place], atol=1e-3)
    for read in (copula.causal_reading, copula.exact_reading):
        before, after = read(seen)[:, :place].exp(), read(changed)[:, :place].exp()
        still_open = seen.open[:, :place]
        assert torch.allclose(before[still_open], after[still_open], atol=1e-5)
    masked = loop.Pass.over(
        backbone,
        canvas.with_tokens(canvas.tokens.masked_fill(behind, backbone.mask_id)),
        canvas.start,
    )
    at = seen.open[:, place]
    exact = copula.exact_reading(seen)[at, place]
    assert torch.allclose(exact.exp(), masked.log_probs[at, place].exp(), atol=1e-5)


@pytest.mark.parametrize("passes", [1, 4])
def test_untrained_adjust_draws_as_the_backbone_does(rivals, backbone, passes):
    layer = rivals.adjust.Adjust(backbone).eval()
    own = fill(rivals, backbone, layer, passes)
    assert torch.equal(own, fill(rivals, backbone, rivals.loop.Factorized(), passes))


def test_adjust_learns_what_drawn_tokens_change(rivals, backbone, monkeypatch):
    layer = rivals.adjust.Adjust(backbone)
    tasks = list(islice(draw_tasks("validation", 0, ["sums"]), 16))
    generator = torch.Generator().manual_seed(7)
    seen, later = rivals.adjust.pairs_of_passes(backbone, tasks, generator)[0]
    with monkeypatch.context() as patch:  # a second a step: the same steps on every machine
        patch.setattr("time.process_time", count().__next__)
        rivals.learning.fit(layer, lambda: rivals.adjust.divergence(layer, seen, later), 40, 3e-3)
    truth = later.log_probs[later.open].exp()

    def away(log_probs):
        return (log_probs[later.open].exp() - truth).abs().sum(-1).mean()

    assert away(layer(seen, later.canvas.tokens)) < away(seen.log_probs)
    fill(rivals, backbone, layer, 4)


def test_demask_takes_positions_whose_influences_stay_within_the_bound(rivals, seen):
    influence = torch.rand(6, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(6, 32, generator=torch.Generator().manual_seed(1))
    best = scores.masked_fill(~seen.open, -1).argmax(-1)
    for bound in (0.0, 0.5, 3.0):
        taken = rivals.demask.bounded(influence, scores, seen.open, bound)
        assert not (taken & ~seen.open).any()
        assert taken[torch.arange(6), best].all()
        for row in range(6):
            order = [i for i in scores[row].argsort(descending=True).tolist() if taken[row, i]]
            pairs = [(late, early) for n, late in enumerate(order) for early in order[:n]]
            assert sum(influence[row, i, j] for i, j in pairs) <= bound + 1e-5
    assert torch.equal(rivals.demask.bounded(influence, scores, seen.open, 1e9), seen.open)


def test_demask_commits_no_neighbours_that_depend_on_each_other(rivals, seen):
    head = rivals.demask.Influence(seen.backbone)
    with torch.no_grad():
        head.on[-1].weight.zero_()
        head.on[-1].bias.zero_()
        head.distance.fill_(-20.0)
    _, independent = rivals.demask.Demask(head).draw(seen)
    assert torch.equal(independent, rivals.loop.Factorized().draw(seen)[1])
    with torch.no_grad():
        head.distance[[30, 32]] = 20.0
    _, chosen = rivals.demask.Demask(head).draw(seen)
    assert torch.equal(chosen.sum(-1), seen.count)
    assert not (chosen & ~seen.open).any()
    untouched = seen.open.all(-1)
    assert untouched.any()
    assert not (chosen[untouched, 1:] & chosen[untouched, :-1]).any()


def test_demask_measures_how_far_predictions_move(rivals, backbone, seen):
    source, moved, others = rivals.demask.measured(seen)
    row = torch.arange(len(source))
    assert seen.open[row, source].all()
    assert not others[row, source].any()
    assert (moved >= 0).all()
    assert (moved <= 1 + 1e-5).all()
    tokens = seen.canvas.tokens.clone()
    tokens[row, seen.columns[row, source]] = seen.log_probs[row, source].argmax(-1)
    again = rivals.loop.Pass.over(backbone, seen.canvas.with_tokens(tokens), seen.columns[:, 0])
    distance = (again.log_probs.exp() - seen.log_probs.exp()).abs().sum(-1) / 2
    assert torch.allclose(moved[others], distance[others], atol=1e-5)


def test_grpo_raises_a_simple_reward_and_leaves_the_backbone(rivals, backbone, monkeypatch):
    config = rivals.grpo.GRPOConfig(1e-2, passes=2, questions=2, updates=2, penalty=0.0)
    before = {name: p.clone() for name, p in backbone.model.state_dict().items()}
    model = rivals.grpo.trainable_copy(backbone)
    grpo = rivals.grpo.GRPO(backbone, model, config, reward=lambda _, text: text.count("a") / 5)
    clock = SimpleNamespace(process_time=count().__next__)  # a second a step, on any machine
    monkeypatch.setattr(rivals.learning, "time", clock)
    rivals.learning.fit(model, grpo.loss, 24, config.learning_rate)
    assert sum(grpo.rewards[-4:]) > 2 * sum(grpo.rewards[:4])
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.state_dict().items())


def test_copula_reads_from_left_to_right(rivals, backbone, canvas):
    model = rivals.copula.causal_copy(backbone, 1).eval()
    logits = model(canvas.tokens, attention_mask=canvas.real.long()).logits
    last = int(canvas.real.sum(-1).min()) - 1
    other = canvas.tokens.clone()
    other[:, last] = 17
    changed = model(other, attention_mask=canvas.real.long()).logits
    assert torch.allclose(logits[:, :last], changed[:, :last], atol=1e-5)
    assert not torch.allclose(logits[:, last], changed[:, last], atol=1e-3)


def test_table_has_every_method_and_goes_on_where_it_stopped(
    rivals, backbone, tmp_path, monkeypatch, capsys
):
    backbone.pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(rivals.table, "TUNED_AT", 1)
    for name, method in rivals.table.METHODS.items():
        few = replace(method, choices=method.choices[-2:])
        monkeypatch.setitem(rivals.table.METHODS, name, few)
    output = tmp_path / "baselines.json"
    command = ["--model", str(tmp_path / "pipeline"), "--output", str(output)]
    command += ["--head-seconds", "0.5", "--budgets", "0.1", "--grpo-budgets", "0.1", "0.2"]
    command += ["--passes", "1", "--num-tasks", "2", "--num-validation", "1"]
    rivals.table.main([*command, "--methods", "factorized", "copula alone"])
    assert "fit_copula 0.05 s" in capsys.readouterr().out
    results = rivals.table.main(command)
    assert results == json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert "fit_demask" in printed
    assert not any(
        done in printed for done in ("factorized 0.0", "copula alone 0.05", "fit_copula")
    )
    rows = [(row["method"], row["of the head's time"]) for row in results["rows"]]
    shares = {"factorized": [0], "CoDD": [1], "GRPO": [0.1, 0.2]}
    assert rows == [(n, s) for n in rivals.table.METHODS for s in shares.get(n, [0.1])]
    assert printed.count("\n| ") >= len(rows) + 1
    with pytest.raises(SystemExit, match="another run"):
        rivals.table.main([*command, "--seed", "1"])


def test_table_of_the_page_is_made_of_its_figures(rivals):
    figures = FOLDER.parents[1] / "model_cards" / "results" / "baselines.json"
    made = rivals.table.table(json.loads(figures.read_text()))
    assert made in (FOLDER / "README.md").read_text()


def test_head_tells_how_long_its_fit_took(rivals, trained_pipeline):
    assert 0 < rivals.table.head_seconds(trained_pipeline) < 600
    assert rivals.table.head_seconds(trained_pipeline / "model") is None
