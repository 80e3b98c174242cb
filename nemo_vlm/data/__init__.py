"""Records to batches: reading, order, padding. Families' processors are handed in."""
