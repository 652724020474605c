"""Backends: other engines that serve the same requests, each behind one file that bears its name."""
