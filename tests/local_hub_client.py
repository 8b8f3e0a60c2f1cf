"""A Hub on loopback as its clients see it: fixtures and files for the tests of `manticore_hf.testing.local_hub`.

A test file takes the fixtures by name: `hub, api, repo = local_hub_client.hub, local_hub_client.api, ...`.
"""

import os
from pathlib import Path

import clean_process
import huggingface_hub
import pytest
from huggingface_hub import HfApi

from manticore_hf.testing.local_hub import TOKEN, LocalHub

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "README.md": b"---\nlicense: mit\ntags:\n- tiny\npipeline_tag: text-generation\n---\n# Tiny\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "sub/deep/notes.txt": b"notes",
    "sub/vocab.txt": b"a\nb\n",
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub of the test's own, unlike the one of the process in conftest.py."""
    # Read at every call, unlike the environment variable: in this process the client is already imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def repo(hub):
    hub.add_repo("ada/tiny", FILES)
    return "ada/tiny"


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def read_folder(root: str | Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def run_python(hub: LocalHub, home: Path, code: str) -> str:
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)}
    done = clean_process.run(["-c", code], env=environment, timeout=120, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stderr
    return done.stdout
