"""Checkpoints that hybrids do not read (GGUF, mamba_ssm's layout, pickles), written as directories that they do."""
