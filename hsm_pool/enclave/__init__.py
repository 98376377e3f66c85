"""What ties a partition to its code and its peers: evidence and healing."""
