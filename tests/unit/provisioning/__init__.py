"""Certificates, data directory, ports, etcd and settings of a new pool."""
