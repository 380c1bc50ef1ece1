"""Run a function where it can do no harm: what a candidate's code touches runs in here.

`spawn(sandbox, function)` forks three processes: a supervisor outside, which watches limits; an
init inside, process 1 of its own pid namespace; and the one that runs the function. Layers, each
used where the kernel and this user may have it, each reported by name in `Child.layers`:

    files        mounts: a private view that holds the listed paths only, read-only but for the
                 writable folder, an empty /tmp and /dev/shm; landlock: the same list again
    network      namespace: no interface but an unconnected loopback; seccomp: sockets of the unix
                 family only; landlock: no TCP, no abstract unix sockets of others
    processes    namespace: no other process is visible, and all end with the init, double forks and
                 new sessions included; subreaper: the weaker form, orphans are found and killed
    privileges   seccomp: no ptrace, mounts, namespaces, io_uring, bpf, keys, clock setting ...;
                 capabilities: all dropped, none can be gained
    limits       rlimits: address space, file size, open files, core dumps; watch: memory and number
                 of the tree's processes, size of the writable folder and of what is printed, looked
                 at five times a second; the tree is killed above the limit

Covered: a candidate reads only what is listed, writes only into its folder, reaches no network, no
other process and no credential of the environment, and leaves no process behind.
Not covered: kernel bugs; the time between two looks of the watch (a burst of 0.2 s passes the
limits on memory and disk by what the machine can do in that time); side channels such as timing
and cache contention; on a GPU the driver's own interface, which needs its device nodes. Where a
layer is missing (macOS, old kernels, forbidden namespaces) the rest still holds, and `missing`
says what does not. Standard library only.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nightshift.fixed import layers as doors
from nightshift.fixed.layers import die_with, prctl

PROTECTIONS = ("files", "network", "processes", "privileges", "limits")
WATCH_S = 0.2
MB = 1 << 20
MAX_FILES = 10_000  # in the writable folder
MAX_LOG_MB = 50  # printed, where the output goes to a file

# Of the environment; everything else (keys, tokens, PYTHON*, LD_PRELOAD) stays outside.
ENVIRONMENT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NIGHTSHIFT_TRIAL", "NIGHTSHIFT_STUDY",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What is allowed inside. Paths are absolute; files or folders."""

    readable: Sequence[str]
    writable: Sequence[str] = ()
    hidden: Sequence[str] = ()  # below a readable folder, and yet not there
    listable: Sequence[str] = ()  # folders whose names may be read, not their files
    memory_mb: int
    disk_mb: int
    num_processes: int
    gpu: bool = False


@dataclass(kw_only=True)
class Report:
    """How it ended, seen from outside."""

    exit: int  # exit status; 128 + number for a signal
    killed: str | None  # the limit that was passed, with value and rule
    wall_s: float
    cpu_s: float
    peak_memory_mb: float


@dataclass(kw_only=True)
class Child:
    supervisor: int
    pipe: int  # from the supervisor: layers, then the report, a JSON line each
    control: int  # closed by us: the supervisor kills the tree
    layers: dict[str, list[str]] | None = None
    report: Report | None = None
    _unread: bytes = field(default=b"", repr=False)

    def started(self, timeout_s: float) -> bool:
        """Whether the sandbox is closed and the function runs; then `layers` is set."""
        deadline = time.monotonic() + timeout_s
        while self.layers is None and self.report is None:
            if not self._read(deadline - time.monotonic()):
                break
        return self.layers is not None

    def wait(self, timeout_s: float) -> Report | None:
        """The report, or None if it still runs."""
        deadline = time.monotonic() + timeout_s
        while self.report is None and self._read(deadline - time.monotonic()):
            pass
        return self.report

    def cpu_s(self) -> float:
        """CPU time of the tree so far, ended and reaped children included; not the supervisor's."""
        return sum(_cpu_s(pid) for pid in _descendants(self.supervisor))

    def kill(self) -> Report:
        """Ends the whole tree; returns when none of it is left."""
        if self.control >= 0:
            os.close(self.control)
            self.control = -1
        while self.report is None and self._read(10.0):
            pass
        return self.report or Report(
            exit=137, killed=None, wall_s=0.0, cpu_s=0.0, peak_memory_mb=0.0
        )

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.pipe], [], [], max(0.0, timeout_s))[0]:
            return False
        data = os.read(self.pipe, 65536)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for values in map(json.loads, lines):
            if "layers" in values:
                self.layers = values["layers"]
            else:
                self.report = Report(**values)
        if not data and self.report is None:  # the supervisor itself was killed
            self.report = Report(exit=137, killed=None, wall_s=0, cpu_s=0, peak_memory_mb=0)
        if self.report is not None:
            self._close()
        return True

    def _close(self) -> None:
        os.close(self.pipe)
        if self.control >= 0:
            os.close(self.control)
            self.control = -1
        try:
            os.waitpid(self.supervisor, 0)
        except ChildProcessError:
            pass


