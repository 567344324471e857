"""treekv: neighbours compete two by two, in turns along the cache: sparse far back, dense near the end.

Source: TreeKV, arXiv 2501.04987. With c middle tokens and one too many, slots i and i + 1 are compared by the attention
that they got in the mean of the queries that saw them; the left one stays if it got more. Then i moves on: by its text
and figure to the next slot, cyclically; by its printed line 16, in effect, two slots on ("printed"). One round of the
first is a pairwise knockout of 2 c tokens.

After a prompt or chunk blocks of tokens play the role of tokens, worth what the last `block` queries gave them. Not
said there, and ours: no block is larger than half of what is kept, the ragged end stays, room that no block fills goes
to the newest dropped tokens, and the turn starts anew. Sums over all queries go on in steps. There keys lie in slots:
positions="slots"; without protected zones sinks=0, window=0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs
from longwave.frame.observe import votes_of
from longwave.methods.evicting import Evicting, Held

RULES = {"text": 1, "printed": 2}  # slots that a turn moves on


@dataclass(frozen=True)
class TreeKV(Evicting):
    """Winners of neighbours that compete in turns (TreeKV).

    block: tokens that are judged together after a prompt or chunk. index_rule: "text" or "printed", see the module.
    """

    name: ClassVar[str] = "treekv"
    least_window: ClassVar[int] = 0
    takes_turns: ClassVar[bool] = True

    block: int = 32
    index_rule: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("block", self.block, 1, "tokens")
        if self.index_rule not in RULES:
            raise ValueError(f'index_rule is "text" or "printed", got {self.index_rule!r}')

    def needs(self) -> Needs:
        return super().needs() | Needs(mass=True, votes=(self.block,))

    def worth(self, held: Held) -> torch.Tensor:
        """What a token is worth beside its neighbour: float [batch, kv_heads, n]."""
        return held.mean_mass()

    def score(self, held: Held) -> torch.Tensor:
        assert held.turn is not None
        worth = self.worth(held)
        last = worth.shape[2] - 1
        left = (self.sinks + held.turn)[:, None, None].expand(-1, worth.shape[1], 1)
        a, b = (worth.gather(2, slot.clamp(max=last)) for slot in (left, left + 1))
        paired = left + 1 < (held.lengths - self.window)[:, None, None]  # where one may go and none may stay, it goes
        loser = (left + ((a > b) & paired)).clamp(max=last)
        return torch.zeros_like(worth).scatter(2, loser, -1.0)

    def next_turn(self, held: Held) -> torch.Tensor:
        assert held.turn is not None
        assert held.room is not None
        return (held.turn + RULES[self.index_rule]) % held.room

    def choose(self, held: Held, free: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        stays = free.expand(-1, held.k.shape[1], -1).clone()
        gone = free.sum((1, 2)) - keep
        if held.turn is None:  # pages: no pass of its own has judged them
            votes = self.worth(held)
        else:
            stays &= (self.score(held) >= 0) | (gone == 0)[:, None, None]
            votes = held.columns[votes_of(self.block)] / held.age().clamp(max=self.block)
        alike: dict[tuple[int, int], list[int]] = {}  # rows whose blocks compete side by side
        for row, (over, stay) in enumerate(torch.stack([gone, keep], 1).tolist()):
            if held.turn is None or over > 1:
                alike.setdefault((over + stay, stay), []).append(row)
        for (n, stay), rows in alike.items():
            own = slice(self.sinks, self.sinks + n)
            stays[rows, :, own] = self.thinned(votes[rows, :, own].flatten(0, 1), stay).unflatten(0, (len(rows), -1))
        return stays

    def thinned(self, worth: torch.Tensor, keep: int) -> torch.Tensor:
        """Which `keep` tokens of worth [heads, n] stay: bool, as worth."""
        _heads, n = worth.shape
        if keep in (0, n):
            return torch.full_like(worth, keep == n, dtype=torch.bool)
        block = min(self.block, max(1, keep // 2))
        whole_blocks = n // block * block
        room = (keep - (n - whole_blocks)) // block
        score = worth[:, :whole_blocks].unflatten(1, (-1, block)).mean(-1)
        stays = torch.ones_like(worth, dtype=torch.bool)
        stays[:, :whole_blocks] = knockout(score, room, RULES[self.index_rule]).repeat_interleave(block, 1)
        dropped = ~stays
        fill = keep - (n - whole_blocks) - room * block
        return stays | (dropped & (dropped.flip(1).cumsum(1).flip(1) <= fill))


def knockout(score: torch.Tensor, room: int, stride: int = 1) -> torch.Tensor:
    """Which `room` of n entries stay that come one by one, when each one too many makes two neighbours compete: bool,
    as score [heads, n]. stride: slots from one competition to the next."""
    heads, n = score.shape
    alive, entries = torch.arange(n, device=score.device).expand(heads, n), torch.arange(n, device=score.device)
    alive, turn, come = alive[:, :room], 0, room
    while come < n:
        new = min(room, n - come) if stride == 1 else 1  # at stride 1 a round's competitions do not meet
        alive = torch.cat([alive, entries[come : come + new].expand(heads, new)], 1)
        pairs = alive[:, turn : turn + 2 * new].unflatten(1, (new, 2))
        worth = score.gather(1, pairs.flatten(1)).unflatten(1, (new, 2))
        winners = torch.where(worth[..., 0] > worth[..., 1], pairs[..., 0], pairs[..., 1])
        alive = torch.cat([alive[:, :turn], winners, alive[:, turn + 2 * new :]], 1)
        turn, come = 0 if stride == 1 else (turn + stride) % room, come + new
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, alive, True)
