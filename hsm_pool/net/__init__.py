"""The gRPC front: thin services over the core, interceptors, TLS."""
