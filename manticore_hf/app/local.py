"""The page for a hybrid on this machine: its own code is not run, the package's is."""

import errno
import os
import socket

import torch

from manticore_hf.app.hybrid_page.reading import Hybrid
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.utils.task_types import model_type_of, task_type_of
from manticore_hf.utils.tokenizers import read_tokenizer, tokenise


def load(
    source: str | os.PathLike, revision: str | None = None, tokenizer: str | None = None, device: str | None = None
) -> Hybrid:
    """A hybrid for the page.

    Args:
        source: Directory or repository.
        revision: Of a repository.
        tokenizer: Directory or repository of the tokenizer; default: `source`.
        device: Where it runs; default: cuda where there is a GPU, else cpu.

    Raises:
        ManticoreError: It is no hybrid that writes text, or has no tokenizer.
    """
    at = {} if revision is None else {"revision": revision}
    if os.path.exists(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise ManticoreError(
            f"{str(source)!r} has no config.json; give the directory of a saved hybrid, or a repository."
        )
    if (kind := model_type_of(source, **at)) != ManticoreConfig.model_type:
        raise ManticoreError(f"{str(source)!r} holds a model of type {kind!r}, no hybrid.")
    kind = task_type_of(ManticoreConfig.from_pretrained(source, **at))
    if kind.labels:
        raise ManticoreError(f"{str(source)!r} is a {kind.noun} ({kind.architecture}); the page is for text.")
    try:
        own, why = read_tokenizer(tokenizer or source, **({} if tokenizer else at)), ""
    except ManticoreError as err:
        own, why = None, f": {str(err)[:400]}"
    if own is None or not len(own):
        raise ManticoreError(
            f"{str(tokenizer or source)!r} has no tokenizer that can be read (--tokenizer names one){why}"
        )
    tokenise(own, "a")
    model = ManticoreForCausalLM.from_pretrained(source, **at)
    return Hybrid(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), own)


def serve(
    source: str, revision: str | None, tokenizer: str | None, device: str | None, host: str, port: int | None
) -> None:
    """Serves the page until it is ended; the arguments are those of `load`, and where to listen.

    Raises:
        ManticoreError: The hybrid cannot be shown, or the port is taken.
    """
    _check_address(host, port)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as err:
        raise ManticoreError(f"--device {device}: torch has no such device here ({str(err).splitlines()[0]}).") from err
    print(f"Loading {source} ...", flush=True)
    from manticore_hf.app.hybrid_page.serving import build, launch

    hybrid = load(source, revision, tokenizer, device)
    title = source if not os.path.isdir(source) else os.path.basename(os.path.abspath(source))
    try:
        launch(build(hybrid, title), host, port)
    except OSError as err:
        raise ManticoreError(
            f"The page cannot be served on {host}: there is no free port from 7860; give one with --port."
            if port is None
            else f"--port {port} was taken while the hybrid was loaded; give another."
        ) from err
    except KeyboardInterrupt:
        pass


def _check_address(host, port):
    """Raises ManticoreError if the page cannot be served there, before anything is loaded."""
    for named, number, remedy in (
        (f"--host {host}", 0, "give an address of this machine (0.0.0.0: all)."),
        (f"--port {port}", port, "give another port, or leave the option out for the first free one from 7860."),
    ):
        try:
            if number is not None:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                socket.create_server((host.strip("[]"), number), family=family).close()
        except OSError as err:
            why = "is in use" if err.errno == errno.EADDRINUSE else f"cannot be listened on ({err.strerror or err})"
            raise ManticoreError(f"{named} {why}: {remedy}") from err
