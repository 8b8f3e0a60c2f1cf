"""Clean processes without their imports: forked from a server that has nothing but these, and no state of a test.

`run` and `start` do what `subprocess.run` and `subprocess.Popen` do with `python ARGUMENTS`. There are three servers in
a test process, each a fork of the one before and started when it is first needed: one has imported only torch
(`TORCH`), for processes in whose environment something differs that Transformers or the Hub's client read at import;
one Transformers (`TRANSFORMERS`), for those without the package; one the package (`PACKAGE`). Whether something can be
imported at all, in which order, and under another hash seed are questions for a process of their own.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = ("manticore_hf.cli", "manticore_hf.training.recipe", "transformers.trainer", "datasets", "peft")
TRANSFORMERS = ("transformers.trainer", "transformers.pipelines")
TORCH = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "numpy")
# Read when a module is imported, which is before the fork
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "MANTICORE_", "TOKENIZERS_")
READ_BY_TORCH = ("OMP_", "MKL_", "TORCH_", "PYTORCH_", "CUDA_")


class Server:
    """A process that imports modules and forks.

    Args:
        modules: What it imports.
        python: The interpreter.
        environment: Its environment, if not this process's; those of its processes may differ only in what no module
            reads at import.
        parent: A Server of the same interpreter that forks it, with what that has imported already.
    """

    def __init__(self, modules, python=sys.executable, environment=None, parent=None):
        self.environment = dict(os.environ if environment is None else environment)
        # Arrow's allocator would start a thread, and OpenBLAS as many as OpenMP is allowed: a fork would lack them
        environment = {**self.environment, "JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_NUM_THREADS": "1"}
        self.folder = tempfile.TemporaryDirectory(prefix="forks-", ignore_cleanup_errors=True)
        self.path = str(Path(self.folder.name) / "socket")
        self.log = Path(self.folder.name) / "log"
        self.early = READ_BY_TORCH if modules == TORCH else READ_BY_TORCH + READ_AT_IMPORT
        command = [str(Path(__file__).with_name("fork_server.py")), self.path, *modules]
        start = parent.start if parent is not None else subprocess.Popen
        with self.log.open("w") as log:
            self.process = start(
                command if parent is not None else [str(python), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder.name,
            )
        atexit.register(self.stop)

    def stop(self):
        atexit.unregister(self.stop)
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def connect(self):
        """A connection to the server, which may still be importing."""
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(self.path)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.02)

    def start(self, arguments, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        """A process; its streams are files, pipes (`subprocess.PIPE`) or, if None, nothing."""
        return Process(self, arguments, env, cwd, stdin, stdout, stderr)

    def run(self, arguments, env=None, cwd=None, timeout=300):
        """Runs a process to its end. Returns a `subprocess.CompletedProcess` with what it printed, as text."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(arguments, env, cwd, None, out, err)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(list(map(str, arguments)), status, out.read(), err.read())


class Process:
    """A forked process, with those parts of `subprocess.Popen` that the tests use."""

    def __init__(self, server, arguments, env, cwd, stdin, stdout, stderr):
        environment = {key: str(value) for key, value in (os.environ if env is None else env).items()}
        for key in {*environment, *server.environment}:
            if key.startswith(server.early):
                assert environment.get(key) == server.environment.get(key), f"{key} is read before the fork"
        self.args, self.returncode = list(map(str, arguments)), None
        self.stdin = self.stdout = self.stderr = None
        descriptors, close = [], []
        for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if stream == subprocess.PIPE:
                ends = os.pipe()
                own, other = ends[::-1] if name == "stdin" else ends
                setattr(self, name, os.fdopen(own, "w" if name == "stdin" else "r"))
                close.append(other)
            elif stream is None:
                other = os.open(os.devnull, os.O_RDWR)
                close.append(other)
            else:
                other = stream.fileno()
            descriptors.append(other)
        request = {"arguments": self.args, "environment": environment, "directory": str(cwd or os.getcwd())}
        self._connection = server.connect()
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [line], descriptors)
        self._connection.sendall(line[sent:])
        for descriptor in close:
            os.close(descriptor)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self):
        """The exit status, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=None):
        """Waits for the exit status, which is negative after a signal."""
        if self.returncode is None:
            self._connection.settimeout(timeout if timeout != 0 else 1e-6)
            try:
                line = self._connection.recv(64)
            except (TimeoutError, BlockingIOError) as err:
                raise subprocess.TimeoutExpired(self.args, timeout) from err
            self.returncode = int(line)
            self._connection.close()
        return self.returncode

    def kill(self):
        """Kills it with all that it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


_SERVERS = {}
_PARENTS = {PACKAGE: TRANSFORMERS, TRANSFORMERS: TORCH}


def server(modules=PACKAGE):
    """The server of this test process that has imported these modules."""
    if modules not in _SERVERS:
        parent = _PARENTS.get(modules)
        _SERVERS[modules] = Server(modules, parent=parent and server(parent))
    return _SERVERS[modules]


def run(arguments, env=None, cwd=None, timeout=300, modules=PACKAGE):
    """Runs `python ARGUMENTS` to its end. Returns a `subprocess.CompletedProcess` with what it printed, as text."""
    return server(modules).run(arguments, env, cwd, timeout)


def start(arguments, modules=PACKAGE, **options):
    """Starts `python ARGUMENTS`, as `Server.start`."""
    return server(modules).start(arguments, **options)
