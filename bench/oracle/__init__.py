"""Every op in float64 by plain loops over tokens: what the tests believe, sharing no code with the package.

Tensors come in, Python floats and numpy float64 arrays go out. Gradients are derived by hand from the formulas, with
the subgradients that the ops promise: a clamp passes the gradient at its bounds, a tie of max or min halves it.
``oracle.gae`` is the function ``gae`` of ``oracle/gae.py``, and so for every op.
"""

from __future__ import annotations

import importlib
import pkgutil

from bench.oracle._kl import kl_token as kl_token
from bench.oracle._tokens import per_token as per_token
from bench.oracle._tokens import rows_of as rows_of

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        globals()[_module.name] = getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name)
