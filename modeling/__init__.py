"""The Hub-portable part of manticore-hf: these files are copied into every published hybrid.

They import torch, transformers, safetensors, huggingface_hub and each other (`from .x import y`), nothing else, and
know nothing of the package around them.
"""
