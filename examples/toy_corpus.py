"""The factorization barrier, measured on a language whose true distribution is known.

A small grammar writes texts of 16 words about the sea, the sky or the kitchen. A tiny masked
diffusion language model learns them, a circuit is fitted to it, and both write new texts in few
passes. The judge is the grammar itself, with a little smoothing: its perplexity on real text is
small; a text whose words do not go together is beyond it.

    python examples/toy_corpus.py
"""

from __future__ import annotations

import math
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from codd_hf import CoDDHead, CoDDHeadConfig, CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.data.canvases import TokenizedExample
from codd_hf.training import (
    ConditionalConfig,
    GenerativeConfig,
    PretrainingConfig,
    fit_backbone,
    fit_conditional,
    fit_generative,
)
from codd_hf.training.fits.generative import text_windows
from codd_hf.training.inputs import small_backbone_config

LENGTH = 16
SPECIAL = ["<pad>", "<mask>", "<end>", "<text>"]
SENTENCES = ["the WHO DOES the THING .", "in CITY WHO and WHO DOES a THING .", "WHO is from CITY ."]
CITIES = ["san diego", "new york", "los angeles", "rio verde"]
WORLDS = [
    {
        "WHO": ["captain", "sailor", "pirate", "fisher"],
        "DOES": ["sails", "steers", "anchors"],
        "THING": ["ship", "boat", "raft", "ferry"],
    },
    {
        "WHO": ["pilot", "steward", "mechanic", "navigator"],
        "DOES": ["flies", "lands", "boards"],
        "THING": ["plane", "glider", "balloon", "jet"],
    },
    {
        "WHO": ["cook", "baker", "waiter", "guest"],
        "DOES": ["bakes", "eats", "serves"],
        "THING": ["cake", "soup", "bread", "pie"],
    },
]


class Grammar:
    """The sentences as an automaton: a text stays in one world and is sentence after sentence.

    A state is a word slot of a sentence; within a slot all words are equally probable.

    Attributes:
        words: the vocabulary, special tokens first.
        start: `[S]`, distribution of a text's first state.
        transition: `[S, S]`, row = previous state.
        emission: `[S, V]`.
    """

    def __init__(self) -> None:
        paths = []  # (world, probability, the words of each slot)
        for number, world in enumerate(WORLDS):
            for sentence in SENTENCES:
                cities = CITIES if "CITY" in sentence else [""]
                for city in cities:
                    slots = [world.get(s, [s]) for s in sentence.replace("CITY", city).split()]
                    paths.append((number, 1 / len(SENTENCES) / len(cities), slots))
        spoken = {word for _, _, slots in paths for slot in slots for word in slot}
        self.words = SPECIAL + sorted(spoken)
        size = sum(len(slots) for _, _, slots in paths)
        self.start = torch.zeros(size)
        self.transition = torch.zeros(size, size)
        self.emission = torch.zeros(size, len(self.words))
        first, ends, state = [], [], 0
        for world, probability, slots in paths:
            first.append((world, state, probability))
            self.start[state] = probability / len(WORLDS)
            for slot in slots:
                for word in slot:
                    self.emission[state, self.words.index(word)] = 1 / len(slot)
                self.transition[state, min(state + 1, size - 1)] = 1
                state += 1
            ends.append((world, state - 1))
        for world, end in ends:
            self.transition[end] = 0
            for other, begin, probability in first:
                if other == world:
                    self.transition[end, begin] = probability

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`[count, LENGTH]` tokens of real texts."""
        state = torch.multinomial(self.start, count, replacement=True, generator=generator)
        tokens = []
        for _ in range(LENGTH):
            tokens.append(torch.multinomial(self.emission[state], 1, generator=generator)[:, 0])
            state = torch.multinomial(self.transition[state], 1, generator=generator)[:, 0]
        return torch.stack(tokens, dim=1)

    def perplexity(self, tokens: torch.Tensor, smoothing: float = 1e-3) -> float:
        """Perplexity per word of `[count, LENGTH]` tokens.

        With probability `smoothing` a word is any of the vocabulary, and the automaton is anywhere.
        """
        emission = (1 - smoothing) * self.emission + smoothing / len(self.words)
        transition = (1 - smoothing) * self.transition + smoothing / len(self.start)
        state, total = self.start.expand(len(tokens), -1), 0.0
        for column in tokens.T:
            joint = state * emission[:, column].T
            likelihood = joint.sum(-1, keepdim=True)
            total += likelihood.log().sum().item()
            state = joint / likelihood @ transition
        return math.exp(-total / tokens.numel())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word."""
        table = {word: number for number, word in enumerate(self.words)}
        words = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", mask_token="<mask>", eos_token="<end>"
        )


