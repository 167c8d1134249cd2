"""Calls as one CUDA graph: what the device needs for them, without what the host does between two launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = Callable[[], object]


def captured(calls: list[Call]) -> tuple[Call | None, str]:
    """One call that does all of them in turn; or None, and why there is no graph.

    What they return is kept while it lasts, so each has outputs of its own and a whole round passes before memory comes
    round again. A library that waits for the device, or takes memory by other means than torch, cannot be captured.
    """
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:1] * 3 + calls:
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            kept = [call() for call in calls]
    except Exception as error:  # of any library: its row is timed by events
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def replay() -> object:
        graph.replay()
        return kept

    return replay, ""
