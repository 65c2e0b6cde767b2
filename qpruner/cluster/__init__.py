"""Everything that imports Ray: the connection, tasks, checks of nodes, and the search under Ray
Tune."""
