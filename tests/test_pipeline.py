"""Promises of `CoDDPipeline` and of the denoising loop under it, on tiny random models."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from transformers import LlamaConfig, LlamaForCausalLM

from codd_hf import CoDDHead, CoDDModel
from codd_hf.configuration_codd import CoDDHeadConfig
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.pipelines import CoDDPipeline, CoDDPipelineOutput
from codd_hf.schedulers.scheduling_codd import CoDDScheduler
from tiny import random_head, tiny_backbone

WINDOW = 4
SHORT = {"gen_length": 10, "block_length": 5, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["two and two are four, and 3 + 4 = 7"] * 3, vocab_size=280)


def make_backbone(tokenizer):
    """A random backbone with 5 ids too many."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def make_head(tokenizer) -> CoDDHead:
    beyond = range(len(tokenizer), len(tokenizer) + 5)
    head = CoDDHead(
        CoDDHeadConfig(
            vocab_size=len(tokenizer) + 5,
            num_latents=6,
            window_length=WINDOW,
            mask_token_id=tokenizer.mask_token_id,
            forbidden_token_ids=[tokenizer.pad_token_id, *beyond],
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def make_pipe(tokenizer, **scheduler) -> CoDDPipeline:
    model = CoDDModel.from_backbone(make_backbone(tokenizer), head=make_head(tokenizer))
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(**scheduler), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return make_pipe(tokenizer)


@pytest.fixture
def passes(pipe):
    """The batch sizes of the backbone passes that `pipe` runs."""
    sizes = []

    def count(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))

    hook = pipe.model.backbone.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    hook.remove()


def favour(pipe, monkeypatch, token: int, at: int | None = None):
    """Makes the backbone certain of `token`, everywhere or at one canvas position."""
    family = type(pipe.model.family)
    states = family.states

    def biased(self, model, input_ids, *args, **kwargs):
        result = states(self, model, input_ids, *args, **kwargs)
        read = result.read_logits

        def read_logits(index):
            logits = read(index).clone()
            if at is None:
                logits[..., token] += 1e4
            else:
                logits[..., token] += torch.where(index[1] == at, 1e4, -1e4)
            return logits

        result.read_logits = read_logits
        return result

    monkeypatch.setattr(family, "states", biased)


PROMPTS = [[40, 41], [50, 51, 52, 53, 54, 55, 56], [60, 61, 62]]


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in range(len(PROMPTS))]


