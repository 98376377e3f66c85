"""Firmware: versioned images of the distribution, published as TUF metadata, verified by partitions."""
