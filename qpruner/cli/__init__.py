"""Define the command line and its output."""
