"""Everything that imports Ray: connection, tasks, checks of nodes, and the search by Ray Tune."""
