"""The search for a plan: searchers, trials and their records."""
