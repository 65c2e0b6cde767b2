"""Pack groups of layers in every format into a bank of files; from it assemble models of mixed
formats."""
