"""Every op and its gradient on tiny inputs, without pytest: what ThreadSanitizer has time for."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from tests.ops.table import cloned, outputs_of
from tests.ops.test_every_op import TABLES, functions, require_grad

MOST_ELEMENTS = 3000


def size(tree: object) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))


def main() -> None:
    calls = 0
    for table in TABLES.values():
        for sample in table.samples:
            args, kwargs = sample.make(torch.float32)
            if not 0 < size((args, kwargs)) <= MOST_ELEMENTS:
                continue
            outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
            calls += 1
            if table.inputs is not None:
                leaves = require_grad(table, args)
                out = outputs_of(table, functions(table)[0], args, kwargs)
                torch.autograd.grad(torch.cat([o.flatten() for o in out]).sum(), leaves, allow_unused=True)
                calls += 1
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
