"""Click prediction at 1x to 128x the batch with CowClip: `python recipes/click_through.py --help`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.studies.click_through")
