"""The proof that the fabric controller is blind: ``./scripts/prove-blind`` (G3, G5)."""
