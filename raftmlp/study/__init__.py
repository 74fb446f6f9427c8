"""Studies: the same training for several networks or settings and several seeds, and what came out of it."""
