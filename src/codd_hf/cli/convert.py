"""`codd-hf convert`: from a PyJuice circuit to a head repository."""

from __future__ import annotations

import argparse

from .common import quiet_loading

HELP = "Turn a circuit that PyJuice saved (.jpc) into a head repository, without unpickling it."
EXAMPLE = """example:
  codd-hf convert il18/llada-math-pc heads/llada-math --mask-token-id 126336 \\
      --base-model GSAI-ML/LLaDA-8B-Instruct
  codd-hf convert model.jpc heads/mine --alpha 1 --push-to-hub me/mine --license apache-2.0

SOURCE is a .jpc file, a folder with model.jpc, or the id of such a repository on the Hub. The
licence of a circuit is not in its file: to share a converted one, say which it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a .jpc file, a folder or an id")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder, for the head")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.0,
        help="power of the token marginal that is divided out (default 0: the circuit as it is)",
    )
    parser.add_argument("--mask-token-id", type=int, help="the backbone's mask token")
    parser.add_argument(
        "--forbidden-token-ids", type=int, nargs="+", help="tokens that are never generated"
    )
    parser.add_argument("--base-model", help="id of the backbone that the circuit belongs to")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--cache-dir", help="of the Hub")
    parser.add_argument(
        "--local-files-only", action="store_true", help="take SOURCE from the Hub's cache"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write into OUTPUT though it is not empty"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the head to this repository")
    parser.add_argument("--license", help="licence of the head, as the Hub names it")


def run(args: argparse.Namespace) -> None:
    from ..conversion import convert_jpc

    if args.push_to_hub is not None and args.license is None:
        raise ValueError(
            "`--push-to-hub` needs `--license`: a circuit's file does not say under which licence "
            "it may be shared, so say it (ask its authors)."
        )
    quiet_loading()
    head = convert_jpc(
        args.source,
        output=args.output,
        alpha=args.alpha,
        mask_token_id=args.mask_token_id,
        forbidden_token_ids=args.forbidden_token_ids,
        base_model_name_or_path=args.base_model,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        overwrite=args.overwrite,
    )
    config = head.config
    print(
        f"The head is in {args.output}: {config.num_latents:,} states, window "
        f"{config.window_length}, {config.vocab_size:,} tokens, alpha {config.alpha:g}."
    )
    if args.push_to_hub is not None:
        commit = head.push_to_hub(args.push_to_hub, license=args.license)
        print(f"Uploaded: {commit.commit_url}")
