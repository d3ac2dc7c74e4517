"""Steps by curvature under DeepSpeed ZeRO-2, on two GPUs: deepspeed --num_gpus 2 docs/examples/curvature.py.

On the CPU: DS_ACCELERATOR=cpu deepspeed --num_gpus 2 docs/examples/curvature.py
"""

import deepspeed
import torch

from trustratio.optimizers import CurvatureSGD

CONFIG = {"train_micro_batch_size_per_gpu": 256, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = CurvatureSGD(model.named_parameters(), lr=0.3, momentum=0.0, interval=5)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
samples = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
x = samples.chunk(engine.world_size)[engine.global_rank].to(engine.device)
y = x.sin().sum(1, keepdim=True)
for step in range(20):
    wanted = optimizer.wants_curvature()  # before forward
    engine.backward(loss := torch.nn.functional.mse_loss(engine(x), y))
    engine.step()  # where one is wanted, this only moves the weights
    if wanted:
        with optimizer.curvature():
            engine.backward(torch.nn.functional.mse_loss(engine(x), y))
            engine.step()
    if engine.global_rank == 0:
        print(f"step {step} loss {loss.item():.4f} ratios {optimizer.trust_ratios()}")
torch.distributed.barrier()  # a rank that leaves while others still talk to it may abort
torch.distributed.destroy_process_group()