def missing(layers: dict[str, list[str]], required: Sequence[str]) -> list[str]:
    """The required protections that have no layer here."""
    return [name for name in required if not layers.get(name)]


def clean_environment(home: str) -> dict[str, str]:
    """What a candidate may see of the environment; `home` is its writable folder or /tmp."""
    kept = {key: value for key, value in os.environ.items() if key in ENVIRONMENT}
    tmp = os.path.join(home, "tmp") if home != "/tmp" else home
    return kept | {
        "HOME": home,
        "TMPDIR": tmp,
        "USER": "candidate",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "MPLCONFIGDIR": tmp,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(tmp, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(tmp, "triton"),
    }


def python_paths() -> list[str]:
    """Where this interpreter and its packages lie: readable for every candidate."""
    places = [sys.prefix, sys.base_prefix, os.path.realpath(sys.executable)]
    return sorted({os.path.realpath(p) for p in places} | set(places))


def spawn(
    sandbox: Sandbox,
    function: Callable[[], None],
    *,
    fds: Sequence[int] = (),
    log: int | None = None,
) -> Child:
    """Runs `function` in a fork of this process, inside the sandbox. `fds` stay open in it.

    The caller must be single-threaded as far as locks matter (no OpenMP, no CUDA yet).
    """
    reader, writer = os.pipe()
    theirs, ours = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    caller = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.close(ours)
            _supervise(sandbox, function, list(fds), log, writer, theirs, caller)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    os.close(theirs)
    return Child(supervisor=pid, pipe=reader, control=ours)


# ---- the supervisor: outside, same user, watches and kills ----


def _supervise(sandbox, function, fds, log, pipe, control, caller) -> None:
    started = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    layers: dict[str, list[str]] = {name: [] for name in PROTECTIONS}
    doors.own_namespaces(layers)
    die_with(caller)
    prctl(doors.PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    init = os.fork()
    if init == 0:
        _init(sandbox, function, fds, log, pipe, layers, supervisor)
    keep = {0, 1, 2, pipe, control} | ({log} if log is not None else set())
    _close_others(keep)
    peak = 0.0
    killed = None
    log_mb = _log_mb(log)
    inherited_kb = _memory_kb(supervisor)  # pages that each fork shares until it writes to them
    while True:
        ended, status, usage = os.wait4(init, os.WNOHANG)
        if ended:
            break
        memory, count = _tree_use(init, inherited_kb)
        peak = max(peak, memory)
        killed = _limit_passed(sandbox, memory, count, _log_mb(log) - log_mb)
        asked = bool(select.select([control], [], [], 0)[0])
        if killed or asked:
            os.kill(init, signal.SIGKILL)
            _, status, usage = os.wait4(init, 0)
            break
        _sleep_until_child(control, init)
    _kill_orphans()
    killed = killed or _limit_passed(sandbox, 0.0, 0, _log_mb(log) - log_mb)  # since the last look
    code = os.waitstatus_to_exitcode(status)
    report = Report(
        exit=code if code >= 0 else 128 - code,
        killed=killed,
        wall_s=round(time.monotonic() - started, 3),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
        peak_memory_mb=round(peak or usage.ru_maxrss / 1024, 1),
    )
    _tell(pipe, vars(report))
    os._exit(0)


def _sleep_until_child(control: int, init: int) -> None:
    """Up to WATCH_S, less if the init ends or the caller asks."""
    try:
        descriptor = os.pidfd_open(init)
    except (AttributeError, OSError):
        select.select([control], [], [], min(WATCH_S, 0.02))
        return
    select.select([control, descriptor], [], [], WATCH_S)
    os.close(descriptor)


def _limit_passed(sandbox: Sandbox, memory_mb: float, count: int, printed_mb: float) -> str | None:
    if printed_mb > MAX_LOG_MB:
        return f"log: {printed_mb:.0f} MB were printed, the limit is {MAX_LOG_MB} MB"
    if memory_mb > sandbox.memory_mb:
        return f"memory: {memory_mb:.0f} MB are used, the limit is {sandbox.memory_mb} MB"
    if count > sandbox.num_processes:
        return f"processes: {count} are running, the limit is {sandbox.num_processes}"
    for folder in sandbox.writable:
        size_mb, files = _folder_use(folder, sandbox.disk_mb)
        if size_mb > sandbox.disk_mb:
            return f"disk: {size_mb:.0f} MB were written, the limit is {sandbox.disk_mb} MB"
        if files > MAX_FILES:
            return f"disk: more than {MAX_FILES} files were written"
    return None


def _log_mb(log: int | None) -> float:
    return os.fstat(1 if log is None else log).st_size / MB


def _folder_use(folder: str, limit_mb: float) -> tuple[float, int]:
    """(MB, files), counted until either is clearly over; links are not followed."""
    size, files, open_folders = 0, 0, [folder]
    while open_folders:
        try:
            with os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    if entry.is_dir(follow_symlinks=False):
                        open_folders.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > MAX_FILES or size > 2 * limit_mb * MB:
                        return size / MB, files
        except OSError:  # removed meanwhile
            continue
    return size / MB, files


def _tree_use(root: int, inherited_kb: int) -> tuple[float, int]:
    """(resident anonymous and shared memory in MB, processes) of a process and its descendants."""
    memory_kb, count, waiting = 0, 0, [root]
    while waiting and count < 5000:
        pid = waiting.pop()
        count += 1
        waiting += _children(pid)
        memory_kb += max(0, _memory_kb(pid) - inherited_kb)
    return memory_kb / 1024, count


def _cpu_s(pid: int) -> float:
    """Of all its threads, to the nanosecond where the kernel has a clock for that; of the children
    that it has reaped, to the tick."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = [int(n) for n in file.read().rsplit(b")", 1)[1].split()[11:15]]
    except OSError:
        return 0.0
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    try:
        own_s = time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED of another process
    except OSError:
        own_s = sum(ticks[:2]) * tick_s
    return own_s + sum(ticks[2:]) * tick_s


def _memory_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = [line for line in file if line.startswith((b"RssAnon:", b"RssShmem:"))]
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}/task/{pid}") and not os.path.exists(
            f"/proc/{pid}/task/{pid}/children"
        ):
            return _children_by_scan(pid)  # a kernel without CONFIG_PROC_CHILDREN
    except OSError:
        pass
    return found


def _children_by_scan(parent: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rsplit(b")", 1)[1].split()[1]) == parent:
                    found.append(int(name))
        except OSError:
            continue
    return found


def _kill_orphans() -> None:
    """Without a pid namespace the tree's survivors are children of ours by now (subreaper)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for pid in _children(os.getpid()):
            for each in [pid, *_descendants(pid)]:
                try:
                    os.kill(each, signal.SIGKILL)
                except OSError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _tell(pipe: int, values: dict) -> None:
    try:
        os.write(pipe, json.dumps(values).encode() + b"\n")
    except BrokenPipeError:
        pass


# ---- the init: inside, process 1 of the namespace, closes the sandbox around itself ----


def _init(sandbox, function, fds, log, pipe, layers, supervisor) -> None:
    code = 1
    try:
        die_with(supervisor)
        os.setsid()
        mounted = doors.private_mounts(sandbox, layers)
        _standard_streams(log)
        _rlimits(sandbox)
        layers["limits"] = ["rlimits", "watch"]
        prctl(doors.PR_SET_NO_NEW_PRIVS, 1)
        doors.landlock(sandbox, layers, mounted)
        doors.drop_capabilities(layers)
        doors.seccomp(layers)
        _tell(pipe, {"layers": layers})
        worker = os.fork()
        if worker == 0:
            _work(function, fds, os.getppid())
        prctl(doors.PR_SET_DUMPABLE, 0)  # the worker cannot look into this process
        _close_others({0, 1, 2})
        code = _reap(worker)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _work(function, fds, init: int) -> None:
    code = 1
    try:
        die_with(init)
        _close_others({0, 1, 2, *fds})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def _reap(worker: int) -> int:
    """Waits for all; ends with the worker. Its orphans then die with the namespace."""
    while True:
        pid, status = os.wait()
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _standard_streams(log: int | None) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    if log is not None:
        os.dup2(log, 1)
        os.dup2(log, 2)
    text = {"encoding": "utf-8", "errors": "replace", "buffering": 1, "closefd": False}
    sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)


def _close_others(keep: set[int]) -> None:
    last = -1
    for fd in sorted(keep):
        if last + 1 < fd:  # an empty range would close them all
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, max(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _rlimits(sandbox: Sandbox) -> None:
    def limit(which: int, value: int) -> None:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 4096)
    limit(resource.RLIMIT_FSIZE, sandbox.disk_mb * MB)
    limit(resource.RLIMIT_NPROC, sandbox.num_processes)  # root is exempt: the watch holds
    if not sandbox.gpu:  # CUDA reserves address space by the terabyte
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, used + 2 * sandbox.memory_mb * MB)