@pytest.mark.parametrize(("gen_length", "block_length"), [(3, 8), (8, 4), (9, 2), (13, 6)])
def test_every_position_is_filled_whatever_the_lengths(pipe, gen_length, block_length):
    num_blocks = -(-gen_length // block_length)
    sequences = pipe(
        input_ids=PROMPTS,
        gen_length=gen_length,
        block_length=block_length,
        num_inference_steps=num_blocks,
        temperature=3.0,
        eos_token_id=[],
        output_type="seq",
    ).sequences
    assert sequences.shape == (3, gen_length)
    assert not torch.isin(
        sequences, torch.tensor([pipe.model.config.mask_token_id, pipe.model.config.pad_token_id])
    ).any()
    assert sequences.max() < len(pipe.tokenizer)


def test_num_inference_steps_is_the_number_of_backbone_passes(pipe, passes):
    output = pipe(input_ids=PROMPTS, **SHORT, eos_token_id=[], output_type="seq")
    assert passes == [3] * 4
    assert output.num_passes == 4


def test_tokens_of_a_block_are_committed_in_equal_shares(pipe):
    shares, blocks = [], []

    def callback(pipe, step, timestep, kwargs):
        shares.append(kwargs["transfer_index"].sum(-1).tolist())
        offset = kwargs["transfer_index"][0].nonzero()[:, 0] - len(PROMPTS[0])
        blocks.append(set((offset // 5).tolist()))
        return {}

    pipe(
        input_ids=PROMPTS,
        **{**SHORT, "num_inference_steps": 5},
        eos_token_id=[],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["transfer_index"],
    )
    assert shares == [[2] * 3, [2] * 3, [1] * 3, [3] * 3, [2] * 3]
    assert blocks == [{0}, {0}, {0}, {1}, {1}]


def test_text_ends_at_the_end_of_text_and_finished_rows_cost_nothing(pipe, passes, monkeypatch):
    eos = pipe.tokenizer.eos_token_id
    at = len(PROMPTS[0]) + 3
    favour(pipe, monkeypatch, eos, at=at)
    output = pipe(input_ids=PROMPTS[:2], gen_length=12, block_length=6, num_inference_steps=6)
    assert output.sequences[0].tolist().index(eos) == 3
    assert (output.sequences[0, 4:] == pipe.tokenizer.pad_token_id).all()
    # Canvas position 5 belongs to the second row's prompt, so that it goes on to the end.
    assert eos not in output.sequences[1]
    assert passes == [2, 2, 2, 1, 1, 1]
    assert output.texts[0] == pipe.tokenizer.decode(output.sequences[0, :3])


def test_callback_sees_the_whole_canvas_at_every_step(pipe):
    mask_token_id = pipe.model.config.mask_token_id
    steps = []

    def callback(pipe, step, timestep, kwargs):
        assert list(kwargs) == pipe._callback_tensor_inputs
        assert {tensor.shape for tensor in kwargs.values()} == {(3, 7 + 10)}
        committed = kwargs["transfer_index"]
        assert (kwargs["canvas"][committed] != mask_token_id).all()
        assert kwargs["generated"].sum(-1).tolist() == [10] * 3
        masked = (kwargs["canvas"] == mask_token_id) & kwargs["generated"]
        steps.append((step, round(float(timestep), 3), int(masked.sum())))
        for row, prompt in enumerate(PROMPTS):
            assert kwargs["canvas"][row, : len(prompt)].tolist() == prompt
        return kwargs

    pipe(
        input_ids=PROMPTS,
        **SHORT,
        eos_token_id=[],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
    )
    assert steps == [(0, 1.0, 21), (1, 0.5, 15), (2, 1.0, 6), (3, 0.5, 0)]


def test_canvas_that_the_callback_returns_is_used_even_beyond_the_tokenizer(pipe):
    beyond = len(pipe.tokenizer) + 2

    def callback(pipe, step, timestep, kwargs):
        return {"canvas": kwargs["canvas"].masked_fill(kwargs["generated"], beyond)}

    names = ["canvas", "generated"]
    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    output = pipe(input_ids=PROMPTS[0], **SHORT, **call)
    assert (output.sequences == beyond).all()
    assert output.texts == [""]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda canvas: None, "must return a dict"),
        (lambda canvas: {"canvas": canvas[:, 1:]}, "`canvas` must have shape"),
        (lambda canvas: {"canvas": canvas * 0 - 1}, "`canvas` must hold"),
        (lambda canvas: {"canvas": canvas + 0.5}, "`canvas` must be integers"),
    ],
)
def test_callback_must_return_a_dict_with_tokens_in_the_shape_of_the_canvas(pipe, change, said):
    with pytest.raises((TypeError, ValueError), match=said):
        pipe(
            input_ids=PROMPTS[0],
            **SHORT,
            callback_on_step_end=lambda p, s, t, kwargs: change(kwargs["canvas"]),
        )


def test_diffusers_callback_objects_work(pipe):
    class Recorder(PipelineCallback):
        tensor_inputs = ("canvas", "transfer_index")

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            seen.append((step_index, sorted(callback_kwargs), pipeline.num_timesteps))
            return callback_kwargs

    seen = []
    pipe(input_ids=PROMPTS[0], **SHORT, callback_on_step_end=Recorder())
    assert seen[0] == (0, ["canvas", "transfer_index"], 4)


def test_output_is_text_or_sequences_as_output_or_tuple(pipe):
    kwargs = {**SHORT, "sampling": "marginal"}
    output = pipe("two and two", **kwargs)
    assert isinstance(output, CoDDPipelineOutput)
    assert isinstance(output.texts[0], str)
    assert pipe("two and two", **kwargs, output_type="seq").texts is None
    sequences, texts = pipe("two and two", **kwargs, return_dict=False)
    assert torch.equal(sequences, output.sequences)
    assert texts == output.texts


def test_prompts_messages_and_ids_mean_the_same(pipe, tokenizer):
    texts = ["two and two are", "3 + 4"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    rows = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"]
        for c in conversations
    ]
    kwargs = {**SHORT, "sampling": "marginal"}
    expected = pipe(input_ids=rows, **kwargs).texts
    assert pipe(texts, **kwargs).texts == expected
    assert pipe(messages=conversations, **kwargs).texts == expected
    assert pipe(messages=conversations[1], **kwargs).texts == expected[1:]
    assert pipe(texts[1], **kwargs).texts == expected[1:]
    assert pipe(input_ids=torch.tensor(rows[0]), **kwargs).texts == expected[:1]
    plain = [tokenizer(text)["input_ids"] for text in texts]
    assert pipe(texts, use_chat_template=False, **kwargs).texts == (
        pipe(input_ids=plain, **kwargs).texts
    )


def test_text_with_mask_tokens_is_filled_in_and_the_rest_stays(pipe, tokenizer):
    mask = tokenizer.mask_token
    templates = [f"two and {3 * mask} four, and", f"{mask} + 4 = {2 * mask}"]
    output = pipe(templates, infill=True, sampling="marginal", num_inference_steps=3)
    for template, text, sequence in zip(templates, output.texts, output.sequences, strict=True):
        ids = torch.tensor(tokenizer(template)["input_ids"])
        given = ids != tokenizer.mask_token_id
        assert int((~given).sum()) == template.count(mask)
        assert torch.equal(sequence[: len(ids)][given], ids[given])
        first, *_, last = template.split(mask)
        assert text.startswith(first)
        assert text.endswith(last)
    messages = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": f"3 {mask} 4"},
    ]
    said = pipe(
        messages=messages, infill=True, chat_template_kwargs={"add_generation_prompt": False}
    )
    assert said.texts[0].split("3 ")[1].endswith(" 4")


