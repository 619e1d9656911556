"""Promises of `examples/rules`: they do what they say where the law is known by enumeration."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from windows import HEAD, LENGTH, LOGITS, MASK, VOCAB, law

from codd_hf.data.tasks import draw_tasks
from codd_hf.schedulers.drawing import RowText, StepDraw
from codd_hf.schedulers.settings import DrawSettings
from tiny import enumerate_window
from tiny_pipeline import tiny_task_pipeline

FOLDER = Path(__file__).parents[2] / "examples" / "rules"
NAMES = ("common", "entropy_bound", "klass", "wino", "num_candidates", "table")
OPEN = [MASK] * LENGTH
ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def rules():
    """The modules by name; they import each other as scripts in one folder do."""
    others = importlib.sys.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in {*NAMES} & {*others}:  # of another folder
            patch.delitem(others, name)
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
        yield found
        for name in NAMES:
            others.pop(name, None)


@pytest.fixture
def step(rules):
    """Makes a step over rows whose predictions differ."""
    noise = torch.randn(ROWS, LENGTH, VOCAB, generator=torch.Generator().manual_seed(5))

    def make(at_least=1, memory=None, logits=None, tokens=None, **settings):
        logits = LOGITS + noise if logits is None else logits
        sample = torch.tensor(OPEN).expand(ROWS, -1) if tokens is None else tokens
        distribution = HEAD(logits, tokens=sample, observed=sample != MASK)
        settings = DrawSettings(**settings)
        every = torch.arange(LENGTH).expand(ROWS, -1)
        text = RowText(sample, sample != MASK, every, torch.arange(ROWS))
        draw = StepDraw(distribution, sample, settings, None, [], text)
        least = torch.full((ROWS,), at_least)
        return rules.common.Step(
            draw, draw.masked, least, 4, {} if memory is None else memory, None
        )

    return make


def laws_of(step, row):
    """All completions of a row and their probabilities, by definition."""
    logits = step.draw.plain.logits[row]
    with torch.no_grad():
        completions, joint = enumerate_window(HEAD, logits, step.draw.sample[row], MASK)
    if step.draw.settings.sampling == "factorized":
        phi = logits.double().index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
        joint = phi[torch.arange(LENGTH), completions].prod(-1)
    return completions, joint


def conditionals(completions, joint, drawn):
    """`[L, vocab]`: of each position given drawn tokens, by enumeration."""
    agrees = torch.ones(len(joint), dtype=torch.bool)
    for place, token in drawn.items():
        agrees &= completions[:, place] == token
    weights = joint[agrees] / joint[agrees].sum()
    found = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
    for place in range(LENGTH):
        found[place].index_add_(0, completions[agrees, place], weights)
    return found


def nats(probs):
    return torch.special.entr(probs).sum(-1)


@pytest.mark.parametrize("sampling", ["factorized", "latent", "any_order"])
def test_entropy_bound_commits_while_entropies_but_for_the_largest_stay_below(
    rules, step, sampling
):
    sizes = set()
    for bound in (0.2, 0.8, 1.6):
        now = step(sampling=sampling)
        output = rules.entropy_bound.EntropyBound(bound)(now)
        for row in range(ROWS):
            completions, joint = laws_of(now, row)
            tokens, drawn, spent = output.sampled_tokens[row], {}, []
            while len(drawn) < LENGTH:
                given = drawn if sampling == "any_order" else {}
                probs = conditionals(completions, joint, given)
                sure = probs.amax(-1) if given or sampling == "any_order" else None
                scores = output.sampled_probs[row].detach() if sure is None else sure
                place = max({*range(LENGTH)} - {*drawn}, key=lambda i: float(scores[i]))
                spent.append(float(nats(probs[place])))
                if sum(spent) - max(spent) > bound:
                    break
                drawn[place] = int(tokens[place])
            assert output.transfer_index[row].nonzero()[:, 0].tolist() == sorted(drawn)
            sizes.add(len(drawn))
    assert len(sizes) > 2


def test_dependence_bound_adds_what_the_tokens_before_say(rules, step):
    sizes = set()
    for bound in (0.001, 0.02, 0.2):
        now = step(sampling="any_order")
        output = rules.entropy_bound.DependenceBound(bound)(now)
        for row in range(ROWS):
            completions, joint = laws_of(now, row)
            alone, drawn, spent = nats(conditionals(completions, joint, {})), {}, 0.0
            while len(drawn) < LENGTH:
                probs = conditionals(completions, joint, drawn)
                place = max({*range(LENGTH)} - {*drawn}, key=lambda i: float(probs[i].max()))
                spent += float(alone[place] - nats(probs[place]))
                if drawn and spent > bound:
                    break
                drawn[place] = int(probs[place].argmax())
            where = output.transfer_index[row].nonzero()[:, 0].tolist()
            assert where == sorted(drawn)
            assert output.prev_sample[row, where].tolist() == [drawn[i] for i in where]
            sizes.add(len(drawn))
    assert len(sizes) > 2


def test_dependence_on_the_latent_path_bounds_that_of_the_tokens_in_the_mean(rules, step):
    """Marginal entropies minus those given a path, over many paths, is no less than their sum's."""
    logits, settings = LOGITS.expand(ROWS, -1, -1), {"sampling": "latent", "temperature": 1.0}
    costs = []
    for _ in range(40):
        now = step(logits=logits, **settings)
        output = now.draw.independently(now.committable, now.at_least)
        entropy = rules.entropy_bound.entropy
        costs.append(entropy(now.marginals()) - entropy(output.pred_logits.exp()))
    completions, joint = law(OPEN)
    total = float(nats(conditionals(completions, joint, {})).sum() - nats(joint))
    assert 0 < total < float(torch.cat(costs).sum(-1).mean())
    for bound, all_of_them in ((-9.0, False), (9.0, True)):
        where = rules.entropy_bound.DependenceBound(bound)(step(**settings)).transfer_index
        assert bool(where.all()) == all_of_them


