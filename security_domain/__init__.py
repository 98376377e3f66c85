"""The security domain as a leaf library, usable on an offline machine."""
