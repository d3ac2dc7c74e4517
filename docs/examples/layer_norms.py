"""Norms of whole layers, with AdamW under FSDP2: torchrun --nproc_per_node 2 docs/examples/layer_norms.py."""

import os

import torch
from torch.distributed.fsdp import fully_shard

from trustratio.integrations.layer_norms import LayerNorms

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
mesh = torch.distributed.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
optimizer = torch.optim.AdamW(fully_shard(model, mesh=mesh).parameters(), lr=0.02)
norms = LayerNorms(optimizer, model)
# or tensorboard=, wandb=, log=...; python -m trustratio.integrations.layer_norms report layer_norms.jsonl makes a page
norms.write_to(file="layer_norms.jsonl")
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(mesh.size())[mesh.get_rank()].to(device)
for step in range(20):
    loss = torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if mesh.get_rank() == 0:
        ratios = {name: layer.ratio for name, layer in norms.latest().items()}  # ‖Δw‖ / ‖w‖
        print(f"step {step} loss {loss.item():.4f} ratios {ratios}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
