"""Security-domain ceremonies: the short-lived child and the parent that drives it."""
