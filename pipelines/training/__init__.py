"""Training, by the noun that flows: recipe -> samples -> batches -> updates -> checkpoints -> registered model."""
