"""The partition process: where store, crypto, ceremonies and the network front meet."""
