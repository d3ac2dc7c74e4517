"""One module or folder per wrapper that shards a model or trains it. Import what you use."""
