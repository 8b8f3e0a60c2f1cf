"""python examples/lora.py

LoRA on a hybrid with PEFT: `lora_config` chooses targets that train the same way on every machine (it leaves out
Mamba's raw and fused projections), and fully trains what joins the components. Prints the hybrid's loss next to each
component's and their ensemble's, before and after training, and plots them all. Uses only what ships with the package;
needs `pip install 'manticore-hf[peft]'`.
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

from peft import get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

from manticore_hf import ManticoreForCausalLM, lora_config
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.utils.plots import plot_losses

SHIPPED = [str(files("manticore_hf") / "demo_components" / name) for name in ("neox-prose", "mamba-code")]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="training rows of 128 tokens")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--picture", default="lora.png", help="where to draw the losses (default: %(default)s)")
    args = parser.parse_args()

    hybrid = ManticoreForCausalLM.from_components(SHIPPED, num_blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED[0])
    train = pack(documents("code", "train"), tokenizer, 128, args.rows)
    test = pack(documents("code", "test"), tokenizer, 128, min(64, args.rows))
    found = {"before": compare_losses(hybrid, test)}
    model = get_peft_model(hybrid, lora_config(hybrid, r=args.rank))
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, learning_rate=1e-3, num_train_epochs=1, report_to="none", save_strategy="no", disable_tqdm=True
        )
        Trainer(model, settings, train_dataset=train).train()
        model.save_pretrained(folder)
        print(f"adapter: {Path(folder, 'adapter_model.safetensors').stat().st_size:,} bytes")
    found["after"] = compare_losses(model.get_base_model(), test)  # PEFT has inserted the adapters into it
    drawn = {}
    for label, losses in found.items():
        print(f"{label}, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        drawn |= {f"{name}, {label}": loss for name, loss in losses.items()}
    plot_losses(drawn, args.picture)
    print(f"drawn: {args.picture}")