@pytest.mark.parametrize("evidence_temperature", [None, 0.5])
def test_draw_that_is_not_held_up_is_the_librarys(rules, step, evidence_temperature):
    for count in range(1, LENGTH + 1):
        now = step(count, sampling="any_order", evidence_temperature=evidence_temperature)
        ours = rules.common.draw_while(now, lambda rows, *_: torch.zeros_like(rows) > 0)
        theirs = now.drawn()
        assert torch.equal(ours.prev_sample, theirs.prev_sample)
        assert torch.allclose(ours.sampled_probs, theirs.sampled_probs)


@pytest.mark.parametrize("sampling", ["factorized", "latent", "any_order"])
def test_klass_commits_stable_and_sure_tokens_and_keeps_the_pace(rules, step, sampling):
    settings, memory = {"sampling": sampling, "strategy": "threshold", "threshold": 0.0}, {}
    klass = rules.klass.Klass(0.01)
    first = klass(step(memory=memory, **settings))
    assert (first.transfer_index.sum(-1) == 1).all()  # nothing has been seen before
    assert klass(step(memory=memory, **settings)).transfer_index.all()
    moved = step(memory=memory, **settings).draw.plain.logits.clone()
    moved[0] = moved[0].roll(1, dims=-1)
    counts = klass(step(memory=memory, logits=moved, **settings)).transfer_index.sum(-1)
    assert counts[0] < LENGTH
    assert (counts[1:] == LENGTH).all()
    settings["threshold"] = 1.0
    assert (klass(step(memory=memory, **settings)).transfer_index.sum(-1) == 1).all()


