"""Ceremonies by a written plan: people confirm each step, and a signed transcript says what was done."""
