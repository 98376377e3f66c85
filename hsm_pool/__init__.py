"""The Managed HSM pool simulator: partitions, node agents, clients and command line.

Start reading at :mod:`hsm_pool.core` (what is decided), then
:mod:`hsm_pool.store` (how decisions are committed and how a partition knows that
it is fresh), then :mod:`hsm_pool.partition` (the process in which both meet).
"""
