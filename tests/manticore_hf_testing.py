"""Shared by the tests: the local Hub, and tiny random models of every family."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start_hub(home):
    """Starts a LocalHub and points the environment at it, without importing huggingface_hub."""
    # By path: `import manticore_hf.local_hub` would import the package, and with it huggingface_hub, too early.
    spec = importlib.util.spec_from_file_location("manticore_local_hub", ROOT / "manticore_hf" / "local_hub.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["manticore_local_hub"] = module
    spec.loader.exec_module(module)
    hub = module.LocalHub()
    hub.start()
    os.environ.update(hub.environment(home))
    return hub
