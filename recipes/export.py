"""Write a checkpoint as a folder that transformers loads: `python recipes/export.py runs/lamb-tiny-1 exported`.

Model, tokenizer and model card are in it: `AutoModelForMaskedLM.from_pretrained("exported")`.
"""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.training.export")
