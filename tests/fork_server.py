"""Imports what takes long once, and then forks a clean process for every request; `clean_process.py` sends them.

    python fork_server.py SOCKET MODULE...

A request is a connection with a line of JSON (arguments of python, environment, directory) and three descriptors
(stdin, stdout, stderr). The server answers with the id of the process and, when that has ended, its exit status. It
kills a process whose connection is closed, and all of them when its own stdin is. It may not import the package
itself: some of its processes are to be without.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import types


class Server:
    """Listens at a path; `wait` returns in each forked process with what it is to run, and in the server at its end."""

    def __init__(self, path):
        self.listener, self.selector = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
        self.listener.bind(path)
        self.listener.listen(16)
        self.woken, self.wake = os.pipe()  # by the end of a process
        os.set_blocking(self.wake, False)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.connections = {}  # pid: connection
        for file in (0, self.woken, self.listener):
            self.selector.register(file, selectors.EVENT_READ)

    def wait(self):
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if (request := self.fork()) is not None:
                        return request
                elif key.fileobj == self.woken:
                    os.read(self.woken, 4096)
                    self.reap()
                elif key.fileobj == 0:
                    if self.connections:
                        time.sleep(0.5)  # a server among them has lost its stdin, too, and ends its own processes first
                    for pid in self.connections:
                        kill(pid)
                    return None
                else:
                    self.selector.unregister(key.fileobj)
                    kill(key.data)

    def fork(self):
        """A new process for a request, in which it is returned."""
        connection, _ = self.listener.accept()
        line, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while not line.endswith(b"\n"):
            line += connection.recv(1 << 16)
        pid = os.fork()
        if pid:
            for descriptor in descriptors:
                os.close(descriptor)
            self.connections[pid] = connection
            self.selector.register(connection, selectors.EVENT_READ, pid)
            connection.sendall(f"{pid}\n".encode())
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()  # so that it can be killed with all that it starts
        self.selector.close()
        for one in (self.listener, connection, *self.connections.values()):
            one.close()
        os.close(self.woken)
        os.close(self.wake)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return json.loads(line)

    def reap(self):
        while self.connections:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self.connections.pop(pid)
            if connection in self.selector.get_map():
                self.selector.unregister(connection)
            try:
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            except OSError:
                pass  # who asked is gone
            connection.close()


def kill(pid):
    """Ends a process and all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it was not yet at its `setsid`


def run(arguments, environment, directory):
    """Does what `python ARGUMENTS` does: a file, -m MODULE or -c CODE, each with arguments of its own."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if "torch" in sys.modules:  # the module `random` does so by itself
        sys.modules["torch"].default_generator.seed()
        sys.modules["numpy"].random.seed()
    kind, *rest = arguments
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[0] = {"-c": "", "-m": directory}.get(kind, os.path.dirname(os.path.abspath(kind)))  # the server's own file
    sys.path[1:1] = paths
    if kind == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads > 1:
        sys.exit(f"{sys.argv[2:]} started {threads - 1} threads, which a fork would lack")
    gc.freeze()  # a collection in a fork would copy every page
    asked = Server(sys.argv[1]).wait()
    if asked is not None:
        run(**asked)
