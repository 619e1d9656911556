"""Whatever a call is given, it answers without NaN, or with one sentence that names an argument."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codd_hf import CoDDModel, CoDDScheduler, CoupledCategorical, Potentials
from codd_hf.configuration_codd import COUPLINGS
from codd_hf.decoding.call import PARADIGMS
from codd_hf.schedulers.settings import DrawSettings
from tiny import SAMPLING, STRATEGIES, random_head, tiny_backbone, tiny_model
from tiny_pipeline import tiny_pipeline

MASK, VOCAB = 2, 12
REFUSALS = (ValueError, TypeError, OSError)

numbers = [0, 1, -1, 2, 3, 4, 5, 11, 12, -100, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1.0, 2.5]
numbers += [float("nan"), float("inf"), -float("inf"), 1e-40, 1e300, 1j, True, False]
numbers += [np.int64(2), np.uint8(200), np.float32(0.5), np.bool_(True), np.array(3), np.nan]
numbers += [torch.tensor(2), torch.tensor(0.5), torch.tensor(True)]
others = [None, "", "x", "1", "[MASK]", "\ud83d", "\x00", b"x", object(), ...]
others += [torch.Generator(), torch.float16, torch.tensor([])]
scalars = st.sampled_from(numbers) | st.sampled_from(others)
integer_dtypes = [torch.int64, torch.int32, torch.uint8, torch.bool]
float_dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
dtypes = st.sampled_from(integer_dtypes) | st.sampled_from(float_dtypes)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.sampled_from(
    [(2,), (2, 4), (1, 4), (2, 3), (2, 4, VOCAB), (2, 4, 3), (2, 8)]
)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of any shape and dtype; values that ids may have, or that they and floats may not."""
    shape, dtype, seed = draw(shapes), draw(dtypes), draw(st.integers(0, 9))
    low, high = draw(st.sampled_from([(0, 2), (3, VOCAB), (0, VOCAB), (-2, VOCAB + 2)]))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high, shape, generator=generator).to(dtype)
    special = draw(st.sampled_from([None, None, float("nan"), float("inf"), -float("inf")]))
    if special is not None and dtype.is_floating_point and values.numel():
        values.view(-1)[seed % values.numel()] = special
    return values


def in_other_forms(tensor: torch.Tensor) -> st.SearchStrategy:
    forms = [tensor, tensor.tolist()]
    if tensor.dtype != torch.bfloat16:
        forms += [tensor.numpy()]
    return st.sampled_from(forms)


values = scalars | tensors().flatmap(in_other_forms)
wild = st.recursive(
    values,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from([0, 1, -1, "x", None]), inner, max_size=2)
    ),
    max_leaves=4,
)
plausible: dict[str, list[Any]] = {
    "strategy": list(STRATEGIES),
    "sampling": list(SAMPLING),
    "paradigm": list(PARADIGMS),
    "temperature": [0.0, 1.0, 1e-6, 1e6],
    "evidence_temperature": [0.5, 1e-6, 1e6],
    "repetition_penalty": [1.5, 1e-6, 1e6],
    "threshold": [0.0, 0.5, 1.0],
    "top_k": [0, 1, 3, 100],
    "top_p": [0.1, 0.9, 1.0],
    "activation_ratio": [0.0, 0.5],
    "forbidden_token_ids": [[], [3, 4], list(range(VOCAB)), list(range(1, VOCAB))],
    "coupling": list(COUPLINGS),
    "attention_mask": [[[1, 1, 1, 0]] * 2, [[0, 0, 0, 0]] * 2, [[0, 1, 1, 1], [1, 0, 1, 0]]],
    "labels": [[[5] * 4] * 2, [[-100, 5, -100, 6]] * 2],
    "position_ids": [[[0, 1, 2, 3]], [[3, 3, 3, 3]] * 2],
    "window_start": [[0, 0], [-9, 9], [2, 1]],
    "gen_length": [1, 5, [1, 9], 120, 10**6],
    "max_new_tokens": [1, [3, 6]],
    "block_length": [1, 3, 100],
    "num_inference_steps": [1, 2, 5, [2, 9], 10**12],
    "min_new_tokens": [1, [0, 2]],
    "forced_tokens": [{0: 5}, [{}, {1: 6}], {4: MASK}],
    "cache": ["prefix", "dual"],
    "eos_token_id": [1, [1, 3], []],
    "pad_token_id": [0, 5],
    "generator": [torch.Generator(), [torch.Generator(), torch.Generator()]],
    "infill": [True],
    "do_sample": [True, False],
    "logits_processor": [lambda ids, scores: scores, lambda ids, scores: scores - torch.inf],
    "batch_size": [1, 2],
    "prompt": ["Tom", ["Tom", ""]],
    "messages": [[{"role": "user", "content": "Tom"}]],
    "output_type": ["text", "seq"],
    "sample": [[[MASK] * 4] * 2, [[MASK, 5, MASK, 6], [5, 5, 5, 5]]],
    "eligible": [torch.tensor([[True, False, True, True]] * 2)],
    "at_least": [[1, 2], [0, 9]],
    "timestep": [1.0, 0.5],
    "timesteps": [0.5, [0.0, 1.0]],
    "mean_span_length": [1, 2.5, 1e9],
    "mask_token_id": [MASK],
    "tokens": [torch.full((2, 4), 5)],
    "observed": [torch.tensor([[True, False, False, True]] * 2), torch.ones(2, 4).bool()],
    "present": [torch.tensor([[True, True, True, False]] * 2), torch.zeros(2, 4).bool()],
    "active": [torch.tensor([True, False])],
    "forbidden": [torch.arange(VOCAB) == MASK, torch.ones(VOCAB).bool()],
    "context": [torch.randn(2, 4, 3)],
    "value": [torch.full((2, 4), 5), torch.full((3, 2, 4), 6)],
    "known": [torch.tensor([[True, False, False, True]] * 2)],
    "where": [torch.tensor([[True, False, False, True]] * 2)],
    "latents": [torch.ones(2, 4).long()],
    "token_ids": [torch.tensor([3, 4]), list(range(VOCAB))],
    "sample_shape": [(), (2,), (0, 3)],
}


