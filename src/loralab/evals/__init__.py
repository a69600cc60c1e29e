"""What was learned and what was forgotten: probes, scores, statistics."""
