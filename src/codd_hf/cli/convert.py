"""Turn a circuit that PyJuice saved (.jpc) into a head repository, without running it."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checks.settings import Settings
from .common import add_flags, quiet_loading, settings_from

EXAMPLE = """example:
  codd-hf convert il18/llada-math-pc heads/llada-math --mask-token-id 126336 \\
      --base-model GSAI-ML/LLaDA-8B-Instruct
  codd-hf convert model.jpc heads/mine --alpha 1 --push-to-hub me/mine --license apache-2.0

The licence of a circuit is not in its file: to share a converted one, say which it is."""


@dataclass
class ConvertSettings(Settings):
    """The settings of a conversion."""

    source: str
    """a .jpc file, a folder with model.jpc, or the id of such a repository on the Hub"""
    output: str
    """a new folder, for the head"""
    alpha: float = 0.0
    """power of the token marginal that is divided out; 0: the circuit as it is"""
    mask_token_id: int | None = None
    """the backbone's mask token"""
    base_model: str | None = None
    """id of the backbone that the circuit belongs to"""
    push_to_hub: str | None = None
    """upload the head to this repository"""
    license: str | None = None
    """licence of the head, as the Hub names it"""


add_arguments = partial(add_flags, kind=ConvertSettings, positional=("source", "output"))


def run(args: argparse.Namespace) -> None:
    """Converts, and pushes if asked to."""
    settings = settings_from(args, ConvertSettings)
    from ..conversion import convert_jpc

    if settings.push_to_hub is not None and settings.license is None:
        raise ValueError(
            "`--push-to-hub` needs `--license`: a circuit's file does not say under which licence "
            "it may be shared, so say it (ask its authors)."
        )
    folder = Path(settings.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`output` {folder} is a file, or not empty: give a new folder.")
    quiet_loading()
    head = convert_jpc(
        settings.source,
        alpha=settings.alpha,
        mask_token_id=settings.mask_token_id,
        base_model_name_or_path=settings.base_model,
    )
    head.save_pretrained(folder)
    config = head.config
    print(
        f"The head is in {settings.output}: {config.num_latents:,} states, window "
        f"{config.window_length}, {config.vocab_size:,} tokens, alpha {config.alpha:g}."
    )
    if settings.push_to_hub is not None:
        commit = head.push_to_hub(settings.push_to_hub, license=settings.license)
        print(f"Uploaded: {commit.commit_url}")
