"""python examples/sft.py

Supervised fine-tuning with TRL's SFTTrainer on prompts and completions: the first line of a piece of code is the
prompt, the rest is the answer. Prints the hybrid's loss next to each component's and their ensemble's, before and after
training, on code it was not trained on, and plots how much each component contributes to each token. Uses only what
ships with the package; needs `pip install trl`.
"""

import argparse
import tempfile
from importlib.resources import files

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from manticore_hf import ManticoreForCausalLM, set_stage
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.utils.plots import plot_weights

SHIPPED = [str(files("manticore_hf") / "demo_components" / name) for name in ("neox-prose", "mamba-code")]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128, help="prompts with their completions to train on")
    parser.add_argument("--picture", default="sft.png", help="where to draw the weights (default: %(default)s)")
    args = parser.parse_args()

    model = ManticoreForCausalLM.from_components(SHIPPED, num_blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED[0])
    pairs = [text.partition("\n") for text in documents("code", "train")[: args.examples]]
    rows = Dataset.from_list([{"prompt": first, "completion": end + rest} for first, end, rest in pairs])
    test = pack(documents("code", "test"), tokenizer, 128, min(64, args.examples))

    found = {"before": compare_losses(model, test)}
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=128,
            learning_rate=3e-4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            num_train_epochs=1,
            bf16=torch.cuda.is_available(),
        )
        SFTTrainer(set_stage(model, "finetune"), settings, train_dataset=rows, processing_class=tokenizer).train()
    found["after"] = compare_losses(model, test)
    for label, losses in found.items():
        print(f"{label}, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    row = test[:1]["input_ids"][0][:80]
    with torch.no_grad():
        weights = model.eval()(torch.tensor([row], device=model.device)).weights[0]
    plot_weights(weights, model.config.component_names, args.picture, [tokenizer.decode(one) for one in row])
    print(f"drawn: {args.picture}")
