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
                 of the tree's processes and the size of the writable folder, looked at five times
                 a second; the tree is killed above the limit

Covered: a candidate reads only what is listed, writes only into its folder, reaches no network, no
other process and no credential of the environment, and leaves no process behind.
Not covered: kernel bugs; the time between two looks of the watch (a burst of 0.2 s passes the
limits on memory and disk by what the machine can do in that time); side channels such as timing
and cache contention; on a GPU the driver's own interface, which needs its device nodes. Where a
layer is missing (macOS, old kernels, forbidden namespaces) the rest still holds, and `missing`
says what does not. Standard library only.
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROTECTIONS = ("files", "network", "processes", "privileges", "limits")
WATCH_S = 0.2
MB = 1 << 20
TMP_MB = 64
SHM_MB = 256
MAX_FILES = 10_000  # in the writable folder

# What Python, torch and a compiler need of the system; what is not there is left out.
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
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
    _own_namespaces(layers)
    _die_with(caller)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    init = os.fork()
    if init == 0:
        _init(sandbox, function, fds, log, pipe, layers, supervisor)
    keep = {0, 1, 2, pipe, control}
    _close_others(keep)
    peak = 0.0
    killed = None
    while True:
        ended, status, usage = os.wait4(init, os.WNOHANG)
        if ended:
            break
        memory, count = _tree_use(init)
        peak = max(peak, memory)
        killed = _limit_passed(sandbox, memory, count)
        asked = bool(select.select([control], [], [], 0)[0])
        if killed or asked:
            os.kill(init, signal.SIGKILL)
            _, status, usage = os.wait4(init, 0)
            break
        _sleep_until_child(control, init)
    _kill_orphans()
    code = os.waitstatus_to_exitcode(status)
    report = Report(
        exit=code if code >= 0 else 128 - code,
        killed=killed,
        wall_s=round(time.monotonic() - started, 3),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
        peak_memory_mb=round(max(peak, usage.ru_maxrss / 1024), 1),
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


def _limit_passed(sandbox: Sandbox, memory_mb: float, count: int) -> str | None:
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


def _tree_use(root: int) -> tuple[float, int]:
    """(resident anonymous and shared memory in MB, processes) of a process and its descendants."""
    memory_kb, count, waiting = 0, 0, [root]
    while waiting and count < 5000:
        pid = waiting.pop()
        count += 1
        waiting += _children(pid)
        try:
            with open(f"/proc/{pid}/status", "rb") as file:
                for line in file:
                    if line.startswith((b"RssAnon:", b"RssShmem:")):
                        memory_kb += int(line.split()[1])
        except OSError:
            continue
    return memory_kb / 1024, count


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
        _die_with(supervisor)
        os.setsid()
        mounted = _private_mounts(sandbox, layers)
        _standard_streams(log)
        _rlimits(sandbox)
        layers["limits"] = ["rlimits", "watch"]
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _landlock(sandbox, layers, mounted)
        _drop_capabilities(layers)
        _seccomp(layers)
        _tell(pipe, {"layers": layers})
        worker = os.fork()
        if worker == 0:
            _work(function, fds, os.getppid())
        _prctl(PR_SET_DUMPABLE, 0)  # the worker cannot look into this process
        _close_others({0, 1, 2})
        code = _reap(worker)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _work(function, fds, init: int) -> None:
    code = 1
    try:
        _die_with(init)
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
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    sys.stderr.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)


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


# ---- the layers ----

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 36, 38, 47
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *args) -> int:
    """A function of the C library. Raises OSError."""
    result = getattr(_libc, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, *values: int) -> int:
    padded = [*values, 0, 0, 0, 0][:4]
    return _libc.prctl(option, *(ctypes.c_ulong(v) for v in padded))


def _die_with(parent: int) -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: the parent is outside our pid namespace
        os._exit(1)


def _own_namespaces(layers: dict[str, list[str]]) -> None:
    """In the supervisor: user and pid namespace; the init makes the rest."""
    if sys.platform != "linux":
        return
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWPID)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        try:
            _call("unshare", CLONE_NEWPID)  # root without user namespaces
        except OSError:
            layers["processes"].append("subreaper")
            return
    layers["processes"].append("namespace")


