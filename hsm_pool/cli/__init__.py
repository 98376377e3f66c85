"""The mhsm command."""