def test_prompts_may_have_lengths_and_steps_of_their_own(pipe):
    kwargs = {"sampling": "marginal", "block_length": 4, "eos_token_id": []}
    output = pipe(input_ids=PROMPTS, gen_length=[4, 9, 1], num_inference_steps=[1, 3, 2], **kwargs)
    assert output.sequences.shape == (3, 9)
    assert output.passes_per_row.tolist() == [1, 3, 1]
    assert pipe.num_timesteps == 3
    for row, (length, steps) in enumerate([(4, 1), (9, 3), (1, 2)]):
        alone = pipe(input_ids=PROMPTS[row], gen_length=length, num_inference_steps=steps, **kwargs)
        assert output.texts[row] == alone.texts[0]


def test_window_that_the_circuit_excludes_is_decoded_factorized_with_a_warning(tokenizer):
    pipe = make_pipe(tokenizer)
    with torch.no_grad():
        pipe.model.coupling_head.emission.fill_(-torch.inf)
    with pytest.warns(UserWarning, match="share no completion of a window"):
        sequences = pipe(input_ids=PROMPTS, **SHORT).sequences
    expected = pipe(input_ids=PROMPTS, **SHORT, sampling="factorized").sequences
    assert torch.equal(sequences, expected)


def test_saved_pipeline_gives_the_same_text_for_the_same_seed(tokenizer, tmp_path):
    pipe = make_pipe(tokenizer, sampling="latent", temperature=0.9)
    pipe.save_pretrained(tmp_path)
    for component in ("model/model.safetensors", "scheduler/scheduler_config.json", "tokenizer"):
        assert (tmp_path / component).exists()
    loaded = CoDDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for name, tensor in pipe.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    texts = [
        p("two and two", **SHORT, generator=torch.Generator().manual_seed(5)).texts
        for p in (pipe, loaded)
    ]
    assert texts[0] == texts[1]
    swapped = CoDDPipeline.from_pretrained(tmp_path, scheduler=CoDDScheduler(sampling="marginal"))
    assert swapped.scheduler.config.sampling == "marginal"


