"""Start Python modules in 0.1 s instead of 5: a server that has imported torch forks them.

Importing torch and lightning takes seconds; forking a process that has done so takes milliseconds.
The server is this file run as a script. It imports and does nothing else: tensor work before a fork
hangs the child (OpenMP state does not survive), CUDA cannot be used after one, and project code
belongs to each run's own worktree, so it is never imported here.

Every child is a session of its own, gets exactly the environment, folder and import path of its
request, and dies with the server; the server dies with the loop. `warm=False` gives the same
interface with a plain `python -m` for every run.

    loop --socket--> server:  {"id": 1, "module": "nightshift.pretrain", "args": [...], ...}
    loop <--socket-- server:  {"id": 1, "pid": 4711}  {"id": 1, "exit": 0}  {"error": "..."}
"""

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PRELOAD = (
    "numpy",
    "torch",
    "torch.utils.data",
    "lightning",
    "lightning.pytorch",
    "safetensors.torch",
    "pyarrow.parquet",
    "tiktoken",
    "hydra",
    "omegaconf",
    "pydantic",
)
MARK = "NIGHTSHIFT_TRIAL"  # in the environment of a run and of everything it starts
STUDY_MARK = "NIGHTSHIFT_STUDY"  # the study's folder, likewise; the server carries it too
PLACEHOLDER = "-" * 128  # the server's own MARK; a child writes its own over it
PR_SET_PDEATHSIG = 1
KILLED_WITH_SERVER = -int(signal.SIGKILL)


class StartError(RuntimeError):
    """Runs cannot be started in this way; the message says why and the next move."""


