"""Randomness as a function of where one is, not of what ran before.

Every sample and every training step seeds the generators from (seed, position). Nothing needs to be saved to resume:
step 12 of epoch 3 draws the same numbers whether or not the run was killed in between, and a sample is augmented alike
whatever the number of workers or processes.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch (all devices) from a tuple of non-negative integers."""
    torch.manual_seed(_seed_python_and_numpy(key))


def _seed_python_and_numpy(key: tuple[int, ...]) -> int:
    """Returns torch's seed."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    return int(state[0]) << 31 | int(state[1]) >> 1


# NumPy's generator inside `seeded`, which every sample enters: to exchange generators takes a tenth of the time that it
# takes to copy a generator's state out and in again.
INSIDE = np.random.MT19937(0)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU generators inside the block and restores them after it.

    NumPy's cached second normal of a pair is not restored: it is drawn anew.
    """
    before = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    np.random.set_bit_generator(np.random.MT19937(0) if before[1] is INSIDE else INSIDE)
    torch.default_generator.manual_seed(_seed_python_and_numpy(key))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_bit_generator(before[1])
        torch.set_rng_state(before[2])
