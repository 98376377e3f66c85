"""Processes of a node and what the agent tells the other partitions."""
