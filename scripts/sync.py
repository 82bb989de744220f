"""The same as pai-bench sync, from a checkout."""

from pai_bench.commands.sync import main

if __name__ == "__main__":
    main()
