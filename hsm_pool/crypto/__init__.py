"""Cryptographic operations and key custody, on top of pyca/cryptography."""
