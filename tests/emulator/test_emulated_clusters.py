"""The emulator's clusters of blocks: that they run together, and what it finds."""

import math

import pytest
import torch

import emulated


def cluster_sum(x, ranks, mistake="none"):
    y = torch.full((len(x) // ranks, 768), math.nan)
    emulated._call(90, "emulated_cluster_sum", *map(emulated._pointer, (x, y)), len(x), ranks, mistake.encode())
    return y


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_blocks_add_what_others_have(ranks):
    x = torch.randint(-50, 50, (3 * ranks, 768)).float()
    expected = x.view(3, ranks, 768).sum(1)
    expected[:, ::4] += sum(range(ranks))
    for _ in range(10):  # orders of events
        assert torch.equal(cluster_sum(x, ranks), expected)


RACE = "(read|write) of byte .* of shared memory of rank .*(nothing orders it|which a copy under way is to write)"
MISTAKES = {
    "no_barrier": RACE,
    "block_barrier_alone": RACE,
    "barrier_not_awaited": f"{RACE}|has ended without a barrier.cluster.wait",
    "waits_without_arriving": "barrier.cluster.wait without an arrive before",
    "arrives_twice": "barrier.cluster.arrive behind another one",
    "block_ends_early": "thread .* of rank .* reads shared memory of rank .*, and nothing keeps that block from ending",
    "overwritten": "(write|read) of byte .* of rank .*, and nothing orders it behind the (read|write) by",
    "rank_too_large": "mapa to rank 2 of a cluster of 2",
    "through_a_pointer": "store of 1 bytes at -?[0-9]+ of shared memory, of which there are 3080 bytes",
    "static_variable": "access to a __shared__ variable in a cluster",
    "some_threads_do_not_arrive": "deadlock: ",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_clusters_are_found(mistake):
    x = torch.zeros(4, 768)
    for _ in range(10):
        with pytest.raises(emulated.RuleBroken, match=MISTAKES[mistake]):
            cluster_sum(x, 2, mistake)


@pytest.mark.parametrize("blocks,ranks", [(3, 2), (16, 16)])
def test_clusters_that_cannot_be_launched(blocks, ranks):
    with pytest.raises(emulated.RuleBroken, match=f"a launch of {blocks} blocks in clusters of {ranks}"):
        cluster_sum(torch.zeros(blocks, 768), ranks)
