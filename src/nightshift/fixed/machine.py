"""The machine's side of a run: device, arithmetic, memory, and the facts to put on record."""

import ctypes
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from nightshift.fixed.config import ConfigError, Runtime, Train


def pick_device(runtime: Runtime) -> torch.device:
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device (cuda): this machine or this build of torch has no CUDA device. "
            "Use runtime.device=cpu, or install a CUDA build of torch"
        )
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(runtime.device)


def pick_dtype(device: torch.device, train: Train) -> torch.dtype:
    """bf16 where the hardware multiplies it (CUDA; CPUs with AVX512-BF16 or AMX), else float32."""
    if train.precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[train.precision]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def ruler_dtype(device: torch.device, train: Train) -> torch.dtype:
    """What a model is scored in: float32 on a CPU, where it costs little and no rounding depends on
    the batch; on CUDA what it was trained in."""
    return pick_dtype(device, train) if device.type == "cuda" else torch.float32


def cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_compile(device: torch.device, train: Train) -> bool:
    """On CUDA by default; on a CPU compiling costs more than a short run can win back."""
    return {"on": True, "off": False, "auto": device.type == "cuda"}[train.compile]


def prepare(runtime: Runtime, device: torch.device) -> None:
    """Process-wide settings; call once, before any tensor work."""
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of giving them back to the kernel.

    Logits and their gradients are tens of MB, freed and allocated again at every step; without
    this the kernel clears the same pages each time (measured: 8.1k -> 13.5k tokens/s,
    docs/decisions.md).
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # another libc: only slower
        pass


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def matmul_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few square matmuls in `dtype`, in FLOP/s: what `mfu` is a share of."""
    n, repeats = (8192, 8) if device.type == "cuda" else (1024, 5)
    a = torch.ones(n, n, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(repeats):
        started_at = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_at)
    return 2 * n**3 / best_s


def facts(device: torch.device) -> dict:
    """What to write on a record: versions and hardware, clocks where they can be read."""
    import lightning

    machine = {
        "device": device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        machine |= _gpu_clocks()
    return machine


def commit_of(root: Path) -> str | None:
    """The commit of the code; with `+` when code or conf differ from it; null outside git."""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "src", "conf"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            line = next((line for line in file if line.startswith("model name")), None)
    except OSError:
        line = None
    return line.split(":", 1)[1].strip() if line else platform.processor() or platform.machine()


def _gpu_clocks() -> dict:
    if not shutil.which("nvidia-smi"):
        return {}
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if answer.returncode != 0:
        return {}
    values = answer.stdout.splitlines()[0].split(", ")
    return dict(
        zip(
            ("driver", "sm_clock_mhz", "max_sm_clock_mhz", "power_limit_w", "gpu_celsius"),
            values,
            strict=False,
        )
    )
