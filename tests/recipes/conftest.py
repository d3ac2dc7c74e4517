"""A small text folder, a cache of its own, and helpers that build rows and vocabularies."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.distributed.pool import Pools
from trustratio.recipes.data.masking import Vocabulary

_WORDS = (
    "layer wise large batch optimizer trust ratio norm weight gradient update shard rank exact step decay warm "
    "learning rate sequence token mask model train loss data text word piece vocabulary encoder attention head"
)


def sentences(seed: int, count: int) -> str:
    """Return paragraphs of random sentences over a small vocabulary, the same for the same seed."""
    generator = random.Random(seed)
    words = _WORDS.split()
    lines = []
    for _ in range(count):
        lines.append(" ".join(generator.choice(words) for _ in range(generator.randint(4, 12))).capitalize() + ".")
        if generator.random() < 0.3:
            lines.append("")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        (folder / f"part{number}.txt").write_text(sentences(number, 500))
    return folder


@pytest.fixture(scope="session")
def pools():
    """Pools of one and of two ranks, which the files here share."""
    pools = Pools(at_once=2)
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def vocabulary():
    """Ids 0-4 are special, 4 is the mask, 5-99 are ordinary."""
    return Vocabulary(4, np.arange(5), np.arange(5, 100))


@pytest.fixture
def rows():
    """Packed rows (200, 16) of a made-up vocabulary of 100 tokens."""
    packed = np.random.default_rng(0).integers(5, 100, size=(200, 16)).astype(np.uint16)
    packed[:, 0], packed[:, -1] = 2, 3
    return packed
