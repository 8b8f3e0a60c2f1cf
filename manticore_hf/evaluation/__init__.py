"""Text, losses, scores of tokens and metrics."""
