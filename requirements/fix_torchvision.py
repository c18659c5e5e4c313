"""Make `import torchvision` work beside a CPU build of torch; do nothing where it works already.

torchvision's registry build is made for CUDA. Beside a CPU torch its C++ operators do not load, and its
import then fails with "operator torchvision::nms does not exist", which transformers and vLLM turn into
failures of their own. Nothing in this project calls these operators; it is enough that their schemas exist.

Run by `make setup`. Where the import fails for that reason, it writes an import hook and a `.pth` file that
names it into this environment's site-packages, because the hook must hold in every process (vLLM and Ray
start their own). The hook costs nothing until torchvision is imported.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''\
"""Written by sima-ray's `make setup` (requirements/fix_torchvision.py): see there for the reason."""

import importlib.abc
import sys


class _DefineSchemas(importlib.abc.MetaPathFinder):
    """Define the operators' schemas just before the first import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None  # never finds a module itself: the ordinary finders go on


def _define():
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    sys.modules[__name__]._library = library  # schemas live as long as their library


sys.meta_path.insert(0, _DefineSchemas())
'''


def imports_cleanly() -> tuple[bool, str]:
    """Import torchvision in a fresh process: whether it worked, and the last line of the error."""
    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    return done.returncode == 0, done.stderr.strip().rpartition("\n")[2]


def main() -> int:
    sound, error = imports_cleanly()
    if sound:
        return 0
    if "torchvision::nms does not exist" not in error:
        print(f"torchvision cannot be imported: {error}", file=sys.stderr)
        return 1
    site = Path(sysconfig.get_path("purelib"))
    (site / "_sima_torchvision_hook.py").write_text(HOOK)
    (site / "sima_torchvision_hook.pth").write_text("import _sima_torchvision_hook\n")
    sound, error = imports_cleanly()
    if not sound:
        print(f"torchvision still cannot be imported: {error}", file=sys.stderr)
        return 1
    print("torchvision: operator schemas defined by an import hook (CUDA build beside a CPU torch)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
