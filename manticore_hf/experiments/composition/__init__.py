"""Composition: what one component knows and another can do, asked for together."""
