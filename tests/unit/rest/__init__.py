"""Tests of the REST front without a pool."""
