"""Describe, load, build and save models; list their groups of layers; free and measure memory."""
