"""``python -m fabric_controller`` is ``mhsm-fabric``."""

from fabric_controller.cli import main

if __name__ == "__main__":
    main()
