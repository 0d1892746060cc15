"""What caches hold and take, while they do: a timeline, a map, metrics."""
