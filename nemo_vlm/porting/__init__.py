"""Command lines of other systems as ours. Needs neither torch nor Hydra: it reads words and prints one line."""
