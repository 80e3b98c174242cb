"""Model families: a folder each. `base.family(name)` opens one."""
