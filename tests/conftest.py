"""Every test process talks to a Hub of its own on loopback; nothing reaches the internet.

The Hub is started and the environment set before huggingface_hub is imported, because that reads it at import.
"""

import itertools
import os
import tempfile

import pytest
from manticore_hf_testing import start_hub

_HOME = tempfile.TemporaryDirectory(prefix="manticore-tests-", ignore_cleanup_errors=True)
HUB = start_hub(_HOME.name)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)

_COUNT = itertools.count()


@pytest.fixture(scope="session")
def hub():
    """The LocalHub of this process."""
    return HUB


@pytest.fixture
def owner(hub):
    """An organisation that no other test of this process has repositories in; its faults end with the test."""
    yield f"org{next(_COUNT)}"
    hub.clear_faults()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
