"""What a fine-tuning changes: low-rank pairs and dense differences, on layers, on disk, merged."""
