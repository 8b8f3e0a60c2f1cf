"""python examples/publish.py

Publishes a hybrid and loads it back. Without `--owner`, this is a dry run against a Hub that the script starts on your
own machine; with `--owner you` it uses the real one and creates three private repositories: two components and the
hybrid, which holds a few kB and references them by commit. Prints the hybrid's loss next to its components' and their
ensemble's, and plots how much worse each of these is, with intervals.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.resources import files

from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from manticore_hf import ManticoreForCausalLM, publish
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import make_passages, measure
from manticore_hf.testing.local_hub import LocalHub
from manticore_hf.utils.plots import plot_differences

SHIPPED = files("manticore_hf") / "demo_components"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", help="your name on the Hub, or an organisation's")
    parser.add_argument("--rows", type=int, default=32, help="test rows of 128 tokens")
    parser.add_argument("--picture", default="publish.png", help="where to draw the differences (default: %(default)s)")
    args = parser.parse_args()
    if args.owner is None:  # again, in a process that finds the local Hub: the client reads its address at import
        with LocalHub() as hub, tempfile.TemporaryDirectory() as home:
            command = [sys.executable, *sys.argv, "--owner", "me"]
            sys.exit(subprocess.run(command, env={**os.environ, **hub.environment(home)}).returncode)

    parts = [f"{args.owner}/{name}" for name in ("neox-prose", "mamba-code")]
    for repo in parts:  # your own would be on the Hub already
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=SHIPPED / repo.split("/")[1])
    model = ManticoreForCausalLM.from_components(parts, num_blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(parts[0])
    done = publish(model, f"{args.owner}/manticore-demo", tokenizer=tokenizer, private=True)
    size = sum(file.size for file in HfApi().list_repo_tree(done.repo_id) if file.path.endswith(".safetensors"))
    print(f"published {done.repo_id}@{done.commit[:7]}: {size:,} bytes of weights")
    loaded = AutoModelForCausalLM.from_pretrained(done.repo_id)  # without this package: trust_remote_code=True
    rows = pack(documents("code", "test"), tokenizer, 128, args.rows, keep_text=True)
    found = measure(loaded, make_passages(rows, tokenizer))
    print("loaded, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in found.losses.items()))
    drawn = [
        {"name": name, "kind": "baseline", "difference": difference, "difference_interval": interval}
        for name, (difference, *interval) in found.differences().items()
    ]
    plot_differences(drawn, "hybrid", args.picture, unit="bits per byte")
    print(f"drawn: {args.picture}")
