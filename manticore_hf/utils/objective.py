"""What a hybrid is trained on, as its configuration says it."""

from manticore_hf.modeling.configuration_manticore import ManticoreConfig

OBJECTIVE = ("mixture_space", "mix_loss_weight", "component_loss_weight", "objective")
"""Keys of a configuration that say what a hybrid is trained on, and why."""
DIFFERENT = 0.05
"""Gain, in nats per token, above which components' errors count as complementary (benchmarks/objective.py)."""
SPECIALISTS = {"mixture_space": "prob", "loss_weights": (1.0, 0.0)}
ALIKE = {"mixture_space": "logprob", "loss_weights": (0.3, 1.0)}
"""What is chosen; loss weights are those of the mixture and of the components' own (FINDINGS 12, 13; BENCHMARKS.md)."""


def say_objective(config: ManticoreConfig) -> str | None:
    """What a hybrid is trained on and why, in one line; None where all of it was given by the user."""
    objective = config.objective
    if objective is None:
        return None
    if "open" in objective:
        return "chosen when the hybrid is first trained, by whether its components' errors are complementary"
    how = "complementary" if objective["gain"] > DIFFERENT else "similar"
    values = {
        "mixture_space": f"mixture_space {config.mixture_space}",
        "loss_weights": f"{config.mix_loss_weight:g} * the mixture's loss + {config.component_loss_weight:g} * the "
        "components' own",
    }
    return (
        f"the components' errors are {how} on this text (choosing the better one in each window saves "
        f"{objective['gain']:.3f} nats per token), so " + ", ".join(values[key] for key in objective["chosen"])
    )
