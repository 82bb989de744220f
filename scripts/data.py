"""The same as pai-bench data, from a checkout."""

from pai_bench.commands.data import main

if __name__ == "__main__":
    main()
