"""The run's configuration: fields (`schema`), what goes with what (`rules`), reading and overriding (`load`)."""

from qpruner.config import rules as rules
