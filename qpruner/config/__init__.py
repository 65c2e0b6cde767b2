"""Define a run's configuration.

Its fields are in `schema`, the rules between keys in `rules`, loading and overrides in `load`.
"""

from qpruner.config import rules as rules
