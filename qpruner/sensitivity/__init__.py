"""How much each group loses at fewer bits, by several methods, and the plan that each suggests."""
