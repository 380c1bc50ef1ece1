"""The layers of the sandbox, each closing one door of this process: see sandbox.py for the whole.

Each function adds its name to `layers` if the kernel granted it, and is silent if it did not: the
caller reports what is missing. They are called in this order, by the supervisor (`own_namespaces`)
and then by the init inside: mounts first, for they need the capabilities that are dropped later.

Covered: Linux 5.13 and later on x86-64 and arm64, as root and as an ordinary user; older kernels
and other systems get what they have.
Not covered: containers that forbid user namespaces keep Landlock and seccomp only; in those that
refuse a fresh /proc the host's is shown, from which Landlock keeps everything but names and
command lines. Standard library only.
"""

import ctypes
import os
import signal
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nightshift.fixed.seccomp import PIVOT_ROOT, program

TMP_MB = 64
SHM_MB = 256

# What Python, torch and a compiler need of the system; what is not there is left out.
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 36, 38, 47
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str, *args) -> int:
    """A function of the C library. Raises OSError."""
    result = getattr(_libc, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option: int, *values: int) -> int:
    padded = [*values, 0, 0, 0, 0][:4]
    return _libc.prctl(option, *(ctypes.c_ulong(v) for v in padded))


def die_with(parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: the parent is outside our pid namespace
        os._exit(1)


def own_namespaces(layers: dict[str, list[str]]) -> None:
    """In the supervisor: user and pid namespace; the init makes the rest."""
    if sys.platform != "linux":
        return
    uid, gid = os.getuid(), os.getgid()
    try:
        call("unshare", CLONE_NEWUSER | CLONE_NEWPID)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        try:
            call("unshare", CLONE_NEWPID)  # root without user namespaces
        except OSError:
            layers["processes"].append("subreaper")
            return
    layers["processes"].append("namespace")


def private_mounts(sandbox, layers: dict[str, list[str]]) -> bool:
    """Network, IPC, host name and the view of the file system. Whether the view is in place."""
    if sys.platform != "linux":
        return False
    try:
        call("unshare", CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        layers["network"].append("namespace")
    except OSError:
        pass
    try:
        call("unshare", CLONE_NEWNS)
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
    call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


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


def _build_view(sandbox, own_pids: bool) -> None:
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
    call("syscall", ctypes.c_long(PIVOT_ROOT), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def _read_only(target: str, recursive: bool = True) -> None:
    attributes = struct.pack("QQQQ", 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    at_recursive = 0x8000 if recursive else 0
    try:
        size = ctypes.c_size_t(len(attributes))
        place = ctypes.c_int(-100), os.fsencode(target), ctypes.c_uint(at_recursive)
        call("syscall", ctypes.c_long(442), *place, attributes, size)
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


def _gpu_devices(sandbox) -> list[str]:
    if not sandbox.gpu:
        return []
    names = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    return [f"/dev/{name}" for name in names]


def _gpu_readable(sandbox) -> list[str]:
    return ["/sys", "/opt/cuda", "/etc/OpenCL", "/etc/vulkan"] if sandbox.gpu else []


def landlock(sandbox, layers: dict[str, list[str]], mounted: bool) -> None:
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
    rules = call("syscall", ctypes.c_long(444), attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
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
        call(
            "syscall",
            ctypes.c_long(445),
            ctypes.c_int(rules),
            ctypes.c_int(1),
            rule,
            ctypes.c_uint(0),
        )
        os.close(fd)
    call("syscall", ctypes.c_long(446), ctypes.c_int(rules), ctypes.c_uint(0))
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


def drop_capabilities(layers: dict[str, list[str]]) -> None:
    if sys.platform != "linux":
        return
    for capability in range(64):
        prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_CAP_AMBIENT, 4)  # clear all
    header = struct.pack("Ii", 0x20080522, 0)
    if _libc.capset(header, struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)) == 0:
        layers["privileges"].append("capabilities")


def seccomp(layers: dict[str, list[str]]) -> None:
    """A filter on system calls (seccomp BPF), kept by everything that is forked from here."""
    lines = program()
    if sys.platform != "linux" or not lines:
        return
    buffer = ctypes.create_string_buffer(lines)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    wanted = Program(len(lines) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(wanted), 0, 0) == 0:
        layers["privileges"].append("seccomp")
        layers["network"].append("seccomp")
