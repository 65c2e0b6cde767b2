"""Define a run's configuration: its fields (`schema`), rules between keys (`rules`), loading and
overrides (`load`)."""

from qpruner.config import rules as rules
