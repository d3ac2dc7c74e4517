"""Pretrain BERT with a layer-wise optimizer under DeepSpeed: `deepspeed --num_gpus 2 recipes/bert.py`.

Without arguments: a tiny BERT on the documentation of the installed Python packages, in minutes on two CPU cores.
`--help` lists the options.
"""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.training.bert", opening="trustratio.recipes.configuration.opening", cluster=True)
