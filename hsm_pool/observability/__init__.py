"""What operators see of a running pool: log lines, metrics and traces. None of it holds a secret."""
