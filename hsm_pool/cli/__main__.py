"""``python -m hsm_pool.cli`` is the mhsm command."""

from hsm_pool.cli.main import main

main()
