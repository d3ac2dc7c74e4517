"""LAMB under DistributedDataParallel, on GPUs or without: torchrun --nproc_per_node 2 docs/examples/with_ddp.py."""

import os

import torch
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LAMB

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
optimizer = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)  # before or after wrapping
wrapped = DistributedDataParallel(model)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(ranks)[rank].to(device)
y = x.sin().sum(1, keepdim=True)
for step in range(20):
    loss = torch.nn.functional.mse_loss(wrapped(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {optimizer.trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
