"""Tests of the Managed HSM pool simulator."""
