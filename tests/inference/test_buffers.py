"""Memory that decodes use one after another."""

import gc

import numpy as np

from lightning_mue.inference.buffers import Buffers


class Owner:
    """What something is lent to."""


def where(array):
    return array.__array_interface__["data"][0]


def test_what_is_lent_is_nobody_elses_until_its_owner_is_gone():
    buffers, first, second = Buffers(), Owner(), Owner()
    a = buffers.lend(first, (3, 4), np.float32)
    b = buffers.lend(second, (3, 4), np.float32)
    c = buffers.lend(second, (5,), np.uint16)
    a[:], b[:], c[:] = 1, 2, 3
    assert (a.shape, a.dtype, c.shape, c.dtype) == ((3, 4), np.float32, (5,), np.uint16)
    assert [{*x.tolist()} for x in (a.ravel(), b.ravel(), c)] == [{1.0}, {2.0}, {3}]
    assert all(x.flags.c_contiguous for x in (a, b, c))
    places = {where(b), where(c)}
    del b, c, second
    gc.collect()
    again = Owner()
    assert {where(buffers.lend(again, (12,), np.float32)), where(buffers.lend(again, (2,), np.uint16))} == places
    assert (a == 1).all()


def test_the_smallest_that_fits_is_lent_and_one_too_small_makes_room():
    buffers = Buffers()

    def lent(*sizes):
        owner = Owner()
        return [where(buffers.lend(owner, (size,), np.uint8)) for size in sizes]

    small, large = lent(100_000, 900_000)
    assert lent(90_000, 800_000) == [small, large]
    assert lent(200_000) == [large]
    assert lent(200_000, 300_000)[0] == large  # and what was small is as large as was asked for
    assert sorted(block.nbytes for block in buffers._free) == [300_000, 900_000]
