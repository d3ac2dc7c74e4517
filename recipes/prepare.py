"""Write text as token shards that training maps into memory: `python -m trustratio.recipes.prepare --help`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.data.prepare")
