"""Two gloo processes against one on the joined batch: global weights, SAM under DDP, the queue of PaCo."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyvitfast.distill import SAM, DeiTLTLoss, PaCo

COUNTS = [500, 200, 50, 10, 2]


def student_step(wrap, part):
    """Gradient of a linear model with two heads."""
    torch.manual_seed(0)
    model = wrap(nn.Linear(6, 10, dtype=torch.float64))
    images, teacher = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    labels = torch.randint(5, (8,))
    loss = DeiTLTLoss(COUNTS, drw_epoch=0, weight_norm="global")
    loss(model(images[part]).chunk(2, 1), labels[part], teacher[part]).backward()
    return [p.grad for p in model.parameters()]


def sam_steps(wrap, part):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double())
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.5)
    images, labels = torch.randn(3, 8, 6, dtype=torch.float64), torch.randint(5, (3, 8))
    for x, y in zip(images, labels):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


def queue(_, part):
    torch.manual_seed(0)
    paco = PaCo(
        timm.create_model("resnet20_cifar", num_classes=5, in_chans=1), COUNTS, queue=12, dim=4
    ).eval()
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(5, (8,))
    with torch.no_grad():
        paco(images[part], images[part], labels[part])
    paco.advance()
    return [paco.queue, paco.queue_labels]


PARTS = {"loss": student_step, "sam": sam_steps, "queue": queue}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        part = slice(4 * rank, 4 * rank + 4)
        found = {name: run(DistributedDataParallel, part) for name, run in PARTS.items()}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, (tmp_path,), nprocs=2)
    for name, run in PARTS.items():
        expected = run(lambda model: model, slice(0, 8))
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            for one, other in zip(found, expected, strict=True):
                # The divisor is float32, and the queue's encoder; SAM is float64 throughout.
                torch.testing.assert_close(one, other, rtol=1e-12 if name == "sam" else 1e-5, atol=1e-6)
