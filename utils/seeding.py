"""Randomness as a function of where one is, not of what ran before.

Every sample and every training step seeds the generators from (seed, position). Nothing needs to be saved to
resume: step
12 of epoch 3 draws the same numbers whether or not the run was killed in between, and a sample is augmented alike
whatever the number of workers or processes.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch (all devices) from a tuple of non-negative integers."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


# What NumPy draws from inside `seeded`, which each sample enters: to exchange generators costs a tenth of what it costs
# to copy one's state out and in again.
INSIDE = np.random.MT19937(0)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU generators inside the block and puts them back as they were after it.

    But for the second of a pair of normals, which NumPy keeps for the next call: it is drawn anew.
    """
    before = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    np.random.set_bit_generator(np.random.MT19937(0) if before[1] is INSIDE else INSIDE)
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.default_generator.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_bit_generator(before[1])
        torch.set_rng_state(before[2])
