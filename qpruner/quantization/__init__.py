"""Quantize groups of layers at every bit-width into a bank of files; from it assemble models of mixed bit-widths."""