def _private_mounts(sandbox: Sandbox, layers: dict[str, list[str]]) -> bool:
    """Network, IPC, host name and the view of the file system. Whether the view is in place."""
    if sys.platform != "linux":
        return False
    try:
        _call("unshare", CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        layers["network"].append("namespace")
    except OSError:
        pass
    try:
        _call("unshare", CLONE_NEWNS)
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
    except OSError:
        return False
    try:
        _build_view(sandbox, bool(layers["processes"] == ["namespace"]))
    except OSError as error:
        print(f"sandbox: no private mounts ({error})", file=sys.stderr)
        return False
    layers["files"].append("mounts")
    return True


def _mount(source, target, kind, flags, data=None) -> None:
    encoded = [None if v is None else os.fsencode(v) for v in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _paths_and_links(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Real paths of what exists, and the symbolic links on the way: link -> its text."""
    paths: list[str] = []
    links: dict[str, str] = {}

    def walk(path: str, depth: int = 0) -> None:
        current = "/"
        parts = [part for part in path.split("/") if part]
        for index, part in enumerate(parts):
            current = os.path.join(current, part)
            if os.path.islink(current) and depth < 40:
                links[current] = os.readlink(current)
                target = os.path.normpath(os.path.join(os.path.dirname(current), links[current]))
                walk(os.path.join(target, *parts[index + 1 :]), depth + 1)
                return
        if os.path.lexists(current) and current not in paths:
            paths.append(current)

    for path in wanted:
        walk(os.path.normpath(path))
    return paths, links


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _build_view(sandbox: Sandbox, own_pids: bool) -> None:
    """A tmpfs as root with the allowed paths bound into it, entered with pivot_root."""
    devices = [*DEVICES, *_gpu_devices(sandbox)]
    readable, links = _paths_and_links([*sandbox.readable, *SYSTEM, *_gpu_readable(sandbox)])
    writable, more_links = _paths_and_links([*sandbox.writable, *devices])
    links |= more_links
    readable = [p for p in readable if not any(_is_below(p, q) for q in readable if q != p)]
    plan = [(p, MS_RDONLY) for p in readable] + [(p, 0) for p in writable]
    # Held open, for the tmpfs below may cover them; each is bound through its descriptor.
    sources = [(os.open(path, os.O_PATH), path, flags) for path, flags in sorted(plan)]
    kinds = {path: os.path.isdir(path) for path, _ in plan}
    hidden = [(os.path.realpath(p), os.path.isdir(p)) for p in sandbox.hidden if os.path.exists(p)]
    root = next(p for p in ("/tmp", "/var/tmp", "/mnt", "/run") if os.path.isdir(p))
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in ("proc", "tmp", "dev/shm"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={TMP_MB}m,mode=1777")
    _mount("tmpfs", f"{root}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={SHM_MB}m,mode=1777")
    for fd, path, flags in sources:
        target = root + path
        if not os.path.lexists(target):
            if kinds[path]:
                os.makedirs(target, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
        _mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
        if flags:
            _read_only(target)
        os.close(fd)
    for link, text in links.items():
        if not os.path.lexists(root + link):
            os.makedirs(os.path.dirname(root + link), exist_ok=True)
            os.symlink(text, root + link)
    for path, is_folder in hidden:
        if os.path.lexists(root + path):
            if is_folder:
                _mount("tmpfs", root + path, "tmpfs", MS_RDONLY, "size=4k,mode=000")
            else:
                _mount("/dev/null", root + path, None, MS_BIND)
    _mount_proc(f"{root}/proc", own_pids)
    _read_only(root, recursive=False)
    os.chdir(root)
    _call("syscall", ctypes.c_long(_NUMBERS["pivot_root"]), b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def _read_only(target: str, recursive: bool = True) -> None:
    attributes = struct.pack("QQQQ", 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    at_recursive = 0x8000 if recursive else 0
    try:
        size = ctypes.c_size_t(len(attributes))
        place = ctypes.c_int(-100), os.fsencode(target), ctypes.c_uint(at_recursive)
        _call("syscall", ctypes.c_long(442), *place, attributes, size)
    except OSError:  # before Linux 5.12: this mount alone, with the flags that it has
        flags = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def _mount_proc(target: str, own_pids: bool) -> None:
    """A /proc of this namespace; in some containers the kernel refuses that, then the host's."""
    try:
        if not own_pids:
            raise OSError("no pid namespace")
        _mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        _mount("/proc", target, None, MS_BIND | MS_REC)


def _gpu_devices(sandbox: Sandbox) -> list[str]:
    if not sandbox.gpu:
        return []
    names = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    return [f"/dev/{name}" for name in names]


def _gpu_readable(sandbox: Sandbox) -> list[str]:
    return ["/sys", "/opt/cuda", "/etc/OpenCL", "/etc/vulkan"] if sandbox.gpu else []


def _landlock(sandbox: Sandbox, layers: dict[str, list[str]], mounted: bool) -> None:
    """Linux Landlock: the list of paths once more, and no TCP."""
    if sys.platform != "linux":
        return
    abi = _libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if abi < 1:
        return
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    everything = (1 << rights) - 1
    reading = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read folder
    of_files = everything & (1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15)
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = _call(
        "syscall", ctypes.c_long(444), attributes, ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    readable, _ = _paths_and_links([*sandbox.readable, *SYSTEM, *_gpu_readable(sandbox), "/proc"])
    writable, _ = _paths_and_links(
        [*sandbox.writable, *DEVICES, *_gpu_devices(sandbox), *(["/tmp", "/dev/shm"] * mounted)]
    )
    hidden = [os.path.realpath(path) for path in sandbox.hidden]
    allowed = [rule for path in readable for rule in _without(path, hidden, reading)]
    allowed += [(p, everything) for p in writable]
    for path, access in allowed:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access &= everything if stat.S_ISDIR(os.fstat(fd).st_mode) else of_files
        rule = struct.pack("=Qi", access, fd)
        _call(
            "syscall",
            ctypes.c_long(445),
            ctypes.c_int(rules),
            ctypes.c_int(1),
            rule,
            ctypes.c_uint(0),
        )
        os.close(fd)
    _call("syscall", ctypes.c_long(446), ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)
    layers["files"].append("landlock")
    if abi >= 4:
        layers["network"].append("landlock")


def _without(path: str, hidden: Sequence[str], access: int) -> Iterator[tuple[str, int]]:
    """The path; or, where something hidden lies below it, its entries without that.

    Folders on the way to something hidden may be listed (imports need that), names below it too.
    """
    if path in hidden:
        return
    if any(_is_below(h, path) for h in hidden) and os.path.isdir(path):
        yield path, 1 << 3  # read folder
        for entry in os.scandir(path):
            yield from _without(entry.path, hidden, access)
    else:
        yield path, access


def _drop_capabilities(layers: dict[str, list[str]]) -> None:
    if sys.platform != "linux":
        return
    for capability in range(64):
        _prctl(PR_CAPBSET_DROP, capability)
    _prctl(PR_CAP_AMBIENT, 4)  # clear all
    header = struct.pack("Ii", 0x20080522, 0)
    if _libc.capset(header, struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)) == 0:
        layers["privileges"].append("capabilities")


_X86_64 = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "add_key": 248,
    "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272,
    "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "open_by_handle_at": 304, "name_to_handle_at": 303, "quotactl": 179,
    "swapon": 167, "swapoff": 168, "reboot": 169, "acct": 163, "settimeofday": 164,
    "clock_settime": 227, "clock_adjtime": 305, "adjtimex": 159, "sethostname": 170,
    "setdomainname": 171, "syslog": 103, "iopl": 172, "ioperm": 173,
    "clone": 56, "socket": 41, "ioctl": 16,
}  # fmt: skip
_AARCH64 = {
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "add_key": 217,
    "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
    "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97,
    "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273,
    "delete_module": 106, "open_by_handle_at": 265, "name_to_handle_at": 264, "quotactl": 60,
    "swapon": 224, "swapoff": 225, "reboot": 142, "acct": 89, "settimeofday": 170,
    "clock_settime": 112, "clock_adjtime": 266, "adjtimex": 171, "sethostname": 161,
    "setdomainname": 162, "syslog": 116,
    "clone": 220, "socket": 198, "ioctl": 29,
}  # fmt: skip
_SHARED = {  # the same number everywhere
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
_ARCHITECTURE = {"x86_64": (_X86_64, 0xC000003E), "aarch64": (_AARCH64, 0xC00000B7)}
_NUMBERS, _AUDIT_ARCH = _ARCHITECTURE.get(platform.machine(), ({}, 0))
_CHECKED = ("clone", "socket", "ioctl")  # by their arguments
CLONE3 = 435
NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
AF_UNIX, EPERM, EACCES, ENOSYS = 1, 1, 13, 38


def _seccomp(layers: dict[str, list[str]]) -> None:
    """A filter on system calls (seccomp BPF), kept by everything that is forked from here."""
    if sys.platform != "linux" or not _NUMBERS:
        return
    program = b"".join(struct.pack("HBBI", *line) for line in _filter())
    buffer = ctypes.create_string_buffer(program)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    wanted = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(wanted), 0, 0) == 0:
        layers["privileges"].append("seccomp")
        layers["network"].append("seccomp")


def _filter() -> list[tuple[int, int, int, int]]:
    """Classic BPF lines (code, jump if true, jump if false, constant)."""
    load, equal, any_bit, at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, error, kill = 0x7FFF0000, 0x00050000, 0x80000000
    number_at, arch_at, first_argument, second_argument = 0, 4, 16, 24
    lines = [
        (load, 0, 0, arch_at),
        (equal, 1, 0, _AUDIT_ARCH),
        (answer, 0, 0, kill),
        (load, 0, 0, number_at),
    ]
    if platform.machine() == "x86_64":
        lines += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, error | EPERM)]  # the x32 calls
    denied = [n for name, n in (_NUMBERS | _SHARED).items() if name not in _CHECKED]
    for number in denied:
        lines += [(equal, 0, 1, number), (answer, 0, 0, error | EPERM)]
    lines += [(equal, 0, 1, CLONE3), (answer, 0, 0, error | ENOSYS)]  # libc falls back to clone
    lines += [
        (equal, 0, 4, _NUMBERS["clone"]),
        (load, 0, 0, first_argument),
        (any_bit, 0, 1, NEW_NAMESPACES),
        (answer, 0, 0, error | EPERM),
        (answer, 0, 0, allow),
        (equal, 0, 4, _NUMBERS["socket"]),
        (load, 0, 0, first_argument),
        (equal, 1, 0, AF_UNIX),
        (answer, 0, 0, error | EACCES),
        (answer, 0, 0, allow),
        (equal, 0, 4, _NUMBERS["ioctl"]),
        (load, 0, 0, second_argument),
        (equal, 1, 0, TIOCSTI),
        (equal, 0, 1, TIOCLINUX),
        (answer, 0, 0, error | EPERM),
        (answer, 0, 0, allow),
    ]
    return lines
