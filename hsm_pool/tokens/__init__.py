"""Bearer tokens: how a partition verifies them, and the small issuer of the development profile."""
