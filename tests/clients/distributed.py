"""Run by `torch.distributed.run` with two processes: DDP and FSDP2 over gloo, on CPUs, against one process.

`python -m torch.distributed.run --nproc-per-node 2 -m tests.clients.distributed FOLDERS OUT`: FOLDERS is JSON (mode ->
folder); OUT gets, for every mode and wrapper, the largest difference of its logits, and of its gradients (relative to
the largest one), from those of the model alone on the whole batch, and whether the surgery is in effect after a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import regsurgery
from tests.clients.conftest import opened, photos


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def compared(folder: Path, mode: str, how: str) -> dict[str, float | bool]:
    rank, images, labels = dist.get_rank(), photos(4), torch.arange(4)
    alone, model = opened(folder), opened(folder)
    expected = alone(pixel_values=images).logits
    cross_entropy(expected, labels).backward()
    if how == "DDP":
        # As Trainer does: transformers' DINOv2, which is what mode native writes, has a mask token that nothing reads.
        wrapped: Any = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in next(model.children()).get_submodule("layers" if mode != "native" else "encoder.layer"):  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    mine = slice(2 * rank, 2 * rank + 2)
    logits = wrapped(pixel_values=images[mine]).logits
    cross_entropy(logits, labels[mine]).backward()
    gradients = {name: whole(one.grad) for name, one in model.named_parameters() if one.grad is not None}
    wanted = {name: one.grad for name, one in alone.named_parameters() if one.grad is not None}
    assert gradients.keys() == wanted.keys()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    held = mode == "stock" or bool(
        regsurgery.still_patched(model, images, run=lambda pixels: wrapped(pixel_values=pixels))
    )
    return {
        "logits": float((logits - expected[mine]).abs().max().detach()),
        "gradients": max(float((gradients[name] - wanted[name]).abs().max()) for name in wanted)
        / max(float(one.abs().max()) for one in wanted.values()),
        "held": held,
    }


def main() -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    folders, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    results = {
        f"{mode} {how}": compared(Path(folder), mode, how)
        for mode, folder in folders.items()
        for how in ("DDP", "FSDP2")
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
