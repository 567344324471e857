"""Tokens that lie in host memory, and the blocks of them that were read last on the device as well.

A block is `block` tokens of a row, from a multiple of it on. Each row has `slots` places for them; where all are taken
the block that was asked for longest ago gives way, and none that is asked for now.
"""

from __future__ import annotations

import torch

from longwave.store.tokens import TokenBuffer, writable


class Resident:
    """Copies on `device` of blocks of a `TokenBuffer`'s K and V. Whoever changes those says so: see `forget`."""

    def __init__(self, tokens: TokenBuffer, block: int, slots: int, device: torch.device):
        self.tokens, self.block, self.slots, self.device = tokens, block, slots, device
        self.k, self.v = (  # [batch, kv_heads, slots * block, head_dim]
            x.new_zeros(*x.shape[:2], slots * block, x.shape[3], device=device) for x in tokens.tensors()
        )
        # of each row, block to slot, what was asked for longest ago first
        self.held: list[dict[int, int]] = [{} for _ in tokens.lengths]

    def forget(self, lengths: list[int]) -> None:
        """Row b's tokens from lengths[b] on are no longer what they were."""
        for held, length in zip(self.held, lengths, strict=True):
            for block in [block for block in held if block >= length // self.block]:
                del held[block]

    def read(self, index: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of row b's first count[b] tokens index [batch, n], and anything behind them: [batch, kv_heads, n,
        head_dim] each, on the device. ValueError where they lie in more blocks than there are slots."""
        if not writable(self.k):  # made under inference_mode, read outside
            self.k, self.v = self.k.clone(), self.v.clone()
        blocks = (index // self.block).cpu()
        at = torch.zeros_like(blocks)
        for row, some in enumerate(count.tolist()):
            wanted, where = blocks[row, :some].unique(return_inverse=True)
            slots = torch.tensor(self._bring(row, wanted.tolist()), dtype=torch.long)
            at[row, :some] = slots[where]
        place = at.to(self.device) * self.block + index % self.block
        rows = torch.arange(index.shape[0], device=self.device)[:, None]
        return self.k[rows, :, place].transpose(1, 2), self.v[rows, :, place].transpose(1, 2)

    def _bring(self, row: int, wanted: list[int]) -> list[int]:
        """Slots of a row's wanted blocks, all of which lie on the device then."""
        if len(wanted) > self.slots:
            raise ValueError(f"{len(wanted)} blocks are read at once, and there is room for {self.slots} of a row")
        held = self.held[row]
        for block in wanted:
            if block in held:
                held[block] = held.pop(block)  # the latest one now
        free = set(range(self.slots)) - set(held.values())
        for block in wanted:
            if block in held:
                continue
            slot = free.pop() if free else held.pop(next(iter(held)))
            for own, source in zip((self.k, self.v), self.tokens.tensors(), strict=True):
                part = source[row, :, block * self.block : (block + 1) * self.block]
                own[row, :, slot * self.block : slot * self.block + part.shape[1]] = part.to(self.device)
            held[block] = slot
        return [held[block] for block in wanted]

    def copies(self) -> list[torch.Tensor]:
        return [self.k, self.v]
