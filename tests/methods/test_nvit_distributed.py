"""Two gloo processes against one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyvitfast.prune import NViTPruner
from pyvitfast.prune.shards import whole


def run(wrap, part, steps=6, membership="subset"):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=4, num_classes=10
    )
    for parameter in model.double().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    handle = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    pruner = NViTPruner(handle, interval=2, groups_per_step=3, membership=membership)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)[part]
        y = torch.randint(10, (8,), generator=generator)[part]
        optimizer.zero_grad()
        F.cross_entropy(handle(x), y).backward()
        pruner.step(optimizer)
    scores = pruner.state_dict()["ema"]
    removed = [(r["structure"], r["units"]) for entry in pruner.history for r in entry["removed"]]
    for name, parameter in model.named_parameters():
        state = whole(optimizer.state[parameter]["momentum_buffer"])
        assert torch.equal(state == 0, whole(parameter.detach()) == 0) or "blocks" not in name
    slim = pruner.compact(None if isinstance(handle, FSDPModule) else optimizer)
    return scores, removed, slim.state_dict()


def split(model):
    """FSDP of each block and of the rest; 2 processes, so that class token and qkv are cut unevenly."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPS = {"ddp": DistributedDataParallel, "fsdp": split}


def worker(rank, world, folder, mode, membership="subset"):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        part = slice(4 * rank, 4 * rank + 4)
        if mode in WRAPS:
            torch.save(run(WRAPS[mode], part, membership=membership), f"{folder}/{rank}.pt")
        else:
            try:
                run(lambda model: model, part)
            except RuntimeError as error:
                torch.save(str(error), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("membership", ["subset", "full"])
@pytest.mark.parametrize("mode", list(WRAPS))
def test_two_processes_equal_one(tmp_path, mode, membership):
    """Also where gradients are split: squares of partial sums would not add up to the square of the sum."""
    mp.spawn(worker, (2, tmp_path, mode, membership), nprocs=2)
    scores, removed, weights = run(lambda model: model, slice(0, 8), membership=membership)
    assert len(removed) == 9
    for rank in range(2):
        other_scores, other_removed, other_weights = torch.load(tmp_path / f"{rank}.pt")
        assert other_removed == removed
        torch.testing.assert_close(other_scores, scores, rtol=1e-6, atol=1e-18)
        for name in weights:
            torch.testing.assert_close(other_weights[name], weights[name], rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_processes_that_disagree_are_told(tmp_path):
    mp.spawn(worker, (2, tmp_path, "no averaging"), nprocs=2)
    for rank in range(2):
        assert "masks must be equal on all processes" in torch.load(tmp_path / f"{rank}.pt")
