"""The audit log: every authenticated operation, in a tree that cannot be rewritten unnoticed (G7)."""