def train(grammar: Grammar, num_texts: int = 8192) -> CoDDPipeline:
    """A masked diffusion model of the grammar's texts, with a head."""
    tokenizer = grammar.tokenizer()
    opening = [grammar.words.index("<text>")]
    texts = grammar.sample(num_texts + 256, torch.Generator().manual_seed(0)).tolist()
    examples = [TokenizedExample(opening, text) for text in texts]
    learned, validation = examples[:num_texts], examples[num_texts:]
    noise = {"max_extra_windows": 0, "mixed_precision": "no"}

    torch.manual_seed(0)
    shape = small_backbone_config(tokenizer, hidden_size=64, num_layers=2)
    backbone = AutoModelForCausalLM.from_config(shape)
    model = CoDDModel.from_backbone(backbone, mask_token_id=tokenizer.mask_token_id)
    pretraining = PretrainingConfig(
        max_steps=600,
        tokens_per_batch=128 * (LENGTH + 1),
        learning_rate=1e-2,
        evaluation_steps=300,
        warmup_steps=20,
        **noise,
    ).completed("new")
    fit_backbone(model, tokenizer, learned, validation, pretraining, window_length=LENGTH)

    num_latents = 40
    windows = [text_windows(part, LENGTH, tokenizer.eos_token_id) for part in (learned, validation)]
    potentials, _ = fit_generative(
        *windows,
        backbone.get_output_embeddings().weight.detach(),
        num_latents,
        GenerativeConfig(num_epochs=6),
    )
    special = [grammar.words.index(word) for word in SPECIAL if word != "<mask>"]
    head = CoDDHead(
        CoDDHeadConfig(
            vocab_size=len(grammar.words),
            num_latents=num_latents,
            window_length=LENGTH,
            mask_token_id=tokenizer.mask_token_id,
            forbidden_token_ids=special,
        )
    )
    head.set_potentials(potentials)
    model = CoDDModel.from_backbone(backbone, head)
    fit_conditional(
        model,
        tokenizer,
        learned,
        validation,
        ConditionalConfig(
            max_steps=200,
            windows_per_batch=128,
            learning_rate=1e-2,
            evaluation_steps=200,
            warmup_steps=20,
            **noise,
        ),
    )
    return CoDDPipeline(model, CoDDScheduler(), tokenizer)


def main(passes: tuple[int, ...] = (1, 2, 4, 8, 16), num_texts: int = 256) -> dict:
    """Trains, generates and prints the table.

    Returns:
        `real`, the perplexity of real text; `factorized` and `coupled`, by number of passes.
    """
    started = time.monotonic()
    grammar = Grammar()
    pipe = train(grammar)
    pipe.set_progress_bar_config(disable=True)
    prompts = [[grammar.words.index("<text>")]] * num_texts
    real = grammar.perplexity(grammar.sample(4096, torch.Generator().manual_seed(1)))
    result: dict = {"real": real, "factorized": {}, "coupled": {}}
    shown = {}
    for number in passes:
        for name, sampling in (("factorized", "factorized"), ("coupled", "latent")):
            tokens = pipe(
                input_ids=prompts,
                gen_length=LENGTH,
                block_length=LENGTH,
                num_inference_steps=number,
                strategy="random",
                sampling=sampling,
                temperature=1.0,
                generator=torch.Generator().manual_seed(2),
                output_type="seq",
            ).sequences
            result[name][number] = grammar.perplexity(tokens)
            shown.setdefault(name, pipe.tokenizer.decode(tokens[0]))
    print(f"\nIn {passes[0]} pass, factorized: {shown['factorized']}")
    print(f"In {passes[0]} pass, coupled:    {shown['coupled']}\n")
    print("perplexity under the grammar, per word")
    print(f"passes  {'factorized':>10}  {'coupled':>8}  {'real text':>9}")
    for number in passes:
        factorized, coupled = result["factorized"][number], result["coupled"][number]
        print(f"{number:>6}  {factorized:>10.2f}  {coupled:>8.2f}  {real:>9.2f}")
    print(f"{time.monotonic() - started:.0f} s")
    return result


if __name__ == "__main__":
    main()
