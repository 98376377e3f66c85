"""Decisions without I/O: key life cycle, drains, freshness leases."""
