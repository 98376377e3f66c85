"""The replicated store: etcd, sealed records, the hash chain and freshness leases."""
