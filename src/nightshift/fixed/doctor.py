"""Which protections hold on this machine: each is tried by an attack, none is read off a version.

    nightshift doctor             a table; exit status 1 if an attack got through
    nightshift doctor --json      the same for programs (a study asks before it starts)

Covered: one or more attacks for each protection of fixed/sandbox.py, run as the candidate would.
Not covered: attacks that nobody thought of; `make cheats` tries many more on the real pipeline.
"""

import ctypes
import json
import os
import pwd
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nightshift.fixed.sandbox import (
    PROTECTIONS,
    Child,
    Report,
    Sandbox,
    clean_environment,
    python_paths,
    spawn,
)

SECRET = "nightshift-doctor-secret"  # planted in a file and in the environment, then looked for
MEMORY_MB, DISK_MB, NUM_PROCESSES = 400, 20, 40
LIMIT_S = 20.0


@dataclass(frozen=True)
class Finding:
    protection: str
    attack: str
    holds: bool
    how: str  # what stopped it, or what it got


@dataclass
class Ground:
    """What the attacks aim at: made for them, outside the sandbox."""

    folder: Path
    port: int
    abstract: str

    @property
    def secret(self) -> Path:
        return self.folder / "secret"


def examine() -> tuple[dict[str, list[str]], list[Finding]]:
    """(layers that the kernel granted, what each attack met)."""
    os.environ["NIGHTSHIFT_DOCTOR"] = SECRET
    folder = Path(tempfile.mkdtemp(prefix="nightshift-doctor-"))
    listener, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        abstract = f"\0nightshift-doctor-{os.getpid()}"
        if sys.platform == "linux":
            unix.bind(abstract)
            unix.listen()
        ground = Ground(folder, listener.getsockname()[1], abstract)
        ground.secret.write_text(SECRET)
        layers, findings = _quiet_attacks(ground)
        return layers, findings + _loud_attacks(ground)
    finally:
        listener.close()
        unix.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(ground: Ground, function: Callable[[], None], *fds: int, writable: str = "writable"):
    """In a sandbox with small limits."""
    folder = ground.folder / writable
    folder.mkdir(exist_ok=True)
    box = Sandbox(
        readable=[*python_paths(), str(Path(__file__).parents[2])],
        writable=[str(folder)],
        memory_mb=MEMORY_MB,
        disk_mb=DISK_MB,
        num_processes=NUM_PROCESSES,
    )
    log = os.open(ground.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = spawn(box, function, fds=fds, log=log)
    os.close(log)
    return child


def _end(child: Child) -> Report:
    child.started(LIMIT_S)
    return child.wait(LIMIT_S) or child.kill()


# ---- attacks that only ask ----


def _attacks(ground: Ground) -> list[tuple[str, str, Callable[[], object]]]:
    parent, home = os.getpid(), pwd.getpwuid(os.getuid()).pw_dir

    def connect():
        socket.create_connection(("127.0.0.1", ground.port), timeout=2)

    def datagram():
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", ground.port))

    def abstract():
        socket.socket(socket.AF_UNIX).connect(ground.abstract)

    def environment():
        with open("/proc/self/environ", "rb") as file:
            seen = file.read() + repr(os.environ).encode()
        if SECRET.encode() not in seen:
            raise PermissionError("not in the environment")

    def through_proc():
        with open(f"/proc/{parent}/environ", "rb") as file:
            file.read()

    def number(x86_64: int, aarch64: int, *arguments):
        import platform

        which = aarch64 if platform.machine() == "aarch64" else x86_64
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(which, *arguments) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    return [
        ("files", "read a file outside", lambda: ground.secret.read_text()),
        ("files", "read the user's home", lambda: os.listdir(home)),
        ("files", "write into the python environment", lambda: _touch(sys.prefix)),
        ("files", "read a key from the environment", environment),
        ("network", "connect over TCP", connect),
        ("network", "send over UDP", datagram),
        ("network", "connect to an abstract unix socket", abstract),
        ("processes", "signal a process outside", lambda: os.kill(parent, 0)),
        ("processes", "read a process outside", through_proc),
        ("privileges", "make a user namespace", lambda: number(272, 97, 0x10000000)),
        ("privileges", "trace a process", lambda: number(101, 117, 0, 0, 0, 0)),
        ("privileges", "open an io_uring", lambda: number(425, 425, 1, bytes(120))),
        ("privileges", "look at the session's keys", lambda: number(250, 219, 0, -3, 0)),
    ]


def _touch(folder: str) -> None:
    path = Path(folder) / "nightshift-doctor"
    path.write_text("x")
    path.unlink()


def _quiet_attacks(ground: Ground) -> tuple[dict[str, list[str]], list[Finding]]:
    attacks = _attacks(ground)
    reader, writer = os.pipe()

    def attack() -> None:
        environment = clean_environment("/tmp")
        os.environ.clear()
        os.environ.update(environment)
        outcomes: list[str | None] = []
        with suppress(OSError):
            (ground.folder / "planted").write_text("x")
        for _, _, act in attacks:
            try:
                act()
                outcomes.append(None)
            except BaseException as error:
                outcomes.append(type(error).__name__)
        os.write(writer, json.dumps(outcomes).encode())

    child = _start(ground, attack, writer)
    os.close(writer)
    _end(child)
    layers = child.layers or {name: [] for name in PROTECTIONS}
    data = b""
    while part := os.read(reader, 65536):
        data += part
    os.close(reader)
    outcomes = json.loads(data or b"[]")
    if len(outcomes) != len(attacks):
        return layers, [Finding(p, a, False, "the sandbox did not run") for p, a, _ in attacks]
    findings = [
        Finding(protection, name, outcome is not None, outcome or "got through")
        for (protection, name, _), outcome in zip(attacks, outcomes, strict=True)
    ]
    planted = (ground.folder / "planted").exists()  # or only in the sandbox's private /tmp
    how = "got through" if planted else "nothing arrived outside"
    findings.append(Finding("files", "write outside", not planted, how))
    return layers, findings


# ---- attacks that must be ended ----


def _loud_attacks(ground: Ground) -> list[Finding]:
    disk = ground.folder / "disk"
    attacks = (
        ("use more memory than allowed", _take_memory, "memory"),
        ("write more than allowed", lambda: _fill_disk(disk), "disk"),
        ("start more processes than allowed", _fork_many, "processes"),
    )
    children = [_start(ground, attack, writable=limit) for _, attack, limit in attacks]
    found = [_daemon(ground)]
    for (name, _, limit), child in zip(attacks, children, strict=True):
        report = _end(child)
        ended = report.killed or (f"exit status {report.exit}" if report.exit else None)
        found.append(Finding("limits", name, ended is not None, ended or f"no limit on {limit}"))
    return found


def _take_memory() -> None:
    block = bytearray(2 * MEMORY_MB << 20)
    time.sleep(2)
    del block


def _fill_disk(folder: Path) -> None:
    for number in range(8):
        (folder / str(number)).write_bytes(bytes(DISK_MB << 19))
        time.sleep(0.3)


def _fork_many() -> None:
    for _ in range(3 * NUM_PROCESSES):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
    time.sleep(2)


def _daemon(ground: Ground) -> Finding:
    """A double fork in a new session, which holds a pipe open as long as it lives."""
    reader, writer = os.pipe()

    def escape() -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        time.sleep(0.2)

    child = _start(ground, escape, writer)
    os.close(writer)
    _end(child)
    os.set_blocking(reader, False)
    try:
        alive = os.read(reader, 1) != b""  # the end of the file: nobody holds the pipe
    except BlockingIOError:
        alive = True
    os.close(reader)
    how = "outlived its trial" if alive else "died with its trial"
    return Finding("processes", "leave a daemon behind", not alive, how)


# ---- the command ----


def off(findings: list[Finding]) -> list[str]:
    """Protections that an attack got through, in their order."""
    broken = {finding.protection for finding in findings if not finding.holds}
    return [name for name in PROTECTIONS if name in broken]


def table(layers: dict[str, list[str]], findings: list[Finding]) -> str:
    lines = [f"{'protection':<12}{'attack':<38}{'outcome'}"]
    for finding in sorted(findings, key=lambda f: PROTECTIONS.index(f.protection)):
        mark = "held" if finding.holds else "OPEN"
        lines.append(f"{finding.protection:<12}{finding.attack:<38}{mark}  {finding.how}")
    lines += ["", "layers:"]
    lines += [f"  {name:<11}{' + '.join(layers.get(name, [])) or 'none'}" for name in PROTECTIONS]
    broken = off(findings)
    lines.append("")
    lines.append(
        f"open here: {', '.join(broken)}. Run trials only with code that you trust, or elsewhere; "
        "sandbox.require=all refuses to start"
        if broken
        else "all protections hold"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if set(arguments) - {"--json"}:
        print("usage: nightshift doctor [--json]", file=sys.stderr)
        return 2
    layers, findings = examine()
    if "--json" in arguments:
        facts = {"layers": layers, "open": off(findings), "findings": list(map(asdict, findings))}
        print(json.dumps(facts))
    else:
        print(table(layers, findings))
    return 1 if off(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
