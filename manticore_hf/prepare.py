"""The stages without gradients: compose and calibrate. Each writes a hybrid that loads, with its tokenizer."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from manticore_hf.calibrate import calibrate_projectors
from manticore_hf.data import load_rows
from manticore_hf.modeling.modeling_manticore import ManticoreForCausalLM

RESULT = "stage.json"


def finished(output):
    """The result of a stage that has ended in this directory, or None."""
    file = Path(output) / RESULT
    return json.loads(file.read_text()) if file.is_file() else None


def record(output, result):
    """Writes a stage's result; by rename and last, because its presence says that the stage has ended."""
    scratch = Path(output) / f".{RESULT}"
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, Path(output) / RESULT)
    return result


def run_compose(components, output, seed=0, dtype=None, **settings):
    """Joins components into a hybrid and saves it with the tokenizer of its tokenizer component.

    Args:
        components: As `ManticoreForCausalLM.from_components` takes them.
        output: Directory to write.
        seed: Random seed of the initial projectors.
        dtype: Of the weights.
        **settings: Keys of ManticoreConfig.

    Returns:
        The stage's result: components, blocks, parameters, bytes of the hybrid's own weights.
    """
    if (result := finished(output)) is not None:
        print(f"{output}: this stage is finished; delete {RESULT} there to run it again.")
        return result
    set_seed(seed)
    model = ManticoreForCausalLM.from_components(components, dtype=dtype, **settings)
    names = model.config.component_names
    entry = model.config.components[names.index(model.config.tokenizer_component)]
    source = entry["repo_id"] or components[names.index(entry["name"])]
    model.save_pretrained(output)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=entry["revision"] or "main")
        tokenizer.save_pretrained(output)
    except (OSError, ValueError) as err:
        print(f"No tokenizer was saved: {source} has none that can be read ({err}).", file=sys.stderr)
    own = sum(file.stat().st_size for file in Path(output).glob("*.safetensors"))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"\ncompose: {' + '.join(names)} in {model.config.num_blocks} block(s)")
    print(f"{model.num_parameters():,} parameters; {own:,} bytes of weights written, {whole:,} with all components")
    result = {"stage": "compose", "components": names, "num_blocks": model.config.num_blocks}
    return record(output, {**result, "parameters": model.num_parameters(), "own_bytes": own})


def run_calibrate(start, data, output, tokens=40_000, batch_size=8, reference=None, dtype="float32"):
    """Calibrates a saved hybrid's projectors and saves the result.

    Args:
        start: Hybrid: directory or Hub repo.
        data: DataArguments; validation_fraction is not used, the ridge is chosen on tokens held out inside.
        output: Directory to write.
        tokens: Tokens to use.
        batch_size: Rows per forward pass.
        reference: The reference component; default: the one with the lowest loss.
        dtype: Of the weights while calibrating.

    Returns:
        The stage's result: reference, losses of the components, R^2 of each map.
    """
    if (result := finished(output)) is not None:
        print(f"{output}: this stage is finished; delete {RESULT} there to run it again.")
        return result
    model = ManticoreForCausalLM.from_pretrained(start, dtype=dtype)
    if torch.cuda.is_available():
        model.cuda()
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows, _ = load_rows(data, tokenizer)
    found = calibrate_projectors(model, rows, tokens=tokens, batch_size=batch_size, reference=reference)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"\ncalibrate: {found.tokens:,} tokens, reference {found.reference}")
    for name, loss in found.losses.items():
        print(f"{name:>24}  {loss:.4f} nats per token")
    for key, score in found.r2.items():
        print(f"{key:>32}  R^2 {score:6.3f}  ridge {found.ridges[key]:g}")
    result = {"stage": "calibrate", "reference": found.reference, "losses": found.losses, "r2": found.r2}
    return record(output, {**result, "ridges": found.ridges, "tokens": found.tokens})
