"""The same as pai-bench status, from a checkout."""

from pai_bench.commands.status import main

if __name__ == "__main__":
    main()
