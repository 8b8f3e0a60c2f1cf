"""The losses of a recipe at every fixed alpha of a grid, in one block or in two, beside that of the alpha it searched.

    python benchmarks/fixed_alphas.py paper_ptb.yaml --output-dir DIR                    # 0, 0.1, ..., 1 in one block
    python benchmarks/fixed_alphas.py paper_ptb.yaml --output-dir DIR --blocks 2 --step 0.25

The recipe (a file, or the name of a shipped one) is run as it is, with its search; then the hybrid that its finetune
stage starts from is fixed at each alpha of the grid (of two components; with two blocks at each pair of alphas) and
tuned by that stage. Each is a directory, finished ones are read, so that the same command goes on after a kill.
`DIR/alphas.json` has the losses on the stage's validation text.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import yaml
from manticore_hf.modeling.bounds_manticore import ManticoreError

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.recipe import find_beside, find_recipe, load_recipe, run_recipe, stage_data
from manticore_hf.training.runtime import training_defaults
from manticore_hf.training.stages import STAGES
from manticore_hf.utils.files import write_json
from manticore_hf.utils.tokenizers import read_tokenizer


def at_blocks(path, blocks, output):
    """The recipe with another number of blocks, as a file; it names what the first one names."""
    recipe = load_recipe(path)
    values = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
    values["components"] = [find_beside(one, recipe) for one in recipe.components]
    values["hybrid"] = {**values.get("hybrid", {}), "num_blocks": blocks}
    file = output / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def grid_of(step, blocks):
    """Mixture weights [blocks][2] at every point of the grid."""
    count = round(1 / step)
    points = [round(i / count, 6) for i in range(count + 1)]
    return [[[one, round(1 - one, 6)] for one in chosen] for chosen in itertools.product(points, repeat=blocks)]


def fixed(start, weights, folder):
    """The hybrid that the finetune stage starts from, with its alpha fixed, in a directory."""
    if not (folder / "config.json").exists():
        model = ManticoreForCausalLM.from_pretrained(start)
        model.set_mixture_weights(weights)
        model.save_pretrained(folder)
        read_tokenizer(start).save_pretrained(folder)
    return folder


def measure(path, output, blocks, step, seed=None):
    """Runs what is not finished; the result, as `alphas.json` has it.

    Args:
        path: The recipe.
        output: Directory.
        blocks: Of the hybrid.
        step: Of the grid.
        seed: Instead of the recipe's.
    """
    output.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(path)
    own = recipe.hybrid.get("num_blocks", 1)
    stages = [name for name, _ in recipe.stages]
    if len(recipe.components) != 2 or stages[-2:] != ["search", "finetune"]:
        raise ManticoreError(f"{path}: a grid needs two components and a search before a finetune at the end.")
    file = find_recipe(path) if blocks == own else at_blocks(path, blocks, output)
    runs = run_recipe(file, output / "searched", seed=seed, allow_outside=True)
    start, found = runs[-3][0], runs[-1][1]
    settings = dict(recipe.stages)["finetune"]
    recipe.allow_outside, known = True, STAGES["finetune"]
    names = {field.name for field in dataclasses.fields(known.arguments)}
    chosen = {key: value for key, value in settings.items() if key in names}
    training = {key: value for key, value in settings.items() if key not in {*names, "data"}}
    rows = []
    for weights in grid_of(step, blocks):
        name = "-".join(f"{row[0]:g}" for row in weights)
        begin = fixed(start, weights, output / f"fixed-{name}" / "start")
        given = {"output_dir": str(output / f"fixed-{name}" / "tuned"), "seed": recipe.seed if seed is None else seed}
        arguments = known.training_class(**{**training_defaults(), **training, **given})
        data = stage_data(recipe, settings.get("data", {}))
        result = known.run(known.arguments(model=str(begin), **chosen), data, arguments)
        rows.append({"alpha": [row[0] for row in weights], "losses": result["losses"]})
        best = min(rows, key=lambda row: row["losses"]["hybrid"])
        searched = {"alpha": [row[0] for row in found["mixture_weights"]], "losses": found["losses"]}
        summary = {"components": result["components"], "grid": rows, "best": best, "searched": searched}
        write_json(output / "alphas.json", summary)
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file, or the name of a shipped recipe")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--step", type=float, default=0.1, help="of the grid of alpha")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    args = parser.parse_args()
    found = measure(args.recipe, args.output_dir, args.blocks, args.step, args.seed)
    print(f"\n| alpha of {found['components'][0]} | loss |\n|---|---|")
    for row in [*found["grid"], found["searched"]]:
        mark = " (best)" if row is found["best"] else " (searched)" if row is found["searched"] else ""
        print(f"| {', '.join(f'{one:.3f}' for one in row['alpha'])} | {row['losses']['hybrid']:.4f}{mark} |")


if __name__ == "__main__":
    main()
