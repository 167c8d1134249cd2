"""What one process may hold of this package: one copy, in the main interpreter.

Torch's operators belong to the process. A second copy of the library that registers them again ends in a crash inside
torch, and so does torch itself in another interpreter, so both are refused before anything is loaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path


def refuse_another_interpreter() -> None:
    """Before torch is imported, which hangs or crashes there."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # from Python 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "ppo_kernels works in the main interpreter of a process alone, and this is a subinterpreter, where "
                "torch crashes: import it in the main one, or start a process (multiprocessing) in place of this one"
            )
        return


def refuse_another_copy(package: Path, op: str) -> None:
    """``op`` is one that the C++ library registers. Call ``claim`` once the ops of ``package`` are there."""
    import torch

    loaded = [Path(path) for path in torch.ops.loaded_libraries]
    claimed = [path for path in loaded if path.name == package.name]
    ours = any(path.parent == package for path in loaded)  # by torch.ops.load_library
    if claimed or (hasattr(torch.ops.ppo_kernels, op) and not ours):
        source = (claimed or [path for path in loaded if path.name.startswith("_C")] or [Path("another folder")])[0]
        raise ImportError(
            f"the ops of ppo_kernels are in this process already, from {source}, and torch takes no second copy of "
            f"them, here {package}: keep one on sys.path, import it once, and start Python again"
        )


def claim(package: Path) -> None:
    """Note in torch's own list of what brought ops into this process that this package did."""
    import torch

    torch.ops.loaded_libraries.add(str(package))