def test_model_folder_and_backbone_folder_load_as_pipelines(tokenizer, tmp_path):
    pipe = make_pipe(tokenizer)
    model_folder, backbone_folder = tmp_path / "model", tmp_path / "backbone"
    pipe.model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    pipe.model.backbone.save_pretrained(backbone_folder)
    tokenizer.save_pretrained(backbone_folder)

    loaded = CoDDPipeline.from_pretrained(model_folder)
    loaded.set_progress_bar_config(disable=True)
    kwargs = {**SHORT, "sampling": "marginal"}
    assert loaded("two and two", **kwargs).texts == pipe("two and two", **kwargs).texts

    bare = CoDDPipeline.from_pretrained(backbone_folder)
    bare.set_progress_bar_config(disable=True)
    assert bare.model.coupling_head is None
    expected = pipe("two and two", **SHORT, sampling="factorized").texts
    assert bare("two and two", **SHORT).texts == expected


def test_head_folder_loads_with_the_backbone_and_tokenizer_it_names(tokenizer, tmp_path):
    pipe = make_pipe(tokenizer)
    pipe.model.backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    head = pipe.model.coupling_head
    head.config.base_model_name_or_path = str(tmp_path / "backbone")
    head.save_pretrained(tmp_path / "head")
    loaded = CoDDPipeline.from_pretrained(tmp_path / "head")
    loaded.set_progress_bar_config(disable=True)
    kwargs = {**SHORT, "sampling": "marginal"}
    assert loaded("two and two", **kwargs).texts == pipe("two and two", **kwargs).texts


def test_folders_that_hold_no_pipeline_get_one_clear_sentence(tmp_path):
    with pytest.raises(OSError, match="holds no CoDD head, model or pipeline"):
        CoDDPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="there is no file or folder"):
        CoDDPipeline.from_pretrained(tmp_path / "not" / "there")
    with pytest.raises(OSError, match="is not in the cache"):
        CoDDPipeline.from_pretrained("not/there", local_files_only=True)


def test_tokenizer_of_another_model_is_refused(pipe, tokenizer):
    other = train_tokenizer(["abc"], vocab_size=270)
    other.mask_token = "<|user|>"
    with pytest.raises(ValueError, match="`tokenizer` has the mask token"):
        CoDDPipeline(model=pipe.model, scheduler=CoDDScheduler(), tokenizer=other)


def test_pipeline_without_tokenizer_works_on_ids(pipe):
    bare = CoDDPipeline(model=pipe.model, scheduler=CoDDScheduler())
    bare.set_progress_bar_config(disable=True)
    kwargs = {**SHORT, "output_type": "seq", "sampling": "marginal"}
    assert torch.equal(
        bare(input_ids=PROMPTS, **kwargs).sequences, pipe(input_ids=PROMPTS, **kwargs).sequences
    )
    with pytest.raises(ValueError, match="`prompt` needs a tokenizer"):
        bare("two", **kwargs)
    with pytest.raises(ValueError, match="`output_type='text'` needs a tokenizer"):
        bare(input_ids=PROMPTS, **SHORT)


