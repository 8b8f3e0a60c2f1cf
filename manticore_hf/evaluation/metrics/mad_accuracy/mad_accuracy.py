"""Accuracy at labelled positions of sequences, micro and macro, as a metric of the `evaluate` library.

    metric = evaluate.load("<this folder>")
    metric.compute(predictions=[[3, 7, 7]], references=[[-100, 7, 2]])

The script stands alone: it needs evaluate, datasets and numpy, and no network.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Accuracy of predicted labels at the labelled positions of sequences, as the MAD tasks (Poli et al., "Mechanistic Design
and Scaling of Hybrid Architectures", arXiv 2403.17844) are scored.

What "macro" means here: the mean over classes of the share of a class's labelled positions that were predicted right,
every class counting once. It is what MAD-Lab (github.com/athms/mad-lab) reports as its accuracy: `mad/metrics.py`
flattens the sequences and leaves torchmetrics' MulticlassAccuracy at its default, average="macro". As there, a class
that is predicted at labelled positions but is nowhere the label counts, with accuracy 0, and a class that is neither
does not.

One difference: MAD-Lab logs that number batch by batch (`mad/model/pl_model_wrapper.py`) and prints the mean over
batches, so it depends on the batch size and a little on the order; here it is one number of the whole corpus. For
MAD-Lab's, compute batch by batch (128 sequences by its default) and take the mean.
"""

_INPUTS = """
Args:
    predictions: For each sequence, the predicted label ids, one for each position of the reference. The metric does
        not shift: with labels of a causal LM, give argmax(logits)[:, :-1] and labels[:, 1:].
    references: For each sequence, its label ids; `ignore_index` where a position has none.
    ignore_index: What marks a position without a label; -100.

Returns:
    accuracy: Micro: the share of all labelled positions that were predicted right.
    macro_accuracy: Macro: the mean over classes, as described above.
    positions: Number of labelled positions.
    classes: Number of classes that the macro accuracy is the mean of.

Raises:
    ValueError: A prediction and its reference differ in length, an id is not a whole number from 0 on, or no
        position is labelled.
"""


class MadAccuracy(evaluate.Metric):
    """Accuracy at labelled positions, over positions and over classes; see `inputs_description`."""

    def _info(self):
        # Not integers: Arrow would cut 1.5 to 1, and scores would pass for labels.
        labels = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": labels, "references": labels}),
            reference_urls=["https://github.com/athms/mad-lab", "https://arxiv.org/abs/2403.17844"],
        )

    def _compute(self, predictions, references, ignore_index=-100):
        predicted, wanted = [np.zeros(0)], [np.zeros(0)]
        for i, (guess, labels) in enumerate(zip(predictions, references)):
            guess, labels = (np.array([None] if row is None else row, dtype=np.float64) for row in (guess, labels))
            if len(guess) != len(labels):
                raise ValueError(
                    f"predictions[{i}] has {len(guess)} positions and references[{i}] {len(labels)}: give one label id "
                    "for each position (for a causal LM argmax(logits)[:, :-1] and labels[:, 1:])."
                )
            labelled = labels != ignore_index
            _check("predictions", i, guess, labelled, "give label ids (the argmax of scores, not the scores)")
            _check("references", i, labels, labelled, f"mark positions without a label by {ignore_index}")
            predicted.append(guess[labelled])
            wanted.append(labels[labelled])
        predicted, wanted = np.concatenate(predicted), np.concatenate(wanted)
        if not wanted.size:
            raise ValueError(
                f"None of the {len(references)} sequence(s) given has a labelled position, so there is no accuracy: "
                f"give labels that are not {ignore_index}."
            )
        classes, of_position = np.unique(np.concatenate([wanted, predicted]), return_inverse=True)
        of_label, right = of_position[: wanted.size], predicted == wanted
        total = np.bincount(of_label, minlength=classes.size)
        hits = np.bincount(of_label, weights=right, minlength=classes.size)
        return {
            "accuracy": float(right.mean()),
            "macro_accuracy": float((hits / np.maximum(total, 1)).mean()),
            "positions": int(wanted.size),
            "classes": int(classes.size),
        }


def _check(name, i, ids, labelled, remedy):
    # NaN is unequal to its own floor
    wrong = np.flatnonzero(labelled & ~((ids >= 0) & (ids == np.floor(ids))))
    if wrong.size:
        raise ValueError(f"{name}[{i}][{wrong[0]}] is {ids[wrong[0]]:g}, which is no label id: {remedy}.")
