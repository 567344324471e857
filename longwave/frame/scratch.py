"""Memory that one layer's pass takes and the next takes again: counted while it is held, given back with the pass."""

import torch


class Scratch:
    """K and V of one row of one layer, dense. `most` is the bytes that a pass took at most."""

    def __init__(self) -> None:
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.most = 0

    def take(self, like: torch.Tensor, tokens: int, beside: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors [1, heads, tokens, head_dim + beside] in the dtype and on the device of like
        [.., heads, .., head_dim]."""
        heads, dim = like.shape[1], like.shape[3] + beside
        held, needed = self._held, heads * tokens * dim
        if held is None or (held[0].device, held[0].dtype) != (like.device, like.dtype) or held[0].numel() < needed:
            held = self._held = None  # the old one goes before the new one comes
            self._held = held = (like.new_empty(needed), like.new_empty(needed))
            self.most = max(self.most, sum(x.nbytes for x in held))
        k, v = (x[:needed].view(1, heads, tokens, dim) for x in held)
        return k, v

    def beside(self, nbytes: int) -> None:
        """So many bytes more are held in a pass, by somebody else."""
        self.most = max(self.most, nbytes + sum(x.nbytes for x in self.tensors()))

    def tensors(self) -> list[torch.Tensor]:
        return list(self._held or ())

    def clear(self) -> None:
        self._held = None

    def __deepcopy__(self, memo: object) -> "Scratch":
        return Scratch()
