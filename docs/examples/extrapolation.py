"""Extrapolated LAMB under DDP: torchrun --nproc_per_node 2 docs/examples/extrapolation.py."""

import os

import torch
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LAMB, Extrapolation

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
optimizer = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)
# or direction="own_gradient", where each rank moves by its own; or "noise"
extrapolation = Extrapolation(optimizer, step_size=0.01)
model = DistributedDataParallel(model)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(ranks)[rank].to(device)
for step in range(20):
    with extrapolation:  # the model computes with the moved weights
        loss = torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        loss.backward()
    optimizer.step()  # from the original ones
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {optimizer.trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
