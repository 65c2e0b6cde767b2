"""How much each group loses at fewer bits, by several methods, and the plan that each suggests."""

from qpruner.sensitivity.seeds import seed_origin, seed_plan

__all__ = ["seed_origin", "seed_plan"]
