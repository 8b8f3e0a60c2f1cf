"""Recipes and their stages: calibrate, warm up, search, fine-tune, prune."""