def test_leave_one_out_is_the_conditional_given_all_other_known_tokens(rules, step):
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = tokens.masked_fill(tokens == MASK, 0)
    tokens[: ROWS // 2, 1] = MASK
    now = step(tokens=tokens, sampling="any_order")
    ours = rules.wino.leave_one_out(now.draw.plain, now.draw.plain.logits)
    for row in range(ROWS):
        known = {i: int(t) for i, t in enumerate(tokens[row]) if t != MASK}
        empty = step(sampling="any_order")  # with all of them to come
        completions, joint = laws_of(empty, row)
        for place, token in known.items():
            others = {i: t for i, t in known.items() if i != place}
            expected = float(conditionals(completions, joint, others)[place, token])
            assert float(ours[row, place]) == pytest.approx(expected, abs=1e-5)
    assert (ours[: ROWS // 2, 1] == 1).all()


@pytest.fixture(scope="module")
def pipeline():
    """Random weights, far from uniform, a random head that copies, and one layer."""
    return tiny_task_pipeline({"num_hidden_layers": 1}, conditioning=["copy"], context_size=16)


def test_shadow_reads_a_token_as_if_it_were_masked(rules, pipeline):
    """With one layer that is exact: no other token has seen it."""
    model, mask = pipeline.model, pipeline.model.mask_token_id
    tokens = torch.randint(10, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens[0, 7:] = pipeline.tokenizer.pad_token_id
    tokens[0, 6] = mask
    real = tokens != pipeline.tokenizer.pad_token_id
    position = torch.tensor([[3, 4, 5]]).expand(2, -1)
    text = RowText(tokens, real & (tokens != mask), position, torch.arange(2))
    scheduler = rules.common.RuleScheduler(None, model, mask_token_id=mask)
    ours = rules.wino.shadow_logits(
        SimpleNamespace(draw=SimpleNamespace(text=text), scheduler=scheduler)
    )
    for number, place in enumerate(position[0].tolist()):
        hidden = tokens.clone()
        hidden[:, place] = mask
        states = model.backbone_states(hidden, real.long())
        expected = states.logits((torch.arange(2), torch.full((2,), place)))
        assert torch.allclose(ours[:, number], expected, atol=1e-5)


@pytest.mark.parametrize("sampling", ["factorized", "latent", "any_order"])
def test_wino_takes_back_fewer_than_it_commits_and_comes_to_an_end(rules, pipeline, sampling):
    entry = rules.table.RULES["wino"]
    tasks = list(islice(draw_tasks("validation", 0), 3))
    answering = rules.table.AnsweringSettings(gen_length=32)
    used = {}
    for threshold in (0.0, 1.0):
        setting = {"threshold": threshold, "least": 1.0, "passes": 6}
        answered = rules.table.answer(pipeline, tasks, entry, setting, sampling, answering)
        used[threshold] = answered.passes
    assert used[0.0] == [1, 1, 1]  # all at once, and nothing is judged
    assert all(1 < number <= 6 for number in used[1.0])


@pytest.mark.parametrize("sampling", ["latent", "any_order"])
def test_more_candidates_are_never_less_probable(rules, step, sampling):
    torch.manual_seed(0)
    probs = []
    for number in (1, 8, 400):
        now = step(3, sampling=sampling)
        output = rules.num_candidates.NumCandidates(number)(now)
        assert torch.equal(output.transfer_index, now.drawn().transfer_index)
        if number == 1:
            assert torch.equal(output.prev_sample, now.drawn().prev_sample)
        known = output.transfer_index
        probs.append(now.draw.plain.partial_log_prob(output.sampled_tokens, known).exp())
    assert (probs[1] >= probs[0] - 1e-6).all()
    best = []
    for row in range(ROWS):
        completions, joint = laws_of(now, row)
        codes = (completions * VOCAB ** torch.arange(LENGTH))[:, known[row]].sum(-1)
        best.append(torch.bincount(codes, joint).max())
    assert torch.allclose(probs[2].double(), torch.stack(best), atol=1e-5)


def test_mix_of_two_settings_takes_as_many_passes_as_it_may(rules):
    def answered(right, passes):
        return rules.table.Answered([right] * 2, [passes] * 2, [1] * 2, [0.0] * 2)

    tried = [
        ({"at": 1}, answered(0, 1)),
        ({"at": 3}, answered(60, 3)),
        ({"at": 7}, answered(80, 7)),
    ]
    assert rules.table.choose(tried, 0.5) is None
    assert rules.table.choose(tried, 9) == (80, ({"at": 7}, {"at": 7}, 0))
    assert rules.table.choose(tried, 2) == (30, ({"at": 1}, {"at": 3}, 0.5))
    right, mix = rules.table.choose(tried, 4)
    assert (right, mix) == (65, ({"at": 3}, {"at": 7}, 0.25))
    mixed = tried[1][1].mixed(tried[2][1], mix.share)
    assert (mixed.right, mixed.passes_a_window.value) == ([65, 65], 4)


def test_table_has_every_rule_and_goes_on_where_it_stopped(
    rules, pipeline, tmp_path, monkeypatch, capsys
):
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name, entry in rules.table.RULES.items():
        few = replace(entry, grid={name: values[-1:] for name, values in entry.grid.items()})
        monkeypatch.setitem(rules.table.RULES, name, few)
    command = ["--model", str(tmp_path / "pipeline"), "--output", str(tmp_path / "rules.json")]
    command += ["--num-tasks", "2", "--num-validation", "1", "--passes", "32"]
    rules.table.main([*command, "--samplings", "factorized"])
    assert '["test", "klass", "factorized"' in capsys.readouterr().out
    results = rules.table.main([*command, "--samplings", "factorized", "latent"])
    assert '"factorized", {' not in capsys.readouterr().out
    assert results == json.loads((tmp_path / "rules.json").read_text())
    rows = [(row["sampling"], row["rule"]) for row in results["rows"]]
    coupled = [("latent", name) for name in rules.table.RULES]
    alike = [(s, name) for s, name in rows if s == "factorized"]
    assert rows == alike + coupled
    assert len(alike) == 6
    with pytest.raises(SystemExit, match="another run"):
        rules.table.main([*command, "--num-tasks", "3"])
