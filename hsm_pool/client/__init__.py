"""Typed clients of a pool, synchronous and asyncio."""
