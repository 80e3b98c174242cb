"""The training of any family: one Lightning module, losses, schedules, callbacks, what is kept of a run."""