def changes(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Up to four of these arguments, with plausible values or any."""

    def of(name: str) -> st.SearchStrategy:
        found = plausible.get(name)
        given = wild if found is None else wild | st.sampled_from(found) | st.sampled_from(found)
        return given.map(lambda value: (name, value))

    pairs = st.sampled_from(names).flatmap(of)
    return st.lists(pairs, min_size=1, max_size=4, unique_by=lambda pair: pair[0]).map(dict)


def floats_in(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from floats_in(part)
    elif hasattr(result, "__dict__") and not isinstance(result, (CoupledCategorical, Potentials)):
        yield from floats_in(list(vars(result).values()))


def holds(call: Callable[[], Any]) -> Any:
    """What the call gives, free of NaN; None where it refuses in one sentence."""
    refusal = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except REFUSALS as error:
            result, refusal = None, error
    names_something = refusal is None or re.search(r"`[\w.\[\]=', -]+`", str(refusal))
    if not names_something or "\n" in str(refusal):
        raise AssertionError(f"No sentence that names an argument: {refusal}") from refusal
    for tensor in floats_in(result):
        assert not tensor.isnan().any()
    return result


DRAWS = [field.name for field in fields(DrawSettings)]
TASK = ("block_length", "num_inference_steps", "paradigm", "infill")
TASK += ("min_new_tokens", "forced_tokens", "generator", "cache")
TASK += ("logits_processor", "eos_token_id", "attention_mask")
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 10]])
HIDDEN = torch.tensor([[5, 6, MASK, MASK], [MASK, 3, MASK, 10]])

MODELS = {
    "llama": tiny_model(),
    "bert": tiny_model("bert"),
    "roberta": tiny_model("roberta"),
    "blocks": CoDDModel.from_backbone(tiny_backbone(block_length=4), random_head()),
    "listed": CoDDModel.from_backbone(tiny_backbone(), random_head(evidence_size=3)),
    "bare": CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK, forbidden_token_ids=[3]),
    "unknown mask": CoDDModel.from_backbone(tiny_backbone()),
}
models = st.sampled_from(list(MODELS.values()))
PIPE = tiny_pipeline()


def check_forward(data: st.DataObject) -> None:
    names = ("input_ids", "attention_mask", "position_ids", "labels", "window_start", "coupling")
    names += ("return_distribution", "generator", "return_dict", "token_type_ids", "use_cache")
    given = {"input_ids": HIDDEN} | data.draw(changes(*names, "head", "past_key_values"))
    holds(lambda: data.draw(models)(**given))


def check_generate(data: st.DataObject) -> None:
    names = ("inputs", "input_ids", "max_new_tokens", "gen_length", "do_sample")
    names += ("pad_token_id", "token_type_ids", "generation_config")
    names += ("streamer", "on_step")
    given = {"inputs": IDS, "max_new_tokens": 6, "num_inference_steps": 2}
    given |= data.draw(changes(*names, *TASK, *DRAWS, "head", "use_cache", "scheduler"))
    holds(lambda: data.draw(models).generate(**given))


def check_score(data: st.DataObject) -> None:
    given = {"prompts": [[5, 6], []], "answers": [[7], [8, 9, 10, 11, 3]]}
    given |= data.draw(changes("prompts", "answers", "batch_size", "tokenizer", "head"))
    holds(lambda: data.draw(models).score(**given))


def check_pipeline(data: st.DataObject) -> None:
    given = {"gen_length": 6, "block_length": 4, "num_inference_steps": 2}
    names = ("prompt", "messages", "input_ids", "use_chat_template", "gen_length", "output_type")
    names += ("return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
    names += ("chat_template_kwargs",)
    given |= data.draw(st.sampled_from([{"prompt": ["Tom", "Ann buys"]}, {"input_ids": IDS}]))
    holds(lambda: PIPE(**given | data.draw(changes(*names, *TASK, *DRAWS))))


def check_scheduler(data: st.DataObject) -> None:
    scheduler = holds(lambda: CoDDScheduler(**data.draw(changes(*DRAWS, "mask_token_id"))))
    scheduler = scheduler or CoDDScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(2)
    holds(lambda: scheduler.add_noise(**{"original_samples": IDS, "timesteps": 0.5} | data.draw(
        changes("original_samples", "timesteps", "generator", "mask_token_id", "mean_span_length")
    )))  # fmt: skip
    output = data.draw(st.sampled_from(["logits", "distribution"]))
    output = torch.randn(2, 4, VOCAB) if output == "logits" else a_distribution({})
    names = ("model_output", "timestep", "sample", "generator", "eligible", "at_least")
    given = {"model_output": output, "timestep": 1.0, "sample": [[MASK] * 4] * 2}
    holds(lambda: scheduler.step(**given | data.draw(changes(*names, *DRAWS))))
    holds(lambda: scheduler.set_timesteps(data.draw(wild)))


def a_distribution(given: dict[str, Any]) -> CoupledCategorical:
    generator = torch.Generator().manual_seed(0)
    parts = (torch.randn(shape, generator=generator) for shape in ((3,), (1, 3, 3), (1, 3, VOCAB)))
    initial, transition, emission = parts
    law = torch.randn(VOCAB, generator=generator).log_softmax(-1)
    potentials = Potentials(initial, transition, emission, law)
    logits = torch.randn(2, 4, VOCAB, generator=generator)
    return CoupledCategorical(**{"logits": logits, "potentials": potentials} | given)


METHODS = {
    "log_prob": ("value",),
    "coupling_gain": ("value",),
    "marginal_probs_of": ("value",),
    "partial_log_prob": ("value", "known"),
    "sample_latents": ("generator",),
    "logits_given": ("latents",),
    "sample": ("sample_shape", "generator"),
    "viterbi": (),
    "condition": ("tokens", "observed"),
    "without": ("token_ids",),
    "with_temperature": ("temperature",),
    "with_active": ("active",),
}
ATTRIBUTES = ("marginals", "factorized_logits", "log_partition", "latent_posterior", "masked")


def check_distribution(data: st.DataObject) -> None:
    names = ("logits", "potentials", "tokens", "observed", "present", "context", "active")
    names += ("temperature", "forbidden", "top_k")
    distribution = holds(lambda: a_distribution(data.draw(changes(*names))))
    distribution = distribution or a_distribution({})
    for _ in range(2):
        name = data.draw(st.sampled_from([*METHODS, *ATTRIBUTES]))
        if name in ATTRIBUTES:
            holds(lambda name=name: getattr(distribution, name))
            continue
        given = {n: plausible.get(n, [None])[0] for n in METHODS[name]}
        given |= data.draw(changes(*METHODS[name])) if given else {}
        result = holds(lambda name=name, given=given: getattr(distribution, name)(**given))
        if isinstance(result, CoupledCategorical):
            holds(lambda result=result: (result.log_partition, result.marginals))


def check_potentials(data: st.DataObject) -> None:
    given = {"initial": torch.zeros(3), "transition": torch.zeros(1, 3, 3)}
    given |= {"emission": torch.zeros(1, 3, VOCAB)}
    given |= data.draw(changes("initial", "transition", "emission", "log_marginal"))
    potentials = holds(lambda: Potentials(**given))
    if potentials is not None:
        holds(lambda: a_distribution({"potentials": potentials}).log_partition)


CHECKS = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_forward,
        check_generate,
        check_score,
        check_pipeline,
        check_scheduler,
        check_distribution,
        check_potentials,
    )
}
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_any_arguments_give_a_result_or_one_sentence(check, data):
    check(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@settings(max_examples=6000, deadline=10_000, suppress_health_check=QUIET)
@given(data=st.data())
def test_any_arguments_give_a_result_or_one_sentence_within_ten_seconds(check, data):
    check(data)
