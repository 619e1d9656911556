"""A masked language model of chemical reactions as a backbone, taken as it is.

The checkpoint is a folder with `config.json`, `pytorch_model.bin` and `vocab.txt` of a BERT-like
model of reaction SMILES, such as the ALBERT of RXNMapper. Its weights are converted to safetensors
once. A new head changes nothing, so the coupled predictions are the model's own; then the end of a
reaction is masked and filled in.

    python examples/complete_reaction.py --checkpoint path/to/rxn_albert_mlm
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from codd_hf import CoDDHeadConfig, CoDDModel, CoDDPipeline, CoDDScheduler

# Atoms in brackets, two-letter elements, ring closures above 9 and the arrow are one token each.
SMILES_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[A-Za-z0-9()=#\-+./\\:~@?>*$]")
WINDOW = 32
# What is given, and the masked tail. Chosen among a dozen that were tried, to show it at work: with
# RXNMapper's ALBERT, whole products and other spellings (`CC(=O)O.OCC>>`) come out wrong.
REACTIONS = [
    ("esterification", "CC(=O)O.CCO>>CCOC(C", ")=O"),
    ("esterification of benzoic acid", "CCO.O=C(O)c1ccccc1>>CCOC(", "=O)c1ccccc1"),
    ("amide from an acid chloride", "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1", "ccccc1"),
    ("Suzuki coupling", "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2", "ccccc2)cc1"),
]


def convert_weights(checkpoint: Path, folder: Path) -> None:
    """Writes the checkpoint to `folder` as safetensors, unless that was done before."""
    target = folder / "model.safetensors"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # Tied weights share memory, which safetensors does not store.
    weights = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(weights, target, metadata={"format": "pt"})


class SmilesTokenizer:
    """Reaction SMILES to ids and back, by a regular expression and a list of tokens."""

    def __init__(self, vocabulary: Path):
        self.tokens = vocabulary.read_text().splitlines()
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, smiles: str) -> list[int]:
        tokens = SMILES_TOKEN.findall(smiles)
        if "".join(tokens) != smiles:
            raise ValueError(f"`smiles` has parts that are no token: {smiles!r}.")
        return [self.ids.get(token, self.ids["[UNK]"]) for token in tokens]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


def load_model(checkpoint: Path, work_dir: Path, tokenizer: SmilesTokenizer) -> CoDDModel:
    """The checkpoint as a backbone, with a new head that changes nothing."""
    convert_weights(checkpoint, work_dir)
    mask = tokenizer.ids["[MASK]"]
    # The special tokens come first in the list; they are no part of a molecule.
    head = CoDDHeadConfig(
        vocab_size=len(tokenizer.tokens),
        num_latents=16,
        window_length=WINDOW,
        mask_token_id=mask,
        forbidden_token_ids=list(range(mask)),
    )
    return CoDDModel.from_backbone(work_dir, head)


@torch.no_grad()
def difference_of_marginals(model: CoDDModel, prompt: list[int], num_masked: int) -> float:
    """The largest difference between coupled and factorized marginals behind a prompt."""
    input_ids = torch.tensor([prompt + [model.config.mask_token_id] * num_masked])
    distribution = model(input_ids, return_distribution=True).distribution
    difference = distribution.marginals - distribution.factorized_logits.exp()
    return difference.abs().max().item()


def main(checkpoint: Path, work_dir: Path) -> dict:
    """Completes the reactions and prints what comes out.

    Returns:
        `difference`, the largest between coupled and factorized marginals; `completions`, of each
        reaction by name: what the model wrote and the truth.
    """
    tokenizer = SmilesTokenizer(checkpoint / "vocab.txt")
    model = load_model(checkpoint, work_dir, tokenizer)
    pipe = CoDDPipeline(model, CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)

    result: dict = {"difference": 0.0, "completions": {}}
    for name, given, truth in REACTIONS:
        prompt = [tokenizer.ids["[CLS]"], *tokenizer.encode(given)]
        gen_length = len(tokenizer.encode(truth))
        difference = difference_of_marginals(model, prompt, gen_length)
        result["difference"] = max(result["difference"], difference)
        output = pipe(
            input_ids=prompt,
            gen_length=gen_length,
            block_length=gen_length,
            num_inference_steps=gen_length,
            sampling="latent",
            temperature=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="seq",
        )
        completion = tokenizer.decode(output.sequences[0].tolist())
        result["completions"][name] = (completion, truth)
        print(f"{name}\n  given      {given}\n  completed  {completion}\n  truth      {truth}")
    print(f"coupled and factorized marginals differ by at most {result['difference']:.1e}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model's folder")
    parser.add_argument("--work-dir", type=Path, help="where the converted weights are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.checkpoint, arguments.work_dir or Path(temporary))
