"""Alpha programmed with MAD for one pair of families, and profiles of several, at easy sizes.

    python benchmarks/mad_program.py DIR --output benchmarks/results/mad_program.json    # half an hour on a busy core

At the defaults of ProgramSettings and EasySettings: 32 tokens, 1600 sequences, two layers of width 64, 400 steps of 32.
Finished runs in DIR are not repeated. DIR/profile holds the picture.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from manticore_hf.experiments import TASKS, EasySettings, ProgramSettings, mad_profile, program_alpha
from manticore_hf.training.programs import program_lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where each run's JSON goes")
    parser.add_argument("--output", type=Path, help="write all results to this file")
    parser.add_argument("--pair", nargs="+", default=["llama", "mamba"])
    parser.add_argument("--families", nargs="+", default=["gpt_neox", "llama", "mamba", "mamba2"])
    parser.add_argument("--seeds", type=int, default=2, help="of the programmed alpha")
    parser.add_argument("--profile-seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    settings = ProgramSettings(seeds=args.seeds)
    found = program_alpha(args.pair, list(TASKS), 1, args.directory / "program", settings)
    print("\n".join(program_lines(args.pair, found.alpha.tolist(), found.record())))
    results = {"families": args.pair, "alpha": found.alpha.tolist(), "tasks": found.record(), "runs": found.runs}
    results = {"programmed": results}
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    sizes = EasySettings(seeds=args.profile_seeds)
    results["profile"] = mad_profile(args.families, args.directory / "profile", settings=sizes)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
