"""Describe model families; load, build and save models; list layers that share a format; free and
measure memory."""
