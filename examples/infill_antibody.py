"""A head for a model that nobody here trained: AntiBERTy, and what coupling buys when it infills.

AntiBERTy (arXiv 2112.07782) is a BERT of 26 M parameters for antibody sequences. A head is fitted
to heavy chains; of others CDR3, the loop that differs most, or 16 residues anywhere are masked and
filled in, factorized and coupled.

    pip download --no-deps --only-binary :all: -d wheels antiberty==0.1.3 abnativ==2.0.9
    python examples/infill_antibody.py --wheels wheels --json antibody.json

Both wheels are read as archives; nothing in them is installed or run. AntiBERTy, its weights
included, is under the MIT licence. The sequences (test data of AbNatiV, from the Observed Antibody
Space, OAS) are under CC BY-NC-SA 4.0: for non-commercial use. AntiBERTy was trained on OAS and may
know all of them; the head has seen nothing alike those that figures are of (`far_apart`).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from codd_hf import CoDDPipeline
from codd_hf.evaluation.statistics import ratio
from codd_hf.training import ConditionalConfig, TrainConfig, train

MODEL = "antiberty/trained_models/AntiBERTy_md_smooth"
VOCABULARY = "antiberty/trained_models/vocab.txt"
SEQUENCES = "abnativ/model/percentiles/test_vh_v2_abnativ_seq_scores.csv"
UNUSED = ("bert.pooler", "bert.embeddings.position_ids", "cls.species", "cls.chain", "cls.graft")
LOOP = slice(106, 138)  # CDR3 in AHo's columns: between the conserved C and W
GAP = ord("-")
SPAN = 16
ALIKE, ALIKE_LOOP = 0.9, 0.6  # identity over columns that either sequence fills
PASSES = (1, 2, 4, 8)
ORDERS = ("low_confidence", "margin", "entropy", "left_to_right")
SIDES = {  # as many settings on each side, of which validation chooses one
    "factorized": [("factorized", order) for order in ORDERS],
    "coupled": [(mode, order) for mode in ("marginal", "viterbi") for order in ORDERS[:2]],
}


def convert(wheel: Path, folder: Path) -> None:
    """Writes the model in AntiBERTy's wheel as transformers' BERT, with a tokenizer."""
    with zipfile.ZipFile(wheel) as archive:
        fields = json.loads(archive.read(f"{MODEL}/config.json"))
        stored = io.BytesIO(archive.read(f"{MODEL}/pytorch_model.bin"))
        tokens = archive.read(VOCABULARY).decode().split()
    weights = torch.load(stored, map_location="cpu", weights_only=True)
    for name in ("_name_or_path", "architectures"):
        fields.pop(name, None)
    model = BertForMaskedLM(BertConfig(**fields))
    model.load_state_dict({n: w for n, w in weights.items() if not n.startswith(UNUSED)})
    model.save_pretrained(folder)
    # A token for each residue, [CLS] before and, as end-of-text, [SEP] behind.
    ids = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    begin = [("[CLS]", ids["[CLS]"])]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=begin)
    core.decoder = decoders.Fuse()
    names = {"cls_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    names |= {"unk_token": "[UNK]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def read_sequences(wheel: Path, seed: int) -> torch.Tensor:
    """All heavy chains, aligned: letters `[n, columns]` (uint8), in random order."""
    with zipfile.ZipFile(wheel) as archive, archive.open(SEQUENCES) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "ascii"))
        letters = torch.tensor([list(row["aligned_seq"].encode()) for row in rows])
    generator = torch.Generator().manual_seed(seed)
    return letters.to(torch.uint8)[torch.randperm(len(letters), generator=generator)]


def text_of(row: torch.Tensor) -> str:
    """The residues of an aligned sequence."""
    return bytes(row[row != GAP].tolist()).decode()


def far_apart(letters: torch.Tensor, held: int, fitted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to hold out and to fit to: no two are alike of which one is held out."""
    chosen: list[int] = []
    left = torch.ones(len(letters), dtype=torch.bool)
    while len(chosen) < held:
        chosen.append(int(left.long().argmax()))
        filled = (letters != GAP) | (letters[chosen[-1]] != GAP)
        equal = (letters == letters[chosen[-1]]) & filled
        left &= equal.sum(1) < ALIKE * filled.sum(1)
        left &= equal[:, LOOP].sum(1) < ALIKE_LOOP * filled[:, LOOP].sum(1)
    return letters[chosen], letters[left][:fitted]


class Template(NamedTuple):
    """Tokens of a sequence, and where they are masked."""

    ids: list[int]
    span: slice

    def masked(self, mask: int) -> list[int]:
        """The tokens with mask tokens in the span."""
        hidden = range(len(self.ids))[self.span]
        return [mask if place in hidden else token for place, token in enumerate(self.ids)]


def templates(pipe: CoDDPipeline, letters: torch.Tensor, task: str, seed: int) -> list[Template]:
    """Masks CDR3 (`cdr3`) or `SPAN` residues anywhere (`span`) of each sequence."""
    found, generator = [], torch.Generator().manual_seed(seed)
    for row in letters:
        ids = [*pipe.tokenizer.encode(text_of(row)), pipe.tokenizer.eos_token_id]
        begin, size = 1 + int((row[: LOOP.start] != GAP).sum()), int((row[LOOP] != GAP).sum())
        if task == "span":
            begin = 1 + int(torch.randint(len(ids) - 1 - SPAN, (), generator=generator))
            size = SPAN
        found.append(Template(ids, slice(begin, begin + size)))
    return found


