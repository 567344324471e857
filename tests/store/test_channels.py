import pytest
import torch

from longwave.store.channels import ChannelSplit

TABLES = {
    "even": torch.tensor([[True, False, True, False], [False, False, True, True]]),
    "ragged": torch.tensor([[True, True, True, False], [False, False, False, True], [True, False, False, False]]),
    "all-and-none": torch.tensor([[True] * 4, [False] * 4, [True] * 4]),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_split_and_join(name):
    split = ChannelSplit(TABLES[name])
    heads = TABLES[name].shape[0]
    x = torch.arange(2 * heads * 5 * 4).view(2, heads, 5, 4)
    parts = list(split.split(x))
    assert sum(kept.shape[1] * kept.shape[3] for kept, _ in parts) == split.total_kept == int(TABLES[name].sum())
    assert sum(comp.shape[1] * comp.shape[3] for _, comp in parts) == split.total_comp
    assert torch.equal(split.join(parts), x)
    for group, (kept, _) in zip(split.groups, parts, strict=True):
        for i, head in enumerate(group.heads.tolist()):
            assert torch.equal(kept[:, i], x[:, head][..., TABLES[name][head]])
    assert torch.equal(split.stack(list(split.select(x))), x)


def test_equal_counts_share_a_group():
    assert len(ChannelSplit(TABLES["even"]).groups) == 1
    assert len(ChannelSplit(TABLES["ragged"]).groups) == 2


def test_wrong_table():
    with pytest.raises(ValueError, match="bool table"):
        ChannelSplit(torch.ones(2, 4))
