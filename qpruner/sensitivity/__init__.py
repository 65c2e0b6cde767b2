"""How much each group suffers at fewer bits, by several methods, and the plan that each of them suggests."""

from qpruner.sensitivity.seeds import seed_origin, seed_plan

__all__ = ["seed_origin", "seed_plan"]
