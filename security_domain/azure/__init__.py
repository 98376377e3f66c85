"""Azure's own security-domain format, both ways: document, transfer key and restore blob.

Specified in FORMAT.md, section "Azure's format". Like the rest of the library it does no
network I/O; what reads secrets is meant for a short-lived process.
"""
