"""Backups: everything that leaves a partition is encrypted to the security domain."""
