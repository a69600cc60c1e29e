"""What lies inside a delta: singular values, ranks, sizes."""
