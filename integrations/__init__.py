"""One module per wrapper that shards a model; each explains its tensors to the optimizers. Import what you use."""