MESSAGES = [{"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "Provide one of `prompt`, `messages` and `input_ids`, got none"),
        ({"prompt": "two", "messages": MESSAGES}, "got `prompt` and `messages`"),
        ({"prompt": []}, "`prompt` must hold at least one row, got none"),
        ({"messages": []}, "`messages` must hold at least one row, got none"),
        ({"input_ids": []}, "`input_ids` must hold at least one row, got none"),
        (
            {"input_ids": torch.zeros(1, 1, 1, dtype=torch.long)},
            "`input_ids` must hold rows of token ids",
        ),
        ({"input_ids": [40, 5000]}, "got 5000 in row 0"),
        ({"input_ids": [[40], [-1]]}, "got -1 in row 1"),
        ({"input_ids": [40, 1]}, "must not hold the mask token"),
        (
            {"input_ids": torch.tensor([[40]]), "attention_mask": torch.ones(1, 2)},
            "`attention_mask` must have shape",
        ),
        ({"prompt": "two", "attention_mask": torch.ones(1, 2)}, "goes with `input_ids` only"),
        ({"prompt": "two", "gen_length": 0}, "`gen_length` must be at least 1, got 0"),
        ({"prompt": "two", "block_length": -1}, "`block_length` must be at least 1, got -1"),
        ({"prompt": "two", "num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        (
            {"prompt": "two", "num_inference_steps": 1},
            "that are decoded, 2 in row 0 with `block_length=5`, got 1: take more steps",
        ),
        ({"prompt": "two", "temperature": "hot"}, "`temperature` must be a number"),
        ({"prompt": "two", "strategy": "best"}, "`strategy` must be one of"),
        ({"prompt": "two", "top_p": 0.0}, "`top_p` must be at least 1e-06"),
        ({"prompt": "two", "output_type": "pt"}, "`output_type` must be one of text, seq"),
        (
            {"prompt": ["two", "four"], "generator": [torch.Generator()] * 3},
            "`generator` must have one entry per row (2), got 3",
        ),
        (
            {"prompt": "two", "callback_on_step_end_tensor_inputs": ["latents"]},
            "`callback_on_step_end_tensor_inputs` must hold names among canvas",
        ),
        (
            {"prompt": "two", "gen_length": 95, "block_length": 95},
            "exceed the 96 positions of the backbone",
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(pipe, kwargs, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        pipe(**{**SHORT, **kwargs})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"messages": [[]]}, "`messages` must be a list of messages"),
        ({"prompt": 3}, "`prompt` must be a string or a list of strings, got 3"),
        ({"input_ids": torch.zeros(1, 2)}, "`input_ids` must be integers"),
        ({"prompt": "two", "gen_length": 2.5}, "`gen_length` must be an integer, got 2.5"),
        (
            {"prompt": "two", "temprature": 1},
            "`temprature` is not an argument of the pipeline",
        ),
        ({"prompt": "two", "callback_on_step_end": 3}, "`callback_on_step_end` must be callable"),
        *(
            ({"prompt": "two", "chat_template_kwargs": value}, "`chat_template_kwargs` must be a")
            for value in ({0: 0}, [], torch.zeros(2))
        ),
    ],
)
def test_values_of_the_wrong_type_get_one_clear_sentence(pipe, kwargs, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        pipe(**{**SHORT, **kwargs})


def test_prompt_without_a_token_is_text_without_a_prompt_alone_and_in_a_batch(pipe):
    ids, mask = torch.tensor([[40], [41]]), torch.tensor([[1], [0]])
    kwargs = {"attention_mask": mask, "generator": seeds()[:2], "scheduler": pipe.scheduler}
    batch = pipe.model.generate(ids, **kwargs, **SHORT)[:, ids.shape[1] :]
    alone = pipe(input_ids=torch.zeros(1, 0), generator=seeds()[1:2], **SHORT).sequences
    assert torch.equal(batch[1], alone[0])
    assert torch.equal(pipe(input_ids=[[40], []], generator=seeds()[:2], **SHORT).sequences, batch)
    assert (
        pipe("", use_chat_template=False, generator=seeds()[1], **SHORT).texts
        == (pipe(["", "two"], use_chat_template=False, generator=seeds()[1:3], **SHORT).texts[:1])
    )


def test_listed_evidence_decodes_at_any_evidence_temperature():
    """What a large vocabulary gets by default, and all tokens listed is the exact reading."""
    texts = {}
    for top_k in (0, 3, 12):
        head = random_head(12, mask_token_id=1, evidence_size=top_k)
        backbone = tiny_backbone(vocab_size=12, eos_token_id=2)
        model = CoDDModel.from_backbone(backbone, head)
        assert model.coupling_head.evidence_size == top_k
        texts[top_k] = model.generate(
            torch.tensor([[3, 4]]),
            gen_length=8,
            block_length=4,
            num_inference_steps=4,
            evidence_temperature=0.5,
            generator=torch.Generator().manual_seed(0),
        )
    assert (texts[3] != 1).all()
    assert torch.equal(texts[0], texts[12])
