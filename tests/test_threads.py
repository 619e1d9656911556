"""Promises to threads that share a pipeline: a call gives what it gives alone."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.text.encoding import encode_texts
from tiny import SAMPLING, STRATEGIES, random_head, tiny_backbone

MASK, NUM_THREADS = 2, 8
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])
HEADS = (None, False, "default", "longer", "conditioned", "tied")
Call = Callable[[CoDDPipeline], list]


@pytest.fixture(autouse=True)
def threads_that_switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def pipeline_with_heads(kind: str = "llama", adapters: tuple[str, ...] = ()) -> CoDDPipeline:
    """Three heads beside the default one, some of them with a LoRA of their own."""
    model = CoDDModel.from_backbone(tiny_backbone(kind), random_head())
    others = {
        "longer": {"window_length": 6, "seed": 2},
        "conditioned": {"conditioning": ["latent", "copy"], "context_size": 16, "seed": 4},
        "tied": {"emission": "tied", "emission_rank": 4, "context_size": 16, "seed": 5},
    }
    for name, changes in others.items():
        adapter = next((folder for folder in adapters if folder.name == name), None)
        model.load_head(random_head(**changes), name, adapter=adapter)
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def adapters(tmp_path):
    for seed, name in enumerate(("longer", "tied")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_backbone(), config).save_pretrained(tmp_path / name)
    return tuple(tmp_path / name for name in ("longer", "tied"))


def coupled(model: CoDDModel, head: str | bool | None) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, coupling="marginal", head=head).logits


def random_call(draw: random.Random, caches: tuple[str | None, ...]) -> Call:
    """A call of any entry point, with choices of its own; seeded where it draws."""
    head, kind, seed = draw.choice(HEADS), draw.randrange(5), draw.randrange(1000)
    prompts = [[draw.randrange(3, 12) for _ in range(draw.randrange(1, 6))] for _ in range(2)]
    lengths = [draw.randrange(4, 14) for _ in prompts]
    decoding = {
        "block_length": 4,
        "num_inference_steps": draw.randrange(4, 9),
        "sampling": draw.choice(SAMPLING),
        "strategy": draw.choice(STRATEGIES),
        "temperature": draw.choice([0.0, 1.0]),
        "paradigm": draw.choice(["block", "full"]),
        "cache": draw.choice(caches),
        "head": head,
    }
    if kind < 2:
        return lambda pipe: pipe(
            input_ids=prompts,
            gen_length=lengths,
            output_type="seq",
            generator=[torch.Generator().manual_seed(seed + i) for i in range(2)],
            **decoding,
        ).sequences.tolist()
    if kind == 2:
        return lambda pipe: pipe.model.generate(
            torch.tensor(prompts[:1]),
            max_new_tokens=lengths[0],
            generator=torch.Generator().manual_seed(seed),
            **decoding,
        ).tolist()
    if kind == 3:
        return lambda pipe: pipe.model.score(prompts, [p[::-1] for p in prompts], head=head)[
            "coupled"
        ].tolist()
    return lambda pipe: coupled(pipe.model, head).tolist()


def results(pipe: CoDDPipeline, calls: list[Call]) -> list:
    """Of all calls, made by threads that each take the next one."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda call: call(pipe), calls))


def assert_equal_to_alone(pipe: CoDDPipeline, number: int) -> None:
    draw, is_decoder = random.Random(0), pipe.model.backbone.config.model_type == "llama"
    caches = (None, "prefix", "dual") if is_decoder else (None,)
    calls = [random_call(draw, caches) for _ in range(number)]
    alone = [call(pipe) for call in calls]
    together = results(pipe, calls)
    different = [i for i in range(number) if together[i] != alone[i]]
    assert not different


def test_mixed_calls_of_eight_threads_give_what_each_gives_alone():
    assert_equal_to_alone(pipeline_with_heads("bert"), 20)


