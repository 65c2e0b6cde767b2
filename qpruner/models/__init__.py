"""Describe model families; load, build and save models; list layers that share a bit-width; free and measure memory."""
