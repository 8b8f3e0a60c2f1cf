"""The two classifying hybrids by kind, for the tests of them."""

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from manticore_hf import ManticoreForSequenceClassification, ManticoreForTokenClassification

BOTH = {"sequence": ManticoreForSequenceClassification, "token": ManticoreForTokenClassification}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def scored(model, kind, **inputs):
    with torch.no_grad():
        return model(**inputs).logits
