"""Components whose vocabulary was transplanted: embedding and head are the hybrid's own, the rest is referenced."""

from transformers import PreTrainedModel

from .bounds_manticore import ManticoreError
from .references_manticore import where


def end_names(component: PreTrainedModel) -> set[str]:
    """Names of a causal LM's embedding and head tensors."""
    ends = {id(component.get_input_embeddings()), id(component.get_output_embeddings())}
    found = [(path, module) for path, module in component.named_modules() if id(module) in ends]
    return {f"{path}.{name}" for path, module in found for name, _ in module.named_parameters(recurse=False)}


def own_vocabulary(model: PreTrainedModel, entry: dict, ties: dict) -> set[str]:
    """Names in the hybrid of a transplanted component's embedding and head tensors."""
    names = {f"{entry['name']}.{name}" for name in end_names(model.component(entry["name"]))}
    return names.union(*(ties.get(name, ()) for name in names))


def check_rows(entry: dict, key: str, rows: int) -> None:
    """Raises ManticoreError unless a referenced embedding or head has the rows that the transplant was made from."""
    if rows != (recorded := entry["transplant"]["vocab_size"]):
        raise ManticoreError(
            f"{where(entry)}: {key} has {rows} rows; its vocabulary was transplanted from one of {recorded}. This "
            "config.json belongs to another commit of the component: use the one that was saved with these weights."
        )
