"""Describe model families; load, build and save models; list the layer groups of a plan; free and measure memory."""
