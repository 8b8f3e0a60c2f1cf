"""The contract of decoding, for a hybrid of any kind."""

from cases import case
from transformers import PreTrainedModel

from manticore_hf.families import contract

CHUNKS = (1,), (3,), (4, 1, 1, 3, 2)


def check_decoding(model: PreTrainedModel) -> None:
    """Cached equals uncached: greedy, beams, turns, chunks, padding anywhere, documents, and a static cache."""
    checks = {
        "greedy": lambda: contract.check_greedy(model),
        "padding": lambda: contract.check_padding(model),
        "beams": lambda: contract.check_beams(model),
        "turns": lambda: contract.check_turns(model),
        "padding inside": lambda: contract.check_padding_inside(model),
        "documents": lambda: contract.check_documents(model),
    }
    checks |= {f"chunks of {n}": lambda n=n: contract.check_chunks(model, n) for n in CHUNKS}
    if "gpt_neo" not in model.config.component_names:
        checks["static cache"] = lambda: contract.check_static_cache(model)
    for name, check in checks.items():
        with case(name):
            check()
