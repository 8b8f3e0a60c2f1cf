"""A hybrid's bits per byte and loss on a text, beside every baseline: `manticore-hf evaluate --data`.

manticore-hf evaluate --model org/hybrid --data text.txt
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.untouched import measure_originals
from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.evaluation.gguf_sources import say_gguf
from manticore_hf.evaluation.losses import how_measured, make_passages, measure, name_of
from manticore_hf.training.originals import find_originals
from manticore_hf.utils.claims import ORIGINAL, claim, itself, more_rows
from manticore_hf.utils.files import write_json
from manticore_hf.utils.formatting import signed
from manticore_hf.utils.tokenizers import read_tokenizer

RESULT = "evaluation.json"


def run_evaluate(
    source: str | os.PathLike,
    data: DataArguments,
    batch_size: int = 8,
    output: str | os.PathLike | None = None,
    components: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Prints (and writes) what a saved hybrid and its baselines lose on a text.

    The baselines are its components by their own heads inside it, their plain ensemble, their online mixture (weights
    from their losses on the tokens before, by the hybrid's online_eta, online_decay and online_share), and each
    original component, with its own tokenizer.

    Args:
        source: Hybrid: directory or Hub repo.
        data: DataArguments with validation_fraction 0.
        batch_size: Rows per forward pass.
        output: Directory for `evaluation.json`, or None.
        components: Where the original components are, in the hybrid's order. Default: the addresses that the hybrid
            knows, or what is known of its making (`find_originals`).

    Returns:
        {"data", "note", "tokens", "bytes", "losses", "bits_per_byte", "differences", "missing"}, as `Measured.to_dict`
        and `evaluation.json` have them.

    Raises:
        ManticoreError: The text or the components cannot be used.
    """
    model = ManticoreForCausalLM.from_pretrained(source, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, config = read_tokenizer(source), model.config
    rows, _ = load_rows(data, tokenizer, keep_text=True, keep_rest=True)
    sources = find_originals(source, config, components)
    passages = make_passages(rows, tokenizer)
    found = measure(model, passages, batch_size)
    device, fresh = model.device, config.embeddings == "fresh"
    del model
    measure_originals(found, config, passages, tokenizer, sources, batch_size, device, ensemble=fresh)
    result = {"data": name_of(data), "note": f"{how_measured(data)} {say_gguf(sources)}".strip(), **found.to_dict()}
    print_result(source, result, config.mixture)
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        write_json(Path(output) / RESULT, result)
    return result


def print_result(source: str | os.PathLike, result: Mapping[str, Any], mixture: str | None = None) -> None:
    """Prints a result of `run_evaluate`, best first, with what can be said of the best baseline.

    Args:
        source: What the hybrid is called.
        result: The result.
        mixture: The hybrid's setting; None if it is not known.
    """
    bits, own = result["bits_per_byte"], "hybrid"
    print(f"{source} on {result['data']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes of text")
    same = itself(result["losses"], result["differences"], own, mixture)
    bits = {name: value for name, value in bits.items() if name not in same}
    width = max(map(len, bits))
    print(f"{'':>{width}}  bits per byte  nats per token  baseline - hybrid, bits per byte (95 %)")
    for name in sorted(bits, key=bits.get):
        line = f"{name:>{width}}  {bits[name]:13.4f}  {result['losses'][name]:14.4f}"
        if name != own:
            gain, low, high = result["differences"][name]
            line += f"  {signed(gain, 4)}" + (f" ({signed(low, 4)} to {signed(high, 4)})" if low is not None else "")
        print(line)
    if any(name.startswith(ORIGINAL.format("")) for name in bits):
        print('Components are measured inside the hybrid and, as "original", as they came, with their own tokenizers.')
    for name in same:
        print(f"The hybrid is the {name} of its components, which is therefore no baseline.")
    for name, why in result["missing"].items():
        print(f"{name}: not measured. {why}")
    others = [name for name in bits if name != own]
    if others:
        best = min(others, key=bits.get)
        named, rows = f"the best baseline ({best})", result.get("rows")
        said = claim(named, result["differences"][best], result["bytes"], "The hybrid", rows)
        print(f"{said} {more_rows(rows, result['bytes'])}".strip())
