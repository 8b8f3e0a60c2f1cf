"""The recipes shipped with manticore-hf; installed as `manticore_hf.recipes`, so that the demo finds its own."""