class Starter:
    """The loop's side: starts modules as children of the server and waits for them."""

    def __init__(self, study_folder: Path, warm: bool):
        self.study_folder = study_folder
        self.mode = "warm" if warm else "cold"
        self.server: subprocess.Popen | None = None
        self.num_started = 0
        self._launch()

    def _launch(self) -> None:
        """Returns at once: requests wait in the socket until the imports are done."""
        self.close()
        ours, theirs = socket.socketpair()
        self.socket, self.unread, self.events = ours, b"", {}
        # Here, not above: this file is the server's script too, which imports no project code.
        from nightshift.fixed.sandbox import ENVIRONMENT

        # No key and no token: what is forked from the server has its memory, and the /proc entry
        # of its environment.
        environment = {k: v for k, v in os.environ.items() if k in ENVIRONMENT}
        environment |= {MARK: PLACEHOLDER, STUDY_MARK: str(self.study_folder)}
        environment.setdefault("GOMP_SPINCOUNT", "0")  # nightshift/__init__.py says why
        command = [
            sys.executable,
            "-P",
            __file__,
            str(theirs.fileno()),
            self.mode,
            str(os.getpid()),
        ]
        with open(self.study_folder / "warm.log", "wb") as log:
            self.server = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the loop, which then stops its runs
            )
        theirs.close()

    def start(
        self, module: str, args: list[str], *, src: Path, env: dict[str, str], log: Path
    ) -> int:
        """Start `python -m module`, src first on its path. Returns the number to wait for."""
        self.num_started += 1
        request = {
            "id": self.num_started,
            "module": module,
            "args": args,
            "src": str(src),
            "cwd": str(src.parent),
            "env": env,
            "log": str(log),
        }
        line = json.dumps(request).encode() + b"\n"
        try:
            self.socket.sendall(line)
        except OSError:  # the server was killed since the last run
            self._launch()
            self.socket.sendall(line)
        return self.num_started

    def wait(self, number: int, timeout_s: float) -> int | None:
        """Exit status (negative: the signal), or None when it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            if number in self.events:
                return self.events.pop(number)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self.socket], [], [], left_s)[0]:
                return None
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                data = b""
            if not data:  # the server was killed, and its children with it
                self.close()
                return KILLED_WITH_SERVER
            *lines, self.unread = (self.unread + data).split(b"\n")
            for event in map(json.loads, lines):
                if "error" in event:
                    raise StartError(event["error"])
                if "exit" in event:
                    self.events[event["id"]] = event["exit"]

    def close(self) -> None:
        if self.server is not None:
            self.socket.close()
            self.server.kill()
            self.server.wait()
            self.server = None


def marked_processes(study_folder: Path, mark: str | None = None) -> list[int]:
    """Processes that carry the study's mark (and the trial's), however they were forked away."""
    wanted = {f"{STUDY_MARK}={study_folder}".encode()}
    if mark:
        wanted.add(f"{MARK}={mark}".encode())
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                with open(f"/proc/{entry.name}/environ", "rb") as file:
                    environment = set(file.read().split(b"\0"))
            except OSError:  # gone, or another user's
                continue
            if wanted <= environment:
                found.append(int(entry.name))
    return found


def kill_marked(study_folder: Path, mark: str | None = None, limit_s: float = 10.0) -> int:
    """SIGKILL until none is left, since a dying tree may still fork. Returns how many it hit."""
    killed: set[int] = set()
    deadline = time.monotonic() + limit_s
    while (found := marked_processes(study_folder, mark)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                pass
        time.sleep(0.01)
    return len(killed)


# ---- the server: everything below runs in the process that this file is the script of ----


def serve(sock: socket.socket, warm: bool) -> None:
    if warm:
        _preload(sock)
    running: dict[int, int] = {}  # pid -> request
    unread = b""
    while True:
        readable, _, _ = select.select([sock], [], [], 0.01 if running else None)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            _tell(sock, {"id": running.pop(pid), "exit": os.waitstatus_to_exitcode(status)})
        if not readable:
            continue
        data = sock.recv(65536)
        if not data:
            return  # the loop is gone or done; children get PDEATHSIG
        *lines, unread = (unread + data).split(b"\n")
        for request in map(json.loads, lines):
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                _run(request, sock, server, warm)
            running[pid] = request["id"]
            _tell(sock, {"id": request["id"], "pid": pid})


def _preload(sock: socket.socket) -> None:
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except Exception as error:
            message = f"cannot import {name} ({error}); study.warm=false starts runs without it"
            _tell(sock, {"error": message})
            sys.exit(1)
    project = [name for name in sys.modules if name.split(".")[0] == "nightshift"]
    assert not project, f"project code was imported before the fork: {project}"
    import gc

    gc.collect()
    gc.freeze()  # the children share these pages


def _tell(sock: socket.socket, event: dict) -> None:
    sock.sendall(json.dumps(event).encode() + b"\n")


def _run(request: dict, sock: socket.socket, server: int, warm: bool) -> None:
    """The child: becomes the requested run. Never returns."""
    code = 1
    try:
        sock.close()
        os.setsid()
        _die_with(server)
        _become(request)
        if warm:
            _run_module(request)
            code = 0
        else:
            command = [sys.executable, "-m", request["module"], *request["args"]]
            os.execve(sys.executable, command, dict(os.environ))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _become(request: dict) -> None:
    _write_mark(request["env"][MARK])
    os.environ.clear()
    os.environ.update(request["env"], PYTHONPATH=request["src"])
    os.chdir(request["cwd"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
    sys.stderr.reconfigure(encoding="utf-8", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_module(request: dict) -> None:
    import runpy

    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = (checkout, os.path.join(checkout, "src"))  # an editable install puts these on the path
    sys.path[:] = [request["src"], *(p for p in sys.path if os.path.abspath(p) not in ours)]
    importlib.invalidate_caches()
    sys.argv = [request["module"], *request["args"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _write_mark(mark: str) -> None:
    """Write MARK where /proc/<pid>/environ shows it, so that all forks of this child show it too.

    That file shows the memory that the server's first environment lies in, whatever os.environ says
    later; field 50 of /proc/self/stat is its address (man 5 proc).
    """
    with open("/proc/self/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    start, end = int(fields[47]), int(fields[48])
    placeholder = f"{MARK}={PLACEHOLDER}".encode()
    offset = ctypes.string_at(start, end - start).index(placeholder)
    line = f"{MARK}={mark}".encode().ljust(len(placeholder), b"\0")
    assert len(line) == len(placeholder), f"{mark} is too long"
    ctypes.memmove(start + offset, line, len(line))


if __name__ == "__main__":
    fd, mode, loop = sys.argv[1:]
    _die_with(int(loop))
    serve(socket.socket(fileno=int(fd)), warm=mode == "warm")
