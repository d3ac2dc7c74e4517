"""LAMB under DeepSpeed ZeRO-2, on two GPUs: deepspeed --num_gpus 2 docs/examples/with_deepspeed.py.

On the CPU: DS_ACCELERATOR=cpu deepspeed --num_gpus 2 docs/examples/with_deepspeed.py
"""

import deepspeed
import torch

from trustratio.optimizers import LAMB

CONFIG = {"train_micro_batch_size_per_gpu": 256, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(engine.world_size)[engine.global_rank].to(engine.device)
y = x.sin().sum(1, keepdim=True)
for step in range(20):
    loss = torch.nn.functional.mse_loss(engine(x), y)
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {optimizer.trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