def test_calls_whose_heads_need_different_adapters_take_turns(adapters):
    pipe = pipeline_with_heads(adapters=adapters)
    trained = [p.requires_grad for p in pipe.model.backbone.parameters()]
    assert_equal_to_alone(pipe, 24)
    assert [p.requires_grad for p in pipe.model.backbone.parameters()] == trained


@pytest.mark.slow
@pytest.mark.parametrize("with_adapters", [False, True])
def test_five_hundred_mixed_calls_of_eight_threads_give_what_each_gives_alone(
    with_adapters, adapters
):
    assert_equal_to_alone(pipeline_with_heads(adapters=adapters if with_adapters else ()), 500)


def test_prompts_are_read_alike_while_others_pad_and_cut_with_the_same_tokenizer(tiny_tokenizer):
    texts, stop = ["Tom has 3 boxes of eggs.", "<|mask|> Ann", "He"], threading.Event()
    expected = [encode_texts(texts, tiny_tokenizer), encode_texts(texts[:1], tiny_tokenizer)]

    def pad() -> None:
        while not stop.is_set():
            tiny_tokenizer(texts, padding="max_length", truncation=True, max_length=3)

    others = [threading.Thread(target=pad) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(200):
            assert encode_texts(texts, tiny_tokenizer) == expected[0]
            assert encode_texts(texts[:1], tiny_tokenizer) == expected[1]
    finally:
        stop.set()
        for other in others:
            other.join()


def test_what_is_changed_about_a_tokenizer_counts_from_the_next_text_on(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    (before,), _ = encode_texts(["Tom"], tokenizer)
    tokenizer.add_tokens(["Tom"])
    (after,), _ = encode_texts(["Tom"], tokenizer)
    assert before != after == [len(tokenizer) - 1]


def test_adapter_is_put_back_when_a_call_fails(adapters):
    model = pipeline_with_heads(adapters=adapters).model
    expected = coupled(model, None)
    with pytest.raises((IndexError, ValueError)):
        model(torch.full((1, 4), 99), head="longer")
    assert torch.equal(coupled(model, None), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning")
def test_head_with_another_adapter_is_not_trained_where_passes_are_repeated(adapters):
    model = pipeline_with_heads(adapters=adapters).model
    model.backbone.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
        model(IDS, coupling="marginal", head="longer")
    coupled(model, "longer")  # without gradients nothing is repeated


def test_shared_scheduler_is_left_as_it_was():
    pipe = pipeline_with_heads()
    pipe.scheduler.set_timesteps(5)
    pipe(input_ids=[[5, 6]], gen_length=8, num_inference_steps=8, output_type="seq")
    assert pipe.scheduler.num_inference_steps == 5


def test_scores_without_a_head_are_the_factorized_ones_and_the_window_stays():
    model = pipeline_with_heads().model
    scores = model.score([[5, 6]], [[7, 8, 9, 4, 3]], head=False)
    assert torch.equal(scores.coupled, scores.factorized)
    assert torch.equal(scores.factorized, model.score([[5, 6]], [[7, 8, 9, 4, 3]]).factorized)


@pytest.mark.parametrize("head", [True, 0, 1.5, ["default"], random_head])
def test_head_of_a_call_that_is_no_name_is_refused(head):
    pipe = pipeline_with_heads()
    for call in (
        lambda: pipe(input_ids=[[5]], head=head, output_type="seq"),
        lambda: pipe.model.generate(IDS[:, :2], head=head),
        lambda: pipe.model.score([[5]], [[6]], head=head),
        lambda: pipe.model(IDS, head=head),
    ):
        with pytest.raises(ValueError, match="`head` must be the name of a head, None"):
            call()


def test_copied_and_pickled_models_have_locks_of_their_own():
    model = pipeline_with_heads().model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.adapter_lock is not model.adapter_lock is model.adapter_lock
        assert torch.equal(coupled(other, "longer"), coupled(model, "longer"))
