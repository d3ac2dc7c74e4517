"""LAMB through Accelerate: accelerate launch --multi_gpu --num_processes 2 docs/examples/with_accelerate.py.

The same command works without a GPU, where `--cpu` would start a single process.
"""

import torch
from accelerate import Accelerator

from trustratio.optimizers import LAMB

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
lamb = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)  # before prepare, which may wrap the model
x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(x, x.sin().sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(data, batch_size=256)
model, optimizer, loader = accelerator.prepare(model, lamb, loader)
for step in range(20):
    for x, y in loader:  # one batch per rank
        loss = torch.nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"step {step} loss {loss.item():.4f} ratios {lamb.trust_ratios()}")
accelerator.wait_for_everyone()  # a rank that leaves while others still talk to it may abort
accelerator.end_training()
