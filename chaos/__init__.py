"""Breaks things on purpose and judges what happened, from outside: uses only what users can use."""
