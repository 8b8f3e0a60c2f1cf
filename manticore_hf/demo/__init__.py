"""The demonstration: `manticore-hf demo`."""
