"""What is trainable in each stage of making a hybrid."""

from manticore_hf.modeling.configuration_manticore import ManticoreError

STAGES = ("projectors", "search", "finetune")


def set_stage(model, stage):
    """Sets `requires_grad` for a stage; the standard Trainer then trains just that.

    Args:
        model: A hybrid.
        stage: "projectors" (projectors, mixture weights and gate; components frozen), "search" (everything) or
            "finetune" (everything but the static mixture weights, which keep their present values exactly).

    Returns:
        The model.

    Raises:
        ManticoreError: An unknown stage.
    """
    if stage not in STAGES:
        raise ManticoreError(f"stage={stage!r} is unknown; choose one of {list(STAGES)}.")
    model.requires_grad_(stage != "projectors")
    model.hybrid_mixer.requires_grad_(True)
    if stage == "finetune":
        model.hybrid_mixer.alpha_logits.requires_grad_(False)
    return model
