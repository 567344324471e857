"""What a pass takes for the time that it runs: counted, and never held twice."""

import weakref

import torch

from longwave.frame.scratch import Scratch


def test_the_old_one_goes_before_the_new_one_comes():
    scratch, like = Scratch(), torch.zeros(1, 2, 5, 8)
    k, v = scratch.take(like, 10)
    assert k.shape == v.shape == (1, 2, 10, 8)
    assert scratch.most == 2 * 2 * 10 * 8 * 4
    first = weakref.ref(scratch._held[0])
    del k, v

    class Watched:
        shape, device, dtype = like.shape, like.device, like.dtype

        def new_empty(self, count):
            assert first() is None
            return like.new_empty(count)

    k, _ = scratch.take(Watched(), 30)
    assert scratch.most == 3 * 2 * 2 * 10 * 8 * 4
    assert scratch.take(like, 20)[0].data_ptr() == k.data_ptr()  # it is large enough
    assert sum(x.nbytes for x in scratch.tensors()) == scratch.most
    assert scratch.take(like.double(), 5)[0].dtype == torch.float64
    scratch.clear()
    assert not scratch.tensors()
