"""The system calls that a candidate may not make, as a seccomp BPF program.

Denied by number: tracing other processes, kernel modules, keys, bpf, performance counters, mounts
and namespaces, io_uring (which would bypass this filter), clocks, swap, reboot. Denied by argument:
sockets that are not of the unix family, clones into new namespaces, typing into a terminal. Calls
of another architecture end the process.

Covered: x86-64 (the x32 calls too) and arm64. Not covered: other processors have no filter.
Standard library only.
"""

import platform
import struct

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


PIVOT_ROOT = _NUMBERS.get("pivot_root", -1)


def program() -> bytes:
    """Instructions for the kernel; empty where the processor is not known."""
    return b"".join(struct.pack("HBBI", *line) for line in _filter()) if _NUMBERS else b""


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
