"""The fabric controller: outside the boundary, sees the enclave interface only."""
