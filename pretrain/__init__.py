"""Training a model on token shards with DeepSpeed; knows nothing of how an architecture works inside."""