def recovery(pipe: CoDDPipeline, some: Sequence[Template], **call) -> torch.Tensor:
    """`[3, n]`: residues that come out right, that were masked, and whether all are right."""
    columns, mask = [], pipe.model.config.mask_token_id
    call |= {"infill": True, "temperature": 0.0, "output_type": "seq"}
    for start in range(0, len(some), 16):
        part = some[start : start + 16]
        output = pipe(input_ids=[template.masked(mask) for template in part], **call)
        for template, row in zip(part, output.sequences.tolist(), strict=True):
            pairs = zip(row[template.span], template.ids[template.span], strict=True)
            right = [drawn == true for drawn, true in pairs]
            columns.append([sum(right), len(right), all(right)])
    return torch.tensor(columns, dtype=torch.float64).T


@torch.no_grad()
def joint_nats(pipe: CoDDPipeline, some: Sequence[Template]) -> torch.Tensor:
    """`[2, n]`: nats of all that was masked after one pass, factorized and coupled."""
    columns, mask = [], pipe.model.config.mask_token_id
    for template in some:
        canvas = pipe.prepare(input_ids=template.masked(mask), infill=True)
        where = canvas.tokens, canvas.window_origin, canvas.attention_mask
        states = pipe.model.backbone_states(canvas.tokens, canvas.attention_mask)
        distribution = pipe.model.window_distribution(states, *where)
        places = canvas.window_origin[:, None] + torch.arange(pipe.model.window_length)
        truth = torch.tensor([template.ids])[:, places[0].clamp(max=len(template.ids) - 1)]
        tokens = distribution.factorized_logits.log_softmax(-1).gather(-1, truth[..., None])
        factorized = tokens[..., 0].masked_fill(~distribution.masked, 0).sum()
        columns.append([-factorized.item(), -distribution.log_prob(truth).item()])
    return torch.tensor(columns, dtype=torch.float64).T


def compared(factorized: torch.Tensor, coupled: torch.Tensor, whole: torch.Tensor) -> dict:
    """Shares of a whole `[n]` on both sides, and their paired difference."""
    one, other = ratio(factorized, whole), ratio(coupled, whole)
    figures = {"factorized": one, "coupled": other, "difference": other - one}
    return {name: figure.as_dict() for name, figure in figures.items()}


def measure(pipe: CoDDPipeline, validation: list[Template], test: list[Template]) -> dict:
    """Figures of a task; each side's setting has most residues right on validation, in 2 passes."""
    sizes = torch.tensor([len(t.ids[t.span]) for t in test])
    result: dict = {"nats_per_residue": compared(*joint_nats(pipe, test), sizes), "settings": {}}
    print(f"nats per residue: {json.dumps(result['nats_per_residue'])}", flush=True)
    for side, settings in SIDES.items():
        calls = [{"sampling": sampling, "strategy": strategy} for sampling, strategy in settings]
        rights = [recovery(pipe, validation, num_inference_steps=2, **c)[0].sum() for c in calls]
        result["settings"][side] = calls[int(torch.stack(rights).argmax())]
    for passes in PASSES:
        (right, size, exact), (coupled_right, _, coupled_exact) = (
            recovery(pipe, test, num_inference_steps=passes, **result["settings"][side])
            for side in SIDES
        )
        spans = compared(exact, coupled_exact, torch.ones_like(exact))
        figures = {"residues": compared(right, coupled_right, size), "spans": spans}
        result[str(passes)] = figures
        print(f"{passes} passes: {json.dumps(figures)}", flush=True)
    return result


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder of both wheels")
    parser.add_argument("--output", type=Path, default=Path("runs/antibody"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    for name, number in {"train": 960, "validation": 32, "test": 64, "latents": 64}.items():
        parser.add_argument(f"--num-{name}", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    # 1. The model, and sequences: for the fit, for its choices, and for figures.
    backbone, dataset = args.output / "backbone", args.output / "heavy_chains.jsonl"
    convert(next(args.wheels.glob("antiberty-*.whl")), backbone)
    letters = read_sequences(next(args.wheels.glob("abnativ-*.whl")), args.seed)
    num_held = args.num_validation + args.num_test
    few = letters[: 2 * (num_held + args.num_train)]  # about a third of which is left out
    held, fitted = far_apart(few, num_held, args.num_train)
    rows = [json.dumps({"text": text_of(r)}) for r in (*fitted, *held[: args.num_validation])]
    dataset.write_text("\n".join(rows) + "\n")

    # 2. The head. In each sequence a window of 32 is noised, anywhere, the rest being visible.
    config = TrainConfig(
        dataset=str(dataset),
        backbone=str(backbone),
        output_dir=str(args.output),
        num_latents=args.num_latents,
        conditioning=["latent"],
        num_validation=args.num_validation,
        num_gap_problems=0,
        conditional=ConditionalConfig(num_draws=1, infill=True, mean_span_length=8.0),
    )
    pipe = CoDDPipeline.from_pretrained(train(config))
    pipe.set_progress_bar_config(disable=True)

    # 3. Figures.
    result: dict = {"arguments": {k: v for k, v in vars(args).items() if isinstance(v, int)}}
    for task in ("cdr3", "span"):
        found = templates(pipe, held, task, args.seed)
        result[task] = measure(pipe, found[: args.num_validation], found[args.num_validation :])
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
