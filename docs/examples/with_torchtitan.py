"""LAMB in torchtitan's container, with or without GPU: torchrun --nproc_per_node 2 docs/examples/with_torchtitan.py."""

import os

import torch
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer

from trustratio.integrations.torchtitan import layerwise

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
mesh = torch.distributed.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
fully_shard(model, mesh=mesh)  # in torchtitan: the parallelize function of the model
optimizers = layerwise("lamb", lr=0.02, weight_decay=0.0).build(model_parts=[model])
schedule = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0).build(optimizers=optimizers, training_steps=20)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(mesh.size())[mesh.get_rank()].to(device)
y = x.sin().sum(1, keepdim=True)
for step in range(20):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step(), schedule.step(), optimizers.zero_grad()
    if mesh.get_rank() == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {next(iter(optimizers)).trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
