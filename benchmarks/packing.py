"""What documents in one row cost: against the same documents as padded rows, and against one text of that length.

    python benchmarks/packing.py --output benchmarks/results/packing.json        # about a minute of one core

CPU time of one thread for forward and backward of a GPT-NeoX and a Mamba (2 layers each, width 128, one block). The
same tokens come packed (one row, `position_ids` that start again), as a padded batch with a mask, in a row each, one
after the other, and as one row that is one text, which is what models that let documents run into each other compute.
Every repeat runs all in turn; ratios are medians over repeats.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

from manticore_hf import ComponentSpec, ManticoreForCausalLM

SHAPES = {
    "8 of 256": [256] * 8,
    "40 to 600": [600, 420, 300, 220, 170, 130, 90, 60, 40],
    "one of 600, 10 of 30": [600, *[30] * 10],
}


def hybrid():
    """A hybrid of one block with random weights."""
    torch.manual_seed(0)
    common = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2}
    parts = [
        GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=512, num_attention_heads=4, **common)),
        MambaForCausalLM(MambaConfig(state_size=16, **common)),
    ]
    specs = [ComponentSpec(part, name=name) for part, name in zip(parts, ("neox", "mamba"))]
    return ManticoreForCausalLM.from_components(specs, verify=False).train()


def ways(lengths):
    """{name: the calls that read documents of these lengths once}."""
    documents = [torch.randint(1, 1024, (1, n)) for n in lengths]
    row, longest = torch.cat(documents, 1), max(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = torch.cat([torch.nn.functional.pad(one, (0, longest - one.shape[1])) for one in documents])
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {
        "packed": [{"input_ids": row, "labels": row, "position_ids": positions}],
        "padded": [{"input_ids": batch, "labels": batch.masked_fill(mask == 0, -100), "attention_mask": mask}],
        "one by one": [{"input_ids": one, "labels": one} for one in documents],
        "one text": [{"input_ids": row, "labels": row}],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = hybrid(), []
    for name, lengths in SHAPES.items():
        times = []
        for _ in tqdm(range(args.repeats + 1), desc=name, disable=None):
            times.append({})
            for way, calls in ways(lengths).items():
                start = time.process_time()
                for call in calls:
                    model(**call, use_cache=False).loss.backward()
                times[-1][way] = time.process_time() - start
                model.zero_grad()
        times = times[1:]  # the first compiles and allocates
        ratios = {
            way: statistics.median(one["packed"] / one[way] for one in times) for way in times[0] if way != "packed"
        }
        rows.append({"documents": name, "tokens": sum(lengths), "packed /": ratios})
        print(rows[-1])
    out = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
