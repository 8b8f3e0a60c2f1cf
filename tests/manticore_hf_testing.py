"""Shared by the tests: the local Hub, and tiny random models of every family."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_local_hub():
    """The package `manticore_hf.testing.local_hub`, under a name of its own and without importing `manticore_hf`."""
    # By path: `import manticore_hf.testing.local_hub` would import the package, and with it huggingface_hub, too early.
    folder = ROOT / "manticore_hf" / "testing" / "local_hub"
    spec = importlib.util.spec_from_file_location(
        "manticore_local_hub", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start_hub(home):
    """Starts a LocalHub and points the environment at it, without importing huggingface_hub."""
    hub = load_local_hub().LocalHub()
    hub.start()
    os.environ.update(hub.environment(home))
    return hub
