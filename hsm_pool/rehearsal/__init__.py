"""Disaster recovery, rehearsed end to end: lose a pool, and get everything back in another one."""
