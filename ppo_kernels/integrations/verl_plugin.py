"""What verl's entry point group ``verl.plugins`` loads: importing this puts our ops in place of verl's functions.

verl loads it at the end of ``import verl``, in every process, and hides what a plugin raises; so it reports for itself.
Where PPO_KERNELS_PATCH is set, it decides: this does nothing unless verl is among its names.
"""

from __future__ import annotations

import logging

from ppo_kernels.integrations import named_by_environment
from ppo_kernels.integrations.verl import ADAPTER

try:
    _names = named_by_environment()
    if _names is None or "verl" in _names:
        ADAPTER.apply(strict=False)
except Exception:
    logging.getLogger("ppo_kernels").exception("verl: our ops are not in place")
    raise
