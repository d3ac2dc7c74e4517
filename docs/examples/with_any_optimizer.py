"""TrustRatio around AdamW under FSDP2: torchrun --nproc_per_node 2 docs/examples/with_any_optimizer.py."""

import os

import torch
from torch.distributed.fsdp import fully_shard

from trustratio.optimizers import TrustRatio

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
mesh = torch.distributed.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
fully_shard(model, mesh=mesh)
# Any element-wise optimizer class: torch's, timm's, your own. Around AdamW it is LAMB.
optimizer = TrustRatio(torch.optim.AdamW, model.named_parameters(), lr=0.02, eps=1e-6, weight_decay=0.0)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(mesh.size())[mesh.get_rank()].to(device)
y = x.sin().sum(1, keepdim=True)
for step in range(20):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if mesh.get_rank() == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {optimizer.trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
