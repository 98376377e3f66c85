"""Chaos: histories of a real pool under faults, and the checker that judges them."""
