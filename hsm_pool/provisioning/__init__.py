"""Making and running a pool on one machine: identities, files, supervisor."""
