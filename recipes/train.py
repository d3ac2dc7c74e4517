"""Pretrain BERT on this machine: `python -m trustratio.recipes.train`, on its GPUs or in two CPU processes."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.training.start", cluster=True, launches=True)
