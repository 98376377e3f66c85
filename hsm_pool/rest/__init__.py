"""The front for Azure's clients: a part of the Key Vault REST API over the same core as gRPC."""
