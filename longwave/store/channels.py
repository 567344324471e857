"""Which channels of each head are kept, and the index bookkeeping that follows from it."""

from collections.abc import Iterator

import torch


class HeadGroup:
    """Heads that keep the same number of channels, so that they can share one matrix product."""

    def __init__(self, heads: list[int], kept: torch.Tensor):
        """`kept` [heads, head_dim] bool: True where a channel is kept."""
        self.heads = torch.tensor(heads)
        self.kept = int(kept[0].sum())
        self.order = torch.argsort((~kept).int(), dim=-1, stable=True)  # [heads, head_dim]: kept first, then the rest
        self.inverse = torch.argsort(self.order, dim=-1)


class ChannelSplit:
    """The kept and compressed channels of one layer's K or V.

    `kept` is a bool table [kv_heads, head_dim]. Heads with equal counts form a `HeadGroup`; a profile that keeps the
    same number in every head gives a single group, which is the fast case.
    """

    def __init__(self, kept: torch.Tensor):
        if kept.ndim != 2 or kept.dtype != torch.bool:
            raise ValueError(f"kept must be a bool table [kv_heads, head_dim], got {tuple(kept.shape)} {kept.dtype}")
        self.table = kept.cpu()
        self.heads, self.dim = self.table.shape
        counts = self.table.sum(-1)
        self.groups = []
        for count in sorted(set(counts.tolist())):
            heads = (counts == count).nonzero()[:, 0]
            self.groups.append(HeadGroup(heads.tolist(), self.table[heads]))
        self.total_kept = int(counts.sum())
        self.total_comp = self.heads * self.dim - self.total_kept

    @property
    def device(self) -> torch.device:
        return self.groups[0].order.device

    def move(self, device: torch.device | str) -> None:
        for group in self.groups:
            group.heads, group.order, group.inverse = (x.to(device) for x in (group.heads, group.order, group.inverse))

    def tensors(self) -> Iterator[torch.Tensor]:
        for group in self.groups:
            yield from (group.heads, group.order, group.inverse)

    def split(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each group, x [B, H, R, D] -> (kept [B, heads, R, n], compressed [B, heads, R, c])."""
        for group in self.groups:
            part = x if len(self.groups) == 1 else x.index_select(1, group.heads)
            part = part.gather(-1, group.order[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))
            yield part[..., : group.kept], part[..., group.kept :]

    def join(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The inverse of `split`."""
        whole = []
        for group, (kept, comp) in zip(self.groups, parts, strict=True):
            part = torch.cat([kept, comp], dim=-1)
            whole.append(part.gather(-1, group.inverse[None, :, None].expand(part.shape[0], -1, part.shape[2], -1)))
        return self.stack(whole)

    def stack(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Group results [B, heads, ...] put back in head order [B, H, ...]."""
        if len(parts) == 1:
            return parts[0]
        order = torch.argsort(torch.cat([group.heads for group in self.groups]))
        return torch.cat(parts, dim=1).index_select(1, order)

    def select(self, parts: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each group, its heads of a tensor [B, H, ...]."""
        for group in self.groups:
            yield parts if len(self.groups) == 1 else parts.index_select(1, group.heads)
