"""python examples/train.py

Trains a hybrid with the standard Trainer: first what joins the components (here the gate that weights them for each
token), then everything. Prints its loss next to each component's and their ensemble's, before and after training (the
components predict with their own heads inside the hybrid), and plots them all. Uses only what ships with the package;
takes about a minute.
"""

import argparse
import tempfile
from importlib.resources import files

from transformers import AutoTokenizer, Trainer, TrainingArguments

from manticore_hf import ManticoreForCausalLM, choose_objective, set_stage
from manticore_hf.demo.text import documents
from manticore_hf.evaluation.data import pack
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.utils.plots import plot_losses

SHIPPED = [str(files("manticore_hf") / "demo_components" / name) for name in ("neox-prose", "mamba-code")]


def report(label, losses):
    print(f"{label}, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return {f"{name}, {label}": loss for name, loss in losses.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="training rows of 128 tokens for each kind of text")
    parser.add_argument("--output-dir", help="where to save the hybrid (default: nowhere)")
    parser.add_argument("--picture", default="train.png", help="where to draw the losses (default: %(default)s)")
    args = parser.parse_args()

    model = ManticoreForCausalLM.from_components(SHIPPED, num_blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED[0])
    texts = {
        split: documents("prose", split)[: args.rows] + documents("code", split)[: args.rows]
        for split in ("train", "test")
    }
    train = pack(texts["train"], tokenizer, 128).shuffle(seed=0).select(range(2 * args.rows))
    test = pack(texts["test"], tokenizer, 128).shuffle(seed=0).select(range(min(64, args.rows)))
    found = report("before", compare_losses(model, test))
    choose_objective(model, train)  # complementary errors? then train on the mixture's loss alone
    for stage, rate in (("projectors", 3e-3), ("finetune", 3e-4)):
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, learning_rate=rate, num_train_epochs=1, report_to="none", save_strategy="no", disable_tqdm=True
            )
            Trainer(set_stage(model, stage), settings, train_dataset=train).train()
        found |= report(f"after {stage}", compare_losses(model, test))
    if args.output_dir:
        model.save_pretrained(args.output_dir)
    plot_losses(found, args.picture)
    print(f"drawn: {args.picture}")
