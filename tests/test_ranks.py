"""Two real processes that train one network (gloo, DDP): the same mask on both, and the one that a single process would find."""

import copy
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import anymask
from anymask.cli.ranks import leave
from anymask.ranks import from_rank, mean_over_ranks, on_any_rank, together

METHODS = {"rigl": {}, "set": {}, "gmp": {"sparsity": 0.8}}
STEPS = 7


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def mask_of(method, seed=0):
    return anymask.prune(net(), "random", sparsity=0.0 if method == "gmp" else 0.6, seed=seed)


def train(network, model, method, *, seed, rank=None, parts=1, spoil=None):
    """Masks after each step, weights at the end, and the steps of the moves; with a `rank`, on its half of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold = anymask.hold(mask_of(method, seed).broadcast(), model, optimizer)
    rewiring = anymask.rewire(hold, method, total_steps=STEPS, every="2it", end="100%", seed=seed, **METHODS[method])
    if spoil is not None:
        model[0].weight.register_hook(spoil)
    masks = []
    for x in batches():
        mine = x if rank is None else x.chunk(2)[rank]
        optimizer.zero_grad()
        for number, part in enumerate(mine.chunk(parts), 1):
            wait = network.no_sync() if rank is not None and number < parts else torch.enable_grad()
            with wait:
                ((network(part) - 1).square().mean() / parts).backward()
        optimizer.step()
        masks.append({name: hold.mask[name] for name in hold.mask})
    return {"masks": masks, "weights": copy.deepcopy(model.state_dict()), "steps": [move.step for move in rewiring.history]}


def on_both(rank, folder):
    """All that this file looks at, on one of two ranks, left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mask = anymask.Mask({"w": torch.arange(12).reshape(3, 4) % (rank + 2) == 0}, info={"seed": rank})
    found = {
        "helpers": [together(), from_rank(rank), from_rank(rank, 1), mean_over_ranks(torch.tensor([1.0, 3.0 * rank])).tolist()],
        "flags": on_any_rank([rank == 1, False, True], device=torch.device("cpu")),
        "broadcast": [(m["w"], m.info["seed"]) for m in (mask.broadcast(), mask.broadcast(1))],
    }
    for method in METHODS:
        for parts in (1, 2):
            model = net()
            found[f"{method} {parts}"] = train(DistributedDataParallel(model), model, method, seed=0, rank=rank, parts=parts)
        model = net()
        found[f"{method} of two seeds"] = train(DistributedDataParallel(model), model, method, seed=rank, rank=rank)
    heard = iter(range(STEPS))  # rank 1 alone meets NaN in the second step, at a place that is pruned
    place = tuple((~mask_of("rigl")["0.weight"]).nonzero()[0].tolist())
    spoil = (lambda g: _with(g, place, math.nan) if next(heard) == 1 else g) if rank == 1 else None
    model = net()
    found["rigl with NaN"] = train(DistributedDataParallel(model), model, "rigl", seed=0, rank=rank, spoil=spoil)
    leave()
    torch.save(found, f"{folder}/rank{rank}.pt")


def _with(gradient, place, value):
    gradient = gradient.clone()
    gradient[place] = value
    return gradient


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")  # imports torch once, and forks from a process of one thread
    context.set_forkserver_preload(["torch.distributed", "torch.nn.parallel", "anymask.pruning.rewiring"])
    processes = [context.Process(target=on_both, args=(rank, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def same(first, second):
    assert first["steps"] == second["steps"]
    for ours, theirs in zip(first["masks"], second["masks"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, value in second["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-9, atol=1e-12)


def test_a_process_of_its_own_agrees_with_itself():
    mask = anymask.Mask({"w": torch.eye(2)})
    assert not together()
    assert mask.broadcast() is mask
    assert from_rank(3, 1) == 3
    assert mean_over_ranks(torch.tensor([2.0])).tolist() == [2.0]


def test_ranks_agree(both):
    assert [found["helpers"] for found in both] == [[True, 0, 1, [1.0, 1.5]]] * 2
    assert [found["flags"] for found in both] == [[True, False, True]] * 2


def test_a_mask_is_that_of_one_rank_on_all(both):
    for source in (0, 1):
        kept = torch.arange(12).reshape(3, 4) % (source + 2) == 0
        for found in both:
            assert torch.equal(found["broadcast"][source][0], kept)
            assert found["broadcast"][source][1] == source


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_mask_moves_equally_on_both_ranks_and_as_in_one_process_with_twice_the_batch(both, method, parts):
    alone = train(model := net(), model, method, seed=0)
    assert alone["steps"] == [2, 4, 6] + [7] * (method == "gmp")
    for found in both:
        same(found[f"{method} {parts}"], alone)


@pytest.mark.parametrize("method", METHODS)
def test_where_seeds_differ_the_mask_is_that_of_rank_0(both, method):
    first, second = (found[f"{method} of two seeds"] for found in both)
    same(first, second)
    same(first, both[0][f"{method} 1"])


def test_a_move_that_one_rank_cannot_make_is_put_off_on_both(both):
    first, second = (found["rigl with NaN"] for found in both)
    same(first, second)
    assert first["steps"] == [3, 4, 6]
