"""A run: its folder, records, events, log, lock and storage."""
