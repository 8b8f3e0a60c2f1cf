"""From pretrained models to a hybrid: components, tokenizers, other formats, transplanted vocabularies."""
