"""The parts of scripts/compare: the work that everybody does, who does it, and what came out."""
