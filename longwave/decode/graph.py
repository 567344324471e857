"""One CUDA graph of a step: captured once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UP = 3  # steps before the capture: kernels compile and libraries take their workspaces


class Graph:
    """A captured step. `logits` are written anew by every `replay`."""

    def __init__(self, run: Callable[[], torch.Tensor], states: Sequence[torch.Tensor], live: torch.Tensor):
        """run: the step, device work alone, on tensors that stay where they are. states: what it advances, and what it
        changes of the storage that later steps read; put back after each warm-up, so that none of them counts. live: a
        tensor that lies where the work is done."""
        device = live.device
        before = [state.clone() for state in states]
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        run()
                        for state, was in zip(states, before, strict=True):
                            state.copy_(was)
            finally:  # whoever takes the storage back waits for what was written
                torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.logits = run()

    def replay(self) -> None:
        self._graph.replay()
