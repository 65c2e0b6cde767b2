"""Everything that imports Ray: connection, tasks, nodes, the search under Tune."""
