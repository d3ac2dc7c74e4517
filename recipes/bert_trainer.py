"""Pretrain BERT through the Hugging Face Trainer: `deepspeed --num_gpus 2 recipes/bert_trainer.py`.

Also `accelerate launch --config_file CONFIG recipes/bert_trainer.py` with one of recipes/configs, and `torchrun`, which
means DeepSpeed as for `bert.py`. The options are those of `bert.py`.
"""

from trustratio.recipes.common.script import follow_accelerate_to_cpu, run

if __name__ == "__main__":
    follow_accelerate_to_cpu()
    run("trustratio.recipes.training.bert_trainer", opening="trustratio.recipes.configuration.opening", cluster=True)
