"""Pretrain BERT through Accelerate: `accelerate launch --config_file CONFIG recipes/bert_accelerate.py`.

CONFIG is one of recipes/configs: ZeRO-1, 2, 3 through DeepSpeed, or plain DDP. The options are those of `bert.py`.
"""

from trustratio.recipes.common.script import follow_accelerate_to_cpu, run

if __name__ == "__main__":
    follow_accelerate_to_cpu()
    run("trustratio.recipes.training.bert_accelerate", opening="trustratio.recipes.configuration.opening", cluster=True)
