"""Components whose vocabulary was transplanted, so that they read another tokenizer's tokens.

A transplanted component keeps its body by reference; its embedding and head have rows for another tokenizer's tokens
and are the hybrid's own. The tensors of its checkpoint under the same names are never read: not where the hybrid's file
lacks them, and not where they have the same shape by chance.
"""

from .configuration_manticore import ManticoreError


def end_names(component):
    """Names of a causal LM's embedding and head tensors."""
    ends = {id(component.get_input_embeddings()), id(component.get_output_embeddings())}
    return {
        f"{path}.{name}"
        for path, module in component.named_modules()
        if id(module) in ends
        for name, _ in module.named_parameters(recurse=False)
    }


def own_vocabulary(model, entry, ties):
    """Names of a transplanted component's embedding and head tensors in the hybrid; empty for other components.

    Args:
        model: The hybrid.
        entry: The component's entry in the configuration.
        ties: The model's `tie_groups`.
    """
    if entry["transplant"] is None:
        return set()
    names = {f"{entry['name']}.{name}" for name in end_names(model.component(entry["name"]))}
    return names.union(*(ties.get(name, ()) for name in names))


def check_rows(entry, key, tensor, owner):
    """Raises ManticoreError unless a referenced embedding or head has the rows that the transplant was made from."""
    rows, recorded = tensor.get_shape()[0], entry["transplant"]["vocab_size"]
    if rows != recorded:
        raise ManticoreError(
            f"{owner}: {key} has {rows} rows; its vocabulary was transplanted from one of {recorded}. The "
            "configuration belongs to another commit of the component: use the config.json that was saved with these "
            "weights."
        )
