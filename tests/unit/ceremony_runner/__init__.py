"""Ceremony plans, runner and transcripts."""
